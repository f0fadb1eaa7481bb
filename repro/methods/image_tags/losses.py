"""Losses of the image-tag methods on tags, regions and pixels, and the fusion of CAMs with regions.

Everything is computed in float32 at least, also under autocast. Scalars are 0 where nothing counts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repro.cam import widened
from repro.data.masks import IGNORE
from repro.methods.image_tags.regions import Pairs
from repro.solvers.crf import filter_exact

GRADIENTS = ("released", "exact")


def tag_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """L_cls, multi-label soft margin: binary cross-entropy of sigmoid(logits), mean over images and classes.

    logits, tags: (B, C). Source: released codes.
    """
    return F.binary_cross_entropy_with_logits(widened(logits), tags.to(widened(logits).dtype))


def confidence_loss(score: Tensor, tags: Tensor) -> Tensor:
    """L_conf, binary cross-entropy of scores in [0, 1], mean over images and classes.

    score: (B, C) of `regions.image_score`; tags: (B, C). Logarithms end at -100. Source: PCRE (released code).
    """
    return bounded_cross_entropy(score, tags).mean()


def refine_loss(masks: Tensor, found: Tensor, pairs: Pairs, labels: Tensor) -> Tensor:
    """L_refine: binary cross-entropy of m_r with 1[Y_p = c], mean over pixels, summed over pairs, over their number.

    masks: m_r (B, A, H, W) in [0, 1], behind the radius gate. found: (B, A) bool, pairs that had a candidate: the
        others add nothing to the sum, but count among the pairs. pairs: of `regions.shown_classes`.
    labels: Y_p (B, H, W), the refined label map of the prototypes' CAM; 255 counts as another class.
    Source: PCRE (released code).
    """
    target = labels.long()[:, None] == (pairs.classes + 1)[:, :, None, None]
    loss = bounded_cross_entropy(masks, target).mean((2, 3))
    return (loss * (found & pairs.shown)).sum() / pairs.shown.sum().clamp(min=1)


def bounded_cross_entropy(probs: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of each probability, at most 100; target is 0 or 1, of any type."""
    with torch.autocast(probs.device.type, enabled=False):  # under autocast this loss is refused
        probs = widened(probs)
        return F.binary_cross_entropy(probs, target.to(probs.dtype), reduction="none")


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L_seg: half the mean cross-entropy over background pixels and half that over all foreground pixels.

    logits: (B, K, H, W); labels: (B, H, W) integers in [0, K) or 255, which no mean sees.
    Means are sums over (count + 1e-6), so a side without pixels is 0. Source: DuPL and PCRE (released codes); ToCo's
    is NaN then.
    """
    labels = labels.long()
    loss = F.cross_entropy(widened(logits), labels, ignore_index=IGNORE, reduction="none")
    sides = labels == 0, (labels != 0) & (labels != IGNORE)
    back, front = (torch.where(side, loss, 0).sum() / (side.sum(dtype=loss.dtype) + 1e-6) for side in sides)
    return 0.5 * back + 0.5 * front


def fused(cam: Tensor, regions: Tensor, share: float = 0.3) -> Tensor:
    """(1 - alpha) CAM_c + alpha Mbar_c; the CAM itself where the region is empty (its sum at most 1e-5).

    cam: (B, C, H, W) in [0, 1]. regions: Mbar (B, C, H, W) in [0, 1], not gated, through `repro.cam.multi_scale_cam`.
    share: alpha, .3 in the released code; the overview figure says mean fusion, .5.
    Source: PCRE (released code), also of the exception.
    """
    some = regions.sum((2, 3), keepdim=True) > 1e-5
    return torch.where(some, (1 - share) * cam + share * regions, cam)


def dense_energy(
    probs: Tensor, images: Tensor, labels: Tensor, roi: Tensor | None = None, sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0, downscale: float = 0.5, gradient: str = "released",
) -> Tensor:  # fmt: skip
    """L_reg, the gated dense CRF energy, a scalar, not positive; the released weight is 1e-7 at 448 x 448 pixels.

    K is exact between all pixels, quadratic in their number; released codes filter by a permutohedral lattice.
    probs: p (B, K, H, W), softmax of the head. images: (B, 3, H, W), channels in 0..255. labels: (B, H, W) or 255.
    roi: (B, H, W) bool, False on padding; None for all. gradient: of `gated_energy`.
    sigma_xy: in pixels of the given size. downscale: factor in (0, 1] of all maps and of sigma_xy; p is resized
        bilinearly, the others by the nearest pixel.
    Source: ToCo and PCRE (released codes); DuPL has none.
    """
    with torch.autocast(probs.device.type, enabled=False):
        probs = widened(probs)
        images = images.to(probs.dtype)
        roi = torch.ones_like(probs[:, :1]) if roi is None else roi[:, None].to(probs.dtype)
        known = labels[:, None].to(probs.dtype)
        if downscale < 1:
            probs = F.interpolate(probs, scale_factor=downscale, mode="bilinear", align_corners=False)
            images, roi, known = (F.interpolate(values, scale_factor=downscale) for values in (images, roi, known))
        gate = energy_gate(probs, known[:, 0] == IGNORE, roi[:, 0])
        colours, width = images / sigma_rgb, sigma_xy * downscale
        return gated_energy(probs * roi, gate, lambda values: filter_exact(values, colours, width), gradient)


def energy_gate(probs: Tensor, ignored: Tensor, roi: Tensor) -> Tensor:
    """Gate (B, H, W) in [0, 1] without gradient: 1 at ignored pixels, else max(0, roi - max_k p_k).

    probs: (B, K, H, W). ignored: (B, H, W) bool. roi: (B, H, W), 1 inside the image. Source: ToCo (released code).
    """
    return (roi - probs.detach().amax(1)).clamp(min=0).masked_fill(ignored, 1)


def gated_energy(probs: Tensor, gate: Tensor, smooth: Callable[[Tensor], Tensor], gradient: str = "released") -> Tensor:
    """E = -1 / B sum p gate (K p), a scalar.

    probs: p (B, K, H, W), 0 outside the image. gate: (B, H, W). smooth: p to K p, the same shape, K symmetric.
    gradient: `released`, -2 gate (K p) / B, which is that of E for a gate that is 1 everywhere; `exact`, that of E for
        the gate it has, -(gate (K p) + K (gate p)) / B, through `smooth` (ours).
    Raises ValueError for another gradient.
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}; it must be one of {', '.join(map(repr, GRADIENTS))}")
    gate = gate[:, None]
    if gradient == "exact":
        return -(probs * gate * smooth(probs)).sum() / len(probs)
    with torch.no_grad():
        slope = gate * smooth(probs)
    energy = (probs * slope).sum() / len(probs)
    return energy.detach() - 2 * energy
