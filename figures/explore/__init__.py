"""Explorers: controls that move over a finished run, with numbers and pictures that follow at once.

`explore.thresholds.explore(experiment, root)` and so on: see `panel.Explorer.explore`.
"""

from figures.explore.labels import Mixtures as margins
from figures.explore.labels import Reliability as reliability
from figures.explore.labels import Thresholds as thresholds
from figures.explore.masks import Weights as weights
from figures.explore.scribbles import Proposals as proposals
from figures.explore.tags import Maps as regions

__all__ = ["margins", "proposals", "regions", "reliability", "thresholds", "weights"]
