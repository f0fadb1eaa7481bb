"""Segmentation from image tags as a task: images with tags, network, views and method, and what is measured.

Published sets are measured at their images' own sizes: each is resized to a square of the crop's side for the network,
and its CAM and its logits back. (Released heads go to that size straight from the patch grid, ours by way of the crop.)
"""

import functools
import hashlib
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro import cam
from repro.cam import at_least_float32, attention_rollout, bilinear, grad_cam, min_max
from repro.data.catalogue import DataError
from repro.data.folders import open_masks, open_tags
from repro.data.mask_views import PADDING, TAGS, Crop, MaskViews
from repro.data.masks import MaskPool, draw_masks, show_tags, tags_of
from repro.data.pools import TagPool, draw_tags, read_ahead
from repro.data.scenes import scenes
from repro.measure import segmentation
from repro.measure.segmentation import combined, confusion, iou, mean_iou, plain, scale_logits
from repro.methods.image_tags import METHODS
from repro.methods.image_tags.afa import AFANetwork
from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.dupl import Pair
from repro.methods.image_tags.pcre import PCRENetwork, RegionDecoder
from repro.models.modes import evaluating
from repro.models.pretrained import initialise
from repro.models.vit import DILATIONS, LAYOUTS, MINI_DILATIONS, DilatedHead, LargeFov, ViT, vit
from repro.recipe import Cell, TagRecipe
from repro.settings import SettingError
from repro.solvers.crf import CRF, EXACT_PIXELS, INSTALL, has_lattice, lattice_crf, mean_field
from repro.tasks.common import check_scenes, spread, stacked, unmasked
from repro.train import Task

SHOWN_POOL, SHOWN_TEST, EXPLORED = 8, 16, 4  # images whose CAMs a run keeps for figures and the explorer
BATCH = 25  # scenes evaluated at a time

Batches = Iterator[tuple[Tensor, Tensor, Tensor]]  # images (B, 3, H, W) uint8, masks (B, H, W) uint8, tags (B, C)


@dataclass(frozen=True)
class Sets:
    """The data of an experiment, on the CPU. C classes without the background.

    pool: what the method sees. most: classes that a tagged image shows at most. test: the test images in order, at
    their own sizes, with true tags. train: training images for the report, masks included; None where masks stay shut.
    shown: (P,) pool images for figures, with pictures (images, masks), masks 255 where they stay shut. tests: pictures
    of the first test images. Pictures have the crop's size. scored: test images behind the CRF; None for all.
    """

    pool: MaskPool | TagPool
    most: int
    classes: int
    test: Callable[[], Batches]
    train: Callable[[], Batches] | None
    shown: Tensor
    pictures: tuple[Tensor, Tensor]
    shown_tags: Tensor
    tests: tuple[Tensor, Tensor]
    test_tags: Tensor
    scored: Tensor | None
    digest: str


