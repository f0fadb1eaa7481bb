"""What figures of all papers share: bands over seeds, loss terms, a reliability panel, tables as points."""

import functools
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from figures import style
from figures.claims import statistic
from figures.style import Drawing, by_seed, label_of, message, style_of, themed, where
from figures.tables import (  # fmt: skip
    NOT_RUN,
    RULES,
    WEIGHTS,
    check_reporting,
    published_grid,
    shared_seeds,
    summarise,
)
from repro.experiment import Experiment
from repro.grid import PAPERS, Column, Table, column_of
from repro.measure import calibration
from repro.measure.metrics import METRICS, Metric
from repro.papers.published import NOT_AVAILABLE
from repro.runs import folder_of, is_finished, load_history, load_metrics

TERMS = {"supervised": style.GREY, "positive": style.GREEN, "negative": style.ORANGE, "consistency": style.BLUE}
LINES = ("-", "--", "-.", ":")


def not_run(title: str, experiments: Iterable[Experiment]) -> Figure:
    """A figure that says of which methods there is nothing to draw."""
    names = ", ".join(dict.fromkeys(label_of(item) for item in experiments))
    return message(title, f"{NOT_RUN}: {names}\n{where(experiments)}")


def not_shown(experiments: Iterable[Experiment], done: Collection[Experiment], why: str = NOT_RUN) -> str:
    """A line that names the methods that a figure does not show; empty where it shows all."""
    names = dict.fromkeys(label_of(item) for item in experiments if item not in done)
    return f"\n{why}: {', '.join(names)}" if names else ""


def reported(experiment: Experiment, root: Path | None, rule: str, weights: str) -> dict:
    """What a finished run reports by a rule and kind of weights."""
    return load_metrics(folder_of(experiment, root))["reported"][rule][weights]


def rows_of(experiment: Experiment, root: Path | None, kind: str) -> list[dict]:
    """A run's history rows of a kind."""
    return load_history(folder_of(experiment, root)).of(kind)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# Over training


@themed
def loss_curves(experiment: Experiment, root: Path | None = None) -> Figure:
    """Weighted loss terms and their sum over the steps of a run, finished or under way (ComMatch, Fig. 2a)."""
    title = f"Loss terms of {label_of(experiment)}"
    rows = rows_of(experiment, root, "train")
    if not rows:
        return not_run(title, [experiment])
    figure = Drawing(figsize=(8, 3.4), layout="constrained")
    figure.suptitle(f"{title}\n{where([experiment])}")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    axes.plot(steps, [sum(row["terms"].values()) for row in rows], color=style.INK, linewidth=1, label="sum")
    spare = iter((style.PURPLE, style.BROWN, style.PINK, style.SKY, style.YELLOW, style.RED, style.GREEN, style.BLUE))
    names = list(dict.fromkeys(name for row in rows for name in row["terms"]))
    for number, name in enumerate(names):
        values = [row["terms"].get(name, math.nan) for row in rows]
        axes.plot(steps, values, LINES[number % 4], color=TERMS.get(name) or next(spare, style.GREY), label=name)
    axes.set(xlabel="training step", ylabel="loss, weighted (nats)")
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a term that stays 0 is a line, not the frame
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    outside_legend(figure, axes)
    return figure


def banded(experiments: Sequence[Experiment]) -> str:
    """Where runs were made, and what a band is if there are several seeds."""
    return where(experiments) + "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)


