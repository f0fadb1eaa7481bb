"""Segmentation from image tags as a task: images with tags, network, views and method, and what is measured."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from repro import cam, segmentation
from repro.data.mask_views import TAGS, MaskViews
from repro.data.masks import draw_masks, tags_of
from repro.data.scenes import SIZES, scenes
from repro.experiment import Experiment, TagRecipe
from repro.methods.image_tags import METHODS
from repro.methods.image_tags.dupl import Pair
from repro.methods.image_tags.pcre_network import PCRENetwork, RegionDecoder
from repro.methods.image_tags.trunk import Trunk
from repro.models.modes import evaluating
from repro.models.pretrained import initialise
from repro.models.vit import DILATIONS, LAYOUTS, MINI_DILATIONS, DilatedHead, LargeFov, ViT, vit
from repro.settings import SettingError
from repro.training import Task

SHOWN_POOL, SHOWN_TEST = 8, 16  # images whose CAMs a run keeps for figures and the explorer
BATCH = 25  # scenes evaluated at a time


def prepare(experiment: Experiment, recipe: TagRecipe, device: torch.device, data_root: Path | None = None) -> Task:
    """Make the scenes and their tags, build the seeded network and method. Methods see no mask.

    Raises SettingError, WeightsError.
    """
    check_scenes(experiment, recipe)
    train, test = scenes("train", recipe.images, recipe.crop), scenes("test", recipe.tests, recipe.crop)
    pool, truth = draw_masks(train, 0, experiment.seed, tags=True)
    tags, test_tags = pool.tags[:, 1:].float(), tags_of(test.masks, len(test.classes))[:, 1:].float()
    everything = torch.arange(len(train))
    # the loop hands out `labels`: here tags, in place of masks that are hidden anyway
    pool = replace(pool, labels=tags, labelled=everything, unlabelled=everything).to(device)
    generator = torch.Generator(device).manual_seed(experiment.seed)
    views = MaskViews(recipe.crop, (recipe.scale_low, recipe.scale_high), strong=TAGS, generator=generator).to(device)
    torch.manual_seed(experiment.seed)
    network, weights = build(experiment.method, recipe, tags.shape[1])
    most = int(tags.sum(1).max())
    method = METHODS[experiment.method](recipe.method, network, views, recipe, most).to(device)

    @torch.no_grad()
    def activation(net: nn.Module, images: Tensor, tags: Tensor) -> Tensor:
        """CAM with the true tags, as every paper evaluates it, on the device; batch by batch."""
        parts = zip(images.split(BATCH), tags.split(BATCH), strict=True)
        with evaluating(net):
            maps = [
                net.activation(views.plain(seen.to(device)), recipe.scales, shown.to(device)) for seen, shown in parts
            ]
        return torch.cat(maps)

    def cam_counts(net: nn.Module, images: Tensor, tags: Tensor, masks: Tensor) -> Tensor:
        found = activation(net, images, tags)
        return cam.threshold_counts(found, tags.to(device), masks.to(device), thresholds(recipe.beta)).cpu()

    some = spread(recipe.images, recipe.tests)

    def evaluate(net: nn.Module) -> dict:
        pairs = zip(test.images.split(BATCH), test.masks.split(BATCH), strict=True)
        batches = ((views.plain(images.to(device)), masks.to(device)) for images, masks in pairs)
        measured = segmentation.evaluate(net, batches, len(test.classes))
        measured["ece_15"] = measured.pop("ece")
        on_train = cam_report(cam_counts(net, train.images[some], tags[some], truth[some]), recipe.beta)
        on_test = cam_report(cam_counts(net, test.images, test_tags, test.masks), recipe.beta)
        return measured | on_test | {"cam_miou_train": on_train["cam_miou"]}

    shown = spread(recipe.images, SHOWN_POOL)

    def moments(net: nn.Module) -> dict[str, Tensor]:
        """CAMs (P, C, H, W) of the shown training images, in half precision."""
        return {"cam": activation(net, train.images[shown], tags[shown]).half()}

    def outputs(net: nn.Module) -> dict[str, Tensor]:
        """Arrays for figures: training images and their CAMs, test images, their CAMs and predictions."""
        images, first = test.images[:SHOWN_TEST], test_tags[:SHOWN_TEST]
        with torch.no_grad(), evaluating(net):
            prediction = net(views.plain(images.to(device))).argmax(1).byte()
        return {
            "pool_index": shown, "pool_images": train.images[shown], "pool_truth": truth[shown],
            "pool_tags": tags[shown].byte(), "pool_cam": moments(net)["cam"],
            "test_images": images, "test_truth": test.masks[:SHOWN_TEST], "test_tags": first.byte(),
            "test_prediction": prediction, "test_cam": activation(net, images, first).half(),
        }  # fmt: skip

    digest = f"{pool.digest}+{test.digest}"
    generators = {"views": generator}
    return Task(method, pool, None, generators, evaluate, outputs, lambda outputs: {}, digest, moments, weights)


def build(method: str, recipe: TagRecipe, classes: int) -> tuple[nn.Module, dict[str, str]]:
    """The network of a method, its encoder filled with pretrained weights unless `weights` is scratch, and where they
    come from.

    classes: C, without the background. Position embeddings learn in PCRE alone (released codes).
    """
    mini, own = recipe.network == "vit-mini", method == "pcre"

    def trunk_parts() -> tuple[ViT, dict[str, str], nn.Module]:
        tokens = {"class_tokens": classes, "masked": True, "value_only": True} if own else {}
        encoder = vit(recipe.network, auxiliary=recipe.auxiliary, **tokens)
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
    if method == "dupl":
        other, _, other_head = trunk_parts()
        return Pair(trunk, Trunk(other, classes, other_head)), origin
    return trunk, origin


def check_scenes(experiment: Experiment, recipe: TagRecipe) -> None:
    """Raise SettingError for what the scenes cannot give."""
    if experiment.data != "scenes":
        raise SettingError(f"data is {experiment.data!r}; image tags are embedded for scenes only")
    if not (recipe.images and recipe.tests):
        raise SettingError(f"images is {recipe.images}, tests {recipe.tests}: scenes need at least one of both")
    if recipe.crop not in SIZES:
        raise SettingError(f"crop is {recipe.crop}; scenes are made at the crop's size, {SIZES[0]} to {SIZES[-1]}")


def spread(count: int, chosen: int) -> Tensor:
    """Up to `chosen` of the numbers below `count`, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(chosen, count)).long()


