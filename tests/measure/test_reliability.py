"""Reliability bins against plain loops, hand-placed edges and torchmetrics; running sums against the bins."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchmetrics.functional.classification import binary_calibration_error

from repro.measure.reliability import ReliabilitySums, bin_index, reliability

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
unit_floats = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, 0.5, 0.2, 1 / 15, 14 / 15])


@st.composite
def pairs(draw):
    n = draw(st.integers(1, 40))
    confidence = draw(hnp.arrays(np.float32, n, elements=unit_floats.map(lambda x: float(np.float32(x)))))
    correct = draw(hnp.arrays(np.bool_, n))
    return torch.from_numpy(confidence), torch.from_numpy(correct)


def bins_by_loop(confidence, correct, bins, closing):
    """(count, confidence sum, correct sum) of each bin, one sample and one comparison at a time."""
    edges = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(confidence.dtype).tolist()
    found = np.zeros((3, bins))
    for c, y in zip(confidence.tolist(), correct.tolist(), strict=True):
        for b in range(bins):
            low, high = edges[b], edges[b + 1]
            inside = (
                low < c <= high if closing == "right" else low <= c < high or (b == bins - 1 and c == high)
            )
            if inside:
                found[:, b] += 1, c, y
    return found


@given(pairs(), st.integers(1, 20), st.sampled_from(["right", "left"]))
@settings(deadline=None)
def test_equal_width_bins_equal_the_loop(data, bins, closing):
    confidence, correct = data
    found = reliability(confidence, correct, bins, closing)
    count, confidences, corrects = bins_by_loop(confidence, correct, bins, closing)
    assert found.count.tolist() == count.tolist() and found.total == len(confidence)
    filled = count > 0
    np.testing.assert_allclose(found.confidence[filled], confidences[filled] / count[filled], atol=1e-12)
    np.testing.assert_allclose(found.accuracy[filled], corrects[filled] / count[filled], atol=1e-12)
    assert found.confidence[~filled].isnan().all() and found.accuracy[~filled].isnan().all()
    gaps = np.abs(confidences - corrects)
    np.testing.assert_allclose(found.ece, gaps.sum() / len(confidence), atol=1e-12)
    np.testing.assert_allclose(found.mce, max(gaps[filled] / count[filled], default=0), atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_every_precision_obey_the_closing(dtype):
    """k/15 as the dtype writes it is the edge itself, and its two neighbours lie on either side."""
    edges = (torch.arange(16, dtype=torch.float64) / 15).to(dtype)
    assert bin_index(edges, 15, "right").tolist() == list(range(-1, 15))
    assert bin_index(edges, 15, "left").tolist() == [*range(15), 14]
    inner, eps = edges[1:-1].double(), torch.finfo(dtype).eps
    above, below = (inner * (1 + eps)).to(dtype), (inner * (1 - eps)).to(dtype)
    for closing in ("right", "left"):
        assert bin_index(above, 15, closing).tolist() == list(range(1, 15))
        assert bin_index(below, 15, closing).tolist() == list(range(14))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_rounds_to_one_is_in_the_last_bin(dtype):
    nearly = torch.tensor([1 - 1e-9], dtype=torch.float64).to(dtype)
    for closing in ("right", "left"):
        assert bin_index(nearly, 15, closing).tolist() == [14]
    assert reliability(nearly, torch.tensor([False])).ece.item() == pytest.approx(float(nearly))


def test_confidence_zero_is_never_binned_at_the_right_yet_counts_in_the_total():
    confidence, correct = torch.tensor([0.0, 0.0, 0.9, 0.9]), torch.tensor([True, True, True, True])
    right, left = (reliability(confidence, correct, 10, closing) for closing in ("right", "left"))
    assert right.count.sum() == 2 and right.total == 4 and left.count[0] == 2
    assert right.ece.item() == pytest.approx(0.5 * 0.1, abs=1e-7)
    assert left.ece.item() == pytest.approx(0.5 * 0.1 + 0.5 * 1.0, abs=1e-7)
    assert reliability(torch.zeros(3), torch.ones(3), 5).mce == 0  # nothing binned at all


@pytest.mark.parametrize(("norm", "measure"), [("l1", "ece"), ("max", "mce")])
def test_torchmetrics_agrees_away_from_the_edges(norm, measure):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(3000, generator=generator) * 0.998 + 0.001
    correct = torch.rand(3000, generator=generator) < confidence**2
    expected = binary_calibration_error(confidence, correct.long(), n_bins=15, norm=norm)
    for closing in ("right", "left"):
        found = getattr(reliability(confidence, correct, 15, closing), measure)
        torch.testing.assert_close(found.float(), expected, atol=1e-6, rtol=1e-5)


def test_torchmetrics_closes_at_the_left_and_sets_confidence_one_apart():
    quarters = torch.tensor([0.25, 0.5, 0.5, 0.6, 0.75]), torch.tensor([1, 0, 0, 1, 1])
    left, right = (reliability(*quarters, 4, closing).ece.float() for closing in ("left", "right"))
    torchmetrics = binary_calibration_error(*quarters, n_bins=4)
    torch.testing.assert_close(left, torchmetrics)
    assert left.item() == pytest.approx((0.75 + 0.6 + 0.25) / 5)
    assert right.item() == pytest.approx((0.75 + 1.0 + 0.65) / 5)
    ones = torch.tensor([1.0, 0.8]), torch.tensor([0, 1])  # (1.8 - 1) / 2 in one bin, (1 + .2) / 2 in two
    assert reliability(*ones, 4, "left").ece.item() == pytest.approx(0.4)
    assert binary_calibration_error(*ones, n_bins=4).item() == pytest.approx(0.6)


def test_equal_mass_without_ties_is_array_split_of_the_sorted_sample():
    generator = torch.Generator().manual_seed(0)
    confidence, correct = torch.rand(60, generator=generator), torch.rand(60, generator=generator) < 0.5
    found = reliability(confidence, correct, 6, spacing="mass")
    order = confidence.argsort()
    for b, members in enumerate(np.array_split(order.numpy(), 6)):
        chosen = confidence[members].double()
        assert found.count[b] == 10
        torch.testing.assert_close(found.confidence[b], chosen.mean())
        torch.testing.assert_close(found.accuracy[b], correct[members].double().mean())
        assert found.lower[b] == chosen.min() and found.upper[b] == chosen.max()


@given(st.integers(1, 60), st.integers(1, 20))
def test_equal_mass_spreads_the_remainder(n, bins):
    count = reliability(torch.linspace(0.1, 0.9, n), torch.ones(n), bins, spacing="mass").count
    assert count.sum() == n and count.max() - count.min() <= 1


@given(pairs(), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_equal_mass_keeps_ties_together_whatever_their_order(data, bins, random):
    confidence, correct = data
    confidence = (confidence * 4).round() / 4  # many ties
    order = random.sample(range(len(confidence)), len(confidence))
    found = reliability(confidence, correct, bins, spacing="mass")
    shuffled = reliability(confidence[order], correct[order], bins, spacing="mass")
    assert found.count.tolist() == shuffled.count.tolist() and found.count.sum() == len(confidence)
    torch.testing.assert_close(found.ece, shuffled.ece, atol=1e-12, rtol=0)
    filled = found.count > 0
    lower, upper = found.lower[filled], found.upper[filled]
    assert (lower[1:] > upper[:-1]).all()  # intervals are disjoint: no tie straddles
    assert found.lower[~filled].isnan().all()


def test_equal_mass_of_one_value_is_one_bin():
    found = reliability(torch.full((7,), 0.6), torch.ones(7), 3, spacing="mass")
    assert found.count.tolist() == [0, 7, 0] and found.ece.item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(0), torch.zeros(0)),
            r"confidence is torch.float32 \(0,\); it must be floating, \(n > 0,\)",
        ),
        ((torch.ones(2, 1), torch.ones(2, 1)), r"confidence is torch.float32 \(2, 1\)"),
        ((torch.ones(2, dtype=torch.long), torch.ones(2)), "confidence is torch.int64"),
        ((torch.ones(2), torch.ones(3)), r"correct is \(3,\); it must be \(2,\)"),
        ((torch.tensor([0.1, 1.2]), torch.ones(2)), "probabilities span 0.1 to 1.2; take the softmax"),
        ((torch.tensor([0.1, torch.nan]), torch.ones(2)), "probabilities span nan to nan"),
        ((torch.ones(2), torch.ones(2), 0), "bins is 0; it must be at least 1"),
        ((torch.ones(2), torch.ones(2), 5, "both"), "closing is 'both'; it must be 'right' or 'left'"),
        ((torch.ones(2), torch.ones(2), 5, "left", "log"), "spacing is 'log'; it must be 'width' or 'mass'"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        reliability(*arguments)


@given(pairs(), st.integers(1, 20), st.sampled_from(["right", "left"]))
@settings(deadline=None)
def test_running_sums_with_a_mask_equal_the_bins_of_the_selected(data, bins, closing):
    confidence, correct = data
    mask = torch.arange(len(confidence)) % 3 != 0
    sums = ReliabilitySums(bins, closing)
    for start in range(0, len(confidence), 7):
        part = slice(start, start + 7)
        sums.add(confidence[part], correct[part], mask[part])
    read = sums.read()
    assert read["coverage"] == pytest.approx(mask.double().mean().item())
    if not mask.any():
        assert read["accuracy"] is read["confidence"] is read["ece"] is None
        return
    expected = reliability(confidence[mask], correct[mask], bins, closing)
    assert read["ece"] == pytest.approx(expected.ece.item(), abs=1e-12)
    assert read["accuracy"] == pytest.approx(correct[mask].double().mean().item())
    assert read["confidence"] == pytest.approx(confidence[mask].double().mean().item())


def test_running_sums_with_soft_weights_by_hand():
    sums = ReliabilitySums(2)
    sums.add(torch.tensor([0.9, 0.8, 0.4]), torch.tensor([True, False, True]), torch.tensor([1.0, 0.5, 0.5]))
    read = sums.read()
    assert read["coverage"] == pytest.approx(2 / 3)
    assert read["accuracy"] == pytest.approx(1.5 / 2)
    assert read["confidence"] == pytest.approx((0.9 + 0.4 + 0.2) / 2)
    assert read["ece"] == pytest.approx((abs(1.3 - 1.0) + abs(0.2 - 0.5)) / 2)


def test_running_sums_reset_and_travel_in_a_state_dict():
    first, second = ReliabilitySums(), ReliabilitySums()
    batch = torch.tensor([0.3, 0.95]), torch.tensor([False, True]), torch.tensor([True, True])
    first.add(*batch)
    second.load_state_dict(first.state_dict())
    first.add(*batch)
    second.add(*batch)
    assert first.read() == second.read()
    assert first.read() == {"coverage": None, "accuracy": None, "confidence": None, "ece": None}


def test_running_sums_accept_half_precision_and_count_beyond_float32():
    sums = ReliabilitySums()
    confidence = torch.full((1000,), 0.75, dtype=torch.bfloat16)
    sums.sums[0, 12] = 2.0**24  # from here on float32 could not count in ones
    sums.offered += 2.0**24
    sums.add(confidence, torch.ones(1000, dtype=torch.bool), torch.ones(1000, dtype=torch.bool))
    assert sums.sums[0].sum() == 2.0**24 + 1000
    assert sums.read()["coverage"] == 1.0


def test_running_sums_never_wait_for_the_device():
    """On the meta device any copy to the host raises."""
    with torch.device("meta"):
        sums = ReliabilitySums()
        sums.add(torch.rand(8), torch.ones(8, dtype=torch.bool), torch.rand(8))
    with pytest.raises((RuntimeError, NotImplementedError)):
        sums.read()
