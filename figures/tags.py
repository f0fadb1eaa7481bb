"""PCRE's further figures: activation maps, over-activation, growth of regions, and thresholds.

Drawn from saved results only and under the conventions of `figures`. Hidden masks are for these figures alone; no
method sees them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from figures import style
from figures.claims import statistic
from figures.common import Drawn, bands, filled, loss_curves, not_shown, outside_legend, reported, table_figures
from figures.masks import qualitative_masks
from figures.plane import class_colours, class_legend, classes_of, tile, unavailable
from figures.style import Drawing, by_seed, label_of, style_of, themed, where
from figures.sweeps import ablation_curves, sweep
from figures.tables import NOT_RUN, RULES, WEIGHTS, check_reporting, summarise
from repro import cam
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.measure import segmentation
from repro.methods.image_tags.pcre import PCRESettings, squared_distances
from repro.recipe import TagRecipe
from repro.runs import folder_of, is_finished, load_moments, load_outputs
from repro.settings import SettingError

TITLES = {"cam_miou": "CAM, test images", "cam_miou_train": "CAM, training images", "miou": "segmentation, test images"}
CUT = 5.0  # over-activation that a bar shows at most
OVERLAY = 0.85  # of a class's colour where its map is 1
Value = Callable[[dict], Sequence[float | None]]


# Images


@themed
def cam_panels(experiments: Sequence[Experiment], root: Path | None = None, images: int = 4) -> Figure:
    """Test images with the CAM of each finished run, PCRE's hard label and the truth; CAM mIoU of all images above.

    experiments: of one data set and scale, one a method. images: how many, the first that show two classes or more.
    A colour is the shown class whose map is largest, its strength that value. Raises SettingError for runs that were
    tested on different images.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    if not done:
        return unavailable("Activation maps", experiments, root)
    first = next(iter(done.values()))
    if not all(torch.equal(kept["test_images"], first["test_images"]) for kept in done.values()):
        raise SettingError("these runs were tested on different images; show runs of one data set and scale together")
    tags, truth = first["test_tags"], first["test_truth"]
    crowded = [index for index, shown in enumerate(tags.sum(1).tolist()) if shown > 1]
    chosen = (crowded or list(range(len(tags))))[:images]
    names = classes_of(experiments[0].data)
    colours = class_colours(len(names))
    hard = {item: resolve(item).beta for item in done if item.method == "pcre"}
    columns = len(done) + len(hard) + 2
    width, (high, wide) = min(10, 1.9 * columns), truth.shape[1:]
    rest = not_shown(experiments, done)
    height = (width / columns * high / wide + 0.03) * len(chosen) + 1.3 + 0.2 * (rest != "")
    figure = Drawing(figsize=(width, height), layout="constrained")
    note = "colour: the shown class with the largest value, as strong as that value"
    figure.suptitle(f"Activation maps of {len(chosen)} test images; above: CAM mIoU over the whole test set\n"
                    f"{where(done)}\n{note}{rest}")  # fmt: skip
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0)
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    several = len({item.seed for item in done}) > 1
    for index, row in zip(chosen, grid, strict=True):
        picture, places = first["test_images"][index].permute(1, 2, 0).numpy(), iter(row)
        tile(next(places), picture)
        for kept in done.values():
            value, label = cam.best_class(kept["test_cam"][index][None].float(), tags[index][None])
            tile(next(places), overlay(picture, value[0].numpy(), colours[label[0].numpy()]))
        for item, beta in hard.items():
            labels = cam.cam_labels(done[item]["test_cam"][index][None].float(), tags[index][None], beta)
            tile(next(places), colours[labels[0].numpy()])
        tile(next(places), colours[truth[index].numpy()])
    heads = ["image"]
    for item in done:
        seed = f", seed {item.seed}" * several
        heads += [f"{label_of(item)}{seed}\n{100 * statistic(item, 'cam_miou', root, 'last', 'ema'):.1f} %"]
    heads += [f"{label_of(item)},\ncut at {beta:g}" for item, beta in hard.items()] + ["truth"]
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10 if columns < 8 else 9)
    class_legend(figure, names, [truth[chosen]])
    return figure


