"""What the proposal explorer computes: scribbles at a position, and the solver's labelling of them; no widget."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from figures.plane import classes_of
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
from repro.solvers.cuts import Solution, SolverSettings, allowed_labels, ends, solve
from repro.solvers.potts import Grid, contrast_grid, potts_energy, problems, proposal_energy, steps

NEEDED = tuple(f"pool_{name}" for name in ("images", "truth", "scribbles", "reach", "log_probs"))
STARTS = {"background": "all background", "argmax": "argmax"}
NOTHING = -1.0  # the length where no scribble is given


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
