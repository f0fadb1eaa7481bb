"""Trust region (Marin & Boykov, ICCV 2021): a cut solves for labels, then the network is fitted to them.

Stage A, every few epochs and for each whole image: X = argmin gamma KL(X || S) + lambda R(X), X = y on seeds. Stage B,
every step: cross-entropy on the seeds and the robust loss on X elsewhere. Plain and robust are one method, with
epsilon 0 or above. The paper's text could not be had: this follows the released code.
"""

import contextlib
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repro.arrays import at_least_float32
from repro.data.mask_views import MaskViews, hide
from repro.data.masks import IGNORE
from repro.methods.scribbles.common import (
    ScribbleMethod,
    View,
    outlier_model,
    partial_cross_entropy,
    proposal_losses,
)
from repro.models.modes import evaluating
from repro.recipe import ScribbleRecipe
from repro.settings import SettingError, check, hyper
from repro.solvers.cuts import (
    BACK_ENDS,
    PADDING,
    UNLABELLED,
    Problem,
    Solution,
    SolverSettings,
    solve_all,
    start_workers,
)
from repro.solvers.potts import contrast_grid, problems
from repro.train import Items, Losses, PixelLabels

# Proposals

IMAGES_PER_PASS = 16  # memory only: the network is in eval mode


def refresh(
    network: nn.Module, views: MaskViews, pool: Any, stored: Tensor, settings: SolverSettings, neighbours: int = 8,
    workers: int = 0,
) -> list[Solution]:  # fmt: skip
    """Solve stage A for every image of a pool and overwrite its stored proposal.

    network: put in eval mode for the pass, then back; predicts whole, un-augmented images without autocast.
    pool: `labelled` (n,); labels (H, W) are scribbles, 255, and 254 where a picture was padded to the common size.
        Its `take`, if it has one, must deliver whole images, without chance.
    stored: (N, H, W) uint8 by pool index, in which each image starts; 255 is the lowest label that is allowed, which
        is background where all are (the released start). Written only once all are solved.
    workers: processes, 0 for this one.
    Returns the solutions in the order of `labelled`.
    Source: released code: seeds fixed, labels of the scribbles only (if the settings say so), unary by plain log
    softmax, contrast weights of the normalised image.
    """
    with torch.no_grad(), start_workers(workers) as executor, evaluating(network):
        waiting = whole_images(network, views, pool, stored, neighbours)
        solutions = solve_all(waiting, settings, executor)
    for number, solution in zip(pool.labelled.tolist(), solutions, strict=True):
        stored[number] = torch.from_numpy(solution.labels).to(stored.device)
    return solutions


def whole_images(network: nn.Module, views: MaskViews, pool: Any, stored: Tensor, neighbours: int) -> Iterator[Problem]:
    """Stage A of each image in turn; the network runs only as far as problems are asked for."""
    for index in pool.labelled.split(IMAGES_PER_PASS):
        items = pool.take(index) if hasattr(pool, "take") else Items(index, pool.images[index], pool.labels[index])
        roi = items.labels != PADDING
        x = hide(views.plain(items.images), ~roi)
        grid = contrast_grid(x, roi, neighbours)
        names = [f"{number} of the pool" for number in index.tolist()]
        yield from problems(at_least_float32(network(x)).log_softmax(1), grid, items.labels, stored[items.index], names)


def report(index: Tensor, logits: Tensor, proposals: Tensor, seeds: Tensor, window: Any) -> dict[str, PixelLabels]:
    """What the monitor compares with hidden masks: proposals outside the seeds, and the network's probability of each.

    index: (B,). logits: (B, C, S, S). proposals: (B, S, S), 255 where there is none. seeds: (B, S, S) bool.
    """
    valid = proposals < logits.shape[1]
    scores = at_least_float32(logits.detach())
    chosen = torch.where(valid, proposals.long(), 0)
    confidence = (scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(1)).exp()
    return {"proposals": PixelLabels(index, chosen, valid & ~seeds, confidence, valid, window)}


# The methods


@dataclass(frozen=True)
class TrustRegionSettings:
    epsilon: float = hyper(0.0, "epsilon", "0: plain; robust: tuned_for(length, C)", low=0, high=1)
    soften: float = hyper(0.0, "", "released code (tr-soften): off; label smoothing, ablation", low=0, high=1)
    potts_weight: float = hyper(100.0, "lambda", "released script", low=0)
    gamma: float = hyper(0.05, "gamma", "released README, length 1; shorter: tuned_for", low=0)
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
        values = self.potts_weight, self.gamma, self.sweeps, self.restricted, self.downscale, self.back_end
        return SolverSettings(*values)


@dataclass(frozen=True)
class RobustTrustRegionSettings(TrustRegionSettings):
    epsilon: float = hyper(0.9440, "epsilon", "released README, length 1, C = 21; else tuned_for", low=0, high=1)


class TrustRegion(ScribbleMethod):
    """L = L_PCE, then L_B = (sum over seeds of CE + sum over other pixels of -log(a + b s_X)) / (B |Omega_L|).

    `proposals` (N, H, W) uint8 holds X of each image by pool index, 255 where there is none. Raises SettingError for an
    epsilon that the number of classes does not allow.
    """

    Settings = TrustRegionSettings

    def __init__(
        self, settings: TrustRegionSettings, network: nn.Module, views: MaskViews, classes: int, recipe: ScribbleRecipe,
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


# ADM: an alternating scheme on the same energy


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


class ADM(ScribbleMethod):
    """L = L_PCE, then L_PCE + 1.5 CE(X, S), X = argmin sum -log S_X + 80 sum w [X_p != X_q], all labels, free seeds.

    The method is slow: every step of its second stage copies predictions and weights to the host and waits for the
    solver. Expansion starts from background, as in the released code. Chosen here: both terms are means over pixels,
    divided by B as in all methods, so that one learning rate suits all; contrast weights read the normalised view, as
    in the trust region.
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
        grid = contrast_grid(view.x, view.roi, settings.neighbours)
        factor = (grid.pairs / grid.pixels.clamp(min=1))[:, None, None]  # cancels the solver's |Omega| / |N|
        grid = replace(grid, weights=tuple(weight * factor for weight in grid.weights))
        unseeded = torch.where(view.roi, UNLABELLED, PADDING).to(torch.uint8)
        waiting = problems(at_least_float32(logits).log_softmax(1), grid, unseeded)
        labels = np.stack([solution.labels for solution in solve_all(waiting, solver, self.processes())])
        return torch.from_numpy(labels).to(logits.device)

    def processes(self) -> Executor | None:
        """Worker processes, started at the first step and ended with the method; None for this process."""
        if self.workers and self.executor is None:
            stack = contextlib.ExitStack()
            self.executor = stack.enter_context(start_workers(self.workers))
            weakref.finalize(self, stack.close)
        return self.executor
