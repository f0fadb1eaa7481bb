"""Supervised training, FixMatch and UniMatch for segmentation.

UniMatch (Yang et al., CVPR 2023): two strong CutMix views and a feature-perturbed one learn from the weak view.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repro.data.mask_views import paste
from repro.methods.few_masks.common import MaskMethod, detached, threshold_targets, weighted_cross_entropy
from repro.models.modes import evaluating
from repro.settings import check, hyper
from repro.train import Items, Losses, Now

# Supervised


@dataclass(frozen=True)
class SupervisedSettings:
    def __post_init__(self):
        check(self)


class Supervised(MaskMethod):
    """L = L_x."""

    Settings = SupervisedSettings

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        return {"labelled": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        (x,) = self.crops(batch)
        return Losses({"supervised": self.labelled_loss(self.network(self.views.weak(x)), x.masks)})


# FixMatch


@dataclass(frozen=True)
class FixMatchSettings:
    threshold: float = hyper(0.95, "tau", "UniMatch; 0 on Cityscapes", low=0, high=1)

    def __post_init__(self):
        check(self)


class FixMatch(MaskMethod):
    """L = (L_x + L_s) / 2."""

    Settings = FixMatchSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        x, u, mix = self.crops(batch)
        views, threshold = self.views, self.settings.threshold
        with evaluating(self.network):
            mix_targets = threshold_targets(detached(self.network, views.weak(mix)), mix.padding, threshold)
        both = self.network(torch.cat([views.weak(x), views.weak(u)]))
        logits, weak_logits = both.split([len(x.images), len(u.images)])
        targets = threshold_targets(weak_logits, u.padding, threshold)
        box = views.boxes(u)
        strong_logits = self.network(paste(views.strong(u), views.strong(mix), box))
        mixed = targets.pasted(mix_targets, box)
        terms = {
            "supervised": 0.5 * self.labelled_loss(logits, x.masks),
            "consistency": 0.5 * weighted_cross_entropy(strong_logits, mixed.label, mixed.weight, mixed.valid),
        }
        return Losses(terms, targets.report(batch["unlabelled"].index, u))


# UniMatch


@dataclass(frozen=True)
class UniMatchSettings:
    threshold: float = hyper(0.95, "tau", "UniMatch; 0 on Cityscapes", low=0, high=1)
    feature_perturbation: bool = hyper(True, source="UniMatch; off removes L_fp")

    def __post_init__(self):
        check(self)


class UniMatch(MaskMethod):
    """L = (L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2."""

    Settings = UniMatchSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        x, u, mix = self.crops(batch)
        views, settings, sizes = self.views, self.settings, [len(crop.images) for crop in (x, u)]
        with evaluating(self.network):
            mix_targets = threshold_targets(detached(self.network, views.weak(mix)), mix.padding, settings.threshold)
        clean = self.network(torch.cat([views.weak(x), views.weak(u)]), perturb=settings.feature_perturbation)
        clean, perturbed = clean if settings.feature_perturbation else (clean, None)
        logits, weak_logits = clean.split(sizes)
        targets = threshold_targets(weak_logits, u.padding, settings.threshold)
        boxes = [views.boxes(u), views.boxes(u)]
        strong = [paste(views.strong(u), views.strong(mix), box) for box in boxes]
        strong_logits = self.network(torch.cat(strong)).chunk(2)
        terms = {"supervised": 0.5 * self.labelled_loss(logits, x.masks)}
        for name, logits_s, box in zip(("consistency", "consistency_2"), strong_logits, boxes, strict=True):
            mixed = targets.pasted(mix_targets, box)
            terms[name] = 0.125 * weighted_cross_entropy(logits_s, mixed.label, mixed.weight, mixed.valid)
        if perturbed is not None:
            logits_fp = perturbed[sizes[0] :]
            terms["features"] = 0.25 * weighted_cross_entropy(logits_fp, targets.label, targets.weight, targets.valid)
        return Losses(terms, targets.report(batch["unlabelled"].index, u))
