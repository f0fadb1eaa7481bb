"""Every operation against PIL, to the last bit: smooth, noisy, dark, flat, two-level images, grey and RGB."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from repro.data import pil_ops
from repro.data.pil_ops import CODE, CUTOUT_GREY, FAMILIES, OPERATIONS, RESAMPLERS, apply

SIZES = [(32, 32), (28, 28), (20, 33)]  # (height, width)


def photographs(channels, height, width, count=6, seed=0):
    """Smooth, noisy, dark, flat, two-level and one-hot images, uint8 (count, C, H, W)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    phase = rng.uniform(0, 6, (channels, 1, 1))
    smooth = 127 + 120 * np.sin(5 * x + 3 * y + phase)
    noisy = rng.integers(0, 256, (channels, height, width))
    dark = smooth * 0.2 + rng.normal(0, 3, (channels, height, width)) + 20
    flat = np.full((channels, height, width), 77)
    two = np.where(noisy > 100, 200, 30)
    single = np.zeros((channels, height, width))
    single[:, height // 2, width // 3] = 255
    stack = np.stack([smooth, noisy, dark, flat, two, single][:count])
    return torch.from_numpy(stack.clip(0, 255).astype(np.uint8))


def to_pil(image):
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def from_pil(image):
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients)


def mixed(image, other, alpha):
    return Image.blend(image, other, alpha)


def cropped(image, fraction, resampler):
    width, height = image.size
    box = (fraction * width, fraction * height, width * (1 - fraction), height * (1 - fraction))
    return image.crop(box).resize(image.size, Image.Resampling[resampler.upper()])


def enhanced(kind):
    return lambda image, factor: kind(image).enhance(factor)


FACTORS = [0.0, 0.05, 1 / 3, 0.7310585, 0.95, 1.0, 1.37, 2.0]
ALPHAS = [0.0, 0.013, 0.5, 0.77777, 1.0]
ORACLE = {
    "Identity": (lambda image, _: image, [0.3]),
    "Rotate": (
        lambda image, degrees: image.rotate(degrees),
        [-45, -30, -17.3, -1e-3, 0, 1, 9, 12.345, 27, 45],
    ),
    "ShearX": (lambda image, v: affine(image, 1, v, 0, 0, 1, 0), [-0.3, -0.1234, -0.03, 0, 0.09, 0.27, 0.3]),
    "ShearY": (lambda image, v: affine(image, 1, 0, 0, v, 1, 0), [-0.3, -0.1234, -0.03, 0, 0.09, 0.27, 0.3]),
    "TranslateX": (
        lambda image, v: affine(image, 1, 0, v, 0, 1, 0),
        [-9.6, -3.5, -0.5, -0.3, 0.3, 0.5, 2.51, 9],
    ),
    "TranslateY": (
        lambda image, v: affine(image, 1, 0, 0, 0, 1, v),
        [-9.6, -3.5, -0.5, -0.3, 0.3, 0.5, 2.51, 9],
    ),
    "AutoContrast": (lambda image, v: mixed(image, ImageOps.autocontrast(image), v), ALPHAS),
    "Brightness": (enhanced(ImageEnhance.Brightness), FACTORS),
    "Contrast": (enhanced(ImageEnhance.Contrast), FACTORS),
    "Invert": (lambda image, v: mixed(image, ImageOps.invert(image), v), ALPHAS),
    "Posterize": (lambda image, bits: ImageOps.posterize(image, bits), range(1, 9)),
    "Solarize": (lambda image, v: ImageOps.solarize(image, v), [0, 1, 100.5, 128, 255, 256]),
    "Equalize": (lambda image, v: mixed(image, ImageOps.equalize(image), v), ALPHAS),
    "Color": (enhanced(ImageEnhance.Color), FACTORS),
    "Sharpness": (enhanced(ImageEnhance.Sharpness), FACTORS),
    "Smooth": (lambda image, v: mixed(image, image.filter(ImageFilter.SMOOTH), v), ALPHAS),
    "Blur": (lambda image, v: mixed(image, image.filter(ImageFilter.BLUR), v), ALPHAS),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ORACLE)
