"""AFA (Ru et al., CVPR 2022): affinity between patches, learnt from attention, along which the CAM walks.

Losses, labels and stages are those of the released code for VOC. (On COCO it takes the labels of the affinity from the
walked CAM as well.) Two things differ here: the trunk is the ViT of the other methods in place of MiT-B1, with its
auxiliary classifier and segmentation head, and the CAM itself walks, so that one map serves labels and evaluation; the
released code walks the softmax of the CAM and a constant background.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.arrays import IGNORE, Items, at_least_float32
from repro.cam import bilinear, multi_scale_cam
from repro.methods.image_tags.common import Prediction, TagMethod, Trunk, tag_terms
from repro.models.vit import ViT
from repro.settings import check, hyper
from repro.train import Losses, Now

# Affinity


def symmetric_scores(scores: Iterable[Tensor], skip: int) -> Tensor:
    """S + S^T (B, M, N, N) of the patches, M heads of all blocks together.

    scores: (B, heads, skip + N, skip + N) of each block, before the softmax, queries in rows.
    skip: class tokens in front, which are left out. Source: released code; its backbone has no class token.
    """
    patches = torch.cat([at_least_float32(block)[:, :, skip:, skip:] for block in scores], 1)
    return patches + patches.mT


def neighbours(grid: tuple[int, int], radius: int, device: torch.device | None = None) -> Tensor:
    """Pairs (N, N) bool of patches at most `radius` rows and at most `radius` columns apart, each with itself too."""
    rows, columns = (torch.arange(side, device=device) for side in grid)
    above, beside = ((at[:, None] - at).abs() <= radius for at in (rows, columns))
    return (above[:, None, :, None] & beside[:, None]).flatten(2).flatten(0, 1)


def affinity_pairs(labels: Tensor, grid: tuple[int, int], radius: int) -> tuple[Tensor, Tensor]:
    """Neighbouring patches (B, N, N) bool with one label, and those with two labels; a patch of 255 makes no pair.

    labels: (B, H, W) integers, refined; a patch takes the nearest pixel, which is the first one of its square. The
        background is a label like others, and each labelled patch makes a pair with itself.
    radius: of `neighbours`. Source: released code.
    """
    patches = F.interpolate(labels[:, None].float(), size=grid, mode="nearest").flatten(1)
    known = patches != IGNORE
    pairs = known[:, :, None] & known[:, None] & neighbours(grid, radius, labels.device)
    same = patches[:, :, None] == patches[:, None]
    return pairs & same, pairs & ~same


def affinity_loss(logits: Tensor, alike: Tensor, apart: Tensor) -> Tensor:
    """L_aff = .5 sum_alike (1 - a) / (#alike + 1) + .5 sum_apart a / (#apart + 1), a = sigmoid(logits).

    logits, alike, apart: (B, N, N). Sums and counts are over the whole batch. Source: released code.
    """
    logits = at_least_float32(logits)
    # 1 - a is computed as sigmoid(-z), so that sure pairs keep a gradient
    pull, push = (
        torch.where(pairs, score.sigmoid(), 0).sum() / (pairs.sum() + 1)
        for pairs, score in ((alike, -logits), (apart, logits))
    )
    return 0.5 * pull + 0.5 * push


def transition(logits: Tensor, near: Tensor, power: float = 2.0) -> Tensor:
    """T (B, N, N), T_ij = a_ij^power / sum_k a_ik^power, k over the neighbours of i; 0 for other j.

    logits: (B, N, N), a = sigmoid(logits). near: (N, N) bool, of `neighbours`. Computed in logarithms, so that
    affinities near 0 do not divide 0 by 0; the released code adds .1 to each sum instead, which dims the map.
    """
    weight = power * F.logsigmoid(at_least_float32(logits))
    return weight.masked_fill(~near, -math.inf).softmax(-1)


def random_walk(cam: Tensor, steps: Tensor) -> Tensor:
    """CAM (B, C, h, w) after one step: at each patch the mean of its neighbours' values, weighted by a row of T.

    steps: T (B, N, N) of `transition`.
    """
    with torch.autocast(cam.device.type, enabled=False):
        cam = at_least_float32(cam)
        return (cam.flatten(2) @ steps.to(cam.dtype).mT).unflatten(2, cam.shape[2:])


# AFA


LAST = (-2, -1)  # blocks whose scores are read: with MiT-B1 those of its last stage


@dataclass(frozen=True)
class AFASettings:
    aff_weight: float = hyper(0.1, source="AFA: weight of L_aff", low=0)
    seg_weight: float = hyper(0.1, source="AFA: weight of L_seg", low=0)
    energy_weight: float = hyper(0.0, source="AFA: first released with .01 of L_reg, then without", low=0)
    radius: int = hyper(8, source="AFA: of affinity, in patches; there of a 20 x 20 grid", low=0)
    power: float = hyper(2.0, source="AFA: of the affinity in the random walk", low=0)
    propagate_from: float = hyper(
        0.3, source="AFA: share of training from which the CAM walks; .1875 on COCO", low=0, high=1
    )
    freeze_norms: bool = hyper(True, source="AFA: the encoder's normalisation layers do not learn")

    def __post_init__(self):
        check(self)


class AFANetwork(Trunk):
    """The trunk, the 1x1 convolution from attention to affinity, and as a buffer whether the CAM walks yet.

    The convolution starts as in the released code. Raises ValueError for an encoder with fewer blocks than are read, or
    whose last block has no attention.
    """

    def __init__(self, encoder: ViT, classes: int, head: nn.Module, settings: AFASettings) -> None:
        super().__init__(encoder, classes, head)
        if encoder.value_only or encoder.depth < len(LAST):
            raise ValueError(f"affinity is read from the attention of the last {len(LAST)} blocks; all must have some")
        self.settings = settings
        # its name makes it learn as fast as classifiers and heads
        self.projection = nn.Conv2d(len(LAST) * encoder.heads, 1, 1)
        nn.init.kaiming_normal_(self.projection.weight, a=5**0.5, mode="fan_out")
        self.register_buffer("walking", torch.zeros((), dtype=torch.bool))

    def predict(self, x: Tensor) -> Prediction:
        """As in a trunk; the tokens also hold the scores that `affinity` reads."""
        return self.predicted(self.encoder(x, LAST, softmax=False))

    def affinity(self, scores: Iterable[Tensor]) -> Tensor:
        """Logits of the affinity (B, N, N), symmetric, from the scores (B, heads, T, T) of the last blocks.

        The scores are multiplied by the square root of the width to give q . k, as in the released code.
        """
        encoder = self.encoder
        seen = symmetric_scores(scores, encoder.class_tokens) * (encoder.width / encoder.heads) ** 0.5
        with torch.autocast(seen.device.type, enabled=False):
            return self.projection(seen)[:, 0]

    @torch.no_grad()
    def maps(self, x: Tensor, scales: Sequence[float], walks: bool) -> tuple[Tensor, Tensor]:
        """CAM (B, C, H, W) in [0, 1] over scales and flips, and the same after the walk; twice the CAM without `walks`.

        x: normalised images (B, 3, H, W). The walk is on the patch grid of the largest scale, along the affinity of the
        images there, not of their mirror images. The radius counts patches of that grid (released code).
        """
        size, largest = (x.shape[2], x.shape[3]), max(scales)
        top, found = (int(largest * size[0]), int(largest * size[1])), []

        def raw(seen: Tensor) -> Tensor:
            wanted = LAST if walks and seen.shape[2:] == top else ()
            tokens = self.encoder(seen, wanted, softmax=False)
            if wanted:
                scores = [block[: len(x)] for block in tokens.attention.values()]
                found.append((self.affinity(scores), tokens.grid))
            return self.raw(tokens)

        cam = multi_scale_cam(raw, x, scales)
        if not walks:
            return cam, cam
        logits, grid = found[0]
        steps = transition(logits, neighbours(grid, self.settings.radius, x.device), self.settings.power)
        return cam, bilinear(random_walk(bilinear(cam, grid), steps), size)

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """CAM (B, C, H, W) in [0, 1], after the walk once training has begun to walk it; tags have no effect.

        That is the map which then teaches the head. The released code measures both maps: before the affinity has
        learnt anything the walk harms (.29 against .47 mean IoU at the end of the warm-up in its log), later it helps.
        Synchronises with the device, so use it in evaluation only.
        """
        return self.maps(x, scales, bool(self.walking))[1]


class AFA(TagMethod):
    """L = L_cls + L_cls_aux, after the warm-up + .1 L_seg + .1 L_aff; after 30 % the CAM that teaches the head walks.

    The affinity learns the refined labels of the CAM that has not walked.
    """

    Settings = AFASettings

    def __init__(self, settings: AFASettings, network: AFANetwork, *rest: Any) -> None:
        super().__init__(settings, network, *rest)
        if settings.freeze_norms:
            for module in network.encoder.modules():
                if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                    module.requires_grad_(False)

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings, network = self.view(batch["tagged"]), self.settings, self.network
        predicted = network.predict(view.x)
        terms = tag_terms(predicted, view.tags)
        if self.learning(now):
            walks = now.progress >= settings.propagate_from
            if walks:
                network.walking.fill_(True)
            cam, walked = network.maps(view.x, self.recipe.scales, walks)
            labels = self.labels(view, cam)
            tokens = predicted.tokens
            alike, apart = affinity_pairs(labels, tokens.grid, settings.radius)
            logits = network.affinity(tokens.attention.values())
            terms["affinity"] = settings.aff_weight * affinity_loss(logits, alike, apart)
            terms |= self.head_terms(predicted.segmentation, self.labels(view, walked) if walks else labels, view)
        return Losses(terms)
