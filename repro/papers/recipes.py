"""Recipes of every method, by kind of supervision, at three scales.

`paper` numbers are published or released ones, as noted beside the fields in `repro.recipe`; an assumption is marked as
one. `mini` and `tiny` shrink the network, the images, the batch and the number of steps, and adapt what belongs to a
crop or an epoch: a `mini` run takes about a minute on one CPU core, a `tiny` one seconds.
"""

from typing import Any

from repro.data import splits
from repro.data.augment import STRONG
from repro.data.catalogue import SOURCES
from repro.methods import few_labels, few_masks, image_tags, scribbles
from repro.methods.scribbles.baselines import for_crop
from repro.models import resnet, vit, wide_resnet
from repro.models.deeplab import BACKBONES
from repro.recipe import LabelRecipe, MaskRecipe, ScribbleRecipe, TagRecipe
from repro.settings import SettingError, replace, unknown
from repro.tasks.masks import budget_of

# Few labels: FixMatch's recipe as USB and TorchSSL have it; ComMatch states a ratio of 5

# Published label budgets; any balanced budget is allowed, these are the ones that have tables.
LABEL_BUDGETS = {
    "fashion": (40, 100, 250),
    "cifar10": (40, 250, 4000),
    "cifar100": (400, 2500, 10000),
    "svhn": (40, 250, 1000),
    "svhn_extra": (40, 250, 1000),
    "stl10": (40, 250, 1000),
}
LABEL_PAPER_NETWORK = {"fashion": "wrn-28-2", "cifar10": "wrn-28-2", "cifar100": "wrn-28-8", "svhn": "wrn-28-2",
                 "svhn_extra": "wrn-28-2", "stl10": "wrn-37-2"}  # fmt: skip
# Methods whose own recipe departs from FixMatch's at every scale: mu = 1 (MixMatch and its relatives, as in
# TorchSSL).
LABEL_PAIRED = {"mean_teacher", "mixmatch", "remixmatch", "pseudo_label"}


def check_label_budget(data: str, labels: int) -> None:
    """Raise SettingError unless `labels` can be drawn class-balanced from `data` (0 is not a budget)."""
    try:
        splits.parse(f"{data}.0@{labels}")
    except ValueError as error:
        raise SettingError(str(error)) from error


def check_label_recipe(recipe: LabelRecipe) -> None:
    """Raise SettingError unless the network and the strong view exist."""
    for name, known in (("network", wide_resnet.LAYOUTS), ("strong", STRONG)):
        if getattr(recipe, name) not in known:
            raise unknown(name, getattr(recipe, name), known)


def label_recipe(method: str, data: str, labels: int, scale: str, **paper: Any) -> LabelRecipe:
    """The recipe of `method` on `data` with `labels` labels at `scale`.

    paper: fields that a paper states differently (ComMatch: `unlabelled_ratio=5`), applied at every scale.
    """
    source = SOURCES[data]
    base = LabelRecipe(
        method=few_labels.METHODS[method].Settings(),
        network=LABEL_PAPER_NETWORK[data],
        padding=source.shape[1] // 8,
        flip=source.flip,
        weight_decay=1e-3 if data == "cifar100" else 5e-4,
    )
    if method in LABEL_PAIRED:
        base = replace(base, unlabelled_ratio=1)
    if method in ("commatch", "ups"):
        base = replace(base, dropout=0.3)
    if method == "ups":  # its released code: no decay, no averaging, larger batches once labels are many
        base = replace(base, variant="ups", weight_decay=0.0, ema=0.0, batch=64 if labels < 4000 else 128)
    base = replace(base, **{name: value for name, value in paper.items() if method not in LABEL_PAIRED})
    if scale == "paper":
        return base
    ratio = {} if method in LABEL_PAIRED else {"unlabelled_ratio": 5}
    small = replace(base, **LABEL_MINI | ratio) if scale == "mini" else replace(base, **LABEL_MINI | ratio | LABEL_TINY)
    recipe_changes, method_changes = LABEL_SMALL.get(method, {}).get(scale, ({}, {}))
    return replace(small, **recipe_changes, method=replace(small.method, **method_changes))


