"""Tables, ablations and claims of the papers as experiments.

A `Table` has rows (methods, or one method under changed settings) and columns (data, labels); an ablation is a table; a
`Claim` is a sentence that two rows decide. `PAPERS` holds those of each paper's TOML file. Nothing here runs or reads a
run.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repro.experiment import Experiment
from repro.papers import SPECS, Spec
from repro.papers.published import LABELS, Published, Reference
from repro.recipe import SCALES
from repro.settings import SettingError, unknown

# Accuracy is never shown without calibration, nor calibration without its bins.
CALIBRATED = ("error", "ece_15", "ece_10_left", "nll", "brier")
MASKED = ("miou", "pixel_accuracy", "boundary_f", "ece_15")
ACTIVATED = ("cam_miou", "cam_miou_train", "miou", "miou_crf", "over_activation_mean", "ece_15")
TITLES = {"fashion": "Fashion-MNIST part", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN",
          "svhn_extra": "SVHN with extra", "stl10": "STL-10", "scenes": "Fashion scenes", "voc": "Pascal VOC 2012",
          "cityscapes": "Cityscapes", "coco2017": "COCO", "coco2014": "COCO 2014"}  # fmt: skip
EMBEDDED = ("fashion", "scenes")  # in the package: what small scales use


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


def column_of(experiment: Experiment) -> Column:
    """Where an experiment stands in a table of its paper."""
    return Column(experiment.data, experiment.labels, SPECS[experiment.paper].supervision.budget)


@dataclass(frozen=True)
class Table:
    """A table or an ablation.

    paper: whose recipes apply. rows: from top to bottom. columns: the paper's own, used at scale `paper`. small: used
    at `mini` and `tiny`. references: published columns, looked up in `published`. note: what the reader has to know
    about published cells. varies: True for an ablation; each row is compared with the unchanged row on the seeds that
    both have.
    """

    name: str
    title: str
    paper: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    small: tuple[Column, ...]
    published: tuple[Published, ...] = ()
    references: tuple[Reference, ...] = ()
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
    """A sentence of a paper that runs can decide: `metric` of `left` is lower (or higher) than that of `right`.

    text: the claim in words chosen here. source: where it is made. metric: a stored metric, or a statistic computed
    from a run's history or outputs. right: None compares the statistic with 0. column: where it is decided at `paper`
    scale; small: at `mini` and `tiny`. margin: how far (in the metric's stored unit) the left may fall short and the
    claim still hold, for "not higher" claims. published: the effect that the paper states.
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
    published: Published | None = None

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
        """Left and right experiment of one seed: the same labelled subset, so that their difference is paired."""
        column = self.column_at(scale)
        left, right = (
            row and experiment(self.paper, row, column, scale, seed) for row in (self.left, self.right)
        )
        return left, right

    def experiments(self, scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
        """Every experiment that decides the claim, seed by seed."""
        return [item for seed in checked_seeds(seeds) for item in self.pair(scale, seed) if item is not None]


@dataclass(frozen=True)
class Paper:
    """A paper with its tables, ablations and claims by name; everything else is in `spec`."""

    spec: Spec
    tables: Mapping[str, Table]
    ablations: Mapping[str, Table]
    claims: Mapping[str, Claim]

    def main_experiments(self, scale: str = "mini", seeds: Sequence[int] = (0, 1)) -> list[Experiment]:
        """What the main job runs: a few rows of the first table, seed by seed, the cheapest method first."""
        main = self.spec.tables["main"]
        columns = _columns(main["columns"] if scale == "paper" else main["small"], self.spec)
        rows = [_row(self.spec, name) for name in main["rows"]]
        return [
            experiment(self.spec.name, row, column, scale, seed)
            for seed in checked_seeds(seeds)
            for column in columns
            for row in rows
        ]


def _columns(budgets: Mapping[str, Sequence[int]], spec: Spec) -> tuple[Column, ...]:
    words = spec.supervision.budget
    return tuple(Column(data, labels, words) for data, several in budgets.items() for labels in several)


def _row(spec: Spec, name: str) -> Row:
    """A row of the file's `rows` by name."""
    fields = spec.tables["rows"][name]
    published, labels = tuple(fields.get("published", ())), fields.get("labels")
    return Row(fields["label"], fields["method"], fields.get("set", {}), published, labels)


def _table(spec: Spec, fields: Mapping[str, Any], varies: bool) -> Table:
    """A table, or an ablation, whose rows are [label, changed settings, what the paper prints (default: label)]."""
    if varies:
        base = spec.tables["main"]["varied"]
        rows = tuple(
            Row(
                label,
                changes.get("method", base),
                {name: value for name, value in changes.items() if name != "method"},
                tuple(printed) or (label,),
            )
            for label, changes, *printed in fields["rows"]
        )
    else:
        rows = tuple(_row(spec, name) for name in fields["rows"])
    references = tuple(Reference(**reference) for reference in fields.get("references", ()))
    return Table(
        fields["name"],
        fields["title"],
        spec.name,
        rows,
        _columns(fields["columns"], spec),
        _columns(fields["small"], spec),
        spec.published if references else (),
        references,
        tuple(fields["metrics"]),
        fields.get("note", ""),
        varies,
    )


def _claims(spec: Spec, ablations: Mapping[str, Table]) -> Iterable[Claim]:
    """Claims in the file's order; those with several columns once for each, all claims of a column together."""

    def side(name: str | list[str] | None) -> Row | None:
        if isinstance(name, list):
            return next(row for row in ablations[name[0]].rows if row.label == name[1])
        return None if name is None else _row(spec, name)

    def claim(fields: Mapping[str, Any], column: Column, small: Column) -> Claim:
        stated = fields.get("published")
        return Claim(
            fields["id"].format(column.labels),
            fields["text"].format(column.labels),
            fields["source"],
            spec.name,
            side(fields["left"]),
            side(fields.get("right")),
            fields["metric"],
            column,
            small,
            fields.get("direction", "lower"),
            fields.get("margin", 0.0),
            stated and next(row for row in spec.published if all(getattr(row, k) == v for k, v in stated.items())),
        )

    several = [
        list(zip(_columns(fields["column"], spec), _columns(fields["small"], spec), strict=True))
        for fields in spec.tables["claims"]
    ]
    for at in range(max(map(len, several))):
        for fields, places in zip(spec.tables["claims"], several, strict=True):
            if at < len(places):
                yield claim(fields, *places[at])


def _paper(spec: Spec) -> Paper:
    tables, ablations = (
        {fields["name"]: _table(spec, fields, varies) for fields in spec.tables[key]}
        for key, varies in (("tables", False), ("ablations", True))
    )
    return Paper(spec, tables, ablations, {claim.id: claim for claim in _claims(spec, ablations)})


PAPERS = {name: _paper(spec) for name, spec in SPECS.items()}
