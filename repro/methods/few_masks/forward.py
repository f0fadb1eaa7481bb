"""What the few-mask methods share: their parts, learning rates, the crops of a step and CutMix with a second batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repro.data.mask_views import Crop, MaskViews, paste
from repro.train import Items, Method, PixelLabels


class MaskMethod(Method):
    """A method that segments from few masks.

    settings: the method's own. network: a DeepLabV3+. views: made on its device. classes: K, with the background.
    labelled_loss: (logits (B, K, H, W), labels (B, H, W) with 255) -> scalar.
    head_factor: learning rate outside the backbone, as a multiple of the backbone's.
    """

    def __init__(
        self, settings: Any, network: nn.Module, views: MaskViews, classes: int,
        labelled_loss: Callable[[Tensor, Tensor], Tensor], head_factor: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes
        self.labelled_loss, self.head_factor = labelled_loss, head_factor

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        """Labelled and unlabelled images, and a second unlabelled batch in an order of its own for CutMix."""
        count = recipe.batch * recipe.unlabelled_ratio
        return {
            "labelled": (pool.labelled, recipe.batch),
            "unlabelled": (pool.unlabelled, count),
            "mix": (pool.unlabelled, count),
        }

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Backbone and head; weight decay on everything, batch norms included (released codes)."""
        return [
            {"params": list(self.network.backbone.parameters()), "weight_decay": weight_decay, "lr_factor": 1.0},
            {"params": self.network.head_parameters(), "weight_decay": weight_decay, "lr_factor": self.head_factor},
        ]

    def crops(self, batch: dict[str, Items]) -> list[Crop]:
        """Scaled, padded, cropped and flipped: one crop a stream, in their order."""
        return [self.views.crop(items.images, items.labels) for items in batch.values()]


@dataclass(frozen=True)
class PixelTargets:
    """Pseudo-labels of a batch of crops.

    label: (B, H, W) int64; weight: (B, H, W) in [0, 1] or bool; confidence: (B, H, W); valid: (B, H, W) bool.
    """

    label: Tensor
    weight: Tensor
    confidence: Tensor
    valid: Tensor

    def pasted(self, other: "PixelTargets", box: Tensor) -> "PixelTargets":
        """The targets of `other` inside the CutMix box (B, H, W) bool."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return PixelTargets(*(paste(mine, theirs, box) for mine, theirs in pairs))

    def report(self, index: Tensor, crop: Crop) -> dict[str, PixelLabels]:
        """What the monitor is told of these targets. index: (B,) pool indices of the crops."""
        pixels = PixelLabels(index, self.label, self.weight, self.confidence, self.valid, crop.window)
        return {"pixels": pixels}


def threshold_targets(logits: Tensor, padding: Tensor, threshold: float) -> PixelTargets:
    """Pseudo-labels whose softmax probability reaches a threshold.

    logits: (B, K, H, W) of a weak view, whose gradient is cut here; padding: (B, H, W) bool. threshold: in [0, 1].
    Source: FixMatch and UniMatch (released code of UniMatch).
    """
    confidence, label = logits.detach().float().softmax(1).max(1)
    return PixelTargets(label, (confidence >= threshold) & ~padding, confidence, ~padding)


@torch.no_grad()
def detached(network: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, K, H, W) in float32, without gradient, in whatever mode the network is."""
    return network(images).float()
