"""The papers as data: recipes, published tables, ablations and claims, one module and one CSV a paper."""

from types import ModuleType

from repro.papers import calibratemix, commatch, csl, pcre, trust_region

PAPERS: dict[str, ModuleType] = {
    "commatch": commatch,
    "calibratemix": calibratemix,
    "csl": csl,
    "pcre": pcre,
    "trust_region": trust_region,
}
