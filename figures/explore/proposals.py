"""The proposal explorer: scribbles on an image, and the labelling that stage A of the trust region makes of them.

What is computed stands in `labelling`, here are numbers as text, pictures and widgets; the energy is that of `potts`,
its solver that of `solve`. `explore` puts controls around them; where nobody watches it returns a figure. Predictions
are those of the final network on whole pool images.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.explore.labelling import (
    NOTHING,
    STARTS,
    Position,
    Saved,
    Stroke,
    View,
    accuracy,
    changed,
    contrast_map,
    load_saved,
    missing,
    starting,
    view,
)
from figures.explore.parts import (  # fmt: skip
    Panel,
    buttons,
    columns,
    embedded,
    fitted,
    html_table,
    look,
    nearest,
    opened,
    outline,
    sheet,
    slider,
    smooth,
    write_key,
)
from figures.explore.weights import RIGHT, UNKNOWN, WRONG, fade
from figures.plane import class_colours
from figures.style import INK
from repro.data.masks import IGNORE
from repro.experiment import Experiment
from repro.methods.scribbles.common import PUBLISHED
from repro.runs import folder_of, load_outputs

TITLE = "What the solver makes of a scribble"
LAMBDAS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GAMMAS = (0, 0.01, 0.02, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
QUICK = 128 * 128  # pixels: larger images are solved when a slider is let go, not while it moves


# What is shown

COLUMNS = ("labelling", "energy E", "unary part", "Potts part", "unlike argmax", "unlike start", "right (report only)")


def table_rows(saved: Saved, at: Position, seen: View | None = None) -> list[tuple[str, ...]]:
    """Energies and shares of the network's labelling, the start and the proposal as text, under COLUMNS."""
    seen = seen or view(saved, at)
    named = {
        "network's argmax, seeds clamped": seen.clamped,
        f"start: {STARTS[at.start]}, seeds clamped": seen.start,
        "proposal": seen.proposal,
    }
    rows = []
    for name, found in named.items():
        energies = (f"{value:.4f}" for value in (found.energy, found.unary, found.potts))
        shares = (changed(found.labels, seen.argmax), changed(found.labels, seen.start.labels))
        right = accuracy(saved, at, found.labels)
        rows.append((name, *energies, *map(percent, (*shares, right))))
    return rows


def percent(value: float | None) -> str:
    """`61.3 %`, a dash where it is not defined."""
    return "-" if value is None else f"{100 * value:.1f} %"


def heading(saved: Saved, at: Position, seen: View) -> str:
    """How much is scribbled, what the solver did under which labels, and what an edge weighs against a pixel."""
    labels, (high, wide) = seen.scribbles, saved.size
    seeds, pixels, pairs = labels[labels < len(saved.classes)], float(seen.grid.pixels), float(seen.grid.pairs)
    kept = "no given scribble" if at.length == NOTHING else f"given scribbles of length {100 * at.length:g} %"
    drawn = f"{len(at.strokes)} stroke{'s'[: len(at.strokes) != 1]} drawn" if at.strokes else "none drawn"
    names = ", ".join(saved.classes[label] for label in seen.allowed)
    limit = names if len(seen.allowed) < len(saved.classes) else f"all {len(saved.classes)} classes"
    said = (
        f"Image {at.image} of the pool, {high} x {wide} pixels: {len(seeds):,} seeds "
        f"({percent(len(seeds) / max(1.0, pixels))}) of {len(seeds.unique())} classes; {kept}, {drawn}. "
        f"Labels allowed: {limit}. Alpha-expansion: {counted(seen.solution.sweeps, 'sweep')} of at most "
        f"{saved.solver.sweeps}, {counted(seen.solution.cuts, 'cut')}."
    )
    edge = at.potts_weight * pixels / max(1.0, pairs)
    if at.gamma:
        said += f" Cutting an edge of w = 1 costs as much as {edge / at.gamma:.3g} nats of one pixel."
    else:
        said += " gamma = 0: the network has no say."
    if at.length in PUBLISHED:
        said += f" Released at this length: lambda = 100, gamma = {PUBLISHED[at.length].gamma:g}."
    return said


