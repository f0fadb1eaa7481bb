"""What figures of all papers share: curves, bars, points, images and reliability on axes, and whole figures of them."""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from figures import style
from figures.claims import statistic
from figures.style import INK, Drawing, Root, Runs, by_seed, label_of, message, say, start, style_of, themed, where
from figures.tables import NOT_RUN, RULES, WEIGHTS, check_reporting, published_grid, shared_seeds, summarise
from repro.data.folders import MASK_SOURCES
from repro.data.masks import IGNORE, palette
from repro.data.scenes import DEFAULT
from repro.experiment import Experiment
from repro.grid import PAPERS, Column, Row, Table, column_of
from repro.measure.metrics import METRICS, Metric
from repro.methods.few_labels.calibratemix import CalibrateMixSettings
from repro.papers.published import NOT_AVAILABLE
from repro.runs import folder_of, is_finished, load_history, load_metrics
from repro.settings import SettingError

TERMS = {"supervised": style.GREY, "positive": style.GREEN, "negative": style.ORANGE, "consistency": style.BLUE}
OTHERS = (style.PURPLE, style.BROWN, style.PINK, style.SKY, style.YELLOW, style.RED, style.GREEN, style.BLUE)
FOREGROUND = (style.SKY, style.YELLOW, style.GREEN, style.PINK, style.BROWN, style.PURPLE, style.ORANGE, style.GREY)
LINES, HATCHES = ("-", "--", "-.", ":"), ("", "///", "...", "xxx")  # of variations of one method
GAP = {"facecolor": "#f6ddd0", "edgecolor": style.RED, "hatch": "////"}
SEEDS = "line: standard deviation, dots: seeds"
PUBLISHED_GROUND = "#f7f3ea"  # behind published numbers, which have axes of their own

Drawn = list[tuple[str, str, Figure]]  # (name, title, figure)


# On axes


def percent(axis: Axis) -> None:
    """Label fractions in percent."""
    axis.set_major_formatter(PercentFormatter(1, symbol=None))


