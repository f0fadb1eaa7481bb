import numpy as np
import pytest
import torch
from scipy import ndimage

from repro.data import scenes as module
from repro.data.catalogue import load
from repro.data.scenes import COS, DEFAULT, GARMENTS, LEVEL, OPENING, SIDE, SIN, TURN, colour, cut_out, scenes

SMALL = scenes("train", 60, seed=3)


def test_a_known_configuration_keeps_its_pixels_and_masks():
    """Guards published numbers, and equality across machines and versions: these were made on x86-64, numpy 2."""
    assert scenes("train", 8).digest == "e959e01272258d9edb4af64bfcd1599dc9bebac526f451ae6aff13bc85739142"
    large = scenes("test", 5, size=96, seed=1, classes=GARMENTS)
    assert large.digest == "3df480e1f305f0bc597587cb607a74e13520afa2f72abb6d92fff4682d8ccd59"


def test_shapes_types_and_classes():
    assert SMALL.images.shape == (60, 3, 64, 64) and SMALL.images.dtype == torch.uint8
    assert SMALL.masks.shape == (60, 64, 64) and SMALL.masks.dtype == torch.uint8
    assert SMALL.classes == ("background", *DEFAULT) and len(SMALL) == 60
    assert SMALL.masks.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert scenes("train", 60, seed=3) is scenes("train", 60, seed=3)  # shared, not generated twice


def test_a_scene_does_not_depend_on_how_many_there_are():
    """Also across the chunks that are rendered together."""
    few = scenes("train", 37, seed=3)
    assert torch.equal(few.images, SMALL.images[:37]) and torch.equal(few.masks, SMALL.masks[:37])


def test_splits_seeds_and_classes_differ():
    digests = {scenes(split, 4, seed=seed).digest for split in ("train", "test") for seed in (0, 1)}
    digests |= {scenes("train", 4, classes=pair).digest for pair in (("Bag", "Dress"), ("Dress", "Bag"))}
    assert len(digests) == 6


def test_scenes_of_a_split_show_garments_of_that_part_only(monkeypatch):
    """Black garments of the other part make no difference; of this part they make all."""
    asked = []

    def spy(name, split):
        asked.append((name, split))
        return load(name, split)

    monkeypatch.setattr(module, "load", spy)
    module._scenes.__wrapped__("test", 4, 64, 9, DEFAULT)
    assert set(asked) == {("fashion", "test")}


def test_every_number_of_garments_and_every_class_occurs_alike():
    masks = scenes("train", 400).masks
    present = torch.stack([(masks == label).flatten(1).any(1) for label in range(1, 6)], 1).float()
    assert present.mean(0).amin() > 0.3 and present.mean(0).amax() < 0.55  # about 1 - (1 - 1/5) ** 2.5
    counts = present.sum(1).long().bincount(minlength=5)
    assert counts[0] == 0 and (counts[1:4] > 20).all()
    assert 0.6 < (masks == 0).float().mean() < 0.8


def test_most_of_each_garment_is_seen():
    """Hidden garments would make image tags wrong in all but name."""
    masks = scenes("train", 400).masks
    areas = torch.stack([(masks == label).flatten(1).sum(1) for label in range(1, 6)], 1)
    assert (areas[areas > 0] < 30).float().mean() < 0.01


def test_colour_tells_nothing_about_the_class():
    """Mean colours of the classes differ by less than the spread within a class, many times."""
    data = scenes("train", 400)
    means = []
    for label in range(1, 6):
        pixels = [
            image[:, mask == label].float().mean(1)
            for image, mask in zip(data.images, data.masks, strict=True)
            if (mask == label).any()
        ]
        means.append(torch.stack(pixels))
    between = torch.stack([mean.mean(0) for mean in means]).std(0)
    within = torch.stack([mean.std(0) for mean in means]).mean(0)
    assert (between < within / 4).all()


def test_masks_are_exact():
    """On a scene with white cloth and a black background, the mask is where the white is, up to the soft border."""
    size, garment = 64, 11
    garments = cut_out(load("fashion", "train"), np.array([garment])) | np.uint32(255)  # shade 255 everywhere
    canvas, masks = np.zeros((1, 3, size, size), np.int32), np.zeros((1, size, size), np.uint8)
    item = {
        "present": np.array([True]),
        "label": np.array([4], np.uint8),
        "garment": np.array([0], np.int32),
        "side": np.array([40 * 16], np.int32),
        "centre": np.array([[30 * 16, 35 * 16]], np.int32),
        "turn": np.array([31]),
        "flip": np.array([1]),
        "light": np.full((1, 3), 255),
        "depth": np.array([256]),
    }
    module.lay(canvas, masks, item, garments, size)
    assert np.array_equal(masks[0] == 4, canvas[0, 0] > 127)
    soft = (canvas[0, 0] > 0) & (canvas[0, 0] < 255)
    box = np.ones((3, 3))
    edge = ndimage.binary_dilation(masks[0] == 4, box) & ~ndimage.binary_erosion(masks[0] == 4, box)
    assert not (soft & ~edge).any()


