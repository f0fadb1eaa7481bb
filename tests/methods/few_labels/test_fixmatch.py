"""FixMatch: selection and loss against loops in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels.common import consistency_loss, pseudo_label
from repro.methods.few_labels.fixmatch import FixMatch, FixMatchSettings
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    cross_entropy,
    now,
    softmax,
    view,
)


def test_pseudo_label_is_argmax_and_max_softmax_without_gradient():
    logits = torch.randn(6, 4, requires_grad=True)
    label, confidence = pseudo_label(logits)
    probs = softmax(logits.detach())
    assert label.tolist() == probs.argmax(axis=1).tolist()
    np.testing.assert_allclose(confidence, probs.max(axis=1), rtol=1e-6)
    assert not label.requires_grad and not confidence.requires_grad


def test_ties_give_one_of_the_tied_classes_at_their_probability():
    label, confidence = pseudo_label(torch.tensor([[2.0, 2.0, -9.0], [0.0, 0.0, 0.0]]))
    assert label[0] in (0, 1) and confidence[1].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_select_as_full_precision(dtype):
    logits = torch.tensor([[30.0, -30.0, 0.0], [1.0, 0.5, 0.0], [3.0, 3.5, -60.0]])
    label, confidence = pseudo_label(logits.to(dtype))
    assert label.tolist() == [0, 0, 1]
    np.testing.assert_allclose(confidence.float(), softmax(logits).max(axis=1), atol=4e-3)
    assert torch.isfinite(consistency_loss(logits.to(dtype), label, confidence >= 0.95)).item()


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


def test_nothing_selected_gives_zero_and_no_gradient():
    logits = torch.randn(5, 4, requires_grad=True)
    loss = consistency_loss(logits, torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum().item() == 0


def build(**changes):
    return FixMatch(FixMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize("threshold", [0.0, 0.55, 0.99])
def test_losses_of_a_step(threshold):
    method, samples = build(threshold=threshold, unlabelled_weight=2.5), batch()
    losses = method.losses(samples, now())
    # Drawn in this order: weak unlabelled, weak labelled, strong (negated); one forward of all three.
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    logits = (
        TinyNetwork()(torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])).detach().numpy()
    )
    own, weak, strong = logits[:4], softmax(logits[4:12]), logits[12:]
    selected = [max(row) >= threshold for row in weak]
    consistency = (
        sum(c for c, s in zip(cross_entropy(strong, weak.argmax(1)), selected, strict=True) if s) / 8
    )
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(own, samples["labelled"].labels).mean(), rel=1e-5
    )
    assert losses.terms["consistency"].item() == pytest.approx(2.5 * consistency, rel=1e-5)
    positive = losses.pseudo["positive"]
    assert positive.mask.tolist() == selected and positive.label.tolist() == weak.argmax(1).tolist()
    assert positive.index.tolist() == list(range(8))
    np.testing.assert_allclose(positive.confidence, weak.max(1), rtol=1e-5)


def test_the_threshold_is_inclusive_and_one_selects_only_certainty():
    label, confidence = pseudo_label(torch.tensor([[200.0, 0.0], [0.0, 0.0]]))
    assert (confidence >= 1.0).tolist() == [True, False]
    assert (confidence >= 0.5).tolist() == [True, True]


def test_the_weak_view_teaches_but_is_not_taught():
    # A network that is a table of logits by position shows which view receives a gradient.
    table = torch.nn.Parameter(torch.randn(20, CLASSES))
    network = torch.nn.Module()
    network.forward = lambda images: table[: len(images)]
    method = FixMatch(FixMatchSettings(threshold=0.0), network, FakeViews(), CLASSES, 10)
    (gradient,) = torch.autograd.grad(method.losses(batch(), now()).terms["consistency"], table)
    assert gradient[:12].abs().sum() == 0 and (gradient[12:].abs().sum(dim=1) > 0).all()
