"""Calibration of class probabilities: calibration errors, proper scores, temperature scaling, intervals.

Two kinds of input: `probs` (n, K) with `labels` (n,), or the pair `confidence` (n,), `correct` (n,) that
`top_label` makes of them. Results are 0-d tensors on the input's device unless said otherwise, as fractions,
computed in float64 (float32 on devices without it), whatever precision comes in. `repro.measure.reliability` says
which bin a confidence is in.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from repro.measure.reliability import Bins as Bins
from repro.measure.reliability import ReliabilitySums as ReliabilitySums
from repro.measure.reliability import bin_index, check_range, float64, group_sums, reliability


def top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence (n,) in the dtype of probs, and whether the likeliest class (ties: the first) is the label.

    probs: (n, K) in [0, 1]; labels: (n,) integers in [0, K).
    Raises ValueError for empty, ill-shaped or out-of-range input.
    """
    check_probs(probs, labels)
    confidence, predicted = probs.max(1)
    return confidence, predicted == labels


def ece(confidence: Tensor, correct: Tensor, bins: int = 15, closing: str = "right") -> Tensor:
    """Expected calibration error over equal-width bins; arguments and errors as in `reliability`.

    Source: Guo et al. (2017), Eq. 3 (15 bins, `right`); CalibrateMix's released code has 10 bins, `left`.
    """
    return reliability(confidence, correct, bins, closing).ece


