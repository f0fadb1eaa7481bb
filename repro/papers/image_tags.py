"""Recipes for segmentation from image tags: PCRE's and those of its peers, at three scales.

`paper` numbers are those of the released codes, as noted in `experiment.TagRecipe` and below; an assumption says so.
`mini` and `tiny` shrink the network, the images, the number of steps and what counts pixels, and change batch and rate.
"""

from typing import Any

from repro.experiment import TagRecipe
from repro.methods.image_tags import METHODS
from repro.models.vit import LAYOUTS
from repro.settings import SettingError, replace, unknown

TRAINING = {"voc": 10_582, "coco2014": 82_081}  # images whose tags are shown
SCENES = 500
# Fields of the recipe by data set and by method. Batch and steps hold for all; DuPL's rate and schedule are
# assumptions, ToCo's.
COMMON: dict[str, dict[str, Any]] = {
    "voc": {"batch": 4, "steps": 20_000},
    "coco2014": {"batch": 8, "steps": 80_000, "colour": False},
}
TOCO_LIKE = {"lr": 6e-5, "colour": False, "cam_scales": "1,0.5,1.5"}
PAPER: dict[str, dict[str, Any]] = {
    "plain": TOCO_LIKE,
    "toco": TOCO_LIKE,
    "dupl": TOCO_LIKE,
    "afa": TOCO_LIKE | {"crop": 320, "cam_high": 0.55, "cam_low": 0.35, "beta": 0.45},
    "pcre": {"lr": 3e-5, "value_only": True},
}
ON_COCO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # (fields of the recipe, settings of the method)
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
MINI = {
    "network": "vit-mini", "crop": 64, "batch": 16, "lr": 2e-3, "steps": 240, "epoch_steps": 31,
    "warmup_steps": 20, "cam_scales": "1,0.5", "colour": False, "eval_every": 40, "log_every": 10,
    "checkpoint_every": 40, "scale_low": 0.75, "scale_high": 1.5, "precision": "fp32", "threads": 1, "images": SCENES,
    "tests": 200, "cam_low": 0.2, "cam_high": 0.5, "beta": 0.3,
}  # fmt: skip
TINY = {"batch": 4, "steps": 6, "epoch_steps": 2, "warmup_steps": 1, "eval_every": 3, "log_every": 2,
        "checkpoint_every": 3, "tests": 10}  # fmt: skip
# What counts pixels or patches of a crop of 448, and what costs more than it gives on a grid of 16 x 16. PCRE's masks
# learn from maps that are cut like the others: above .7 hardly a pixel is left of peaked ones, and the masks vanished
# in test runs of seeds 0 and 1.
SMALL: dict[str, dict[str, Any]] = {
    "toco": {"side": 16, "hidden": 128, "crops": 4},
    "dupl": {"least": 20},
    "pcre": {"resize": "group", "mask_scales": "1", "prototype_high": MINI["cam_high"]},
}


def check_budget(data: str, labels: int) -> None:
    """Raise SettingError unless the tags of `labels` images can be shown of `data`: 1 to 500 scenes, or all images."""
    if data == "scenes" and not 1 <= labels <= SCENES:
        raise SettingError(f"labels is {labels}; it is the number of scenes whose tags are shown, 1 to {SCENES}")
    if data != "scenes" and labels != TRAINING[data]:
        raise SettingError(f"labels is {labels}; papers show the tags of all {TRAINING[data]} images of {data}")


def check_recipe(recipe: TagRecipe) -> None:
    """Raise SettingError unless the network exists and sizes fit together."""
    if recipe.network not in LAYOUTS:
        raise unknown("network", recipe.network, LAYOUTS)
    if recipe.scale_low > recipe.scale_high:
        raise SettingError(f"scale_low is {recipe.scale_low}, above scale_high, {recipe.scale_high}")
    patch, smallest = LAYOUTS[recipe.network].patch, int(recipe.crop * min(recipe.scales))
    if smallest < patch:
        raise SettingError(f"the smallest of cam_scales makes {smallest} px of a crop, less than a patch of {patch}")


def recipe(method: str, data: str, labels: int, scale: str) -> TagRecipe:
    """The recipe of `method` on `data` at `scale`; labels: images whose tags are shown.

    Raises SettingError for scenes at `paper` scale, which nobody published.
    """
    settings = METHODS[method].Settings()
    base = TagRecipe(
        method=settings, network="vit_base_patch16_224", unlabelled_ratio=1, optimiser="adamw", weight_decay=0.01,
        schedule="warmup-poly-0.9", warmup_steps=1500, ema=0.0, precision="fp32", epoch_steps=1000, eval_every=2000,
        checkpoint_every=2000, log_every=200,
    )  # fmt: skip
    base = replace(base, **PAPER[method])
    if data == "scenes":
        if scale == "paper":
            raise SettingError("scenes have no published setting: use scale mini or tiny, or other data")
    else:
        base = replace(base, **COMMON[data])
    if data == "coco2014":
        fields, changes = ON_COCO.get(method, ({}, {}))
        base = replace(base, **fields, method=replace(settings, **changes))
    if scale == "paper":
        return base
    small = replace(base, **MINI, value_only=method != "afa", method=replace(base.method, **SMALL.get(method, {})))
    return replace(small, **TINY) if scale == "tiny" else small
