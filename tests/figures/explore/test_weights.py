import base64
import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image

from figures.explore import weights as explore
from figures.explore.weights import Position, Saved, measure, weigh
from figures.plane import Moment, classes_of, selection
from repro.experiment import Experiment
from repro.methods.few_masks.csl import CSLSettings
from repro.runs import load_moments, load_outputs
from tests.fake_mask_runs import POOL, STEPS, features, probabilities, scenes, write_mask_run
from tests.fake_outputs import texts

CSL = Experiment("csl", "csl", "scenes", 20, 0, "mini")


def saved_run(**settings):
    """Two evaluations of three images, without a folder."""
    images, truth = scenes(3, seed=0)
    moments = {}
    for step, share in ((100, 0.3), (200, 1.0)):
        moments[step] = Moment(step, images, truth, **features(probabilities(truth, "csl", 0, share)))
    return Saved(moments, classes_of("scenes"), CSLSettings(**settings), "a run")


def weights_by_svd(confidence, residual, alpha, rule, features):
    """CSL's weight of one image as its description says: singular vectors of N x 2 values, in numpy."""
    c, r = (part.double().numpy().ravel() for part in (confidence, residual))
    vectors = np.linalg.svd(np.stack([c, r], 1), full_matrices=False)[0]
    second = np.abs(vectors[:, 1]) > np.abs(vectors[:, 0])
    best = max((second, ~second), key=lambda part: c[part].mean())
    z = {
        "confidence": (c - c[best].mean()) / np.sqrt(c[best].var(ddof=1) + 1e-8),
        "dispersion": (r[best].mean() - r) / np.sqrt(r[best].var(ddof=1) + 1e-8),
    }
    read = np.array([z[name] for name in z if features in (name, "both")])
    good = (read > 0).any(0) if rule == "or" else (read >= 0).all(0)
    distance = np.where(good, 0, (np.minimum(read, 0) ** 2).sum(0))
    return np.exp(-distance / alpha).reshape(confidence.shape)


@pytest.mark.parametrize("features", ["both", "confidence", "dispersion"])
@pytest.mark.parametrize("rule", ["or", "and"])
def test_weights_equal_those_of_an_svd_and_a_threshold(rule, features):
    saved = saved_run()
    for image in range(3):
        at = Position(image, 200, alpha=3.0, rule=rule, features=features, threshold=0.8)
        seen, found = saved.moments[200], weigh(saved, at)
        expected = weights_by_svd(seen.confidence[image], seen.residual[image], 3.0, rule, features)
        np.testing.assert_allclose(found["gaussian"].numpy(), expected, atol=1e-6)
        assert torch.equal(found["hard"], (found["gaussian"] == 1).float())
        assert torch.equal(found["threshold"] == 1, seen.confidence[image] >= 0.8)
        assert 0 < float(found["hard"].mean()) < float(found["gaussian"].mean()) < 1


def test_a_wider_gaussian_and_a_lower_threshold_keep_more():
    saved = saved_run()
    kept = [float(weigh(saved, Position(0, 200, alpha=alpha))["gaussian"].mean()) for alpha in (0.5, 8, 200)]
    assert kept == sorted(kept) and kept[0] < kept[2]
    for tau, share in ((0.0, 1.0), (1.1, 0.0)):
        assert weigh(saved, Position(0, 200, threshold=tau))["threshold"].mean() == share


@given(st.integers(1, 30), st.integers(0, 5), st.sampled_from([0.0, 0.4, 1.0]))
def test_numbers_equal_brute_force(n, seed, knowing):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(n, generator=generator).clamp(0.3, 0.7) / 0.7 - 3 / 7
    right, known = torch.rand(n, generator=generator) < 0.6, torch.rand(n, generator=generator) < knowing
    found = measure(weight, right, known)
    rows = list(zip(weight.double().tolist(), right.tolist(), known.tolist(), strict=True))
    assert found.kept == pytest.approx(sum(w for w, _, _ in rows) / n)
    assert found.full == pytest.approx(sum(w == 1 for w, _, _ in rows) / n)
    judged = [(w, good) for w, good, is_known in rows if is_known]
    total, good = sum(w for w, _ in judged), sum(w for w, good in judged if good)
    assert found.right == (pytest.approx(good / total) if total else None)
    assert found.wrong == (pytest.approx((total - good) / len(judged), abs=1e-12) if judged else None)


