"""Pseudo-Label (Lee, ICML workshop 2013) as the toolboxes run it: confident classes become their own targets.

Lee's text has no threshold: every sample counts, only the weight ramps up. USB and TorchSSL add FixMatch's.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from repro.data.augment import Views
from repro.methods.few_labels.fixmatch import consistency_loss, pseudo_label
from repro.models.modes import held_statistics
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class PseudoLabelSettings:
    threshold: float = hyper(0.95, "tau", "released code (USB, TorchSSL); Lee: 0", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "alpha_f", "released code (USB, TorchSSL); Lee: 3", low=0)
    ramp: float = hyper(0.4, "T_2", "released code (USB, TorchSSL), fraction of training", low=0, high=1)

    def __post_init__(self):
        check(self)


def linear_ramp(progress: float, length: float) -> float:
    """min(1, progress / length): weight of an unlabelled loss, 0 at the start.

    progress, length: fractions of training in [0, 1]; length 0: no ramp.
    Source: released code (USB, TorchSSL).
    """
    return min(1.0, progress / length) if length > 0 else 1.0


class PseudoLabel(Method):
    """L = CE(labelled) + ramp * weight * mean_b 1[m_b >= tau] CE(argmax z_b, z_b), z of a weak view."""

    Settings = PseudoLabelSettings

    def __init__(
        self, settings: PseudoLabelSettings, network: nn.Module, views: Views, classes: int, pool_size: int
    ):
        super().__init__()
        self.settings, self.network, self.views = settings, network, views

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits = self.network(self.views.weak(labelled.images)).float()
        with held_statistics(self.network):
            own_logits = self.network(self.views.weak(unlabelled.images)).float()
        label, confidence = pseudo_label(own_logits)
        mask = confidence >= settings.threshold
        weight = settings.unlabelled_weight * linear_ramp(now.progress, settings.ramp)
        return Losses(
            {
                "supervised": F.cross_entropy(logits, labelled.labels),
                "pseudo_label": weight * consistency_loss(own_logits, label, mask),
            },
            {"positive": PseudoLabels(unlabelled.index, label, mask, confidence)},
        )
