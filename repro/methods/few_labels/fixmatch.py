"""FixMatch (Sohn et al., NeurIPS 2020): a confident weak view labels the strong view of the same image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.common import Checked, WeakToStrong, align, consistency_loss, follow, pseudo_label
from repro.settings import hyper
from repro.train import Losses, PseudoLabels

# FixMatch


@dataclass(frozen=True)
class FixMatchSettings(Checked):
    threshold: float = hyper(0.95, "tau", "FixMatch, section 2.2", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "lambda_u", "FixMatch, section 2.2", low=0)


class FixMatch(WeakToStrong):
    Settings = FixMatchSettings

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        mask = confidence >= self.settings.threshold
        loss = self.settings.unlabelled_weight * consistency_loss(strong_logits, label, mask)
        return Losses({"consistency": loss}, {"positive": PseudoLabels(index, label, mask, confidence)})


# FlexMatch


@dataclass(frozen=True)
class FlexMatchSettings(Checked):
    threshold: float = hyper(0.95, "tau", "FlexMatch, section 4.1", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "lambda", "FlexMatch, section 4.1", low=0)
    threshold_warmup: bool = hyper(True, "", "FlexMatch, Eq. 11: unused samples count as a class")


def learning_status(selected: Tensor, classes: int, threshold_warmup: bool = True) -> Tensor:
    """beta (K,) in [0, 1]: how many samples each class last took confidently, relative to the best class.

    selected: (N,) int64, the class each unlabelled sample last had confidently, -1 for never.
    threshold_warmup: the denominator is also at least the number of samples still unset.
    All zero while nothing is selected. Source: FlexMatch, Eq. 5, 6 and 11.
    """
    counts = torch.zeros(classes + 1, dtype=torch.float32, device=selected.device)
    counts.scatter_add_(0, selected + 1, torch.ones_like(selected, dtype=torch.float32))
    unset, sigma = counts[0], counts[1:]
    best = torch.maximum(sigma.max(), unset) if threshold_warmup else sigma.max()
    return sigma / best.clamp(min=1)


def flexible_threshold(beta: Tensor, threshold: float) -> Tensor:
    """tau_c = tau * beta_c / (2 - beta_c), the convex mapping; shaped as beta. Source: FlexMatch, Eq. 7."""
    return threshold * beta / (2 - beta)


def remember(selected: Tensor, index: Tensor, label: Tensor, confident: Tensor) -> Tensor:
    """`selected` (N,) after a step: the class of each confident sample of the batch, others unchanged.

    index, label, confident: (U,). An index twice in the batch takes its last confident occurrence (toolboxes leave this
    open). The maximum over positions, unlike an indexed write, gives the same result on every device.
    """
    position = torch.arange(1, len(index) + 1, device=index.device) * confident
    last = torch.zeros_like(selected).scatter_reduce(0, index, position, "amax")
    chosen = label[(last - 1).clamp(min=0)]
    return torch.where(last > 0, chosen, selected)


class FlexMatch(WeakToStrong):
    Settings = FlexMatchSettings

    def __init__(self, settings: FlexMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, network, views, classes, pool_size)
        self.register_buffer("selected", torch.full((pool_size,), -1, dtype=torch.int64))

    def select(self, index: Tensor, label: Tensor, confidence: Tensor) -> Tensor:
        """The mask (U,) of this step, from the state before it; then the state moves (USB's order)."""
        beta = learning_status(self.selected, self.classes, self.settings.threshold_warmup)
        mask = confidence >= flexible_threshold(beta, self.settings.threshold)[label]
        confident = confidence >= self.settings.threshold
        self.selected = remember(self.selected, index, label, confident)
        return mask

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        mask = self.select(index, label, confidence)
        loss = self.settings.unlabelled_weight * consistency_loss(strong_logits, label, mask)
        return Losses({"consistency": loss}, {"positive": PseudoLabels(index, label, mask, confidence)})


# FreeMatch


@dataclass(frozen=True)
class FreeMatchSettings(Checked):
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


def histogram(label: Tensor, weight: Tensor, classes: int) -> Tensor:
    """Weighted number of samples of each class, (K,).

    label: (n,) int64; weight: (n,) float. A product with one-hot rows: the same on every device, nothing waits for it.
    """
    return (torch.eye(classes, dtype=weight.dtype, device=weight.device)[label] * weight[:, None]).sum(dim=0)


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


def self_adaptive_threshold(tau: Tensor, marginal: Tensor, clip: str = "none") -> Tensor:
    """tau_c = tau * p_c / max_k p_k.

    tau: 0-dim; marginal: p (K,); clip: see `FreeMatchSettings.clip`, of which `torchssl` acts here.
    Source: FreeMatch (self-adaptive threshold); released code.
    """
    threshold = tau * marginal / marginal.max()
    return threshold.clamp(0.9, 0.95) if clip == "torchssl" else threshold


class FreeMatch(WeakToStrong):
    """L = CE(labelled) + w_u mean_b 1[m_b >= tau_c] CE(c_b, strong_b) + w_f * fairness."""

    Settings = FreeMatchSettings

    def __init__(self, settings: FreeMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, network, views, classes, pool_size)
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


# SoftMatch


@dataclass(frozen=True)
class SoftMatchSettings(Checked):
    unlabelled_weight: float = hyper(1.0, "lambda_u", "SoftMatch; released code (USB)", low=0)
    n_sigma: float = hyper(2.0, "n_sigma", "released code (USB): the variance is divided by its square", low=1e-3)
    ema_p: float = hyper(0.999, "m", "SoftMatch; released code (USB): of mean, variance, class marginal", low=0, high=1)
    alignment: str = hyper("uniform", "UA", "SoftMatch; released code (USB)", choices=("uniform", "none"))


def gaussian_weight(confidence: Tensor, mean: Tensor, variance: Tensor, n_sigma: float) -> Tensor:
    """exp(-min(m - mu, 0)^2 / (2 sigma^2 / n_sigma^2)): 1 from the mean upwards, a Gaussian below it.

    confidence: (U,); mean, variance: 0-dim. Returns (U,) in [0, 1]. Source: SoftMatch; n_sigma: released code.
    """
    below = (confidence - mean).clamp(max=0)
    return (-(below**2) / (2 * variance.clamp(min=1e-12) / n_sigma**2)).exp()


class SoftMatch(WeakToStrong):
    """L = CE(labelled) + lambda_u mean_b w_b CE(argmax q_b, strong_b); w from aligned q, the argmax from q itself."""

    Settings = SoftMatchSettings

    def __init__(self, settings: SoftMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, network, views, classes, pool_size)
        self.register_buffer("marginal", torch.zeros(classes))  # the first batch sets it
        self.register_buffer("mean", torch.tensor(1 / classes))
        self.register_buffer("variance", torch.tensor(1.0))

    def weigh(self, probs: Tensor) -> Tensor:
        """Weight (U,) of probs (U, K); all state moves before it is used (USB's order)."""
        if self.settings.alignment == "uniform":
            self.marginal = follow(self.marginal, probs, self.settings.ema_p)
            probs = align(probs, torch.full_like(self.marginal, 1 / len(self.marginal)), self.marginal)
        confidence, decay = probs.amax(dim=1), self.settings.ema_p
        variance = confidence.var(correction=min(1, len(confidence) - 1))  # unbiased, as released; one sample has 0
        self.mean = decay * self.mean + (1 - decay) * confidence.mean()
        self.variance = decay * self.variance + (1 - decay) * variance
        return gaussian_weight(confidence, self.mean, self.variance, self.settings.n_sigma)

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        weight = self.weigh(weak_logits.detach().softmax(dim=1))
        loss = self.settings.unlabelled_weight * consistency_loss(strong_logits, label, weight)
        return Losses({"consistency": loss}, {"positive": PseudoLabels(index, label, weight, confidence)})
