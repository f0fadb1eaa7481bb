"""Every figure, drawn from saved results only: histories, metrics and outputs of runs, never from a network.

A figure takes experiments and a folder of runs and returns a matplotlib Figure; runs that differ in their seed only are
one line with a band. The caption has the data, the scale and n; a run that is missing is named as "not run". Equal
results give equal bytes through `style.save`. Modules are imported on first use: `figures.labels.accuracy_curves(...)`.
"""

import importlib
import importlib.util


def __getattr__(name: str):
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
