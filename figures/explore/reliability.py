"""The reliability explorer: temperature, bins and closing move a saved run's diagram and numbers at once.

`diagram`, `measure` and `sweep` are pure functions, with no widget in them. `explore` puts controls around them;
where nobody watches it returns a figure at the starting position.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.calibration import Predictions, short_label
from figures.explore.parts import Panel, buttons, embedded, html_table, look
from figures.style import INK, Drawing, message, themed, where
from repro.batch.progress import is_watched
from repro.experiment import Experiment
from repro.measure import calibration
from repro.measure.reliability import Bins, reliability
from repro.runs import is_finished

COLDEST, HOTTEST = 0.1, 10.0
SWEEP = torch.logspace(-1, 1, 41, dtype=torch.float64)
SPACINGS = {"equal width": "width", "equal count": "mass"}


@dataclass(frozen=True)
class Position:
    """Where the controls stand; bins, closing and spacing as in `reliability.reliability`."""

    temperature: float = 1.0
    bins: int = 15
    closing: str = "right"
    spacing: str = "width"


@dataclass(frozen=True)
class Numbers:
    """A row of the table: fractions, NLL in nats; MCE is over the diagram's bins, adaptive ECE over equal counts."""

    accuracy: float
    ece: float
    adaptive_ece: float
    mce: float
    nll: float
    brier: float


@dataclass(frozen=True)
class Saved:
    """A run's predictions under its name, with what does not depend on the bins worked out beforehand.

    correct: (n,), at any temperature. confidence: (len(SWEEP), n); nll: (len(SWEEP),), along SWEEP.
    """

    title: str
    predictions: Predictions
    correct: Tensor
    confidence: Tensor
    nll: Tensor

    @classmethod
    def of(cls, title: str, predictions: Predictions) -> "Saved":
        """Work them out: some tenths of a second."""
        _, correct = predictions.top()
        probs = [predictions.probs(float(temperature)) for temperature in SWEEP]
        confidence = torch.stack([at.amax(dim=1) for at in probs])
        nll = torch.stack([calibration.nll(at, predictions.labels) for at in probs])
        return cls(title, predictions, correct, confidence, nll)


def diagram(saved: Saved, at: Position) -> Bins:
    """The reliability bins at a position."""
    confidence = saved.predictions.probs(at.temperature).amax(dim=1)
    return reliability(confidence, saved.correct, at.bins, at.closing, at.spacing)


def measure(saved: Saved, at: Position) -> Numbers:
    """The numbers at a position."""
    probs, labels = saved.predictions.probs(at.temperature), saved.predictions.labels
    confidence, found = probs.amax(dim=1), diagram(saved, at)
    adaptive = calibration.adaptive_ece(confidence, saved.correct, at.bins)
    scores = calibration.nll(probs, labels), calibration.brier(probs, labels)
    values = (saved.correct.double().mean(), found.ece, adaptive, found.mce, *scores)
    return Numbers(*(float(value) for value in values))


def sweep(saved: Saved, at: Position) -> list[float]:
    """ECE at every temperature of SWEEP, with the position's bins."""
    found = (reliability(row, saved.correct, at.bins, at.closing, at.spacing) for row in saved.confidence)
    return torch.stack([bins.ece for bins in found]).tolist()


# What is shown

COLUMNS = ("", "accuracy", "ECE", "adaptive ECE", "MCE", "NLL (nats)", "Brier")


def table_rows(saved: Saved, at: Position) -> list[tuple[str, ...]]:
    """Numbers as trained, at the position and at the fitted temperature, as text under COLUMNS."""
    named = [("as trained, T = 1", 1.0), (f"here, T = {at.temperature:.3g}", at.temperature)]
    fitted = saved.predictions.temperature
    if fitted is not None:
        named.append((f"fitted, T = {fitted:.3g}", fitted))
    rows = []
    for name, temperature in named:
        found = measure(saved, dataclasses.replace(at, temperature=temperature))
        *shares, nll, brier = dataclasses.astuple(found)
        rows.append((name, *(f"{100 * share:.2f} %" for share in shares), f"{nll:.4f}", f"{brier:.4f}"))
    return rows


def text(saved: Saved, at: Position) -> str:
    """The numbers as plain text."""
    head, *body = [COLUMNS, *table_rows(saved, at)]
    return "\n".join(f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in (head, *body))


def html(saved: Saved, at: Position) -> str:
    """The numbers as an HTML table."""
    return html_table(COLUMNS, table_rows(saved, at))


WIDTH, HEIGHT = 900, 430  # of the picture, pixels
BLUE, GAP, GREY, ORANGE, GREEN = "#0173b2", (213, 94, 0, 90), "#949494", "#de8f05", "#029e73"


