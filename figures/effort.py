"""Across papers: kinds of supervision on the same scenes, and accuracy against calibration of all classifiers.

No source used here states seconds of annotation an image, so effort is what can be counted exactly on the training
scenes: labelled pixels a training image (masks: every pixel of the shown images; scribbles: the marked pixels), or tags
a training image. Pixels and tags are never put on one scale. Read from saved runs only. Source: chosen here.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from figures.tables import Summary, show, summarise
from repro.data.masks import IGNORE, draw_masks, show_tags, tags_of
from repro.data.scenes import scenes
from repro.data.scribbles import draw_scribbles
from repro.experiment import Experiment, resolve, run_id
from repro.grid import PAPERS, column_of, experiment
from repro.measure.metrics import METRICS
from repro.papers.published import LABELS, MASKS, SCRIBBLES, TAGS
from repro.runs import folder_of, is_finished, load_metrics
from repro.tasks.scribbles import sees_masks

KINDS = {MASKS: "few masks", TAGS: "image tags", SCRIBBLES: "scribbles"}  # by how a paper states its budget
FULL = "full supervision"
PIXELS, TAGGED = "labelled pixels", "tags"
SEGMENTED, CLASSIFIED = ("miou", "ece_15"), ("accuracy", "error", "ece_15")


@dataclass(frozen=True)
class Effort:
    """What people had to mark. unit: PIXELS or TAGGED; per_image: how many, over all training images; marked: images
    with any; images: training images."""

    unit: str
    per_image: float
    marked: int
    images: int

    def say(self) -> str:
        """`163.8 labelled pixels`."""
        return f"{self.per_image:,.1f} {self.unit}"


@dataclass(frozen=True)
class Point:
    """A method with a budget, over seeds.

    kind: of supervision, or the paper's title for classifiers; label, method: of the row; budget: in words.
    experiments: one a seed; finished: those that have run. metrics: name -> Summary of the last evaluation of the EMA
    weights. planned: seeds. effort: None for classifiers.
    """

    kind: str
    label: str
    method: str
    budget: str
    experiments: tuple[Experiment, ...]
    finished: tuple[Experiment, ...]
    metrics: dict[str, Summary]
    planned: int
    effort: Effort | None = None

    def cell(self, metric: str) -> str:
        """`55.00 ± 7.07 (n = 2)`."""
        return show(self.metrics[metric], METRICS[metric], self.planned, len(self.finished))


def _point(kind, label, budget, cell, root, names, effort=None) -> Point:
    finished = tuple(item for item in cell if is_finished(item, root))
    found = [load_metrics(folder_of(item, root))["reported"]["last"]["ema"] for item in finished]
    values = {name: [float("nan") if one.get(name) is None else float(one[name]) for one in found] for name in names}
    metrics = {name: summarise(several) for name, several in values.items()}
    return Point(kind, label, cell[0].method, budget, tuple(cell), finished, metrics, len(cell), effort)


# Kinds of supervision


def supervised(scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None) -> list[Point]:
    """A point for each row and scene budget of the first table of each paper on scenes; full supervision once, last.

    Empty at scale `paper`, which has no scenes. Raises SettingError (unknown scale), CorruptFile (an edited run).
    """
    points: list[Point] = []
    full: dict[tuple[Experiment, ...], Point] = {}  # its columns share their runs
    for paper in PAPERS.values():
        table = next(iter(paper.tables.values()))
        for column in (column for column in table.columns_at(scale) if column.data == "scenes"):
            for row in table.rows:
                cell = tuple(table.cell(row, column, scale, seeds))
                if cell in full:
                    continue
                if sees_all_masks(cell[0]):
                    full[cell] = _point(FULL, row.label, "all masks", cell, root, SEGMENTED, effort_of(cell[0]))
                else:
                    kind, effort = KINDS[paper.spec.supervision.budget], effort_of(cell[0])
                    points.append(_point(kind, row.label, column.budget, cell, root, SEGMENTED, effort))
    return [*points, *full.values()]


def sees_all_masks(item: Experiment) -> bool:
    """Whether the method is full supervision, whatever budget its record states."""
    return PAPERS[item.paper].spec.supervision.budget == SCRIBBLES and sees_masks(item)


def effort_of(item: Experiment) -> Effort:
    """What is marked on the training scenes of an experiment, counted on them. Raises ValueError for other data."""
    if item.data != "scenes":
        raise ValueError(f"effort can be counted on scenes; this experiment is on {item.data}")
    recipe = resolve(item)
    kind = FULL if sees_all_masks(item) else KINDS[PAPERS[item.paper].spec.supervision.budget]
    budget = 0 if kind == FULL else item.labels
    return count(kind, budget, item.seed, recipe.images, recipe.crop, getattr(recipe, "width", 1))


@functools.cache
def count(kind: str, budget: int, seed: int, images: int, side: int, width: int) -> Effort:
    """What is marked on `images` training scenes of side x side pixels.

    kind: a value of KINDS, or FULL. budget: masks shown, images whose tags are shown, or percent of each scribble.
    seed: of the shown subset. width: of a scribble, pixels.
    """
    train = scenes("train", images, side)
    if kind == KINDS[TAGS]:
        seen, index = show_tags(tags_of(train.masks, len(train.classes))[:, 1:], budget, seed)
        return Effort(TAGGED, seen.sum().item() / images, len(index), images)
    if kind == KINDS[SCRIBBLES]:
        labels = draw_scribbles(train, budget / 100, width)[0].labels
    else:
        labels = draw_masks(train, images if kind == FULL else budget, seed)[0].labels
    marked = (labels != IGNORE).flatten(1)
    return Effort(PIXELS, marked.sum().item() / images, int(marked.any(1).sum()), images)


def supervision_frame(points: Sequence[Point]) -> pd.DataFrame:
    """The points as text, a row each: kind, method, budget, effort, marked images, mIoU, pixel ECE."""
    rows = [
        {
            "learns from": point.kind,
            "method": point.label,
            "budget": point.budget,
            "marked per training image": point.effort.say(),
            "images with a mark": f"{point.effort.marked} of {point.effort.images}",
            METRICS["miou"].title: point.cell("miou"),
            f"pixel {METRICS['ece_15'].title}": point.cell("ece_15"),
        }
        for point in points
    ]
    return pd.DataFrame(rows)


# Classifiers


def classified(scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None) -> list[Point]:
    """A point for each row of the first table of each paper of few labels, at the budget of the first one's main job.

    Rows whose runs another row has already are left out. A method under two papers' recipes has the paper in its label.
    """
    points: dict[tuple[str, ...], Point] = {}
    column = None
    for name, paper in PAPERS.items():
        if paper.spec.supervision.budget != LABELS:
            continue
        column = column or column_of(paper.main_experiments(scale, seeds)[0])
        for row in next(iter(paper.tables.values())).rows:
            cell = [experiment(name, row, column, scale, seed) for seed in seeds]
            point = _point(paper.spec.title.partition(":")[0], row.label, column.title, cell, root, CLASSIFIED)
            points.setdefault(tuple(map(run_id, cell)), point)
    labels = [point.label for point in points.values()]
    return [
        dataclasses.replace(point, label=f"{point.label} ({point.kind}'s recipe)")
        if labels.count(point.label) > 1 else point
        for point in points.values()
    ]  # fmt: skip


def calibration_frame(points: Sequence[Point]) -> pd.DataFrame:
    """The points as text, a row each: method, error, accuracy, ECE."""
    rows = [
        {"method": point.label} | {METRICS[name].title: point.cell(name) for name in CLASSIFIED} for point in points
    ]
    return pd.DataFrame(rows)
