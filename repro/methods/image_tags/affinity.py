"""AFA's affinity between patches: what it is read from, its labels and loss, and the random walk of a CAM along it.

N = h w patches of a grid (h, w), row by row. Label maps hold 0 for the background, c + 1 for class c and 255 for
ignored pixels. Everything is computed in float32 at least, also under autocast. "Released code" is AFA's.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from repro.cam import widened
from repro.data.masks import IGNORE


def symmetric_scores(scores: Iterable[Tensor], skip: int) -> Tensor:
    """S + S^T (B, M, N, N) of the patches, M heads of all blocks together.

    scores: (B, heads, skip + N, skip + N) of each block, before the softmax, queries in rows; finite between patches.
    skip: class tokens in front, which are left out. Source: released code; its backbone has no class token.
    """
    patches = torch.cat([widened(block)[:, :, skip:, skip:] for block in scores], 1)
    return patches + patches.mT


def neighbours(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Pairs (N, N) bool of patches at most `radius` rows and at most `radius` columns apart; a patch is its own.

    A square window, cut off at the border. radius: at least 0, in patches. Source: released code.
    """
    rows, columns = (torch.arange(side, device=device) for side in grid)
    above, beside = ((at[:, None] - at).abs() <= radius for at in (rows, columns))
    return (above[:, None, :, None] & beside[:, None]).flatten(2).flatten(0, 1)


def affinity_pairs(labels: Tensor, grid: tuple[int, int], radius: int) -> tuple[Tensor, Tensor]:
    """Pairs of patches (B, N, N) bool with one label, and pairs with two; neither where one of both is 255 or too far.

    labels: (B, H, W) integers, refined, of which a patch takes the nearest pixel: the first one of its square. The
        background is a label like others, and each labelled patch is alike with itself.
    radius: of `neighbours`. Source: released code.
    """
    patches = F.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1)
    known = patches != IGNORE
    pairs = known[:, :, None] & known[:, None] & neighbours(grid, radius, labels.device)
    same = patches[:, :, None] == patches[:, None]
    return pairs & same, pairs & ~same


def affinity_loss(logits: Tensor, alike: Tensor, apart: Tensor) -> Tensor:
    """L_aff = .5 sum_alike (1 - a) / (#alike + 1) + .5 sum_apart a / (#apart + 1), a = sigmoid(logits); a scalar.

    All (B, N, N), and sums and counts over the whole batch. In [0, 1), and 0 where there is no pair.
    Source: released code.
    """
    logits = widened(logits)
    # 1 - a is sigmoid(-z): no difference of nearly equal numbers, so sure pairs keep a gradient
    pull, push = (
        torch.where(pairs, score.sigmoid(), 0).sum() / (pairs.sum() + 1)
        for pairs, score in ((alike, -logits), (apart, logits))
    )
    return 0.5 * pull + 0.5 * push


def transition(logits: Tensor, near: Tensor, power: float = 2.0) -> Tensor:
    """T (B, N, N): the affinities between neighbours to a power, element by element, over their sum in each row.

    T_ij = a_ij^power / sum_k a_ik^power, k over the neighbours of i, 0 for others: rows sum to 1. In logarithms, so
    that affinities near 0 do not divide 0 by 0; the released code adds .1 to each sum instead, which dims the map.
    logits: (B, N, N), a = sigmoid(logits). near: (N, N) bool, of `neighbours`. power: 2, at least 0; 0 is a plain mean.
    """
    weight = power * F.logsigmoid(widened(logits))
    return weight.masked_fill(~near, -math.inf).softmax(-1)


def random_walk(cam: Tensor, steps: Tensor) -> Tensor:
    """CAM (B, C, h, w) after one step: at each patch the mean of its neighbours' values, weighted by a row of T.

    cam: (B, C, h, w). steps: T (B, N, N) of `transition`. No value leaves the range of its map.
    """
    with torch.autocast(cam.device.type, enabled=False):
        cam = widened(cam)
        return (cam.flatten(2) @ steps.to(cam.dtype).mT).unflatten(2, cam.shape[2:])
