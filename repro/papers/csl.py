"""CSL, confidence separable learning (ICCV 2025, arXiv 2509.16704): recipes, tables, ablations, claims.

Of the paper only the abstract, the first figure's caption and opening lines could be had; its tables are not available.
Published numbers are its peers', from the READMEs of UniMatch, CorrMatch and UniMatch V2.
"""

from collections.abc import Sequence

from repro.experiment import Experiment, Recipe
from repro.papers import few_masks, published
from repro.papers.grid import MASKED, MASKS, Claim, Column, Row, Table, ablation, checked_seeds, experiment
from repro.papers.published import Reference

TITLE = "CSL: pixels separated by confidence, reliable ones masked"
NOTE = (
    "The paper's equations and tables could not be had, so its published cells are not available. The method follows "
    "code that was read in parts and is held to be the authors'; where it and a second-hand account differ, both are a "
    "parameter. Published numbers are those of UniMatch and CorrMatch. No weights are averaged: EMA weights "
    "are the live ones."
)
METHODS = ("supervised", "fixmatch", "unimatch", "csl")
DATA = ("scenes", "voc", "cityscapes", "coco2017")
BUDGET = MASKS
HEADLINES = ("miou", "ece_15")
check_budget, check_recipe = few_masks.check_budget, few_masks.check_recipe


def task(experiment):
    """The module that prepares this paper's runs."""
    from repro.tasks import masks as task

    return task


def recipe(method: str, data: str, labels: int, scale: str) -> Recipe:
    """CSL's recipe, and UniMatch's for the others: the same but for the output stride (8 and 16)."""
    return few_masks.recipe(method, data, labels, scale)


# Tables and ablations

PUBLISHED = published.load("csl")
SCENES = tuple(Column("scenes", masks, MASKS) for masks in few_masks.BUDGETS["scenes"])
SCENES_20, VOC_183 = Column("scenes", 20, MASKS), Column("voc", 183, MASKS)
STRIDE_8, STRIDE_16 = {"output_stride": 8}, {"output_stride": 16}

SUPERVISED = Row("Supervised", "supervised", published=("SupBaseline", "SupOnly"))
FIXMATCH = Row("FixMatch", "fixmatch", published=("FixMatch",))
UNIMATCH = Row("UniMatch", "unimatch", published=("UniMatch", "UniMatch V1"))
UNIMATCH_8 = Row("UniMatch, output stride 8", "unimatch", STRIDE_8)
CSL = Row("CSL", "csl", published=("CSL",))
CSL_8 = Row("CSL, output stride 8", "csl", STRIDE_8)
ROWS = (SUPERVISED, FIXMATCH, UNIMATCH, UNIMATCH_8, CSL)

LOST = Reference("CSL", "tables", "miou")
PASCAL = (
    LOST,
    Reference("UniMatch", "README Pascal VOC 2012", "miou"),
    Reference("CorrMatch", "README Pascal VOC 2012", "miou"),
)
CITYSCAPES = (
    LOST,
    Reference("UniMatch", "README Cityscapes", "miou", "ResNet-101"),
    Reference("UniMatch", "README Cityscapes", "miou", "ResNet-50"),
    Reference("CorrMatch", "README Cityscapes", "miou"),
)
COCO = (LOST, Reference("UniMatch", "README COCO", "miou"))
NOTES = (
    "The cells of CSL's tables could not be had. Published UniMatch has output stride 16 and CSL 8, so a row of "
    "UniMatch at 8 separates the stride's share of any gain; at small scales all others have 16. UniMatch and "
    "CorrMatch report the best evaluation on the validation set."
)


def _peer(dataset: str) -> str:
    """What CorrMatch, a method that has no row, states of itself."""
    own = (row for row in PUBLISHED if (row.paper, row.method, row.dataset) == ("CorrMatch", "CorrMatch", dataset))
    values = ", ".join(f"{row.value} ({row.labels})" for row in own)
    return f"CorrMatch itself, at output stride 8 and not built here, states mIoUs (masks) of {values}."


