"""The scores of a trained network: segmentation over scales and mirror images, then the same behind a dense CRF.

Each method is scored as its own released code scores it. Scenes are of the crop's size, so nothing is resized, and the
widths of the CRF, stated for images of about 448 pixels, shrink with them (ours).
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor, nn

from repro.cam import bilinear
from repro.data.mask_views import MaskViews
from repro.data.pools import read_ahead
from repro.measure.segmentation import combined, confusion, iou, mean_iou, plain, scale_logits
from repro.models.modes import evaluating
from repro.solvers.crf import CRF, EXACT_PIXELS, INSTALL, has_lattice, lattice_crf, mean_field

SIDE = 448  # of the images that widths are stated for
CRF_SCENES = 50  # at most: exact inference takes a tenth of a second a scene
SCORES = ("ms", "crf")
INFERENCES = ("exact", "lattice", "none")


@dataclass(frozen=True)
class Protocol:
    """How a method is scored.

    form: of `segmentation.combined`. frame: side of the square that images are resized to; long: length that their
    longer side is resized to; 0 for neither. halved: an image and its mirror image are averaged, not summed, which
    makes the CRF's probabilities softer.
    """

    crf: CRF
    scales: tuple[float, ...] = (1.0, 1.25, 1.5)
    form: str = "max"
    frame: int = 0
    long: int = 0
    halved: bool = False


def protocol_of(method: str, data: str, crop: int) -> Protocol:
    """The method's protocol: PCRE's for VOC or for COCO, AFA's, or ToCo's, which is DuPL's too and ours for plain.

    crop: side of training crops, pixels. Where it is not the published one, native sizes would be out of proportion for
    the network, and images of published sets are resized to a square of that side (ours), as in PCRE's for VOC.
    Source: released codes; on scenes that for VOC, at their own size.
    """
    found, published = Protocol(CRF()), SIDE
    if method == "pcre" and data == "coco2014":
        found = Protocol(CRF(1.0, 1.0, 7.0, 140.0, 1.0))
    elif method == "pcre":
        found = Protocol(CRF(1.0, 2.0, 7.0, 140.0, 1.0), form="mean-or-first", frame=crop)
    elif method == "afa":
        found, published = Protocol(CRF(3.0, 3.0, 4.0, 64.0, 5.0), (1.0, 0.5, 0.75), long=512, halved=True), 320
    if data == "scenes":
        return replace(found, frame=0, long=0, crf=found.crf.scaled(crop / SIDE))
    return found if crop == published else replace(found, frame=crop, long=0)


def inference_of(data: str, crop: int) -> str:
    """How the CRF is inferred: `exact` on small scenes, else `lattice` (pydensecrf2). Without that package `none`, with
    a warning: a run of days must not fail at its end."""
    if data == "scenes" and crop**2 <= EXACT_PIXELS:
        return "exact"
    if has_lattice():
        return "lattice"
    warnings.warn(f"miou_crf is left out: above {EXACT_PIXELS:,} pixels it needs pydensecrf2: {INSTALL}", stacklevel=2)
    return "none"


@torch.no_grad()
def final_counts(
    network: nn.Module,
    tests: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    protocol: Protocol,
    views: MaskViews,
    inference: str = "exact",
    chosen: Tensor | None = None,
) -> dict[str, Tensor]:
    """Confusion counts (K, K) int64, rows are the truth: `ms_confusion` over scales and mirror images, and
    `crf_confusion` behind the CRF, unless inference is `none`.

    tests: images (B, 3, H, W) uint8 and masks (B, H, W) at their original size, on the CPU. classes: K.
    inference: one of INFERENCES. chosen: positions of the test images that the CRF sees; None for all.
    """
    counts = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in SCORES}

    def smooth() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images and masks that the CRF sees, and their probabilities; counts all of them on the way."""
        first = 0
        for images, masks in tests:
            x = fitted(views.plain(images.to(views.mean.device)), protocol)
            logits = scale_logits(network, x, protocol.scales, (masks.shape[1], masks.shape[2]))
            logits = combined(logits, protocol.form) / (2 if protocol.halved else 1)
            counts["ms"] += confusion(masks, logits.argmax(1).cpu(), classes).sum(0)
            seen = torch.arange(first, first + len(images))
            seen = torch.ones_like(seen).bool() if chosen is None else torch.isin(seen, chosen)
            first += len(images)
            yield images[seen], masks[seen], logits[seen.to(logits.device)].softmax(1)

    with evaluating(network):
        if inference == "none":
            deque(smooth(), maxlen=0)
            del counts["crf"]
        else:
            refined = exact_labels if inference == "exact" else lattice_labels
            for masks, labels in refined(smooth(), protocol.crf):
                counts["crf"] += confusion(masks, labels, classes).sum(0)
    return {f"{name}_confusion": count for name, count in counts.items()}


def fitted(images: Tensor, protocol: Protocol) -> Tensor:
    """Images (B, 3, H, W) at the size of the protocol's scale 1."""
    height, width = images.shape[2:]
    if protocol.frame:
        return bilinear(images, (protocol.frame, protocol.frame))
    if protocol.long:
        ratio = protocol.long / max(height, width)
        return bilinear(images, (int(height * ratio), int(width * ratio)))
    return images


def exact_labels(items: Iterable[tuple[Tensor, Tensor, Tensor]], crf: CRF) -> Iterator[tuple[Tensor, Tensor]]:
    """Masks and labels (B, H, W) behind the exact CRF of images, masks and probabilities."""
    for images, masks, probs in items:
        yield masks, mean_field(probs, images.to(probs.device), crf).argmax(1).cpu()


def lattice_labels(items: Iterable[tuple[Tensor, Tensor, Tensor]], crf: CRF) -> Iterator[tuple[Tensor, Tensor]]:
    """The same by pydensecrf2, in processes, since it holds Python's lock."""
    waiting: deque[Tensor] = deque()

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images, masks, probs in items:
            for image, mask, prob in zip(images, masks, probs.cpu(), strict=True):
                waiting.append(mask)
                yield prob.numpy(), image.permute(1, 2, 0).contiguous().numpy()

    workers = torch.get_num_threads()
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for labels in read_ahead(processes, partial(lattice_label, crf=crf), pairs(), 2 * workers):
            yield waiting.popleft()[None], torch.from_numpy(labels)[None]


def lattice_label(pair: tuple[np.ndarray, np.ndarray], crf: CRF) -> np.ndarray:
    """Label map (H, W) of probabilities (K, H, W) and an image (H, W, 3)."""
    return lattice_crf(*pair, crf).argmax(0).astype(np.uint8)


def final_scores(outputs: dict[str, Tensor]) -> dict:
    """Metrics from the counts that a run's outputs hold; None where there are none.

    miou_ms: mean IoU over scales and mirror images, of all test images. miou_crf: the same behind the dense CRF; of
    scenes at full size, but of CRF_SCENES evenly spread ones at most. iou_ms, iou_crf: lists of K. A class without a
    pixel in truth and prediction counts as 0, as in `miou`.
    """
    scores: dict = {}
    for name in SCORES:
        counts = outputs.get(f"{name}_confusion")
        scores[f"miou_{name}"] = None if counts is None else plain(mean_iou(counts))
        scores[f"iou_{name}"] = None if counts is None else plain(iou(counts))
    return scores
