"""ComMatch: thresholds against a table, selections and losses against loops, each setting by what it changes."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repro.methods.few_labels.commatch import (
    ComMatch,
    ComMatchSettings,
    instability,
    negative_loss,
    positive_loss,
    select_negative,
    select_positive,
    thresholds,
)
from repro.settings import SettingError
from repro.train import Now
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    cross_entropy,
    gradient_reaches,
    items,
    softmax,
    view,
)

# epoch 0 ... 20, computed by hand from "every 3 epochs .01 up to .95, a tenth down to .0003"
POSITIVE = [0.90] * 3 + [0.91] * 3 + [0.92] * 3 + [0.93] * 3 + [0.94] * 3 + [0.95] * 6
NEGATIVE = [0.3] * 3 + [0.03] * 3 + [0.003] * 3 + [0.0003] * 12


@pytest.mark.parametrize("moving_positive", [True, False])
@pytest.mark.parametrize("moving_negative", [True, False])
def test_thresholds_follow_the_table_or_stay_at_their_ends(moving_positive, moving_negative):
    settings = ComMatchSettings(moving_positive=moving_positive, moving_negative=moving_negative)
    got = [thresholds(settings, epoch) for epoch in range(21)]
    assert [t_p for t_p, _ in got] == pytest.approx(POSITIVE if moving_positive else [0.95] * 21, rel=1e-12)
    assert [t_n for _, t_n in got] == pytest.approx(NEGATIVE if moving_negative else [3e-4] * 21, rel=1e-12)
    assert thresholds(settings, 10**6) == (0.95, 3e-4)


@given(st.integers(2, 12), st.booleans(), st.integers(0, 10_000))
def test_instability_is_numpys_deviation_and_bounded(passes, unbiased, seed):
    probs = np.random.default_rng(seed).dirichlet([0.1] * 4, size=(passes, 5))
    mean, deviation = instability(torch.tensor(probs), unbiased)
    np.testing.assert_allclose(mean, probs.mean(0), atol=1e-12)
    np.testing.assert_allclose(deviation, probs.std(0, ddof=int(unbiased)), atol=1e-7)
    assert (deviation <= (math.sqrt(passes / (passes - 1)) if unbiased else 1) / 2 + 1e-12).all()


def select_by_loops(mean, deviation, t_p, s_p, t_n, s_n):
    positives, negatives = [], []
    for row, spread in zip(mean, deviation, strict=True):
        best = max(range(len(row)), key=lambda c: (row[c], -c))
        positives.append((best, row[best] >= t_p and spread[best] < s_p))
        negatives.append([c != best and row[c] < t_n and spread[c] < s_n for c in range(len(row))])
    return positives, negatives


@given(st.integers(1, 6), st.sampled_from([2, 3, 10, 100]), st.integers(0, 10_000))
def test_selections_are_those_of_loops(n, classes, seed):
    """Values on a coarse grid that includes the thresholds, so that ties and equalities are common."""
    rng = np.random.default_rng(seed)
    mean = torch.tensor(rng.choice([0.0, 0.03, 0.3, 0.9, 0.95], (n, classes)), dtype=torch.float32)
    deviation = torch.tensor(rng.choice([0.0, 0.004, 0.005, 0.05], (n, classes)), dtype=torch.float32)
    limits = [float(np.float32(x)) for x in (0.9, 0.05, 0.3, 0.005)]
    positives, negatives = select_by_loops(mean.tolist(), deviation.tolist(), *limits)
    label, mask, confidence = select_positive(mean, deviation, 0.9, 0.05)
    assert list(zip(label.tolist(), mask.tolist(), strict=True)) == positives
    assert torch.equal(confidence, mean.amax(1))
    assert select_negative(mean, deviation, 0.3, 0.005).tolist() == negatives


def negative_by_loops(logits, mask, mean_over):
    total, having = 0.0, 0
    for row, marks in zip(softmax(logits), mask, strict=True):
        terms = [-math.log(max(1 - p, 1e-7)) for p, m in zip(row, marks, strict=True) if m]
        total += sum(terms) / len(terms) if terms else 0.0
        having += bool(terms)
    return total / (len(mask) if mean_over == "batch" else max(1, having))


@given(st.integers(1, 6), st.sampled_from([2, 3, 100]), st.sampled_from(["batch", "selected"]), st.integers(0, 10_000))
def test_losses_are_those_of_loops(n, classes, mean_over, seed):
    rng = np.random.default_rng(seed)
    logits, label = rng.normal(size=(n, classes)) * 4, rng.integers(classes, size=n)
    weight, mask = rng.choice([0.0, 0.3, 1.0], n), rng.random((n, classes)) < rng.choice([0, 0.3, 1])
    got = negative_loss(torch.tensor(logits), torch.tensor(mask), mean_over).item()
    assert got == pytest.approx(negative_by_loops(logits, mask, mean_over), rel=1e-9, abs=1e-12)
    divisor = n if mean_over == "batch" else max(1, (weight > 0).sum())
    got = positive_loss(torch.tensor(logits), torch.tensor(label), torch.tensor(weight), mean_over).item()
    assert got == pytest.approx((weight * cross_entropy(logits, label)).sum() / divisor, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mean_over", ["batch", "selected"])
def test_losses_have_the_gradients_of_their_values(mean_over):
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    label, weight = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64)
    mask = torch.rand(5, 4) < 0.5
    mask[1] = False
    assert torch.autograd.gradcheck(lambda z: positive_loss(z, label, weight, mean_over), (logits,))
    assert torch.autograd.gradcheck(lambda z: negative_loss(z, mask, mean_over), (logits,))


@pytest.mark.parametrize("mean_over", ["batch", "selected"])
def test_nothing_selected_is_exactly_zero_with_zero_gradients(mean_over):
    logits = (torch.randn(5, 4) * 100).requires_grad_()
    none = torch.zeros(5, dtype=torch.bool)
    loss = positive_loss(logits, torch.zeros(5, dtype=torch.int64), none, mean_over)
    loss = loss + negative_loss(logits, torch.zeros(5, 4, dtype=torch.bool), mean_over)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum().item() == 0


def test_a_certain_prediction_of_a_wrong_class_costs_the_clamp():
    logits = torch.tensor([[500.0, 0.0, 0.0]], requires_grad=True)
    loss = negative_loss(logits, torch.tensor([[True, False, False]]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-7), rel=1e-6) and torch.isfinite(logits.grad).all()


# The method on fakes


def build(dropout=0.5, **changes):
    return ComMatch(ComMatchSettings(**changes), TinyNetwork(dropout), FakeViews(), CLASSES, 10)


def at(epoch):
    return Now(epoch, 1000, epoch, 0, None)


LOOSE = {"moving_positive": False, "positive_end": 0.4, "moving_negative": False, "negative_end": 0.35}
LOOSE |= {"positive_stability": 0.066, "negative_stability": 0.025}


def expected_step(settings, epoch, samples, weigh=lambda label: 1.0):
    """Terms and selections of one step, recomputed: numpy and loops after the network's outputs, at seed 5."""
    unlabelled = view(samples["unlabelled"].images)
    labelled = view(samples["labelled"].images, draw=1)
    network = TinyNetwork(0.5).train()
    torch.manual_seed(5)
    # With gradients, as in training: without them PyTorch draws its dropout masks otherwise.
    logits = network(torch.cat([labelled, unlabelled, -unlabelled])).detach().numpy()
    with torch.no_grad():
        network.eval()
        network.body[3].train()
        passes = np.stack([network(unlabelled).numpy() for _ in range(settings.passes)])
    probs, tempered = softmax(passes), softmax(passes / settings.negative_temperature)
    t_p, t_n = thresholds(settings, epoch)
    off = settings.stability != "dropout"
    s_p, s_n = (math.inf if off else s for s in (settings.positive_stability, settings.negative_stability))
    ddof = int(settings.unbiased)
    positives, _ = select_by_loops(probs.mean(0), probs.std(0, ddof=ddof), t_p, s_p, t_n, s_n)
    _, negatives = select_by_loops(tempered.mean(0), tempered.std(0, ddof=ddof), t_p, s_p, t_n, s_n)
    if settings.negatives_for == "unselected":
        negatives = [[m and not on for m in row] for row, (_, on) in zip(negatives, positives, strict=True)]
    strong, labels = logits[12:], [label for label, _ in positives]
    weight = np.array([on * weigh(i) for i, (_, on) in enumerate(positives)])
    divisor = 8 if settings.positive_mean == "batch" else max(1, (weight > 0).sum())
    terms = {
        "supervised": cross_entropy(logits[:4], samples["labelled"].labels).mean(),
        "positive": settings.positive_weight * (weight * cross_entropy(strong, np.array(labels))).sum() / divisor,
        "negative": settings.negative_weight * negative_by_loops(strong, negatives, settings.negative_mean),
    }
    return terms, positives, negatives


