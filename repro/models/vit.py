"""Vision transformers whose patches make class activation maps, and the two segmentation heads on top of them.

Parameter names and shapes are timm's (`patch_embed.proj`, `cls_token`, `pos_embed`, `blocks.N.attn.qkv`, ...), so its
weights load as they are; `ViT.fitted` turns those of one [CLS] token into those of one token a class. Images may have
any size from one patch: positions are resized to their grid, and a border that fills no patch is not seen (both as in
the released codes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6  # timm's, for ViT and DeiT
DILATIONS, MINI_DILATIONS = (6, 12, 18, 24), (1, 2, 3, 4)  # of `DilatedHead`; ours for grids of 16 x 16


@dataclass(frozen=True)
class Layout:
    """Shape of a network.

    width: D. depth: blocks. heads: of attention, a divisor of D. patch: pixels from one token to the next.
    grid: side of the square grid whose position embeddings are stored. ratio: hidden width of an MLP over D.
    stem: width and stride of the 3x3 convolutions before the last one, which leads to D; empty for one convolution of
        patch x patch. The strides multiply to `patch`.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    grid: int = 14
    ratio: int = 4
    stem: tuple[tuple[int, int], ...] = ()


LAYOUTS = {
    "vit_base_patch16_224": Layout(),
    "deit_base_patch16_224": Layout(),
    # Ours, for scenes of 64 px: 16 x 16 tokens, since the CAMs of 8 x 8 do not follow a garment. The convolutional stem
    # is a deviation from the papers: through it a patch sees 39 px, most of a garment. Only two blocks stand before the
    # last, which mixes nothing for most methods: a small ViT that mixes more carries what is in an image to every
    # patch, and its maps light up the background.
    "vit-mini": Layout(48, 3, 2, 4, 16, 2, ((24, 2), (48, 2), (48, 1), (48, 1), (48, 1))),
}


class Tokens(NamedTuple):
    """What a ViT makes of B images with N = h w patches.

    class_tokens: (B, C, D) and patches: (B, N, D), after the final LayerNorm
    auxiliary: (B, N, D), patches as the auxiliary block puts them out, without LayerNorm
    grid: (h, w); patches go row by row
    attention: maps (B, heads, C + N, C + N) of the blocks that were asked for, by index from 0: queries in rows
    """

    class_tokens: Tensor
    patches: Tensor
    auxiliary: Tensor
    grid: tuple[int, int]
    attention: dict[int, Tensor]


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, N, D) as a map (B, D, h, w)."""
    return patches.mT.unflatten(2, grid)


class Attention(nn.Module):
    """Softmax attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, hidden: int, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Mixed tokens (B, T, D), and if wanted their scores (B, heads, T, T), whose softmax is the attention.

        hidden: that many leading tokens are attended to by nobody, themselves included, but attend to the others.
        """
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key, value, scores = key[:, :, hidden:], value[:, :, hidden:], None
        if wanted:
            seen = query @ key.mT / query.shape[-1] ** 0.5
            mixed, scores = seen.softmax(-1) @ value, F.pad(seen, (hidden, 0), value=-math.inf)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2)), scores

    def values(self, x: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The same with every token attending to itself alone: W_proj (W_v x + b_v) + b_proj."""
        width = x.shape[2]
        out = self.proj(F.linear(x, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :]))
        itself = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).log() if wanted else None
        return out, itself.expand(len(x), self.heads, -1, -1) if wanted else None


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x: Tensor, hidden: int, mixes: bool, wanted: bool) -> tuple[Tensor, Tensor | None]:
        seen = self.norm1(x)
        change, scores = self.attn(seen, hidden, wanted) if mixes else self.attn.values(seen, wanted)
        x = x + change
        return x + self.mlp(self.norm2(x)), scores


