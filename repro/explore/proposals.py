"""The proposal explorer: scribbles on an image, and the labelling that stage A of the trust region makes of them.

`load_saved`, `view` and `table_rows` are pure functions, with no widget in them; the energy is that of `potts`, its
solver that of `solve`. `explore` puts controls around them; where nobody watches it returns a figure. Predictions are
those of the final network on whole pool images.
"""

import dataclasses
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repro.data.augment import normalise
from repro.data.mask_views import IMAGENET_MEAN, IMAGENET_STD, PADDING, hide
from repro.data.masks import IGNORE
from repro.data.scribble_layout import trace
from repro.data.scribbles import WIDTH, paint
from repro.experiment import Experiment, resolve
from repro.explore.parts import (
    Panel,
    buttons,
    columns,
    embedded,
    fitted,
    html_table,
    look,
    nearest,
    outline,
    sheet,
    slider,
    smooth,
    write_key,
)  # fmt: skip
from repro.explore.weights import RIGHT, UNKNOWN, WRONG, fade
from repro.methods.scribbles.lengths import PUBLISHED
from repro.methods.scribbles.trust_region import TrustRegionSettings
from repro.plots.plane import class_colours, classes_of
from repro.plots.style import INK, label_of, message, where
from repro.potts import Grid, contrast_grid, potts_energy, problems, proposal_energy, steps
from repro.progress import is_watched
from repro.runs import folder_of, is_finished, load_outputs
from repro.segmentation import confusion, pixel_accuracy
from repro.solve import Solution, SolverSettings, allowed_labels, ends, solve

TITLE = "What the solver makes of a scribble"
NEEDED = tuple(f"pool_{name}" for name in ("images", "truth", "scribbles", "reach", "log_probs"))
STARTS = {"background": "all background", "argmax": "argmax"}
LAMBDAS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GAMMAS = (0, 0.01, 0.02, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
NOTHING = -1.0  # the length where no scribble is given
QUICK = 128 * 128  # pixels: larger images are solved when a slider is let go, not while it moves


@dataclass(frozen=True, eq=False)
class Saved:
    """What the explorer reads of a run: its P pool images, K classes.

    images: (P, 3, H, W) uint8. truth: (P, H, W) uint8, for scribbles of other lengths and the report.
    scribbles: (P, H, W) uint8, class, 255, 254 on padding; of the run's own length.
    reach: (P, H, W) floating, the shortest length at which a pixel is marked, inf for never.
    log_probs: (P, K, H, W) floating. classes: K names. length: the run's, 0..1. solver, neighbours: of its stage A,
    the released ones for a method without it. title: its name. width: of a scribble, in pixels.
    """

    images: Tensor
    truth: Tensor
    scribbles: Tensor
    reach: Tensor
    log_probs: Tensor
    classes: tuple[str, ...]
    length: float
    solver: SolverSettings
    neighbours: int
    title: str
    width: int = WIDTH

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return tuple(self.truth.shape[1:])


@dataclass(frozen=True)
class Stroke:
    """A straight stroke of a class from one pixel (row, column) to another."""

    label: int
    first: tuple[int, int]
    last: tuple[int, int]


@dataclass(frozen=True)
class Position:
    """Where the controls stand.

    image: of the pool's kept images. length: of the scribbles, 0..1, or NOTHING. strokes: drawn, the last on top.
    potts_weight: lambda. gamma: of the unary. neighbours: 4 or 8. restricted: to the labels of the scribbles.
    start: of STARTS.
    """

    image: int = 0
    length: float = 1.0
    strokes: tuple[Stroke, ...] = ()
    potts_weight: float = 100.0
    gamma: float = 0.1
    neighbours: int = 8
    restricted: bool = True
    start: str = "background"


@dataclass(frozen=True, eq=False)
class Labelling:
    """labels: (H, W) uint8, 255 on padding. unary, potts: the two parts of its energy E, their sum."""

    labels: Tensor
    unary: float
    potts: float

    @property
    def energy(self) -> float:
        """E(X) = gamma / |Omega| sum_p -log S_p[X_p] + lambda / |N| sum_pq w_pq [X_p != X_q]."""
        return self.unary + self.potts


@dataclass(frozen=True, eq=False)
class View:
    """What is seen at a position.

    scribbles: (H, W) uint8. argmax: (H, W) uint8, the network's, as it is. clamped: it with seeds at their labels.
    start: what the solver starts from, with seeds and restriction. proposal: where it ends. grid: the neighbours.
    allowed: labels that it may use. solution: the solver's own account.
    """

    scribbles: Tensor
    argmax: Tensor
    clamped: Labelling
    start: Labelling
    proposal: Labelling
    grid: Grid
    allowed: tuple[int, ...]
    solution: Solution


def load_saved(experiment: Experiment, root: Path | None = None) -> Saved | None:
    """Read a finished run; None for one that lacks an array of NEEDED. Raises CorruptFile."""
    outputs = load_outputs(folder_of(experiment, root))
    if missing(outputs):
        return None
    length, recipe = experiment.labels / 100, resolve(experiment)
    own = recipe.method
    solver, neighbours = released(length), 8
    if isinstance(own, TrustRegionSettings):
        solver, neighbours = own.solver, own.neighbours
    arrays = (outputs[name] for name in NEEDED)
    title = f"{label_of(experiment)}, {where([experiment])}"
    return Saved(*arrays, classes_of(experiment.data), length, solver, neighbours, title, recipe.width)


def missing(outputs: dict[str, Tensor]) -> list[str]:
    """Names of NEEDED that are not there, or hold no image."""
    return [name for name in NEEDED if not len(outputs.get(name, ()))]


def released(length: float) -> SolverSettings:
    """The released stage A for a scribble length; gamma is that of short ones where none is published."""
    return SolverSettings(gamma=PUBLISHED[length].gamma) if length in PUBLISHED else SolverSettings()


def starting(saved: Saved) -> Position:
    """The first image with the run's own scribble, under the run's stage A, started as its first one was."""
    own = saved.solver
    return Position(0, saved.length, (), own.potts_weight, own.gamma, saved.neighbours, own.restricted)


# What is computed


def scribbles_at(saved: Saved, at: Position) -> Tensor:
    """Scribbles (H, W) uint8 of the position's length, the strokes on top; padding stays 254.

    At the run's own length they are the run's. Others compare with the saved reach, whose half precision can add a
    pixel at an end.
    """
    own, truth = saved.scribbles[at.image], saved.truth[at.image]
    if at.length == saved.length:
        found = own.clone()
    else:
        reach = saved.reach[at.image]
        found = torch.where(reach <= torch.tensor(at.length, dtype=reach.dtype), truth, IGNORE)
    for stroke in at.strokes:
        found[brushed(stroke, saved.size, saved.width)] = stroke.label
    return torch.where(own == PADDING, PADDING, found)


def brushed(stroke: Stroke, size: tuple[int, int], width: int = WIDTH) -> Tensor:
    """Pixels (H, W) bool of a stroke, drawn as all scribbles are and cut off at the picture's edge."""
    row, column, reach = trace(np.array([stroke.first, stroke.last], float))
    return torch.from_numpy(np.isfinite(paint(row, column, reach, size, width)))


def view(saved: Saved, at: Position) -> View:
    """Stage A of the position's image, on its ImageNet-normalised pixels as in training, and its energies."""
    image, scribbles = slice(at.image, at.image + 1), scribbles_at(saved, at)
    roi, log_probs = scribbles[None] != PADDING, saved.log_probs[image]
    x = normalise(saved.images[image], torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))
    grid = contrast_grid(hide(x, ~roi), roi, at.neighbours)
    argmax = log_probs.float().argmax(1).to(torch.uint8)
    starts = argmax if at.start == "argmax" else None
    (problem,) = problems(log_probs, grid, scribbles[None], starts, [f"image {at.image}"])
    settings = dataclasses.replace(
        saved.solver, potts_weight=at.potts_weight, gamma=at.gamma, restricted=at.restricted, back_end="scipy"
    )
    solution, unmoved = solve(problem, settings), solve(problem, dataclasses.replace(settings, sweeps=0))

    def labelled(labels: Tensor) -> Labelling:
        labels = torch.where(roi[0], labels, IGNORE)
        unary = proposal_energy(labels[None], log_probs, grid, at.gamma, 0.0)
        return Labelling(labels, float(unary), at.potts_weight * float(potts_energy(labels[None], grid)))

    is_seed = scribbles < len(saved.classes)
    allowed = allowed_labels(scribbles[is_seed].numpy(), len(saved.classes), at.restricted)
    clamped = labelled(torch.where(is_seed, scribbles, argmax[0]))
    start, proposal = (labelled(torch.from_numpy(found.labels)) for found in (unmoved, solution))
    return View(scribbles, argmax[0], clamped, start, proposal, grid, tuple(allowed.tolist()), solution)


