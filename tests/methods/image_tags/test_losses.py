"""Losses of the image-tag methods against torch's, loops written from the equations, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from repro.methods.image_tags.common import balanced_cross_entropy, dense_energy, energy_gate, gated_energy, tag_loss
from repro.methods.image_tags.pcre import Pairs, confidence_loss, fused, refine_loss, shown_classes

B, C, H, W = 3, 4, 5, 6


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tags_of(seed):
    return (normal(seed, B, C) > 0).double()


def labels_of(seed, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C + 1, (B, H, W), generator=generator)
    labels[torch.rand(B, H, W, generator=generator) < ignored] = 255
    return labels


def surprise(p, target):
    """Binary cross-entropy of one probability."""
    return -math.log(p if target else 1 - p)


def test_tag_loss_is_torch_s_soft_margin():
    logits, tags = normal(0, B, C).requires_grad_(), tags_of(1)
    loss = tag_loss(logits, tags)
    torch.testing.assert_close(loss, F.multilabel_soft_margin_loss(logits, tags))
    assert torch.autograd.gradcheck(lambda x: tag_loss(x, tags), logits)
    rows = zip(logits.flatten().tolist(), tags.flatten().tolist(), strict=True)
    expected = sum(math.log1p(math.exp(-x if y else x)) for x, y in rows) / (B * C)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert tag_loss(logits.half(), tags.long()).dtype == torch.float32
    assert tag_loss(torch.zeros(2, 3), torch.zeros(2, 3)).item() == pytest.approx(math.log(2))


def test_confidence_loss_is_the_loop():
    score, tags = normal(2, B, C).sigmoid().requires_grad_(), tags_of(3)
    rows = zip(score.flatten().tolist(), tags.flatten().tolist(), strict=True)
    expected = sum(surprise(*row) for row in rows) / (B * C)
    assert confidence_loss(score, tags).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: confidence_loss(x, tags), score)


def test_confidence_loss_at_the_ends_and_under_autocast():
    score = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    loss = confidence_loss(score, torch.tensor([[1, 0, 0, 1]]))
    assert loss.item() == 50  # logarithms end at -100
    loss.backward()
    assert score.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert confidence_loss(score.bfloat16(), torch.tensor([[1, 0, 0, 1]])).item() == 50


def test_refine_loss_is_the_loop():
    tags, labels = tags_of(4), labels_of(5)
    tags[0] = 0
    pairs = shown_classes(tags)
    masks = normal(6, B, C, H, W).sigmoid().requires_grad_()
    found = normal(7, B, C) > -0.5
    total, number = 0.0, 0
    for image in range(B):
        for place in range(C):
            if not pairs.shown[image, place]:
                continue
            number += 1
            if not found[image, place]:
                continue
            own = labels[image] == pairs.classes[image, place] + 1
            values = zip(masks[image, place].flatten().tolist(), own.flatten().tolist(), strict=True)
            total += sum(surprise(*row) for row in values) / (H * W)
    assert refine_loss(masks, found, pairs, labels).item() == pytest.approx(total / number, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: refine_loss(x, found, pairs, labels), masks)
    refine_loss(masks, found, pairs, labels.to(torch.uint8)).backward()
    assert not masks.grad[~(found & pairs.shown)].any()


def test_refine_loss_by_hand():
    pairs = Pairs(torch.tensor([[1, 0], [0, 1]]), torch.tensor([[True, True], [True, False]]))
    masks = torch.full((2, 2, 1, 2), 0.25)
    labels = torch.tensor([[[2, 255]], [[0, 1]]])
    all_found = torch.ones(2, 2, dtype=torch.bool)
    # pair (0, class 1): one pixel is its own, the ignored one is not; pair (0, class 0): none; pair (1, class 0): one
    one, none = (math.log(4) - math.log(0.75)) / 2, -math.log(0.75)
    assert refine_loss(masks, all_found, pairs, labels).item() == pytest.approx((one + none + one) / 3)
    missing = torch.tensor([[True, False], [True, True]])
    assert refine_loss(masks, missing, pairs, labels).item() == pytest.approx(2 * one / 3)
    assert refine_loss(masks, all_found & False, pairs, labels).item() == 0
    nobody = Pairs(pairs.classes, pairs.shown & False)
    assert refine_loss(masks, all_found, nobody, labels).item() == 0


def test_balanced_cross_entropy_is_the_loop():
    logits, labels = normal(8, B, C + 1, H, W).requires_grad_(), labels_of(9)
    sides = {True: [], False: []}
    for image, row, column in (labels != 255).nonzero().tolist():
        label = labels[image, row, column].item()
        sides[label == 0].append(-logits[image, :, row, column].log_softmax(0)[label].item())
    expected = sum(0.5 * sum(side) / len(side) for side in sides.values())
    assert balanced_cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: balanced_cross_entropy(x, labels), logits)


@pytest.mark.parametrize("label, factor", [(0, 0.5), (2, 0.5), (255, 0.0)])
def test_balanced_cross_entropy_with_one_side_empty(label, factor):
    logits = torch.zeros(1, C + 1, 4, 4, requires_grad=True)
    loss = balanced_cross_entropy(logits, torch.full((1, 4, 4), label, dtype=torch.uint8))
    assert loss.item() == pytest.approx(factor * math.log(C + 1), rel=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_fusion_by_hand():
    cam = torch.tensor([0.5, 1.0]).view(1, 1, 1, 2).repeat(1, 2, 1, 1)
    regions = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    torch.testing.assert_close(fused(cam, regions)[0, :, 0], torch.tensor([[0.65, 0.7], [0.5, 1.0]]))
    torch.testing.assert_close(fused(cam, regions, 0.5)[0, :, 0], torch.tensor([[0.75, 0.5], [0.5, 1.0]]))
    assert torch.equal(fused(cam, regions, 0.0), cam)


def kernel_of(images, sigma_rgb, sigma_xy):
    """K of one image (3, H, W) by loops over pairs of pixels."""
    height, width = images.shape[1:]
    places = [(row, column) for row in range(height) for column in range(width)]
    kernel = torch.zeros(len(places), len(places), dtype=torch.float64)
    for p, (a, b) in enumerate(places):
        for q, (c, d) in enumerate(places):
            colour = sum((images[k, a, b] - images[k, c, d]).item() ** 2 for k in range(3))
            exponent = colour / (2 * sigma_rgb**2) + ((a - c) ** 2 + (b - d) ** 2) / (2 * sigma_xy**2)
            kernel[p, q] = math.exp(-exponent)
    return kernel


def slow_energy(probs, labels, roi, kernels):
    """Energy and released gradient with respect to p, by loops over images, classes and pixels."""
    energy, slope = 0.0, torch.zeros_like(probs)
    batch, classes, height, width = probs.shape
    for image in range(batch):
        inside = (probs[image] * roi[image]).flatten(1)
        for k in range(classes):
            filtered = kernels[image] @ inside[k]
            for at in range(height * width):
                row, column = divmod(at, width)
                gate = max(0.0, roi[image, row, column].item() - probs[image, :, row, column].max().item())
                if labels[image, row, column] == 255:
                    gate = 1.0
                energy -= inside[k, at].item() * gate * filtered[at].item() / batch
                slope[image, k, row, column] = -2 * gate * filtered[at] * roi[image, row, column] / batch
    return energy, slope


@pytest.mark.parametrize("padded", [False, True])
def test_dense_energy_and_its_released_gradient_are_the_loop(padded):
    probs = normal(10, B, 3, 4, 5).softmax(1).requires_grad_()
    images = 255 * normal(11, B, 3, 4, 5).sigmoid()
    labels, roi = labels_of(12)[:, :4, :5], torch.ones(B, 4, 5, dtype=torch.bool)
    if padded:
        roi[1, :, 3:] = False
    kernels = [kernel_of(image, 15.0, 20.0) for image in images]
    energy, slope = slow_energy(probs.detach(), labels, roi.double(), kernels)
    loss = dense_energy(probs, images, labels, roi if padded else None, 15.0, 20.0, downscale=1)
    assert loss.item() == pytest.approx(energy, rel=1e-10)
    loss.backward()
    torch.testing.assert_close(probs.grad, slope, rtol=1e-9, atol=1e-12)


def test_dense_energy_at_half_size_is_that_of_resized_maps():
    probs, images = normal(13, 2, 3, 8, 8).softmax(1), 255 * normal(14, 2, 3, 8, 8).sigmoid()
    labels = torch.full((2, 8, 8), 255)
    labels[:, ::2, ::2] = 1  # nearest pixels are the even ones, and all of them have a label
    small = F.avg_pool2d(probs, 2)
    value = dense_energy(probs, images, labels)
    expected = dense_energy(small, images[:, :, ::2, ::2], labels[:, ::2, ::2], sigma_xy=50, downscale=1)
    torch.testing.assert_close(value, expected)
    assert value != dense_energy(small, images[:, :, ::2, ::2], torch.full((2, 4, 4), 255), sigma_xy=50, downscale=1)


def test_exact_gradient_of_the_energy():
    probs = normal(15, 2, 3, 2, 3).softmax(1).requires_grad_()
    gate = normal(16, 2, 2, 3).sigmoid()
    root = normal(17, 2, 6, 6)
    kernel = root @ root.mT

    def smooth(values):
        return (values.flatten(2) @ kernel).view_as(values)

    assert torch.autograd.gradcheck(lambda p: gated_energy(p, gate, smooth, "exact"), probs)
    torch.testing.assert_close(gated_energy(probs, gate, smooth), gated_energy(probs, gate, smooth, "exact"))
    # with a gate of 1 everywhere both gradients are the same
    slopes = [
        torch.autograd.grad(gated_energy(probs, torch.ones_like(gate), smooth, form), probs)[0]
        for form in ("released", "exact")
    ]
    torch.testing.assert_close(*slopes)
    uneven = [torch.autograd.grad(gated_energy(probs, gate, smooth, form), probs)[0] for form in ("released", "exact")]
    assert not torch.allclose(*uneven)
    with pytest.raises(ValueError, match="true"):
        gated_energy(probs, gate, smooth, "true")


def test_gate_by_hand():
    probs = torch.tensor([[[0.9, 0.4, 0.6]], [[0.1, 0.6, 0.4]]]).transpose(0, 1)[:, :, None]
    ignored = torch.tensor([[[False, False, True]]])
    torch.testing.assert_close(energy_gate(probs, ignored, torch.ones(1, 1, 3)), torch.tensor([[[0.1, 0.4, 1.0]]]))
    torch.testing.assert_close(energy_gate(probs, ignored, torch.zeros(1, 1, 3)), torch.tensor([[[0.0, 0.0, 1.0]]]))
