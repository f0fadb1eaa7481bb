"""CSL's figures: the confidence plane and its weights, masks, selection of pixels, IoU and pixel calibration.

Drawn from saved results only and under the conventions of `repro.plots`. Hidden masks of the pool are for these
figures alone; no method sees them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from repro import style
from repro.claims import statistic
from repro.data.masks import IGNORE, palette
from repro.data.masks_sources import MASK_SOURCES
from repro.data.scenes import DEFAULT
from repro.experiment import Experiment
from repro.grids import Column, Table
from repro.methods.few_masks.separation import pixel_weights, reliable_statistics, separate
from repro.papers import PAPERS
from repro.plots import Drawn, bands, loss_curves, outside_legend, table_points
from repro.runs import folder_of, is_finished, load_history, load_metrics, load_moments, load_outputs
from repro.settings import SettingError
from repro.style import Drawing, by_seed, label_of, message, say, setting, style_of, themed, where
from repro.tables import METRICS, NOT_RUN, RULES, WEIGHTS, check_reporting, summarise

RIGHT, WRONG = style.BLUE, style.RED
UNSURE, CERTAIN, SMALLEST = 0.2, 1 - 1e-6, 1e-14  # what lies beyond is drawn on the frame: confidence, residual variance
SHOWN = 40_000  # pixels that a scatter shows at most
LEVELS = (0.25, 0.5, 0.75)  # of the weight
FOREGROUND = (style.SKY, style.YELLOW, style.GREEN, style.RED, style.PINK, style.BLUE, style.ORANGE, style.PURPLE,
              style.BROWN)  # fmt: skip
MEASURED = ("miou", "ece_15")


# What a run keeps


@dataclass(frozen=True, eq=False)
class Moment:
    """How the network of a run saw the kept images of the pool at one evaluation.

    step: of training. images: (P, 3, H, W) uint8. truth: (P, H, W) uint8, 255 unknown; hidden from the method.
    confidence: (P, H, W) in (0, 1]. residual: (P, H, W), residual variance, >= 0. label: (P, H, W) uint8, argmax.
    """

    step: int
    images: Tensor
    truth: Tensor
    confidence: Tensor
    residual: Tensor
    label: Tensor

    @property
    def known(self) -> Tensor:
        """Pixels whose true class is known (P, H, W)."""
        return self.truth != IGNORE

    @property
    def right(self) -> Tensor:
        """Pixels whose label is the true class (P, H, W)."""
        return self.label == self.truth

    def only(self, image: int) -> "Moment":
        """One image, counted as in a sequence. Raises SettingError where there is none."""
        count = len(self.truth)
        if not -count <= image < count:
            raise SettingError(f"image is {image}; the run keeps {count} images, 0 to {count - 1}, or 'all'")
        return Moment(self.step, *(part[image : image % count + 1] for part in list(vars(self).values())[1:]))

    def reliable(self):
        """`separation.Reliable` of each image: mean and variance of both features in the reliable cluster."""
        valid = torch.ones_like(self.known)
        cluster = separate(self.confidence, self.residual, valid)
        return reliable_statistics(self.confidence, self.residual, cluster, valid)

    def weight(self, **rule: Any) -> Tensor:
        """CSL's weight (P, H, W), each image by its own split. rule: of `separation.pixel_weights`."""
        valid = torch.ones_like(self.known)
        return pixel_weights(self.confidence, self.residual, valid, self.reliable(), **rule)

    def chosen(self, weight: Tensor) -> str:
        """`keeps 81.2 %, 97.0 % of them right`, over pixels of known truth; weights between 0 and 1 count as parts."""
        share, accuracy = selection(weight, self.right, self.known)
        return f"keeps {100 * share:.1f} %" + (f", {100 * accuracy:.1f} % right" if share else "")


