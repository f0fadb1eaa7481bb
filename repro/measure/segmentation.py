"""Segmentation metrics: confusion counts, IoU, boundaries, pixel calibration, and the two protocols of evaluation.

Label maps are integers (B, H, W); `ignore` marks pixels that no metric sees: there the prediction takes the truth's
place, so they count for nothing, and objects end at them. Counts are int64 sums over the whole set, made on the
device without waiting for it; results are fractions, None (in reports) or NaN (in tensors) where nothing was there.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.arrays import IGNORE
from repro.measure.reliability import ReliabilitySums
from repro.models.modes import evaluating

BAND = 0.02  # width of boundary IoU's band as a share of the image's diagonal (Cheng et al., 2021)
TOLERANCE = 0.0075  # of the boundary F-score, likewise (Csurka et al., 2013)
ABSENT = ("zero", "skip")
COMBINED = ("max", "mean-or-first")


def confusion(truth: Tensor, predicted: Tensor, classes: int, ignore: int = IGNORE) -> Tensor:
    """Counts (B, K, K) int64 of pixels, [image, true class, predicted class].

    truth, predicted: (B, H, W) integers; pixels where either lies outside [0, K) are left out.
    classes: K. ignore: the truth that is left out, also if it lies in [0, K).
    """
    return pair_counts(truth, predicted, classes, ignore)[:, : classes**2].unflatten(1, (classes, classes))


def pair_counts(truth: Tensor, predicted: Tensor, classes: int, ignore: int) -> Tensor:
    """`confusion`, flat, followed by the numbers of ignored and of impossible pixels: (B, K * K + 2)."""
    truth, predicted = truth.flatten(1).long(), predicted.flatten(1).long()
    possible = (truth >= 0) & (truth < classes) & (predicted >= 0) & (predicted < classes)
    pair = torch.where(possible, truth * classes + predicted, classes**2 + 1)
    pair = torch.where(truth == ignore, classes**2, pair)
    # not bincount, which waits for the largest index on CUDA
    counts = pair.new_zeros(len(pair), classes**2 + 2)
    return counts.scatter_add_(1, pair, torch.ones_like(pair))


def iou(counts: Tensor) -> Tensor:
    """Intersection over union (..., K) of each class from `confusion` counts (..., K, K); NaN for U = 0."""
    hits = counts.diagonal(dim1=-2, dim2=-1).double()
    return hits / (counts.sum(-1) + counts.sum(-2) - hits)


def mean_iou(counts: Tensor, absent: str = "zero") -> Tensor:
    """Mean IoU (...) over classes.

    counts: (..., K, K), summed over the whole set for the published figure.
    absent: what a class without a pixel in truth and prediction counts for: `zero`, since the released code has
        I / (U + 1e-10); `skip`, the mean over the others (NaN if there are none).
    Raises ValueError for another name. Source: released code (UniMatch, CSL).
    """
    if absent not in ABSENT:
        raise ValueError(f"absent is {absent!r}; it must be 'zero' or 'skip'")
    values = iou(counts)
    return values.nan_to_num(0.0).mean(-1) if absent == "zero" else values.nanmean(-1)


def pixel_accuracy(counts: Tensor) -> Tensor:
    """Share (...) of right pixels in `confusion` counts (..., K, K); NaN if there are none."""
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1).double() / counts.sum((-2, -1))


def pixels_of(share: float, size: tuple[int, int]) -> int:
    """A share of the diagonal of an image of (H, W) in whole pixels, at least 1."""
    return max(1, round(share * math.hypot(*size)))


def boundary_overlap(
    truth: Tensor, predicted: Tensor, classes: int, width: int | None = None, ignore: int = IGNORE
) -> Tensor:
    """Counts (3, K) for boundary IoU: pixels of each class in both bands, in the truth's, in the prediction's.

    The band of a class holds its pixels within `width` of another label or of the image's edge: the mask less its
    erosion by a square of side 2 width + 1. Every pixel has one class, so one erosion of the label map does all.
    truth, predicted: (B, H, W) integers. width: in pixels, at least 1; None for 2 % of the diagonal.
    Source: Cheng et al. (2021) and their released code, there for one mask; sums over the set are ours.
    """
    width = width_of(width, BAND, truth)
    truth, predicted, seen = match_ignored(truth, predicted, ignore)
    inside = [torch.where(on_edge(labels, width, True) & seen, labels, classes) for labels in (truth, predicted)]
    counts = confusion(*inside, classes + 1, ignore=-1).sum(0)
    return torch.stack([counts.diagonal(), counts.sum(1), counts.sum(0)])[:, :classes]


def boundary_matches(
    truth: Tensor, predicted: Tensor, classes: int, tolerance: int | None = None, ignore: int = IGNORE
) -> Tensor:
    """Counts (4, K) for the boundary F-score: predicted contour pixels matched and all, true ones matched and all.

    A contour holds the pixels of a class beside (8 neighbours) another label; the image's edge makes none. One is
    matched by a pixel of the other map's contour of that class within `tolerance` rows and columns.
    truth, predicted: (B, H, W) integers. tolerance: in pixels, at least 1; None for .75 % of the diagonal.
    Source: Csurka et al. (2013), there averaged over images; square neighbourhood and sums over the set are ours.
    """
    tolerance = width_of(tolerance, TOLERANCE, truth)
    truth, predicted, seen = match_ignored(truth, predicted, ignore)
    found = []
    for labels in (predicted, truth):
        known = (labels >= 0) & (labels < classes)
        coded = torch.where(on_edge(labels, 1, False) & seen & known, labels, classes)
        found.append(F.one_hot(coded, classes + 1)[..., :classes].permute(0, 3, 1, 2).float())
    near = [extreme(contours, tolerance) for contours in found]
    pairs = [found[0] * near[1], found[0], found[1] * near[0], found[1]]
    return torch.stack([pair.sum((2, 3)).long().sum(0) for pair in pairs])  # a float32 sum is exact for one image


def boundary_iou(overlap: Tensor) -> Tensor:
    """Boundary IoU (K,) from `boundary_overlap` counts (3, K); NaN for a class in neither band."""
    both, truth, predicted = overlap.double()
    return both / (truth + predicted - both)


def boundary_f(matches: Tensor) -> Tensor:
    """Boundary F-score (K,) from `boundary_matches` counts (4, K); NaN for a class without contours."""
    matched, predicted, met, true = matches.double()
    precision, recall = matched / predicted.clamp(min=1), met / true.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where(predicted + true > 0, score, math.nan)


def width_of(width: int | None, share: float, labels: Tensor) -> int:
    """`width`, or the share of the images' diagonal; raises ValueError below 1."""
    width = pixels_of(share, labels.shape[-2:]) if width is None else width
    if width < 1:
        raise ValueError(f"a boundary of {width} pixels holds nothing; it must be at least 1")
    return width


