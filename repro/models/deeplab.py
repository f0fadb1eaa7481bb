"""DeepLabV3+ (Chen et al., 2018) as the few-mask and scribble codes build it, with a second, perturbed output."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.models.mobilenet import mobilenet_v2
from repro.models.resnet import LAYOUTS, convolution, resnet

MOBILENET = "mobilenetv2_100"  # timm's name of MobileNetV2, width 1
BACKBONES = (*LAYOUTS, MOBILENET)
RATES_AT_16 = (6, 12, 18)  # dilations of the pyramid at output stride 16, twice as large at 8
MINI_RATES_AT_8 = (1, 2, 3)  # ours: the published ones would miss a 64 px scene
FEATURE_DROPOUT = 0.5


def conv_bn_relu(c_in: int, c_out: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Convolution without bias, BN, ReLU; the size is kept."""
    return nn.Sequential(convolution(c_in, c_out, kernel, 1, dilation), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned (released code)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 branch, three dilated 3x3 branches, the image's mean; then 1x1."""

    def __init__(self, c_in: int, width: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        branches = [conv_bn_relu(c_in, width, 1)] + [conv_bn_relu(c_in, width, 3, rate) for rate in rates]
        self.branches = nn.ModuleList(branches)
        self.pool = conv_bn_relu(c_in, width, 1)
        self.project = conv_bn_relu(5 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class DeepLabV3Plus(nn.Module):
    """A backbone with `low_high(x)` and `low_high_widths`, the pyramid, and a decoder at the low-level size.

    Everything outside `backbone` is the head, which the recipes train with a larger learning rate.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        rates: tuple[int, int, int],
        width: int = 256,
        low_width: int = 48,
        dropout: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        low, high = backbone.low_high_widths
        self.backbone = backbone
        self.aspp = Aspp(high, width, rates)
        self.reduce = conv_bn_relu(low, low_width, 1)
        self.fuse = nn.Sequential(
            conv_bn_relu(low_width + width, width, 3), nn.Dropout(dropout[0]),
            conv_bn_relu(width, width, 3), nn.Dropout(dropout[1]),
        )  # fmt: skip
        self.classifier = nn.Conv2d(width, classes, 1)

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters outside the backbone, for an optimiser group."""
        return [value for name, value in self.named_parameters() if not name.startswith("backbone.")]

    def decode(self, low: Tensor, high: Tensor) -> Tensor:
        """Logits (B, K, h, w) at the low-level size from the backbone's features."""
        pyramid = resize(self.aspp(high), low.shape[2:])
        return self.classifier(self.fuse(torch.cat([self.reduce(low), pyramid], dim=1)))

    def forward(self, x: Tensor, perturb: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, K, H, W) of normalised images x (B, C, H, W); with `perturb` a pair of them.

        perturb: also return logits of the same images with channel dropout (.5, in eval mode too) on low- and
            high-level features. Both go through the head as one batch, so its batch norms see both.
        In train mode B must be at least 2: the pyramid's pooled branch has one value a channel and image.
        Source: released code (UniMatch; the same in CSL's step).
        """
        low, high = self.backbone.low_high(x)
        if not perturb:
            return resize(self.decode(low, high), x.shape[2:])
        dropped = [F.dropout2d(part, FEATURE_DROPOUT, training=True) for part in (low, high)]
        both = self.decode(torch.cat([low, dropped[0]]), torch.cat([high, dropped[1]]))
        clean, perturbed = resize(both, x.shape[2:]).chunk(2)
        return clean, perturbed


def deeplab(
    name: str, classes: int, output_stride: int, channels: int = 3, dropout: tuple[float, float] = (0.0, 0.0)
) -> DeepLabV3Plus:
    """A freshly initialised DeepLabV3+ on a ResNet or MobileNetV2; `repro.models.pretrained` fills the backbone.

    name: one of `BACKBONES`; "resnet101s" is the few-mask papers' ResNet-101 with a deep stem, "mobilenetv2_100" the
        scribble papers' backbone.
    classes: K, at least 1, with the background.
    output_stride: 8 (CSL) or 16 (UniMatch, Robust Trust Region); "resnet-mini" has half of each: 4 or 8. The
        pyramid's rates follow, 12/24/36 and 6/12/18; "resnet-mini" 2/4/6 and 1/2/3.
    dropout: behind both 3x3 convolutions of the decoder; scribble papers .5 and .1, few-mask papers none.
    Raises ValueError for names and values outside these ranges.
    Source: released codes (head 256, low-level 48); the narrow head of "resnet-mini" is ours.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    if classes < 1:
        raise ValueError(f"classes is {classes}; it must be at least 1")
    mini = name == "resnet-mini"
    coarse = 8 if mini else 16
    if output_stride not in (coarse // 2, coarse):
        raise ValueError(f"output_stride is {output_stride}; {name} has {coarse // 2} or {coarse} here")
    rates = tuple(rate * coarse // output_stride for rate in (MINI_RATES_AT_8 if mini else RATES_AT_16))
    if name == MOBILENET:
        backbone = mobilenet_v2(output_stride, channels=channels)
    else:
        backbone = resnet(name, output_stride, channels=channels)
    sizes = {"width": 32, "low_width": 12} if mini else {}
    return DeepLabV3Plus(backbone, classes, rates, dropout=dropout, **sizes)
