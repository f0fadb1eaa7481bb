"""Scribbles drawn into masks at any length, and ScribbleSup's scribbles by hand in the layouts that releases read.

    scribbles = scribbles_of(mask, 0.5)      # 255 where nothing is marked
    pool, truth = draw_scribbles(scenes("train", 500), 0.3)      # "scenes.scribbles.30.3px@500"

Every connected region of a class, the background included, gets one stroke: a longest path through its skeleton, as a
person would draw it from end to end. Of the stroke a stretch round its middle is kept; length 0 is a click. How the
authors shortened theirs is not known, so this is our reconstruction. What is found once for all lengths is `reach_of`:
the shortest length at which a pixel is marked. A shorter scribble is therefore always part of a longer one.

    scribbled = open_scribbles(0.3, root="~/data")      # ScribbleSup beside VOC 2012; or $REPRO_DATA
    pool = framed(scribbled)      # whole images in frames of 500 x 500; `PaddedViews` crops them on the device

A folder of scribbles is a `MaskFolder`, so that images are read, checked, scaled and cropped by the same code.

| folder, in VOC's or beside it | holds |
| --- | --- |
| pascal_2012_scribble/ | PNG, 0..20, 255 where not scribbled (rloss; 10,582 images of train_aug) |
| pascal_2012_scribble0.8/, ...0.5/, ...0.3/, ...0/ | the same, shortened (names: trust region's released loader) |
| scribble_annotation/pascal_2012/ | XML with a polyline for each stroke (ScribbleSup's original) |

Where there is no folder of a length, strokes of the XML are shortened here: a stretch round their middle. The authors'
own way of shortening is not published.
"""

import functools
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, dijkstra
from torch import Tensor

from repro.arrays import Items
from repro.data.catalogue import DataError
from repro.data.folders import VOC_CLASSES, MaskFolder, open_masks, voc_mask
from repro.data.mask_views import PADDING, Crop, MaskViews, Window
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


# ScribbleSup


FRAME = 500  # pixels: no image of VOC is wider or higher
PNG, XML = "pascal_2012_scribble", Path("scribble_annotation", "pascal_2012")
GET = (
    f"To get it: pascal_2012_scribble.zip (linked from github.com/meng-tang/rloss) unpacked to VOC2012/{PNG}/, or "
    f"scribble_annotation.zip (jifengdai.org/downloads/scribble_sup) to VOC2012/{XML.as_posix()}/; lengths below 1 "
    f"need the latter, or PNGs of their own in {PNG}0.3/ and so on"
)
# The XML files shorten five of VOC's names.
TAGS = {name: label for label, name in enumerate(VOC_CLASSES)} | {
    "plane": 1, "bike": 2, "table": 11, "plant": 16, "monitor": 20,
}  # fmt: skip


def open_scribbles(length: float, root: str | os.PathLike | None = None) -> MaskFolder:
    """The images of VOC's train_aug with their scribbles in place of masks, which are not opened.

    length: 0..1, of each stroke's arc length; 0 is a click
    root: as for `open_masks`; the lists and files of VOC must be complete
    Raises ValueError for the length; DataError, which says what is missing and how to get it.
    """
    check(length)
    voc = open_masks("voc", "train_aug", root)
    base = voc.pairs[0][0].parent.parent
    drawn = Path(f"{PNG}{'' if length == 1 else f'{length:g}'}")
    looked = [place / name for name in (drawn, XML) for place in dict.fromkeys((base, base.parent, voc.root))]
    folder = next((path for path in looked if path.is_dir()), None)
    if folder is None:
        raise DataError(f"scribbles of length {length:g}: none of {', '.join(map(str, looked))}. {GET}")
    ready = folder.name == drawn.name
    pairs = tuple((image, folder / f"{image.stem}.{'png' if ready else 'xml'}") for image, _ in voc.pairs)
    missing = [str(path) for _, path in pairs if not path.is_file()]
    if missing:
        raise DataError(f"scribbles: {len(missing)} files are missing, first {', '.join(missing[:5])}. {GET}")
    digest = hashlib.sha256(f"{voc.digest} {length:g} {ready}".encode())
    for _, path in pairs:
        digest.update(f"\n{path.name} {path.stat().st_size}".encode())
    decode = voc_mask if ready else functools.partial(xml_scribbles, length=length)
    source = replace(voc.source, name=f"scribblesup.{100 * length:g}", decode=decode, budgets={}, get=GET)
    return replace(voc, source=source, pairs=pairs, digest=digest.hexdigest())


