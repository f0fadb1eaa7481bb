"""PCRE's further figures: activation maps, over-activation, growth of regions, and thresholds.

Hidden masks are for these figures alone; no method sees them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from figures import common, style
from figures.common import Drawn
from figures.masks import qualitative_masks
from figures.style import Root, Runs, label_of, start, themed, where
from figures.sweeps import ablation_curves, sweep
from repro import cam
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.measure import segmentation
from repro.methods.image_tags.pcre import PCRESettings, squared_distances
from repro.recipe import TagRecipe
from repro.runs import folder_of, is_finished, load_moments, load_outputs

CUT = 5.0  # over-activation that a bar shows at most
OVERLAY = 0.85  # of a class's colour where its map is 1


# Images


@themed
def cam_panels(experiments: Runs, root: Root = None, images: int = 4) -> Figure:
    """Test images with the CAM of each finished run, PCRE's hard label and the truth; CAM mIoU of all images above.

    experiments: of one data set and scale, one a method. images: how many, the first that show two classes or more.
    A colour is the shown class whose map is largest, its strength that value. Raises SettingError for runs that were
    tested on different images.
    """
    done = {item: load_outputs(folder_of(item, root)) for item in experiments if is_finished(item, root)}
    if not done:
        return common.unavailable("Activation maps", experiments, root)
    common.check_alike(done.values(), "test_images", "been tested on different images")
    first, names = next(iter(done.values())), common.classes_of(experiments[0].data)
    tags, truth, colours = first["test_tags"], first["test_truth"], common.class_colours(len(names))
    crowded = [index for index, classes in enumerate(tags.sum(1).tolist()) if classes > 1]
    chosen, rows = (crowded or list(range(len(tags))))[:images], []
    hard = {item: resolve(item).beta for item in done if item.method == "pcre"}
    for index in chosen:
        image, shown = first["test_images"][index], tags[index][None]
        row = [common.picture(image)]
        for kept in done.values():
            value, label = cam.best_class(kept["test_cam"][index][None].float(), shown)
            row.append(common.overlay(image, OVERLAY * value[0], colours[label[0]]))
        for item, beta in hard.items():
            row.append(colours[cam.cam_labels(done[item]["test_cam"][index][None].float(), shown, beta)[0]])
        rows.append([*row, colours[truth[index]]])
    cuts = [f"{label_of(item)},\ncut at {beta:g}" for item, beta in hard.items()]
    note = "colour: the shown class with the largest value, as strong as that value"
    title = f"Activation maps of {len(chosen)} test images; above: CAM mIoU over the whole test set"
    heads = ["image", *common.heads_of(done, root, "cam_miou"), *cuts, "truth"]
    captions = [where(done), note, common.absent(experiments, done)]
    return common.image_grid(title, captions, heads, rows, names, [truth[chosen]])[0]


@themed
def region_growth(experiment: Experiment, root: Root = None, images: int = 2, columns: int = 6) -> Figure:
    """Regions of a PCRE run over training on the first kept training images, one shown class each, and the radius.

    columns: evaluations at most, evenly spread. White line: hidden truth. Below: patches that one mask may reach, and
    the schedule.
    """
    title = f"Growth of {label_of(experiment)}'s regions"
    moments = load_moments(folder_of(experiment, root)) if is_finished(experiment, root) else {}
    moments = {step: kept for step, kept in moments.items() if "regions" in kept}
    if not moments:
        return common.unavailable(title, [experiment], root)
    outputs, recipe = load_outputs(folder_of(experiment, root)), resolve(experiment)
    tags, names = outputs["pool_tags"], common.classes_of(experiment.data)
    chosen = [index for index in range(len(tags)) if tags[index].any()][:images]
    labels = [1 + int(tags[index].int().argmax()) for index in chosen]  # the first class that each shows
    steps, size = list(moments), outputs["pool_truth"].shape[1:]
    steps = [steps[at] for at in sorted({round(at) for at in np.linspace(0, len(steps) - 1, columns)})]
    patches = tuple(next(iter(moments.values()))["regions"].shape[2:])
    colours, rows = common.class_colours(len(names)), []
    for index, label in zip(chosen, labels, strict=True):
        regions = [moments[step]["regions"][index, label - 1][None, None].float() for step in steps]
        shares = [OVERLAY * cam.bilinear(region, size)[0, 0] for region in regions]
        rows.append([common.overlay(outputs["pool_images"][index], share, colours[label]) for share in shares])
    away = squared_distances(patches, torch.device("cpu"))[patches[0] // 2 * patches[1] + patches[1] // 2]
    reach = [(away <= moments[step]["radius"] ** 2).numpy() for step in steps]
    rows.append([np.where(near[..., None], 0.5, np.ones(3)) for near in reach])
    captions = [where([experiment]), "colour: refined region of the named class; line: its hidden truth; "
                "grey: patches within r of the middle one"]  # fmt: skip
    heads = [f"step {step}\nr = {float(moments[step]['radius']):.2f}" for step in steps]
    sides = [f"{names[label]}\ntraining image {int(outputs['pool_index'][index])}"
             for index, label in zip(chosen, labels, strict=True)]  # fmt: skip
    title, sides = f"{title} at scale 1, behind the gate of the step", [*sides, "reach of\na mask"]
    figure, grid = common.image_grid(title, captions, heads, rows, names, [], sides, room=1.6)
    for index, label, row in zip(chosen, labels, grid, strict=False):
        for axes in row:
            _outline(axes, outputs["pool_truth"][index] == label)
    _schedule(figure.axes[-1], moments, recipe, patches)
    return figure


def _outline(axes: Axes, inside: Tensor) -> None:
    """A white line with dark edges round a mask (H, W), seen on any picture."""
    if inside.any():
        for colour, width in ((style.INK, 2.2), ("white", 1.0)):
            axes.contour(inside.float().numpy(), [0.5], colors=[colour], linewidths=width)


def _schedule(axes: Axes, moments: dict[int, dict[str, Tensor]], recipe: TagRecipe, grid: tuple[int, int]) -> None:
    """Radius in patches against the step: the schedule, and dots at the evaluations that were kept."""
    settings, at = recipe.method, np.linspace(0, 1, 401)
    radius = [max(grid) if (one := settings.radius(progress, grid)) is None else one for progress in at]
    common.curve(axes, at * recipe.steps, radius, "schedule")
    kept = [float(moment["radius"]) for moment in moments.values()]
    common.curve(axes, list(moments), kept, "kept evaluations", style.BLUE, "o", linestyle="")
    axes.set(xlabel="training step", ylabel="radius r\n(patches)")
    axes.set(xlim=(0, 1.01 * recipe.steps), ylim=(0, 1.12 * max(radius)))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for share in (settings.gate_from, settings.gate_to):
        common.mark(axes, share * recipe.steps, f"{100 * share:g} %")
    axes.legend(loc="lower right", frameon=False)


# Over training


def miou_curves(experiments: Runs, root: Root = None, weights: str = "ema") -> Figure:
    """CAM and segmentation mIoU over the steps, with the ends of PCRE's stages."""
    recipe = resolve(next((item for item in experiments if item.method == "pcre"), experiments[0]))
    ends = {recipe.warm_up: "warm-up of the head ends"}
    if isinstance(recipe.method, PCRESettings):
        ends[recipe.method.fuse_from] = "PCRE's regions join its CAM"
    panels = {"CAM mIoU (%), test images": "cam_miou", "CAM mIoU (%), training images": "cam_miou_train",
              "segmentation mIoU (%), test images": "miou"}  # fmt: skip
    caption = ", ".join(f"{100 * share:g} %: {what}" for share, what in ends.items())
    marks = {share * recipe.steps: f"{100 * share:g} %" for share in ends}
    title = "mIoU of CAMs and of segmentation over training"
    return common.over_training(title, experiments, root, panels, weights, [caption], marks=marks)