def test_a_garment_is_turned_mirrored_and_placed_as_asked():
    """Against an affine transform in floating point by scipy."""
    size, garments = 64, cut_out(load("fashion", "train"), np.array([11]))
    for turn, flip in ((20, 0), (20, 1), (33, 0), (3, 1)):
        canvas, masks = np.zeros((1, 3, size, size), np.int32), np.zeros((1, size, size), np.uint8)
        side, centre = 45.0, (30.0, 37.5)
        item = {
            "present": np.array([True]),
            "label": np.array([1], np.uint8),
            "garment": np.array([0], np.int32),
            "side": np.array([side * 16], np.int32),
            "centre": (np.array([centre]) * 16).astype(np.int32),
            "turn": np.array([turn]),
            "flip": np.array([flip]),
            "light": np.full((1, 3), 255),
            "depth": np.array([0]),
        }
        module.lay(canvas, masks, item, garments, size)
        angle, factor = np.radians(TURN[turn]), 56 / side
        matrix = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # row, column
        matrix[1] *= 1 - 2 * flip
        offset = (SIDE - 1) / 2 - matrix @ (np.array(centre[::-1]) - 0.5)
        coverage = (garments >> 16).reshape(SIDE, SIDE).astype(float)
        expected = ndimage.affine_transform(coverage, matrix, offset, (size, size), order=1) > 127
        assert (expected != (masks[0] == 1)).mean() < 0.004 and expected.sum() > 300


def test_garments_are_solid_but_for_their_openings():
    data = load("fashion", "train")
    rows = torch.arange(400)
    solid = (cut_out(data, rows.numpy()) >> 16).reshape(-1, SIDE, SIDE) > 0
    enlarged = torch.nn.functional.interpolate(data.images[rows].float(), scale_factor=2, mode="bicubic")[:, 0].numpy()
    bright = np.pad(enlarged, ((0, 0), (1, 1), (1, 1))) > LEVEL + 1
    assert not solid[:, [0, -1]].any() and not solid[:, :, [0, -1]].any()
    assert (bright & ~solid).mean() < 0.005  # specks only
    holes = 0
    for garment, mask in zip(enlarged, solid, strict=True):
        filled = ndimage.binary_fill_holes(mask)
        parts, number = ndimage.label(filled & ~mask)
        for part in range(1, number + 1):
            inside = (parts == part)[1:-1, 1:-1]
            assert inside.sum() > OPENING * mask.sum() * 0.8 and np.median(garment[inside]) < 1
        holes += number
    assert 5 < holes < 80  # handles, sandals, between legs


def test_colours_against_colorsys():
    import colorsys

    for hue, saturation, value in ((0, 255, 255), (256, 255, 200), (700, 128, 255), (1400, 77, 90), (1535, 0, 31)):
        expected = np.multiply(colorsys.hsv_to_rgb(hue / 1536, saturation / 255, value / 255), 255)
        found = colour(np.array(hue), np.array(saturation), np.array(value))
        assert np.abs(found - expected).max() <= 1.01


def test_rounded_sines_leave_no_doubt():
    """No sine lies near the middle of two integers, so any sound libm gives the same tables."""
    for table, function in ((COS, np.cos), (SIN, np.sin)):
        exact = function(np.radians(TURN)) * 2**14
        assert np.abs(np.abs(exact - np.floor(exact)) - 0.5).min() > 1e-4
        assert np.array_equal(table, np.rint(exact))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", 4), "no split 'valid'; they have: train, test"),
        (("train", 0), "count 0 must be positive"),
        (("train", 4, 200), "size 200 in 48..128"),
        (("train", 4, 64, -1), "seed -1"),
        (("train", 4, 64, 0, ("Hat",)), "'Hat'"),
        (("train", 4, 64, 0, ("Bag", "Bag")), "different names"),
        (("train", 4, 64, 0, ()), "one or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(*arguments)


def test_a_garment_changes_nothing_far_from_its_mask():
    """One that fills its box to the edge once dragged a faint streak to the picture's border."""
    garments = np.full(SIDE * SIDE, 0, np.uint32).reshape(SIDE, SIDE)
    garments[1:-1, 1:-1] = 255 << 16 | 200
    one = {
        key: np.array([value])
        for key, value in {"garment": 0, "turn": 0, "flip": 0, "side": 320, "depth": 128, "label": 3}.items()
    }
    one |= {"present": np.array([True]), "centre": np.full((1, 2), 24 * 16), "light": np.full((1, 3), 120, np.uint8)}
    canvas, masks = np.full((1, 3, 64, 64), 250), np.zeros((1, 64, 64), np.uint8)
    module.lay(canvas, masks, one, garments.ravel(), 64)
    touched = (canvas[0] != 250).any(0)
    assert (masks > 0).sum() == 400 and not (touched & ~ndimage.binary_dilation(masks[0] > 0, iterations=2)).any()
