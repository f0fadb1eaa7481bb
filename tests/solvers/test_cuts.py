"""Alpha-expansion against exhaustive search; stage A of whole images and sets, and the worker processes."""

import dataclasses
import importlib
import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.solvers import cuts as expansion
from repro.solvers import cuts as solving
from repro.solvers.cuts import (  # fmt: skip
    BACK_ENDS,
    DIRECTIONS,
    Graph,
    SolverSettings,
    allowed_labels,
    alpha_expansion,
    contract,
    expansion_move,
    find_back_end,
    flow_bound,
    merge,
    quantise,
    solve,
    solve_all,
    start_workers,
)  # fmt: skip
from repro.solvers.potts import contrast_grid, problems, proposal_energy


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


def graph_energy(graph, labels):
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
        energy = graph_energy(graph, moved)
        if best is None or energy < best:
            best, changes = energy, set(free)
        if energy == best:
            changes &= {node for node, taken in zip(free, chosen, strict=True) if taken}
    return best, [alpha if node in changes else label for node, label in enumerate(labels)]


def reference(graph, start, allowed, sweeps):
    """Alpha-expansion by `best_move`: plain passes, nothing left out."""
    labels = [held if held >= 0 else int(label) for held, label in zip(graph.fixed, start, strict=True)]
    trace = [graph_energy(graph, labels)]
    for _ in range(sweeps):
        before = list(labels)
        for alpha in allowed:
            best, moved = best_move(graph, labels, alpha)
            assert graph_energy(graph, moved) == best  # the intersection of the minimisers is one of them
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
        assert found.energies[-1] == min(graph_energy(graph, labels) for labels in every)
        if start != "random" and not seeded:
            assert found.cuts <= 1  # the first cut with all nodes on one side is the end


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
    assert found.energies[0] == pytest.approx(graph_energy(graph, begun))
    assert found.energies[-1] == pytest.approx(graph_energy(graph, found.labels))
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
    assert bound == pytest.approx(max(graph_energy(graph, state), *around))
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
        least = min(graph_energy(graph, labels) for labels in itertools.product((0, 1), repeat=6))
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
        assert found.energies[-1] == graph_energy(graph, found.labels)


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
        assert coarse.energy(np.array(labels)) == pytest.approx(graph_energy(graph, np.array(labels)[group]))
    graph.fixed[[0, 1, 4, 10]] = [2, 1, 2, 0]
    assert merge(graph, group, 4).fixed.tolist() == [2, -1, -1, 0]
    graph.fixed[5] = 1
    assert merge(graph, group, 4).fixed[0] == 1  # two against two: the lower


def test_a_missing_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(expansion, "importlib", type("Fake", (), {"import_module": staticmethod(missing)}))
    with pytest.raises(ImportError, match="'pymaxflow' needs PyMaxflow: pip install PyMaxflow"):
        find_back_end("pymaxflow")
    assert importlib.import_module("repro.solvers.cuts") is expansion


# Stage A


