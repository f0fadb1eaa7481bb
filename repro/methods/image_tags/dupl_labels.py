"""DuPL's (Wu et al., CVPR 2024) treatment of labels and features: two networks that teach each other.

Source: released code, unless said otherwise. Nothing waits for the device.
"""

from math import cos, pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from repro.cam import widened
from repro.data.masks import IGNORE
from repro.measure.reliability import wide

# Final thresholds on VOC: aeroplane, bicycle, bird, boat, chair and train keep the first one.
VOC_TARGETS = tuple(0.7 if index in (0, 1, 2, 3, 8, 18) else 0.55 for index in range(20))


def discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Sum over both directions of 1 + mean cos(sg(F_1), F_2), in [0, 4]: the networks' features shall differ.

    first, second: (B, N, D) patches. The cosine is taken over the N patches, for each channel of each image.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = widened(first), widened(second)
        ahead = F.cosine_similarity(first.detach(), second, dim=1, eps=1e-6)
        back = F.cosine_similarity(second.detach(), first, dim=1, eps=1e-6)
        return 2 + ahead.mean() + back.mean()


def class_thresholds(step: int, steps: int, targets: Tensor, start: float = 0.7) -> Tensor:
    """High threshold (C,) of each class: half a cosine wave from `start` at step 0 to its target at the last step.

    step: since the segmentation loss set in, negative before. steps: until the end of training, so the last is
        steps - 1. targets: (C,) floating, as `VOC_TARGETS`.
    """
    done = min(max(step / max(steps - 1, 1), 0.0), 1.0)
    return start + (targets - start) * ((1 - cos(pi * done)) / 2)


def image_thresholds(thresholds: Tensor, tags: Tensor) -> Tensor:
    """Largest threshold (B,) of the classes that an image shows; of all classes where it shows none (ours).

    thresholds: (C,); tags: (B, C).
    """
    shown = tags > 0
    return torch.where(shown | ~shown.any(1, keepdim=True), thresholds, -torch.inf).amax(1)


class Mixture(NamedTuple):
    """Two Gaussians on a line in rising order of their means; weights, means, variances: each (B, 2) float64."""

    weights: Tensor
    means: Tensor
    variances: Tensor


class Noise(NamedTuple):
    """noisy: (B, H, W) bool, pixels whose label is to be ignored. applies: (B,) bool, images where the test holds.
    mixture: of all images, meaningful where it applies."""

    noisy: Tensor
    applies: Tensor
    mixture: Mixture


@torch.no_grad()
def noisy_labels(
    loss: Tensor, labels: Tensor, floor: float = 0.1, least: int = 1000, gap: float = 1.0, certainty: float = 0.95
) -> Noise:
    """Pixels whose cross-entropy says that their label is wrong, by a mixture of two Gaussians an image.

    The mixture is fitted to the foreground's losses above `floor`. It applies when there are more than `least` of them
    and the means differ by more than `gap`. Then every pixel that is not background is noisy whose loss, small ones
    included, belongs to the component of larger mean with a probability above `certainty`.
    loss: (B, H, W), cross-entropy of a network with its own labels, in nats, 0 where ignored.
    labels: (B, H, W), those labels; 255 ignored. least: pixels, of 448 x 448 in the released code.
    Ours: an image whose losses are all equal has no two components, and the test does not hold.
    """
    values, labels = loss.flatten(1), labels.flatten(1)
    fitted = (labels != 0) & (labels != IGNORE) & (values > floor)
    mixture, split = fit_mixture(values, fitted)
    applies = split & (fitted.sum(1) > least) & (mixture.means[:, 1] - mixture.means[:, 0] > gap)
    upper = component_logs(wide(values), mixture).softmax(1)[:, 1]
    noisy = (upper > certainty) & (labels != 0) & applies[:, None]
    return Noise(noisy.view(loss.shape), applies, mixture)