def test_numbers_agree_with_those_of_the_figures():
    saved = saved_run()
    at = Position(1, 100)
    seen, weight = saved.moments[100].only(1), weigh(saved, at)["gaussian"]
    whole = dataclasses.replace(seen, truth=torch.where(seen.known, seen.truth, 0))  # the figures leave 255 out of kept
    found = measure(weight, whole.right[0], whole.known[0])
    assert (found.kept, found.right) == pytest.approx(selection(weight, whole.right[0], whole.known[0]))


def test_the_table_compares_the_rules_and_marks_the_chosen_one():
    saved, at = saved_run(), Position(2, 200, "hard", threshold=0.9, alpha=2.0)
    rows = {name: cells for name, *cells in explore.table_rows(saved, at)}
    assert list(rows) == ["CSL, Gaussian, alpha = 2", "> CSL, 0 or 1", "threshold 0.9", "every pixel"]
    seen = saved.moments[200].only(2)
    accuracy = float((seen.label == seen.truth)[seen.known].double().mean())
    percent = [f"{100 * value:.2f} %" for value in (1, accuracy, 1 - accuracy, 1)]
    assert rows["every pixel"] == percent
    assert rows["> CSL, 0 or 1"][0] == rows["> CSL, 0 or 1"][3] == rows["CSL, Gaussian, alpha = 2"][3]
    assert all(row[0] in explore.text(saved, at) for row in explore.table_rows(saved, at))
    assert "<b>CSL, 0 or 1</b>" in explore.html(saved, at)


def test_an_image_without_truth_has_a_share_and_no_accuracy():
    saved = saved_run()
    unknown = torch.full_like(saved.moments[200].truth, 255)
    moments = {step: dataclasses.replace(seen, truth=unknown) for step, seen in saved.moments.items()}
    blind = dataclasses.replace(saved, moments=moments)
    for _, kept, right, wrong, _ in explore.table_rows(blind, Position(0, 200)):
        assert kept.endswith("%") and (right, wrong) == ("-", "-")
    assert "hidden from this report too" in explore.text(blind, Position(0, 200))
    picture = explore.Canvas(blind).draw(Position(0, 200))
    assert not {explore.RIGHT, explore.WRONG} & colours_of(tile(picture, 5))


def colours_of(pixels):
    return {tuple(colour) for colour in np.asarray(pixels).reshape(-1, 3).tolist()}


def tile(picture, place):
    """The pixels of a tile, counted row by row."""
    x = explore.LEFT + place % 3 * explore.STEP
    y = explore.TOP + place // 3 * explore.ROW
    return picture.crop((x, y, x + explore.TILE, y + explore.TILE))


@pytest.fixture
def quarters():
    """An image of four pixels: sure and right, sure and wrong, unsure and right, unsure and of unknown truth."""
    confidence = torch.tensor([[[0.97, 0.96], [0.5, 0.6]]])
    label, truth = torch.tensor([[[0, 1], [2, 3]]]).byte(), torch.tensor([[[0, 2], [2, 255]]]).byte()
    images = torch.tensor([[[10, 20], [30, 40]]] * 3).byte()[None]
    moment = Moment(5, images, truth, confidence, (1 - confidence) ** 2 / 5, label)
    return Saved({5: moment}, classes_of("scenes"), CSLSettings(), "four pixels")


def test_tiles_show_image_kept_truth_label_and_verdict(quarters):
    canvas = explore.Canvas(quarters)
    picture = canvas.draw(Position(0, 5, "threshold", threshold=0.9))

    def corners(place):
        part = tile(picture, place)
        return [part.getpixel(at) for at in ((30, 30), (100, 30), (30, 100), (100, 100))]

    assert corners(0) == [(10,) * 3, (20,) * 3, (30,) * 3, (40,) * 3]
    assert corners(1)[:2] == corners(0)[:2]
    faded = [round(0.12 * grey + 0.88 * 255) for grey in (30, 40)]
    assert corners(1)[2:] == [pytest.approx((grey,) * 3, abs=1) for grey in faded]
    assert corners(3) == [tuple(canvas.colours[label].tolist()) for label in (0, 2, 2, 255)]
    assert corners(4) == [tuple(canvas.colours[label].tolist()) for label in (0, 1, 2, 3)]
    verdict = corners(5)
    assert verdict[:2] == [explore.RIGHT, explore.WRONG]
    assert min(verdict[2]) > 200 and len(set(verdict[3])) == 1, "pale where not kept, grey where not known"


