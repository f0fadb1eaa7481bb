"""What methods for image tags share: the trunk, losses and contrasts against loops, views, labels, learning rates."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from repro.cam import refined_labels
from repro.methods.image_tags.afa import AFA, AFANetwork, AFASettings
from repro.methods.image_tags.common import (
    Trunk,
    balanced_cross_entropy,
    cosines,
    dense_energy,
    patch_contrast,
    tag_loss,
)
from repro.methods.image_tags.dupl import DuPL, DuPLSettings, Pair
from repro.methods.image_tags.pcre import PCRE, PCRESettings, class_contrast
from repro.methods.image_tags.toco import Plain, PlainSettings, ToCo, ToCoSettings
from tests.methods.image_tags import fakes
from tests.methods.image_tags.fakes import CLASSES, SCALES, SIDE, Head
from tests.methods.image_tags.test_pcre import labels_of
from tests.methods.image_tags.test_pcre import network as pcre_network

B, N, C, D = 3, 6, 4, 5


@pytest.fixture
def trunk():
    return Trunk(fakes.encoder(), CLASSES, Head())


def images(count=2, side=16, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_tags_come_from_the_largest_value_over_patches(trunk):
    x = images()
    predicted, tokens = trunk.predict(x), trunk.encoder(x)
    for logits, patches, classify in (
        (predicted.logits, tokens.patches, trunk.classifier),
        (predicted.logits_aux, tokens.auxiliary, trunk.classifier_aux),
    ):
        for b in range(len(x)):
            pooled = [max(patches[b, n, d].item() for n in range(16)) for d in range(fakes.LAYOUT.width)]
            expected = [sum(w * p for w, p in zip(row, pooled, strict=True)) for row in classify.weight.tolist()]
            assert logits[b].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert trunk.classifier.bias is None and trunk.classifier_aux.bias is None
    # each classifier reads its own patches: the auxiliary one does not reach the last block
    last = trunk.encoder.blocks[-1].mlp.fc2.weight
    assert grad(predicted.logits_aux.sum(), last, allow_unused=True, retain_graph=True)[0] is None
    assert grad(predicted.logits.sum(), last, retain_graph=True)[0].any()


def test_segmentation_is_the_head_of_the_patches(trunk):
    x = images()
    tokens = trunk.encoder(x)
    maps = torch.stack([patches.T.reshape(fakes.LAYOUT.width, 4, 4) for patches in tokens.patches])
    torch.testing.assert_close(trunk.predict(x).segmentation, trunk.head(maps))
    torch.testing.assert_close(trunk(x), fakes.bilinear(trunk.head(maps), (16, 16)))
    assert trunk(images(side=24)).shape == (2, CLASSES + 1, 24, 24)


def test_cams_are_those_of_loops_over_scales_and_mirror_images(trunk):
    x = images()
    cam, aux = trunk.both_cams(x, SCALES)
    torch.testing.assert_close(cam, fakes.cam_oracle(fakes.main_cam(trunk), x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux, fakes.cam_oracle(fakes.aux_cam(trunk), x), rtol=1e-4, atol=1e-5)
    assert not cam.requires_grad and not aux.requires_grad
    torch.testing.assert_close(trunk.activation(x, SCALES, torch.zeros(2, CLASSES)), cam, rtol=1e-4, atol=1e-5)
    assert cam.amin() == 0 and cam.amax() <= 1 and cam.shape == (2, CLASSES, 16, 16)


def test_tag_loss_is_torch_s_soft_margin():
    logits, tags = fakes.normal(0, B, C).requires_grad_(), (fakes.normal(1, B, C) > 0).double()
    torch.testing.assert_close(tag_loss(logits, tags), F.multilabel_soft_margin_loss(logits, tags))
    assert torch.autograd.gradcheck(lambda x: tag_loss(x, tags), logits)
    assert tag_loss(logits.half(), tags.long()).dtype == torch.float32


def test_balanced_cross_entropy_is_the_loop():
    logits, labels = fakes.normal(8, B, C + 1, 2, 3).requires_grad_(), labels_of(9)[0]
    torch.testing.assert_close(balanced_cross_entropy(logits, labels), fakes.balanced_oracle(logits, labels))
    assert torch.autograd.gradcheck(lambda x: balanced_cross_entropy(x, labels), logits)


@pytest.mark.parametrize("label, factor", [(0, 0.5), (2, 0.5), (255, 0.0)])
def test_balanced_cross_entropy_with_one_side_empty(label, factor):
    logits = torch.zeros(1, C + 1, 4, 4, requires_grad=True)
    loss = balanced_cross_entropy(logits, torch.full((1, 4, 4), label, dtype=torch.uint8))
    assert loss.item() == pytest.approx(factor * math.log(C + 1), rel=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_dense_energy_and_its_released_gradient_are_those_of_the_kernel():
    """p at half the size is the mean of 2 x 2 pixels; other maps take the even ones (spec 6.6)."""
    probs, images = (
        fakes.normal(13, 2, 3, 8, 6).softmax(1).requires_grad_(),
        255 * fakes.normal(14, 2, 3, 8, 6).sigmoid(),
    )
    labels = torch.where(fakes.normal(15, 2, 8, 6) > 0, 255, 1)
    roi = torch.ones(2, 8, 6, dtype=torch.bool)
    roi[1, :, 4:] = False
    colours, inside, ignored = images[:, :, ::2, ::2], roi[:, ::2, ::2], labels[:, ::2, ::2] == 255
    small = F.avg_pool2d(probs, 2).detach()
    gate = torch.where(ignored, 1, (inside.double() - small.amax(1)).clamp(min=0)).flatten(1)
    at = torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0)).double()
    energy, slope = 0.0, torch.zeros_like(small)
    for b in range(2):
        paint = colours[b].flatten(1).T
        kernel = torch.exp(-(torch.cdist(paint, paint) ** 2) / (2 * 15**2) - torch.cdist(at, at) ** 2 / (2 * 50**2))
        p = (small[b] * inside[b]).flatten(1)
        energy -= (p * gate[b] * (p @ kernel)).sum() / 2
        slope[b] = (-gate[b] * (p @ kernel)).view(3, 4, 3) * inside[b]  # -2 gate (K p) / B of two images
    found = dense_energy(probs, images, labels, roi)
    torch.testing.assert_close(found, energy)
    expected = F.interpolate(slope, scale_factor=2) / 4
    torch.testing.assert_close(grad(found, probs)[0], expected)


@pytest.mark.parametrize("seed", range(5))
def test_patch_contrast_is_the_loop(seed):
    patches, (labels, _) = fakes.normal(seed, B, N, D), labels_of(seed)
    torch.testing.assert_close(patch_contrast(patches, labels), fakes.patch_oracle(patches, labels))


@pytest.mark.parametrize("ignored", [False, True])
def test_contrasts_without_pairs_are_a_half(ignored):
    patches, tokens = fakes.normal(0, B, N, D).requires_grad_(), fakes.normal(1, B, C, D).requires_grad_()
    labels, tags = labels_of(0)
    if ignored:
        labels = torch.full_like(labels, 255)
        losses = [patch_contrast(patches, labels), class_contrast(tokens, patches, labels, tags)]
    else:
        losses = [patch_contrast(patches[:, :1], labels[:, 0, :1])]
        losses += [class_contrast(tokens, patches, labels, torch.zeros_like(tags))]
    assert [loss.item() for loss in losses] == [0.5, 0.5]
    sum(losses).backward()
    assert not patches.grad.any() and not tokens.grad.any()


def test_gradients_of_the_contrasts():
    patches, tokens = fakes.normal(2, B, N, D).requires_grad_(), fakes.normal(3, B, C, D).requires_grad_()
    labels, tags = labels_of(4)
    assert torch.autograd.gradcheck(lambda x: patch_contrast(x, labels), patches)
    assert torch.autograd.gradcheck(lambda z: class_contrast(z, patches, labels, tags), tokens)
    class_contrast(tokens, patches, labels, tags).backward()
    assert patches.grad is None and tokens.grad[tags > 0].any() and not tokens.grad[tags == 0].any()


def test_cosines_of_a_zero_vector_and_in_half_precision():
    vectors = fakes.normal(5, 2, 3, 4)
    vectors[0, 0] = 0
    found = cosines(vectors, vectors)
    assert not found[0, 0].any() and not found[0, :, 0].any()
    torch.testing.assert_close(found[1].diagonal(), torch.ones(3, dtype=torch.float64))
    half = cosines(vectors.half(), vectors.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), found, atol=2e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(vectors.float(), vectors.float()), cosines(*[vectors.float()] * 2).float())
        assert cosines(vectors.float(), vectors.float()).dtype == torch.float32


def plain(seed=0, **changes):
    settings = PlainSettings()
    return Plain(
        settings,
        Trunk(fakes.encoder(), CLASSES, Head()),
        fakes.views(seed),
        fakes.recipe(settings, **changes),
    )


def random_cam(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, CLASSES, 5, 5, generator=generator), (SIDE, SIDE), mode="bilinear")


def test_a_view_is_a_crop_of_the_image_and_no_mask_takes_part():
    method, samples = plain(3), fakes.items()
    asked = []
    crop = method.views.crop
    method.views.crop = lambda images, masks: asked.append(masks) or crop(images, masks)
    view = method.view(samples)
    assert not asked[0].any() and asked[0].shape == samples.images[:, 0].shape
    # moved pixels, 0 where padded, normalised by ImageNet's constants
    moved = view.crop.window.images(samples.images).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(view.x, (moved - mean) / std)
    assert view.crop.padding.any() and not moved[view.crop.padding[:, None].expand_as(moved)].any()
    assert torch.equal(view.crop.padding, view.crop.window.outside) and view.tags is samples.labels
    torch.testing.assert_close(method.pixels(view), moved)
    # the crop is drawn from the generator alone: other images and tags have the same windows
    again = plain(3).view(fakes.items(seed=9))
    assert torch.equal(again.crop.window.row, view.crop.window.row)
    assert torch.equal(again.crop.window.column, view.crop.window.column)


def test_colours_change_if_the_recipe_says_so():
    samples = fakes.items(8)
    plainly, coloured = plain(1).view(samples), plain(1, colour=True).view(samples)
    assert torch.equal(plainly.crop.images, coloured.crop.images)
    changed = (plainly.x - coloured.x).abs().amax((1, 2, 3)) > 0.05
    assert 4 <= changed.sum() <= 8
    inside = plain(1, colour=True).pixels(coloured)
    assert inside.min() >= 0 and inside.max() <= 1
    assert inside[coloured.crop.padding[:, None].expand_as(inside)].abs().max() < 1e-6


def test_the_stream_is_every_image():
    method = plain()
    pool = dataclasses.make_dataclass("Pool", ["labelled", "unlabelled"])(torch.arange(7), torch.arange(0))
    ((index, batch),) = method.streams(pool, method.recipe).values()
    assert index.tolist() == [*range(7)] and batch == 4 and list(method.streams(pool, method.recipe)) == ["tagged"]


@pytest.mark.parametrize(("step", "learns"), [(0, False), (9, False), (10, True), (99, True)])
def test_the_warm_up_is_a_tenth(step, learns):
    assert plain().learning(fakes.now(step)) is learns
    assert plain(warm_up=0.0).learning(fakes.now(0)) and not plain(warm_up=1.0).learning(fakes.now(99))


def methods():
    """Every method, and the parts of its parameters' names that learn faster."""
    made = {"plain": plain()}
    settings = ToCoSettings(side=8, hidden=8)
    made["toco"] = ToCo(settings, Trunk(fakes.encoder(), CLASSES, Head()), fakes.views(), fakes.recipe(settings))
    pair = Pair(Trunk(fakes.encoder(), CLASSES, Head()), Trunk(fakes.encoder(1), CLASSES, Head()))
    made["dupl"] = DuPL(DuPLSettings(), pair, fakes.views(), fakes.recipe(DuPLSettings()))
    walker = AFANetwork(fakes.encoder(), CLASSES, Head(), AFASettings())
    made["afa"] = AFA(AFASettings(), walker, fakes.views(), fakes.recipe(AFASettings()))
    made["pcre"] = PCRE(PCRESettings(), pcre_network(), fakes.views(), fakes.recipe(PCRESettings()))
    parts = ("classifier", "classifier_aux", "head")
    fast = {
        "plain": [f"network.{part}" for part in parts],
        "toco": [f"network.{part}" for part in parts] + ["projection"],
        "dupl": [f"network.{trunk}.{part}" for trunk in ("first", "second") for part in parts],
        "afa": [f"network.{part}" for part in (*parts, "projection")],
        "pcre": [f"network.{part}" for part in parts],
    }
    return [pytest.param(method, fast[name], id=name) for name, method in made.items()]


