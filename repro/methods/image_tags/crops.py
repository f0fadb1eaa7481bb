"""ToCo's local crops: where the CAM is not confident, and which of them show nothing (released code)."""

import torch
from torch import Tensor

from repro.cam import best_class


def confidence_levels(cam: Tensor, tags: Tensor, low: float = 0.25, high: float = 0.7) -> Tensor:
    """Map (B, H, W) int64 of an (auxiliary) CAM: 0 where its best class is at most `low`, 2 from `high` on, else 1.

    cam: (B, C, H, W), not negative; tags: (B, C).
    """
    value, _ = best_class(cam, tags)
    return torch.where(value <= low, 0, torch.where(value >= high, 2, 1))


@torch.no_grad()
def choose_crops(
    levels: Tensor, count: int = 8, side: int = 96, least: float = 0.2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Corners (B, n, 2) int64, top and left, of crops around random pixels that are not confident; which are negative.

    levels: (B, H, W) of `confidence_levels`. A crop's centre has level 0 or 1, unless an image has fewer than `count`
        such pixels: then any. No two crops of an image have the same corner. All crops lie inside (the released code
        leaves out the last row and column).
    count: n. side: of a crop, pixels. least: a crop is negative, (B, n) bool, when its mean level is at most this.
    generator: on the device of the levels. Raises ValueError when an image has no room for `count` crops.
    """
    height, width = levels.shape[1] - side + 1, levels.shape[2] - side + 1
    if side < 1 or height < 1 or width < 1 or height * width < count:
        raise ValueError(f"{count} crops of {side} pixels do not fit into images of {tuple(levels.shape[1:])}")
    centre = side // 2
    allowed = (levels[:, centre : centre + height, centre : centre + width] < 2).flatten(1)
    allowed = allowed | (allowed.sum(1, keepdim=True) < count)
    draw = torch.rand(allowed.shape, generator=generator, device=levels.device)
    chosen = (draw + allowed).topk(count, dim=1).indices
    corners = torch.stack([chosen // width, chosen % width], 2)
    return corners, cut(levels[:, None], corners, side).float().mean((2, 3, 4)) <= least


def cut(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Crops (B, n, channels, side, side) of images (B, channels, H, W) at corners (B, n, 2), top and left."""
    reach = torch.arange(side, device=images.device)
    rows, columns = corners[:, :, 0, None] + reach, corners[:, :, 1, None] + reach
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images[image, :, rows[:, :, :, None], columns[:, :, None]].movedim(4, 2)
