"""FreeMatch (Wang et al., ICLR 2023): thresholds that follow the network's own confidence, and class fairness."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.fixmatch import consistency_loss, pseudo_label, weak_to_strong
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class FreeMatchSettings:
    unlabelled_weight: float = hyper(1.0, "w_u", "FreeMatch; released code (USB, TorchSSL)", low=0)
    fairness_weight: float = hyper(0.001, "w_f", "USB's vision configs; its default and TorchSSL: .01", low=0)
    ema_p: float = hyper(0.999, "lambda", "FreeMatch; released code (USB, TorchSSL)", low=0, high=1)
    statistic: str = hyper(
        "mean", "", "of the confidences: mean (USB's configs) or their .8 quantile", choices=("mean", "quantile")
    )
    clip: str = hyper(
        "none",
        "",
        "on SVHN, usb: tau is at most .95; torchssl: each class's threshold lies in [.9, .95]; elsewhere none",
        choices=("none", "usb", "torchssl"),
    )

    def __post_init__(self):
        check(self)


def histogram(label: Tensor, weight: Tensor, classes: int) -> Tensor:
    """Weighted number of samples of each class, (K,).

    label: (n,) int64; weight: (n,) float. A product with one-hot rows: the same on every device, nothing waits for it.
    """
    return (torch.eye(classes, dtype=weight.dtype, device=weight.device)[label] * weight[:, None]).sum(dim=0)


def self_adaptive_threshold(tau: Tensor, marginal: Tensor, clip: str = "none") -> Tensor:
    """tau_c = tau * p_c / max_k p_k.

    tau: 0-dim; marginal: p (K,); clip: see `FreeMatchSettings.clip`, of which `torchssl` acts here.
    Source: FreeMatch (self-adaptive threshold); released code.
    """
    threshold = tau * marginal / marginal.max()
    return threshold.clamp(0.9, 0.95) if clip == "torchssl" else threshold


def _balanced(probs: Tensor, counts: Tensor) -> Tensor:
    ratio = torch.where(counts > 0, probs / torch.where(counts > 0, counts, 1), 0)
    return ratio / ratio.sum().clamp(min=1e-12)


def fairness_loss(strong_logits: Tensor, mask: Tensor, marginal: Tensor, label_histogram: Tensor) -> Tensor:
    """sum_k N(p / h)_k log(N(p_s / h_s)_k + 1e-12): minus a cross-entropy, so at most 0; 0 when nothing is selected.

    strong_logits: (U, K), of which p_s is the mean softmax and h_s the histogram of the argmax, over selected samples.
    mask: (U,) bool; marginal, label_histogram: p and h (K,). N divides by the sum; classes with h = 0 count 0.
    Source: FreeMatch (self-adaptive fairness); released code (USB, TorchSSL).
    """
    probs, weight = strong_logits.softmax(dim=1), mask.to(strong_logits.dtype)
    selected = weight.sum().clamp(min=1)
    strong_mean = (probs * weight[:, None]).sum(dim=0) / selected
    strong_histogram = histogram(probs.argmax(dim=1), weight, probs.shape[1]) / selected
    target, predicted = _balanced(marginal, label_histogram), _balanced(strong_mean, strong_histogram)
    return (target * (predicted + 1e-12).log()).sum() * mask.any()


class FreeMatch(Method):
    """L = CE(labelled) + w_u mean_b 1[m_b >= tau_c] CE(c_b, strong_b) + w_f * fairness."""

    Settings = FreeMatchSettings

    def __init__(self, settings: FreeMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes
        self.register_buffer("tau", torch.tensor(1 / classes))
        self.register_buffer("marginal", torch.full((classes,), 1 / classes))
        self.register_buffer("label_histogram", torch.full((classes,), 1 / classes))

    def select(self, probs: Tensor, label: Tensor, confidence: Tensor) -> Tensor:
        """The mask (U,) of this step, after the state has followed probs (U, K) (USB's order)."""
        settings, decay = self.settings, self.settings.ema_p
        level = confidence.mean() if settings.statistic == "mean" else confidence.quantile(0.8)
        tau = decay * self.tau + (1 - decay) * level
        self.tau = tau.clamp(max=0.95) if settings.clip == "usb" else tau
        self.marginal = decay * self.marginal + (1 - decay) * probs.mean(dim=0)
        counts = histogram(label, torch.ones_like(confidence), self.classes)
        self.label_histogram = decay * self.label_histogram + (1 - decay) * counts / len(label)
        return confidence >= self_adaptive_threshold(self.tau, self.marginal, settings.clip)[label]

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        mask = self.select(weak_logits.detach().softmax(dim=1), label, confidence)
        fairness = fairness_loss(strong_logits, mask, self.marginal, self.label_histogram)
        return Losses(
            {
                "consistency": self.settings.unlabelled_weight * consistency_loss(strong_logits, label, mask),
                "fairness": self.settings.fairness_weight * fairness,
            },
            {"positive": PseudoLabels(index, label, mask, confidence)},
        )

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        return weak_to_strong(self, batch, now)
