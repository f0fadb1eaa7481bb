"""MixMatch and ReMixMatch: targets, mixed losses, rotations and batch-norm averages against numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from repro.methods.few_labels.common import align, follow, interleaving, mixup
from repro.methods.few_labels.mixmatch import (
    MixMatch,
    MixMatchSettings,
    ReMixMatch,
    ReMixMatchSettings,
    RotationNetwork,
    guess,
    rotate,
)
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
    view,
)

# MixMatch


def test_guess_averages_views_without_trace():
    network = TinyNetwork()
    before = bn_state(network)
    views = [torch.randn(5, 3, 2, 2) for _ in range(3)]
    got = guess(network, views)
    expected = np.mean([softmax(TinyNetwork()(seen).detach()) for seen in views], axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not got.requires_grad and network.training
    assert all(torch.equal(value, bn_state(network)[key]) for key, value in before.items())


def build_mixmatch(**changes):
    return MixMatch(MixMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


def by_hand(samples, copies, interleaved, temperature=0.5):
    """Mixed logits and targets, the guess, averages of batch norm; mixup's draws repeated from its seed."""
    views = [view(samples["unlabelled"].images, draw) for draw in range(copies)]
    labelled = view(samples["labelled"].images, copies)
    probs = np.mean([softmax(TinyNetwork()(seen).detach()) for seen in views], axis=0)
    powered = probs ** (1 / temperature)
    target = powered / powered.sum(axis=1, keepdims=True)
    truth = np.eye(CLASSES)[samples["labelled"].labels]
    torch.manual_seed(11)
    images, targets = mixup(
        torch.cat([labelled, *views]),
        torch.tensor(np.concatenate([truth, *[target] * copies])).float(),
        0.5,
    )
    size, chunks = len(labelled), len(images) // len(labelled)
    order = interleaving(size, chunks, "cpu") if interleaved else torch.arange(len(images))
    network, logits = TinyNetwork(), np.zeros((len(images), CLASSES))
    for chunk in range(chunks):
        rows = order[chunk * size : (chunk + 1) * size]
        logits[rows] = network(images[rows]).detach()
        if chunk == 0:
            moved = bn_state(network)
    return logits, targets.numpy(), probs, moved


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (100, 0.25), (700, 1.0)])
def test_losses_of_a_step_of_mixmatch(interleave, copies, step, ramp):
    method, samples = build_mixmatch(interleave=interleave, augmentations=copies), batch(4, 8 if copies == 2 else 4)
    logits, targets, probs, moved = by_hand(samples, copies, interleave)
    torch.manual_seed(11)
    losses = method.losses(samples, now(step, 1000))
    assert losses.terms["supervised"].item() == pytest.approx(cross_entropy(logits[:4], targets[:4]).mean(), rel=1e-4)
    expected = 100 * ramp * np.mean((softmax(logits[4:]) - targets[4:]) ** 2)
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    positive = losses.pseudo["positive"]
    assert positive.mask.all() and positive.label.tolist() == probs.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, probs.max(1), rtol=1e-5)
    for key, value in moved.items():
        np.testing.assert_allclose(bn_state(method.network)[key], value, rtol=1e-5, atol=1e-7)


# ReMixMatch


def test_align_by_loops():
    rng = np.random.default_rng(0)
    probs, prior, marginal = (
        rng.dirichlet(np.ones(4), size=5),
        rng.dirichlet(np.ones(4)),
        rng.dirichlet(np.ones(4)),
    )
    expected = np.array([[p * (q + 1e-6) / (m + 1e-6) for p, q, m in zip(row, prior, marginal, strict=True)]
                         for row in probs])  # fmt: skip
    expected /= expected.sum(axis=1, keepdims=True)
    got = align(*(torch.tensor(v) for v in (probs, prior, marginal)))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_align_to_the_own_marginal_changes_nothing_and_a_lost_class_stays_finite():
    probs = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.8, 0.0]])
    marginal = probs.mean(dim=0)
    np.testing.assert_allclose(align(probs, marginal, marginal), probs, rtol=1e-6)
    assert torch.isfinite(align(probs, torch.full((3,), 1 / 3), marginal)).all()


def test_follow_over_steps():
    torch.manual_seed(0)
    batches = torch.randn(5, 6, 3).softmax(dim=2)
    marginal, expected = torch.zeros(3), None
    for probs in batches:
        marginal = follow(marginal, probs, 0.9)
        mean = probs.numpy().mean(axis=0)
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
        np.testing.assert_allclose(marginal, expected, rtol=1e-5)


@pytest.mark.parametrize("order", [[3, 3, 0], [2, 1, 1]])
def test_rotate_turns_each_image_by_its_own_angle(order):
    images = torch.randn(3, 2, 4, 4)
    expected = np.stack([np.rot90(image, k, (1, 2)) for image, k in zip(images.numpy(), order, strict=True)])
    np.testing.assert_array_equal(rotate(images, torch.tensor(order)), expected)


