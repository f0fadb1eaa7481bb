"""What methods for few labels share: forward passes, pseudo-labels, ramps, distribution alignment, mixing, margins."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.models.modes import held_statistics
from repro.settings import check
from repro.train import Items, Losses, Method, Now


def probabilities(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from normalised images (n, C, H, W) to softmax probabilities (n, K) in float32."""
    return lambda images: network(images).float().softmax(dim=1)


def three_views(
    network: nn.Module, views: Views, labelled: Items, unlabelled: Items, teacher: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in float32 of labelled weak (B, K), unlabelled weak (U, K; detached) and strong (U, K) views, and the
    unlabelled weak images (U, C, H, W).

    teacher: the averaged network, in evaluation mode; where CTAugment makes the strong view, it first learns from the
        teacher's prediction of a labelled probe (released code).
    One forward of the concatenation, so batch statistics mix all three (USB, TorchSSL).
    """
    views.learn(probabilities(teacher), labelled.images, labelled.labels)
    weak = views.weak(unlabelled.images)
    images = torch.cat([views.weak(labelled.images), weak, views.strong(unlabelled.images)])
    sizes = [len(labelled.images), len(unlabelled.images), len(unlabelled.images)]
    labelled_logits, weak_logits, strong_logits = network(images).float().split(sizes)
    return labelled_logits, weak_logits.detach(), strong_logits, weak


class Checked:
    """Settings that refuse a value of the wrong type or outside its range when they are made."""

    def __post_init__(self):
        check(self)


class FewLabels(Method):
    """What the constructors of most methods keep. classes: K; pool_size: images in the pool, for buffers by index."""

    def __init__(self, settings: Any, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes


class WeakToStrong(FewLabels):
    """FixMatch and its descendants: cross-entropy of the labelled views, and the terms of `unlabelled`."""

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        """Weighted terms, and hard labels as "positive", of the images with pool indices `index` (U,).

        weak_logits: (U, K), without gradient; strong_logits: (U, K). State moves by assigning buffers.
        """
        raise TypeError(f"{type(self).__name__} does not define unlabelled()")

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        logits, weak_logits, strong_logits, _ = three_views(self.network, self.views, labelled, unlabelled, now.teacher)
        losses = self.unlabelled(weak_logits, strong_logits, unlabelled.index)
        return Losses({"supervised": F.cross_entropy(logits, labelled.labels)} | losses.terms, losses.pseudo)


# Pseudo-labels


def pseudo_label(weak_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax (U,) int64 and maximum softmax (U,) of weak_logits (U, K), both without gradient."""
    confidence, label = weak_logits.detach().softmax(dim=1).max(dim=1)
    return label, confidence


def consistency_loss(strong_logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """mean_b weight_b CE(label_b, softmax(strong_logits_b)): the mean runs over all U samples, unselected ones too.

    strong_logits: (U, K); label: (U,) int64; weight: (U,) in [0, 1] or bool. Source: FixMatch, Eq. 4.
    """
    return (F.cross_entropy(strong_logits, label, reduction="none") * weight).mean()


def linear_ramp(progress: float, length: float) -> float:
    """min(1, progress / length): weight of an unlabelled loss, 0 at the start.

    progress, length: fractions of training in [0, 1]; length 0: no ramp. Source: released code (USB, TorchSSL).
    """
    return min(1.0, progress / length) if length > 0 else 1.0


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """mean over samples and classes of (softmax(logits) - target)^2; the target gets no gradient.

    logits: (n, K); target: (n, K), probabilities. Source: released code (TorchSSL); MixMatch, Eq. 4.
    """
    return F.mse_loss(logits.softmax(dim=1), target.detach())


# Distribution alignment

EPS = 1e-6  # of released code (ReMixMatch, USB); TorchSSL divides without it


def align(probs: Tensor, prior: Tensor, marginal: Tensor) -> Tensor:
    """Probabilities (n, K) scaled class by class by prior / marginal, rows summing to 1 again.

    prior: (K,), class frequencies of the labelled set; marginal: (K,), running mean of the predictions.
    Source: ReMixMatch (distribution alignment); released code.
    """
    scaled = probs * (prior + EPS) / (marginal + EPS)
    return scaled / scaled.sum(dim=1, keepdim=True)


def follow(marginal: Tensor, probs: Tensor, decay: float) -> Tensor:
    """The running mean (K,) of the predictions after a batch (n, K).

    marginal: (K,), all zero before the first batch, which then sets it. Source: released code (USB, TorchSSL).
    """
    batch_mean = probs.mean(dim=0)
    return torch.where(marginal.sum() > 0, decay * marginal + (1 - decay) * batch_mean, batch_mean)


# Mixing


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """p_k^(1/T) / sum_j p_j^(1/T), through logarithms so that a small T does not underflow.

    probs: (n, K), rows sum to 1; temperature: T > 0, below 1 sharpens. Source: MixMatch, Eq. 7.
    """
    return (probs.log() / temperature).softmax(dim=1)


def draw_weight(alpha: float, device: torch.device) -> Tensor:
    """l ~ Beta(alpha, alpha), one for a whole batch, 0-dim, drawn on the device so that nothing waits for the host.

    Source: TorchSSL, USB, CalibrateMix's released code; the papers of MixMatch and ReMixMatch draw one l a sample.
    """
    concentration = torch.full((), alpha, device=device)
    return torch.distributions.Beta(concentration, concentration, validate_args=False).sample()


def mixup(images: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """l v + (1 - l) v[partner] of images (n, C, H, W) and of targets (n, K), with one permutation and one weight.

    The weight is folded, max(l, 1 - l). Source: MixMatch, Eq. 8 to 11; released code (TorchSSL).
    """
    drawn = draw_weight(alpha, images.device)
    weight = torch.maximum(drawn, 1 - drawn)
    partner = torch.randperm(len(images), device=images.device)
    mixed_images, mixed_targets = (weight * values + (1 - weight) * values[partner] for values in (images, targets))
    return mixed_images, mixed_targets


def interleaving(size: int, chunks: int, device: torch.device | str) -> Tensor:
    """The order (size * chunks,) in which chunk 0 swaps its g-th group with that of chunk g; its own inverse.

    Chunk 0 then holds a share of every chunk, so the statistics taken from it are those of the whole batch.
    size: samples in a chunk; a chunk is cut into `chunks` groups, equal or one longer at the end.
    Source: released code (MixMatch, TorchSSL); USB leaves it out.
    """
    order = torch.arange(size * chunks, device=device).view(chunks, size)
    swapped = order.clone()
    shorter = chunks - size % chunks
    ends = [group * (size // chunks) + max(0, group - shorter) for group in range(chunks + 1)]
    for group in range(1, chunks):
        part = slice(ends[group], ends[group + 1])
        swapped[0, part], swapped[group, part] = order[group, part], order[0, part]
    return swapped.flatten()


def chunked_logits(network: nn.Module, images: Tensor, size: int, interleaved: bool) -> Tensor:
    """Logits (n, K) in float32 of one forward for each `size` images; the first alone moves the BN averages.

    images: (n, C, H, W), n a multiple of size; interleaved: see `interleaving`, undone in the logits.
    Source: released code (TorchSSL).
    """
    order = interleaving(size, len(images) // size, images.device) if interleaved else None
    first, *others = (images if order is None else images[order]).split(size)
    logits = [network(first)]
    with held_statistics(network):
        logits += [network(chunk) for chunk in others]
    joined = torch.cat(logits).float()
    return joined if order is None else joined[order]


# Margins


def margins(logits: Tensor) -> Tensor:
    """z_c - max_{j != c} z_j for every class: above 0 for the argmax alone, by how much it leads.

    logits: (n, K), K at least 2. Returns (n, K) without gradient.
    Source: AUM (Pleiss et al., 2020) for c = y; MarginMatch, pseudo-margins for every c.
    """
    logits = logits.detach()
    (first, second), leader = logits.topk(2).values.unbind(dim=1), logits.argmax(dim=1, keepdim=True)
    return (logits - first[:, None]).scatter(1, leader, (first - second)[:, None])


def zeroed_margins(logits: Tensor) -> Tensor:
    """`margins` as MarginMatch's released code has them: the runner-up is sought after the top logit was set to 0.

    So the argmax's margin is the whole top logit where all others are negative. Shapes as in `margins`.
    """
    logits = logits.detach()
    first = logits.amax(dim=1, keepdim=True)
    leads = logits == first
    second = logits.masked_fill(leads, 0).amax(dim=1, keepdim=True)
    return torch.where(leads, logits - second, logits - first)


def last_of_each(index: Tensor) -> Tensor:
    """Mask (n,) of the last occurrence of each value of index (n,)."""
    return repeats(index)[1] == torch.arange(len(index), device=index.device)


def repeats(index: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of index (n,) are equal, (n, n) bool, and the position of the last of them, (n,) int64."""
    same = index[:, None] == index
    return same, (same * torch.arange(len(index), device=index.device)).amax(dim=1)


def add_margins(total: Tensor, visits: Tensor, index: Tensor, margin: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Margin sums (N,) and visit counts (N,) int64 after a batch; AUM_i is `area_under_margin` of the two.

    index: (n,) int64 in 0..N-1; margin: (n,), of the true class; counted: (n,) bool, entries to record.
    Source: AUM; CalibrateMix, step 2.
    """
    same, last = repeats(index)
    heard = same & counted
    # Repeats of an index all write the sum at its last place, so the order of writing does not matter.
    added = torch.where(heard, margin.to(total.dtype), 0).sum(dim=1)[last]
    return total.scatter(0, index, total[index] + added), visits.scatter(0, index, visits[index] + heard.sum(dim=1))


def area_under_margin(total: Tensor, visits: Tensor) -> Tensor:
    """AUM: the mean margin, total / visits, 0 before the first visit; large is easy. Shapes alike."""
    return total / visits.clamp(min=1)


def average_margins(
    average: Tensor, visits: Tensor, index: Tensor, margin: Tensor, delta: float, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """APM (N, K) and visit counts (N,) int64 after a batch: A <- a m + (1 - a) A with a = delta / (1 + visits so far).

    index: (n,) int64; margin: (n, K), of every class; delta: in [0, 1], at 1 an arithmetic mean.
    counted: (n,) bool, entries to record; those of one index follow one another in the order of the batch.
    Source: MarginMatch; CalibrateMix, step 4.
    """
    same, last = repeats(index)
    heard = same & counted
    rate = counted.to(average.dtype) * delta / (1 + visits[index] + heard.tril(-1).sum(dim=1))
    kept = 1 - rate
    share = rate * torch.where(heard.triu(1), kept, 1).prod(dim=1)  # what later entries leave of each
    left = torch.where(heard, kept, 1).prod(dim=1)
    with torch.autocast(index.device.type, enabled=False):  # a product of matrices would be rounded to bfloat16
        recorded = (same * share) @ margin.to(average.dtype)
    rows = (left[:, None] * average[index] + recorded)[last]
    return average.index_put((index,), rows), visits.scatter(0, index, visits[index] + heard.sum(dim=1))
