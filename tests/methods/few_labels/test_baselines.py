"""Supervised training, Pseudo-Label, Mean Teacher and UDA against loops in numpy."""

import math

import numpy as np
import pytest
import torch

from repro.methods.few_labels.baselines import (
    UDA,
    MeanTeacher,
    MeanTeacherSettings,
    PseudoLabel,
    PseudoLabelSettings,
    Supervised,
    SupervisedSettings,
    UDASettings,
    annealed_loss,
    annealed_threshold,
    soft_consistency_loss,
)
from repro.methods.few_labels.common import linear_ramp, squared_error
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    bn_state,
    cross_entropy,
    gradient_reaches,
    now,
    pool,
    softmax,
    three_view_logits,
    view,
)

# Supervised


def build_supervised():
    return Supervised(SupervisedSettings(), TinyNetwork(), FakeViews(), CLASSES, 10)


def test_loss_is_the_mean_cross_entropy_of_the_weak_view():
    method, given = build_supervised(), batch()["labelled"]
    losses = method.losses({"labelled": given}, now())
    reference = TinyNetwork()
    expected = cross_entropy(reference(view(given.images)).detach(), given.labels).mean()
    assert losses.terms.keys() == {"supervised"} and losses.pseudo == {}
    assert losses.terms["supervised"].item() == pytest.approx(expected, rel=1e-5)
    assert method.views.calls == [("weak", 4)]


def test_only_a_labelled_stream():
    recipe = type("Recipe", (), {"batch": 5})
    given = pool(10, {3: 1, 7: 2})
    streams = build_supervised().streams(given, recipe)
    assert streams.keys() == {"labelled"}
    index, size = streams["labelled"]
    assert index.tolist() == [3, 7] and size == 5


# Pseudo-Label


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


def build_pseudo_label(**changes):
    return PseudoLabel(PseudoLabelSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (100, 0.25), (400, 1.0), (999, 1.0)])
def test_losses_of_a_step_of_pseudo_label(step, ramp):
    method, samples = build_pseudo_label(threshold=0.45, unlabelled_weight=2.0), batch()
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


# Mean Teacher


def test_squared_error_by_loops_and_gradcheck():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64).softmax(dim=1)
    probs, total = softmax(logits.detach()), 0.0
    for row in range(4):
        for k in range(3):
            total += (probs[row, k] - target[row, k].item()) ** 2
    assert squared_error(logits, target).item() == pytest.approx(total / 12, rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: squared_error(z, target), (logits,))


def build_mean_teacher():
    method = MeanTeacher(MeanTeacherSettings(), TinyNetwork(), FakeViews(), CLASSES, 10)
    return method, TinyNetwork(seed=7).eval().requires_grad_(False)


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (200, 0.5), (400, 1.0), (800, 1.0)])
def test_losses_of_a_step_of_mean_teacher(step, ramp):
    (method, teacher), samples = build_mean_teacher(), batch()
    losses = method.losses(samples, now(step, 1000, teacher=teacher))
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    # Weak draws in order: labelled, teacher's, student's; teacher and student both use batch statistics.
    target = softmax(TinyNetwork(seed=7).train()(view(unlabelled, 1)).detach())
    student = softmax(TinyNetwork()(view(unlabelled, 2)).detach())
    expected = 50 * ramp * np.mean((student - target) ** 2)
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (expected > 0) == (step > 0)
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(TinyNetwork()(view(labelled)).detach(), samples["labelled"].labels).mean(), rel=1e-5
    )
    positive = losses.pseudo["positive"]
    assert positive.mask.all() and positive.label.tolist() == target.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, target.max(1), rtol=1e-5)


def test_student_learns_teacher_does_not():
    (method, teacher), samples = build_mean_teacher(), batch()
    teacher.requires_grad_(True)  # even then
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    term = method.losses(samples, now(teacher=teacher)).terms["consistency"]
    assert gradient_reaches(term, method.network.parameters())
    assert not gradient_reaches(term, teacher.parameters())
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("build", [build_pseudo_label, lambda: build_mean_teacher()[0]])
def test_only_labelled_images_move_the_batch_norm_averages(build):
    method, samples, reference = build(), batch(), TinyNetwork()
    method.losses(samples, now(teacher=TinyNetwork(seed=7).eval()))
    reference(view(samples["labelled"].images))
    assert all(torch.equal(value, bn_state(method.network)[key]) for key, value in bn_state(reference).items())


# UDA


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


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_annealed_loss_by_loops(threshold):
    torch.manual_seed(2)
    logits, labels = torch.randn(9, 3, dtype=torch.float64) * 2, torch.tensor([0, 1, 2] * 3)
    probs = softmax(logits)
    total = -sum(math.log(p[k]) for p, k in zip(probs, labels, strict=True) if max(p) <= threshold)
    assert annealed_loss(logits, labels, threshold).item() == pytest.approx(total / 9, rel=1e-9)


def test_losses_gradcheck():
    torch.manual_seed(0)
    logits, labels = (
        torch.randn(6, 4, dtype=torch.float64, requires_grad=True),
        torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    assert torch.autograd.gradcheck(lambda z: annealed_loss(z, labels, 0.6), (logits,))
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


def build_uda(**changes):
    return UDA(UDASettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


@pytest.mark.parametrize(
    ("changes", "kept_samples"),
    [
        ({}, 4),
        ({"annealing": "linear"}, 1),
        ({"annealing": "exp"}, 0),
        ({"temperature": 1.0}, 4),
    ],
)
def test_losses_of_a_step_of_uda(changes, kept_samples):
    method, samples = build_uda(threshold=0.55, unlabelled_weight=2.0, **changes), batch()
    losses = method.losses(samples, now(300, 1000))
    logits = three_view_logits(samples)
    own, labels = logits[:4], samples["labelled"].labels.numpy()
    share = {"none": 1.0, "linear": 0.3, "exp": math.exp(-3.5)}[changes.get("annealing", "none")]
    eta = share * 2 / 3 + 1 / 3
    kept = softmax(own).max(1) <= eta
    assert kept.sum() == kept_samples
    supervised = (cross_entropy(own, labels) * kept).sum() / 4
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


@pytest.mark.parametrize("rule", ["toolbox", "paper"])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 1.0])
def test_annealed_loss_of_both_rules_by_loops(rule, threshold):
    logits, labels = torch.randn(9, 3, dtype=torch.float64) * 2, torch.tensor([0, 1, 2] * 3)
    probs, total, kept = logits.softmax(1).tolist(), 0.0, 0
    for row in range(9):
        known = max(probs[row]) if rule == "toolbox" else probs[row][labels[row]]
        if known <= threshold:
            total, kept = total - math.log(probs[row][labels[row]]), kept + 1
    expected = total / 9 if rule == "toolbox" else total / max(kept, 1)
    assert annealed_loss(logits, labels, threshold, rule).item() == pytest.approx(expected, rel=1e-9)
