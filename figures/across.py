"""Figures across papers: mIoU against annotation effort, and accuracy against ECE; from points of `repro.across`.

Under the conventions of `figures`: a method looks as in every other figure; marks are means over seeds, bars are
standard deviations; what was not run is named.
"""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from figures.effort import FULL, PIXELS, TAGGED, Point
from figures.style import Drawing, message, style_of, themed
from figures.tables import NOT_RUN, RULES, WEIGHTS
from repro.measure.metrics import METRICS

FEW = 4  # methods that are named when they did not run; more are counted
LINE_OF = {"few masks": "-", "scribbles": "--", "image tags": ""}


@themed
def effort(points: Sequence[Point]) -> Figure:
    """mIoU of test scenes against what was marked: tags an image in a panel of their own, pixels an image (log) beside.

    points: of `across.supervised`. A line joins the budgets of a method; full supervision is a level, too.
    """
    title = "mIoU against annotation effort, on the same scenes"
    done = [point for point in points if point.metrics["miou"].n]
    if not done:
        return message(title, _missing(points).strip() or NOT_RUN)
    figure = Drawing(figsize=(10.5, 6.2), layout="constrained")
    figure.suptitle(f"{title}\n{_where(done)}\nmark: mean, bar: standard deviation (from n = 2 on){_missing(points)}")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3.4))
    for axes, unit in zip(panels, (TAGGED, PIXELS), strict=True):
        here = [point for point in done if point.effort.unit == unit]
        _lines(axes, here, unit)
        if not here:
            axes.set_xticks([])
            axes.text(0.5, 0.5, NOT_RUN, transform=axes.transAxes, ha="center", color="0.45")
    panels[0].set(xlabel="tags per training image", ylabel=METRICS["miou"].title)
    panels[1].set(xlabel="labelled pixels per training image (logarithmic)", xscale="log")
    if panels[1].lines:
        panels[1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panels[1].xaxis.set_minor_locator(NullLocator())
    for point in (point for point in done if point.kind == FULL):
        for axes in panels:
            axes.axhline(100 * point.metrics["miou"].mean, color=style_of(point.method).colour, linewidth=1, zorder=1)
    handles = {label: mark for axes in panels for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _lines(axes: Axes, points: Sequence[Point], unit: str) -> None:
    """One line a method; tags have one budget, so their methods stand side by side in order of the table."""
    methods = list(dict.fromkeys((point.kind, point.label) for point in points))
    used: dict[str, int] = {}
    for number, (kind, label) in enumerate(methods):
        mine = sorted((p for p in points if (p.kind, p.label) == (kind, label)), key=lambda p: p.effort.per_image)
        look = style_of(mine[0].method)
        variant = used[mine[0].method] = used.get(mine[0].method, -1) + 1
        apart = 0.06 * (number - (len(methods) - 1) / 2) if unit == TAGGED else 0.0
        axes.errorbar(
            [point.effort.per_image + apart for point in mine],
            [100 * point.metrics["miou"].mean for point in mine],
            [100 * (point.metrics["miou"].sd or 0) for point in mine],
            color=look.colour, marker=look.marker, markersize=9 if kind == FULL else 7, capsize=3, elinewidth=1,
            linestyle=LINE_OF.get(kind, ""), linewidth=1.2, markerfacecolor="white" if variant else None,
            label=f"{kind}: {label} ({_counts(mine, 'miou')})" if kind != FULL else f"{kind} ({_counts(mine, 'miou')})",
        )  # fmt: skip
    if unit == TAGGED and points:
        middle = points[0].effort.per_image
        axes.set_xlim(middle - 0.06 * len(methods), middle + 0.06 * len(methods))
        axes.set_xticks(sorted({round(point.effort.per_image, 2) for point in points}))


@themed
def calibration(points: Sequence[Point]) -> Figure:
    """Accuracy against ECE (15 bins) of classifiers on test images. points: of `across.classified`."""
    title = "Accuracy against calibration"
    done = [point for point in points if point.metrics["ece_15"].n and point.metrics["accuracy"].n]
    if not done:
        return message(title, _missing(points).strip() or NOT_RUN)
    figure = Drawing(figsize=(9, 6.4), layout="constrained")
    figure.suptitle(f"{title}\n{_where(done)}\nmark: mean, bars: standard deviation (from n = 2 on){_missing(points)}")
    axes = figure.subplots()
    used: dict[str, int] = {}
    for point in done:
        look = style_of(point.method)
        variant = used[point.method] = used.get(point.method, -1) + 1
        ece, accuracy = point.metrics["ece_15"], point.metrics["accuracy"]
        axes.errorbar(
            100 * ece.mean, 100 * accuracy.mean, 100 * (accuracy.sd or 0), 100 * (ece.sd or 0), color=look.colour,
            marker=(look.marker, "^", "s", "v", "D")[variant % 5], markersize=8, capsize=2, elinewidth=1, linestyle="",
            markerfacecolor="white" if variant else None, label=f"{point.label} ({_counts([point], 'ece_15')})",
        )  # fmt: skip
    axes.set(xlabel=f"test {METRICS['ece_15'].title}", ylabel=f"test {METRICS['accuracy'].title}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure


def _counts(points: Sequence[Point], metric: str) -> str:
    """`n = 5`, or `n = 2 to 5` over the budgets of a line."""
    counts = sorted({point.metrics[metric].n for point in points})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def _where(points: Sequence[Point]) -> str:
    """`mini scale, seeds 0, 1, last evaluation, EMA weights`."""
    runs = [item for point in points for item in point.finished]
    scale, seeds = runs[0].scale, sorted({item.seed for item in runs})
    place = f"{points[0].budget}, " if points[0].effort is None else ""
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{place}{scale} scale, {named}, {RULES['last']}, {WEIGHTS['ema']}"


def _missing(points: Iterable[Point]) -> str:
    """A line that names the methods without any finished run, or counts them where they are many."""
    points = list(points)
    ran = {(point.kind, point.label) for point in points if point.finished}
    absent = list(dict.fromkeys((point.kind, point.label) for point in points if (point.kind, point.label) not in ran))
    if not absent:
        return ""
    if len(absent) <= FEW:
        return f"\n{NOT_RUN}: {', '.join(label for _, label in absent)}"
    kinds = {kind: [label for of, label in absent if of == kind] for kind, _ in absent}
    counted = (f"{len(labels)} of {kind}" if len(labels) > 1 else labels[0] for kind, labels in kinds.items())
    return f"\n{NOT_RUN}: {', '.join(counted)}"


__all__ = ["calibration", "effort"]
