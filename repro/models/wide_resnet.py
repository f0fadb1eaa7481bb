"""Wide ResNets as the semi-supervised codes build them (Zagoruyko & Komodakis, 2016; pre-activation blocks).

Public codes share one layout and differ in details that show in their parameter counts; `VARIANTS` holds those
that recipes use. They share a quirk: in the first block of every stage but the first, the batch norm and activation in
front of the first convolution are computed and thrown away (`transition="discard"`). Only USB's four-stage
network, which it has for STL-10, does otherwise.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Shape of a network: blocks in a stage, widening factor, stages, stride of the first stage and of the stem."""

    blocks: int
    width: int
    stages: int = 3
    first_stride: int = 1
    stem_stride: int = 1


@dataclass(frozen=True)
class Variant:
    """What one public code does differently.

    conv_bias: which convolutions carry a bias: `none`, `first` (the stem only) or `all`.
    block_eps, final_eps: epsilon of the blocks' batch norms and of the last one.
    activation: `leaky` (LeakyReLU, slope .1) or `mish`.
    shift: constant added after every batch norm's affine map.
    dropout_after: `conv1` (before the second batch norm) or `activation` (before the second convolution).
    transition: what the first block of stages 2, 3, ... feeds to its first convolution and its shortcut:
        `discard` raw x to both; `shared` the activated x to both; `separate` activated x to the convolution,
        raw x to the shortcut (Google's FixMatch). Stage 1 always shares when its width changes.
    """

    conv_bias: str
    block_eps: float
    final_eps: float
    activation: str = "leaky"
    shift: float = 0.0
    dropout_after: str = "activation"
    transition: str = "discard"


LAYOUTS = {
    "wrn-10-1": Layout(blocks=1, width=1),  # ours: widths 16, 16, 32, 64
    "wrn-10-1-half": Layout(blocks=1, width=1, stem_stride=2),  # ours, for `mini`: a quarter of its arithmetic
    "wrn-28-2": Layout(blocks=4, width=2),
    "wrn-28-8": Layout(blocks=4, width=8),
    "wrn-37-2": Layout(blocks=4, width=2, stages=4, first_stride=2),  # STL-10: from 96 px to 6 px
}
VARIANTS = {
    "usb": Variant(conv_bias="first", block_eps=1e-5, final_eps=1e-3),
    "ups": Variant("none", 1e-5, 1e-5, activation="mish", shift=0.1, dropout_after="conv1"),
}
USB_FOUR_STAGES = Variant(conv_bias="all", block_eps=1e-3, final_eps=1e-3, transition="shared")


class ShiftedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm followed by a constant shift, against collapsed filters (UPS's released code)."""

    def __init__(self, channels: int, shift: float, **settings: float) -> None:
        super().__init__(channels, **settings)
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def batch_norm(channels: int, variant: Variant, eps: float, momentum: float) -> nn.BatchNorm2d:
    """The variant's batch norm; its state-dict keys are the same with and without a shift."""
    if variant.shift:
        return ShiftedBatchNorm2d(channels, variant.shift, eps=eps, momentum=momentum)
    return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)


def activation(variant: Variant) -> nn.Module:
    """The variant's activation; LeakyReLU overwrites batch norm's output, which no backward pass needs."""
    return nn.Mish() if variant.activation == "mish" else nn.LeakyReLU(0.1, inplace=True)


class Block(nn.Module):
    """BN, activation, conv 3x3, BN, activation, conv 3x3, plus a shortcut (conv 1x1 where the width changes).

    transition: as in `Variant`; it matters only where the width changes.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        variant: Variant,
        transition: str,
        dropout: float,
        bn_momentum: float,
    ) -> None:
        super().__init__()
        bias, changes_width = variant.conv_bias == "all", c_in != c_out
        self.bn1 = batch_norm(c_in, variant, variant.block_eps, bn_momentum)
        self.act1 = activation(variant)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=bias)
        self.bn2 = batch_norm(c_out, variant, variant.block_eps, bn_momentum)
        self.act2 = activation(variant)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=bias)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=bias) if changes_width else nn.Identity()
        self.transition = transition if changes_width else "separate"
        self.drops_early = variant.dropout_after == "conv1"

    def forward(self, x: Tensor) -> Tensor:
        if self.transition == "discard":
            if self.training:  # the released codes keep these statistics too; nothing reads them
                with torch.no_grad():
                    self.bn1(x)
            activated = x
        else:
            activated = self.act1(self.bn1(x))
        residual = self.conv1(activated)
        if self.drops_early:
            residual = self.act2(self.bn2(self.dropout(residual)))
        else:
            residual = self.dropout(self.act2(self.bn2(residual)))
        return self.shortcut(activated if self.transition == "shared" else x) + self.conv2(residual)


class WideResNet(nn.Module):
    """Stem, stages of residual blocks, BN, activation, global average pool, linear head."""

    def __init__(
        self,
        layout: Layout,
        variant: Variant,
        classes: int,
        channels: int,
        dropout: float,
        bn_momentum: float,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, layout.stem_stride, padding=1, bias=variant.conv_bias != "none")
        blocks, c_in = [], 16
        for stage in range(layout.stages):
            c_out = 16 * layout.width * 2**stage
            for index in range(layout.blocks):
                stride = 1 if index else (2 if stage else layout.first_stride)
                transition = variant.transition if stage else "shared"
                blocks.append(Block(c_in, c_out, stride, variant, transition, dropout, bn_momentum))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.bn = batch_norm(c_in, variant, variant.final_eps, bn_momentum)
        self.act = activation(variant)
        self.head = nn.Linear(c_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # its bias, if any, keeps PyTorch's own draw, as released
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")
        nn.init.xavier_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (B, D) of normalised images x (B, C, H, W); D is `head.in_features`."""
        return self.act(self.bn(self.blocks(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of normalised images x (B, C, H, W)."""
        return self.head(self.features(x))


def wide_resnet(
    name: str,
    classes: int,
    channels: int = 3,
    variant: str = "usb",
    dropout: float = 0.0,
    discard_bn: bool | None = None,
    bn_momentum: float = 0.001,
) -> WideResNet:
    """A freshly initialised wide ResNet; it takes images of any side.

    name: a key of `LAYOUTS`, "wrn-28-2" = depth 28, widening 2; "wrn-37-2" is the public name of the
        four-stage one.
    classes: K, at least 1; channels: of the images, at least 1.
    variant: a key of `VARIANTS`, the public code whose details are followed.
    dropout: probability in [0, 1) of the `nn.Dropout` in each block; 0 in the published recipes, .3 in UPS.
    discard_bn: None follows the variant; True is the quirk above, False the block of Google's FixMatch.
    bn_momentum: weight in (0, 1] of the newest batch in the running statistics; .001 in every public code.
        After s steps (1 - bn_momentum)^s of the start is left, so a few hundred steps need about .1.
    Raises ValueError for names and values outside these ranges.
    Source: released code (USB, UPS); "wrn-10-1" is chosen here.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown wide ResNet {name!r}; known: {', '.join(LAYOUTS)}")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    if classes < 1 or channels < 1:
        raise ValueError(f"classes is {classes} and channels is {channels}; both must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if not 0 < bn_momentum <= 1:
        raise ValueError(f"bn_momentum is {bn_momentum}; it must lie in (0, 1]")
    layout, details = LAYOUTS[name], VARIANTS[variant]
    if variant == "usb" and layout.stages == 4:
        details = USB_FOUR_STAGES
    if discard_bn is not None:
        details = replace(details, transition="discard" if discard_bn else "separate")
    return WideResNet(layout, details, classes, channels, dropout, bn_momentum)
