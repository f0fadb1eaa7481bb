"""Every figure, drawn from saved results only: histories, metrics and outputs of runs, never from a network.

A figure takes experiments and a folder of runs and returns a matplotlib Figure; runs that differ in their
seed only are one line with a band. What was not run is named in the figure. Equal results give equal bytes
through `save`.
"""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from repro import calibration, style
from repro.claims import INSTABILITY_BINS, instability_correlation, statistic
from repro.experiment import Experiment, resolve
from repro.grids import Column, Table, place
from repro.methods.few_labels import commatch
from repro.papers import PAPERS
from repro.papers.published import NOT_AVAILABLE
from repro.runs import folder_of, is_finished, load_history, load_outputs
from repro.style import Drawing, by_seed, label_of, message, save, say, setting, style_of, themed, where
from repro.tables import METRICS, NOT_RUN, RULES, WEIGHTS, check_reporting, published_grid, summarise

TERMS = {"supervised": style.GREY, "positive": style.GREEN, "negative": style.ORANGE, "consistency": style.BLUE}
LINES = ("-", "--", "-.", ":")


def _not_run(title: str, experiments: Iterable[Experiment]) -> Figure:
    names = ", ".join(dict.fromkeys(label_of(item) for item in experiments))
    return message(title, f"{NOT_RUN}: {names}\n{where(experiments)}")


def _rows(experiment: Experiment, root: Path | None, kind: str) -> list[dict]:
    return load_history(folder_of(experiment, root)).of(kind)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# Over training


@themed
def loss_curves(experiment: Experiment, root: Path | None = None) -> Figure:
    """Weighted loss terms and their sum over the steps of a run, finished or under way (ComMatch, Fig. 2a)."""
    title = f"Loss terms of {label_of(experiment)}"
    rows = _rows(experiment, root, "train")
    if not rows:
        return _not_run(title, [experiment])
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


@themed
def accuracy_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """Test accuracy and ECE over the steps; line: mean, band: smallest to largest (ComMatch, Fig. 2b, 3)."""
    check_reporting("last", weights)
    figure = Drawing(figsize=(9, 3.6), layout="constrained")
    title = f"Accuracy and calibration over training ({WEIGHTS[weights]})"
    figure.suptitle(f"{title}\n{_banded(experiments)}")
    both = figure.subplots(1, 2)
    for metric, name, axes in zip(("accuracy", "ece_15"), ("accuracy", "ECE, 15 bins"), both, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, metric=metric: row[weights][metric])
        axes.set(xlabel="training step", ylabel=f"test {name} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, both[0])
    return figure


@themed
def pseudo_label_quality(experiments: Sequence[Experiment], root: Path | None = None) -> Figure:
    """Coverage, accuracy and ECE of the pseudo-labels over the steps; positives and negatives apart.

    Measured against hidden labels, which no method sees; gaps in a line: nothing was selected.
    """
    title = "Pseudo-labels over training, against hidden labels"
    rows = [row for item in experiments for row in _rows(item, root, "train")]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["pseudo"]))
    if not kinds:
        return message(title, "no pseudo-labels were selected") if rows else _not_run(title, experiments)
    figure = Drawing(figsize=(10, 2.5 * len(kinds) + 0.9), layout="constrained")
    figure.suptitle(f"{title}\n{_banded(experiments)}")
    grid = figure.subplots(len(kinds), 3, squeeze=False, sharex=True)
    for kind, row in zip(kinds, grid, strict=True):
        for name, axes in zip(("coverage", "accuracy", "ece"), row, strict=True):
            of = functools.partial(_quality, kind=kind, name=name)
            bands(axes, experiments, root, "train", of)
            axes.set_ylabel(f"{kind} {'ECE, 15 bins' if name == 'ece' else name} (%)")
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    outside_legend(figure, grid[0, 0])
    return figure


def _banded(experiments: Sequence[Experiment]) -> str:
    return where(experiments) + "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)


def _quality(row: dict, kind: str, name: str) -> float | None:
    return row["pseudo"].get(kind, {}).get(name)


def bands(axes: Axes, experiments, root, kind: str, value: Callable[[dict], float | None]) -> None:
    """One line a group of seeds over the steps that all its runs have; the legend names what was not run."""
    variants: dict[str, int] = {}
    for group in by_seed(experiments):
        look, label = style_of(group[0].method), label_of(group[0])
        number = variants[group[0].method] = variants.get(group[0].method, -1) + 1
        found = [rows for item in group if (rows := _rows(item, root, kind))]
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


