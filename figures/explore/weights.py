"""The weights explorer: which pixels of an unlabelled image each rule keeps, and how many of them are labelled right.

`load_saved`, `weigh` and `measure` are pure functions, with no widget in them; weights come from `separation`.
`explore` puts controls around them; where nobody watches it returns a figure. Predictions are those that a run saves at
each evaluation: of whole pool images, in eval mode. Training makes its labels in training mode, on augmented crops.
"""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.explore.parts import Panel, buttons, embedded, html_table, look, opened, outline, sheet, slider
from figures.explore.reliability import Plane
from figures.plane import CERTAIN, SHOWN, SMALLEST, TICKS, Moment, class_colours, classes_of
from figures.style import INK, label_of, where
from repro.experiment import Experiment, resolve
from repro.methods.few_masks.csl import FEATURES, Reliable, pixel_weights
from repro.runs import folder_of, load_moments, load_outputs

SELECTIONS = {"gaussian": "CSL, Gaussian", "hard": "CSL, 0 or 1", "threshold": "threshold"}
THRESHOLDS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9999)
NARROWEST, WIDEST = -2, 8  # log2 of alpha


@dataclass(frozen=True, eq=False)
class Saved:
    """What the explorer reads of a run: its evaluations by step, names of classes, the method's settings, a title."""

    moments: dict[int, Moment]
    classes: tuple[str, ...]
    settings: Any
    title: str


@dataclass(frozen=True)
class Position:
    """Where the controls stand.

    image: of the pool's kept images. step: of training, an evaluation. selection: of SELECTIONS. threshold: tau.
    alpha, features, rule: as in `csl.pixel_weights`.
    """

    image: int
    step: int
    selection: str = "gaussian"
    threshold: float = 0.95
    alpha: float = 8.0
    features: str = "both"
    rule: str = "or"


@dataclass(frozen=True)
class Numbers:
    """What a weight keeps, as fractions; None where it is not defined or no truth is known.

    kept: mean weight of all pixels. full: share of weight 1. right: weighted accuracy. wrong: weight of wrongly
    labelled pixels, per pixel. The last two are over pixels whose truth is known.
    """

    kept: float
    full: float
    right: float | None
    wrong: float | None


def load_saved(experiment: Experiment, root: Path | None = None) -> Saved | None:
    """Read a finished run; None for one that kept no evaluation. Raises CorruptFile."""
    folder = folder_of(experiment, root)
    kept = load_moments(folder)
    if not kept:
        return None
    outputs = load_outputs(folder)
    images, truth = outputs["pool_images"], outputs["pool_truth"]
    moments = {step: Moment(step, images, truth, **seen) for step, seen in kept.items()}
    title = f"{label_of(experiment)}, {where([experiment])}"
    return Saved(moments, classes_of(experiment.data), resolve(experiment).method, title)


def starting(saved: Saved) -> Position:
    """The first image at the last evaluation, under the run's own rule; CSL's for a method without one."""
    names = [field.name for field in dataclasses.fields(Position)]
    own = {name: getattr(saved.settings, name) for name in names if hasattr(saved.settings, name)}
    if "threshold" in own:
        own = {"selection": "threshold"} | own
    return Position(0, max(saved.moments), **own)


def csl_weight(confidence: Tensor, residual: Tensor, found: Reliable, at: Position, soft: bool = True) -> Tensor:
    """CSL's weight (B, H, W) at a position, each image by its own split."""
    how = {"alpha": at.alpha, "features": at.features, "rule": at.rule, "soft": soft}
    return pixel_weights(confidence, residual, torch.ones_like(confidence, dtype=torch.bool), found, **how)


def weigh(saved: Saved, at: Position) -> dict[str, Tensor]:
    """Weight (H, W) in [0, 1] of each pixel of the image by each of SELECTIONS, at the position's other values."""
    seen = saved.moments[at.step].only(at.image)
    found = seen.reliable()
    soft, hard = (csl_weight(seen.confidence, seen.residual, found, at, soft)[0] for soft in (True, False))
    return {"gaussian": soft, "hard": hard, "threshold": (seen.confidence[0] >= at.threshold).to(soft.dtype)}


def measure(weight: Tensor, right: Tensor, known: Tensor) -> Numbers:
    """What a weight keeps. weight: in [0, 1]; right, known: bool, of labels and truth; of one shape, not empty."""
    weight = weight.double()
    kept, full = float(weight.mean()), float((weight == 1).double().mean())
    if not known.any():
        return Numbers(kept, full, None, None)
    good, total = float(weight[known & right].sum()), float(weight[known].sum())
    return Numbers(kept, full, good / total if total else None, (total - good) / int(known.sum()))


