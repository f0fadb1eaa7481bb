"""The explorer of runs from scribbles: scribbles on an image, and the labelling that stage A of the trust region makes.

Predictions are those of the final network on whole pool images. Each move solves stage A again.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from torch import Tensor

from figures.explore.panel import (  # fmt: skip
    RIGHT,
    UNKNOWN,
    WRONG,
    Explorer,
    Missing,
    Numbers,
    Panel,
    buttons,
    counted,
    fade,
    in_columns,
    key,
    levels,
    looks,
    opened,
    outline,
    percent,
    picture,
    slider,
    tiles,
    whole,
)
from figures.plane import class_colours, classes_of
from figures.style import label_of, where
from repro.data.augment import normalise
from repro.data.mask_views import IMAGENET_MEAN, IMAGENET_STD, PADDING, hide
from repro.data.masks import IGNORE
from repro.data.scribble_layout import trace
from repro.data.scribbles import WIDTH, paint
from repro.experiment import Experiment, resolve
from repro.measure.segmentation import confusion, pixel_accuracy
from repro.methods.scribbles.lengths import PUBLISHED
from repro.methods.scribbles.trust_region import TrustRegionSettings
from repro.runs import folder_of, load_outputs
from repro.solvers.cuts import Solution, SolverSettings, allowed_labels, ends, solve
from repro.solvers.potts import Grid, contrast_grid, potts_energy, problems, proposal_energy, steps

NEEDED = tuple(f"pool_{name}" for name in ("images", "truth", "scribbles", "reach", "log_probs"))
STARTS = {"background": "all background", "argmax": "argmax"}
NOTHING = -1.0  # the length where no scribble is given
LAMBDAS = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
GAMMAS = (0, 0.01, 0.02, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
QUICK = 128 * 128  # pixels: larger images are solved when a slider is let go, not while it moves


class Stroke(NamedTuple):
    """A straight stroke of a class from one pixel (row, column) to another."""

    label: int
    first: tuple[int, int]
    last: tuple[int, int]


class Drawn(NamedTuple):
    """cursor: the stroke that the button would add. strokes: those added, with their images, the last on top."""

    cursor: Stroke
    strokes: tuple[tuple[int, Stroke], ...] = ()


class Pencil(widgets.VBox):
    """A control for strokes: class and ends of the next one, and buttons to add it or to clear those of the image."""

    value = traitlets.Any()

    def __init__(self, classes: Sequence[str], size: tuple[int, int], image: widgets.IntSlider) -> None:
        high, wide = size
        names = [(name, label) for label, name in enumerate(classes)]
        self.label = widgets.Dropdown(options=names, value=0, **looks("stroke: class"))
        self.places = [
            whole("from row", high // 2, 0, high - 1), whole("from column", wide // 4, 0, wide - 1),
            whole("to row", high // 2, 0, high - 1), whole("to column", 3 * wide // 4, 0, wide - 1),
        ]  # fmt: skip
        self.add = widgets.Button(description="add stroke", layout={"margin": "0 8px 0 164px"})
        self.clear = widgets.Button(description="clear")
        super().__init__([in_columns([self.label, widgets.HBox([self.add, self.clear]), *self.places])])
        self.value, self.image = Drawn(self.cursor()), image
        for control in (self.label, *self.places):
            control.observe(lambda _: self.set(self.value.strokes), "value")
        self.add.on_click(lambda _: self.set((*self.value.strokes, (image.value, self.value.cursor))))
        self.clear.on_click(lambda _: self.set(part for part in self.value.strokes if part[0] != image.value))

    def cursor(self) -> Stroke:
        """The stroke at the controls."""
        row, column, to_row, to_column = (place.value for place in self.places)
        return Stroke(self.label.value, (row, column), (to_row, to_column))

    def set(self, strokes) -> None:
        """Take these strokes, and the cursor where it is."""
        self.value = Drawn(self.cursor(), tuple(strokes))


@dataclass(frozen=True, eq=False)
class Labelling:
    """labels: (H, W) uint8, 255 on padding. unary, potts: both parts of its energy
    E(X) = gamma / |Omega| sum_p -log S_p[X_p] + lambda / |N| sum_pq w_pq [X_p != X_q]."""

    labels: Tensor
    unary: float
    potts: float

    @property
    def energy(self) -> float:
        """E."""
        return self.unary + self.potts


@dataclass(frozen=True, eq=False)
class Solved:
    """Stage A of an image.

    at: the position, its strokes those of the image. scribbles: (H, W) uint8. argmax: (H, W) uint8, the network's.
    clamped: it with seeds at their labels. start: what the solver starts from, with seeds and restriction. proposal:
    where it ends. grid: the neighbours. allowed: labels that it may use. solution: the solver's own account.
    """

    at: dict[str, Any]
    scribbles: Tensor
    argmax: Tensor
    clamped: Labelling
    start: Labelling
    proposal: Labelling
    grid: Grid
    allowed: tuple[int, ...]
    solution: Solution
    cursor: Stroke | None = None


@dataclass(eq=False)
class Proposals(Explorer):
    """Scribbles and proposals on the P pool images that a run keeps, of K classes.

    images: (P, 3, H, W) uint8. truth: (P, H, W) uint8, for scribbles of other lengths and the report. scribbles:
    (P, H, W) uint8, class, 255, 254 on padding; of the run's own length. reach: (P, H, W), the shortest length at which
    a pixel is marked, inf for never. log_probs: (P, K, H, W). length: the run's, 0..1. solver, neighbours: of its stage
    A, the released ones for a method without it. width: of a scribble, in pixels.
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
    words = "Scribbles, argmax, proposal and truth."

    def __post_init__(self) -> None:
        self.solve = functools.lru_cache(4)(self._solve)  # a move of the cursor solves nothing again
        high, wide = self.truth.shape[1:]
        self.size = (9.0, 0.75 + 2 * (0.25 + 2.2 * high / max(high, wide)))

    @classmethod
    def read(cls, experiment: Experiment, root: Path | None = None) -> "Proposals":
        """A finished run; raises Missing for one that lacks an array of NEEDED."""
        outputs = load_outputs(folder_of(experiment, root))
        lacking = [name for name in NEEDED if not len(outputs.get(name, ()))]
        if lacking:
            raise Missing(", ".join(lacking))
        length, recipe = experiment.labels / 100, resolve(experiment)
        own, solver, neighbours = recipe.method, released(length), 8
        if isinstance(own, TrustRegionSettings):
            solver, neighbours = own.solver, own.neighbours
        arrays, title = (outputs[name] for name in NEEDED), f"{label_of(experiment)}, {where([experiment])}"
        return cls(*arrays, classes_of(experiment.data), length, solver, neighbours, title, recipe.width)

    def controls(self) -> dict[str, widgets.Widget]:
        """At the first image with the run's own scribble, under the run's stage A, started as its first one was."""
        own, (high, wide) = self.solver, self.truth.shape[1:]
        live, lengths = high * wide <= QUICK, sorted({*(step / 100 for step in range(101)), self.length})
        image = whole("image of the pool", 0, 0, len(self.images) - 1)
        options = [("none", NOTHING), *((f"{100 * length:g} %", length) for length in lengths)]
        return {
            "image": image,
            "length": slider("length of the scribbles", options, self.length, live),
            "potts_weight": slider("lambda, of Potts", levels(LAMBDAS, own.potts_weight), own.potts_weight, live),
            "gamma": slider("gamma, of the network", levels(GAMMAS, own.gamma), own.gamma, live),
            "neighbours": buttons("neighbours", {"4": 4, "8": 8}, self.neighbours),
            "restricted": buttons("labels", {"of the scribbles": True, "all": False}, own.restricted),
            "start": buttons("start from", {name: key for key, name in STARTS.items()}, "background"),
            "drawn": Pencil(self.classes, (high, wide), image),
        }

    def compute(self, image: int, drawn: Drawn | None = None, **at) -> Solved:
        """at: length, 0..1 or NOTHING; potts_weight lambda; gamma; neighbours, 4 or 8; restricted to the scribbles'
        labels; start, of STARTS."""
        strokes = tuple(stroke for number, stroke in (drawn.strokes if drawn else ()) if number == image)
        return dataclasses.replace(self.solve(image, strokes, **at), cursor=drawn and drawn.cursor)

    def scribbled(self, image: int, length: float, strokes: Sequence[Stroke] = ()) -> Tensor:
        """Scribbles (H, W) uint8 of a length, the strokes on top; padding stays 254.

        At the run's own length they are the run's. Others compare with the saved reach, whose half precision can add a
        pixel at an end.
        """
        own, reach = self.scribbles[image], self.reach[image]
        found = torch.where(reach <= torch.tensor(length, dtype=reach.dtype), self.truth[image], IGNORE)
        found = own.clone() if length == self.length else found
        for stroke in strokes:
            found[brushed(stroke, tuple(own.shape), self.width)] = stroke.label
        return torch.where(own == PADDING, PADDING, found)

    def _solve(self, image: int, strokes: tuple[Stroke, ...], **at) -> Solved:
        """Stage A of the image, on its ImageNet-normalised pixels as in training, and its energies."""
        one, scribbles = slice(image, image + 1), self.scribbled(image, at["length"], strokes)
        roi, log_probs = scribbles[None] != PADDING, self.log_probs[one]
        x = normalise(self.images[one], torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))
        grid = contrast_grid(hide(x, ~roi), roi, at["neighbours"])
        argmax = log_probs.float().argmax(1).to(torch.uint8)
        starts = argmax if at["start"] == "argmax" else None
        (problem,) = problems(log_probs, grid, scribbles[None], starts, [f"image {image}"])
        own = {name: at[name] for name in ("potts_weight", "gamma", "restricted")}
        settings = dataclasses.replace(self.solver, back_end="scipy", **own)
        solution, unmoved = solve(problem, settings), solve(problem, dataclasses.replace(settings, sweeps=0))

        def labelled(labels: Tensor) -> Labelling:
            labels = torch.where(roi[0], labels, IGNORE)
            unary = proposal_energy(labels[None], log_probs, grid, at["gamma"], 0.0)
            return Labelling(labels, float(unary), at["potts_weight"] * float(potts_energy(labels[None], grid)))

        is_seed = scribbles < len(self.classes)
        allowed = allowed_labels(scribbles[is_seed].numpy(), len(self.classes), at["restricted"])
        clamped = labelled(torch.where(is_seed, scribbles, argmax[0]))
        start, proposal = (labelled(torch.from_numpy(found.labels)) for found in (unmoved, solution))
        at = {"image": image, "strokes": strokes} | at
        return Solved(at, scribbles, argmax[0], clamped, start, proposal, grid, tuple(allowed.tolist()), solution)

    def accuracy(self, image: int, labels: Tensor) -> float | None:
        """Share of labels (H, W) that equal the truth, seeds included, where it is known; None where it nowhere is."""
        counts = confusion(self.truth[image][None], labels[None], len(self.classes))
        return float(pixel_accuracy(counts)) if counts.any() else None

    def numbers(self, seen: Solved) -> Numbers:
        named = {
            "network's argmax, seeds clamped": seen.clamped,
            f"start: {STARTS[seen.at['start']]}, seeds clamped": seen.start,
            "proposal": seen.proposal,
        }
        rows = []
        for name, found in named.items():
            energies = (f"{value:.4f}" for value in (found.energy, found.unary, found.potts))
            shares = (changed(found.labels, seen.argmax), changed(found.labels, seen.start.labels))
            rows.append((name, *energies, *map(percent, (*shares, self.accuracy(seen.at["image"], found.labels)))))
        parts = ("energy E", "unary part", "Potts part")
        columns = ("labelling", *parts, "unlike argmax", "unlike start", "right (report only)")
        return Numbers(self.heading(seen), columns, rows)

    def heading(self, seen: Solved) -> str:
        """How much is scribbled, what the solver did under which labels, and what an edge weighs against a pixel."""
        at, labels, (high, wide) = seen.at, seen.scribbles, self.truth.shape[1:]
        seeds, pixels, pairs = labels[labels < len(self.classes)], float(seen.grid.pixels), float(seen.grid.pairs)
        kept = f"given scribbles of length {100 * at['length']:g} %"
        kept = "no given scribble" if at["length"] == NOTHING else kept
        drawn = f"{counted(len(at['strokes']), 'stroke')} drawn" if at["strokes"] else "none drawn"
        names = ", ".join(self.classes[label] for label in seen.allowed)
        limit = names if len(seen.allowed) < len(self.classes) else f"all {len(self.classes)} classes"
        said = (
            f"Image {at['image']} of the pool, {high} x {wide} pixels: {len(seeds):,} seeds "
            f"({percent(len(seeds) / max(1.0, pixels))}) of {len(seeds.unique())} classes; {kept}, {drawn}. "
            f"Labels allowed: {limit}. Alpha-expansion: {counted(seen.solution.sweeps, 'sweep')} of at most "
            f"{self.solver.sweeps}, {counted(seen.solution.cuts, 'cut')}."
        )
        edge = at["potts_weight"] * pixels / max(1.0, pairs)
        if at["gamma"]:
            said += f" Cutting an edge of w = 1 costs as much as {edge / at['gamma']:.3g} nats of one pixel."
        else:
            said += " gamma = 0: the network has no say."
        if at["length"] in PUBLISHED:
            said += f" Released at this length: lambda = 100, gamma = {PUBLISHED[at['length']].gamma:g}."
        return said

    def layout(self, figure: FigureBase) -> list[Axes]:
        return tiles(figure, 2, 4)

    def draw(self, axes: Sequence[Axes], seen: Solved) -> None:
        *grid, below = axes
        image, colours = seen.at["image"], (255 * class_colours(len(self.classes))).round().astype(np.uint8)
        truth, proposal, count = self.truth[image], seen.proposal.labels, len(self.classes)
        differs = (proposal != seen.argmax) & (proposal != IGNORE)
        known = (truth < count) & (proposal != IGNORE)
        verdict = np.array([WRONG, RIGHT, UNKNOWN], np.uint8)[np.where(known, (proposal == truth).long(), 2)]
        weights, is_seed = contrast_map(seen.grid), (seen.scribbles < count).numpy()
        pixels = self.images[image].permute(1, 2, 0).numpy()
        right = f"Proposal, right: {percent(self.accuracy(image, proposal))} (report only)"
        moved = f"Proposal, not the argmax: {percent(changed(proposal, seen.argmax))}"
        pictures = (
            (f"Image {image}, and what is scribbled", np.where(is_seed[..., None], colours[seen.scribbles], pixels)),
            ("Network's argmax", colours[seen.argmax]),
            (f"Proposal: E = {seen.proposal.energy:.4f}", colours[proposal]),
            ("Truth (report only)", colours[truth]),
            (f"Contrast w, {seen.at['neighbours']} neighbours; dark: cheap", weights.numpy()),
            (f"Start: E = {seen.start.energy:.4f}", colours[seen.start.labels]),
            (moved, fade(colours[proposal], differs)),
            (right, verdict),
        )
        for tile, (title, shown) in zip(grid, pictures, strict=True):
            picture(tile, shown, title, cmap="gray", vmin=0, vmax=1)
        outline(grid[0], is_seed, "white")
        if seen.cursor:
            (y, x), (to_y, to_x) = seen.cursor.first, seen.cursor.last
            for wide, colour in ((4, "white"), (2, colours[seen.cursor.label] / 255)):
                grid[0].plot((x, to_x), (y, to_y), "o-", color=colour, linewidth=wide, markersize=8,
                             markerfacecolor="none", markeredgewidth=wide)  # fmt: skip
        maps = (seen.scribbles, seen.argmax, seen.start.labels, proposal, truth)
        present = sorted({label for labels in maps for label in labels.unique().tolist() if label < count})
        verdicts = (("right", RIGHT), ("wrong", WRONG), ("unknown", UNKNOWN))
        entries = [(self.classes[label], colours[label] / 255) for label in present]
        key(below, entries + [(name, np.array(colour) / 255) for name, colour in verdicts])


def released(length: float) -> SolverSettings:
    """The released stage A for a scribble length; gamma is that of short ones where none is published."""
    return SolverSettings(gamma=PUBLISHED[length].gamma) if length in PUBLISHED else SolverSettings()


def brushed(stroke: Stroke, size: tuple[int, int], width: int = WIDTH) -> Tensor:
    """Pixels (H, W) bool of a stroke, drawn as all scribbles are and cut off at the picture's edge."""
    row, column, reach = trace(np.array([stroke.first, stroke.last], float))
    return torch.from_numpy(np.isfinite(paint(row, column, reach, size, width)))


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


def proposals(experiment: Experiment, root: Path | None = None) -> Panel | Figure:
    """What stage A makes of scribbles on a finished run's images."""
    title = "What the solver makes of a scribble"
    return opened(title, [experiment], root, lambda _: Proposals.read(experiment, root))
