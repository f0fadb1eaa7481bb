"""Segmentation from image tags: one file a method."""

from repro.methods.image_tags.afa import AFA
from repro.methods.image_tags.dupl import DuPL
from repro.methods.image_tags.pcre import PCRE
from repro.methods.image_tags.toco import Plain, ToCo

METHODS = {"plain": Plain, "toco": ToCo, "dupl": DuPL, "afa": AFA, "pcre": PCRE}
