"""PCRE's network: a trunk with a token for each class, the decoder that makes a mask a patch, and class prototypes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from repro.cam import bilinear, multi_scale_cam, widened
from repro.methods.image_tags import contrast, losses, regions
from repro.methods.image_tags.trunk import Trunk
from repro.models.vit import Layout, PatchEmbed, Tokens, ViT, resized, to_map
from repro.recipe import scales_of

CAM, AUX, PROTOTYPES, REGIONS = "cam", "aux", "prototypes", "regions"


class RegionDecoder(nn.Module):
    """CRME: two decoder layers over the patches, a joint confidence, and one soft mask a patch (spec 3.2).

    encoder: whose patches are read. layout: of that encoder; queries come from a convolution of patch x patch, also
        where the encoder has a stem. classes: C. heads, hidden: of the decoder. groups: of the mask's group norm.
    Source: released code.
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
        """Joint confidence S (B, N, C) and masks M (B, N, h, w) in [0, 1], before any gate; at least float32.

        x: normalised images (B, 3, H, W). patches: F (B, N, D) of them, without gradient here. grid: (h, w), N = h w.
        """
        patches = patches.detach()
        # a stem rounds the grid of odd sizes up, a single convolution down
        queries = bilinear(self.patch_embed(x), grid).flatten(2).mT + resized(self.pos_embed, self.grid, grid)
        decoded = self.layers(queries, patches)
        confidence = regions.joint_confidence(self.by_class(decoded), self.by_patch(decoded))
        logits = self.embed(decoded) @ self.pixels(to_map(patches, grid)).flatten(2)
        return confidence, widened(logits).sigmoid().unflatten(2, grid)


class PCRENetwork(Trunk):
    """The trunk, the decoder, and as buffers the prototypes (C, D) and whether masks are mixed into the CAM yet.

    settings: `pcre.PCRESettings`. Prototypes start as Gaussian noise (released code). progress: share of training done
    at the last step, for the gate of `gated_regions`; not saved.
    """

    def __init__(self, encoder: ViT, classes: int, head: nn.Module, decoder: RegionDecoder, settings: Any) -> None:
        super().__init__(encoder, classes, head)
        self.decoder, self.settings, self.progress = decoder, settings, 0.0
        self.register_buffer("prototypes", torch.randn(classes, encoder.width))
        self.register_buffer("fusing", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def follow(self, class_tokens: Tensor, tags: Tensor) -> None:
        """Move the prototypes towards class tokens (B, C, D) of shown classes, image by image (Eq. 12), in place, so
        that a teacher which copies buffers has them too. tags: (B, C)."""
        momentum = self.settings.prototype_momentum
        self.prototypes.copy_(contrast.updated_prototypes(self.prototypes, widened(class_tokens), tags, momentum))

    def maps(
        self, x: Tensor, scales: Sequence[float], tags: Tensor, wanted: Sequence[str], most: int | None = None
    ) -> dict[str, Tensor]:
        """Maps (B, C, H, W) in [0, 1] over scales and flips by name, from one pass a scale and without gradient.

        x: normalised images (B, 3, H, W). tags: (B, C). most: classes that an image shows at most, None for C.
        wanted: of CAM, AUX (the auxiliary CAM), PROTOTYPES (cosines with them), REGIONS (m_r without a gate, of shown
            classes, at the settings' mask scales).
        Maps and masks are resized to (H, W) straight from the patch grid.
        """
        size = (x.shape[2], x.shape[3])
        mirrored = torch.cat([tags, tags])
        with_masks = scales_of(self.settings.mask_scales) if self.settings.mask_scales else scales
        seen_with_masks = {(int(scale * size[0]), int(scale * size[1])) for scale in with_masks}

        def one(name: str, seen: Tensor, tokens: Tokens) -> Tensor:
            if name != REGIONS:
                return bilinear(widened(self.raw_map(name, tokens)), size)
            if (seen.shape[2], seen.shape[3]) in seen_with_masks:
                return self.grown(seen, tokens, mirrored, size, most)
            return x.new_zeros(len(seen), tags.shape[1], *size)

        def raw(seen: Tensor) -> Tensor:
            tokens = self.encoder(seen)
            return torch.cat([one(name, seen, tokens) for name in wanted], 1)

        return dict(zip(wanted, multi_scale_cam(raw, x, scales).chunk(len(wanted), 1), strict=True))

    def raw_map(self, name: str, tokens: Tokens) -> Tensor:
        """Map (B, C, h, w) of that name, not rectified."""
        if name == PROTOTYPES:
            points = self.prototypes if self.settings.prototypes else tokens.class_tokens
            return contrast.prototype_cam(tokens.patches, points, tokens.grid)
        return {CAM: self.raw, AUX: self.raw_aux}[name](tokens)

    def grown(
        self, x: Tensor, tokens: Tokens, tags: Tensor, size: tuple[int, int], most: int | None, r: float | None = None
    ) -> Tensor:
        """Regions m_r (B, C, H, W) at `size`, zeros for classes that are not shown. r: of the gate, None for none."""
        confidence, masks = self.decoder(x, tokens.patches, tokens.grid)
        masks = masks if r is None else regions.gate(masks, r)
        pairs = regions.shown_classes(tags, most)
        found = regions.refined_regions(masks, confidence, pairs, size, self.settings.expansion)
        return regions.by_class(found.masks, pairs, tags.shape[1])

    @torch.no_grad()
    def gated_regions(self, x: Tensor, tags: Tensor) -> tuple[Tensor, float]:
        """Regions (B, C, h, w) at scale 1 behind the gate of the last step, and its radius in patches; where there is
        none, the side of the grid.

        x: normalised images (B, 3, H, W). tags: (B, C). Zeros for classes that are not shown. For figures.
        """
        tokens = self.encoder(x)
        r = self.settings.radius(self.progress, tokens.grid)
        found = self.grown(x, tokens, tags, tokens.grid, None, r)
        return found, float(max(tokens.grid)) if r is None else r

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """CAM (B, C, H, W) in [0, 1], with the regions of the classes in tags (B, C) once training mixes them in.

        Waits for the device; for evaluation.
        """
        if not self.fusing:
            return super().activation(x, scales, tags)
        most = max(1, int((tags > 0).sum(1).max()))
        maps = self.maps(x, scales, tags, (CAM, REGIONS), most)
        return losses.fused(maps[CAM], maps[REGIONS], self.settings.fusion)
