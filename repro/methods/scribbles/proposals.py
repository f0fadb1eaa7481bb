"""Stage A over images: what is solved, where, and how proposals are told to the reports."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor, nn

from repro.data.mask_views import PADDING, MaskViews, hide
from repro.models.modes import evaluating
from repro.solvers.cuts import Problem, Solution, SolverSettings, solve_all, start_workers
from repro.solvers.potts import contrast_grid, problems, wide
from repro.train import Items, PixelLabels

IMAGES_PER_PASS = 16  # memory only: the network is in eval mode


def solving(workers: int) -> contextlib.AbstractContextManager[Executor | None]:
    """Worker processes for a `with` block; None, and so this process, for 0."""
    return start_workers(workers) if workers else contextlib.nullcontext()


def refresh(
    network: nn.Module,
    views: MaskViews,
    pool: Any,
    stored: Tensor,
    settings: SolverSettings,
    neighbours: int = 8,
    workers: int = 0,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> list[Solution]:
    """Solve stage A for every image of a pool and overwrite its stored proposal.

    network: put in eval mode for the pass, then back; predicts whole, un-augmented images without autocast.
    pool: `labelled` (n,); labels (H, W) are scribbles, 255, and 254 where a picture was padded to the common size.
        Its `take`, if it has one, must deliver whole images, without chance.
    stored: (N, H, W) uint8 by pool index, in which each image starts; 255 is the lowest label that is allowed, which
        is background where all are (the released start). Written only once all are solved.
    workers: processes, 0 for this one. on_progress(done, None): after each image.
    Returns the solutions in the order of `labelled`, with the energies from and to which each image came.
    Source: released code: seeds fixed, labels of the scribbles only (if the settings say so), unary by plain log
    softmax, contrast weights of the normalised image.
    """
    with torch.no_grad(), solving(workers) as executor, evaluating(network):
        waiting = whole_images(network, views, pool, stored, neighbours)
        solutions = solve_all(waiting, settings, executor, on_progress)
    for number, solution in zip(pool.labelled.tolist(), solutions, strict=True):
        stored[number] = torch.from_numpy(solution.labels).to(stored.device)
    return solutions


def whole_images(network: nn.Module, views: MaskViews, pool: Any, stored: Tensor, neighbours: int) -> Iterator[Problem]:
    """Stage A of each image in turn; the network runs only as far as problems are asked for."""
    for index in pool.labelled.split(IMAGES_PER_PASS):
        items = take(pool, index)
        roi = items.labels != PADDING
        x = hide(views.plain(items.images), ~roi)
        grid = contrast_grid(x, roi, neighbours)
        names = [f"{number} of the pool" for number in index.tolist()]
        yield from problems(wide(network(x)).log_softmax(1), grid, items.labels, stored[items.index], names)


def take(pool: Any, index: Tensor) -> Items:
    """Images of a pool, by its `take` where it has one."""
    if hasattr(pool, "take"):
        return pool.take(index)
    return Items(index, pool.images[index], pool.labels[index])


def report(index: Tensor, logits: Tensor, proposals: Tensor, seeds: Tensor, window: Any) -> dict[str, PixelLabels]:
    """What the monitor is told of proposals on crops: those outside the seeds, and the network's probability of each.

    index: (B,). logits: (B, C, S, S). proposals: (B, S, S), 255 where there is none. seeds: (B, S, S) bool.
    """
    valid = proposals < logits.shape[1]
    scores = wide(logits.detach())
    chosen = torch.where(valid, proposals.long(), 0)
    confidence = (scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(1)).exp()
    return {"proposals": PixelLabels(index, chosen, valid & ~seeds, confidence, valid, window)}
