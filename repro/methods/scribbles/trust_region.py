"""Trust region (Marin & Boykov, ICCV 2021): a cut solves for labels, then the network is fitted to them.

Stage A, every few epochs and for each whole image: X = argmin gamma KL(X || S) + lambda R(X), X = y on seeds. Stage B,
every step: cross-entropy on the seeds and the robust loss on X elsewhere. Plain and robust are one method, with
epsilon 0 or above. The paper's text could not be had: this follows the released code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repro.data.mask_views import MaskViews
from repro.data.masks import IGNORE
from repro.methods.scribbles.losses import outlier_model, proposal_losses
from repro.methods.scribbles.proposals import refresh, report
from repro.methods.scribbles.steps import Options, ScribbleMethod, View
from repro.settings import SettingError, check, hyper
from repro.solvers.cuts import SolverSettings
from repro.solvers.expansion import BACK_ENDS
from repro.train import Losses


@dataclass(frozen=True)
class TrustRegionSettings:
    epsilon: float = hyper(0.0, "epsilon", "0: plain; robust: lengths.tuned_for(length, C)", low=0, high=1)
    soften: float = hyper(0.0, "", "released code (tr-soften): off; label smoothing, ablation", low=0, high=1)
    potts_weight: float = hyper(100.0, "lambda", "released script", low=0)
    gamma: float = hyper(0.05, "gamma", "released README, length 1; shorter: lengths.tuned_for", low=0)
    refresh: int = hyper(5, "", "released script: epochs between two stages A", low=1)
    sweeps: int = hyper(5, "", "released code: passes over the labels in a stage A", low=1)
    restricted: bool = hyper(True, "", "released code (tr-restricted): only labels of the image's scribbles")
    neighbours: int = hyper(8, "", "released code; 4: ablation", choices=(4, 8))
    downscale: int = hyper(1, "", "released: 1; side in pixels of blocks that share a label, ours", low=1)
    back_end: str = hyper("scipy", "", "released: GCO; ours: the same labels from each", choices=tuple(BACK_ENDS))
    rate: float = hyper(0.1, "", "released script: lr 7e-4; second stage over the recipe's lr, 7e-3", low=0)

    def __post_init__(self):
        check(self)

    @property
    def solver(self) -> SolverSettings:
        """Those of stage A."""
        return SolverSettings(
            self.potts_weight, self.gamma, self.sweeps, self.restricted, self.downscale, self.back_end
        )


@dataclass(frozen=True)
class RobustTrustRegionSettings(TrustRegionSettings):
    epsilon: float = hyper(0.9440, "epsilon", "released README, length 1, C = 21; else lengths.tuned_for(length, C)",
                           low=0, high=1)  # fmt: skip


class TrustRegion(ScribbleMethod):
    """L = L_PCE, then L_B = (sum over seeds of CE + sum over other pixels of -log(a + b s_X)) / (B |Omega_L|).

    `proposals` (N, H, W) uint8 holds X of each image by pool index, 255 where there is none. Raises SettingError for an
    epsilon that the number of classes does not allow.
    """

    Settings = TrustRegionSettings

    def __init__(
        self, settings: TrustRegionSettings, network: nn.Module, views: MaskViews, classes: int, recipe: Options,
        size: tuple[int, int, int],
    ) -> None:  # fmt: skip
        super().__init__(settings, network, views, classes, recipe, size)
        try:
            outlier_model(settings.epsilon, classes)
        except ValueError as error:
            raise SettingError(str(error)) from error
        self.register_buffer("proposals", torch.full(size, IGNORE, dtype=torch.uint8))

    def begin_epoch(self, epoch: int, pool: Any) -> None:
        """Stage A, when it is due; between, proposals stay."""
        if self.is_second(int(self.stage)) and epoch % self.settings.refresh == 0:
            solver, neighbours = self.settings.solver, self.settings.neighbours
            refresh(self.network, self.views, pool, self.proposals, solver, neighbours, self.workers)

    def second(self, view: View, logits: Tensor) -> Losses:
        settings, crop = self.settings, view.crop
        proposals = crop.window.maps(self.proposals[view.index], IGNORE)
        seeds, others = proposal_losses(logits, crop.masks, proposals, settings.epsilon, settings.soften)
        told = report(view.index, logits, proposals, crop.masks < self.classes, crop.window)
        return Losses({"seeds": seeds, "proposals": others}, told)


class RobustTrustRegion(TrustRegion):
    """`TrustRegion` whose default epsilon is the published one."""

    Settings = RobustTrustRegionSettings
