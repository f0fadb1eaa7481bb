"""MixMatch: guessed and sharpened targets, mixed losses, interleaving, batch-norm averages."""

import numpy as np
import pytest
import torch

from repro.methods.few_labels.common import interleaving, mixup
from repro.methods.few_labels.mixmatch import MixMatch, MixMatchSettings, guess
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


def test_guess_averages_views_without_trace():
    network = TinyNetwork()
    before = bn_state(network)
    views = [torch.randn(5, 3, 2, 2) for _ in range(3)]
    got = guess(network, views)
    expected = np.mean([softmax(TinyNetwork()(seen).detach()) for seen in views], axis=0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    assert not got.requires_grad and network.training
    assert all(torch.equal(value, bn_state(network)[key]) for key, value in before.items())


def build(**changes):
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
def test_losses_of_a_step(interleave, copies, step, ramp):
    method, samples = build(interleave=interleave, augmentations=copies), batch(4, 4)
    logits, targets, probs, moved = by_hand(samples, copies, interleave)
    torch.manual_seed(11)
    losses = method.losses(samples, now(step, 1000))
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(logits[:4], targets[:4]).mean(), rel=1e-4
    )
    expected = 100 * ramp * np.mean((softmax(logits[4:]) - targets[4:]) ** 2)
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    positive = losses.pseudo["positive"]
    assert positive.mask.all() and positive.label.tolist() == probs.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, probs.max(1), rtol=1e-5)
    for key, value in moved.items():
        np.testing.assert_allclose(bn_state(method.network)[key], value, rtol=1e-5, atol=1e-7)


def test_more_unlabelled_than_labelled():
    method, samples = build(), batch(4, 8)
    logits, targets, _, _ = by_hand(samples, 2, True)
    torch.manual_seed(11)
    losses = method.losses(samples, now())
    assert len(logits) == 20
    expected = 100 * np.mean((softmax(logits[4:]) - targets[4:]) ** 2)
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4)


def test_targets_are_constants():
    """The gradient is that of the chunks' forwards alone: the same as with targets computed elsewhere."""
    method, samples = build(interleave=False), batch(4, 4)
    torch.manual_seed(11)
    losses = method.losses(samples, now())
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())
    got = torch.autograd.grad(losses.terms["consistency"], list(method.network.parameters()))
    _, targets, probs, _ = by_hand(samples, 2, False)
    sharp = torch.tensor(probs**2 / (probs**2).sum(axis=1, keepdims=True)).float()
    views = [
        view(samples["labelled"].images, 2),
        *(view(samples["unlabelled"].images, draw) for draw in (0, 1)),
    ]
    truth = torch.eye(CLASSES)[samples["labelled"].labels]
    torch.manual_seed(11)
    images, _ = mixup(torch.cat(views), torch.cat([truth, sharp, sharp]), 0.5)
    reference = TinyNetwork()
    logits = torch.cat([reference(chunk) for chunk in images.split(4)])[4:]
    loss = 100 * (logits.softmax(dim=1) - torch.tensor(targets[4:])).square().mean()
    for mine, theirs in zip(got, torch.autograd.grad(loss, list(reference.parameters())), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_published_defaults_and_ranges():
    defaults = MixMatchSettings()
    assert (defaults.augmentations, defaults.temperature, defaults.alpha) == (2, 0.5, 0.5)
    assert (defaults.unlabelled_weight, defaults.ramp) == (100.0, 0.4)
    for change in ({"augmentations": 0}, {"temperature": 0.0}, {"alpha": 0.0}):
        with pytest.raises(SettingError):
            MixMatchSettings(**change)
