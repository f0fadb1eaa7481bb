"""Supervised only: the floor that every semi-supervised method must beat."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from repro.data.augment import Views
from repro.train import Items, Losses, Method, Now


@dataclass(frozen=True)
class SupervisedSettings:
    """No hyper-parameter of its own."""


class Supervised(Method):
    """L = mean_b CE(y_b, p(weak(x_b))) on the labelled images alone."""

    Settings = SupervisedSettings

    def __init__(self, settings: SupervisedSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.network, self.views = network, views

    def streams(self, pool, recipe):
        return {"labelled": (pool.labelled, recipe.batch)}

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        labelled = batch["labelled"]
        logits = self.network(self.views.weak(labelled.images)).float()
        return Losses({"supervised": F.cross_entropy(logits, labelled.labels)})
