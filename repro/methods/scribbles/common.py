"""What methods for scribbles share: losses, settings by scribble length, the class that turns a batch into views."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from repro.arrays import at_least_float32
from repro.data.mask_views import Crop, MaskViews, Photometric, hide
from repro.recipe import ScribbleRecipe
from repro.train import Items, Losses, Method, Now

# Losses


def outlier_model(epsilon: float, classes: int) -> tuple[float, float]:
    """a and b of P(x) = a + b s_x.

    epsilon: in [0, (C - 1) / C], where b is exactly 0 at the upper end. Raises ValueError outside.
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; a label can be wrong only if there are 2 or more")
    limit = (classes - 1) / classes
    if not 0 <= epsilon <= limit:
        raise ValueError(
            f"epsilon is {epsilon}; with {classes} classes it must lie in [0, {limit:.6g}], where the robust loss is "
            "constant: convert a value for another number of classes with rescaled_epsilon"
        )
    return epsilon / (classes - 1), 1 - epsilon / limit


def rescaled_epsilon(epsilon: float, from_classes: int = 21, to_classes: int = 21) -> float:
    """The epsilon for `to_classes` whose b / a, the slope of the robust loss at s_x = 0, is that of `from_classes`.

    With r = b / a it is (C - 1) / (C + r) (derived). from_classes: 21 for published values. 0 stays 0, and
    (C - 1) / C goes to (C - 1) / C. Raises ValueError as `outlier_model`.
    """
    a, b = outlier_model(epsilon, from_classes)
    if to_classes < 2:
        raise ValueError(f"to_classes is {to_classes}; it must be 2 or more")
    if to_classes == from_classes:
        return epsilon
    return min((to_classes - 1) * a / (to_classes * a + b), (to_classes - 1) / to_classes)


def robust_surprise(log_probs: Tensor, epsilon: float, classes: int) -> Tensor:
    """-log(a + b s), of any shape, from log s.

    Its derivative in log s is -b s / (a + b s), in [-1, 0]: it vanishes with s, where cross-entropy has -1. epsilon 0
    gives -log s exactly, (C - 1) / C the constant log C without gradient.
    """
    a, b = outlier_model(epsilon, classes)
    log_a, log_b = (math.log(value) if value > 0 else -math.inf for value in (a, b))
    return -torch.logaddexp(torch.full_like(log_probs, log_a), log_probs + log_b)


def pixel_loss(log_probs: Tensor, labels: Tensor, epsilon: float = 0.0, soften: float = 0.0) -> Tensor:
    """The robust loss of each pixel, (B, H, W); 0 where the label counts for nothing.

    log_probs: (B, C, H, W), log softmax. labels: (B, H, W).
    soften: share of the label that is spread evenly over all C classes, label smoothing for epsilon 0. It is a switch
        of the released code, whose formula for epsilon > 0 is not known; this one was chosen here.
    """
    classes = log_probs.shape[1]
    known = labels < classes
    chosen = torch.where(known, labels.long(), 0)[:, None]
    loss = robust_surprise(log_probs.gather(1, chosen)[:, 0], epsilon, classes)
    if soften:
        loss = (1 - soften) * loss + soften * robust_surprise(log_probs, epsilon, classes).mean(1)
    return torch.where(known, loss, 0.0)


def partial_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the labelled pixels of a batch: their mean, over B; 0 where there are none.

    logits: (B, C, H, W). labels: (B, H, W).
    The released code divides its mean by the batch size once more; learning rates and weights belong to that.
    """
    loss = pixel_loss(at_least_float32(logits).log_softmax(1), labels)
    return loss.sum() / ((labels < logits.shape[1]).sum().clamp(min=1) * len(logits))


def proposal_losses(
    logits: Tensor, scribbles: Tensor, proposals: Tensor, epsilon: float, soften: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Both parts of L_B, scalars: cross-entropy on the seeds, and the robust loss on the proposals elsewhere.

    logits: (B, C, H, W). scribbles, proposals: (B, H, W). epsilon, soften: of the proposals.
    Both are sums over B and the batch's number of *seeds*, so proposals weigh by their number. A batch without a seed
    has no such scale, so both parts are 0 (chosen here; the released code divides by zero).
    """
    classes = logits.shape[1]
    log_probs = at_least_float32(logits).log_softmax(1)
    seeds = scribbles < classes
    divisor = seeds.sum().clamp(min=1) * len(logits)
    rest = torch.where(seeds, classes, proposals.long())
    on_seeds = pixel_loss(log_probs, scribbles).sum()
    others = seeds.any() * pixel_loss(log_probs, rest, epsilon, soften).sum()
    return on_seeds / divisor, others / divisor


# Settings by scribble length

PUBLISHED_CLASSES = 21


@dataclass(frozen=True)
class Tuned:
    """epsilon: probability that a proposal label is wrong. gamma: weight of the network's prediction in stage A."""

    epsilon: float
    gamma: float


# share of each scribble that is left, 0 a click -> values of the released README
PUBLISHED = {
    1.0: Tuned(0.9440, 0.05),
    0.8: Tuned(0.9460, 0.075),
    0.5: Tuned(0.9514, 0.1),
    0.3: Tuned(0.9516, 0.1),
    0.0: Tuned(0.9522, 0.1),
}


def tuned_for(length: float, classes: int = PUBLISHED_CLASSES) -> Tuned:
    """The published gamma, and the published epsilon rescaled to C = `classes`.

    length: one of the published ones; ValueError for others, since both values were tuned for each length alone.
    """
    if length not in PUBLISHED:
        known = ", ".join(f"{known:g}" for known in sorted(PUBLISHED))
        raise ValueError(f"length is {length}; published values are for {known}: for another set epsilon and gamma")
    found = PUBLISHED[length]
    return Tuned(rescaled_epsilon(found.epsilon, PUBLISHED_CLASSES, classes), found.gamma)


# Steps

# Robust Trust Region's colours: a blur of radius U(0, 1) or nothing. A deviation of 0 cannot be divided by.
BLUR = Photometric(jitter=0, grey=0, blur=0.5, sigma_low=1e-3, sigma_high=1.0)


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
    """A method that segments from scribbles; each defines its second stage in `second`.

    settings: the method's own; its `rate` is the second stage's learning rate over the recipe's. network: a
    DeepLabV3+. views: made on its device. classes: C, with the background. size: (N, H, W) of the pool's images,
    for methods that keep a label map of each.
    """

    # the kind of `labels` that the pool must have: "scribbles", or "masks" for full supervision alone
    supervision: ClassVar[str] = "scribbles"

    def __init__(
        self, settings: Any, network: nn.Module, views: MaskViews, classes: int, recipe: ScribbleRecipe,
        size: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes
        self.start_steps, self.head_factor, self.blur = recipe.start_steps, recipe.head_factor, recipe.blur
        self.workers = recipe.workers
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))  # resuming skips begin_stage

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
        backbone, head = list(self.network.backbone.parameters()), self.network.head_parameters()
        parts = (backbone, rate), (head, self.head_factor * rate)
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
