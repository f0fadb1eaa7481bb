"""Segmentation from scribbles as a task: images with scribbles, network, views and method, and what is measured."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repro.data.folders import open_masks
from repro.data.mask_views import PADDING, MaskViews, hide
from repro.data.masks import IGNORE, MaskPool, draw_masks
from repro.data.pools import read_ahead
from repro.data.scenes import scenes
from repro.data.scribbles import FRAME, FramePool, PaddedViews, draw_scribbles, framed, open_scribbles, reaches_of
from repro.measure.segmentation import SegmentationSums, confusion, mean_iou, pixel_accuracy, whole_image
from repro.methods.scribbles import METHODS
from repro.methods.scribbles.common import BLUR
from repro.models.modes import evaluating
from repro.recipe import Cell, ScribbleRecipe
from repro.settings import SettingError
from repro.solvers.potts import contrast_grid, potts_energy, relaxed_potts
from repro.tasks.common import build_deeplab, check_scenes, spread, stacked
from repro.tasks.monitors import PixelMonitor
from repro.train import Task

SHOWN_POOL, SHOWN_TEST = 8, 12  # images whose predictions a run keeps for figures and the explorer
BATCH = 50  # scenes evaluated at a time


@dataclass(frozen=True)
class Sets:
    """The data of an experiment, on the CPU.

    pool: what the method sees; size: (N, H, W) of its images. truth: hidden masks (N, H, W) for the report, None where
    they stay shut. test: the test images (B, 3, H, W) and masks (B, H, W) in order, at their own sizes; tests: the
    first of them at the crop's size. shown: (P,) pool images for figures. pictures: arrays of them for `outputs`.
    """

    pool: MaskPool | FramePool
    size: tuple[int, int, int]
    truth: Tensor | None
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    tests: tuple[Tensor, Tensor]
    shown: Tensor
    pictures: dict[str, Tensor]
    digest: str


def prepare(
    experiment: Cell, recipe: ScribbleRecipe, device: torch.device, data_root: Path | None = None
) -> Task:
    """Load the images, draw or read their scribbles, build the seeded network and method.

    experiment.labels: length of the scribbles in percent. Methods see no mask but for full supervision.
    Raises DataError, SettingError, WeightsError.
    """
    if not 0 <= experiment.labels <= 100:
        raise SettingError(f"labels is {experiment.labels}; it is the length of scribbles in percent, 0 to 100")
    embedded = experiment.data == "scenes"
    sets = _embedded(experiment, recipe) if embedded else _folder(experiment, recipe, data_root)
    classes, scale = len(sets.pool.classes), (recipe.scale_low, recipe.scale_high)
    generator = torch.Generator(device).manual_seed(experiment.seed)
    made = MaskViews if embedded else PaddedViews
    views = made(recipe.crop, scale, strong=BLUR, generator=generator).to(device)
    torch.manual_seed(experiment.seed)
    network, weights = build_deeplab(recipe, classes)
    method = METHODS[experiment.method](recipe.method, network, views, classes, recipe, sets.size).to(device)
    truth = None if sets.truth is None else sets.truth.to(device)
    padding = (sets.pictures["pool_scribbles"] == PADDING).to(device)
    plain = hide(views.plain(sets.pictures["pool_images"].to(device)), padding)

    def proposals() -> Tensor | None:
        """X of all pool images (N, H, W), 255 where padded; None without stage A and before the first."""
        found = getattr(method, "proposals", None)
        return None if found is None or bool((found[0] == IGNORE).all()) else found

    @torch.no_grad()
    def evaluate(net: nn.Module) -> dict:
        sums, energies = SegmentationSums(classes).to(device), []
        with evaluating(net):
            for images, masks in sets.test():
                x = views.plain(images.to(device))
                probs, grid = whole_image(net, x), contrast_grid(x)
                sums.add(probs, masks.to(device))
                energies.append(torch.stack([potts_energy(probs.argmax(1), grid), relaxed_potts(probs, grid)]))
        measured = sums.read()
        measured["ece_15"] = measured.pop("ece")
        hard, soft = torch.cat(energies, 1).double().mean(1).tolist()
        energy = {"potts_energy": hard, "potts_energy_soft": soft}
        return measured | energy | proposal_quality(proposals(), truth, classes)

    @torch.no_grad()
    def log_probs(net: nn.Module) -> Tensor:
        """(P, K, H, W) of the shown pool images, in eval mode."""
        with evaluating(net):
            return torch.cat([net(part).float().log_softmax(1) for part in plain.split(BATCH)])

    def labelled(found: Tensor) -> Tensor:
        """Their argmax, (P, H, W) uint8, 255 where padded."""
        return found.argmax(1).byte().masked_fill(padding, IGNORE)

    def proposed(name: str) -> dict[str, Tensor]:
        """Proposals of the shown pool images, (P, H, W) uint8, under a name; nothing where there are none."""
        found = proposals()
        return {} if found is None else {name: found[sets.shown.to(device)]}

    def moments(net: nn.Module) -> dict[str, Tensor]:
        """Label maps of the shown pool images: the network's prediction, and the proposal."""
        return {"prediction": labelled(log_probs(net))} | proposed("proposal")

    def outputs(net: nn.Module) -> dict[str, Tensor]:
        """Arrays for figures and the explorer: `Sets.pictures`, what became of them, and predictions on test images."""
        found = log_probs(net)
        kept = {"pool_index": sets.shown} | sets.pictures
        kept |= {"pool_log_probs": found.half(), "pool_prediction": labelled(found)} | proposed("pool_proposal")
        images, masks = sets.tests
        with torch.no_grad(), evaluating(net):
            confidence, prediction = whole_image(net, views.plain(images.to(device))).max(1)
        kept |= {"test_images": images, "test_truth": masks}
        return kept | {"test_prediction": prediction.byte(), "test_confidence": confidence}

    monitor = PixelMonitor(truth, device)
    return Task(
        method, sets.pool.to(device), monitor, {"views": generator}, evaluate, outputs, lambda outputs: {}, sets.digest,
        moments, weights,
    )  # fmt: skip


