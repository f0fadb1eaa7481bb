"""Thresholds, reliability and margins against loops over images with plain numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from figures.calibration import Margins, Predictions
from figures.explore import labels, panel
from figures.explore.labels import Mixtures, Reliability, Thresholds
from repro.data import splits
from repro.data.augment import Views
from repro.data.catalogue import SOURCES
from repro.measure import calibration
from repro.methods.few_labels.calibratemix import CalibrateMixSettings
from tests import fake_outputs
from tests.fake_margins import BASE, MIXED, write_pair
from tests.fake_outputs import texts
from tests.figures.explore.runs import COMMATCH, made

# Thresholds


def thresholds(n=60, classes=4, passes=5, seed=0, temperature=1.0):
    """Dropout passes that agree on some images and not on others; some truths are unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(1, n, classes, generator=generator)
    noise = torch.rand(1, n, 1, generator=generator) * torch.randn(passes, n, classes, generator=generator)
    truth = torch.randint(-1, classes, (n,), generator=generator)
    images = torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    names = tuple(f"class {k}" for k in range(classes))
    return made(Thresholds, passes=(logits + noise).softmax(dim=-1), truth=truth, images=images, classes=names,
                title="a run", start=(0.9, 0.05, 0.05, 0.05), temperature=temperature)  # fmt: skip


def selected(explorer, limits):
    """Positives as (image, label, p) and negatives as (image, class, p), one at a time."""
    positives, negatives = [], []
    passes = explorer.passes.double()
    for i in range(passes.shape[1]):
        mean = [float(passes[:, i, c].mean()) for c in range(passes.shape[2])]
        spread = [float(passes[:, i, c].std()) for c in range(passes.shape[2])]
        best = max(range(len(mean)), key=mean.__getitem__)
        if mean[best] >= limits[0] and spread[best] < limits[1]:
            positives.append((i, best, mean[best]))
        for c in range(len(mean)):
            if c != best and mean[c] < limits[2] and spread[c] < limits[3]:
                negatives.append((i, c, mean[c]))
    return positives, negatives


def binned_error(pairs):
    """ECE over 15 right-closed bins of (confidence, correct) pairs."""
    bins = {}
    for confidence, correct in pairs:
        bins.setdefault(math.ceil(confidence * 15) - 1, []).append(confidence - correct)
    return sum(abs(sum(gaps)) for gaps in bins.values()) / len(pairs)


@settings(max_examples=25)
@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 3))
def test_selections_and_their_quality_by_loops(t_p, s_p, t_n, s_n, seed):
    explorer, limits = thresholds(n=30, seed=seed), (t_p, s_p, t_n, s_n)
    seen = explorer.compute(*limits)
    positives, negatives = selected(explorer, limits)
    assert seen.mask.nonzero()[:, 0].tolist() == [i for i, _, _ in positives]
    assert seen.negative_mask.nonzero().tolist() == [[i, c] for i, c, _ in negatives]
    truth = explorer.truth.tolist()
    judged = (
        [(p, label == truth[i]) for i, label, p in positives if truth[i] >= 0],
        [(1 - p, c != truth[i]) for i, c, p in negatives if truth[i] >= 0],
    )
    rows = explorer.numbers(seen).rows
    for (_, count, *shares), found, pairs, total in zip(rows, (positives, negatives), judged, (30, 120), strict=True):
        assert count == f"{len(found)} of {total}"
        values = [len(found) / total]
        if pairs:
            values += [
                sum(y for _, y in pairs) / len(pairs),
                sum(c for c, _ in pairs) / len(pairs),
                binned_error(pairs),
            ]
        assert [float(share.rstrip(" %")) for share in shares[: len(values)]] == pytest.approx(
            [100 * value for value in values], abs=0.006
        )  # two decimals are shown
        assert shares[len(values) :] == ["none"] * (4 - len(values))


def test_a_temperature_of_negatives_flattens_them_but_spares_the_same_class():
    limits = (0.95, 0.05, 0.1, 0.5)
    plain, flat = thresholds().compute(*limits), thresholds(temperature=2.0).compute(*limits)
    tempered = thresholds().passes.sqrt()
    torch.testing.assert_close(flat.negative_mean, (tempered / tempered.sum(dim=-1, keepdim=True)).mean(dim=0))
    assert flat.negative_mask.sum() < plain.negative_mask.sum()
    assert not flat.negative_mask.gather(1, flat.label[:, None]).any() and torch.equal(flat.label, plain.label)


