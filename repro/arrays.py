"""Array types that data, methods and measurements share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE = 255  # the label of pixels that no loss and no score counts


@dataclass(frozen=True)
class Items:
    """Samples of one stream: pool indices (n,), images (n, C, H, W) uint8, labels (n, ...), hidden ones -1.

    Of masks: labels (n, H, W) uint8, 255 where hidden or void, 254 where a loader padded.
    """

    index: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PseudoLabels:
    """What a method selected in one step, for reporting against hidden labels.

    index: (U,) pool indices.
    label, mask, confidence: (U,) positives: class, selected, its probability; or (U, K) negatives, where `label`
        is the class number, `mask` marks classes held to be wrong and confidence is 1 - p.
    """

    index: Tensor
    label: Tensor
    mask: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class PixelLabels:
    """Pseudo-labels of the pixels of crops, for reporting against hidden masks.

    index: (B,) pool indices. label: (B, S, S) classes. weight: (B, S, S) in [0, 1] or bool. confidence: (B, S, S).
    valid: (B, S, S) bool, not padding. window: a `data.mask_views.Window`, which moves hidden masks to the crops.
    """

    index: Tensor
    label: Tensor
    weight: Tensor
    confidence: Tensor
    valid: Tensor
    window: Any


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in their own type where it is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
