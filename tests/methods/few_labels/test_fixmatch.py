"""FixMatch, FlexMatch, FreeMatch and SoftMatch: selection, state and losses against numpy over several steps."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels.common import consistency_loss, pseudo_label
from repro.methods.few_labels.fixmatch import (
    FixMatch,
    FixMatchSettings,
    FlexMatch,
    FlexMatchSettings,
    FreeMatch,
    FreeMatchSettings,
    SoftMatch,
    SoftMatchSettings,
    fairness_loss,
    flexible_threshold,
    gaussian_weight,
    learning_status,
    remember,
    self_adaptive_threshold,
)
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    cross_entropy,
    gradient_reaches,
    now,
    softmax,
    three_view_logits,
)

# FixMatch


def test_pseudo_label_is_argmax_and_max_softmax_without_gradient():
    logits = torch.randn(6, 4, requires_grad=True)
    label, confidence = pseudo_label(logits)
    probs = softmax(logits.detach())
    assert label.tolist() == probs.argmax(axis=1).tolist()
    np.testing.assert_allclose(confidence, probs.max(axis=1), rtol=1e-6)
    assert not label.requires_grad and not confidence.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 10_000))
def test_consistency_loss_averages_over_all_samples(n, classes, seed):
    rng = np.random.default_rng(seed)
    logits, label = rng.normal(size=(n, classes)) * 4, rng.integers(classes, size=n)
    mask = rng.random(n) < 0.5
    total = 0.0
    for row in range(n):
        if mask[row]:
            total += cross_entropy(logits[row : row + 1], label[row : row + 1])[0]
    got = consistency_loss(torch.tensor(logits), torch.tensor(label), torch.tensor(mask))
    assert got.item() == pytest.approx(total / n, rel=1e-9, abs=1e-12)


def test_consistency_loss_gradcheck():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    label, weight = (
        torch.tensor([0, 1, 2, 3, 0]),
        torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0], dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda z: consistency_loss(z, label, weight), (logits,))


def build_fixmatch(**changes):
    return FixMatch(FixMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("threshold", [0.0, 0.55, 0.99])
def test_losses_of_a_step_of_fixmatch(threshold):
    method, samples = build_fixmatch(threshold=threshold, unlabelled_weight=2.5), batch()
    losses = method.losses(samples, now())
    # Drawn in this order: weak unlabelled, weak labelled, strong (negated); one forward of all three.
    logits = three_view_logits(samples)
    own, weak, strong = logits[:4], softmax(logits[4:12]), logits[12:]
    selected = [max(row) >= threshold for row in weak]
    consistency = sum(c for c, s in zip(cross_entropy(strong, weak.argmax(1)), selected, strict=True) if s) / 8
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(own, samples["labelled"].labels).mean(), rel=1e-5
    )
    assert losses.terms["consistency"].item() == pytest.approx(2.5 * consistency, rel=1e-5)
    positive = losses.pseudo["positive"]
    assert positive.mask.tolist() == selected and positive.label.tolist() == weak.argmax(1).tolist()
    assert positive.index.tolist() == list(range(8))
    np.testing.assert_allclose(positive.confidence, weak.max(1), rtol=1e-5)


def test_the_weak_view_teaches_but_is_not_taught():
    # A network that is a table of logits by position shows which view receives a gradient.
    table = torch.nn.Parameter(torch.randn(20, CLASSES))
    network = torch.nn.Module()
    network.forward = lambda images: table[: len(images)]
    method = FixMatch(FixMatchSettings(threshold=0.0), network, FakeViews(), CLASSES, 10)
    (gradient,) = torch.autograd.grad(method.losses(batch(), now()).terms["consistency"], table)
    assert gradient[:12].abs().sum() == 0 and (gradient[12:].abs().sum(dim=1) > 0).all()


# FlexMatch


def counted_status(selected, classes, warmup):
    """The toolboxes' way: count, divide by the largest count (unset samples compete only during warm-up)."""
    counts = Counter(selected)
    rivals = [counts[k] for k in range(classes)] + ([counts[-1]] if warmup else [])
    largest = max(rivals)
    return [counts[k] / largest if largest else 0.0 for k in range(classes)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.booleans())
def test_learning_status_counts(selected, warmup):
    got = learning_status(torch.tensor(selected), 5, warmup)
    np.testing.assert_allclose(got, counted_status(selected, 5, warmup), rtol=1e-6)
    assert ((got >= 0) & (got <= 1)).all()