def read_moment(experiment: Experiment, root: Path | None = None, moment: int = -1) -> Moment | None:
    """An evaluation of a finished run, counted as in a sequence; None where the run keeps none.

    Raises SettingError for a moment that is not there.
    """
    folder = folder_of(experiment, root)
    kept = list(load_moments(folder).items())
    if not kept:
        return None
    if not -len(kept) <= moment < len(kept):
        raise SettingError(f"moment is {moment}; the run keeps {len(kept)} evaluations, 0 to {len(kept) - 1}")
    outputs, (step, seen) = load_outputs(folder), kept[moment]
    features = (seen[name] for name in ("confidence", "residual", "label"))
    return Moment(step, outputs["pool_images"], outputs["pool_truth"], *features)


def selection(weight: Tensor, right: Tensor, known: Tensor) -> tuple[float, float]:
    """Mean weight of the pixels whose truth is known, and their weighted accuracy; NaN where nothing has weight.

    weight: in [0, 1]; right, known: bool; all of one shape.
    """
    weight, right = weight[known].double(), right[known].double()
    total = float(weight.sum())
    share = total / weight.numel() if weight.numel() else math.nan
    return share, float((weight * right).sum()) / total if total else math.nan


def classes_of(data: str) -> tuple[str, ...]:
    """Names of the classes of a data set, index = class."""
    return ("background", *DEFAULT) if data == "scenes" else MASK_SOURCES[data].classes


def class_colours(classes: int) -> np.ndarray:
    """(256, 3) in 0..1: VOC's colours, or ones that the colour-blind tell apart where they suffice; 255 is cream."""
    colours = palette(classes) / 255
    if classes <= len(FOREGROUND) + 1:
        colours[:classes] = [(0.12,) * 3, *FOREGROUND[: classes - 1]]
    return colours


# The confidence plane


