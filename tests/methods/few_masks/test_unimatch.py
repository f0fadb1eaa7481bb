"""UniMatch: all four terms, their gradients and the batch norm against a second implementation."""

import pytest
import torch

from repro.methods.few_masks.unimatch import UniMatch
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