def _table(
    name: str, title: str, budgets: tuple[Column, ...], references: tuple[Reference, ...], note: str, small=()
) -> Table:
    return Table(name, title, "csl", ROWS, budgets, small, PUBLISHED, references, MASKED, f"{NOTES} {note}")


def _columns(data: str, *masks: int) -> tuple[Column, ...]:
    return tuple(Column(data, number, MASKS) for number in masks)


TABLES = {
    table.name: table
    for table in (
        _table(
            "main",
            "mIoU by number of masks",
            _columns("voc", 92, 183, 366, 732, 1464),
            PASCAL,
            f"{_peer('Pascal VOC 2012 (classic)')} UniMatch V2 repeats UniMatch's numbers; its own come from DINOv2, "
            "which compares with nothing here.",
            SCENES,
        ),
        _table(
            "cityscapes",
            "Cityscapes: mIoU by number of masks",
            _columns("cityscapes", 186, 372, 744, 1488),
            CITYSCAPES,
            _peer("Cityscapes"),
        ),
        _table(
            "coco",
            "COCO: mIoU by number of masks",
            _columns("coco2017", 232, 463, 925, 1849, 3697),
            COCO,
            "UniMatch's README names an Xception-65 as its backbone, ours is a ResNet-101; UniMatch V2 lists the same "
            "numbers as those of a ResNet-101.",
        ),
    )
}


def _ablation(name: str, title: str, *variations: tuple[str, dict], note: str = "") -> Table:
    columns = {"columns": (VOC_183,), "small": (SCENES_20,)}
    return ablation(name, title, "csl", "csl", variations, **columns, metrics=MASKED, note=note)


def _values(setting: str, symbol: str, default, *others) -> list[tuple[str, dict]]:
    return [
        (f"{symbol} = {value}{' (default)' * (value == default)}", {setting: value})
        for value in sorted((default, *others))
    ]


ABLATIONS = {
    table.name: table
    for table in (
        _ablation(
            "selection",
            "Which pixels count",
            ("split, Gaussian weights (default)", {}),
            ("split, weights 0 or 1", {"selection": "hard"}),
            ("threshold .95", {"selection": "threshold"}),
        ),
        _ablation(
            "features",
            "What a pixel's weight reads",
            ("confidence and dispersion (default)", {}),
            ("confidence only", {"features": "confidence"}),
            ("dispersion only", {"features": "dispersion"}),
        ),
        _ablation(
            "rule",
            "When a pixel is reliable",
            ("either feature is above its mean (default)", {}),
            ("both are", {"rule": "and"}),
        ),
        _ablation(
            "scope",
            "What is split",
            ("each image (default)", {}),
            ("each class", {"scope": "class"}),
            ("the whole batch", {"scope": "batch"}),
        ),
        _ablation("alpha", "Width of the Gaussian", *_values("alpha", "alpha", 8.0, 2.0, 4.0, 16.0, 32.0)),
        _ablation(
            "form",
            "Residual variance",
            ("as released, with a further m^2 (default)", {}),
            ("as attributed to the paper, second-hand", {"form": "paper"}),
        ),
        _ablation(
            "masking",
            "Which pixels are masked",
            ("reliable only (default)", {}),
            ("any", {"masking": "random"}),
            ("none", {"masking": "none"}),
            note="Without masking the third view stays, with its mild or strong colours.",
        ),
        _ablation("ratio", "Share of masked blocks", *_values("ratio", "ratio", 0.7, 0.3, 0.5, 0.9)),
        _ablation(
            "block",
            "Side of a masked block",
            ("4 px", {"block": 4}),
            ("default: 32 px, 8 px on scenes", {}),
            ("16 px", {"block": 16}),
            ("48 px", {"block": 48}),
            note="A crop has 321 px on Pascal and 64 px on scenes, where a block of 48 px is the whole crop.",
        ),
        _ablation(
            "feature_perturbation",
            "Feature perturbation",
            ("CSL (default)", {}),
            ("CSL without", {"feature_perturbation": False}),
            ("UniMatch (default)", {"method": "unimatch"}),
            ("UniMatch without", {"method": "unimatch", "feature_perturbation": False}),
        ),
        _ablation(
            "output_stride",
            "Output stride",
            ("CSL, 8", STRIDE_8),
            ("CSL, 16", STRIDE_16),
            ("UniMatch, 8", {"method": "unimatch"} | STRIDE_8),
            ("UniMatch, 16", {"method": "unimatch"} | STRIDE_16),
            note="The selection's effect is the difference at equal stride. Published: CSL 8, UniMatch 16.",
        ),
        _ablation(
            "weights",
            "Where training starts",
            ("CSL, pretrained (default)", {}),
            ("CSL, from scratch", {"weights": "scratch"}),
            ("supervised, pretrained (default)", {"method": "supervised"}),
            ("supervised, from scratch", {"method": "supervised", "weights": "scratch"}),
        ),
    )
}


