"""Class activation maps: making, normalising, thresholding, refining, and measuring them. C foreground classes.

    cam = multi_scale_cam(lambda x: raw_cam(*patches_and_grid(x)), images)      # (B, C, H, W) in [0, 1]
    labels = cam_labels(cam, tags, 0.25, high=0.7)                              # 0, 1..C, 255 in between
    labels = refined_labels(pixels, cam, tags, low=0.25, high=0.7)              # the same after refinement

CAMs are floating (B, C, H, W), tags (B, C) with 1 where an image shows a class, label maps int64 (B, H, W) with 0 for
the background, c + 1 for channel c and 255 for ignored pixels. No function writes into its arguments, and none that a
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

from repro.arrays import IGNORE
from repro.measure.segmentation import iou

SCALES = (1.0, 0.5, 1.5)  # ToCo's; PCRE trains with 1, .5, .75, 1.5
THRESHOLDS = tuple(step / 100 for step in range(100))  # of the background
DILATIONS, ITERATIONS = (1, 2, 4, 8, 12, 24), 10  # of the refinement
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
BANDWIDTH, POSITION = 0.3, 0.01  # of the refinement's affinities, and the share of the one of positions


def raw_cam(patches: Tensor, weight: Tensor, grid: tuple[int, int], rectify: bool = True) -> Tensor:
    """relu(W_c . F_n), (B, C, h, w).

    patches: (B, N, D), N = h w row by row. weight: (C, D) or (C, D, 1, 1) of a classifier without bias.
    rectify: without it W_c . F_n, which `multi_scale_cam` expects: it rectifies after resizing.
    """
    cam = F.linear(patches, weight.flatten(1)).mT.unflatten(2, grid)
    return cam.relu() if rectify else cam


def min_max(cam: Tensor) -> Tensor:
    """Each map less its smallest value, over the largest of that plus 1e-5: in [0, 1], 0 where a map is constant.

    cam: (..., H, W). At least float32.
    """
    cam = widened(cam)
    cam = cam - cam.amin((-2, -1), keepdim=True)
    return cam / (cam.amax((-2, -1), keepdim=True) + 1e-5)


@torch.no_grad()
def multi_scale_cam(
    raw: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float] = SCALES, flip: bool = True
) -> Tensor:
    """CAM (B, C, H, W) in [0, 1], of any method: over scales the sum of the larger of an image's map and its mirrored.

    raw: images (B', 3, H', W') to maps (B', C, h, w) that are not yet rectified. With flip B' = 2 B, the images and
        then their mirror images; where maps stand for other things than images, the same two halves are expected.
    images: normalised (B, 3, H, W). scales: of both sides, rounded down; each above 0.
    Raises ValueError for no scale, or one that is not positive.
    Source: released code, which always adds scale 1.
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales are {tuple(scales)}; at least one is needed and all must be positive")
    height, width = images.shape[2:]
    total = 0.0
    for scale in scales:
        seen = bilinear(images, (int(scale * height), int(scale * width)))
        cam = bilinear(widened(raw(torch.cat([seen, seen.flip(3)]) if flip else seen)), (height, width))
        if flip:
            plain, mirrored = cam.chunk(2)
            cam = torch.maximum(plain, mirrored.flip(3))
        total = total + cam.relu()
    return min_max(total)