def mean_of(rows: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are defined; NaN where none is."""
    count = np.isfinite(rows).sum(axis=0)
    return np.where(count > 0, np.nansum(rows, axis=0) / np.maximum(count, 1), math.nan)


def curve(axes: Axes, x, rows, label: str = "", colour=INK, marker: str = "", **looks) -> None:
    """The mean of runs as a line, and their range as a band.

    x: (n,). rows: (runs, n), or (n,) of one run; None or NaN where a run has no value. looks: of `Axes.plot`.
    """
    rows = np.atleast_2d(np.array(rows, dtype=float))
    axes.plot(x, mean_of(rows), label=label, color=colour, marker=marker, **looks)
    if len(rows) > 1:
        axes.fill_between(x, np.fmin.reduce(rows), np.fmax.reduce(rows), color=colour, alpha=0.18, linewidth=0)


def bars(
    axes: Axes, values: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str], colours: Sequence = (),
    hatches: Sequence[str] = (), horizontal: bool = False, most: float = math.inf, counted: bool = False,
) -> None:  # fmt: skip
    """Bars by name, side by side for each label: mean over seeds; line: standard deviation; dots: seeds.

    values: label -> the seeds' values of each name, NaN where undefined: a cross marks what a mean leaves out.
    colours, hatches: of the labels. most: a longer bar is cut there and has its value in it. counted: n above a bar.
    """
    width, draw = 0.8 / max(len(values), 1), axes.barh if horizontal else axes.bar
    for number, (label, groups) in enumerate(values.items()):
        at = np.arange(len(names)) + (number + 0.5 - len(values) / 2) * width
        stated = [summarise(group) for group in groups]
        look = {"color": colours[number] if colours else style.PALETTE[number % len(style.PALETTE)]}
        look |= {"hatch": hatches[number] if hatches else "", "edgecolor": "white", "linewidth": 0.6}
        draw(at, [min(one.mean or 0, most) for one in stated], 0.92 * width, label=label, **look)
        for x, one, group in zip(at, stated, groups, strict=True):
            point = slice(None, None, -1 if horizontal else 1)  # (place, value), turned round for horizontal bars
            text = {"textcoords": "offset points", "ha": "center", "fontsize": 7, "color": "0.35"}
            if (one.mean or 0) > most:
                text |= {"ha": "right", "va": "center", "color": "white", "fontweight": "bold"}
                axes.annotate(f"{one.mean:.1f}", (x, most)[point], (-3, 0), **text)
            elif one.n > 1:
                error = {"xerr" if horizontal else "yerr": one.sd or 0}
                axes.errorbar(*(x, one.mean)[point], **error, color=INK, capsize=1.5, linewidth=0.9)
                axes.plot(*([x] * len(group), group)[point], ".", color=INK, markersize=3, alpha=0.6)
            if np.isnan(group).any():
                axes.plot(*(x, 0)[point], "x", color=INK, markersize=5, markeredgewidth=1.6, clip_on=False, zorder=5)
            if counted:
                top = max([0, (one.mean or 0) + (one.sd or 0), *group])
                axes.annotate(str(one.n or NOT_RUN), (x, top), (0, 2), rotation=0 if one.n else 90, **text)
    ticks = range(len(names))
    (axes.set_yticks if horizontal else axes.set_xticks)(ticks, names)
    axes.grid(axis="y" if horizontal else "x", visible=False)
    if horizontal:
        axes.set_ylim(len(names) - 0.5, -0.5)


def points(axes: Axes, at, groups: Sequence[Sequence[float]], label: str = "", colour=INK, **looks) -> np.ndarray:
    """Mean with standard deviation of each group of seeds, and the seeds as dots; returns the means, NaN without any.

    at: (n,) places. groups: the seeds' values of each place. looks: of `Axes.errorbar`.
    """
    stated = [summarise(group) for group in groups]
    mean = np.array([math.nan if one.mean is None else one.mean for one in stated])
    kept, at = np.isfinite(mean), np.asarray(at, dtype=float)
    spread = np.array([one.sd or 0 for one in stated])
    axes.errorbar(at[kept], mean[kept], spread[kept], color=colour, label=label, elinewidth=1, capsize=2, **looks)
    for x, group in zip(at, groups, strict=True):
        if len(group) > 1:
            axes.plot([x] * len(group), group, ".", color=INK, markersize=3.5, alpha=0.6)
    return mean


def image_panel(axes: Axes, image, title: str = "", below: str = "", **how) -> AxesImage:
    """Show an image without ticks, its pixels unblended. below: a line under it. how: of `Axes.imshow`."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(below, fontsize=7, labelpad=3)
    return axes.imshow(image, interpolation="nearest", **how)


def reliability_panel(axes: Axes, accuracy, confidence, count, below: Axes | None = None, runs=()) -> None:
    """Accuracy in bins of confidence of equal width, and its gap to the mean confidence.

    accuracy, confidence, count: (bins,), NaN where a bin is empty. below: axes for the share of each bin. runs: of
    several seeds, the accuracies (runs, bins), as dots.
    """
    parts = (np.asarray(part, dtype=float) for part in (accuracy, confidence, count))
    accuracy, confidence, count = map(np.nan_to_num, parts)  # an empty bin has no bar
    width, left, filled = 1 / len(count), np.arange(len(count)) / len(count), count > 0
    bar = {"width": width, "align": "edge", "linewidth": 0.6}
    axes.bar(left, accuracy, color=style.BLUE, edgecolor="white", label="accuracy", **bar)
    axes.bar(left, confidence - accuracy, bottom=accuracy, label="gap to mean confidence", **GAP, **bar)
    axes.hlines(accuracy[filled], left[filled], left[filled] + width, color=style.BLUE, linewidth=2.5)
    axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="perfect")
    for run in runs if len(runs) > 1 else ():
        axes.plot(left + width / 2, run, ".", color=INK, markersize=3.5, alpha=0.7)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    percent(axes.yaxis)
    if below is not None:
        share = count / max(count.sum(), 1)
        below.bar(left, share, color=style.GREY, edgecolor="white", **bar)
        for x, one in zip(left[filled], share[filled], strict=True):
            text = f"{100 * one:.0f}" if one >= 0.005 else "<1"
            below.annotate(text, (x + width / 2, one), ha="center", va="bottom", fontsize=6, color=INK)
        below.set(xlabel="confidence (%)", ylim=(0, 1.15))
        percent(below.xaxis)
        percent(below.yaxis)


def mark(axes: Axes, at: float, text: str, linestyle: str = ":") -> None:
    """A vertical line with a word above it."""
    axes.axvline(at, color=INK, linestyle=linestyle, linewidth=1.2, zorder=1)
    axes.text(at, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color=INK)


