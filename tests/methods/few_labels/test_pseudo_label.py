"""Pseudo-Label: ramp, own targets, held batch-norm averages."""

import numpy as np
import pytest
import torch

from repro.methods.few_labels.baselines import PseudoLabel, PseudoLabelSettings
from repro.methods.few_labels.common import linear_ramp
from repro.settings import SettingError
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    bn_state,
    cross_entropy,
    gradient_reaches,
    now,
    softmax,
    view,
)


@pytest.mark.parametrize(
    ("progress", "length", "expected"),
    [
        (0, 0.4, 0),
        (0.1, 0.4, 0.25),
        (0.4, 0.4, 1),
        (0.9, 0.4, 1),
        (0, 0, 1),
        (0.25, 1, 0.25),
        (1 / 128, 1 / 64, 0.5),
    ],
)
def test_linear_ramp(progress, length, expected):
    assert linear_ramp(progress, length) == pytest.approx(expected)


def build(**changes):
    return PseudoLabel(PseudoLabelSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (100, 0.25), (400, 1.0), (999, 1.0)])
def test_losses_of_a_step(step, ramp):
    method, samples = build(threshold=0.45, unlabelled_weight=2.0), batch()
    losses = method.losses(samples, now(step, 1000))
    # Two forwards, each with its own statistics: labelled (first weak draw), unlabelled (second).
    labelled = TinyNetwork()(view(samples["labelled"].images)).detach()
    own = TinyNetwork()(view(samples["unlabelled"].images, 1)).detach()
    probs = softmax(own)
    mask, label = probs.max(1) >= 0.45, probs.argmax(1)
    assert 0 < mask.sum() < 8
    expected = 2.0 * ramp * (cross_entropy(own, label) * mask).sum() / 8
    assert losses.terms["pseudo_label"].item() == pytest.approx(expected, rel=1e-5)
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(labelled, samples["labelled"].labels).mean(), rel=1e-5
    )
    positive = losses.pseudo["positive"]
    assert positive.mask.tolist() == mask.tolist() and positive.label.tolist() == label.tolist()
    np.testing.assert_allclose(positive.confidence, probs.max(1), rtol=1e-5)
    assert method.views.calls == [("weak", 4), ("weak", 8)]


def test_only_labelled_images_move_the_batch_norm_averages():
    method, samples = build(), batch()
    method.losses(samples, now())
    reference = TinyNetwork()
    reference(view(samples["labelled"].images))
    for key, value in bn_state(reference).items():
        assert torch.equal(value, bn_state(method.network)[key]), key


def test_own_logits_get_the_gradient_of_a_fixed_target():
    method, samples = build(threshold=0.0, ramp=0.0), batch()
    term = method.losses(samples, now()).terms["pseudo_label"]
    assert gradient_reaches(term, method.network.parameters())
    reference = TinyNetwork()
    logits = reference(view(samples["unlabelled"].images, 1))
    # d mean CE / d logits = (softmax - onehot) / U, computed by hand and pulled back through the same network
    probs = logits.detach().softmax(dim=1)
    fixed = (probs - torch.eye(CLASSES)[probs.argmax(dim=1)]) / 8
    expected = torch.autograd.grad(logits, list(reference.parameters()), fixed)
    got = torch.autograd.grad(term, list(method.network.parameters()))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_published_defaults_and_ranges():
    defaults = PseudoLabelSettings()
    assert (defaults.threshold, defaults.unlabelled_weight, defaults.ramp) == (0.95, 1.0, 0.4)
    for change in ({"threshold": -0.1}, {"ramp": 1.5}, {"unlabelled_weight": -1.0}):
        with pytest.raises(SettingError):
            PseudoLabelSettings(**change)