@themed
def confidence_plane(
    experiment: Experiment, root: Path | None = None, image: int | str = 0, moment: int = -1, threshold: float = 0.95,
    alpha: float = 8.0, rule: str = "or", features: str = "both",
) -> Figure:  # fmt: skip
    """Pixels by confidence and residual variance, right and wrong, what a threshold keeps and what CSL (CSL, Fig. 1).

    image: one of the kept images of the pool, or "all", each with a boundary of its own. moment: of the evaluations,
    counted as in a sequence. threshold: kept from there on. alpha, rule, features: of `separation.pixel_weights`.
    Confidence is spaced by log10(1 - c), residual variance by its logarithm; what lies beyond is on the frame.
    Raises SettingError for an image or a moment that is not there.
    """
    found = read_moment(experiment, root, moment) if is_finished(experiment, root) else None
    if found is None:
        return _nothing("The confidence plane", [experiment], root)
    if image != "all":
        found = found.only(image)
    named = "all kept images" if image == "all" else f"image {image}"
    title = f"The confidence plane of {label_of(experiment)}: {named} of the pool at step {found.step}"
    how = {"alpha": alpha, "rule": rule, "features": features}
    weight, known = found.weight(**how), found.known
    figure = Drawing(figsize=(9.5, 6.6), layout="constrained")
    figure.suptitle(f"{title}\n{where([experiment])}; {int(known.sum()):,} pixels, {len(known)} image"
                    f"{'s'[: len(known) > 1]}")  # fmt: skip
    top, empty, plane, side = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(1, 4)).flat
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    empty.set_axis_off()
    confidence = found.confidence[known].double().clamp(UNSURE, CERTAIN).numpy()
    residual, right = found.residual[known].double().clamp(min=SMALLEST).numpy(), found.right[known].numpy()
    _plane_axes(plane, top, side, confidence, residual)
    order = np.random.default_rng(0).permutation(len(right))[:SHOWN]  # neither colour lies on top of the other
    plane.scatter(confidence[order], residual[order], s=7 if len(order) < 10_000 else 3, linewidths=0, alpha=0.55,
                  c=np.where(right[order, None], *(np.array([[*colour]]) for colour in (RIGHT, WRONG))))  # fmt: skip
    for axes, values, limits, direction in (
        (top, confidence, plane.get_xlim(), "vertical"), (side, residual, plane.get_ylim(), "horizontal")
    ):  # fmt: skip
        scale = axes.xaxis if direction == "vertical" else axes.yaxis
        edges = scale.get_transform().inverted().transform(np.linspace(*scale.get_transform().transform(limits), 51))
        edges[[0, -1]] = limits
        for part, colour in ((right, RIGHT), (~right, WRONG)):
            axes.hist(values[part], edges, color=colour, alpha=0.55, orientation=direction)
    _boundaries(plane, found.reliable(), how, shaded=len(known) == 1)
    plane.axvline(threshold, color=style.INK, linestyle="--", linewidth=1.5)
    top.axvline(threshold, color=style.INK, linestyle="--", linewidth=1)
    dots = {"marker": "o", "linestyle": "", "markersize": 6}
    share = 100 * float(right.mean())
    figure.legend(
        handles=[
            Line2D([], [], color=RIGHT, label=f"right label: {share:.1f} % of the pixels", **dots),
            Line2D([], [], color=WRONG, label=f"wrong label: {100 - share:.1f} %", **dots),
            Line2D([], [], color=style.INK, linestyle="--", linewidth=1.5,
                   label=f"threshold {threshold:g} {found.chosen(found.confidence >= threshold)}"),
            Line2D([], [], color="black", linewidth=1.8, label=f"CSL, w = 1, {found.chosen(weight == 1)}"),
            Patch(color="0.8", label=f"CSL, weighted by w, {found.chosen(weight)}"),
        ],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    return figure


def _plane_axes(plane: Axes, top: Axes, side: Axes, confidence: np.ndarray, residual: np.ndarray) -> None:
    """Scales, limits round the pixels and labels of the plane and of the histograms beside it."""
    scale = (lambda c: -np.log10(1 - np.clip(c, 0, CERTAIN)), lambda x: 1 - 10.0**-x)
    limits = confidence.min(), max(confidence.max(), 0.99)
    for axes in (plane, top):
        axes.set_xscale("function", functions=scale)
        axes.set_xlim(*limits)
    for axes in (plane, side):
        axes.set_yscale("log")
        axes.set_ylim(0.7 * residual.min(), 1.4 * residual.max())
    ticks = [0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 0.99999]
    for axis in (plane.xaxis, top.xaxis):
        axis.set_major_locator(FixedLocator([tick for tick in ticks if limits[0] <= tick <= limits[1]]))
        axis.set_major_formatter(FuncFormatter(lambda c, _: f"{100 * c:.7g}"))
    for axis in (plane.yaxis, side.yaxis):
        axis.set_major_locator(LogLocator(numticks=9))
        axis.set_minor_formatter(NullFormatter())
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False)
    top.set(ylabel="pixels", yscale="log")
    side.set(xlabel="pixels", xscale="log")
    plane.set(xlabel="confidence c (%), spaced by log(1 - c)", ylabel="residual variance r")


def _boundaries(axes: Axes, reliable, how: dict, shaded: bool) -> None:
    """Where the weight falls below 1, of each image; of a single one also grey levels of the weight."""
    x, y = (axis.get_transform().inverted().transform(np.linspace(*axis.get_transform().transform(limits), 600))
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())))  # fmt: skip
    c, r = (torch.from_numpy(part)[None] for part in np.meshgrid(x, y))
    for means in zip(reliable.mean_c, reliable.mean_r, reliable.var_c, reliable.var_r, strict=True):
        one = type(reliable)(*(value[None] for value in means))
        weight = pixel_weights(c, r, torch.ones_like(c, dtype=torch.bool), one, **how)[0].numpy()
        if shaded:
            axes.contourf(x, y, weight, np.linspace(0, 1, 11), cmap="Greys_r", alpha=0.3, zorder=0)
            lines = axes.contour(x, y, weight, LEVELS, colors="0.45", linewidths=0.8)
            axes.clabel(lines, fmt="w = %g", fontsize=7.5)
        axes.contour(x, y, weight == 1, [0.5], colors="black", linewidths=1.8 if shaded else 0.9)