def test_equals_pil(name, channels, size):
    oracle, magnitudes = ORACLE[name]
    images = photographs(channels, *size)
    before = images.clone()
    for magnitude in magnitudes:
        operation = torch.full((len(images),), CODE[name])
        ours = apply(images, operation, torch.full((len(images),), magnitude, dtype=torch.float64))
        theirs = torch.stack([from_pil(oracle(to_pil(image), magnitude)) for image in images])
        assert torch.equal(ours, theirs), (magnitude, (ours != theirs).sum())
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "AutoContrast", "Contrast"]
)
def test_equals_pil_at_random_magnitudes(name):
    """Magnitudes as flavours draw them, on noise of all contrasts."""
    rng = np.random.default_rng(1)
    span = {"Rotate": 45, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 10, "TranslateY": 10}.get(name, 1)
    levels = rng.integers(0, 256, (200, 2, 3, 1, 1))
    images = rng.uniform(levels.min(1), levels.max(1) + 1, (200, 3, 16, 16)).astype(np.uint8)
    images, magnitude = torch.from_numpy(images), torch.from_numpy(rng.uniform(-1, 1, 200)) * span
    magnitude = magnitude if span != 1 else magnitude.abs()
    ours = apply(images, torch.full((200,), CODE[name]), magnitude)
    for image, result, value in zip(images, ours, magnitude.tolist(), strict=True):
        assert torch.equal(result, from_pil(ORACLE[name][0](to_pil(image), value)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_rescale_equals_pil(resampler, channels, size):
    images = photographs(channels, *size)
    point = torch.full((len(images), 2), (RESAMPLERS.index(resampler) + 0.5) / len(RESAMPLERS))
    operation = torch.full((len(images),), CODE["Rescale"])
    for fraction in (0, 0.012, 0.04, 0.07, 0.113, 0.16, 0.2, 0.25):
        ours = apply(images, operation, torch.full((len(images),), fraction, dtype=torch.float64), point)
        theirs = torch.stack([from_pil(cropped(to_pil(image), fraction, resampler)) for image in images])
        assert torch.equal(ours, theirs), (fraction, (ours != theirs).sum())


def test_cutout_paints_an_even_box_cut_at_the_borders():
    images = photographs(3, 12, 10, count=3)
    point = torch.tensor([[0.0, 0.0], [0.55, 0.5], [0.99, 0.99]])  # pixels (0, 0), (5, 6), (9, 11)
    ours = apply(images, torch.full((3,), CODE["Cutout"]), torch.tensor([4.0, 5.0, 6.0]).double(), point)
    expected = images.clone()
    expected[0, :, :2, :2] = expected[1, :, 4:8, 3:7] = expected[2, :, 8:, 6:] = CUTOUT_GREY
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_and_sparse_are_bit_equal(channels):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (400, channels, 20, 24), dtype=torch.uint8, generator=generator)
    images[::5] //= 9
    images[1::7] = 200
    operation = torch.randint(0, len(OPERATIONS), (400,), generator=generator)
    magnitude = torch.rand(400, dtype=torch.float64, generator=generator)
    big = [CODE[name] for name in ("Rotate", "TranslateX", "TranslateY", "Solarize", "Posterize", "Cutout")]
    magnitude[torch.isin(operation, torch.tensor(big))] *= 8
    magnitude[operation == CODE["Rescale"]] /= 4
    point = torch.rand(400, 2, generator=generator)
    dense, sparse = (apply(images, operation, magnitude, point, dense=way) for way in (True, False))
    assert torch.equal(dense, sparse)
    untouched = operation == CODE["Identity"]
    assert untouched.any() and torch.equal(dense[untouched], images[untouched])
    assert (dense != images).flatten(1).any(1).float().mean() > 0.6


def test_families_cover_each_operation_but_identity_once():
    covered = [code for first, last, *_ in FAMILIES for code in range(first, last + 1)]
    assert sorted(covered) == list(range(1, len(OPERATIONS)))


@pytest.mark.parametrize("dense", [True, False])
def test_empty_batch_and_families_left_out(dense):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    empty = torch.zeros(0, dtype=torch.int64)
    assert apply(none, empty, empty.double(), dense=dense).shape == none.shape
    images = photographs(3, 8, 8)
    operation, half = torch.full((6,), CODE["Invert"]), torch.full((6,), 1.0, dtype=torch.float64)
    assert torch.equal(apply(images, operation, half, dense=dense, among=("Invert", "Blur")), 255 - images)


def test_affine_in_place_work_leaves_shared_memory_alone():
    images = photographs(3, 8, 8)[:1].expand(4, -1, -1, -1)
    for name in OPERATIONS:
        apply(images, torch.full((4,), CODE[name]), torch.full((4,), 0.2, dtype=torch.float64))
    assert torch.equal(images, photographs(3, 8, 8)[:1].expand(4, -1, -1, -1))
    assert pil_ops.grey(images).shape == (4, 1, 8, 8)
