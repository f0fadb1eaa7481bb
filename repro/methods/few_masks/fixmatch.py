"""FixMatch on pixels, as UniMatch's code has it: confident pixels of the weak view label a strong CutMix view."""

from dataclasses import dataclass

import torch

from repro.data.mask_views import paste
from repro.methods.few_masks.forward import MaskMethod, detached, threshold_targets
from repro.methods.few_masks.losses import weighted_cross_entropy
from repro.models.modes import evaluating
from repro.settings import check, hyper
from repro.train import Items, Losses, Now


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
