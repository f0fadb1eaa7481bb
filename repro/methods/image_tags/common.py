"""What methods for image tags share: the trunk of a network, losses, the contrast of patches, and `TagMethod`.

There are C foreground classes, and N = h w patches of D features on a grid (h, w), row by row. Label maps hold 0 for
the background, c + 1 for class c and 255 for ignored pixels, as `repro.cam` makes them. Losses are scalars in float32
at least, also under autocast, and 0 where nothing counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.arrays import IGNORE, Items, at_least_float32
from repro.cam import bilinear, cam_labels, multi_scale_cam, raw_cam, refined_labels
from repro.data.mask_views import Crop, MaskViews
from repro.models.vit import Tokens, ViT, to_map
from repro.recipe import TagRecipe
from repro.solvers.crf import filter_exact
from repro.train import Method, Now

# The trunk


class Prediction(NamedTuple):
    """What a trunk makes of B images: logits (B, C) of the tags from the final and from the auxiliary patches,
    segmentation logits (B, C + 1, h, w), and the encoder's tokens."""

    logits: Tensor
    logits_aux: Tensor
    segmentation: Tensor
    tokens: Tokens


class Trunk(nn.Module):
    """Encoder, classifiers without bias behind a global maximum over patches, and the head that is evaluated.

    classes: C, without the background. head: (B, D, h, w) -> (B, C + 1, h, w).
    Source: released codes of ToCo, DuPL, SeCo and PCRE.
    """

    def __init__(self, encoder: ViT, classes: int, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.classifier = nn.Linear(encoder.width, classes, bias=False)
        self.classifier_aux = nn.Linear(encoder.width, classes, bias=False)

    def predict(self, x: Tensor) -> Prediction:
        """Tags, segmentation and tokens of normalised images x (B, 3, H, W)."""
        return self.predicted(self.encoder(x))

    def predicted(self, tokens: Tokens) -> Prediction:
        """The same from the encoder's tokens."""
        logits, logits_aux = self.classifier(tokens.patches.amax(1)), self.classifier_aux(tokens.auxiliary.amax(1))
        return Prediction(logits, logits_aux, self.head(to_map(tokens.patches, tokens.grid)), tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Segmentation logits (B, C + 1, H, W) at the size of normalised images x (B, 3, H, W)."""
        tokens = self.encoder(x)
        return bilinear(self.head(to_map(tokens.patches, tokens.grid)), (x.shape[2], x.shape[3]))

    def raw(self, tokens: Tokens) -> Tensor:
        """Main CAM (B, C, h, w), not rectified."""
        return raw_cam(tokens.patches, self.classifier.weight, tokens.grid)

    def raw_aux(self, tokens: Tokens) -> Tensor:
        """Auxiliary CAM (B, C, h, w), not rectified."""
        return raw_cam(tokens.auxiliary, self.classifier_aux.weight, tokens.grid)

    def both_cams(self, x: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Main and auxiliary CAM over scales and flips, (B, C, H, W) each, in [0, 1], from one pass a scale."""

        def raw(seen: Tensor) -> Tensor:
            tokens = self.encoder(seen)
            return torch.cat([self.raw(tokens), self.raw_aux(tokens)], 1)

        cam, aux = multi_scale_cam(raw, x, scales).chunk(2, 1)
        return cam, aux

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """The CAM (B, C, H, W) in [0, 1] that is evaluated, of normalised images x (B, 3, H, W).

        tags: (B, C), for methods whose maps depend on them; this CAM does not.
        """
        return multi_scale_cam(lambda seen: self.raw(self.encoder(seen)), x, scales)


# Losses


ENERGY_SCALE = 1e-7  # of the dense energy, inside its released layer
SIGMA_RGB, SIGMA_XY = 15.0, 100.0  # of the dense energy: colours in 0..255, pixels


def tag_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """L_cls, multi-label soft margin: binary cross-entropy of sigmoid(logits), mean over images and classes.

    logits, tags: (B, C). Source: released codes.
    """
    logits = at_least_float32(logits)
    return F.binary_cross_entropy_with_logits(logits, tags.to(logits.dtype))


def tag_terms(predicted: Prediction, tags: Tensor) -> dict[str, Tensor]:
    """L_cls of the final and of the auxiliary patches. tags: (B, C)."""
    return {"tags": tag_loss(predicted.logits, tags), "tags_aux": tag_loss(predicted.logits_aux, tags)}


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_seg: half the mean cross-entropy over background pixels and half that over all foreground pixels.

    logits: (B, K, H, W). labels: (B, H, W) integers in [0, K), or 255 for ignored pixels.
    Means are sums over (count + 1e-6), so a side without pixels is 0. Source: DuPL and PCRE (released codes); ToCo's
    is NaN then.
    """
    labels = labels.long()
    loss = F.cross_entropy(at_least_float32(logits), labels, ignore_index=IGNORE, reduction="none")
    sides = labels == 0, (labels != 0) & (labels != IGNORE)
    back, front = (torch.where(side, loss, 0).sum() / (side.sum(dtype=loss.dtype) + 1e-6) for side in sides)
    return 0.5 * back + 0.5 * front


def dense_energy(probs: Tensor, images: Tensor, labels: Tensor, roi: Tensor) -> Tensor:
    """L_reg, the gated dense CRF energy E = -1 / B sum p gate (K p) at half the size, a scalar, not positive.

    probs: p (B, K, H, W), softmax of the head. images: (B, 3, H, W), channels in 0..255.
    labels: (B, H, W), 255 for ignored pixels. roi: (B, H, W) bool, False on padding.
    p is resized bilinearly, the other maps by the nearest pixel. The gate has no gradient; it is 1 at ignored pixels,
    else max(0, roi - max_k p_k). As in the released code, the gradient is -2 gate (K p) / B, as if the gate were 1
    everywhere else. K is exact between all pixels, quadratic in their number; released codes filter by a permutohedral
    lattice. The released weight is 1e-7 at 448 x 448 pixels. Source: ToCo and PCRE (released codes); DuPL has none.
    """
    with torch.autocast(probs.device.type, enabled=False):
        probs = F.interpolate(at_least_float32(probs), scale_factor=0.5, mode="bilinear", align_corners=False)
        maps = (images.to(probs.dtype), roi[:, None].to(probs.dtype), labels[:, None].to(probs.dtype))
        images, inside, known = (F.interpolate(values, scale_factor=0.5) for values in maps)
        gate = (inside - probs.detach().amax(1, keepdim=True)).clamp(min=0).masked_fill(known == IGNORE, 1)
        probs = probs * inside
        with torch.no_grad():
            slope = gate * filter_exact(probs, images / SIGMA_RGB, SIGMA_XY / 2)
        energy = (probs * slope).sum() / len(probs)
        return energy.detach() - 2 * energy


# Contrast of patches


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """cos (..., n, m) of each pair of vectors (..., n, D) and (..., m, D); 0 for vectors of length 0."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = (F.normalize(at_least_float32(vectors), dim=-1, eps=1e-8) for vectors in (first, second))
        return first @ second.mT


def balanced_contrast(similarity: Tensor, alike: Tensor, apart: Tensor) -> Tensor:
    """.5 (1 - sum_alike a / (#alike + 1)) + .5 sum_apart a / (#apart + 1), a scalar over all entries.

    similarity: a, in [0, 1]; alike, apart: bool; shapes alike. .5 where there is no pair at all.
    Source: released codes (ToCo, DuPL, PCRE).
    """
    pull, push = (torch.where(mask, similarity, 0).sum() / (mask.sum() + 1) for mask in (alike, apart))
    return 0.5 * (1 - pull) + 0.5 * push


def patch_contrast(patches: Tensor, labels: Tensor) -> Tensor:
    """L_ptc on |cos(F_i, F_j)|: patches of one label, the background's included, are alike, others apart.

    patches: F (B, N, D). labels: (B, h, w) or (B, N) integers; a patch of 255, or with itself, makes no pair.
    Source: ToCo (released code).
    """
    labels = labels.flatten(1)
    seen = labels != IGNORE
    pairs = seen[:, :, None] & seen[:, None] & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    same = labels[:, :, None] == labels[:, None]
    return balanced_contrast(cosines(patches, patches).abs(), pairs & same, pairs & ~same)


# The method


FAST = {"classifier", "classifier_aux", "head", "projection"}  # parts of a parameter's name


@dataclass(frozen=True)
class View:
    """Normalised images x (B, 3, S, S), black where padded, the crop that they come from, and tags (B, C), floating."""

    x: Tensor
    crop: Crop
    tags: Tensor


class TagMethod(Method):
    """A method that segments from image tags.

    settings: the method's own. network: a trunk, or what a method makes of one. views: made on its device.
    recipe: gives thresholds, scales and the length of the warm-up.
    most: the largest number of classes in an image, if known: no label map is refined for more. None for all.
    """

    def __init__(
        self, settings: Any, network: nn.Module, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__()
        self.settings, self.network, self.views, self.recipe, self.most = settings, network, views, recipe, most

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        """One stream of all images, with tags as their labels."""
        return {"tagged": (pool.labelled, recipe.batch)}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Classifiers, heads and projections learn faster; weight decay acts on all parameters (released codes)."""
        fast, slow = [], []
        for name, value in self.named_parameters():
            if value.requires_grad:
                (slow if FAST.isdisjoint(name.split(".")) else fast).append(value)
        return [
            {"params": slow, "weight_decay": weight_decay, "lr_factor": 1.0},
            {"params": fast, "weight_decay": weight_decay, "lr_factor": self.recipe.head_factor},
        ]

    def learning(self, now: Now) -> bool:
        """Whether the warm-up is over, and the segmentation head learns."""
        return now.progress >= self.recipe.warm_up

    def crop(self, images: Tensor) -> Crop:
        """A random scale, crop and flip of images (B, 3, H, W) uint8. No mask takes part: methods have none."""
        return self.views.crop(images, torch.zeros_like(images[:, 0]))

    def view(self, items: Items) -> View:
        """Crops, with changed colours if the recipe asks for them, and their images' tags."""
        crop = self.crop(items.images)
        return View(self.views.strong(crop) if self.recipe.colour else self.views.weak(crop), crop, items.labels)

    def pixels(self, view: View) -> Tensor:
        """The view's images in [0, 1], for refinement and energy."""
        return (view.x * self.views.std[:, None, None] + self.views.mean[:, None, None]).clamp(0, 1)

    def labels(self, view: View, cam: Tensor, high: float | Tensor | None = None) -> Tensor:
        """Refined label map (B, S, S) of a CAM, 255 where undecided or padded, for the segmentation head.

        cam: (B, C, S, S) in [0, 1]. high: a number or (B,), None for the recipe's.
        """
        low, high = self.recipe.cam_low, self.recipe.cam_high if high is None else high
        valid = ~view.crop.padding
        return refined_labels(self.pixels(view), cam, view.tags, low, high, valid, most=self.most)

    def patch_labels(
        self, view: View, cam: Tensor, grid: tuple[int, int], high: float | Tensor | None = None
    ) -> Tensor:
        """Label map (B, h, w) of a CAM resized to the patch grid, not refined. cam, high: as in `labels`.

        A patch that holds padding is 255 (chosen here; released codes apply the box of pixels to the map of patches,
        which removes hardly any patch).
        """
        padded = F.adaptive_max_pool2d(view.crop.padding[:, None].float(), grid)[:, 0] > 0
        high = self.recipe.cam_high if high is None else high
        return cam_labels(bilinear(cam, grid), view.tags, self.recipe.cam_low, high, ~padded)

    def head_terms(self, logits: Tensor, labels: Tensor, view: View) -> dict[str, Tensor]:
        """L_seg, and L_reg if it has a weight, with the settings' weights. logits: (B, K, h, w); labels: (B, S, S)."""
        settings, logits = self.settings, bilinear(logits, (labels.shape[1], labels.shape[2]))
        terms = {"segmentation": settings.seg_weight * balanced_cross_entropy(logits, labels)}
        if settings.energy_weight:
            probs = at_least_float32(logits).softmax(1)
            energy = dense_energy(probs, 255 * self.pixels(view), labels, ~view.crop.padding)
            terms["energy"] = settings.energy_weight * (ENERGY_SCALE * energy)
        return terms
