"""CSL's further figures: predicted masks, IoU, pixel calibration, and which pixels are learned from over training.

Drawn from saved results only and under the conventions of `figures`; `plane` draws the confidence plane.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from figures import style
from figures.claims import statistic
from figures.common import (
    Drawn,
    banded,
    bands,
    filled,
    loss_curves,
    not_shown,
    outside_legend,
    reported,
    table_figures,
)
from figures.plane import class_colours, class_legend, classes_of, confidence_plane, tile, unavailable, weight_maps
from figures.style import Drawing, by_seed, label_of, message, say, style_of, themed, where
from figures.tables import NOT_RUN, RULES, WEIGHTS, check_reporting, summarise
from repro.experiment import Experiment
from repro.grid import PAPERS, Table
from repro.measure.metrics import METRICS
from repro.runs import folder_of, is_finished, load_history, load_outputs
from repro.settings import SettingError

MEASURED = ("miou", "ece_15")
LEAST = 1e-3  # mean weight of a range whose accuracy is shown
HATCHED = {"facecolor": "#f6ddd0", "edgecolor": style.RED, "hatch": "////"}


# Of the trained network


@themed
def qualitative_masks(experiments: Sequence[Experiment], root: Path | None = None, images: int = 6) -> Figure:
    """Test images with their truth and the prediction of each finished run; mIoU over all test images above.

    experiments: of one data set and scale, the seeds of a method apart. images: how many, from the first.
    Raises SettingError for runs that were tested on different images.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    if not done:
        return unavailable("Predicted masks", experiments, root)
    first = next(iter(done.values()))
    if not all(torch.equal(kept["test_images"], first["test_images"]) for kept in done.values()):
        raise SettingError("these runs were tested on different images; show runs of one data set and scale together")
    shown, names = min(images, len(first["test_truth"])), classes_of(experiments[0].data)
    rest = not_shown(experiments, done)
    width, (high, wide) = min(10, 1.9 * (len(done) + 2)), first["test_truth"].shape[1:]
    height = (width / (len(done) + 2) * high / wide + 0.03) * shown + 1.1 + 0.2 * (rest != "")
    figure = Drawing(figsize=(width, height), layout="constrained")
    figure.suptitle(f"Masks of {shown} test images; above: mIoU over the whole test set\n{where(done)}{rest}")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0)
    grid = figure.subplots(shown, len(done) + 2, squeeze=False)
    colours = class_colours(len(names))
    maps = [first["test_truth"], *(kept["test_prediction"] for kept in done.values())]
    several = len({item.seed for item in done}) > 1
    heads = ["image", "truth"]
    for item in done:
        seed = f", seed {item.seed}" * several
        heads += [f"{label_of(item)}{seed}\n{100 * statistic(item, 'miou', root, 'last', 'ema'):.1f} %"]
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    for index, row in enumerate(grid):
        tile(row[0], first["test_images"][index].permute(1, 2, 0).numpy())
        for axes, labels in zip(row[1:], maps, strict=True):
            tile(axes, colours[labels[index].numpy()])
    class_legend(figure, names, [labels[:shown] for labels in maps])
    return figure


# Over training


@themed
def training_curves(
    experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema", metrics: Sequence[str] = MEASURED
) -> Figure:
    """Metrics of test images over the steps; line: mean, band: smallest to largest. metrics: names in METRICS."""
    check_reporting("last", weights)
    figure = Drawing(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"Test images over training ({WEIGHTS[weights]})\n{banded(experiments)}")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for name, axes in zip(metrics, panels, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, name=name: row[weights][name])
        axes.set(xlabel="training step", ylabel=_titled(name))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, panels[0])
    return figure


def _titled(metric: str) -> str:
    return f"{'pixel ' * (metric == 'ece_15')}{METRICS[metric].title}"


