"""Stage A of the trust region: the labelling of an image that its network, scribbles and contrast edges agree on.

    with start_workers(2) as pool:
        solutions = solve_all(problems, SolverSettings(gamma=0.05), pool)

One image's energy, over its region of interest, with seeds held at their labels:

    E(X) = gamma / |Omega| sum_p -log S_p[X_p]  +  lambda / |N| sum_pq w_pq [X_p != X_q]

torch is not imported: worker processes start in a fraction of its time. `potts.problems` makes the problems.
Sources: released code (robust_trust_region); where stated, ours.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repro.settings import check, hyper
from repro.solvers.expansion import BACK_ENDS, Graph, alpha_expansion, merge

UNLABELLED, PADDING = 255, 254  # as `repro.data.masks.IGNORE`, whose module needs torch
DIRECTIONS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (-1, 1))}  # rows down, columns right: each pair once
AHEAD = 32  # problems handed to the workers before the oldest must be done: bounds the memory


@dataclass(frozen=True)
class SolverSettings:
    potts_weight: float = hyper(100.0, "lambda", "released script (potts-weight)", low=0)
    gamma: float = hyper(0.1, "gamma", "released README: 0.05 (length 1), 0.075 (0.8), 0.1 (below)", low=0)
    sweeps: int = hyper(5, "", "released code", low=0)
    restricted: bool = hyper(True, "", "released code (tr-restricted): only labels of the image's scribbles")
    downscale: int = hyper(
        1, "", "side in pixels of the blocks that share a label; released: 1; blocks are ours", low=1
    )
    back_end: str = hyper("scipy", "", "released: GCO; ours: same labelling from each", choices=tuple(BACK_ENDS))

    def __post_init__(self):
        check(self)


@dataclass(frozen=True, eq=False)
class Problem:
    """Stage A of one image of H x W pixels and C classes, whatever the settings.

    name: for messages. log_probs: (C, H, W) floating, log S. weights: w_pq for each of two or four `DIRECTIONS`, as
    `repro.solvers.potts.Grid` has them. scribbles: (H, W) uint8, a class, 255 or 254. roi: (H, W) bool, None for all.
    start: (H, W) uint8, the stored proposal; None for all background. Pixels of it with a label that is not allowed
    (also 255) start from the lowest allowed one.
    """

    name: str
    log_probs: NDArray
    weights: tuple[NDArray, ...]
    scribbles: NDArray
    roi: NDArray | None = None
    start: NDArray | None = None


@dataclass(frozen=True, eq=False)
class Solution:
    """A proposal: labels (H, W) uint8, 255 outside the region of interest; the E it started from and ended at; sweeps
    and cuts that it took."""

    labels: NDArray
    start_energy: float
    energy: float
    sweeps: int
    cuts: int


def ends(maps: Any, direction: tuple[int, int]) -> tuple[Any, Any]:
    """Views of arrays or tensors (..., H, W) at both ends p, q = p + direction of all pairs inside the image."""
    down, right = direction
    height, width = maps.shape[-2:]
    first = maps[..., max(0, -down) : height - max(0, down), : width - right]
    return first, maps[..., max(0, down) : height - max(0, -down), right:]


@functools.lru_cache(maxsize=4)  # 12 MB for 375 x 500
def grid_pairs(height: int, width: int, neighbours: int) -> NDArray:
    """Both ends (2, m) of the pairs of a grid as flat positions, direction by direction. Shared: do not write."""
    position = np.arange(height * width).reshape(height, width)
    views = [ends(position, direction) for direction in DIRECTIONS[neighbours]]
    return np.stack([np.concatenate([view[end].ravel() for view in views]) for end in (0, 1)])


def allowed_labels(seeds: NDArray, classes: int, restricted: bool = True) -> NDArray:
    """Labels that stage A may use, ascending: those of the seeds (any shape), all if there are not two of them."""
    present = np.unique(seeds)
    return present if restricted and len(present) > 1 else np.arange(classes)


def solve(problem: Problem, settings: SolverSettings) -> Solution:
    """Minimise one image's E by alpha-expansion. E of the result is never above E of the start.

    With `downscale` s > 1 pixels in a block of s x s share a label: their unaries and the edges between two blocks
    add up, so the energy of such a labelling is the exact one (ours; the released option shrinks the image). A block
    with seeds takes their most frequent label; each seed keeps its own in the result.
    Raises ValueError for shapes that do not match, unknown scribble labels, or log-probabilities that are not finite.
    """
    classes, height, width = problem.log_probs.shape
    roi = check_image(problem)
    seeds = np.where(problem.scribbles < classes, problem.scribbles.astype(np.int64), -1)[roi]
    pixels = int(roi.sum())
    allowed = allowed_labels(seeds[seeds >= 0], classes, settings.restricted)
    labels = np.full((height, width), UNLABELLED, np.uint8)
    if not pixels:
        return Solution(labels, 0.0, 0.0, 0, 0)
    graph = graph_of(problem, roi, seeds, settings)
    start = np.zeros(pixels, np.int64) if problem.start is None else problem.start[roi].astype(np.int64)
    start = np.where(np.isin(start, allowed), start, allowed[0])
    start = np.where(seeds >= 0, seeds, start)
    if settings.downscale == 1:
        found = alpha_expansion(graph, start, allowed, settings.sweeps, settings.back_end)
        chosen = found.labels
    else:
        rows, columns = np.nonzero(roi)
        blocks = rows // settings.downscale * width + columns // settings.downscale
        present, group = np.unique(blocks, return_inverse=True)
        votes = np.stack([np.bincount(group[start == k], minlength=len(present)) for k in range(classes)])
        coarse = merge(graph, group, len(present))
        found = alpha_expansion(coarse, votes.argmax(0), allowed, settings.sweeps, settings.back_end)
        chosen = np.where(seeds >= 0, seeds, found.labels[group])
    before, after = graph.energy(start), graph.energy(chosen)
    if after > before:
        chosen, after = start, before
    labels[roi] = chosen
    return Solution(labels, before / pixels, after / pixels, found.sweeps, found.cuts)


def check_image(problem: Problem) -> NDArray:
    """The region of interest (H, W); ValueError for shapes or labels that do not fit."""
    classes, *size = problem.log_probs.shape
    roi = np.ones(size, bool) if problem.roi is None else problem.roi
    for name in ("scribbles", "roi", "start"):
        given = getattr(problem, name)
        if given is not None and given.shape != tuple(size):
            raise ValueError(f"{name} are {given.shape}, but log_probs are {problem.log_probs.shape}")
    known = (problem.scribbles < classes) | np.isin(problem.scribbles, (UNLABELLED, PADDING))
    if not known.all():
        raise ValueError(f"scribbles hold {problem.scribbles[~known].max()}, which is neither a class nor 254 or 255")
    return roi


def graph_of(problem: Problem, roi: NDArray, seeds: NDArray, settings: SolverSettings) -> Graph:
    """E times |Omega| as a graph whose nodes are the n pixels of the region of interest; seeds: (n,), -1 for none."""
    neighbours = 2 * len(problem.weights)
    pairs = grid_pairs(*roi.shape, neighbours)
    inside = roi.ravel()[pairs].all(0)
    index = np.cumsum(roi) - 1
    weights = np.concatenate([weight.ravel() for weight in problem.weights]).astype(np.float64)
    if weights.shape != inside.shape:
        raise ValueError(f"{len(weights)} weights, but {roi.shape} pixels have {len(inside)} pairs")
    scale = settings.potts_weight * len(seeds) / max(1, int(inside.sum()))
    unary = -settings.gamma * problem.log_probs[:, roi].astype(np.float64)
    return Graph(unary, index[pairs[:, inside]], scale * weights[inside], seeds)


@contextlib.contextmanager
def start_workers(count: int) -> Iterator[Executor]:
    """Processes for `solve_all`, each with one thread; they live until the end of the `with` block.

    They are spawned, not forked, so a script that uses them needs `if __name__ == "__main__":`. Ctrl-C reaches all
    processes of a terminal; here only the caller decides what it means, and workers finish what they are given.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=ignore_interrupts)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))  # a library reads them when it loads: they must be there before
    try:
        for _ in range(count):
            pool.submit(os.getpid)  # each starts a process, which inherits the variables
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with pool:
        yield pool


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def solve_all(
    problems: Iterable[Problem],
    settings: SolverSettings,
    pool: Executor | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> list[Solution]:
    """`solve` for each problem, in their order, which is also that of the result whatever the workers do.

    problems: read as the workers need them, so a generator may run the network meanwhile. pool: from `start_workers`,
    or None to solve in this process. on_progress(done, total): after each, total None if `problems` has no length.
    Raises RuntimeError that names the image, from the error that its solution raised.
    """
    total = len(problems) if hasattr(problems, "__len__") else None
    solutions: list[Solution] = []
    with contextlib.closing(submitted(problems, settings, pool)) as results:
        for name, result in results:
            try:
                solutions.append(result())
            except Exception as error:
                raise RuntimeError(f"stage A failed on image {name!r}: {type(error).__name__}: {error}") from error
            if on_progress:
                on_progress(len(solutions), total)
    return solutions


def submitted(
    problems: Iterable[Problem], settings: SolverSettings, pool: Executor | None
) -> Iterator[tuple[str, Callable[[], Solution]]]:
    """Names and functions that wait for the solutions, in order; what is not waited for at the end is cancelled."""
    if pool is None:
        for problem in problems:
            yield problem.name, functools.partial(solve, problem, settings)
        return
    waiting: deque = deque()
    try:
        for problem in problems:
            waiting.append((problem.name, pool.submit(solve, problem, settings)))
            if len(waiting) == AHEAD:
                name, future = waiting.popleft()
                yield name, future.result
        while waiting:
            name, future = waiting.popleft()
            yield name, future.result
    finally:
        for _, future in waiting:
            future.cancel()
