"""PCRE's confidence regions (Xu et al., CVPR 2025): one soft mask a patch, grown into one region a class of an image.

    S = joint_confidence(class_logits, patch_logits)
    pairs = shown_classes(tags, most=3)
    masks = gate(masks, radius(progress), grid=(28, 28))            # in the training loss only
    regions = refined_regions(masks, S, pairs, (448, 448))
    by_class(regions.masks, pairs, classes)                         # (B, C, H, W)

B images, C foreground classes, N = h w patches row by row, and A places for the classes that an image shows, of which
some stay empty: so no shape depends on values, and no step waits for the device. Equations as far as the released code
and the supplementary give them; the text of the paper was not read.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, hypot, pi
from typing import NamedTuple

import torch
from torch import Tensor

from repro.cam import widened
from repro.methods.image_tags.maxima import region_masks
from repro.settings import check, hyper

SCHEDULES = ("cosine", "fixed", "none")
POOLS = ("sum", "max")


@dataclass(frozen=True)
class Expansion:
    """How regions grow."""

    threshold: float = hyper(0.7, "tau_bin", "supplementary, Tab. 1a; released code", low=0, high=1)
    rounds: int = hyper(5, "T", "supplementary, Tab. 1c; released code", low=1)
    low: float = hyper(0.3, "", "released code: least overlap with the seed of a mask that joins", low=0, high=1)
    high: float = hyper(0.5, "", "released code: most overlap; a mask above it adds nothing", low=0, high=1)
    limit: int = hyper(300, "", "released code: candidates of a class in an image", low=1)
    expand: bool = hyper(True, "", "off: the best mask alone, a switch of the released code")
    ranking: str = hyper(
        "confidence", "", "reconstruction; index: above the limit the last patches lead, a fault of the released code",
        choices=("confidence", "index"),
    )  # fmt: skip
    resize: str = hyper(
        "each", "", "released code: masks are resized before their maximum; group: after it (ours, cheaper)",
        choices=("each", "group"),
    )  # fmt: skip

    def __post_init__(self):
        check(self)


class Pairs(NamedTuple):
    """Classes (B, A) int64, from 0, that each image shows, in rising order, and which of the A places are filled."""

    classes: Tensor
    shown: Tensor


class Growth(NamedTuple):
    """What joined in which round, for the regions and for figures.

    seeds: (B, A, T) int64, the patch each round started from, -1 where no candidate was left
    joins: (B, A, T, N) bool, the masks of each round's group, its seed included; a mask can be in several groups
    """

    seeds: Tensor
    joins: Tensor


class Regions(NamedTuple):
    """masks: (B, A, H, W) in [0, 1], m_r, zeros where nothing was found. found: (B, A) bool: there was a candidate.
    rank: (B, A, N) of `candidates`. growth: of `grow`."""

    masks: Tensor
    found: Tensor
    rank: Tensor
    growth: Growth


def joint_confidence(class_logits: Tensor, patch_logits: Tensor) -> Tensor:
    """S (B, N, C) in [0, 1]: the softmax over classes of one branch times the softmax over patches of the other.

    class_logits, patch_logits: (B, N, C). At least float32. Source: released code; two streams as in WSDDN.
    """
    return widened(class_logits).softmax(2) * widened(patch_logits).softmax(1)


def image_score(confidence: Tensor, pool: str = "sum") -> Tensor:
    """Score (B, C) in [0, 1] of an image from S (B, N, C): its sum over patches, or a variant's maximum.

    Rounding above 1 is cut. Raises ValueError for another pool. Source: released code, both.
    """
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; it must be one of {', '.join(map(repr, POOLS))}")
    return (confidence.sum(1) if pool == "sum" else confidence.amax(1)).clamp(max=1)


def radius(
    progress: float, schedule: str = "cosine", r_max: float | None = 5.0, begin: float = 0.1, end: float = 0.4,
    grid: tuple[int, int] = (28, 28),
) -> float | None:  # fmt: skip
    """Radius of the gate in patches (Eq. 5), None for no gate.

    progress: share of training done, t / t_max. schedule: `cosine`, 1 up to `begin`, then half a cosine wave up to
        r_max at `end`, where it stays; `fixed`, always r_max; `none`.
    r_max: at least 0; None grows it to the grid's diagonal, and there is no gate from `end` on (supplementary: until
        the whole target is covered). 5 is the released code's.
    grid: (h, w), read for r_max None alone.
    The clip at both ends is a reconstruction: the released formula has none and would come down again. In effect the
    released training has `fixed` 5, since its disc is cached before the schedule is first read.
    Raises ValueError for another schedule, 0 <= begin < end not given, or a negative r_max.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(map(repr, SCHEDULES))}")
    if not 0 <= begin < end or (r_max is not None and r_max < 0):
        raise ValueError(f"begin {begin}, end {end} and r_max {r_max} must meet 0 <= begin < end and r_max >= 0")
    if schedule == "none" or (r_max is None and (schedule == "fixed" or progress >= end)):
        return None
    largest = hypot(grid[0] - 1, grid[1] - 1) if r_max is None else r_max
    done = 1.0 if schedule == "fixed" else min(max((progress - begin) / (end - begin), 0.0), 1.0)
    return 1 + (largest - 1) * (1 - cos(pi * done)) / 2


@lru_cache(maxsize=16)
def squared_distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(N, h, w) int32, in patches, between the patches of a grid; kept, since every step asks for the same."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.int32) for side in grid)
    down = (rows[:, None] - rows).square()
    right = (columns[:, None] - columns).square()
    return (down[:, None, :, None] + right[None, :, None, :]).flatten(0, 1)


