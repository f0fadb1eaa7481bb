"""Explorers: controls that move over a finished run, with numbers and pictures that follow at once.

Each function returns the panel or, where nobody can move a control, a figure at the starting position.
"""

from figures.explore.labels import margins, reliability_of, thresholds
from figures.explore.masks import weights
from figures.explore.scribbles import proposals
from figures.explore.tags import regions

__all__ = ["margins", "proposals", "regions", "reliability_of", "thresholds", "weights"]
