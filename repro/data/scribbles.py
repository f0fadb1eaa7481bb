"""Scribbles drawn into masks, at any length: the supervision of the trust region paper on data with masks.

    scribbles = scribbles_of(mask, 0.5)      # 255 where nothing is marked
    pool, truth = draw_scribbles(scenes("train", 500), 0.3)      # "scenes.scribbles.30.3px@500"

Every connected region of a class, the background included, gets one stroke: a longest path through its skeleton, as a
person would draw it from end to end. Of the stroke a stretch round its middle is kept; length 0 is a click. How the
authors shortened theirs is not known, so this is our reconstruction. What is found once for all lengths is `reach_of`:
the shortest length at which a pixel is marked. A shorter scribble is therefore always part of a longer one.
"""

import functools
import hashlib
import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra
from torch import Tensor

from repro.data.masks import IGNORE, MaskPool, MaskSet

LENGTHS = (0.0, 0.3, 0.5, 0.8, 1.0)  # those of the released settings
WIDTH = 3  # pixels, as ScribbleSup is drawn (rloss)
LEAST = 16  # pixels: a smaller region is a speck that nobody would scribble on (ours)
CHUNK = 256  # images at a time: bounds the memory
EIGHT = np.ones((3, 3))


def draw_scribbles(masks: MaskSet, length: float, width: int = WIDTH, least: int = LEAST) -> tuple[MaskPool, Tensor]:
    """A pool whose labels are scribbles on every image, and the truth. Nothing is random, so there is no seed.

    length, width, least: as for `scribbles_of`
    Returns (pool, truth): pool.labels (N, H, W) uint8, 255 where not scribbled; both index lists hold all images;
    truth (N, H, W) uint8 is for reporting, never given to a method. Raises ValueError.
    """
    check(length, width, least)
    labels = torch.from_numpy(_marked(masks.masks.numpy(), _reaches(masks, width, least), length))
    everything = torch.arange(len(masks))
    digest = hashlib.sha256(f"{masks.digest} scribbles".encode())
    digest.update(labels.numpy())
    name = f"{masks.name}.scribbles.{100 * length:g}.{width}px@{len(masks)}"
    return MaskPool(masks.images, labels, everything, everything, masks.classes, name, digest.hexdigest()), masks.masks


def scribbles_of(mask: NDArray, length: float, width: int = WIDTH, least: int = LEAST) -> NDArray:
    """Scribbles of one image, (H, W) uint8: the class on a stroke, 255 elsewhere.

    mask: (H, W) uint8, classes and 255, where there is never a stroke
    length: 0..1, fraction of each stroke's arc length that is kept round its middle; 0 is a dot of width x width pixels
    width: side of the square brush in pixels, clipped to the region that the stroke lies in
    least: area in pixels below which a region has no stroke
    Raises ValueError.
    """
    check(length, width, least)
    return _marked(mask, reach_of(mask, width, least), length)


def scene_scribbles(masks: Tensor, length: float, width: int = WIDTH, least: int = LEAST) -> Tensor:
    """`scribbles_of` for many masks: (N, H, W) uint8 on the CPU. masks: (N, H, W) uint8 on the CPU."""
    check(length, width, least)
    return torch.from_numpy(_marked(masks.numpy(), reaches_of(masks.numpy(), width, least), length))


def reach_of(mask: NDArray, width: int = WIDTH, least: int = LEAST) -> NDArray:
    """The shortest length at which each pixel is marked, (H, W) float32: 0..1, inf where never.

    mask, width, least: as for `scribbles_of`
    """
    regions = _regions(mask, least)
    return paint(*_strokes(_skeleton(mask, regions), regions), mask.shape, width, regions)


def reaches_of(masks: NDArray, width: int = WIDTH, least: int = LEAST) -> NDArray:
    """`reach_of` for many masks, (N, H, W) float32. masks: (N, H, W) uint8."""
    n, height, across = masks.shape
    parts = []
    for start in range(0, n, CHUNK):
        # One tall picture whose images are parted by a line of 255: a single thinning and search for all.
        tall = np.pad(masks[start : start + CHUNK], ((0, 0), (0, 1), (0, 0)), constant_values=IGNORE)
        reach = reach_of(tall.reshape(-1, across), width, least)
        parts.append(reach.reshape(-1, height + 1, across)[:, :height])
    return np.concatenate(parts) if parts else np.zeros(masks.shape, np.float32)


def arc_reach(position: NDArray, total: NDArray | float) -> NDArray:
    """The shortest centred stretch of a stroke that holds a place: 0 in the middle, 1 at both ends.

    position: (P,) arc length from one end; total: arc length of the whole stroke, (P,) or one number, in the same unit
    """
    return np.abs(2 * position / np.where(total > 0, total, 1) - 1) * (total > 0)


