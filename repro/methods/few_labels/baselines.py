"""Supervised training, Pseudo-Label, Mean Teacher and UDA."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repro.methods.few_labels.common import (
    Checked,
    FewLabels,
    consistency_loss,
    linear_ramp,
    pseudo_label,
    squared_error,
    three_views,
)
from repro.models.modes import held_statistics
from repro.settings import hyper
from repro.train import Items, Losses, Now, PseudoLabels

# Supervised


@dataclass(frozen=True)
class SupervisedSettings:
    """No hyper-parameter of its own."""


class Supervised(FewLabels):
    """L = mean_b CE(y_b, p(weak(x_b))) on the labelled images alone."""

    Settings = SupervisedSettings

    def streams(self, pool, recipe):
        return {"labelled": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        labelled = batch["labelled"]
        logits = self.network(self.views.weak(labelled.images)).float()
        return Losses({"supervised": F.cross_entropy(logits, labelled.labels)})


# Pseudo-Label


@dataclass(frozen=True)
class PseudoLabelSettings(Checked):
    threshold: float = hyper(0.95, "tau", "released code (USB, TorchSSL); Lee: 0", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "alpha_f", "released code (USB, TorchSSL); Lee: 3", low=0)
    ramp: float = hyper(0.4, "T_2", "released code (USB, TorchSSL), fraction of training", low=0, high=1)


class PseudoLabel(FewLabels):
    """L = CE(labelled) + ramp * weight * mean_b 1[m_b >= tau] CE(argmax z_b, z_b), z of a weak view."""

    Settings = PseudoLabelSettings

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


# Mean Teacher


@dataclass(frozen=True)
class MeanTeacherSettings(Checked):
    unlabelled_weight: float = hyper(50.0, "lambda_u", "released code (USB, TorchSSL)", low=0)
    ramp: float = hyper(0.4, "", "released code (USB, TorchSSL), fraction of training", low=0, high=1)


class MeanTeacher(FewLabels):
    """L = CE(labelled) + ramp * weight * MSE(student on one weak view, EMA teacher on another).

    Both passes over unlabelled images normalise by their own batch and leave the running averages alone: what
    TorchSSL calls freezing BN. The teacher is the network that the loop averages and evaluates.
    """

    Settings = MeanTeacherSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits = self.network(self.views.weak(labelled.images)).float()
        with torch.no_grad(), held_statistics(now.teacher):
            target = now.teacher(self.views.weak(unlabelled.images)).float().softmax(dim=1)
        with held_statistics(self.network):
            student_logits = self.network(self.views.weak(unlabelled.images)).float()
        confidence, label = target.max(dim=1)
        every = torch.ones_like(label, dtype=torch.bool)
        weight = settings.unlabelled_weight * linear_ramp(now.progress, settings.ramp)
        return Losses(
            {
                "supervised": F.cross_entropy(logits, labelled.labels),
                "consistency": weight * squared_error(student_logits, target),
            },
            {"positive": PseudoLabels(unlabelled.index, label, every, confidence)},
        )


# UDA


@dataclass(frozen=True)
class UDASettings(Checked):
    threshold: float = hyper(0.8, "beta", "UDA (CIFAR); released code (USB, TorchSSL)", low=0, high=1)
    temperature: float = hyper(0.4, "tau", "UDA (CIFAR); released code (TorchSSL)", low=1e-2)
    unlabelled_weight: float = hyper(1.0, "lambda", "UDA; released code", low=0)
    annealing: str = hyper(
        "none", "TSA", "released code (USB, TorchSSL): none", choices=("none", "linear", "exp", "log")
    )
    annealing_rule: str = hyper(
        "toolbox",
        "",
        "toolbox (USB, TorchSSL): top class, mean over B; paper (Google's): true class, mean over the kept",
        choices=("toolbox", "paper"),
    )


def annealed_threshold(schedule: str, progress: float, classes: int) -> float:
    """eta in [1/K, 1]: labelled samples predicted with more than this are left out.

    schedule: none (1), linear, exp or log; progress: in [0, 1]. Source: UDA (training signal annealing).
    """
    if schedule == "none":
        return 1.0
    share = {"linear": progress, "exp": math.exp(5 * (progress - 1)), "log": 1 - math.exp(-5 * progress)}[schedule]
    return share * (1 - 1 / classes) + 1 / classes


def annealed_loss(logits: Tensor, labels: Tensor, threshold: float, rule: str = "toolbox") -> Tensor:
    """Cross-entropy of the labelled samples whose probability is at most `threshold`.

    logits: (B, K); labels: (B,); rule: see `UDASettings.annealing_rule`. 0 when none is kept.
    Source: released code (TorchSSL; google-research/fixmatch).
    """
    probs = logits.detach().softmax(dim=1)
    known = probs.amax(dim=1) if rule == "toolbox" else probs.gather(1, labels[:, None])[:, 0]
    kept = (known <= threshold).to(logits.dtype)
    total = (F.cross_entropy(logits, labels, reduction="none") * kept).sum()
    return total / (len(logits) if rule == "toolbox" else kept.sum().clamp(min=1))


def soft_consistency_loss(strong_logits: Tensor, weak_logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """mean_b mask_b CE(softmax(weak_b / T), softmax(strong_b)) over all U samples.

    strong_logits, weak_logits: (U, K), the weak ones get no gradient; mask: (U,).
    Source: released code (TorchSSL). The paper's KL divergence differs by the target's entropy, a constant.
    """
    target = (weak_logits.detach() / temperature).softmax(dim=1)
    return (F.cross_entropy(strong_logits, target, reduction="none") * mask).mean()


class UDA(FewLabels):
    Settings = UDASettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits, weak_logits, strong_logits, _ = three_views(self.network, self.views, labelled, unlabelled, now.teacher)
        label, confidence = pseudo_label(weak_logits)
        mask = confidence >= settings.threshold  # on the prediction before sharpening
        eta = annealed_threshold(settings.annealing, now.progress, self.classes)
        consistency = soft_consistency_loss(strong_logits, weak_logits, mask, settings.temperature)
        return Losses(
            {
                "supervised": annealed_loss(logits, labelled.labels, eta, settings.annealing_rule),
                "consistency": settings.unlabelled_weight * consistency,
            },
            {"positive": PseudoLabels(unlabelled.index, label, mask, confidence)},
        )
