"""The proposal explorer against loops over pixels, exhaustive search and the solver; its controls and its figure."""

import base64
import dataclasses
import functools
import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from figures.explore import labelling, parts
from figures.explore import proposals as explore
from figures.explore.labelling import NOTHING, Position, Saved, Stroke, view
from figures.explore.proposals import Canvas, Explorer
from figures.explore.weights import RIGHT, UNKNOWN, WRONG
from repro.data.mask_views import MaskViews
from repro.data.scenes import scenes
from repro.data.scribbles import LENGTHS, reaches_of, scribbles_of
from repro.experiment import Experiment
from repro.files import save_state, write_json
from repro.runs import folder_of
from repro.solvers.cuts import SolverSettings, solve
from repro.solvers.potts import contrast_grid, problems
from tests.fake_outputs import texts

SIDE, COUNT, K = 48, 3, 6
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@functools.cache
def run_outputs(length=1.0):
    """What a run on scenes keeps: blurred masks with noise for predictions."""
    train, dice = scenes("train", COUNT, SIDE), torch.Generator().manual_seed(0)
    objects = F.one_hot(train.masks.long(), K).movedim(3, 1).float()
    noise = F.interpolate(torch.randn(COUNT, K, 12, 12, generator=dice), (SIDE, SIDE), mode="bilinear")
    reach = reaches_of(train.masks.numpy())
    scribbles = torch.stack([torch.from_numpy(scribbles_of(mask, length)) for mask in train.masks.numpy()])
    return {
        "pool_index": torch.arange(COUNT), "pool_images": train.images, "pool_truth": train.masks,
        "pool_scribbles": scribbles, "pool_reach": torch.from_numpy(reach).half(),
        "pool_log_probs": (F.avg_pool2d(5 * objects, 5, 1, 2) + 1.8 * noise).log_softmax(1).half(),
    }  # fmt: skip


def saved_run(length=1.0, **solver):
    """A run without a folder."""
    arrays = (run_outputs(length)[name] for name in labelling.NEEDED)
    names = scenes("train", COUNT, SIDE).classes
    return Saved(*arrays, names, length, SolverSettings(**solver), 8, "a run")


def small_run(height=3, width=3, classes=2, seed=0, padded=0):
    """An image of random pixels with two seeds of different classes; the lowest rows are padding."""
    dice = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (1, 3, height, width), generator=dice).byte()
    truth = torch.randint(classes, (1, height, width), generator=dice).byte()
    scribbles = torch.full_like(truth, 255)
    scribbles[0, 0, 0], scribbles[0, 1, width - 1] = 0, classes - 1
    if padded:
        scribbles[:, -padded:], truth[:, -padded:] = 254, 255
    log_probs = (2 * torch.randn(1, classes, height, width, generator=dice)).log_softmax(1).half()
    names, reach = tuple("abcdef"[:classes]), torch.full(truth.shape, math.inf).half()
    return Saved(images, truth, scribbles, reach, log_probs, names, 1.0, SolverSettings(), 8, "small")


