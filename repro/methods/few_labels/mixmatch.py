"""MixMatch (Berthelot et al., NeurIPS 2019): guess labels from several views, sharpen, mix all with all."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.common import (
    Checked,
    FewLabels,
    align,
    chunked_logits,
    follow,
    linear_ramp,
    mixup,
    probabilities,
    sharpen,
    squared_error,
)
from repro.models.modes import held_statistics
from repro.settings import hyper
from repro.train import Items, Losses, Now, PseudoLabels

# MixMatch


@dataclass(frozen=True)
class MixMatchSettings(Checked):
    augmentations: int = hyper(2, "K", "MixMatch; released code", low=1)
    temperature: float = hyper(0.5, "T", "MixMatch; released code", low=1e-2)
    alpha: float = hyper(0.5, "alpha", "released code (MixMatch, USB, TorchSSL)", low=1e-2)
    unlabelled_weight: float = hyper(100.0, "lambda_U", "released code (MixMatch, TorchSSL)", low=0)
    ramp: float = hyper(0.4, "", "released code (USB, TorchSSL); MixMatch's: 1/64 of training", low=0, high=1)
    interleave: bool = hyper(True, "", "released code (MixMatch, TorchSSL); USB: False")


@torch.no_grad()
def guess(network: nn.Module, views: list[Tensor]) -> Tensor:
    """Mean softmax (U, K) over views of the unlabelled images, without gradient or trace in the BN averages.

    views: K tensors (U, C, H, W), one forward each. Source: MixMatch, Eq. 6; BN as in TorchSSL.
    """
    with held_statistics(network):
        return torch.stack([network(view).float().softmax(dim=1) for view in views]).mean(dim=0)


def mixed_logits(method: FewLabels, labelled: Items, target: Tensor, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and targets (n, K) of a weak view of the labelled images (the first B rows) and of `views`, all mixed.

    target: (U, K), of each of the views (U, C, H, W). Source: MixMatch, Algorithm 1.
    """
    settings, size = method.settings, len(labelled.images)
    truth = torch.eye(method.classes, device=target.device)[labelled.labels]
    own = method.views.weak(labelled.images)
    images, targets = mixup(torch.cat([own, *views]), torch.cat([truth, *[target] * len(views)]), settings.alpha)
    return chunked_logits(method.network, images, size, settings.interleave), targets


class MixMatch(FewLabels):
    """L = soft CE(mixed labelled) + ramp * weight * MSE(mixed unlabelled), both mixed with everything."""

    Settings = MixMatchSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        views = [self.views.weak(unlabelled.images) for _ in range(settings.augmentations)]
        probs = guess(self.network, views)
        target = sharpen(probs, settings.temperature)
        logits, targets = mixed_logits(self, labelled, target, views)
        size = len(labelled.images)
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


# ReMixMatch


@dataclass(frozen=True)
class ReMixMatchSettings(Checked):
    temperature: float = hyper(0.5, "T", "ReMixMatch; released code", low=1e-2)
    alpha: float = hyper(0.75, "alpha", "ReMixMatch; released code", low=1e-2)
    mixed_weight: float = hyper(1.5, "lambda_U", "ReMixMatch; released code", low=0)
    strong_weight: float = hyper(0.5, "lambda_U1", "ReMixMatch; released code", low=0)
    rotation_weight: float = hyper(0.5, "lambda_r", "ReMixMatch; released code", low=0)
    ramp: float = hyper(1 / 64, "", "released code (all three), fraction of training", low=0, high=1)
    marginal_decay: float = hyper(0.999, "", "USB, TorchSSL; paper: mean of 128 batches", low=0, high=1)
    interleave: bool = hyper(True, "", "released code (ReMixMatch, TorchSSL); USB: False")


class RotationNetwork(nn.Module):
    """A classifier with a second linear head on its features that names one of four rotations.

    network: has `features(images) -> (n, D)` and `head` with `in_features` = D; `forward` is its own.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.rotation = nn.Linear(network.head.in_features, 4)
        nn.init.xavier_normal_(self.rotation.weight)
        nn.init.zeros_(self.rotation.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (n, K) of normalised images (n, C, H, W)."""
        return self.network(images)

    def rotation_logits(self, images: Tensor) -> Tensor:
        """Logits (n, 4) of 0, 90, 180 and 270 degrees counter-clockwise."""
        return self.rotation(self.network.features(images))


def rotate(images: Tensor, quarters: Tensor) -> Tensor:
    """Each image turned counter-clockwise by its number of quarter turns.

    images: (n, C, S, S), square; quarters: (n,) int64 in 0..3. Source: ReMixMatch; the direction is TorchSSL's.
    """
    turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
    return turned[quarters, torch.arange(len(images), device=images.device)]


class ReMixMatch(FewLabels):
    """L = CE(mixed labelled) + r w_U CE(mixed unlabelled) + r w_U1 CE(strong) + w_r CE(rotation)."""

    Settings = ReMixMatchSettings

    def __init__(self, settings: ReMixMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, RotationNetwork(network), views, classes, pool_size)
        self.register_buffer("prior", torch.full((classes,), 1 / classes))
        self.register_buffer("marginal", torch.zeros(classes))

    def begin_stage(self, stage, pool):
        counts = torch.bincount(pool.labels[pool.labelled], minlength=self.classes)
        self.prior = counts / counts.sum()

    def target(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Aligned and then sharpened probabilities, (U, K) each; the running mean moves before it is used."""
        self.marginal = follow(self.marginal, probs, self.settings.marginal_decay)
        aligned = align(probs, self.prior, self.marginal)
        return aligned, sharpen(aligned, self.settings.temperature)

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        self.views.learn(probabilities(now.teacher), labelled.images, labelled.labels)
        weak = self.views.weak(unlabelled.images)
        strong, second = self.views.strong(unlabelled.images), self.views.strong(unlabelled.images)
        aligned, target = self.target(guess(self.network, [weak]))
        logits, targets = mixed_logits(self, labelled, target, [strong, second, weak])
        size = len(labelled.images)
        quarters = torch.randint(4, (len(strong),), device=strong.device)
        with held_statistics(self.network):
            strong_logits = self.network(strong).float()
            rotation_logits = self.network.rotation_logits(rotate(strong, quarters)).float()
        ramp = linear_ramp(now.progress, settings.ramp)
        confidence, label = aligned.max(dim=1)
        every = torch.ones_like(label, dtype=torch.bool)
        return Losses(
            {
                "supervised": F.cross_entropy(logits[:size], targets[:size]),
                "mixed": ramp * settings.mixed_weight * F.cross_entropy(logits[size:], targets[size:]),
                "strong": ramp * settings.strong_weight * F.cross_entropy(strong_logits, target),
                "rotation": settings.rotation_weight * F.cross_entropy(rotation_logits, quarters),
            },
            {"positive": PseudoLabels(unlabelled.index, label, every, confidence)},
        )
