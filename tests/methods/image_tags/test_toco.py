"""ToCo: contrasts of patches and crops recomputed by loops, the teacher's mean, and where crops may lie."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.toco import BOTTLENECK, EMBEDDING, Projection, ToCo, ToCoSettings, choose_crops
from repro.settings import SettingError
from tests.methods.image_tags.fakes import (
    CLASSES,
    SIDE,
    Head,
    aux_cam,
    balanced_oracle,
    bilinear,
    cam_oracle,
    encoder,
    gradients,
    items,
    main_cam,
    now,
    patch_label_oracle,
    patch_oracle,
    recipe,
    replayed,
    same_gradients,
    views,
)


def built(seed=0, **changes):
    settings = ToCoSettings(**{"side": 8, "hidden": 24, "crops": 5} | changes)
    torch.manual_seed(7)
    trunk = Trunk(encoder(), CLASSES, Head())
    return ToCo(settings, trunk, views(seed), recipe(settings)).train()


def test_projection_is_an_mlp_in_front_of_a_weight_normed_layer():
    head = Projection(16, 24)
    last = weight_norm(nn.Linear(BOTTLENECK, EMBEDDING, bias=False))
    with torch.no_grad():
        last.parametrizations.weight.original0.fill_(1)
        last.parametrizations.weight.original1.copy_(head.last.weight)
    tokens = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    one, two, three = head.layers
    hidden = three(nn.functional.gelu(two(nn.functional.gelu(one(tokens)))))
    torch.testing.assert_close(head(tokens), last(hidden / hidden.norm(dim=-1, keepdim=True)))
    assert head(tokens).shape == (3, 4, EMBEDDING) and head(tokens).abs().max() <= 1
    assert [layer.weight.shape for layer in head.layers] == [(24, 16), (24, 24), (BOTTLENECK, 24)]


def level_oracle(aux, tags, low=0.25, high=0.7):
    levels = torch.zeros(len(aux), SIDE, SIDE)
    for b, i, j in torch.ones_like(levels).nonzero().tolist():
        best = max((aux[b, c, i, j] * tags[b, c]).item() for c in range(CLASSES))
        levels[b, i, j] = 0 if best <= low else 2 if best >= high else 1
    return levels


def contrast_oracle(student, taught, positive, temperature=0.5):
    """InfoNCE by loops and exponentials (spec 6.7)."""
    total = 0.0
    for b in range(len(student)):
        scores = [[(t * s).sum().div(temperature).exp() for s in student[b]] for t in taught[b]]
        inner = 0.0
        for row in scores:
            negatives = sum((e for e, keep in zip(row, positive[b], strict=True) if not keep), torch.zeros(())) + 1e-4
            inner = inner + sum(-(e / (e + negatives)).log() for e, keep in zip(row, positive[b], strict=True) if keep)
            inner = inner - (1 / (1 + negatives)).log()
        total = total + inner / (2 * (sum(positive[b]) + 1e-4))
    return total / len(student)


@pytest.mark.parametrize("step", [5, 10])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(seg_weight=0.2), items(2)
    view, trunk, generator = replayed(method, samples), method.network, method.views.generator
    start = generator.get_state()
    # the random numbers of a step, in their order: the view, the second view, the copy's crops, the copy
    method.view(samples)
    other = method.views.strong(method.views.crop(samples.images, torch.zeros_like(samples.images[:, 0])))
    cam, aux = (cam_oracle(make(trunk), view.x).detach() for make in (main_cam, aux_cam))
    levels = level_oracle(aux, samples.labels)
    corners, negative = choose_crops(levels.long(), 5, 8, 0.2, generator)
    copy = method.views.strong(view.crop)
    generator.set_state(start)

    tokens = trunk.encoder(view.x)
    student, positive = [], []
    for b in range(2):
        crops = [copy[b, :, top : top + 8, left : left + 8] for top, left in corners[b].tolist()]
        assert negative[b].tolist() == [
            levels[b, top : top + 8, left : left + 8].mean().item() <= 0.2 for top, left in corners[b].tolist()
        ]
        seen = [trunk.encoder(image[None]).class_tokens[0, 0] for image in (view.x[b], other[b], *crops)]
        student.append(torch.stack([method.projection(token) for token in seen]))
        positive.append([True, True, *(not flag for flag in negative[b].tolist())])
    teacher = [0.9 * mean + 0.1 * live for mean, live in zip(
        method.teacher.parameters(), method.projection.parameters(), strict=True
    )]  # fmt: skip
    assert any(not all(row) for row in positive)
    taught = torch.stack(
        [
            torch.stack([method.projection(trunk.encoder(x[None]).class_tokens[0, 0]) for x in (view.x[b], other[b])])
            for b in range(2)
        ]
    )  # fmt: skip  (teacher and student are still equal)
    expected = {
        "patches": 0.2 * patch_oracle(tokens.patches, patch_label_oracle(aux, samples.labels, view.crop.padding)),
        "crops": 0.5 * contrast_oracle(student, taught.detach(), positive),
    }
    if step >= 10:
        labels = method.labels(view, cam)
        maps = tokens.patches.mT.reshape(2, -1, 4, 4)
        expected["segmentation"] = 0.2 * balanced_oracle(bilinear(trunk.head(maps), (SIDE, SIDE)), labels)
    found = method.losses({"tagged": samples}, now(step)).terms
    assert found.keys() == expected.keys() | {"tags", "tags_aux"}
    for name, term in expected.items():
        same_gradients(found[name], term, method)
    for mean, wanted in zip(method.teacher.parameters(), teacher, strict=True):
        torch.testing.assert_close(mean, wanted)


def test_the_teacher_follows_the_student_before_it_teaches():
    method, samples = built(momentum=0.75), items(2)
    state = method.views.generator.get_state()
    with torch.no_grad():
        for value in method.projection.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    before = [value.clone() for value in method.teacher.parameters()]
    live = [value.clone() for value in method.projection.parameters()]
    term = method.losses({"tagged": samples}, now(0)).terms["crops"]
    for old, new, student in zip(before, method.teacher.parameters(), live, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)
    # with a teacher that stays, as it is now, the same draws give the same loss
    method.views.generator.set_state(state)
    object.__setattr__(method.settings, "momentum", 1.0)
    torch.testing.assert_close(method.losses({"tagged": samples}, now(0)).terms["crops"], term)


def test_the_teacher_is_saved_with_the_method_and_never_learns():
    method = built()
    state = method.state_dict()
    assert {name.split(".")[0] for name in state} == {"network", "projection", "teacher"}
    assert not any("teacher" in name or "projection" in name for name, _ in method.network.named_parameters())
    terms = method.losses({"tagged": items(2)}, now(50)).terms
    sum(terms.values()).backward()
    assert all(value.grad is None for value in method.teacher.parameters())
    assert all(value.grad is not None for value in method.projection.parameters())
    again = built()
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.teacher.parameters(), method.teacher.parameters(), strict=True))


def test_crops_reach_the_encoder_and_the_projection_only():
    method = built()
    reached = gradients(method.losses({"tagged": items(2)}, now(0)).terms["crops"], method)
    assert {".".join(name.split(".")[:2]) for name in reached} >= {"network.encoder", "projection.last"}
    assert {name.split(".")[0] for name in reached} == {"network", "projection"}
    assert not any(name.startswith(("network.head", "network.classifier")) for name in reached)


def test_without_negatives_the_loss_is_that_of_positives_alone():
    """All levels above `least`: only the constant 1e-4 stands against the positives."""
    method, samples = built(least=0.0, crops=2), items(2)
    method.recipe = recipe(method.settings, cam_low=0.0)
    term = method.losses({"tagged": samples}, now(0)).terms["crops"]
    assert 0 < term.item() < 0.5 * 2 * math.log1p(1e-4 * math.exp(1 / 0.5))


@pytest.mark.parametrize("side", [3, 17])
def test_a_crop_must_hold_a_patch_and_fit_the_view(side):
    with pytest.raises(SettingError, match=f"side is {side}; it must lie between a patch, 4, and crop, 16"):
        built(side=side)