class PatchEmbed(nn.Module):
    """Images to a map of tokens: one strided convolution, or several with group norm and ReLU between them.

    Group norm keeps no running statistics, so that passes at several scales leave no trace.
    """

    def __init__(self, layout: Layout, channels: int) -> None:
        super().__init__()
        if not layout.stem:
            self.proj: nn.Module = nn.Conv2d(channels, layout.width, layout.patch, layout.patch)
            return
        layers, c_in = [], channels
        for width, stride in layout.stem:
            layers += [nn.Conv2d(c_in, width, 3, stride, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU(inplace=True)]
            c_in = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(c_in, layout.width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ViT(nn.Module):
    """Encoder without classifier; `vit` describes the options."""

    def __init__(
        self, layout: Layout, class_tokens: int, masked: bool, value_only: bool, auxiliary: int, channels: int
    ) -> None:
        super().__init__()
        self.patch, self.width, self.heads, self.depth = layout.patch, layout.width, layout.heads, layout.depth
        self.grid, self.class_tokens, self.value_only = layout.grid, class_tokens, value_only
        self.hidden = class_tokens if masked else 0
        self.auxiliary = auxiliary % layout.depth
        self.patch_embed = PatchEmbed(layout, channels)
        self.cls_token = nn.Parameter(torch.empty(1, 1, layout.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + layout.grid**2, layout.width))
        self.blocks = nn.ModuleList(Block(layout.width, layout.heads, layout.ratio) for _ in range(layout.depth))
        self.norm = nn.LayerNorm(layout.width, eps=NORM_EPS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d) and layout.stem:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        copies = self.fitted({"cls_token": self.cls_token.data, "pos_embed": self.pos_embed.data})
        self.cls_token, self.pos_embed = (nn.Parameter(copies[name]) for name in ("cls_token", "pos_embed"))

    def fitted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of such a network, with its own number of class tokens and its own grid; other tensors are kept.

        tensors: by timm's names. A single `cls_token` and its position are copied for every class; positions of
            another square grid are resized. What does not fit is left for the caller's check of shapes.
        Source: released code (PCRE copies the token and its position, ToCo resizes bicubically).
        """
        tensors = dict(tensors)
        token, positions = tensors.get("cls_token"), tensors.get("pos_embed")
        if token is None or positions is None or token.ndim != 3 or positions.ndim != 3:
            return tensors
        first, rest = positions.split([token.shape[1], positions.shape[1] - token.shape[1]], dim=1)
        if token.shape[1] == 1:
            tensors["cls_token"] = token.repeat(1, self.class_tokens, 1)
            first = first.repeat(1, self.class_tokens, 1)
        side = math.isqrt(rest.shape[1])
        if side**2 == rest.shape[1]:
            rest = resized(rest, (side, side), (self.grid, self.grid))
        tensors["pos_embed"] = torch.cat([first, rest], dim=1)
        return tensors

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Class tokens and patches (B, C + N, D) with their positions, in front of the first block, and (h, w).

        x: normalised images (B, channels, H, W). Raises ValueError when they are smaller than a patch.
        """
        if min(x.shape[2:]) < self.patch:
            raise ValueError(f"images of {tuple(x.shape[2:])} pixels are smaller than a patch of {self.patch}")
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        first, rest = self.pos_embed.split([self.class_tokens, self.grid**2], dim=1)
        patches = x.flatten(2).mT + resized(rest, (self.grid, self.grid), grid)
        return torch.cat([(self.cls_token + first).expand(len(x), -1, -1), patches], dim=1), grid

    def block(self, index: int, tokens: Tensor, wanted: bool = False) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, C + N, D) after block `index`, counted from 0, and its scores (B, heads, T, T) if wanted."""
        mixes = not (self.value_only and index == self.depth - 1)
        return self.blocks[index](tokens, self.hidden, mixes, wanted)

    def forward(self, x: Tensor, attention: Sequence[int] = (), softmax: bool = True) -> Tokens:
        """Tokens of normalised images x (B, channels, H, W).

        attention: indices of the blocks whose maps are wanted, -depth <= i < depth; each map is held in memory. That
            of a value-only block is the identity.
        softmax: maps whose rows sum to 1; without it the scores q . k / sqrt(D / heads) behind them, minus infinity
            where nobody looks. (AFA's affinity reads scores, in its released code without the square root.)
        Raises ValueError for blocks that do not exist, and for images smaller than a patch.
        """
        unknown = [index for index in attention if not -self.depth <= index < self.depth]
        if unknown:
            raise ValueError(f"there are no blocks {unknown}; this ViT has {-self.depth} to {self.depth - 1}")
        wanted = {index % self.depth for index in attention}
        tokens, grid = self.embed(x)
        maps, auxiliary = {}, tokens
        for index in range(self.depth):
            tokens, scores = self.block(index, tokens, index in wanted)
            if scores is not None:
                maps[index] = scores.softmax(-1) if softmax else scores
            if index == self.auxiliary:
                auxiliary = tokens
        auxiliary = auxiliary[:, self.class_tokens :]
        first, patches = self.norm(tokens).split([self.class_tokens, auxiliary.shape[1]], dim=1)
        return Tokens(first, patches, auxiliary, grid, maps)


def resized(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings (1, N, D) of one grid (h, w) on another, bicubic; unchanged where the grids are equal."""
    if old == new:
        return positions
    return F.interpolate(to_map(positions, old), size=new, mode="bicubic", align_corners=False).flatten(2).mT


def vit(
    name: str, class_tokens: int = 1, masked: bool = False, value_only: bool = False, auxiliary: int = -3,
    channels: int = 3,
) -> ViT:  # fmt: skip
    """A freshly initialised ViT encoder; `repro.models.pretrained` fills it.

    name: a key of `LAYOUTS`; the two of timm differ in their weights only.
    class_tokens: C, at least 1. 1 is the plain [CLS] of ToCo and DuPL; with one a class (PCRE) all start as copies.
    masked: nobody attends to class tokens, they attend to patches only (PCRE, blocks 1 to the last but one); so
        patches do not depend on them. Else attention is ordinary.
    value_only: the last block mixes nothing; it uses its value path alone (PCRE).
    auxiliary: index of the block whose output is `Tokens.auxiliary`, -depth <= i < depth; papers: -3.
    channels: of the images, at least 1.
    Raises ValueError for names and values outside these ranges. ToCo keeps `pos_embed` frozen, PCRE trains it.
    Source: released code (ToCo, PCRE); "vit-mini" is ours.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown ViT {name!r}; known: {', '.join(LAYOUTS)}")
    if class_tokens < 1 or channels < 1:
        raise ValueError(f"class_tokens is {class_tokens} and channels is {channels}; both must be at least 1")
    depth = LAYOUTS[name].depth
    if not -depth <= auxiliary < depth:
        raise ValueError(f"auxiliary is {auxiliary}; {name} has blocks {-depth} to {depth - 1}")
    return ViT(LAYOUTS[name], class_tokens, masked, value_only, auxiliary, channels)


class DilatedHead(nn.Module):
    """Parallel dilated 3x3 convolutions with bias, summed (PCRE and SeCo; the form of DeepLab-v2).

    width: D of the features. classes: K, with the background. dilations: one a branch; `MINI_DILATIONS` on small grids.
    Source: released code, also of the weights' N(0, .01). The supplementary speaks of four simple convolutions.
    """

    def __init__(self, width: int, classes: int, dilations: Sequence[int] = DILATIONS) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(width, classes, 3, padding=d, dilation=d) for d in dilations)
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) from features x (B, D, h, w)."""
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


class LargeFov(nn.Module):
    """Two dilated 3x3 convolutions with ReLU and a 1x1 convolution, no biases (ToCo and DuPL).

    width: D of the features. classes: K, with the background. hidden: width between them; 512, ours at `mini`: 64.
    dilation: of both, 5; ours at `mini`: 2. Source: released code; the initialisation is PyTorch's, as there.
    """

    def __init__(self, width: int, classes: int, hidden: int = 512, dilation: int = 5) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(width, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(hidden, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) from features x (B, D, h, w)."""
        return self.conv8(F.relu(self.conv7(F.relu(self.conv6(x)))))