# Of the trained network


@themed
def threshold_curves(experiments: Runs, root: Root = None, rule: str = "last", weights: str = "ema") -> Figure:
    """CAM mIoU of test images at every background threshold; line: mean, band: range over seeds.

    Dashed: beta of the recipes. Large marks: the best threshold of a mean curve, chosen on this very set.
    """
    title = f"CAM mIoU against the background threshold, {common.reporting(rule, weights)}"
    if not any(is_finished(item, root) for item in experiments):
        return common.unavailable(title, experiments, root)
    note = "large mark: best threshold, chosen on this very set; dashed: beta of hard labels"
    figure, ((axes,),) = start(title, [common.banded(experiments), note], (8.5, 4.6))
    at = np.array(cam.THRESHOLDS)
    for group, looks, _ in common.variants(experiments):
        runs = [common.reported(item, root, rule, weights)["cam_curve"] for item in group if is_finished(item, root)]
        mean, label = common.mean_of(np.array(runs, dtype=float).reshape(-1, len(at))), common.counted(group, runs)
        if np.isfinite(mean).any():
            best = int(np.nanargmax(mean))
            axes.plot(at[best], mean[best], looks["marker"], color=looks["colour"], markersize=11,
                      markeredgecolor=style.INK)  # fmt: skip
            label += f": best {100 * mean[best]:.1f} % at {at[best]:.2f}"
        common.curve(axes, at, runs or np.full(len(at), math.nan), label, markevery=10, **looks)
    for beta in sorted({resolve(item).beta for item in experiments}):
        common.mark(axes, beta, f"beta = {beta:g}", "--")
    axes.set(xlabel="background threshold", ylabel="CAM mIoU (%), test images", xlim=(0, 1), ylim=(0, None))
    common.percent(axes.yaxis)
    common.outside_legend(figure, axes, columns=2)
    return figure