def match_ignored(truth: Tensor, predicted: Tensor, ignore: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps as int64, the prediction with the truth's ignored pixels, and which pixels are not ignored."""
    truth, seen = truth.long(), truth != ignore
    return truth, torch.where(seen, predicted.long(), truth), seen


def on_edge(labels: Tensor, width: int, frame: bool) -> Tensor:
    """Whether (B, H, W) another label is within `width` rows and columns; with `frame` the outside is another label."""
    maps = labels[:, None].float()
    outside = math.inf if frame else -math.inf
    return ((extreme(maps, width) != maps) | (extreme(-maps, width, outside) != -maps))[:, 0]


def extreme(maps: Tensor, width: int, outside: float = -math.inf) -> Tensor:
    """Largest value within `width` rows and columns of floating (B, C, H, W), whose surroundings are `outside`.

    Windows of three pixels ever farther apart reach any width in log3 steps (at 23 in half the time of one window).
    """
    maps = F.pad(maps, (width,) * 4, value=outside)
    reach = 0
    while reach < width:
        step = min(2 * reach + 1, width - reach)
        maps = F.max_pool2d(maps, (3, 1), 1, 0, (step, 1))
        maps = F.max_pool2d(maps, (1, 3), 1, 0, (1, step))
        reach += step
    return maps


class SegmentationSums(nn.Module):
    """Running sums of all metrics on the device: nothing waits until `read`. A module, so that they travel in state
    dicts and `.to(device)`.

    classes: K, at least 1, with the background. bins: of the pixels' confidence. ignore: truth that is not counted.
    boundaries: whether to measure them, which costs most of the time and 4 K maps of float32 a batch.
    """

    def __init__(self, classes: int, bins: int = 15, ignore: int = IGNORE, boundaries: bool = True) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes is {classes}; it must be at least 1")
        self.classes, self.ignore, self.boundaries = classes, ignore, boundaries
        for name, shape in {"pairs": (classes**2 + 2,), "overlap": (3, classes), "matches": (4, classes)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.confidence = ReliabilitySums(bins)

    @torch.no_grad()
    def add(self, scores: Tensor, truth: Tensor) -> None:
        """Count a batch.

        scores: (B, K, H, W), not negative; softmax probabilities, or sums of them over windows or scales, in any
            precision. Their argmax is the prediction, its share of the sum over K the confidence.
        truth: (B, H, W) integers in [0, K) or `ignore`; others make `read` raise.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        top, predicted = scores.max(1)
        self.pairs += pair_counts(truth, predicted, self.classes, self.ignore).sum(0)
        confidence = (top / scores.sum(1)).clamp(max=1)
        rows = (confidence, predicted == truth, truth != self.ignore)
        self.confidence.add(*(row.flatten() for row in rows))
        if self.boundaries:
            self.overlap += boundary_overlap(truth, predicted, self.classes, ignore=self.ignore)
            self.matches += boundary_matches(truth, predicted, self.classes, ignore=self.ignore)

    def read(self) -> dict:
        """Copy to the host, reset, and return what was seen since the last reading.

        pixels, ignored: counts. miou (absent classes count as 0), miou_present (they are skipped), pixel_accuracy,
        mean_class_accuracy (over classes in the truth), boundary_iou and boundary_f (means over classes that have
        boundaries), ece, pixel_confidence: fractions or None. iou, boundary_iou_by_class, boundary_f_by_class: lists
        of K. confusion: K lists of K counts, rows are the truth. reliability: count, confidence, accuracy by bin.
        Raises ValueError when a truth was outside the classes.
        """
        pairs, overlap, matches = (sums.to("cpu", copy=True) for sums in (self.pairs, self.overlap, self.matches))
        count, confidence, accuracy = self.confidence.sums[:, 1:].to("cpu", copy=True)
        pixels = self.confidence.read()
        for sums in (self.pairs, self.overlap, self.matches):
            sums.zero_()
        *_, ignored, impossible = pairs.tolist()
        if impossible:
            raise ValueError(
                f"{impossible} pixels have a label outside 0..{self.classes - 1} that is not {self.ignore}: "
                "map the labels, or give the right number of classes"
            )
        counts = pairs[:-2].view(self.classes, self.classes)
        recall = counts.diagonal().double() / counts.sum(1)
        report = {
            "miou": mean_iou(counts) if counts.any() else torch.tensor(math.nan),
            "miou_present": mean_iou(counts, "skip"),
            "pixel_accuracy": pixel_accuracy(counts),
            "mean_class_accuracy": recall.nanmean(),
            "iou": iou(counts),
        }
        if self.boundaries:
            bands, contours = boundary_iou(overlap), boundary_f(matches)
            report |= {"boundary_iou": bands.nanmean(), "boundary_f": contours.nanmean()}
            report |= {"boundary_iou_by_class": bands, "boundary_f_by_class": contours}
        bins = {"count": count, "confidence": confidence / count, "accuracy": accuracy / count}
        return {name: plain(value) for name, value in report.items()} | {
            "ece": pixels["ece"],
            "pixel_confidence": pixels["confidence"],
            "pixels": int(counts.sum()),
            "ignored": ignored,
            "confusion": counts.tolist(),
            "reliability": {name: plain(value) for name, value in bins.items()},
        }


def plain(values: Tensor) -> float | None | list[float | None]:
    """A tensor of one or no dimension as Python floats, NaN as None."""
    if values.ndim:
        return [plain(value) for value in values]
    value = values.item()
    return None if math.isnan(value) else value


def whole_image(network: nn.Module, images: Tensor) -> Tensor:
    """Softmax scores (B, K, H, W), at least float32, of normalised images (B, C, H, W) seen at once."""
    logits = network(images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)


def sliding_window(network: nn.Module, images: Tensor, window: int, stride: int | None = None) -> Tensor:
    """Softmax scores (B, K, H, W) summed over square windows, not divided by how many cover a pixel.

    images: normalised (B, C, H, W). window: side in pixels, at least 1 (Cityscapes: 801).
    stride: in [1, window], None for int(2 / 3 window). Windows start at its multiples inside the image; those that
        cross the right or lower edge are cut there, not moved.
    Raises ValueError outside these ranges. Source: released code (UniMatch, CSL).
    """
    stride = window * 2 // 3 if stride is None else stride
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"window is {window} and stride is {stride}; they need 1 <= stride <= window")
    scores = None
    for row in range(0, images.shape[2], stride):
        for column in range(0, images.shape[3], stride):
            part = (..., slice(row, row + window), slice(column, column + window))
            seen = whole_image(network, images[part])
            if scores is None:
                scores = seen.new_zeros(len(images), seen.shape[1], *images.shape[2:])
            scores[part] += seen
    return scores


@torch.no_grad()
def scale_logits(
    network: nn.Module, images: Tensor, scales: Sequence[float], size: tuple[int, int] | None = None
) -> Tensor:
    """Logits (S, B, K, H, W) of S scales, each the sum of those of the images and of their mirror images, turned back.

    network: in the mode it is in. images: normalised (B, C, h, w). scales: of both sides, rounded down; each above 0.
    size: (H, W), to which logits are resized (bilinear, free corners); None for that of the images. At least float32.
    Raises ValueError for no scale, or one that is not positive. Source: released code (ToCo, DuPL, PCRE).
    """
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales are {tuple(scales)}; at least one is needed and all must be positive")
    own, found = (images.shape[2], images.shape[3]), []
    for scale in scales:
        seen = _resized(images, (int(scale * own[0]), int(scale * own[1])))
        logits = network(torch.cat([seen, seen.flip(3)]))
        logits = _resized(logits.to(torch.promote_types(logits.dtype, torch.float32)), size or own)
        plain_view, mirrored = logits.chunk(2)
        found.append(plain_view + mirrored.flip(3))
    return torch.stack(found)


def combined(logits: Tensor, form: str = "max") -> Tensor:
    """Logits (B, K, H, W) from those of S scales (S, B, K, H, W).

    form: `max`, the largest over scales (ToCo, DuPL; PCRE on COCO); `mean-or-first`, the larger of their mean and the
        first scale's, which ought to be scale 1 (PCRE on VOC).
    Raises ValueError for another form. Source: released code.
    """
    if form not in COMBINED:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(map(repr, COMBINED))}")
    return logits.amax(0) if form == "max" else torch.maximum(logits[0], logits.mean(0))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def evaluate(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int, window: int | None = None,
    ignore: int = IGNORE, bins: int = 15, boundaries: bool = True,
) -> dict:  # fmt: skip
    """`SegmentationSums.read` of a network in eval mode over a set; every module's mode is restored.

    batches: pairs of normalised images (B, C, H, W) and truth (B, H, W) on the network's device; sizes may differ
        between batches. window: None for whole images (Pascal), or the side of a sliding window (Cityscapes: 801).
    Source: released code (UniMatch, CSL): single scale, no flip.
    """
    sums: SegmentationSums | None = None
    with evaluating(network):
        for images, truth in batches:
            if sums is None:
                sums = SegmentationSums(classes, bins, ignore, boundaries).to(images.device)
            whole = window is None
            sums.add(whole_image(network, images) if whole else sliding_window(network, images, window), truth)
    if sums is None:
        raise ValueError("there is no image to evaluate: `batches` is empty")
    return sums.read()
