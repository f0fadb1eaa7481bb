"""DuPL (Wu et al., CVPR 2024): two trunks, kept apart, whose heads learn each other's labels.

Equations are those of the released code. Its strong views are mirrored and drawn from RandAugment; here they stay in
place and change colours alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.arrays import IGNORE, Items, at_least_float32
from repro.cam import bilinear
from repro.measure.reliability import float64
from repro.methods.image_tags.common import TagMethod, Trunk, View, balanced_cross_entropy, patch_contrast, tag_terms
from repro.settings import check, hyper
from repro.train import Losses, Now

# Final thresholds on VOC: aeroplane, bicycle, bird, boat, chair and train keep the first one.
VOC_TARGETS = tuple(0.7 if index in (0, 1, 2, 3, 8, 18) else 0.55 for index in range(20))


def discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """L_dis, the sum over both directions of 1 + mean cos(sg(F_1), F_2), in [0, 4], which keeps the trunks apart.

    first, second: (B, N, D) patches. The cosine is taken over the N patches, for each channel of each image.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = at_least_float32(first), at_least_float32(second)
        ahead = F.cosine_similarity(first.detach(), second, dim=1, eps=1e-6)
        back = F.cosine_similarity(second.detach(), first, dim=1, eps=1e-6)
        return 2 + ahead.mean() + back.mean()


def class_thresholds(step: int, steps: int, targets: Tensor, start: float = 0.7) -> Tensor:
    """High threshold (C,) of each class: half a cosine wave from `start` at step 0 to its target at the last step.

    step: since the end of the warm-up, negative before. steps: from there to the end of training. targets: (C,).
    """
    done = min(max(step / max(steps - 1, 1), 0.0), 1.0)
    return start + (targets - start) * ((1 - cos(pi * done)) / 2)


def image_thresholds(thresholds: Tensor, tags: Tensor) -> Tensor:
    """Largest threshold (B,) of the classes that an image shows; of all classes if it shows none (chosen here).

    thresholds: (C,). tags: (B, C).
    """
    shown = tags > 0
    return torch.where(shown | ~shown.any(1, keepdim=True), thresholds, -torch.inf).amax(1)


class Mixture(NamedTuple):
    """Two Gaussians on a line in rising order of their means; each field is (B, 2) float64."""

    weights: Tensor
    means: Tensor
    variances: Tensor


@torch.no_grad()
def noisy_labels(
    loss: Tensor, labels: Tensor, floor: float = 0.1, least: int = 1000, gap: float = 1.0, certainty: float = 0.95
) -> Tensor:
    """Pixels (B, H, W) bool whose label is judged wrong by their cross-entropy, by a mixture of two Gaussians an image.

    The mixture is fitted to the foreground's losses above `floor`. It applies when there are more than `least` of them
    and the means differ by more than `gap`. Then a pixel that is not background is noisy if its loss, however small,
    belongs to the component of larger mean with a probability above `certainty`.
    loss: (B, H, W), cross-entropy of a network with its own labels, in nats, 0 where ignored.
    labels: (B, H, W), those labels; 255 ignored. least: pixels, of 448 x 448 in the released code.
    An image whose losses are all equal has no two components, hence no noisy pixel (chosen here).
    """
    values, labels = loss.flatten(1), labels.flatten(1)
    fitted = (labels != 0) & (labels != IGNORE) & (values > floor)
    mixture, split = fit_mixture(values, fitted)
    applies = split & (fitted.sum(1) > least) & (mixture.means[:, 1] - mixture.means[:, 0] > gap)
    upper = component_logs(float64(values), mixture).softmax(1)[:, 1]
    return ((upper > certainty) & (labels != 0) & applies[:, None]).view(loss.shape)


@torch.no_grad()
def fit_mixture(
    values: Tensor, used: Tensor, iterations: int = 10, tolerance: float = 1e-2, ridge: float = 5e-4
) -> tuple[Mixture, Tensor]:
    """Mixture of two Gaussians of each row by expectation and maximisation; and whether two of its values differ, (B,).

    values: (B, P) floating. used: (B, P) bool, the values that are fitted. iterations: at most.
    tolerance: a row stops changing after the step in which its mean log-likelihood, taken before that step, differed by
        less from the previous one. ridge: added to the variances.
    The algorithm is that of scikit-learn, which the released code calls, but for the start: here it is the split of the
    sorted values with the smallest squared error, where scikit-learn's k-means from a random start mostly ends.
    """
    count = used.sum(1, keepdim=True)
    x = float64(values.masked_fill(~used, 0))
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
    """Largest value (B,) of the lower one of the two clusters with the smallest squared error, for each row (B, P)."""
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
    """L_con, cross-entropy of the strong view with the plain view's class, mean over unlabelled pixels of sure class.

    strong_logits, logits: (B, K, H, W) of one network; the second one has no gradient here.
    labels: (B, H, W) that the network learns: only its 255 count, where the plain view is surer than `threshold`.
    """
    confidence, label = at_least_float32(logits).detach().softmax(1).max(1)
    counts = (labels == IGNORE) & (confidence > threshold)
    loss = F.cross_entropy(at_least_float32(strong_logits), label, reduction="none")
    return torch.where(counts, loss, 0).sum() / counts.sum().clamp(min=1)


