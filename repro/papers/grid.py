"""What a paper's tables, ablations and claims compare, as data: which experiments they need at which scale.

A `Table` has rows (methods, or one method under changed settings) and columns (data, labels); an ablation is
a table; a `Claim` is a sentence that two rows decide. Nothing here runs or reads anything: `tables` and
`claims` do.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from repro.experiment import SCALES, Experiment
from repro.settings import SettingError, unknown

if TYPE_CHECKING:  # papers import this module
    from repro.papers.published import Published, Reference

# Accuracy is never shown without calibration, nor calibration without its bins.
CALIBRATED = ("error", "ece_15", "ece_10_left", "nll", "brier")
MASKED = ("miou", "pixel_accuracy", "boundary_f", "ece_15")
ACTIVATED = ("cam_miou", "cam_miou_train", "miou", "miou_crf", "over_activation_mean", "ece_15")
TITLES = {"fashion": "Fashion-MNIST part", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN",
          "svhn_extra": "SVHN with extra", "stl10": "STL-10", "scenes": "Fashion scenes", "voc": "Pascal VOC 2012",
          "cityscapes": "Cityscapes", "coco2017": "COCO", "coco2014": "COCO 2014"}  # fmt: skip
EMBEDDED = ("fashion", "scenes")  # in the package: what small scales use
LABELS, MASKS, TAGS = "{} labels", "{} masks", "{} tagged images"  # how a budget is said, by kind of supervision
SCRIBBLES = "scribble length {} %"  # every image has its scribbles


@dataclass(frozen=True)
class Row:
    """A row: a method under changed settings.

    published: what the sources call it, the preferred name first. labels: the budget of a method that ignores the
    column's, so that its cells share their runs; None takes the column's.
    """

    label: str
    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    labels: int | None = None


@dataclass(frozen=True)
class Column:
    """A column: a data set, its number of labels, masks or tagged images, and how that is said."""

    data: str
    labels: int
    words: str = LABELS

    @property
    def budget(self) -> str:
        """`40 labels`, `20 masks`."""
        return self.words.format(self.labels)

    @property
    def title(self) -> str:
        """`CIFAR-10, 40 labels`."""
        return f"{TITLES.get(self.data, self.data)}, {self.budget}"


def place(experiment: Experiment) -> Column:
    """Where an experiment stands in a table of its paper."""
    from repro.papers import PAPERS

    return Column(experiment.data, experiment.labels, PAPERS[experiment.paper].BUDGET)


@dataclass(frozen=True)
class Table:
    """A table or an ablation.

    paper: whose recipes apply. rows: from top to bottom. columns: of the `paper` scale, those that the paper
    has.
    small: the columns of `mini` and `tiny`. published: numbers to look references up in. references:
    published columns.
    note: what the reader has to know about its published cells. varies: whether it is an ablation, whose rows are
    compared with the one that changes nothing, on the seeds that both have.
    """

    name: str
    title: str
    paper: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    small: tuple[Column, ...]
    published: tuple["Published", ...] = ()
    references: tuple["Reference", ...] = ()
    metrics: tuple[str, ...] = CALIBRATED
    note: str = ""
    varies: bool = False

    def columns_at(self, scale: str) -> tuple[Column, ...]:
        """The measured columns of a scale."""
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        return self.columns if scale == "paper" else self.small

    def cell(self, row: Row, column: Column, scale: str, seeds: Sequence[int]) -> list[Experiment]:
        """The experiments of one cell, one a seed."""
        return [experiment(self.paper, row, column, scale, seed) for seed in checked_seeds(seeds)]

    def experiments(self, scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
        """Every experiment that fills the table at `scale`, once, seed by seed, so that a whole seed is done first."""
        every = (
            experiment(self.paper, row, column, scale, seed)
            for seed in checked_seeds(seeds)
            for column in self.columns_at(scale)
            for row in self.rows
        )
        return list(dict.fromkeys(every))

    def only(self, rows: Iterable[str] | None = None, small: Iterable[Column] | None = None) -> "Table":
        """The same table with these rows (by label) and these columns at small scales."""
        labels = [row.label for row in self.rows]
        kept = labels if rows is None else list(rows)
        for label in kept:
            if label not in labels:
                raise unknown(f"row of {self.name}", label, labels)
        chosen = tuple(row for row in self.rows if row.label in kept)
        return dataclasses.replace(self, rows=chosen, small=self.small if small is None else tuple(small))


def ablation(
    name: str,
    title: str,
    paper: str,
    base: str,
    variations: Sequence[tuple[str, Mapping[str, Any]]],
    columns: tuple[Column, ...],
    small: tuple[Column, ...],
    **more: Any,
) -> Table:
    """An ablation is a table whose rows are one method under changed parameters.

    base: the method. variations: (label, overrides), the unchanged method usually first; the key `method` in
    the overrides names another method. more: further fields of `Table`.
    """
    rows = []
    for label, overrides in variations:
        settings = {key: value for key, value in overrides.items() if key != "method"}
        rows.append(Row(label, overrides.get("method", base), settings, published=(label,)))
    return Table(name, title, paper, tuple(rows), columns, small, **more, varies=True)


def experiment(paper: str, row: Row, column: Column, scale: str, seed: int) -> Experiment:
    """The experiment of a row, a column, a scale and a seed."""
    labels = column.labels if row.labels is None else row.labels
    return Experiment(paper, row.method, column.data, labels, seed, scale, tuple(row.overrides.items()))


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """`seeds` as a tuple; SettingError unless they are one or more different whole numbers."""
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise SettingError(f"seeds is {list(seeds)}; it must be one or more different whole numbers from 0")
    return seeds


DIRECTIONS = ("lower", "higher")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper that runs can decide: `metric` of `left` is lower (or higher) than that of
    `right`.

    text: the claim in our words. source: where it is made.
    metric: a stored metric, or a statistic of `claims.STATISTICS` that is computed from a run's history or
    outputs.
    right: None compares the statistic with 0.
    columns: where it is decided at `paper` scale; small: at `mini` and `tiny`.
    margin: how far (in the metric's stored unit) the left may fall short and the claim still hold: "not
    higher" claims.
    published: the effect that the paper states.
    """

    id: str
    text: str
    source: str
    paper: str
    left: Row
    right: Row | None
    metric: str
    column: Column
    small: Column
    direction: str = "lower"
    margin: float = 0.0
    published: "Published | None" = None

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise unknown("direction", self.direction, DIRECTIONS)
        if not 0 <= self.margin < float("inf"):
            raise SettingError(f"margin of claim {self.id} is {self.margin}; it must be finite and from 0")

    def column_at(self, scale: str) -> Column:
        """Where the claim is decided at a scale."""
        if scale not in SCALES:
            raise unknown("scale", scale, SCALES)
        return self.column if scale == "paper" else self.small

    def pair(self, scale: str, seed: int) -> tuple[Experiment, Experiment | None]:
        """Left and right experiment of one seed: the same labelled subset, so that their difference is
        paired."""
        column = self.column_at(scale)
        left, right = (
            row and experiment(self.paper, row, column, scale, seed) for row in (self.left, self.right)
        )
        return left, right

    def experiments(self, scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
        """Every experiment that decides the claim, seed by seed."""
        return [item for seed in checked_seeds(seeds) for item in self.pair(scale, seed) if item is not None]
