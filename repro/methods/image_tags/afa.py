"""AFA (Ru et al., CVPR 2022): affinity between patches, learnt from attention, along which the CAM walks.

Losses, labels and stages are those of the released code for VOC. (On COCO it takes the labels of the
affinity from the walked CAM as well.) Deviations of ours:
- The trunk is the ViT of the other methods in place of MiT-B1, with its auxiliary classifier and its segmentation head.
- The CAM itself walks. The released code walks its softmax beside a constant background; here one map serves both the
  labels and the evaluation.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.cam import bilinear, multi_scale_cam, widened
from repro.data.mask_views import MaskViews
from repro.data.masks import IGNORE
from repro.methods.image_tags.common import Prediction, TagMethod, Trunk, tag_terms
from repro.models.vit import ViT, to_map
from repro.recipe import TagRecipe
from repro.settings import check, hyper
from repro.train import Items, Losses, Now

# Affinity


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
    """The trunk, the 1x1 convolution that makes affinity of attention, and as a buffer whether the CAM walks yet.

    settings: `AFASettings`. The convolution starts as in the released code. Raises ValueError for an encoder with fewer
    blocks than are read, or whose last block has no attention.
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
        """As of a trunk; the tokens hold the scores that `affinity` reads."""
        tokens = self.encoder(x, LAST, softmax=False)
        logits, logits_aux = self.classifier(tokens.patches.amax(1)), self.classifier_aux(tokens.auxiliary.amax(1))
        return Prediction(logits, logits_aux, self.head(to_map(tokens.patches, tokens.grid)), tokens)

    def affinity(self, scores: Iterable[Tensor]) -> Tensor:
        """Logits of the affinity (B, N, N), symmetric, from the scores (B, heads, T, T) of the last blocks.

        Scores are read as q . k, without the square root of the width (released code).
        """
        encoder = self.encoder
        seen = symmetric_scores(scores, encoder.class_tokens) * (encoder.width / encoder.heads) ** 0.5
        with torch.autocast(seen.device.type, enabled=False):
            return self.projection(seen)[:, 0]

    @torch.no_grad()
    def maps(self, x: Tensor, scales: Sequence[float], walks: bool) -> tuple[Tensor, Tensor]:
        """CAM (B, C, H, W) in [0, 1] over scales and flips, and the same after the walk; twice the CAM if none.

        x: normalised images (B, 3, H, W). The walk is on the patch grid of the largest scale, along the affinity that
        the images show there, not their mirror images; the radius counts patches of that grid (released code).
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
        """CAM (B, C, H, W) in [0, 1], after the walk once training has begun to walk it.

        That is the map which then teaches the head. The released code measures both maps: before the affinity has
        learnt anything the walk harms (.29 against .47 mean IoU at the end of the warm-up in its log), later it helps.
        Waits for the device; for evaluation. tags: (B, C), of no effect.
        """
        return self.maps(x, scales, bool(self.walking))[1]


class AFA(TagMethod):
    """L = L_cls + L_cls_aux, after the warm-up + .1 L_seg + .1 L_aff; after 30 % the CAM that teaches the head walks.

    The affinity learns the refined labels of the CAM that has not walked.
    """

    Settings = AFASettings

    def __init__(
        self, settings: AFASettings, network: AFANetwork, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__(settings, network, views, recipe, most)
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
