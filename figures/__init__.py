"""Every figure, drawn from saved results only: histories, metrics and outputs of runs, never from a network.

A figure takes experiments and a folder of runs and returns a matplotlib Figure; runs that differ in their seed only are
one line with a band. What was not run is named in the figure. Equal results give equal bytes through `style.save`.
"""

from figures import (
    calibration,
    common,
    labels,
    masks,
    plane,
    scribble_panels,
    scribbles,
    style,
    sweeps,
    tags,
    verdicts,
)

__all__ = [
    "calibration", "common", "labels", "masks", "plane", "scribble_panels", "scribbles", "style", "sweeps", "tags",
    "verdicts",
]  # fmt: skip
