"""Class activation maps (CAMs): making, normalising, thresholding, refining and measuring them.

    cam = multi_scale_cam(lambda x: raw_cam(patches(x), weight, grid), images)  # (B, C, H, W) in [0, 1]
    labels = cam_labels(cam, tags, 0.25, high=0.7)                              # 0, 1..C, 255 in between
    labels = refined_labels(pixels, cam, tags, low=0.25, high=0.7)              # the same after refinement

There are C foreground classes. CAMs are floating (B, C, H, W), tags (B, C) hold 1 where an image shows a class, and
label maps int64 (B, H, W) hold 0 for the background, c + 1 for channel c and 255 for ignored pixels. No function that a
training step calls waits for the device. "Released code" is ToCo's unless another is named.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from repro.arrays import IGNORE, at_least_float32
from repro.measure.segmentation import iou

THRESHOLDS = tuple(step / 100 for step in range(100))  # of the background
DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10  # of the refinement
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
BANDWIDTH, POSITION = 0.3, 0.01  # of the refinement's affinities, and the weight of the one by position


def raw_cam(patches: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """W_c . F_n, (B, C, h, w), not rectified: `multi_scale_cam` rectifies after resizing.

    patches: (B, N, D), N = h w row by row. weight: (C, D) of a classifier without bias.
    """
    return F.linear(patches, weight).mT.unflatten(2, grid)


def min_max(cam: Tensor) -> Tensor:
    """Each map (..., H, W) less its smallest value, over the largest of that plus 1e-5: in [0, 1], 0 if constant."""
    cam = at_least_float32(cam)
    cam = cam - cam.amin((-2, -1), keepdim=True)
    return cam / (cam.amax((-2, -1), keepdim=True) + 1e-5)


@torch.no_grad()
def multi_scale_cam(raw: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float]) -> Tensor:
    """CAM (B, C, H, W) in [0, 1] of any method: the sum over scales of the larger of an image's map and its mirrored.

    raw: images (2 B, 3, H', W'), the second half mirrored, to maps (2 B, C, h, w) that are not yet rectified.
    images: normalised (B, 3, H, W). scales: of both sides, rounded down.
    Raises ValueError for no scale, or one that is not positive. Source: released code, which always adds scale 1.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales are {tuple(scales)}; at least one is needed and all must be positive")
    height, width = images.shape[2:]
    total = 0.0
    for scale in scales:
        seen = bilinear(images, (int(scale * height), int(scale * width)))
        plain, mirrored = bilinear(at_least_float32(raw(torch.cat([seen, seen.flip(3)]))), (height, width)).chunk(2)
        total = total + torch.maximum(plain, mirrored.flip(3)).relu()
    return min_max(total)