@themed
def selection_over_training(experiments: Sequence[Experiment], root: Path | None = None) -> Figure:
    """Weight and accuracy of pseudo-labels over the steps, and the wrong pixels that are learned from.

    Measured against hidden masks; gaps in a line: nothing had weight.
    """
    title = "Pseudo-labels of pixels over training, against hidden masks"
    if not any(_pixels(row) for item in experiments for row in _trained(item, root)):
        return unavailable(title, experiments, root)
    figure = Drawing(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"{title}\n{banded(experiments)}")
    panels = figure.subplots(1, 3)
    values = {
        "coverage: mean weight (%)": lambda row: _pixels(row).get("coverage"),
        "weighted accuracy (%)": lambda row: _pixels(row).get("accuracy"),
        "wrong and kept (% of all pixels)": _wrong,
    }
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        bands(axes, experiments, root, "train", value)
        axes.set(xlabel="training step", ylabel=name)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, panels[0])
    return figure


def _trained(experiment: Experiment, root: Path | None) -> list[dict]:
    return load_history(folder_of(experiment, root)).of("train")


def _pixels(row: dict) -> dict:
    """What a row says of pseudo-labels of pixels; {} of a method that has none."""
    return row["pseudo"].get("pixels", {})


def _wrong(row: dict) -> float | None:
    found = _pixels(row)
    return found["coverage"] * (1 - (found["accuracy"] or 0)) if found else None


@themed
def selection_by_confidence(experiments: Sequence[Experiment], root: Path | None = None) -> Figure:
    """Weight and accuracy in ranges of confidence: at the end of training, and over it as maps. A column a method.

    Means over seeds; hatched: no pixel, or too little weight for an accuracy. Ranges (lo, hi] are drawn equally wide.
    """
    title = "Which pixels are learned from, by confidence, against hidden masks"
    groups = [(group, _ranges(group, root)) for group in by_seed(experiments)]
    groups = [(group, found) for group, found in groups if found]
    if not groups:
        return unavailable(title, experiments, root)
    figure = Drawing(figsize=(max(3.1 * len(groups) + 0.9, 8), 7.4), layout="constrained")
    kept = [item for group, _ in groups for item in group]
    done = [item for item in experiments if is_finished(item, root)]
    rest = not_shown(done, kept, "without pseudo-labels") + not_shown(experiments, [*done, *kept])
    figure.suptitle(f"{title}\n{where(kept)}\nmeans over seeds; hatched: mean weight below {100 * LEAST:g} %{rest}")
    grid = figure.subplots(3, len(groups), squeeze=False, sharex=True, height_ratios=(1.25, 1, 1))
    for (end, covered, right), (group, found) in zip(grid.T, groups, strict=True):
        end.set_title(f"{label_of(group[0])} (n = {found['n']})")
        at = np.arange(len(found["edges"]) - 1) + 0.5
        end.bar(at, found["share"][-1], width=1, color="0.88", edgecolor="white", label="share of all pixels")
        end.plot(at, found["coverage"][-1], color=style.GREEN, marker="s", label="mean weight")
        end.plot(at, found["all_accuracy"][-1], color="0.35", linestyle="--", marker=".", label="accuracy of all")
        end.plot(at, found["accuracy"][-1], color=style.BLUE, marker="o", label="weighted accuracy")
        end.set(ylim=(-0.03, 1.03))
        end.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
        end.grid(axis="x", visible=False)
        for axes, name in ((covered, "coverage"), (right, "accuracy")):
            axes.set_facecolor("white")
            axes.patch.set(hatch="////", edgecolor="0.8")
            axes.grid(False)
            drawn = axes.pcolormesh(*found["mesh"], found[name], cmap="viridis", vmin=0, vmax=1)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if axes in grid[:, -1]:
                words = "mean weight (%)" if name == "coverage" else "weighted accuracy (%)"
                bar = figure.colorbar(drawn, ax=axes, label=words)
                bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
        right.set_xticks(range(len(found["edges"])), [f"{100 * edge:g}" for edge in found["edges"]], fontsize=8)
        right.set_xlabel("confidence (%), ranges (lo, hi]")
    for axes, name in zip(grid[:, 0], ("end of training (%)", "training step", "training step"), strict=True):
        axes.set_ylabel(name)
    outside_legend(figure, grid[0, 0])
    return figure