@torch.no_grad()
def fit_mixture(
    values: Tensor, used: Tensor, iterations: int = 10, tolerance: float = 1e-2, ridge: float = 5e-4
) -> tuple[Mixture, Tensor]:
    """Mixture of two Gaussians of each row by expectation and maximisation; and whether it has two components, (B,).

    values: (B, P) floating, used: (B, P) bool; the others enter nothing, whatever they hold.
    iterations: at most. tolerance: a row stops changing after the step in which its mean log-likelihood, taken before
        that step, differed by less from the previous one. ridge: added to the variances.
    Starts from the split of the sorted values with the smallest squared error (ours; scikit-learn, which the released
    code calls, draws a start of k-means, which mostly ends there). Else its algorithm. Two components need two
    different values.
    """
    count = used.sum(1, keepdim=True)
    x = wide(values.masked_fill(~used, 0))
    upper = x > two_means(x, used)[:, None]
    split = (upper & used).any(1) & (~upper & used).any(1)
    mixture = moments(x, torch.stack([~upper & used, upper & used], 1).to(x.dtype), count, ridge)
    before, done = x.new_full((len(x),), -torch.inf), ~split
    for _ in range(iterations):
        logs = component_logs(x, mixture)
        likelihood = logs.logsumexp(1)
        mean = torch.where(used, likelihood, 0).sum(1) / count[:, 0].clamp(min=1)
        share = (logs - likelihood[:, None]).exp() * used[:, None]
        updated = moments(x, share, count, ridge)
        mixture = Mixture(*(torch.where(done[:, None], old, new) for old, new in zip(mixture, updated, strict=True)))
        done = done | ((mean - before).abs() < tolerance)
        before = mean
    order = mixture.means.argsort(1)
    return Mixture(*(part.gather(1, order) for part in mixture)), split


def two_means(x: Tensor, used: Tensor) -> Tensor:
    """Largest value (B,) of the lower of two clusters of each row of x (B, P) with the smallest squared error."""
    ordered = x.masked_fill(~used, torch.inf).sort(1).values
    number = torch.arange(1, x.shape[1] + 1, device=x.device)
    count = used.sum(1, keepdim=True)
    centre = x.sum(1, keepdim=True) / count.clamp(min=1)
    below = torch.where(number <= count, ordered - centre, 0).cumsum(1)
    # both clusters' sums are opposite after centring, so the explained squares are below^2 (1 / n + 1 / (N - n))
    explained = below.square() * (1 / number + 1 / (count - number).clamp(min=1))
    return ordered.gather(1, explained.masked_fill(number >= count, -1).argmax(1, keepdim=True))[:, 0]


def moments(x: Tensor, share: Tensor, count: Tensor, ridge: float) -> Mixture:
    """The maximisation: weights, means and variances of x (B, P) under shares (B, 2, P) of count (B, 1) values."""
    size = share.sum(2) + 10 * torch.finfo(x.dtype).eps
    means = (share * x[:, None]).sum(2) / size
    variances = (share * (x[:, None] - means[:, :, None]).square()).sum(2) / size + ridge
    return Mixture(size / count.clamp(min=1), means, variances)


def component_logs(x: Tensor, mixture: Mixture) -> Tensor:
    """log(weight N(x; mean, variance)), (B, 2, P), of x (B, P)."""
    weights, means, variances = (part[:, :, None] for part in mixture)
    return weights.log() - 0.5 * ((2 * pi * variances).log() + (x[:, None] - means).square() / variances)


def consistency(strong_logits: Tensor, logits: Tensor, labels: Tensor, threshold: float = 0.9) -> Tensor:
    """Cross-entropy of the strongly augmented view with the plain view's class, where that is sure and no label is.

    strong_logits, logits: (B, K, H, W) of one network, the first one moved back to where the plain view is; the second
        one has no gradient here.
    labels: (B, H, W), what the network learns from: only its 255 count. threshold: pixels count above it.
    Mean over the pixels that count, 0 where there are none.
    """
    confidence, label = widened(logits).detach().softmax(1).max(1)
    counts = (labels == IGNORE) & (confidence > threshold)
    loss = F.cross_entropy(widened(strong_logits), label, reduction="none")
    return torch.where(counts, loss, 0).sum() / counts.sum().clamp(min=1)
