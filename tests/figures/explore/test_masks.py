"""Weights of pixels against singular vectors in numpy, and their numbers against loops."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from figures.common import classes_of
from figures.explore import panel
from figures.explore.masks import Weights, measure
from figures.plane import Moment
from repro.methods.few_masks.csl import CSLSettings
from repro.runs import load_moments, load_outputs
from tests.fake_mask_runs import STEPS, features, probabilities, scenes, write_mask_run
from tests.figures.explore.runs import CSL, made

START = {"selection": "gaussian", "threshold": 0.95, "alpha": 8.0, "features": "both", "rule": "or"}


def of(moments, **changes):
    classes, settings = classes_of("scenes"), CSLSettings(**changes)
    return made(Weights, moments=moments, classes=classes, settings=settings, title="a run")


def two_moments(**changes):
    """Two evaluations of three images."""
    images, truth = scenes(3, seed=0)
    shares = ((100, 0.3), (200, 1.0))
    return of({step: Moment(step, images, truth, **features(probabilities(truth, "csl", 0, share)))
               for step, share in shares}, **changes)  # fmt: skip


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
    explorer = two_moments()
    for image in range(3):
        at = START | {"alpha": 3.0, "rule": rule, "features": features, "threshold": 0.8}
        moment, found = explorer.moments[200], explorer.compute(image, 200, **at).weights
        expected = weights_by_svd(moment.confidence[image], moment.residual[image], 3.0, rule, features)
        np.testing.assert_allclose(found["gaussian"].numpy(), expected, atol=1e-6)
        assert torch.equal(found["hard"], (found["gaussian"] == 1).float())
        assert torch.equal(found["threshold"] == 1, moment.confidence[image] >= 0.8)
        assert 0 < float(found["hard"].mean()) < float(found["gaussian"].mean()) < 1


@given(st.integers(1, 30), st.integers(0, 5), st.sampled_from([0.0, 0.4, 1.0]))
def test_numbers_by_loops(n, seed, knowing):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(n, generator=generator).clamp(0.3, 0.7) / 0.7 - 3 / 7
    right, known = torch.rand(n, generator=generator) < 0.6, torch.rand(n, generator=generator) < knowing
    rows = list(zip(weight.double().tolist(), right.tolist(), known.tolist(), strict=True))
    judged = [(w, good) for w, good, is_known in rows if is_known]
    total, good = sum(w for w, _ in judged), sum(w for w, good in judged if good)
    accuracy, wrong = good / total if total else math.nan, (total - good) / len(judged) if judged else math.nan
    expected = (sum(w for w, _, _ in rows) / n, accuracy, wrong, sum(w == 1 for w, _, _ in rows) / n)
    assert measure(weight, right, known) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_table_compares_the_rules_and_marks_the_chosen_one():
    explorer = two_moments()
    seen = explorer.compute(2, 200, **START | {"selection": "hard", "threshold": 0.9, "alpha": 2.0})
    rows = {name: cells for name, *cells in explorer.numbers(seen).rows}
    assert list(rows) == ["CSL, Gaussian, alpha = 2", "> CSL, 0 or 1", "threshold 0.9", "every pixel"]
    accuracy = float((seen.moment.label == seen.moment.truth)[seen.moment.known].double().mean())
    assert rows["every pixel"] == [panel.percent(value, 2) for value in (1, accuracy, 1 - accuracy, 1)]
    assert rows["> CSL, 0 or 1"][0] == rows["> CSL, 0 or 1"][3] == rows["CSL, Gaussian, alpha = 2"][3]


def test_an_image_without_truth_has_a_share_and_no_accuracy():
    moments = two_moments().moments
    blind = of({step: dataclasses.replace(moment, truth=torch.full_like(moment.truth, 255))
                for step, moment in moments.items()})  # fmt: skip
    seen = blind.compute(0, 200, **START)
    numbers = blind.numbers(seen)
    assert all(kept.endswith("%") and (right, wrong) == ("-", "-") for _, kept, right, wrong, _ in numbers.rows)
    assert "hidden from this report too" in numbers.heading
    axes = blind.layout(Figure())
    blind.draw(axes, seen)
    assert axes[6].images[0].get_array().shape == (32, 40, 3) and len(axes) == 8
    shown = axes[6].images[0].get_array().reshape(-1, 3)
    assert (shown.max(1) - shown.min(1) == 0).all(), "neither right nor wrong, but grey"


def test_a_run_is_read_and_starts_under_its_own_rule(tmp_path):
    own = CSL.with_(selection="threshold", threshold=0.88, alpha=4.0, rule="and")
    folder = write_mask_run(own, tmp_path)
    explorer, outputs, kept = Weights(own, tmp_path), load_outputs(folder), load_moments(folder)
    assert list(explorer.moments) == list(STEPS) and explorer.classes[1] == "Trouser"
    for step, moment in explorer.moments.items():
        assert torch.equal(moment.images, outputs["pool_images"]) and torch.equal(moment.truth, outputs["pool_truth"])
        assert all(torch.equal(getattr(moment, name), value) for name, value in kept[step].items())
    expected = {"image": 0, "step": STEPS[-1], "selection": "threshold", "threshold": 0.88, "alpha": 4.0,
                "features": "both", "rule": "and"}  # fmt: skip
    assert panel.position(explorer.controls()) == expected, "a threshold between those of the slider is on it"
    for method, rule in (("unimatch", "threshold"), ("supervised", "gaussian")):
        other = CSL.with_(method=method)
        write_mask_run(other, tmp_path)
        assert Weights(other, tmp_path).controls()["selection"].value == rule


def test_the_heading_explains_where_the_run_itself_differs():
    for changes, words in (({"scope": "class"}, "splits each class"), ({"form": "paper"}, "other form of r"), ({}, "")):
        explorer = two_moments(**changes)
        heading = explorer.numbers(explorer.compute(0, 200, **START)).heading
        assert words in heading and (changes or heading.endswith("1,280 pixels."))
