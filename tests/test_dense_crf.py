"""The dense CRF loss against loops over all pairs of pixels."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from repro import dense_crf
from repro.dense_crf import FORMS, dense_crf_loss

BATCH, C, H, W = 2, 3, 4, 5


def inputs(seed=0, height=H, width=W):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(BATCH, C, height, width, generator=generator, dtype=torch.float64).softmax(1)
    images = torch.randint(0, 60, (BATCH, 3, height, width), generator=generator).double()
    roi = torch.rand(BATCH, height, width, generator=generator) < 0.8
    return probs, images, roi


def kernel_of(image, sigma_rgb=15.0, sigma_xy=3.0, radius=math.inf):
    """K (N, N) by the definition."""
    _, height, width = image.shape
    pixels = list(itertools.product(range(height), range(width)))
    rows = []
    for p in pixels:
        row = []
        for q in pixels:
            colour, place = float(((image[:, *p] - image[:, *q]) ** 2).sum()), math.dist(p, q) ** 2
            near = max(abs(p[0] - q[0]), abs(p[1] - q[1])) <= radius
            row.append(near * math.exp(-colour / (2 * sigma_rgb**2) - place / (2 * sigma_xy**2)))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def expected(probs, images, roi, **settings):
    """Loss and gradient -2 K S / B by the definition."""
    total, gradient = 0.0, torch.zeros_like(probs)
    for b in range(BATCH):
        mask = roi[b].flatten().double()
        flat = probs[b].flatten(1) * mask
        filtered = flat @ kernel_of(images[b], **settings)
        total -= float((flat * filtered).sum()) / BATCH
        gradient[b] = (-2 * filtered * mask / BATCH).view_as(probs[b])
    return total, gradient


@pytest.mark.parametrize(("form", "radius"), [("exact", 1), ("windowed", 0), ("windowed", 1), ("windowed", 2)])
def test_value_and_gradient_are_brute_force(form, radius):
    probs, images, roi = inputs()
    probs.requires_grad_()
    loss = dense_crf_loss(probs, images, roi, 15.0, 3.0, 1.0, form, radius)
    value, gradient = expected(probs.detach(), images, roi, radius=math.inf if form == "exact" else radius)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, probs)[0], 3 * gradient, rtol=1e-12, atol=1e-14)


def test_a_window_as_large_as_the_image_is_exact():
    probs, images, roi = inputs(1)
    exact = dense_crf_loss(probs, images, roi, downscale=1.0)
    for radius in (4, 50):
        assert dense_crf_loss(
            probs, images, roi, downscale=1.0, form="windowed", radius=radius
        ).item() == pytest.approx(exact.item(), rel=1e-12)
    assert dense_crf_loss(probs, images, roi, downscale=1.0, form="sampled", samples=20).item() == pytest.approx(
        exact.item(), rel=1e-12
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form):
    probs, images, roi = inputs(2, 3, 2)
    probs.requires_grad_()

    def loss(values):
        generator = torch.Generator().manual_seed(3)
        return dense_crf_loss(values, images, roi, 15.0, 3.0, 1.0, form, 1, 4, generator)

    assert torch.autograd.gradcheck(loss, probs)


def test_sampling_is_unbiased_in_value_and_gradient(monkeypatch):
    probs, images, roi = inputs(3)
    probs.requires_grad_()
    value, gradient = expected(probs.detach(), images, roi)
    order = list(range(H * W))
    values, gradients = [], []
    for first in order:  # each pixel as the only sample, once
        monkeypatch.setattr(
            torch, "randperm", lambda *_, first=first, **__: torch.tensor(order[first:] + order[:first])
        )
        loss = dense_crf_loss(probs, images, roi, 15.0, 3.0, 1.0, "sampled", samples=1)
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, probs)[0])
    assert sum(values) / len(values) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.stack(gradients).mean(0), gradient, rtol=1e-12, atol=1e-14)


def test_samples_follow_the_generator():
    probs, images, _ = inputs(4)
    losses = [
        dense_crf_loss(
            probs, images, form="sampled", downscale=1.0, samples=3, generator=torch.Generator().manual_seed(s)
        )
        for s in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_it_is_bilinear_potts_up_to_a_constant():
    _, images, _ = inputs(5)
    everywhere = torch.ones(BATCH, H, W, dtype=torch.bool)
    offsets = []
    for seed in (6, 7):
        probs = inputs(seed)[0]
        potts = 0.0
        for b in range(BATCH):
            kernel = kernel_of(images[b])
            potts += sum(float(row @ kernel @ (1 - row)) for row in probs[b].flatten(1)) / BATCH
        offsets.append(potts - expected(probs, images, everywhere)[0])
        assert dense_crf_loss(probs, images, None, 15.0, 3.0, 1.0).item() == pytest.approx(potts - offsets[-1])
    total = sum(kernel_of(image).sum().item() for image in images) / BATCH
    assert offsets == pytest.approx([total, total])


def test_halving_the_resolution():
    probs, images, roi = inputs(8, 6, 8)
    pooled = F.avg_pool2d(probs, 2)  # bilinear at one half is the mean of four; nearest is the first of them
    value, _ = expected(pooled, images[..., ::2, ::2], roi[..., ::2, ::2], sigma_xy=3.0)
    assert dense_crf_loss(probs, images, roi, 15.0, 6.0).item() == pytest.approx(value, rel=1e-12)


def test_chunks_do_not_matter(monkeypatch):
    probs, images, roi = inputs(9)
    whole = dense_crf_loss(probs, images, roi, downscale=1.0)
    for chunk in (1, 130):
        monkeypatch.setattr(dense_crf, "CHUNK", chunk)
        assert dense_crf_loss(probs, images, roi, downscale=1.0).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_autocast_compute_in_single(form):
    probs, images, roi = inputs(10)
    single = dense_crf_loss(probs.half().float(), images, roi, form=form, samples=100)
    half = dense_crf_loss(probs.half(), images.to(torch.uint8), roi, form=form, samples=100)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(single.item(), rel=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense_crf_loss(probs.float(), images, roi, form=form, samples=100).item() == pytest.approx(
            dense_crf_loss(probs.float(), images, roi, form=form, samples=100).item(), rel=1e-6
        )


def test_nothing_inside_the_region():
    probs, images, roi = inputs(11)
    probs.requires_grad_()
    for form in FORMS:
        loss = dense_crf_loss(probs, images, torch.zeros_like(roi), downscale=1.0, form=form)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, probs)[0].abs().max() == 0


@pytest.mark.parametrize(
    "bad",
    [
        dict(sigma_rgb=0.0),
        dict(sigma_xy=-1.0),
        dict(downscale=0.0),
        dict(downscale=2.0),
        dict(radius=-1),
        dict(samples=0),
    ],
)
def test_settings_out_of_range(bad):
    probs, images, roi = inputs()
    with pytest.raises(ValueError, match="must be positive"):
        dense_crf_loss(probs, images, roi, **bad)


def test_an_unknown_form():
    probs, images, roi = inputs()
    with pytest.raises(ValueError, match="form is 'permutohedral'; it must be one of exact, windowed, sampled"):
        dense_crf_loss(probs, images, roi, form="permutohedral")
