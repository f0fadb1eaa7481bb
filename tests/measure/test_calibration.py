"""Calibration measures against plain loops, torchmetrics, closed forms and simulated forecasters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from repro.measure.calibration import (
    adaptive_ece,
    all_metrics,
    bootstrap_interval,
    brier,
    classwise_ece,
    ece,
    fit_temperature,
    mce,
    nll,
    top_label,
)


def forecasts(n=400, classes=5, seed=0, sharpen=1.0):
    """Logits and labels of a forecaster that is calibrated for sharpen = 1, overconfident above."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    return logits * sharpen, labels


@st.composite
def problems(draw):
    n, classes = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    logits, _ = forecasts(n, classes, draw(st.integers(0, 10**6)), draw(st.sampled_from([0.1, 1.0, 10.0])))
    labels = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    return logits, labels


def classwise_by_loop(probs, labels, bins):
    probs, labels = probs.numpy(), labels.numpy()
    total = 0.0
    for k in range(probs.shape[1]):
        which = np.minimum((probs[:, k] * bins).astype(int), bins - 1)
        for b in range(bins):
            members = which == b
            if members.any():
                total += members.mean() * abs(probs[members, k].mean() - (labels[members] == k).mean())
    return total / probs.shape[1]


def test_top_label_takes_the_first_of_tied_classes():
    confidence, correct = top_label(torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2]]), torch.tensor([0, 1]))
    assert correct.tolist() == [True, False] and confidence.tolist() == pytest.approx([0.4, 0.4])


def test_ece_and_mce_equal_torchmetrics():
    logits, labels = forecasts(2000, sharpen=2.0)
    probs = logits.float().softmax(1)
    for bins in (10, 15):
        for norm, measure in (("l1", ece), ("max", mce)):
            expected = multiclass_calibration_error(probs, labels, 5, bins, norm)
            found = measure(*top_label(probs, labels), bins, "left")
            torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-4)


def test_ece_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.65, 0.65], dtype=torch.float64)
    correct = torch.tensor([True, False, True, True])
    assert ece(confidence, correct, 10).item() == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)
    assert mce(confidence, correct, 10).item() == pytest.approx(0.45)
    assert ece(confidence, correct, 1).item() == pytest.approx(abs(0.8 - 0.75))  # one bin: errors cancel
    assert adaptive_ece(confidence, correct, 2).item() == pytest.approx(0.5 * 0.45 + 0.5 * 0.35)


@given(problems(), st.integers(1, 20))
@settings(deadline=None)
def test_classwise_ece_equals_the_loop(problem, bins):
    logits, labels = problem
    probs = logits.softmax(1)
    assert classwise_ece(probs, labels, bins).item() == pytest.approx(classwise_by_loop(probs, labels, bins))


def test_classwise_ece_counts_probability_zero_only_when_closed_at_the_left():
    probs, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 1])
    assert classwise_ece(probs, labels).item() == pytest.approx(1.0)
    assert classwise_ece(probs, labels, closing="right").item() == pytest.approx(0.5)


def test_nll_and_brier_equal_their_definitions():
    logits, labels = forecasts()
    probs = logits.softmax(1)
    torch.testing.assert_close(nll(probs, labels), torch.nn.functional.cross_entropy(logits, labels))
    squares = [
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(probs.tolist(), labels.tolist(), strict=True)
    ]
    assert brier(probs, labels).item() == pytest.approx(sum(squares) / len(squares))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nll_of_the_impossible_is_finite(dtype):
    probs = torch.tensor([[1.0, 0.0]], dtype=dtype)
    assert nll(probs, torch.tensor([1])).item() == pytest.approx(-math.log(torch.finfo(dtype).tiny))
    assert nll(probs, torch.tensor([0])).item() == 0.0


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_bounds_and_permutation_invariance(problem, random):
    logits, labels = problem
    probs = logits.softmax(1)
    order = random.sample(range(len(labels)), len(labels))
    row, shuffled = all_metrics(probs, labels), all_metrics(probs[order], labels[order])
    assert row.pop("per_class_accuracy") == shuffled.pop("per_class_accuracy")
    for name, value in row.items():
        assert value == pytest.approx(shuffled[name], abs=1e-9)
        assert 0 <= value <= {"nll": math.inf, "brier": 2 + 1e-12}.get(name, 1 + 1e-12)
    assert row["ece_15"] <= row["mce_15"] + 1e-12
    top_label(probs, labels)


@given(problems(), st.floats(0.1, 10.0))
@settings(deadline=None, max_examples=40)
def test_temperature_does_not_change_accuracy(problem, temperature):
    logits, labels = problem
    before, after = (
        all_metrics(logits.softmax(1), labels),
        all_metrics((logits / temperature).softmax(1), labels),
    )
    assert before["accuracy"] == after["accuracy"]
    assert before["per_class_accuracy"] == after["per_class_accuracy"]