def _ranges(group: Sequence[Experiment], root: Path | None) -> dict | None:
    """Means over seeds of what the steps that all runs have say by range, (steps, E); None where nothing is said."""
    runs = [{row["step"]: _pixels(row)["ranges"] for row in _trained(item, root) if _pixels(row)} for item in group]
    runs = [run for run in runs if run]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return None
    found: dict[str, Any] = {"n": len(runs), "edges": runs[0][steps[0]]["edges"]}
    for name in ("share", "coverage", "accuracy", "all_accuracy"):
        values = np.array([[run[step][name] for step in steps] for run in runs], dtype=float)  # None is NaN
        count = np.isfinite(values).sum(axis=0)
        found[name] = np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), math.nan)
    found["accuracy"][~(found["coverage"] >= LEAST)] = math.nan  # of a pixel or two on the threshold
    found["mesh"] = np.arange(len(found["edges"])), np.array([0, *steps])
    return found


@themed
def pixel_reliability(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """Accuracy against confidence of test pixels, bins as stored; bars: all seeds together, dots: each seed.

    No intervals: the pixels of an image are not independent, so resampling them would promise too much.
    """
    check_reporting(rule, weights)
    groups = by_seed(experiments)
    figure = Drawing(figsize=(max(min(2.55 * len(groups) + 0.8, 10.4), 6), 4.9), layout="constrained")
    how = f"{RULES[rule]}, {WEIGHTS[weights]}, bins (lo, hi]"
    note = "dots: seeds; no bootstrap, since pixels are not independent"
    figure.suptitle(f"Reliability of test pixels, {how}\n{where(experiments)}\n{note}")
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row", height_ratios=(3.2, 1))
    for (diagram, shares), group in zip(grid.T, groups, strict=True):
        diagram.set_title(label_of(group[0]))
        done = [item for item in group if is_finished(item, root)]
        if not done:
            say(diagram, NOT_RUN)
            shares.set_axis_off()
            continue
        _reliability_panel(diagram, shares, [reported(item, root, rule, weights) for item in done])
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("pixels (%)")
    handles = [Patch(color=style.BLUE, label="accuracy"), Patch(label="gap to mean confidence", **HATCHED),
               Line2D([], [], color=style.INK, linestyle="--", linewidth=1, label="perfect")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _reliability_panel(diagram: Axes, shares: Axes, runs: Sequence[dict]) -> None:
    """Bins of several runs, their pixels put together, over the share of pixels in each."""
    count, confidence, accuracy = (
        np.array([run["reliability"][name] for run in runs], dtype=float)
        for name in ("count", "confidence", "accuracy")
    )
    total, bins = count.sum(axis=0), count.shape[1]
    sure, right = (np.nansum(count * part, axis=0) / np.maximum(total, 1) for part in (confidence, accuracy))
    left, bar = np.arange(bins) / bins, {"width": 1 / bins, "align": "edge", "linewidth": 0.6}
    diagram.bar(left, right, color=style.BLUE, edgecolor="white", **bar)
    diagram.bar(left, sure - right, bottom=right, **HATCHED, **bar)
    filled = total > 0
    diagram.hlines(right[filled], left[filled], left[filled] + 1 / bins, color=style.BLUE, linewidth=2.5)
    diagram.plot([0, 1], [0, 1], color=style.INK, linestyle="--", linewidth=1)
    for run in accuracy if len(runs) > 1 else ():
        diagram.plot(left + 0.5 / bins, run, ".", color=style.INK, markersize=3.5, alpha=0.7)
    ece = summarise(run["ece_15"] for run in runs)
    spread = "" if ece.sd is None else f" ± {100 * ece.sd:.1f}"
    numbers = f"ECE {100 * ece.mean:.1f}{spread} %, {bins} bins\n{total.sum():,.0f} pixels, n = {len(runs)}"
    diagram.set_title(f"{diagram.get_title()}\n{numbers}", fontsize=9.5)
    diagram.set(xlim=(0, 1), ylim=(0, 1.02))
    diagram.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    shares.bar(left, total / total.sum(), color=style.GREY, edgecolor="white", **bar)
    for x, share in zip(left, total / total.sum(), strict=True):
        if share:
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            shares.annotate(text, (x + 0.5 / bins, share), ha="center", va="bottom", fontsize=6, color=style.INK)
    shares.set(xlabel="confidence (%)", ylim=(0, 1.15))
    for axis in (shares.xaxis, shares.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=None))


@themed
def per_class_iou(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """IoU of each class on the test images by method: large: mean over seeds, line: deviation, small: seeds."""
    check_reporting(rule, weights)
    groups, names = by_seed(experiments), [*classes_of(experiments[0].data), "mean"]
    title = f"IoU by class, {RULES[rule]}, {WEIGHTS[weights]}; large: mean, line: standard deviation, small: seeds"
    if not any(is_finished(item, root) for item in experiments):
        return unavailable(title, experiments, root)
    high = min(0.13 * len(groups) + 0.12, 0.55) if len(names) < 12 else 0.3
    figure = Drawing(figsize=(9, high * len(names) + 1.7), layout="constrained")
    figure.suptitle(f"{title}\n{where(experiments)}")
    axes = figure.subplots()
    for number, group in enumerate(groups):
        reports = [reported(item, root, rule, weights) for item in group if is_finished(item, root)]
        found = [[*run["iou"], run["miou"]] for run in reports]
        at = np.arange(len(names)) + 0.76 * ((number + 0.5) / len(groups) - 0.5)
        n = "" if len(found) == len(group) else f" (n = {len(found)})" if found else f" ({NOT_RUN})"
        again = any(group[0].method == other[0].method for other in groups[:number])
        look = {"color": style_of(group[0].method).colour, "marker": style_of(group[0].method).marker}
        look |= {"markerfacecolor": "white" if again else None, "label": label_of(group[0]) + n}
        _points(axes, at, np.array(found, dtype=float).reshape(-1, len(names)), look)
    axes.set(xlabel="IoU (%)", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    for y in np.arange(len(names) - 1) + 0.5:
        axes.axhline(y, color="0.9" if y < len(names) - 2 else "0.5", linewidth=1)
    outside_legend(figure, axes)
    return figure


def _points(axes: Axes, at: np.ndarray, found: np.ndarray, look: dict) -> None:
    """Means of fractions (n, values) with their deviation in percent, seeds behind."""
    stated = [summarise(column) for column in found.T]
    mean = [math.nan if one.mean is None else 100 * one.mean for one in stated]
    deviation = [100 * (one.sd or 0) for one in stated]
    axes.errorbar(mean, at, xerr=deviation, linestyle="", markersize=6, elinewidth=1, capsize=2, **look)
    for run in found if len(found) > 1 else ():
        axes.plot(100 * run, at, ".", color=look["color"], markersize=4, alpha=0.5)


# Of tables


@themed
def miou_by_budget(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema", metrics: Sequence[str] = MEASURED,
) -> Figure:  # fmt: skip
    """mIoU and pixel ECE of each row of a table by number of masks: bar: mean, line: deviation, dots: seeds, n above.

    Ours only: a published number has another network, data set or scale. Columns without a finished run are left out,
    rows without one are named. rule, weights: as in `tables.compare`.
    """
    check_reporting(rule, weights)
    columns = table.columns_at(scale)
    cells = {
        (row.label, column): [item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)]
        for row in table.rows
        for column in columns
    }
    rows = [row for row in table.rows if any(cells[row.label, column] for column in columns)]
    columns = [column for column in columns if any(cells[row.label, column] for row in rows)]
    missing = ", ".join(row.label for row in table.rows if row not in rows)
    title = f"mIoU and pixel calibration by number of masks\n{scale} scale, {RULES[rule]}, {WEIGHTS[weights]}, " \
            f"seeds {', '.join(map(str, seeds))}; line: standard deviation, above: n"  # fmt: skip
    if not rows:
        return message(title, f"{NOT_RUN}: {missing}")
    figure = Drawing(figsize=(9.5, 2.3 * len(metrics) + 1.5), layout="constrained")
    figure.suptitle(title + f"\n{NOT_RUN}: {missing}" * (missing != ""))
    width, methods = 0.8 / len(rows), [row.method for row in rows]
    panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for name, axes in zip(metrics, panels, strict=True):
        for number, row in enumerate(rows):
            for place, column in enumerate(columns):
                values = [statistic(item, name, root, rule, weights) for item in cells[row.label, column]]
                x = place + (number + 0.5 - len(rows) / 2) * width
                look = {"color": style_of(row.method).colour, "hatch": "///" * (row.method in methods[:number])}
                _bar(axes, x, width, values, row.label if place == 0 else None, look)
        axes.set(ylabel=_titled(name), ylim=(0, 1.06 * axes.get_ylim()[1]))
        axes.set_xticks(range(len(columns)), [column.title for column in columns])
        axes.grid(axis="x", visible=False)
    outside_legend(figure, panels[0])
    return figure


def _bar(axes: Axes, x: float, width: float, values: Sequence[float], label: str | None, look: dict) -> None:
    """Fractions of seeds as their mean in percent, with deviation and n."""
    found, percent = summarise(values), 100 * np.array(values)
    axes.bar(x, 100 * (found.mean or 0), 0.92 * width, edgecolor="white", label=label, **look)
    if not found.n:
        axes.annotate(NOT_RUN, (x, 0), (0, 4), textcoords="offset points", ha="center", rotation=90, fontsize=7.5,
                      color="0.45")  # fmt: skip
        return
    axes.plot([x] * len(values), percent, ".", color=style.INK, markersize=4, alpha=0.6)
    if found.sd is not None:
        axes.errorbar(x, 100 * found.mean, 100 * found.sd, color=style.INK, capsize=2, linewidth=1)
    top = max(np.nanmax(percent), 100 * (found.mean + (found.sd or 0)))
    axes.annotate(f"{found.n}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5, color="0.35")


# The report's


def csl_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What the finished runs can draw, as `plots.commatch_figures`."""
    module = PAPERS["csl"]
    experiments = module.main_experiments(scale, seeds)
    finished = [item for item in experiments if is_finished(item, root)]
    table = next(iter(module.TABLES.values()))
    drawn: Drawn = []
    for item in [item for item in finished if item.method == "csl"][:1]:
        drawn += [
            ("plane", "The confidence plane of one image (Fig. 1)", confidence_plane(item, root)),
            ("plane_all", "The confidence plane of all kept images", confidence_plane(item, root, "all")),
            ("weights", "Pseudo-labels and their weights", weight_maps(item, root)),
            ("loss", "Loss terms over training", loss_curves(item, root)),
        ]
    if finished:
        first = [item for item in experiments if item.seed == finished[0].seed]
        drawn += [
            ("masks", "Masks of test images", qualitative_masks(first, root)),
            ("curves", "mIoU and pixel ECE over training", training_curves(experiments, root)),
            ("selection", "Pseudo-labels over training", selection_over_training(experiments, root)),
            ("ranges", "Pseudo-labels by confidence", selection_by_confidence(experiments, root)),
            ("reliability", "Reliability of test pixels", pixel_reliability(experiments, root)),
            ("classes", "IoU by class", per_class_iou(experiments, root)),
        ]
    if sum(filled(table, column, scale, seeds, root) > 0 for column in table.columns_at(scale)) > 1:
        drawn += [("budgets", "mIoU by number of masks", miou_by_budget(table, scale, seeds, root))]
    return drawn + table_figures("csl", scale, seeds, root)


__all__ = ["confidence_plane", "csl_figures", "miou_by_budget", "per_class_iou", "pixel_reliability",
           "qualitative_masks", "selection_by_confidence", "selection_over_training", "training_curves",
           "weight_maps"]  # fmt: skip
