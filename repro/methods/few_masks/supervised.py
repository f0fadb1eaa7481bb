"""Supervised only: cross-entropy on the labelled masks, the floor that every other method has to beat."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from repro.methods.few_masks.forward import MaskMethod
from repro.settings import check
from repro.train import Items, Losses, Now


@dataclass(frozen=True)
class SupervisedSettings:
    def __post_init__(self):
        check(self)


class Supervised(MaskMethod):
    """L = L_x."""

    Settings = SupervisedSettings

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        return {"labelled": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        (x,) = self.crops(batch)
        return Losses({"supervised": self.labelled_loss(self.network(self.views.weak(x)), x.masks)})