def prepare(experiment: Cell, recipe: TagRecipe, device: torch.device, data_root: Path | None = None) -> Task:
    """Load the images and their tags, build the seeded network and method. Methods see no mask.

    Raises DataError, SettingError, WeightsError.
    """
    embedded = experiment.data == "scenes"
    sets = _embedded(experiment, recipe) if embedded else _folder(experiment, recipe, data_root)
    generator = torch.Generator(device).manual_seed(experiment.seed)
    made, scale = (MaskViews, (recipe.scale_low, recipe.scale_high)) if embedded else (FramedViews, (1.0, 1.0))
    views = made(recipe.crop, scale, strong=TAGS, generator=generator).to(device)
    torch.manual_seed(experiment.seed)
    network, weights = build(experiment.method, recipe, sets.classes - 1)
    method = METHODS[experiment.method](recipe.method, network, views, recipe, sets.most).to(device)
    pool, side = sets.pool.to(device), min(recipe.crop, LARGEST)
    protocol = protocol_of(experiment.method, experiment.data, recipe.crop)
    inference = inference_of(experiment.data, recipe.crop)

    def framed(images: Tensor) -> Tensor:
        """Normalised images on the device, at the crop's size."""
        return bilinear(views.plain(images.to(device)), (recipe.crop, recipe.crop))

    @torch.no_grad()
    def activation(net: nn.Module, images: Tensor, tags: Tensor) -> Tensor:
        """CAMs (n, C, S, S) of pictures, with the true tags, as every paper evaluates them; batch by batch."""
        parts = zip(images.split(BATCH), tags.split(BATCH), strict=True)
        with evaluating(net):
            maps = [net.activation(framed(seen), recipe.scales, shown.to(device)) for seen, shown in parts]
        return torch.cat([bilinear(part, (side, side)).half().cpu() for part in maps])

    @torch.no_grad()
    def measure(net: nn.Module, batches: Batches, sums: segmentation.SegmentationSums | None = None) -> Tensor:
        """CAM counts of `cam.threshold_counts`; adds the head's predictions to the sums."""
        counts: Tensor | int = 0
        with evaluating(net):
            for images, masks, tags in batches:
                x, truth, tags = framed(images), masks.to(device), tags.to(device)
                size = (truth.shape[1], truth.shape[2])
                if sums is not None:
                    sums.add(bilinear(net(x).float(), size).softmax(1), truth)
                found = bilinear(net.activation(x, recipe.scales, tags), size)
                counts = counts + cam.threshold_counts(found, tags, truth, thresholds(recipe.beta))
        return counts.cpu()

    @functools.cache
    def chance() -> float:
        """CAM mIoU of a map that sees no pixel, the same cone round the centre for all tags, at its best threshold."""
        counts = sum(
            cam.threshold_counts(centred(tags, masks), tags, masks, thresholds(recipe.beta))
            for _, masks, tags in sets.test()
        )
        return cam_report(counts, recipe.beta)["cam_miou_best"]

    def evaluate(net: nn.Module) -> dict:
        sums = segmentation.SegmentationSums(sets.classes).to(device)
        on_test = cam_report(measure(net, sets.test(), sums), recipe.beta)
        measured = sums.read()
        measured["ece_15"] = measured.pop("ece")
        on_train = cam_report(measure(net, sets.train()), recipe.beta)["cam_miou"] if sets.train else None
        above = None if on_test["cam_miou"] is None else on_test["cam_miou"] - chance()
        return measured | on_test | {"cam_miou_train": on_train, "cam_above_chance": above}

    def moments(net: nn.Module) -> dict[str, Tensor]:
        """CAMs (P, C, H, W) of the shown training images; of PCRE regions (P, C, h, w) and the gate's radius too."""
        images, _ = sets.pictures
        found = {"cam": activation(net, images, sets.shown_tags)}
        if isinstance(net, PCRENetwork):
            with evaluating(net):
                regions, radius = net.gated_regions(framed(images), sets.shown_tags.to(device))
            found |= {"regions": regions.half().cpu(), "radius": torch.tensor(radius)}
        return found

    def outputs(net: nn.Module) -> dict[str, Tensor]:
        """Arrays for figures, `explored` of the first test images, and the counts of `protocol_counts`."""
        images, masks = sets.tests
        with torch.no_grad(), evaluating(net):
            logits = [bilinear(net(framed(part)), (side, side)) for part in images.split(BATCH)]
        kept = {
            "pool_index": sets.shown, "pool_images": small_images(sets.pictures[0], side),
            "pool_truth": small_labels(sets.pictures[1], side), "pool_tags": sets.shown_tags.byte(),
            "pool_cam": activation(net, sets.pictures[0], sets.shown_tags),
            "test_images": small_images(images, side), "test_truth": small_labels(masks, side),
            "test_tags": sets.test_tags.byte(), "test_prediction": torch.cat(logits).argmax(1).byte().cpu(),
            "test_cam": activation(net, images, sets.test_tags),
        }  # fmt: skip
        if isinstance(trunk_of(net), Trunk):
            kept |= explored(net, framed(images[:EXPLORED]), side)
        tests = ((images, masks) for images, masks, _ in sets.test())
        return kept | protocol_counts(net, tests, sets.classes, protocol, views, inference, sets.scored)

    generators = {"views": generator} | ({"crops": pool.generator} if isinstance(pool, TagPool) else {})
    return Task(method, pool, None, generators, evaluate, outputs, protocol_scores, sets.digest, moments, weights)


