"""ToCo (Ru et al., CVPR 2023): patch tokens of one label are pulled together, class tokens of empty crops pushed away.

Equations are those of the released code. One fault of it is not repeated: it mirrors the copy that local crops are cut
from at random, but not the map that decides where to cut. `Plain`, training without both contrasts, is at the end.
"""

from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.arrays import Items, at_least_float32
from repro.cam import best_class
from repro.methods.image_tags.common import TagMethod, Trunk, View, patch_contrast, tag_terms
from repro.settings import SettingError, check, hyper
from repro.train import Losses, Now

# Crops


def confidence_levels(cam: Tensor, tags: Tensor, low: float, high: float) -> Tensor:
    """Map (B, H, W) int64 of a CAM: 0 where its best class is at most `low`, 2 from `high` on, else 1.

    cam: (B, C, H, W), not negative. tags: (B, C).
    """
    value, _ = best_class(cam, tags)
    return torch.where(value <= low, 0, torch.where(value >= high, 2, 1))


@torch.no_grad()
def choose_crops(
    levels: Tensor, count: int, side: int, least: float = 0.2, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Corners (B, n, 2) int64, top and left, of crops around random pixels that are not confident; which are negative.

    levels: (B, H, W) of `confidence_levels`. A crop's centre has level 0 or 1, unless an image has fewer than `count`
        such pixels: then any. The n = `count` corners of an image differ, and all crops of `side` pixels lie inside
        (the released code leaves out the last row and column).
    least: a crop is negative, (B, n) bool, when its mean level is at most this. generator: on the levels' device.
    Raises ValueError when an image has no room for `count` crops.
    """
    height, width = levels.shape[1] - side + 1, levels.shape[2] - side + 1
    if side < 1 or height < 1 or width < 1 or height * width < count:
        raise ValueError(f"{count} crops of {side} pixels do not fit into images of {tuple(levels.shape[1:])}")
    centre = side // 2
    allowed = (levels[:, centre : centre + height, centre : centre + width] < 2).flatten(1)
    allowed = allowed | (allowed.sum(1, keepdim=True) < count)
    draw = torch.rand(allowed.shape, generator=generator, device=levels.device)
    chosen = (draw + allowed).topk(count, dim=1).indices
    corners = torch.stack([chosen // width, chosen % width], 2)
    return corners, cut(levels[:, None], corners, side).float().mean((2, 3, 4)) <= least


def cut(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Crops (B, n, channels, side, side) of images (B, channels, H, W) at corners (B, n, 2), top and left."""
    reach = torch.arange(side, device=images.device)
    rows, columns = corners[:, :, 0, None] + reach, corners[:, :, 1, None] + reach
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    return images[image, :, rows[:, :, :, None], columns[:, :, None]].movedim(4, 2)


# Contrast of crops


EPS = 1e-4  # added to the negatives of `crop_contrast`


def crop_contrast(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float = 0.5) -> Tensor:
    """L_ctc, InfoNCE of crops against the teacher's two views of their image, mean over images.

    With e_gv = exp(<t_g, s_v> / T) and n_g = sum of e_gv over the negative crops v + 1e-4, the loss of an image is
    sum_g [ sum_positive -log(e_gv / (e_gv + n_g)) + log(1 + n_g) ] / (2 (#positive + 1e-4)).
    student: s (B, V, E), projected class tokens of the two global views and of the crops.
    teacher: t (B, 2, E), of the global views by the teacher's head; without gradient here.
    positive: (B, V) bool, True for the global views and for crops that are not negative. temperature: T.
    Source: ToCo (released code), here in logarithms, so that no exponential overflows.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = at_least_float32(teacher).detach() @ at_least_float32(student).mT / temperature
        rest = logits.masked_fill(positive[:, None], -torch.inf)
        negatives = torch.cat([rest, torch.full_like(rest[:, :, :1], log(EPS))], 2).logsumexp(2, keepdim=True)
        pulled = F.softplus(negatives - logits).masked_fill(~positive[:, None], 0).sum((1, 2))
        pushed = F.softplus(negatives).sum((1, 2))
        return ((pulled + pushed) / (teacher.shape[1] * (positive.sum(1, dtype=logits.dtype) + EPS))).mean()


# ToCo


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

    def __init__(self, settings: ToCoSettings, network: Trunk, *rest: Any) -> None:
        super().__init__(settings, network, *rest)
        patch, crop = network.encoder.patch, self.recipe.crop
        if not patch <= settings.side <= crop:
            raise SettingError(f"side is {settings.side}; it must lie between a patch, {patch}, and crop, {crop}")
        # outside the network, since only that is evaluated and saved
        self.projection = Projection(network.encoder.width, settings.hidden)
        self.teacher = Projection(network.encoder.width, settings.hidden).requires_grad_(False)
        self.teacher.load_state_dict(self.projection.state_dict())

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view, settings = self.view(batch["tagged"]), self.settings
        predicted = self.network.predict(view.x)
        tokens = predicted.tokens
        cam, aux = self.network.both_cams(view.x, self.recipe.scales)
        terms = tag_terms(predicted, view.tags)
        labels = self.patch_labels(view, aux, tokens.grid)
        terms["patches"] = settings.ptc_weight * patch_contrast(tokens.patches, labels)
        other = self.views.strong(self.crop(batch["tagged"].images))
        terms["crops"] = settings.ctc_weight * self.crop_loss(view, tokens.class_tokens[:, 0], other, aux)
        if self.learning(now):
            terms |= self.head_terms(predicted.segmentation, self.labels(view, cam), view)
        return Losses(terms)

    def crop_loss(self, view: View, token: Tensor, other: Tensor, aux: Tensor) -> Tensor:
        """L_ctc of two views of the whole image, and of crops of the first one where it is not confident.

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


# Plain training


@dataclass(frozen=True)
class PlainSettings:
    seg_weight: float = hyper(0.1, source="ToCo: weight of L_seg", low=0)
    energy_weight: float = hyper(0.0, source="ToCo: .05 of L_reg; ours: off, exact and quadratic in the pixels", low=0)

    def __post_init__(self):
        check(self)


class Plain(TagMethod):
    """L = L_cls + L_cls_aux, after the warm-up + .1 L_seg."""

    Settings = PlainSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view = self.view(batch["tagged"])
        predicted = self.network.predict(view.x)
        terms = tag_terms(predicted, view.tags)
        if self.learning(now):
            cam = self.network.activation(view.x, self.recipe.scales, view.tags)
            terms |= self.head_terms(predicted.segmentation, self.labels(view, cam), view)
        return Losses(terms)
