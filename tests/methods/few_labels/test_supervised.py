"""Supervised: cross-entropy of the weak labelled view, and nothing else."""

import numpy as np
import pytest
import torch

from repro.methods.few_labels.baselines import Supervised, SupervisedSettings
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    bn_state,
    cross_entropy,
    items,
    now,
    pool,
    view,
)


def build():
    return Supervised(SupervisedSettings(), TinyNetwork(), FakeViews(), CLASSES, 10)


def test_loss_is_the_mean_cross_entropy_of_the_weak_view():
    method, given = build(), batch()["labelled"]
    losses = method.losses({"labelled": given}, now())
    reference = TinyNetwork()
    expected = cross_entropy(reference(view(given.images)).detach(), given.labels).mean()
    assert losses.terms.keys() == {"supervised"} and losses.pseudo == {}
    assert losses.terms["supervised"].item() == pytest.approx(expected, rel=1e-5)
    assert method.views.calls == [("weak", 4)]


def test_gradient_and_batch_norm_move():
    method = build()
    before = bn_state(method.network)
    method.losses({"labelled": batch()["labelled"]}, now()).terms["supervised"].backward()
    assert all(parameter.grad is not None for parameter in method.network.parameters())
    assert any(not torch.equal(value, bn_state(method.network)[key]) for key, value in before.items())


def test_duplicates_count_as_often_as_they_occur():
    # Evaluation mode: batch norm would otherwise see another batch.
    method = build().eval()
    once = items(2, labels=torch.tensor([0, 2]))
    twice = type(once)(*(value[[0, 1, 1, 1]] for value in (once.index, once.images, once.labels)))
    alone = cross_entropy(method.network(view(once.images)).detach(), once.labels)
    got = method.losses({"labelled": twice}, now()).terms["supervised"].item()
    assert got == pytest.approx((alone[0] + 3 * alone[1]) / 4, rel=1e-5)
    assert not np.isclose(got, alone.mean())


def test_only_a_labelled_stream():
    recipe = type("Recipe", (), {"batch": 5})
    given = pool(10, {3: 1, 7: 2})
    streams = build().streams(given, recipe)
    assert streams.keys() == {"labelled"}
    index, size = streams["labelled"]
    assert index.tolist() == [3, 7] and size == 5
