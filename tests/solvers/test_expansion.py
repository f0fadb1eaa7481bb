"""Alpha-expansion and its cuts against exhaustive search over all labellings and all moves."""

import importlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.solvers import cuts as expansion
from repro.solvers.cuts import (
    BACK_ENDS,
    Graph,
    alpha_expansion,
    contract,
    expansion_move,
    find_back_end,
    flow_bound,
    merge,
    quantise,
)  # fmt: skip


def installed(name):
    try:
        find_back_end(name)
    except ImportError:
        return False
    return True


INSTALLED = [name for name in BACK_ENDS if installed(name)]
GRIDS = [(2, 3), (1, 6), (6, 1), (2, 2)]


def grid_of(height, width, classes, rng, values, fixed=0.0, eight=True):
    """A small grid whose unaries and weights are drawn from `values`."""
    steps = [(0, 1), (1, 0), (1, 1), (-1, 1)] if eight else [(0, 1), (1, 0)]
    pairs = []
    for row, column in itertools.product(range(height), range(width)):
        for down, right in steps:
            if 0 <= row + down < height and column + right < width:
                pairs.append((row * width + column, (row + down) * width + column + right))
    pairs = np.array(pairs, int).reshape(-1, 2).T
    n = height * width
    held = np.where(rng.random(n) < fixed, rng.integers(0, classes, n), -1)
    return Graph(values((classes, n)), pairs, values(pairs.shape[1]), held)


def quarters(rng):
    """Multiples of 1/4 in [0, 2): quantised without error, and full of ties."""
    return lambda size: rng.integers(0, 8, size) / 4


def energy_of(graph, labels):
    """E by its definition."""
    total = sum(graph.unary[label, node] for node, label in enumerate(labels))
    return total + sum(
        weight for p, q, weight in zip(*graph.pairs, graph.weights, strict=True) if labels[p] != labels[q]
    )


def best_move(graph, labels, alpha):
    """The best expansion among all 2^n; of equal ones the nodes that change in each of them."""
    free = [node for node, label in enumerate(labels) if graph.fixed[node] < 0 and label != alpha]
    best, changes = None, None
    for chosen in itertools.product((False, True), repeat=len(free)):
        moved = list(labels)
        for node, taken in zip(free, chosen, strict=True):
            moved[node] = alpha if taken else moved[node]
        energy = energy_of(graph, moved)
        if best is None or energy < best:
            best, changes = energy, set(free)
        if energy == best:
            changes &= {node for node, taken in zip(free, chosen, strict=True) if taken}
    return best, [alpha if node in changes else label for node, label in enumerate(labels)]


def reference(graph, start, allowed, sweeps):
    """Alpha-expansion by `best_move`: plain passes, nothing left out."""
    labels = [held if held >= 0 else int(label) for held, label in zip(graph.fixed, start, strict=True)]
    trace = [energy_of(graph, labels)]
    for _ in range(sweeps):
        before = list(labels)
        for alpha in allowed:
            best, moved = best_move(graph, labels, alpha)
            assert energy_of(graph, moved) == best  # the intersection of the minimisers is one of them
            if best < trace[-1]:
                labels = moved
                trace.append(best)
        if labels == before:
            break
    return labels, trace


@pytest.mark.parametrize("back_end", INSTALLED)
@pytest.mark.parametrize("high", [2, 4, 1000])
def test_a_cut_is_the_smallest_of_the_best_of_all(back_end, high):
    rng = np.random.default_rng(high)
    cut = find_back_end(back_end)
    for _ in range(60):
        n = rng.integers(1, 9)
        p, q = np.array(list(itertools.combinations(range(n), 2)), int).reshape(-1, 2).T
        kept = rng.random(len(p)) < 0.5
        p, q = p[kept], q[kept]
        cost, capacity = rng.integers(-high, high + 1, n), rng.integers(1, high + 1, len(p))
        assignments = np.array(list(itertools.product((False, True), repeat=n)))
        energies = assignments @ cost + (assignments[:, p] != assignments[:, q]) @ capacity
        expected = assignments[energies == energies.min()].all(0)
        assert cut(cost, p, q, capacity).tolist() == expected.tolist()


