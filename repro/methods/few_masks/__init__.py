"""Segmentation from few masks: one file a method."""

from repro.methods.few_masks.csl import CSL
from repro.methods.few_masks.unimatch import FixMatch, Supervised, UniMatch

METHODS = {"supervised": Supervised, "fixmatch": FixMatch, "unimatch": UniMatch, "csl": CSL}
