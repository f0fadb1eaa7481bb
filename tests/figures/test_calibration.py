import numpy as np
import pytest
import torch

from figures import calibration as figures
from figures.tables import NOT_RUN
from repro.grid import PAPERS, Column
from repro.measure import calibration
from tests import fake_outputs
from tests.fake_margins import BASE, LABELLED, MIXED, write_pair, write_run
from tests.fake_outputs import texts
from tests.figures.drawn import change_final, spreads

TABLE = PAPERS["calibratemix"].tables["main"].only(["FixMatch", "FixMatch + CalibrateMix", "FlexMatch"])
HUNDRED = Column("fashion", 100)


def test_before_and_after_scale_by_the_temperature_of_the_held_out_images(tmp_path):
    kept = write_pair(tmp_path)
    figure = figures.before_and_after([(BASE, MIXED)], tmp_path, bins=5, resamples=10)
    diagrams = figure.axes[:4]
    fitted = calibration.fit_temperature(kept["holdout_logits"], kept["holdout_labels"])
    for axes, temperature in zip(diagrams[2:], (1.0, fitted), strict=True):
        probs = (kept["test_logits"].double() / temperature).softmax(dim=1)
        confidence, label = probs.max(dim=1)
        right = label == kept["test_labels"]
        ece = 0.0
        for b in range(5):
            inside = (confidence > b / 5) & (confidence <= (b + 1) / 5)
            if inside.any():
                ece += float(inside.double().mean() * abs(right[inside].double().mean() - confidence[inside].mean()))
        assert f"ECE {100 * ece:.1f} %" in axes.get_title()
        assert f"error {100 * (1 - float(right.double().mean())):.1f} %" in axes.get_title()
    assert "as trained" in diagrams[2].get_title() and f"scaled at T = {fitted:.2f}" in diagrams[3].get_title()
    assert "FixMatch + CalibrateMix" in diagrams[3].get_title() and "5 bins (lo, hi]" in texts(figure)


def test_a_run_without_held_out_images_says_so(tmp_path):
    fake_outputs.write_run(tmp_path, BASE, passes=False)
    said = texts(figures.before_and_after([(BASE, MIXED)], tmp_path, resamples=10))
    assert "no held-out images" in said and NOT_RUN in said


def test_bars_are_means_with_deviation_and_n(tmp_path):
    for seed, ece in ((0, 0.1), (1, 0.3)):
        write_run(tmp_path, MIXED.with_(seed=seed))
        change_final(tmp_path, MIXED.with_(seed=seed), lambda found, ece=ece: found.update(ece_15=ece))
    figure = figures.ece_bars(TABLE, "tiny", (0, 1), tmp_path)
    (bar,) = figure.axes[0].patches
    assert bar.get_height() == pytest.approx(0.2) and bar.get_hatch() == "///"
    assert spreads(figure.axes[0]) == pytest.approx([np.std([0.1, 0.3], ddof=1)])
    assert "not run: FixMatch, FlexMatch" in texts(figure) and "10 bins [lo, hi)" in texts(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["2"]


def test_points_are_means_over_seeds_before_and_after_scaling(tmp_path):
    for seed, accuracy, ece, scaled in ((0, 0.5, 0.1, 0.02), (1, 0.7, 0.3, 0.04)):
        write_pair(tmp_path, seed)
        for item, less in ((BASE, 0.1), (MIXED, 0.0)):
            values = {"accuracy": accuracy - less, "ece_15": ece, "scaled_ece_15": scaled}
            change_final(tmp_path, item.with_(seed=seed), lambda found, values=values: found.update(values))
    figure = figures.accuracy_against_ece(TABLE, "tiny", (0, 1), tmp_path, column=HUNDRED)
    for axes, mean in zip(figure.axes, (0.2, 0.03), strict=True):
        points = {item.get_label(): item[0].get_xydata() for item in axes.containers}
        assert points["FixMatch (n = 2)"] == pytest.approx(np.array([[mean, 0.5]]))
        assert points["FixMatch + CalibrateMix (n = 2)"] == pytest.approx(np.array([[mean, 0.6]]))
        assert len(points["FlexMatch (not run)"]) == 0
        (arrow,) = [text for text in axes.texts if text.arrow_patch is not None]
        assert arrow.xyann == pytest.approx((mean, 0.5)) and arrow.xy == pytest.approx((mean, 0.6))


def test_curves_mark_the_end_of_the_warm_up(tmp_path):
    write_pair(tmp_path)
    figure = figures.calibration_curves([BASE, MIXED], tmp_path)
    accuracy, ece, nll = figure.axes
    assert accuracy.lines[0].get_ydata() == pytest.approx([0.2, 0.5])
    assert ece.lines[1].get_ydata() == pytest.approx([0.1, 0.2])
    assert list(nll.lines[-1].get_xdata()) == [3, 3] and "warm-up ends" in texts(nll)


def test_margins_are_of_labelled_and_unlabelled_images_that_have_one(tmp_path):
    kept = write_pair(tmp_path)
    labelled, unlabelled = figures.read_margins(MIXED, tmp_path)
    assert labelled.index.tolist() == list(range(LABELLED)) and unlabelled.index.tolist() == list(range(LABELLED, 250))
    assert torch.equal(labelled.label, kept["truth"][:LABELLED]) and labelled.right.all()
    assert torch.equal(unlabelled.score, kept["apm"][LABELLED:250])
    assert torch.equal(unlabelled.right, kept["pseudo_label"][LABELLED:250] == kept["truth"][LABELLED:250])
    halves = unlabelled.split()
    assert unlabelled.score[halves["hard"]].max() <= unlabelled.score[halves["easy"]].min()
    assert figures.read_margins(BASE, tmp_path) is None


def test_histograms_count_every_image_once_and_examples_are_the_extremes(tmp_path):
    kept = write_pair(tmp_path)
    figure = figures.margin_histograms(MIXED, tmp_path, examples=3)
    left, right, *tiles = figure.axes
    filled = [sum(bar.get_height() for bar in group) for group in right.containers[:2]]
    assert filled == [115, 115] and sum(sum(b.get_height() for b in g) for g in left.containers) == LABELLED
    shown = [axes.get_xlabel().split("\n")[1] for axes in tiles]
    ordered = [f"{float(score):+.2f}" for score in kept["apm"][LABELLED:250].sort().values]
    assert shown[6:9] == ordered[:3] and shown[9:] == ordered[::-1][:3]
    part = figures.read_margins(MIXED, tmp_path)[1]
    easy = part.score >= part.score.sort().values[115]
    assert f"easy half, {100 * float(part.right[easy].double().mean()):.1f} % right" in texts(right)


def test_runs_without_margins_are_named(tmp_path):
    write_pair(tmp_path)
    assert "keeps no margins" in texts(figures.margin_histograms(BASE, tmp_path))
