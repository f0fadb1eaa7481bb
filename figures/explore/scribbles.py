"""The explorer of runs from scribbles: scribbles on an image, and the labelling that stage A of the trust region makes.

Predictions are those of the final network on whole pool images. Each move solves stage A again.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from torch import Tensor

from figures.common import class_colours, classes_of
from figures.explore import panel
from figures.explore.panel import RIGHT, UNKNOWN, WRONG, Explorer, Missing, Numbers, Seen
from figures.style import label_of, where
from repro.data.augment import normalise
from repro.data.mask_views import IMAGENET_MEAN, IMAGENET_STD, PADDING, hide
from repro.data.masks import IGNORE
from repro.data.scribbles import WIDTH, paint, trace
from repro.experiment import Experiment, resolve
from repro.measure.segmentation import confusion, pixel_accuracy
from repro.methods.scribbles.common import PUBLISHED
from repro.methods.scribbles.trust_region import TrustRegionSettings
from repro.runs import folder_of, load_outputs
from repro.solvers.cuts import SolverSettings, allowed_labels, solve
from repro.solvers.potts import contrast_grid, potts_energy, problems, proposal_energy

NEEDED = ("images", "truth", "scribbles", "reach", "log_probs")  # outputs `pool_...` of a run
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
        self.label = widgets.Dropdown(options=names, value=0, **panel.looks("stroke: class"))
        self.places = [
            panel.whole("from row", high // 2, 0, high - 1), panel.whole("from column", wide // 4, 0, wide - 1),
            panel.whole("to row", high // 2, 0, high - 1), panel.whole("to column", 3 * wide // 4, 0, wide - 1),
        ]  # fmt: skip
        self.add = widgets.Button(description="add stroke", layout={"margin": "0 8px 0 164px"})
        self.clear = widgets.Button(description="clear")
        super().__init__([panel.in_columns([self.label, widgets.HBox([self.add, self.clear]), *self.places])])
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


class Proposals(Explorer):
    """Scribbles on the P pool images that a run keeps, of K classes, and what stage A makes of them.

    images: (P, 3, H, W) uint8. truth: (P, H, W) uint8, for scribbles of other lengths and the report. scribbles:
    (P, H, W) uint8, class, 255, 254 on padding; of the run's own length. reach: (P, H, W), the shortest length at which
    a pixel is marked, inf for never. log_probs: (P, K, H, W). length: the run's, 0..1. solver, neighbours: of its stage
    A, the released ones for a method without it. width: of a scribble, in pixels.
    """

    about = "What the solver makes of a scribble"
    words = "Scribbles, argmax, proposal and truth."

    def __init__(self, experiment: Experiment, root: Path | None = None) -> None:
        outputs = load_outputs(folder_of(experiment, root))
        lacking = [f"pool_{name}" for name in NEEDED if not len(outputs.get(f"pool_{name}", ()))]
        if lacking:
            raise Missing(", ".join(lacking))
        self.images, self.truth, self.scribbles, self.reach, self.log_probs = (
            outputs[f"pool_{name}"] for name in NEEDED
        )
        self.length, recipe = experiment.labels / 100, resolve(experiment)
        self.solver, self.neighbours = released(self.length), 8
        if isinstance(recipe.method, TrustRegionSettings):
            self.solver, self.neighbours = recipe.method.solver, recipe.method.neighbours
        self.classes, self.width = classes_of(experiment.data), recipe.width
        self.title = f"{label_of(experiment)}, {where([experiment])}"
        self.solve = functools.lru_cache(4)(self._solve)  # a move of the cursor solves nothing again
        high, wide = self.truth.shape[1:]
        self.size = (9.0, 0.75 + 2 * (0.25 + 2.2 * high / max(high, wide)))

    def controls(self) -> dict[str, widgets.Widget]:
        """At the first image with the run's own scribble, under the run's stage A, started as its first one was."""
        own, (high, wide) = self.solver, self.truth.shape[1:]
        live, lengths = high * wide <= QUICK, sorted({*(step / 100 for step in range(101)), self.length})
        image = panel.whole("image of the pool", 0, 0, len(self.images) - 1)
        lambdas = panel.levels(LAMBDAS, own.potts_weight)
        options = [("none", NOTHING), *((f"{100 * length:g} %", length) for length in lengths)]
        return {
            "image": image,
            "length": panel.slider("length of the scribbles", options, self.length, live),
            "potts_weight": panel.slider("lambda, of Potts", lambdas, own.potts_weight, live),
            "gamma": panel.slider("gamma, of the network", panel.levels(GAMMAS, own.gamma), own.gamma, live),
            "neighbours": panel.buttons("neighbours", {4: "4", 8: "8"}, self.neighbours),
            "restricted": panel.buttons("labels", {True: "of the scribbles", False: "all"}, own.restricted),
            "start": panel.buttons("start from", STARTS, "background"),
            "drawn": Pencil(self.classes, (high, wide), image),
        }

    def compute(self, image: int, drawn: Drawn | None = None, **at) -> Seen:
        """at: length, 0..1 or NOTHING; potts_weight lambda; gamma; neighbours, 4 or 8; restricted to the scribbles'
        labels; start, of STARTS.

        scribbles, argmax: (H, W) uint8, the latter the network's. clamped: it with seeds at their labels. start: what
        the solver starts from, with seeds and restriction. proposal: where it ends. The last three have labels (H, W)
        uint8, 255 on padding, and both parts of their energy E(X), unary = gamma / |Omega| sum_p -log S_p[X_p] and
        potts = lambda / |N| sum_pq w_pq [X_p != X_q]. grid: the neighbours. allowed: labels that the solver may use.
        solution: its own account. at: the position, its strokes those of the image.
        """
        strokes = tuple(stroke for number, stroke in (drawn.strokes if drawn else ()) if number == image)
        return Seen(**vars(self.solve(image, strokes, **at)), cursor=drawn and drawn.cursor)

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

    def _solve(self, image: int, strokes: tuple[Stroke, ...], **at) -> Seen:
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

        def labelled(labels: Tensor) -> Seen:
            labels = torch.where(roi[0], labels, IGNORE)
            unary = float(proposal_energy(labels[None], log_probs, grid, at["gamma"], 0.0))
            potts = at["potts_weight"] * float(potts_energy(labels[None], grid))
            return Seen(labels=labels, unary=unary, potts=potts, energy=unary + potts)

        is_seed = scribbles < len(self.classes)
        allowed = allowed_labels(scribbles[is_seed].numpy(), len(self.classes), at["restricted"])
        clamped = labelled(torch.where(is_seed, scribbles, argmax[0]))
        start, proposal = (labelled(torch.from_numpy(found.labels)) for found in (unmoved, solution))
        at, labellings = {"image": image, "strokes": strokes} | at, {"clamped": clamped, "start": start}
        return Seen(at=at, scribbles=scribbles, argmax=argmax[0], **labellings, proposal=proposal, grid=grid,
                    allowed=tuple(allowed.tolist()), solution=solution)  # fmt: skip

    def accuracy(self, image: int, labels: Tensor) -> float:
        """Share of labels (H, W) that equal the truth, seeds included, where it is known; NaN where it nowhere is."""
        counts = confusion(self.truth[image][None], labels[None], len(self.classes))
        return float(pixel_accuracy(counts)) if counts.any() else math.nan

    def numbers(self, seen: Seen) -> Numbers:
        image = seen.at["image"]
        named = {
            "network's argmax, seeds clamped": seen.clamped,
            f"start: {STARTS[seen.at['start']]}, seeds clamped": seen.start,
            "proposal": seen.proposal,
        }
        rows = []
        for name, found in named.items():
            energies = (f"{value:.4f}" for value in (found.energy, found.unary, found.potts))
            labels = found.labels
            shares = (changed(labels, seen.argmax), changed(labels, seen.start.labels), self.accuracy(image, labels))
            rows.append((name, *energies, *map(panel.percent, shares)))
        parts = ("energy E", "unary part", "Potts part")
        columns = ("labelling", *parts, "unlike argmax", "unlike start", "right (report only)")
        return Numbers(self.heading(seen), columns, rows)

    def heading(self, seen: Seen) -> str:
        """How much is scribbled, what the solver did under which labels, and what an edge weighs against a pixel."""
        at, labels, (high, wide) = seen.at, seen.scribbles, self.truth.shape[1:]
        seeds, pixels, pairs = labels[labels < len(self.classes)], float(seen.grid.pixels), float(seen.grid.pairs)
        kept = f"given scribbles of length {100 * at['length']:g} %"
        kept = "no given scribble" if at["length"] == NOTHING else kept
        drawn = f"{panel.counted(len(at['strokes']), 'stroke')} drawn" if at["strokes"] else "none drawn"
        names = ", ".join(self.classes[label] for label in seen.allowed)
        limit = names if len(seen.allowed) < len(self.classes) else f"all {len(self.classes)} classes"
        said = (
            f"Image {at['image']} of the pool, {high} x {wide} pixels: {len(seeds):,} seeds "
            f"({panel.percent(len(seeds) / max(1.0, pixels))}) of {len(seeds.unique())} classes; {kept}, {drawn}. "
            f"Labels allowed: {limit}. Alpha-expansion: {panel.counted(seen.solution.sweeps, 'sweep')} of at most "
            f"{self.solver.sweeps}, {panel.counted(seen.solution.cuts, 'cut')}."
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
        return panel.tiles(figure, 2, 4)

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        *grid, below = axes
        image, colours = seen.at["image"], (255 * class_colours(len(self.classes))).round().astype(np.uint8)
        truth, proposal, count = self.truth[image], seen.proposal.labels, len(self.classes)
        differs = (proposal != seen.argmax) & (proposal != IGNORE)
        known = (truth < count) & (proposal != IGNORE)
        verdict = np.array([WRONG, RIGHT, UNKNOWN], np.uint8)[np.where(known, (proposal == truth).long(), 2)]
        is_seed, (right, down) = (seen.scribbles < count).numpy(), (part[0].numpy() for part in seen.grid.weights[:2])
        pixels = self.images[image].permute(1, 2, 0).numpy()
        good = f"Proposal, right: {panel.percent(self.accuracy(image, proposal))} (report only)"
        moved = f"Proposal, not the argmax: {panel.percent(changed(proposal, seen.argmax))}"
        pictures = (
            (f"Image {image}, and what is scribbled", np.where(is_seed[..., None], colours[seen.scribbles], pixels)),
            ("Network's argmax", colours[seen.argmax]),
            (f"Proposal: E = {seen.proposal.energy:.4f}", colours[proposal]),
            ("Truth (report only)", colours[truth]),
            ("Least edge weight w; dark: cheap", np.minimum(right[:-1], down[:, :-1])),
            (f"Start: E = {seen.start.energy:.4f}", colours[seen.start.labels]),
            (moved, panel.fade(colours[proposal], differs)),
            (good, verdict),
        )
        for tile, (title, shown) in zip(grid, pictures, strict=True):
            panel.picture(tile, shown, title, cmap="gray", vmin=0, vmax=1)
        panel.outline(grid[0], is_seed, "white")
        if seen.cursor:
            (y, x), (to_y, to_x) = seen.cursor.first, seen.cursor.last
            for wide, colour in ((4, "white"), (2, colours[seen.cursor.label] / 255)):
                grid[0].plot((x, to_x), (y, to_y), "o-", color=colour, linewidth=wide, markersize=8,
                             markerfacecolor="none", markeredgewidth=wide)  # fmt: skip
        maps = (seen.scribbles, seen.argmax, seen.start.labels, proposal, truth)
        present = sorted({label for labels in maps for label in labels.unique().tolist() if label < count})
        verdicts = (("right", RIGHT), ("wrong", WRONG), ("unknown", UNKNOWN))
        entries = [(self.classes[label], colours[label] / 255) for label in present]
        panel.key(below, entries + [(name, np.array(colour) / 255) for name, colour in verdicts])


def released(length: float) -> SolverSettings:
    """The released stage A for a scribble length; gamma is that of short ones where none is published."""
    return SolverSettings(gamma=PUBLISHED[length].gamma) if length in PUBLISHED else SolverSettings()


def brushed(stroke: Stroke, size: tuple[int, int], width: int = WIDTH) -> Tensor:
    """Pixels (H, W) bool of a stroke, drawn as all scribbles are and cut off at the picture's edge."""
    row, column, reach = trace(np.array([stroke.first, stroke.last], float))
    return torch.from_numpy(np.isfinite(paint(row, column, reach, size, width)))


def changed(labels: Tensor, others: Tensor) -> float:
    """Share of pixels that differ, of those that are not padding in `labels` (H, W); 0 without any."""
    inside = labels != IGNORE
    return int((inside & (labels != others)).sum()) / max(1, int(inside.sum()))
