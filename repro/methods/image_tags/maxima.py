"""The largest of chosen masks at each pixel, for many sets of masks at once (`regions` explains the letters).

Where masks are resized first, all of them are, in parts and without a gradient; what a pixel keeps is then worked out
again, with one, from the four patches around it.
"""

import torch
from torch import Tensor

from repro.cam import bilinear, widened

CHUNK = 2**23  # resized mask values at a time
MAX = 2  # of embedding bags


def region_masks(masks: Tensor, joined: Tensor, size: tuple[int, int], resize: str = "each") -> Tensor:
    """Largest of the joined masks at each pixel, (B, A, H, W); zeros where none joined.

    masks: (B, N, h, w) in [0, 1]. joined: (B, A, N) bool; a mask joins one region of its image at most.
    size: (H, W). resize: `each`, of the masks resized (bilinear, free corners); `group`, resized afterwards, which is
        at least as large.
    A pixel's gradient goes to the mask that is largest there (ties: the first). At least float32.
    """
    masks = widened(masks)
    grid = (masks.shape[2], masks.shape[3])
    some = joined.any(2)[:, :, None, None]
    if resize == "group" or grid == size:
        winner = largest(masks.flatten(2), joined)
        return bilinear(masks.flatten(2).gather(1, winner).unflatten(2, grid) * some, size)
    down, across = taps(grid[0], size[0], masks), taps(grid[1], size[1], masks)
    rows = max(1, CHUNK // (masks.shape[0] * masks.shape[1] * size[1]))
    winners = []
    with torch.no_grad(), torch.autocast(masks.device.type, enabled=False):
        wide = masks @ matrix(*across, grid[1]).mT
        for part in matrix(*down, grid[0]).split(rows):
            winners.append(largest((part @ wide).flatten(2), joined))
    winner = torch.cat(winners, 2).unflatten(2, size) * (grid[0] * grid[1])
    flat, total = masks.flatten(1), 0.0
    # only the winner is resized with a gradient, from its four patches around each pixel
    for row, vertical in zip(*down, strict=True):
        for column, horizontal in zip(*across, strict=True):
            corner = winner + row[:, None] * grid[1] + column
            value = flat.gather(1, corner.flatten(1)).view(corner.shape)
            total = total + value * (vertical[:, None] * horizontal)
    return total * some


@torch.no_grad()
def largest(values: Tensor, joined: Tensor) -> Tensor:
    """Index (B, A, P) int64 of the joined row of values (B, N, P) that is largest at each place; any if none joined.

    The maximum over a list of rows of a table is what an embedding bag takes: each row is read once, and rows that
    joined nothing make up a last bag.
    """
    batch, patches = values.shape[:2]
    owner = joined.long().argmax(1).masked_fill(~joined.any(1), joined.shape[1])
    first = torch.arange(batch, device=values.device)[:, None] * patches
    rows = (owner.argsort(dim=1, stable=True) + first).flatten()
    count = (owner[:, None] == torch.arange(joined.shape[1] + 1, device=values.device)[:, None]).sum(2).flatten()
    found = torch.embedding_bag(values.flatten(0, 1), rows, count.cumsum(0) - count, mode=MAX)[3]
    winner = found.view(batch, -1, values.shape[2])[:, :-1] - first[:, :, None]
    return winner.clamp(0, patches - 1)


def taps(old: int, new: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours (2, new) int64 of each new place among the old ones, and their weights (2, new)."""
    place = ((torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * (old / new) - 0.5).clamp(min=0)
    lower = place.long()
    share = place - lower
    return torch.stack([lower, (lower + 1).clamp(max=old - 1)]), torch.stack([1 - share, share])


def matrix(index: Tensor, weight: Tensor, old: int) -> Tensor:
    """The (new, old) matrix of `taps`."""
    return (weight[:, :, None] * (index[:, :, None] == torch.arange(old, device=index.device))).sum(0)