def build_remixmatch(**changes):
    torch.manual_seed(5)
    return ReMixMatch(ReMixMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, 10)


def test_prior_comes_from_the_labelled_set():
    method = build_remixmatch()
    np.testing.assert_allclose(method.prior, np.full(3, 1 / 3), rtol=1e-6)
    method.begin_stage(0, pool(10, {0: 1, 3: 1, 4: 0, 9: 1}))
    assert method.prior.tolist() == [0.25, 0.75, 0.0]


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (5, 0.32), (500, 1.0)])
def test_losses_of_a_step_of_remixmatch(interleave, step, ramp):
    method, samples = build_remixmatch(interleave=interleave), batch(4, 4)
    method.begin_stage(0, pool(10, {0: 1, 3: 1, 4: 0, 9: 2}))
    method.marginal = torch.tensor([0.5, 0.3, 0.2])
    reference = copy.deepcopy(method.network)
    held = copy.deepcopy(method.network)  # forwards whose statistics are not looked at

    unlabelled, labelled = samples["unlabelled"].images, samples["labelled"].images
    probs = softmax(held(view(unlabelled)).detach())
    marginal = 0.999 * np.array([0.5, 0.3, 0.2]) + 0.001 * probs.mean(axis=0)
    aligned = probs * (np.array([0.25, 0.5, 0.25]) + 1e-6) / (marginal + 1e-6)
    aligned /= aligned.sum(axis=1, keepdims=True)
    target = aligned**2 / (aligned**2).sum(axis=1, keepdims=True)
    strong, second = -view(unlabelled), -view(unlabelled, 1)
    torch.manual_seed(11)
    images, targets = mixup(
        torch.cat([view(labelled, 1), strong, second, view(unlabelled)]),
        torch.tensor(np.concatenate([np.eye(3)[samples["labelled"].labels], target, target, target])).float(),
        0.75,
    )
    quarters = torch.randint(4, (4,))
    order = interleaving(4, 4, "cpu") if interleave else torch.arange(16)
    logits = np.zeros((16, 3))
    for chunk in range(4):
        rows = order[4 * chunk : 4 * chunk + 4]
        logits[rows] = (reference if chunk == 0 else held)(images[rows]).detach()
    turned = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(strong, quarters, strict=True)])
    rotation = held.rotation(held.network.features(turned)).detach()

    torch.manual_seed(11)
    losses = method.losses(samples, now(step, 1000))
    got = {name: term.item() for name, term in losses.terms.items()}
    assert got == pytest.approx(
        {
            "supervised": cross_entropy(logits[:4], targets[:4]).mean(),
            "mixed": 1.5 * ramp * cross_entropy(logits[4:], targets[4:]).mean(),
            "strong": 0.5 * ramp * cross_entropy(held(strong).detach(), target).mean(),
            "rotation": 0.5 * cross_entropy(rotation, quarters).mean(),
        },
        rel=1e-4,
    )
    np.testing.assert_allclose(method.marginal, marginal, rtol=1e-5)
    positive = losses.pseudo["positive"]
    assert positive.mask.all() and positive.label.tolist() == aligned.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, aligned.max(1), rtol=1e-4)
    for key, value in bn_state(reference).items():  # moved by the first chunk alone
        np.testing.assert_allclose(bn_state(method.network)[key], value, rtol=1e-5, atol=1e-7)


def test_gradients():
    method, samples = build_remixmatch(), batch(4, 4)
    losses = method.losses(samples, now())
    classifier = method.network.network
    for name in ("supervised", "mixed", "strong"):
        assert gradient_reaches(losses.terms[name], classifier.head.parameters())
        assert not gradient_reaches(losses.terms[name], method.network.rotation.parameters())
    assert gradient_reaches(losses.terms["rotation"], method.network.rotation.parameters())
    assert gradient_reaches(losses.terms["rotation"], classifier.body.parameters())
    assert not gradient_reaches(losses.terms["rotation"], classifier.head.parameters())
    assert not method.marginal.requires_grad


def test_ctaugment_is_shown_the_labelled_images():
    method, samples, teacher = build_remixmatch(), batch(4, 4), TinyNetwork(seed=3).eval()
    method.losses(samples, now(teacher=teacher))
    ((predict, images, labels),) = method.views.learnt
    assert torch.equal(images, samples["labelled"].images) and torch.equal(labels, samples["labelled"].labels)
    probe = view(images)
    np.testing.assert_allclose(predict(probe).detach(), softmax(teacher(probe).detach()), rtol=1e-5)


def test_xavier_initialisation_of_the_rotation_head():
    torch.manual_seed(0)
    network = nn.Module()
    network.head = nn.Linear(400, 10)
    deviation = RotationNetwork(network).rotation.weight.std().item()
    assert deviation == pytest.approx((2 / 404) ** 0.5, rel=0.06)
