"""Scribbles, energies and proposals against loops over pixels, exhaustive search and the solver; the drawn strokes."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from figures.explore import panel, scribbles
from figures.explore.panel import Panel
from figures.explore.scribbles import NOTHING, Drawn, Proposals, Stroke, brushed
from repro.data.scribbles import LENGTHS, reaches_of, scribbles_of
from repro.files import save_state
from repro.runs import folder_of, load_outputs
from repro.solvers.cuts import SolverSettings
from tests.fake_scribble_runs import write_scribble_run
from tests.figures.explore.runs import TRUST, made

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
START = {"length": 1.0, "potts_weight": 100.0, "gamma": 0.1, "neighbours": 8, "restricted": True, "start": "background"}


def of(images, truth, given, reach, log_probs, **changes):
    """An explorer of arrays."""
    names = tuple("abcdef"[: log_probs.shape[1]])
    fields = {"length": 1.0, "solver": SolverSettings(), "neighbours": 8, "width": 1, "size": (9, 5), "title": "a run"}
    explorer = made(Proposals, images=images, truth=truth, scribbles=given, reach=reach, log_probs=log_probs,
                    classes=names, **fields | changes)  # fmt: skip
    explorer.solve = functools.lru_cache(4)(explorer._solve)
    return explorer


def small(height=3, width=3, seed=0, padded=0):
    """An image of random pixels with two seeds of different classes; the lowest rows are padding."""
    dice = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (1, 3, height, width), generator=dice).byte()
    truth = torch.randint(2, (1, height, width), generator=dice).byte()
    given = torch.full_like(truth, 255)
    given[0, 0, 0], given[0, 1, width - 1] = 0, 1
    if padded:
        given[:, -padded:], truth[:, -padded:] = 254, 255
    log_probs = (2 * torch.randn(1, 2, height, width, generator=dice)).log_softmax(1).half()
    return of(images, truth, given, torch.full(truth.shape, math.inf).half(), log_probs)


@pytest.fixture
def saved(root):
    """A run's explorer, whose attributes a test may replace."""
    explorer = made(Proposals, **vars(Proposals(TRUST, root)))
    explorer.solve = functools.lru_cache(4)(explorer._solve)
    return explorer


