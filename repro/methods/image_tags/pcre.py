"""PCRE (Xu et al., CVPR 2025): confident regions, one soft mask a patch, grown over training and mixed into the CAM.

    S = joint_confidence(class_logits, patch_logits)
    pairs = shown_classes(tags, most=3)
    masks = gate(masks, radius(progress))                           # in the training loss only
    regions = refined_regions(masks, S, pairs, (448, 448))
    by_class(regions.masks, pairs, classes)                         # (B, C, H, W)

There are B images, C foreground classes, N = h w patches row by row, and A places for the classes that an image shows.
Some places stay empty, so no shape depends on values, and no step waits for the device.

Equations are those of the released code and the supplementary; the paper's text could not be had. Two faults of the
released training are not repeated: the radius of the gate follows its schedule, and crops are drawn without masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import cos, hypot, pi
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.arrays import IGNORE, Items, at_least_float32
from repro.cam import bilinear, multi_scale_cam
from repro.methods.image_tags.common import TagMethod, Trunk, balanced_contrast, cosines, patch_contrast, tag_terms
from repro.models.vit import Layout, PatchEmbed, Tokens, ViT, resized, to_map
from repro.recipe import scales_of
from repro.settings import SettingError, check, hyper
from repro.train import Losses, Now

# Settings


SCHEDULES = ("cosine", "fixed", "none")
SIDE = 28  # patches of a published crop's side, which r_max refers to


@dataclass(frozen=True)
class Expansion:
    """How regions grow. `PCRESettings` has the sources of what can be set; the rest is from the released code.

    threshold: tau_bin. rounds: T. low, high: a mask joins if its overlap with the seed lies between them; one above
    `high` adds nothing. limit: candidates of a class in an image. expand: False takes the best mask alone.
    ranking: what a list above the limit keeps, the most confident patches or those of highest index.
    resize: `each` mask before their maximum, or the `group` after it, which is cheaper.
    """

    threshold: float = 0.7
    rounds: int = 5
    low: float = 0.3
    high: float = 0.5
    limit: int = 300
    expand: bool = True
    ranking: str = "confidence"
    resize: str = "each"


@dataclass(frozen=True)
class PCRESettings:
    conf_weight: float = hyper(1.0, "lambda_1", "supplementary, Tab. 1e; its text and the code say 2", low=0)
    refine_weight: float = hyper(2.0, "lambda_2", "supplementary, Tab. 1f, and the code; its text says 1", low=0)
    cpe_weight: float = hyper(0.02, "lambda_3", "supplementary, Tab. 1g; .5 on COCO", low=0)
    ptc_weight: float = hyper(0.3, source="released code; .2 on COCO", low=0)
    seg_weight: float = hyper(0.12, source="released code", low=0)
    energy_weight: float = hyper(0.0, source="released: .05 of L_reg; ours: off, exact, quadratic in the pixels", low=0)
    tau: float = hyper(0.7, "tau_bin", "supplementary, Tab. 1a", low=0, high=1)
    rounds: int = hyper(5, "T", "supplementary, Tab. 1c", low=1)
    prototype_momentum: float = hyper(0.99, "lambda_p", "supplementary, Tab. 1d; .9 on COCO", low=0, high=1)
    prototype_high: float = hyper(0.7, source="released code: for the masks' labels; .9 on COCO", low=0, high=1)
    gating: str = hyper("cosine", source="supplementary, Tab. 1h; in effect released: fixed", choices=SCHEDULES)
    r_max: float = hyper(5.0, source="released code, in patches of 1/28 of a crop's side; 0: the whole grid", low=0)
    gate_from: float = hyper(0.1, source="released code: share of training when the radius sets out", low=0, high=1)
    gate_to: float = hyper(0.4, source="released code: and when it is full-grown", low=0, high=1)
    fusion: float = hyper(0.3, "alpha", "released code; the overview figure says mean fusion, .5", low=0, high=1)
    fuse_from: float = hyper(0.4, source="released code: share of training when masks join the CAM", low=0, high=1)
    pool: str = hyper("sum", source="released code, of S over patches; max: an ablation there", choices=("sum", "max"))
    expand: bool = hyper(True, source="off: the best mask alone (ablation)")
    prototypes: bool = hyper(True, source="off: class tokens in their place (ablation)")
    prototype_labels: bool = hyper(True, source="off: the head's labels supervise the masks too (ablation)")
    ranking: str = hyper("confidence", source="ours; index: a fault of the code", choices=("confidence", "index"))
    resize: str = hyper("each", source="released code; group: ours, cheaper", choices=("each", "group"))
    mask_scales: str = hyper("", source="ours: scales that masks are read at; released code and empty: the CAM's")

    def __post_init__(self):
        check(self)
        if self.gate_from >= self.gate_to:
            raise SettingError(f"gate_from is {self.gate_from} and gate_to {self.gate_to}; the first must be smaller")
        if self.mask_scales:
            scales_of(self.mask_scales)

    @property
    def expansion(self) -> Expansion:
        """The rules by which regions grow."""
        shared = {name: getattr(self, name) for name in ("rounds", "expand", "ranking", "resize")}
        return Expansion(self.tau, **shared)

    def radius(self, progress: float, grid: tuple[int, int]) -> float | None:
        """Radius of the gate in patches of a grid (h, w), None for no gate; progress: share of training done.

        r_max is scaled from 28 patches to the grid but stays at least 1 (chosen here).
        """
        r_max = max(1.0, self.r_max * grid[0] / SIDE) if self.r_max else None
        return radius(progress, self.gating, r_max, self.gate_from, self.gate_to, grid)


# Confidence of patches


def joint_confidence(class_logits: Tensor, patch_logits: Tensor) -> Tensor:
    """S (B, N, C) in [0, 1]: the softmax over classes of one branch times the softmax over patches of the other.

    class_logits, patch_logits: (B, N, C). Source: released code; two streams as in WSDDN.
    """
    return at_least_float32(class_logits).softmax(2) * at_least_float32(patch_logits).softmax(1)


def image_score(confidence: Tensor, pool: str = "sum") -> Tensor:
    """Score (B, C) in [0, 1] of an image from S (B, N, C): its `sum` or `max` over patches. Source: released code."""
    return (confidence.sum(1) if pool == "sum" else confidence.amax(1)).clamp(max=1)


class RegionDecoder(nn.Module):
    """CRME: two decoder layers over the patches, a joint confidence, and one soft mask a patch.

    encoder, layout: of the patches that are decoded; queries come from a convolution of patch x patch, also where the
        encoder has a stem. heads, hidden: of the decoder. groups: of the masks' group norm. Source: released code.
    """

    def __init__(
        self, encoder: ViT, layout: Layout, classes: int, heads: int = 8, hidden: int = 2048, groups: int = 32
    ) -> None:
        super().__init__()
        width = encoder.width
        self.grid = (encoder.grid, encoder.grid)
        self.patch_embed = PatchEmbed(replace(layout, stem=()), 3)
        self.pos_embed = nn.Parameter(torch.empty(1, encoder.grid**2, width))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        layer = nn.TransformerDecoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, 2, nn.LayerNorm(width))
        self.by_class, self.by_patch = nn.Linear(width, classes), nn.Linear(width, classes)
        for branch in (self.by_class, self.by_patch):
            nn.init.xavier_uniform_(branch.weight)
            nn.init.zeros_(branch.bias)
        self.embed = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.pixels = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(groups, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Joint confidence S (B, N, C) and masks M (B, N, h, w) in [0, 1], before any gate.

        x: normalised images (B, 3, H, W). patches: F (B, N, D) of them, without gradient here. grid: (h, w).
        """
        patches = patches.detach()
        # a stem rounds the grid of odd sizes up, a single convolution down
        queries = bilinear(self.patch_embed(x), grid).flatten(2).mT + resized(self.pos_embed, self.grid, grid)
        decoded = self.layers(queries, patches)
        confidence = joint_confidence(self.by_class(decoded), self.by_patch(decoded))
        logits = self.embed(decoded) @ self.pixels(to_map(patches, grid)).flatten(2)
        return confidence, at_least_float32(logits).sigmoid().unflatten(2, grid)