def test_learning_status_of_nothing_and_of_everything():
    assert learning_status(torch.full((7,), -1), 3).tolist() == [0, 0, 0]
    assert learning_status(torch.full((7,), -1), 3, threshold_warmup=False).tolist() == [0, 0, 0]
    assert learning_status(torch.full((7,), 2), 3).tolist() == [0, 0, 1]


def test_flexible_threshold_is_convex_and_ends_at_tau():
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    tau = flexible_threshold(beta, 0.95)
    assert tau[0] == 0 and tau[-1] == pytest.approx(0.95) and (tau.diff() > 0).all() and (tau.diff().diff() > 0).all()
    assert tau[10].item() == pytest.approx(0.95 / 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_remember_writes_in_order_of_the_batch(seed, size):
    rng = np.random.default_rng(seed)
    before = rng.integers(-1, 3, size=6)
    index, label, confident = rng.integers(6, size=size), rng.integers(3, size=size), rng.random(size) < 0.5
    expected = before.copy()
    for i, k, sure in zip(index, label, confident, strict=True):
        if sure:
            expected[i] = k
    got = remember(*(torch.tensor(v) for v in (before, index, label, confident)))
    assert got.tolist() == expected.tolist()


def build_flexmatch(pool_size=8, **changes):
    return FlexMatch(FlexMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, pool_size)


@pytest.mark.parametrize("warmup", [True, False])
def test_masks_over_several_steps_use_the_status_before_the_step(warmup):
    method, rng = build_flexmatch(threshold=0.6, threshold_warmup=warmup), np.random.default_rng(0)
    memory, seen = [-1] * 8, set()
    for _ in range(12):
        index, label = rng.integers(8, size=6), rng.integers(CLASSES, size=6)  # duplicates on purpose
        confidence = rng.random(6).astype(np.float32)
        beta = counted_status(memory, CLASSES, warmup)
        expected = [p >= 0.6 * beta[k] / (2 - beta[k]) for p, k in zip(confidence, label, strict=True)]
        got = method.select(torch.tensor(index), torch.tensor(label), torch.tensor(confidence))
        assert got.tolist() == expected
        for i, k, p in zip(index, label, confidence, strict=True):
            if p >= 0.6:
                memory[i] = int(k)
        assert method.selected.tolist() == memory
        seen.add(tuple(beta))
    assert len(seen) > 3  # the thresholds did move


def test_losses_of_a_step_of_flexmatch():
    method, samples = build_flexmatch(unlabelled_weight=3.0), batch()
    method.selected = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0])
    losses = method.losses(samples, now())
    logits = three_view_logits(samples)
    supervised = cross_entropy(logits[:4], samples["labelled"].labels).mean()
    weak, strong = softmax(logits[4:12]), logits[12:]
    beta = counted_status([0, 0, 0, 1, 1, 2, -1, 0], CLASSES, True)
    label = weak.argmax(1)
    mask = [p >= 0.95 * beta[k] / (2 - beta[k]) for p, k in zip(weak.max(1), label, strict=True)]
    assert 0 < sum(mask) < 8
    assert losses.pseudo["positive"].mask.tolist() == mask
    expected = 3.0 * (cross_entropy(strong, label) * mask).sum() / 8
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    assert losses.terms["supervised"].item() == pytest.approx(supervised, rel=1e-5)
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())


# FreeMatch


def normalised(ratio):
    return ratio / ratio.sum()


def fairness_by_loops(logits, mask, marginal, counts):
    probs = softmax(logits)[np.asarray(mask, bool)]
    if len(probs) == 0:
        return 0.0
    shares = np.array([np.mean(probs.argmax(axis=1) == k) for k in range(probs.shape[1])])
    predicted = np.array([p / h if h > 0 else 0.0 for p, h in zip(probs.mean(axis=0), shares, strict=True)])
    target = np.array([p / h if h > 0 else 0.0 for p, h in zip(marginal, counts, strict=True)])
    terms = zip(normalised(target), normalised(predicted), strict=True)
    return sum(t * math.log(p + 1e-12) for t, p in terms)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(2, 5))
def test_fairness_by_loops(seed, n, classes):
    rng = np.random.default_rng(seed)
    logits, mask = rng.normal(size=(n, classes)) * 2, rng.random(n) < 0.6
    marginal, counts = rng.dirichlet(np.ones(classes)), rng.integers(0, 3, size=classes).astype(float)
    counts[0] = 1  # one class at least has been predicted
    got = fairness_loss(*(torch.tensor(v) for v in (logits, mask, marginal, counts)))
    assert got.item() == pytest.approx(fairness_by_loops(logits, mask, marginal, counts), rel=1e-8, abs=1e-9)
    assert got.item() <= 1e-9


