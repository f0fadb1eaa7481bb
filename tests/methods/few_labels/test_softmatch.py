"""SoftMatch: alignment, running mean and variance, and weights against numpy, over several steps."""

import math

import numpy as np
import pytest
import torch

from repro.methods.few_labels.fixmatch import SoftMatch, SoftMatchSettings, gaussian_weight
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


class Reference:
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


def build(**changes):
    return SoftMatch(SoftMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("alignment", ["uniform", "none"])
@pytest.mark.parametrize(("decay", "n_sigma"), [(0.999, 2.0), (0.6, 1.0)])
def test_weights_over_several_steps(alignment, decay, n_sigma):
    method = build(alignment=alignment, ema_p=decay, n_sigma=n_sigma)
    reference, rng = Reference(CLASSES, decay, n_sigma, alignment == "uniform"), np.random.default_rng(0)
    for _ in range(8):
        probs = softmax(rng.normal(size=(7, CLASSES)) * 2 + [1.5, 0, 0])  # more of class 0, for alignment to mend
        got = method.weigh(torch.tensor(probs).float())
        np.testing.assert_allclose(got, reference.weigh(probs), rtol=2e-4)
        np.testing.assert_allclose(method.mean, reference.mean, rtol=1e-5)
        np.testing.assert_allclose(method.variance, reference.variance, rtol=1e-5)
    assert (method.marginal.sum() > 0) == (alignment == "uniform")


def test_the_target_is_the_argmax_before_alignment():
    method = build()
    method.marginal = torch.tensor([0.98, 0.01, 0.01])
    weak = torch.tensor([[1.0, 0.9, -5.0]])
    losses = method.unlabelled(weak, torch.randn(1, 3), torch.tensor([4]))
    assert losses.pseudo["positive"].label.tolist() == [0]


def test_one_unlabelled_sample_has_no_variance_and_no_nan():
    method = build()
    for _ in range(3):
        weight = method.weigh(torch.tensor([[0.2, 0.3, 0.5]]))
    assert torch.isfinite(weight).all() and method.variance.item() == pytest.approx(0.999**3)


@pytest.mark.parametrize("alignment", ["uniform", "none"])
def test_losses_of_a_step(alignment):
    method, samples = build(unlabelled_weight=2.5, alignment=alignment, ema_p=0.1), batch()
    losses = method.losses(samples, now())
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    images = torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])
    logits = TinyNetwork()(images).detach().numpy()
    weak, strong = softmax(logits[4:12]), logits[12:]
    weight = Reference(CLASSES, 0.1, 2.0, alignment == "uniform").weigh(weak)
    assert 0 < weight.min() < weight.max() <= 1
    expected = 2.5 * (cross_entropy(strong, weak.argmax(1)) * weight).mean()
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(logits[:4], samples["labelled"].labels).mean(), rel=1e-5
    )
    positive = losses.pseudo["positive"]
    np.testing.assert_allclose(positive.mask, weight, rtol=1e-3)
    np.testing.assert_allclose(positive.confidence, weak.max(1), rtol=1e-5)
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())