LABEL_MINI = {
    "network": "wrn-10-1-half", "batch": 32, "steps": 600, "epoch_steps": 10, "ema": 0.98, "bn_momentum": 0.05,
    "holdout": 10, "eval_every": 60, "log_every": 20, "checkpoint_every": 60, "precision": "fp32", "threads": 1,
}  # fmt: skip
LABEL_TINY = {"batch": 10, "steps": 6, "epoch_steps": 2, "eval_every": 3, "log_every": 2, "checkpoint_every": 3}
# What counts iterations, or repeats whole trainings, shrinks with the run: (changes of the recipe, of the method). UPS
# trains in fewer rounds (its published 20 are each a whole training); CalibrateMix spends half a run on its warm-up
# (published: a seventh), since a step after it costs about two of its base's; running means of .999 would keep half of
# their start through 600 steps.
LABEL_SMALL: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "ups": {"mini": ({"ema": 0.0}, {"rounds": 3}), "tiny": ({"steps": 3, "ema": 0.0}, {"rounds": 2})},
    "calibratemix": {"mini": ({}, {"warmup": 300, "ema_p": 0.98}), "tiny": ({}, {"warmup": 3, "ema_p": 0.98})},
    "softmatch": {"mini": ({}, {"ema_p": 0.98}), "tiny": ({}, {"ema_p": 0.98})},
    "freematch": {"mini": ({}, {"ema_p": 0.98}), "tiny": ({}, {"ema_p": 0.98})},
    "marginmatch": {
        "mini": ({}, {"warmup": 60, "refresh_every": 20, "redraw_every": 300, "delay": 20}),
        "tiny": ({}, {"warmup": 2, "refresh_every": 1, "redraw_every": 3, "delay": 1}),
    },
}


# Few masks: UniMatch's recipe and the configurations that are held to be CSL's

# Published numbers of masks; of scenes any number may be shown.
MASK_BUDGETS = {
    "scenes": (10, 20, 40),
    "voc": (92, 183, 366, 732, 1464, 662, 1323, 2646),
    "cityscapes": (100, 186, 372, 744, 1488),
    "coco2017": (232, 463, 925, 1849, 3697),
}
MASK_TRAINING = {"voc": 10_582, "cityscapes": 2975, "coco2017": 118_287}
# Per data set: epochs, and fields of the recipe. COCO is UniMatch's; its batch and learning rate are assumptions, and
# so is its backbone here: the published one is an Xception-65.
MASK_PAPER: dict[str, tuple[int, dict[str, Any]]] = {
    "voc": (80, {"crop": 321, "lr": 0.001, "head_factor": 10.0}),
    "cityscapes": (240, {"crop": 801, "lr": 0.005, "head_factor": 1.0, "labelled_loss": "ohem", "window": 801}),
    "coco2017": (30, {"crop": 513, "lr": 0.004, "head_factor": 10.0}),
}
MASK_MINI = {
    "network": "resnet-mini", "output_stride": 16, "crop": 64, "batch": 8, "lr": 0.01, "head_factor": 10.0,
    "steps": 300, "epoch_steps": 30, "eval_every": 30, "log_every": 10, "checkpoint_every": 30,
    "precision": "fp32", "threads": 1,
}  # fmt: skip
MASK_TINY = {"batch": 4, "steps": 6, "epoch_steps": 2, "eval_every": 3, "log_every": 2, "checkpoint_every": 3}
# Scenes are made at the crop's size; of files, a small crop shows the same share of an image as the published one.
MASK_SCENES, MASK_FEW_SCENES = {"images": 500, "tests": 200}, {"images": 40, "tests": 10}
MASK_FILES = {"scale_low": 0.1, "scale_high": 0.4}


def check_mask_budget(data: str, labels: int) -> None:
    """Raise SettingError unless `labels` masks can be shown of `data`: any number of scenes, or a published list."""
    if data == "scenes":
        if labels < 1:
            raise SettingError(f"labels is {labels}; it is the number of masks shown, at least 1")
        return
    try:
        budget_of(data, labels)
    except ValueError as error:
        raise SettingError(str(error)) from error


def check_mask_recipe(recipe: MaskRecipe) -> None:
    """Raise SettingError unless the network exists and sizes fit together."""
    if recipe.network not in resnet.LAYOUTS:
        raise unknown("network", recipe.network, resnet.LAYOUTS)
    if recipe.scale_low > recipe.scale_high:
        raise SettingError(f"scale_low is {recipe.scale_low}, above scale_high, {recipe.scale_high}")
    if recipe.batch < 2:
        raise SettingError("batch is 1; the pyramid's pooled branch needs at least 2 images a batch")
    block = getattr(recipe.method, "block", 1)
    if round(recipe.crop / block) < 1:
        raise SettingError(f"block is {block}; it must be below twice the crop, {recipe.crop}")


