"""Reliability bins: how confident and how right a classifier is, at once or summed while it trains.

Bin edges k/bins are first rounded to the dtype of the confidences, so that a half-precision confidence that
its dtype cannot tell from an edge lies on the edge, and the closing decides its bin. Confidence 1 is in the
last bin for both closings; confidence 0 is in the first one for `left` and, as in Guo's released code, in
none for `right`. Sums are float64 (float32 on devices without it), whatever precision comes in.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLOSINGS = ("right", "left")


@dataclass(frozen=True)
class Bins:
    """A reliability diagram: M bins of confidence.

    lower, upper: (M,) edges; of equal-mass bins the smallest and largest member, NaN where there is none.
    count: (M,) samples. confidence, accuracy: (M,) means over the bin, NaN where it is empty.
    total: samples offered, which exceeds the sum of `count` by those with confidence 0 under `right` closing.
    """

    lower: Tensor
    upper: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    total: int

    @property
    def gap(self) -> Tensor:
        """Mean confidence minus accuracy (M,), 0 where a bin is empty; positive where overconfident."""
        return torch.where(self.count > 0, self.confidence - self.accuracy, 0.0)

    @property
    def share(self) -> Tensor:
        """Fraction of `total` in each bin (M,)."""
        return float64(self.count) / self.total

    @property
    def ece(self) -> Tensor:
        """Mean absolute gap, weighted by the share of each bin."""
        return (self.share * self.gap.abs()).sum()

    @property
    def mce(self) -> Tensor:
        """Largest absolute gap of a non-empty bin."""
        return self.gap.abs().max()


def reliability(
    confidence: Tensor, correct: Tensor, bins: int = 15, closing: str = "right", spacing: str = "width"
) -> Bins:
    """Reliability bins.

    confidence: (n,) in [0, 1]; correct: (n,) bool or in [0, 1].
    bins: M, at least 1.
    closing: `right` (lo, hi] or `left` [lo, hi) with the last bin closed; see the module.
    spacing: `width`, edges at k/M; `mass`, equal counts, where `closing` does not matter: the sample of rank
        r (from 0) goes to bin floor(r M / n), so counts differ by at most 1. Tied confidences share a bin,
        that of their mean rank, whatever their order.
    Raises ValueError for empty, ill-shaped or out-of-range input.
    Source: Guo et al. (2017), Sec. 2; `mass`: Nguyen & O'Connor (2015), treatment of ties ours.
    """
    check_pairs(confidence, correct)
    edges = bin_edges(bins, confidence.dtype, confidence.device)
    if spacing == "width":
        index, lower, upper = bin_index(confidence, bins, closing), edges[:-1], edges[1:]
    elif spacing == "mass":
        index = mass_index(confidence, bins)
        empty = torch.full_like(edges[1:], math.nan)
        lower = empty.scatter_reduce(0, index, float64(confidence), "amin", include_self=False)
        upper = empty.scatter_reduce(0, index, float64(confidence), "amax", include_self=False)
    else:
        raise ValueError(f"spacing is {spacing!r}; it must be 'width' or 'mass'")
    ones = torch.ones_like(confidence)
    count, confidences, corrects = group_sums(index + 1, bins + 1, ones, confidence, correct)[:, 1:]
    total = confidence.numel()
    return Bins(lower, upper, count.long(), confidences / count, corrects / count, total)


class ReliabilitySums(nn.Module):
    """Running reliability bins on the device, for pseudo-labels during training: nothing waits until `read`.

    A module only so that its sums travel in state dicts and `.to(device)`; a resumed run reports the same
    numbers.
    """

    def __init__(self, bins: int = 15, closing: str = "right") -> None:
        super().__init__()
        self.bins, self.closing = bins, closing
        # rows: weight, weighted confidence, weighted correctness; column 0 holds what no bin takes
        self.register_buffer("sums", torch.zeros(3, bins + 1, dtype=torch.float64))
        self.register_buffer("offered", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def add(self, confidence: Tensor, correct: Tensor, weight_mask: Tensor) -> None:
        """Count a batch; it neither checks its input nor synchronises.

        confidence: (B,) in [0, 1]; correct: (B,) bool; weight_mask: (B,) bool, or weights >= 0.
        """
        slot = bin_index(confidence, self.bins, self.closing) + 1
        weight = float64(weight_mask)
        self.sums += group_sums(slot, self.bins + 1, weight, weight * float64(confidence), weight * float64(correct))
        self.offered += confidence.numel()

    def read(self) -> dict[str, float | None]:
        """Copy to the host once, reset, and return what was seen since the last reading.

        coverage: mean weight; accuracy, confidence, ece: of the selected samples, by weight. None for a mean
        over nothing.
        """
        *flat, offered = torch.cat([self.sums.flatten(), self.offered[None]]).tolist()
        self.sums.zero_()
        self.offered.zero_()
        weight, confidence, correct = torch.tensor(flat, dtype=torch.float64).view(3, -1)
        total = weight.sum()
        means = {
            "accuracy": correct.sum() / total,
            "confidence": confidence.sum() / total,
            "ece": (confidence - correct)[1:].abs().sum() / total,
        }
        read = {name: value.item() if total > 0 else None for name, value in means.items()}
        return {"coverage": total.item() / offered if offered else None} | read


def bin_edges(bins: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The M + 1 edges k/M, rounded to `dtype`."""
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    return float64((float64(torch.arange(bins + 1, device=device)) / bins).to(dtype))


