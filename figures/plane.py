"""CSL's confidence plane and weights: the pixels that a run kept, what a threshold chooses of them and what CSL.

Hidden masks of the pool are for these figures alone; no method sees them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from figures import style
from figures.common import class_colours, classes_of, image_grid, image_panel, outside_legend, picture, unavailable
from figures.style import Root, label_of, start, themed, where
from repro.data.masks import IGNORE
from repro.experiment import Experiment
from repro.methods.few_masks.csl import Reliable, pixel_weights, reliable_statistics, separate
from repro.runs import folder_of, is_finished, load_moments, load_outputs
from repro.settings import SettingError

RIGHT, WRONG = style.BLUE, style.RED
UNSURE, CERTAIN, SMALLEST = 0.2, 1 - 1e-6, 1e-14  # confidence and residual variance beyond are drawn on the frame
SHOWN = 40_000  # pixels that a scatter shows at most
LEVELS = (0.25, 0.5, 0.75)  # of the weight
TICKS = (0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 0.99999)


# What a run keeps


@dataclass(frozen=True, eq=False)
class Moment:
    """How the network of a run saw the kept images of the pool at one evaluation.

    step: of training. images: (P, 3, H, W) uint8. truth: (P, H, W) uint8, 255 unknown; hidden from the method.
    confidence: (P, H, W) in (0, 1]. residual: (P, H, W), residual variance in the released form, from 0.
    label: (P, H, W) uint8, the argmax.
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
        if type(image) is not int or not -count <= image < count:
            raise SettingError(f"image is {image!r}; the run keeps {count} images: 0 to {count - 1}, or 'all' of them")
        at = image % count
        return Moment(self.step, *(part[at : at + 1] for part in list(vars(self).values())[1:]))

    def reliable(self) -> Reliable:
        """Statistics of the reliable cluster of each image, all of whose pixels count as in training."""
        valid = torch.ones_like(self.known)
        cluster = separate(self.confidence, self.residual, valid)
        return reliable_statistics(self.confidence, self.residual, cluster, valid)

    def weight(self, **rule: Any) -> Tensor:
        """CSL's weight (P, H, W), each image by its own split. rule: of `csl.pixel_weights`."""
        valid = torch.ones_like(self.known)
        return pixel_weights(self.confidence, self.residual, valid, self.reliable(), **rule)

    def chosen(self, weight: Tensor) -> str:
        """`keeps 81.2 %, 97.0 % right`, over pixels of known truth; a weight between 0 and 1 keeps a part."""
        share, accuracy = selection(weight, self.right, self.known)
        return f"keeps {100 * share:.1f} %" + (f", {100 * accuracy:.1f} % right" if share > 0 else "")


def read_moment(experiment: Experiment, root: Root = None, moment: int = -1) -> Moment | None:
    """An evaluation of a finished run, counted as in a sequence; None for a run that is not finished or keeps none.

    Raises SettingError for a moment that is not there.
    """
    folder = folder_of(experiment, root)
    kept = list(load_moments(folder).items()) if is_finished(experiment, root) else []
    if not kept:
        return None
    if not -len(kept) <= moment < len(kept):
        raise SettingError(f"moment is {moment}; the run keeps {len(kept)} evaluations: 0 to {len(kept) - 1}")
    outputs, (step, seen) = load_outputs(folder), kept[moment]
    features = (seen[name] for name in ("confidence", "residual", "label"))
    return Moment(step, outputs["pool_images"], outputs["pool_truth"], *features)


def selection(weight: Tensor, right: Tensor, known: Tensor) -> tuple[float, float]:
    """Mean weight of the pixels whose truth is known, and their weighted accuracy; NaN where nothing is, or has weight.

    weight: in [0, 1] or bool; right, known: bool; all of one shape.
    """
    weight, right = weight[known].double(), right[known].double()
    total = float(weight.sum())
    share = total / weight.numel() if weight.numel() else math.nan
    return share, float((weight * right).sum()) / total if total else math.nan


# The plane