def counted(number: int, name: str) -> str:
    """`1 sweep`, `2 sweeps`."""
    return f"{number} {name}{'s'[: number != 1]}"


def text(saved: Saved, at: Position, seen: View) -> str:
    """The numbers as plain text."""
    rows = (COLUMNS, *table_rows(saved, at, seen))
    lines = ["".join((f"{row[0]:<40}", *(f"{cell:>15}" for cell in row[1:6]), f"{row[6]:>21}")) for row in rows]
    return "\n".join((*textwrap.wrap(heading(saved, at, seen), 136), "", *lines))


def html(saved: Saved, at: Position, seen: View) -> str:
    """The numbers as an HTML table."""
    return heading(saved, at, seen) + html_table(COLUMNS, table_rows(saved, at, seen))


SIDE, LEFT, TOP, STEP, GAP = 208, 10, 24, 224, 28  # tiles: longer side, corner of the first, to the next; rows apart
WIDE = 900  # of the picture


class Canvas:
    """Draws one run at a position. Tiles: image with scribbles, argmax, proposal, truth; below what explains them."""

    def __init__(self, saved: Saved) -> None:
        self.saved, self.fit = saved, fitted(saved.size, SIDE)
        self.small = ImageFont.load_default(11)
        self.colours = (255 * class_colours(len(saved.classes))).round().astype(np.uint8)
        self.foot = TOP + 2 * (self.fit[1] + GAP) - GAP + 8
        # as high as the longest key needs, so that the page does not jump
        every = self.key(range(len(saved.classes)), True)
        self.height = self.foot + self.write(ImageDraw.Draw(Image.new("RGB", (1, 1))), every)

    def draw(self, at: Position, seen: View | None = None, cursor: Stroke | None = None) -> Image.Image:
        """The picture, RGB. seen: what `view` returns, if it is at hand. cursor: a stroke that is not yet added."""
        seen = seen or view(self.saved, at)
        picture = Image.new("RGB", (WIDE, self.height), "white")
        pen = ImageDraw.Draw(picture)
        for number, (words, tile) in enumerate(self.tiles(at, seen, cursor)):
            x, y = LEFT + number % 4 * STEP, TOP + number // 4 * (self.fit[1] + GAP)
            pen.text((x, y - 17), words, INK, self.small)
            picture.paste(tile, (x, y))
        truth = self.saved.truth[at.image]
        maps = (seen.scribbles, seen.argmax, seen.start.labels, seen.proposal.labels, truth)
        present = sorted({label for labels in maps for label in labels.unique().tolist()})
        unknown = (truth == IGNORE) | (seen.proposal.labels == IGNORE)
        self.write(pen, self.key(present, bool(unknown.any())))
        return picture

    def tiles(self, at: Position, seen: View, cursor: Stroke | None = None) -> list[tuple[str, Image.Image]]:
        """Title and picture of every tile, row by row."""
        truth, proposal = self.saved.truth[at.image], seen.proposal.labels
        pixels = self.saved.images[at.image].permute(1, 2, 0).numpy()
        differs = ((proposal != seen.argmax) & (proposal != IGNORE)).numpy()
        known = (truth < len(self.saved.classes)).numpy() & (proposal != IGNORE).numpy()
        verdict = np.where(known[..., None], np.where((proposal == truth).numpy()[..., None], RIGHT, WRONG), UNKNOWN)
        weights = 255 * contrast_map(seen.grid)[..., None].numpy()
        moved = fade(self.colours[proposal.numpy()].astype(float), differs[..., None])
        return [
            (f"Image {at.image}, and what is scribbled", self.scribbled(pixels, seen.scribbles, cursor)),
            ("Network's argmax", self.flat(self.colours[seen.argmax.numpy()])),
            (f"Proposal: E = {seen.proposal.energy:.4f}", self.flat(self.colours[proposal.numpy()])),
            ("Truth (report only)", self.flat(self.colours[truth.numpy()])),
            (f"Contrast w, {at.neighbours} neighbours; dark: cheap", self.flat(weights.repeat(3, 2))),
            (f"Start: E = {seen.start.energy:.4f}", self.flat(self.colours[seen.start.labels.numpy()])),
            (f"Proposal, not the argmax: {percent(changed(proposal, seen.argmax))}", self.flat(moved)),
            (f"Proposal, right: {percent(accuracy(self.saved, at, proposal))} (report only)", self.flat(verdict)),
        ]

    def flat(self, pixels: np.ndarray) -> Image.Image:
        """Colours (H, W, 3) in 0..255, unblended, as a tile with a frame."""
        tile = Image.fromarray(pixels.astype(np.uint8)).resize(self.fit, Image.Resampling.NEAREST)
        ImageDraw.Draw(tile).rectangle((0, 0, self.fit[0] - 1, self.fit[1] - 1), None, UNKNOWN)
        return tile

    def scribbled(self, pixels: np.ndarray, scribbles: Tensor, cursor: Stroke | None) -> Image.Image:
        """The image under its scribbles, outlined in white, and a stroke to come: a line with rings at its ends."""
        tile, labels = smooth(pixels, self.fit), nearest(scribbles.numpy(), self.fit)
        is_seed = labels < len(self.saved.classes)
        rim = outline(is_seed) | outline(is_seed[::-1, ::-1])[::-1, ::-1]  # outline knows two of four sides
        tile[rim] = 255
        tile[is_seed] = self.colours[labels[is_seed]]  # on top: a stroke may be three cells wide
        picture = Image.fromarray(tile)
        if cursor:
            pen, colour = ImageDraw.Draw(picture), tuple(self.colours[cursor.label].tolist())
            ratio = self.fit[0] / scribbles.shape[1]
            places = [tuple((place + 0.5) * ratio for place in reversed(end)) for end in (cursor.first, cursor.last)]
            for wide, paint_with in ((4, "white"), (2, colour)):
                pen.line(places, paint_with, wide)
            for x, y in places:
                pen.ellipse((x - 5, y - 5, x + 5, y + 5), None, "white", 4)
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), None, colour, 2)
        return picture

    def key(self, present: Iterable[int], unknown: bool) -> list[tuple[str, tuple[int, ...]]]:
        """Words and colours: the classes of those labels, then what is right, wrong or not known."""
        named = [label for label in present if label < len(self.saved.classes)]
        entries = [(self.saved.classes[label], tuple(self.colours[label].tolist())) for label in named]
        return [*entries, ("right", RIGHT), ("wrong", WRONG), *[("unknown", UNKNOWN)] * unknown]

    def write(self, pen: ImageDraw.ImageDraw, entries: list[tuple[str, tuple[int, ...]]]) -> int:
        """The key below the tiles; returns its height."""
        return write_key(pen, entries, (LEFT, self.foot, WIDE - 4), self.small)