def thresholds(beta: float) -> tuple[float, ...]:
    """Background thresholds at which CAMs are measured, beta among them."""
    return tuple(sorted({*cam.THRESHOLDS, beta}))


def cam_report(counts: Tensor, beta: float) -> dict:
    """CAM metrics, fractions or None, from counts (T, K, K) of `cam.threshold_counts` at `thresholds(beta)`.

    cam_miou: at beta. cam_miou_best, cam_beta_best: at the threshold that is best on this very set, and that threshold.
    cam_curve: mIoU at each of `cam.THRESHOLDS`. cam_confusion: K x K at beta, rows are the truth.
    over_activation: lists of K at beta, by the names of `cam.OverActivation`; infinite ones are None too.
    """
    at = thresholds(beta)
    found = cam.curve_report(counts, at, beta)
    fixed = counts[at.index(beta)]
    spilled = cam.over_activation(fixed)._asdict()
    return {
        "cam_miou": found["fixed"]["miou"],
        "cam_miou_best": found["best"]["miou"],
        "cam_beta_best": found["best"]["threshold"],
        "cam_curve": [miou for threshold, miou in zip(at, found["miou"], strict=True) if threshold in cam.THRESHOLDS],
        "cam_confusion": fixed.tolist(),
        "over_activation": {
            name: segmentation.plain(part.masked_fill(part.isinf(), math.nan)) for name, part in spilled.items()
        },
    }
