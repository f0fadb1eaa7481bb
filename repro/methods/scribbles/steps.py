"""What the scribble methods share: two stages, their learning rates, and the view that a step learns from.

Every method trains partial cross-entropy for `start_steps` steps, the same ones for a seed, then its own loss for the
recipe's `steps` with a fresh optimiser and schedule. So a run is complete in itself, regularised methods start where
partial cross-entropy stands, and all have one budget. The released code starts from a checkpoint instead.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from repro.data.mask_views import Crop, MaskViews, Photometric, hide
from repro.methods.scribbles.losses import partial_cross_entropy
from repro.train import Items, Losses, Method, Now

# Robust Trust Region's colours: a blur of radius U(0, 1) or nothing. A deviation of 0 cannot be divided by.
BLUR = Photometric(jitter=0, grey=0, blur=0.5, sigma_low=1e-3, sigma_high=1.0)


class Options(Protocol):
    """What these methods read of a recipe.

    start_steps: steps of partial cross-entropy at the start, 0 for none. head_factor: learning rate outside the
    backbone. blur: whether views have the colours of the `MaskViews`, made with strong=BLUR. workers: processes that
    solve stage A, 0 for none beside this one.
    """

    start_steps: int
    head_factor: float
    blur: bool
    workers: int


@dataclass(frozen=True)
class View:
    """index: (B,) pool indices. x: normalised images (B, 3, S, S), 0 where padded. crop: where they come from."""

    index: Tensor
    x: Tensor
    crop: Crop

    @property
    def roi(self) -> Tensor:
        """(B, S, S) bool, False on padding."""
        return ~self.crop.padding


class ScribbleMethod(Method):
    """A method that segments from scribbles; it says what its second stage is in `second`.

    settings: the method's own; its `rate` is the second stage's learning rate over the recipe's. network: a
    DeepLabV3+. views: made on its device. classes: C, with the background. size: (N, H, W) of the pool's images,
    for methods that keep a label map of each.
    """

    # what the pool's `labels` must be: "scribbles", or "masks" for full supervision alone
    supervision: ClassVar[str] = "scribbles"

    def __init__(
        self, settings: Any, network: nn.Module, views: MaskViews, classes: int, recipe: Options,
        size: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes
        self.start_steps, self.head_factor, self.blur = recipe.start_steps, recipe.head_factor, recipe.blur
        self.workers = recipe.workers
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # a resumed run is not told its stage

    def stages(self, steps: int) -> list[int]:
        return [self.start_steps, steps] if self.start_steps else [steps]

    def begin_stage(self, stage: int, pool: Any) -> None:
        self.stage.fill_(stage)

    def is_second(self, stage: int) -> bool:
        """Whether the start is over; without one it never was."""
        return stage == (1 if self.start_steps else 0)

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        """Every image, with its scribbles in place of a mask."""
        return {"scribbles": (pool.labelled, recipe.batch)}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Backbone and head; weight decay on everything, batch norms included (released code)."""
        rate = self.settings.rate if self.is_second(int(self.stage)) else 1.0
        parts = (
            (list(self.network.backbone.parameters()), rate),
            (self.network.head_parameters(), self.head_factor * rate),
        )
        return [{"params": part, "weight_decay": weight_decay, "lr_factor": factor} for part, factor in parts]

    def view(self, items: Items) -> View:
        """Scaled, padded, cropped, flipped, perhaps blurred. Padding is 0 after normalisation (released code)."""
        crop = self.views.crop(items.images, items.labels)
        x = self.views.strong(crop) if self.blur else self.views.weak(crop)
        return View(items.index, hide(x, crop.padding), crop)

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view = self.view(batch["scribbles"])
        logits = self.network(view.x)
        if self.is_second(now.stage):
            return self.second(view, logits)
        return Losses({"seeds": partial_cross_entropy(logits, view.crop.masks)})

    def second(self, view: View, logits: Tensor) -> Losses:
        """The method's own loss. logits: (B, C, S, S)."""
        raise TypeError(f"{type(self).__name__} does not define second()")
