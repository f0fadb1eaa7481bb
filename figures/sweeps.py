"""Ablations of one number as curves: measured seeds and mean, and the published ones in a panel of their own."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import style
from figures.claims import statistic
from figures.common import PUBLISHED_GROUND, keep_apart, percent, points, reporting, seeds_drawn
from figures.style import Root, start, style_of, themed
from figures.tables import NOT_RUN
from repro.experiment import Experiment, resolve
from repro.grid import Column, Row, Table
from repro.measure.metrics import METRICS
from repro.papers.published import Published, lookup
from repro.runs import is_finished
from repro.settings import SettingError

SHORT = {"cam_miou": "CAM mIoU", "miou": "segmentation mIoU"}  # what the paper's ablations print


class Sweep(NamedTuple):
    """The one setting that the rows of an ablation change.

    symbol: the paper's, else the setting's name. rows: in rising order of their values, or the table's where these are
    words. values: of the rows. default: the recipe's value. numeric: whether no value is a word or a truth value.
    """

    symbol: str
    rows: Sequence[Row]
    values: Sequence
    default: Any
    numeric: bool


def sweep(table: Table, column: Column, scale: str) -> Sweep | None:
    """How the rows of an ablation differ; None unless it is in one setting of one method."""
    names = {name for row in table.rows for name in row.overrides}
    if len(names) != 1 or len({row.method for row in table.rows}) != 1:
        return None
    (name,) = names

    def read(experiment: Experiment) -> tuple[Any, str]:
        recipe = resolve(experiment)
        owner = recipe.method if hasattr(recipe.method, name) else recipe
        field = next(field for field in dataclasses.fields(owner) if field.name == name)
        return getattr(owner, name), field.metadata.get("symbol") or name

    cells = [table.cell(row, column, scale, (0,))[0] for row in table.rows]
    default, symbol = read(dataclasses.replace(cells[0], overrides=()))
    pairs = [(row, read(item)[0]) for row, item in zip(table.rows, cells, strict=True)]
    numeric = not any(isinstance(value, str | bool) for _, value in pairs)
    rows, values = zip(*sorted(pairs, key=lambda pair: pair[1]) if numeric else pairs, strict=True)
    return Sweep(symbol, rows, values, default, numeric)


@themed
def ablation_curves(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Root = None, rule: str = "last",
    weights: str = "ema",
) -> Figure:  # fmt: skip
    """Measured CAM and segmentation mIoU against the setting that an ablation changes; published ones in own panels.

    Values are in order and evenly spaced; words are not joined by a line. Only seeds that the rows share are drawn.
    rule, weights: as in `tables.compare`.
    Raises SettingError for an ablation that changes more than one setting.
    """
    column = table.columns_at(scale)[0]
    heading = f"measured: {column.title}, {scale} scale, {reporting(rule, weights)}"
    (seeds, words), swept = seeds_drawn(table, column, scale, seeds, root), sweep(table, column, scale)
    if swept is None:
        raise SettingError(f"rows of {table.name} differ in more than one setting; a curve has one on its axis")
    marks = f"mean, deviation, dots: {words}; shaded: the default; values are evenly spaced"
    title = f"{table.title}; tinted: published, on axes of its own"
    figure, grid = start(title, [heading, marks], (10, 3.5), 1, 2 * len(SHORT))
    look, at = style_of(swept.rows[0].method), np.arange(len(swept.rows))
    line = {} if swept.numeric else {"linestyle": ""}
    for name, measured, printed in zip(SHORT, grid[0], grid[0, len(SHORT) :], strict=False):
        runs = [[statistic(item, name, root, rule, weights) for item in table.cell(row, column, scale, seeds)
                 if is_finished(item, root)] for row in swept.rows]  # fmt: skip
        numbers = _published(table, swept, name)
        stated = [[] if one.value is None else [one.value / 100] for one in numbers] or [[]] * len(at)
        origin = next((f"{one.dataset} {one.split}, {one.backbone}" for one in numbers if one.value is not None), "")
        means = points(measured, at, runs, colour=look.colour, marker=look.marker, **line)
        stated = points(printed, at, stated, colour=style.INK, marker="s", **{"linestyle": "--"} | line)
        measured.set_title(f"measured {SHORT[name]}\n{scale} scale, n = {max(map(len, runs))}", fontsize=9)
        printed.set_title(f"published {SHORT[name]}\n{origin}", fontsize=9)
        printed.set_facecolor(PUBLISHED_GROUND)
        for axes, shown, missing in ((measured, means, NOT_RUN), (printed, stated, "not given")):
            names = [f"{value:g}" if swept.numeric else str(value) for value in swept.values]
            absent = [f"{name}\n{missing}" for name in names]
            axes.set_xticks(at, np.where(np.isfinite(shown), names, absent))
            keep_apart(axes, "y", METRICS[name])
    for axes in grid[0]:
        for place in at[[value == swept.default for value in swept.values]]:
            axes.axvspan(place - 0.3, place + 0.3, color="0.85", linewidth=0, zorder=0)
        axes.set(xlabel=swept.symbol, xlim=(-0.5, len(at) - 0.5))
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        percent(axes.yaxis)
    grid[0, 0].set_ylabel("mIoU (%)")
    return figure


def _published(table: Table, swept: Sweep, metric: str) -> list[Published]:
    """What the paper prints of a metric, by row; empty where it prints none."""
    reference = next((one for one in table.references if one.metric == metric), None)
    if reference is None:
        return []
    place = table.columns[0].data, table.columns[0].labels
    return [lookup(table.published, reference, *place, row.published or (row.method,)) for row in swept.rows]
