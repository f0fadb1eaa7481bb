"""UDA: annealing schedules and rules, sharpened targets, masks."""

import math

import numpy as np
import pytest
import torch

from repro.methods.few_labels.baselines import (
    UDA,
    UDASettings,
    annealed_loss,
    annealed_threshold,
    soft_consistency_loss,
)
from repro.settings import SettingError
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


@pytest.mark.parametrize("classes", [2, 10])
def test_annealed_threshold_endpoints_and_middle(classes):
    low = 1 / classes
    assert annealed_threshold("none", 0.3, classes) == 1
    assert annealed_threshold("linear", 0.0, classes) == pytest.approx(low)
    assert annealed_threshold("linear", 0.5, classes) == pytest.approx((1 + low) / 2)
    assert annealed_threshold("exp", 0.0, classes) == pytest.approx(low + math.exp(-5) * (1 - low))
    assert annealed_threshold("log", 0.0, classes) == pytest.approx(low)
    assert annealed_threshold("log", 1.0, classes) == pytest.approx(1 - math.exp(-5) * (1 - low))
    for schedule in ("linear", "exp"):
        assert annealed_threshold(schedule, 1.0, classes) == pytest.approx(1)


def test_schedules_rise_and_are_ordered():
    progress = np.linspace(0, 1, 50)
    curves = {s: [annealed_threshold(s, p, 10) for p in progress] for s in ("log", "linear", "exp")}
    assert all(np.all(np.diff(curve) > 0) for curve in curves.values())
    inside = slice(1, -1)
    assert np.all(np.array(curves["log"])[inside] > np.array(curves["linear"])[inside])
    assert np.all(np.array(curves["linear"])[inside] > np.array(curves["exp"])[inside])


@pytest.mark.parametrize("rule", ["toolbox", "paper"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_annealed_loss_by_loops(rule, threshold):
    torch.manual_seed(2)
    logits, labels = torch.randn(9, 3, dtype=torch.float64) * 2, torch.tensor([0, 1, 2] * 3)
    probs, total, kept = softmax(logits), 0.0, 0
    for row in range(9):
        known = max(probs[row]) if rule == "toolbox" else probs[row, labels[row]]
        if known <= threshold:
            total, kept = total - math.log(probs[row, labels[row]]), kept + 1
    expected = total / 9 if rule == "toolbox" else total / max(kept, 1)
    assert annealed_loss(logits, labels, threshold, rule).item() == pytest.approx(expected, rel=1e-9)


def test_the_rules_differ_on_a_confident_mistake():
    """Sure and wrong: the toolboxes leave it out, the paper keeps exactly such samples."""
    logits, labels = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([1])
    assert annealed_loss(logits, labels, 0.5, "toolbox").item() == 0
    assert annealed_loss(logits, labels, 0.5, "paper").item() == pytest.approx(
        cross_entropy(logits, labels)[0]
    )


@pytest.mark.parametrize("rule", ["toolbox", "paper"])
def test_without_annealing_it_is_cross_entropy(rule):
    logits, labels = torch.randn(7, 4) * 30, torch.randint(4, (7,))  # saturated rows too
    logits[0] = torch.tensor([500.0, 0, 0, 0])
    got = annealed_loss(logits, labels, annealed_threshold("none", 0.0, 4), rule)
    assert got.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_losses_gradcheck():
    torch.manual_seed(0)
    logits, labels = (
        torch.randn(6, 4, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    for rule in ("toolbox", "paper"):
        assert torch.autograd.gradcheck(lambda z, rule=rule: annealed_loss(z, labels, 0.6, rule), (logits,))
    weak, mask = torch.randn(6, 4, dtype=torch.float64), torch.tensor([1, 0, 1, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda z: soft_consistency_loss(z, weak, mask, 0.4), (logits,))


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_soft_consistency_by_loops(temperature):
    rng = np.random.default_rng(0)
    strong, weak, mask = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) * 3, rng.random(5) < 0.6
    target, total = softmax(weak / temperature), 0.0
    for row in range(5):
        if mask[row]:
            total -= sum(target[row] * np.log(softmax(strong)[row]))
    got = soft_consistency_loss(torch.tensor(strong), torch.tensor(weak), torch.tensor(mask), temperature)
    assert got.item() == pytest.approx(total / 5, rel=1e-9)


def test_cold_targets_approach_hard_ones():
    strong, weak = torch.randn(5, 3), torch.randn(5, 3)
    got = soft_consistency_loss(strong, weak, torch.ones(5), 0.01)
    expected = cross_entropy(strong, weak.argmax(dim=1)).mean()
    assert got.item() == pytest.approx(expected, rel=1e-2)


def test_the_weak_view_gets_no_gradient():
    strong, weak = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = soft_consistency_loss(strong, weak, torch.ones(5), 0.4)
    gradients = torch.autograd.grad(loss, (strong, weak), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None


def build(**changes):
    return UDA(UDASettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize(
    ("changes", "kept_samples"),
    [
        ({}, 4),
        ({"annealing": "linear"}, 1),
        ({"annealing": "linear", "annealing_rule": "paper"}, 3),
        ({"annealing": "exp"}, 0),
        ({"annealing": "exp", "annealing_rule": "paper"}, 2),
        ({"temperature": 1.0}, 4),
    ],
)
def test_losses_of_a_step(changes, kept_samples):
    method, samples = build(threshold=0.55, unlabelled_weight=2.0, **changes), batch()
    losses = method.losses(samples, now(300, 1000))
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    logits = (
        TinyNetwork()(torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])).detach().numpy()
    )
    own, labels = logits[:4], samples["labelled"].labels.numpy()
    rule = changes.get("annealing_rule", "toolbox")
    share = {"none": 1.0, "linear": 0.3, "exp": math.exp(-3.5)}[changes.get("annealing", "none")]
    eta = share * 2 / 3 + 1 / 3
    known = softmax(own).max(1) if rule == "toolbox" else softmax(own)[np.arange(4), labels]
    kept = known <= eta
    assert kept.sum() == kept_samples
    supervised = (cross_entropy(own, labels) * kept).sum() / (4 if rule == "toolbox" else max(1, kept.sum()))
    weak = softmax(logits[4:12])
    mask = weak.max(1) >= 0.55  # before sharpening
    assert 0 < mask.sum() < 8
    target = softmax(logits[4:12] / changes.get("temperature", 0.4))
    consistency = 2.0 * (cross_entropy(logits[12:], target) * mask).sum() / 8
    assert losses.terms["supervised"].item() == pytest.approx(supervised, rel=1e-5)
    assert losses.terms["consistency"].item() == pytest.approx(consistency, rel=1e-5)
    positive = losses.pseudo["positive"]
    assert positive.mask.tolist() == mask.tolist() and positive.label.tolist() == weak.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, weak.max(1), rtol=1e-5)


def test_published_defaults_and_choices():
    defaults = UDASettings()
    assert (defaults.threshold, defaults.temperature, defaults.annealing) == (0.8, 0.4, "none")
    with pytest.raises(SettingError, match="'none', 'linear', 'exp', 'log'"):
        UDASettings(annealing="cosine")
