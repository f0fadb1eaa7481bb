"""Stage A of the trust region: the labelling of an image that its network, scribbles and contrast edges agree on.

    with start_workers(2) as pool:
        solutions = solve_all(problems, SolverSettings(gamma=0.05), pool)

One image's energy, over its region of interest, with seeds held at their labels:

    E(X) = gamma / |Omega| sum_p -log S_p[X_p]  +  lambda / |N| sum_pq w_pq [X_p != X_q]

torch is not imported, so worker processes start in a fraction of the time. `potts.problems` makes the problems.
Source: released code (robust_trust_region), except where a choice is named as made here.
"""

import contextlib
import functools
import importlib
import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from repro.settings import check, hyper

# Alpha-expansion

LIMIT = 29  # bits of a quantised energy: residual capacities up to four times it fit int32
COARSE = 16  # once the energy has fallen by this factor, the rounding is made finer


@dataclass(frozen=True, eq=False)
class Graph:
    """A Potts energy over n nodes and K labels.

    unary: (K, n) float64. pairs: (2, m) integers, both ends of each pair. weights: (m,) float64, not negative.
    fixed: (n,) integers, the label that a node must keep, -1 where it is free.
    """

    unary: NDArray
    pairs: NDArray
    weights: NDArray
    fixed: NDArray

    def energy(self, labels: NDArray) -> float:
        """E of labels (n,) in [0, K); a fixed node costs its unary like any other."""
        first, second = labels[self.pairs]
        return float(self.unary[labels, np.arange(len(labels))].sum() + self.weights[first != second].sum())


@dataclass(frozen=True, eq=False)
class Expansion:
    """What `alpha_expansion` found.

    labels: (n,) int64. energies: of the start, then after each accepted move, strictly falling.
    sweeps: passes over the labels that were begun. cuts: maximum flows that were computed.
    """

    labels: NDArray
    energies: tuple[float, ...]
    sweeps: int
    cuts: int


def alpha_expansion(
    graph: Graph, start: NDArray, allowed: Sequence[int] | None = None, sweeps: int = 5, back_end: str = "scipy"
) -> Expansion:
    """Lower a Potts energy by expansion moves: labels in rising order, until a whole sweep changes nothing.

    start: (n,) labels; fixed nodes take theirs, a free node outside `allowed` takes the lowest that is allowed.
    allowed: labels that free nodes may take, None for all. sweeps: passes over them at most; 0 returns the start.
    back_end: "scipy", "ortools" or "pymaxflow"; all give the same labels.
    A move is the best one up to rounding (`quantise`), and is accepted only if it lowers E in float64. Cuts that
    cannot change anything are left out: of a label already tried since the last change, and of all after a move of a
    two-label problem in which every free node took part, since that is the global minimum.
    Raises ValueError for bad values, ImportError for a library that is not installed.
    """
    allowed = check_problem(graph, start, allowed, sweeps)
    cut = find_back_end(back_end)
    free = np.flatnonzero(graph.fixed < 0)
    labels = np.where(graph.fixed < 0, start, graph.fixed).astype(np.int64)
    labels[free] = np.where(np.isin(labels[free], allowed), labels[free], allowed[0])
    state = np.searchsorted(allowed, labels[free])
    inner = contract(graph, allowed)
    bound = flow_bound(inner, state)
    unary, weights, _ = quantise(inner, bound)
    energies, begun, cuts = [graph.energy(labels)], 0, 0
    settled: set[int] = set()  # labels whose move is known to change nothing
    while begun < sweeps and len(settled) < len(allowed):
        begun += 1
        for alpha in range(len(allowed)):
            move = None if alpha in settled else expansion_move(unary, inner.pairs, weights, state, alpha)
            settled.add(alpha)
            if move is None:
                continue
            nodes, problem = move
            cuts += 1
            proposal = state.copy()
            proposal[nodes[cut(*problem)]] = alpha
            proposed = labels.copy()
            proposed[free] = allowed[proposal]
            energy = graph.energy(proposed)
            if energy < energies[-1]:
                state, labels, settled = proposal, proposed, {alpha}
                energies.append(energy)
            if len(allowed) == 2 and len(nodes) == len(state):
                settled = {0, 1}
            tighter = flow_bound(inner, state)
            if tighter < bound / COARSE:
                bound, settled = tighter, set()
                unary, weights, _ = quantise(inner, bound)
    return Expansion(labels, tuple(energies), begun, cuts)