def best_class(cam: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value (B, H, W) over the classes shown, and its label in 1..C; value 0 where no class is shown.

    Source: released code, v = cam * y, so cam must not be negative.
    """
    value, channel = (widened(cam) * tags[:, :, None, None]).max(1)
    return value, channel + 1


def cam_labels(
    cam: Tensor, tags: Tensor, low: float | Tensor, high: float | Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Label map (B, H, W) of a CAM by one threshold or two.

    cam: (B, C, H, W), not negative; tags: (B, C)
    low: pixels whose value is at most this are background; alone it is beta.
    high: of the others those up to this value are 255; None for none. Both may be (B,), one for each image (DuPL).
    valid: (B, H, W) bool, pixels that the image fills (`box_mask`, or ~padding of a crop); the others are 255.
    """
    value, label = best_class(cam, tags)
    if high is not None:
        label = label.masked_fill(value <= of_images(high), IGNORE)
    label = label.masked_fill(value <= of_images(low), 0)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


def box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (B, H, W) inside boxes (B, 4): first row, row behind the last, first column, column behind the last."""
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(side, device=boxes.device) for side in size)
    return ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]


@functools.lru_cache(maxsize=8)  # since copying offsets to a device waits for it; do not write into the tensors
def neighbourhood(size: tuple[int, int], dilations: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat index (n, H W) of the n = 8 len(dilations) neighbours of each pixel, and weights (n,) float64 by position.

    Outside the image a neighbour is the nearest pixel of it. Weights: the softmax of minus (distance / (std + 1e-8) /
    .3)^2, std unbiased over the n distances.
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

    images: (B, channels, H W) in [0, 1]. index, position: of `neighbourhood`.
    Colour: minus the mean over channels of (|difference| / (std + 1e-8) / .3)^2, std unbiased over the neighbours.
    """
    near = images[:, :, index]
    # by hand, since torch's std along an inner dimension takes several times as long
    centred = near - near.mean(2, keepdim=True)
    spread = (centred.square_().sum(2, keepdim=True) / (len(index) - 1)).sqrt() + 1e-8
    colour = near.sub_(images[:, :, None]).square_().mul_(-1 / (spread * BANDWIDTH).square()).mean(1)
    return colour.softmax(1) + POSITION * position.to(images.dtype)[:, None]


@torch.no_grad()
def refine(
    images: Tensor,
    masks: Tensor,
    dilations: Sequence[int] = DILATIONS,
    iterations: int = ITERATIONS,
    chunk: int | None = None,
) -> Tensor:
    """Pixel-adaptive refinement: masks (B, P, H, W) after each pixel took the weighted mean of its neighbours.

    images: (B, 3, H, W) in [0, 1], not normalised. masks: (B, P, h, w), resized first, with corners aligned.
    dilations: of the eight neighbours, pixels. iterations: at least 0. Each multiplies the sum of all masks by 1.01.
    chunk: images at a time. Affinities take 8 len(dilations) H W numbers an image and channel; None for all at once.
    At least float32. Raises ValueError without a dilation of at least 1.
    Source: released code (AFA, whose name for it is PAR).
    """
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations are {tuple(dilations)}; at least one is needed and all must be at least 1")
    images, size = widened(images), (images.shape[2], images.shape[3])
    masks = F.interpolate(widened(masks), size=size, mode="bilinear", align_corners=True).to(images.dtype)
    around = neighbourhood(size, tuple(dilations), images.device)
    parts = zip(images.split(chunk or len(images)), masks.split(chunk or len(images)), strict=True)
    return torch.cat([propagated(part, planes, *around, iterations) for part, planes in parts])


def propagated(images: Tensor, masks: Tensor, index: Tensor, position: Tensor, iterations: int) -> Tensor:
    """`refine` of images and masks of one size. A sum over weighted rows of a table is what an embedding bag is, so
    the 48 shifted copies of the masks are never made."""
    batch, planes, height, width = masks.shape
    weight = pixel_affinity(images.flatten(2), index, position).mT.flatten(0, 1).contiguous()
    first = torch.arange(batch, device=index.device)[:, None, None] * (height * width)
    rows = (index.mT + first).flatten(0, 1)
    table = masks.flatten(2).mT.flatten(0, 1).contiguous()
    for _ in range(iterations):
        table = F.embedding_bag(rows, table, mode="sum", per_sample_weights=weight)
    return table.unflatten(0, (batch, -1)).mT.unflatten(2, (height, width))


@torch.no_grad()
def refined_labels(
    images: Tensor,
    cam: Tensor,
    tags: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    valid: Tensor | None = None,
    dilations: Sequence[int] = DILATIONS,
    iterations: int = ITERATIONS,
    down: int = 2,
    most: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Label map (B, H, W) for the segmentation head: CAM beside a constant background, refined, for two backgrounds.

    images: (B, 3, H, W) in [0, 1]; cam: (B, C, H, W); tags: (B, C)
    low, high: values of the background, floats or (B,). A pixel is 0 where background wins against both, 255 where it
        wins only against the high one, else the class that won.
    valid: as in `cam_labels`. dilations, iterations, chunk: as in `refine`. down: the refinement's images are 1 / down
        as large, sides rounded down.
    most: classes that an image shows at most, when known: others are then not refined. None for C.
    """
    size = images.shape[2:]
    small = (size[0] // down, size[1] // down)
    order = (tags > 0).long().argsort(dim=1, descending=True, stable=True)[:, :most]
    shown = bilinear(widened(cam).gather(1, order[:, :, None, None].expand(-1, -1, *cam.shape[2:])), small)
    shown = shown.masked_fill((tags.gather(1, order) == 0)[:, :, None, None], -math.inf)
    floors = [torch.zeros_like(shown[:, 0]) + of_images(value) for value in (high, low)]
    probs = torch.cat([torch.cat([floor[:, None], shown], 1).softmax(1) for floor in floors], 1)
    winners = bilinear(refine(bilinear(widened(images), small), probs, dilations, iterations, chunk), size)
    ids = F.pad(order + 1, (1, 0))
    above, below = (ids.gather(1, part.argmax(1).flatten(1)).unflatten(1, size) for part in winners.chunk(2, 1))
    label = torch.where(above == 0, torch.where(below == 0, 0, IGNORE), above)
    return label if valid is None else label.masked_fill(~valid, IGNORE)


@torch.no_grad()
def threshold_counts(
    cam: Tensor, tags: Tensor, truth: Tensor, thresholds: Sequence[float] = THRESHOLDS, ignore: int = IGNORE
) -> Tensor:
    """Confusion counts (T, K, K) int64 of `cam_labels` at every background threshold, K = C + 1, summed over images.

    cam: (B, C, H, W), not negative, at the truth's size; tags: (B, C), the true ones in the papers' protocol
    truth: (B, H, W) integers; pixels outside [0, K), or equal to `ignore`, are left out. thresholds: T, rising.
    One histogram over (truth, class, number of thresholds passed) serves them all. Sums over batches add up.
    Raises ValueError for thresholds that do not rise.
    """
    if not thresholds or any(a >= b for a, b in pairwise(thresholds)):
        raise ValueError(f"thresholds are {tuple(thresholds)}; at least one is needed and they must rise")
    value, label = best_class(cam, tags)
    classes, levels = cam.shape[1] + 1, len(thresholds) + 1
    edges = torch.tensor(list(thresholds), dtype=value.dtype, device=value.device)
    passed = torch.searchsorted(edges, value.contiguous())
    truth = truth.long()
    counted = (truth >= 0) & (truth < classes) & (truth != ignore)
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

    counts: (T, K, K) of `threshold_counts`, summed over the set. fixed: beta, one of the thresholds.
    Returns thresholds, miou: lists of T; best, fixed: dicts of threshold, miou. miou is None where nothing was counted.
    Raises ValueError when `fixed` is not among the thresholds. The best one is chosen on the set it is reported on.
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
    """How far labels spill out of their classes; each (..., K) float64, NaN where the denominator has no pixel at all.

    ratio: FP / TP, infinite for a class that is predicted but never rightly (reconstruction: the released evaluator's
        "confusion"). share: FP / (FP + TP) = 1 - precision, in [0, 1]. spill: background pixels predicted c over the
        pixels of c, NaN for the background itself. The last two are ours.
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
    With C class tokens in front, rows [:, :C] and columns [:, :, C:] are their maps over patches.
    Source: Abnar & Zuidema (2020): heads averaged, identity added, matrices multiplied.
    """
    flow = None
    for maps in attention:
        mixed = (1 - residual) * widened(maps).mean(1)
        mixed.diagonal(dim1=1, dim2=2).add_(residual)
        flow = mixed if flow is None else mixed @ flow
    if flow is None:
        raise ValueError("there is no attention map: ask the network for those of all its blocks")
    return flow


def grad_cam(patches: Tensor, score: Callable[[Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
    """Grad-CAM (B, C, h, w): relu of the features weighted by the mean gradient of a class's score, for every class.

    patches: (B, N, D) of any layer. score: from such patches to logits (B, C); an image's logits must depend on its
        own patches only. One backward pass a class, also where gradients are switched off.
    With a global mean or maximum and a linear classifier it is `raw_cam` / N; it says more at earlier layers.
    Source: Selvaraju et al. (2017).
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


def widened(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_images(value: float | Tensor) -> float | Tensor:
    """A threshold, or one for each image (B,), so that it meets maps (B, H, W)."""
    return value[:, None, None] if isinstance(value, Tensor) and value.ndim else value
