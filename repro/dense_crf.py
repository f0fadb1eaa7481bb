"""Dense CRF loss with a Gaussian bilateral kernel between all pairs of pixels (rloss), and two cheaper kernels.

    L = -1 / B sum_k S_k^T K S_k,    K_pq = exp(-||I_p - I_q||^2 / (2 sigma_rgb^2) - ||p - q||^2 / (2 sigma_xy^2))

It is the bilinear Potts energy sum_k S_k^T K (1 - S_k) less 1^T K 1, which S cannot change. The released code filters
by a permutohedral lattice. Here: "exact", all pairs, quadratic in the pixels; "windowed", pairs within a square
window, another and more local regulariser; "sampled", all pixels against a random part of them, unbiased but noisy.
Sources: rloss (Tang et al., 2018) for loss, settings and gradient; windows and samples are ours.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FORMS = ("exact", "windowed", "sampled")
CHUNK = 2**22  # entries of K at a time


def dense_crf_loss(
    probs: Tensor, images: Tensor, roi: Tensor | None = None, sigma_rgb: float = 15.0, sigma_xy: float = 100.0,
    downscale: float = 0.5, form: str = "exact", radius: int = 10, samples: int = 1024,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """L, a scalar, not positive. A sum over all pairs: the released weight of 2e-9 belongs to crops of 513 pixels.

    probs: (B, C, H, W), S. images: (B, 3, H, W), channels in 0..255, where sigma_rgb is 15. roi: (B, H, W) bool,
        False on padding, whose S counts as 0; None for all.
    sigma_xy: in pixels of the given size. downscale: factor in (0, 1] of S (bilinear), image and roi (nearest), and
        sigma_xy, as released.
    form: "exact"; "windowed", pairs at most `radius` rows and columns apart; "sampled", against `samples` pixels
        drawn without replacement from `generator` (of the probabilities' device), scaled so that value and gradient
        are unbiased. All count each pair both ways and each pixel with itself.
    Raises ValueError for another form or values out of range.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    if not (sigma_rgb > 0 and sigma_xy > 0 and 0 < downscale <= 1 and radius >= 0 and samples >= 1):
        raise ValueError(
            f"sigma_rgb {sigma_rgb} and sigma_xy {sigma_xy} must be positive, downscale {downscale} in (0, 1], radius "
            f"{radius} not negative and samples {samples} positive"
        )
    with torch.autocast(probs.device.type, enabled=False):
        probs, images = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (probs, images))
        images = images.detach().to(probs.dtype)
        roi = probs.new_ones(probs[:, :1].shape) if roi is None else roi[:, None].to(probs.dtype)
        if downscale < 1:
            probs = F.interpolate(probs, scale_factor=downscale, mode="bilinear", align_corners=False)
            images, roi = (F.interpolate(values, scale_factor=downscale) for values in (images, roi))
        probs = probs * roi
        features = images / sigma_rgb, sigma_xy * downscale
        if form == "sampled":
            return sampled(probs, *features, samples, generator) / len(probs)
        return SelfProduct.apply(probs, *features, radius if form == "windowed" else None) / len(probs)


class SelfProduct(torch.autograd.Function):
    """-sum_bk S_k^T K S_k, whose gradient -2 K S needs no second filtering since K is symmetric."""

    @staticmethod
    def forward(ctx, probs: Tensor, colours: Tensor, sigma_xy: float, radius: int | None) -> Tensor:
        if radius is None:
            filtered = filter_exact(probs, colours, sigma_xy)
        else:
            filtered = filter_windowed(probs, colours, sigma_xy, radius)
        ctx.save_for_backward(filtered)
        return -(probs * filtered).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (filtered,) = ctx.saved_tensors
        return -2 * gradient * filtered, None, None, None


def points_of(colours: Tensor, sigma_xy: float) -> Tensor:
    """(B, H W, channels + 2): the points whose squared distances, halved, are the exponents of K."""
    height, width = colours.shape[-2:]
    rows = torch.arange(height, device=colours.device, dtype=colours.dtype) / sigma_xy
    columns = torch.arange(width, device=colours.device, dtype=colours.dtype) / sigma_xy
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(len(colours), -1, -1, -1)
    return torch.cat([colours, place], 1).flatten(2).transpose(1, 2)


def kernel(here: Tensor, there: Tensor) -> Tensor:
    """K (B, n, m) between points (B, n, D) and (B, m, D)."""
    distance = torch.cdist(here, there, compute_mode="donot_use_mm_for_euclid_dist")  # the other cancels when near
    return (distance.square() / -2).exp()


def filter_exact(values: Tensor, colours: Tensor, sigma_xy: float) -> Tensor:
    """K S (B, C, H, W) of values (B, C, H, W) and colours over sigma_rgb (B, 3, H, W), some rows of K at a time."""
    points, flat = points_of(colours, sigma_xy), values.flatten(2).transpose(1, 2)
    rows = max(1, CHUNK // max(1, points.shape[0] * points.shape[1]))
    parts = [kernel(part, points) @ flat for part in points.split(rows, 1)]
    return torch.cat(parts, 1).transpose(1, 2).reshape(values.shape)


def filter_windowed(values: Tensor, colours: Tensor, sigma_xy: float, radius: int) -> Tensor:
    """`filter_exact` with K_pq = 0 unless p and q are at most `radius` rows and columns apart."""
    height, width = values.shape[-2:]
    result = values.clone()  # K_pp = 1
    for down in range(min(radius, height - 1) + 1):
        for right in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if (down, right) <= (0, 0):
                continue  # each unordered pair once
            p = (..., slice(0, height - down), slice(max(0, -right), width - max(0, right)))
            q = (..., slice(down, height), slice(max(0, right), width - max(0, -right)))
            exponent = (colours[p] - colours[q]).square().sum(1, keepdim=True) + (down**2 + right**2) / sigma_xy**2
            weight = (exponent / -2).exp()
            result[p] += weight * values[q]
            result[q] += weight * values[p]
    return result


def sampled(probs: Tensor, colours: Tensor, sigma_xy: float, samples: int, generator: torch.Generator | None) -> Tensor:
    """An unbiased estimate of -sum_bk S_k^T K S_k from the columns of K at random pixels, the same for all images."""
    points, flat = points_of(colours, sigma_xy), probs.flatten(2).transpose(1, 2)
    pixels = points.shape[1]
    samples = min(samples, pixels)
    chosen = torch.randperm(pixels, generator=generator, device=probs.device)[:samples]
    return -(pixels / samples) * (flat * (kernel(points, points[:, chosen]) @ flat[:, chosen])).sum()
