"""CTAugment: the weighting rule, what is drawn, the images against PIL, and the update against a loop."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.stats import chisquare

from repro.data.ctaugment import CTAugment, CTPolicy
from tests.data.test_pil_ops import affine, from_pil, photographs, to_pil

UPPER = ("LANCZOS", "BICUBIC", "BILINEAR", "BOX", "HAMMING", "NEAREST")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(image, name, level, method, point):
    """One operation of the released code with PIL."""
    width, height = image.size
    enhance = {kind: getattr(ImageEnhance, kind) for kind in ("Brightness", "Color", "Contrast", "Sharpness")}
    if name in enhance:
        return enhance[name](image).enhance(0.1 + 1.9 * level)
    blended = {
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Invert": ImageOps.invert,
        "Blur": lambda image: image.filter(ImageFilter.BLUR),
        "Smooth": lambda image: image.filter(ImageFilter.SMOOTH),
    }
    if name in blended:
        return Image.blend(image, blended[name](image), level)
    signed = (2 * level - 1) * 0.3
    if name == "Posterize":
        return ImageOps.posterize(image, 1 + int(level * 7.999))
    if name == "Solarize":
        return ImageOps.solarize(image, int(level * 255.999))
    if name == "Rotate":
        return image.rotate(int(np.round((2 * level - 1) * 45)))
    if name == "ShearX":
        return affine(image, 1, signed, 0, 0, 1, 0)
    if name == "ShearY":
        return affine(image, 1, 0, 0, signed, 1, 0)
    if name == "TranslateX":
        return affine(image, 1, 0, signed, 0, 1, 0)
    if name == "TranslateY":
        return affine(image, 1, 0, 0, 0, 1, signed)
    if name == "Rescale":
        scale = level * 0.25
        crop = (scale * width, scale * height, width * (1 - scale), height * (1 - scale))
        return image.crop(crop).resize(image.size, Image.Resampling[UPPER[int(method * 5.99)]])
    if name == "Cutout":
        half = (1 + int(level * min(width, height) * 0.499)) // 2
        x, y = int(point[0] * width), int(point[1] * height)
        image.paste(
            (127,) * 3, (max(0, x - half), max(0, y - half), min(width, x + half), min(height, y + half))
        )
        return image
    assert name == "Identity"
    return image


@pytest.mark.parametrize("dense", [True, False])
def test_distorted_images_equal_pil(dense):
    images = photographs(3, 32, 32).repeat(30, 1, 1, 1)
    module = CTAugment(dense=dense)
    row, level = module.draw(len(images), probe=True, generator=seeded(1))
    ours = module.distort(images, row, level, seeded(2))
    points = torch.rand(2, len(images), 2, generator=seeded(2)).tolist()
    for i, image in enumerate(map(to_pil, images)):
        steps = [(module.ranges.names[row[j, i]], level[j, i].tolist(), points[j][i]) for j in range(2)]
        for name, (first, second), point in steps:
            image = oracle(image, name, first, second, point)
        assert torch.equal(ours[i], from_pil(image)), steps
    assert len(row.unique()) == 19


def test_strong_view_ends_with_the_largest_cutout():
    images = photographs(3, 32, 32).repeat(20, 1, 1, 1)
    module = CTAugment()
    ours = module(images, seeded(3))
    generator = seeded(3)
    before = module.distort(images, *module.draw(len(images), probe=False, generator=generator), generator)
    points = torch.rand(len(images), 2, generator=generator).tolist()
    for image, result, point in zip(before, ours, points, strict=True):
        assert torch.equal(result, from_pil(oracle(to_pil(image), "Cutout", 1, None, point)))
    assert (ours != before).flatten(1).any(1).float().mean() > 0.95


def test_all_bins_are_open_at_first_and_weights_follow_the_threshold():
    module = CTAugment(CTPolicy(threshold=0.85, decay=0.99))
    assert module.rates.sum() == 17 * 17 + 8 + 6 + (
        17 - 17
    )  # 17 operations of 17 bins, Posterize, resamplers
    assert torch.equal(module.weights(), module.rates)
    module.rates[0, 0] = torch.linspace(0.2, 1.0, 17)
    weights = module.weights()[0, 0]
    expected = (torch.linspace(0.2, 1.0, 17).double() + 0.01) / 1.01
    torch.testing.assert_close(weights, torch.where(expected < 0.85, 0.0, expected))
    assert (weights > 0).sum() == 4
    module.rates.zero_()  # the offset keeps all bins open
    assert torch.equal(module.weights()[0, 0], torch.ones(17).double())


def test_training_draws_bins_by_weight_and_probes_uniformly():
    module = CTAugment(CTPolicy(depth=1))
    bright = module.ranges.names.index("Brightness")
    module.rates[bright, 0] = torch.tensor([0.1] * 10 + [0.9, 1.0, 0.95, 0.86, 0.2, 0.1, 0.97]).double()
    row, level = module.draw(200000, probe=False, generator=seeded(0))
    assert chisquare(torch.bincount(row[0])).pvalue > 1e-3
    own = level[0, row[0] == bright, 0]
    counts = torch.bincount((own * 17).long(), minlength=17)
    weights = module.weights()[bright, 0]
    assert (counts[weights == 0] == 0).all() and (weights == 0).sum() == 12
    expected = counts.sum() * weights / weights.sum()
    assert chisquare(counts[weights > 0], expected[weights > 0]).pvalue > 1e-3
    within = own * 17 % 1
    assert chisquare(torch.histc(within.float(), 10, 0, 1)).pvalue > 1e-3
    _, level = module.draw(200000, probe=True, generator=seeded(0))
    assert chisquare(torch.histc(level.float(), 20, 0, 1)).pvalue > 1e-3
    posterize = module.ranges.names.index("Posterize")
    row, level = module.draw(200000, probe=False, generator=seeded(1))
    assert chisquare(torch.bincount((level[0, row[0] == posterize, 0] * 8).long())).pvalue > 1e-3


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_update_equals_the_sequential_rule(batch):
    """The released code visits images, then operations, then parameters; bins repeat in large batches."""
    module = CTAugment(CTPolicy(decay=0.9))
    module.rates *= torch.rand(module.rates.shape, generator=seeded(0), dtype=torch.float64)
    rates = module.rates.clone()
    drawn = module.draw(batch, probe=True, generator=seeded(1))
    probs = torch.rand(batch, 5, generator=seeded(2)).softmax(1)
    labels = torch.arange(batch) % 5
    for i in range(batch):
        error = probs[i].double().clone()
        error[labels[i]] -= 1
        match = 1 - 0.5 * error.abs().sum()
        for row, level in zip(drawn[0][:, i], drawn[1][:, i], strict=True):
            for parameter, size in enumerate(module.sizes[row]):
                if size:
                    at = (row, parameter, int(level[parameter] * int(size) * 0.999))
                    rates[at] = rates[at] * 0.9 + match * (1 - 0.9)
    module.update(drawn, probs, labels)
    torch.testing.assert_close(module.rates, rates, rtol=0, atol=1e-6)
    assert (module.rates[module.rates == 0] == 0).all() and module.rates.max() <= 1


def test_bins_that_harm_are_closed_in_the_end():
    """A network that fails on inverted images only: strong inversion leaves the policy, gentle stays."""
    module = CTAugment(CTPolicy(decay=0.9))
    invert = module.ranges.names.index("Invert")
    for step in range(200):
        row, level = module.draw(64, probe=True, generator=seeded(step))
        harmed = ((row == invert) & (level[..., 0] > 0.5)).any(0)
        module.update(
            (row, level), torch.stack([1 - harmed * 0.9, harmed * 0.9], 1), torch.zeros(64, dtype=torch.int64)
        )
    weights = module.weights()
    assert (weights[invert, 0, 10:] == 0).all() and (weights[invert, 0, :8] > 0).all()


def test_unknown_flavour_is_refused():
    with pytest.raises(ValueError, match="'ctaugment-sides'; choose one of .*ctaugment"):
        CTAugment("ctaugment-sides")