def check_problem(graph: Graph, start: NDArray, allowed: Sequence[int] | None, sweeps: int) -> NDArray:
    """The allowed labels, ascending; ValueError for a problem that makes no sense."""
    classes, nodes = graph.unary.shape
    if graph.fixed.shape != (nodes,) or start.shape != (nodes,) or graph.pairs.shape != (2, len(graph.weights)):
        raise ValueError(
            f"unary {graph.unary.shape}, fixed {graph.fixed.shape}, start {start.shape}, pairs {graph.pairs.shape} and "
            f"weights {graph.weights.shape} must be (K, n), (n,), (n,), (2, m) and (m,)"
        )
    if not math.isfinite(float(np.abs(graph.unary).sum() + graph.weights.sum())):
        raise ValueError("unary or weights hold NaN or infinity: forbid labels by `allowed` or `fixed` instead")
    if (graph.weights < 0).any():
        raise ValueError(f"the smallest weight is {graph.weights.min()}; a Potts weight must not be negative")
    low, high = graph.fixed.min(initial=-1), graph.fixed.max(initial=-1)
    if not -1 <= low <= high < classes:
        raise ValueError(f"fixed labels span {low} to {high}; they must be in [-1, {classes})")
    allowed = np.unique(np.arange(classes) if allowed is None else np.asarray(allowed, np.int64))
    if len(allowed) == 0 or allowed[0] < 0 or allowed[-1] >= classes:
        raise ValueError(f"allowed labels are {allowed.tolist()}; there must be some, all in [0, {classes})")
    if sweeps < 0:
        raise ValueError(f"sweeps is {sweeps}; it must not be negative")
    return allowed


