"""RandAugment's flavours: what is drawn, how often, and whole views against a pipeline of PIL calls."""

import numpy as np
import pytest
import torch
from PIL import ImageDraw
from scipy.stats import chisquare, kstest

from repro.data.pil_ops import CODE, OPERATIONS
from repro.data.randaugment import FLAVOURS, Box, Flavour, RandAugment, Range, cut_out
from tests.data.test_pil_ops import ORACLE, from_pil, photographs, to_pil

FOURTEEN = (
    "AutoContrast Brightness Color Contrast Equalize Identity Posterize "
    "Rotate Sharpness ShearX ShearY Solarize TranslateX TranslateY"
).split()
ENHANCE = ("Brightness", "Color", "Contrast", "Sharpness")
WIDTH, HEIGHT = 32, 28


def draw(flavour, batch=30000, seed=0):
    return RandAugment(flavour).draw(batch, HEIGHT, WIDTH, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("flavour", "count"), [("randaugment-usb", 3), ("randaugment-usb-medium", 1)]
)
def test_operations_are_drawn_uniformly_with_replacement(flavour, count):
    codes, _ = draw(flavour)
    assert codes.shape == (count, 30000)
    expected = np.zeros(len(OPERATIONS))
    expected[[CODE[name] for name in FOURTEEN]] = 1 / 14
    for row in codes:
        counts = np.bincount(row, minlength=len(OPERATIONS))
        assert counts[expected == 0].sum() == 0
        assert chisquare(counts[expected > 0], 30000 * expected[expected > 0]).pvalue > 1e-3
    if count > 1:  # independent between steps
        joint = torch.zeros(len(OPERATIONS), len(OPERATIONS)).index_put_(
            (codes[0], codes[1]), torch.ones(()), True
        )
        cells = np.outer(expected, expected) > 0
        assert chisquare(joint.numpy()[cells], 30000 * np.outer(expected, expected)[cells]).pvalue > 1e-3


def test_magnitudes_of_usb_are_uniform_in_their_ranges():
    codes, magnitudes = (drawn.flatten().numpy() for drawn in draw("randaugment-usb"))
    ranges = {name: (0.05, 0.95) for name in ENHANCE} | {"ShearX": (-0.3, 0.3), "ShearY": (-0.3, 0.3)}
    ranges |= {"Rotate": (-30, 30), "Solarize": (0, 256)}
    ranges |= {"TranslateX": (-0.3 * WIDTH, 0.3 * WIDTH), "TranslateY": (-0.3 * HEIGHT, 0.3 * HEIGHT)}
    for name, (low, high) in ranges.items():
        drawn = magnitudes[codes == CODE[name]]
        assert low <= drawn.min() and drawn.max() <= high
        assert kstest((drawn - low) / (high - low), "uniform").pvalue > 1e-3, name
    bits, counts = np.unique(magnitudes[codes == CODE["Posterize"]], return_counts=True)
    assert bits.tolist() == [4, 5, 6, 7] and chisquare(counts).pvalue > 1e-3
    assert (magnitudes[codes == CODE["AutoContrast"]] == 1).all()


def pil_box(image, box, uniform):
    """Cutout as the public codes write it. uniform: three numbers in [0, 1), the drawn side, x and y."""
    width, height = image.size
    side = (box.low + (box.high - box.low) * uniform[0]) * width
    x, y = uniform[1] * width, uniform[2] * height
    fill = box.fill if image.mode == "RGB" else round(sum(box.fill) / 3)
    image = image.copy()
    left, top = int(max(0, x - side / 2)), int(max(0, y - side / 2))
    ImageDraw.Draw(image).rectangle((left, top, min(width, left + side), min(height, top + side)), fill)
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_cutout_equals_pil_rectangles(flavour, channels):
    images = photographs(channels, HEIGHT, WIDTH).repeat(40, 1, 1, 1)
    box = FLAVOURS[flavour].box
    ours = cut_out(images, box, torch.tensor(box.fill, dtype=torch.uint8), torch.Generator().manual_seed(2))
    uniform = torch.rand(3, len(images), generator=torch.Generator().manual_seed(2)).double().T.tolist()
    for image, result, numbers in zip(images, ours, uniform, strict=True):
        assert torch.equal(result, from_pil(pil_box(to_pil(image), box, numbers)))


def test_cutout_rules_by_hand():
    white = torch.full((2000, 3, 32, 32), 255, dtype=torch.uint8)

    def sides(flavour):
        box = FLAVOURS[flavour].box
        fill = torch.tensor(box.fill, dtype=torch.uint8)
        cut = cut_out(white, box, fill, torch.Generator().manual_seed(0)) != 255
        assert cut.flatten(1).any(1).all()
        return cut[:, 0].any(1).sum(1), cut[:, 0].any(2).sum(1)

    width, height = sides("randaugment-usb")
    assert width.max() == height.max() == 16  # PIL's rectangles include their ends: int(v) + 1 pixels
    assert width.min() == 1  # moved in at the left, cut at the right


def test_a_box_of_no_side_is_not_painted():
    images = photographs(3, 8, 8)
    empty = Box(0.0, 0.0, fill=(1, 2, 3))
    assert torch.equal(cut_out(images, empty, torch.tensor(empty.fill, dtype=torch.uint8)), images)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_views_equal_a_pipeline_of_pil(flavour, dense):
    images = photographs(3, 32, 32).repeat(25, 1, 1, 1)
    module = RandAugment(flavour, dense=dense)
    ours = module(images, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    codes, magnitudes = module.draw(len(images), 32, 32, generator)
    uniform = torch.rand(3, len(images), generator=generator).double().T.tolist()
    for i, image in enumerate(map(to_pil, images)):
        steps = [
            (OPERATIONS[code], value)
            for code, value in zip(codes[:, i], magnitudes[:, i].tolist(), strict=True)
        ]
        steps = [(name, int(value) if name == "Posterize" else value) for name, value in steps]
        for name, value in steps:
            image = ORACLE[name][0](image, value)
        assert torch.equal(ours[i], from_pil(pil_box(image, module.flavour.box, uniform[i]))), steps


def test_a_flavour_is_data():
    only = Flavour("test", 1, (Range("Solarize", 0, 0),), box=None)
    images = photographs(1, 8, 8)
    assert torch.equal(RandAugment(only)(images), 255 - images)


def test_unknown_flavour_is_refused():
    with pytest.raises(ValueError, match="'randaugment-kekmodel'; choose one of .*randaugment-usb"):
        RandAugment("randaugment-kekmodel")
