"""ComMatch: positive and negative pseudo-labels, accepted only when dropout passes agree, under moving thresholds.

The published text states the ingredients in words; its equations could not be had. Every formula here is therefore a
**reconstruction** (UPS's selection rule with FixMatch's weak/strong consistency around it) unless marked "stated", and
every other reading that the text allows is a named setting.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.common import Checked, FewLabels, repeats, three_views
from repro.models.modes import stochastic_probs
from repro.settings import SettingError, hyper
from repro.train import Items, Losses, Now, PseudoLabels


@dataclass(frozen=True)
class ComMatchSettings(Checked):
    positive_weight: float = hyper(0.5, "lambda", "ours; stated only: lambda < mu", low=0)
    negative_weight: float = hyper(1.0, "mu", "ours; stated only: lambda < mu", low=0)
    positive_start: float = hyper(0.9, "t_p", "stated", low=0, high=1)
    positive_end: float = hyper(0.95, "t_p", "stated", low=0, high=1)
    negative_start: float = hyper(0.3, "t_n", "stated", low=0, high=1)
    negative_end: float = hyper(3e-4, "t_n", "stated", low=1e-12, high=1)
    threshold_epochs: int = hyper(3, "", "stated: the thresholds move every 3 epochs", low=1)
    moving_positive: bool = hyper(True, "", "stated (dynamic threshold)")
    moving_negative: bool = hyper(True, "", "stated; another passage says fixed")
    positive_stability: float = hyper(0.05, "s_p", "stated", low=0)
    negative_stability: float = hyper(0.005, "s_n", "stated", low=0)
    passes: int = hyper(10, "T", "stated", low=2)
    unbiased: bool = hyper(True, "", "standard deviation over T - 1 as in UPS's code, else over T")
    stability: str = hyper(
        "dropout", "", "method text: dropout; ablation text: label consistency", choices=("dropout", "labels", "none")
    )
    consistency_decay: float = hyper(0.9, "", "ours; only for stability = labels", low=0, high=1)
    negative_temperature: float = hyper(1.0, "", "ours; UPS evaluates negatives at 2", low=1e-3)
    negatives_for: str = hyper("all", "", "ours; UPS: unselected samples only", choices=("all", "unselected"))
    positive_mean: str = hyper("batch", "", "FixMatch: batch", choices=("batch", "selected"))
    negative_mean: str = hyper("batch", "", "ours; UPS: samples with a negative", choices=("batch", "selected"))


def thresholds(settings: ComMatchSettings, epoch: int) -> tuple[float, float]:
    """(t_p, t_n) in epoch `epoch` (0-based).

    t_p rises by .01 and t_n falls tenfold every `threshold_epochs`, until their ends; a fixed threshold stays at its
    end. Source: stated in words (.90 to .95; .3 to .0003), formula ours.
    """
    moves = epoch // settings.threshold_epochs
    positive, negative = settings.positive_end, settings.negative_end
    if settings.moving_positive:
        positive = min(positive, settings.positive_start + 0.01 * moves)
    if settings.moving_negative:
        negative = max(negative, settings.negative_start * math.pow(10.0, -moves))
    return positive, negative


def instability(probs: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over stochastic passes.

    probs: (T, B, K), softmax of T passes with dropout on. Returns mean and deviation, (B, K) each; the unbiased
    deviation of T values in [0, 1] is at most sqrt(T / (T - 1)) / 2. Source: stated (deviation over 10 passes).
    """
    return probs.mean(dim=0), probs.std(dim=0, correction=int(unbiased))


def select_positive(mean: Tensor, deviation: Tensor, threshold: float, stability: float) -> tuple[Tensor, ...]:
    """Label (B,), mask (B,) and confidence (B,) of positive pseudo-labels: mean >= t_p and deviation < s_p.

    mean, deviation: (B, K). Source: reconstruction (UPS's rule and comparison signs).
    """
    confidence, label = mean.max(dim=1)
    stable = deviation.gather(1, label[:, None])[:, 0] < stability
    return label, (confidence >= threshold) & stable, confidence


def select_negative(
    mean: Tensor, deviation: Tensor, threshold: float, stability: float, spared: Tensor | None = None
) -> Tensor:
    """Mask (B, K) of classes held to be wrong: mean < t_n and deviation < s_n, never the spared class.

    mean, deviation: (B, K). spared: (B,) int64, by default the argmax of `mean` (where negatives are tempered, UPS's
    code spares the argmax of the untempered mean). Source: reconstruction (UPS's rule).
    """
    spared = mean.argmax(dim=1) if spared is None else spared
    is_spared = torch.arange(mean.shape[1], device=mean.device) == spared[:, None]
    return (mean < threshold) & (deviation < stability) & ~is_spared