def _nothing(title: str, experiments: Iterable[Experiment], root: Path | None) -> Figure:
    """Why there is no figure: the runs are not there, or do not keep what it needs."""
    experiments = list(experiments)
    done = any(is_finished(item, root) for item in experiments)
    names = ", ".join(dict.fromkeys(label_of(item) for item in experiments))
    return message(title, f"{'this run keeps nothing of it' if done else NOT_RUN}: {names}\n{where(experiments)}")


# Images


@themed
def weight_maps(
    experiment: Experiment, root: Path | None = None, images: int = 4, moment: int = -1, threshold: float = 0.95,
    **rule: Any,
) -> Figure:  # fmt: skip
    """Images of the pool with truth, pseudo-label, its errors, the threshold's choice and CSL's weight.

    images: how many, from the first. moment: of the evaluations, counted as in a sequence. rule: of
    `separation.pixel_weights`. Under the maps: what they keep. Raises SettingError for a moment that is not there.
    """
    found = read_moment(experiment, root, moment) if is_finished(experiment, root) else None
    if found is None:
        return _nothing("Weights of pseudo-labels", [experiment], root)
    shown, names = min(images, len(found.truth)), classes_of(experiment.data)
    figure = Drawing(figsize=(10, 1.72 * shown + 1.5), layout="constrained")
    figure.suptitle(f"Pseudo-labels of {label_of(experiment)} and their weights at step {found.step}\n"
                    f"{where([experiment])}, images 0 to {shown - 1} of the pool")  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    grid = figure.subplots(shown, 6, squeeze=False)
    heads = ("image", "hidden truth", "pseudo-label", "right or wrong", f"threshold {threshold:g}", "CSL's weight")
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    colours, verdicts = class_colours(len(names)), np.array([WRONG, RIGHT, class_colours(2)[IGNORE]])
    for index, row in enumerate(grid):
        part = found.only(index)
        kept, weight = part.confidence >= threshold, part.weight(**rule)
        verdict = torch.where(part.known, part.right, 2)[0].long().numpy()
        pictures = [colours[part.truth[0].numpy()], colours[part.label[0].numpy()], verdicts[verdict]]
        _tile(row[0], part.images[0].permute(1, 2, 0).numpy(), f"image {index}")
        for axes, picture in zip(row[1:4], pictures, strict=True):
            _tile(axes, picture)
        row[3].set_xlabel(f"{100 * float(part.right[part.known].double().mean()):.1f} % right", fontsize=7.5, labelpad=3)
        for axes, choice in ((row[4], kept), (row[5], weight)):
            drawn = _tile(axes, choice[0].numpy(), part.chosen(choice), cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=grid, label="weight of a pixel", shrink=0.6, aspect=30, pad=0.01)
    _class_legend(figure, names, [found.truth[:shown], found.label[:shown]], {"right": RIGHT, "wrong": WRONG})
    return figure