# Claims

SECOND_HAND = "a summary page, second-hand"


def _claim(id: str, text: str, source: str, left: Row, right: Row, metric: str = "miou") -> Claim:
    direction = "higher" if metric == "miou" else "lower"
    return Claim(id, text, source, "csl", left, right, metric, column=VOC_183, small=SCENES_20, direction=direction)


def _variation(name: str, label: str) -> Row:
    return next(row for row in ABLATIONS[name].rows if row.label == label)


CLAIMS = {
    claim.id: claim
    for claim in (
        _claim(
            "fixmatch-supervised",
            "FixMatch has a higher mIoU than training on the masks alone.",
            "a check of ours, after FixMatch",
            FIXMATCH,
            SUPERVISED,
        ),
        _claim("fixmatch", "CSL has a higher mIoU than FixMatch.", "ours, after the abstract", CSL, FIXMATCH),
        _claim(
            "unimatch",
            "CSL has a higher mIoU than UniMatch.",
            "abstract: favourable against the state of the art, here UniMatch",
            CSL,
            UNIMATCH,
        ),
        _claim(
            "unimatch-stride",
            "At the same output stride (8) CSL has a higher mIoU than UniMatch.",
            "ours: the published strides differ",
            CSL_8,
            UNIMATCH_8,
        ),
        _claim(
            "selection",
            "Within CSL, the split with Gaussian weights gives a higher mIoU than a threshold of .95.",
            f"abstract, of fixed thresholds; {SECOND_HAND} (a gain of 4.1 %, of which accuracy is not said)",
            CSL,
            _variation("selection", "threshold .95"),
        ),
        _claim(
            "masking-random",
            "Masking reliable pixels only gives a higher mIoU than masking any.",
            "ours, after the abstract's reason for masking",
            CSL,
            _variation("masking", "any"),
        ),
        _claim(
            "masking-none",
            "Masking reliable pixels gives a higher mIoU than no masking.",
            "abstract",
            CSL,
            _variation("masking", "none"),
        ),
        _claim(
            "scope",
            "One split an image gives a higher mIoU than one split a class.",
            f"{SECOND_HAND}: class-wise selection is clearly worse",
            CSL,
            _variation("scope", "each class"),
        ),
        _claim(
            "ece",
            "CSL is better calibrated than UniMatch: the ECE of its pixels (15 bins) is lower.",
            "ours, after the abstract's complaint of overconfidence",
            CSL,
            UNIMATCH,
            "ece_15",
        ),
    )
}


def main_experiments(scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
    """What the main job runs: supervised, FixMatch, UniMatch and CSL, seed by seed, the cheapest first.

    scale: `mini` and `tiny` take the embedded scenes with 20 masks, `paper` Pascal with 183.
    """
    column = VOC_183 if scale == "paper" else SCENES_20
    rows = (SUPERVISED, FIXMATCH, UNIMATCH, CSL)
    return [experiment("csl", row, column, scale, seed) for seed in checked_seeds(seeds) for row in rows]
