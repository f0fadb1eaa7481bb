"""The dense CRF loss and inference against loops over all pairs of pixels, and against the released library."""

import itertools
import math
import sys

import pytest
import torch
from torch.nn import functional as F

from repro.settings import SettingError
from repro.solvers import crf
from repro.solvers.crf import CRF, dense_crf_loss, has_lattice, lattice_crf, mean_field

BATCH, C, H, W = 2, 3, 4, 5


def inputs(seed=0, height=H, width=W):
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(BATCH, C, height, width, generator=generator, dtype=torch.float64).softmax(1)
    images = torch.randint(0, 60, (BATCH, 3, height, width), generator=generator).double()
    roi = torch.rand(BATCH, height, width, generator=generator) < 0.8
    return probs, images, roi


def kernel_of(image, sigma_rgb=15.0, sigma_xy=3.0):
    """K (N, N) by the definition."""
    _, height, width = image.shape
    pixels = list(itertools.product(range(height), range(width)))
    rows = []
    for p in pixels:
        row = []
        for q in pixels:
            colour, place = float(((image[:, *p] - image[:, *q]) ** 2).sum()), math.dist(p, q) ** 2
            row.append(math.exp(-colour / (2 * sigma_rgb**2) - place / (2 * sigma_xy**2)))
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


def test_value_and_gradient_are_brute_force():
    probs, images, roi = inputs()
    probs.requires_grad_()
    loss = dense_crf_loss(probs, images, roi, 15.0, 3.0, 1.0)
    value, gradient = expected(probs.detach(), images, roi)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, probs)[0], 3 * gradient, rtol=1e-12, atol=1e-14)


def test_gradients_are_those_of_finite_differences():
    probs, images, roi = inputs(2, 3, 2)
    assert torch.autograd.gradcheck(lambda s: dense_crf_loss(s, images, roi, 15.0, 3.0, 1.0), probs.requires_grad_())


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


def test_half_precision_and_autocast_compute_in_single():
    probs, images, roi = inputs(10)
    single = dense_crf_loss(probs.half().float(), images, roi)
    with torch.autocast("cpu", torch.bfloat16):
        half = dense_crf_loss(probs.half(), images.to(torch.uint8), roi)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(single.item(), rel=1e-6)


def test_nothing_inside_the_region():
    probs, images, roi = inputs(11)
    probs.requires_grad_()
    loss = dense_crf_loss(probs, images, torch.zeros_like(roi), downscale=1.0)
    assert loss.item() == 0 and torch.autograd.grad(loss, probs)[0].abs().max() == 0


# Inference


def pictures(seed=0, height=H, width=W, dtype=torch.float64):
    """Probabilities, and images with near and with far colours."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(BATCH, C, height, width, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    images = torch.randint(0, 12, (BATCH, 3, height, width), generator=generator)
    images += 200 * (torch.rand(BATCH, 1, height, width, generator=generator) < 0.3)
    return probs.to(dtype), images.to(torch.uint8)


def inferred(probs, image, crf):
    """Q (C, N) of one image, message by message, with both kernels as loops over pairs."""
    _, height, width = image.shape
    pixels = list(itertools.product(range(height), range(width)))
    count = len(pixels)
    near = [[math.exp(-(math.dist(p, q) ** 2) / (2 * crf.position_xy**2)) for q in pixels] for p in pixels]
    alike = kernel_of(image.double(), crf.rgb, crf.xy).tolist()
    log = [[math.log(max(probs[k, *p].item(), 1e-5)) for p in pixels] for k in range(C)]

    def softmax(values):
        total = sum(math.exp(value) for value in values)
        return [math.exp(value) / total for value in values]

    found = [softmax([log[k][i] for k in range(C)]) for i in range(count)]
    for _ in range(crf.iterations):
        scores = [[log[k][i] for k in range(C)] for i in range(count)]
        for weight, kernel in ((crf.position_weight, near), (crf.weight, alike)):
            total = [sum(row) for row in kernel]
            for i, j in itertools.product(range(count), repeat=2):
                share = weight * kernel[i][j] / math.sqrt(total[i] * total[j])
                for k in range(C):
                    scores[i][k] += share * found[j][k]
        found = [softmax(row) for row in scores]
    return torch.tensor(found, dtype=torch.float64).mT


@pytest.mark.parametrize(
    "crf",
    [CRF(), CRF(1.0, 2.0, 7.0, 140.0, 1.0, 4), CRF(3.0, 0.6, 4.0, 2.5, 5.0, 1), CRF(0.0, 1.0, 9.0, 1.5, 30.0, 3)],
    ids=["toco", "pcre", "local", "bilateral"],
)
def test_mean_field_is_brute_force(crf):
    probs, images = pictures()
    found = mean_field(probs, images, crf)
    for b in range(BATCH):
        torch.testing.assert_close(found[b].flatten(1), inferred(probs[b], images[b], crf), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mean_field(probs.float(), images, crf).double(), found, rtol=1e-4, atol=1e-5)


def test_rows_of_the_kernel_do_not_matter(monkeypatch):
    probs, images = pictures(3, 6, 5)
    whole = mean_field(probs, images)
    for rows in (1, 7, 12):
        monkeypatch.setattr(crf, "ROWS", rows)
        torch.testing.assert_close(mean_field(probs, images), whole, rtol=1e-12, atol=0)


def test_inference_in_half_precision_and_without_images():
    probs, images = pictures(4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_field(probs, images), mean_field(probs, images))
        inside = mean_field(probs, images)
    assert inside.dtype == torch.float32 and torch.equal(inside, mean_field(probs, images))
    assert mean_field(probs.half(), images).dtype == torch.float32
    assert mean_field(probs[:0], images[:0]).shape == (0, C, H, W)


def test_widths_follow_the_size():
    crf = CRF(1.0, 2.0, 7.0, 140.0, 1.0).scaled(64 / 448)
    assert (crf.position_xy, crf.xy) == pytest.approx((2 / 7, 20.0)) and (crf.rgb, crf.weight) == (1.0, 7.0)
    with pytest.raises(SettingError, match="rgb"):
        CRF(rgb=0.0)


def test_bad_input():
    probs, images, roi = inputs()
    for bad in (dict(sigma_rgb=0.0), dict(sigma_xy=-1.0), dict(downscale=0.0), dict(downscale=2.0)):
        with pytest.raises(ValueError, match="must be positive"):
            dense_crf_loss(probs, images, roi, **bad)
    probs, images = pictures()
    for wrong in (images.float(), images[:, :, 1:], images[:, :2], images[:1]):
        with pytest.raises(ValueError, match="needs uint8 images"):
            mean_field(probs, wrong)


def test_the_lattice_needs_its_package(monkeypatch):
    probs, images = pictures(dtype=torch.float32)
    for name in ("pydensecrf", "pydensecrf.densecrf"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="of 5 x 4 pixels needs pydensecrf2: pip install "):
        lattice_crf(probs[0].numpy(), images[0].permute(1, 2, 0).numpy())
    assert not has_lattice()
