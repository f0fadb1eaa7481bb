"""The ComMatch explorer: move the thresholds over a saved run and see at once what would be selected.

`load_saved` reads a run, `choose` selects under given limits, `measure` counts: pure functions, with no widget
in them. `explore` puts sliders around them; where nobody watches it returns a figure at the starting limits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.explore.parts import Panel, embedded, html_table, look, opened
from figures.style import INK, Drawing, label_of, themed, where
from repro.data import splits
from repro.experiment import Experiment, resolve
from repro.measure.calibration import ece
from repro.methods.few_labels import commatch
from repro.runs import folder_of, load_outputs

BINS = 15
LOOSEST = 0.53  # no deviation of ten values in [0, 1] reaches it


@dataclass(frozen=True)
class Saved:
    """What the explorer reads of a run: n unlabelled images of the pool, as the trained network sees them.

    passes: (T, n, K) softmax of dropout passes; (1, n, K) of the plain prediction when the run kept none
    truth: (n,) hidden classes, -1 where unknown: for the report only
    images: (n, C, H, W) uint8; classes: names; title: of the run
    """

    passes: Tensor
    truth: Tensor
    images: Tensor
    classes: tuple[str, ...]
    title: str

    @property
    def stochastic(self) -> bool:
        """Whether there are dropout passes, hence an instability to limit."""
        return len(self.passes) > 1


@dataclass(frozen=True)
class Limits:
    """Where the sliders stand; names and meaning as in `commatch.ComMatchSettings`."""

    positive_threshold: float = 0.95
    positive_stability: float = 0.05
    negative_threshold: float = 3e-4
    negative_stability: float = 0.005
    negative_temperature: float = 1.0


@dataclass(frozen=True)
class Chosen:
    """The selection under some limits.

    label, mask, confidence, deviation: (n,) of positives; negative_mask, negative_mean: (n, K).
    """

    label: Tensor
    mask: Tensor
    confidence: Tensor
    deviation: Tensor
    negative_mask: Tensor
    negative_mean: Tensor


@dataclass(frozen=True)
class Quality:
    """How good a selection is: `selected` of `total`; over those of known truth accuracy, mean confidence and
    ECE (None where there are none)."""

    selected: int
    total: int
    accuracy: float | None
    confidence: float | None
    ece: float | None

    @property
    def coverage(self) -> float:
        """Fraction selected."""
        return self.selected / self.total


def load_saved(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Saved:
    """Read the outputs of a finished run and the images they are about. Raises CorruptFile, DataError."""
    outputs = load_outputs(folder_of(experiment, root))
    pool, _ = splits.open_pool(experiment.split, data_root)
    plain = outputs["pool_logits"].softmax(dim=1)[None]
    title = f"{label_of(experiment)}\n{where([experiment])}"
    images = pool.images[outputs["pool_index"]]
    return Saved(outputs.get("pool_passes", plain), outputs["pool_truth"], images, pool.classes, title)


def starting_limits(experiment: Experiment) -> Limits:
    """Limits at the end of an experiment's training if its method has them, else those ComMatch publishes."""
    recipe, settings = resolve(experiment), commatch.ComMatchSettings()
    if isinstance(recipe.method, commatch.ComMatchSettings):
        settings = recipe.method
    positive, negative = commatch.thresholds(settings, (recipe.steps - 1) // recipe.epoch_steps)
    stable = (settings.positive_stability, settings.negative_stability)
    if settings.stability != "dropout":
        stable = (LOOSEST, LOOSEST)
    return Limits(positive, stable[0], negative, stable[1], settings.negative_temperature)


def choose(saved: Saved, limits: Limits) -> Chosen:
    """Positive and negative pseudo-labels of a run's images, by ComMatch's own functions."""
    mean, deviation = _spread(saved.passes)
    label, mask, confidence = commatch.select_positive(
        mean, deviation, limits.positive_threshold, limits.positive_stability
    )
    at_label = deviation.gather(1, label[:, None])[:, 0]
    mean, deviation = negative_spread(saved, limits)
    negatives = commatch.select_negative(
        mean, deviation, limits.negative_threshold, limits.negative_stability, spared=label
    )
    return Chosen(label, mask, confidence, at_label, negatives, mean)


def negative_spread(saved: Saved, limits: Limits) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n, K) that negatives are judged by: those of the passes at their temperature."""
    if limits.negative_temperature == 1.0:
        return _spread(saved.passes)
    log_probs = saved.passes.clamp(min=1e-12).log()
    return _spread((log_probs / limits.negative_temperature).softmax(dim=-1))


def _spread(passes: Tensor) -> tuple[Tensor, Tensor]:
    if len(passes) > 1:
        return commatch.instability(passes)
    return passes[0], torch.zeros_like(passes[0])


def measure(saved: Saved, chosen: Chosen) -> tuple[Quality, Quality]:
    """Quality of the positives (of n images) and of the negatives (of n K pairs of image and class)."""
    n, classes = chosen.negative_mask.shape
    truth, known = saved.truth[:, None], saved.truth >= 0
    wrong = torch.arange(classes) != truth
    return (
        _quality(chosen.mask, chosen.mask & known, chosen.confidence, chosen.label == saved.truth),
        _quality(chosen.negative_mask, chosen.negative_mask & known[:, None], 1 - chosen.negative_mean, wrong),
    )


def _quality(mask: Tensor, judged: Tensor, confidence: Tensor, correct: Tensor) -> Quality:
    confidence, correct = confidence[judged].double(), correct[judged]
    if len(confidence) == 0:
        return Quality(int(mask.sum()), mask.numel(), None, None, None)
    means = (correct.double().mean(), confidence.mean(), ece(confidence, correct, BINS))
    return Quality(int(mask.sum()), mask.numel(), *(float(value) for value in means))


# What is shown

COLUMNS = ("", "selected", "coverage", "accuracy", "mean confidence", f"ECE, {BINS} bins")


def table_rows(positive: Quality, negative: Quality) -> list[tuple[str, ...]]:
    """The two rows of the table of numbers, as text under COLUMNS."""
    rows = []
    for name, quality in (("positives", positive), ("negatives", negative)):
        shares = (quality.coverage, quality.accuracy, quality.confidence, quality.ece)
        texts = ("none" if value is None else f"{100 * value:.2f} %" for value in shares)
        rows.append((name, f"{quality.selected:,} of {quality.total:,}", *texts))
    return rows


def text(positive: Quality, negative: Quality) -> str:
    """The numbers as plain text."""
    rows = [COLUMNS, *table_rows(positive, negative)]
    return "\n".join("".join(f"{cell:>17}" for cell in row) for row in rows)


def html(positive: Quality, negative: Quality) -> str:
    """The numbers as an HTML table."""
    return html_table(COLUMNS, table_rows(positive, negative))


def affected(saved: Saved, chosen: Chosen, shown: int) -> list[tuple[str, list[int]]]:
    """Pool positions worth a look, by heading: surest and least sure positives, worst mistaken negatives.

    A mistaken negative is an image whose true class is held to be wrong, the worst with the least probability.
    """
    selected = chosen.mask.nonzero()[:, 0]
    order = selected[chosen.confidence[selected].argsort(descending=True, stable=True)].tolist()
    true_class = saved.truth.clamp(min=0)[:, None]
    mistaken = chosen.negative_mask.gather(1, true_class)[:, 0] & (saved.truth >= 0)
    at_truth = chosen.negative_mean.gather(1, true_class)[:, 0]
    worst = mistaken.nonzero()[:, 0]
    worst = worst[at_truth[worst].argsort(stable=True)].tolist()
    least = order[shown:][::-1][:shown]  # those not among the surest
    return [
        (f"Surest positives ({len(order):,} in all)", order[:shown]),
        ("Least sure positives", least),
        (f"True class among the negatives ({len(worst):,} in all)", worst[:shown]),
    ]


SHOWN, TILE, STEP, WIDTH = 12, 56, 74, 900  # images a row, their side and distance, width of the picture: pixels
RIGHT, WRONG, REGION = "#0173b2", "#d55e00", (1, 115, 178, 40)
FLOOR = 1e-5  # smaller deviations are drawn here, on a logarithmic axis


@dataclass(frozen=True)
class Plane:
    """Where one scatter plot lies in the picture: its box in pixels, and the pixel of a point."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    pixel: Callable[[float, float], tuple[float, float]]

    def clipped(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point, moved to the edge of the box if it lies beyond."""
        (left, top, right, bottom), (across, down) = self.box, self.pixel(x, y)
        return min(max(across, left), right), min(max(down, top), bottom)


class Canvas:
    """Draws selections of one run: scatter plots, drawn once, under the accepted regions, above some images."""

    def __init__(self, saved: Saved, start: Limits) -> None:
        self.saved = saved
        self.background, self.planes = scatter(saved, choose(saved, start), start)
        self.font, self.small = ImageFont.load_default(12), ImageFont.load_default(10)

    def draw(self, limits: Limits, chosen: Chosen) -> Image.Image:
        """The picture of one selection, RGB."""
        rows = affected(self.saved, chosen, SHOWN)
        picture = Image.new("RGB", (WIDTH, self.background.height + len(rows) * (TILE + 52)), "white")
        picture.paste(self.background)
        pen = ImageDraw.Draw(picture, "RGBA")
        positive, negative = self.planes
        x, y = positive.clipped(limits.positive_threshold, limits.positive_stability)
        pen.rectangle((x, y, *positive.box[2:]), REGION, RIGHT, 2)
        x, y = negative.clipped(limits.negative_threshold, limits.negative_stability)
        pen.rectangle((negative.box[0], y, x, negative.box[3]), REGION, RIGHT, 2)
        for number, (heading, places) in enumerate(rows):
            y = self.background.height + number * (TILE + 52)
            pen.text((8, y), heading if places else f"{heading}: none", INK, self.font)
            for column, place in enumerate(places):
                self._tile(picture, pen, 8 + column * STEP, y + 18, place, chosen, mistaken=number == 2)
        return picture

    def _tile(self, picture, pen, x: int, y: int, place: int, chosen: Chosen, mistaken: bool) -> None:
        truth, label = int(self.saved.truth[place]), int(chosen.label[place])
        named = truth if mistaken else label
        p = float(chosen.negative_mean[place, truth] if mistaken else chosen.confidence[place])
        colour = WRONG if mistaken or truth not in (label, -1) else RIGHT
        pixels = self.saved.images[place].permute(1, 2, 0).squeeze(2).numpy()
        pen.rectangle((x, y, x + TILE + 5, y + TILE + 5), colour)
        picture.paste(Image.fromarray(pixels).convert("RGB").resize((TILE, TILE)), (x + 3, y + 3))
        pen.text((x, y + TILE + 6), self.saved.classes[named][:11], colour, self.small)
        pen.text((x, y + TILE + 17), f"{100 * p:.1f} %" if p > 1e-3 else f"{100 * p:.0e} %", colour, self.small)


@themed
def scatter(saved: Saved, chosen: Chosen, limits: Limits) -> tuple[Image.Image, tuple[Plane, Plane]]:
    """Instability against probability: of each image at its argmax, and of each image and other class."""
    figure = Figure(figsize=(WIDTH / 100, 3.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    n, classes = chosen.negative_mean.shape
    other = torch.arange(classes) != chosen.label[:, None]
    deviation = negative_spread(saved, limits)[1][other]
    right_class = torch.arange(classes).expand(n, classes)[other] != saved.truth[:, None].expand(n, classes)[other]
    _dots(left, chosen.confidence, chosen.deviation, chosen.label == saved.truth)
    _dots(right, chosen.negative_mean[other], deviation, right_class)
    left.set(xlim=(0, 1.01), ylim=(FLOOR / 2, 0.6), yscale="log", title="Positives: image, most probable class")
    left.set(xlabel="confidence (mean over passes)", ylabel="instability (deviation)")
    right.set(xlim=(1e-5, 1), ylim=(FLOOR / 2, 0.6), xscale="log", yscale="log")
    right.set(xlabel="probability (mean over passes)", title="Negatives: image, any other class")
    left.legend(loc="lower left", fontsize=8, markerscale=3)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return picture, (_plane(left, picture.height), _plane(right, picture.height))


def _dots(axes, probability: Tensor, deviation: Tensor, correct: Tensor) -> None:
    deviation = deviation.clamp(min=FLOOR)
    for value, colour, label in ((True, RIGHT, "right"), (False, WRONG, "wrong")):
        part = correct == value
        axes.plot(probability[part].clamp(min=1e-5), deviation[part], ".", markersize=2, color=colour, label=label)


def _plane(axes, height: int) -> Plane:
    box, transform = axes.get_window_extent(), axes.transData.frozen()

    def pixel(x: float, y: float) -> tuple[float, float]:
        across, up = transform.transform((x, max(y, FLOOR)))
        return across, height - up

    return Plane((box.x0, height - box.y1, box.x1, height - box.y0), pixel)


# Widgets


class Explorer(Panel):
    """Sliders over a saved run; every move selects, measures and draws again. See `explore`."""

    def __init__(self, saved: Saved, start: Limits) -> None:
        self.saved, self.start, self.canvas = saved, start, Canvas(saved, start)
        off, loosest = not saved.stochastic, math.log10(LOOSEST)
        controls = {
            "positive_threshold": _linear("t_p, positive threshold", start.positive_threshold, 1, 0.005),
            "positive_stability": _linear("s_p, positive stability", start.positive_stability, LOOSEST, 0.001, off),
            "negative_threshold": _logarithmic("t_n, negative threshold", start.negative_threshold, 0),
            "negative_stability": _logarithmic("s_n, negative stability", start.negative_stability, loosest, off),
        }
        note = ". This run kept no dropout passes: instability is 0, its limits do nothing" if off else ""
        title = f"{saved.title.replace(chr(10), ', ')}{note}"
        super().__init__(title, controls, self.show, lambda: still(saved, start))

    @property
    def limits(self) -> Limits:
        """Where the sliders stand."""
        return dataclasses.replace(self.at(Limits), negative_temperature=self.start.negative_temperature)

    def show(self) -> tuple[str, str]:
        """Select, measure and draw under the sliders' limits."""
        limits = self.limits
        chosen = choose(self.saved, limits)
        words = "Probability and instability of pool images, and what is selected. The table has the numbers."
        return html(*measure(self.saved, chosen)), embedded(self.canvas.draw(limits, chosen), words)


def _linear(description: str, value: float, high: float, step: float, off: bool = False) -> widgets.FloatSlider:
    return widgets.FloatSlider(
        value, min=0, max=high, step=step, readout_format=".3f", disabled=off, **look(description)
    )


def _logarithmic(description: str, value: float, high: float, off: bool = False) -> widgets.FloatLogSlider:
    """A slider of powers of ten from about 1e-5; its steps pass through `value`, or the page would round it away."""
    step, exponent = 0.05, math.log10(max(value, 1e-5))
    low = -5 + (exponent + 5) % step
    return widgets.FloatLogSlider(
        10**exponent, min=low, max=high, step=step, readout_format=".5f", disabled=off, **look(description)
    )


@themed
def still(saved: Saved, limits: Limits) -> Figure:
    """The explorer at one position as a figure: the picture, and under it limits and numbers."""
    chosen = choose(saved, limits)
    picture = Canvas(saved, limits).draw(limits, chosen)
    figure = Drawing(figsize=(WIDTH / 100, picture.height / 100 + 1.05), layout="constrained")
    figure.suptitle(saved.title)
    axes = figure.subplots()
    axes.imshow(picture, interpolation="bilinear")
    axes.set_axis_off()
    names = ("t_p", "s_p", "t_n", "s_n")
    values = (
        limits.positive_threshold,
        limits.positive_stability,
        limits.negative_threshold,
        limits.negative_stability,
    )
    limits_text = ", ".join(f"{name} = {value:g}" for name, value in zip(names, values, strict=True))
    numbers = f"at {limits_text}\n{text(*measure(saved, chosen))}"
    axes.text(
        0.5, -0.01, numbers, family="DejaVu Sans Mono", fontsize=7.5, ha="center", va="top", transform=axes.transAxes
    )
    return figure


def explore(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Explorer | Figure:
    """The explorer of a finished run, or a figure where nobody can move a slider (papermill, export, not run)."""
    start = starting_limits(experiment)

    def panel(saved: Saved) -> Explorer:
        return Explorer(saved, start)

    def drawn(saved: Saved) -> Figure:
        return still(saved, start)

    load = functools.partial(load_saved, experiment, root, data_root)
    return opened("Thresholds over a saved run", experiment, root, load, panel, drawn)
