"""CalibrateMix (arXiv 2511.12964; AAAI 2026 under another title): recipes, tables, ablations, claims.

The paper's own tables could not be had; only a summary's average is known, unverified. The released code covers
SoftMatch as the base; on other bases the method is a reconstruction.
"""

from collections.abc import Sequence

from repro.experiment import Experiment, Recipe
from repro.papers import few_labels, published
from repro.papers.grid import LABELS, Claim, Column, Row, Table, ablation, checked_seeds, experiment
from repro.papers.published import Reference

TITLE = "CalibrateMix: mixup guided by how easy or hard an image is"
PUBLISHED = (*published.load("calibratemix"), *few_labels.baselines())
SUMMARY = next(row for row in PUBLISHED if row.metric == "ece_reduction_percent")
NOTE = (
    "The paper's tables could not be had, so its published cells are not available; all that is known is an average "
    f"relative reduction of ECE by {SUMMARY.value} % ({SUMMARY.source}). The method follows the code released "
    "for SoftMatch; on FixMatch and FlexMatch it is a reconstruction. Temperature scaling is ours: it is fitted on 10 "
    "further labelled images a class that no method trains on, and never on test."
)
METHODS = ("supervised", "fixmatch", "flexmatch", "freematch", "softmatch", "marginmatch", "calibratemix")
DATA = ("fashion", "cifar10", "cifar100", "svhn", "svhn_extra", "stl10")
BUDGET = LABELS
HEADLINES = ("error", "ece_15")
check_budget, check_recipe = few_labels.check_budget, few_labels.check_recipe


def task(experiment):
    """The module that prepares this paper's runs."""
    from repro.tasks import labels as task

    return task


def recipe(method: str, data: str, labels: int, scale: str) -> Recipe:
    """The released configurations: FixMatch's recipe as USB has it, ratio 7 (5 at small scales, as ComMatch)."""
    return few_labels.recipe(method, data, labels, scale)


# Tables and ablations

FASHION_100 = Column("fashion", 100)
CIFAR10_40, CIFAR10_4000 = Column("cifar10", 40), Column("cifar10", 4000)
METRICS = ("error", "ece_15", "ece_10_left", "nll", "brier", "temperature", "scaled_ece_15", "scaled_nll")
TABLE = Reference("CalibrateMix", "tables")
BASES = ("fixmatch", "flexmatch", "softmatch")
RANDOM = {"pairing": "random", "partner": "random"}


def on(base: str, label: str = "", **overrides) -> Row:
    """CalibrateMix, or a variation of it, on a base."""
    name = few_labels.ROWS[base].label
    return Row(f"{name} + {label or 'CalibrateMix'}", "calibratemix", {"base": base} | overrides, ("CalibrateMix",))


MIXED = {base: on(base) for base in BASES}
MIXUP = on("fixmatch", "mixup (random)", **RANDOM)

TABLES = {
    "main": Table(
        "main",
        "Accuracy and calibration of each base, alone and with CalibrateMix",
        "calibratemix",
        (
            few_labels.ROWS["supervised"],
            few_labels.ROWS["fixmatch"],
            MIXUP,
            MIXED["fixmatch"],
            few_labels.ROWS["flexmatch"],
            MIXED["flexmatch"],
            few_labels.ROWS["softmatch"],
            MIXED["softmatch"],
            few_labels.ROWS["freematch"],
            few_labels.ROWS["marginmatch"],
        ),
        few_labels.columns("cifar10", "cifar100", "svhn", "stl10"),
        few_labels.EMBEDDED,
        PUBLISHED,
        (TABLE, *few_labels.TOOLBOXES),
        METRICS,
        note="The cells of CalibrateMix's tables could not be had. Toolbox numbers come from other code and recipes, "
        "report the best evaluation on test, and no calibration.",
    )
}


def _ablation(name: str, title: str, variations, **more) -> Table:
    on_fixmatch = [(label, {"base": "fixmatch"} | overrides) for label, overrides in variations]
    table = ablation(
        name,
        title,
        "calibratemix",
        "calibratemix",
        on_fixmatch,
        (CIFAR10_4000,),
        (FASHION_100,),
        metrics=METRICS,
        **more,
    )
    return table