@themed
def qualitative_masks(experiments: Sequence[Experiment], root: Path | None = None, images: int = 6) -> Figure:
    """Test images with their truth and the prediction of each finished run; mIoU over all test images above.

    experiments: of one data set and scale, the seeds of a method apart. images: how many, from the first.
    Raises SettingError for runs that were tested on different images.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    if not done:
        return _nothing("Predicted masks", experiments, root)
    first = next(iter(done.values()))
    if not all(torch.equal(kept["test_images"], first["test_images"]) for kept in done.values()):
        raise SettingError("these runs were tested on different images; show runs of one data set and scale together")
    shown, names = min(images, len(first["test_truth"])), classes_of(experiments[0].data)
    missing = list(dict.fromkeys(label_of(item) for item in experiments if item not in done))
    width = min(10, 1.62 * (len(done) + 2))
    figure = Drawing(figsize=(width, (width / (len(done) + 2)) * shown + 1.75), layout="constrained")
    figure.suptitle(f"Masks of test images 0 to {shown - 1}; above: mIoU over the whole test set\n{where(done)}"
                    + (f"\n{NOT_RUN}: {', '.join(missing)}" if missing else ""))  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    grid = figure.subplots(shown, len(done) + 2, squeeze=False)
    colours, maps = class_colours(len(names)), [first["test_truth"], *(kept["test_prediction"] for kept in done.values())]
    several = len({item.seed for item in done}) > 1
    heads = ["image", "truth"]
    heads += [f"{label_of(item)}{f', seed {item.seed}' * several}\n{100 * statistic(item, 'miou', root, 'last', 'ema'):.1f} %"
              for item in done]  # fmt: skip
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    for index, row in enumerate(grid):
        _tile(row[0], first["test_images"][index].permute(1, 2, 0).numpy())
        for axes, labels in zip(row[1:], maps, strict=True):
            _tile(axes, colours[labels[index].numpy()])
    _class_legend(figure, names, [labels[:shown] for labels in maps])
    return figure


def _tile(axes: Axes, picture: np.ndarray, below: str = "", **how: Any):
    """A picture without ticks, its pixels unblended."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_xlabel(below, fontsize=7.5, labelpad=3)
    return axes.imshow(picture, interpolation="nearest", **how)


def _class_legend(figure: Figure, names: Sequence[str], maps: Sequence[Tensor], more: dict | None = None) -> None:
    """Names and colours of the classes in the maps, below; 255 is `unknown`. more: further entries."""
    present = sorted({int(label) for labels in maps for label in labels.unique()})
    colours = class_colours(len(names))
    entries = {"unknown" if label == IGNORE else names[label]: colours[label] for label in present} | (more or {})
    patches = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=name) for name, colour in entries.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 9), frameon=False, fontsize=9)


# Over training


@themed
def training_curves(
    experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema", metrics: Sequence[str] = MEASURED
) -> Figure:
    """Metrics of test images over the steps; line: mean, band: smallest to largest. metrics: names in METRICS."""
    check_reporting("last", weights)
    figure = Drawing(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"Test images over training ({WEIGHTS[weights]})\n{_banded(experiments)}")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for name, axes in zip(metrics, panels, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, name=name: row[weights][name])
        axes.set(xlabel="training step", ylabel=_titled(name))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, panels[0])
    return figure


def _titled(metric: str) -> str:
    return f"{'pixel ' * (metric == 'ece_15')}{METRICS[metric].title}"


def _banded(experiments: Sequence[Experiment]) -> str:
    return where(experiments) + "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)


