"""DuPL (Wu et al., CVPR 2024): two trunks, kept apart, whose heads learn each other's labels.

Equations are those of the released code, in `dupl_labels`. Its strong views are mirrored and drawn from RandAugment;
here they stay in place and change colours alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.cam import bilinear, widened
from repro.data.mask_views import MaskViews
from repro.data.masks import IGNORE
from repro.methods.image_tags import dupl_labels
from repro.methods.image_tags.contrast import patch_contrast
from repro.methods.image_tags.losses import balanced_cross_entropy
from repro.methods.image_tags.steps import TagMethod, View, tag_terms
from repro.methods.image_tags.trunk import Trunk
from repro.recipe import TagRecipe
from repro.settings import check, hyper
from repro.train import Items, Losses, Now


@dataclass(frozen=True)
class DuPLSettings:
    ptc_weight: float = hyper(0.2, source="DuPL: weight of L_ptc, of both trunks", low=0)
    seg_weight: float = hyper(0.2, source="DuPL: weight of L_seg", low=0)
    apart_weight: float = hyper(0.1, source="DuPL: weight of the discrepancy", low=0)
    consistency_weight: float = hyper(0.05, source="DuPL: weight of the consistency", low=0)
    final_high: float = hyper(0.55, source="DuPL: high threshold at the end; six VOC classes keep .7", low=0, high=1)
    clean_from: float = hyper(0.4, source="DuPL: share of training from which noise is filtered", low=0, high=1)
    least: int = hyper(1000, source="DuPL: losses that a mixture needs, of 448 x 448 pixels", low=1)
    gap: float = hyper(1.0, source="DuPL: least distance of its means, nats", low=0)
    certainty: float = hyper(0.95, source="DuPL: a pixel more surely noisy than this is ignored", low=0, high=1)
    confidence: float = hyper(0.9, source="DuPL: of predictions that the consistency reads", low=0, high=1)

    def __post_init__(self):
        check(self)


class Pair(nn.Module):
    """Two trunks; the first one is evaluated. The released code reports whichever scores better on the validation set,
    which is a choice by the score itself."""

    def __init__(self, first: Trunk, second: Trunk) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """The first trunk's logits (B, C + 1, H, W) of normalised images x (B, 3, H, W)."""
        return self.first(x)

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """The first trunk's CAM (B, C, H, W)."""
        return self.first.activation(x, scales, tags)


class DuPL(TagMethod):
    """L = sum of 4 L_cls + .2 L_ptc + .1 L_dis, after the warm-up + .2 L_seg, after 40 % + .05 L_con."""

    Settings = DuPLSettings

    def __init__(
        self, settings: DuPLSettings, network: Pair, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__(settings, network, views, recipe, most)
        classes, final = network.first.classifier.out_features, dupl_labels.VOC_TARGETS
        final = torch.tensor(final if classes == len(final) else [settings.final_high] * classes)
        self.register_buffer("final", final.clamp(min=settings.final_high), persistent=False)

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings, scales = self.view(batch["tagged"]), self.settings, self.recipe.scales
        trunks = (self.network.first, self.network.second)
        predicted = [trunk.predict(view.x) for trunk in trunks]
        cams = [trunk.both_cams(view.x, scales) for trunk in trunks]
        high = self.thresholds(view, now)
        both = [tag_terms(part, view.tags) for part in predicted]
        terms = {name: both[0][name] + both[1][name] for name in both[0]}
        patches, grid = [part.tokens.patches for part in predicted], predicted[0].tokens.grid
        contrasts = [
            patch_contrast(part, self.patch_labels(view, aux, grid, high))
            for part, (_, aux) in zip(patches, cams, strict=True)
        ]
        terms["patches"] = settings.ptc_weight * sum(contrasts)
        terms["apart"] = settings.apart_weight * dupl_labels.discrepancy(*patches)
        if self.learning(now):
            size = (view.x.shape[2], view.x.shape[3])
            logits = [bilinear(part.segmentation, size) for part in predicted]
            labels = [self.labels(view, cam, high) for cam, _ in cams]
            terms |= self.cross_terms(view, logits, labels, now.progress >= settings.clean_from)
        return Losses(terms)

    def thresholds(self, view: View, now: Now) -> Tensor:
        """High threshold (B,) of each image at this step; the first one during the warm-up."""
        begun = round(self.recipe.warm_up * now.steps)
        high = dupl_labels.class_thresholds(now.step - begun, now.steps - begun, self.final, self.recipe.cam_high)
        return dupl_labels.image_thresholds(high, view.tags)

    def cross_terms(self, view: View, logits: list[Tensor], labels: list[Tensor], late: bool) -> dict[str, Tensor]:
        """L_seg of each head with the other trunk's labels; late, these are cleaned first and L_con is added.

        logits: (B, K, S, S) of each trunk. labels: (B, S, S) that each trunk's CAM makes.
        """
        settings = self.settings
        if late:  # each trunk judges the labels of its own CAM
            labels = [self.cleaned(scores, own) for scores, own in zip(logits, labels, strict=True)]
        taught = labels[::-1]
        terms = {"segmentation": settings.seg_weight * sum(map(balanced_cross_entropy, logits, taught))}
        if late:
            strong, trunks = self.views.strong(view.crop), (self.network.first, self.network.second)
            agreed = [
                dupl_labels.consistency(trunk(strong), scores, other, settings.confidence)
                for trunk, scores, other in zip(trunks, logits, taught, strict=True)
            ]
            terms["consistency"] = settings.consistency_weight * sum(agreed)
        return terms

    def cleaned(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels (B, S, S) whose pixels are 255 where the logits (B, K, S, S) say that they are noise."""
        loss = F.cross_entropy(widened(logits).detach(), labels, ignore_index=IGNORE, reduction="none")
        settings = self.settings
        found = dupl_labels.noisy_labels(
            loss, labels, least=settings.least, gap=settings.gap, certainty=settings.certainty
        )
        return labels.masked_fill(found.noisy, IGNORE)