VARIATIONS = [
    {},
    {"positive_weight": 2.0},
    {"negative_weight": 0.0},
    {"passes": 3},
    {"unbiased": False},
    {"stability": "none"},
    {"negative_temperature": 2.0},
    {"negatives_for": "unselected"},
    {"positive_mean": "selected"},
    {"negative_mean": "selected"},
    {"positive_stability": 0.05},
    {"negative_stability": 0.045},
    {"moving_positive": True, "positive_start": 0.35, "positive_end": 0.9},
    {"moving_negative": True, "negative_start": 0.9, "negative_end": 0.01},
]


@pytest.mark.parametrize("change", VARIATIONS, ids=str)
@pytest.mark.parametrize("epoch", [0, 7])
def test_a_step_is_what_its_settings_say(change, epoch):
    method, samples = build(**LOOSE | change), batch()
    torch.manual_seed(5)
    losses = method.losses(samples, at(epoch))
    terms, positives, negatives = expected_step(method.settings, epoch, samples)
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(terms, rel=1e-4, abs=1e-6)
    positive, negative = losses.pseudo["positive"], losses.pseudo["negative"]
    assert list(zip(positive.label.tolist(), positive.mask.tolist(), strict=True)) == positives
    assert negative.mask.tolist() == negatives
    assert negative.label.tolist() == [[0, 1, 2]] * 8 and positive.index.tolist() == negative.index.tolist()