@pytest.mark.parametrize(("method", "fast"), methods())
def test_classifiers_and_heads_learn_ten_times_as_fast(method, fast):
    slow_group, fast_group = method.parameter_groups(0.01)
    assert (slow_group["lr_factor"], fast_group["lr_factor"]) == (1.0, 10.0)
    assert slow_group["weight_decay"] == fast_group["weight_decay"] == 0.01
    names = {id(value): name for name, value in method.named_parameters() if value.requires_grad}
    told = [{names[id(value)] for value in group["params"]} for group in (slow_group, fast_group)]
    assert told[1] == {name for name in names.values() if any(name.startswith(f"{part}.") for part in fast)}
    assert told[0] == set(names.values()) - told[1] and len(told[0]) + len(told[1]) == len(names)
    # PyTorch's decoder layers call their cross-attention "multihead_attn": that is no head
    assert not any("multihead" in name or name.startswith("teacher") for name in told[1])


def test_labels_are_refined_on_the_view_s_own_pixels():
    method = plain(3)
    view, cam = method.view(fakes.items()), random_cam()
    pixels = view.crop.images.float() / 255
    expected = refined_labels(pixels, cam, view.tags, 0.25, 0.7, ~view.crop.padding)
    assert torch.equal(method.labels(view, cam), expected)
    assert (expected[view.crop.padding] == 255).all() and {0, 255} < set(expected.unique().tolist())
    high = torch.tensor([0.5, 0.6, 0.7, 0.9])
    stricter = refined_labels(pixels, cam, view.tags, 0.25, high, ~view.crop.padding)
    assert torch.equal(method.labels(view, cam, high), stricter) and not torch.equal(stricter, expected)
    shown = [set(labels.unique().tolist()) - {0, 255} for labels in expected]
    assert all(found <= {c + 1 for c in range(CLASSES) if view.tags[b, c]} for b, found in enumerate(shown))
    method.most = int(view.tags.sum(1).max())
    assert torch.equal(method.labels(view, cam), expected)


