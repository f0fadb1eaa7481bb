"""The explorer of runs from few masks: which pixels of an unlabelled image each rule keeps, and how many are right.

Predictions are those that a run saves at each evaluation: of whole pool images, in eval mode. Training makes its labels
in training mode, on augmented crops.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from figures.common import class_colours, classes_of
from figures.explore import panel
from figures.explore.panel import RIGHT, UNKNOWN, WRONG, Explorer, Missing, Numbers, Seen
from figures.plane import CERTAIN, SHOWN, SMALLEST, TICKS, Moment
from figures.style import INK, label_of, where
from repro.experiment import Experiment, resolve
from repro.methods.few_masks.csl import FEATURES, pixel_weights
from repro.runs import folder_of, load_moments, load_outputs

SELECTIONS = {"gaussian": "CSL, Gaussian", "hard": "CSL, 0 or 1", "threshold": "threshold"}
THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999)


class Weights(Explorer):
    """Which pixels of a pool image CSL's weights and a threshold keep, and how many of them are right.

    moments: the evaluations of the run by step. settings: of the run's method.
    """

    about = "Which pixels are kept"
    words = "The confidence plane, and maps of what is kept."
    size = (9.0, 4.6)

    def __init__(self, experiment: Experiment, root: Path | None = None) -> None:
        folder = folder_of(experiment, root)
        kept = load_moments(folder)
        if not kept:
            raise Missing("moment of its training")
        outputs = load_outputs(folder)
        images, truth = outputs["pool_images"], outputs["pool_truth"]
        self.moments = {step: Moment(step, images, truth, **seen) for step, seen in kept.items()}
        self.classes, self.settings = classes_of(experiment.data), resolve(experiment).method
        self.title = f"{label_of(experiment)}, {where([experiment])}"

    def controls(self) -> dict[str, widgets.Widget]:
        start = {"selection": "gaussian", "threshold": 0.95, "alpha": 8.0, "features": "both", "rule": "or"}
        own = {name: getattr(self.settings, name) for name in start if hasattr(self.settings, name)}
        at = start | ({"selection": "threshold"} if "threshold" in own else {}) | own
        power, images = math.log2(at["alpha"]), len(next(iter(self.moments.values())).truth)
        scale = {"base": 2, "min": min(-2, power), "max": max(8, power), "step": 0.25, "readout_format": ".3g"}
        steps = [(str(step), step) for step in self.moments]
        return {
            "image": panel.whole("image of the pool", 0, 0, images - 1),
            "step": panel.slider("training step", steps, max(self.moments)),
            "selection": panel.buttons("rule", SELECTIONS, at["selection"]),
            "features": panel.buttons("CSL reads", dict(zip(FEATURES, FEATURES, strict=True)), at["features"]),
            "threshold": panel.slider("tau, threshold", panel.levels(THRESHOLDS, at["threshold"]), at["threshold"]),
            "alpha": widgets.FloatLogSlider(at["alpha"], **scale, **panel.looks("alpha, Gaussian")),
            "rule": panel.buttons("full weight where", {"or": "either is good", "and": "both are"}, at["rule"]),
        }

    def compute(self, image: int, step: int, **at) -> Seen:
        """at: selection, of SELECTIONS; threshold; alpha, features and rule as in `pixel_weights`.

        moment: the image at the step. weights: (H, W) in [0, 1] by SELECTIONS.
        """
        seen = self.moments[step].only(image)
        how = {name: at[name] for name in ("alpha", "features", "rule")}
        soft, hard = (seen.weight(soft=soft, **how)[0] for soft in (True, False))
        above = (seen.confidence[0] >= at["threshold"]).to(soft.dtype)
        weights = {"gaussian": soft, "hard": hard, "threshold": above}
        return Seen(moment=seen, weights=weights, at={"image": image} | at)

    def numbers(self, seen: Seen) -> Numbers:
        found, at = seen.moment, seen.at
        said = f"Image {at['image']} of the pool at step {found.step} of {max(self.moments)}"
        said += f", {found.label.numel():,} pixels"
        if not found.known.any():
            said += "; its mask is hidden from this report too, so nothing is known to be right"
        if getattr(self.settings, "scope", "image") != "image":
            said += f"; the run splits each {self.settings.scope}, shown is one split an image"
        if getattr(self.settings, "form", "released") != "released":
            said += "; the run reads the other form of r, shown is the released one"
        rows = []
        for name, weight in (seen.weights | {"every pixel": torch.ones_like(seen.weights["hard"])}).items():
            more = {"gaussian": f", alpha = {at['alpha']:.3g}", "threshold": f" {at['threshold']:g}"}.get(name, "")
            label = f"{'> ' * (name == at['selection'])}{SELECTIONS.get(name, name)}{more}"
            values = measure(weight, found.right[0], found.known[0])
            rows.append((label, *(panel.percent(value, 2) for value in values)))
        columns = ("", "kept: mean weight", "right, of kept", "wrong and kept", "weight is 1")
        return Numbers(f"{said}.", columns, rows)

    def layout(self, figure: FigureBase) -> list[Axes]:
        plane = figure.add_axes((0.07, 0.19, 0.4, 0.74))
        plane.grid(False)
        panel.plain_ticks(plane)
        plane.set_title("blue: right, orange: wrong label; white: kept, grey: less weight", fontsize=8)
        plane.set(xlabel="confidence c (%)", ylabel="log10 of the residual variance r")
        plane.set_xticks(-np.log10(1 - np.array(TICKS[1:])), [f"{100 * tick:.6g}" for tick in TICKS[1:]], rotation=60)
        return [plane, *panel.tiles(figure, 2, 3, left=0.5)]

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        plane, *grid, below = axes
        self.draw_plane(plane, seen)
        found, at, colours = seen.moment, seen.at, class_colours(len(self.classes))
        beside = "gaussian" if at["selection"] == "threshold" else "threshold"
        named = SELECTIONS | {"threshold": f"threshold {at['threshold']:g}"}
        image, label, truth = found.images[0].permute(1, 2, 0).numpy(), found.label[0].numpy(), found.truth[0].numpy()
        verdict = np.array([WRONG, RIGHT, UNKNOWN])[np.where(found.known[0], found.right[0].long(), 2)]
        chosen, other = seen.weights[at["selection"]], seen.weights[beside]
        pictures = (
            ("image", image),
            (f"kept: {named[at['selection']]}", panel.fade(image, chosen)),
            (f"kept: {named[beside]}", panel.fade(image, other)),
            ("hidden truth" if found.known.any() else "truth is not known", colours[truth]),
            ("pseudo-label", colours[label]),
            ("kept: right or wrong", panel.fade(verdict, chosen)),
        )
        for tile, (title, pixels) in zip(grid, pictures, strict=True):
            panel.picture(tile, pixels, title)
        names = {**dict(enumerate(self.classes)), 255: "unknown"}
        panel.key(below, [(names[kind], colours[kind]) for kind in np.union1d(truth, label)], 5)

    def draw_plane(self, plane: Axes, seen: Seen) -> None:
        """Pixels by confidence and residual variance over the weight of the chosen rule. The axes hold the pixels of
        all steps, so that only pixels move with the step."""
        found, at = seen.moment, seen.at
        parts = [spaced(one.confidence[at["image"]], one.residual[at["image"]]) for one in self.moments.values()]
        (left, right), (low, high) = (
            (min(x.min() for x in axis), max(x.max() for x in axis)) for axis in zip(*parts, strict=True)
        )
        x = np.linspace(left - 0.05, max(right, 2.0) + 0.05, 190)
        y = np.linspace(low - 0.2, max(high, low + 1) + 0.2, 160)
        c, r = (torch.from_numpy(part)[None] for part in np.meshgrid(1 - 10**-x, 10**y))
        how = {name: at[name] for name in ("alpha", "features", "rule")} | {"soft": at["selection"] != "hard"}
        csl = pixel_weights(c, r, torch.ones_like(c, dtype=torch.bool), found.reliable(), **how)[0].numpy()
        shade = (c[0].numpy() >= at["threshold"]).astype(float) if at["selection"] == "threshold" else csl
        box = (x[0], x[-1], y[0], y[-1])
        plane.imshow(shade, extent=box, origin="lower", aspect="auto", cmap="gray", vmin=-4, vmax=1)
        plane.contour(x, y, csl == 1, [0.5], colors=INK, linewidths=1.4)
        plane.axvline(spaced(torch.tensor(at["threshold"]), torch.ones(1))[0], color=INK, linestyle="--")
        order = np.random.default_rng(0).permutation(found.label.numel())[:SHOWN]  # neither colour lies on top
        colours = np.array([WRONG, RIGHT, UNKNOWN])[np.where(found.known[0], found.right[0].long(), 2)] / 255
        across, up = (part.ravel()[order] for part in spaced(found.confidence[0], found.residual[0]))
        plane.scatter(across, up, 3, colours.reshape(-1, 3)[order], linewidths=0, alpha=0.7)
        plane.set(xlim=box[:2], ylim=box[2:])


def measure(weight: Tensor, right: Tensor, known: Tensor) -> tuple[float, ...]:
    """What a weight keeps: its mean; the weighted accuracy; the weight of wrong pixels, per pixel; the share of 1.

    weight: in [0, 1]; right, known: bool; all of one shape. The second and third are over pixels of known truth, NaN
    where there is none, the second also where none has weight.
    """
    weight = weight.double()
    good, total = weight[known & right].sum(), weight[known].sum()
    values = (weight.mean(), good / total, (total - good) / known.sum(), (weight == 1).double().mean())
    return tuple(map(float, values))


def spaced(confidence: Tensor, residual: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-log10(1 - c) and log10(r), as the plane shows them; what lies beyond its ends is put there."""
    c = confidence.double().clamp(max=CERTAIN)
    return -(1 - c).log10().numpy(), residual.double().clamp(min=SMALLEST).log10().numpy()
