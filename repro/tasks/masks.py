"""Segmentation from few masks as a task: data, network, views and method of an experiment, and what is measured."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from repro.data.folders import MASK_SOURCES, open_masks
from repro.data.mask_views import MaskViews
from repro.data.masks import draw_masks
from repro.data.pools import draw_folder, read_ahead
from repro.data.scenes import scenes
from repro.measure import segmentation
from repro.methods.few_masks import METHODS
from repro.methods.few_masks.common import LABELLED
from repro.methods.few_masks.csl import confidence_features
from repro.models.modes import evaluating
from repro.recipe import Cell, MaskRecipe
from repro.settings import SettingError
from repro.tasks.common import build_deeplab, check_scenes, spread, stacked, unmasked
from repro.tasks.monitors import PixelMonitor
from repro.train import Task

SHOWN_POOL, SHOWN_TEST = 8, 12  # images whose predictions a run keeps for figures and the explorer
BATCH = 50  # scenes evaluated at a time


def prepare(experiment: Cell, recipe: MaskRecipe, device: torch.device, data_root: Path | None = None) -> Task:
    """Load the data, draw the shown masks, build the seeded network and method.

    Raises DataError, SettingError, WeightsError.
    """
    source = _embedded if experiment.data == "scenes" else _folder
    pool, truth, pictures, test, digest = source(experiment, recipe, data_root)
    classes = len(pool.classes)
    generator = torch.Generator(device).manual_seed(experiment.seed)
    scale = (recipe.scale_low, recipe.scale_high) if experiment.data == "scenes" else (1.0, 1.0)
    views = MaskViews(recipe.crop, scale, generator=generator).to(device)
    torch.manual_seed(experiment.seed)
    network, weights = build_deeplab(recipe, classes)
    method = METHODS[experiment.method](
        recipe.method, network, views, classes, LABELLED[recipe.labelled_loss], recipe.head_factor
    ).to(device)
    pool = pool.to(device)
    truth = truth if truth is None else truth.to(device)
    shown, images, masks = pictures(SHOWN_POOL)
    plain = views.plain(images.to(device))

    def evaluate(net: nn.Module) -> dict:
        batches = ((views.plain(images.to(device)), masks.to(device)) for images, masks in test())
        measured = segmentation.evaluate(net, batches, classes, recipe.window or None)
        return measured | {"ece_15": measured.pop("ece")}

    def moments(net: nn.Module) -> dict[str, Tensor]:
        """Confidence, residual variance and label of the shown pool images, in eval mode."""
        features = confidence_features(_probabilities(net, plain, recipe.window))
        return {"confidence": features.confidence, "residual": features.residual, "label": features.label.byte()}

    def outputs(net: nn.Module) -> dict[str, Tensor]:
        """Arrays for figures: the shown pool images, and predictions on test images, at the size of a crop."""
        kept = {"pool_index": shown, "pool_images": images, "pool_truth": masks}
        test_images, test_truth = stacked(list(itertools.islice(_single(test()), SHOWN_TEST)), recipe.crop)
        confidence, prediction = _probabilities(net, views.plain(test_images.to(device)), recipe.window).max(1)
        kept |= {"test_images": test_images, "test_truth": test_truth}
        return kept | {"test_prediction": prediction.byte(), "test_confidence": confidence}

    generators = {"views": generator} | ({"crops": pool.generator} if hasattr(pool, "generator") else {})
    monitor = PixelMonitor(truth, device)
    return Task(method, pool, monitor, generators, evaluate, outputs, lambda outputs: {}, digest, moments, weights)


def _embedded(experiment: Cell, recipe: MaskRecipe, data_root: Path | None):
    """Pool, truth, shown pictures, test pairs and digest of the Fashion scenes."""
    if not 0 < experiment.labels <= recipe.images:
        raise SettingError(f"labels is {experiment.labels}, images {recipe.images}: scenes show 1 to `images` masks")
    check_scenes(recipe)
    train, test = scenes("train", recipe.images, recipe.crop), scenes("test", recipe.tests, recipe.crop)
    pool, truth = draw_masks(train, experiment.labels, experiment.seed)

    def pictures(count: int) -> tuple[Tensor, Tensor, Tensor]:
        index = _some(pool.unlabelled, count)
        return index, pool.images[index].cpu(), truth[index]

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(test.images.split(BATCH), test.masks.split(BATCH), strict=True)

    return pool, truth, pictures, pairs, f"{pool.digest}+{test.digest}"


def _folder(experiment: Cell, recipe: MaskRecipe, data_root: Path | None):
    """The same of a published data set in its folders; its hidden masks are not opened, so there is no truth."""
    train = open_masks(experiment.data, "train_aug" if experiment.data == "voc" else "train", data_root)
    test = open_masks(experiment.data, "val", data_root)
    budget = budget_of(experiment.data, experiment.labels, recipe.lists)
    scale = (recipe.scale_low, recipe.scale_high)
    pool = draw_folder(train, budget, experiment.seed, recipe.crop, scale)

    def pictures(count: int) -> tuple[Tensor, Tensor, Tensor]:
        index = _some(pool.unlabelled, count)
        return index, *stacked([unmasked(train, number) for number in index.tolist()], recipe.crop)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(8) as threads:
            for image, mask in read_ahead(threads, test.read, range(len(test)), 16):
                yield image[None], mask[None]

    return pool, None, pictures, pairs, f"{pool.digest}+{test.digest}"


def budget_of(data: str, labels: int, lists: str = "own") -> str:
    """The name of the published list of `labels` masks, or `all`. Raises ValueError where there is none.

    lists: whose, for Pascal's blended splits.
    """
    source = MASK_SOURCES[data]
    if labels == max(source.counts.values()):
        return "all"
    names = [name for name, count in source.budgets.items() if count == labels]
    if not names:
        known = ", ".join(str(count) for count in sorted({*source.budgets.values(), max(source.counts.values())}))
        raise ValueError(f"labels is {labels}; the published lists of {data} show {known} masks")
    chosen = [name for name in names if name.startswith("u2pl_") == (lists == "u2pl")]
    return (chosen or names)[0]


def _some(indices: Tensor, count: int) -> Tensor:
    """Up to `count` of the indices, evenly spread, the same in every run of a split."""
    return indices.cpu()[spread(len(indices), count)]


@torch.no_grad()
def _probabilities(network: nn.Module, images: Tensor, window: int) -> Tensor:
    """(B, K, H, W) in eval mode, seen as in the evaluation; sums over windows are divided by their total."""
    with evaluating(network):
        if not window:
            return segmentation.whole_image(network, images)
        scores = segmentation.sliding_window(network, images, window)
        return scores / scores.sum(1, keepdim=True)


def _single(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    for images, masks in batches:
        yield from zip(images, masks, strict=True)