@dataclass(frozen=True)
class Plane:
    """An axes box in the picture, in pixels, and the values at its left, right, bottom and top."""

    left: float
    top: float
    right: float
    bottom: float
    values: tuple[float, float, float, float] = (0, 1, 0, 1)

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        x0, x1, y0, y1 = self.values
        across = self.left + (x - x0) / (x1 - x0) * (self.right - self.left)
        return across, self.bottom - (y - y0) / (y1 - y0) * (self.bottom - self.top)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        """The pixels of a rectangle, in the order that drawing needs, a pixel wide at least."""
        (a, b), (c, d) = self.pixel(x0, y0), self.pixel(x1, y1)
        return min(a, c), min(b, d), max(a, c, min(a, c) + 1), max(b, d)


DIAGRAM = Plane(60, 24, 430, 310)
COUNTS = Plane(60, 322, 430, 394)
CURVE = Plane(520, 24, 885, 394, (-1, 1, 0, 1))  # log10 of the temperature


class Canvas:
    """Draws one run at a position: diagram, counts, and the errors along the temperature."""

    def __init__(self) -> None:
        self.font, self.small = ImageFont.load_default(12), ImageFont.load_default(10)
        self.sweep = functools.lru_cache(64)(self._sweep)
        self.runs: dict[int, Saved] = {}

    def _sweep(self, key: int, bins: int, closing: str, spacing: str) -> list[float]:
        return sweep(self.runs[key], Position(1.0, bins, closing, spacing))

    def draw(self, saved: Saved, at: Position) -> Image.Image:
        """The picture, RGB."""
        picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        pen = ImageDraw.Draw(picture, "RGBA")
        found = diagram(saved, at)
        bins = [row for row in zip(*(getattr(found, name).tolist() for name in
                ("lower", "upper", "accuracy", "confidence", "count")), strict=True) if row[4]]  # fmt: skip
        tallest = max(count for *_, count in bins) if bins else 1
        for lower, upper, accuracy, confidence, count in bins:
            pen.rectangle(DIAGRAM.box(lower, 0, upper, accuracy), "#8cbcdc", "white")
            pen.rectangle(DIAGRAM.box(lower, accuracy, upper, confidence), GAP, "#d55e00")
            pen.line([DIAGRAM.pixel(lower, accuracy), DIAGRAM.pixel(upper, accuracy)], BLUE, 3)
            pen.rectangle(COUNTS.box(lower, 0, upper, count / tallest), GREY, "white")
        pen.line([DIAGRAM.pixel(0, 0), DIAGRAM.pixel(1, 1)], INK, 1)
        self._axes(pen, DIAGRAM, "accuracy (%) against confidence (%)", ticks=False)
        self._axes(pen, COUNTS, "", ticks=True)
        pen.text((COUNTS.left - 8, COUNTS.top), f"{tallest:.0f}", INK, self.small, anchor="rt")
        pen.text((COUNTS.left - 8, COUNTS.bottom), "images", INK, self.small, anchor="rb")
        legend = "blue: accuracy\norange: gap to the mean confidence"
        pen.text((DIAGRAM.left + 8, DIAGRAM.top + 6), legend, INK, self.small)
        self._curves(pen, saved, at)
        return picture

    def _axes(self, pen, plane: Plane, title: str, ticks: bool) -> None:
        pen.rectangle((plane.left, plane.top, plane.right, plane.bottom), None, GREY)
        pen.text((plane.left, plane.top - 18), title, INK, self.font)
        for tick in range(0, 101, 20):
            x, y = plane.pixel(tick / 100, tick / 100)
            if ticks:
                pen.text((x, plane.bottom + 4), f"{tick}", INK, self.small, anchor="mt")
            else:
                pen.text((plane.left - 8, y), f"{tick}", INK, self.small, anchor="rm")

    def _curves(self, pen, saved: Saved, at: Position) -> None:
        """ECE and NLL along SWEEP, each on a scale of its own, with the fitted and the chosen temperature."""
        self.runs[id(saved)] = saved
        errors = self.sweep(id(saved), at.bins, at.closing, at.spacing)
        lowest, highest = float(saved.nll.min()), float(saved.nll[len(SWEEP) // 4 :].max())
        log_t = SWEEP.log10().tolist()
        pen.rectangle((CURVE.left, CURVE.top, CURVE.right, CURVE.bottom), None, GREY)
        pen.text((CURVE.left, CURVE.top - 18), "ECE (%)", BLUE, self.font)
        pen.text((CURVE.left + 60, CURVE.top - 18), f"NLL (least {lowest:.3f})", ORANGE, self.font)
        pen.text((CURVE.left + 180, CURVE.top - 18), "against the temperature", INK, self.font)
        of_ece = dataclasses.replace(CURVE, values=(-1, 1, 0, max(0.02, 1.1 * max(errors))))
        of_nll = dataclasses.replace(CURVE, values=(-1, 1, lowest - 0.1 * (highest - lowest), highest + 1e-9))
        for plane, values, colour in ((of_nll, saved.nll.tolist(), ORANGE), (of_ece, errors, BLUE)):
            points = [plane.pixel(x, min(y, plane.values[3])) for x, y in zip(log_t, values, strict=True)]
            pen.line(points, colour, 2)
        for temperature in (0.1, 0.3, 1, 3, 10):
            x = CURVE.pixel(math.log10(temperature), 0)[0]
            pen.text((x, CURVE.bottom + 4), f"{temperature:g}", INK, self.small, anchor="mt")
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = of_ece.bottom - share * (of_ece.bottom - of_ece.top)
            pen.text((CURVE.left - 8, y), f"{100 * share * of_ece.values[3]:.0f}", INK, self.small, anchor="rm")
        marks = [(at.temperature, INK, f"here {at.temperature:.3g}", 0)]
        if saved.predictions.temperature is not None:
            fitted = saved.predictions.temperature
            marks.append((fitted, GREEN, f"fitted {fitted:.3g}", 16))
        for temperature, colour, name, lower in marks:
            x = CURVE.pixel(math.log10(min(max(temperature, COLDEST), HOTTEST)), 0)[0]
            pen.line([(x, CURVE.top), (x, CURVE.bottom)], colour, 1)
            anchor, aside = ("rs", -4) if x > CURVE.right - 70 else ("ls", 4)
            pen.text((x + aside, CURVE.top + 16 + lower), name, colour, self.small, anchor=anchor)


# Widgets


class Explorer(Panel):
    """Controls over saved runs; every move measures and draws again. See `explore`."""

    def __init__(self, runs: Sequence[Saved]) -> None:
        self.runs, self.canvas = {saved.title: saved for saved in runs}, Canvas()
        start = Position()
        self.run = widgets.ToggleButtons(options=list(self.runs), style={"button_width": "auto"})
        self.run.observe(lambda _: self.update(), "value")
        controls = {
            "temperature": widgets.FloatLogSlider(
                start.temperature, min=-1, max=1, step=0.02, readout_format=".3f", **look("T, temperature")
            ),
            "bins": widgets.IntSlider(start.bins, min=1, max=50, **look("bins")),
            "closing": buttons("closing", {"(lo, hi]": "right", "[lo, hi)": "left"}, start.closing),
            "spacing": buttons("spacing", SPACINGS, start.spacing),
        }
        super().__init__("Reliability on test images", controls, self.show, lambda: still(runs), [self.run])

    @property
    def position(self) -> Position:
        """Where the controls stand."""
        return self.at(Position)

    def show(self) -> tuple[str, str]:
        """Measure and draw at the controls' position."""
        saved, at = self.runs[self.run.value], self.position
        words = f"{saved.title}: accuracy against confidence in {at.bins} bins. The table has the numbers."
        return html(saved, at), embedded(self.canvas.draw(saved, at), words)


@themed
def still(runs: Sequence[Saved], at: Position | None = None) -> Figure:
    """The explorer at one position (by default the first) as a figure: every run's picture, its numbers below."""
    at = at or Position()
    figure = Drawing(figsize=(WIDTH / 100, (HEIGHT / 100 + 0.9) * len(runs) + 0.3), layout="constrained")
    edges = "equal counts" if at.spacing == "mass" else {"right": "(lo, hi]", "left": "[lo, hi)"}[at.closing]
    figure.suptitle(f"Reliability on test images, {at.bins} bins {edges}")
    for axes, saved in zip(figure.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True):
        axes.imshow(Canvas().draw(saved, at), interpolation="bilinear")
        axes.set_axis_off()
        axes.set_title(saved.title, fontsize=10)
        looks = {"family": "DejaVu Sans Mono", "fontsize": 7, "ha": "center", "va": "top"}
        axes.text(0.5, -0.01, text(saved, at), transform=axes.transAxes, **looks)
    return figure


def explore(experiments: Sequence[Experiment], root: Path | None = None) -> Explorer | Figure:
    """The explorer of finished runs, or a figure where nobody can move a slider (papermill, export, not run)."""
    done = [item for item in experiments if is_finished(item, root)]
    if not done:
        return message("Reliability of saved runs", f"not run: {', '.join(map(short_label, experiments))}")
    runs = [Saved.of(f"{short_label(item)}, {where([item])}", Predictions.of(item, root)) for item in done]
    return Explorer(runs) if is_watched() else still(runs)
