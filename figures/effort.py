"""Across papers: kinds of supervision on the same scenes, and accuracy against calibration of all classifiers.

No source that we read states seconds of annotation an image, so effort is what can be counted exactly on the training
scenes: labelled pixels a training image (masks: every pixel of the shown images; scribbles: the marked pixels), or tags
a training image. Pixels and tags are never put on one scale. Read from saved runs only. Source: ours.
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
from repro.grid import PAPERS, Column, experiment, place
from repro.measure.metrics import METRICS
from repro.papers.published import LABELS, MASKS, SCRIBBLES, TAGS
from repro.runs import folder_of, is_finished, load_metrics

KINDS = {MASKS: "few masks", TAGS: "image tags", SCRIBBLES: "scribbles"}  # by how a paper states its budget
FULL = "full supervision"
PIXELS, TAGGED = "labelled pixels", "tags"
SEGMENTED, CLASSIFIED = ("miou", "ece_15"), ("accuracy", "error", "ece_15")


@dataclass(frozen=True)
class Effort:
    """What people had to mark. unit: PIXELS or TAGGED; per_image: of it, over all training images; marked: images that
    show any; images: training images."""

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
    experiments: one a seed; finished: those that have run.
    metrics: name -> Summary of the last evaluation of the EMA weights. planned: seeds. effort: None for classifiers.
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

    @property
    def name(self) -> str:
        """`CSL, 20 masks`."""
        return f"{self.label}, {self.budget}" if self.budget else self.label


# Kinds of supervision


def supervised(scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None) -> list[Point]:
    """A point for each row and scene budget of the first table of each paper on scenes; full supervision once, last.

    Empty at scale `paper`, which has no scenes. Raises SettingError (unknown scale), CorruptFile (an edited run).
    """
    points: list[Point] = []
    full: dict[tuple[Experiment, ...], Point] = {}  # its columns share their runs
    for paper in PAPERS.values():
        table = next(iter(paper.TABLES.values()))
        for column in (column for column in table.columns_at(scale) if column.data == "scenes"):
            for row in table.rows:
                cell = tuple(table.cell(row, column, scale, seeds))
                everything = sees_all_masks(cell[0])
                if cell in full:
                    continue
                kind, budget = (FULL, "all masks") if everything else (KINDS[paper.BUDGET], column.budget)
                point = _point(kind, row.label, budget, cell, root, SEGMENTED, effort_of(cell[0]))
                if everything:
                    full[cell] = point
                else:
                    points.append(point)
    return [*points, *full.values()]


def sees_all_masks(item: Experiment) -> bool:
    """Whether the method is full supervision, whatever budget its record states."""
    from repro.tasks.scribbles import sees_masks

    return PAPERS[item.paper].BUDGET == SCRIBBLES and sees_masks(item)


def _point(kind, label, budget, cell, root, names, effort=None) -> Point:
    finished = tuple(item for item in cell if is_finished(item, root))
    values = [_read(item, root) for item in finished]
    metrics = {name: summarise(found[name] for found in values) for name in names}
    return Point(kind, label, cell[0].method, budget, tuple(cell), finished, metrics, len(cell), effort)


def _read(item: Experiment, root: Path | None) -> dict[str, float]:
    final = load_metrics(folder_of(item, root))["reported"]["last"]["ema"]
    return {name: float("nan") if final.get(name) is None else float(final[name]) for name in {*SEGMENTED, *CLASSIFIED}}


def effort_of(item: Experiment) -> Effort:
    """What is marked on the training scenes of an experiment, counted on them. Raises ValueError for other data."""
    if item.data != "scenes":
        raise ValueError(f"effort can be counted on scenes; this experiment is on {item.data}")
    recipe = resolve(item)
    kind = FULL if sees_all_masks(item) else KINDS[PAPERS[item.paper].BUDGET]
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
            METRICS["miou"].title: _shown(point, "miou"),
            f"pixel {METRICS['ece_15'].title}": _shown(point, "ece_15"),
        }
        for point in points
    ]
    return pd.DataFrame(rows)


def settings_frame(points: Sequence[Point]) -> pd.DataFrame:
    """What else differs between kinds of supervision: network, size, steps and batch of their recipes, as text."""
    rows: dict[tuple, dict[str, str]] = {}
    for point in points:
        recipe = resolve(point.experiments[0])
        steps = f"{recipe.start_steps} + {recipe.steps}" if getattr(recipe, "start_steps", 0) else str(recipe.steps)
        facts = {
            "paper": PAPERS[point.experiments[0].paper].TITLE.partition(":")[0],
            "network": recipe.network,
            "weights at the start": recipe.weights,
            "steps": steps,
            "images a step": _batch(recipe, point.kind),
            "training scenes": str(recipe.images),
            "test scenes": str(recipe.tests),
            "side (px)": str(recipe.crop),
        }
        rows.setdefault(tuple(facts.values()), facts | {"learns from": []})["learns from"].append(point.kind)
    frame = pd.DataFrame(list(rows.values()))
    if len(frame):
        frame.insert(0, "learns from", frame.pop("learns from").map(lambda kinds: ", ".join(dict.fromkeys(kinds))))
    return frame


def _batch(recipe, kind: str) -> str:
    return f"{recipe.batch} + {recipe.batch * recipe.unlabelled_ratio}" if kind == KINDS[MASKS] else str(recipe.batch)


# Classifiers


def classified(scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None) -> list[Point]:
    """A point for each row of the first table of each paper of few labels, at the budget of the first one's main job.

    Rows whose runs another row has already are left out.
    """
    points: list[Point] = []
    seen: set[tuple[str, ...]] = set()
    column: Column | None = None
    for name, paper in PAPERS.items():
        if paper.BUDGET != LABELS:
            continue
        column = column or place(paper.main_experiments(scale, seeds)[0])
        for row in next(iter(paper.TABLES.values())).rows:
            cell = [experiment(name, row, column, scale, seed) for seed in seeds]
            runs = tuple(map(run_id, cell))
            if runs not in seen:
                seen.add(runs)
                points.append(_point(paper.TITLE.partition(":")[0], row.label, column.title, cell, root, CLASSIFIED))
    labels = [point.label for point in points]
    return [_named_apart(point) if labels.count(point.label) > 1 else point for point in points]


def _named_apart(point: Point) -> Point:
    """One method under two papers' recipes: its label says whose."""
    return dataclasses.replace(point, label=f"{point.label} ({point.kind}'s recipe)")


