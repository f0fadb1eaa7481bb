"""Losses of the scribble methods: cross-entropy on seeds, and the robust one on proposals that may be wrong.

A proposal label x is right with probability 1 - epsilon, else any other class with the same probability. Under the
prediction s it is then observed with

    P(x) = a + b s_x,    a = epsilon / (C - 1),    b = 1 - C epsilon / (C - 1)

Labels are integers; C and above (255 unlabelled, 254 padding) count for nothing. Everything is computed in float32 at
least. Source: Robust Trust Region (released code); where stated, ours.
"""

import math

import torch
from torch import Tensor

from repro.solvers.potts import wide


def outlier_model(epsilon: float, classes: int) -> tuple[float, float]:
    """a and b of P(x) = a + b s_x.

    epsilon: in [0, (C - 1) / C], where b is exactly 0 at the upper end. Raises ValueError outside.
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; a label can be wrong only if there are 2 or more")
    limit = (classes - 1) / classes
    if not 0 <= epsilon <= limit:
        raise ValueError(
            f"epsilon is {epsilon}; with {classes} classes it must lie in [0, {limit:.6g}], where the robust loss is "
            "constant: bring a value for another number of classes over with rescaled_epsilon"
        )
    return epsilon / (classes - 1), 1 - epsilon / limit


def rescaled_epsilon(epsilon: float, from_classes: int = 21, to_classes: int = 21) -> float:
    """The epsilon for `to_classes` whose b / a, the slope of the robust loss at s_x = 0, is that of `from_classes`.

    With r = b / a it is (C - 1) / (C + r) (derived). from_classes: 21 for published values. 0 stays 0, and
    (C - 1) / C goes to (C - 1) / C. Raises ValueError as `outlier_model`.
    """
    a, b = outlier_model(epsilon, from_classes)
    if to_classes < 2:
        raise ValueError(f"to_classes is {to_classes}; it must be 2 or more")
    if to_classes == from_classes:
        return epsilon
    return min((to_classes - 1) * a / (to_classes * a + b), (to_classes - 1) / to_classes)


def robust_surprise(log_probs: Tensor, epsilon: float, classes: int) -> Tensor:
    """-log(a + b s), of any shape, from log s.

    Its derivative in log s is -b s / (a + b s), in [-1, 0]: it vanishes with s, where cross-entropy has -1. epsilon 0
    gives -log s exactly, (C - 1) / C the constant log C without gradient.
    """
    a, b = outlier_model(epsilon, classes)
    log_a, log_b = (math.log(value) if value > 0 else -math.inf for value in (a, b))
    return -torch.logaddexp(torch.full_like(log_probs, log_a), log_probs + log_b)


def pixel_loss(log_probs: Tensor, labels: Tensor, epsilon: float = 0.0, soften: float = 0.0) -> Tensor:
    """The robust loss of each pixel, (B, H, W); 0 where the label counts for nothing.

    log_probs: (B, C, H, W), log softmax. labels: (B, H, W).
    soften: share of the label that is spread evenly over all C classes. For epsilon 0 this is label smoothing. A
        switch of the released code; which formula it has with epsilon > 0 is not known, this one is ours.
    """
    classes = log_probs.shape[1]
    known = labels < classes
    chosen = torch.where(known, labels.long(), 0)[:, None]
    loss = robust_surprise(log_probs.gather(1, chosen)[:, 0], epsilon, classes)
    if soften:
        loss = (1 - soften) * loss + soften * robust_surprise(log_probs, epsilon, classes).mean(1)
    return torch.where(known, loss, 0.0)


def partial_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the labelled pixels of a batch: their mean, over B; 0 where there are none.

    logits: (B, C, H, W). labels: (B, H, W).
    The released code divides its mean by the batch size once more; learning rates and weights belong to that.
    """
    loss = pixel_loss(wide(logits).log_softmax(1), labels)
    return loss.sum() / ((labels < logits.shape[1]).sum().clamp(min=1) * len(logits))


def proposal_losses(
    logits: Tensor, scribbles: Tensor, proposals: Tensor, epsilon: float, soften: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Both parts of L_B, scalars: cross-entropy on the seeds, and the robust loss on the proposals elsewhere.

    logits: (B, C, H, W). scribbles, proposals: (B, H, W). epsilon, soften: of the proposals.
    Both are sums over B and the batch's number of *seeds*, so proposals weigh by their number. A batch without a seed
    has no such scale: both parts are 0 then (ours; the released code divides by zero).
    """
    classes = logits.shape[1]
    log_probs = wide(logits).log_softmax(1)
    seeds = scribbles < classes
    divisor = seeds.sum().clamp(min=1) * len(logits)
    rest = torch.where(seeds, classes, proposals.long())
    on_seeds = pixel_loss(log_probs, scribbles).sum()
    others = seeds.any() * pixel_loss(log_probs, rest, epsilon, soften).sum()
    return on_seeds / divisor, others / divisor
