"""Partial cross-entropy on the scribbled pixels alone: the floor, and where the other methods start."""

from dataclasses import dataclass

from torch import Tensor

from repro.methods.scribbles.losses import partial_cross_entropy
from repro.methods.scribbles.steps import ScribbleMethod, View
from repro.settings import check, hyper
from repro.train import Losses


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