# DuPL


@dataclass(frozen=True)
class DuPLSettings:
    ptc_weight: float = hyper(0.2, source="DuPL: weight of L_ptc, of both trunks", low=0)
    seg_weight: float = hyper(0.2, source="DuPL: weight of L_seg", low=0)
    apart_weight: float = hyper(0.1, source="DuPL: weight of the discrepancy", low=0)
    consistency_weight: float = hyper(0.05, source="DuPL: weight of the consistency", low=0)
    final_high: float = hyper(0.55, source="DuPL: high threshold at the end; six VOC classes keep .7", low=0, high=1)
    clean_from: float = hyper(0.4, source="DuPL: share of training from which noise is filtered", low=0, high=1)
    least: int = hyper(1000, source="DuPL: losses that a mixture needs, of 448 x 448 pixels", low=1)
    gap: float = hyper(1.0, source="DuPL: least distance of its means, nats", low=0)
    certainty: float = hyper(0.95, source="DuPL: a pixel more surely noisy than this is ignored", low=0, high=1)
    confidence: float = hyper(0.9, source="DuPL: of predictions that the consistency reads", low=0, high=1)

    def __post_init__(self):
        check(self)


class Pair(nn.Module):
    """Two trunks, of which the first one is evaluated. The released code reports whichever scores better on the
    validation set, which is a choice by the score itself."""

    def __init__(self, first: Trunk, second: Trunk) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """The first trunk's logits (B, C + 1, H, W) of normalised images x (B, 3, H, W)."""
        return self.first(x)

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """The first trunk's CAM (B, C, H, W)."""
        return self.first.activation(x, scales, tags)


class DuPL(TagMethod):
    """L = sum of 4 L_cls + .2 L_ptc + .1 L_dis, after the warm-up + .2 L_seg, after 40 % + .05 L_con."""

    Settings = DuPLSettings

    def __init__(self, settings: DuPLSettings, network: Pair, *rest: Any) -> None:
        super().__init__(settings, network, *rest)
        classes, final = network.first.classifier.out_features, VOC_TARGETS
        final = torch.tensor(final if classes == len(final) else [settings.final_high] * classes)
        self.register_buffer("final", final.clamp(min=settings.final_high), persistent=False)

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings, scales = self.view(batch["tagged"]), self.settings, self.recipe.scales
        trunks = (self.network.first, self.network.second)
        predicted = [trunk.predict(view.x) for trunk in trunks]
        cams = [trunk.both_cams(view.x, scales) for trunk in trunks]
        high = self.thresholds(view, now)
        both = [tag_terms(part, view.tags) for part in predicted]
        terms = {name: both[0][name] + both[1][name] for name in both[0]}
        patches, grid = [part.tokens.patches for part in predicted], predicted[0].tokens.grid
        labels = [self.patch_labels(view, aux, grid, high) for _, aux in cams]
        terms["patches"] = settings.ptc_weight * sum(map(patch_contrast, patches, labels))
        terms["apart"] = settings.apart_weight * discrepancy(*patches)
        if self.learning(now):
            size = (view.x.shape[2], view.x.shape[3])
            logits = [bilinear(part.segmentation, size) for part in predicted]
            labels = [self.labels(view, cam, high) for cam, _ in cams]
            terms |= self.cross_terms(view, logits, labels, now.progress >= settings.clean_from)
        return Losses(terms)

    def thresholds(self, view: View, now: Now) -> Tensor:
        """High threshold (B,) of each image at this step; the first one during the warm-up."""
        begun = round(self.recipe.warm_up * now.steps)
        high = class_thresholds(now.step - begun, now.steps - begun, self.final, self.recipe.cam_high)
        return image_thresholds(high, view.tags)

    def cross_terms(self, view: View, logits: list[Tensor], labels: list[Tensor], late: bool) -> dict[str, Tensor]:
        """L_seg of each head with the other trunk's labels; if `late`, these are cleaned first and L_con is added.

        logits: (B, K, S, S) of each trunk. labels: (B, S, S) from each trunk's CAM.
        """
        settings = self.settings
        if late:  # each trunk judges the labels of its own CAM
            labels = [self.cleaned(scores, own) for scores, own in zip(logits, labels, strict=True)]
        taught = labels[::-1]
        terms = {"segmentation": settings.seg_weight * sum(map(balanced_cross_entropy, logits, taught))}
        if late:
            strong, trunks = self.views.strong(view.crop), (self.network.first, self.network.second)
            agreed = [
                consistency(trunk(strong), scores, other, settings.confidence)
                for trunk, scores, other in zip(trunks, logits, taught, strict=True)
            ]
            terms["consistency"] = settings.consistency_weight * sum(agreed)
        return terms

    def cleaned(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels (B, S, S), 255 where the logits (B, K, S, S) of the trunk that made them show that they are noise."""
        loss = F.cross_entropy(at_least_float32(logits).detach(), labels, ignore_index=IGNORE, reduction="none")
        rules = {name: getattr(self.settings, name) for name in ("least", "gap", "certainty")}
        return labels.masked_fill(noisy_labels(loss, labels, **rules), IGNORE)