def parts_by_loops(explorer, image, at, labels, inside):
    """Unary and Potts part of E of labels (H, W), pixel by pixel and pair by pair in float64."""
    pixels = (explorer.images[image].double().numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    places, near = [tuple(place) for place in np.argwhere(inside)], {4: 1.1, 8: 1.5}[at["neighbours"]]
    known, pairs = set(places), []
    for p in places:
        beside = itertools.product((p[0], p[0] + 1), (p[1] - 1, p[1], p[1] + 1))
        pairs += [(p, q) for q in beside if q > p and q in known and math.dist(p, q) < near]
    square = [float(((pixels[:, *p] - pixels[:, *q]) ** 2).sum()) for p, q in pairs]
    variance = sum(square) / len(square)
    weights = [math.exp(-d / (2 * variance)) / math.dist(p, q) for (p, q), d in zip(pairs, square, strict=True)]
    cut = sum(w for (p, q), w in zip(pairs, weights, strict=True) if labels[p] != labels[q])
    surprise = -sum(float(explorer.log_probs[image, int(labels[p]), *p]) for p in places)
    return at["gamma"] * surprise / len(places), at["potts_weight"] * cut / len(pairs)


MOVES = [
    {}, {"neighbours": 4, "start": "argmax"}, {"potts_weight": 3.0, "gamma": 1.5, "restricted": False},
    {"potts_weight": 0.0}, {"gamma": 0.0, "length": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("moves", MOVES, ids=str)
def test_energies_of_argmax_start_and_proposal_by_loops(saved, moves):
    at, classes = START | moves, len(saved.classes)
    seen, given = saved.compute(1, **at), saved.scribbled(1, at["length"]).numpy()
    argmax, is_seed = saved.log_probs[1].float().argmax(0).numpy(), given < classes
    present = np.unique(given[is_seed])
    allowed = present if at["restricted"] else np.arange(classes)
    free = argmax if at["start"] == "argmax" else np.zeros_like(argmax)
    free = np.where(np.isin(free, allowed), free, allowed[0])
    expected = {"clamped": np.where(is_seed, given, argmax), "start": np.where(is_seed, given, free)}
    assert np.array_equal(seen.argmax.numpy(), argmax) and seen.allowed == tuple(allowed)
    for name in ("clamped", "start", "proposal"):
        found = getattr(seen, name)
        labels = found.labels.numpy()
        assert name == "proposal" or np.array_equal(labels, expected[name])
        assert (labels[is_seed] == given[is_seed]).all()
        unary, potts = parts_by_loops(saved, 1, at, labels, np.ones_like(is_seed))
        assert (found.unary, found.potts) == pytest.approx((unary, potts), rel=1e-4, abs=1e-6)
        assert found.energy == found.unary + found.potts
    assert np.isin(seen.proposal.labels, allowed).all() and seen.proposal.energy <= seen.start.energy
    account = (seen.solution.start_energy, seen.solution.energy)
    assert (seen.start.energy, seen.proposal.energy) == pytest.approx(account, rel=1e-5)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("start", list(scribbles.STARTS))
def test_the_proposal_is_the_best_labelling_of_a_small_image(neighbours, start):
    at = START | {"potts_weight": 2.0, "gamma": 1.0, "neighbours": neighbours, "start": start}
    for seed in range(4):
        explorer = small(seed=seed)
        seen, given = explorer.compute(0, **at), explorer.scribbles[0].numpy().ravel()
        choices = [[label] if label < 2 else [0, 1] for label in given]
        every = [np.array(labels).reshape(3, 3) for labels in itertools.product(*choices)]
        energies = [sum(parts_by_loops(explorer, 0, at, labels, np.ones((3, 3)))) for labels in every]
        best = int(np.argmin(energies))
        assert len(every) == 2**7 and seen.proposal.energy == pytest.approx(energies[best], rel=1e-4)
        assert np.array_equal(seen.proposal.labels.numpy(), every[best])


def test_padding_has_no_label_energy_or_edge():
    explorer, noisy = small(5, 4, seed=3, padded=2), small(5, 4, seed=3, padded=2)
    noisy.images[:, :, -2:], noisy.log_probs[:, :, -2:] = 17, -9.0
    at, drawn = START | {"gamma": 1.0, "potts_weight": 2.0}, Drawn(None, ((0, Stroke(1, (4, 0), (4, 3))),))
    seen, other = explorer.compute(0, drawn, **at), noisy.compute(0, drawn, **at)
    inside = np.arange(5)[:, None].repeat(4, 1) < 3
    for name in ("clamped", "start", "proposal"):
        found, same = getattr(seen, name), getattr(other, name)
        assert torch.equal(found.labels, same.labels) and (found.unary, found.potts) == (same.unary, same.potts)
        labels = found.labels.numpy()
        assert (labels[~inside] == 255).all() and (labels[inside] < 2).all()
        parts = parts_by_loops(explorer, 0, at, labels, inside)
        assert (found.unary, found.potts) == pytest.approx(parts, rel=1e-4)
    assert (seen.scribbles[-2:] == 254).all(), "a stroke does not mark padding"
    assert float(seen.grid.pixels) == 12
    right = (seen.proposal.labels == explorer.truth[0]).numpy()[inside].mean()
    assert explorer.numbers(seen).rows[2][6] == f"{100 * right:.1f} %"


def test_a_scribble_at_a_length_is_that_of_the_mask(saved):
    exact = made(Proposals, **vars(saved) | {"reach": torch.from_numpy(reaches_of(saved.truth.numpy()))})
    for image, mask in enumerate(saved.truth.numpy()[:3]):
        for length in {*LENGTHS, *np.arange(0, 101, 20) / 100} - {saved.length}:
            expected = scribbles_of(mask, length)
            assert np.array_equal(exact.scribbled(image, length).numpy(), expected)
            half = saved.scribbled(image, length).numpy()
            assert (half[expected < 255] == expected[expected < 255]).all() and (half != expected).mean() < 0.005
        assert (saved.scribbled(image, NOTHING) == 255).all()
    own = made(Proposals, **vars(saved) | {"scribbles": saved.scribbles.flip(0)})
    assert torch.equal(own.scribbled(0, saved.length), own.scribbles[0])


def test_strokes_are_as_wide_as_scribbles_clipped_and_on_top(saved):
    across = brushed(Stroke(1, (10, 5), (10, 20)), (48, 48), 3)
    expected = torch.zeros(48, 48, dtype=torch.bool)
    expected[9:12, 4:22] = True
    assert torch.equal(across, expected)
    assert brushed(Stroke(1, (0, 0), (0, 0)), (48, 48), 3).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    beyond = brushed(Stroke(1, (47, 30), (88, 30)), (48, 48), 3).nonzero().tolist()
    assert beyond == [[row, column] for row in (46, 47) for column in (29, 30, 31)]

    strokes = (Stroke(2, (0, 0), (31, 31)), Stroke(4, (0, 31), (31, 0)), Stroke(5, (16, 0), (16, 39)))
    before, size = saved.scribbled(0, 0.8), tuple(saved.truth.shape[1:])
    found, by_hand = saved.scribbled(0, 0.8, strokes), before.clone()
    for stroke in strokes:
        by_hand[brushed(stroke, size, saved.width)] = stroke.label
    assert torch.equal(found, by_hand) and (found[16] == 5).all() and found[0, 31] == 4
    assert torch.equal(saved.scribbled(0, 0.8), before), "nothing is written into"
    drawn = Drawn(None, tuple((0, stroke) for stroke in strokes) + ((1, Stroke(1, (0, 0), (3, 3))),))
    seen = saved.compute(0, drawn, **START | {"length": NOTHING})
    assert seen.allowed == (2, 4, 5) and set(seen.proposal.labels.unique().tolist()) <= {2, 4, 5}
    assert seen.start.labels[10, 20] == 2, "the lowest label that is allowed, where background is not"


def test_without_any_scribble_every_label_is_allowed(saved):
    at = START | {"length": NOTHING, "gamma": 0.5, "start": "argmax"}
    seen = saved.compute(2, **at | {"potts_weight": 0.0})
    assert seen.allowed == tuple(range(6))
    assert torch.equal(seen.proposal.labels, seen.argmax), "without Potts the network's labels are the best"
    assert len(saved.compute(2, **at | {"potts_weight": 1e5}).proposal.labels.unique()) == 1, "with little else one is"


def test_the_table_and_the_heading(saved):
    at = {"length": 0.3, "potts_weight": 50.0, "gamma": 0.2, "neighbours": 8, "restricted": True, "start": "argmax"}
    seen = saved.compute(0, Drawn(None, ((0, Stroke(3, (0, 0), (0, 9))),)), **at)
    numbers, known = saved.numbers(seen), (saved.truth[0] != 255).numpy()
    rows = {name: cells for name, *cells in numbers.rows}
    names = ["network's argmax, seeds clamped", "start: argmax, seeds clamped", "proposal"]
    assert list(rows) == names
    for name, found in zip(names, (seen.clamped, seen.start, seen.proposal), strict=True):
        labels = found.labels.numpy()
        assert rows[name][:3] == [f"{value:.4f}" for value in (found.energy, found.unary, found.potts)]
        shares = [(labels != other.numpy()).mean() for other in (seen.argmax, seen.start.labels)]
        shares.append((labels == saved.truth[0].numpy())[known].mean())
        assert rows[name][3:] == [f"{100 * share:.1f} %" for share in shares]
    seeds, pairs = int((seen.scribbles < 6).sum()), 32 * 39 + 31 * 40 + 2 * 31 * 39
    start = f"Image 0 of the pool, 32 x 40 pixels: {seeds} seeds ({100 * seeds / 1280:.1f} %) of "
    assert numbers.heading.startswith(start) and "1 stroke drawn" in numbers.heading
    assert f"as much as {50 * 1280 / pairs / 0.2:.3g} nats" in numbers.heading
    assert "Released at this length: lambda = 100, gamma = 0.1." in numbers.heading
    other = saved.compute(0, **at | {"length": NOTHING, "gamma": 0.0, "restricted": False})
    heading = saved.numbers(other).heading
    for words in ("no given scribble, none drawn", "all 6 classes", "the network has no say"):
        assert words in heading
    assert "Released" not in heading
    saved.truth = torch.full_like(saved.truth, 255)
    assert [row[6] for row in saved.numbers(other).rows] == ["-"] * 3


def test_strokes_are_added_and_cleared_image_by_image(saved):
    found, solved = Panel(saved), []
    solve_now = saved.solve
    saved.solve = lambda image, strokes, **at: solved.append(strokes) or solve_now(image, strokes, **at)
    pencil, before, drawn = found.controls["drawn"], found.numbers.value, found.picture.value
    pencil.label.value = 3
    for place, value in zip(pencil.places, (0, 35, 30, 39), strict=True):
        shown = found.picture.value
        place.value = value
        assert found.picture.value != shown and found.numbers.value == before
    assert pencil.value == Drawn(Stroke(3, (0, 35), (30, 39))) and solve_now.cache_info().misses == 1
    pencil.add.click()
    pencil.label.value = 0
    pencil.add.click()
    assert solved[-1] == (Stroke(3, (0, 35), (30, 39)), Stroke(0, (0, 35), (30, 39)))
    assert "2 strokes drawn" in found.numbers.value
    found.controls["image"].value = 1
    assert solved[-1] == () and "none drawn" in found.numbers.value
    pencil.clear.click()
    found.controls["image"].value = 0
    assert "2 strokes drawn" in found.numbers.value, "those of another image stay"
    pencil.clear.click()
    assert found.numbers.value == before and found.picture.value != drawn, "the cursor is elsewhere"
    words = [pencil.label.description, *(place.description for place in pencil.places)]
    assert words == ["stroke: class", "from row", "from column", "to row", "to column"]


def test_saved_are_the_arrays_and_the_stage_of_the_run(tmp_path):
    own = TRUST.with_(gamma=0.3, neighbours=4, sweeps=2, back_end="ortools", width=2)
    folder = write_scribble_run(own, tmp_path)
    explorer, found = Proposals(own, tmp_path), load_outputs(folder)
    for name in scribbles.NEEDED:
        assert torch.equal(getattr(explorer, name), found[f"pool_{name}"])
    assert explorer.classes[1] == "Trouser" and (explorer.length, explorer.width) == (0.3, 2)
    assert explorer.solver == SolverSettings(100.0, 0.3, sweeps=2, back_end="ortools")
    start = panel.position(explorer.controls())
    for controls, live in ((explorer.controls(), True), (small(129, 128).controls(), False)):
        assert all(controls[name].continuous_update == live for name in ("length", "gamma", "potts_weight"))
    assert start | {"drawn": 0} == {"image": 0, "length": 0.3, "potts_weight": 100.0, "gamma": 0.3, "neighbours": 4,
                                    "restricted": True, "start": "background", "drawn": 0}  # fmt: skip
    assert explorer.compute(**start).proposal.energy > 0, "whatever back end the run had"
    for method, labels, gamma in (("adm", 30, 0.1), ("partial_ce", 80, 0.075), ("grid_gd", 100, 0.05)):
        other = TRUST.with_(method=method, labels=labels)
        write_scribble_run(other, tmp_path)
        explorer = Proposals(other, tmp_path)
        assert explorer.solver == SolverSettings(100.0, gamma) and (explorer.neighbours, explorer.width) == (8, 1)
    assert scribbles.released(0.42) == SolverSettings(100.0, 0.1)
    kept = {name: found[name] for name in found if name not in ("pool_reach", "pool_log_probs")}
    save_state(folder_of(own, tmp_path) / "outputs.safetensors", kept | {"pool_images": found["pool_images"][:0]})
    with pytest.raises(panel.Missing, match="pool_images, pool_reach, pool_log_probs"):
        Proposals(own, tmp_path)