def bands(axes: Axes, experiments, root, kind: str, value: Callable[[dict], float | None]) -> None:
    """One line a group of seeds over the steps that all its runs have; the legend names what was not run."""
    variants: dict[str, int] = {}
    for group in by_seed(experiments):
        look, label = style_of(group[0].method), label_of(group[0])
        number = variants[group[0].method] = variants.get(group[0].method, -1) + 1
        found = [rows for item in group if (rows := rows_of(item, root, kind))]
        runs = [{row["step"]: _number(value(row)) for row in rows} for rows in found]
        steps = sorted(set.intersection(*map(set, runs))) if runs else []
        looks = {"color": look.colour, "linestyle": LINES[number % 4], "marker": look.marker}
        count = "" if len(found) == len(group) else f" ({NOT_RUN})" if not found else f" (n = {len(found)})"
        values = np.array([[run[step] for step in steps] for run in runs]).reshape(len(runs), len(steps))
        defined = np.isfinite(values).sum(axis=0)
        if found and not defined.any():
            count += " (none)"
        mean = np.where(defined > 0, np.nansum(values, axis=0) / np.maximum(defined, 1), math.nan)
        axes.plot(steps, mean, label=label + count, markevery=max(1, len(steps) // 8), **looks)
        if len(runs) > 1:
            low, high = np.fmin.reduce(values, axis=0), np.fmax.reduce(values, axis=0)
            axes.fill_between(steps, low, high, color=look.colour, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def outside_legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The legend of `axes` below all axes of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False)


# Of the trained network


def reliability_panel(diagram: Axes, counts: Axes, confidence, correct, bins: int, resamples: int) -> None:
    """One diagram over its counts: `calibration.reliability`, right closing, with the ECE's bootstrap interval."""
    found = calibration.reliability(confidence, correct, bins)
    ece = functools.partial(calibration.ece, bins=bins)
    low, high = calibration.bootstrap_interval(ece, confidence, correct, resamples)
    left, width = found.lower.numpy(), 1 / bins
    accuracy, gap = np.nan_to_num(found.accuracy.numpy()), found.gap.numpy()
    bar = {"width": width, "align": "edge", "linewidth": 0.6}
    hatched = {"facecolor": "#f6ddd0", "edgecolor": style.RED, "hatch": "////"}
    diagram.bar(left, accuracy, color=style.BLUE, edgecolor="white", label="accuracy", **bar)
    diagram.bar(left, gap, bottom=accuracy, label="gap to mean confidence", **hatched, **bar)
    number = found.count.numpy()
    filled = number > 0
    diagram.hlines(accuracy[filled], left[filled], left[filled] + width, color=style.BLUE, linewidth=2.5)
    diagram.plot([0, 1], [0, 1], color=style.INK, linestyle="--", linewidth=1, label="perfect")
    error = 100 * (1 - float(correct.double().mean()))
    numbers = f"ECE {100 * float(found.ece):.1f} % [{100 * low:.1f}, {100 * high:.1f}], error {error:.1f} %"
    diagram.set_title(f"{diagram.get_title()}\n{numbers}\n{len(correct):,} images", fontsize=9.5)
    diagram.set(xlim=(0, 1), ylim=(0, 1.02))
    diagram.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    diagram.legend(loc="upper left", fontsize=7.5, framealpha=0.9)
    counts.bar(left, number, color=style.GREY, edgecolor="white", **bar)
    for x, n in zip(left, number, strict=True):
        if n:
            counts.annotate(f"{n}", (x + width / 2, n), ha="center", va="bottom", fontsize=5.5, color=style.INK)
    counts.set(xlabel="confidence (%)", ylim=(0, 1.2 * max(number.max(), 1)))
    counts.xaxis.set_major_formatter(PercentFormatter(1, symbol=None))


# Of tables


@themed
def table_points(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema", column: Column | None = None, metrics: Sequence[str] = ("error", "ece_15"),
) -> Figure:  # fmt: skip
    """Rows of a table or an ablation as points: seeds, mean and deviation; the paper's own cell at the right.

    column: of the table at this scale, by default its first. rule, weights: as in `tables.compare`. Of an ablation only
    seeds that its rows share are drawn.
    """
    check_reporting(rule, weights)
    place = column or table.columns_at(scale)[0]
    seeds, said = seeds_drawn(table, place, scale, seeds, root)
    cells = [table.cell(row, place, scale, seeds) for row in table.rows]
    figure = Drawing(figsize=(9.5, 0.42 * len(cells) + 1.9), layout="constrained")
    heading = f"{place.title}, {scale} scale, {RULES[rule]}, {WEIGHTS[weights]}"
    marks = f"small: {said}; large: mean; bar: standard deviation"
    figure.suptitle(f"{table.title}\n{heading}\n{marks}")
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for name, axes in zip(metrics, grid, strict=True):
        metric, at = METRICS[name], np.arange(len(cells))
        for y, row, cell in zip(at, table.rows, cells, strict=True):
            look = style_of(row.method)
            values = [statistic(item, name, root, rule, weights) for item in cell if is_finished(item, root)]
            summary, factor = summarise(values), 100 if metric.percent else 1
            if summary.n == 0:
                middle = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
                axes.annotate(NOT_RUN, (0.5, y), color="0.45", fontsize=8.5, **middle)
                continue
            looks = {"color": look.colour, "marker": look.marker, "markersize": 7, "capsize": 3}
            axes.plot(factor * np.array(values), [y + 0.2] * len(values), ".", color=look.colour, alpha=0.5)
            axes.errorbar(factor * summary.mean, y, xerr=factor * (summary.sd or 0), **looks)
        axes.set(xlabel=textwrap.fill(metric.title, 60 // len(metrics)), ylim=(len(cells) - 0.5, -0.5), yticks=at)
        keep_apart(axes, "x", metric)
        axes.set_yticklabels([row.label for row in table.rows])
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(metrics) < 3 else 4))
    _published_beside(grid[-1], table)
    return figure


def keep_apart(axes: Axes, axis: str, metric: Metric) -> None:
    """Widen an axis over which values hardly differ, so that a difference of nothing does not fill the figure.

    To half a point of a percentage, of others to a twentieth of the largest value. No offset is taken off the numbers.
    """
    low, high = getattr(axes, f"get_{axis}lim")()
    least = 0.5 if metric.percent else 0.05 * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        getattr(axes, f"set_{axis}lim")(middle - least / 2, middle + least / 2)
    axes.ticklabel_format(axis=axis, useOffset=False)


def seeds_drawn(
    table: Table, column: Column, scale: str, seeds: Sequence[int], root: Path | None = None
) -> tuple[tuple[int, ...], str]:
    """Which of `seeds` a figure of a table draws, and how it says so.

    Of an ablation only those that its rows share; all where they share none, and the words then warn of it.
    """
    shared = shared_seeds(table, column, scale, seeds, root) if table.varies else tuple(seeds)
    drawn = shared or tuple(seeds)
    said = f"seeds {', '.join(map(str, drawn))}"
    return drawn, said if shared else f"{said}, but ROWS SHARE NONE: compare no two of them"


def _published_beside(axes: Axes, table: Table) -> None:
    """The first published column's cells as text at the right edge: no small scale may stand on their axis.

    Of the first reference that has a number there, else of the first.
    """
    if table.references:
        grids = [published_grid(table, reference) for reference in table.references]
        known = [(grid.iloc[:, 0] != NOT_AVAILABLE).any() for grid in grids]
        shown = known.index(True) if any(known) else 0
        reference, column = table.references[shown], grids[shown].columns[0]
        lines = f"{METRICS[reference.metric].name}, {reference.title},", f"{column}:"
        heading = "\n".join(textwrap.fill(line, 42) for line in lines)
        cells = grids[shown][column]
    else:
        heading, cells = "published:", ["none"] * len(table.rows)
    side = axes.secondary_yaxis("right")
    side.set_yticks(range(len(table.rows)), list(cells), fontsize=8.5, color="0.35")
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)
    axes.annotate(heading, (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=8, color="0.35")


# A paper's figures for the report


Drawn = list[tuple[str, str, Figure]]  # (name, title, figure)


def table_figures(paper: str, scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """A paper's first table where its main job runs, and the ablations of which two rows or more have been run."""
    module = PAPERS[paper]
    experiments = module.main_experiments(scale, seeds)
    table, column = next(iter(module.TABLES.values())), column_of(experiments[0])
    rows = [row.label for row in table.rows if table.cell(row, column, scale, seeds)[0] in experiments]
    how = {"root": root, "metrics": module.HEADLINES}
    drawn = [("main", table.title, table_points(table.only(rows), scale, seeds, column=column, **how))]
    for name, ablation in module.ABLATIONS.items():
        if filled(ablation, ablation.columns_at(scale)[0], scale, seeds, root) > 1:
            drawn += [(f"ablation_{name}", ablation.title, table_points(ablation, scale, seeds, **how))]
    return drawn


def filled(table: Table, column: Column, scale: str, seeds: Sequence[int], root: Path | None) -> int:
    """How many cells of a column have a finished run."""
    cells = (table.cell(row, column, scale, seeds) for row in table.rows)
    return sum(any(is_finished(item, root) for item in cell) for cell in cells)
