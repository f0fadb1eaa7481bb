"""CSL's further figures: predicted masks, IoU, pixel calibration, and which pixels are learned from over training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import common, style
from figures.common import Drawn
from figures.plane import confidence_plane, weight_maps
from figures.style import Root, Runs, by_seed, label_of, start, themed, where
from figures.tables import NOT_RUN, summarise
from repro.experiment import Experiment
from repro.grid import PAPERS, Table
from repro.measure.metrics import METRICS
from repro.runs import folder_of, is_finished, load_outputs

MEASURED = ("miou", "ece_15")
LEAST = 1e-3  # mean weight of a range whose accuracy is drawn


# Of the trained network


@themed
def qualitative_masks(experiments: Runs, root: Root = None, images: int = 6) -> Figure:
    """Test images with their truth and the prediction of each finished run; mIoU over all test images above.

    experiments: of one data set and scale, the seeds of a method apart. images: how many, from the first.
    Raises SettingError for runs that were tested on different images.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    if not done:
        return common.unavailable("Predicted masks", experiments, root)
    common.check_alike(done.values(), "test_images", "been tested on different images")
    first, names = next(iter(done.values())), common.classes_of(experiments[0].data)
    maps = [first["test_truth"], *(kept["test_prediction"] for kept in done.values())]
    maps, colours = [labels[:images] for labels in maps], common.class_colours(len(names))
    rows = [[common.picture(first["test_images"][index]), *(colours[labels[index]] for labels in maps)]
            for index in range(len(maps[0]))]  # fmt: skip
    title = f"Masks of {len(rows)} test images; above: mIoU over the whole test set"
    heads = ["image", "truth", *common.heads_of(done, root, "miou")]
    return common.image_grid(title, [where(done), common.absent(experiments, done)], heads, rows, names, maps)[0]


def per_class_iou(experiments: Runs, root: Root = None, rule: str = "last", weights: str = "ema") -> Figure:
    """IoU of each class on the test images by method, and their mean."""
    names = [*common.classes_of(experiments[0].data), "mean"]
    panels = {"IoU (%)": lambda run: [*run["iou"], run["miou"]]}
    return common.class_bars("IoU by class", names, panels, experiments, root, rule, weights)


def pixel_reliability(experiments: Runs, root: Root = None, rule: str = "last", weights: str = "ema") -> Figure:
    """Accuracy against confidence of test pixels, bins as stored; bars: all seeds together, dots: each seed.

    No intervals: the pixels of an image are not independent, so resampling them would promise too much.
    """
    title = f"Reliability of test pixels, {common.reporting(rule, weights)}, bins (lo, hi]"
    panels = []
    for group in by_seed(experiments):
        panels.append({"title": label_of(group[0]), "why": NOT_RUN})
        runs = [common.reported(item, root, rule, weights) for item in group if is_finished(item, root)]
        if runs:
            count, confidence, accuracy = (np.array([run["reliability"][name] for run in runs], dtype=float)
                                           for name in ("count", "confidence", "accuracy"))  # fmt: skip
            total = count.sum(axis=0)
            right, sure = (np.nansum(count * part, axis=0) / np.maximum(total, 1) for part in (accuracy, confidence))
            ece = summarise(run["ece_15"] for run in runs)
            spread = "" if ece.sd is None else f" ± {100 * ece.sd:.1f}"
            pixels = f"{total.sum():,.0f} pixels, n = {len(runs)}"
            numbers = f"ECE {100 * ece.mean:.1f}{spread} %, {len(total)} bins\n{pixels}"
            panels[-1] |= {"bins": (right, sure, total), "runs": accuracy, "numbers": numbers}
    captions = [where(experiments), "dots: seeds; no bootstrap, since pixels are not independent"]
    return common.reliability_figure(title, captions, [panels], "pixels")


def miou_by_budget(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Root = None, rule: str = "last",
    weights: str = "ema", metrics: Sequence[str] = MEASURED,
) -> Figure:  # fmt: skip
    """mIoU and pixel ECE of each row of a table by number of masks, as `common.table_bars`."""
    title = "mIoU and pixel calibration by number of masks"
    return common.table_bars(title, table, scale, seeds, root, rule, weights, metrics)


# Over training


def training_curves(
    experiments: Runs, root: Root = None, weights: str = "ema", metrics: Sequence[str] = MEASURED
) -> Figure:
    """Metrics of test images over the steps. metrics: names in METRICS."""
    panels = {f"{'pixel ' * (name == 'ece_15')}{METRICS[name].title}": name for name in metrics}
    return common.over_training("Test images over training", experiments, root, panels, weights)


def _pixels(row: dict) -> dict:
    """A history row's numbers of pseudo-labels of pixels; {} of a method that has none."""
    return row["pseudo"].get("pixels", {})


