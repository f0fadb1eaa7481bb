"""MixMatch (Berthelot et al., NeurIPS 2019): guess labels from several views, sharpen, mix all with all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.mean_teacher import squared_error
from repro.methods.few_labels.mixing import chunked_logits, mixup, sharpen
from repro.methods.few_labels.pseudo_label import linear_ramp
from repro.models.modes import held_statistics
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class MixMatchSettings:
    augmentations: int = hyper(2, "K", "MixMatch; released code", low=1)
    temperature: float = hyper(0.5, "T", "MixMatch; released code", low=1e-2)
    alpha: float = hyper(0.5, "alpha", "released code (MixMatch, USB, TorchSSL)", low=1e-2)
    unlabelled_weight: float = hyper(100.0, "lambda_U", "released code (MixMatch, TorchSSL)", low=0)
    ramp: float = hyper(0.4, "", "released code (USB, TorchSSL); MixMatch's: 1/64 of training", low=0, high=1)
    interleave: bool = hyper(True, "", "released code (MixMatch, TorchSSL); USB: False")

    def __post_init__(self):
        check(self)


@torch.no_grad()
def guess(network: nn.Module, views: list[Tensor]) -> Tensor:
    """Mean softmax (U, K) over views of the unlabelled images, without gradient or trace in the BN averages.

    views: K tensors (U, C, H, W), one forward each. Source: MixMatch, Eq. 6; BN as in TorchSSL.
    """
    with held_statistics(network):
        return torch.stack([network(view).float().softmax(dim=1) for view in views]).mean(dim=0)


class MixMatch(Method):
    """L = soft CE(mixed labelled) + ramp * weight * MSE(mixed unlabelled), both mixed with everything."""

    Settings = MixMatchSettings

    def __init__(
        self, settings: MixMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int
    ):
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        views = [self.views.weak(unlabelled.images) for _ in range(settings.augmentations)]
        probs = guess(self.network, views)
        target = sharpen(probs, settings.temperature)
        truth = torch.eye(self.classes, device=target.device)[labelled.labels]
        images, targets = mixup(
            torch.cat([self.views.weak(labelled.images), *views]),
            torch.cat([truth, *[target] * settings.augmentations]),
            settings.alpha,
        )
        size = len(labelled.images)
        logits = chunked_logits(self.network, images, size, settings.interleave)
        weight = settings.unlabelled_weight * linear_ramp(now.progress, settings.ramp)
        confidence, label = probs.max(dim=1)  # before sharpening: what the network believes
        every = torch.ones_like(label, dtype=torch.bool)
        return Losses(
            {
                "supervised": F.cross_entropy(logits[:size], targets[:size]),
                "consistency": weight * squared_error(logits[size:], targets[size:]),
            },
            {"positive": PseudoLabels(unlabelled.index, label, every, confidence)},
        )
