import base64
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import VBox
from matplotlib.figure import Figure

from figures.calibration import Predictions
from figures.explore import reliability as explore
from figures.explore.reliability import Position, Saved, diagram, measure, sweep
from repro.measure import calibration
from tests.fake_margins import BASE, MIXED, write_pair
from tests.fake_outputs import texts


def saved_run(n=80, classes=4, seed=0, temperature=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator)
    return Saved.of("a run", Predictions(logits, torch.randint(classes, (n,), generator=generator), temperature))


def brute_force(saved, at):
    """ECE and MCE, NLL and Brier with plain loops over samples."""
    z = saved.predictions.logits.double().numpy() / at.temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    labels = saved.predictions.labels.numpy()
    confidence, right = p.max(1), p.argmax(1) == labels
    if at.spacing == "mass":
        places = [rank * at.bins // len(p) for rank in range(len(p))]
        bins = dict(zip(np.argsort(confidence, kind="stable").tolist(), places, strict=True))
    else:
        edge = math.floor if at.closing == "left" else lambda x: math.ceil(x) - 1
        bins = {i: min(edge(confidence[i] * at.bins), at.bins - 1) for i in range(len(p))}
    gaps = {}
    for i, b in bins.items():
        gaps.setdefault(b, []).append(confidence[i] - right[i])
    means = [(len(gap) / len(p), abs(np.mean(gap))) for gap in gaps.values()]
    rows = np.arange(len(p))
    ece, mce = sum(share * gap for share, gap in means), max(gap for _, gap in means)
    brier = ((p - np.eye(p.shape[1])[labels]) ** 2).sum(1).mean()
    return right.mean(), ece, mce, -np.log(p[rows, labels]).mean(), brier


@settings(max_examples=30)
@given(
    st.floats(0.2, 8), st.integers(1, 50), st.sampled_from(["right", "left"]), st.sampled_from(["width", "mass"]),
    st.integers(0, 3),
)  # fmt: skip
def test_numbers_equal_brute_force_and_the_calibration_functions(temperature, bins, closing, spacing, seed):
    saved, at = saved_run(seed=seed), Position(temperature, bins, closing, spacing)
    found = measure(saved, at)
    numbers = found.accuracy, found.ece, found.mce, found.nll, found.brier
    assert numbers == pytest.approx(brute_force(saved, at), abs=1e-9)
    probs = (saved.predictions.logits.double() / temperature).softmax(dim=1)
    confidence, correct = calibration.top_label(probs, saved.predictions.labels)
    assert found.adaptive_ece == pytest.approx(float(calibration.adaptive_ece(confidence, correct, bins)))
    if spacing == "width":
        assert found.ece == pytest.approx(float(calibration.ece(confidence, correct, bins, closing)))


def test_a_temperature_keeps_the_accuracy_and_the_fitted_one_has_the_least_nll():
    saved = saved_run(n=300)
    fitted = calibration.fit_temperature(saved.predictions.logits, saved.predictions.labels)
    found = [measure(saved, Position(temperature)) for temperature in (0.1, 1.0, fitted, 10.0)]
    assert len({numbers.accuracy for numbers in found}) == 1
    assert min(numbers.nll for numbers in found) == found[2].nll


def test_the_sweep_is_the_ece_at_every_temperature_of_the_positions_bins():
    saved, at = saved_run(), Position(bins=7, closing="left")
    errors = sweep(saved, at)
    for place in (0, 20, 40):
        temperature = float(explore.SWEEP[place])
        assert errors[place] == pytest.approx(measure(saved, Position(temperature, 7, "left")).ece)
    assert explore.SWEEP[20] == pytest.approx(1.0)


def test_the_diagram_holds_every_image():
    for at in (Position(bins=3), Position(0.5, 20, "left"), Position(2, 6, spacing="mass")):
        assert diagram(saved_run(), at).count.sum() == 80


def test_the_table_shows_trained_here_and_fitted():
    trained, here, fitted = explore.table_rows(saved_run(temperature=2.5), Position(1.5))
    assert [row[0] for row in (trained, here, fitted)] == ["as trained, T = 1", "here, T = 1.5", "fitted, T = 2.5"]
    assert trained[1] == here[1] == fitted[1]
    assert len(explore.table_rows(saved_run(temperature=None), Position())) == 2
    assert trained[2] == f"{100 * measure(saved_run(), Position()).ece:.2f} %"


def test_bars_of_the_picture_stand_where_the_bins_are():
    logits = torch.tensor([[math.log(9.0), 0.0]]).expand(20, 2)  # all at .9, half of them right
    saved = Saved.of("a run", Predictions(logits, torch.tensor([0, 1]).repeat(10), None))
    picture = explore.Canvas().draw(saved, Position(bins=5))
    plane = explore.DIAGRAM
    colour = {y: picture.getpixel(tuple(round(v) for v in plane.pixel(0.95, y))) for y in (0.2, 0.7, 0.97)}
    assert colour[0.2] == (140, 188, 220) and colour[0.97] == (255, 255, 255)
    assert colour[0.7] not in (colour[0.2], colour[0.97])
    empty = picture.getpixel(tuple(round(v) for v in plane.pixel(0.3, 0.1)))
    assert empty == (255, 255, 255)


def test_moving_the_temperature_changes_numbers_and_picture_and_back():
    explorer = explore.Explorer([saved_run(), saved_run(seed=1)])
    before, drawn = explorer.numbers.value, explorer.picture.value
    explorer.controls["temperature"].value = 2.0
    assert explorer.numbers.value != before and explorer.picture.value != drawn
    assert "here, T = 2<" in explorer.numbers.value
    explorer.controls["temperature"].value = 1.0
    assert explorer.numbers.value == before and explorer.picture.value == drawn
    for name, value in (("bins", 40), ("spacing", "mass"), ("closing", "left")):
        drawn = explorer.picture.value
        explorer.controls[name].value = value
        assert (explorer.picture.value != drawn) == (name != "closing"), "equal counts have no closing"


def test_every_run_can_be_chosen():
    first, second = saved_run(), saved_run(seed=1)
    second = Saved(**vars(second) | {"title": "another"})
    explorer = explore.Explorer([first, second])
    explorer.run.value = "another"
    assert explorer.numbers.value == explore.html(second, Position())


def test_controls_only_where_somebody_can_move_them(tmp_path, monkeypatch):
    write_pair(tmp_path)
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = explore.explore([BASE, MIXED], tmp_path)
    assert isinstance(still, Figure) and "FixMatch + CalibrateMix" in texts(still) and "fitted, T = " in texts(still)
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = explore.explore([BASE, MIXED], tmp_path)
    assert isinstance(explorer, VBox) and len(explorer.run.options) == 2
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "not run" in texts(explore.explore([BASE.with_(seed=5)], tmp_path))