def positive_loss(logits: Tensor, label: Tensor, weight: Tensor, mean_over: str = "batch") -> Tensor:
    """sum_b weight_b CE(label_b, softmax(logits_b)) / B, or / number selected.

    logits: (B, K) of the strong view; label: (B,); weight: (B,) bool or in [0, 1]. 0 when nothing is selected.
    Source: reconstruction (FixMatch, Eq. 4).
    """
    total = (F.cross_entropy(logits, label, reduction="none") * weight).sum()
    return total / (len(logits) if mean_over == "batch" else (weight > 0).sum().clamp(min=1))


def negative_loss(logits: Tensor, mask: Tensor, mean_over: str = "batch") -> Tensor:
    """-(1/n) sum_b [ sum_c mask_bc log(1 - p_bc) / max(1, sum_c mask_bc) ], with 1 - p clamped at 1e-7.

    logits: (B, K) of the strong view; mask: (B, K). The mean over a sample's negative classes keeps K = 100 on the
    scale of K = 10; n = B, or the number of samples with a negative. Source: reconstruction (negative learning, UPS).
    """
    mask = mask.to(logits.dtype)
    complement = (1 - logits.softmax(dim=1)).clamp(min=1e-7)
    per_sample = -(mask * complement.log()).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    n = len(logits) if mean_over == "batch" else (mask.sum(dim=1) > 0).sum().clamp(min=1)
    return per_sample.sum() / n


class ComMatch(FewLabels):
    Settings = ComMatchSettings

    def __init__(self, settings: ComMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, network, views, classes, pool_size)
        if not any(module.p > 0 for module in network.modules() if isinstance(module, nn.Dropout)):
            raise SettingError(
                "ComMatch predicts by dropout passes, and the network has none: set dropout > 0 (recipe: 0.3)"
            )
        # Read only with stability = labels: the last argmax and how steadily it has been repeated.
        self.register_buffer("last_label", torch.full((pool_size,), -1, dtype=torch.int64))
        self.register_buffer("consistency", torch.zeros(pool_size))

    def label_weight(self, index: Tensor, label: Tensor) -> Tensor:
        """Weight (B,) in [0, 1]: an average, with `consistency_decay`, of how often the argmax stayed the same.

        Source: reconstruction of the ablation text (stability as label consistency across iterations).
        """
        decay = self.settings.consistency_decay
        same = (self.last_label[index] == label).float()
        weight = decay * self.consistency[index] + (1 - decay) * same
        _, last = repeats(index)  # an index twice in the batch writes its last occurrence, on every device
        self.consistency = self.consistency.scatter(0, index, weight[last])
        self.last_label = self.last_label.scatter(0, index, label[last])
        return weight

    def select(self, weak: Tensor, index: Tensor, epoch: int) -> tuple[PseudoLabels, PseudoLabels, Tensor]:
        """Positive and negative pseudo-labels of the weak images, and the weight of each positive."""
        settings = self.settings
        positive_threshold, negative_threshold = thresholds(settings, epoch)
        probs = stochastic_probs(self.network, weak, settings.passes)
        mean, deviation = instability(probs, settings.unbiased)
        by_dropout = settings.stability == "dropout"
        positive_limit = settings.positive_stability if by_dropout else math.inf
        negative_limit = settings.negative_stability if by_dropout else math.inf
        label, selected, confidence = select_positive(mean, deviation, positive_threshold, positive_limit)
        if settings.negative_temperature != 1.0:
            tempered = (probs.clamp(min=1e-12).log() / settings.negative_temperature).softmax(dim=-1)
            mean, deviation = instability(tempered, settings.unbiased)
        negatives = select_negative(mean, deviation, negative_threshold, negative_limit, spared=label)
        if settings.negatives_for == "unselected":
            negatives = negatives & ~selected[:, None]
        weight = selected.float()
        if settings.stability == "labels":
            weight = weight * self.label_weight(index, label)
        classes = torch.arange(mean.shape[1], device=mean.device).expand_as(mean)
        return (
            PseudoLabels(index, label, selected, confidence),
            PseudoLabels(index, classes, negatives, 1 - mean),
            weight,
        )

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits, _, strong_logits, weak = three_views(self.network, self.views, labelled, unlabelled, now.teacher)
        positive, negative, weight = self.select(weak, unlabelled.index, now.epoch)
        positives = positive_loss(strong_logits, positive.label, weight, settings.positive_mean)
        negatives = negative_loss(strong_logits, negative.mask, settings.negative_mean)
        return Losses(
            {
                "supervised": F.cross_entropy(logits, labelled.labels),
                "positive": settings.positive_weight * positives,
                "negative": settings.negative_weight * negatives,
            },
            {"positive": positive, "negative": negative},
        )
