"""Gradient descent on a relaxed Potts energy of neighbouring pixels (Grid-GD)."""

from dataclasses import dataclass

from torch import Tensor

from repro.methods.scribbles.losses import partial_cross_entropy
from repro.methods.scribbles.steps import ScribbleMethod, View
from repro.settings import check, hyper
from repro.solvers.potts import RELAXATIONS, contrast_grid, potts_loss, wide
from repro.train import Losses


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

    The released script has a squared error on the seeds, by a default that it does not override; here cross-entropy.
    Contrast weights read the normalised view, as the released trainer's do.
    """

    Settings = GridGDSettings

    def second(self, view: View, logits: Tensor) -> Losses:
        settings = self.settings
        grid = contrast_grid(view.x, view.roi, settings.neighbours)
        potts = potts_loss(wide(logits).softmax(1), grid, settings.potts_weight, settings.relaxation)
        return Losses({"seeds": partial_cross_entropy(logits, view.crop.masks), "potts": potts})
