"""What tests of figures read off axes, and how they change the numbers of a run."""

import json

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.container import BarContainer, ErrorbarContainer

from repro.files import write_json
from repro.runs import folder_of, load_history, load_metrics


def lines(axes):
    """Label -> values of a line."""
    return {line.get_label(): np.array(line.get_ydata(), dtype=float) for line in axes.lines}


def band(axes, x):
    """Ends of the only band at a place."""
    (found,) = axes.findobj(PolyCollection)
    corners = found.get_paths()[0].vertices
    at = corners[np.isclose(corners[:, 0], x)][:, 1]
    return at.min(), at.max()


def bars(axes, horizontal=False):
    """Label -> lengths of its bars."""
    groups = [group for group in axes.containers if isinstance(group, BarContainer)]
    return {group.get_label(): [bar.get_width() if horizontal else bar.get_height() for bar in group]
            for group in groups}  # fmt: skip


def spreads(axes, axis=1):
    """Half the lengths of the error bars, one after the other."""
    groups = [item for item in axes.containers if isinstance(item, ErrorbarContainer)]
    segments = [segment for item in groups for segment in item[2][0].get_segments()]
    return [(high - low) / 2 for low, high in (segment[:, axis] for segment in segments)]


def image(axes):
    """The image that axes show."""
    return np.asarray(axes.images[0].get_array())


def final(root, experiment):
    """What a run reports last, of the EMA weights."""
    return load_metrics(folder_of(experiment, root))["reported"]["last"]["ema"]


def change_final(root, experiment, change):
    """Change what a run reports last, in place. change: of the dictionary."""
    path = folder_of(experiment, root) / "metrics.json"
    saved = json.loads(path.read_text())
    change(saved["reported"]["last"]["ema"])
    write_json(path, saved)


def stored(root, experiments, name):
    """A metric of the evaluations, (runs, steps)."""
    rows = [load_history(folder_of(item, root)).of("evaluation") for item in experiments]
    return np.array([[row["ema"][name] for row in run] for run in rows], dtype=float)