def overlay(picture: np.ndarray, value: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A grey picture under a colour, (H, W, 3) in 0..1.

    picture: (H, W, 3) uint8. value: (H, W) in [0, 1], how much of the colour. colour: (H, W, 3) or (3,) in 0..1.
    """
    grey = picture.mean(2, keepdims=True) / 255
    share = OVERLAY * np.clip(value, 0, 1)[..., None]
    return (1 - share) * grey + share * colour


@themed
def region_growth(experiment: Experiment, root: Path | None = None, images: int = 2, columns: int = 6) -> Figure:
    """Regions of a PCRE run over training on the first kept training images, one shown class each, and the radius.

    columns: evaluations at most; more of them while the radius grows. Below: patches that one mask may reach, and the
    schedule. White line: hidden truth.
    """
    title = f"Growth of {label_of(experiment)}'s regions"
    moments = load_moments(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    moments = {step: kept for step, kept in moments.items() if "regions" in kept}
    if not moments:
        return unavailable(title, [experiment], root)
    outputs, recipe = load_outputs(folder_of(experiment, root)), resolve(experiment)
    tags, names = outputs["pool_tags"], classes_of(experiment.data)
    chosen = [index for index in range(len(tags)) if tags[index].any()][:images]
    steps = _while_growing(list(moments), recipe, columns)
    grid = tuple(next(iter(moments.values()))["regions"].shape[2:])
    size, width = outputs["pool_truth"].shape[1:], 10
    side = width / (len(steps) + 0.3) * size[0] / size[1]
    ratios = [side] * len(chosen) + [0.7 * side, 1.6]
    figure = Drawing(figsize=(width, sum(ratios) + 1.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.01)
    figure.suptitle(f"{title} at scale 1, behind the gate of the step\n{where([experiment])}\n"
                    "colour: refined region of the named class; line: its hidden truth; "
                    "grey: patches within r of the middle one")  # fmt: skip
    places = figure.add_gridspec(len(ratios), len(steps), height_ratios=ratios)
    colours = class_colours(len(names))
    for row, index in enumerate(chosen):
        label = 1 + int(tags[index].int().argmax())  # the first class that it shows
        picture = outputs["pool_images"][index].permute(1, 2, 0).numpy()
        for column, step in enumerate(steps):
            axes = figure.add_subplot(places[row, column])
            region = cam.bilinear(moments[step]["regions"][index, label - 1][None, None].float(), size)[0, 0]
            tile(axes, overlay(picture, region.numpy(), colours[label]))
            _outline(axes, outputs["pool_truth"][index] == label)
            if column == 0:
                axes.set_ylabel(f"{names[label]}\ntraining image {int(outputs['pool_index'][index])}", fontsize=8.5)
            if row == 0:
                axes.set_title(f"step {step}\nr = {float(moments[step]['radius']):.2f}", fontsize=10)
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    away = squared_distances(grid, torch.device("cpu"))[middle]
    for column, step in enumerate(steps):
        axes = figure.add_subplot(places[-2, column])
        tile(axes, (away <= moments[step]["radius"] ** 2).numpy(), cmap="Greys", vmin=0, vmax=1.6)
        axes.patch.set_edgecolor("0.6")
        if column == 0:
            axes.set_ylabel("reach of\na mask", fontsize=8.5)
    _schedule(figure.add_subplot(places[-1, :]), moments, recipe, grid)
    return figure


def _while_growing(steps: list[int], recipe: TagRecipe, most: int) -> list[int]:
    """Up to `most` steps: two thirds of them, as far as there are, up to the end of the ramp, then to the last."""
    end = recipe.method.gate_to * recipe.steps
    ramp = next((at for at, step in enumerate(steps) if step >= end), len(steps) - 1) + 1
    late = min(len(steps) - ramp, max(most - ramp, most // 3))
    return _spread(steps[:ramp], most - late) + _spread(steps[ramp:][::-1], late)[::-1]


def _spread(items: list, count: int) -> list:
    """Up to `count` items, evenly spread, the first among them."""
    return [items[at * len(items) // count] for at in range(count)] if count < len(items) else items


def _outline(axes: Axes, inside: Tensor) -> None:
    """A white line with dark edges round a mask (H, W), seen on any picture."""
    if inside.any():
        for colour, width in ((style.INK, 2.2), ("white", 1.0)):
            axes.contour(inside.float().numpy(), [0.5], colors=[colour], linewidths=width)


def _schedule(axes: Axes, moments: dict[int, dict[str, Tensor]], recipe: TagRecipe, grid: tuple[int, int]) -> None:
    """Radius in patches against the step: the schedule, and dots at the evaluations that were kept."""
    settings = recipe.method
    at = np.linspace(0, 1, 401)
    radius = [settings.radius(progress, grid) for progress in at]
    radius = [max(grid) if value is None else value for value in radius]
    axes.plot(at * recipe.steps, radius, color=style.INK, linewidth=1.3, label="schedule")
    axes.plot(list(moments), [float(kept["radius"]) for kept in moments.values()], "o", color=style.BLUE,
              label="kept evaluations")  # fmt: skip
    axes.set(xlabel="training step", ylabel="radius r\n(patches)")
    axes.set(xlim=(0, 1.01 * recipe.steps), ylim=(0, 1.12 * max(radius)))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    mark_shares(axes, recipe, (settings.gate_from, settings.gate_to))
    axes.legend(loc="lower right", frameon=False)


# Over training


def stages(experiments: Sequence[Experiment]) -> tuple[TagRecipe, dict[float, str]]:
    """The recipe of the first PCRE experiment, or the first of all, and what happens at which share of its training."""
    recipe = resolve(next((item for item in experiments if item.method == "pcre"), experiments[0]))
    found = {recipe.warm_up: "warm-up of the head ends"}
    if isinstance(recipe.method, PCRESettings):
        found[recipe.method.fuse_from] = "PCRE's regions join its CAM"
    return recipe, found


def mark_shares(axes: Axes, recipe: TagRecipe, shares: Iterable[float]) -> None:
    """Dotted lines at shares of training, each with its percentage above."""
    for share in shares:
        axes.axvline(share * recipe.steps, color=style.INK, linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(f"{100 * share:g} %", (share * recipe.steps, 1), (0, 2), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", fontsize=8, color=style.INK)  # fmt: skip


@themed
def miou_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """CAM and segmentation mIoU over the steps, with the ends of PCRE's stages; line: mean, band: range over seeds."""
    check_reporting("last", weights)
    recipe, marks = stages(experiments)
    figure = Drawing(figsize=(10, 3.9), layout="constrained")
    banded = "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)
    said = ", ".join(f"{100 * share:g} %: {what}" for share, what in marks.items())
    figure.suptitle(
        f"mIoU of CAMs and of segmentation over training ({WEIGHTS[weights]})\n{where(experiments)}{banded}\n{said}"
    )
    panels = figure.subplots(1, len(TITLES))
    for name, axes in zip(TITLES, panels, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, name=name: row[weights][name])
        axes.set(xlabel="training step", ylabel="mIoU (%)" if axes is panels[0] else "")
        axes.set_title(TITLES[name], pad=16)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
        mark_shares(axes, recipe, marks)
    outside_legend(figure, panels[0], columns=5)
    return figure


# Of the trained network


@themed
def threshold_curves(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """CAM mIoU of test images at every background threshold; line: mean, band: range over seeds.

    Dashed: beta of the recipes. Large marks: the best threshold of a mean curve, chosen on this very set.
    """
    check_reporting(rule, weights)
    title = f"CAM mIoU against the background threshold, {RULES[rule]}, {WEIGHTS[weights]}"
    if not any(is_finished(item, root) for item in experiments):
        return unavailable(title, experiments, root)
    figure = Drawing(figsize=(8.5, 4.6), layout="constrained")
    banded = "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)
    note = "large mark: best threshold, chosen on this very set; dashed: beta of hard labels"
    figure.suptitle(f"{title}\n{where(experiments)}{banded}\n{note}")
    axes, at = figure.subplots(), np.array(cam.THRESHOLDS)
    for group in by_seed(experiments):
        look, name = style_of(group[0].method), label_of(group[0])
        runs = [reported(item, root, rule, weights) for item in group if is_finished(item, root)]
        curves = np.array([run["cam_curve"] for run in runs], dtype=float).reshape(-1, len(at))  # None is NaN
        count = "" if len(runs) == len(group) else f" (n = {len(runs)})" if runs else f" ({NOT_RUN})"
        mean = curves.mean(0) if runs else np.full(len(at), math.nan)
        if np.isfinite(mean).any():
            best = int(np.nanargmax(mean))
            axes.plot(at[best], mean[best], look.marker, color=look.colour, markersize=11, markeredgecolor=style.INK)
            count += f": best {100 * mean[best]:.1f} % at {at[best]:.2f}"
        axes.plot(at, mean, color=look.colour, marker=look.marker, markevery=10, markersize=4, label=name + count)
        if len(runs) > 1:
            axes.fill_between(at, curves.min(0), curves.max(0), color=look.colour, alpha=0.18, linewidth=0)
    betas: dict[float, list[str]] = {}
    for item in experiments:
        betas.setdefault(resolve(item).beta, []).append(label_of(item))
    sides = {min(betas): "right", max(betas): "left"} if len(betas) > 1 else {}  # names beside one another
    for beta, names in betas.items():
        axes.axvline(beta, color=style.INK, linestyle="--", linewidth=1.2, zorder=1)
        whose = f" ({', '.join(dict.fromkeys(names))})" if len(betas) > 1 else ""
        axes.annotate(f"beta = {beta:g}{whose}", (beta, 1), (0, 2), xycoords=("data", "axes fraction"), fontsize=8,
                      textcoords="offset points", ha=sides.get(beta, "center"), color=style.INK)  # fmt: skip
    axes.set(xlabel="background threshold", ylabel="CAM mIoU (%), test images", xlim=(0, 1), ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, axes, columns=2)
    return figure


@themed
def iou_by_class(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """IoU of each class on the test images, of CAMs cut at beta and of the segmentation head."""
    panels = {
        "CAM IoU (%), cut at beta": _cam_iou,
        "segmentation IoU (%)": lambda run: [*run["iou"], run["miou"]],
    }
    names = [*classes_of(experiments[0].data), "mean"]
    figure = _class_bars("IoU by class", names, panels, experiments, root, rule, weights)
    for axes in figure.axes:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    return figure


def _cam_iou(run: dict) -> list[float | None]:
    return [*segmentation.plain(segmentation.iou(torch.tensor(run["cam_confusion"]))), run["cam_miou"]]


@themed
def over_activation_bars(
    experiments: Sequence[Experiment], root: Path | None = None, rule: str = "last", weights: str = "ema"
) -> Figure:
    """Over-activation of each class of CAMs cut at beta: FP / TP, and the bounded FP / (FP + TP).

    After the supplementary's first figure, whose formula is not printed: FP / TP is a reconstruction, the other ours.
    The background is left out: what is wrongly called that is a missed object. A cross: infinite (no pixel right) or
    undefined (no pixel at all) in a run, which the bar, the mean of the others, leaves out.
    """
    panels = {
        "FP / TP (reconstruction)": lambda run: run["over_activation"]["ratio"][1:],
        "FP / (FP + TP) (ours, bounded)": lambda run: run["over_activation"]["share"][1:],
    }
    title = "Over-activation of CAMs by class; the paper prints no formula, FP / TP is our reconstruction"
    names = list(classes_of(experiments[0].data))[1:]
    figure = _class_bars(title, names, panels, experiments, root, rule, weights, cut=CUT)
    for axes in figure.axes[1:]:
        axes.set_xlim(0, 1)
    return figure


def _class_bars(
    title: str, names: list[str], panels: dict[str, Value], experiments: Sequence[Experiment], root: Path | None,
    rule: str, weights: str, cut: float = math.inf,
) -> Figure:  # fmt: skip
    """Bars by class and method, a panel a quantity: mean over seeds, deviation, seeds as dots."""
    check_reporting(rule, weights)
    how = f"{RULES[rule]}, {WEIGHTS[weights]}; bar: mean, line: standard deviation, dots: seeds"
    if not any(is_finished(item, root) for item in experiments):
        return unavailable(title, experiments, root)
    groups = by_seed(experiments)
    figure = Drawing(figsize=(9.5, max(0.11 * len(groups) + 0.12, 0.3) * len(names) + 2.2), layout="constrained")
    crossed = False
    grid = figure.subplots(1, len(panels), sharey=True)
    figure.get_layout_engine().set(wspace=0.04)
    for axes, (quantity, value) in zip(grid, panels.items(), strict=True):
        for number, group in enumerate(groups):
            runs = [reported(item, root, rule, weights) for item in group if is_finished(item, root)]
            count = "" if len(runs) == len(group) else f" (n = {len(runs)})" if runs else f" ({NOT_RUN})"
            found = np.array([value(run) for run in runs], dtype=float).reshape(-1, len(names))  # None is NaN
            at = np.arange(len(names)) + 0.8 * ((number + 0.5) / len(groups) - 0.5)
            again = sum(group[0].method == other[0].method for other in groups[:number])
            look = {"color": style_of(group[0].method).colour, "hatch": "///" * again}
            crossed |= _bars(axes, at, 0.74 / len(groups), found, cut, label_of(group[0]) + count, look)
        axes.set(xlabel=quantity, ylim=(len(names) - 0.5, -0.5))
        axes.set_xlim(0, min(cut, axes.get_xlim()[1]))
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="y", visible=False)
    marks = "\ncross: infinite or undefined in a run, which its bar leaves out" * crossed
    figure.suptitle(f"{title}\n{how}\n{where(experiments)}{marks}")
    outside_legend(figure, grid[0], columns=5)
    return figure


def _bars(axes: Axes, at: np.ndarray, width: float, found: np.ndarray, cut: float, label: str, look: dict) -> bool:
    """Bars of values (n, names), NaN where a run has none; whether there was one. What a cut bar stands for is said."""
    stated = [summarise(column) for column in found.T]
    mean = np.array([math.nan if one.mean is None else one.mean for one in stated])
    axes.barh(at, np.fmin(np.nan_to_num(mean), cut), width, edgecolor="white", linewidth=0.4, label=label, **look)
    for y, one, column in zip(at, stated, found.T, strict=True):
        if one.mean is not None and one.mean > cut:
            axes.annotate(f"{one.mean:.1f}", (cut, y), (-3, 0), textcoords="offset points", ha="right", va="center",
                          fontsize=6.5, color="white", fontweight="bold")  # fmt: skip
        elif one.n > 1:
            axes.errorbar(one.mean, y, xerr=one.sd, color=style.INK, capsize=1.5, linewidth=0.9, elinewidth=0.9)
            axes.plot(column, [y] * len(column), ".", color=style.INK, markersize=3, alpha=0.6)
        if np.isnan(column).any():
            axes.plot(0.015, y, "x", color=style.INK, markersize=5, markeredgewidth=1.6, zorder=5,
                      transform=axes.get_yaxis_transform())  # fmt: skip
    return bool(np.isnan(found).any())


# The report's


def pcre_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What the finished runs can draw, as `plots.commatch_figures`."""
    module = PAPERS["pcre"]
    experiments = module.main_experiments(scale, seeds)
    finished = [item for item in experiments if is_finished(item, root)]
    drawn: Drawn = []
    if finished:
        first = [item for item in experiments if item.seed == finished[0].seed]
        drawn += [
            ("cams", "Activation maps of test images", cam_panels(first, root)),
            ("masks", "Masks of test images", qualitative_masks(first, root, images=4)),
            ("over_activation", "Over-activation by class", over_activation_bars(experiments, root)),
            ("classes", "IoU by class", iou_by_class(experiments, root)),
            ("thresholds", "CAM mIoU against the threshold", threshold_curves(experiments, root)),
            ("curves", "CAM and segmentation mIoU over training", miou_curves(experiments, root)),
        ]
    for item in [item for item in finished if item.method == "pcre"][:1]:
        drawn += [
            ("growth", "Growth of the regions", region_growth(item, root)),
            ("loss", "Loss terms over training", loss_curves(item, root)),
        ]
    for name, table in module.ABLATIONS.items():
        column = table.columns_at(scale)[0]
        if table.references and sweep(table, column, scale) and filled(table, column, scale, seeds, root) > 1:
            drawn += [(f"curve_{name}", f"{table.title}, as a curve", ablation_curves(table, scale, seeds, root))]
    return drawn + table_figures("pcre", scale, seeds, root)

