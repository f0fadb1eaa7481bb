"""RandAugment's flavours as data, and the drawing of operations, magnitudes and Cutout boxes.

Each flavour is a `Flavour` below, read from the code it names. Operations are drawn uniformly with replacement,
for each image, and all of them are applied.
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
    """

    operation: str
    low: float = 1.0
    high: float = 1.0
    whole: str = ""
    side: str = ""


@dataclass(frozen=True)
class Box:
    """Cutout after the operations, centred at a uniform point that is moved so that the top-left corner lies inside.

    The box reaches `side` pixels from that corner, ends included (side + 1 pixels), and is cut at the right and
    bottom border.
    low, high: the side is uniform in [low, high), in widths of the image.
    fill: a level for each of red, green and blue. Images of one channel take the rounded mean (chosen here; no code
        has them).
    """

    low: float
    high: float
    fill: tuple[int, int, int]


@dataclass(frozen=True)
class Flavour:
    """Everything that a public code decides.

    count: operations an image.
    """

    source: str
    count: int
    ranges: tuple[Range, ...]
    box: Box | None


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


# USB and TorchSSL: uniform in ranges that hold both signs.
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
_USB_BOX = Box(0.0, 0.5, fill=(125, 123, 114))

FLAVOURS = {
    # microsoft/Semi-supervised-learning, semilearn/datasets/augmentation/randaugment.py, RandAugment(3, 5);
    # the same as TorchSSL, datasets/augmentation/randaugment.py. The second argument, a global magnitude, is
    # never used there.
    "randaugment-usb": Flavour("USB, TorchSSL: RandAugment(3, 5)", 3, _USB, _USB_BOX),
    # USB's transform_medium, RandAugment(1, 5): one operation, Cutout as ever.
    "randaugment-usb-medium": Flavour("USB: RandAugment(1, 5)", 1, _USB, _USB_BOX),
}


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
        }
        for name, values in columns.items():
            values = torch.tensor(values, dtype=torch.float64 if name in ("low", "span", "share") else None)
            self.register_buffer(name, values, persistent=False)

    def forward(self, row: Tensor, level: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Codes int64 and magnitudes float64, in the shape of `row`.

        row: int64, rows of the table; level: in [0, 1].
        """
        one, x, y, smaller = self.share
        side = (one + x * width + y * height + smaller * min(width, height))[row]
        amount = self.span[row] * level.double() * side
        amount = torch.where(self.trunc[row], amount.trunc(), amount)
        low = self.low[row] * torch.where(self.trunc[row], 1.0, side)
        magnitude = low + amount
        return self.code[row], torch.where(self.round[row], magnitude.round(), magnitude)


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
        if self.flavour.box is not None:
            fill = torch.tensor(self.flavour.box.fill, dtype=torch.uint8)
            self.register_buffer("fill", fill, persistent=False)

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator | None = None):
        """Codes int64 and magnitudes float64, both (count, batch): what `forward` applies, in order."""
        flavour, device = self.flavour, self.ranges.code.device
        uniform = torch.rand(flavour.count, 4, batch, generator=generator, device=device)
        row, level, *_ = uniform.unbind(1)  # two draws stay unused, so that a seed keeps its images
        return self.ranges((row * len(flavour.ranges)).long(), level, height, width)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """images: uint8 (B, C, H, W), C = 1 or 3. Returns the same shape."""
        codes, magnitudes = self.draw(len(images), *images.shape[2:], generator=generator)
        augmented = pil_ops.apply(images, codes, magnitudes, dense=self.dense, among=self.ranges.names)
        if self.flavour.box is None:
            return augmented
        return cut_out(augmented, self.flavour.box, self.fill, generator)

def cut_out(images: Tensor, box: Box, fill: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Paint one box, drawn by the rules of `Box`, into each image.

    images: uint8 (B, C, H, W); fill: uint8 (3,), used channel by channel, or its rounded mean for one
        channel.
    """
    b, c, height, width = images.shape
    side, x, y = torch.rand(3, b, generator=generator, device=images.device).double()
    side = (box.low + (box.high - box.low) * side) * width
    x, y = x * width, y * height
    left, top = (x - side / 2).clamp(min=0).long(), (y - side / 2).clamp(min=0).long()
    right, bottom = (left + side).long() + 1, (top + side).long() + 1
    right = torch.where(side > 0, right, left)
    fill = fill if c == 3 else fill.float().mean(0, keepdim=True).round().to(torch.uint8)
    return pil_ops.fill_box(images, left, top, right, bottom, fill)
