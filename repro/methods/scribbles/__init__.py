"""Segmentation from scribbles: one file a method."""

import dataclasses
from typing import Any

from repro.methods.scribbles.baselines import DenseGD, Full, GridGD, PartialCE
from repro.methods.scribbles.common import PUBLISHED_CLASSES, tuned_for
from repro.methods.scribbles.trust_region import ADM, RobustTrustRegion, TrustRegion

METHODS = {
    "partial_ce": PartialCE, "dense_gd": DenseGD, "grid_gd": GridGD, "adm": ADM,
    "trust_region": TrustRegion, "robust_trust_region": RobustTrustRegion, "full": Full,
}  # fmt: skip


def settings_for(method: str, length: float, classes: int = PUBLISHED_CLASSES) -> Any:
    """A method's published settings for a scribble length and C classes, those of `tuned_for` filled in.

    Plain trust region keeps epsilon 0. Raises ValueError for a length without published values where they are needed,
    KeyError for an unknown method.
    """
    settings = METHODS[method].Settings()
    if not isinstance(settings, TrustRegion.Settings):
        return settings
    tuned = tuned_for(length, classes)
    robust = isinstance(settings, RobustTrustRegion.Settings)
    return dataclasses.replace(settings, gamma=tuned.gamma, epsilon=tuned.epsilon if robust else 0.0)