def test_fairness_gradcheck():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    marginal, counts = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    assert torch.autograd.gradcheck(lambda z: fairness_loss(z, mask, marginal, counts), (logits,))


class FreeReference:
    """numpy, float64, straight from the note."""

    def __init__(self, decay, statistic="mean", clip="none"):
        self.decay, self.statistic, self.clip = decay, statistic, clip
        self.tau, self.marginal = 1 / CLASSES, np.full(CLASSES, 1 / CLASSES)
        self.histogram = np.full(CLASSES, 1 / CLASSES)

    def select(self, probs):
        d, confidence, label = self.decay, probs.max(axis=1), probs.argmax(axis=1)
        level = confidence.mean() if self.statistic == "mean" else np.quantile(confidence, 0.8)
        self.tau = d * self.tau + (1 - d) * level
        if self.clip == "usb":
            self.tau = min(self.tau, 0.95)
        self.marginal = d * self.marginal + (1 - d) * probs.mean(axis=0)
        self.histogram = d * self.histogram + (1 - d) * np.bincount(label, minlength=CLASSES) / len(label)
        threshold = self.tau * self.marginal / self.marginal.max()
        return confidence >= threshold[label]


def build_freematch(**changes):
    return FreeMatch(FreeMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("statistic", ["mean", "quantile"])
@pytest.mark.parametrize("clip", ["none", "usb"])
def test_masks_over_several_steps_follow_the_state_after_the_step(statistic, clip):
    method, reference = build_freematch(ema_p=0.7, statistic=statistic, clip=clip), FreeReference(0.7, statistic, clip)
    rng, seen = np.random.default_rng(1), []
    for step in range(10):
        probs = softmax(rng.normal(size=(9, CLASSES)) * (1 + step) + [1, 0, 0]).astype(np.float32)
        confidence, label = torch.tensor(probs).max(dim=1)
        got = method.select(torch.tensor(probs), label, confidence)
        assert got.tolist() == reference.select(probs.astype(np.float64)).tolist()
        np.testing.assert_allclose(method.tau, reference.tau, rtol=1e-5)
        np.testing.assert_allclose(method.marginal, reference.marginal, rtol=1e-5)
        np.testing.assert_allclose(method.label_histogram, reference.histogram, rtol=1e-5)
        seen += got.tolist()
    assert 5 < sum(seen) < 85


def test_losses_of_a_step_of_freematch():
    method, samples = build_freematch(ema_p=0.1, unlabelled_weight=3.0, fairness_weight=0.2), batch()
    losses = method.losses(samples, now())
    logits = three_view_logits(samples)
    weak, strong, reference = softmax(logits[4:12]), logits[12:], FreeReference(0.1)
    mask = reference.select(weak)
    assert 0 < mask.sum() < 8
    assert losses.pseudo["positive"].mask.tolist() == mask.tolist()
    expected = {
        "supervised": cross_entropy(logits[:4], samples["labelled"].labels).mean(),
        "consistency": 3.0 * (cross_entropy(strong, weak.argmax(1)) * mask).sum() / 8,
        "fairness": 0.2 * fairness_by_loops(strong, mask, reference.marginal, reference.histogram),
    }
    assert {name: term.item() for name, term in losses.terms.items()} == pytest.approx(expected, rel=1e-4)
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())


# SoftMatch


def test_weight_by_hand():
    """Two deviations sigma / n_sigma below the mean weigh e^-2; from the mean upwards all weigh 1."""
    confidence = torch.tensor([0.5, 0.7, 0.71, 1.0], dtype=torch.float64)
    got = gaussian_weight(confidence, torch.tensor(0.7), torch.tensor(0.04), 2.0)
    np.testing.assert_allclose(got, [math.exp(-2), 1, 1, 1], rtol=1e-6)


def test_weight_rises_with_confidence_and_survives_zero_variance():
    confidence = torch.linspace(0, 1, 50)
    weight = gaussian_weight(confidence, torch.tensor(0.6), torch.tensor(0.1), 2.0)
    assert (weight.diff() >= 0).all() and weight[0] > 0 and weight[-1] == 1
    flat = gaussian_weight(confidence, torch.tensor(0.5), torch.tensor(0.0), 2.0)
    assert torch.equal(flat, (confidence >= 0.5).float())