def test_patch_labels_are_cut_from_the_resized_cam():
    method = plain(3)
    view, cam = method.view(fakes.items()), random_cam()
    labels = method.patch_labels(view, cam, (4, 4))
    assert torch.equal(labels, fakes.patch_label_oracle(cam, view.tags, view.crop.padding))
    assert {0, 255} < set(labels.unique().tolist())
    high = torch.tensor([0.5, 0.6, 0.7, 0.9])
    expected = fakes.patch_label_oracle(cam, view.tags, view.crop.padding, high=high)
    assert torch.equal(method.patch_labels(view, cam, (4, 4), high), expected) and not torch.equal(expected, labels)


def test_a_patch_with_one_padded_pixel_is_ignored():
    method = plain()
    view = method.view(fakes.items())
    padding = torch.zeros_like(view.crop.padding)
    padding[0, 7, 8] = True
    view = dataclasses.replace(view, crop=dataclasses.replace(view.crop, padding=padding))
    labels = method.patch_labels(view, torch.ones(4, CLASSES, SIDE, SIDE), (4, 4))
    assert (labels == 255).nonzero().tolist() == [[0, 1, 2]]


def test_head_terms_are_the_loops():
    method = plain()
    view = method.view(fakes.items())
    logits = torch.randn(4, CLASSES + 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = method.labels(view, random_cam())
    terms = method.head_terms(logits, labels, view)
    assert list(terms) == ["segmentation"]
    large = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
    expected = 0.1 * fakes.balanced_oracle(large, labels)
    torch.testing.assert_close(terms["segmentation"], expected, rtol=1e-5, atol=1e-6)
    method.settings = PlainSettings(energy_weight=0.05)
    view.crop.padding[0, :8] = True
    terms = method.head_terms(logits, labels, view)
    energy = dense_energy(large.softmax(1), view.crop.images.float(), labels, ~view.crop.padding)
    torch.testing.assert_close(terms["energy"], 0.05 * 1e-7 * energy)