def _values(setting: str, symbol: str, values: Sequence, default) -> list:
    return [(f"{symbol} = {value}{' (default)' * (value == default)}", {setting: value}) for value in values]


ABLATIONS = {
    table.name: table
    for table in (
        _ablation(
            "warmup",
            "Length of the warm-up (steps of 600 at mini)",
            [
                ("no warm-up", {"warmup": 0}),
                ("100", {"warmup": 100}),
                ("200", {"warmup": 200}),
                ("300 (default at mini)", {"warmup": 300}),
                ("450", {"warmup": 450}),
            ],
            note="Step numbers are those of the mini scale; the released warm-up is 150,000 of 1,048,576.",
        ),
        _ablation(
            "partner",
            "How a partner is chosen",
            _values("partner", "partner", ("dissimilar", "random", "similar"), "dissimilar"),
        ),
        _ablation(
            "similarity", "Where likeness is measured", _values("similarity", "space", ("pixels", "features"), "pixels")
        ),
        _ablation("pool", "Candidates a partner is drawn from", _values("pool", "k", (5, 15, 30, 45), 15)),
        _ablation(
            "pairing",
            "Which halves meet",
            [
                ("M1 and M2 (default)", {}),
                ("random mixup", RANDOM),
                ("M1 only", {"pairing": "M1"}),
                ("M2 only", {"pairing": "M2"}),
                ("easy with easy", {"pairing": "easy-easy"}),
                ("hard with hard", {"pairing": "hard-hard"}),
            ],
        ),
        _ablation(
            "beta", "Beta distribution of the mixing weight", _values("beta_alpha", "alpha", (0.1, 0.4, 1.0, 2.0), 0.4)
        ),
        _ablation("loss", "Loss on mixed images", _values("mixed_loss", "loss", ("bce", "ce"), "bce")),
        _ablation(
            "terms",
            "How often the base's loss counts",
            _values("ssl_terms", "terms", ("both", "first", "second"), "both"),
        ),
        _ablation(
            "delta", "Smoothing of the average pseudo-margin", _values("delta", "delta", (0.9, 0.99, 0.997), 0.997)
        ),
        _ablation(
            "bookkeeping",
            "Conventions of the released code",
            [
                ("released (default)", {}),
                ("duplicates counted", {"duplicates": "count"}),
                ("APM from the first step", {"apm_during_warmup": True}),
                ("one state update a step", {"second_updates": False}),
            ],
        ),
    )
}

# Claims

FEW = {"column": CIFAR10_40, "small": FASHION_100}


def _pair(base: str, metric: str, text: str, margin: float = 0.0) -> Claim:
    kind = "ece" if metric == "ece_15" else "error"
    return Claim(
        f"{kind}-{base}",
        text,
        "abstract" if base in BASES else "ours",
        "calibratemix",
        MIXED[base],
        few_labels.ROWS[base],
        metric,
        margin=margin,
        **FEW,
    )


CLAIMS = {
    claim.id: claim
    for base in BASES
    for claim in (
        _pair(base, "ece_15", f"{few_labels.ROWS[base].label} + CalibrateMix has a lower ECE (15 bins) than its base."),
        _pair(
            base,
            "error",
            f"{few_labels.ROWS[base].label} + CalibrateMix is not less accurate than its base "
            "(by more than half a point).",
            margin=0.005,
        ),
    )
}
CLAIMS["random"] = Claim(
    "random",
    "Choosing partners by easy and hard halves calibrates better than ordinary random mixup.",
    "summary",
    "calibratemix",
    MIXED["fixmatch"],
    MIXUP,
    "ece_15",
    **FEW,
)


def main_experiments(scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
    """What the main job runs: FixMatch alone, with random mixup, and with CalibrateMix, seed by seed."""
    column = CIFAR10_40 if scale == "paper" else FASHION_100
    rows = (few_labels.ROWS["fixmatch"], MIXUP, MIXED["fixmatch"])
    return [experiment("calibratemix", row, column, scale, seed) for seed in checked_seeds(seeds) for row in rows]