def test_pixels_stand_in_the_plane_where_their_features_say(quarters):
    canvas = explore.Canvas(quarters)
    picture, plane = canvas.draw(Position(0, 5, "threshold", threshold=0.9)), canvas.plane(0)
    for c, right in ((0.97, True), (0.96, False), (0.5, True)):
        x, y = plane.pixel(-math.log10(1 - c), math.log10((1 - c) ** 2 / 5))
        red, _, blue = picture.getpixel((int(x), int(y)))
        assert blue > red + 50 if right else red > blue + 50
    line, _ = plane.pixel(1.0, 0)  # c = .9
    assert picture.getpixel((int(line) - 8, 100))[0] == explore.GREY
    assert picture.getpixel((int(line) + 8, 300)) == (255, 255, 255)


def test_axes_stay_while_the_step_moves_and_hold_every_pixel():
    saved = saved_run()
    plane = explore.Canvas(saved).plane(1)
    x0, x1, y0, y1 = plane.values
    for seen in saved.moments.values():
        x, y = explore.spaced(seen.confidence[1], seen.residual[1])
        assert x0 < x.min() and x.max() < x1 and y0 < y.min() and y.max() < y1


def test_a_run_starts_under_its_own_rule(tmp_path):
    own = CSL.with_(selection="threshold", threshold=0.88, alpha=4.0, rule="and")
    write_mask_run(own, tmp_path)
    start = explore.starting(explore.load_saved(own, tmp_path))
    assert start == Position(0, STEPS[-1], "threshold", 0.88, 4.0, "both", "and")
    for method, rule in (("unimatch", "threshold"), ("supervised", "gaussian")):
        other = CSL.with_(method=method)
        write_mask_run(other, tmp_path)
        assert explore.starting(explore.load_saved(other, tmp_path)).selection == rule
    explorer = explore.Explorer(explore.load_saved(own, tmp_path))
    assert explorer.position == start, "a threshold between those of the slider is on it"


def test_saved_are_the_arrays_of_the_run(tmp_path):
    folder = write_mask_run(CSL, tmp_path)
    saved, outputs, kept = explore.load_saved(CSL, tmp_path), load_outputs(folder), load_moments(folder)
    assert list(saved.moments) == list(STEPS) and saved.classes[1] == "Trouser"
    for step, seen in saved.moments.items():
        assert torch.equal(seen.images, outputs["pool_images"]) and torch.equal(seen.truth, outputs["pool_truth"])
        assert all(torch.equal(getattr(seen, name), value) for name, value in kept[step].items())


def test_the_heading_says_where_the_run_itself_differs():
    assert "splits each class" in explore.heading(saved_run(scope="class"), Position(0, 200))
    assert "other form of r" in explore.heading(saved_run(form="paper"), Position(0, 200))
    assert explore.heading(saved_run(), Position(0, 200)).endswith("1,280 pixels")


def test_every_control_changes_the_picture_and_back():
    explorer = explore.Explorer(saved_run())
    before, drawn = explorer.numbers.value, explorer.picture.value
    moves = {"image": 2, "step": 100, "threshold": 0.7, "alpha": 0.5, "features": "dispersion", "rule": "and",
             "selection": "hard"}  # fmt: skip
    for name, value in moves.items():
        start = getattr(explorer.position, name)
        explorer.controls[name].value = value
        assert explorer.numbers.value != before and explorer.picture.value != drawn, name
        explorer.controls[name].value = start
        assert explorer.numbers.value == before and explorer.picture.value == drawn, name
    assert all(control.description for control in explorer.controls.values())
    words, source = re.fullmatch(r'<img .* alt="(.*)" src="data:image/jpeg;base64,(.*)">', drawn).groups()
    assert words.startswith("Image 0 of the pool at step 200")
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (explore.WIDTH, explore.HEIGHT)


def test_controls_only_where_somebody_can_move_them(tmp_path, monkeypatch):
    write_mask_run(CSL, tmp_path)
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = explore.explore(CSL, tmp_path)
    assert isinstance(still, Figure) and "CSL, Gaussian, alpha = 8" in texts(still) and "threshold 0.95" in texts(still)
    assert "not run" in texts(explore.explore(CSL.with_(seed=5), tmp_path))
    other = CSL.with_(seed=6)
    write_mask_run(other, tmp_path, figures=False)
    assert "keeps no moment" in texts(explore.explore(other, tmp_path))
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = explore.explore(CSL, tmp_path)
    assert isinstance(explorer, VBox) and explorer.controls["image"].max == POOL - 1
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