def mask_recipe(method: str, data: str, labels: int, scale: str) -> MaskRecipe:
    """The recipe of `method` on `data` with `labels` masks at `scale`.

    Raises SettingError for scenes at `paper` scale, which nobody published.
    """
    settings = few_masks.METHODS[method].Settings()
    base = MaskRecipe(
        method=settings, network="resnet101s", unlabelled_ratio=1, batch=8, momentum=0.9, nesterov=False,
        weight_decay=1e-4, schedule="poly-0.9", ema=0.0,
        output_stride=8 if method == "csl" else 16,
    )  # fmt: skip
    if data == "cityscapes" and method in ("fixmatch", "unimatch"):
        base = replace(base, method=replace(settings, threshold=0.0))
    if data != "scenes":
        epochs, fields = MASK_PAPER[data]
        epoch = (MASK_TRAINING[data] - labels or MASK_TRAINING[data]) // base.batch
        every = {"epoch_steps": epoch, "eval_every": epoch, "checkpoint_every": epoch, "log_every": 50}
        base = replace(base, steps=epochs * epoch, **every, **fields)
    elif scale == "paper":
        raise SettingError("scenes have no published setting: use scale mini or tiny, or other data")
    if scale == "paper":
        return base
    small = replace(base, **MASK_MINI, **(MASK_SCENES if data == "scenes" else MASK_FILES))
    if method == "csl":
        small = replace(small, method=replace(small.method, block=8))
    return replace(small, **MASK_TINY, **(MASK_FEW_SCENES if data == "scenes" else {})) if scale == "tiny" else small


# Image tags: PCRE's recipe and those of its peers, from the released codes

TAG_TRAINING = {"voc": 10_582, "coco2014": 82_081}  # images whose tags are shown
TAG_SCENES = 500
# Fields of the recipe by data set and by method. Batch and steps hold for all; DuPL's rate and schedule are
# assumptions, ToCo's.
TAG_COMMON: dict[str, dict[str, Any]] = {
    "voc": {"batch": 4, "steps": 20_000},
    "coco2014": {"batch": 8, "steps": 80_000, "colour": False},
}
TAG_TOCO_LIKE = {"lr": 6e-5, "colour": False, "cam_scales": "1,0.5,1.5"}
TAG_PAPER: dict[str, dict[str, Any]] = {
    "plain": TAG_TOCO_LIKE,
    "toco": TAG_TOCO_LIKE,
    "dupl": TAG_TOCO_LIKE,
    "afa": TAG_TOCO_LIKE | {"crop": 320, "cam_high": 0.55, "cam_low": 0.35, "beta": 0.45},
    "pcre": {"lr": 3e-5, "value_only": True},
}
TAG_ON_COCO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (fields of the recipe, settings of the method)
    "toco": ({"cam_high": 0.65, "beta": 0.45}, {"temperature": 1.0}),
    "pcre": (
        {"lr": 6e-5},
        {"cpe_weight": 0.5, "ptc_weight": 0.2, "prototype_momentum": 0.9, "prototype_high": 0.9},
    ),
}
# The last block mixes nothing at small scales, for all but AFA, which reads its attention: the small ViT carries what
# is in an image to every patch, so that maps of its full last block light up the background. The rate suits the few
# steps, and the thresholds maps that are still peaked after them. All are deviations, chosen by plain training on
# training scenes outside the pool and the same for all methods.
TAG_MINI = {
    "network": "vit-mini", "crop": 64, "batch": 16, "lr": 2e-3, "steps": 240, "epoch_steps": 31,
    "warmup_steps": 20, "cam_scales": "1,0.5", "colour": False, "eval_every": 40, "log_every": 10,
    "checkpoint_every": 40, "scale_low": 0.75, "scale_high": 1.5, "precision": "fp32", "threads": 1,
    "images": TAG_SCENES, "tests": 200, "cam_low": 0.2, "cam_high": 0.5, "beta": 0.3,
}  # fmt: skip
TAG_TINY = {"batch": 4, "steps": 6, "epoch_steps": 2, "warmup_steps": 1, "eval_every": 3, "log_every": 2,
        "checkpoint_every": 3, "tests": 10}  # fmt: skip