def test_confidences_are_those_of_the_means():
    method, samples = build(**LOOSE), batch()
    torch.manual_seed(5)
    pseudo = method.losses(samples, at(0)).pseudo
    torch.testing.assert_close(pseudo["positive"].confidence, 1 - pseudo["negative"].confidence.amin(1))


def test_label_consistency_is_an_average_of_repeated_argmaxes():
    method = build(stability="labels", consistency_decay=0.75)
    history = {3: [1, 1, 1, 2, 2], 7: [0, 0, 1, 0, 0]}
    expected, weights = {3: 0.0, 7: 0.0}, []
    for step in range(5):
        labels = torch.tensor([history[3][step], history[7][step]])
        weight = method.label_weight(torch.tensor([3, 7]), labels)
        for i in (3, 7):
            same = step > 0 and history[i][step] == history[i][step - 1]
            expected[i] = 0.75 * expected[i] + 0.25 * same
        assert weight.tolist() == pytest.approx(list(expected.values()))
        weights.append(weight)
    assert weights[0].tolist() == [0, 0] and method.consistency.count_nonzero() == 2
    assert method.last_label.tolist() == [-1, -1, -1, 2, -1, -1, -1, 0, -1, -1]


def test_label_consistency_weighs_positives_and_drops_the_dropout_test():
    method, samples = build(**LOOSE | {"stability": "labels"}), batch()
    method.consistency[:] = torch.linspace(0, 0.9, 10)
    before = method.consistency.clone()
    torch.manual_seed(5)
    losses = method.losses(samples, at(0))
    terms, positives, negatives = expected_step(method.settings, 0, samples, lambda i: 0.9 * before[i].item())
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(terms, rel=1e-4, abs=1e-6)
    assert losses.pseudo["negative"].mask.tolist() == negatives
    assert {"last_label", "consistency"} <= set(method.state_dict())


def test_label_consistency_state_stays_untouched_otherwise():
    method = build(**LOOSE)
    before = copy.deepcopy(method.state_dict())
    method.losses(batch(), at(0))
    assert torch.equal(before["last_label"], method.last_label)
    assert torch.equal(before["consistency"], method.consistency)


@pytest.mark.parametrize("stability", ["dropout", "labels", "none"])
def test_a_network_without_dropout_is_refused_when_the_method_is_built(stability):
    with pytest.raises(SettingError, match=r"dropout passes, and the network has none: set dropout > 0"):
        build(dropout=0.0, stability=stability)


def test_passes_leave_modes_and_batch_statistics_alone():
    """One batch-norm update a step: that of the concatenated views."""
    method = build(**LOOSE).train()
    method.losses(batch(), at(0))
    assert all(module.training for module in method.modules())
    assert method.network.body[2].num_batches_tracked.item() == 1


def test_gradients_reach_the_network_through_the_strong_view_only():
    method, samples = build(**LOOSE), batch()
    terms = method.losses(samples, at(0)).terms
    assert all(gradient_reaches(term, method.network.parameters()) for term in terms.values())
    table = torch.nn.Parameter(torch.randn(20, CLASSES))
    method.network.forward = lambda images: table[: len(images)]
    terms = method.losses(samples, at(0)).terms
    for name in ("positive", "negative"):
        (gradient,) = torch.autograd.grad(terms[name], table, retain_graph=True)
        assert gradient[:12].abs().sum() == 0 and gradient[12:].abs().sum() > 0


def test_ctaugment_gets_its_labelled_probe():
    method, samples = build(), {"labelled": items(4, 1), "unlabelled": items(8, 2)}
    method.losses(samples, at(0))
    ((_, images, labels),) = method.views.learnt
    assert torch.equal(images, samples["labelled"].images) and torch.equal(labels, samples["labelled"].labels)
