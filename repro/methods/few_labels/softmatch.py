"""SoftMatch (Chen et al., ICLR 2023): every pseudo-label counts, less the further its confidence is below average."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.fixmatch import consistency_loss, pseudo_label, weak_to_strong
from repro.methods.few_labels.remixmatch import align, follow
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class SoftMatchSettings:
    unlabelled_weight: float = hyper(1.0, "lambda_u", "SoftMatch; released code (USB)", low=0)
    n_sigma: float = hyper(2.0, "n_sigma", "released code (USB): the variance is divided by its square", low=1e-3)
    ema_p: float = hyper(0.999, "m", "SoftMatch; released code (USB): of mean, variance, class marginal", low=0, high=1)
    alignment: str = hyper("uniform", "UA", "SoftMatch; released code (USB)", choices=("uniform", "none"))

    def __post_init__(self):
        check(self)


def gaussian_weight(confidence: Tensor, mean: Tensor, variance: Tensor, n_sigma: float) -> Tensor:
    """exp(-min(m - mu, 0)^2 / (2 sigma^2 / n_sigma^2)): 1 from the mean upwards, a Gaussian below it.

    confidence: (U,); mean, variance: 0-dim. Returns (U,) in [0, 1].
    Source: SoftMatch (truncated Gaussian weight); n_sigma: released code.
    """
    below = (confidence - mean).clamp(max=0)
    return (-(below**2) / (2 * variance.clamp(min=1e-12) / n_sigma**2)).exp()


class SoftMatch(Method):
    """L = CE(labelled) + lambda_u mean_b w_b CE(argmax q_b, strong_b); w from aligned q, the argmax from q itself."""

    Settings = SoftMatchSettings

    def __init__(self, settings: SoftMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views = settings, network, views
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

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        return weak_to_strong(self, batch, now)
