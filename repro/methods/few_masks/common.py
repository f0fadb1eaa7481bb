"""What methods for few masks share: the views of a batch, losses on pixels, threshold targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.mask_views import Crop, MaskViews, paste
from repro.data.masks import IGNORE
from repro.train import Items, Method, PixelLabels

# Losses

OHEM_THRESHOLD, OHEM_KEPT = 0.7, 200_000


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255; 0 where there are none.

    logits: (B, K, H, W); labels: (B, H, W) integers in [0, K) or 255.
    Source: UniMatch, CSL (released codes), which give NaN without a labelled pixel.
    """
    loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


def ohem(logits: Tensor, labels: Tensor, threshold: float = OHEM_THRESHOLD, kept: int = OHEM_KEPT) -> Tensor:
    """Cross-entropy over hard pixels only: those whose true class has a probability of at most `threshold`.

    logits: (B, K, H, W); labels: (B, H, W) integers in [0, K) or 255. threshold: in [0, 1].
    kept: at least as many pixels count, the hardest; all of them where fewer are labelled. Ties count together.
    Returns the mean over the pixels that count, 0 where there are none.
    Source: Cityscapes recipe of UniMatch and CSL (released codes).
    """
    labels = labels.long()
    known = labels != IGNORE
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    probability = torch.where(known, (-loss.detach()).exp(), torch.inf).flatten()
    if kept < probability.numel():
        # where fewer than `kept` are labelled the value is infinite, and every labelled pixel counts
        limit = probability.kthvalue(max(kept, 1)).values.clamp(min=threshold)
    else:
        limit = torch.inf
    hard = known & (probability.view_as(loss) <= limit)
    return torch.where(hard, loss, 0.0).sum() / hard.sum().clamp(min=1)


LABELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "ohem": ohem}


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """sum(weight * CE(logits, label)) / number of valid pixels: the divisor also counts pixels without weight.

    logits: (B, K, H, W); label: (B, H, W) int64; weight: (B, H, W) in [0, 1] or bool, 0 where not valid;
    valid: (B, H, W) bool. Returns 0 where nothing is valid (the released code: NaN).
    Source: UniMatch and CSL (released codes).
    """
    loss = F.cross_entropy(logits.float(), label, reduction="none")
    return (loss * weight).sum() / valid.sum().clamp(min=1)


# Forward passes


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
        """Labelled and unlabelled images, and a second unlabelled batch in its own order for CutMix."""
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
        """What the monitor compares with hidden masks. index: (B,) pool indices of the crops."""
        return {"pixels": PixelLabels(index, self.label, self.weight, self.confidence, self.valid, crop.window)}


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
