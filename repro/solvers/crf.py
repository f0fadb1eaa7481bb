"""Dense CRF: its loss with a Gaussian bilateral kernel between all pairs of pixels, and inference after training.

    L = -1 / B sum_k S_k^T K S_k,    K_pq = exp(-||I_p - I_q||^2 / (2 sigma_rgb^2) - ||p - q||^2 / (2 sigma_xy^2))

L is the bilinear Potts energy sum_k S_k^T K (1 - S_k) less 1^T K 1, which S cannot change. The released code filters
by a permutohedral lattice; here all pairs are summed, quadratic in the pixels. Source of loss, settings and gradient:
rloss (Tang et al., 2018).

Inference is the mean field of Kraehenbuehl & Koltun (2011) with two kernels, one of positions alone: `mean_field` is
exact and meant for small images, `lattice_crf` uses the permutohedral lattice of the optional package pydensecrf2.
"""

import importlib.util
from dataclasses import dataclass, replace
from math import e, log2

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from repro.arrays import at_least_float32
from repro.settings import check, hyper

CHUNK = 2**22  # entries of K at a time
EXACT_PIXELS = 96**2  # of an image whose whole kernel is held in memory, 340 MB in single precision
ROWS = 128  # of that kernel at a time while it is made, so that they stay in the cache
CLIP = 1e-5  # least probability, as in the released evaluators
FAINT = -100.0  # least exponent of 2; far below rounding, and smaller numbers take many times as long
INSTALL = "pip install pydensecrf2"


def dense_crf_loss(
    probs: Tensor, images: Tensor, roi: Tensor | None = None, sigma_rgb: float = 15.0, sigma_xy: float = 100.0,
    downscale: float = 0.5,
) -> Tensor:  # fmt: skip
    """L, a scalar, not positive. A sum over all pairs: the released weight of 2e-9 belongs to crops of 513 pixels.

    probs: (B, C, H, W), S. images: (B, 3, H, W), channels in 0..255, where sigma_rgb is 15. roi: (B, H, W) bool,
        False on padding, whose S counts as 0; None for all.
    sigma_xy: in pixels of the given size. downscale: factor in (0, 1] of S (bilinear), image and roi (nearest), and
        sigma_xy, as released.
    Each pair counts both ways and each pixel with itself. Raises ValueError for values out of range.
    """
    if not (sigma_rgb > 0 and sigma_xy > 0 and 0 < downscale <= 1):
        raise ValueError(
            f"sigma_rgb {sigma_rgb} and sigma_xy {sigma_xy} must be positive and downscale {downscale} in (0, 1]"
        )
    with torch.autocast(probs.device.type, enabled=False):
        probs = at_least_float32(probs)
        images = at_least_float32(images).detach().to(probs.dtype)
        roi = probs.new_ones(probs[:, :1].shape) if roi is None else roi[:, None].to(probs.dtype)
        if downscale < 1:
            probs = F.interpolate(probs, scale_factor=downscale, mode="bilinear", align_corners=False)
            images, roi = (F.interpolate(values, scale_factor=downscale) for values in (images, roi))
        return SelfProduct.apply(probs * roi, images / sigma_rgb, sigma_xy * downscale) / len(probs)


class SelfProduct(torch.autograd.Function):
    """-sum_bk S_k^T K S_k, whose gradient -2 K S needs no second filtering since K is symmetric."""

    @staticmethod
    def forward(ctx, probs: Tensor, colours: Tensor, sigma_xy: float) -> Tensor:
        filtered = filter_exact(probs, colours, sigma_xy)
        ctx.save_for_backward(filtered)
        return -(probs * filtered).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (filtered,) = ctx.saved_tensors
        return -2 * gradient * filtered, None, None


def points_of(colours: Tensor, sigma_xy: float) -> Tensor:
    """(B, H W, channels + 2): the points whose squared distances, halved, are the exponents of K."""
    height, width = colours.shape[-2:]
    rows = torch.arange(height, device=colours.device, dtype=colours.dtype) / sigma_xy
    columns = torch.arange(width, device=colours.device, dtype=colours.dtype) / sigma_xy
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(colours), -1, -1, -1)
    return torch.cat([colours, place], 1).flatten(2).transpose(1, 2)


