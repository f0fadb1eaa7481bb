"""CSL, confidence separable learning (Liu & Liu, ICCV 2025): pixels weighted by a per-image split, trusted ones masked.

The paper's equations could not be had; this follows code that was read in parts and is held to be the authors'
(reconstruction where it says so). `separation` holds the equations of the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from repro.data.mask_views import hide, paste
from repro.methods.few_masks.forward import MaskMethod, PixelTargets, detached, threshold_targets
from repro.methods.few_masks.losses import weighted_cross_entropy
from repro.methods.few_masks.separation import FEATURES, FORMS, RULES, SCOPES, image_weights
from repro.models.modes import held_statistics
from repro.settings import check, hyper
from repro.train import Items, Losses, Now

SELECTIONS = ("gaussian", "hard", "threshold")


@dataclass(frozen=True)
class CSLSettings:
    selection: str = hyper("gaussian", source="released code; the others are ablations", choices=SELECTIONS)
    threshold: float = hyper(0.95, "tau", "ablation: of selection = threshold only", low=0, high=1)
    alpha: float = hyper(8.0, source="released code: squared width of the Gaussian", low=1e-6)
    features: str = hyper("both", source="released code; else: which z the weight reads", choices=FEATURES)
    rule: str = hyper("or", source="released code; and: ablation", choices=RULES)
    scope: str = hyper("image", source="released code: one split an image", choices=SCOPES)
    form: str = hyper("released", source="of the residual variance; paper: second-hand", choices=FORMS)
    masking: str = hyper("reliable", source="released code", choices=("reliable", "random", "none"))
    ratio: float = hyper(0.7, source="released code: probability that a block is masked", low=0, high=1)
    block: int = hyper(32, source="released code: side of a block, pixels; 8 at mini", low=1)
    feature_perturbation: bool = hyper(True, source="released code; off removes L_fp")

    def __post_init__(self):
        check(self)


def csl_targets(logits: Tensor, padding: Tensor, settings: CSLSettings) -> PixelTargets:
    """Pseudo-labels with their weights.

    logits: (B, K, H, W) of a weak view, whose gradient is cut here; padding: (B, H, W) bool.
    Source: released code; see `separation`.
    """
    if settings.selection == "threshold":
        return threshold_targets(logits, padding, settings.threshold)
    weight, features = image_weights(
        logits.detach().float().softmax(1), ~padding, form=settings.form, rule=settings.rule,
        features=settings.features, soft=settings.selection == "gaussian", alpha=settings.alpha, scope=settings.scope,
    )  # fmt: skip
    return PixelTargets(features.label, weight, features.confidence, ~padding)


class CSL(MaskMethod):
    """L = (L_x + L_s / 4 + L_m / 4 + L_fp / 2) / 2.

    Under bf16 the mix batch is predicted in bf16 as all else is; the code that was read seems to do so in float32.
    """

    Settings = CSLSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        x, u, mix = self.crops(batch)
        views, settings, sizes = self.views, self.settings, [len(crop.images) for crop in (x, u)]
        # Only the forward of [x_l; x_w] moves the running averages of the batch norms (released code).
        with held_statistics(self.network):
            mix_targets = csl_targets(detached(self.network, views.weak(mix)), mix.padding, settings)
        clean = self.network(torch.cat([views.weak(x), views.weak(u)]), perturb=settings.feature_perturbation)
        clean, perturbed = clean if settings.feature_perturbation else (clean, None)
        logits, weak_logits = clean.split(sizes)
        targets = csl_targets(weak_logits, u.padding, settings)
        box = views.boxes(u)
        strong = paste(views.strong(u), views.strong(mix), box)
        masked, blocks = views.masked(u, settings.block, settings.ratio)
        if settings.masking != "none":
            masked = hide(masked, blocks & (targets.weight == 1) if settings.masking == "reliable" else blocks)
        with held_statistics(self.network):
            strong_logits, masked_logits = self.network(torch.cat([strong, masked])).chunk(2)
        mixed = targets.pasted(mix_targets, box)
        terms = {
            "supervised": 0.5 * self.labelled_loss(logits, x.masks),
            "consistency": 0.125 * weighted_cross_entropy(strong_logits, mixed.label, mixed.weight, mixed.valid),
            "masked": 0.125 * weighted_cross_entropy(masked_logits, targets.label, targets.weight, targets.valid),
        }
        if perturbed is not None:
            logits_fp = perturbed[sizes[0] :]
            terms["features"] = 0.25 * weighted_cross_entropy(logits_fp, targets.label, targets.weight, targets.valid)
        return Losses(terms, targets.report(batch["unlabelled"].index, u))