@pytest.mark.parametrize("back_end", INSTALLED)
def test_a_cut_at_the_limits_of_int32(back_end):
    # the largest costs and capacities that `quantise` can make; a chain of 50 carries the flow past the middle
    cut, n = find_back_end(back_end), 50
    cost = np.zeros(n, np.int64)
    cost[0], cost[-1] = -(2**30 + 2**29), 2**30
    p, q = np.arange(n - 1), np.arange(1, n)
    capacity = np.full(n - 1, 2**29)
    capacity[20] -= 2
    assert cut(cost, p, q, capacity).tolist() == [True] * 21 + [False] * 29
    capacity[30] -= 2  # as cheap, but it would change more nodes
    assert cut(cost, p, q, capacity).sum() == 21


@pytest.mark.parametrize("back_end", INSTALLED)
@pytest.mark.parametrize("size", GRIDS)
@pytest.mark.parametrize("eight", [True, False])
def test_every_move_is_the_best_of_all_moves(back_end, size, eight):
    rng = np.random.default_rng(7)
    for trial in range(12):
        graph = grid_of(*size, 3, rng, quarters(rng), fixed=(0, 0.3)[trial % 2], eight=eight)
        start, sweeps = rng.integers(0, 3, size[0] * size[1]), 1 + trial % 4
        labels, trace = reference(graph, start, range(3), sweeps)
        found = alpha_expansion(graph, start, sweeps=sweeps, back_end=back_end)
        assert found.labels.tolist() == labels
        assert list(found.energies) == trace
        assert found.sweeps <= sweeps


@pytest.mark.parametrize("seeded", [0.0, 0.3])
@pytest.mark.parametrize("start", ["zeros", "ones", "random"])
def test_two_labels_are_solved_exactly(start, seeded):
    rng = np.random.default_rng(3)
    for _ in range(20):
        graph = grid_of(2, 4, 2, rng, quarters(rng), fixed=seeded)
        first = {"zeros": np.zeros(8, int), "ones": np.ones(8, int), "random": rng.integers(0, 2, 8)}[start]
        every = itertools.product(*[[held] if held >= 0 else [0, 1] for held in graph.fixed])
        found = alpha_expansion(graph, first)
        assert found.energies[-1] == min(energy_of(graph, labels) for labels in every)
        if start != "random" and not seeded:
            assert found.cuts <= 1  # the first cut with all nodes on one side is the end


def test_three_labels_end_where_no_move_helps_and_near_the_global_minimum():
    rng, gaps = np.random.default_rng(4), []
    for _ in range(20):
        graph = grid_of(2, 3, 3, rng, quarters(rng))
        found = alpha_expansion(graph, np.zeros(6, int), sweeps=50)
        for alpha in range(3):
            assert best_move(graph, found.labels.tolist(), alpha)[0] == found.energies[-1]
        least = min(energy_of(graph, labels) for labels in itertools.product(range(3), repeat=6))
        assert least <= found.energies[-1] <= 2 * least  # Boykov, Veksler & Zabih (2001), Theorem 6.1, for Potts
        gaps.append(found.energies[-1] - least)
    assert sum(gap == 0 for gap in gaps) >= 15


SCALES = st.sampled_from([1e-250, 1e-6, 1.0, 3.7e5, 1e200])


@given(st.integers(0, 10**6), SCALES, st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=40, deadline=None)
def test_energies_never_rise_and_rules_are_kept(seed, scale, fixed):
    rng = np.random.default_rng(seed)
    graph = grid_of(5, 6, 4, rng, lambda size: scale * rng.exponential(size=size) ** 2, fixed=fixed)
    allowed = np.flatnonzero(rng.random(4) < 0.7)
    allowed = allowed if len(allowed) else np.array([2])
    start = rng.integers(0, 4, 30)
    found = alpha_expansion(graph, start, allowed)
    begun = np.where(graph.fixed >= 0, graph.fixed, np.where(np.isin(start, allowed), start, allowed[0]))
    assert found.energies[0] == pytest.approx(energy_of(graph, begun))
    assert found.energies[-1] == pytest.approx(energy_of(graph, found.labels))
    assert all(after < before for before, after in itertools.pairwise(found.energies))
    assert (found.labels == graph.fixed)[graph.fixed >= 0].all()
    assert np.isin(found.labels[graph.fixed < 0], allowed).all()


