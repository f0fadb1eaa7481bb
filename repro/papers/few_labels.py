"""Recipes that the semi-supervised classification papers share: FixMatch's, at three scales.

`paper` numbers come from FixMatch, USB and TorchSSL as noted in `experiment.LabelRecipe`; `mini` and `tiny` shrink
the network, the batch and the number of steps so that a run takes about a minute, or seconds, on two CPU
cores.
"""

from typing import Any

from repro.data import splits
from repro.data.augment import STRONG
from repro.data.catalogue import SOURCES
from repro.experiment import LabelRecipe, Recipe
from repro.methods.few_labels import METHODS
from repro.models.wide_resnet import LAYOUTS
from repro.papers import published
from repro.papers.grid import Column, Row
from repro.papers.published import Reference
from repro.settings import SettingError, replace, unknown

# Published label budgets; any balanced budget is allowed, these are the ones that have tables.
BUDGETS = {
    "fashion": (40, 100, 250),
    "cifar10": (40, 250, 4000),
    "cifar100": (400, 2500, 10000),
    "svhn": (40, 250, 1000),
    "svhn_extra": (40, 250, 1000),
    "stl10": (40, 250, 1000),
}
PAPER_NETWORK = {"fashion": "wrn-28-2", "cifar10": "wrn-28-2", "cifar100": "wrn-28-8", "svhn": "wrn-28-2",
                 "svhn_extra": "wrn-28-2", "stl10": "wrn-37-2"}  # fmt: skip
# Methods whose own recipe departs from FixMatch's at every scale: mu = 1 (MixMatch and its relatives, as in
# TorchSSL).
PAIRED = {"mean_teacher", "mixmatch", "remixmatch", "pseudo_label"}

# Table rows, shared by the papers; `published` is what the sources call the method.
ROWS = {
    "supervised": Row("Supervised", "supervised", published=("Supervised",)),
    "pseudo_label": Row("Pseudo-label", "pseudo_label", published=("PseudoLabel",)),
    "mean_teacher": Row("Mean Teacher", "mean_teacher", published=("MeanTeacher",)),
    "mixmatch": Row("MixMatch", "mixmatch", published=("MixMatch",)),
    "remixmatch": Row("ReMixMatch", "remixmatch", published=("ReMixMatch",)),
    "uda": Row("UDA", "uda", published=("UDA",)),
    "fixmatch": Row("FixMatch", "fixmatch", published=("FixMatch", "FixMatch (RA)")),
    "fixmatch_cta": Row("FixMatch (CTAugment)", "fixmatch", {"strong": "ctaugment"}, ("FixMatch (CTA)",)),
    "flexmatch": Row("FlexMatch", "flexmatch", published=("FlexMatch",)),
    "freematch": Row("FreeMatch", "freematch", published=("FreeMatch",)),
    "softmatch": Row("SoftMatch", "softmatch", published=("SoftMatch",)),
    "marginmatch": Row("MarginMatch", "marginmatch", published=("MarginMatch",)),
    "ups": Row("UPS", "ups", published=("UPS",)),
}
# Published columns that any of these papers' tables can stand beside.
TOOLBOXES = (
    Reference("USB", "results/classic_cv.csv"),
    Reference("TorchSSL", "README main results"),
    Reference("FixMatch", "Table 2"),
)
EMBEDDED = tuple(Column("fashion", labels) for labels in BUDGETS["fashion"])


def columns(*data: str) -> tuple[Column, ...]:
    """The published label budgets of each data set."""
    return tuple(Column(name, labels) for name in data for labels in BUDGETS[name])


def baselines() -> tuple[published.Published, ...]:
    """Published numbers of the baselines: USB, TorchSSL and the FixMatch paper."""
    return published.load("ssl_baselines")


def check_budget(data: str, labels: int) -> None:
    """Raise SettingError unless `labels` can be drawn class-balanced from `data` (0 is not a budget)."""
    try:
        splits.parse(f"{data}.0@{labels}")
    except ValueError as error:
        raise SettingError(str(error)) from error


def check_recipe(recipe: Recipe) -> None:
    """Raise SettingError unless the network and the strong view exist."""
    for name, known in (("network", LAYOUTS), ("strong", STRONG)):
        if getattr(recipe, name) not in known:
            raise unknown(name, getattr(recipe, name), known)


def recipe(method: str, data: str, labels: int, scale: str, **paper: Any) -> Recipe:
    """The recipe of `method` on `data` with `labels` labels at `scale`.

    paper: fields that a paper states differently (ComMatch: `unlabelled_ratio=5`), applied at every scale.
    """
    source = SOURCES[data]
    base = LabelRecipe(
        method=METHODS[method].Settings(),
        network=PAPER_NETWORK[data],
        padding=source.shape[1] // 8,
        flip=source.flip,
        weight_decay=1e-3 if data == "cifar100" else 5e-4,
    )
    if method in PAIRED:
        base = replace(base, unlabelled_ratio=1)
    if method in ("commatch", "ups"):
        base = replace(base, dropout=0.3)
    if method == "ups":  # its released code: no decay, no averaging, larger batches once labels are many
        base = replace(base, variant="ups", weight_decay=0.0, ema=0.0, batch=64 if labels < 4000 else 128)
    base = replace(base, **{name: value for name, value in paper.items() if method not in PAIRED})
    if scale == "paper":
        return base
    ratio = {} if method in PAIRED else {"unlabelled_ratio": 5}
    small = replace(base, **MINI | ratio) if scale == "mini" else replace(base, **MINI | ratio | TINY)
    recipe_changes, method_changes = SMALL.get(method, {}).get(scale, ({}, {}))
    return replace(small, **recipe_changes, method=replace(small.method, **method_changes))


MINI = {
    "network": "wrn-10-1-half", "batch": 32, "steps": 600, "epoch_steps": 10, "ema": 0.98, "bn_momentum": 0.05,
    "holdout": 10, "eval_every": 60, "log_every": 20, "checkpoint_every": 60, "precision": "fp32", "threads": 1,
}  # fmt: skip
TINY = {"batch": 10, "steps": 6, "epoch_steps": 2, "eval_every": 3, "log_every": 2, "checkpoint_every": 3}
# What counts iterations, or repeats whole trainings, shrinks with the run: (changes of the recipe, of the method). UPS
# trains in fewer rounds (its published 20 are each a whole training); CalibrateMix spends half a run on its warm-up
# (published: a seventh), since a step after it costs about two of its base's; running means of .999 would keep half of
# their start through 600 steps.
SMALL: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "ups": {"mini": ({"ema": 0.0}, {"rounds": 3}), "tiny": ({"steps": 3, "ema": 0.0}, {"rounds": 2})},
    "calibratemix": {"mini": ({}, {"warmup": 300, "ema_p": 0.98}), "tiny": ({}, {"warmup": 3, "ema_p": 0.98})},
    "softmatch": {"mini": ({}, {"ema_p": 0.98}), "tiny": ({}, {"ema_p": 0.98})},
    "freematch": {"mini": ({}, {"ema_p": 0.98}), "tiny": ({}, {"ema_p": 0.98})},
    "marginmatch": {
        "mini": ({}, {"warmup": 60, "refresh_every": 20, "redraw_every": 300, "delay": 20}),
        "tiny": ({}, {"warmup": 2, "refresh_every": 1, "redraw_every": 3, "delay": 1}),
    },
}
