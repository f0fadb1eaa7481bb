"""Local crops of ToCo: levels, places, negatives and the cut itself."""

import pytest
import torch

from repro.methods.image_tags.toco import choose_crops, confidence_levels, cut


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_levels_by_hand():
    cam = torch.tensor([[0.25, 0.26, 0.69, 0.7], [0.9, 0.1, 0.9, 0.9]]).view(1, 2, 1, 4)
    assert confidence_levels(cam, torch.tensor([[1, 0]])).tolist() == [[[0, 1, 1, 2]]]
    assert confidence_levels(cam, torch.tensor([[1, 1]])).tolist() == [[[2, 1, 2, 2]]]
    assert confidence_levels(cam, torch.zeros(1, 2)).tolist() == [[[0, 0, 0, 0]]]
    assert confidence_levels(cam.half(), torch.tensor([[1, 0]]), low=0.5).tolist() == [[[0, 0, 1, 2]]]


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