# What counts pixels or patches of a crop of 448, and what costs more than it gives on a grid of 16 x 16. PCRE's masks
# learn from maps that are cut like the others: above .7 hardly a pixel is left of peaked ones, and the masks vanished
# in test runs of seeds 0 and 1.
TAG_SMALL: dict[str, dict[str, Any]] = {
    "toco": {"side": 16, "hidden": 128, "crops": 4},
    "dupl": {"least": 20},
    "pcre": {"resize": "group", "mask_scales": "1", "prototype_high": TAG_MINI["cam_high"]},
}


def check_tag_budget(data: str, labels: int) -> None:
    """Raise SettingError unless the tags of `labels` images can be shown of `data`: 1 to 500 scenes, or all images."""
    if data == "scenes" and not 1 <= labels <= TAG_SCENES:
        raise SettingError(f"labels is {labels}; it is the number of scenes whose tags are shown, 1 to {TAG_SCENES}")
    if data != "scenes" and labels != TAG_TRAINING[data]:
        raise SettingError(f"labels is {labels}; papers show the tags of all {TAG_TRAINING[data]} images of {data}")


def check_tag_recipe(recipe: TagRecipe) -> None:
    """Raise SettingError unless the network exists and sizes fit together."""
    if recipe.network not in vit.LAYOUTS:
        raise unknown("network", recipe.network, vit.LAYOUTS)
    if recipe.scale_low > recipe.scale_high:
        raise SettingError(f"scale_low is {recipe.scale_low}, above scale_high, {recipe.scale_high}")
    patch, smallest = vit.LAYOUTS[recipe.network].patch, int(recipe.crop * min(recipe.scales))
    if smallest < patch:
        raise SettingError(f"the smallest of cam_scales makes {smallest} px of a crop, less than a patch of {patch}")


def tag_recipe(method: str, data: str, labels: int, scale: str) -> TagRecipe:
    """The recipe of `method` on `data` at `scale`; labels: images whose tags are shown.

    Raises SettingError for scenes at `paper` scale, which nobody published.
    """
    settings = image_tags.METHODS[method].Settings()
    base = TagRecipe(
        method=settings, network="vit_base_patch16_224", unlabelled_ratio=1, optimiser="adamw", weight_decay=0.01,
        schedule="warmup-poly-0.9", warmup_steps=1500, ema=0.0, precision="fp32", epoch_steps=1000, eval_every=2000,
        checkpoint_every=2000, log_every=200,
    )  # fmt: skip
    base = replace(base, **TAG_PAPER[method])
    if data == "scenes":
        if scale == "paper":
            raise SettingError("scenes have no published setting: use scale mini or tiny, or other data")
    else:
        base = replace(base, **TAG_COMMON[data])
    if data == "coco2014":
        fields, changes = TAG_ON_COCO.get(method, ({}, {}))
        base = replace(base, **fields, method=replace(settings, **changes))
    if scale == "paper":
        return base
    small = replace(
        base, **TAG_MINI, value_only=method != "afa", method=replace(base.method, **TAG_SMALL.get(method, {}))
    )
    return replace(small, **TAG_TINY) if scale == "tiny" else small


# Scribbles: Robust Trust Region's recipe and those of its peers, from released scripts and READMEs. All methods share
# the first stage, partial cross-entropy for `start_steps` steps, and the length of the second, `steps`

SCRIBBLE_LENGTHS = (0, 30, 50, 80, 100)  # percent of each stroke that is left; 0 is a click
SCRIBBLE_CLASSES = {"scenes": 6, "voc": 21}  # C, with the background: epsilon belongs to it
SCRIBBLE_EPOCH, SCRIBBLE_EPOCHS = 882, 60  # batches of 12 that hold VOC's 10,582 images; epochs of each stage
SCRIBBLE_MINI = {
    "network": "resnet-mini", "crop": 64, "batch": 12, "start_steps": 200, "steps": 160, "epoch_steps": 41, "lr": 0.2,
    "head_factor": 10.0, "scale_low": 0.75, "scale_high": 1.5, "blur": False, "width": 1, "images": 500, "tests": 200,
    "eval_every": 40, "log_every": 10, "checkpoint_every": 40, "precision": "fp32", "threads": 1, "workers": 0,
}  # fmt: skip
SCRIBBLE_TINY = {"batch": 4, "start_steps": 3, "steps": 3, "epoch_steps": 2, "eval_every": 3, "log_every": 2,
        "checkpoint_every": 3, "images": 40, "tests": 12}  # fmt: skip
