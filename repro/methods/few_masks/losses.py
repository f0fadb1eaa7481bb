"""Losses of the few-mask methods on pixels: cross-entropy, OHEM, and weighted pseudo-labels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repro.data.masks import IGNORE

OHEM_THRESHOLD, OHEM_KEPT = 0.7, 200_000


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255; 0 where there are none.

    logits: (B, K, H, W); labels: (B, H, W) integers in [0, K) or 255.
    Source: UniMatch, CSL (released codes), which give NaN without a labelled pixel.
    """
    loss = F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORE, reduction="sum")
    return loss / (labels != IGNORE).sum().clamp(min=1)


def ohem(logits: Tensor, labels: Tensor, threshold: float = OHEM_THRESHOLD, kept: int = OHEM_KEPT) -> Tensor:
    """Cross-entropy over hard pixels only: those whose true class has a probability of at most `threshold`.

    logits: (B, K, H, W); labels: (B, H, W) integers in [0, K) or 255. threshold: in [0, 1].
    kept: at least as many pixels count, the hardest; all of them where fewer are labelled. Ties count together.
    Returns the mean over the pixels that count, 0 where there are none.
    Source: Cityscapes recipe of UniMatch and CSL (released codes).
    """
    labels = labels.long()
    known = labels != IGNORE
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    probability = torch.where(known, (-loss.detach()).exp(), torch.inf).flatten()
    if kept < probability.numel():
        # where fewer than `kept` are labelled the value is infinite, and every labelled pixel counts
        limit = probability.kthvalue(max(kept, 1)).values.clamp(min=threshold)
    else:
        limit = torch.inf
    hard = known & (probability.view_as(loss) <= limit)
    return torch.where(hard, loss, 0.0).sum() / hard.sum().clamp(min=1)


LABELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "ohem": ohem}


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor, valid: Tensor) -> Tensor:
    """sum(weight * CE(logits, label)) / number of valid pixels: the divisor counts what has no weight, too.

    logits: (B, K, H, W); label: (B, H, W) int64; weight: (B, H, W) in [0, 1] or bool, 0 where not valid;
    valid: (B, H, W) bool. Returns 0 where nothing is valid (the released code: NaN).
    Source: UniMatch and CSL (released codes).
    """
    loss = F.cross_entropy(logits.float(), label, reduction="none")
    return (loss * weight).sum() / valid.sum().clamp(min=1)