def proposal_quality(proposals: Tensor | None, truth: Tensor | None, classes: int) -> dict[str, float | None]:
    """Share of pixels whose proposal is their true class, and the mIoU of proposals, for the report alone.

    proposals, truth: (N, H, W) uint8; pixels of either that are 255 are left out. Without one of them both are None.
    """
    names = ("proposal_accuracy", "proposal_miou")
    if proposals is None or truth is None:
        return dict.fromkeys(names)
    counts = confusion(truth, proposals, classes).sum(0)
    return dict(zip(names, (pixel_accuracy(counts).item(), mean_iou(counts).item()), strict=True))


def sees_masks(experiment: Cell) -> bool:
    """Whether the method is full supervision."""
    return METHODS[experiment.method].supervision == "masks"


def _embedded(experiment: Cell, recipe: ScribbleRecipe) -> Sets:
    """Fashion scenes, with scribbles drawn into their masks."""
    check_scenes(recipe)
    train, test = scenes("train", recipe.images, recipe.crop), scenes("test", recipe.tests, recipe.crop)
    scribbled, truth = draw_scribbles(train, experiment.labels / 100, recipe.width)
    pool = draw_masks(train, len(train), experiment.seed)[0] if sees_masks(experiment) else scribbled
    shown = spread(len(train), SHOWN_POOL)
    reach = torch.from_numpy(reaches_of(train.masks[shown].numpy(), recipe.width))
    pictures = {
        "pool_images": train.images[shown], "pool_truth": truth[shown], "pool_scribbles": scribbled.labels[shown],
        "pool_reach": reach.half(),
    }  # fmt: skip

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        return zip(test.images.split(BATCH), test.masks.split(BATCH), strict=True)

    first = test.images[:SHOWN_TEST], test.masks[:SHOWN_TEST]
    size = (len(train), recipe.crop, recipe.crop)
    return Sets(pool, size, truth, batches, first, shown, pictures, f"{pool.digest}+{test.digest}")


def _folder(experiment: Cell, recipe: ScribbleRecipe, data_root: Path | None) -> Sets:
    """ScribbleSup on Pascal VOC. No mask of a training image is opened but for full supervision.

    Of the shown images' reach only the scribbles at hand are known: it is their length there, and inf elsewhere.
    """
    length, masks = experiment.labels / 100, sees_masks(experiment)
    train = open_masks(experiment.data, "train_aug", data_root) if masks else open_scribbles(length, data_root)
    test = open_masks(experiment.data, "val", data_root)
    pool = framed(train, FRAME)
    shown = spread(len(train), SHOWN_POOL)
    items = pool.take(shown)
    hidden = torch.where(items.labels == PADDING, PADDING, IGNORE).byte()
    scribbles = hidden if masks else items.labels
    reach = torch.where(scribbles < len(train.classes), length, torch.inf)
    truth = (items.labels if masks else hidden).masked_fill(hidden == PADDING, IGNORE)
    pictures = {
        "pool_images": items.images, "pool_truth": truth, "pool_scribbles": scribbles, "pool_reach": reach.half(),
    }  # fmt: skip
    tested = spread(len(test), recipe.tests or len(test)).tolist()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(8) as threads:
            for image, mask in read_ahead(threads, test.read, tested, 16):
                yield image[None], mask[None]

    first = stacked([test.read(index) for index in tested[:SHOWN_TEST]], recipe.crop)
    return Sets(pool, pool.size, None, batches, first, shown, pictures, f"{pool.digest}+{test.digest}")
