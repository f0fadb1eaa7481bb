"""Gradient descent on a dense CRF energy of all pairs of pixels (rloss, Tang et al., 2018; Dense-GD)."""

from dataclasses import dataclass, replace

from torch import Tensor

from repro.methods.scribbles.losses import partial_cross_entropy
from repro.methods.scribbles.steps import ScribbleMethod, View
from repro.settings import check, hyper
from repro.solvers.crf import FORMS, dense_crf_loss
from repro.solvers.potts import wide
from repro.train import Losses

PUBLISHED_CROP = 513  # pixels; weight and sigma_xy belong to it


@dataclass(frozen=True)
class DenseGDSettings:
    weight: float = hyper(2e-9, source="rloss; of a sum over all pairs, so it belongs to crops of 513 px", low=0)
    sigma_rgb: float = hyper(15.0, "sigma_rgb", "rloss; of channels in 0..255", low=1e-3)
    sigma_xy: float = hyper(100.0, "sigma_xy", "rloss; pixels of the crop", low=1e-3)
    downscale: float = hyper(0.5, source="rloss", low=0.05, high=1)
    form: str = hyper("exact", source="rloss filters by a permutohedral lattice; others: ours, cheaper", choices=FORMS)
    radius: int = hyper(10, source="ours: of form = windowed, pixels after downscaling", low=0)
    samples: int = hyper(1024, source="ours: of form = sampled, pixels", low=1)
    rate: float = hyper(1.0, source="rloss: lr 7e-3; second stage over the recipe's lr", low=0)

    def __post_init__(self):
        check(self)


def for_crop(settings: DenseGDSettings, crop: int, published: int = PUBLISHED_CROP) -> DenseGDSettings:
    """The settings of crops of `published` pixels for crops of `crop` (ours).

    sigma_xy stays the same share of the crop, and the weight grows by the fourth power of the ratio, as the number of
    pairs falls: an image and its smaller copy then have about the same loss.
    """
    ratio = published / crop
    return replace(settings, weight=settings.weight * ratio**4, sigma_xy=settings.sigma_xy / ratio)


class DenseGD(ScribbleMethod):
    """L = L_PCE, then L_PCE + weight * dense CRF loss of S; rloss trains so from ImageNet weights at once.

    The kernel reads the view in 0..255, as rloss does.
    """

    Settings = DenseGDSettings

    def second(self, view: View, logits: Tensor) -> Losses:
        settings, views = self.settings, self.views
        colours = 255 * (view.x * views.std[:, None, None] + views.mean[:, None, None])
        dense = dense_crf_loss(
            wide(logits).softmax(1), colours, view.roi, settings.sigma_rgb, settings.sigma_xy, settings.downscale,
            settings.form, settings.radius, settings.samples, views.generator,
        )  # fmt: skip
        seeds = partial_cross_entropy(logits, view.crop.masks)
        return Losses({"seeds": seeds, "dense": settings.weight * dense})