@given(st.integers(0, 10**6), SCALES)
@settings(max_examples=40, deadline=None)
def test_quantisation_is_bounded_and_fits_int32(seed, scale):
    rng = np.random.default_rng(seed)
    graph = grid_of(4, 5, 3, rng, lambda size: scale * rng.exponential(size=size) ** 3, fixed=0.2)
    graph = contract(graph, np.arange(3))
    n, m = graph.unary.shape[1], len(graph.weights)
    state = rng.integers(0, 3, n)
    bound = flow_bound(graph, state)
    around = [graph.weights[(graph.pairs == p).any(0)].sum() for p in range(n)]
    assert bound == pytest.approx(max(energy_of(graph, state), *around))
    unary, weights, s = quantise(graph, bound)
    assert np.frexp(s)[0] == 0.5 and (weights % 2 == 0).all()
    exact = Graph(unary, graph.pairs, weights, graph.fixed)
    assert 2**28 <= bound * s < 2**29
    for _ in range(20):
        labels = rng.integers(0, 3, n)
        if graph.unary[labels, range(n)].max(initial=0) <= 2 * bound:  # nothing clipped
            assert abs(exact.energy(labels) / s - graph.energy(labels)) <= (n / 2 + m) / s * (1 + 1e-9)
    for alpha in range(3):
        move = expansion_move(unary, graph.pairs, weights, state, alpha)
        if move is not None:
            cost, _, _, capacity = move[1]
            assert abs(cost).max() < 2**31 and 2 * capacity.max(initial=0) < 2**31
            assert -cost[cost < 0].sum() <= exact.energy(state) < 2**30  # what leaves the source: the flow


def test_rounding_costs_no_more_than_the_bound():
    # unaries far below the resolution that the strong edges leave
    rng = np.random.default_rng(5)
    for _ in range(10):
        graph = grid_of(2, 3, 2, rng, lambda size: rng.random(size))
        graph = Graph(graph.unary * 1e-8, graph.pairs, graph.weights, graph.fixed)
        start = rng.integers(0, 2, 6)
        inner = contract(graph, np.arange(2))
        s = quantise(inner, flow_bound(inner, start))[2]
        found = alpha_expansion(graph, start).energies[-1]
        least = min(energy_of(graph, labels) for labels in itertools.product((0, 1), repeat=6))
        assert found - least <= 2 * (6 / 2 + len(graph.weights)) / s


def test_a_prohibitive_unary_is_never_paid():
    graph = Graph(np.array([[0, 1e30, 0.0], [1, 0, 1]]), np.array([[0, 1], [1, 2]]), np.full(2, 5.0), np.full(3, -1))
    found = alpha_expansion(graph, np.ones(3, int))
    assert found.labels.tolist() == [1, 1, 1] and found.energies == (2.0,)
    # a start that pays it makes the first rounding too coarse to see anything else
    assert alpha_expansion(graph, np.zeros(3, int)).labels.tolist() == [1, 1, 1]


def test_a_tie_keeps_the_label():
    none = np.zeros((2, 0), int)
    for start in ([0, 1, 2], [2, 2, 0]):
        flat = Graph(np.ones((3, 3)), none, np.zeros(0), np.full(3, -1))
        assert alpha_expansion(flat, np.array(start)).labels.tolist() == start
    # the middle of three costs the same with either neighbour's label: it stays as it was
    chain = Graph(np.zeros((2, 3)), np.array([[0, 1], [1, 2]]), np.ones(2), np.array([0, -1, 1]))
    for middle in (0, 1):
        assert alpha_expansion(chain, np.full(3, middle)).labels.tolist() == [0, middle, 1]


def test_every_back_end_gives_the_same_labels():
    for seed in range(4):
        for values in (quarters, lambda rng: lambda size: rng.exponential(size=size)):
            rng = np.random.default_rng(seed)
            graph = grid_of(12, 13, 5, rng, values(rng), fixed=0.05)
            graph = Graph(8 * graph.unary, graph.pairs, graph.weights, graph.fixed)
            start = rng.integers(0, 5, 156)
            found = [alpha_expansion(graph, start, [0, 1, 3, 4], back_end=name) for name in INSTALLED]
            assert len(found[0].energies) > 2
            for other in found[1:]:
                assert other.labels.tolist() == found[0].labels.tolist()
                assert (other.energies, other.cuts) == (found[0].energies, found[0].cuts)