def selection_over_training(experiments: Runs, root: Root = None) -> Figure:
    """Weight and accuracy of pseudo-labels over the steps, and the wrong pixels that are learned from.

    Measured against hidden masks; gaps in a line: nothing had weight.
    """
    title = "Pseudo-labels of pixels over training, against hidden masks"
    if not any(_pixels(row) for item in experiments for row in common.rows_of(item, root, "train")):
        return common.unavailable(title, experiments, root)

    def wrong(row: dict) -> float | None:
        found = _pixels(row)
        return found["coverage"] * (1 - (found["accuracy"] or 0)) if found else None

    panels = {
        "coverage: mean weight (%)": lambda row: _pixels(row).get("coverage"),
        "weighted accuracy (%)": lambda row: _pixels(row).get("accuracy"),
        "wrong and kept (%) of all pixels": wrong,
    }
    return common.over_training(title, experiments, root, panels)


@themed
def selection_by_confidence(experiments: Runs, root: Root = None) -> Figure:
    """Weight and accuracy in ranges of confidence: at the end of training, and over it as maps. A column a method.

    Means over seeds; hatched: no pixel, or too little weight for an accuracy. Ranges (lo, hi] are drawn equally wide.
    """
    title = "Which pixels are learned from, by confidence, against hidden masks"
    groups = [(group, found) for group in by_seed(experiments) if (found := _ranges(group, root))]
    if not groups:
        return common.unavailable(title, experiments, root)
    kept = [item for group, _ in groups for item in group]
    done = [item for item in experiments if is_finished(item, root)]
    captions = [where(kept), f"means over seeds; hatched: mean weight below {100 * LEAST:g} %",
                common.absent(done, kept, "without pseudo-labels"),
                common.absent(experiments, [*done, *kept])]  # fmt: skip
    size = (max(3.1 * len(groups) + 0.9, 8), 7.4)
    figure, grid = start(title, captions, size, 3, len(groups), sharex=True, height_ratios=(1.25, 1, 1))
    for (end, *maps), (group, found) in zip(grid.T, groups, strict=True):
        end.set_title(f"{label_of(group[0])} (n = {found['n']})")
        at = np.arange(len(found["edges"]) - 1) + 0.5
        end.bar(at, found["share"][-1], width=1, color="0.88", edgecolor="white", label="share of all pixels")
        common.curve(end, at, found["coverage"][-1], "mean weight", style.GREEN, "s")
        common.curve(end, at, found["all_accuracy"][-1], "accuracy of all", "0.35", ".", linestyle="--")
        common.curve(end, at, found["accuracy"][-1], "weighted accuracy", style.BLUE, "o")
        end.set(ylim=(-0.03, 1.03))
        common.percent(end.yaxis)
        end.grid(axis="x", visible=False)
        for axes, (name, words) in zip(maps, {"coverage": "mean weight", "accuracy": "weighted accuracy"}.items(),
                                       strict=True):  # fmt: skip
            axes.patch.set(hatch="////", edgecolor="0.8")
            axes.grid(False)
            drawn = axes.pcolormesh(*found["mesh"], found[name], cmap="viridis", vmin=0, vmax=1)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if axes in grid[:, -1]:
                common.percent(figure.colorbar(drawn, ax=axes, label=f"{words} (%)").ax.yaxis)
        axes.set_xticks(range(len(found["edges"])), [f"{100 * edge:g}" for edge in found["edges"]], fontsize=8)
        axes.set_xlabel("confidence (%), ranges (lo, hi]")
    for axes, name in zip(grid[:, 0], ("end of training (%)", "training step", "training step"), strict=True):
        axes.set_ylabel(name)
    common.outside_legend(figure, grid[0, 0])
    return figure


def _ranges(group: Sequence[Experiment], root: Root) -> dict | None:
    """Means over seeds by step and range (steps, E), at the steps that all runs have; None without pseudo-labels."""
    runs = [{row["step"]: _pixels(row)["ranges"] for row in common.rows_of(item, root, "train") if _pixels(row)}
            for item in group]  # fmt: skip
    runs = [run for run in runs if run]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if not steps:
        return None
    found: dict[str, Any] = {"n": len(runs), "edges": runs[0][steps[0]]["edges"]}
    for name in ("share", "coverage", "accuracy", "all_accuracy"):
        found[name] = common.mean_of(np.array([[run[step][name] for step in steps] for run in runs], dtype=float))
    found["accuracy"][~(found["coverage"] >= LEAST)] = np.nan  # of a pixel or two on the threshold
    found["mesh"] = np.arange(len(found["edges"])), np.array([0, *steps])
    return found


# The report's


def csl_figures(scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """As `labels.commatch_figures`."""
    module = PAPERS["csl"]
    experiments = module.main_experiments(scale, seeds)
    finished = [item for item in experiments if is_finished(item, root)]
    table = next(iter(module.tables.values()))
    drawn: Drawn = []
    for item in [item for item in finished if item.method == "csl"][:1]:
        drawn += [
            ("plane", "The confidence plane of one image (Fig. 1)", confidence_plane(item, root)),
            ("plane_all", "The confidence plane of all kept images", confidence_plane(item, root, "all")),
            ("weights", "Pseudo-labels and their weights", weight_maps(item, root)),
            ("loss", "Loss terms over training", common.loss_curves(item, root)),
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
    if sum(common.filled(table, column, scale, seeds, root) > 0 for column in table.columns_at(scale)) > 1:
        drawn += [("budgets", "mIoU by number of masks", miou_by_budget(table, scale, seeds, root))]
    return drawn + common.table_figures("csl", scale, seeds, root)