def gate(masks: Tensor, r: float | None) -> Tensor:
    """Masks (B, N, h, w), each 0 at patches farther than r from its own (Eq. 5); unchanged for None."""
    if r is None:
        return masks
    near = squared_distances((masks.shape[2], masks.shape[3]), masks.device) <= r**2
    return masks * near


def shown_classes(tags: Tensor, most: int | None = None) -> Pairs:
    """The classes of tags (B, C) that are above 0, in A = `most` places an image, C for None.

    most: classes an image shows at most, when known; of more the first are kept.
    """
    order = (tags > 0).long().argsort(dim=1, descending=True, stable=True)[:, :most]
    return Pairs(order, tags.gather(1, order) > 0)


def by_class(maps: Tensor, pairs: Pairs, classes: int) -> Tensor:
    """Maps (B, A, H, W) of pairs as maps (B, C, H, W), zeros for classes that are not shown. classes: C."""
    maps = maps * pairs.shown[:, :, None, None]
    index = pairs.classes[:, :, None, None].expand_as(maps)
    return maps.new_zeros(len(maps), classes, *maps.shape[2:]).scatter(1, index, maps)


@torch.no_grad()
def candidates(confidence: Tensor, pairs: Pairs, limit: int = 300, ranking: str = "confidence") -> Tensor:
    """Place (B, A, N) int64 of each patch in its class's list, 0 for the best; N where it is not in the list.

    Sr[n, c] = S[n, c] / max_n' S[n', c]. A patch belongs to argmax_c Sr[n, c] (ties: the first class), over all
    classes, shown or not, and enters that class's list when max_c S[n, c] > 0, in falling order of Sr (ties: the first
    patch).
    confidence: S (B, N, C). limit: length of a list. ranking: what a longer list keeps: `confidence`, its first ones;
        `index`, the patches with the highest numbers, the highest first (the released code takes the top of the list
        of numbers, so that the bottom rows of an image lead).
    Source: released code.
    """
    confidence = widened(confidence)
    patches = torch.arange(confidence.shape[1], device=confidence.device)
    relative = confidence / confidence.amax(1, keepdim=True).clamp(min=torch.finfo(confidence.dtype).tiny)
    owner = relative.argmax(2)[:, None]
    listed = (owner == pairs.classes[:, :, None]) & pairs.shown[:, :, None] & (confidence.amax(2) > 0)[:, None]
    key = relative.mT.gather(1, pairs.classes[:, :, None].expand_as(listed))
    if ranking == "index":
        key = torch.where(listed.sum(2, keepdim=True) > limit, patches.to(key.dtype), key)
    order = key.masked_fill(~listed, -1).argsort(dim=2, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter(2, order, patches.expand_as(order))
    return rank.masked_fill(~listed | (rank >= limit), len(patches))


@torch.no_grad()
def grow(masks: Tensor, rank: Tensor, rules: Expansion = Expansion()) -> Growth:
    """T rounds of growth: each takes the best unused candidate as seed and the masks that partly overlap it.

    B_n = 1[M_n > tau_bin] (Eq. 7); the overlap of n with seed q is |B_n and B_q| / max(|B_q|, 1e-6). Candidates, used
    or not, with an overlap in [low, high] join; they, the seed and all with a larger one are used from then on.
    masks: M (B, N, h, w), behind the gate if there is one. rank: (B, A, N) of `candidates`.
    Source: released code, whose further rounds for one seed test that seed again and so end at once. That this overlap
    is the "ROR" of the supplementary is a reconstruction.
    """
    patches = torch.arange(rank.shape[2], device=rank.device)
    listed = rank < len(patches)
    unused = listed
    seeds, joins = [], []
    with torch.autocast(masks.device.type, enabled=False):  # counts above 256 are not exact in bfloat16
        inside = (widened(masks) > rules.threshold).flatten(2).float()
        area = inside.sum(2)
        for _ in range(rules.rounds if rules.expand else 1):
            left = unused.any(2)
            seed = rank.masked_fill(~unused, len(patches)).argmin(2)
            common = inside.gather(1, seed[:, :, None].expand(-1, -1, inside.shape[2])) @ inside.mT
            overlap = common / area.gather(1, seed)[:, :, None].clamp(min=1e-6)
            group = patches == seed[:, :, None]
            if rules.expand:
                group = group | (listed & (overlap >= rules.low) & (overlap <= rules.high))
            group = group & left[:, :, None]
            unused = unused & ~group & (overlap <= rules.high)
            seeds.append(seed.masked_fill(~left, -1))
            joins.append(group)
    return Growth(torch.stack(seeds, 2), torch.stack(joins, 2))


def refined_regions(
    masks: Tensor, confidence: Tensor, pairs: Pairs, size: tuple[int, int], rules: Expansion = Expansion()
) -> Regions:
    """m_r of every class that an image shows: candidates, growth, maximum.

    masks: M (B, N, h, w), behind the gate if there is one; the only argument that gets a gradient.
    confidence: S (B, N, C). pairs: of `shown_classes`. size: (H, W) of the image.
    """
    rank = candidates(confidence, pairs, rules.limit, rules.ranking)
    growth = grow(masks, rank, rules)
    found = growth.seeds[:, :, 0] >= 0
    return Regions(region_masks(masks, growth.joins.any(2), size, rules.resize), found, rank, growth)
