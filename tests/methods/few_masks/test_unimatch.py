"""Supervised training, FixMatch and UniMatch: terms, gradients and batch norm against a second implementation."""

from types import SimpleNamespace

import pytest
import torch

from repro.methods.few_masks.common import ohem
from repro.methods.few_masks.unimatch import FixMatch, Supervised, UniMatch
from tests.methods.few_masks import fakes
from tests.methods.few_masks.fakes import (
    NOW,
    Twin,
    box,
    build,
    compare,
    crops,
    labelled_loss,
    pasted,
    pseudo_loss,
    threshold_oracle,
    view,
)

# Supervised


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


# FixMatch


def fixmatch_step(twin, samples, threshold):
    """L = (L_x + L_s) / 2; the mix batch is seen in eval mode, before the averages move."""
    x, u, mix = crops(samples)
    mix_targets = threshold_oracle(twin.evaluated(view(mix)), mix.padding, threshold)
    logits = twin.trained(torch.cat([view(x), view(u)]))
    targets = threshold_oracle(logits[len(x.images) :], u.padding, threshold)
    where = box(0, len(u.images))
    strong = twin.trained(pasted(view(u, 1.5), view(mix, 2.0), where))
    mixed = pasted(targets, mix_targets, where)
    terms = {
        "supervised": labelled_loss(logits[: len(x.images)], x.masks) / 2,
        "consistency": pseudo_loss(strong, mixed) / 2,
    }
    return terms, targets, mixed


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.95])
def test_a_step_of_fixmatch_is_that_of_a_second_implementation(threshold):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(FixMatch, network, threshold=threshold)
    losses = method.losses(samples, NOW)
    expected, targets, mixed = fixmatch_step(twin, samples, threshold)
    compare(losses.terms, expected, network, twin)
    assert twin.same_averages(network) and twin.count == 2
    chosen = mixed.weight.sum().item()
    assert chosen == mixed.valid.sum() if threshold == 0 else 0 < chosen < mixed.valid.sum()
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.index, samples["unlabelled"].index) and pixels.window == "window 1"
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    assert torch.equal(pixels.weight.double(), targets.weight)
    torch.testing.assert_close(pixels.confidence.double(), targets.confidence, rtol=1e-5, atol=1e-6)


def test_passes_and_draws_of_fixmatch():
    network = fakes.TinyNetwork()
    method = build(FixMatch, network)
    method.losses(fakes.batch(), NOW)
    modes = [(len(x), perturb, training, gradients) for x, perturb, training, _, gradients in network.passes]
    assert modes == [(3, False, False, False), (5, False, True, True), (3, False, True, True)]
    assert [entry[0] for entry in method.views.drawn] == ["crop"] * 3 + ["boxes", "strong", "strong"]
    assert all(module.training for module in network.modules())


def test_what_the_unlabelled_masks_hold_changes_nothing():
    """Their void pixels stay valid, and no class of theirs is read: only padding counts."""
    samples = fakes.batch()
    told = samples | {"unlabelled": fakes.items(3, 2, 1.0), "mix": fakes.items(3, 3, 0.5)}
    first, second = (build(FixMatch, threshold=0.5).losses(part, NOW) for part in (samples, told))
    assert {name: term.item() for name, term in first.terms.items()} == {
        name: term.item() for name, term in second.terms.items()
    }
    valid = first.pseudo["pixels"].valid
    assert torch.equal(valid, samples["unlabelled"].labels != 254) and not valid.all()


# UniMatch


def twin_step(twin, samples, threshold, features):
    """L = (L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2."""
    x, u, mix = crops(samples)
    count = len(x.images)
    mix_targets = threshold_oracle(twin.evaluated(view(mix)), mix.padding, threshold)
    weak = torch.cat([view(x), view(u)])
    logits = twin.trained(weak)
    targets = threshold_oracle(logits[count:], u.padding, threshold)
    boxes = [box(draw, len(u.images)) for draw in (0, 1)]
    strong = [pasted(view(u, 1.5 + draw), view(mix, 2.0 + draw), where) for draw, where in enumerate(boxes)]
    strong_logits = twin.trained(torch.cat(strong)).chunk(2)
    terms = {"supervised": labelled_loss(logits[:count], x.masks) / 2}
    for name, part, where in zip(("consistency", "consistency_2"), strong_logits, boxes, strict=True):
        terms[name] = pseudo_loss(part, pasted(targets, mix_targets, where)) / 8
    if features:
        terms["features"] = pseudo_loss(twin.trained(weak, move=False, factor=2.0)[count:], targets) / 4
    return terms, targets


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.95])
def test_a_step_is_that_of_a_second_implementation(threshold, features):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    settings = {"threshold": threshold, "feature_perturbation": features}
    twin, method = Twin(network), build(UniMatch, network, **settings)
    losses = method.losses(samples, NOW)
    expected, targets = twin_step(twin, samples, threshold, features)
    compare(losses.terms, expected, network, twin)
    assert twin.same_averages(network) and twin.count == 2
    assert expected["consistency"].item() != pytest.approx(expected["consistency_2"].item(), rel=0.01)
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    assert torch.equal(pixels.weight.double(), targets.weight) and pixels.window == "window 1"


@pytest.mark.parametrize("features", [True, False])
def test_passes_and_draws(features):
    network = fakes.TinyNetwork()
    method = build(UniMatch, network, feature_perturbation=features)
    method.losses(fakes.batch(), NOW)
    modes = [(len(x), perturb, training, gradients) for x, perturb, training, _, gradients in network.passes]
    assert modes == [(3, False, False, False), (5, features, True, True), (6, False, True, True)]
    assert [entry[0] for entry in method.views.drawn] == ["crop"] * 3 + ["boxes"] * 2 + ["strong"] * 4
    assert all(module.training for module in network.modules())
