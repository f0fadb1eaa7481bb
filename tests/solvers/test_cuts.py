"""Stage A of whole images and sets: its energy by loops, exhaustive search, the rules, and the worker processes."""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch

from repro.settings import SettingError
from repro.solvers import cuts as solving
from repro.solvers.cuts import (  # fmt: skip
    DIRECTIONS,
    Problem,
    SolverSettings,
    allowed_labels,
    ends,
    grid_pairs,
    solve,
    solve_all,
    start_workers,
)
from repro.solvers.potts import contrast_grid, problems, proposal_energy


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


def test_padding_is_no_seed():
    problem = problem_of(5, seeds=2)
    problem.scribbles[0] = 254
    assert solve(problem, SolverSettings(gamma=3.0)).labels.max() < 3


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scribbles=np.full((3, 4), 3, np.uint8)), "scribbles hold 3, which is neither a class nor 254 or 255"),
        (dict(scribbles=np.full((4, 3), 255, np.uint8)), "scribbles are \\(4, 3\\)"),
        (dict(roi=np.ones((3, 3), bool)), "roi are \\(3, 3\\)"),
        (dict(start=np.zeros((1, 3, 4), np.uint8)), "start are"),
        (dict(log_probs=np.full((3, 3, 4), -np.inf)), "NaN or infinity"),
        (dict(weights=(np.ones((3, 3)), np.ones((3, 4)))), "21 weights, but \\(3, 4\\) pixels have 17 pairs"),
    ],
)
def test_bad_problems(change, message):
    with pytest.raises(ValueError, match=message):
        solve(dataclasses.replace(problem_of(), **change), SolverSettings())


def test_bad_settings():
    with pytest.raises(SettingError, match="back_end is 'gco'"):
        SolverSettings(back_end="gco")
    with pytest.raises(SettingError, match="downscale is 0"):
        SolverSettings(downscale=0)


@pytest.mark.parametrize("neighbours", [4, 8])
def test_grid_pairs(neighbours):
    reach = {4: 1.1, 8: 1.5}[neighbours]
    for height, width in [(3, 4), (1, 5), (4, 1), (1, 1)]:
        pixels = list(itertools.product(range(height), range(width)))
        expected = {
            (p, q) for p, q in itertools.combinations(range(len(pixels)), 2) if math.dist(pixels[p], pixels[q]) < reach
        }
        pairs = grid_pairs(height, width, neighbours)
        assert {tuple(sorted(pair)) for pair in pairs.T.tolist()} == expected
        assert pairs.shape == (2, len(expected))


@pytest.mark.parametrize("direction", DIRECTIONS[8])
def test_ends_of_arrays_and_tensors(direction):
    maps = np.arange(24).reshape(2, 3, 4)
    first, second = ends(maps, direction)
    assert (second - first == 4 * direction[0] + direction[1]).all() and first.size
    assert torch.equal(ends(torch.from_numpy(maps), direction)[1], torch.from_numpy(second.copy()))


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


def test_a_generator_that_fails_keeps_its_error():
    def made():
        yield problem_of(0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        solve_all(made(), SolverSettings())


def test_workers_need_no_torch():
    code = "import sys, repro.solvers.cuts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_problem_without_region_or_start_takes_everything_and_background():
    made = problem_of(6)
    bare = Problem(made.name, made.log_probs, made.weights, made.scribbles)
    assert solve(bare, SolverSettings()).labels.tolist() == solve(made, SolverSettings()).labels.tolist()