class SoftReference:
    """numpy, float64, straight from the note: align, then mean and unbiased variance, then weigh."""

    def __init__(self, classes, decay, n_sigma, aligned):
        self.marginal, self.mean, self.variance = None, 1 / classes, 1.0
        self.classes, self.decay, self.n_sigma, self.aligned = classes, decay, n_sigma, aligned

    def weigh(self, probs):
        d = self.decay
        if self.aligned:
            mean = probs.mean(axis=0)
            self.marginal = mean if self.marginal is None else d * self.marginal + (1 - d) * mean
            probs = probs * (1 / self.classes + 1e-6) / (self.marginal + 1e-6)
            probs = probs / probs.sum(axis=1, keepdims=True)
        confidence = probs.max(axis=1)
        self.mean = d * self.mean + (1 - d) * confidence.mean()
        self.variance = d * self.variance + (1 - d) * confidence.var(ddof=1)
        gap = np.minimum(confidence - self.mean, 0)
        return np.exp(-(gap**2) / (2 * self.variance / self.n_sigma**2))


def build_softmatch(**changes):
    return SoftMatch(SoftMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("alignment", ["uniform", "none"])
@pytest.mark.parametrize(("decay", "n_sigma"), [(0.999, 2.0), (0.6, 1.0)])
def test_weights_over_several_steps(alignment, decay, n_sigma):
    method = build_softmatch(alignment=alignment, ema_p=decay, n_sigma=n_sigma)
    reference, rng = SoftReference(CLASSES, decay, n_sigma, alignment == "uniform"), np.random.default_rng(0)
    for _ in range(8):
        probs = softmax(rng.normal(size=(7, CLASSES)) * 2 + [1.5, 0, 0])  # more of class 0, for alignment to mend
        got = method.weigh(torch.tensor(probs).float())
        np.testing.assert_allclose(got, reference.weigh(probs), rtol=2e-4)
        np.testing.assert_allclose(method.mean, reference.mean, rtol=1e-5)
        np.testing.assert_allclose(method.variance, reference.variance, rtol=1e-5)
    assert (method.marginal.sum() > 0) == (alignment == "uniform")


def test_the_target_is_the_argmax_before_alignment():
    method = build_softmatch()
    method.marginal = torch.tensor([0.98, 0.01, 0.01])
    weak = torch.tensor([[1.0, 0.9, -5.0]])
    losses = method.unlabelled(weak, torch.randn(1, 3), torch.tensor([4]))
    assert losses.pseudo["positive"].label.tolist() == [0]


def test_one_unlabelled_sample_has_no_variance_and_no_nan():
    method = build_softmatch()
    for _ in range(3):
        weight = method.weigh(torch.tensor([[0.2, 0.3, 0.5]]))
    assert torch.isfinite(weight).all() and method.variance.item() == pytest.approx(0.999**3)


@pytest.mark.parametrize("alignment", ["uniform", "none"])
def test_losses_of_a_step_of_softmatch(alignment):
    method, samples = build_softmatch(unlabelled_weight=2.5, alignment=alignment, ema_p=0.1), batch()
    losses = method.losses(samples, now())
    logits = three_view_logits(samples)
    supervised = cross_entropy(logits[:4], samples["labelled"].labels).mean()
    weak, strong = softmax(logits[4:12]), logits[12:]
    weight = SoftReference(CLASSES, 0.1, 2.0, alignment == "uniform").weigh(weak)
    assert 0 < weight.min() < weight.max() <= 1
    expected = 2.5 * (cross_entropy(strong, weak.argmax(1)) * weight).mean()
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert losses.terms["supervised"].item() == pytest.approx(supervised, rel=1e-5)
    positive = losses.pseudo["positive"]
    np.testing.assert_allclose(positive.mask, weight, rtol=1e-3)
    np.testing.assert_allclose(positive.confidence, weak.max(1), rtol=1e-5)
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())


def test_self_adaptive_threshold_by_hand():
    marginal, tau = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor(0.96, dtype=torch.float64)
    for clip in ("none", "usb"):
        assert self_adaptive_threshold(tau, marginal, clip).tolist() == pytest.approx([0.96, 0.48, 0.48])
    assert self_adaptive_threshold(tau, marginal, "torchssl").tolist() == pytest.approx([0.95, 0.9, 0.9])