def iou_by_class(experiments: Runs, root: Root = None, rule: str = "last", weights: str = "ema") -> Figure:
    """IoU of each class on the test images, of CAMs cut at beta and of the segmentation head."""

    def of_cams(run: dict) -> list[float | None]:
        return [*segmentation.plain(segmentation.iou(torch.tensor(run["cam_confusion"]))), run["cam_miou"]]

    panels = {"CAM IoU (%), cut at beta": of_cams, "segmentation IoU (%)": lambda run: [*run["iou"], run["miou"]]}
    names = [*common.classes_of(experiments[0].data), "mean"]
    return common.class_bars("IoU by class", names, panels, experiments, root, rule, weights)


def over_activation_bars(experiments: Runs, root: Root = None, rule: str = "last", weights: str = "ema") -> Figure:
    """Over-activation of each class of CAMs cut at beta: FP / TP, and the bounded FP / (FP + TP).

    After the supplementary's first figure, whose formula is not printed: FP / TP is a reconstruction, the other was
    chosen here. The background is left out: what is wrongly called that is a missed object. A cross: infinite (no pixel
    right) or undefined (no pixel at all) in a run, which the bar, the mean of the others, leaves out.
    """
    panels = {
        "FP / TP (reconstruction)": lambda run: run["over_activation"]["ratio"][1:],
        "FP / (FP + TP) (%), bounded": lambda run: run["over_activation"]["share"][1:],
    }
    title = "Over-activation of CAMs by class; the paper prints no formula, FP / TP is a reconstruction"
    names = common.classes_of(experiments[0].data)[1:]
    return common.class_bars(title, names, panels, experiments, root, rule, weights, most=CUT)


# The report's


def pcre_figures(scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """As `labels.commatch_figures`."""
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
            ("loss", "Loss terms over training", common.loss_curves(item, root)),
        ]
    for name, table in module.ablations.items():
        column = table.columns_at(scale)[0]
        if table.references and sweep(table, column, scale) and common.filled(table, column, scale, seeds, root) > 1:
            drawn += [(f"curve_{name}", f"{table.title}, as a curve", ablation_curves(table, scale, seeds, root))]
    return drawn + common.table_figures("pcre", scale, seeds, root)