@pytest.mark.parametrize("bad", [lambda cost: np.ones(len(cost), bool), lambda cost: cost > 0])
def test_a_cut_that_raises_the_energy_is_refused(monkeypatch, bad):
    monkeypatch.setitem(BACK_ENDS, "scipy", ("scipy", "scipy", lambda cost, *_: bad(cost)))
    rng = np.random.default_rng(6)
    for _ in range(20):
        graph = grid_of(4, 4, 3, rng, quarters(rng))
        found = alpha_expansion(graph, rng.integers(0, 3, 16))
        assert all(after < before for before, after in itertools.pairwise(found.energies))
        assert found.energies[-1] == energy_of(graph, found.labels)


def test_small_problems():
    rng, none = np.random.default_rng(8), np.zeros((2, 0), int)
    one = Graph(np.array([[3.0], [1], [2]]), none, np.zeros(0), np.array([-1]))
    assert alpha_expansion(one, np.array([0])).labels.tolist() == [1]
    assert alpha_expansion(one, np.array([0]), [0, 2]).labels.tolist() == [2]
    assert alpha_expansion(one, np.array([0]), sweeps=0).energies == (3.0,)
    empty = Graph(np.zeros((3, 0)), none, np.zeros(0), np.zeros(0, int))
    found = alpha_expansion(empty, np.zeros(0, int))
    assert found.labels.shape == (0,) and found.energies == (0.0,) and found.cuts == 0
    lone = grid_of(2, 3, 1, rng, quarters(rng))
    assert alpha_expansion(lone, np.zeros(6, int)).labels.tolist() == [0] * 6
    held = grid_of(2, 3, 3, rng, quarters(rng), fixed=1.1)
    assert alpha_expansion(held, np.zeros(6, int)).labels.tolist() == held.fixed.tolist()
    # a node held at a label that free nodes must not take still pulls on them
    pulled = Graph(np.zeros((3, 2)), np.array([[0], [1]]), np.ones(1), np.array([2, -1]))
    assert alpha_expansion(pulled, np.zeros(2, int), [0, 1]).labels.tolist() == [2, 0]


def test_merged_groups_have_the_exact_energy():
    rng = np.random.default_rng(9)
    graph = grid_of(3, 4, 3, rng, quarters(rng))
    group = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3])
    coarse = merge(graph, group, 4)
    assert coarse.pairs.shape[1] == 6 and (coarse.pairs[0] < coarse.pairs[1]).all()
    for labels in itertools.product(range(3), repeat=4):
        assert coarse.energy(np.array(labels)) == pytest.approx(energy_of(graph, np.array(labels)[group]))
    graph.fixed[[0, 1, 4, 10]] = [2, 1, 2, 0]
    assert merge(graph, group, 4).fixed.tolist() == [2, -1, -1, 0]
    graph.fixed[5] = 1
    assert merge(graph, group, 4).fixed[0] == 1  # two against two: the lower


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(unary=np.array([[0, np.inf], [0, 0]])), "NaN or infinity"),
        (dict(weights=np.array([np.nan])), "NaN or infinity"),
        (dict(weights=np.array([-1.0])), "smallest weight is -1.0"),
        (dict(fixed=np.array([-1, 2])), "must be in \\[-1, 2\\)"),
        (dict(fixed=np.array([-1])), "must be \\(K, n\\)"),
    ],
)
def test_bad_graphs(change, message):
    good = dict(unary=np.zeros((2, 2)), pairs=np.array([[0], [1]]), weights=np.ones(1), fixed=np.full(2, -1))
    with pytest.raises(ValueError, match=message):
        alpha_expansion(Graph(**good | change), np.zeros(2, int))


@pytest.mark.parametrize("allowed", [[], [2], [-1, 0]])
def test_bad_arguments(allowed):
    graph = Graph(np.zeros((2, 1)), np.zeros((2, 0), int), np.zeros(0), np.array([-1]))
    with pytest.raises(ValueError, match="allowed labels are"):
        alpha_expansion(graph, np.zeros(1, int), allowed)
    with pytest.raises(ValueError, match="sweeps is -1"):
        alpha_expansion(graph, np.zeros(1, int), sweeps=-1)
    with pytest.raises(ValueError, match="unknown max-flow back end 'gco'; known: scipy, ortools, pymaxflow"):
        alpha_expansion(graph, np.zeros(1, int), back_end="gco")


def test_a_missing_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(expansion, "importlib", type("Fake", (), {"import_module": staticmethod(missing)}))
    with pytest.raises(ImportError, match="'pymaxflow' needs PyMaxflow: pip install PyMaxflow"):
        find_back_end("pymaxflow")
    assert importlib.import_module("repro.solvers.cuts") is expansion
