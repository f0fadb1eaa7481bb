"""FreeMatch: thresholds over several steps and the fairness term against numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels.fixmatch import (
    FreeMatch,
    FreeMatchSettings,
    fairness_loss,
    histogram,
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
    view,
)


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


def test_fairness_by_hand():
    """Two certain samples of different classes under a uniform state: both sides are (1/2, 1/2), so -log 2."""
    uniform = torch.full((2,), 0.5, dtype=torch.float64)
    logits = torch.tensor([[40.0, -40.0], [-40.0, 40.0]], dtype=torch.float64)
    every = torch.tensor([True, True])
    assert fairness_loss(logits, every, uniform, uniform).item() == pytest.approx(-math.log(2))
    # One class alone: the other's share of the prediction is 0, and half the target lies there.
    same = fairness_loss(logits[:1], every[:1], uniform, uniform).item()
    assert same == pytest.approx(0.5 * math.log(1e-12), rel=1e-9)


def test_nothing_selected_is_zero_without_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    third = torch.full((3,), 1 / 3)
    loss = fairness_loss(logits, torch.zeros(4, dtype=torch.bool), third, third)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_fairness_gradcheck():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    marginal, counts = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    mask = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    assert torch.autograd.gradcheck(lambda z: fairness_loss(z, mask, marginal, counts), (logits,))


def test_threshold_by_hand():
    marginal = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    tau = torch.tensor(0.96, dtype=torch.float64)
    assert self_adaptive_threshold(tau, marginal).tolist() == pytest.approx([0.96, 0.48, 0.48])
    assert self_adaptive_threshold(tau, marginal, "usb").tolist() == pytest.approx([0.96, 0.48, 0.48])
    assert self_adaptive_threshold(tau, marginal, "torchssl").tolist() == pytest.approx([0.95, 0.9, 0.9])


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_histogram_counts(label):
    got = histogram(torch.tensor(label), torch.ones(len(label)), 4)
    assert got.tolist() == [label.count(k) for k in range(4)]


class Reference:
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
        if self.clip == "torchssl":
            threshold = threshold.clip(0.9, 0.95)
        return confidence >= threshold[label]


def build(**changes):
    return FreeMatch(FreeMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("statistic", ["mean", "quantile"])
@pytest.mark.parametrize("clip", ["none", "usb", "torchssl"])
def test_masks_over_several_steps_follow_the_state_after_the_step(statistic, clip):
    method, reference = build(ema_p=0.7, statistic=statistic, clip=clip), Reference(0.7, statistic, clip)
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


def test_usb_clips_the_state_itself():
    method = build(clip="usb", ema_p=0.0)
    method.select(torch.tensor([[1.0, 0, 0]]), torch.tensor([0]), torch.tensor([1.0]))
    assert method.tau.item() == pytest.approx(0.95)


def test_losses_of_a_step():
    method, samples = build(ema_p=0.1, unlabelled_weight=3.0, fairness_weight=0.2), batch()
    losses = method.losses(samples, now())
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    images = torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])
    logits = TinyNetwork()(images).detach().numpy()
    weak, strong, reference = softmax(logits[4:12]), logits[12:], Reference(0.1)
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


def test_published_defaults():
    defaults = FreeMatchSettings()
    assert (defaults.fairness_weight, defaults.ema_p, defaults.statistic, defaults.clip) == (
        0.001,
        0.999,
        "mean",
        "none",
    )
