"""RandAugment's flavours as data, and the drawing of operations, magnitudes and Cutout boxes.

The public codes called "RandAugment (FixMatch)" differ in almost every number: how many operations, always
applied or half of the time, continuous ranges or ten levels, signs, Cutout's size, anchor and colour. Each is
a `Flavour` below, read from the code it names. What they share: operations are drawn uniformly with
replacement, for each image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data import pil_ops
from repro.data.pil_ops import CODE


@dataclass(frozen=True)
class Range:
    """One operation and how its magnitude follows from a level in [0, 1].

    low, high: ends of the range, in the operation's unit (see `operations.OPERATIONS`) times `side`.
    whole: "" low + (high - low) * level; "round" that, rounded half to even; "trunc" low + the second term
        cut towards zero (and only that term scales with `side`).
    side: "" 1, "x" the width, "y" the height, "xy" the smaller of both.
    signed: the sign is drawn, + or - with probability 1/2.
    """

    operation: str
    low: float = 1.0
    high: float = 1.0
    whole: str = ""
    side: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Box:
    """Cutout after the operations. The box is placed at a uniform point, `side` is its drawn or fixed side.

    low, high: the side is uniform in [low, high), in pixels or, with `relative`, in widths.
    anchor: "corner": the point is the centre, moved so that the top-left corner lies inside; the box then
        reaches `side` pixels further, ends included (side + 1 pixels), and is cut at the right and bottom
        border only. "centre": `side // 2` pixels each way from a pixel, cut at every border.
    fill: a level for each of red, green and blue. Images of one channel take the rounded mean (ours; no code
        has them).
    """

    low: float
    high: float
    relative: bool
    anchor: str
    fill: tuple[int, int, int]


@dataclass(frozen=True)
class Flavour:
    """Everything that a public code decides.

    count: operations an image. probability: that each of them is applied. levels: 0 continuous, else levels
    1..levels of ten. outside: the final level of pixels that a geometric operation moved in, until an
    operation of OPAQUE turns them black; None: black.
    """

    source: str
    count: int
    ranges: tuple[Range, ...]
    box: Box | None
    probability: float = 1.0
    levels: int = 0
    outside: int | None = None


def _ranges(enhance, posterize, solarize, geometric) -> tuple[Range, ...]:
    """The fourteen operations common to all flavours."""
    return (
        Range("AutoContrast"),
        *(Range(name, *enhance) for name in ("Brightness", "Color", "Contrast")),
        Range("Equalize"),
        Range("Identity"),
        Range("Posterize", *posterize),
        Range("Rotate", **geometric["Rotate"]),
        Range("Sharpness", *enhance),
        *(Range(name, **geometric["Shear"]) for name in ("ShearX", "ShearY")),
        Range("Solarize", *solarize),
        Range("TranslateX", **geometric["TranslateX"]),
        Range("TranslateY", **geometric["TranslateY"]),
    )


# USB and TorchSSL: uniform in ranges that hold both signs (kekmodel's code ascribes the same ranges to the
# FixMatch paper; FixMatch's released code below has others).
_USB = _ranges(
    enhance=(0.05, 0.95),
    posterize=(4, 8, "trunc"),
    solarize=(0, 256),
    geometric={
        "Rotate": dict(low=-30, high=30),
        "Shear": dict(low=-0.3, high=0.3),
        "TranslateX": dict(low=-0.3, high=0.3, side="x"),
        "TranslateY": dict(low=-0.3, high=0.3, side="y"),
    },
)
# kekmodel: levels 1..9 of ten, magnitudes cut to whole degrees, bits, levels and pixels.
_KEKMODEL = _ranges(
    enhance=(0.05, 0.95),
    posterize=(4, 8, "trunc"),
    solarize=(256, 0, "trunc"),
    geometric={
        "Rotate": dict(low=0, high=30, whole="trunc", signed=True),
        "Shear": dict(low=0, high=0.3, signed=True),
        "TranslateX": dict(low=0, high=0.3, whole="trunc", side="x", signed=True),
        "TranslateY": dict(low=0, high=0.3, whole="trunc", side="y", signed=True),
    },
)
# google-research/fixmatch: as kekmodel, but enhancement both ways, down to 1 bit, and up to 9 pixels whatever
# the size.
_FIXMATCH = _ranges(
    enhance=(0.1, 1.9),
    posterize=(4, 0, "trunc"),
    solarize=(256, 0, "trunc"),
    geometric={
        "Rotate": dict(low=0, high=30, whole="trunc", signed=True),
        "Shear": dict(low=0, high=0.3, signed=True),
        "TranslateX": dict(low=0, high=10, whole="trunc", signed=True),
        "TranslateY": dict(low=0, high=10, whole="trunc", signed=True),
    },
)
_GREY = (127, 127, 127)
_USB_BOX = Box(0.0, 0.5, relative=True, anchor="corner", fill=(125, 123, 114))

FLAVOURS = {
    # microsoft/Semi-supervised-learning, semilearn/datasets/augmentation/randaugment.py, RandAugment(3, 5);
    # the same as TorchSSL, datasets/augmentation/randaugment.py. The second argument, a global magnitude, is
    # never used there.
    "randaugment-usb": Flavour("USB, TorchSSL: RandAugment(3, 5)", 3, _USB, _USB_BOX),
    # USB's transform_medium, RandAugment(1, 5): one operation, Cutout as ever.
    "randaugment-usb-medium": Flavour("USB: RandAugment(1, 5)", 1, _USB, _USB_BOX),
    # google-research/fixmatch, ablation/ab_fixmatch_ra.py ("d.d.rac"): libml/augment.py, AugmentPoolRAMC with
    # third_party/auto_augment/augmentations.py. Cutout zeroes images scaled to [-1, 1], which is level 127
    # here; pixels moved in from outside are transparent there and end at zero too.
    "randaugment-fixmatch": Flavour(
        "FixMatch's released code: rac",
        2,
        _FIXMATCH,
        Box(16, 16, relative=False, anchor="centre", fill=_GREY),
        probability=0.5,
        levels=9,
        outside=127,
    ),
    # kekmodel/FixMatch-pytorch, dataset/randaugment.py, RandAugmentMC(n=2, m=10).
    "randaugment-kekmodel": Flavour(
        "kekmodel/FixMatch-pytorch: RandAugmentMC(2, 10)",
        2,
        _KEKMODEL,
        Box(16, 16, relative=False, anchor="corner", fill=_GREY),
        probability=0.5,
        levels=9,
    ),
}
# Operations for which FixMatch's code drops transparency: what lies outside is black from then on.
OPAQUE = ("AutoContrast", "Equalize", "Posterize", "Solarize")


class Ranges(nn.Module):
    """A table of `Range`s as tensors: from drawn rows and levels to codes and magnitudes."""

    def __init__(self, ranges: tuple[Range, ...]):
        super().__init__()
        self.names = tuple(row.operation for row in ranges)
        columns = {
            "code": [CODE[row.operation] for row in ranges],
            "low": [row.low for row in ranges],
            "span": [row.high - row.low for row in ranges],
            "share": [[row.side == side for row in ranges] for side in ("", "x", "y", "xy")],
            "trunc": [row.whole == "trunc" for row in ranges],
            "round": [row.whole == "round" for row in ranges],
            "signed": [row.signed for row in ranges],
        }
        for name, values in columns.items():
            values = torch.tensor(values, dtype=torch.float64 if name in ("low", "span", "share") else None)
            self.register_buffer(name, values, persistent=False)

    def forward(
        self, row: Tensor, level: Tensor, negative: Tensor, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Codes int64 and magnitudes float64, in the shape of `row`.

        row: int64, rows of the table; level: in [0, 1]; negative: bool, the sign where the row draws one.
        """
        one, x, y, smaller = self.share
        side = (one + x * width + y * height + smaller * min(width, height))[row]
        amount = self.span[row] * level.double() * side
        amount = torch.where(self.trunc[row], amount.trunc(), amount)
        low = self.low[row] * torch.where(self.trunc[row], 1.0, side)
        magnitude = low + amount
        magnitude = torch.where(self.round[row], magnitude.round(), magnitude)
        return self.code[row], torch.where(self.signed[row] & negative, -magnitude, magnitude)