class FramedViews(MaskViews):
    """Views of crops that a loader made: of their four channels the last is 0 where padded."""

    def crop(self, images: Tensor, masks: Tensor) -> Crop:
        """As of `MaskViews`, for images (B, 4, S, S)."""
        return super().crop(images[:, :3], masks.masked_fill(images[:, 3] == 0, PADDING))


def _embedded(experiment: Cell, recipe: TagRecipe) -> Sets:
    """Fashion scenes, whose tags follow from their masks."""
    check_scenes(recipe)
    if not 1 <= experiment.labels <= recipe.images:
        raise SettingError(
            f"labels is {experiment.labels}, the number of scenes whose tags are shown: 1 to images, {recipe.images}"
        )
    train, test = scenes("train", recipe.images, recipe.crop), scenes("test", recipe.tests, recipe.crop)
    pool, truth = draw_masks(train, 0, experiment.seed, tags=True)
    tags, test_tags = pool.tags[:, 1:], tags_of(test.masks, len(test.classes))[:, 1:].float()
    seen, index = show_tags(tags, experiment.labels, experiment.seed)
    digest = hashlib.sha256(f"{pool.digest} {index.tolist()}".encode()).hexdigest()
    # the loop hands out `labels`: here tags, in place of masks that are hidden anyway
    pool = replace(pool, labels=seen, labelled=index, unlabelled=index, digest=digest, tags=None)
    some, shown = spread(recipe.images, recipe.tests), index[spread(len(index), SHOWN_POOL)]

    def batches(*parts: Tensor) -> Callable[[], Batches]:
        return lambda: zip(*(part.split(BATCH) for part in parts), strict=True)

    return Sets(
        pool, int(seen.sum(1).max()), len(test.classes), batches(test.images, test.masks, test_tags),
        batches(train.images[some], truth[some], tags[some].float()), shown, (train.images[shown], truth[shown]),
        seen[shown], (test.images[:SHOWN_TEST], test.masks[:SHOWN_TEST]), test_tags[:SHOWN_TEST],
        spread(recipe.tests, CRF_SCENES), f"{digest}+{test.digest}",
    )  # fmt: skip


def _folder(experiment: Cell, recipe: TagRecipe, data_root: Path | None) -> Sets:
    """A published data set in its folders. No mask of a training image is opened, or need be there.

    Images of val without any object are left out, as in the papers' list for COCO.
    """
    train, tags = open_tags(experiment.data, "train_aug" if experiment.data == "voc" else "train", data_root)
    test, true_tags = open_masks(experiment.data, "val", data_root), open_tags(experiment.data, "val", data_root)[1]
    scale = (recipe.scale_low, recipe.scale_high)
    try:
        pool = draw_tags(train, tags, experiment.labels, experiment.seed, recipe.crop, scale)
    except ValueError as error:
        raise SettingError(f"labels is {experiment.labels}: {train.name} has tags of fewer images ({error})") from error
    tested = true_tags.any(1).nonzero()[:, 0]
    if not len(tested):
        raise DataError(f"{test.name}/val has no image with tags")
    tested = tested[spread(len(tested), recipe.tests)] if recipe.tests else tested
    shown, first = pool.labelled[spread(len(pool.labelled), SHOWN_POOL)], tested[:SHOWN_TEST]

    def batches() -> Batches:
        with ThreadPoolExecutor(8) as threads:
            pairs = read_ahead(threads, test.read, tested.tolist(), 16)
            for index, (image, mask) in zip(tested.tolist(), pairs, strict=True):
                yield image[None], mask[None], true_tags[index, None].float()

    return Sets(
        pool, int(pool.labels.sum(1).max()), len(test.classes), batches, None, shown,
        stacked([unmasked(train, index) for index in shown.tolist()], recipe.crop), pool.labels[shown],
        stacked([test.read(index) for index in first.tolist()], recipe.crop), true_tags[first].float(), None,
        f"{pool.digest}+{test.digest}",
    )  # fmt: skip