def test_without_passes_the_plain_prediction_is_perfectly_stable():
    explorer = thresholds(passes=1)
    seen = explorer.compute(0.9, 1e-9, 3e-4, 0.005)
    assert (seen.deviation == 0).all() and torch.equal(seen.mask, explorer.passes[0].max(dim=1).values >= 0.9)
    assert explorer.controls()["positive_stability"].disabled
    assert not thresholds().controls()["positive_stability"].disabled


def test_thresholds_start_at_those_of_the_last_epoch(tmp_path):
    def start(**changes):
        experiment = COMMATCH.with_(**changes)
        fake_outputs.write_run(tmp_path, experiment)
        return Thresholds(experiment, tmp_path)

    assert start(steps=60, epoch_steps=2).start == (0.95, 0.05, 3e-4, 0.005)
    assert start(steps=8, epoch_steps=2, positive_stability=0.1).start == pytest.approx((0.91, 0.1, 0.03, 0.005))
    free = start(stability="none").start
    assert (free[1], free[3]) == (0.53, 0.53) > (math.sqrt(10 / 9) / 2,) * 2
    fixmatch = start(method="fixmatch")
    assert fixmatch.start[0] in (0.9, 0.95) and fixmatch.start[1] == 0.05
    pool, _ = splits.open_pool(COMMATCH.split)
    assert torch.equal(fixmatch.images, pool.images[:40]) and fixmatch.classes == pool.classes
    assert panel.position(fixmatch.controls()) == pytest.approx(
        dict(zip(fixmatch.controls(), fixmatch.start, strict=True))
    )


# Reliability


def predicted(seed):
    generator = torch.Generator().manual_seed(seed)
    return Predictions(3 * torch.randn(80, 4, generator=generator), torch.randint(4, (80,), generator=generator), 2.0)


def reliability(predictions):
    probs = [predictions.probs(float(heat)) for heat in labels.SWEEP]
    along = [p.amax(1) for p in probs], [float(calibration.nll(p, predictions.labels)) for p in probs]
    return made(Reliability, runs={"a run": predictions}, along={"a run": along})


def by_loops(predictions, temperature, bins, closing, spacing):
    """Accuracy, ECE, MCE, NLL and Brier with plain loops over samples."""
    z = predictions.logits.double().numpy() / temperature
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    truth = predictions.labels.numpy()
    confidence, right = p.max(1), p.argmax(1) == truth
    if spacing == "mass":
        places = [rank * bins // len(p) for rank in range(len(p))]
        index = dict(zip(np.argsort(confidence, kind="stable").tolist(), places, strict=True))
    else:
        edge = math.floor if closing == "left" else lambda x: math.ceil(x) - 1
        index = {i: min(edge(confidence[i] * bins), bins - 1) for i in range(len(p))}
    gaps = {}
    for i, b in index.items():
        gaps.setdefault(b, []).append(confidence[i] - right[i])
    means = [(len(gap) / len(p), abs(np.mean(gap))) for gap in gaps.values()]
    ece, mce = sum(share * gap for share, gap in means), max(gap for _, gap in means)
    brier = ((p - np.eye(p.shape[1])[truth]) ** 2).sum(1).mean()
    return right.mean(), ece, mce, -np.log(p[np.arange(len(p)), truth]).mean(), brier


@settings(max_examples=20)
@given(
    st.floats(0.2, 8), st.integers(1, 50), st.sampled_from(["right", "left"]), st.sampled_from(["width", "mass"]),
    st.integers(0, 3),
)  # fmt: skip
def test_calibration_numbers_by_loops(temperature, bins, closing, spacing, seed):
    predictions = predicted(seed)
    seen = reliability(predictions).compute("a run", temperature, bins, closing, spacing)
    assert [row[:2] for row in seen.rows] == [("as trained", 1.0), ("here", temperature), ("fitted", 2.0)]
    for _, heat, accuracy, ece, adaptive, mce, nll, brier in seen.rows:
        expected = by_loops(predictions, heat, bins, closing, spacing)
        assert (accuracy, ece, mce, nll, brier) == pytest.approx(expected, abs=1e-9)
        confidence, correct = calibration.top_label(predictions.probs(heat), predictions.labels)
        assert adaptive == pytest.approx(float(calibration.adaptive_ece(confidence, correct, bins)))
    assert seen.bins.count.sum() == 80
    assert labels.SWEEP[20] == pytest.approx(1.0)
    for place in (0, 20, 40):
        _, ece, _, nll, _ = by_loops(predictions, float(labels.SWEEP[place]), bins, closing, spacing)
        assert (seen.ece[place], seen.nll[place]) == pytest.approx((ece, nll), abs=1e-9)


# Margins


def mixtures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=generator)
    label, truth = torch.randint(3, (n,), generator=generator), torch.randint(-1, 3, (n,), generator=generator)
    margins = dict.fromkeys(labels.KINDS, Margins(torch.arange(n) + 5, score, label, truth, "APM"))
    images = torch.randint(256, (n + 5, 1, 28, 28), generator=generator).byte()
    return made(Mixtures, margins=margins, images=images, plain=Views((0.5,), (0.5,), flip=False), classes=tuple("abc"),
                settings=CalibrateMixSettings(), sizes=(4, 8), title="a run")  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 100), st.integers(0, 4))
