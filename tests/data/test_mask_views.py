import colorsys
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from repro.data.mask_views import (
    MILD,
    PADDING,
    STRONG,
    TAGS,
    MaskViews,
    Photometric,
    block_mask,
    colour_jitter,
    cutmix_boxes,
    draw_window,
    gaussian_blur,
    hide,
    luminance,
    paste,
    photometric,
    shift_hue,
)

NOTHING = Photometric(jitter=0, grey=0, blur=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coordinates(count: int, height: int, width: int) -> torch.Tensor:
    """Images that say where each pixel comes from: column, row, 200."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([column * 2, row * 2, torch.full_like(row, 200)]).to(torch.uint8).expand(count, -1, -1, -1)


def random_images(count: int, size: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=generator(seed), dtype=torch.uint8)


def smooth_image(size: int = 48) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return np.array(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


# Geometry


@given(st.integers(0, 10**6), st.integers(10, 60), st.integers(10, 60), st.integers(8, 70), st.booleans())
def test_image_and_mask_stay_aligned(seed, height, width, size, flip):
    """The mask holds the block of 5 x 5 pixels that a pixel comes from, the image its coordinates."""
    images = coordinates(4, height, width)
    row, column = images[:, 1].int() // 2, images[:, 0].int() // 2
    masks = (row // 5 * 12 + column // 5).to(torch.uint8)
    crop = MaskViews(size, flip=flip, generator=generator(seed)).crop(images, masks)
    x, y = crop.images[:, 0].double() / 2, crop.images[:, 1].double() / 2
    found_row, found_column = crop.masks // 12, crop.masks % 12
    real = ~crop.padding
    # Nearest and bilinear sources differ by at most half a pixel, averaging at the border by a little more.
    for found, position in ((found_row, y), (found_column, x)):
        below, above = position[real] - found[real] * 5, found[real] * 5 + 4 - position[real]
        assert below.amin() >= -1.01 and above.amin() >= -1.01
    assert (crop.masks[crop.padding] == 255).all() and (crop.images.amax(1)[crop.padding] == 0).all()
    assert ((crop.images[:, 2].int() - 200).abs()[real] <= 1).all()


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.0, 1.7, 2.0])
def test_scaling_against_pillow(scale):
    """Bilinear with antialiasing within 1 level (Pillow rounds between its two passes), nearest and crop exactly.

    Where a centre falls exactly between two pixels Pillow takes either: its positions are sums of rounded steps.
    """
    size, height, width = 40, 36, 50
    image = np.asarray(Image.fromarray(smooth_image(64)).resize((width, height)))
    mask = np.random.default_rng(1).integers(0, 21, (height, width)).astype(np.uint8)
    side = int(width * scale)
    draws = torch.tensor([[0.0], [0.999], [0.5], [0.9]], dtype=torch.float64)
    window = draw_window(draws, height, width, size, (scale, scale), flip=True)
    new = (side, int(height * side / width + 0.5))  # (width, height)
    scaled = Image.fromarray(image).resize(new, Image.Resampling.BILINEAR)
    labels = Image.fromarray(mask).resize(new, Image.Resampling.NEAREST)
    missing = [max(0, size - extent) for extent in new]
    padded = ImageOps.expand(scaled, (0, 0, *missing), 0)
    labels = ImageOps.expand(labels, (0, 0, *missing), PADDING)
    left = int(0.5 * (max(0, new[0] - size) + 1))
    top = max(0, new[1] - size)  # the last of them
    box = (left, top, left + size, top + size)
    found = window.images(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - np.asarray(padded.crop(box)).astype(int)).max() <= 1
    moved = window.maps(torch.from_numpy(mask)[None], PADDING)[0].numpy()
    rows, columns = (
        ((2 * (np.arange(size) + first) + 1) * old % (2 * extent) != 0) | (scale in (0.5, 1, 2))
        for first, old, extent in ((top, height, new[1]), (left, width, new[0]))
    )
    assert np.array_equal(moved[rows][:, columns], np.asarray(labels.crop(box))[rows][:, columns])
    assert rows.mean() > 0.9 and columns.mean() > 0.9


def test_flip_mirrors_the_crop():
    draws = torch.tensor([[0.3, 0.3], [0.2, 0.2], [0.6, 0.6], [0.49, 0.5]], dtype=torch.float64)
    window = draw_window(draws, 20, 20, 30, (0.5, 2.0), flip=True)
    moved = window.images(random_images(1, 20).expand(2, -1, -1, -1))
    assert torch.equal(moved[0].flip(2), moved[1]) and not torch.equal(moved[0], moved[1])
    still = draw_window(draws, 20, 20, 30, (0.5, 2.0), flip=False)
    assert torch.equal(still.row[0], still.row[1]) and torch.equal(still.column[0], still.column[1])


def test_long_sides_and_offsets_are_uniform_integers():
    draws = torch.rand(4, 20_000, generator=generator(), dtype=torch.float64)
    window = draw_window(draws, 10, 8, 4, (0.5, 2.0), flip=False)
    extent = (~window.outside).sum((1, 2))
    assert (extent == 16).all()  # 5 .. 20 pixels cover the crop of 4
    side = 5 + (draws[0] * 16).long()
    offsets = torch.stack([side, window.row[:, 0]], 1)
    assert offsets[:, 0].unique().tolist() == list(range(5, 21))
    # At side 20 the rows 0..16 are the possible corners; their source rows are 0..8.
    corner = window.row[side == 20, 0]
    share = corner.bincount(minlength=9) / len(corner)
    expected = torch.tensor([2 / 17] * 8 + [1 / 17])
    assert (share - expected).abs().max() < 0.03


def test_padding_of_the_loader_is_padding_here():
    images, masks = random_images(2, 16), torch.zeros(2, 16, 16, dtype=torch.uint8)
    masks[:, 12:], masks[:, 0] = PADDING, 255
    crop = MaskViews(16, (1, 1), flip=False, generator=generator()).crop(images, masks)
    assert torch.equal(crop.images[:, :, :12], images[:, :, :12]) and torch.equal(crop.padding, masks == PADDING)
    assert (crop.masks[:, 12:] == 255).all() and (crop.masks[:, 0] == 255).all() and not crop.padding[:, 0].any()


def test_further_maps_move_along():
    masks = torch.arange(900).remainder(251).to(torch.uint8).view(30, 30).expand(3, -1, -1)
    crop = MaskViews(24, generator=generator(2)).crop(coordinates(3, 30, 30), masks)
    proposal = crop.window.maps(masks.float() / 2, -1.0)
    assert torch.equal(proposal[crop.padding], torch.full_like(proposal[crop.padding], -1))
    assert torch.equal(proposal[~crop.padding] * 2, crop.masks[~crop.padding].float())


# Colours


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def jitter(image: np.ndarray, order: tuple[int, ...], factors=(1.0, 1.0, 1.0), shift: float = 0.0) -> np.ndarray:
    result = colour_jitter(
        as_tensor(image),
        torch.tensor(factors).view(3, 1, 1, 1, 1),
        torch.full((1, 1, 1, 1), shift),
        torch.tensor(order).view(4, 1, 1, 1, 1),
    )
    return result[0].permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.83, 1.0, 1.5])
@pytest.mark.parametrize(
    ("kind", "enhance"), [(0, ImageEnhance.Brightness), (1, ImageEnhance.Contrast), (2, ImageEnhance.Color)]
)
def test_factors_against_pillow(kind, enhance, factor):
    """Within the level that Pillow truncates, and another half where it rounds the grey image first."""
    image = smooth_image()
    expected = np.asarray(enhance(Image.fromarray(image)).enhance(factor)).astype(float)
    factors = [1.0, 1.0, 1.0]
    factors[kind] = factor
    found = jitter(image, (3, 0, 1, 2), factors)
    assert np.abs(found - expected).max() <= 1.51
    if factor == 1:
        assert np.abs(found - image).max() < 1e-4


@pytest.mark.parametrize("shift", [-0.25, -0.1, 0.07, 0.25, 0.5])
def test_hue_against_colorsys(shift):
    image = smooth_image(16)
    image[0] = 128  # grey has no hue
    image[1, :, 0] = image[1, :, 1]  # ties of the maximum
    image[2, :, 1] = image[2, :, 2]
    found = shift_hue(as_tensor(image), torch.full((1, 1, 1, 1), shift))[0].permute(1, 2, 0).numpy()
    for row, column in np.ndindex(16, 16):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[row, column] / 255))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        assert np.abs(found[row, column] - expected).max() < 2e-6


def test_hue_against_pillows_bytes():
    """torchvision shifts the hue channel of Pillow's HSV bytes: 1/255 turn and 1/255 saturation are lost there."""
    image = smooth_image()
    hue, saturation, value = Image.fromarray(image).convert("HSV").split()
    turned = Image.fromarray((np.asarray(hue).astype(int) + int(0.2 * 255)).astype(np.uint8))
    expected = np.asarray(Image.merge("HSV", (turned, saturation, value)).convert("RGB")).astype(float)
    found = jitter(image, (3, 0, 1, 2), shift=0.2)
    assert np.abs(found - expected).mean() < 2 and np.abs(found - expected).max() <= 10


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_order_of_the_operations(order):
    """One operation at a time in that order gives the same."""
    image, factors, shift = smooth_image(), (1.4, 0.6, 1.5), 0.15
    expected = image
    for kind in order:
        single = tuple(factor if kind == place else 1.0 for place, factor in enumerate(factors))
        values = expected.astype(np.float64)
        tensor = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
        shape = torch.tensor(single).view(3, 1, 1, 1, 1)
        step = colour_jitter(
            tensor, shape, torch.full((1, 1, 1, 1), shift if kind == 3 else 0.0), torch.arange(4).view(4, 1, 1, 1, 1)
        )
        expected = step[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(jitter(image, order, factors, shift) - expected).max() < 0.01
    other = jitter(image, order[::-1], factors, shift)
    assert np.abs(other - expected).max() > 3


def test_every_order_occurs_alike():
    """24 orders, and factors in their ranges: brightness of a white image, isolated."""
    draws = torch.rand(4, 24_000, generator=generator())
    orders = draws.argsort(0)
    code = (orders * torch.tensor([64, 16, 4, 1])[:, None]).sum(0)
    found, count = code.unique(return_counts=True)
    assert len(found) == 24 and (count - 1000).abs().max() < 150


def test_strengths_and_probabilities():
    """Brightness alone on white images at half level: factor in [0.5, 1.5] for 80 %, the rest untouched."""
    images = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    strength = Photometric(contrast=0, saturation=0, hue=0, grey=0, blur=0)
    level = photometric(images, strength, generator())[:, 0, 0, 0] * 255
    same = (level - 100).abs() < 1e-3
    assert abs(same.float().mean() - 0.2) < 0.03
    moved = level[~same]
    assert moved.min() >= 49.9 and moved.max() <= 150.1 and abs(moved.mean() - 100) < 2
    histogram = torch.histc(moved, 5, 50, 150) / len(moved)
    assert (histogram - 0.2).abs().max() < 0.03
    above = photometric(images, replace(strength, brightness=1.5), generator())[:, 0, 0, 0]
    assert above.min() < 0.05 and above.max() <= 2.5 * 100 / 255 + 1e-6  # factors 0 .. 2.5


def test_gray_and_solarise_probabilities():
    images = random_images(1500, 4)
    grey = photometric(images, replace(NOTHING, grey=0.2), generator())
    is_grey = (grey.amax(1) - grey.amin(1)).amax((1, 2)) == 0
    assert abs(is_grey.float().mean() - 0.2) < 0.03
    assert torch.allclose(grey[is_grey], luminance(images.float() / 255)[is_grey].expand(-1, 3, -1, -1))
    solarised = photometric(images, replace(NOTHING, solarise=1.0), generator()) * 255
    expected = np.stack([np.asarray(ImageOps.solarize(Image.fromarray(image.permute(1, 2, 0).numpy())))
                         for image in images[:20]])
    assert np.abs(solarised[:20].permute(0, 2, 3, 1).numpy() - expected).max() < 1e-3
    assert torch.allclose(photometric(images, NOTHING, generator()) * 255, images.float(), atol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_against_the_formula_and_pillow(sigma):
    image = smooth_image(32)
    image[10:14, 12] = 255
    found = gaussian_blur(as_tensor(image).double(), torch.tensor([sigma]))[0].permute(1, 2, 0).numpy()
    tap = np.arange(-6, 7)
    kernel = np.exp(-0.5 * (tap / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(image / 255, ((6, 6), (6, 6), (0, 0)), mode="edge")
    rows = sum(weight * padded[k : k + 32] for k, weight in enumerate(kernel))
    expected = sum(weight * rows[:, k : k + 32] for k, weight in enumerate(kernel))
    assert np.abs(found - expected).max() < 1e-6
    pillow = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
    assert np.abs(found * 255 - pillow).mean() < 1.0  # three box filters


def test_a_second_strength_for_chosen_images():
    images = random_images(200, 4)
    where = (torch.arange(200) % 2 == 0).view(200, 1, 1)
    mixed = photometric(images, replace(NOTHING, grey=1.0), generator(), NOTHING, where)
    assert torch.allclose(mixed[::2] * 255, images[::2].float(), atol=1e-4)
    assert (mixed[1::2].amax(1) == mixed[1::2].amin(1)).all()


# Boxes and blocks


def test_cutmix_boxes_are_boxes_within_bounds():
    size = 64
    boxes = cutmix_boxes(3000, size, 0.5, "cpu", generator())
    drawn = boxes.flatten(1).any(1)
    assert abs(drawn.float().mean() - 0.5) < 0.03
    for box in boxes[drawn][:300]:
        rows, columns = box.any(1).nonzero()[:, 0], box.any(0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        assert box.sum() == height * width
        assert rows[-1] - rows[0] == height - 1 and columns[-1] - columns[0] == width - 1
        # int() takes less than a pixel from each side.
        assert 0.02 * size**2 - height - width - 1 < height * width <= 0.4 * size**2 + 1e-3
        assert height / (width + 1) < 1 / 0.3 and (height + 1) / width > 0.3


def test_cutmix_boxes_are_distributed_as_by_redrawing():
    """Against the published loop, on the mean side lengths, the mean area and the mean place."""
    size, random = 48, np.random.default_rng(0)
    reference = []
    for _ in range(4000):
        area = random.uniform(0.02, 0.4) * size**2
        while True:
            ratio = random.uniform(0.3, 1 / 0.3)
            width, height = int(math.sqrt(area / ratio)), int(math.sqrt(area * ratio))
            x, y = random.integers(0, size, 2)
            if x + width <= size and y + height <= size:
                break
        reference.append((width, height, width * height, x, y))
    boxes = cutmix_boxes(4000, size, 1.1, "cpu", generator())
    width, height = boxes.any(1).sum(1), boxes.any(2).sum(1)
    left, top = boxes.any(1).int().argmax(1), boxes.any(2).int().argmax(1)
    found = torch.stack([width, height, width * height, left, top], 1).double().numpy()
    reference = np.array(reference, float)
    error = np.hypot(reference.std(0), found.std(0)) / math.sqrt(4000)
    assert (np.abs(found.mean(0) - reference.mean(0)) < 4 * error).all()
    assert (np.abs(found.std(0) / reference.std(0) - 1) < 0.06).all()


@pytest.mark.parametrize(("size", "block", "grid"), [(64, 32, 2), (321, 32, 10), (80, 32, 2), (64, 8, 8), (112, 32, 4)])
def test_block_masks(size, block, grid):
    """Python rounds 2.5 to 2 and 3.5 to 4."""
    masks = block_mask(400, size, block, 0.7, "cpu", generator())
    cells = torch.arange(size) * grid // size
    corner = [(cells == cell).int().argmax() for cell in range(grid)]
    values = masks[:, corner][:, :, corner]
    assert torch.equal(values[:, cells][:, :, cells], masks)
    assert abs(values.float().mean() - 0.7) < 4 * math.sqrt(0.21 / values.numel())
    flat = values.flatten(1).float()
    assert abs(torch.corrcoef(flat[:, :2].T)[0, 1]) < 0.2  # independent draws


def test_paste_and_hide():
    base, other = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    where = torch.zeros(2, 4, 4, dtype=torch.bool)
    where[0, 1:3, 2:] = True
    assert paste(base, other, where).sum() == 3 * 4 and paste(base[:, 0], other[:, 0], where).sum() == 4
    assert torch.equal(hide(other, where)[:, 0], (~where).float())


# Views


def test_views_show_the_same_pixels_in_the_same_place():
    images, masks = coordinates(8, 40, 40), torch.zeros(8, 40, 40, dtype=torch.uint8)
    views = MaskViews(32, strong=NOTHING, mild=NOTHING, generator=generator(4))
    crop = views.crop(images, masks)
    weak = views.weak(crop)
    masked, _ = views.masked(crop, 8)
    assert torch.allclose(views.strong(crop), weak, atol=1e-5) and torch.allclose(masked, weak, atol=1e-5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (crop.images.double() / 255 - mean[:, None, None].double()) / std[:, None, None].double()
    assert torch.allclose(weak.double(), expected, atol=1e-5)


def test_strong_views_are_black_where_padded():
    """Brightness, contrast and blur reach the padding; the loss must not see that, nor the network."""
    images, masks = random_images(16, 40), torch.zeros(16, 40, 40, dtype=torch.uint8)
    views = MaskViews(64, strong=TAGS, generator=generator(1))
    crop = views.crop(images, masks)
    black = views.plain(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).expand(16, -1, 64, 64)
    padded = crop.padding[:, None].expand_as(black)
    assert padded.any()
    for view in (views.weak(crop), views.strong(crop), views.masked(crop, 8)[0]):
        assert torch.allclose(view[padded], black[padded], atol=1e-6)


def test_masked_view_has_blocks_only_with_mild_colours():
    images, masks = random_images(600, 8), torch.zeros(600, 8, 8, dtype=torch.uint8)
    strong = replace(NOTHING, grey=1.0)
    views = MaskViews(8, (1, 1), strong=strong, mild=NOTHING, generator=generator())
    view, blocks = views.masked(views.crop(images, masks), 1)
    level = view * views.std[:, None, None] + views.mean[:, None, None]
    grey = (level.amax(1) - level.amin(1)).amax((1, 2)) < 1e-5
    assert torch.equal(grey, ~blocks.flatten(1).any(1))
    assert abs(grey.float().mean() - 0.5) < 0.08
    assert abs(blocks[~grey].float().mean() - 0.7) < 0.02
    assert MILD.grey == 0 and STRONG.grey == 0.2


def test_equal_generators_make_equal_views_and_images_differ():
    images, masks = random_images(1, 32).expand(6, -1, -1, -1), torch.zeros(6, 32, 32, dtype=torch.uint8)

    def views_of(seed):
        views = MaskViews(32, generator=generator(seed))
        crop = views.crop(images, masks)
        return [crop.images, crop.padding, views.strong(crop), *views.masked(crop, 8), views.boxes(crop)]

    first, again, other = views_of(0), views_of(0), views_of(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[2][0], first[2][1])


class NoHostReads(TorchDispatchMode):
    """Fails on operations that copy a value to the host or whose result has a data-dependent shape."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"), name
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    images, masks = random_images(4, 32), torch.zeros(4, 32, 32, dtype=torch.uint8)
    views = MaskViews(32, strong=TAGS, generator=generator())
    with NoHostReads():
        crop = views.crop(images, masks)
        view, blocks = views.masked(crop, 8)
        paste(views.strong(crop), views.weak(crop), views.boxes(crop))
        hide(view, blocks)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        views.mean.sum().item()


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.int64)),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.uint8)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 9, dtype=torch.uint8)),
    ],
)
def test_other_types_and_shapes_are_refused(images, masks):
    with pytest.raises(ValueError, match=r"views need uint8 images \(B, 3, H, W\) and masks \(B, H, W\), got torch"):
        MaskViews(8).crop(images, masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 0}, "crop 0 must be positive"),
        ({"crop": 64, "scale": (0, 1)}, r"scale \(0, 1\) a range"),
        ({"crop": 64, "scale": (2, 1)}, r"scale \(2, 1\) a range"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskViews(**arguments)


def test_a_block_beyond_the_crop_is_named():
    with pytest.raises(ValueError, match="blocks of 40 must be below twice the crop, 16"):
        block_mask(1, 16, 40, 0.7, "cpu")