def find_back_end(name: str) -> Callable[..., NDArray]:
    """The cut function of a back end; raises ValueError for an unknown one, ImportError for one not installed."""
    if name not in BACK_ENDS:
        raise ValueError(f"unknown max-flow back end {name!r}; known: {', '.join(BACK_ENDS)}")
    module, package, cut = BACK_ENDS[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        hint = f"max-flow back end {name!r} needs {package}: pip install {package}, or use 'scipy'"
        raise ImportError(hint) from error
    return cut


def contract(graph: Graph, allowed: NDArray) -> Graph:
    """The graph of the free nodes over the allowed labels: pairs with a fixed node become unary costs.

    Each node's cheapest label then costs 0, so energies differ from those of `graph` by a constant.
    """
    is_free = graph.fixed < 0
    count = int(is_free.sum())
    index = np.cumsum(is_free) - 1
    unary = graph.unary[allowed][:, is_free].astype(np.float64)
    for here, there in (graph.pairs, graph.pairs[::-1]):
        lone = is_free[here] & ~is_free[there]
        node, weight, label = index[here[lone]], graph.weights[lone], graph.fixed[there[lone]]
        unary += np.bincount(node, weight, count)
        known = np.searchsorted(allowed, label).clip(max=len(allowed) - 1)
        known = np.where(allowed[known] == label, known, -1)  # a fixed label need not be an allowed one
        for k in range(len(allowed)):
            unary[k] -= np.bincount(node[known == k], weight[known == k], count)
    inner = is_free[graph.pairs].all(0) & (graph.weights > 0)
    return Graph(unary - unary.min(0), index[graph.pairs[:, inner]], graph.weights[inner], np.full(count, -1))


def merge(graph: Graph, group: NDArray, count: int) -> Graph:
    """The energy of labellings that are constant on groups of nodes, as a graph of the `count` groups.

    group: (n,) integers in [0, count). A group with fixed nodes is fixed to their most frequent label, the lowest of
    equals: for others of its fixed nodes the energy is not exact.
    """
    classes = len(graph.unary)
    unary = np.stack([np.bincount(group, row, count) for row in graph.unary])
    ends = np.sort(group[graph.pairs], axis=0)
    apart = ends[0] != ends[1]
    keys, place = np.unique(ends[0, apart] * count + ends[1, apart], return_inverse=True)
    weights = np.bincount(place, graph.weights[apart], len(keys))
    votes = np.stack([np.bincount(group[graph.fixed == k], minlength=count) for k in range(classes)])
    fixed = np.where(votes.any(0), votes.argmax(0), -1)
    return Graph(unary, np.stack([keys // count, keys % count]), weights, fixed)


def flow_bound(graph: Graph, state: NDArray) -> float:
    """Above the energy of labels (n,), where cheapest labels cost 0, and above the sum of any one node's weights.

    Every flow of a move from there stays below it, since keeping all labels is a cut, and so does any later energy.
    """
    incident = np.bincount(graph.pairs.ravel(), np.tile(graph.weights, 2), len(state))
    return max(graph.energy(state), float(incident.max(initial=0)))


def quantise(graph: Graph, bound: float) -> tuple[NDArray, NDArray, float]:
    """Integer unary (K, n) and even integer weights (m,) of a graph whose cheapest labels cost 0, and their scale s.

    bound: from `flow_bound`. s is the largest power of two (so that energies in its multiples stay exact) that keeps
    s times the bound under 2**29: nothing in a cut then overflows int32. Costs are clipped to twice the bound, which
    is more than a labelling that improves on the state can pay.
    The integer energy of a labelling over s is within (n / 2 + m) / s of its energy: 1 / 2 of a unary, 1 of a weight,
    which must be even since cuts halve it. So a move comes within twice that of the best.
    """
    if bound == 0:
        return np.zeros(graph.unary.shape, np.int64), np.zeros(len(graph.weights), np.int64), 1.0
    # frexp gives the bound as f 2**e with 1 / 2 <= f < 1; the limit of 1000 keeps 2**exponent a float
    exponent = min(LIMIT - math.frexp(bound)[1], 1000)
    unary = np.rint(np.ldexp(np.minimum(graph.unary, 2 * bound), exponent)).astype(np.int64)
    weights = 2 * np.rint(np.ldexp(graph.weights, exponent - 1)).astype(np.int64)
    return unary, weights, math.ldexp(1.0, exponent)


def expansion_move(
    unary: NDArray, pairs: NDArray, weights: NDArray, state: NDArray, alpha: int
) -> tuple[NDArray, tuple[NDArray, ...]] | None:
    """The binary cut that finds the best expansion on `alpha`: (nodes, (cost, p, q, capacity)), None if it is `state`.

    unary (K, n), weights (m,): from `quantise`. state: (n,) labels. nodes: (f,) those without `alpha`. The arguments
    of a back end: cost (f,) of taking `alpha`, and pairs p, q of positions in `nodes` with their capacities.
    Of a pair of weight w with different labels, keeping both or one costs w and taking both 0: w - w (x_p + x_q) / 2
    + w |x_p - x_q| / 2. With equal labels it is w |x_p - x_q|, and w (1 - x_p) beside a node that has `alpha`.
    """
    is_free = state != alpha
    nodes = np.flatnonzero(is_free)
    p, q = pairs
    both, same = is_free[p] & is_free[q], state[p] == state[q]
    relief = np.where(both, np.where(same, 0, weights // 2), weights)
    gain = np.bincount(p, relief, len(state)) + np.bincount(q, relief, len(state))
    cost = unary[alpha, nodes] - unary[state[nodes], nodes] - gain[nodes].astype(np.int64)
    if not (cost < 0).any():
        return None
    index = np.cumsum(is_free) - 1
    arcs = both & (weights > 0)
    return nodes, (cost, index[p[arcs]], index[q[arcs]], np.where(same, weights, weights // 2)[arcs])


def arcs_of(cost: NDArray, p: NDArray, q: NDArray, capacity: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Tails, heads and capacities of the network of a cut; node f is the source, f + 1 the sink.

    The source feeds what gains by x = 1, so the nodes reachable from it in the residual are the fewest with x = 1.
    """
    gains, losses = np.flatnonzero(cost < 0), np.flatnonzero(cost > 0)
    source, sink = len(cost), len(cost) + 1
    tails = np.concatenate([p, q, np.full(len(gains), source), losses])
    heads = np.concatenate([q, p, gains, np.full(len(losses), sink)])
    return tails, heads, np.concatenate([capacity, capacity, -cost[gains], cost[losses]])


def cut_scipy(cost: NDArray, p: NDArray, q: NDArray, capacity: NDArray) -> NDArray:
    """x (f,) bool that minimises sum_i cost_i x_i + sum capacity |x_p - x_q|; among equals, that with fewest True.

    cost: (f,) integers. p, q, capacity: (a,) integers. All at most 2**31 - 1, and so are the sums of the two
    capacities between two nodes.
    """
    tails, heads, values = arcs_of(cost, p, q, capacity)
    source, sink = len(cost), len(cost) + 1
    network = csr_matrix((values.astype(np.int32), (tails, heads)), shape=(sink + 1, sink + 1))
    residual = network - maximum_flow(network, source, sink).flow
    residual.eliminate_zeros()
    taken = np.zeros(sink + 1, bool)
    taken[breadth_first_order(residual, source, return_predecessors=False)] = True
    return taken[:source]


def cut_ortools(cost: NDArray, p: NDArray, q: NDArray, capacity: NDArray) -> NDArray:
    """`cut_scipy` by OR-tools (Apache-2.0)."""
    from ortools.graph.python import max_flow

    tails, heads, values = arcs_of(cost, p, q, capacity)
    source, sink = len(cost), len(cost) + 1
    solver = max_flow.SimpleMaxFlow()
    solver.add_arcs_with_capacity(tails, heads, values)
    solver.add_arc_with_capacity(source, sink, 0)  # the library leaves out nodes without arcs
    status = solver.solve(source, sink)
    if status != solver.OPTIMAL:
        raise RuntimeError(f"OR-tools found no maximum flow: {status}")
    taken = np.zeros(sink + 1, bool)
    taken[solver.get_source_side_min_cut()] = True
    return taken[:source]


def cut_pymaxflow(cost: NDArray, p: NDArray, q: NDArray, capacity: NDArray) -> NDArray:
    """`cut_scipy` by PyMaxflow (GPL). What neither side reaches counts as its source's: here the sink is x = 1."""
    import maxflow

    solver = maxflow.Graph[int](len(cost), len(p))
    nodes = solver.add_nodes(len(cost))
    solver.add_edges(p, q, capacity, capacity)
    solver.add_grid_tedges(nodes, cost.clip(min=0), -cost.clip(max=0))
    solver.maxflow()
    return solver.get_grid_segments(nodes)


# name -> module that must be there, package that has it, function
BACK_ENDS = {
    "scipy": ("scipy", "scipy", cut_scipy),
    "ortools": ("ortools.graph.python.max_flow", "ortools", cut_ortools),
    "pymaxflow": ("maxflow", "PyMaxflow", cut_pymaxflow),
}


# Problems and their solutions

UNLABELLED, PADDING = 255, 254  # as `repro.data.masks.IGNORE`, whose module needs torch
DIRECTIONS = {4: ((0, 1), (1, 0)), 8: ((0, 1), (1, 0), (1, 1), (-1, 1))}  # rows down, columns right: each pair once
AHEAD = 32  # problems handed to the workers before the oldest must be done: bounds the memory


@dataclass(frozen=True)
class SolverSettings:
    potts_weight: float = hyper(100.0, "lambda", "released script (potts-weight)", low=0)
    gamma: float = hyper(0.1, "gamma", "released README: 0.05 (length 1), 0.075 (0.8), 0.1 (below)", low=0)
    sweeps: int = hyper(5, "", "released code", low=0)
    restricted: bool = hyper(True, "", "released code (tr-restricted): only labels of the image's scribbles")
    downscale: int = hyper(1, "", "side of blocks that share a label, pixels; released: 1; blocks are ours", low=1)
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
    add up, so the energy of such a labelling is exact (chosen here; the released option shrinks the image). A block
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
def start_workers(count: int) -> Iterator[Executor | None]:
    """Processes for `solve_all`, each with one thread, until the end of the `with` block. None for a count of 0.

    They are spawned, not forked, so a script that uses them needs `if __name__ == "__main__":`. Workers ignore Ctrl-C,
    which reaches all processes of a terminal: the caller decides what it means, and workers finish their problems.
    """
    if not count:
        yield None
        return
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
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


def solve_all(problems: Iterable[Problem], settings: SolverSettings, pool: Executor | None = None) -> list[Solution]:
    """`solve` for each problem, in their order, which is also that of the result whatever the workers do.

    problems: read as the workers need them, so a generator may run the network in between. pool: from `start_workers`,
    or None to solve in this process. Raises RuntimeError that names the image, from the error of its solution.
    """
    solutions: list[Solution] = []
    with contextlib.closing(submitted(problems, settings, pool)) as results:
        for name, result in results:
            try:
                solutions.append(result())
            except Exception as error:
                raise RuntimeError(f"stage A failed on image {name!r}: {type(error).__name__}: {error}") from error
    return solutions


def submitted(
    problems: Iterable[Problem], settings: SolverSettings, pool: Executor | None
) -> Iterator[tuple[str, Callable[[], Solution]]]:
    """Names and functions that wait for the solutions, in order; solutions not asked for by the end are cancelled."""
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