def filter_exact(values: Tensor, colours: Tensor, sigma_xy: float) -> Tensor:
    """K S (B, C, H, W) of values (B, C, H, W) and colours over sigma_rgb (B, 3, H, W), some rows of K at a time."""
    points, flat = points_of(colours, sigma_xy), values.flatten(2).transpose(1, 2)
    filtered = []
    for part in points.split(max(1, CHUNK // max(1, points.shape[0] * points.shape[1])), 1):
        # the form by a matrix product cancels for near points
        distance = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        filtered.append((distance.square() / -2).exp() @ flat)
    return torch.cat(filtered, 1).transpose(1, 2).reshape(values.shape)


@dataclass(frozen=True)
class CRF:
    """Kernels of the inference; defaults are ToCo's and DuPL's. xy: in pixels, rgb: in levels of 0..255."""

    position_weight: float = hyper(1.0, source="ToCo, DuPL, PCRE: of the kernel of positions", low=0)
    position_xy: float = hyper(1.0, source="ToCo, DuPL: its width; PCRE 2 on VOC", low=1e-3)
    weight: float = hyper(4.0, source="ToCo, DuPL: of the bilateral kernel; PCRE 7", low=0)
    xy: float = hyper(121.0, source="ToCo, DuPL: its width in space; PCRE 140", low=1e-3)
    rgb: float = hyper(5.0, source="ToCo, DuPL: its width in colour; PCRE 1", low=1e-3)
    iterations: int = hyper(10, source="ToCo, DuPL, PCRE", low=0)

    def __post_init__(self):
        check(self)

    def scaled(self, factor: float) -> "CRF":
        """The same for images `factor` times as large: widths in space follow, colours and weights stay (ours)."""
        return replace(self, position_xy=self.position_xy * factor, xy=self.xy * factor)


def has_lattice() -> bool:
    """Whether pydensecrf2 is installed."""
    return importlib.util.find_spec("pydensecrf") is not None


@torch.no_grad()
def mean_field(probs: Tensor, images: Tensor, crf: CRF = CRF()) -> Tensor:
    """Probabilities (B, K, H, W) after exact inference: quadratic in the pixels in time and memory, image by image.

        Q <- softmax_k( log p + sum_m w_m N_m Q ),    N_m = D_m^(-1/2) K_m D_m^(-1/2),    D_m = diag(K_m 1)

    probs: (B, K, H, W), softmax. images: (B, 3, H, W) uint8.
    It starts from Q = p, with p clipped at 1e-5 from below; K_1 = exp(-|p - q|^2 / (2 xy^2)) and
    K_2 is the bilateral K. A pixel sends to itself as well. At least float32. Raises ValueError for other images.
    Source: the released library, whose lattice approximates K and sums.
    """
    if images.dtype != torch.uint8 or images.shape != (len(probs), 3, *probs.shape[2:]):
        raise ValueError(
            f"a dense CRF of probabilities {tuple(probs.shape)} needs uint8 images (B, 3, H, W) of their size, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    # neither the exact differences of colours nor K may be rounded to half precision
    with torch.autocast(probs.device.type, enabled=False):
        probs = at_least_float32(probs)
        down, across = (normalised(apart(side, probs), crf.position_xy) for side in probs.shape[2:])
        # one buffer for all images: a fresh one costs as much as the kernel
        kernel = probs.new_empty(probs.shape[2] * probs.shape[3], probs.shape[2] * probs.shape[3])
        found = []
        for unary, image in zip(probs.clamp(CLIP, 1).log(), images, strict=True):
            fill_bilateral(kernel, image, crf)
            found.append(settled(unary, kernel, down, across, crf))
        return torch.stack(found) if found else probs


def settled(unary: Tensor, kernel: Tensor, down: Tensor, across: Tensor, crf: CRF) -> Tensor:
    """Q (K, H, W) of log probabilities (K, H, W), K_2 (H W, H W), and N_1's factors (H, H) and (W, W)."""
    share, found = kernel.sum(1).rsqrt(), unary.softmax(0)
    for _ in range(crf.iterations):
        # K_2 is symmetric, and a wide product on this side is the faster one
        sent = ((found.flatten(1) * share) @ kernel * share).view_as(found)
        found = (unary + crf.weight * sent + crf.position_weight * (down @ found @ across)).softmax(0)
    return found


def fill_bilateral(kernel: Tensor, image: Tensor, crf: CRF) -> None:
    """Write K_2 of an image (3, H, W) uint8 into kernel (H W, H W). Squared differences of whole numbers are exact, so
    near colours are not lost in the product that makes them."""
    height, width = image.shape[1:]
    colours = image.flatten(1).mT.to(kernel)
    square, one = colours.square().sum(1, keepdim=True), torch.ones_like(colours[:, :1])
    left, right = torch.cat([-2 * colours, square, one], 1), torch.cat([colours, one, square], 1).mT.contiguous()
    rows, columns = (apart(side, kernel) * (-log2(e) / (2 * crf.xy**2)) for side in (height, width))
    step = max(1, ROWS // width)
    for first in range(0, height, step):
        last = min(first + step, height)
        part = kernel[first * width : last * width]
        torch.mm(left[first * width : last * width], right, out=part)
        part.mul_(-log2(e) / (2 * crf.rgb**2))
        part = part.view(last - first, width, height, width)
        part.add_(rows[first:last, None, :, None]).add_(columns[None, :, None]).clamp_(min=FAINT).exp2_()


def apart(side: int, like: Tensor) -> Tensor:
    """Squared distances (side, side) along an axis, in pixels."""
    places = torch.arange(side, dtype=like.dtype, device=like.device)
    return (places[:, None] - places).square()


def normalised(distance: Tensor, sigma: float) -> Tensor:
    """D^(-1/2) K D^(-1/2) along an axis; the kernel of positions is the product of those of both axes."""
    kernel = (distance / (-2 * sigma**2)).exp()
    share = kernel.sum(1).rsqrt()
    return share[:, None] * kernel * share


def lattice_crf(probs: np.ndarray, image: np.ndarray, crf: CRF = CRF()) -> np.ndarray:
    """`mean_field` of one image by pydensecrf2's lattice, (K, H, W) float32. Arrays, so that it runs in processes.

    probs: (K, H, W). image: (H, W, 3) uint8. Raises ModuleNotFoundError, which says how to install it.
    """
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ModuleNotFoundError(
            f"a dense CRF of {image.shape[1]} x {image.shape[0]} pixels needs pydensecrf2: {INSTALL}. Images up to "
            f"{EXACT_PIXELS:,} pixels need no package"
        ) from error
    classes, height, width = probs.shape
    field = DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(probs.clip(CLIP, 1)).reshape(classes, -1), dtype=np.float32))
    field.addPairwiseGaussian(sxy=crf.position_xy, compat=crf.position_weight)
    field.addPairwiseBilateral(sxy=crf.xy, srgb=crf.rgb, rgbim=np.ascontiguousarray(image), compat=crf.weight)
    return np.array(field.inference(crf.iterations), dtype=np.float32).reshape(probs.shape)
