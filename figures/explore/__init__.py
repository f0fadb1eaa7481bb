"""Explorers: controls that move over a saved run, with numbers and pictures that follow at once.

Each module is one explorer: pure functions that read a run and compute what a position shows, and widgets around them.
`explore` of a module returns the widget or, where nobody watches, a figure at the starting position.
"""

from figures.explore import growth, labelling, margins, parts, proposals, regions, reliability, thresholds, weights

__all__ = ["growth", "labelling", "margins", "parts", "proposals", "regions", "reliability", "thresholds", "weights"]