def keep_apart(axes: Axes, axis: str, metric: Metric) -> None:
    """Widen an axis over which values hardly differ, so that a difference of nothing does not fill the figure.

    To half a point of a percentage, of others to a twentieth of the largest value.
    """
    low, high = getattr(axes, f"get_{axis}lim")()
    least = 0.005 if metric.percent else 0.05 * max(abs(low), abs(high))
    if high - low < least:
        getattr(axes, f"set_{axis}lim")((low + high - least) / 2, (low + high + least) / 2)
    if metric.percent:
        percent(getattr(axes, f"{axis}axis"))
    else:
        axes.ticklabel_format(axis=axis, useOffset=False)


def outside_legend(figure: Figure, axes: Axes, columns: int = 4, **keys) -> None:
    """The legend of `axes` below all axes of the figure. keys: "handles" in place of those of `axes`."""
    handles = keys.get("handles") or axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False)


# Runs and captions


def unavailable(title: str, experiments: Iterable[Experiment], root: Root) -> Figure:
    """A figure that tells why there is none: the runs are not there, or do not keep what it needs."""
    experiments = list(experiments)
    why = "nothing of this was kept" if any(is_finished(item, root) for item in experiments) else NOT_RUN
    names = ", ".join(dict.fromkeys(label_of(item) for item in experiments))
    return message(title, f"{why}: {names}\n{where(experiments)}")


def absent(experiments: Iterable[Experiment], others: Collection[Experiment], why: str = NOT_RUN) -> str:
    """A caption that names the methods of the experiments that are not among `others`; empty without any."""
    names = dict.fromkeys(label_of(item) for item in experiments if item not in others)
    return f"{why}: {', '.join(names)}" if names else ""


def banded(experiments: Runs) -> str:
    """Where runs were made, and what a band is if there are several seeds."""
    return where(experiments) + "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)


def reporting(rule: str, weights: str) -> str:
    """`last evaluation, EMA weights`; raises SettingError for an unknown rule or kind of weights."""
    check_reporting(rule, weights)
    return f"{RULES[rule]}, {WEIGHTS[weights]}"


def reported(experiment: Experiment, root: Root, rule: str, weights: str) -> dict:
    """What a finished run reports by a rule and kind of weights."""
    return load_metrics(folder_of(experiment, root))["reported"][rule][weights]


def rows_of(experiment: Experiment, root: Root, kind: str) -> list[dict]:
    """A run's history rows of a kind."""
    return load_history(folder_of(experiment, root)).of(kind)


def variants(experiments: Iterable[Experiment]) -> Iterator[tuple[list[Experiment], dict, str]]:
    """Groups of seeds, the looks of each for `curve`, and a hatch; variations of a method differ in line and hatch."""
    used = Counter()
    for group in by_seed(experiments):
        look, number = style_of(group[0].method), used[group[0].method] % 4
        used[group[0].method] += 1
        yield group, {"colour": look.colour, "marker": look.marker, "linestyle": LINES[number]}, HATCHES[number]


def counted(group: Sequence[Experiment], found: Sequence) -> str:
    """The label of seeds, with the number of runs where it is not as many as were asked for."""
    n = "" if len(found) == len(group) else f" (n = {len(found)})" if found else f" ({NOT_RUN})"
    return label_of(group[0]) + n


# Figures over training


@themed
def loss_curves(experiment: Experiment, root: Root = None) -> Figure:
    """Weighted loss terms and their sum over the steps of a run, finished or under way (ComMatch, Fig. 2a)."""
    title, rows = f"Loss terms of {label_of(experiment)}", rows_of(experiment, root, "train")
    if not rows:
        return unavailable(title, [experiment], root)
    figure, ((axes,),) = start(title, [where([experiment])], (8, 3.4))
    steps, spare = [row["step"] for row in rows], itertools.cycle(OTHERS)
    curve(axes, steps, [sum(row["terms"].values()) for row in rows], "sum", linewidth=1)
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["terms"])):
        colour = TERMS.get(name) or next(spare)
        curve(axes, steps, [row["terms"].get(name) for row in rows], name, colour, linestyle=LINES[number % 4])
    axes.set(xlabel="training step", ylabel="loss, weighted (nats)")
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a term that stays 0 is a line, not the frame
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    outside_legend(figure, axes)
    return figure