def best_class(cam: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value (B, H, W) over the classes shown, and its label in 1..C; value 0 where no class is shown.

    The CAM must not be negative. Source: released code, v = cam * y.
    """
    value, channel = (at_least_float32(cam) * tags[:, :, None, None]).max(1)
    return value, channel + 1


def cam_labels(
    cam: Tensor, tags: Tensor, low: float | Tensor, high: float | Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Label map (B, H, W) of a CAM by one threshold or two.

    cam: (B, C, H, W), not negative. tags: (B, C).
    low: pixels whose value is at most this are background. A single threshold is beta.
    high: the others up to this value are 255; None for none. Both may be (B,), one for each image (DuPL).
    valid: (B, H, W) bool; other pixels are 255.
    """
    value, label = best_class(cam, tags)
    if high is not None:
        label = label.masked_fill(value <= of_images(high), IGNORE)
    label = label.masked_fill(value <= of_images(low), 0)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


@functools.lru_cache(maxsize=8)  # since copying offsets to a device waits for it; do not write into the tensors
def neighbourhood(size: tuple[int, int], dilations: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat index (n, H W) of the n = 8 len(dilations) neighbours of each pixel, and weights (n,) float64 by position.

    A neighbour outside the image is the image's nearest pixel. The weights are the softmax of
    -(distance / (std + 1e-8) / .3)^2, std unbiased over the n distances.
    """
    height, width = size
    steps = torch.tensor([(d * row, d * column) for d in dilations for row, column in AROUND])
    distance = steps.double().square().sum(1).sqrt()
    near = -(distance / (distance.std() + 1e-8) / BANDWIDTH).square()
    rows = (torch.arange(height) + steps[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + steps[:, 1:]).clamp(0, width - 1)
    index = (rows[:, :, None] * width + columns[:, None]).flatten(1)
    return index.to(device), near.softmax(0).to(device)


def pixel_affinity(images: Tensor, index: Tensor, position: Tensor) -> Tensor:
    """Weights (B, n, H W) of each pixel's n neighbours: a softmax by colour plus .01 times one by position.

    images: (B, channels, H W) in [0, 1]. index, position: of `neighbourhood`. The logit by colour is minus the mean
    over channels of (|difference| / (std + 1e-8) / .3)^2, std unbiased over the neighbours.
    """
    near = images[:, :, index]
    # by hand, since torch's std along an inner dimension takes several times as long
    centred = near - near.mean(2, keepdim=True)
    spread = (centred.square_().sum(2, keepdim=True) / (len(index) - 1)).sqrt() + 1e-8
    colour = near.sub_(images[:, :, None]).square_().mul_(-1 / (spread * BANDWIDTH).square()).mean(1)
    return colour.softmax(1) + POSITION * position.to(images.dtype)[:, None]


@torch.no_grad()
def refine(
    images: Tensor, masks: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = ITERATIONS
) -> Tensor:
    """Pixel-adaptive refinement: masks (B, P, H, W) after each pixel took the weighted mean of its neighbours.

    images: (B, 3, H, W) in [0, 1], not normalised. masks: (B, P, h, w), resized first, with corners aligned.
    dilations: of the eight neighbours, pixels. Each iteration multiplies the sum of all masks by 1.01.
    Raises ValueError without a dilation of at least 1. Source: released code (AFA, which calls it PAR).
    """
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations are {tuple(dilations)}; at least one is needed and all must be at least 1")
    images, size = at_least_float32(images), (images.shape[2], images.shape[3])
    masks = F.interpolate(at_least_float32(masks), size=size, mode="bilinear", align_corners=True).to(images.dtype)
    index, position = neighbourhood(size, tuple(dilations), images.device)
    weight = pixel_affinity(images.flatten(2), index, position).mT.flatten(0, 1).contiguous()
    first = torch.arange(len(masks), device=index.device)[:, None, None] * (size[0] * size[1])
    rows = (index.mT + first).flatten(0, 1)
    table = masks.flatten(2).mT.flatten(0, 1).contiguous()
    for _ in range(iterations):  # an embedding bag sums weighted rows, so no shifted copy of the masks is made
        table = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weight)
    return table.unflatten(0, (len(masks), -1)).mT.unflatten(2, size)


@torch.no_grad()
def refined_labels(
    images: Tensor, cam: Tensor, tags: Tensor, low: float | Tensor, high: float | Tensor, valid: Tensor | None = None,
    dilations: Sequence[int] = DILATIONS, iterations: int = ITERATIONS, most: int | None = None,
) -> Tensor:  # fmt: skip
    """Label map (B, H, W) for the segmentation head: the CAM and a constant background, refined at half the size.

    images: (B, 3, H, W) in [0, 1]. cam: (B, C, H, W). tags: (B, C).
    low, high: two values of the background, floats or (B,). A pixel is 0 where the background wins with both, 255 where
        it wins only with the high one, else the class that won.
    valid: as in `cam_labels`. dilations, iterations: as in `refine`.
    most: the largest number of classes in an image, if known: no others are refined. None for C.
    """
    size = images.shape[2:]
    small = (size[0] // 2, size[1] // 2)
    order = (tags > 0).long().argsort(dim=1, descending=True, stable=True)[:, :most]
    shown = bilinear(at_least_float32(cam).gather(1, order[:, :, None, None].expand(-1, -1, *cam.shape[2:])), small)
    shown = shown.masked_fill((tags.gather(1, order) == 0)[:, :, None, None], -math.inf)
    floors = [torch.zeros_like(shown[:, 0]) + of_images(value) for value in (high, low)]
    probs = torch.cat([torch.cat([floor[:, None], shown], 1).softmax(1) for floor in floors], 1)
    winners = bilinear(refine(bilinear(at_least_float32(images), small), probs, dilations, iterations), size)
    ids = F.pad(order + 1, (1, 0))
    above, below = (ids.gather(1, part.argmax(1).flatten(1)).unflatten(1, size) for part in winners.chunk(2, 1))
    label = torch.where(above == 0, torch.where(below == 0, 0, IGNORE), above)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


@torch.no_grad()
def threshold_counts(cam: Tensor, tags: Tensor, truth: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Confusion counts (T, K, K) int64 of `cam_labels` at every background threshold, K = C + 1, summed over images.

    cam: (B, C, H, W), not negative, at the truth's size. tags: (B, C), the true ones in the papers' protocol.
    truth: (B, H, W) integers; pixels outside [0, K) are left out. thresholds: T, rising, else ValueError.
    One histogram over (truth, class, number of thresholds passed) serves all thresholds.
    """
    if not thresholds or any(a >= b for a, b in pairwise(thresholds)):
        raise ValueError(f"thresholds are {tuple(thresholds)}; at least one is needed and they must rise")
    value, label = best_class(cam, tags)
    classes, levels = cam.shape[1] + 1, len(thresholds) + 1
    edges = torch.tensor(list(thresholds), dtype=value.dtype, device=value.device)
    passed = torch.searchsorted(edges, value.contiguous())
    truth = truth.long()
    counted = (truth >= 0) & (truth < classes)
    cell = torch.where(counted, (truth * classes + label) * levels + passed, classes**2 * levels).flatten()
    counts = cell.new_zeros(classes**2 * levels + 1).scatter_add_(0, cell, torch.ones_like(cell))
    counts = counts[:-1].view(classes, classes, levels)
    kept = counts.flip(2).cumsum(2).flip(2)[..., 1:]
    background = (counts.sum(2, keepdim=True) - kept).sum(1)
    kept[:, 0] += background
    return kept.permute(2, 0, 1)


def curve_miou(counts: Tensor) -> Tensor:
    """Mean IoU (T,) over the classes in the truth, NaN if there are none. counts: (T, K, K) of `threshold_counts`."""
    return iou(counts).masked_fill(counts.sum(-1) == 0, math.nan).nanmean(-1)


def curve_report(counts: Tensor, thresholds: Sequence[float] = THRESHOLDS, fixed: float = 0.5) -> dict:
    """Mean IoU at every background threshold, at the best one (the lowest of equals) and at the fixed one, as floats.

    counts: (T, K, K) of `threshold_counts`, summed over the set. fixed: beta, one of the thresholds, else ValueError.
    Returns thresholds, miou: lists of T; best, fixed: dicts of threshold, miou. miou is None where nothing was counted.
    The best threshold is chosen on the set that it is reported on.
    """
    if fixed not in thresholds:
        raise ValueError(f"the fixed threshold {fixed} is not among the {len(thresholds)} that were counted")
    miou = [None if math.isnan(value) else value for value in curve_miou(counts).tolist()]
    best = max(range(len(miou)), key=lambda at: (miou[at] or 0.0, -at))
    marks = {"best": best, "fixed": list(thresholds).index(fixed)}
    return {"thresholds": list(thresholds), "miou": miou} | {
        name: {"threshold": thresholds[at], "miou": miou[at]} for name, at in marks.items()
    }


class OverActivation(NamedTuple):
    """How far labels spill out of their classes; each (..., K) float64, NaN for 0 / 0.

    ratio: FP / TP, infinite for a class that is predicted but never rightly (reconstruction: the released evaluator's
        "confusion"). share: FP / (FP + TP) = 1 - precision, in [0, 1]. spill: background pixels predicted c over the
        pixels of c, NaN for the background itself. The last two are not in the papers.
    """

    ratio: Tensor
    share: Tensor
    spill: Tensor


def over_activation(counts: Tensor) -> OverActivation:
    """Over-activation by class from confusion counts (..., K, K), rows are the truth, class 0 is the background."""
    counts = counts.double()
    true = counts.diagonal(dim1=-2, dim2=-1)
    false = counts.sum(-2) - true
    spill = counts[..., 0, :] / counts.sum(-1)
    spill = torch.cat([torch.full_like(spill[..., :1], math.nan), spill[..., 1:]], -1)
    spill = spill.masked_fill(counts.sum(-1) == 0, math.nan)
    return OverActivation(false / true, false / (false + true), spill)


def attention_rollout(attention: Iterable[Tensor], residual: float = 0.5) -> Tensor:
    """How much each token draws on each input token, (B, T, T); rows sum to 1 where the maps' do.

    attention: (B, heads, T, T) of all blocks, the first one first. residual: share of the identity, in [0, 1).
    Raises ValueError without a map. Source: Abnar & Zuidema (2020): average heads, add the identity, multiply.
    """
    flow = None
    for maps in attention:
        mixed = (1 - residual) * at_least_float32(maps).mean(1)
        mixed.diagonal(dim1=1, dim2=2).add_(residual)
        flow = mixed if flow is None else mixed @ flow
    if flow is None:
        raise ValueError("there is no attention map: ask the network for those of all its blocks")
    return flow


def grad_cam(patches: Tensor, score: Callable[[Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
    """Grad-CAM (B, C, h, w): relu of the features weighted by the mean gradient of a class's score, for every class.

    patches: (B, N, D) of any layer. score: from such patches to logits (B, C); an image's logits must depend on its
        own patches only. It takes one backward pass a class, also where gradients are switched off.
    Behind a global mean or maximum and a linear classifier it is relu(`raw_cam`) / N. Source: Selvaraju et al. (2017).
    """
    with torch.enable_grad():
        patches = patches.detach().requires_grad_()
        totals = score(patches).sum(0).unbind()
        slopes = [torch.autograd.grad(total, patches, retain_graph=True)[0].mean(1) for total in totals]
    return torch.einsum("bnd,cbd->bcn", patches.detach(), torch.stack(slopes)).relu().unflatten(2, grid)


def bilinear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps resized with free corners; unchanged at their own size."""
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def of_images(value: float | Tensor) -> float | Tensor:
    """A threshold that broadcasts with maps (B, H, W): a number, or (B,) made (B, 1, 1)."""
    return value[:, None, None] if isinstance(value, Tensor) and value.ndim else value
