"""What image-tag methods share: views without masks, labels from CAMs, learning rates, the losses of the head."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from repro.cam import refined_labels
from repro.methods.image_tags.afa import AFA, AFANetwork, AFASettings
from repro.methods.image_tags.common import Prediction, Trunk, tag_terms
from repro.methods.image_tags.dupl import DuPL, DuPLSettings, Pair
from repro.methods.image_tags.pcre import PCRE, PCRESettings
from repro.methods.image_tags.toco import Plain, PlainSettings, ToCo, ToCoSettings
from tests.methods.image_tags.fakes import (
    CLASSES,
    SIDE,
    Head,
    balanced_oracle,
    encoder,
    items,
    now,
    patch_label_oracle,
    recipe,
    views,
)
from tests.methods.image_tags.test_pcre import network as pcre_network


def plain(seed=0, **changes):
    settings = PlainSettings()
    return Plain(settings, Trunk(encoder(), CLASSES, Head()), views(seed), recipe(settings, **changes))


def random_cam(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(count, CLASSES, 5, 5, generator=generator), (SIDE, SIDE), mode="bilinear")


def test_a_view_is_a_crop_of_the_image_and_no_mask_takes_part():
    method, samples = plain(3), items()
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
    again = plain(3).view(items(seed=9))
    assert torch.equal(again.crop.window.row, view.crop.window.row)
    assert torch.equal(again.crop.window.column, view.crop.window.column)


def test_colours_change_if_the_recipe_says_so():
    samples = items(8)
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
    assert plain().learning(now(step)) is learns
    assert plain(warm_up=0.0).learning(now(0)) and not plain(warm_up=1.0).learning(now(99))


def methods():
    """Every method, and the parts of its parameters' names that learn faster."""
    made = {"plain": plain()}
    settings = ToCoSettings(side=8, hidden=8)
    made["toco"] = ToCo(settings, Trunk(encoder(), CLASSES, Head()), views(), recipe(settings))
    pair = Pair(Trunk(encoder(), CLASSES, Head()), Trunk(encoder(1), CLASSES, Head()))
    made["dupl"] = DuPL(DuPLSettings(), pair, views(), recipe(DuPLSettings()))
    walker = AFANetwork(encoder(), CLASSES, Head(), AFASettings())
    made["afa"] = AFA(AFASettings(), walker, views(), recipe(AFASettings()))
    made["pcre"] = PCRE(PCRESettings(), pcre_network(), views(), recipe(PCRESettings()))
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


def test_frozen_parameters_are_in_no_group():
    method = plain()
    method.network.encoder.pos_embed.requires_grad_(False)
    groups = method.parameter_groups(0.0)
    assert all(value is not method.network.encoder.pos_embed for group in groups for value in group["params"])


def test_labels_are_refined_on_the_view_s_own_pixels():
    method = plain(3)
    view, cam = method.view(items()), random_cam()
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
    view, cam = method.view(items()), random_cam()
    labels = method.patch_labels(view, cam, (4, 4))
    assert torch.equal(labels, patch_label_oracle(cam, view.tags, view.crop.padding))
    assert {0, 255} < set(labels.unique().tolist())
    high = torch.tensor([0.5, 0.6, 0.7, 0.9])
    expected = patch_label_oracle(cam, view.tags, view.crop.padding, high=high)
    assert torch.equal(method.patch_labels(view, cam, (4, 4), high), expected) and not torch.equal(expected, labels)


def test_a_patch_with_one_padded_pixel_is_ignored():
    method = plain()
    view = method.view(items())
    padding = torch.zeros_like(view.crop.padding)
    padding[0, 7, 8] = True
    view = dataclasses.replace(view, crop=dataclasses.replace(view.crop, padding=padding))
    labels = method.patch_labels(view, torch.ones(4, CLASSES, SIDE, SIDE), (4, 4))
    assert (labels == 255).nonzero().tolist() == [[0, 1, 2]]


def test_head_terms_are_the_loops():
    method = plain()
    view = method.view(items())
    logits = torch.randn(4, CLASSES + 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = method.labels(view, random_cam())
    terms = method.head_terms(logits, labels, view)
    assert list(terms) == ["segmentation"]
    large = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False)
    expected = 0.1 * balanced_oracle(large, labels)
    torch.testing.assert_close(terms["segmentation"], expected, rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (terms["segmentation"], expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_the_dense_energy_joins_when_it_has_a_weight():
    """Half resolution, 1e-7 and the settings' weight, colours in 0..255 (spec 6.6), by loops over pairs of pixels."""
    method = plain()
    method.settings = PlainSettings(energy_weight=0.05)
    view = method.view(items(2))
    logits = torch.randn(2, CLASSES + 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = method.labels(view, random_cam(count=2))
    terms = method.head_terms(logits, labels, view)
    probs = F.interpolate(logits, (SIDE, SIDE), mode="bilinear", align_corners=False).softmax(1)
    probs = F.interpolate(probs, (8, 8), mode="bilinear", align_corners=False).double().numpy()
    colours = view.crop.images[:, :, ::2, ::2].double().numpy()
    roi, known = (~view.crop.padding[:, ::2, ::2]).double().numpy(), labels[:, ::2, ::2].numpy()
    rows, columns = (part.ravel() for part in np.indices((8, 8)))
    far = ((rows[:, None] - rows) ** 2 + (columns[:, None] - columns) ** 2) / 50**2
    total = 0.0
    for b in range(2):
        paint = colours[b].reshape(3, -1)
        near = np.exp(-0.5 * (far + (((paint[:, :, None] - paint[:, None]) / 15) ** 2).sum(0)))
        p = (probs[b] * roi[b]).reshape(CLASSES + 1, -1)
        gate = np.where(known[b] == 255, 1, np.maximum(0, roi[b] - probs[b].max(0))).ravel()
        total -= (p * gate * (p @ near)).sum() / 2
    assert terms["energy"].item() == pytest.approx(0.05 * 1e-7 * total, rel=1e-4)


def test_tag_terms_are_torch_s_soft_margin():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 4, CLASSES, generator=generator)
    tags = items().labels
    terms = tag_terms(Prediction(logits, other, None, None), tags)
    torch.testing.assert_close(terms["tags"], F.multilabel_soft_margin_loss(logits, tags))
    torch.testing.assert_close(terms["tags_aux"], F.multilabel_soft_margin_loss(other, tags))
