"""Alpha-expansion for Potts energies on graphs, by exact binary cuts over a choice of max-flow libraries.

    E(X) = sum_p unary[X_p, p] + sum_pq weight_pq [X_p != X_q]

Only numpy and scipy are imported, so that worker processes start fast. Three rules make a labelling depend on the
energy and the start alone, whatever library finds the maximum flow: energies are rounded to integers before
(`quantise`), among equal cuts the one that changes the fewest nodes is taken (it is unique), and labels are tried in
rising order. Sources: Boykov, Veksler & Zabih (2001) for the moves; Kolmogorov & Zabih (2004) for the graph; the
reduction to one undirected arc a pair, the tie rule and the rounding are ours.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

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
    if nodes and not -1 <= graph.fixed.min() <= graph.fixed.max() < classes:
        raise ValueError(
            f"fixed labels span {graph.fixed.min()} to {graph.fixed.max()}; they must be in [-1, {classes})"
        )
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
        raise ImportError(
            f"max-flow back end {name!r} needs {package}: pip install {package}, or use 'scipy'"
        ) from error
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
    solver.add_arc_with_capacity(source, sink, 0)  # it does not know nodes without arcs
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