def paint(
    row: NDArray, column: NDArray, reach: NDArray, shape: tuple[int, int], width: int, regions: NDArray | None = None
) -> NDArray:
    """Reach map (H, W) float32, inf where no brush comes, of strokes drawn with a square brush.

    row, column: (P,) int64, pixels of the strokes' centrelines, outside the picture only without regions; reach: (P,)
    regions: (H, W), the brush marks only pixels whose number is that under its centre; None: the whole picture
    """
    painted = np.full(shape, np.inf, np.float32)
    reach = reach.astype(np.float32)
    brush = range(-((width - 1) // 2), width // 2 + 1)
    for down, right in itertools.product(brush, brush):
        y, x = row + down, column + right
        marked = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
        if regions is not None:
            marked[marked] = regions[y[marked], x[marked]] == regions[row[marked], column[marked]]
        np.minimum.at(painted, (y[marked], x[marked]), reach[marked])
    return painted


def check(length: float, width: int = WIDTH, least: int = LEAST) -> None:
    """Raises ValueError for settings that `scribbles_of` cannot use."""
    if not 0 <= length <= 1:
        raise ValueError(f"scribble length {length} must be a fraction, 0 to 1; a hundredth of a percentage")
    if width < 1 or least < 1:
        raise ValueError(f"scribble width {width} and least area {least} must be at least 1 pixel")


@functools.lru_cache(maxsize=4)
def _reaches(masks: MaskSet, width: int, least: int) -> NDArray:
    """By identity of the set, so that all lengths of it cost one search."""
    return reaches_of(masks.masks.numpy(), width, least)


def _marked(masks: NDArray, reach: NDArray, length: float) -> NDArray:
    return np.where(reach <= np.float32(length), masks, IGNORE).astype(np.uint8)


def _regions(mask: NDArray, least: int) -> NDArray:
    """Numbers 1.. of the connected (8 neighbours) regions of a class with at least `least` pixels, 0 elsewhere."""
    regions, numbers = np.zeros(mask.shape, np.int32), 0
    for label in np.unique(mask[mask != IGNORE]):
        parts, count = ndimage.label(mask == label, EIGHT)
        kept = np.bincount(parts.ravel(), minlength=count + 1) >= least
        kept[0] = False
        number = np.where(kept, numbers + np.cumsum(kept), 0).astype(np.int32)
        regions += number[parts]
        numbers += int(kept.sum())
    return regions


def _skeleton(mask: NDArray, regions: NDArray) -> NDArray:
    """(H, W) bool: one pixel wide, in as many connected parts as there are regions."""
    from skimage.morphology import skeletonize  # takes most of a second to import

    skeleton = np.zeros(mask.shape, bool)
    for label in np.unique(mask[regions > 0]):  # regions of one class never touch: they are thinned together
        skeleton |= skeletonize((mask == label) & (regions > 0))
    return skeleton


def _strokes(skeleton: NDArray, regions: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Row, column and reach (P,) of the pixels of every region's stroke.

    From any pixel to the farthest, and from there to the farthest again: of a tree this is a longest path. Where the
    skeleton goes round a hole, it is the shorter way between two pixels far apart. Steps cost 1 or sqrt(2).
    """
    graph = _grid_graph(skeleton, regions)
    part = connected_components(graph, directed=False)[1]
    starts = np.unique(part, return_index=True)[1]
    one_end = _farthest(dijkstra(graph, directed=False, indices=starts, min_only=True), part)
    away, before, _ = dijkstra(graph, directed=False, indices=one_end, min_only=True, return_predecessors=True)
    node = _farthest(away, part)
    total, stroke = away[node], np.arange(len(node))
    nodes, strokes = [], []
    while len(node):
        nodes.append(node)
        strokes.append(stroke)
        node = before[node]
        node, stroke = node[node >= 0], stroke[node >= 0]
    node, stroke = (np.concatenate(lists or [np.zeros(0, np.int64)]) for lists in (nodes, strokes))
    reach = arc_reach(away[node], total[stroke])
    reach[_farthest(-reach, stroke)] = 0  # the click: the pixel nearest to the middle
    row, column = np.nonzero(skeleton)
    return row[node], column[node], reach


def _grid_graph(skeleton: NDArray, regions: NDArray) -> csr_matrix:
    """Skeleton pixels in raster order, joined to their eight neighbours of the same region."""
    height, across = skeleton.shape
    number = np.full(skeleton.shape, -1)
    count = int(skeleton.sum())
    number[skeleton] = np.arange(count)
    ends, costs = [], []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = np.s_[: height - down, max(0, -right) : across - max(0, right)]
        there = np.s_[down:, max(0, right) : across + min(0, right)]
        joined = skeleton[here] & skeleton[there] & (regions[here] == regions[there])
        ends.append(np.stack([number[here][joined], number[there][joined]]))
        costs.append(np.full(ends[-1].shape[1], (down**2 + right**2) ** 0.5))
    return csr_matrix((np.concatenate(costs), tuple(np.concatenate(ends, 1))), shape=(count, count))


def _farthest(distance: NDArray, part: NDArray) -> NDArray:
    """Of each connected part the node with the largest distance, the first of equals."""
    order = np.lexsort((np.arange(len(part)), -distance, part))
    return order[np.unique(part[order], return_index=True)[1]]