@themed
def over_training(
    title: str, experiments: Runs, root: Root,
    panels: Mapping[str, str | Callable[[dict], float | None]], weights: str = "", captions: Sequence[str] = (),
    columns: int = 0, marks: Mapping[float, str] | None = None, place: str = "",
) -> Figure:  # fmt: skip
    """A panel a quantity over the steps, a line a method: mean over seeds; band: smallest to largest.

    panels: label -> a metric of the evaluations under `weights`, or, without weights, the quantity in a history row of
    training; one with "(%)" is a fraction. The legend names what was not run. columns: of panels, by default one row.
    marks: step -> word. place: caption in place of `banded`. Raises SettingError for an unknown kind of weights.
    """
    if weights:
        title += f" ({reporting('last', weights).split(', ')[1]})"
    columns = columns or len(panels)
    lines = -(-len(panels) // columns)
    size = (4.4 if columns < 3 else 3.5) * columns, 2.7 * lines + 1.2 + 0.2 * len(captions)
    figure, grid = start(title, [place or banded(experiments), *captions], size, lines, columns, sharex=True)
    for (label, value), axes in zip(panels.items(), grid.flat, strict=False):
        for group, looks, _ in variants(experiments):
            found = [kept for item in group if (kept := rows_of(item, root, "evaluation" if weights else "train"))]
            runs = [{row["step"]: row[weights][value] if weights else value(row) for row in kept} for kept in found]
            steps = sorted(set.intersection(*map(set, runs))) if runs else []
            rows = np.array([[run[step] for step in steps] for run in runs], dtype=float)  # None is NaN
            none = " (none)" * bool(steps and not np.isfinite(rows).any())
            curve(axes, steps, rows, counted(group, found) + none, markevery=max(1, len(steps) // 8), **looks)
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if "(%)" in label:
            percent(axes.yaxis)
        for step, word in (marks or {}).items():
            mark(axes, step, word)
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    outside_legend(figure, grid[0, 0])
    return figure


# Figures of bars and points


@themed
def reliability_figure(
    title: str, captions: Sequence[str], rows: Sequence[Sequence[Mapping]], unit: str = "images"
) -> Figure:
    """Rows of reliability panels, each above the shares of its bins.

    rows: of panels with "title", and "bins" and "runs" as `reliability_panel` takes them and the "numbers" above, or
    "why" there are none.
    """
    columns = len(rows[0])
    size = (max(min(3.2 * columns + 0.6, 13), 6), 4.2 * len(rows) + 0.8)
    figure, grid = start(title, captions, size, 2 * len(rows), columns, sharex=True,
                         height_ratios=(3.2, 1) * len(rows))  # fmt: skip
    for number, row in enumerate(rows):
        upper, lower = grid[2 * number], grid[2 * number + 1]
        for axes, below, panel in zip(upper, lower, row, strict=True):
            axes.set_title("\n".join([panel["title"], panel.get("numbers", "")]), fontsize=9.5)
            if "bins" in panel:
                reliability_panel(axes, *panel["bins"], below, panel.get("runs", ()))
                below.tick_params(labelbottom=True)
            else:
                say(axes, panel["why"])
                below.set_axis_off()
        upper[0].set_ylabel("accuracy (%)")
        lower[0].set_ylabel(f"{unit} (%)")
    outside_legend(figure, next((axes for axes in grid.flat if axes.containers), grid[0, 0]))
    return figure


@themed
def class_bars(
    title: str, names: Sequence[str], panels: Mapping[str, Callable[[dict], Sequence[float | None]]],
    experiments: Runs, root: Root, rule: str, weights: str, most: float = math.inf,
) -> Figure:  # fmt: skip
    """Bars by class and method, a panel a quantity. panels: label -> its values of `names` in a report.

    most: where bars are cut, None is drawn as a cross.
    """
    how = reporting(rule, weights)
    if not any(is_finished(item, root) for item in experiments):
        return unavailable(title, experiments, root)
    groups = list(variants(experiments))
    size = 4.75 * max(len(panels), 1.8), max(0.11 * len(groups) + 0.12, 0.3) * len(names) + 2
    captions = [f"{how}; bar: mean, {SEEDS}", where(experiments)]
    figure, grid = start(title, captions, size, 1, len(panels), sharey=True)
    for axes, (quantity, value) in zip(grid[0], panels.items(), strict=True):
        values = {}
        for group, *_ in groups:
            runs = [reported(item, root, rule, weights) for item in group if is_finished(item, root)]
            found = np.array([value(run) for run in runs], dtype=float).reshape(-1, len(names))  # None is NaN
            values[counted(group, runs)] = found.T
        bars(axes, values, names, [looks["colour"] for _, looks, _ in groups], [hatch for *_, hatch in groups],
             horizontal=True, most=most)  # fmt: skip
        axes.set(xlabel=quantity)
        axes.set_xlim(0, min(most, axes.get_xlim()[1]))
        if "(%)" in quantity:
            axes.set_xlim(0, 1)
            percent(axes.xaxis)
    if any(line.get_marker() == "x" for axes in grid[0] for line in axes.lines):
        figure.suptitle(figure.get_suptitle() + "\ncross: infinite or undefined in a run, which its bar leaves out")
    outside_legend(figure, grid[0, 0])
    return figure


def table_looks(table: Table) -> dict[str, dict]:
    """Looks of each row: colour and marker of the method that it is or builds on, a hatch and a fill of its variation.

    A method that extends another has its `base` among the row's overrides.
    """
    looks, used = {}, Counter()
    for row in table.rows:
        base = style_of(base_of(row))
        number, fill = used[base.title], (None, "white", "0.75", "0.5")
        looks[row.label] = {"colour": base.colour, "marker": base.marker, "hatch": HATCHES[number % 4],
                            "fill": fill[number % 4]}  # fmt: skip
        used[base.title] += 1
    return looks


def base_of(row: Row) -> str:
    """The method that a row builds on, or the method itself."""
    return row.overrides.get("base", CalibrateMixSettings.base) if row.method == "calibratemix" else row.method


@themed
def table_bars(
    title: str, table: Table, scale: str, seeds: Sequence[int], root: Root, rule: str, weights: str,
    metrics: Sequence[str],
) -> Figure:  # fmt: skip
    """A panel a metric, with bars of each row of a table by column: mean, deviation, seeds, and n above.

    Columns without a finished run are left out, rows without one are named.
    """
    caption = f"{scale} scale, {reporting(rule, weights)}, seeds {', '.join(map(str, seeds))}; {SEEDS}, above: n"
    cells = {(row.label, column): [item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)]
             for row in table.rows for column in table.columns_at(scale)}  # fmt: skip
    columns = [column for column in table.columns_at(scale) if any(cells[row.label, column] for row in table.rows)]
    rows = [row.label for row in table.rows if any(cells[row.label, column] for column in columns)]
    missing = [row.label for row in table.rows if row.label not in rows]
    missed = f"{NOT_RUN}: {', '.join(missing)}" * bool(missing)
    if not rows:
        return message(title, f"{caption}\n{missed}")
    figure, grid = start(title, [caption, missed], (10, 2.5 * len(metrics) + 1.6), len(metrics), 1, sharex=True)
    looks = [table_looks(table)[label] for label in rows]
    for name, axes in zip(metrics, grid[:, 0], strict=True):
        values = {label: [[statistic(item, name, root, rule, weights) for item in cells[label, column]]
                          for column in columns] for label in rows}  # fmt: skip
        bars(axes, values, [column.title for column in columns], [look["colour"] for look in looks],
             [look["hatch"] for look in looks], counted=True)  # fmt: skip
        axes.set(ylabel=METRICS[name].title, ylim=(0, 1.08 * axes.get_ylim()[1]))
        if METRICS[name].percent:
            percent(axes.yaxis)
    outside_legend(figure, grid[0, 0])
    return figure


@themed
def table_points(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Root = None, rule: str = "last",
    weights: str = "ema", column: Column | None = None, metrics: Sequence[str] = ("error", "ece_15"),
) -> Figure:  # fmt: skip
    """Rows of a table or an ablation as points: seeds, mean and deviation; the paper's own cell at the right.

    column: of the table at this scale, by default its first. rule, weights: as in `tables.compare`. Of an ablation only
    seeds that its rows share are drawn.
    """
    column = column or table.columns_at(scale)[0]
    heading = f"{column.title}, {scale} scale, {reporting(rule, weights)}"
    seeds, words = seeds_drawn(table, column, scale, seeds, root)
    marks = f"small: {words}; large: mean; bar: standard deviation"
    size = (9.5, 0.42 * len(table.rows) + 1.9)
    figure, grid = start(table.title, [heading, marks], size, 1, len(metrics), sharey=True)
    for name, axes in zip(metrics, grid[0], strict=True):
        metric = METRICS[name]
        for y, row in enumerate(table.rows):
            cell = [item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)]
            values, look = [statistic(item, name, root, rule, weights) for item in cell], style_of(row.method)
            summary = summarise(values)
            if not summary.n:
                axes.annotate(NOT_RUN, (0.5, y), xycoords=("axes fraction", "data"), ha="center", va="center",
                              color="0.45", fontsize=8.5)  # fmt: skip
                continue
            axes.plot(values, [y + 0.2] * len(values), ".", color=look.colour, alpha=0.5)
            axes.errorbar(summary.mean, y, xerr=summary.sd or 0, color=look.colour, marker=look.marker, markersize=7,
                          capsize=3)  # fmt: skip
        axes.set(xlabel=textwrap.fill(metric.title, 60 // len(metrics)), ylim=(len(table.rows) - 0.5, -0.5))
        keep_apart(axes, "x", metric)
        axes.set_yticks(range(len(table.rows)), [row.label for row in table.rows])
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(metrics) < 3 else 4))
    _published_beside(grid[0, -1], table)
    return figure


def seeds_drawn(
    table: Table, column: Column, scale: str, seeds: Sequence[int], root: Root = None
) -> tuple[tuple[int, ...], str]:
    """Which of `seeds` a figure of a table draws, and words for them.

    Of an ablation only those that its rows share; all where they share none, and the words then warn of it.
    """
    shared = shared_seeds(table, column, scale, seeds, root) if table.varies else tuple(seeds)
    words = f"seeds {', '.join(map(str, shared or seeds))}"
    return shared or tuple(seeds), words if shared else f"{words}, but ROWS SHARE NONE: compare no two of them"


def _published_beside(axes: Axes, table: Table) -> None:
    """The published cells of the first reference that has a number, as text at the right edge.

    They are text because no small scale may stand on the axis of published numbers.
    """
    heading, cells = "published:", ["none"] * len(table.rows)
    grids = [(reference, published_grid(table, reference)) for reference in table.references]
    if grids:
        known = [pair for pair in grids if (pair[1].iloc[:, 0] != NOT_AVAILABLE).any()]
        reference, grid = (known or grids)[0]
        lines = f"{METRICS[reference.metric].name}, {reference.title},", f"{grid.columns[0]}:"
        heading, cells = "\n".join(textwrap.fill(line, 42) for line in lines), list(grid[grid.columns[0]])
    side = axes.secondary_yaxis("right")
    side.set_yticks(range(len(table.rows)), cells, fontsize=8.5, color="0.35")
    side.tick_params(length=0)
    side.spines["right"].set_visible(False)
    axes.annotate(heading, (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=8, color="0.35")


def table_figures(paper: str, scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """A paper's first table where its main job runs, and the ablations of which two rows or more have been run."""
    module = PAPERS[paper]
    experiments = module.main_experiments(scale, seeds)
    table, column = next(iter(module.tables.values())), column_of(experiments[0])
    rows = [row.label for row in table.rows if table.cell(row, column, scale, seeds)[0] in experiments]
    how = {"root": root, "metrics": module.spec.headlines}
    drawn = [("main", table.title, table_points(table.only(rows), scale, seeds, column=column, **how))]
    for name, ablation in module.ablations.items():
        if filled(ablation, ablation.columns_at(scale)[0], scale, seeds, root) > 1:
            drawn += [(f"ablation_{name}", ablation.title, table_points(ablation, scale, seeds, **how))]
    return drawn


def filled(table: Table, column: Column, scale: str, seeds: Sequence[int], root: Root) -> int:
    """How many cells of a column have a finished run."""
    cells = (table.cell(row, column, scale, seeds) for row in table.rows)
    return sum(any(is_finished(item, root) for item in cell) for cell in cells)


# Figures of images


def image_grid(
    title: str, captions: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence], names: Sequence[str],
    maps: Iterable[Tensor], sides: Sequence[str] = (), more: Mapping | None = None, room: float = 0.0,
) -> tuple[Drawing, np.ndarray]:  # fmt: skip
    """Images (rows, columns) under their heads, with the classes that occur in a legend; the figure and its axes.

    rows: of images, or of pairs of an image and a line under it. names: of the classes. maps: labels that occur. sides:
    words at the left of a row. more: further colours of the legend. room: inches that the caller fills below.
    """
    high, wide = np.shape(rows[0][0][0] if isinstance(rows[0][0], tuple) else rows[0][0])[:2]
    width, lines = min(10, 1.9 * len(heads)), max(head.count("\n") for head in heads)
    gap = 0.25 if any(isinstance(cell, tuple) for cell in rows[0]) else 0.04
    size = width, (width / len(heads) * high / wide + gap) * len(rows) + 1 + 0.2 * (lines + len(captions)) + room
    figure = Drawing(figsize=size, layout="constrained")
    figure.suptitle("\n".join([title, *filter(None, captions)]))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0)
    ratios = [width / len(heads) * high / wide] * len(rows) + [room] * bool(room)
    places = figure.add_gridspec(len(ratios), len(heads), height_ratios=ratios)
    grid = np.array([[figure.add_subplot(places[row, column]) for column in range(len(heads))]
                     for row in range(len(rows))])  # fmt: skip
    for at, row in enumerate(rows):
        for axes, head, cell in zip(grid[at], heads, row, strict=True):
            image, below = cell if isinstance(cell, tuple) else (cell, "")
            image_panel(axes, image, head if at == 0 else "", below)
        if sides:
            grid[at, 0].set_ylabel(sides[at], fontsize=8.5)
    if room:
        figure.add_subplot(places[-1, :])
    class_legend(figure, names, maps, more)
    return figure, grid


def heads_of(done: Iterable[Experiment], root: Root, metric: str) -> list[str]:
    """What stands above the images of each run: method, seed if there are several, and a metric of all test images."""
    several = len({item.seed for item in done}) > 1
    names = [textwrap.fill(label_of(item) + f", seed {item.seed}" * several, 15) for item in done]
    values = [100 * statistic(item, metric, root, "last", "ema") for item in done]
    return [f"{name}\n{value:.1f} %" for name, value in zip(names, values, strict=True)]


def check_alike(kept: Iterable[Mapping[str, Tensor]], name: str, what: str) -> None:
    """Raise SettingError unless an array is the same in the outputs of all runs. what: the words for it."""
    kept = list(kept)
    if not all(torch.equal(one[name], kept[0][name]) for one in kept):
        raise SettingError(f"these runs have {what}; show runs of one data set, budget and scale together")


def picture(image: Tensor) -> np.ndarray:
    """An image (3, H, W) as (H, W, 3)."""
    return image.permute(1, 2, 0).numpy()


def overlay(image: Tensor, share, colour: np.ndarray, paleness: float = 0.0) -> np.ndarray:
    """A grey image under a colour, (H, W, 3) in 0..1.

    image: (3, H, W) uint8. share: (H, W) in [0, 1], of the colour. colour: (H, W, 3) or (3,) in 0..1. paleness: from 0,
    the grey as it is, to 1, white.
    """
    grey = paleness + (1 - paleness) * picture(image).mean(2, keepdims=True) / 255
    share = np.clip(np.asarray(share, dtype=float), 0, 1)[..., None]
    return (1 - share) * grey + share * colour


def classes_of(data: str) -> tuple[str, ...]:
    """Names of the classes of a data set, index = class."""
    return ("background", *DEFAULT) if data == "scenes" else MASK_SOURCES[data].classes


def class_colours(classes: int) -> np.ndarray:
    """(256, 3) in 0..1: VOC's colours, or ones that the colour-blind tell apart where they suffice; 255 is cream."""
    colours = palette(classes) / 255
    if classes <= len(FOREGROUND) + 1:
        colours[:classes] = [(0.12,) * 3, *FOREGROUND[: classes - 1]]
    return colours


def class_legend(figure: Figure, names: Sequence[str], maps: Iterable[Tensor], more: Mapping | None = None) -> None:
    """Names and colours of the classes in the maps, below; 255 is `unknown`. more: further entries."""
    present = sorted({int(label) for labels in maps for label in labels.unique()})
    colours = class_colours(len(names))
    entries = {"unknown" if label == IGNORE else names[label]: colours[label] for label in present} | dict(more or {})
    patches = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=name) for name, colour in entries.items()]
    columns = min(len(patches), max(1, int(0.9 * figure.get_figwidth())))
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