# The gate (Eq. 5)


def radius(
    progress: float, schedule: str = "cosine", r_max: float | None = 5.0, begin: float = 0.1, end: float = 0.4,
    grid: tuple[int, int] = (28, 28),
) -> float | None:  # fmt: skip
    """Radius of the gate in patches (Eq. 5), None for no gate.

    progress: share of training done, t / t_max. schedule: `cosine`, 1 up to `begin`, then half a cosine wave up to
        r_max at `end`, where it stays; `fixed`, always r_max; `none`.
    r_max: None grows the radius to the grid's diagonal, and there is no gate from `end` on (supplementary: until the
        whole target is covered). 5 is the released code's. grid: (h, w), read for r_max None alone.
    The clip at both ends is a reconstruction: the released formula has none and would come down again. In effect the
    released training has `fixed` 5, since its disc is cached before the schedule is first read.
    """
    if schedule == "none" or (r_max is None and (schedule == "fixed" or progress >= end)):
        return None
    largest = hypot(grid[0] - 1, grid[1] - 1) if r_max is None else r_max
    done = 1.0 if schedule == "fixed" else min(max((progress - begin) / (end - begin), 0.0), 1.0)
    return 1 + (largest - 1) * (1 - cos(pi * done)) / 2


@lru_cache(maxsize=16)
def squared_distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Squared distances (N, h, w) int32, in patches, between the patches of a grid."""
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


# Growing a region (Eq. 7)


class Pairs(NamedTuple):
    """Classes (B, A) int64, from 0, that each image shows, in rising order, and which of the A places are filled."""

    classes: Tensor
    shown: Tensor


class Growth(NamedTuple):
    """What joined in which round.

    seeds: (B, A, T) int64, the patch that each round started from, -1 where no candidate was left.
    joins: (B, A, T, N) bool, the masks of each round's group, its seed included; a mask can be in several groups.
    """

    seeds: Tensor
    joins: Tensor


class Regions(NamedTuple):
    """Masks m_r (B, A, H, W) in [0, 1], zeros where nothing was found; whether there was a candidate (B, A) bool; the
    rank (B, A, N) of `candidates`; and the growth of `grow`."""

    masks: Tensor
    found: Tensor
    rank: Tensor
    growth: Growth


def shown_classes(tags: Tensor, most: int | None = None) -> Pairs:
    """The classes of tags (B, C) above 0, in A = `most` places an image, which keep the first ones; None for C."""
    order = (tags > 0).long().argsort(dim=1, descending=True, stable=True)[:, :most]
    return Pairs(order, tags.gather(1, order) > 0)


def by_class(maps: Tensor, pairs: Pairs, classes: int) -> Tensor:
    """Maps (B, A, H, W) of pairs as maps (B, C, H, W), zeros for classes that are not shown. classes: C."""
    maps = maps * pairs.shown[:, :, None, None]
    index = pairs.classes[:, :, None, None].expand_as(maps)
    return maps.new_zeros(len(maps), classes, *maps.shape[2:]).scatter(1, index, maps)


@torch.no_grad()
def candidates(confidence: Tensor, pairs: Pairs, limit: int = 300, ranking: str = "confidence") -> Tensor:
    """Rank (B, A, N) int64 of each patch in its class's list, 0 for the best; N where it is not in the list.

    Sr[n, c] = S[n, c] / max_n' S[n', c]. A patch belongs to argmax_c Sr[n, c] (ties: the first class), over all
    classes, shown or not. It enters that class's list when max_c S[n, c] > 0, in falling order of Sr (ties: the first
    patch). confidence: S (B, N, C). limit: length of a list. ranking: a longer list keeps its first patches by
    `confidence`; by `index` those with the highest numbers, the highest first, so that the bottom rows of an image
    lead, a fault of the released code. Source: released code.
    """
    confidence = at_least_float32(confidence)
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
        inside = (at_least_float32(masks) > rules.threshold).flatten(2).float()
        area = inside.sum(2)
        for _ in range(rules.rounds if rules.expand else 1):
            some = unused.any(2)
            seed = rank.masked_fill(~unused, len(patches)).argmin(2)
            common = inside.gather(1, seed[:, :, None].expand(-1, -1, inside.shape[2])) @ inside.mT
            overlap = common / area.gather(1, seed)[:, :, None].clamp(min=1e-6)
            group = patches == seed[:, :, None]
            if rules.expand:
                group = group | (listed & (overlap >= rules.low) & (overlap <= rules.high))
            group = group & some[:, :, None]
            unused = unused & ~group & (overlap <= rules.high)
            seeds.append(seed.masked_fill(~some, -1))
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


CHUNK = 2**23  # resized mask values at a time
MAX = 2  # of embedding bags


def region_masks(masks: Tensor, joined: Tensor, size: tuple[int, int], resize: str = "each") -> Tensor:
    """Largest of the joined masks at each pixel, (B, A, H, W); zeros where none joined.

    masks: (B, N, h, w) in [0, 1]. joined: (B, A, N) bool; a mask joins one region of its image at most.
    resize: `each` resizes the masks to `size` (H, W) before their maximum, `group` the maximum, which is at least as
        large; bilinear, free corners. A pixel's gradient goes to the mask that is largest there (ties: the first).
    """
    masks = at_least_float32(masks)
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
    """Index (B, A, P) int64 of the joined row of values (B, N, P) that is largest in each column; any if none joined.

    An embedding bag takes the maximum over a list of rows and reads each row once. Rows that joined nothing make up a
    last bag.
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
    """The two old neighbours (2, new) int64 of each new position in bilinear resizing, and their weights (2, new)."""
    place = ((torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * (old / new) - 0.5).clamp(min=0)
    lower = place.long()
    share = place - lower
    return torch.stack([lower, (lower + 1).clamp(max=old - 1)]), torch.stack([1 - share, share])


def matrix(index: Tensor, weight: Tensor, old: int) -> Tensor:
    """The (new, old) matrix of `taps`."""
    return (weight[:, :, None] * (index[:, :, None] == torch.arange(old, device=index.device))).sum(0)


# Losses


def confidence_loss(score: Tensor, tags: Tensor) -> Tensor:
    """L_conf, binary cross-entropy of scores (B, C) of `image_score` with tags (B, C). Source: released code."""
    return bounded_cross_entropy(score, tags).mean()


def refine_loss(masks: Tensor, found: Tensor, pairs: Pairs, labels: Tensor) -> Tensor:
    """L_refine: binary cross-entropy of m_r with 1[Y_p = c], mean over pixels, summed over pairs, over their number.

    masks: m_r (B, A, H, W) in [0, 1], behind the gate. found: (B, A) bool, pairs that had a candidate; the others add 0
        to the sum but count among the pairs. labels: Y_p (B, H, W), the refined label map of the prototypes' CAM; 255
        counts as another class. Source: released code.
    """
    target = labels.long()[:, None] == (pairs.classes + 1)[:, :, None, None]
    loss = bounded_cross_entropy(masks, target).mean((2, 3))
    return (loss * (found & pairs.shown)).sum() / pairs.shown.sum().clamp(min=1)


def bounded_cross_entropy(probs: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each probability, at most 100; target: 0 or 1, of any type."""
    with torch.autocast(probs.device.type, enabled=False):  # under autocast this loss is refused
        probs = at_least_float32(probs)
        return F.binary_cross_entropy(probs, target.to(probs.dtype), reduction="none")


def fused(cam: Tensor, regions: Tensor, share: float = 0.3) -> Tensor:
    """(1 - alpha) CAM_c + alpha Mbar_c; the CAM itself where the region is empty (its sum at most 1e-5).

    cam: (B, C, H, W) in [0, 1]. regions: Mbar (B, C, H, W) in [0, 1], not gated, over scales as the CAM.
    share: alpha, .3 in the released code, which has the exception too; the overview figure says mean fusion, .5.
    """
    some = regions.sum((2, 3), keepdim=True) > 1e-5
    return torch.where(some, (1 - share) * cam + share * regions, cam)


def class_contrast(class_tokens: Tensor, patches: Tensor, labels: Tensor, tags: Tensor) -> Tensor:
    """L_CPE on A = |cos(Z_c, sg(F_n))|: a class that is shown is like its own patches, and unlike all others.

    class_tokens: Z (B, C, D). patches: F (B, N, D), without gradient here. labels: (B, h, w) of the auxiliary CAM (of
        the main CAM in the overview figure); 255 makes no pair. tags: (B, C). Source: released code.
    """
    labels = labels.flatten(1).long()[:, None]
    own = labels == torch.arange(1, tags.shape[1] + 1, device=labels.device)[:, None]
    pairs = (labels != IGNORE) & (tags > 0)[:, :, None]
    return balanced_contrast(cosines(class_tokens, patches.detach()).abs(), pairs & own, pairs & ~own)


# Prototypes (Eq. 12) and the network


@torch.no_grad()
def updated_prototypes(prototypes: Tensor, class_tokens: Tensor, tags: Tensor, momentum: float = 0.99) -> Tensor:
    """Prototypes (C, D) after a batch (Eq. 12), in the dtype of the old ones.

    For one image after another, P_c <- lambda_p P_c + (1 - lambda_p) Z_c if it shows c; then all rows are divided by
    their lengths. Unrolled: the token of an image that a further m images with c follow weighs
    (1 - lambda_p) lambda_p^m, the old prototype lambda_p to the number of images with c.
    class_tokens: Z (B, C, D), in the order of the batch. tags: (B, C). Source: released code.
    """
    shown = (tags > 0).to(at_least_float32(prototypes).dtype)
    after = shown.flip(0).cumsum(0).flip(0) - shown
    weight = (1 - momentum) * momentum**after * shown
    kept = momentum ** shown.sum(0)
    mixed = kept[:, None] * prototypes + (weight[:, :, None] * class_tokens).sum(0)
    return F.normalize(mixed, dim=1).to(prototypes.dtype)


def prototype_cam(patches: Tensor, prototypes: Tensor, grid: tuple[int, int]) -> Tensor:
    """|cos(F_n, P_c)| (B, C, h, w): a patch that points away from its prototype counts as active, as released.

    patches: F (B, N, D). prototypes: P (C, D), or class tokens (B, C, D) in their place (an ablation).
    """
    return cosines(prototypes, patches).unflatten(2, grid).abs()


CAM, AUX, PROTOTYPES, REGIONS = "cam", "aux", "prototypes", "regions"


class PCRENetwork(Trunk):
    """The trunk, the decoder, and as buffers the prototypes (C, D) and whether masks are mixed into the CAM yet.

    Prototypes start as Gaussian noise (released code). progress: share of training done at the last step, for the gate
    of `gated_regions`; not saved.
    """

    def __init__(
        self, encoder: ViT, classes: int, head: nn.Module, decoder: RegionDecoder, settings: PCRESettings
    ) -> None:
        super().__init__(encoder, classes, head)
        self.decoder, self.settings, self.progress = decoder, settings, 0.0
        self.register_buffer("prototypes", torch.randn(classes, encoder.width))
        self.register_buffer("fusing", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def follow(self, class_tokens: Tensor, tags: Tensor) -> None:
        """Move the prototypes towards class tokens (B, C, D) of the classes in tags (B, C), in place (Eq. 12)."""
        momentum = self.settings.prototype_momentum
        self.prototypes.copy_(updated_prototypes(self.prototypes, at_least_float32(class_tokens), tags, momentum))

    def maps(
        self, x: Tensor, scales: Sequence[float], tags: Tensor, wanted: Sequence[str], most: int | None = None
    ) -> dict[str, Tensor]:
        """Maps (B, C, H, W) in [0, 1] over scales and flips by name, from one pass a scale and without gradient.

        x: normalised images (B, 3, H, W). tags: (B, C). most: the largest number of classes in an image, None for C.
        wanted: of CAM, AUX (the auxiliary CAM), PROTOTYPES (cosines with them), REGIONS (m_r without a gate, of shown
            classes, at the settings' mask scales).
        """
        size = (x.shape[2], x.shape[3])
        mirrored = torch.cat([tags, tags])
        with_masks = scales_of(self.settings.mask_scales) if self.settings.mask_scales else scales
        seen_with_masks = {(int(scale * size[0]), int(scale * size[1])) for scale in with_masks}

        def one(name: str, seen: Tensor, tokens: Tokens) -> Tensor:
            if name == REGIONS and (seen.shape[2], seen.shape[3]) in seen_with_masks:
                return self.grown(seen, tokens, mirrored, size, most)
            if name == REGIONS:
                return x.new_zeros(len(seen), tags.shape[1], *size)
            if name == PROTOTYPES:
                points = self.prototypes if self.settings.prototypes else tokens.class_tokens
                cam = prototype_cam(tokens.patches, points, tokens.grid)
            else:
                cam = self.raw(tokens) if name == CAM else self.raw_aux(tokens)
            return bilinear(at_least_float32(cam), size)

        def raw(seen: Tensor) -> Tensor:
            tokens = self.encoder(seen)
            return torch.cat([one(name, seen, tokens) for name in wanted], 1)

        return dict(zip(wanted, multi_scale_cam(raw, x, scales).chunk(len(wanted), 1), strict=True))

    def grown(
        self, x: Tensor, tokens: Tokens, tags: Tensor, size: tuple[int, int], most: int | None, r: float | None = None
    ) -> Tensor:
        """Regions m_r (B, C, H, W) at `size`, zeros for classes that are not shown. r: of the gate, None for none."""
        confidence, masks = self.decoder(x, tokens.patches, tokens.grid)
        masks = masks if r is None else gate(masks, r)
        pairs = shown_classes(tags, most)
        found = refined_regions(masks, confidence, pairs, size, self.settings.expansion)
        return by_class(found.masks, pairs, tags.shape[1])

    @torch.no_grad()
    def gated_regions(self, x: Tensor, tags: Tensor) -> tuple[Tensor, float]:
        """Regions (B, C, h, w) at scale 1 behind the gate of the last step, for figures, and its radius in patches: the
        side of the grid if there is no gate. Zeros for classes that are not in the tags (B, C)."""
        tokens = self.encoder(x)
        r = self.settings.radius(self.progress, tokens.grid)
        found = self.grown(x, tokens, tags, tokens.grid, None, r)
        return found, float(max(tokens.grid)) if r is None else r

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """CAM (B, C, H, W) in [0, 1], with the regions of the classes in tags (B, C) once training mixes them in.

        Synchronises with the device, so use it in evaluation only.
        """
        if not self.fusing:
            return super().activation(x, scales, tags)
        most = max(1, int((tags > 0).sum(1).max()))
        maps = self.maps(x, scales, tags, (CAM, REGIONS), most)
        return fused(maps[CAM], maps[REGIONS], self.settings.fusion)


# The method


class PCRE(TagMethod):
    """Warm-up: L_cls + L_cls_aux + .3 L_ptc + l_1 L_conf + l_3 L_CPE; then + l_2 L_refine + .12 L_seg."""

    Settings = PCRESettings

    def __init__(self, settings: PCRESettings, network: PCRENetwork, *rest: Any) -> None:
        super().__init__(settings, network, *rest)
        scales, allowed = settings.mask_scales, self.recipe
        if scales and not set(scales_of(scales)) <= set(allowed.scales):
            raise SettingError(f"mask_scales is {scales!r}; they must be among {allowed.cam_scales!r}")

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings, network = self.view(batch["tagged"]), self.settings, self.network
        network.progress = now.progress
        predicted = network.predict(view.x)
        tokens = predicted.tokens
        confidence, masks = network.decoder(view.x, tokens.patches, tokens.grid)
        wanted = [CAM, AUX]
        if self.learning(now):
            wanted += [PROTOTYPES] * settings.prototype_labels + [REGIONS] * (now.progress >= settings.fuse_from)
        maps = network.maps(view.x, self.recipe.scales, view.tags, wanted, self.most)
        patches = self.patch_labels(view, maps[AUX], tokens.grid)
        score = image_score(confidence, settings.pool)
        terms = tag_terms(predicted, view.tags)
        terms["patches"] = settings.ptc_weight * patch_contrast(tokens.patches, patches)
        terms["confidence"] = settings.conf_weight * confidence_loss(score, view.tags)
        terms["prototypes"] = settings.cpe_weight * class_contrast(
            tokens.class_tokens, tokens.patches, patches, view.tags
        )
        if self.learning(now):
            if REGIONS in maps:
                network.fusing.fill_(True)
            cam = fused(maps[CAM], maps[REGIONS], settings.fusion) if REGIONS in maps else maps[CAM]
            labels = mask_labels = self.labels(view, cam)
            if settings.prototype_labels:
                mask_labels = self.labels(view, maps[PROTOTYPES], settings.prototype_high)
            pairs, size = shown_classes(view.tags, self.most), (view.x.shape[2], view.x.shape[3])
            gated = gate(masks, settings.radius(now.progress, tokens.grid))
            grown = refined_regions(gated, confidence.detach(), pairs, size, settings.expansion)
            terms["refine"] = settings.refine_weight * refine_loss(grown.masks, grown.found, pairs, mask_labels)
            terms |= self.head_terms(predicted.segmentation, labels, view)
            network.follow(tokens.class_tokens, view.tags)
        return Losses(terms)
