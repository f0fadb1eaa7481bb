"""Losses against torch, sorting and sums by hand; streams, learning rates, crops and fixed-threshold targets."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from repro.data.mask_views import MaskViews
from repro.methods.few_masks import METHODS
from repro.methods.few_masks.common import (
    LABELLED,
    OHEM_KEPT,
    cross_entropy,
    detached,
    ohem,
    threshold_targets,
    weighted_cross_entropy,
)
from repro.methods.few_masks.unimatch import FixMatch
from repro.models.deeplab import deeplab
from repro.train import IndexStream, Items, hash_seed
from tests.methods.few_masks import fakes


def maps(seed, classes=4, size=(2, 5, 7), unknown=0.3):
    """Logits (B, K, H, W) and uint8 labels, a part of them 255."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = size
    logits = 2 * torch.randn(batch, classes, height, width, generator=generator)
    labels = torch.randint(classes, size, generator=generator, dtype=torch.uint8)
    return logits, labels.masked_fill(torch.rand(size, generator=generator) < unknown, 255)


def kept_pixels(logits, labels):
    """Logits (n, K) and labels (n,) of the pixels that are not 255."""
    known = labels != 255
    return logits.permute(0, 2, 3, 1)[known], labels[known].long()


def sorted_ohem(logits, labels, threshold, kept):
    """The mean loss of the hardest pixels, by sorting all of them."""
    losses = F.cross_entropy(*kept_pixels(logits, labels), reduction="none")
    probabilities = losses.neg().exp().numpy()
    ordered = np.sort(probabilities)
    limit = max(np.float32(threshold), ordered[kept - 1]) if kept <= len(ordered) else math.inf
    chosen = losses.numpy()[probabilities <= limit]
    return chosen.mean(dtype=np.float64) if len(chosen) else 0.0


# Cross-entropy


@examples(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 21]))
def test_cross_entropy_is_torchs_on_the_known_pixels(seed, classes):
    logits, labels = maps(seed, classes)
    logits.requires_grad_()
    loss = cross_entropy(logits, labels)
    expected = F.cross_entropy(*kept_pixels(logits, labels))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_without_a_label_the_loss_and_its_gradient_are_zero(loss):
    logits, labels = maps(0, unknown=1.1)
    logits = (1e4 * logits).requires_grad_()
    nothing = torch.zeros(labels.shape)
    assert weighted_cross_entropy(logits, torch.zeros_like(labels).long(), nothing, nothing.bool()).item() == 0
    value = loss(logits, labels)
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LABELLED.values(), ids=LABELLED)
def test_half_precision_is_widened_before_anything_is_computed(loss, dtype):
    logits, labels = maps(1)
    half = logits.to(dtype)
    assert torch.equal(loss(half, labels), loss(half.float(), labels)) and loss(half, labels).dtype == torch.float32
    label = labels.long().clamp(max=3)
    parts = (label, torch.rand(labels.shape), labels != 255)
    assert torch.equal(weighted_cross_entropy(half, *parts), weighted_cross_entropy(half.float(), *parts))


# OHEM


@given(st.integers(0, 1000), st.floats(0, 1), st.integers(1, 80))
def test_ohem_is_the_mean_of_the_hardest_and_ties_count_together(seed, threshold, kept):
    """Random pixels, then pixels drawn from five: many are equal, and equal ones are in or out together."""
    logits, labels = maps(seed, unknown=seed % 4 / 3)
    value = ohem(logits, labels, threshold, kept).item()
    assert value == pytest.approx(sorted_ohem(logits, labels, threshold, kept), rel=1e-5)
    rng = np.random.default_rng(seed)
    table, classes = torch.tensor(rng.normal(0, 2, (5, 3)), dtype=torch.float32), torch.tensor([0, 1, 2, 1, 255])
    drawn = torch.tensor(rng.integers(5, size=(2, 4, 4)))
    logits, labels = table[drawn].permute(0, 3, 1, 2), classes[drawn].to(torch.uint8)
    value = ohem(logits, labels, threshold, kept).item()
    assert value == pytest.approx(sorted_ohem(logits, labels, threshold, kept), rel=1e-5)


