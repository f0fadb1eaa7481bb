"""Dense-GD: seeds and the dense CRF loss over all pairs of pixels of the view in 0..255, by a matrix."""


import pytest
import torch
import torch.nn.functional as F

from repro.methods.scribbles.baselines import DenseGD, DenseGDSettings, for_crop
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import SECOND, build


def dense(probs, colours, roi, sigma_rgb, sigma_xy):
    """-1 / B sum_k S^T K S from the whole kernel matrix."""
    total = 0.0
    height, width = roi.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns]).flatten(1).double() / sigma_xy
    for s, colour, inside in zip(probs.double(), colours.double(), roi, strict=True):
        points = torch.cat([colour.flatten(1) / sigma_rgb, place]).T
        kernel = (-((points[:, None] - points) ** 2).sum(2) / 2).exp()
        s = s.flatten(1) * inside.flatten()
        total -= (s @ kernel * s).sum().item()
    return total / len(probs)


@pytest.mark.parametrize("downscale", [1.0, 0.5])
def test_a_step_is_that_of_a_kernel_matrix(downscale):
    sample = fakes.items((1, 4))
    built = build(DenseGD, weight=1e-3, sigma_rgb=20.0, sigma_xy=6.0, downscale=downscale)
    losses = built.losses({"scribbles": sample}, SECOND)
    crop = fakes.again(sample)
    probs = fakes.TinyNetwork()(built.network.passes[0][0]).detach().softmax(1)
    colours, roi = crop.images.double(), ~crop.padding  # in 0..255: not normalised
    if downscale < 1:
        probs = F.interpolate(probs, scale_factor=0.5, mode="bilinear", align_corners=False)
        colours, roi = colours[..., ::2, ::2], roi[:, ::2, ::2]
    expected = 1e-3 * dense(probs, colours, roi, 20.0, 6.0 * downscale)
    assert list(losses.terms) == ["seeds", "dense"] and losses.terms["dense"].item() == pytest.approx(
        expected, rel=1e-4
    )


def test_a_smaller_copy_of_an_image_has_about_the_same_loss():
    """Blocks of 2 x 2 equal pixels against one pixel each: 16 times as many pairs at twice the distance."""
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(1, 3, 6, 6, generator=generator)
    probs = torch.randn(1, 3, 6, 6, generator=generator).softmax(1)
    large = [F.interpolate(maps, scale_factor=2) for maps in (probs, coarse)]
    settings = DenseGDSettings(sigma_xy=9.0)
    small = for_crop(settings, 6, published=12)
    assert small.weight == pytest.approx(16 * 2e-9) and small.sigma_xy == 4.5 and small.sigma_rgb == 15.0
    everywhere = [torch.ones(1, side, side) for side in (12, 6)]
    before = settings.weight * dense(*large, everywhere[0], 15.0, settings.sigma_xy)
    after = small.weight * dense(probs, coarse, everywhere[1], 15.0, small.sigma_xy)
    assert after == pytest.approx(before, rel=0.01)
    assert for_crop(DenseGDSettings(), 513) == DenseGDSettings()