def adaptive_ece(confidence: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error over bins of equal count; ties and remainders as in `reliability`."""
    return reliability(confidence, correct, bins, spacing="mass").ece


def mce(confidence: Tensor, correct: Tensor, bins: int = 15, closing: str = "right") -> Tensor:
    """Maximum calibration error over non-empty equal-width bins (Guo et al., 2017)."""
    return reliability(confidence, correct, bins, closing).mce


def classwise_ece(probs: Tensor, labels: Tensor, bins: int = 15, closing: str = "left") -> Tensor:
    """Mean over classes of the ECE of p_k against 1[label = k], absent classes included.

    probs, labels: as in `top_label`.
    closing: `left` here, since `right` would ignore every p_k that is exactly 0.
    Source: Kull et al. (2019); Nixon et al. (2019) as static calibration error.
    """
    check_probs(probs, labels)
    classes = probs.shape[1]
    slots = torch.arange(classes, device=probs.device) * (bins + 1) + bin_index(probs, bins, closing) + 1
    gaps = float64(probs) - one_hot(labels, classes)
    sums = group_sums(slots.flatten(), classes * (bins + 1), gaps.flatten()).view(classes, bins + 1)[:, 1:]
    return sums.abs().sum() / probs.numel()


def nll(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats; arguments as in `top_label`.

    A probability below the smallest normal number of its dtype counts as that number: the result is finite.
    """
    check_probs(probs, labels)
    floor = torch.finfo(probs.dtype).tiny
    return -float64(probs).gather(1, labels[:, None]).clamp_min(floor).log().mean()


def brier(probs: Tensor, labels: Tensor) -> Tensor:
    """Brier score in [0, 2]: squared error summed over classes, mean over samples (Brier, 1950)."""
    check_probs(probs, labels)
    return (float64(probs) - one_hot(labels, probs.shape[1])).square().sum(1).mean()


def bootstrap_interval(
    statistic: Callable[[Tensor, Tensor], Tensor],
    probs: Tensor,
    labels: Tensor,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of statistic(probs, labels) over `n` resamples of the samples, with replacement.

     statistic: a function of this module, say; probs and labels may also be a confidence and a correct.
     seed: of the resampling, the same on every device. level: coverage in (0, 1).
    Binned errors of a resample are larger than those of the sample, as a sample's are larger than the truth,
     so an interval of a small ECE can lie above it; it shows spread.
     Raises ValueError for empty input, n < 2 or a level outside (0, 1). Source: Efron (1979).
    """
    if len(probs) == 0 or len(probs) != len(labels):
        raise ValueError(f"{len(probs)} probs and {len(labels)} labels; both need the same number, at least 1")
    if n < 2 or not 0 < level < 1:
        raise ValueError(f"n is {n} and level is {level}; n must be at least 2 and level lie in (0, 1)")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(n):
        draw = torch.randint(len(probs), (len(probs),), generator=generator).to(probs.device)
        values.append(statistic(probs[draw], labels[draw]))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = torch.stack(values).double().cpu().quantile(torch.tensor(tails, dtype=torch.float64)).tolist()
    return low, high


def fit_temperature(logits: Tensor, labels: Tensor, low: float = 0.01, high: float = 100.0) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T), by Newton on log T in a shrinking bracket.

    logits: (n, K) of a held-out labelled split, never of the test set: a temperature that has seen test
        labels makes the test ECE a training error. labels: (n,) integers in [0, K).
    low, high: bracket of T. An end is returned where the NLL still falls towards it: `low` when every label
        has the largest logit, `high` when labels have no more than the average logit.
    The NLL is convex in 1/T: the minimum is unique, and never above the NLL at T = 1 if that is in the
    bracket.
    Raises ValueError for empty, ill-shaped, non-finite or out-of-range input.
    Source: Guo et al. (2017), Sec. 4.2.
    """
    check_shapes(logits, labels)
    if not bool(logits.isfinite().all()):
        raise ValueError("logits hold NaN or infinity; a temperature needs finite logits")
    if not 0 < low < high:
        raise ValueError(f"the bracket is [{low}, {high}]; it needs 0 < low < high")
    z = float64(logits)
    z = z - z.gather(1, labels[:, None])  # the loss is logsumexp(z / T), with the label's logit at 0

    def slope_and_curvature(log_t: float) -> tuple[float, float]:
        """First and second derivative of the NLL with respect to log T."""
        scaled = z / math.exp(log_t)
        p = scaled.softmax(1)
        mean = (p * scaled).sum(1)
        variance = (p * scaled.square()).sum(1) - mean.square()
        slope, curvature = torch.stack([-mean.mean(), (variance + mean).mean()]).tolist()
        return slope, curvature

    left, right = math.log(low), math.log(high)
    if slope_and_curvature(left)[0] >= 0:
        return low
    if slope_and_curvature(right)[0] <= 0:
        return high
    log_t = min(max(0.0, left), right)
    for _ in range(100):
        slope, curvature = slope_and_curvature(log_t)
        left, right = (log_t, right) if slope < 0 else (left, log_t)
        following = log_t - slope / curvature if curvature > 0 else math.inf
        if not left < following < right:
            following = (left + right) / 2
        if abs(following - log_t) < 1e-10:
            break
        log_t = following
    return math.exp(log_t)


def all_metrics(probs: Tensor, labels: Tensor) -> dict[str, float | list[float | None]]:
    """Every number of a result row, as Python floats; arguments and errors as in `top_label`.

    Names: accuracy, error, ece_15 (right), ece_10_left, adaptive_ece_15, mce_15, classwise_ece_15, nll,
    brier, and per_class_accuracy, a list with None for a class that has no sample.
    """
    confidence, correct = top_label(probs, labels)
    classes = probs.shape[1]
    hits, counts = group_sums(labels, classes, correct, torch.ones_like(correct))
    scalars = {
        "accuracy": float64(correct).mean(),
        "error": 1 - float64(correct).mean(),
        "ece_15": ece(confidence, correct, 15),
        "ece_10_left": ece(confidence, correct, 10, "left"),
        "adaptive_ece_15": adaptive_ece(confidence, correct, 15),
        "mce_15": mce(confidence, correct, 15),
        "classwise_ece_15": classwise_ece(probs, labels, 15),
        "nll": nll(probs, labels),
        "brier": brier(probs, labels),
    }
    values = torch.cat([torch.stack(list(scalars.values())), hits / counts]).tolist()
    per_class = [None if math.isnan(value) else value for value in values[len(scalars) :]]
    return dict(zip(scalars, values, strict=False)) | {"per_class_accuracy": per_class}


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Outcomes (n, K), 1 at the label."""
    return float64(labels[:, None] == torch.arange(classes, device=labels.device))


def check_shapes(scores: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless scores are a non-empty floating (n, K) and labels (n,) integers in [0, K)."""
    if scores.ndim != 2 or scores.numel() == 0 or not scores.is_floating_point():
        raise ValueError(f"scores are {scores.dtype} {tuple(scores.shape)}; they must be floating, (n > 0, K > 0)")
    if labels.shape != scores.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; they must be integers, ({len(scores)},)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ValueError(f"labels span {low} to {high}, outside [0, {scores.shape[1]}): drop hidden labels (-1) first")


def check_probs(probs: Tensor, labels: Tensor) -> None:
    """`check_shapes`, and probabilities in [0, 1] up to rounding."""
    check_shapes(probs, labels)
    check_range(probs)