def problem_of(seed=0, classes=3, height=3, width=4, seeds=3, roi=None, neighbours=8, start=None):
    """Random log-probabilities and image with a few scribbled pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, classes, height, width, generator=generator)
    image = torch.rand(1, 3, height, width, generator=generator)
    scribbles = torch.full((1, height * width), 255, dtype=torch.uint8)
    place = torch.randperm(height * width, generator=generator)[:seeds]
    scribbles[0, place] = (torch.arange(len(place)) % classes).to(torch.uint8)
    grid = contrast_grid(image, None if roi is None else torch.from_numpy(roi)[None], neighbours)
    starts = None if start is None else torch.from_numpy(start)[None]
    scribbles = scribbles.view(1, height, width)
    return problems(logits.log_softmax(1), grid, scribbles, starts, [f"image {seed}"])[0]


def energy_of(problem, labels, settings):
    """E(X) of the specification by loops."""
    inside = [tuple(pixel) for pixel in np.argwhere(problem.roi)]
    directions = DIRECTIONS[2 * len(problem.weights)]
    pairs = [
        (p, (p[0] + down, p[1] + right), weight[min(p[0], p[0] + down), p[1]])
        for weight, (down, right) in zip(problem.weights, directions, strict=True)
        for p in inside
        if (p[0] + down, p[1] + right) in inside
    ]
    unary = sum(-problem.log_probs[labels[p], *p] for p in inside)
    cut = sum(weight for p, q, weight in pairs if labels[p] != labels[q])
    return settings.gamma * unary / len(inside) + settings.potts_weight * cut / max(1, len(pairs))


def least(problem, settings, allowed, height=3, width=4):
    """The smallest E among all labellings that keep the seeds."""
    choices = [[label] if label < 254 else list(allowed) for label in problem.scribbles.ravel().tolist()]
    every = (np.array(labels).reshape(height, width) for labels in itertools.product(*choices))
    return min(energy_of(problem, labels, settings) for labels in every)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_the_energy_is_that_of_the_paper_and_the_solution_is_the_best(neighbours):
    settings = SolverSettings(gamma=0.7, potts_weight=2.0)
    for seed in range(4):
        problem = problem_of(seed, classes=2, seeds=3, neighbours=neighbours)
        found = solve(problem, settings)
        assert found.energy == pytest.approx(energy_of(problem, found.labels, settings), rel=1e-6)
        assert found.energy == pytest.approx(least(problem, settings, (0, 1)), rel=1e-6)
        background = np.where(problem.scribbles < 2, problem.scribbles, 0)
        assert found.start_energy == pytest.approx(energy_of(problem, background, settings), rel=1e-6)
        assert found.labels.dtype == np.uint8


def test_torch_gives_the_same_energy():
    roi = np.random.default_rng(0).random((9, 8)) < 0.8
    problem = problem_of(1, height=9, width=8, seeds=6, roi=roi)
    found = solve(problem, SolverSettings())
    generator = torch.Generator().manual_seed(1)
    torch.randn(1, 3, 9, 8, generator=generator)
    grid = contrast_grid(torch.rand(1, 3, 9, 8, generator=generator), torch.from_numpy(roi)[None])
    labels, log_probs = torch.from_numpy(found.labels)[None], torch.from_numpy(problem.log_probs)[None]
    assert proposal_energy(labels, log_probs, grid).item() == pytest.approx(found.energy, rel=1e-5)
    assert (found.labels[~roi] == 255).all() and (found.labels[roi] < 3).all()


def test_seeds_and_restriction():
    settings = SolverSettings(gamma=5.0, potts_weight=0.5)
    for seed in range(6):
        problem = problem_of(seed, classes=5, height=6, width=7, seeds=2)  # labels 0 and 1
        free = solve(problem, dataclasses.replace(settings, restricted=False))
        bound = solve(problem, settings)
        assert set(np.unique(bound.labels)) == {0, 1} and len(np.unique(free.labels)) > 2
        drawn = problem.scribbles < 5
        for found in (free, bound):
            assert (found.labels[drawn] == problem.scribbles[drawn]).all()
        assert free.energy < bound.energy
    assert len(np.unique(solve(problem_of(0, classes=5, height=6, width=7, seeds=1), settings).labels)) > 2
    assert len(np.unique(solve(problem_of(0, classes=5, height=6, width=7, seeds=0), settings).labels)) > 2


def test_allowed_labels():
    assert allowed_labels(np.array([4, 1, 4]), 6).tolist() == [1, 4]
    assert allowed_labels(np.array([4, 4]), 6).tolist() == list(range(6))
    assert allowed_labels(np.zeros(0, int), 3).tolist() == [0, 1, 2]
    assert allowed_labels(np.array([4, 1]), 6, restricted=False).tolist() == list(range(6))


def test_the_unary_alone_is_the_networks_argmax():
    problem = problem_of(3, classes=5, height=6, width=7, seeds=0)
    found = solve(problem, SolverSettings(potts_weight=0.0))
    assert found.labels.tolist() == problem.log_probs.argmax(0).tolist()
    smooth = solve(problem, SolverSettings(potts_weight=1e6))
    assert (smooth.labels == problem.log_probs.sum((1, 2)).argmax()).all()


def test_the_start():
    settings, size = SolverSettings(sweeps=0), (3, 4)
    start = np.arange(12).reshape(size).astype(np.uint8) % 3
    start[2, 3] = 255
    problem = problem_of(4, classes=3, seeds=2, start=start)
    seeds = problem.scribbles < 3
    expected = np.where(seeds, problem.scribbles, np.where(start < 2, start, 0))  # 2 and 255 are not allowed
    found = solve(problem, settings)
    assert found.labels.tolist() == expected.tolist() and found.energy == found.start_energy
    again = solve(dataclasses.replace(problem, start=solve(problem, SolverSettings()).labels), SolverSettings())
    assert again.energy == again.start_energy  # a solution is where expansion stays


def test_no_pixel_one_pixel_one_class():
    nothing = solve(problem_of(0, roi=np.zeros((3, 4), bool)), SolverSettings())
    assert (nothing.labels == 255).all() and (nothing.energy, nothing.cuts) == (0, 0)
    one = problem_of(1, height=1, width=1, seeds=0)
    found = solve(one, SolverSettings())
    assert found.labels.item() == one.log_probs.argmax()
    assert found.energy == pytest.approx(-0.1 * one.log_probs.max(), rel=1e-6)
    lone = solve(problem_of(2, classes=1), SolverSettings())
    assert (lone.labels == 0).all() and lone.energy == pytest.approx(0, abs=1e-6)
    line = solve(problem_of(2, height=1, width=9), SolverSettings())
    assert line.labels.shape == (1, 9)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_blocks_share_a_label_and_their_energy_is_exact(size):
    settings = SolverSettings(gamma=0.7, potts_weight=2.0, downscale=2)
    height, width = size
    rows, columns = -(-height // 2), -(-width // 2)
    for seed in range(4):
        problem = problem_of(seed, 2, height, width, seeds=0)
        found = solve(problem, settings)
        small = found.labels[::2, ::2]
        assert found.labels.tolist() == small.repeat(2, 0).repeat(2, 1)[:height, :width].tolist()
        every = itertools.product((0, 1), repeat=rows * columns)
        blocky = (
            np.array(labels).reshape(rows, columns).repeat(2, 0).repeat(2, 1)[:height, :width] for labels in every
        )
        assert found.energy == pytest.approx(min(energy_of(problem, labels, settings) for labels in blocky), rel=1e-6)


def test_blocks_keep_seeds_and_never_end_above_the_start():
    roi = np.random.default_rng(3).random((9, 10)) < 0.8
    for seed, downscale in itertools.product(range(6), (2, 3, 50)):
        problem = problem_of(seed, 3, 9, 10, seeds=12, roi=roi)
        drawn = (problem.scribbles < 3) & roi
        coarse = solve(problem, SolverSettings(downscale=downscale))
        assert (coarse.labels[drawn] == problem.scribbles[drawn]).all()
        assert coarse.energy == pytest.approx(energy_of(problem, coarse.labels, SolverSettings()), rel=1e-6)
        fine = solve(problem, SolverSettings())
        after = solve(dataclasses.replace(problem, start=fine.labels), SolverSettings(downscale=downscale))
        assert after.energy <= after.start_energy == fine.energy
        assert coarse.energy <= coarse.start_energy


@pytest.fixture(scope="module")
def workers():
    with start_workers(2) as pool:
        yield pool


def test_workers_give_the_same_in_the_same_order(workers):
    # the first ones take longest, so that the others overtake them
    made = [problem_of(seed, 3, *((40, 40) if seed < 2 else (6, 6)), seeds=6) for seed in range(12)]
    settings = SolverSettings(gamma=1.0, potts_weight=3.0)
    together, alone = solve_all(iter(made), settings, workers), solve_all(made, settings)
    for one, other in zip(together, alone, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert one.energy == other.energy
    assert solve_all([], settings, workers) == []


def test_workers_have_one_thread_and_the_rest_of_the_environment_stays(workers):
    limits = list(workers.map(os.getenv, ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"] * 2))
    assert limits == ["1"] * 6
    assert workers.submit(os.getpid).result() != os.getpid()


def test_ctrl_c_does_not_reach_the_workers():
    """As in a terminal, where the signal goes to every process of the job."""
    mine = signal.getsignal(signal.SIGINT)
    with start_workers(1) as pool:
        worker = pool.submit(os.getpid).result()
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        os.kill(worker, signal.SIGINT)
        made = [problem_of(seed) for seed in range(3)]
        found = solve_all(made, SolverSettings(), pool)
        assert pool.submit(os.getpid).result() == worker
    assert [one.energy for one in found] == [solve(problem, SolverSettings()).energy for problem in made]
    assert signal.getsignal(signal.SIGINT) is mine


def test_start_workers_leaves_this_process_as_it_was(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with start_workers(1) as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_an_error_names_the_image(workers):
    made = [problem_of(seed) for seed in range(4)]
    made[2] = dataclasses.replace(made[2], scribbles=np.full((3, 4), 9, np.uint8), name="2007_000032")
    for pool in (None, workers):
        with pytest.raises(RuntimeError, match="stage A failed on image '2007_000032': ValueError: scribbles hold 9"):
            solve_all(made, SolverSettings(), pool)
    assert len(solve_all(made[:2], SolverSettings(), workers)) == 2  # the workers are still there


def test_a_worker_that_dies_is_an_error():
    with start_workers(1) as pool:
        pool.submit(os._exit, 1)
        with pytest.raises(RuntimeError, match="stage A failed on image 'image 0'|terminated abruptly"):
            solve_all([problem_of(seed) for seed in range(3)], SolverSettings(), pool)


class Idle(Executor):
    """Workers that never begin."""

    def __init__(self):
        self.futures = []

    def submit(self, function, *arguments):
        self.futures.append(Future())
        return self.futures[-1]


def test_only_some_problems_wait_at_a_time_and_an_error_cancels_them(monkeypatch):
    monkeypatch.setattr(solving, "AHEAD", 5)
    read, pool = [], Idle()

    def made():
        for seed in range(20):
            read.append(seed)
            if seed == 4:
                pool.futures[0].set_exception(MemoryError("no memory"))
            yield problem_of(seed)

    with pytest.raises(RuntimeError, match="'image 0': MemoryError: no memory"):
        solve_all(made(), SolverSettings(), pool)
    assert read == [0, 1, 2, 3, 4]
    assert [future.cancelled() for future in pool.futures] == [False, True, True, True, True]


def test_workers_need_no_torch():
    code = "import sys, repro.solvers.cuts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GRAPH = dict(unary=np.zeros((2, 2)), pairs=np.array([[0], [1]]), weights=np.ones(1), fixed=np.full(2, -1))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (dict(unary=np.array([[0, np.inf], [0, 0]])), {}, "NaN or infinity"),
        (dict(weights=np.array([np.nan])), {}, "NaN or infinity"),
        (dict(weights=np.array([-1.0])), {}, "smallest weight is -1.0"),
        (dict(fixed=np.array([-1, 2])), {}, r"must be in \[-1, 2\)"),
        (dict(fixed=np.array([-1])), {}, r"must be \(K, n\)"),
        ({}, dict(allowed=[]), "allowed labels are"),
        ({}, dict(allowed=[2]), "allowed labels are"),
        ({}, dict(allowed=[-1, 0]), "allowed labels are"),
        ({}, dict(sweeps=-1), "sweeps is -1"),
        ({}, dict(back_end="gco"), "unknown max-flow back end 'gco'; known: scipy, ortools, pymaxflow"),
    ],
)
def test_refused_graphs(change, options, message):
    with pytest.raises(ValueError, match=message):
        alpha_expansion(Graph(**GRAPH | change), np.zeros(2, int), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scribbles=np.full((3, 4), 3, np.uint8)), "scribbles hold 3, which is neither a class nor 254 or 255"),
        (dict(scribbles=np.full((4, 3), 255, np.uint8)), r"scribbles are \(4, 3\)"),
        (dict(roi=np.ones((3, 3), bool)), r"roi are \(3, 3\)"),
        (dict(start=np.zeros((1, 3, 4), np.uint8)), "start are"),
        (dict(log_probs=np.full((3, 3, 4), -np.inf)), "NaN or infinity"),
        (dict(weights=(np.ones((3, 3)), np.ones((3, 4)))), r"21 weights, but \(3, 4\) pixels have 17 pairs"),
    ],
)
def test_refused_problems(change, message):
    with pytest.raises(ValueError, match=message):
        solve(dataclasses.replace(problem_of(), **change), SolverSettings())
