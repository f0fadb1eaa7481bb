"""PCRE (Xu et al., CVPR 2025): confident regions, one soft mask a patch, grown over training and mixed into the CAM.

Equations are those of the released code and the supplementary, in `regions`, `contrast` and `losses`; the paper's text
could not be had. Two faults of the released training are not repeated: the radius of the gate follows its schedule, and
crops are drawn without masks. `pcre_network` holds the decoder and the prototypes.
"""

from dataclasses import dataclass

from torch import Tensor

from repro.data.mask_views import MaskViews
from repro.methods.image_tags import contrast, losses, regions
from repro.methods.image_tags.pcre_network import AUX, CAM, PROTOTYPES, REGIONS, PCRENetwork
from repro.methods.image_tags.steps import TagMethod, View, tag_terms
from repro.recipe import TagRecipe, scales_of
from repro.settings import SettingError, check, hyper
from repro.train import Items, Losses, Now

SIDE = 28  # patches of a published crop's side, which r_max is stated for


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
    gating: str = hyper("cosine", source="supplementary, Tab. 1h; in effect released: fixed", choices=regions.SCHEDULES)
    r_max: float = hyper(5.0, source="released code, in patches of 1/28 of a crop's side; 0: the whole grid", low=0)
    gate_from: float = hyper(0.1, source="released code: share of training when the radius sets out", low=0, high=1)
    gate_to: float = hyper(0.4, source="released code: and when it is full-grown", low=0, high=1)
    fusion: float = hyper(0.3, "alpha", "released code; the overview figure says mean fusion, .5", low=0, high=1)
    fuse_from: float = hyper(0.4, source="released code: share of training when masks join the CAM", low=0, high=1)
    pool: str = hyper("sum", source="released code, of S over patches; max: an ablation there", choices=regions.POOLS)
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
    def expansion(self) -> regions.Expansion:
        """How regions grow."""
        return regions.Expansion(
            threshold=self.tau, rounds=self.rounds, expand=self.expand, ranking=self.ranking, resize=self.resize
        )

    def radius(self, progress: float, grid: tuple[int, int]) -> float | None:
        """Radius of the gate in patches of a grid (h, w), None for no gate.

        progress: share of training done. r_max is scaled to the grid (ours; 28 x 28 needs none) but stays at least 1.
        """
        r_max = max(1.0, self.r_max * grid[0] / SIDE) if self.r_max else None
        return regions.radius(progress, self.gating, r_max, self.gate_from, self.gate_to, grid)


class PCRE(TagMethod):
    """Warm-up: L_cls + L_cls_aux + .3 L_ptc + l_1 L_conf + l_3 L_CPE; then + l_2 L_refine + .12 L_seg."""

    Settings = PCRESettings

    def __init__(
        self, settings: PCRESettings, network: PCRENetwork, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__(settings, network, views, recipe, most)
        if settings.mask_scales and not set(scales_of(settings.mask_scales)) <= set(recipe.scales):
            raise SettingError(f"mask_scales is {settings.mask_scales!r}; they must be among {recipe.cam_scales!r}")

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings, network = self.view(batch["tagged"]), self.settings, self.network
        network.progress = now.progress
        predicted = network.predict(view.x)
        tokens = predicted.tokens
        confidence, masks = network.decoder(view.x, tokens.patches, tokens.grid)
        maps = network.maps(view.x, self.recipe.scales, view.tags, self.wanted(now), self.most)
        patches = self.patch_labels(view, maps[AUX], tokens.grid)
        score = regions.image_score(confidence, settings.pool)
        cpe = contrast.class_contrast(tokens.class_tokens, tokens.patches, patches, view.tags)
        terms = tag_terms(predicted, view.tags) | {
            "patches": settings.ptc_weight * contrast.patch_contrast(tokens.patches, patches),
            "confidence": settings.conf_weight * losses.confidence_loss(score, view.tags),
            "prototypes": settings.cpe_weight * cpe,
        }
        if self.learning(now):
            if REGIONS in maps:
                network.fusing.fill_(True)
            cam = losses.fused(maps[CAM], maps[REGIONS], settings.fusion) if REGIONS in maps else maps[CAM]
            labels = mask_labels = self.labels(view, cam)
            if settings.prototype_labels:
                mask_labels = self.labels(view, maps[PROTOTYPES], settings.prototype_high)
            refined = self.refined(view, now, masks, confidence, mask_labels)
            terms["refine"] = settings.refine_weight * refined
            terms |= self.head_terms(predicted.segmentation, labels, view)
            network.follow(tokens.class_tokens, view.tags)
        return Losses(terms)

    def wanted(self, now: Now) -> tuple[str, ...]:
        """Names of the maps that labels are made of at this step."""
        wanted = (CAM, AUX)
        if self.learning(now) and self.settings.prototype_labels:
            wanted += (PROTOTYPES,)
        return wanted + (REGIONS,) if self.learning(now) and now.progress >= self.settings.fuse_from else wanted

    def refined(self, view: View, now: Now, masks: Tensor, confidence: Tensor, labels: Tensor) -> Tensor:
        """L_refine of masks M (B, N, h, w) behind the gate, with labels (B, S, S); S (B, N, C) only chooses."""
        gated = regions.gate(masks, self.settings.radius(now.progress, (masks.shape[2], masks.shape[3])))
        pairs, size = regions.shown_classes(view.tags, self.most), (view.x.shape[2], view.x.shape[3])
        found = regions.refined_regions(gated, confidence.detach(), pairs, size, self.settings.expansion)
        return losses.refine_loss(found.masks, found.found, pairs, labels)
