"""Contrast-sensitive Potts energies of images on the grid: exact, relaxed for gradient descent, and that of stage A.

    R(X) = 1 / |N| sum_pq w_pq [X_p != X_q],    w_pq = exp(-||I_p - I_q||^2 / (2 sigma^2)) / dist(p, q)

Everything is batched, on the device and free of host waits, except `problems`, which hands a batch to the solver of
`cuts`. Energies are float32 at least, float64 if an input is. Source: released code (robust_trust_region).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repro.arrays import at_least_float32
from repro.solvers.cuts import DIRECTIONS, Problem, ends

RELAXATIONS = ("bilinear", "quadratic", "tv")


@dataclass(frozen=True, eq=False)
class Grid:
    """Neighbours of the pixels of B images and their contrast weights.

    weights: for each of the two or four `DIRECTIONS`, (B, H - |down|, W - right): w_pq of the pair that starts there,
    0 where an end is outside the region of interest. roi: (B, H, W) bool. pairs: (B,) number of pairs inside it over
    all directions, |N|. pixels: (B,) number of pixels in it, |Omega|. Both floating.
    """

    weights: tuple[Tensor, ...]
    roi: Tensor
    pairs: Tensor
    pixels: Tensor

    def mean_of(self, costs: Sequence[Tensor]) -> Tensor:
        """(B,): 1 / |N| sum w_pq cost_pq, for costs laid out as `weights`; 0 without pairs."""
        sums = [(weight * cost).flatten(1).sum(1) for weight, cost in zip(self.weights, costs, strict=True)]
        return torch.stack(sums).sum(0) / self.pairs.clamp(min=1)


def steps(neighbours: int) -> tuple[tuple[int, int], ...]:
    """The directions to 4 or 8 neighbours; ValueError for another number."""
    if neighbours not in DIRECTIONS:
        raise ValueError(f"neighbours is {neighbours}; it must be 4 or 8")
    return DIRECTIONS[neighbours]


def contrast_grid(images: Tensor, roi: Tensor | None = None, neighbours: int = 8) -> Grid:
    """The grid of a batch of images.

    images: (B, 3, H, W), any number of channels, any real type. sigma^2 is each image's mean of ||I_p - I_q||^2 over
        the pairs of its region of interest, 1 if that is 0: a factor or offset common to all channels changes nothing,
        their normalisation one by one does (the released code takes ImageNet-normalised channels).
    roi: (B, H, W) bool, False on padding; None for all pixels. Images may hold anything there but NaN and infinity.
    neighbours: 4 or 8. Raises ValueError for another number.
    """
    directions = steps(neighbours)
    images = at_least_float32(images.detach())
    roi = images.new_ones(images[:, 0].shape, dtype=torch.bool) if roi is None else roi
    inside, squares = [], []
    for direction in directions:
        first, second = ends(roi, direction)
        inside.append((first & second).to(images.dtype))
        first, second = ends(images, direction)
        squares.append((first - second).square().sum(1))
    pairs = torch.stack([flags.flatten(1).sum(1) for flags in inside]).sum(0)
    total = torch.stack([(flags * square).flatten(1).sum(1) for flags, square in zip(inside, squares, strict=True)])
    variance = total.sum(0) / pairs.clamp(min=1)
    variance = torch.where(variance > 0, variance, 1.0)[:, None, None]
    weights = [
        flags * (square / (-2 * variance)).exp() / (down**2 + right**2) ** 0.5
        for flags, square, (down, right) in zip(inside, squares, directions, strict=True)
    ]
    return Grid(tuple(weights), roi, pairs, roi.flatten(1).sum(1).to(images.dtype))


def potts_energy(labels: Tensor, grid: Grid) -> Tensor:
    """R(X), (B,), of labels (B, H, W), integers; values outside the region of interest have no effect."""
    views = [ends(labels, direction) for direction in steps(2 * len(grid.weights))]
    return grid.mean_of([first != second for first, second in views])


def relaxed_potts(probs: Tensor, grid: Grid, form: str = "bilinear") -> Tensor:
    """R of soft labels, (B,): `potts_energy` with a cost of S_p and S_q in the place of [X_p != X_q].

    probs: (B, C, H, W), S. form, and its value for different one-hot S_p and S_q (0 for equal ones):
        "bilinear", sum_k S_p^k (1 - S_q^k), 1: for S that sum to one it is 1 - <S_p, S_q>, which is symmetric;
        "quadratic", sum_k (S_p^k - S_q^k)^2, 2;  "tv", sum_k |S_p^k - S_q^k|, 2.
    Raises ValueError for another name.
    """
    if form not in RELAXATIONS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(RELAXATIONS)}")
    probs = at_least_float32(probs)
    costs = []
    for direction in steps(2 * len(grid.weights)):
        first, second = ends(probs, direction)
        if form == "bilinear":
            costs.append((first * (1 - second)).sum(1))
        else:
            gap = first - second
            costs.append((gap.square() if form == "quadratic" else gap.abs()).sum(1))
    return grid.mean_of(costs)


def proposal_energy(labels: Tensor, log_probs: Tensor, grid: Grid, gamma: float = 0.1, weight: float = 100.0) -> Tensor:
    """E(X) of stage A, (B,): gamma / |Omega| sum_p -log S_p[X_p] + lambda R(X).

    labels: (B, H, W) integers in [0, C) inside the region of interest. log_probs: (B, C, H, W), log S.
    weight: lambda. 0 for an empty region. The solver, not this function, keeps seeds at their labels.
    """
    chosen = torch.where(grid.roi, labels.long(), 0)
    surprise = -at_least_float32(log_probs).gather(1, chosen[:, None])[:, 0]
    unary = torch.where(grid.roi, surprise, 0.0).flatten(1).sum(1) / grid.pixels.clamp(min=1)
    return gamma * unary + weight * potts_energy(labels, grid)


@torch.no_grad()
def problems(
    log_probs: Tensor, grid: Grid, scribbles: Tensor, starts: Tensor | None = None, names: Sequence[str] | None = None
) -> list[Problem]:
    """Stage A of each image of a batch, copied to the host as numpy arrays.

    log_probs: (B, C, H, W), log softmax of the network in eval mode, by `log_softmax`: it must be finite.
    scribbles: (B, H, W) uint8, a class, 255 unlabelled, 254 padding. starts: (B, H, W) uint8, stored proposals.
    names: for messages, numbers by default.
    """
    names = [str(number) for number in range(len(log_probs))] if names is None else names

    def images_of(values: Tensor) -> list:
        # copies, since the tensors may change while the problems wait
        values = at_least_float32(values) if values.is_floating_point() else values
        return [row.copy() for row in values.cpu().numpy()]

    weights = zip(*(images_of(weight) for weight in grid.weights), strict=True)
    starts = [None] * len(names) if starts is None else images_of(starts)
    rows = (names, images_of(log_probs), weights, images_of(scribbles), images_of(grid.roi), starts)
    return [Problem(*row) for row in zip(*rows, strict=True)]
