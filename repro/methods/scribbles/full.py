"""Full supervision: the ceiling. The only method here whose pool must hold masks in place of scribbles."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from repro.methods.scribbles.losses import partial_cross_entropy
from repro.methods.scribbles.steps import ScribbleMethod
from repro.settings import check, hyper
from repro.train import Items, Losses, Now


@dataclass(frozen=True)
class FullSettings:
    rate: float = hyper(0.1, source="ours, as the trust region's: second stage over the recipe's lr", low=0)

    def __post_init__(self):
        check(self)


class Full(ScribbleMethod):
    """Cross-entropy over all pixels of the masks that are not void, in both stages, over B as the others have it."""

    Settings = FullSettings
    supervision: ClassVar[str] = "masks"

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        return {"masks": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view = self.view(batch["masks"])
        return Losses({"masks": partial_cross_entropy(self.network(view.x), view.crop.masks)})
