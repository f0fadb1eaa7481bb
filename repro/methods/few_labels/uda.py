"""UDA (Xie et al., NeurIPS 2020): a sharpened weak prediction teaches the strong view; labelled samples are
left out once they are learnt.

Follows TorchSSL. USB hands probabilities to a function that ignores the temperature for them and so trains on
unsharpened targets: `temperature=1` is what it computes. Google's FixMatch code runs UDA at threshold .95 and
temperature 1.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.fixmatch import pseudo_label
from repro.methods.few_labels.forward import three_views
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class UDASettings:
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

    def __post_init__(self):
        check(self)


def annealed_threshold(schedule: str, progress: float, classes: int) -> float:
    """eta in [1/K, 1]: labelled samples predicted with more than this are left out.

    schedule: none (1), linear, exp or log; progress: in [0, 1].
    Source: UDA, training signal annealing; released code (USB, TorchSSL).
    """
    if schedule == "none":
        return 1.0
    share = {
        "linear": progress,
        "exp": math.exp(5 * (progress - 1)),
        "log": 1 - math.exp(-5 * progress),
    }[schedule]
    return share * (1 - 1 / classes) + 1 / classes


def annealed_loss(logits: Tensor, labels: Tensor, threshold: float, rule: str) -> Tensor:
    """Cross-entropy of the labelled samples whose probability is at most `threshold`.

    logits: (B, K); labels: (B,); rule: see `UDASettings.annealing_rule`. 0 when none is kept.
    Source: released code (TorchSSL; google-research/fixmatch).
    """
    probs = logits.detach().softmax(dim=1)
    known = probs.amax(dim=1) if rule == "toolbox" else probs.gather(1, labels[:, None])[:, 0]
    kept = (known <= threshold).to(logits.dtype)
    total = (F.cross_entropy(logits, labels, reduction="none") * kept).sum()
    return total / (len(logits) if rule == "toolbox" else kept.sum().clamp(min=1))


def soft_consistency_loss(
    strong_logits: Tensor, weak_logits: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """mean_b mask_b CE(softmax(weak_b / T), softmax(strong_b)) over all U samples.

    strong_logits, weak_logits: (U, K), the weak ones get no gradient; mask: (U,).
    Source: released code (TorchSSL). The paper's KL divergence differs by the target's entropy, a constant.
    """
    target = (weak_logits.detach() / temperature).softmax(dim=1)
    return (F.cross_entropy(strong_logits, target, reduction="none") * mask).mean()


class UDA(Method):
    Settings = UDASettings

    def __init__(self, settings: UDASettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits, weak_logits, strong_logits, _ = three_views(
            self.network, self.views, labelled, unlabelled, now.teacher
        )
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
