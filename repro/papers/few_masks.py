"""Recipes for segmentation from few masks: CSL's and UniMatch's, at three scales.

`paper` numbers come from UniMatch and from configurations that are held to be CSL's, as noted in
`experiment.MaskRecipe`; what neither states is an assumption and says so. `mini` and `tiny` shrink the network, the
images, the batch and the number of steps.
"""

from typing import Any

from repro.experiment import MaskRecipe
from repro.methods.few_masks import METHODS
from repro.models.resnet import LAYOUTS
from repro.settings import SettingError, replace, unknown
from repro.tasks.masks import budget_of

# Published numbers of masks; of scenes any number may be shown.
BUDGETS = {
    "scenes": (10, 20, 40),
    "voc": (92, 183, 366, 732, 1464, 662, 1323, 2646),
    "cityscapes": (100, 186, 372, 744, 1488),
    "coco2017": (232, 463, 925, 1849, 3697),
}
TRAINING = {"voc": 10_582, "cityscapes": 2975, "coco2017": 118_287}
# Per data set: epochs, and fields of the recipe. COCO is UniMatch's; its batch and learning rate are assumptions, and
# so is its backbone here: the published one is an Xception-65.
PAPER: dict[str, tuple[int, dict[str, Any]]] = {
    "voc": (80, {"crop": 321, "lr": 0.001, "head_factor": 10.0}),
    "cityscapes": (240, {"crop": 801, "lr": 0.005, "head_factor": 1.0, "labelled_loss": "ohem", "window": 801}),
    "coco2017": (30, {"crop": 513, "lr": 0.004, "head_factor": 10.0}),
}
MINI = {
    "network": "resnet-mini", "output_stride": 16, "crop": 64, "batch": 8, "lr": 0.01, "head_factor": 10.0,
    "steps": 300, "epoch_steps": 30, "eval_every": 30, "log_every": 10, "checkpoint_every": 30,
    "precision": "fp32", "threads": 1,
}  # fmt: skip
TINY = {"batch": 4, "steps": 6, "epoch_steps": 2, "eval_every": 3, "log_every": 2, "checkpoint_every": 3}
# Scenes are made at the crop's size; of files, a small crop shows the same share of an image as the published one.
SCENES, FEW_SCENES = {"images": 500, "tests": 200}, {"images": 40, "tests": 10}
FILES = {"scale_low": 0.1, "scale_high": 0.4}


def check_budget(data: str, labels: int) -> None:
    """Raise SettingError unless `labels` masks can be shown of `data`: any number of scenes, or a published list."""
    if data == "scenes":
        if labels < 1:
            raise SettingError(f"labels is {labels}; it is the number of masks shown, at least 1")
        return
    try:
        budget_of(data, labels)
    except ValueError as error:
        raise SettingError(str(error)) from error


def check_recipe(recipe: MaskRecipe) -> None:
    """Raise SettingError unless the network exists and sizes fit together."""
    if recipe.network not in LAYOUTS:
        raise unknown("network", recipe.network, LAYOUTS)
    if recipe.scale_low > recipe.scale_high:
        raise SettingError(f"scale_low is {recipe.scale_low}, above scale_high, {recipe.scale_high}")
    if recipe.batch < 2:
        raise SettingError("batch is 1; the pyramid's pooled branch needs at least 2 images a batch")
    block = getattr(recipe.method, "block", 1)
    if round(recipe.crop / block) < 1:
        raise SettingError(f"block is {block}; it must be below twice the crop, {recipe.crop}")


def recipe(method: str, data: str, labels: int, scale: str) -> MaskRecipe:
    """The recipe of `method` on `data` with `labels` masks at `scale`.

    Raises SettingError for scenes at `paper` scale, which nobody published.
    """
    settings = METHODS[method].Settings()
    base = MaskRecipe(
        method=settings, network="resnet101s", unlabelled_ratio=1, batch=8, momentum=0.9, nesterov=False,
        weight_decay=1e-4, schedule="poly-0.9", ema=0.0,
        output_stride=8 if method == "csl" else 16,
    )  # fmt: skip
    if data == "cityscapes" and method in ("fixmatch", "unimatch"):
        base = replace(base, method=replace(settings, threshold=0.0))
    if data != "scenes":
        epochs, fields = PAPER[data]
        epoch = (TRAINING[data] - labels or TRAINING[data]) // base.batch
        every = {"epoch_steps": epoch, "eval_every": epoch, "checkpoint_every": epoch, "log_every": 50}
        base = replace(base, steps=epochs * epoch, **every, **fields)
    elif scale == "paper":
        raise SettingError("scenes have no published setting: use scale mini or tiny, or other data")
    if scale == "paper":
        return base
    small = replace(base, **MINI, **(SCENES if data == "scenes" else FILES))
    if method == "csl":
        small = replace(small, method=replace(small.method, block=8))
    return replace(small, **TINY, **(FEW_SCENES if data == "scenes" else {})) if scale == "tiny" else small
