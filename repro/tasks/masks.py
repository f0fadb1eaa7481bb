"""Segmentation from few masks as a task: data, network, views and method of an experiment, and what is measured."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.mask_views import MaskViews
from repro.data.masks import IGNORE, draw_masks
from repro.data.masks_sources import MASK_SOURCES, MaskFolder, open_masks
from repro.data.pools import draw_folder
from repro.data.scenes import SIZES, scenes
from repro.measure import segmentation
from repro.methods.few_masks import METHODS
from repro.methods.few_masks.losses import LABELLED
from repro.methods.few_masks.separation import confidence_features
from repro.models.deeplab import deeplab
from repro.models.modes import evaluating
from repro.models.pretrained import initialise
from repro.recipe import Cell, MaskRecipe
from repro.settings import SettingError
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
    network, weights = build(recipe, classes)
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
        tests = [_fitted(*pair, recipe.crop) for pair in _first(_single(test()), SHOWN_TEST)]
        test_images, test_truth = (torch.stack(parts) for parts in zip(*tests, strict=True))
        confidence, prediction = _probabilities(net, views.plain(test_images.to(device)), recipe.window).max(1)
        kept |= {"test_images": test_images, "test_truth": test_truth}
        return kept | {"test_prediction": prediction.byte(), "test_confidence": confidence}

    generators = {"views": generator} | ({"crops": pool.generator} if hasattr(pool, "generator") else {})
    monitor = PixelMonitor(truth, device)
    return Task(method, pool, monitor, generators, evaluate, outputs, lambda outputs: {}, digest, moments, weights)


def build(recipe: MaskRecipe, classes: int) -> tuple[nn.Module, dict[str, str]]:
    """The recipe's DeepLabV3+, its backbone filled with pretrained weights unless `weights` is scratch, and where they
    come from."""
    stride = recipe.output_stride // (2 if recipe.network == "resnet-mini" else 1)
    network = deeplab(recipe.network, classes, stride)
    return network, initialise(network.backbone, recipe.network, recipe.weights)


def _embedded(experiment: Cell, recipe: MaskRecipe, data_root: Path | None):
    """Pool, truth, shown pictures, test pairs and digest of the Fashion scenes."""
    if not (0 < experiment.labels <= recipe.images and recipe.tests):
        raise SettingError(
            f"labels is {experiment.labels}, images {recipe.images}, tests {recipe.tests}: scenes show 1 to `images` "
            "masks and are evaluated on at least one test"
        )
    if recipe.crop not in SIZES:
        raise SettingError(f"crop is {recipe.crop}; scenes are made at the crop's size, {SIZES[0]} to {SIZES[-1]}")
    train, test = scenes("train", recipe.images, recipe.crop), scenes("test", recipe.tests, recipe.crop)
    pool, truth = draw_masks(train, experiment.labels, experiment.seed)

    def pictures(count: int) -> tuple[Tensor, Tensor, Tensor]:
        index = _spread(pool.unlabelled, count)
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
        index = _spread(pool.unlabelled, count)
        pairs = [_fitted(*_unmasked(train, i), recipe.crop) for i in index.tolist()]
        images, masks = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return index, images, masks

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(8) as threads:
            for image, mask in _ahead(threads, test.read, range(len(test)), 16):
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


def _unmasked(folder: MaskFolder, index: int) -> tuple[Tensor, Tensor]:
    """An unlabelled image with a mask of 255: hidden masks are not opened, not even for figures."""
    picture = folder.image(index)
    image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = image.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return image, torch.full((picture.height, picture.width), IGNORE, dtype=torch.uint8)


def _spread(indices: Tensor, count: int) -> Tensor:
    """Up to `count` of the indices, evenly spread, the same in every run of a split."""
    indices = indices.cpu()
    return indices[torch.linspace(0, len(indices) - 1, min(count, len(indices))).long()]


def _fitted(image: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The centre of an image (3, H, W) and its mask, cut or padded (0 and 255) to a square of `size`."""
    for axis in (-2, -1):
        extra = max(image.shape[axis] - size, 0)
        image = image.narrow(axis, extra // 2, min(image.shape[axis], size))
        mask = mask.narrow(axis, extra // 2, min(mask.shape[axis], size))
    rest = (0, size - image.shape[2], 0, size - image.shape[1])
    return F.pad(image, rest), F.pad(mask, rest, value=IGNORE)


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


def _first(items: Iterator, count: int) -> list:
    return [item for _, item in zip(range(count), items, strict=False)]


def _ahead(threads: ThreadPoolExecutor, call: Callable, items: Iterable, depth: int) -> Iterator:
    """`call` of each item in order, at most `depth` of them read ahead."""
    waiting: deque = deque()
    for item in items:
        waiting.append(threads.submit(call, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
