"""The views that semi-supervised methods train on, drawn on the device for each image.

Images enter as uint8 (B, C, H, W), C = 1 or 3, and leave normalised. On the CPU a strong view costs tens of
microseconds a 32 x 32 image; see tests/benchmarks/bench_augment.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from repro.data import ctaugment, randaugment
from repro.data.ctaugment import CTAugment, CTPolicy
from repro.data.pil_ops import take
from repro.data.randaugment import Flavour, RandAugment


def crop_and_flip(
    images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None
) -> Tensor:
    """A random crop of the image padded by reflection, then a horizontal flip of half of the images.

    images: uint8 (B, C, H, W).
    padding: pixels on each side, below H and W; offsets are uniform in 0..2 * padding.
    flip: False for digits and letters.
    Source: USB, TorchSSL (both flip SVHN too), FixMatch's code (does not).
    """
    b, _, height, width = images.shape
    down, right, mirrored = torch.rand(3, b, 1, generator=generator, device=images.device)
    row = torch.arange(height, device=images.device) + (down * (2 * padding + 1)).long() - padding
    column = torch.arange(width, device=images.device)
    if flip:
        column = torch.where(mirrored < 0.5, width - 1 - column, column)
    column = column + (right * (2 * padding + 1)).long() - padding
    row, column = _reflect(row, height), _reflect(column, width)
    return take(images, row[:, :, None] * width + column[:, None])


def _reflect(index: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - index.abs()).abs()


def normalise(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(images / 255 - mean) / std, in channels_last memory format for three channels.

    images: uint8 (B, C, H, W); mean, std: (C,), fractions of 1.
    """
    b, c, h, w = images.shape
    factor, shift = 1 / (255 * std), -mean / std
    # Channels last first, while a pixel is one byte; then the constants of a whole row, for long inner loops.
    rows = images.permute(0, 2, 3, 1).reshape(b * h, w * c)
    rows = rows.to(factor.dtype).mul_(factor.repeat(w)).add_(shift.repeat(w)).to(dtype)
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


class Views(nn.Module):
    """Makes the views of a batch. All random numbers come from `generator`.

    mean, std: one value a channel, fractions of 1. flip: False for digits.
    strong: a name in STRONG, a `Flavour` or a `CTPolicy`.
    padding: of the random crop, pixels (an eighth of the side in the published recipes).
    generator: on the images' device; None: the device's default generator. Its state belongs to the caller's
        checkpoint.
    dtype: of the views. dense: see `operations.apply`; same numbers either way.
    Raises ValueError for unknown flavours, mean and std of different or other lengths than 1 or 3, std <= 0.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool,
        strong: str | Flavour | CTPolicy = "randaugment-usb",
        padding: int = 4,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        dense: bool | None = None,
    ):
        super().__init__()
        if len(mean) != len(std) or len(mean) not in (1, 3):
            raise ValueError(f"mean {mean} and std {std} need one value a channel, for 1 or 3 channels")
        if min(std) <= 0 or max(*mean, *std) > 1:
            raise ValueError(
                f"mean {mean} and std {std} must be fractions of 1, std above 0: divide 0..255 by 255"
            )
        if isinstance(strong, str) and strong not in STRONG:
            raise ValueError(f"no strong augmentation named {strong!r}; choose one of {STRONG}")
        self.flip, self.padding, self.generator, self.dtype = flip, padding, generator, dtype
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)
        learned = isinstance(strong, CTPolicy) or strong in ctaugment.FLAVOURS
        self.policy = (CTAugment if learned else RandAugment)(strong, dense=dense)
        self.single = RandAugment("randaugment-usb-medium", dense=dense)

    def plain(self, images: Tensor) -> Tensor:
        """Normalised images: what is evaluated. images: uint8 (B, C, H, W); so for all views."""
        return normalise(images, self.mean, self.std, self.dtype)

    def weak(self, images: Tensor) -> Tensor:
        """Random crop and flip."""
        return self.plain(self._moved(images))

    def medium(self, images: Tensor) -> Tensor:
        """Weak, then USB's single operation and Cutout, whatever `strong` is: a view of ReMixMatch."""
        return self.plain(self.single(self._moved(images), self.generator))

    def strong(self, images: Tensor) -> Tensor:
        """Weak, then the flavour's operations, then its Cutout."""
        return self.plain(self.policy(self._moved(images), self.generator))

    @torch.no_grad()
    def learn(self, predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        """Update CTAugment's rates from labelled images; for RandAugment nothing happens, nothing is drawn.

        predict: normalised (B, C, H, W) -> probs (B, K); in FixMatch's code the averaged weights, evaluating.
        images: uint8 (B, C, H, W), labelled; labels: int64 (B,).
        """
        if isinstance(self.policy, CTAugment):
            probes, drawn = self.policy.probe(self._moved(images), self.generator)
            self.policy.update(drawn, predict(self.plain(probes)), labels)

    def _moved(self, images: Tensor) -> Tensor:
        b, c, h, w = images.shape
        if images.dtype != torch.uint8 or c != len(self.mean):
            raise ValueError(
                f"views need uint8 images of {len(self.mean)} channels, got {images.dtype} with {c}"
            )
        if self.padding >= min(h, w):
            raise ValueError(
                f"padding {self.padding} must be below the sides {h} x {w}: reflection needs the pixels"
            )
        if self.generator is not None and self.generator.device.type != images.device.type:
            raise ValueError(
                f"images are on {images.device}, the generator on {self.generator.device}: use one device"
            )
        return crop_and_flip(images, self.padding, self.flip, self.generator)


STRONG = (*randaugment.FLAVOURS, *ctaugment.FLAVOURS)