def pixels(*probabilities):
    """Two classes in one row, all labelled 0 with these probabilities."""
    logits = torch.tensor([[math.log(p / (1 - p)), 0.0] for p in probabilities]).T.reshape(1, 2, 1, -1)
    return logits, torch.zeros(1, 1, len(probabilities), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("threshold", "kept", "counting"),
    [
        (0.7, 1, (0.1, 0.3)),  # all up to the threshold, although fewer would do
        (0.2, 3, (0.1, 0.3, 0.8)),  # too few are hard: the hardest three
        (0.2, 5, (0.1, 0.3, 0.8, 0.9, 0.95)),
        (0.2, 6, (0.1, 0.3, 0.8, 0.9, 0.95)),  # fewer than six are there: all
        (0.0, 1, (0.1,)),  # never none
    ],
)
def test_ohem_by_hand(threshold, kept, counting):
    logits, labels = pixels(0.9, 0.1, 0.8, 0.3, 0.95)
    expected = -sum(math.log(p) for p in counting) / len(counting)
    assert ohem(logits, labels, threshold, kept).item() == pytest.approx(expected, rel=1e-5)


def test_a_probability_that_equals_the_threshold_is_hard():
    logits, labels = pixels(0.9, 0.1, 0.6)
    exact = (-F.cross_entropy(logits, labels.long(), reduction="none")).exp()[0, 0, 2].item()
    expected = -(math.log(0.1) + math.log(0.6)) / 2
    assert ohem(logits, labels, exact, 1).item() == pytest.approx(expected, rel=1e-5)
    assert ohem(logits, labels, exact - 1e-6, 1).item() == pytest.approx(-math.log(0.1), rel=1e-5)


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_fewer_labels_than_are_kept_count_all_however_easy(unknown):
    logits, labels = maps(2, unknown=unknown)
    logits[:, 0] += 30 * (labels == 0)
    for kept in (int((labels != 255).sum()) + 1, labels.numel(), labels.numel() + 1, OHEM_KEPT):
        torch.testing.assert_close(ohem(logits, labels, 0.1, kept), cross_entropy(logits, labels))


