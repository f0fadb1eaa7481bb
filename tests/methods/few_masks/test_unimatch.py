"""Supervised training, FixMatch and UniMatch: terms, gradients and batch norm against a second implementation."""


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


# FixMatch and UniMatch


def twin_step(twin, samples, settings):
    """FixMatch: (L_x + L_s) / 2. UniMatch: (L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2."""
    names = ("consistency",) if isinstance(settings, FixMatch.Settings) else ("consistency", "consistency_2")
    x, u, mix = crops(samples)
    count = len(x.images)
    mix_targets = threshold_oracle(twin.evaluated(view(mix)), mix.padding, settings.threshold)
    weak = torch.cat([view(x), view(u)])
    logits = twin.trained(weak)
    targets = threshold_oracle(logits[count:], u.padding, settings.threshold)
    boxes = [box(draw, len(u.images)) for draw in range(len(names))]
    strong = [pasted(view(u, 1.5 + draw), view(mix, 2.0 + draw), where) for draw, where in enumerate(boxes)]
    strong_logits = twin.trained(torch.cat(strong)).chunk(len(names))
    terms = {"supervised": labelled_loss(logits[:count], x.masks) / 2}
    for name, part, where in zip(names, strong_logits, boxes, strict=True):
        terms[name] = pseudo_loss(part, pasted(targets, mix_targets, where)) / (2 if len(names) == 1 else 8)
    if getattr(settings, "feature_perturbation", False):
        terms["features"] = pseudo_loss(twin.trained(weak, move=False, factor=2.0)[count:], targets) / 4
    return terms, targets


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.95])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [(FixMatch, {}), (UniMatch, {}), (UniMatch, {"feature_perturbation": False})],
    ids=["fixmatch", "unimatch", "without L_fp"],
)
def test_a_step_is_that_of_a_second_implementation(kind, changes, threshold):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(kind, network, threshold=threshold, **changes)
    losses = method.losses(samples, NOW)
    expected, targets = twin_step(twin, samples, method.settings)
    compare(losses.terms, expected, network, twin)
    assert twin.same_averages(network) and twin.count == 2
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.index, samples["unlabelled"].index) and pixels.window == "window 1"
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    assert torch.equal(pixels.weight.double(), targets.weight)
    torch.testing.assert_close(pixels.confidence.double(), targets.confidence, rtol=1e-5, atol=1e-6)
    strong = 1 if kind is FixMatch else 2
    modes = [(len(x), perturb, training, gradients) for x, perturb, training, _, gradients in network.passes]
    perturb = "features" in losses.terms
    assert modes == [(3, False, False, False), (5, perturb, True, True), (3 * strong, False, True, True)]
    drawn = [entry[0] for entry in method.views.drawn]
    assert drawn == ["crop"] * 3 + ["boxes"] * strong + ["strong"] * 2 * strong
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
