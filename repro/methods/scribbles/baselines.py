"""Partial cross-entropy, full supervision, Dense-GD and Grid-GD."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from repro.arrays import at_least_float32
from repro.methods.scribbles.common import ScribbleMethod, View, partial_cross_entropy
from repro.settings import check, hyper
from repro.solvers.crf import dense_crf_loss
from repro.solvers.potts import RELAXATIONS, contrast_grid, relaxed_potts
from repro.train import Items, Losses, Now

# Partial cross-entropy


@dataclass(frozen=True)
class PartialCESettings:
    rate: float = hyper(0.1, source="ours, as the trust region's: second stage over the recipe's lr", low=0)

    def __post_init__(self):
        check(self)


class PartialCE(ScribbleMethod):
    """L = L_PCE in both stages: the same budget as the regularised methods have."""

    Settings = PartialCESettings

    def second(self, view: View, logits: Tensor) -> Losses:
        return Losses({"seeds": partial_cross_entropy(logits, view.crop.masks)})


# Full supervision


class Full(ScribbleMethod):
    """Cross-entropy over all pixels of the masks that are not void, in both stages, divided by B as in the others."""

    Settings = PartialCESettings
    supervision: ClassVar[str] = "masks"

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        return {"masks": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view = self.view(batch["masks"])
        return Losses({"masks": partial_cross_entropy(self.network(view.x), view.crop.masks)})


# Dense-GD


PUBLISHED_CROP = 513  # pixels; weight and sigma_xy belong to it


@dataclass(frozen=True)
class DenseGDSettings:
    weight: float = hyper(2e-9, source="rloss; of a sum over all pairs, so it belongs to crops of 513 px", low=0)
    sigma_rgb: float = hyper(15.0, "sigma_rgb", "rloss; of channels in 0..255", low=1e-3)
    sigma_xy: float = hyper(100.0, "sigma_xy", "rloss; pixels of the crop", low=1e-3)
    downscale: float = hyper(0.5, source="rloss", low=0.05, high=1)
    form: str = hyper("exact", source="all pairs; rloss filters by a permutohedral lattice", choices=("exact",))
    radius: int = hyper(10, source="without effect: part of the run ids, of an approximation that is gone", low=0)
    samples: int = hyper(1024, source="without effect: part of the run ids, of an approximation that is gone", low=1)
    rate: float = hyper(1.0, source="rloss: lr 7e-3; second stage over the recipe's lr", low=0)

    def __post_init__(self):
        check(self)


def for_crop(settings: DenseGDSettings, crop: int, published: int = PUBLISHED_CROP) -> DenseGDSettings:
    """Settings for crops of `crop` pixels, from those for crops of `published` pixels (chosen here).

    sigma_xy stays the same share of the crop, and the weight grows by the fourth power of the ratio as the number of
    pairs falls, so an image and its smaller copy have about the same loss.
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
            at_least_float32(logits).softmax(1), colours, view.roi,
            settings.sigma_rgb, settings.sigma_xy, settings.downscale,
        )  # fmt: skip
        seeds = partial_cross_entropy(logits, view.crop.masks)
        return Losses({"seeds": seeds, "dense": settings.weight * dense})


# Grid-GD


@dataclass(frozen=True)
class GridGDSettings:
    potts_weight: float = hyper(100.0, "lambda", "Robust Trust Region, released script", low=0)
    relaxation: str = hyper("bilinear", source="released code; others are ablations", choices=RELAXATIONS)
    neighbours: int = hyper(8, source="released code; 4: ablation", choices=(4, 8))
    rate: float = hyper(1e-4, source="released script: lr 7e-7; second stage over the recipe's lr, 7e-3", low=0)

    def __post_init__(self):
        check(self)


class GridGD(ScribbleMethod):
    """L = L_PCE, then L_PCE + lambda R(S).

    The released script has a squared error on the seeds, by a default that it does not override; here it is
    cross-entropy. Contrast weights read the normalised view, as in the released trainer.
    """

    Settings = GridGDSettings

    def second(self, view: View, logits: Tensor) -> Losses:
        settings = self.settings
        grid = contrast_grid(view.x, view.roi, settings.neighbours)
        potts = relaxed_potts(at_least_float32(logits).softmax(1), grid, settings.relaxation).mean()
        seeds = partial_cross_entropy(logits, view.crop.masks)
        return Losses({"seeds": seeds, "potts": settings.potts_weight * potts})