@themed
def confidence_plane(
    experiment: Experiment, root: Root = None, image: int | str = 0, moment: int = -1, threshold: float = 0.95,
    alpha: float = 8.0, rule: str = "or", features: str = "both",
) -> Figure:  # fmt: skip
    """Pixels by confidence and residual variance, right and wrong, what a threshold keeps and what CSL (CSL, Fig. 1).

    image: one of the kept images of the pool, or "all", each with a boundary of its own. moment: of the evaluations,
    counted as in a sequence. threshold: kept from there on. alpha, rule, features: of `csl.pixel_weights`.
    Both axes are logarithmic, of 1 - c and of r; what lies beyond `UNSURE`, `CERTAIN` or `SMALLEST` is on the frame.
    Raises SettingError for an image or a moment that is not there.
    """
    found = read_moment(experiment, root, moment)
    alone = image != "all"
    if found is not None and alone:
        found = found.only(image)
    if found is None or not found.known.any():
        return unavailable("The confidence plane", [experiment], root)
    how = {"alpha": alpha, "rule": rule, "features": features}
    weight, known = found.weight(**how), found.known
    confidence = found.confidence[known].double().clamp(UNSURE, CERTAIN).numpy()
    residual, right = found.residual[known].double().clamp(min=SMALLEST).numpy(), found.right[known].numpy()
    order = np.random.default_rng(0).permutation(len(right))[:SHOWN]  # neither colour lies on top of the other
    part = f"image {image}" if alone else f"{len(known)} images"
    count = f"{len(right):,} pixels" + f", {len(order):,} of them drawn" * (len(order) < len(right))
    title = f"The confidence plane of {label_of(experiment)}: {part} of the pool at step {found.step}"
    figure, ((top, corner), (plane, side)) = start(title, [f"{where([experiment])}; {count}"], (9.5, 6.7), 2, 2,
                                                   width_ratios=(5, 1), height_ratios=(1, 4.2))  # fmt: skip
    corner.set_axis_off()
    _scale(plane, top, side, confidence, residual)
    colours = np.array([WRONG, RIGHT])[right[order].astype(int)]
    plane.scatter(confidence[order], residual[order], 3 if len(order) > 10_000 else 8, colours, linewidths=0, alpha=0.6)
    _histogram(top, confidence, right, plane.xaxis, "vertical")
    _histogram(side, residual, right, plane.yaxis, "horizontal")
    _boundaries(plane, found.reliable(), how, shaded=alone)
    for axes, width in ((plane, 1.5), (top, 1)):
        axes.axvline(threshold, color=style.INK, linestyle="--", linewidth=width)
    if alone:  # where no softmax can lie: r is at least (1 - c)^2 / (K - 1)^3
        for at, image_at in ((0.01, picture(found.images[0])), (0.18, _verdict(found))):
            image_panel(plane.inset_axes((at, 0.02, 0.16, 0.28), anchor="SW"), image_at)
    share, line = 100 * float(right.mean()), "beyond the line" if alone else "beyond an image's line"

    def key(label: str, color="black", **look) -> Line2D:
        return Line2D([], [], color=color, label=label, **look)

    dot = {"marker": "o", "linestyle": "", "markersize": 6}
    cut = f"threshold {threshold:g}: {found.chosen(found.confidence >= threshold)}"
    handles = [
        key(f"right label: {share:.1f} % of the pixels", RIGHT, **dot),
        key(f"wrong label: {100 - share:.1f} %", WRONG, **dot),
        *[key(f"w = {', '.join(map(str, LEVELS))}", "0.5", linewidth=0.9)] * alone,
        key(cut, style.INK, linestyle="--", linewidth=1.5),
        key(f"CSL, w = 1 {line}: {found.chosen(weight == 1)}", linewidth=1.8),
        Patch(color="0.8" if alone else "none", label=f"CSL, weighted by w: {found.chosen(weight)}"),
    ]
    outside_legend(figure, plane, 2, handles=handles)
    return figure


def _scale(plane: Axes, top: Axes, side: Axes, confidence: np.ndarray, residual: np.ndarray) -> None:
    """Scales, limits round the pixels, ticks and labels of the plane and of the histograms beside it."""
    nines = (lambda c: -np.log10(1 - np.clip(c, 0, CERTAIN)), lambda x: 1 - 10.0**-x)
    low, high = min(confidence.min(), 0.9), max(confidence.max(), 0.97)
    room, ticks = 0.035 * float(nines[0](high) - nines[0](low)), [1.0]
    for tick in sorted(TICKS, reverse=True):  # labels side by side, not on top of one another
        if low <= tick <= high and nines[0](ticks[-1]) - nines[0](tick) > room:
            ticks.append(tick)
    for axes in (plane, top):
        axes.set_xscale("function", functions=nines)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator(ticks[1:]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda c, _: f"{100 * c:.7g}"))
    for axes in (plane, side):
        axes.set_yscale("log")
        axes.set_ylim(0.7 * residual.min(), 1.4 * residual.max())
        axes.yaxis.set_major_locator(LogLocator(numticks=9))
        axes.yaxis.set_minor_formatter(NullFormatter())
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False)
    top.set(ylabel="pixels", yscale="log")
    side.set(xlabel="pixels", xscale="log")
    plane.set(xlabel="confidence c (%), spaced by log(1 - c)", ylabel="residual variance r")


