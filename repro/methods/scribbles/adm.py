"""ADM (Marin et al., CVPR 2019): a cut on the current crops at every step, and cross-entropy to its labels."""

import contextlib
import weakref
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repro.methods.scribbles.common import ScribbleMethod, View, partial_cross_entropy
from repro.methods.scribbles.trust_region import report, solving
from repro.settings import check, hyper
from repro.solvers.cuts import BACK_ENDS, PADDING, UNLABELLED, SolverSettings, solve_all
from repro.solvers.potts import Grid, contrast_grid, problems, wide
from repro.train import Losses


@dataclass(frozen=True)
class ADMSettings:
    unary_weight: float = hyper(1.0, "gamma", "ADM (released code): of -log S of each pixel", low=0)
    potts_weight: float = hyper(80.0, "lambda", "ADM (released code): of each edge, not over their number", low=0)
    proposal_weight: float = hyper(1.5, "", "ADM (released code): of the cross-entropy to the cut's labels", low=0)
    sweeps: int = hyper(5, "", "ADM (released code)", low=1)
    neighbours: int = hyper(8, "", "as the trust region's", choices=(4, 8))
    back_end: str = hyper("scipy", "", "released: GCO; ours: the same labels from each", choices=tuple(BACK_ENDS))
    rate: float = hyper(0.1, "", "ADM: lr 1e-4 after 1e-3; second stage over the recipe's lr", low=0)

    def __post_init__(self):
        check(self)


def edgewise(grid: Grid) -> Grid:
    """The grid for a solver that multiplies weights by |Omega| / |N|: with these, it multiplies them by 1."""
    factor = (grid.pairs / grid.pixels.clamp(min=1))[:, None, None]
    return replace(grid, weights=tuple(weight * factor for weight in grid.weights))


class ADM(ScribbleMethod):
    """L = L_PCE, then L_PCE + 1.5 CE(X, S), X = argmin sum -log S_X + 80 sum w [X_p != X_q], all labels, free seeds.

    Every step of the second stage copies predictions and weights to the host and waits for the solver: this is slow,
    and it is the method. Expansion starts from background, as the released code does. Both terms are means over pixels,
    which here are divided by B as in all methods, so that one learning rate suits all (ours). Contrast weights read the
    normalised view, as the trust region's do (ours).
    """

    Settings = ADMSettings
    executor: Executor | None = None

    def second(self, view: View, logits: Tensor) -> Losses:
        proposals = self.solved(view, logits)
        seeds = view.crop.masks < self.classes
        terms = {
            "seeds": partial_cross_entropy(logits, view.crop.masks),
            "proposals": self.settings.proposal_weight * partial_cross_entropy(logits, proposals),
        }
        return Losses(terms, report(view.index, logits, proposals, seeds, view.crop.window))

    @torch.no_grad()
    def solved(self, view: View, logits: Tensor) -> Tensor:
        """X of each crop, (B, S, S) uint8, 255 where padded. This waits for the device and for the host's solver."""
        settings = self.settings
        solver = SolverSettings(
            settings.potts_weight, settings.unary_weight, settings.sweeps, restricted=False, back_end=settings.back_end
        )
        grid = edgewise(contrast_grid(view.x, view.roi, settings.neighbours))
        unseeded = torch.where(view.roi, UNLABELLED, PADDING).to(torch.uint8)
        waiting = problems(wide(logits).log_softmax(1), grid, unseeded)
        labels = np.stack([solution.labels for solution in solve_all(waiting, solver, self.processes())])
        return torch.from_numpy(labels).to(logits.device)

    def processes(self) -> Executor | None:
        """Worker processes, started at the first step and ended with the method; None for this process."""
        if self.workers and self.executor is None:
            stack = contextlib.ExitStack()
            self.executor = stack.enter_context(solving(self.workers))
            weakref.finalize(self, stack.close)
        return self.executor