def contrast_map(grid: Grid) -> Tensor:
    """Mean of exp(-||I_p - I_q||^2 / (2 sigma^2)) over a pixel's pairs, those at distance d weighed 1 / d: (H, W).

    In 0..1: where it is small, a boundary of labels is cheap. 1 for a pixel without a pair.
    """
    inside = grid.roi[0].to(grid.weights[0].dtype)
    total, count = torch.zeros_like(inside), torch.zeros_like(inside)
    for weight, direction in zip(grid.weights, steps(2 * len(grid.weights)), strict=True):
        first, second = ends(inside, direction)
        near = first * second / (direction[0] ** 2 + direction[1] ** 2) ** 0.5
        for part in ends(total, direction):
            part += weight[0]
        for part in ends(count, direction):
            part += near
    return torch.where(count > 0, total / count.clamp(min=1e-12), 1.0)


def changed(labels: Tensor, others: Tensor) -> float:
    """Share of pixels that differ, of those that are not padding in `labels` (H, W); 0 without any."""
    inside = labels != IGNORE
    return int((inside & (labels != others)).sum()) / max(1, int(inside.sum()))


def accuracy(saved: Saved, at: Position, labels: Tensor) -> float | None:
    """Share of labels (H, W) that equal the truth, seeds included, where it is known; None where it nowhere is."""
    counts = confusion(saved.truth[at.image][None], labels[None], len(saved.classes))
    return float(pixel_accuracy(counts)) if counts.any() else None


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
    if not is_finished(experiment, root):
        return message(TITLE, f"not run: {label_of(experiment)}")
    saved = load_saved(experiment, root)
    if saved is None:
        lacking = ", ".join(missing(load_outputs(folder_of(experiment, root))))
        return message(TITLE, f"{label_of(experiment)} keeps no {lacking}")
    return Explorer(saved) if is_watched() else still(saved)