def test_all_metrics_by_hand_with_an_absent_class():
    probs = torch.tensor([[0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    row = all_metrics(probs.half(), torch.tensor([0, 1, 1, 0]))
    assert row["accuracy"] == 0.75 and row["error"] == 0.25
    assert row["per_class_accuracy"] == [1.0, 0.5, None]
    assert row["nll"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25) + math.log(0.5)) / 4)
    assert row["brier"] == pytest.approx((0.125 + 1.125 + 0.125 + 0.375) / 4)
    assert row["ece_15"] == pytest.approx((abs(2.25 - 2) + 0.5) / 4)
    assert row["mce_15"] == pytest.approx(0.5)
    assert row["ece_10_left"] == row["ece_15"] == row["adaptive_ece_15"]
    assert list(row) == [
        "accuracy", "error", "ece_15", "ece_10_left", "adaptive_ece_15", "mce_15", "classwise_ece_15", "nll",
        "brier", "per_class_accuracy",
    ]  # fmt: skip


def test_all_metrics_of_one_class_are_perfect():
    row = all_metrics(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    assert row.pop("accuracy") == 1 and row.pop("per_class_accuracy") == [1.0]
    assert set(row.values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_moves_metrics_by_its_rounding_only(dtype):
    logits, labels = forecasts(3000, sharpen=1.5)
    probs = logits.softmax(1)
    exact, rounded = all_metrics(probs, labels), all_metrics(probs.to(dtype), labels)
    for name in ("accuracy", "ece_15", "ece_10_left", "adaptive_ece_15", "nll", "brier"):
        assert rounded[name] == pytest.approx(exact[name], abs=2 * torch.finfo(dtype).eps, rel=1e-5)


def test_fitted_temperature_of_a_two_class_forecaster_in_closed_form():
    """Logits +-a with a fraction q right: softmax confidence sigma(2a/T) = q at T = 2a / logit(q)."""
    logits = torch.tensor([[1.5, -1.5]], dtype=torch.float64).expand(10, 2)
    labels = (torch.arange(10) >= 8).long()
    assert fit_temperature(logits, labels) == pytest.approx(3.0 / math.log(4), rel=1e-9)


@pytest.mark.parametrize("sharpen", [0.3, 1.0, 4.0])
def test_fitted_temperature_minimises_the_nll(sharpen):
    logits, labels = forecasts(300, sharpen=sharpen, seed=3)

    def loss(log_t):
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels).item()

    fitted = fit_temperature(logits, labels)
    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    assert math.log(fitted) == pytest.approx(best.x, abs=1e-6)
    assert fitted / sharpen == pytest.approx(
        fit_temperature(logits / sharpen, labels), rel=1e-8
    )  # T scales along
    assert fit_temperature(logits.bfloat16(), labels) == pytest.approx(fitted, rel=0.01)


@given(problems())
@settings(deadline=None, max_examples=40)
def test_fitting_never_raises_the_nll_and_stays_in_its_bracket(problem):
    logits, labels = problem
    fitted = fit_temperature(logits, labels)
    assert 0.01 <= fitted <= 100
    after, before = (nll((logits / t).softmax(1), labels) for t in (fitted, 1.0))
    assert after <= before + 1e-12


def test_temperature_ends_of_the_bracket():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert fit_temperature(logits, torch.tensor([0, 1])) == 0.01  # all right: the sharper the better
    assert fit_temperature(logits, torch.tensor([1, 0])) == 100.0  # all wrong: the flatter the better


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    correct = torch.arange(400) < 300
    low, high = bootstrap_interval(
        lambda c, y: y.double().mean(), torch.ones(400), correct, n=2000, level=0.9
    )
    half = 1.645 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.005) and high == pytest.approx(0.75 + half, abs=0.005)


def test_bootstrap_interval_is_reproducible_and_takes_both_kinds_of_input():
    logits, labels = forecasts(100)
    probs = logits.softmax(1)
    first = bootstrap_interval(brier, probs, labels, n=50, seed=1)
    assert first == bootstrap_interval(brier, probs, labels, n=50, seed=1)
    assert first != bootstrap_interval(brier, probs, labels, n=50, seed=2)
    assert first[0] < brier(probs, labels).item() < first[1]
    wide, narrow = (
        bootstrap_interval(ece, *top_label(probs, labels), n=50, level=level) for level in (0.9, 0.5)
    )
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("measure", [all_metrics, classwise_ece, nll, brier, top_label])
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), r"scores are torch.float32 \(0, 3\)"),
        (torch.ones(2), torch.zeros(2, dtype=torch.long), r"scores are torch.float32 \(2,\)"),
        (torch.ones(2, 1), torch.zeros(3, dtype=torch.long), r"labels are torch.int64 \(3,\)"),
        (torch.ones(2, 1), torch.zeros(2), r"labels are torch.float32 \(2,\); they must be integers, \(2,\)"),
        (
            torch.ones(2, 1),
            torch.tensor([0, -1]),
            r"labels span -1 to 0, outside \[0, 1\): drop hidden labels",
        ),
        (torch.full((2, 1), 3.0), torch.tensor([0, 0]), "probabilities span 3 to 3; take the softmax"),
    ],
)
def test_wrong_probs_are_named(measure, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        measure(probs, labels)


def test_wrong_settings_are_named():
    none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"scores are torch.float32 \(0, 3\)"):
        fit_temperature(*none)
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        fit_temperature(torch.tensor([[math.inf, 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"the bracket is \[2, 1\]; it needs 0 < low < high"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([0]), low=2, high=1)
    with pytest.raises(ValueError, match="0 probs and 0 labels; both need the same number, at least 1"):
        bootstrap_interval(brier, *none)
    with pytest.raises(ValueError, match="n is 1 and level is 0.95"):
        bootstrap_interval(brier, torch.ones(2, 1), torch.zeros(2, dtype=torch.long), n=1)
    with pytest.raises(ValueError, match="n is 10 and level is 1.0"):
        bootstrap_interval(brier, torch.ones(2, 1), torch.zeros(2, dtype=torch.long), n=10, level=1.0)
    for measure in (adaptive_ece, mce):
        with pytest.raises(ValueError, match="confidence is torch.float32"):
            measure(torch.zeros(0), torch.zeros(0))