def xml_scribbles(path: Path, length: float, width: int = WIDTH) -> NDArray:
    """ScribbleSup's polylines drawn `width` pixels wide, (H, W) uint8: a class or 255; a later stroke lies on top.

    length, width: as for `scribbles_of`; the brush is square, while rloss drew with a pen
    Coordinates count from 0, as public readers take them; strokes that leave the picture are cut off.
    Raises DataError.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = tuple(int(root.findtext(f"size/{name}", "")) for name in ("height", "width"))
        strokes = [
            (
                polygon.findtext("tag", "").strip(),
                [[float(point.findtext(axis, "")) for axis in "YX"] for point in line],
            )
            for polygon in root.iter("polygon")
            if (line := polygon.findall("point"))
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path} holds no ScribbleSup strokes ({error!r}); fetch it again. {GET}") from error
    scribbles = np.full(size, IGNORE, np.uint8)
    for tag, points in strokes:
        if tag not in TAGS:
            raise DataError(f"{path} scribbles on {tag!r}; known: {', '.join(TAGS)}")
        row, column, reach = trace(np.array(points))
        scribbles[paint(row, column, reach, size, width) <= np.float32(length)] = TAGS[tag]
    return scribbles


def trace(points: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Row, column (int64) and reach (float64) of the pixels along a polyline, (P,) each.

    points: (V, 2) rows and columns. Neighbouring pixels touch at least by a corner.
    """
    ends = np.abs(np.diff(points, axis=0))
    steps = np.ceil(ends.max(1, initial=0)).astype(int).clip(1)
    at = np.concatenate([[0.0], *(i + np.arange(1, n + 1) / n for i, n in enumerate(steps))])  # in vertices
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*ends.T))])
    vertex = np.arange(len(points))
    row, column = (np.rint(np.interp(at, vertex, values)).astype(np.int64) for values in points.T)
    reach = arc_reach(np.interp(at, vertex, arc), arc[-1])
    reach[reach.argmin()] = 0
    return row, column, reach


