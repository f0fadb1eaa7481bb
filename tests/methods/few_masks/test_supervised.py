"""Supervised only: one term, one forward, nothing of the unlabelled images."""

from types import SimpleNamespace

import pytest
import torch

from repro.methods.few_masks.common import ohem
from repro.methods.few_masks.unimatch import Supervised
from tests.methods.few_masks import fakes
from tests.methods.few_masks.fakes import NOW, Twin, build, compare, crops, labelled_loss, view


def test_the_loss_is_cross_entropy_on_the_labelled_masks():
    network, samples = fakes.TinyNetwork(), {"labelled": fakes.items(3, 1, 0.8)}
    twin, method = Twin(network), build(Supervised, network)
    losses = method.losses(samples, NOW)
    (x,) = crops(samples)
    compare(losses.terms, {"supervised": labelled_loss(twin.trained(view(x)), x.masks)}, network, twin)
    assert twin.same_averages(network) and losses.pseudo == {}
    assert method.views.drawn == [("crop",)] and len(network.passes) == 1


def test_the_labelled_loss_is_the_recipes():
    network, samples = fakes.TinyNetwork(), {"labelled": fakes.items(3, 1, 0.8)}
    method = build(Supervised, network)
    method.labelled_loss = lambda logits, labels: ohem(logits, labels, 0.3, 5)
    (x,) = crops(samples)
    expected = ohem(Twin(network).trained(view(x)).detach(), x.masks, 0.3, 5)
    assert method.losses(samples, NOW).terms["supervised"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_unlabelled_image_is_asked_for():
    pool = SimpleNamespace(labelled=torch.tensor([3, 5]), unlabelled=torch.arange(9))
    streams = build(Supervised).streams(pool, SimpleNamespace(batch=4, unlabelled_ratio=1))
    assert list(streams) == ["labelled"] and torch.equal(streams["labelled"][0], pool.labelled)
    assert streams["labelled"][1] == 4
