"""What the steps of all image-tag methods share: the view, the labels that CAMs make, the losses of the head."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.cam import bilinear, cam_labels, refined_labels, widened
from repro.data.mask_views import Crop, MaskViews
from repro.methods.image_tags.losses import balanced_cross_entropy, dense_energy, tag_loss
from repro.methods.image_tags.trunk import Prediction
from repro.recipe import TagRecipe
from repro.train import Items, Method, Now

FAST = {"classifier", "classifier_aux", "head", "projection"}  # parts of a parameter's name
ENERGY_SCALE = 1e-7  # of the dense energy, inside its released layer


@dataclass(frozen=True)
class View:
    """x: normalised images (B, 3, S, S), black where padded. crop: where they come from. tags: (B, C), floating."""

    x: Tensor
    crop: Crop
    tags: Tensor


class TagMethod(Method):
    """A method that segments from image tags.

    settings: the method's own. network: a trunk, or what a method makes of one. views: made on its device.
    recipe: the thresholds, scales and the length of the warm-up are read.
    most: classes that an image shows at most, when known: no label map is refined for more. None for all.
    """

    def __init__(
        self, settings: Any, network: nn.Module, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__()
        self.settings, self.network, self.views, self.recipe, self.most = settings, network, views, recipe, most

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        """Every image, with its tags in place of a label."""
        return {"tagged": (pool.labelled, recipe.batch)}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Classifiers, heads and projections learn faster; weight decay on everything (released codes)."""
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
        """What a step learns from: crops, coloured if the recipe says so, and their images' tags."""
        crop = self.crop(items.images)
        return View(self.views.strong(crop) if self.recipe.colour else self.views.weak(crop), crop, items.labels)

    def pixels(self, view: View) -> Tensor:
        """The view's images in [0, 1], as refinement and energy need them."""
        return (view.x * self.views.std[:, None, None] + self.views.mean[:, None, None]).clamp(0, 1)

    def labels(self, view: View, cam: Tensor, high: float | Tensor | None = None) -> Tensor:
        """Refined label map (B, S, S) of a CAM, 255 where undecided or padded: what the segmentation head learns.

        cam: (B, C, S, S) in [0, 1]. high: in place of the recipe's, a number or (B,).
        """
        low, high = self.recipe.cam_low, self.recipe.cam_high if high is None else high
        valid = ~view.crop.padding
        return refined_labels(self.pixels(view), cam, view.tags, low, high, valid, most=self.most)

    def patch_labels(
        self, view: View, cam: Tensor, grid: tuple[int, int], high: float | Tensor | None = None
    ) -> Tensor:
        """Label map (B, h, w) of a CAM on the patch grid, not refined, for contrasts: the CAM is resized, then cut.

        cam, high: as for `labels`. A patch that holds padding is 255 (ours; released codes cut the pixels' box out of
        the patches' map, which takes hardly any patch away).
        """
        padded = F.adaptive_max_pool2d(view.crop.padding[:, None].float(), grid)[:, 0] > 0
        high = self.recipe.cam_high if high is None else high
        return cam_labels(bilinear(cam, grid), view.tags, self.recipe.cam_low, high, ~padded)

    def energy(self, logits: Tensor, labels: Tensor, view: View) -> Tensor:
        """L_reg of the head's logits (B, K, S, S) with the labels (B, S, S) that it learns."""
        probs = widened(logits).softmax(1)
        return ENERGY_SCALE * dense_energy(probs, 255 * self.pixels(view), labels, ~view.crop.padding)

    def head_terms(self, logits: Tensor, labels: Tensor, view: View) -> dict[str, Tensor]:
        """L_seg, and L_reg if it has a weight, by the settings' weights. logits: (B, K, h, w); labels: (B, S, S)."""
        logits = bilinear(logits, (labels.shape[1], labels.shape[2]))
        terms = {"segmentation": self.settings.seg_weight * balanced_cross_entropy(logits, labels)}
        if self.settings.energy_weight:
            terms["energy"] = self.settings.energy_weight * self.energy(logits, labels, view)
        return terms


def tag_terms(predicted: Prediction, tags: Tensor) -> dict[str, Tensor]:
    """L_cls and its auxiliary twin. tags: (B, C)."""
    return {"tags": tag_loss(predicted.logits, tags), "tags_aux": tag_loss(predicted.logits_aux, tags)}