def bin_index(confidence: Tensor, bins: int, closing: str) -> Tensor:
    """Equal-width bin of each confidence (any shape), in 0 ... M - 1; -1 for 0 under `right` closing."""
    if closing not in CLOSINGS:
        raise ValueError(f"closing is {closing!r}; it must be 'right' or 'left'")
    inner = bin_edges(bins, confidence.dtype, confidence.device)[1:-1]
    index = torch.bucketize(float64(confidence), inner, right=closing == "left")
    return torch.where(confidence > 0, index, -1) if closing == "right" else index


def mass_index(confidence: Tensor, bins: int) -> Tensor:
    """Equal-mass bin of each confidence (n,): floor(M r / n) for its rank r, the mean rank among ties."""
    _, group, size = torch.unique(confidence, return_inverse=True, return_counts=True)
    twice_rank = 2 * size.cumsum(0) - size - 1
    return (twice_rank * bins // (2 * confidence.numel()))[group]


def group_sums(group: Tensor, size: int, *values: Tensor) -> Tensor:
    """Sums (len(values), size) of each (n,) of `values` over the samples of every group 0 ... size - 1."""
    stacked = torch.stack([float64(value) for value in values])
    return stacked.new_zeros(len(values), size).index_add_(1, group, stacked)


def float64(x: Tensor) -> Tensor:
    """x in float64, or in float32 on devices that have no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def check_pairs(confidence: Tensor, correct: Tensor) -> None:
    """Raise ValueError unless confidence is a non-empty floating (n,) in [0, 1] and correct has its shape."""
    if confidence.ndim != 1 or confidence.numel() == 0 or not confidence.is_floating_point():
        raise ValueError(f"confidence is {confidence.dtype} {tuple(confidence.shape)}; it must be floating, (n > 0,)")
    if correct.shape != confidence.shape:
        raise ValueError(f"correct is {tuple(correct.shape)}; it must be {tuple(confidence.shape)} like confidence")
    check_range(confidence)


def check_range(probs: Tensor) -> None:
    """Raise ValueError unless all lie in [0, 1], up to rounding."""
    if not bool(((probs >= 0) & (probs <= 1 + 1e-3)).all()):
        raise ValueError(f"probabilities span {probs.min():.4g} to {probs.max():.4g}; take the softmax of logits first")