def test_only_hard_pixels_have_a_gradient():
    logits, labels = pixels(0.9, 0.1, 0.8, 0.3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(ohem(logits, labels, 0.5, 1), logits)
    assert (gradient[0, :, 0].abs().sum(0) > 0).tolist() == [False, True, False, True]
    torch.testing.assert_close(gradient[0, 0, 0, 1], torch.tensor(-0.9 / 2))


# Pseudo-labels


def test_weighted_cross_entropy_by_hand():
    logits, labels = pixels(0.9, 0.1, 0.8, 0.3)
    weight = torch.tensor([[[1.0, 0.5, 0.0, 0.0]]])
    valid = torch.tensor([[[True, True, True, False]]])
    expected = -(math.log(0.9) + 0.5 * math.log(0.1)) / 3  # three valid pixels, not 1.5 of weight
    assert weighted_cross_entropy(logits, labels.long(), weight, valid).item() == pytest.approx(expected, rel=1e-5)
    chosen = -(math.log(0.9) + math.log(0.1)) / 3
    assert weighted_cross_entropy(logits, labels.long(), weight > 0, valid).item() == pytest.approx(chosen, rel=1e-5)


@examples(max_examples=30)
@given(st.integers(0, 1000))
def test_weighted_cross_entropy_is_a_sum_over_pixels(seed):
    logits, labels = maps(seed)
    label, valid = labels.long().clamp(max=3), labels != 255
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) * valid
    logits.requires_grad_()
    flat, classes = logits.permute(0, 2, 3, 1).reshape(-1, 4).double(), label.flatten()
    each = [row.logsumexp(0).item() - row[k].item() for row, k in zip(flat, classes, strict=True)]
    total = sum(w * loss for w, loss in zip(weight.flatten().tolist(), each, strict=True))
    value = weighted_cross_entropy(logits, label, weight, valid)
    assert value.item() == pytest.approx(total / int(valid.sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.equal(gradient.abs().sum(1) > 0, weight > 0)


# Streams, learning rates, crops


RECIPE = SimpleNamespace(batch=4, unlabelled_ratio=1)


def test_mix_draws_the_unlabelled_images_in_another_order():
    pool = SimpleNamespace(labelled=torch.tensor([2, 7]), unlabelled=torch.tensor([0, 1, 3, 4, 5, 6]))
    streams = fakes.build(FixMatch).streams(pool, RECIPE)
    assert list(streams) == ["labelled", "unlabelled", "mix"]
    assert [(indices.tolist(), batch) for indices, batch in streams.values()] == [
        ([2, 7], 4), ([0, 1, 3, 4, 5, 6], 4), ([0, 1, 3, 4, 5, 6], 4),
    ]  # fmt: skip
    drawn = {
        name: torch.cat([IndexStream(*streams[name], hash_seed(0, 0, name)).next() for _ in range(3)])
        for name in ("unlabelled", "mix")
    }
    assert not torch.equal(drawn["unlabelled"], drawn["mix"])
    assert fakes.build(FixMatch).streams(pool, SimpleNamespace(batch=4, unlabelled_ratio=2))["mix"][1] == 8


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_backbone_and_head_are_trained_at_their_own_rates(method):
    network = deeplab("resnet-mini", 4, 8)
    built = method(method.Settings(), network, None, 4, cross_entropy, 7.5)
    backbone, head = built.parameter_groups(1e-4)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in backbone["params"]} == {n for n in names.values() if n.startswith("backbone.")}
    assert {names[id(p)] for p in head["params"]} == {n for n in names.values() if not n.startswith("backbone.")}
    assert len(backbone["params"]) + len(head["params"]) == len(names)
    assert (backbone["lr_factor"], head["lr_factor"]) == (1.0, 7.5)
    assert backbone["weight_decay"] == head["weight_decay"] == 1e-4  # on batch norms and biases too


def test_void_of_hidden_masks_stays_valid_and_only_padding_does_not():
    """Real views: 255 is ignored by the labelled loss, but just what lies beyond the image, or 254, is padding."""
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = torch.full((4, 16, 16), 255, dtype=torch.uint8)
    labels[:, 12:] = 254  # what a loader padded
    method = FixMatch(FixMatch.Settings(), nn.Identity(), MaskViews(16, (1, 1), flip=False), 3, cross_entropy)
    (crop,) = method.crops({"unlabelled": Items(torch.arange(4), images, labels)})
    assert torch.equal(crop.padding, labels == 254) and (crop.masks == 255).all()
    assert torch.equal(crop.images, images)
    shrunk = FixMatch(FixMatch.Settings(), nn.Identity(), MaskViews(16, (0.5, 0.5), flip=False), 3, cross_entropy)
    (crop,) = shrunk.crops({"unlabelled": Items(torch.arange(4), images, torch.full_like(labels, 255))})
    inside = torch.zeros(4, 16, 16, dtype=torch.bool)
    inside[:, :8, :8] = True
    assert torch.equal(~crop.padding, inside) and not crop.images[:, :, 8:].any() and not crop.images[..., 8:].any()


def test_a_threshold_is_reached_at_equality_and_padding_never_counts():
    logits = torch.zeros(1, 4, 2, 2)  # a probability of exactly 1/4 everywhere
    logits[0, 2, 0, 1] = 5.0
    padding = torch.tensor([[[False, True], [False, False]]])
    for threshold, chosen in ((0.0, True), (0.25, True), (0.2500001, False)):
        found = threshold_targets(logits, padding, threshold)
        assert found.weight.flatten().tolist() == [chosen, False, chosen, chosen] and found.weight.dtype == torch.bool
    assert found.label.tolist() == [[[0, 2], [0, 0]]] and torch.equal(found.valid, ~padding)
    assert found.confidence[0, 0, 1].item() == pytest.approx(torch.tensor([0.0, 0, 5, 0]).softmax(0)[2].item())


def test_detached_logits_keep_the_networks_mode():
    network = fakes.TinyNetwork().train()
    x = torch.rand(3, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = detached(network, x)
    assert logits.dtype == torch.float32 and not logits.requires_grad and network.training
    assert network.backbone[1].num_batches_tracked == 1
    network.eval()
    torch.testing.assert_close(detached(network, x), network(x).detach())
