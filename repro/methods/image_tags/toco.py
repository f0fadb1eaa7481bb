"""ToCo (Ru et al., CVPR 2023): patch tokens of one label are pulled together, class tokens of empty crops pushed away.

Equations are those of the released code. One fault of it is not repeated: there the copy that local crops are cut from
is mirrored at random, but not the map that says where to cut.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.mask_views import MaskViews
from repro.methods.image_tags.contrast import crop_contrast, patch_contrast
from repro.methods.image_tags.crops import choose_crops, confidence_levels, cut
from repro.methods.image_tags.steps import TagMethod, View, tag_terms
from repro.methods.image_tags.trunk import Trunk
from repro.recipe import TagRecipe
from repro.settings import SettingError, check, hyper
from repro.train import Items, Losses, Now

BOTTLENECK, EMBEDDING = 256, 1024  # widths of the projection head, released code


@dataclass(frozen=True)
class ToCoSettings:
    ptc_weight: float = hyper(0.2, source="ToCo: weight of L_ptc", low=0)
    ctc_weight: float = hyper(0.5, source="ToCo: weight of L_ctc", low=0)
    seg_weight: float = hyper(0.1, source="ToCo: weight of L_seg", low=0)
    energy_weight: float = hyper(0.0, source="ToCo: .05 of L_reg; ours: off, exact and quadratic in the pixels", low=0)
    temperature: float = hyper(0.5, source="ToCo: of L_ctc; 1 on COCO", low=1e-3)
    crops: int = hyper(8, source="ToCo: local crops an image", low=1)
    side: int = hyper(96, source="ToCo: side of a local crop, pixels", low=1)
    least: float = hyper(0.2, source="ToCo: a crop whose mean level is at most this is negative", low=0, high=2)
    momentum: float = hyper(0.9, source="ToCo: of the teacher's head", low=0, high=1)
    hidden: int = hyper(2048, source="ToCo: hidden width of the projection head", low=1)

    def __post_init__(self):
        check(self)


class Projection(nn.Module):
    """Three linear layers with GELU, unit length, and a linear layer with rows of unit length (DINO's head)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sizes = ((width, hidden), (hidden, hidden), (hidden, BOTTLENECK))
        self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.last = nn.Linear(BOTTLENECK, EMBEDDING, bias=False)
        for layer in self.layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., D) to cosines (..., EMBEDDING) with the rows of the last layer."""
        for layer in self.layers[:-1]:
            tokens = F.gelu(layer(tokens))
        return F.linear(F.normalize(self.layers[-1](tokens), dim=-1), F.normalize(self.last.weight, dim=1))


class ToCo(TagMethod):
    """L = L_cls + L_cls_aux + .2 L_ptc + .5 L_ctc, after the warm-up + .1 L_seg."""

    Settings = ToCoSettings

    def __init__(
        self, settings: ToCoSettings, network: Trunk, views: MaskViews, recipe: TagRecipe, most: int | None = None
    ) -> None:
        super().__init__(settings, network, views, recipe, most)
        patch = network.encoder.patch
        if not patch <= settings.side <= recipe.crop:
            raise SettingError(
                f"side is {settings.side}; it must lie between a patch, {patch}, and crop, {recipe.crop}"
            )
        # beside the network, which is what is evaluated and saved
        self.projection = Projection(network.encoder.width, settings.hidden)
        self.teacher = Projection(network.encoder.width, settings.hidden).requires_grad_(False)
        self.teacher.load_state_dict(self.projection.state_dict())

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings = self.view(batch["tagged"]), self.settings
        predicted = self.network.predict(view.x)
        tokens = predicted.tokens
        cam, aux = self.network.both_cams(view.x, self.recipe.scales)
        terms = tag_terms(predicted, view.tags)
        contrast = patch_contrast(tokens.patches, self.patch_labels(view, aux, tokens.grid))
        terms["patches"] = settings.ptc_weight * contrast
        other = self.views.strong(self.crop(batch["tagged"].images))
        terms["crops"] = settings.ctc_weight * self.crop_loss(view, tokens.class_tokens[:, 0], other, aux)
        if self.learning(now):
            terms |= self.head_terms(predicted.segmentation, self.labels(view, cam), view)
        return Losses(terms)

    def crop_loss(self, view: View, token: Tensor, other: Tensor, aux: Tensor) -> Tensor:
        """L_ctc: two views of the whole image, and crops of the first one where it is not confident.

        token: (B, D), class token of the first view. other: second view (B, 3, S, S), another coloured crop of the
            image. aux: (B, C, S, S), auxiliary CAM of the first view. Crops come from a newly coloured copy of it.
        """
        settings, encoder = self.settings, self.network.encoder
        levels = confidence_levels(aux, view.tags, self.recipe.cam_low, self.recipe.cam_high)
        corners, negative = choose_crops(levels, settings.crops, settings.side, settings.least, self.views.generator)
        crops = cut(self.views.strong(view.crop), corners, settings.side).flatten(0, 1)
        local = encoder(crops).class_tokens[:, 0].unflatten(0, (len(token), settings.crops))
        tokens = torch.cat([token[:, None], encoder(other).class_tokens, local], 1)
        positive = F.pad(~negative, (2, 0), value=True)
        with torch.no_grad():
            for mean, live in zip(self.teacher.parameters(), self.projection.parameters(), strict=True):
                mean.lerp_(live, 1 - settings.momentum)
            taught = self.teacher(tokens[:, :2])
        return crop_contrast(self.projection(tokens), taught, positive, settings.temperature)