def build(method: str, recipe: TagRecipe, classes: int) -> tuple[nn.Module, dict[str, str]]:
    """The network of a method, its encoder filled with pretrained weights unless `weights` is scratch, and where they
    come from.

    classes: C, without the background. Position embeddings learn in PCRE alone (released codes).
    """
    mini, own = recipe.network == "vit-mini", method == "pcre"

    def trunk_parts() -> tuple[ViT, dict[str, str], nn.Module]:
        tokens = {"class_tokens": classes, "masked": True} if own else {}
        encoder = vit(recipe.network, value_only=recipe.value_only, auxiliary=recipe.auxiliary, **tokens)
        origin = initialise(encoder, recipe.network, recipe.weights)
        encoder.pos_embed.requires_grad_(own)
        if own:
            return encoder, origin, DilatedHead(encoder.width, classes + 1, MINI_DILATIONS if mini else DILATIONS)
        return encoder, origin, LargeFov(encoder.width, classes + 1, *((64, 2) if mini else ()))

    encoder, origin, head = trunk_parts()
    if own:
        sizes = {"heads": encoder.heads, "hidden": 4 * encoder.width, "groups": 8} if mini else {}
        decoder = RegionDecoder(encoder, LAYOUTS[recipe.network], classes, **sizes)
        return PCRENetwork(encoder, classes, head, decoder, recipe.method), origin
    trunk = Trunk(encoder, classes, head)
    if method == "afa":
        return AFANetwork(encoder, classes, head, recipe.method), origin
    if method == "dupl":
        other, _, other_head = trunk_parts()
        return Pair(trunk, Trunk(other, classes, other_head)), origin
    return trunk, origin


def centred(tags: Tensor, masks: Tensor) -> Tensor:
    """Maps (B, C, H, W) in [0, 1], 1 at the centre and 0 at the corners. tags: (B, C); masks: (B, H, W)."""
    rows, columns = (torch.linspace(-1, 1, side) for side in masks.shape[1:])
    cone = 1 - (rows[:, None].square() + columns.square()).sqrt() / 2**0.5
    return cone.clamp(min=0).expand(*tags.shape, -1, -1)


def thresholds(beta: float) -> tuple[float, ...]:
    """Background thresholds at which CAMs are measured, beta among them."""
    return tuple(sorted({*cam.THRESHOLDS, beta}))


def cam_report(counts: Tensor, beta: float) -> dict:
    """CAM metrics, fractions or None, from counts (T, K, K) of `cam.threshold_counts` at `thresholds(beta)`.

    cam_miou: at beta. cam_miou_best, cam_beta_best: at the threshold that is best on this very set, and that threshold.
    cam_curve: mIoU at each of `cam.THRESHOLDS`. cam_confusion: K x K at beta, rows are the truth.
    over_activation: lists of K at beta, by the names of `cam.OverActivation`; infinite ones are None too.
    over_activation_mean, over_activation_bounded_mean: of ratio and share over the classes without the background that
        have a value; a class that is never right has no ratio, but a share of 1.
    """
    at = thresholds(beta)
    found = cam.curve_report(counts, at, beta)
    fixed = counts[at.index(beta)]
    spilled = {
        name: part.masked_fill(part.isinf(), math.nan) for name, part in cam.over_activation(fixed)._asdict().items()
    }
    return {
        "cam_miou": found["fixed"]["miou"],
        "cam_miou_best": found["best"]["miou"],
        "cam_beta_best": found["best"]["threshold"],
        "cam_curve": [miou for threshold, miou in zip(at, found["miou"], strict=True) if threshold in cam.THRESHOLDS],
        "cam_confusion": fixed.tolist(),
        "over_activation": {name: segmentation.plain(part) for name, part in spilled.items()},
        "over_activation_mean": segmentation.plain(spilled["ratio"][1:].nanmean()),
        "over_activation_bounded_mean": segmentation.plain(spilled["share"][1:].nanmean()),
    }


# Arrays that a run keeps for figures and the explorer: pictures, maps of one scale, comparisons, PCRE's masks


EXPLORED_SCALES = (0.5, 1.0, 1.5)
LARGEST = 224  # side of kept pictures and maps at most: of COCO, 80 maps of 448 pixels an image would fill a disk


def trunk_of(network: nn.Module) -> Trunk:
    """The trunk that is evaluated."""
    return network.first if isinstance(network, Pair) else network