class RandAugment(nn.Module):
    """A flavour of RandAugment with its Cutout, drawn for each image.

    flavour: a `Flavour` or a name of FLAVOURS. dense: see `operations.apply`.
    Raises ValueError for an unknown name.
    """

    def __init__(self, flavour: Flavour | str, dense: bool | None = None):
        super().__init__()
        if isinstance(flavour, str) and flavour not in FLAVOURS:
            raise ValueError(f"no RandAugment flavour named {flavour!r}; choose one of {sorted(FLAVOURS)}")
        self.flavour = FLAVOURS[flavour] if isinstance(flavour, str) else flavour
        self.dense = dense
        self.ranges = Ranges(self.flavour.ranges)
        self.register_buffer("opaque", torch.tensor([CODE[name] for name in OPAQUE]), persistent=False)
        if self.flavour.box is not None:
            fill = torch.tensor(self.flavour.box.fill, dtype=torch.uint8)
            self.register_buffer("fill", fill, persistent=False)

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator | None = None):
        """Codes int64 and magnitudes float64, both (count, batch): what `forward` applies, in order."""
        flavour, device = self.flavour, self.ranges.code.device
        uniform = torch.rand(flavour.count, 4, batch, generator=generator, device=device)
        row, level, applied, sign = uniform.unbind(1)
        row = (row * len(flavour.ranges)).long()
        if flavour.levels:
            level = ((level * flavour.levels).floor() + 1).double() / 10
        code, magnitude = self.ranges(row, level, sign < 0.5, height, width)
        return torch.where(applied < flavour.probability, code, CODE["Identity"]), magnitude

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images: uint8 (B, C, H, W), C = 1 or 3. Returns the same shape."""
        codes, magnitudes = self.draw(len(images), *images.shape[2:], generator=generator)
        augmented = pil_ops.apply(images, codes, magnitudes, dense=self.dense, among=self.ranges.names)
        if self.flavour.outside is not None:
            opacity = self._opacity(images, codes, magnitudes)
            augmented = (augmented & opacity) | (~opacity & self.flavour.outside)
        if self.flavour.box is None:
            return augmented
        return cut_out(augmented, self.flavour.box, self.fill, generator)

    def _opacity(self, images: Tensor, codes: Tensor, magnitudes: Tensor) -> Tensor:
        """uint8 (B, 1, H, W): 0 for pixels from outside that no operation has made opaque since, else 255."""
        opacity = torch.full_like(images[:, :1], 255)
        (moves,) = pil_ops.prepare_affine(codes, magnitudes, None, *images.shape[2:])
        opaque = torch.isin(codes, self.opaque).to(torch.uint8)[..., None, None, None] * 255
        for move, solid in zip(moves, opaque, strict=True):
            opacity = pil_ops.affine(opacity, move) | solid
        return opacity


def cut_out(images: Tensor, box: Box, fill: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Paint one box, drawn by the rules of `Box`, into each image.

    images: uint8 (B, C, H, W); fill: uint8 (3,), used channel by channel, or its rounded mean for one
        channel.
    """
    b, c, height, width = images.shape
    side, x, y = torch.rand(3, b, generator=generator, device=images.device).double()
    side = (box.low + (box.high - box.low) * side) * (width if box.relative else 1)
    x, y = x * width, y * height
    if box.anchor == "corner":
        left, top = (x - side / 2).clamp(min=0).long(), (y - side / 2).clamp(min=0).long()
        right, bottom = (left + side).long() + 1, (top + side).long() + 1
    else:
        half, x, y = side.long() // 2, x.long(), y.long()
        left, top, right, bottom = x - half, y - half, x + half, y + half
    right = torch.where(side > 0, right, left)
    fill = fill if c == 3 else fill.float().mean(0, keepdim=True).round().to(torch.uint8)
    return pil_ops.fill_box(images, left, top, right, bottom, fill)