def test_images_around_a_percentile_and_shares_of_right_labels_by_loops(n, percentile, seed):
    explorer = mixtures(n, seed)
    margins = explorer.margins["labelled"]
    seen = explorer.compute("labelled", percentile, 0.5, 0, "random", 3)
    order = sorted(range(n), key=lambda i: float(margins.score[i]))
    middle, shown = order[round(percentile / 100 * (n - 1))], min(24, n)
    places = (seen.images.index - 5).tolist()
    first = order.index(places[0])
    assert places == order[first : first + shown] and middle in places and seen.score == float(margins.score[middle])
    parts = {"shown": places, "harder": order[:first], "easier": order[first + shown :]}
    for name, part in parts.items():
        known = [int(margins.label[i]) == int(margins.truth[i]) for i in part if margins.truth[i] >= 0]
        assert seen.shares[name] == pytest.approx(sum(known) / len(known) if known else math.nan, nan_ok=True)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    write_pair(root)
    with pytest.raises(panel.Missing, match="margins"):
        Mixtures(BASE, root)
    return Mixtures(MIXED, root)


def test_mixups_cross_both_divides_with_the_least_alike_of_the_half(mixed):
    pool, source = splits.open_pool(MIXED.split)[0], SOURCES["fashion"]
    assert torch.equal(mixed.images, pool.images) and mixed.classes == pool.classes and mixed.sizes == (10, 50)
    first, second = mixed.mixups(3, "dissimilar", 1)
    assert (first.halves, second.halves) == (("easy", "hard"), ("hard", "easy"))
    assert first.labelled.score.min() >= second.labelled.score.max()
    assert len(first.labelled.index) == len(second.labelled.index) == 5
    mean, std = (torch.tensor(values).double().view(-1, 1, 1) for values in (source.mean, source.std))

    def cosine(i, j):
        a, b = (((mixed.images[k].double() / 255 - mean) / std).flatten() for k in (i, j))
        return float(a @ b / (a.norm() * b.norm()))

    for mixup in (first, second):
        pairs = list(zip(mixup.labelled.index.tolist(), mixup.unlabelled.index.tolist(), strict=True))
        assert mixup.similarity == pytest.approx(sum(cosine(i, j) for i, j in pairs) / len(pairs), abs=1e-4)
        assert mixup.similarity < mixup.candidates
    assert mixed.mixups(3, "similar", 1)[0].similarity > first.candidates


def test_mixups_follow_from_the_seed_and_leave_the_callers_generator_alone(mixed):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, same, other = (mixed.mixups(seed, "dissimilar", 15)[0].unlabelled.index for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected) and torch.equal(first, same) and not torch.equal(first, other)


def test_too_few_margins_mix_nothing(mixed):
    none = mixed.margins["unlabelled"].only(torch.arange(0))
    early = made(Mixtures, **vars(mixed) | {"margins": mixed.margins | {"unlabelled": none}})
    seen = early.compute("unlabelled", 5, 0.5, 0, "random", 15)
    assert seen.mixups == [] and "warm-up was not over" in early.numbers(seen).heading
    figure = Figure()
    early.draw(early.layout(figure), seen)
    assert "no mixtures" in texts(figure)
    hard = made(Mixtures, **vars(mixed) | {"settings": CalibrateMixSettings(pairing="hard-hard")})
    assert [mixup.halves for mixup in hard.mixups(0, "random", 15)] == [("hard", "hard")]