# Widgets


class Explorer(Panel):
    """Controls over a saved run; every move solves, measures and draws again. See `explore`.

    A stroke is set by its class and ends, shown as it is set, and added by a button; each image keeps its own.
    """

    def __init__(self, saved: Saved) -> None:
        self.saved, self.canvas, self.start = saved, Canvas(saved), starting(saved)
        self.strokes: dict[int, tuple[Stroke, ...]] = {}
        self.seen: tuple[Position, View] | None = None
        start, (high, wide), quick = self.start, saved.size, saved.size[0] * saved.size[1] <= QUICK
        options = sorted({*(step / 100 for step in range(101)), saved.length})
        lengths = [("none", NOTHING), *((f"{100 * length:g} %", length) for length in options)]
        controls = {
            "image": widgets.IntSlider(start.image, min=0, max=len(saved.images) - 1, **look("image of the pool")),
            "length": slider("length of the scribbles", lengths, start.length, quick),
            "potts_weight": slider("lambda, of Potts", levels(LAMBDAS, start.potts_weight), start.potts_weight, quick),
            "gamma": slider("gamma, of the network", levels(GAMMAS, start.gamma), start.gamma, quick),
            "neighbours": buttons("neighbours", {"4": 4, "8": 8}, start.neighbours),
            "restricted": buttons("labels", {"of the scribbles": True, "all": False}, start.restricted),
            "start": buttons("start from", {name: key for key, name in STARTS.items()}, start.start),
        }

        def place(words: str, value: int, length: int) -> widgets.IntSlider:
            return widgets.IntSlider(value, min=0, max=length - 1, **look(words))

        names = [(name, label) for label, name in enumerate(saved.classes)]
        self.cursor_controls = {
            "label": widgets.Dropdown(options=names, value=0, **look("stroke: class")),
            "row": place("from row", high // 2, high),
            "column": place("from column", wide // 4, wide),
            "to_row": place("to row", high // 2, high),
            "to_column": place("to column", 3 * wide // 4, wide),
        }
        self.add = widgets.Button(description="add stroke", layout={"margin": "0 8px 0 164px"})
        self.clear = widgets.Button(description="clear")
        for control in self.cursor_controls.values():
            control.observe(lambda _: self.update(), "value")
        self.add.on_click(lambda _: self.keep((*self.strokes.get(self.controls["image"].value, ()), self.cursor)))
        self.clear.on_click(lambda _: self.keep(()))
        label, *places = self.cursor_controls.values()
        further = columns([label, widgets.HBox([self.add, self.clear]), *places])
        super().__init__(saved.title, controls, self.show, lambda: still(saved, start), [further])

    @property
    def position(self) -> Position:
        """Where the controls stand."""
        values = {name: control.value for name, control in self.controls.items()}
        return Position(strokes=self.strokes.get(values["image"], ()), **values)

    @property
    def cursor(self) -> Stroke:
        """The stroke that the button would add."""
        label, *places = (control.value for control in self.cursor_controls.values())
        return Stroke(label, tuple(places[:2]), tuple(places[2:]))

    def keep(self, strokes: tuple[Stroke, ...]) -> None:
        """Set the strokes of the shown image."""
        self.strokes[self.controls["image"].value] = strokes
        self.update()

    def show(self) -> tuple[str, str]:
        """Solve if more than the cursor moved, measure and draw."""
        at = self.position
        if self.seen is None or self.seen[0] != at:
            self.seen = at, view(self.saved, at)
        seen = self.seen[1]
        self.clear.disabled = not at.strokes
        words = f"{heading(self.saved, at, seen)} Scribbles, argmax, proposal and truth. The table has the numbers."
        return html(self.saved, at, seen), embedded(self.canvas.draw(at, seen, self.cursor), words)


def levels(given: tuple[float, ...], own: float) -> list[tuple[str, float]]:
    """Values of a slider, ascending, the run's own among them."""
    return [(f"{level:g}", level) for level in sorted({*given, own})]


def still(saved: Saved, at: Position | None = None) -> Figure:
    """The explorer at one position (by default the starting one) as a figure: the picture, the numbers below."""
    at = at or starting(saved)
    seen = view(saved, at)
    return sheet(f"{TITLE}\n{saved.title}", Canvas(saved).draw(at, seen), text(saved, at, seen))


def explore(experiment: Experiment, root: Path | None = None) -> Explorer | Figure:
    """The explorer of a finished run, or a figure where nobody can move a slider (papermill, export, not run)."""

    def lacking() -> str:
        return ", ".join(missing(load_outputs(folder_of(experiment, root))))

    return opened(TITLE, experiment, root, lambda: load_saved(experiment, root), Explorer, still, lacking)