@themed
def threshold_schedules(experiment: Experiment) -> Figure:
    """ComMatch's t_p and t_n over the epochs of an experiment's recipe (`commatch.thresholds`)."""
    recipe = resolve(experiment)
    if not isinstance(recipe.method, commatch.ComMatchSettings):
        return message("Moving thresholds", f"{label_of(experiment)} has none of ComMatch's kind")
    end = math.ceil(recipe.steps / recipe.epoch_steps)
    epochs = range(max(18, min(30, end)))
    positive, negative = zip(*(commatch.thresholds(recipe.method, epoch) for epoch in epochs), strict=True)
    figure = Drawing(figsize=(8, 2.8), layout="constrained")
    figure.suptitle(f"Moving thresholds of {label_of(experiment)}")
    left, right = figure.subplots(1, 2)
    left.step(epochs, positive, where="post", color=style.GREEN)
    left.set(xlabel="epoch", ylabel="$t_p$: least probability\nof a positive")
    right.step(epochs, negative, where="post", color=style.ORANGE)
    right.set(xlabel="epoch", ylabel="$t_n$: largest probability\nof a negative", yscale="log")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if end < len(epochs):
            axes.axvline(end, color=style.INK, linestyle=":", linewidth=1.2)
            axes.annotate("this run ends", (end, 0.92), xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", fontsize=8, color=style.INK)  # fmt: skip
    return figure


# Of the trained network


@themed
def reliability_diagrams(
    experiments: Sequence[Experiment], root: Path | None = None, bins: int = 15, resamples: int = 300
) -> Figure:
    """Test accuracy against confidence of each run: gap shaded, counts below, ECE in the title (ComMatch, Fig. 4).

    resamples: of the bootstrap interval of the ECE.
    """
    figure = Drawing(figsize=(min(3.5 * len(experiments) + 0.6, 13), 4.6), layout="constrained")
    how = f"EMA weights, {bins} bins (lo, hi], 95 % bootstrap intervals"
    figure.suptitle(f"Reliability on test images ({how})\n{setting(experiments)}")
    grid = figure.subplots(2, len(experiments), squeeze=False, sharex=True, height_ratios=(3.2, 1))
    for (diagram, counts), item in zip(grid.T, experiments, strict=True):
        diagram.set_title(f"{label_of(item)}, seed {item.seed}")
        if not is_finished(item, root):
            say(diagram, NOT_RUN)
            counts.set_axis_off()
            continue
        outputs = load_outputs(folder_of(item, root))
        probs, labels = outputs["test_logits"].double().softmax(dim=1), outputs["test_labels"]
        reliability_panel(diagram, counts, *calibration.top_label(probs, labels), bins, resamples)
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("images")
    return figure


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


@themed
def ece_against_instability(
    experiments: Sequence[Experiment], root: Path | None = None, resamples: int = 200
) -> Figure:
    """ECE of unlabelled images in tenths by instability, and how many have which (ComMatch, Fig. 5).

    Instability: deviation over the dropout passes at the argmax class. Tenths, since the ECEs of groups of equal
    count are alike in bias; hidden labels are for the report only. resamples: of the bootstrap intervals.
    """
    title = "Calibration against instability of unlabelled images"
    shown = []
    for item in experiments:
        outputs = load_outputs(folder_of(item, root)) if is_finished(item, root) else {}
        if "pool_passes" in outputs:
            shown.append((item, *top_of_passes(outputs["pool_passes"], outputs["pool_truth"])))
    if not shown:
        done = [item for item in experiments if is_finished(item, root)]
        return message(title, "these runs have no dropout passes") if done else _not_run(title, experiments)
    figure = Drawing(figsize=(8, 4.4), layout="constrained")
    figure.suptitle(f"{title}\n{where(item for item, *_ in shown)}")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for number, (item, spread, confidence, correct) in enumerate(shown):
        look, line = style_of(item.method), LINES[number % 4]
        centres, values, lows, highs = [], [], [], []
        for group in spread.argsort(stable=True).tensor_split(INSTABILITY_BINS):
            if len(group):
                pair = confidence[group], correct[group]
                low, high = calibration.bootstrap_interval(calibration.ece, *pair, resamples)
                ece = float(calibration.ece(*pair))
                centres, values = [*centres, float(spread[group].mean())], [*values, ece]
                lows, highs = [*lows, max(ece - low, 0)], [*highs, max(high - ece, 0)]
        correlation = instability_correlation(folder_of(item, root))
        label = (
            f"{label_of(item)}, seed {item.seed}: {len(spread):,} images, "
            f"Spearman correlation with the gap {correlation:+.2f}"
        )
        looks = {"color": look.colour, "linestyle": line, "marker": look.marker, "label": label}
        top.errorbar(centres, values, (lows, highs), capsize=2, elinewidth=1, **looks)
        bottom.hist(spread, bins=40, color=look.colour, histtype="step", linestyle=line, linewidth=1.4)
    top.set(ylabel="ECE, 15 bins (%)\n95 % bootstrap", ylim=(0, None))
    top.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    bottom.set(xlabel="instability: standard deviation over dropout passes at the argmax", ylabel="images")
    outside_legend(figure, top, columns=1)
    return figure


def top_of_passes(passes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Instability, confidence and correctness (n,) of the images whose truth is known.

    passes: (T, n, K), softmax of dropout passes; truth: (n,), -1 where unknown.
    """
    mean, deviation = commatch.instability(passes.double())
    confidence, label = mean.max(dim=1)
    known = truth >= 0
    return deviation.gather(1, label[:, None])[:, 0][known], confidence[known], (label == truth)[known]


# Of tables


@themed
def table_points(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema", column: Column | None = None, metrics: Sequence[str] = ("error", "ece_15"),
) -> Figure:  # fmt: skip
    """Rows of a table or an ablation as points: seeds, mean and deviation; the paper's own cell at the right.

    column: of the table at this scale, by default its first. rule, weights: as in `tables.compare`.
    """
    check_reporting(rule, weights)
    place = column or table.columns_at(scale)[0]
    cells = [table.cell(row, place, scale, seeds) for row in table.rows]
    figure = Drawing(figsize=(9.5, 0.42 * len(cells) + 1.9), layout="constrained")
    heading = f"{place.title}, {scale} scale, {RULES[rule]}, {WEIGHTS[weights]}"
    marks = f"small: seeds {', '.join(map(str, seeds))}; large: mean; bar: standard deviation"
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
        axes.set_yticklabels([row.label for row in table.rows])
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(metrics) < 3 else 4))
    _published_beside(grid[-1], table)
    return figure


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


def common_figures(paper: str, scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What every classification paper shows of its main job, its first table, and the ablations that have been run."""
    module = PAPERS[paper]
    experiments = module.main_experiments(scale, seeds)
    finished = [item for item in experiments if is_finished(item, root)]
    drawn = []
    if finished:
        first = [item for item in finished if item.seed == finished[0].seed]
        drawn += [
            ("accuracy", "Accuracy and ECE over training", accuracy_curves(experiments, root)),
            ("pseudo_labels", "Pseudo-labels over training", pseudo_label_quality(experiments, root)),
            ("reliability", "Reliability", reliability_diagrams(first, root)),
        ]
    return drawn + table_figures(paper, scale, seeds, root)


def table_figures(paper: str, scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """A paper's first table where its main job runs, and the ablations of which two rows or more have been run."""
    module = PAPERS[paper]
    experiments = module.main_experiments(scale, seeds)
    table, column = next(iter(module.TABLES.values())), place(experiments[0])
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


def commatch_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """ComMatch's Figs. 2 to 5 and its thresholds, then the common ones."""
    whole = [item for item in PAPERS["commatch"].main_experiments(scale, seeds) if item.method == "commatch"]
    done = [item for item in whole if is_finished(item, root)]
    drawn = [("thresholds", "Moving thresholds", threshold_schedules(whole[0]))]
    if done:
        drawn += [
            ("loss", "Loss terms over training (Fig. 2a)", loss_curves(done[0], root)),
            ("instability", "ECE against instability (Fig. 5)", ece_against_instability(done, root)),
        ]
    return drawn + common_figures("commatch", scale, seeds, root)


__all__ = ["accuracy_curves", "ece_against_instability", "loss_curves", "message", "pseudo_label_quality",
           "reliability_diagrams", "save", "table_points", "threshold_schedules"]  # fmt: skip