# What is shown

COLUMNS = ("", "kept: mean weight", "right, of kept", "wrong and kept", "weight is 1")


def table_rows(saved: Saved, at: Position, weights: dict[str, Tensor] | None = None) -> list[tuple[str, ...]]:
    """Numbers of every rule and of all pixels as text under COLUMNS; `>` marks the rule of the position."""
    seen, weights = saved.moments[at.step].only(at.image), weights or weigh(saved, at)
    every = {"every pixel": torch.ones_like(weights["gaussian"])}
    rows = []
    for name, weight in (weights | every).items():
        more = {"gaussian": f", alpha = {at.alpha:.3g}", "threshold": f" {at.threshold:g}"}.get(name, "")
        found = measure(weight, seen.right[0], seen.known[0])
        values = (found.kept, found.right, found.wrong, found.full)
        shown = ("-" if value is None else f"{100 * value:.2f} %" for value in values)
        rows.append((f"{'> ' * (name == at.selection)}{SELECTIONS.get(name, name)}{more}", *shown))
    return rows


def text(saved: Saved, at: Position) -> str:
    """The numbers as plain text."""
    rows = (COLUMNS, *table_rows(saved, at))
    lines = (f"{name:<30}" + "".join(f"{cell:>19}" for cell in cells) for name, *cells in rows)
    return "\n".join((heading(saved, at), *lines))


def html(saved: Saved, at: Position, weights: dict[str, Tensor] | None = None) -> str:
    """The numbers as an HTML table, the rule of the position in bold."""
    return heading(saved, at) + html_table(COLUMNS, table_rows(saved, at, weights))


def heading(saved: Saved, at: Position) -> str:
    """Which image and step, how many pixels, and what a reader has to know of their truth and of the split."""
    seen = saved.moments[at.step].only(at.image)
    said = f"Image {at.image} of the pool at step {at.step} of {max(saved.moments)}, {seen.label.numel():,} pixels"
    if not seen.known.any():
        said += "; its mask is hidden from this report too, so nothing is known to be right"
    if getattr(saved.settings, "scope", "image") != "image":
        said += f"; the run splits each {saved.settings.scope}, shown is one split an image"
    if getattr(saved.settings, "form", "released") != "released":
        said += "; the run reads the other form of r, shown is the released one"
    return said


TITLE = "Which pixels are kept"
WIDTH, HEIGHT = 900, 426  # of the picture, pixels
BOX = (58, 40, 440, 372)  # of the plane: left, top, right, bottom
TILE, LEFT, TOP, STEP, ROW = 138, 464, 40, 146, 168  # tiles: side, corner of the first, to the next, to the next row
RIGHT, WRONG, UNKNOWN = (1, 115, 178), (213, 94, 0), (130, 130, 130)
FADED, GREY = 0.12, 205  # what is left of an unkept pixel's colour; unkept regions of the plane