def _across(axis, count: int) -> np.ndarray:
    """Values from end to end of an axis, evenly spaced as drawn."""
    transform = axis.get_transform()
    values = transform.inverted().transform(np.linspace(*transform.transform(axis.get_view_interval()), count))
    values[[0, -1]] = axis.get_view_interval()  # rounding must not leave out what lies on the frame
    return values


def _histogram(axes: Axes, values: np.ndarray, right: np.ndarray, axis, orientation: str) -> None:
    edges = _across(axis, 61)
    axes.hist(values[right], edges, color=RIGHT, alpha=0.45, histtype="stepfilled", orientation=orientation)
    axes.hist(values[~right], edges, color=WRONG, linewidth=1.4, histtype="step", orientation=orientation)


def _boundaries(axes: Axes, reliable: Reliable, how: dict, shaded: bool) -> None:
    """Where the weight falls below 1, of each image; of a single one also levels of the weight."""
    x, y = _across(axes.xaxis, 500), _across(axes.yaxis, 500)
    c, r = (torch.from_numpy(part)[None] for part in np.meshgrid(x, y))
    for means in zip(reliable.mean_c, reliable.mean_r, reliable.var_c, reliable.var_r, strict=True):
        one = Reliable(*(value[None] for value in means))
        weight = pixel_weights(c, r, torch.ones_like(c, dtype=torch.bool), one, **how)[0].numpy()
        if shaded:
            greys = [str(grey) for grey in np.linspace(0.8, 1, 10)]
            axes.contourf(x, y, weight, np.linspace(0, 1, 11), colors=greys, zorder=0)
            axes.contour(x, y, weight, LEVELS, colors="0.5", linewidths=0.9)
        axes.contour(x, y, weight == 1, [0.5], colors="black", linewidths=1.8 if shaded else 0.9)


# Images


@themed
def weight_maps(
    experiment: Experiment, root: Root = None, images: int = 4, moment: int = -1, threshold: float = 0.95,
    **rule: Any,
) -> Figure:  # fmt: skip
    """Images of the pool with truth, pseudo-label, its errors, the threshold's choice and CSL's weight.

    images: how many, from the first. moment: of the evaluations, counted as in a sequence. rule: of
    `csl.pixel_weights`. Under the maps: what they keep. Raises SettingError for a moment that is not there.
    """
    found = read_moment(experiment, root, moment)
    if found is None:
        return unavailable("Weights of pseudo-labels", [experiment], root)
    count, names = min(images, len(found.truth)), classes_of(experiment.data)
    colours, shade, rows = class_colours(len(names)), colormaps["viridis"], []
    for index in range(count):
        part = found.only(index)
        accuracy = selection(torch.ones_like(part.known), part.right, part.known)[1]
        row = [(picture(part.images[0]), f"image {index}"), colours[part.truth[0]], colours[part.label[0]]]
        row += [(_verdict(part), f"{100 * accuracy:.1f} % right")]
        weights = (part.confidence >= threshold).double(), part.weight(**rule)
        rows.append(row + [(shade(weight[0].numpy())[..., :3], part.chosen(weight)) for weight in weights])
    captions = [f"{where([experiment])}; {count} of {len(found.truth)} kept images of the pool"]
    heads = ("image", "hidden truth", "pseudo-label", "right or wrong", f"threshold {threshold:g}", "CSL's weight")
    title = f"Pseudo-labels of {label_of(experiment)} and their weights at step {found.step}"
    maps, more = [found.truth[:count], found.label[:count]], {"right": RIGHT, "wrong": WRONG}
    figure, grid = image_grid(title, captions, heads, rows, names, maps, more=more)
    figure.colorbar(ScalarMappable(cmap=shade), ax=grid, label="weight of a pixel", shrink=0.7, aspect=30, pad=0.01)
    return figure


def _verdict(found: Moment) -> np.ndarray:
    """The first image's right, wrong and unknown pixels in colour, (H, W, 3)."""
    colours = np.array([WRONG, RIGHT, class_colours(1)[IGNORE]])
    return colours[torch.where(found.known, found.right.long(), 2)[0].numpy()]