@dataclass(frozen=True, eq=False)
class FramePool:
    """Whole images of a folder with their labels, each in the top left corner of a square frame, without chance.

    So a label map of each image, (N, side, side), can be kept by pool index and cropped like its labels. Files are read
    at every `take`: the host keeps no image, the device one batch.

    labelled, unlabelled: all positions in `folder.pairs`, int64 on the CPU; labels: empty, it only tells the device
    """

    folder: MaskFolder
    side: int
    labelled: Tensor
    unlabelled: Tensor
    name: str
    digest: str
    threads: ThreadPoolExecutor
    labels: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folder.classes

    @property
    def size(self) -> tuple[int, int, int]:
        """(N, side, side)."""
        return len(self.folder), self.side, self.side

    def to(self, device: torch.device | str) -> "FramePool":
        """The same pool whose items are delivered to `device`."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Items:
        """Frames of these images, (B, 3, side, side) uint8, 0 where padded, and labels (B, side, side), 254 there.

        index: (B,) int64, on the CPU if reading is not to wait for the device. Raises DataError.
        """
        frames = list(self.threads.map(self._frame, index.tolist()))
        device = self.labels.device
        images, labels = (torch.stack(parts).to(device, non_blocking=True) for parts in zip(*frames, strict=True))
        return Items(index.to(device, non_blocking=True), images, labels)

    def _frame(self, number: int) -> tuple[Tensor, Tensor]:
        image, label = self.folder.read(number)
        height, width = label.shape
        if max(height, width) > self.side:
            path = self.folder.pairs[number][0]
            raise DataError(f"{path} is {width} x {height}; frames have {self.side} x {self.side}: ask for larger ones")
        rest = (0, self.side - width, 0, self.side - height)
        return F.pad(image, rest), F.pad(label, rest, value=PADDING)


def framed(folder: MaskFolder, side: int = FRAME, workers: int = 8) -> FramePool:
    """A pool of all images of a folder, with its labels, in frames of `side` pixels. workers: threads that read files.

    A uint8 map of each image of ScribbleSup takes 2.6 GB: where proposals are kept, and in every checkpoint.
    """
    everything = torch.arange(len(folder))
    digest = hashlib.sha256(f"{folder.digest} {side}".encode()).hexdigest()
    return FramePool(
        folder, side, everything, everything, f"{folder.name}@{len(folder)}", digest, ThreadPoolExecutor(workers),
        torch.empty(0, dtype=torch.uint8),
    )  # fmt: skip


class PaddedViews(MaskViews):
    """Views of images in frames (`FramePool`): each is scaled by its own size and cropped inside itself.

    scale: of the short side over the crop, where `MaskViews` has the long side over the image's. The short side is an
    integer, drawn uniformly with both ends; only images smaller than the crop are padded.
    Source: released code (rloss, robust_trust_region).
    """

    def crop(self, images: Tensor, masks: Tensor) -> Crop:
        """As of `MaskViews`. masks: 254 right of and below an image of at least one pixel, and nowhere else."""
        inside = masks != PADDING
        sizes = inside.any(2).sum(1), inside.any(1).sum(1)
        draws = torch.rand(4, len(images), generator=self.generator, device=images.device, dtype=torch.float64)
        window = frame_window(draws, *sizes, masks.shape[1], self.size, self.scale, self.flip)
        labels = window.maps(masks, IGNORE)
        return Crop(window.images(images), labels, window.outside, window)


def frame_window(
    draws: Tensor, height: Tensor, width: Tensor, side: int, size: int, scale: tuple[float, float], flip: bool
) -> Window:
    """`mask_views.draw_window` for images of different sizes in frames of `side` pixels.

    draws: (4, B) float64, uniform in [0, 1): short side, row, column, flip. height, width: (B,) int64, of the images.
    size: of the crops. scale: as for `PaddedViews`; the other side is rounded down (released code).
    """
    short = torch.minimum(height, width)
    low, high = (int(size * factor) for factor in scale)
    target = low + (draws[0] * (high - low + 1)).long()
    extents = [extent * target // short for extent in (height, width)]
    top, left = (
        (draw * ((extent - size).clamp(min=0) + 1)).long() for draw, extent in zip(draws[1:3], extents, strict=True)
    )
    output = torch.arange(size, device=draws.device)
    down = output + top[:, None]
    across = torch.where((draws[3] < 0.5)[:, None] & flip, size - 1 - output, output) + left[:, None]
    outside = (down >= extents[0][:, None])[:, :, None] | (across >= extents[1][:, None])[:, None]
    row, row_weights = resampling(down, height, extents[0], side)
    column, column_weights = resampling(across, width, extents[1], side)
    return Window(row, column, row_weights, column_weights, outside)


def resampling(position: Tensor, old: Tensor, new: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Nearest source index (B, S), and weights (B, S, side) of Pillow's bilinear filter, which averages when shrinking.

    position: (B, S) int64, row or column of the scaled image. old, new: (B,), its extent before and after.
    """
    nearest = torch.minimum((2 * position + 1) * old[:, None] // (2 * new[:, None]), old[:, None] - 1)
    ratio = (old / new)[:, None]
    centre = (position + 0.5) * ratio - 0.5
    source = torch.arange(side, device=position.device)
    weights = (1 - (source - centre[..., None]).abs() / ratio.clamp(min=1)[..., None]).clamp_(min=0)
    weights = weights * (source < old[:, None, None])
    return nearest, weights / weights.sum(2, keepdim=True).clamp(min=1e-6)