# Of files: scales are relative to the crop, so that a small one shows what a large one does; strokes keep their width.
SCRIBBLE_FILES = {"scale_low": 0.5, "scale_high": 2.0, "width": 3, "images": 0}
# Numbers that no publication fixes for so few steps. They were chosen by mIoU on training scenes 500 to 699, which no
# run trains on, with seed 0: lr out of .01, .03, .1, .2, .4 by partial CE and full supervision. Then, from one first
# stage at lengths 30 and 100, the rate out of .1, .3, 1: .3 is best where nothing is solved. Both trust regions keep
# the published .1, so that epsilon alone tells them apart: .3 is better for the robust one (.618, not .605, at 30) and
# far worse for the plain one (.167, not .622). Weights, at length 30: Grid-GD's out of .003 to 10 by halves of a
# decade; ADM's out of 4, 16, 64 in 60 steps, of which the smallest is best, so one still smaller may be better yet;
# Dense-GD's out of a third, one and three of `for_crop`. Stage A runs twice in mini: once costs as much as 100 steps.
SCRIBBLE_SMALL: dict[str, dict[str, Any]] = {
    "partial_ce": {"rate": 0.3},
    "dense_gd": {"rate": 0.3},
    "grid_gd": {"rate": 0.3, "potts_weight": 0.3},
    "adm": {"potts_weight": 4.0},
    "trust_region": {"refresh": 2},
    "robust_trust_region": {"refresh": 2},
    "full": {"rate": 0.3},
}


def check_scribble_budget(data: str, labels: int) -> None:
    """Raise SettingError unless `labels` is a published scribble length in percent, whatever the data."""
    if labels not in SCRIBBLE_LENGTHS:
        known = ", ".join(map(str, SCRIBBLE_LENGTHS))
        raise SettingError(
            f"labels is {labels}; it is the length of {data}'s scribbles in percent: {known} (0: a click)"
        )


def check_scribble_recipe(recipe: ScribbleRecipe) -> None:
    """Raise SettingError unless the network exists and sizes fit together."""
    if recipe.network not in BACKBONES:
        raise unknown("network", recipe.network, BACKBONES)
    if recipe.scale_low > recipe.scale_high:
        raise SettingError(f"scale_low is {recipe.scale_low}, above scale_high, {recipe.scale_high}")
    if recipe.batch < 2:
        raise SettingError("batch is 1; the pyramid's pooled branch needs at least 2 images a batch")
    block = getattr(recipe.method, "downscale", 1)
    if block > recipe.crop:
        raise SettingError(f"downscale is {block}; blocks must not be larger than the crop, {recipe.crop} px")


def scribble_recipe(method: str, data: str, labels: int, scale: str) -> ScribbleRecipe:
    """The recipe of `method` on `data` with scribbles of `labels` percent at `scale`.

    epsilon and gamma are the published ones of that length, epsilon brought over to the data's number of classes. Full
    supervision has the same recipe at every length.
    Raises SettingError for scenes at `paper` scale, which nobody published.
    """
    if scale == "paper" and data == "scenes":
        raise SettingError("scenes have no published setting: use scale mini or tiny, or other data")
    epoch, steps = SCRIBBLE_EPOCH, SCRIBBLE_EPOCHS * SCRIBBLE_EPOCH
    base = ScribbleRecipe(
        method=scribbles.settings_for(method, labels / 100, SCRIBBLE_CLASSES[data]), network="mobilenetv2_100",
        output_stride=16, crop=513, batch=12, unlabelled_ratio=1, start_steps=steps, steps=steps, epoch_steps=epoch,
        eval_every=epoch, checkpoint_every=epoch, log_every=50, lr=7e-3, momentum=0.9, nesterov=False,
        weight_decay=5e-4, schedule="poly-0.9", ema=0.0, head_factor=10.0, precision="fp32",
    )  # fmt: skip
    if scale == "paper":
        return base
    small = replace(base, **SCRIBBLE_MINI)
    if method == "dense_gd":
        small = replace(small, method=for_crop(small.method, small.crop))
    small = replace(small, method=replace(small.method, **SCRIBBLE_SMALL.get(method, {})))
    small = replace(small, **SCRIBBLE_TINY) if scale == "tiny" else small
    return replace(small, **SCRIBBLE_FILES) if data != "scenes" else small