def parts_by_loops(saved, at, labels, inside):
    """Unary and Potts part of E of labels (H, W), pixel by pixel and pair by pair in float64."""
    image = (saved.images[at.image].double().numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    pixels = [tuple(place) for place in np.argwhere(inside)]
    near = {4: 1.1, 8: 1.5}[at.neighbours]
    pairs = []
    for p in pixels:
        for q in itertools.product((p[0], p[0] + 1), (p[1] - 1, p[1], p[1] + 1)):
            if (
                q > p
                and q[0] < inside.shape[0]
                and 0 <= q[1] < inside.shape[1]
                and inside[q]
                and math.dist(p, q) < near
            ):
                pairs.append((p, q))
    square = [float(((image[:, *p] - image[:, *q]) ** 2).sum()) for p, q in pairs]
    variance = sum(square) / len(square)
    weights = [math.exp(-d / (2 * variance)) / math.dist(p, q) for (p, q), d in zip(pairs, square, strict=True)]
    cut = sum(w for (p, q), w in zip(pairs, weights, strict=True) if labels[p] != labels[q])
    surprise = -sum(float(saved.log_probs[at.image, int(labels[p]), *p]) for p in pixels)
    return at.gamma * surprise / len(pixels), at.potts_weight * cut / len(pairs)


POSITIONS = [
    {}, {"neighbours": 4, "start": "argmax"}, {"potts_weight": 3.0, "gamma": 1.5, "restricted": False},
    {"potts_weight": 0.0}, {"gamma": 0.0, "length": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("moved", POSITIONS, ids=str)
def test_energies_of_argmax_start_and_proposal_by_loops(moved):
    saved = saved_run()
    at = Position(1, **moved)
    seen, scribbles = view(saved, at), labelling.scribbles_at(saved, at).numpy()
    argmax, is_seed = saved.log_probs[1].float().argmax(0).numpy(), scribbles < K
    present = np.unique(scribbles[is_seed])
    allowed = present if at.restricted else np.arange(K)
    free = argmax if at.start == "argmax" else np.zeros_like(argmax)
    free = np.where(np.isin(free, allowed), free, allowed[0])
    expected = {"clamped": np.where(is_seed, scribbles, argmax), "start": np.where(is_seed, scribbles, free)}
    assert np.array_equal(seen.argmax.numpy(), argmax) and seen.allowed == tuple(allowed)
    for name in ("clamped", "start", "proposal"):
        found = getattr(seen, name)
        labels = found.labels.numpy()
        assert name == "proposal" or np.array_equal(labels, expected[name])
        assert (labels[is_seed] == scribbles[is_seed]).all()
        unary, potts = parts_by_loops(saved, at, labels, np.ones_like(is_seed))
        assert (found.unary, found.potts) == pytest.approx((unary, potts), rel=1e-4, abs=1e-6)
        assert found.energy == found.unary + found.potts
    assert np.isin(seen.proposal.labels, allowed).all()
    assert seen.proposal.energy <= seen.start.energy
    assert (seen.start.energy, seen.proposal.energy) == pytest.approx(
        (seen.solution.start_energy, seen.solution.energy), rel=1e-5
    )


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("start", list(labelling.STARTS))
def test_the_proposal_is_the_best_labelling_of_a_small_image(neighbours, start):
    everything = np.ones((3, 3), bool)
    for seed in range(5):
        saved = small_run(seed=seed)
        at = Position(potts_weight=2.0, gamma=1.0, neighbours=neighbours, start=start)
        seen, scribbles = view(saved, at), saved.scribbles[0].numpy().ravel()
        choices = [[label] if label < 2 else [0, 1] for label in scribbles]
        every = [np.array(labels).reshape(3, 3) for labels in itertools.product(*choices)]
        energies = [sum(parts_by_loops(saved, at, labels, everything)) for labels in every]
        best = int(np.argmin(energies))
        assert len(every) == 2**7 and seen.proposal.energy == pytest.approx(energies[best], rel=1e-4)
        assert np.array_equal(seen.proposal.labels.numpy(), every[best])


@pytest.mark.parametrize("downscale", [1, 2])
def test_the_proposal_is_what_the_solver_returns(downscale):
    saved = saved_run(sweeps=3, downscale=downscale)
    for image, neighbours, restricted in itertools.product(range(COUNT), (4, 8), (True, False)):
        at = Position(image, 0.5, (), 20.0, 0.7, neighbours, restricted, "argmax")
        x = MaskViews(SIDE).plain(saved.images[image : image + 1])
        log_probs = saved.log_probs[image : image + 1].float()
        scribbles = torch.from_numpy(scribbles_of(saved.truth[image].numpy(), 0.5))[None]
        starts = log_probs.argmax(1).byte()
        (problem,) = problems(log_probs, contrast_grid(x, None, neighbours), scribbles, starts)
        settings = SolverSettings(20.0, 0.7, sweeps=3, restricted=restricted, downscale=downscale)
        found, seen = solve(problem, settings), view(saved, at)
        assert np.array_equal(seen.proposal.labels.numpy(), found.labels)
        assert (seen.solution.energy, seen.solution.sweeps, seen.solution.cuts) == (
            found.energy, found.sweeps, found.cuts,
        )  # fmt: skip


def test_padding_has_no_label_energy_or_edge():
    saved = small_run(5, 4, seed=3, padded=2)
    noise = dataclasses.replace(saved, images=saved.images.clone(), log_probs=saved.log_probs.clone())
    noise.images[:, :, -2:] = 17
    noise.log_probs[:, :, -2:] = -9.0
    at = Position(gamma=1.0, potts_weight=2.0, strokes=(Stroke(1, (4, 0), (4, 3)),))
    seen, other, inside = view(saved, at), view(noise, at), np.arange(5)[:, None].repeat(4, 1) < 3
    for name in ("clamped", "start", "proposal"):
        found, same = getattr(seen, name), getattr(other, name)
        assert torch.equal(found.labels, same.labels) and (found.unary, found.potts) == (same.unary, same.potts)
        assert (found.labels.numpy()[~inside] == 255).all() and (found.labels.numpy()[inside] < 2).all()
        parts = parts_by_loops(saved, at, found.labels.numpy(), inside)
        assert (found.unary, found.potts) == pytest.approx(parts, rel=1e-4)
    assert (seen.scribbles[-2:] == 254).all(), "a stroke does not mark padding"
    assert float(seen.grid.pixels) == 12
    rows = explore.table_rows(saved, at, seen)
    right = (seen.proposal.labels == saved.truth[0]).numpy()[inside].mean()
    assert rows[2][6] == f"{100 * right:.1f} %"


def test_a_scribble_at_a_length_is_that_of_the_mask():
    saved = saved_run(0.5)
    exact = dataclasses.replace(saved, reach=torch.from_numpy(reaches_of(saved.truth.numpy())))
    for image, mask in enumerate(saved.truth.numpy()):
        for length in LENGTHS:
            found = labelling.scribbles_at(saved, Position(image, length))
            assert np.array_equal(found.numpy(), scribbles_of(mask, length)), (image, length)
        for length in np.arange(0, 101, 7) / 100:
            expected = scribbles_of(mask, length)
            found = labelling.scribbles_at(exact, Position(image, length)).numpy()
            assert np.array_equal(found, expected)
            half = labelling.scribbles_at(saved, Position(image, length)).numpy()
            assert (half[expected < 255] == expected[expected < 255]).all() and (half != expected).mean() < 0.005
        none = labelling.scribbles_at(saved, Position(image, NOTHING))
        assert (none == 255).all()
    own = dataclasses.replace(saved, scribbles=saved.scribbles.flip(0))
    assert torch.equal(labelling.scribbles_at(own, Position(0, 0.5)), own.scribbles[0])


def test_strokes_are_three_pixels_wide_clipped_and_on_top():
    saved = saved_run()
    across = labelling.brushed(Stroke(1, (10, 5), (10, 20)), (SIDE, SIDE))
    expected = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    expected[9:12, 4:22] = True
    assert torch.equal(across, expected)
    corner = labelling.brushed(Stroke(1, (0, 0), (0, 0)), (SIDE, SIDE)).nonzero().tolist()
    assert corner == [[0, 0], [0, 1], [1, 0], [1, 1]]
    beyond = labelling.brushed(Stroke(1, (SIDE - 1, 30), (SIDE + 40, 30)), (SIDE, SIDE)).nonzero()
    assert beyond.tolist() == [[row, column] for row in (46, 47) for column in (29, 30, 31)]
    slant = labelling.brushed(Stroke(1, (5, 5), (9, 9)), (SIDE, SIDE))
    assert all(slant[place - 1 : place + 2, place - 1 : place + 2].all() for place in range(5, 10))
    assert int(slant.sum()) == 9 + 4 * 5

    strokes = (Stroke(2, (0, 0), (47, 47)), Stroke(4, (0, 47), (47, 0)), Stroke(5, (24, 0), (24, 47)))
    before = labelling.scribbles_at(saved, Position(0, 0.8))
    found, by_hand = labelling.scribbles_at(saved, Position(0, 0.8, strokes)), before.clone()
    for stroke in strokes:
        by_hand[labelling.brushed(stroke, (SIDE, SIDE))] = stroke.label
    assert torch.equal(found, by_hand) and (found[24] == 5).all() and found[0, 47] == 4
    assert torch.equal(labelling.scribbles_at(saved, Position(0, 0.8)), before), "nothing is written into"
    assert torch.equal(saved.scribbles, run_outputs()["pool_scribbles"])
    alone = labelling.scribbles_at(saved, Position(0, NOTHING, strokes[2:]))
    assert (alone < 255).sum() == 3 * SIDE
    thin = dataclasses.replace(saved, width=1)
    assert (labelling.scribbles_at(thin, Position(0, NOTHING, strokes[2:])) < 255).sum() == SIDE
    seen = view(saved, Position(0, NOTHING, strokes))
    assert seen.allowed == (2, 4, 5) and set(seen.proposal.labels.unique().tolist()) <= {2, 4, 5}
    assert seen.start.labels[10, 30] == 2, "the lowest label that is allowed, where background is not"


def test_without_any_scribble_every_label_is_allowed():
    saved = saved_run()
    at = Position(2, NOTHING, gamma=0.5, start="argmax", potts_weight=0.0)
    seen = view(saved, at)
    assert seen.allowed == tuple(range(K))
    assert torch.equal(seen.proposal.labels, seen.argmax), "without Potts the network's labels are the best"
    smooth = view(saved, dataclasses.replace(at, potts_weight=1e5))
    assert len(smooth.proposal.labels.unique()) == 1, "with little else one label is"


@pytest.mark.parametrize("neighbours", [4, 8])
def test_the_contrast_map_by_loops(neighbours):
    saved = small_run(4, 5, seed=2, padded=1)
    found = labelling.contrast_map(view(saved, Position(neighbours=neighbours)).grid)
    image = (saved.images[0].double().numpy() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    places, near = list(np.ndindex(3, 5)), {4: 1.1, 8: 1.5}[neighbours]
    squares = {
        (p, q): ((image[:, *p] - image[:, *q]) ** 2).sum()
        for p in places for q in places if p != q and math.dist(p, q) < near
    }  # fmt: skip
    variance = np.mean(list(squares.values()))
    for p in places:
        own = [(math.exp(-d / 2 / variance), 1 / math.dist(*pair)) for pair, d in squares.items() if pair[0] == p]
        assert float(found[p]) == pytest.approx(sum(e * w for e, w in own) / sum(w for _, w in own), rel=1e-5)
    assert (found[3] == 1).all()


def test_the_table_and_the_heading_say_what_is_shown():
    saved = saved_run(0.3)
    at = Position(0, 0.3, (Stroke(3, (0, 0), (0, 9)),), 50.0, 0.2, start="argmax")
    seen = view(saved, at)
    rows = {name: cells for name, *cells in explore.table_rows(saved, at)}
    names = ["network's argmax, seeds clamped", "start: argmax, seeds clamped", "proposal"]
    assert list(rows) == names
    for name, found in zip(names, (seen.clamped, seen.start, seen.proposal), strict=True):
        labels = found.labels.numpy()
        assert rows[name][:3] == [f"{value:.4f}" for value in (found.energy, found.unary, found.potts)]
        others = (seen.argmax.numpy(), seen.start.labels.numpy())
        shares = [(labels != other).mean() for other in others] + [(labels == saved.truth[0].numpy()).mean()]
        assert rows[name][3:] == [f"{100 * share:.1f} %" for share in shares]
    said, words = explore.html(saved, at, seen), explore.text(saved, at, seen)
    assert all(cell in said and cell in words for name in names for cell in (name, *rows[name]))
    seeds = (labelling.scribbles_at(saved, at) < K).sum()
    heading = explore.heading(saved, at, seen)
    assert heading.startswith(f"Image 0 of the pool, 48 x 48 pixels: {seeds} seeds ({100 * seeds / 48**2:.1f} %) of ")
    pairs = 2 * 47 * 48 + 2 * 47**2
    assert f"as much as {50 * 48**2 / pairs / 0.2:.3g} nats" in heading and "1 stroke drawn" in heading
    assert "Released at this length: lambda = 100, gamma = 0.1." in heading and "Dress" in heading
    other = dataclasses.replace(at, length=NOTHING, gamma=0.0, restricted=False, strokes=())
    heading = explore.heading(saved, other, view(saved, other))
    assert "no given scribble, none drawn" in heading and "all 6 classes" in heading and "Released" not in heading
    assert "the network has no say" in heading


def test_an_image_without_truth_has_no_accuracy():
    saved = saved_run()
    blind = dataclasses.replace(saved, truth=torch.full_like(saved.truth, 255))
    seen = view(blind, Position())
    assert [row[6] for row in explore.table_rows(blind, Position(), seen)] == ["-"] * 3
    verdict = Canvas(blind).tiles(Position(), seen)[7][1]
    assert {RIGHT, WRONG}.isdisjoint(colour for _, colour in verdict.getcolors())


@pytest.fixture
def quarters():
    """Four blocks of 104 x 104 pixels, as large as a tile: one is scribbled; the network is wrong in the second."""
    truth = torch.tensor([[0, 1], [2, 255]]).byte().repeat_interleave(104, 0).repeat_interleave(104, 1)[None]
    likely = torch.tensor([[0, 2], [2, 1]]).repeat_interleave(104, 0).repeat_interleave(104, 1)
    log_probs = (4.0 * F.one_hot(likely, 3).movedim(2, 0)[None]).log_softmax(1).half()
    images = (60 * torch.arange(4)).byte().view(2, 2).repeat_interleave(104, 0).repeat_interleave(104, 1)
    scribbles = torch.full_like(truth, 255)
    scribbles[0, 20:60, 120:180] = 1
    reach = torch.full(truth.shape, math.inf)
    arrays = (images.expand(1, 3, 208, 208), truth, scribbles, reach, log_probs)
    return Saved(*arrays, ("a", "b", "c"), 1.0, SolverSettings(), 8, "quarters")


def test_tiles_show_scribble_argmax_proposal_truth_and_verdict(quarters):
    canvas, at = Canvas(quarters), Position(potts_weight=0.0, gamma=1.0)
    seen = view(quarters, at)
    colours = [tuple(colour) for colour in canvas.colours.tolist()]
    titles, tiles = zip(*canvas.tiles(at, seen), strict=True)

    def corners(tile):
        return [tile.getpixel(place) for place in ((50, 80), (150, 80), (50, 150), (150, 150))]

    assert corners(tiles[0]) == [(grey,) * 3 for grey in (0, 60, 120, 180)]
    assert {tiles[0].getpixel((x, 40)) for x in (120, 150, 179)} == {colours[1]}
    assert {tiles[0].getpixel(place) for place in ((119, 40), (180, 40), (150, 19), (150, 60))} == {(255,) * 3}
    assert corners(tiles[1]) == corners(tiles[2]) == [colours[label] for label in (0, 2, 2, 1)]
    assert tiles[1].getpixel((150, 40)) == colours[2] and tiles[2].getpixel((150, 40)) == colours[1]
    assert corners(tiles[3]) == [colours[label] for label in (0, 1, 2, 255)]
    assert corners(tiles[4]) == [(255,) * 3] * 4 and max(tiles[4].getpixel((103, 50))) < 200
    assert tiles[5].getpixel((50, 50)) == colours[0] and tiles[5].getpixel((150, 40)) == colours[1]
    assert tiles[6].getpixel((150, 40)) == colours[1]
    pale = [tuple(int(0.12 * part + 0.88 * 255) for part in colours[label]) for label in (0, 2, 2, 1)]
    np.testing.assert_allclose(corners(tiles[6]), pale, atol=1)
    assert corners(tiles[7]) == [RIGHT, WRONG, RIGHT, UNKNOWN] and tiles[7].getpixel((150, 40)) == RIGHT
    share = (2 * 104**2 + 40 * 60) / (3 * 104**2)
    assert titles[7] == f"Proposal, right: {100 * share:.1f} % (report only)"
    assert titles[6] == f"Proposal, not the argmax: {100 * 40 * 60 / 208**2:.1f} %"
    assert titles[2] == f"Proposal: E = {seen.proposal.energy:.4f}"
    with_cursor = canvas.tiles(at, seen, Stroke(2, (100, 20), (100, 190)))[0][1]
    assert with_cursor.getpixel((70, 100)) == colours[2] and tiles[0].getpixel((70, 100)) == (0, 0, 0)


def test_images_keep_their_shape_and_long_keys_are_wrapped():
    saved = small_run(6, 12, classes=3)
    canvas = Canvas(saved)
    assert canvas.fit == (208, 104)
    assert {tile.size for _, tile in canvas.tiles(Position(), view(saved, Position()))} == {(208, 104)}
    assert canvas.draw(Position()).size == (explore.WIDE, canvas.height)
    pen, font = ImageDraw.Draw(Image.new("RGB", (300, 200), "white")), ImageFont.load_default(11)
    entries = [("a long name of a class", (1, 2, 3))] * 5
    assert parts.write_key(pen, entries[:1], (0, 0, 200), font) == 17
    assert parts.write_key(pen, entries, (0, 0, 200), font) == 5 * 17


def test_every_control_changes_the_picture_and_the_table_and_back():
    saved = saved_run(gamma=0.5)
    explorer = Explorer(saved)
    explorer.controls["length"].value = 0.3
    explorer.controls["potts_weight"].value = 20
    before, drawn = explorer.numbers.value, explorer.picture.value
    moves = {"image": 2, "length": NOTHING, "potts_weight": 1, "gamma": 10, "neighbours": 4, "restricted": False,
             "start": "argmax"}  # fmt: skip
    assert set(moves) == set(explorer.controls)
    for name, value in moves.items():
        start = getattr(explorer.position, name)
        explorer.controls[name].value = value
        assert getattr(explorer.position, name) == value
        assert explorer.numbers.value != before and explorer.picture.value != drawn, name
        seen = view(saved, explorer.position)
        assert explorer.numbers.value == explore.html(saved, explorer.position, seen)
        explorer.controls[name].value = start
        assert explorer.numbers.value == before and explorer.picture.value == drawn, name
    parts = [*explorer.controls.values(), *explorer.cursor_controls.values(), explorer.add, explorer.clear]
    assert all(part.description for part in parts)
    words, source = re.fullmatch(r'<img .* alt="(.*)" src="data:image/jpeg;base64,(.*)">', drawn).groups()
    assert words.startswith("Image 0 of the pool")
    size = Image.open(io.BytesIO(base64.b64decode(source))).size
    assert size == (explore.WIDE, explorer.canvas.height)


def test_strokes_are_added_and_cleared_image_by_image(monkeypatch):
    explorer, solved = Explorer(saved_run()), []
    original = labelling.view
    monkeypatch.setattr(explore, "view", lambda *given: solved.append(given) or original(*given))
    before, drawn = explorer.numbers.value, explorer.picture.value
    for name, value in {"label": 3, "row": 0, "column": 40, "to_row": 30, "to_column": 47}.items():
        shown = explorer.picture.value
        explorer.cursor_controls[name].value = value
        assert explorer.picture.value != shown and explorer.numbers.value == before, name
    assert explorer.cursor == Stroke(3, (0, 40), (30, 47)) and not solved, "the cursor alone is nothing to solve"
    assert explorer.position.strokes == () and explorer.clear.disabled
    explorer.add.click()
    explorer.cursor_controls["label"].value = 0
    explorer.add.click()
    assert explorer.position.strokes == (Stroke(3, (0, 40), (30, 47)), Stroke(0, (0, 40), (30, 47)))
    assert "2 strokes drawn" in explorer.numbers.value and not explorer.clear.disabled and len(solved) == 2
    explorer.controls["image"].value = 1
    assert explorer.position.strokes == () and explorer.clear.disabled
    explorer.controls["image"].value = 0
    assert len(explorer.position.strokes) == 2
    explorer.clear.click()
    assert explorer.numbers.value == before and explorer.picture.value != drawn, "the cursor is elsewhere"
    for name, value in {"row": 24, "column": 12, "to_row": 24, "to_column": 36}.items():
        explorer.cursor_controls[name].value = value
    assert explorer.picture.value == drawn


def test_controls_start_at_the_runs_own_values():
    saved = dataclasses.replace(saved_run(0.3, gamma=0.123, potts_weight=77.0, restricted=False), neighbours=4)
    explorer = Explorer(saved)
    assert explorer.position == explorer.start == Position(0, 0.3, (), 77.0, 0.123, 4, False, "background")
    for name in ("gamma", "potts_weight"):
        values = [value for _, value in explorer.controls[name].options]
        assert values == sorted(values) and values[0] == 0
    lengths = [length for _, length in explorer.controls["length"].options]
    assert lengths[0] == NOTHING and lengths[1:] == [step / 100 for step in range(101)]
    assert all(explorer.controls[name].continuous_update for name in ("length", "gamma", "potts_weight"))
    explorer = Explorer(small_run(129, 128))
    assert not any(explorer.controls[name].continuous_update for name in ("length", "gamma", "potts_weight"))


# Runs


def asked(method="robust_trust_region", labels=100, **more):
    return Experiment("trust_region", method, "scenes", labels, **more)


def write_run(folder, found):
    save_state(folder / "outputs.safetensors", found)
    write_json(folder / "metrics.json", {"run": folder.name})


def test_saved_are_the_arrays_and_the_stage_of_the_run(tmp_path):
    own = asked(overrides={"gamma": 0.3, "neighbours": 4, "sweeps": 2, "back_end": "ortools", "width": 2})
    others = [asked("adm", 30), asked("partial_ce", 80), asked("grid_gd", 100)]
    for experiment in (own, *others):
        write_run(folder_of(experiment, tmp_path), run_outputs())
    saved = labelling.load_saved(own, tmp_path)
    for name in ("images", "truth", "scribbles", "reach", "log_probs"):
        assert torch.equal(getattr(saved, name), run_outputs()[f"pool_{name}"])
    assert saved.classes[1] == "Trouser" and saved.length == 1.0 and saved.neighbours == 4 and saved.width == 2
    assert saved.solver == SolverSettings(100.0, 0.3, sweeps=2, back_end="ortools")
    assert view(saved, labelling.starting(saved)).proposal.energy > 0, "whatever back end the run had"
    for experiment, gamma in zip(others, (0.1, 0.075, 0.05), strict=True):
        saved = labelling.load_saved(experiment, tmp_path)
        assert saved.solver == SolverSettings(100.0, gamma), experiment.method
        assert (saved.neighbours, saved.width) == (8, 1)
    assert labelling.released(0.42) == SolverSettings(100.0, 0.1)
    assert "scribble length 80 %" in labelling.load_saved(others[1], tmp_path).title


def test_controls_only_where_somebody_can_move_them(tmp_path, monkeypatch):
    own, bare, empty = asked(), asked(seed=6), asked(seed=7)
    kept = run_outputs()
    write_run(folder_of(own, tmp_path), kept)
    lacking = {name: kept[name] for name in kept if name not in ("pool_reach", "pool_log_probs")}
    write_run(folder_of(bare, tmp_path), lacking)
    write_run(folder_of(empty, tmp_path), kept | {"pool_images": kept["pool_images"][:0]})
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = explore.explore(own, tmp_path)
    assert isinstance(still, Figure) and "network's argmax, seeds clamped" in texts(still)
    assert "Robust Grid-TR, Fashion scenes, scribble length 100 %" in texts(still)
    assert "not run" in texts(explore.explore(asked(seed=5), tmp_path))
    assert "Robust Grid-TR keeps no pool_reach, pool_log_probs" in texts(explore.explore(bare, tmp_path))
    assert "keeps no pool_images" in texts(explore.explore(empty, tmp_path))
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = explore.explore(own, tmp_path)
    assert isinstance(explorer, VBox) and explorer.controls["image"].max == COUNT - 1
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    explorer.controls["image"].value = 1
    picture = base64.b64decode(bundle["image/png"])
    assert picture.startswith(b"\x89PNG")
    assert base64.b64decode(explorer._repr_mimebundle_()["image/png"]) == picture, "the starting position"