def calibration_frame(points: Sequence[Point]) -> pd.DataFrame:
    """The points as text, a row each: method, error, accuracy, ECE."""
    return pd.DataFrame(
        [
            {"method": point.label} | {METRICS[name].title: _shown(point, name) for name in CLASSIFIED}
            for point in points
        ]
    )


def _shown(point: Point, metric: str) -> str:
    return show(point.metrics[metric], METRICS[metric], point.planned, len(point.finished))


# Both, for the report


def sections(scale: str, seeds: Sequence[int], root: Path | None = None) -> list[dict]:
    """The sections of the page: id, title, texts, figures (name, title, figure), tables (title, frame)."""
    from figures import across as figures

    scenes_here, classifiers = supervised(scale, seeds, root), classified(scale, seeds, root)
    first = {
        "id": "effort",
        "title": "Kinds of supervision on the same scenes",
        "texts": [
            "Each kind of supervision marks the same training scenes, and all are tested on the same test scenes. "
            "Effort is what can be counted exactly on the training scenes: labelled pixels an image, averaged over all "
            "training images, for masks, scribbles and full supervision; tags an image for tags. None of the sources "
            "used here states seconds of annotation an image, so none are given. A pixel of a mask, a pixel of a "
            "scribble and a tag cost people different times, and pixels and tags are not on one scale.",
            "Networks, steps and starting weights follow each paper's recipe and differ between kinds (see the table "
            "below), so a difference between two kinds is not due to supervision alone. Full supervision learns with "
            "the recipe of scribbles.",
        ],
        "figures": [("effort", "mIoU against annotation effort", figures.effort(scenes_here))] * bool(scenes_here),
        "tables": [
            ("Measured", supervision_frame(scenes_here)),
            ("What else differs", settings_frame(scenes_here)),
        ] if scenes_here else [],
    }  # fmt: skip
    if not scenes_here:
        first["texts"] = [f"The scenes have no recipes at scale {scale}; use mini or tiny."]
    budget = classifiers[0].budget if classifiers else ""
    second = {
        "id": "calibration",
        "title": "Accuracy against calibration of all classifiers",
        "texts": [
            f"All methods that learn from few labels, on {budget}. ECE has 15 bins of equal width, right-closed. "
            "A good method stands at the top left: accurate, and honest about it. CalibrateMix has a point for each "
            "method that it is put on.",
        ],
        "figures": [("calibration", "Accuracy against ECE", figures.calibration(classifiers))] * bool(classifiers),
        "tables": [("Measured", calibration_frame(classifiers))] * bool(classifiers),
    }
    return [first, second]


__all__ = ["Effort", "Point", "calibration_frame", "classified", "count", "effort_of", "sections",
           "settings_frame", "supervised", "supervision_frame"]  # fmt: skip