class Canvas:
    """Draws one run at a position: the confidence plane of an image, and what the rules keep of it."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.font, self.small = ImageFont.load_default(12), ImageFont.load_default(11)
        self.colours = (255 * class_colours(len(saved.classes))).round().astype(np.uint8)
        self.plane, self.empty, self.dots = (
            functools.lru_cache(64)(part) for part in (self._plane, self._empty, self._dots)
        )

    def draw(self, at: Position, weights: dict[str, Tensor] | None = None) -> Image.Image:
        """The picture, RGB. weights: what `weigh` returns, if it is at hand."""
        seen, weights = self.saved.moments[at.step].only(at.image), weights or weigh(self.saved, at)
        picture = self.empty(at.image).copy()
        pen = ImageDraw.Draw(picture)
        self._draw_plane(picture, pen, seen, at)
        image, label, truth = seen.images[0].permute(1, 2, 0).numpy(), seen.label[0].numpy(), seen.truth[0].numpy()
        beside = "gaussian" if at.selection == "threshold" else "threshold"
        chosen, other = (weights[name][..., None].numpy() for name in (at.selection, beside))
        known = seen.known[0].numpy()[..., None]
        verdict = np.where(known, np.where(seen.right[0].numpy()[..., None], RIGHT, WRONG), UNKNOWN)
        tiles = (
            ("image", image),
            (f"kept: {self._named(at.selection, at)}", fade(image, chosen)),
            (f"kept: {self._named(beside, at)}", fade(image, other)),
            ("hidden truth" if known.any() else "truth is not known", self.colours[truth]),
            ("pseudo-label", self.colours[label]),
            ("kept: right or wrong", fade(verdict, chosen)),
        )
        for place, (name, pixels) in enumerate(tiles):
            corner = LEFT + place % 3 * STEP, TOP + place // 3 * ROW
            pen.text((corner[0], corner[1] - 16), name, INK, self.small)
            self._tile(picture, pen, corner, pixels, blend=place < 3)
        self._legend(pen, sorted({*np.unique(truth).tolist(), *np.unique(label).tolist()}))
        return picture

    def _named(self, selection: str, at: Position) -> str:
        return f"threshold {at.threshold:g}" if selection == "threshold" else SELECTIONS[selection]

    def _tile(self, picture, pen, corner: tuple[int, int], pixels: np.ndarray, blend: bool) -> None:
        """Pixels of any size as a tile; where they shrink, a photograph's are blended, colours of classes not."""
        high, wide = (max(1, round(TILE * side / max(pixels.shape[:2]))) for side in pixels.shape[:2])
        how = Image.Resampling.BOX if blend and max(pixels.shape) > TILE else Image.Resampling.NEAREST
        picture.paste(Image.fromarray(pixels.astype(np.uint8)).resize((wide, high), how), corner)
        pen.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + wide, corner[1] + high), None, UNKNOWN)

    def _legend(self, pen, present: list[int]) -> None:
        """Colours and names of the classes in the image, as many as there is room for."""
        x, y = LEFT, TOP + ROW + TILE + 14
        for label in present:
            name = self.saved.classes[label] if label < len(self.saved.classes) else "unknown"
            wide = 20 + pen.textlength(name, self.small)
            if x + wide > WIDTH:
                x, y = LEFT, y + 16
            pen.rectangle((x, y, x + 10, y + 10), tuple(self.colours[label].tolist()), UNKNOWN)
            pen.text((x + 14, y - 1), name, INK, self.small)
            x += wide + 8

    # The confidence plane

    def _plane(self, image: int) -> Plane:
        """Axes of an image: log10 scales round the pixels of all steps, so that only pixels move with the step."""
        moments = self.saved.moments.values()
        thin = max(1, next(iter(moments)).label[0].numel() // SHOWN)
        parts = [spaced(*(x[image].flatten()[::thin] for x in (seen.confidence, seen.residual))) for seen in moments]
        axes = zip(*parts, strict=True)
        (left, right), (low, high) = ((min(x.min() for x in axis), max(x.max() for x in axis)) for axis in axes)
        return Plane(*BOX, (left - 0.05, max(right, 2.0) + 0.05, low - 0.2, max(high, low + 1) + 0.2))

    def _draw_plane(self, picture, pen, seen: Moment, at: Position) -> None:
        plane, (left, top, right, bottom) = self.plane(at.image), BOX
        x0, x1, y0, y1 = plane.values
        across, up = np.linspace(x0, x1, (right - left) // 2), np.linspace(y1, y0, (bottom - top) // 2)
        c, r = (torch.from_numpy(part)[None] for part in np.meshgrid(1 - 10**-across, 10**up))
        csl = csl_weight(c, r, seen.reliable(), at, at.selection != "hard")[0].numpy()
        shade = (c[0].numpy() >= at.threshold) if at.selection == "threshold" else csl
        shade = GREY + (255 - GREY) * shade
        shade[outline(csl == 1)] = 0
        region = Image.fromarray(shade.astype(np.uint8)).resize((right - left, bottom - top)).convert("RGBA")
        region.alpha_composite(self.dots(at.image, at.step))
        picture.paste(region.convert("RGB"), (left, top))
        pen.rectangle(BOX, None, UNKNOWN)
        x = self._place(at.threshold, plane)
        for y in range(top, bottom, 8) if left < x < right else ():
            pen.line([(x, y), (x, min(y + 4, bottom))], INK, 2)

    def _place(self, confidence: float, plane: Plane) -> float:
        return plane.pixel(spaced(torch.tensor([confidence]), torch.ones(1))[0].item(), 0)[0]

    def _empty(self, image: int) -> Image.Image:
        """The picture with what does not depend on the controls: ticks and words about the plane."""
        picture, plane, (left, top, right, bottom) = Image.new("RGB", (WIDTH, HEIGHT), "white"), self.plane(image), BOX
        pen, said = ImageDraw.Draw(picture), -100.0
        pen.text((8, 2), "Pixels by confidence c (%) and residual variance r", INK, self.font)
        key, at = (("right label", RIGHT), ("wrong label", WRONG), ("line: CSL, w = 1; dashed: threshold", INK)), left
        for words, colour in key:
            pen.text((at, top - 17), words, colour, self.small)
            at += pen.textlength(words, self.small) + 12
        for tick in TICKS:
            x = self._place(tick, plane)
            if left <= x <= right - 8 and x - said > 30:
                pen.text((x, bottom + 5), f"{100 * tick:.6g}", INK, self.small, anchor="mt")
                said = x
        powers = range(int(np.ceil(plane.values[2])), int(np.floor(plane.values[3])) + 1)
        for power in powers[:: max(1, len(powers) // 6)]:
            pen.text((left - 6, plane.pixel(0, power)[1]), f"1e{power}", INK, self.small, anchor="rm")
        pen.text((left, bottom + 24), "white: kept by the chosen rule; grey: less weight, or none", INK, self.small)
        return picture

    def _dots(self, image: int, step: int) -> Image.Image:
        """The pixels of an image at a step, RGBA, as large as the plane; at most `SHOWN` of them."""
        seen, (left, top, right, bottom) = self.saved.moments[step].only(image), BOX
        shown = np.random.default_rng(0).permutation(seen.label.numel())[:SHOWN]  # no colour on top
        maps = (seen.confidence, seen.residual, seen.right, seen.known)
        c, r, good, known = (part.flatten()[torch.from_numpy(shown)] for part in maps)
        x, y = self.plane(image).pixel(*spaced(c, r))
        colour = np.where(known[:, None], np.where(good[:, None], RIGHT, WRONG), UNKNOWN)
        layer, side = np.zeros((bottom - top, right - left, 4), np.uint8), 2 if len(shown) < 10_000 else 1
        for down, aside in itertools.product(range(side), range(side)):
            rows = np.clip(y - top + down, 0, bottom - top - 1).astype(int)
            columns = np.clip(x - left + aside, 0, right - left - 1).astype(int)
            layer[rows, columns] = np.c_[colour, np.full(len(colour), 190)]
        return Image.fromarray(layer)


def spaced(confidence: Tensor, residual: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """-log10(1 - c) and log10(r); what lies beyond the figures' ends is put there."""
    c = confidence.double().clamp(max=CERTAIN)
    return -(1 - c).log10().numpy(), residual.double().clamp(min=SMALLEST).log10().numpy()


def fade(pixels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) in 0..255 that pale towards white with their weight (H, W, 1)."""
    weight = FADED + (1 - FADED) * weight
    return weight * pixels + (1 - weight) * 255


# Widgets


class Explorer(Panel):
    """Controls over a saved run; every move weighs, measures and draws again. See `explore`."""

    def __init__(self, saved: Saved) -> None:
        self.saved, self.canvas, self.start = saved, Canvas(saved), starting(saved)
        start, images = self.start, len(next(iter(saved.moments.values())).truth)
        levels, power = sorted({*THRESHOLDS, start.threshold}), math.log2(start.alpha)
        powers = {"base": 2, "min": min(NARROWEST, power), "max": max(WIDEST, power), "step": 0.25}
        steps = [(str(step), step) for step in saved.moments]
        controls = {
            "image": widgets.IntSlider(start.image, min=0, max=images - 1, **look("image of the pool")),
            "step": slider("training step", steps, start.step),
            "selection": buttons("rule", {name: key for key, name in SELECTIONS.items()}, start.selection),
            "features": buttons("CSL reads", {name: name for name in FEATURES}, start.features),
            "threshold": slider("tau, threshold", [(f"{level:g}", level) for level in levels], start.threshold),
            "alpha": widgets.FloatLogSlider(start.alpha, readout_format=".3g", **powers, **look("alpha, Gaussian")),
            "rule": buttons("full weight where", {"either is good": "or", "both are": "and"}, start.rule),
        }
        super().__init__(saved.title, controls, self.show, lambda: still(saved, start))

    @property
    def position(self) -> Position:
        """Where the controls stand."""
        return self.at(Position)

    def show(self) -> tuple[str, str]:
        """Weigh, measure and draw at the controls' position."""
        at = self.position
        weights = weigh(self.saved, at)
        words = f"{heading(self.saved, at)}: the confidence plane, and maps of what is kept. The table has the numbers."
        return html(self.saved, at, weights), embedded(self.canvas.draw(at, weights), words)


def still(saved: Saved, at: Position | None = None) -> Figure:
    """The explorer at one position (by default the starting one) as a figure: the picture, the numbers below."""
    at = at or starting(saved)
    return sheet(f"{TITLE}\n{saved.title}", Canvas(saved).draw(at), text(saved, at))


def explore(experiment: Experiment, root: Path | None = None) -> Explorer | Figure:
    """The explorer of a finished run, or a figure where nobody can move a slider (papermill, export, not run)."""
    lacking = "moment of its training"
    return opened(TITLE, experiment, root, lambda: load_saved(experiment, root), Explorer, still, lacking)
