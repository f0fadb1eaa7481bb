"""ToCo and plain training: crops, contrasts and terms recomputed by loops, the teacher's mean."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from repro.cam import refined_labels
from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.toco import (
    BOTTLENECK,
    EMBEDDING,
    Plain,
    PlainSettings,
    Projection,
    ToCo,
    ToCoSettings,
    choose_crops,
    confidence_levels,
    crop_contrast,
    cut,
)
from repro.settings import SettingError
from tests.methods.image_tags import fakes
from tests.methods.image_tags.fakes import CLASSES, SIDE, Head


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_levels_by_hand():
    cam = torch.tensor([[0.25, 0.26, 0.69, 0.7], [0.9, 0.1, 0.9, 0.9]]).view(1, 2, 1, 4)
    for tags, levels in (([1, 0], [0, 1, 1, 2]), ([1, 1], [2, 1, 2, 2]), ([0, 0], [0, 0, 0, 0])):
        assert confidence_levels(cam, torch.tensor([tags]), 0.25, 0.7).tolist() == [[levels]]
    assert confidence_levels(cam.half(), torch.tensor([[1, 0]]), 0.5, 0.7).tolist() == [[[0, 0, 1, 2]]]


def test_cut_is_a_slice():
    images = torch.rand(2, 3, 9, 11, generator=generator())
    corners = torch.tensor([[[0, 0], [4, 6]], [[1, 3], [4, 0]]])
    crops = cut(images, corners, 5)
    assert crops.shape == (2, 2, 3, 5, 5)
    for image in range(2):
        for crop, (top, left) in enumerate(corners[image].tolist()):
            assert torch.equal(crops[image, crop], images[image, :, top : top + 5, left : left + 5])


@pytest.mark.parametrize("side", [4, 5])
def test_crops_are_centred_on_pixels_that_are_not_confident(side):
    levels = torch.full((2, 20, 24), 2)
    levels[0, 8:12, 10:13] = 1
    levels[1, :, :9] = 0
    corners, negative = choose_crops(levels, 8, side, generator=generator())
    assert len({tuple(corner) for corner in corners[0].tolist()}) == 8
    for image in range(2):
        for crop, (top, left) in enumerate(corners[image].tolist()):
            assert 0 <= top <= 20 - side and 0 <= left <= 24 - side
            assert levels[image, top + side // 2, left + side // 2] < 2
            window = levels[image, top : top + side, left : left + side]
            assert negative[image, crop].item() == (window.sum().item() / side**2 <= 0.2)
    assert not negative[0].any() and negative[1].any()


def test_every_place_is_as_likely():
    levels = torch.full((500, 6, 6), 2)
    levels[:, 1:5, 1:5] = 1  # with crops of 3: 16 places, all with a centre inside
    corners, _ = choose_crops(levels, 4, 3, generator=generator(1))
    counts = torch.bincount((corners[..., 0] * 4 + corners[..., 1]).flatten(), minlength=16)
    assert counts.sum() == 2000 and (counts - 125).abs().max() < 5 * 11


def test_too_few_places_open_all():
    levels = torch.full((1, 7, 7), 2)
    levels[0, 3, 3] = 0
    corners, negative = choose_crops(levels, 2, 5, generator=generator(2))
    drawn = {
        tuple(c) for seed in range(60) for c in choose_crops(levels, 2, 5, generator=generator(seed))[0][0].tolist()
    }
    assert len(drawn) == 9 and not negative.any()
    only = choose_crops(levels, 1, 5, generator=generator(3))[0]
    assert only.tolist() == [[[1, 1]]]


def test_the_mean_that_makes_a_crop_negative():
    levels = torch.zeros(3, 5, 5, dtype=torch.int64)
    levels[0, 0] = 1  # 5 of 25 is .2
    levels[1, 0] = 1
    levels[1, 1, 0] = 1
    levels[2, 0, :2] = 2
    _, negative = choose_crops(levels, 1, 5)
    assert negative[:, 0].tolist() == [True, False, True]
    assert choose_crops(levels, 1, 5, least=0.15)[1][:, 0].tolist() == [False, False, False]


@pytest.mark.parametrize("side, count", [(17, 1), (16, 2), (0, 1)])
def test_crops_that_do_not_fit(side, count):
    with pytest.raises(ValueError, match=f"{count} crops of {side} pixels"):
        choose_crops(torch.zeros(1, 16, 16), count, side)


def contrast_oracle(student, taught, positive, temperature=0.5):
    """InfoNCE by loops and exponentials (spec 6.7)."""
    total = 0.0
    for b in range(len(student)):
        scores = [[(t * s).sum().div(temperature).exp() for s in student[b]] for t in taught[b]]
        inner = 0.0
        for row in scores:
            negatives = (
                sum((e for e, keep in zip(row, positive[b], strict=True) if not keep), student[b].new_zeros(())) + 1e-4
            )
            inner = inner + sum(-(e / (e + negatives)).log() for e, keep in zip(row, positive[b], strict=True) if keep)
            inner = inner - (1 / (1 + negatives)).log()
        total = total + inner / (2 * (sum(positive[b]) + 1e-4))
    return total / len(student)


@pytest.mark.parametrize(("seed", "temperature"), [(0, 0.5), (1, 0.5), (2, 1.0)])
def test_crop_contrast_is_the_loop(seed, temperature):
    student, teacher = fakes.normal(seed, 3, 6, 5), fakes.normal(seed + 1, 3, 2, 5)
    positive = fakes.normal(seed + 2, 3, 6) > 0
    positive[:, :2] = True
    positive[0] = True  # no negative at all
    positive[1, 2:] = False  # no positive crop
    value = crop_contrast(student, teacher, positive, temperature)
    torch.testing.assert_close(
        value, contrast_oracle(student, teacher, positive.tolist(), temperature), rtol=1e-10, atol=0
    )


def test_crop_contrast_does_not_overflow_and_leaves_the_teacher_alone():
    student, teacher = (30 * fakes.normal(seed, 3, size, 5) for seed, size in ((0, 5), (1, 2)))
    positive = torch.tensor([True, True, True, False, False]).expand(3, -1)
    student.requires_grad_(), teacher.requires_grad_()
    loss = crop_contrast(student.float(), teacher.float(), positive)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad is None
    small = fakes.normal(2, 3, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: crop_contrast(s, teacher / 30, positive), small)
    no_negative = torch.ones_like(positive)
    assert torch.autograd.gradcheck(lambda s: crop_contrast(s, teacher / 30, no_negative), small)


def built(seed=0, **changes):
    settings = ToCoSettings(**{"side": 8, "hidden": 24, "crops": 5} | changes)
    torch.manual_seed(7)
    trunk = Trunk(fakes.encoder(), CLASSES, Head())
    return ToCo(settings, trunk, fakes.views(seed), fakes.recipe(settings)).train()


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


@pytest.mark.parametrize("step", [5, 10])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(seg_weight=0.2), fakes.items(2)
    view, trunk, generator = fakes.replayed(method, samples), method.network, method.views.generator
    start = generator.get_state()
    # the random numbers of a step, in their order: the view, the second view, the copy's crops, the copy
    method.view(samples)
    other = method.views.strong(method.views.crop(samples.images, torch.zeros_like(samples.images[:, 0])))
    cam, aux = (fakes.cam_oracle(make(trunk), view.x).detach() for make in (fakes.main_cam, fakes.aux_cam))
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
    assert any(not all(row) for row in positive)
    taught = torch.stack([tokens_of[:2] for tokens_of in student])  # teacher and student are still equal
    expected = {
        "patches": 0.2
        * fakes.patch_oracle(tokens.patches, fakes.patch_label_oracle(aux, samples.labels, view.crop.padding)),
        "crops": 0.5 * contrast_oracle(student, taught.detach(), positive),
    }
    if step >= 10:
        labels = method.labels(view, cam)
        expected["segmentation"] = 0.2 * fakes.head_oracle(trunk, tokens, labels)
    found = method.losses({"tagged": samples}, fakes.now(step)).terms
    assert found.keys() == expected.keys() | {"tags", "tags_aux"}
    for name, term in expected.items():
        fakes.same_gradients(found[name], term, method)


def test_the_teacher_follows_the_student_before_it_teaches():
    method, samples = built(momentum=0.75), fakes.items(2)
    state = method.views.generator.get_state()
    with torch.no_grad():
        for value in method.projection.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    before = [value.clone() for value in method.teacher.parameters()]
    live = [value.clone() for value in method.projection.parameters()]
    term = method.losses({"tagged": samples}, fakes.now(0)).terms["crops"]
    for old, new, student in zip(before, method.teacher.parameters(), live, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student)
    # with a teacher that stays, as it is now, the same draws give the same loss
    method.views.generator.set_state(state)
    object.__setattr__(method.settings, "momentum", 1.0)
    torch.testing.assert_close(method.losses({"tagged": samples}, fakes.now(0)).terms["crops"], term)


def test_the_teacher_never_learns():
    method = built()
    assert not any("teacher" in name or "projection" in name for name, _ in method.network.named_parameters())
    terms = method.losses({"tagged": fakes.items(2)}, fakes.now(50)).terms
    sum(terms.values()).backward()
    assert all(value.grad is None for value in method.teacher.parameters())
    assert all(value.grad is not None for value in method.projection.parameters())


def test_crops_reach_the_encoder_and_the_projection_only():
    method = built()
    reached = fakes.gradients(method.losses({"tagged": fakes.items(2)}, fakes.now(0)).terms["crops"], method)
    assert {".".join(name.split(".")[:2]) for name in reached} >= {"network.encoder", "projection.last"}
    assert {name.split(".")[0] for name in reached} == {"network", "projection"}
    assert not any(name.startswith(("network.head", "network.classifier")) for name in reached)


def test_without_negatives_the_loss_is_that_of_positives_alone():
    """All levels above `least`: only the constant 1e-4 stands against the positives."""
    method, samples = built(least=0.0, crops=2), fakes.items(2)
    method.recipe = fakes.recipe(method.settings, cam_low=0.0)
    term = method.losses({"tagged": samples}, fakes.now(0)).terms["crops"]
    assert 0 < term.item() < 0.5 * 2 * math.log1p(1e-4 * math.exp(1 / 0.5))


@pytest.mark.parametrize("side", [3, 17])
def test_a_crop_must_hold_a_patch_and_fit_the_view(side):
    with pytest.raises(SettingError, match=f"side is {side}; it must lie between a patch, 4, and crop, 16"):
        built(side=side)


@pytest.mark.parametrize("step", [0, 9, 10, 99])
def test_terms_and_gradients_of_plain_training_are_those_of_the_equations(step):
    settings, samples = PlainSettings(seg_weight=0.3), fakes.items()
    trunk = Trunk(fakes.encoder(), CLASSES, Head())
    method = Plain(settings, trunk, fakes.views(), fakes.recipe(settings)).train()
    view = fakes.replayed(method, samples)
    tokens = trunk.encoder(view.x)
    expected = fakes.tag_oracles(trunk, tokens, samples.labels)
    if step >= 10:
        cam = fakes.cam_oracle(fakes.main_cam(trunk), view.x).detach()
        pixels = view.crop.images.float() / 255
        labels = refined_labels(pixels, cam, samples.labels, 0.25, 0.7, ~view.crop.padding)
        expected["segmentation"] = 0.3 * fakes.head_oracle(trunk, tokens, labels)
    found = method.losses({"tagged": samples}, fakes.now(step))
    assert found.terms.keys() == expected.keys() and found.pseudo == {}
    for name, term in found.terms.items():
        fakes.same_gradients(term, expected[name], trunk)