@themed
def selection_over_training(experiments: Sequence[Experiment], root: Path | None = None) -> Figure:
    """Weight and accuracy of pseudo-labels over the steps, and the wrong pixels that are learned from.

    Measured against hidden masks; gaps in a line: nothing had weight.
    """
    title = "Pseudo-labels of pixels over training, against hidden masks"
    if not any(_pixels(row) for item in experiments for row in _trained(item, root)):
        return _nothing(title, experiments, root)
    figure = Drawing(figsize=(10, 3.6), layout="constrained")
    figure.suptitle(f"{title}\n{_banded(experiments)}")
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

    Means over seeds; hatched: no pixel, or no weight. Ranges (lo, hi] are drawn equally wide.
    """
    title = "Which pixels are learned from, by confidence, against hidden masks"
    groups = [(group, _ranges(group, root)) for group in by_seed(experiments)]
    groups = [(group, found) for group, found in groups if found]
    if not groups:
        return _nothing(title, experiments, root)
    figure = Drawing(figsize=(max(3.1 * len(groups) + 0.9, 5), 7.4), layout="constrained")
    kept = [item for group, _ in groups for item in group]
    missing = {label_of(item): None for item in experiments if not is_finished(item, root) and item not in kept}
    figure.suptitle(f"{title}\n{where(kept)}; means over seeds" + (f"\n{NOT_RUN}: {', '.join(missing)}" if missing else ""))
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
        right.set_xlabel("confidence (%)")
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
    found["mesh"] = np.arange(len(found["edges"])), np.array([0, *steps])
    return found


# Of the trained network


@themed
def pixel_reliability(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """Accuracy against confidence of test pixels, bins as stored; bars: all seeds together, dots: each seed.

    No intervals: the pixels of an image are not independent, so resampling them would promise too much.
    """
    check_reporting(rule, weights)
    groups = by_seed(experiments)
    figure = Drawing(figsize=(min(2.55 * len(groups) + 0.8, 10.4), 4.7), layout="constrained")
    figure.suptitle(f"Reliability of test pixels, {RULES[rule]}, {WEIGHTS[weights]}, bins (lo, hi]\n{where(experiments)}; "
                    "dots: seeds")  # fmt: skip
    grid = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row", height_ratios=(3.2, 1))
    for (diagram, shares), group in zip(grid.T, groups, strict=True):
        diagram.set_title(label_of(group[0]))
        done = [item for item in group if is_finished(item, root)]
        if not done:
            say(diagram, NOT_RUN)
            shares.set_axis_off()
            continue
        _reliability_panel(diagram, shares, [_reported(item, root, rule, weights) for item in done])
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("pixels (%)")
    handles = [Patch(color=style.BLUE, label="accuracy"), Patch(label="gap to mean confidence", **_HATCHED),
               Line2D([], [], color=style.INK, linestyle="--", linewidth=1, label="perfect")]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


_HATCHED = {"facecolor": "#f6ddd0", "edgecolor": style.RED, "hatch": "////"}


def _reported(experiment: Experiment, root: Path | None, rule: str, weights: str) -> dict:
    return load_metrics(folder_of(experiment, root))["reported"][rule][weights]


def _reliability_panel(diagram: Axes, shares: Axes, reported: Sequence[dict]) -> None:
    """Bins of several runs, their pixels put together, over the share of pixels in each."""
    count, confidence, accuracy = (
        np.array([run["reliability"][name] for run in reported], dtype=float)
        for name in ("count", "confidence", "accuracy")
    )
    total, bins = count.sum(axis=0), count.shape[1]
    sure, right = (np.nansum(count * part, axis=0) / np.maximum(total, 1) for part in (confidence, accuracy))
    left, bar = np.arange(bins) / bins, {"width": 1 / bins, "align": "edge", "linewidth": 0.6}
    diagram.bar(left, right, color=style.BLUE, edgecolor="white", **bar)
    diagram.bar(left, sure - right, bottom=right, **_HATCHED, **bar)
    diagram.plot([0, 1], [0, 1], color=style.INK, linestyle="--", linewidth=1)
    for run in accuracy if len(reported) > 1 else ():
        diagram.plot(left + 0.5 / bins, run, ".", color=style.INK, markersize=3.5, alpha=0.7)
    ece = summarise(run["ece_15"] for run in reported)
    spread = "" if ece.sd is None else f" ± {100 * ece.sd:.1f}"
    numbers = f"ECE {100 * ece.mean:.1f}{spread} %, {bins} bins\n{total.sum():,.0f} pixels, n = {len(reported)}"
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
    title = f"IoU by class, {RULES[rule]}, {WEIGHTS[weights]}"
    if not any(is_finished(item, root) for item in experiments):
        return _nothing(title, experiments, root)
    high = min(0.13 * len(groups) + 0.12, 0.55) if len(names) < 12 else 0.3
    figure = Drawing(figsize=(9, high * len(names) + 1.7), layout="constrained")
    figure.suptitle(f"{title}\n{where(experiments)}; large: mean, line: standard deviation, small: seeds")
    axes = figure.subplots()
    for number, group in enumerate(groups):
        reports = [_reported(item, root, rule, weights) for item in group if is_finished(item, root)]
        found = [[*run["iou"], run["miou"]] for run in reports]
        at = np.arange(len(names)) + 0.76 * ((number + 0.5) / len(groups) - 0.5)
        n = "" if len(found) == len(group) else f" (n = {len(found)})" if found else f" ({NOT_RUN})"
        _points(axes, at, np.array(found, dtype=float).reshape(-1, len(names)), group[0], label_of(group[0]) + n)
    axes.set(xlabel="IoU (%)", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    for y in np.arange(len(names) - 1) + 0.5:
        axes.axhline(y, color="0.9" if y < len(names) - 2 else "0.5", linewidth=1)
    outside_legend(figure, axes)
    return figure


def _points(axes: Axes, at: np.ndarray, found: np.ndarray, experiment: Experiment, label: str) -> None:
    """Means of fractions (n, values) with their deviation in percent, seeds behind."""
    look = style_of(experiment.method)
    stated = [summarise(column) for column in found.T]
    mean, deviation = ([100 * (part if part is not None else math.nan) for part in parts]
                       for parts in zip(*((one.mean, one.sd or 0) for one in stated), strict=True))  # fmt: skip
    axes.errorbar(mean, at, xerr=deviation, color=look.colour, marker=look.marker, linestyle="", markersize=6,
                  elinewidth=1, capsize=2, label=label)  # fmt: skip
    for run in found if len(found) > 1 else ():
        axes.plot(100 * run, at, ".", color=look.colour, markersize=4, alpha=0.5)


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
    figure.suptitle(title + f"\n{NOT_RUN}: {missing}" * bool(missing))
    width = 0.8 / len(rows)
    panels = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for name, axes in zip(metrics, panels, strict=True):
        for number, row in enumerate(rows):
            for place, column in enumerate(columns):
                values = [statistic(item, name, root, rule, weights) for item in cells[row.label, column]]
                x = place + (number + 0.5 - len(rows) / 2) * width
                _bar(axes, x, width, values, style_of(row.method).colour, row.label if place == 0 else None)
        axes.set(ylabel=_titled(name), ylim=(0, 1.06 * axes.get_ylim()[1]))
        axes.set_xticks(range(len(columns)), [column.title for column in columns])
        axes.grid(axis="x", visible=False)
    outside_legend(figure, panels[0])
    return figure


def _bar(axes: Axes, x: float, width: float, values: Sequence[float], colour, label: str | None) -> None:
    """Fractions of seeds as their mean in percent, with deviation and n."""
    found, percent = summarise(values), 100 * np.array(values)
    axes.bar(x, 100 * (found.mean or 0), 0.92 * width, color=colour, edgecolor="white", label=label)
    if not found.n:
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
    table, place = next(iter(module.TABLES.values())), Column(experiments[0].data, experiments[0].labels)
    rows = [row.label for row in table.rows if table.cell(row, place, scale, seeds)[0] in experiments]
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
            ("budgets", "mIoU by number of masks", miou_by_budget(table, scale, seeds, root)),
        ]
    how = {"root": root, "metrics": MEASURED}
    drawn += [("main", table.title, table_points(table.only(rows), scale, seeds, column=place, **how))]
    for name, ablation in module.ABLATIONS.items():
        cells = [ablation.cell(row, ablation.columns_at(scale)[0], scale, seeds) for row in ablation.rows]
        if sum(any(is_finished(item, root) for item in cell) for cell in cells) > 1:
            drawn += [(f"ablation_{name}", ablation.title, table_points(ablation, scale, seeds, **how))]
    return drawn
