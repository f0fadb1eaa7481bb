"""The views that segmentation methods train on: image and mask move together, drawn on the device for each image.

    views = MaskViews(crop=64, generator=torch.Generator(device).manual_seed(seed))
    crop = views.crop(items.images, items.labels)      # scale, pad, crop, flip
    weak, strong = views.weak(crop), views.strong(crop)      # normalised; the same pixels in the same place
    box = views.boxes(crop)
    strong = paste(strong, other_strong, box)      # CutMix

Images enter as uint8 (B, 3, H, W), masks as uint8 (B, H, W): 255 is ignored, 254 is padding that a loader made.
Nothing here waits for the device, and no work is done image by image.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import normalise
from repro.data.masks import IGNORE

PADDING = 254
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR_RADIUS = 6  # three standard deviations of the strongest blur, in pixels
PROPOSALS = 256  # CutMix boxes drawn for each image; none fits with probability below 1e-6


@dataclass(frozen=True)
class Photometric:
    """Colour operations of a strong view; probabilities of each, and strengths as torchvision's ColorJitter has them.

    brightness, contrast, saturation: factor in [1 - s, 1 + s], not below 0; hue: shift in [-hue, hue] turns
    blur: probability of a Gaussian blur with standard deviation in [sigma_low, sigma_high], pixels
    """

    jitter: float = 0.8
    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25
    grey: float = 0.2
    blur: float = 0.5
    sigma_low: float = 0.1
    sigma_high: float = 2.0
    solarise: float = 0.0


STRONG = Photometric()  # UniMatch and CSL, released code
MILD = Photometric(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2, grey=0.0)  # CSL's masked view, heads
TAGS = Photometric(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.1, solarise=0.2)  # PCRE on VOC


@dataclass(frozen=True)
class Window:
    """Where each crop comes from, for images and any number of maps.

    row, column: (B, S) int64, nearest source row and column of each output row and column
    down, across: (B, S, H) and (B, S, W), weights of the source rows and columns (bilinear, antialiased as Pillow's)
    outside: (B, S, S) bool, beyond the scaled image: padding
    """

    row: Tensor
    column: Tensor
    down: Tensor
    across: Tensor
    outside: Tensor

    def images(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> uint8 (B, C, S, S), 0 where padded."""
        moved = self.down[:, None] @ images.to(self.down.dtype) @ self.across.mT[:, None]
        # Weights may sum to a little more than 1.
        return (moved + 0.5).clamp_(0, 255).to(torch.uint8) * ~self.outside[:, None]

    def maps(self, maps: Tensor, padding: float) -> Tensor:
        """(B, H, W) of any type -> (B, S, S), nearest neighbour; `padding` is the value beyond the image."""
        b, s = self.row.shape
        index = (self.row * maps.shape[2])[:, :, None] + self.column[:, None]
        return maps.flatten(1).gather(1, index.view(b, s * s)).view(b, s, s).masked_fill(self.outside, padding)


@dataclass(frozen=True)
class Crop:
    """A batch after the geometric part, shared by all its views.

    images: (B, 3, S, S) uint8, 0 where padded; masks: (B, S, S) uint8, 255 where void, hidden or padded
    padding: (B, S, S) bool; window: to move further maps along
    """

    images: Tensor
    masks: Tensor
    padding: Tensor
    window: Window


class MaskViews(nn.Module):
    """Makes the views of a batch. All random numbers come from `generator`.

    crop: side S of the crops, pixels
    scale: range of the long side relative to the image's; (1, 1) where a loader has scaled and cropped
    flip: whether half of the crops are mirrored
    strong, mild: colour operations of the strong views, and of CSL's masked view when it is masked
    mean, std: per channel, fractions of 1. generator: on the images' device; None: the default one.
    Raises ValueError.
    """

    def __init__(
        self,
        crop: int,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        strong: Photometric = STRONG,
        mild: Photometric = MILD,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if crop < 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"crop {crop} must be positive and scale {scale} a range (low, high) above 0")
        self.size, self.scale, self.flip, self.generator = crop, scale, flip, generator
        self.photometric, self.mild = strong, mild
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def crop(self, images: Tensor, masks: Tensor) -> Crop:
        """Scale, pad right and below, crop, flip.

        images: (B, 3, H, W) uint8; masks: (B, H, W) uint8
        Raises ValueError for other types or shapes, and for a generator on another device.
        """
        b, channels, height, width = images.shape
        if channels != 3 or masks.shape != (b, height, width) or {images.dtype, masks.dtype} != {torch.uint8}:
            raise ValueError(
                f"views need uint8 images (B, 3, H, W) and masks (B, H, W), got {images.dtype} {tuple(images.shape)} "
                f"and {masks.dtype} {tuple(masks.shape)}"
            )
        if self.generator is not None and self.generator.device.type != images.device.type:
            raise ValueError(f"images are on {images.device}, the generator on {self.generator.device}: use one device")
        draws = torch.rand(4, b, generator=self.generator, device=images.device, dtype=torch.float64)
        window = draw_window(draws, height, width, self.size, self.scale, self.flip)
        labels = window.maps(masks, PADDING)
        padding = labels == PADDING
        return Crop(window.images(images), labels.masked_fill(padding, IGNORE), padding, window)

    def plain(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W): what is evaluated."""
        return normalise(images, self.mean, self.std)

    def weak(self, crop: Crop) -> Tensor:
        """The crop itself, normalised; black where padded."""
        return self.plain(crop.images)

    def strong(self, crop: Crop) -> Tensor:
        """Colour operations on the crop; each call draws anew."""
        return self._normalised(photometric(crop.images, self.photometric, self.generator), crop)

    def masked(self, crop: Crop, block: int = 32, keep: float = 0.7) -> tuple[Tensor, Tensor]:
        """CSL's third view and where it may be masked (released code).

        block: side of a block in pixels, below twice the crop's; keep: probability that a block is 1
        Returns normalised (B, 3, S, S), and (B, S, S) bool blocks. By a fair coin an image has mild colours and
        blocks, or strong colours and none. Masking itself needs the weights: `hide`.
        """
        heads = self._uniform(len(crop.images), 1, 1) < 0.5
        images = photometric(crop.images, self.photometric, self.generator, self.mild, heads)
        blocks = block_mask(len(crop.images), self.size, block, keep, self.mean.device, self.generator)
        return self._normalised(images, crop), blocks & heads

    def boxes(self, crop: Crop, probability: float = 0.5) -> Tensor:
        """CutMix boxes, (B, S, S) bool."""
        return cutmix_boxes(len(crop.images), self.size, probability, crop.images.device, self.generator)

    def _normalised(self, images: Tensor, crop: Crop) -> Tensor:
        black = images.masked_fill(crop.padding[:, None], 0)
        return (black - self.mean[:, None, None]) / self.std[:, None, None]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.mean.device)


def paste(base: Tensor, other: Tensor, where: Tensor) -> Tensor:
    """`other` inside `where`, `base` elsewhere. base, other: (B, S, S) or (B, C, S, S); where: (B, S, S) bool."""
    return torch.where(where if base.ndim == 3 else where[:, None], other, base)


def hide(images: Tensor, where: Tensor) -> Tensor:
    """Normalised images (B, C, S, S) set to 0, the mean colour, at (B, S, S) bool (CSL, released code)."""
    return images.masked_fill(where[:, None], 0)


def draw_window(
    draws: Tensor, height: int, width: int, size: int, scale: tuple[float, float], flip: bool
) -> Window:
    """The geometric transform of each image.

    draws: (4, B) float64, uniform in [0, 1): long side, row, column, flip
    scale: the long side is an integer drawn uniformly from int(scale * long side), both ends included
    Source: UniMatch's released code.
    """
    new_height, new_width, top, left = placement(draws, height, width, size, scale)
    output = torch.arange(size, device=draws.device)
    across = torch.where((draws[3] < 0.5)[:, None] & flip, size - 1 - output, output) + left[:, None]
    down = output + top[:, None]
    outside = (down >= new_height[:, None])[:, :, None] | (across >= new_width[:, None])[:, None]
    row, row_weights = _resampling(down, height, new_height)
    column, column_weights = _resampling(across, width, new_width)
    return Window(row, column, row_weights, column_weights, outside)


def placement(
    draws: Tensor, height: int, width: int, size: int, scale: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Extent of the scaled images and the corner of the crops: height, width, top, left, (B,) int64 each.

    draws: (3 or more, B) float64, uniform in [0, 1): long side, row, column; otherwise as for `draw_window`
    """
    long = max(height, width)
    low, high = int(long * scale[0]), int(long * scale[1])
    side = low + (draws[0] * (high - low + 1)).long()
    extents = [(2 * extent * side + long) // (2 * long) for extent in (height, width)]  # rounded half up
    corner = [
        (draw * ((extent - size).clamp(min=0) + 1)).long() for draw, extent in zip(draws[1:3], extents, strict=True)
    ]
    return *extents, *corner


def _resampling(position: Tensor, old: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest source index (B, S), and weights (B, S, old) of Pillow's bilinear filter, which averages when shrinking.

    position: (B, S) int64, row or column of the scaled image; new: (B,) its extent
    """
    nearest = ((2 * position + 1) * old // (2 * new[:, None])).clamp(0, old - 1)
    ratio = (old / new.float())[:, None]
    centre = (position + 0.5) * ratio - 0.5
    source = torch.arange(old, device=position.device)
    weights = (1 - (source - centre[..., None]).abs() / ratio.clamp(min=1)[..., None]).clamp_(min=0)
    return nearest, weights / weights.sum(2, keepdim=True).clamp(min=1e-6)  # 0 beyond the image


def photometric(
    images: Tensor,
    strength: Photometric,
    generator: torch.Generator | None = None,
    other: Photometric | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """Jitter, grayscale, blur, solarise, each on its own random part of the batch.

    images: (B, 3, H, W) uint8
    other, where: another strength for the images where `where` (B, 1, 1) is true
    Returns float32 in [0, 1], not rounded to levels in between (Pillow rounds after each operation).
    Source: UniMatch's released code, torchvision's ColorJitter.
    """
    b, device = len(images), images.device
    chosen = torch.zeros(b, dtype=torch.bool, device=device) if where is None else where.view(b)
    pairs = zip(astuple(other or strength), astuple(strength), strict=True)
    values = [torch.where(chosen, second, first)[:, None, None, None] for second, first in pairs]
    jitter, brightness, contrast, saturation, hue, grey, blur, low, high, solarise = values
    draws = torch.rand(13, b, 1, 1, 1, generator=generator, device=device)
    # A colour operation that is not drawn has factor 1 or shift 0, which changes nothing.
    amount = torch.stack([brightness, contrast, saturation]) * (draws[0] < jitter)
    least = (1 - amount).clamp_(min=0)
    factors = least + draws[1:4] * (1 + amount - least)
    shift = (2 * draws[4] - 1) * hue * (draws[0] < jitter)
    coloured = colour_jitter(images.float() / 255, factors, shift, draws[5:9].argsort(0))
    result = torch.where(draws[9] < grey, luminance(coloured), coloured)
    if strength.blur or (other and other.blur):
        sigma = low + (high - low) * draws[11]
        result = torch.where(draws[10] < blur, gaussian_blur(result, sigma.view(b)), result)
    if strength.solarise or (other and other.solarise):
        result = torch.where((draws[12] < solarise) & (result >= 128 / 255), 1 - result, result)
    return result


def colour_jitter(images: Tensor, factors: Tensor, shift: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image in its own order; clipped to [0, 1] after each.

    images: (B, 3, H, W) in [0, 1]
    factors: (3, B, 1, 1, 1) of brightness, contrast, saturation, 1 changes nothing; shift: (B, 1, 1, 1) of the hue
    order: (4, B, 1, 1, 1), operation (3 is hue) that comes first, second, ...
    """
    # Hue is by far the dearest: it is computed once, between the steps before and those after it.
    place = (order == 3).int().argmax(0)
    for late in (False, True):
        for step in range(4):
            kind = order[step]
            factor = torch.where(kind < 3, factors.gather(0, kind.clamp(max=2)[None])[0], 1.0)
            images = _blend_step(images, kind, torch.where((step > place) == late, factor, 1.0))
        if not late:
            images = shift_hue(images, shift)
    return images


def _blend_step(images: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    """factor * image + (1 - factor) * (0 black | 1 mean grey level | 2 grey image), clipped."""
    grey = luminance(images)
    # Pillow takes the mean of rounded levels, rounded.
    middle = (grey.mean((1, 2, 3), keepdim=True) * 255).add_(0.5).floor_().div_(255)
    other = torch.where(kind == 1, middle, grey * (kind == 2))
    return (images * factor + other * (1 - factor)).clamp_(0, 1)


def luminance(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma, (B, 1, H, W). images: (B, 3, H, W)."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue at equal HSV saturation and value. images: (B, 3, H, W) in [0, 1]; shift: (B, 1, 1, 1), turns."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    divisor = chroma.clamp(min=1e-12)
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector = sector + 6 * shift[:, 0]
    # RGB from hue without cases: channel = value - chroma * min(k, 4 - k) clipped to [0, 1], k = (n + sector) mod 6.
    phase = torch.stack([(sector + n).remainder(6) for n in (5, 3, 1)], 1)
    turned = value[:, None] - chroma[:, None] * torch.minimum(phase, 4 - phase).clamp_(0, 1)
    return torch.where(shift == 0, images, turned)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each image, edges repeated; Pillow approximates it by repeated box filters.

    images: (B, C, H, W); sigma: (B,) standard deviation in pixels, 0 < sigma <= 2
    """
    b, c, h, w = images.shape
    tap = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    kernel = (-0.5 * (tap / sigma[:, None]) ** 2).softmax(1).to(images.dtype)
    # Bands of a matrix: a row of the result is a weighted sum of the rows above and below, repeated at the edge.
    blurred = images
    for axis, extent in ((2, h), (3, w)):
        nearby = (torch.arange(extent, device=images.device)[:, None] + tap).clamp(0, extent - 1)
        band = torch.zeros(b, extent, extent, device=images.device, dtype=images.dtype)
        band.scatter_add_(2, nearby.expand(b, -1, -1), kernel[:, None].expand(b, extent, -1))
        blurred = band[:, None] @ blurred if axis == 2 else blurred @ band.mT[:, None]
    return blurred


def cutmix_boxes(
    count: int, size: int, probability: float, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensor:
    """Boxes (count, size, size) bool, all False with probability 1 - `probability`.

    Area U(0.02, 0.4) of the crop, ratio U(0.3, 1 / 0.3), width int(sqrt(area / ratio)), height int(sqrt(area * ratio)),
    ratio and corner redrawn until the box fits (UniMatch's released code). Here many are drawn at once and the first
    that fits is taken, which is the same distribution without a loop of unknown length.
    """
    draws = torch.rand(3, count, PROPOSALS, generator=generator, device=device)
    single = torch.rand(2, count, 1, generator=generator, device=device)
    area = (0.02 + 0.38 * single[0]) * size**2
    ratio = 0.3 + (1 / 0.3 - 0.3) * draws[0]
    width, height = (area / ratio).sqrt().long(), (area * ratio).sqrt().long()
    left, top = ((draw * size).long() for draw in draws[1:])
    first = ((left + width <= size) & (top + height <= size)).int().argmax(1, keepdim=True)
    left, top, width, height = (value.gather(1, first) for value in (left, top, width, height))
    axis = torch.arange(size, device=device)
    rows, columns = (axis >= top) & (axis < top + height), (axis >= left) & (axis < left + width)
    return rows[:, :, None] & columns[:, None] & (single[1] < probability)[..., None]


def block_mask(
    count: int,
    size: int,
    block: int,
    keep: float,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, size, size) bool: a grid of round(size / block) squared draws, 1 with probability `keep`, enlarged.

    Raises ValueError where not even one block fits.
    """
    n = round(size / block)
    if n < 1:
        raise ValueError(f"blocks of {block} must be below twice the crop, {size}")
    grid = torch.rand(count, 1, n, n, generator=generator, device=device) < keep
    return F.interpolate(grid.float(), (size, size), mode="nearest")[:, 0] > 0.5
