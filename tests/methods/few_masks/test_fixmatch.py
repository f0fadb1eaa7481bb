"""FixMatch on pixels: both terms, their gradients and the batch norm against a second implementation."""

import pytest
import torch

from repro.methods.few_masks.unimatch import FixMatch
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


def twin_step(twin, samples, threshold):
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
def test_a_step_is_that_of_a_second_implementation(threshold):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(FixMatch, network, threshold=threshold)
    losses = method.losses(samples, NOW)
    expected, targets, mixed = twin_step(twin, samples, threshold)
    compare(losses.terms, expected, network, twin)
    assert twin.same_averages(network) and twin.count == 2
    chosen = mixed.weight.sum().item()
    assert chosen == mixed.valid.sum() if threshold == 0 else 0 < chosen < mixed.valid.sum()
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.index, samples["unlabelled"].index) and pixels.window == "window 1"
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    assert torch.equal(pixels.weight.double(), targets.weight)
    torch.testing.assert_close(pixels.confidence.double(), targets.confidence, rtol=1e-5, atol=1e-6)


def test_passes_and_draws():
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
