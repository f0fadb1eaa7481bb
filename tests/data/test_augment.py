"""Weak views, normalisation and the `Views` module."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from repro.data.augment import STRONG, Views, crop_and_flip, normalise
from repro.data.ctaugment import CTPolicy
from repro.data.randaugment import FLAVOURS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def views(strong="randaugment-usb", seed=0, channels=3, **options):
    return Views(MEAN[:channels], STD[:channels], True, strong, generator=seeded(seed), **options)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("channels", "size", "padding"), [(3, (8, 8), 2), (1, (7, 9), 1)])
def test_weak_draws_each_crop_and_flip_equally_often(channels, size, padding, flip):
    image = noise(1, channels, *size, seed=5)
    padded = np.pad(image[0].numpy(), ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
    cells = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            crop = padded[:, down : down + size[0], right : right + size[1]]
            cells[crop.tobytes()] = len(cells)
            if flip:
                cells[np.ascontiguousarray(crop[..., ::-1]).tobytes()] = len(cells)
    drawn = crop_and_flip(image.repeat(len(cells) * 80, 1, 1, 1), padding, flip, seeded(1))
    counts = np.bincount([cells[view.numpy().tobytes()] for view in drawn], minlength=len(cells))
    assert chisquare(counts).pvalue > 1e-3


def test_without_padding_and_flip_the_weak_view_is_the_image():
    images = noise(5, 3, 6, 6)
    assert torch.equal(crop_and_flip(images, 0, False, seeded()), images)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_matches_the_definition(channels, dtype, tolerance):
    images = noise(4, channels, 5, 7)
    mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
    expected = (images.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    result = normalise(images, mean, std, dtype)
    assert result.dtype == dtype and result.shape == images.shape
    assert (result.double() - expected).abs().max() < tolerance
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("strong", STRONG)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_depend_on_the_generator_alone_and_not_on_the_way(strong, channels):
    images = noise(50, channels, 20, 20)
    before = torch.random.get_rng_state()
    sparse, dense, other = (
        views(strong, seed, channels, dense=way) for seed, way in ((3, False), (3, True), (4, False))
    )
    for name in ("weak", "medium", "strong", "strong"):
        first, second, third = (getattr(one, name)(images) for one in (sparse, dense, other))
        assert torch.equal(first, second), name
        assert not torch.equal(first, third), name
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(images, noise(50, channels, 20, 20))


@pytest.mark.parametrize("strong", STRONG)
def test_each_image_is_drawn_by_itself(strong):
    images = noise(1, 3, 32, 32).repeat(60, 1, 1, 1)
    strongs = views(strong).strong(images)
    assert len({one.numpy().tobytes() for one in strongs.contiguous()}) > 50


def test_medium_is_one_operation_whatever_the_strong_flavour_is():
    images = noise(10, 3, 16, 16)
    assert torch.equal(views("ctaugment").medium(images), views("randaugment-usb-medium").strong(images))


def test_plain_is_only_normalised_and_draws_nothing():
    one = views()
    state = one.generator.get_state()
    images = noise(3, 3, 8, 8)
    assert torch.equal(one.plain(images), normalise(images, torch.tensor(MEAN), torch.tensor(STD)))
    assert torch.equal(one.generator.get_state(), state)


def test_learning_changes_rates_of_ctaugment_and_nothing_else():
    images, labels = noise(6, 3, 16, 16), torch.arange(6) % 3
    seen = []

    def predict(batch):
        seen.append(batch)
        return torch.full((6, 3), 1 / 3)

    learner = views("ctaugment")
    learner.learn(predict, images, labels)
    rates = learner.policy.rates
    assert seen[0].dtype == torch.float32 and seen[0].shape == images.shape
    # Each probe moves the rate of its bin from 1 towards 1/3.
    assert set(learner.state_dict()) == {"policy.rates"}
    moved = rates[(rates != 1) & (rates != 0)]
    assert 1 <= moved.numel() <= 6 * 2 * 2
    assert moved.max() == pytest.approx(0.99 + 0.01 / 3) and moved.min() > 0.99 - 0.07

    fixed = views("randaugment-usb")
    state = fixed.generator.get_state()
    fixed.learn(predict, images, labels)
    assert len(seen) == 1 and not fixed.state_dict() and torch.equal(fixed.generator.get_state(), state)


def test_learned_rates_travel_through_the_state():
    learner, resumed = views("ctaugment"), views("ctaugment", seed=9)
    learner.learn(
        lambda batch: torch.eye(3)[torch.zeros(40, dtype=torch.int64)],
        noise(40, 3, 8, 8),
        torch.arange(40) % 3,
    )
    resumed.load_state_dict(learner.state_dict())
    resumed.generator.set_state(learner.generator.get_state())
    images = noise(8, 3, 8, 8)
    assert torch.equal(resumed.strong(images), learner.strong(images))


def test_flavours_can_be_given_as_objects():
    images = noise(10, 3, 16, 16)
    assert torch.equal(
        views(FLAVOURS["randaugment-usb-medium"]).strong(images), views("randaugment-usb-medium").strong(images)
    )
    assert torch.equal(views(CTPolicy()).strong(images), views("ctaugment").strong(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mean=(0.5,), std=(0.5, 0.5)), "one value a channel"),
        (dict(mean=(0.5, 0.5), std=(0.5, 0.5)), "1 or 3 channels"),
        (dict(mean=(125.3,), std=(63.0,)), "fractions of 1"),
        (dict(mean=(0.5,), std=(0.0,)), "std above 0"),
        (
            dict(mean=(0.5,), std=(0.5,), strong="randaugment"),
            "'randaugment'; choose one of .*randaugment-usb",
        ),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Views(flip=True, **arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (noise(2, 1, 8, 8), "uint8 images of 3 channels, got torch.uint8 with 1"),
        (noise(2, 3, 8, 8).float(), "got torch.float32"),
        (noise(2, 3, 8, 4), "padding 4 must be below the sides 8 x 4"),
    ],
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        views().weak(images)