@torch.no_grad()
def explored(network: nn.Module, x: Tensor, side: int) -> dict[str, Tensor]:
    """What the explorer reads of normalised images x (E, 3, S, S); maps are resized to `side` x `side`.

    explore_scales (Sc,); explore_cam (E, 2, Sc, C, H, W): main and auxiliary, `one_scale` at each of them;
    explore_gradcam (E, C, H, W), explore_rollout (E, H, W): at scale 1, in [0, 1]; of PCRE also explore_confidence
    (E, N, C), S, and explore_masks (E, N, h, w), M, at scale 1 without a gate. Maps in half precision, S in single.
    """
    trunk, size = trunk_of(network), (side, side)
    with evaluating(network):
        cam = torch.stack([one_scale(trunk, x, scale, size) for scale in EXPLORED_SCALES], 2)
        gradcam = torch.cat([block_grad_cam(trunk, image) for image in x.split(1)])
        rollout = torch.cat([rolled_out(trunk, image) for image in x.split(1)])
        found = {
            "explore_scales": torch.tensor(EXPLORED_SCALES),
            "explore_cam": cam.half(),
            "explore_gradcam": min_max(bilinear(gradcam, size)).half(),
            "explore_rollout": min_max(bilinear(rollout, size))[:, 0].half(),
        }
        if isinstance(trunk, PCRENetwork):
            tokens = trunk.encoder(x)
            confidence, masks = trunk.decoder(x, tokens.patches, tokens.grid)
            found |= {"explore_confidence": confidence.float(), "explore_masks": masks.half()}
    return {name: values.cpu() for name, values in found.items()}


def one_scale(trunk: Trunk, x: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Main and auxiliary CAM (B, 2, C, H, W) of one scale: the larger of an image's and its mirror image's, rectified.

    Over scales their sum, made `cam.min_max`, is `cam.multi_scale_cam`, if maps have the size of x (B, 3, H, W).
    """
    seen = bilinear(x, (int(scale * x.shape[2]), int(scale * x.shape[3])))
    tokens = trunk.encoder(torch.cat([seen, seen.flip(3)]))
    maps = bilinear(at_least_float32(torch.cat([trunk.raw(tokens), trunk.raw_aux(tokens)], 1)), size)
    own, mirrored = maps.chunk(2)
    return torch.maximum(own, mirrored.flip(3)).relu().unflatten(1, (2, -1))


def block_grad_cam(trunk: Trunk, x: Tensor) -> Tensor:
    """Grad-CAM (B, C, h, w) of the patches behind the auxiliary block, for the main classifier's scores.

    x: (B, 3, H, W). Class tokens stay as they are there. At the last layer Grad-CAM would be the CAM itself.
    """
    encoder = trunk.encoder
    tokens, grid = encoder.embed(x)
    for index in range(encoder.auxiliary + 1):
        tokens, _ = encoder.block(index, tokens)
    first, patches = tokens.split([encoder.class_tokens, tokens.shape[1] - encoder.class_tokens], 1)

    def score(patches: Tensor) -> Tensor:
        tokens = torch.cat([first, patches], 1)
        for index in range(encoder.auxiliary + 1, encoder.depth):
            tokens, _ = encoder.block(index, tokens)
        return trunk.classifier(encoder.norm(tokens)[:, encoder.class_tokens :].amax(1))

    return grad_cam(patches, score, grid)


def rolled_out(trunk: Trunk, x: Tensor) -> Tensor:
    """Attention rollout (B, 1, h, w) over all blocks, of the class token, or of the mean of several."""
    encoder = trunk.encoder
    tokens = encoder(x, range(encoder.depth))
    flow = attention_rollout(tokens.attention[index] for index in range(encoder.depth))
    return flow[:, : encoder.class_tokens, encoder.class_tokens :].mean(1, keepdim=True).unflatten(2, tokens.grid)


def small_images(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) uint8 of at most `side` pixels, antialiased."""
    if images.shape[2] <= side:
        return images
    seen = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return seen.round().clamp(0, 255).byte()


def small_labels(labels: Tensor, side: int) -> Tensor:
    """Label maps (B, S, S) uint8 of at most `side` pixels, nearest neighbour."""
    if labels.shape[1] <= side:
        return labels
    return F.interpolate(labels[:, None].float(), size=(side, side), mode="nearest")[:, 0].byte()


# The scores of a trained network: segmentation over scales and mirror images, then the same behind a dense CRF


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
def protocol_counts(
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


def protocol_scores(outputs: dict[str, Tensor]) -> dict:
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
