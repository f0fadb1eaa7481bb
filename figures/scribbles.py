"""Robust Trust Region's further figures: mIoU by scribble length, the robust loss, Potts energy, proposals, images.

Drawn from saved results only and under the conventions of `figures`. Hidden masks of training images are for these
figures alone; of the methods, only full supervision sees them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from figures import style
from figures.claims import statistic
from figures.common import LINES, Drawn, bands, loss_curves, outside_legend, table_figures
from figures.plane import classes_of, unavailable
from figures.scribble_panels import CEILING, length_panels, method_panels, named, proposal_panels, where_of
from figures.style import Drawing, label_of, style_of, themed, where
from figures.tables import NOT_RUN, RULES, WEIGHTS, check_reporting, summarise
from repro.experiment import Experiment
from repro.grid import PAPERS, Table
from repro.measure.metrics import METRICS
from repro.methods.scribbles.common import (
    PUBLISHED,
    PUBLISHED_CLASSES,
    outlier_model,
    rescaled_epsilon,
    robust_surprise,
)
from repro.papers.published import Published, lookup
from repro.runs import folder_of, is_finished, load_history
from repro.settings import unknown

APART = 1.0  # percent of length between methods that stand side by side
PAPERLIKE = "#f7f3ea"  # behind published numbers


# By scribble length


@themed
def by_length(
    experiments: Sequence[Experiment], root: Path | None = None, published: Mapping[str, Published] | None = None,
    rule: str = "last", weights: str = "ema", metric: str = "miou",
) -> Figure:  # fmt: skip
    """A metric of test images against the length of the scribbles, a line a method, full supervision as a level.

    experiments: of any lengths and seeds. A seed of full supervision that ran at several lengths counts once, with its
    mean. published: method -> number, drawn in a panel of their own, on its own scale; those without a value are left
    out, and the panel where there is none. metric: a percentage of METRICS. Raises SettingError for an unknown metric,
    rule or kind of weights.
    """
    check_reporting(rule, weights)
    if metric not in (percentages := [name for name, one in METRICS.items() if one.percent]):
        raise unknown("percentage", metric, percentages)
    title = f"Test images by scribble length: {METRICS[metric].name}, {RULES[rule]}, {WEIGHTS[weights]}"
    experiments = list(dict.fromkeys(experiments))
    done = [item for item in experiments if is_finished(item, root)]
    if not done:
        return unavailable(title, experiments, root)
    numbers = {method: one for method, one in (published or {}).items() if one.value is not None}
    figure = Drawing(figsize=(10 if numbers else 8.5, 5.3), layout="constrained")
    marks = "large: mean, bar: standard deviation, small: seeds; at each length, methods stand side by side"
    figure.suptitle(f"{title}\n{where(done)}\n{marks}{_lengths_missing(experiments, done)}")
    ratios = (3, 0.42 * len(numbers) + 0.3) if numbers else (1,)
    measured, *beside = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]

    def value(item: Experiment) -> float:
        return statistic(item, metric, root, rule, weights)

    names = list(dict.fromkeys(label_of(item) for item in done if item.method != CEILING))
    planned, used = len({item.seed for item in experiments}), []
    for number, name in enumerate(names):
        mine = [item for item in done if label_of(item) == name]
        look = style_of(mine[0].method)
        used.append(mine[0].method)
        looks = {"color": look.colour, "marker": look.marker, "linestyle": LINES[(used.count(used[-1]) - 1) % 4]}
        away = APART * (number - (len(names) - 1) / 2)
        _line(measured, mine, value, away, planned, name, looks)
    _level(measured, [item for item in done if item.method == CEILING], value)
    lengths = sorted({item.labels for item in done if item.method != CEILING} or {item.labels for item in done})
    measured.set_xticks(lengths, [f"{length}\n(click)" if length == 0 else str(length) for length in lengths])
    measured.set(xlabel="scribble length (%)", ylabel=METRICS[metric].title)
    measured.set_xlim(min(lengths) - 6, max(lengths) + 6)
    measured.grid(axis="x", visible=False)
    for axes in beside:
        _published_panel(axes, numbers)
    outside_legend(figure, measured, columns=3)
    return figure


def _lengths_missing(experiments: Sequence[Experiment], done: Sequence[Experiment]) -> str:
    """A line on methods that did not run, and on lengths that did not run, at all or of some method."""
    ran: dict[str, set[int]] = {}
    for item in done:
        ran.setdefault(label_of(item), set()).add(item.labels)
    weak = [item for item in experiments if item.method != CEILING]
    nowhere = {item.labels for item in weak} - {item.labels for item in done if item.method != CEILING}
    without = dict.fromkeys(label_of(item) for item in experiments if label_of(item) not in ran)
    parts = [*without]
    if nowhere:
        parts.append(f"length {', '.join(map(str, sorted(nowhere)))} %")
    for name in dict.fromkeys(label_of(item) for item in weak if label_of(item) in ran):
        absent = {item.labels for item in weak if label_of(item) == name} - ran[name] - nowhere
        parts += [f"{name} at {', '.join(map(str, sorted(absent)))} %"] * bool(absent)
    return f"\n{NOT_RUN}: {'; '.join(parts)}" if parts else ""


def _level(axes: Axes, runs: Sequence[Experiment], value: Callable[[Experiment], float]) -> None:
    """Mean and deviation over seeds as a horizontal line and band."""
    seeds = dict.fromkeys(item.seed for item in runs)
    found = summarise(float(np.mean([value(item) for item in runs if item.seed == seed])) for seed in seeds)
    if found.mean is None:
        return
    look = style_of(CEILING)
    label = f"{look.title}: {100 * found.mean:.1f} % (n = {found.n})"
    axes.axhline(100 * found.mean, color=look.colour, linestyle="--", linewidth=1.4, zorder=1, label=label)
    if found.sd is not None:
        low, high = 100 * (found.mean - found.sd), 100 * (found.mean + found.sd)
        axes.axhspan(low, high, color=look.colour, alpha=0.12, linewidth=0, zorder=0)


def _line(
    axes: Axes, runs: Sequence[Experiment], value: Callable[[Experiment], float], away: float, planned: int, name: str,
    looks: dict,
) -> None:  # fmt: skip
    """Mean with deviation of each length, seeds as dots; the legend has n where it is not as planned."""
    lengths = sorted({item.labels for item in runs})
    values = [[value(item) for item in runs if item.labels == length] for length in lengths]
    stated = [summarise(of_length) for of_length in values]
    mean = [math.nan if one.mean is None else 100 * one.mean for one in stated]
    fewest, most = (extreme(one.n for one in stated) for extreme in (min, max))
    count = "" if fewest == planned else f" (n = {fewest})" if fewest == most else f" (n = {fewest} to {most})"
    at = np.array(lengths) + away
    deviation = [100 * (one.sd or 0) for one in stated]
    axes.errorbar(at, mean, yerr=deviation, elinewidth=1, capsize=2, markersize=6.5, label=name + count, **looks)
    for x, of_length in zip(at, values, strict=True):
        if len(of_length) > 1:
            axes.plot([x] * len(of_length), 100 * np.array(of_length), ".", color=style.INK, markersize=3.5, alpha=0.6)


def _published_panel(axes: Axes, numbers: Mapping[str, Published]) -> None:
    """Published numbers as points, each with its value; the title says on what and with which network."""
    axes.set_facecolor(PAPERLIKE)
    for at, (method, one) in enumerate(numbers.items()):
        look = style_of(method)
        axes.errorbar(at, one.value, one.std, color=look.colour, marker=look.marker, markersize=8, capsize=3)
        axes.annotate(f"{one.value:g}", (at, one.value), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    first = next(iter(numbers.values()))
    origins = [dict.fromkeys(getattr(one, name) for one in numbers.values()) for name in ("dataset", "backbone")]
    axes.set_title("published: " + "\n".join(" / ".join(words) for words in origins), fontsize=9)
    settings = [one.setting for method, one in numbers.items() if method != CEILING and one.setting]
    axes.set_xticks(range(len(numbers)), [style_of(method).title.replace(" ", "\n") for method in numbers], fontsize=8)
    axes.set(xlim=(-0.6, len(numbers) - 0.4), xlabel="; ".join(dict.fromkeys(settings)), ylabel=f"{first.metric} (%)")
    axes.xaxis.label.set_fontsize(8)
    axes.margins(y=0.16)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", visible=False)


# The robust loss


@themed
def robust_loss_curves(classes: int = PUBLISHED_CLASSES, others: Sequence[float] = (0.1, 0.4)) -> Figure:
    """-log(a + b s) against s, and b s / (a + b s), the share that it leaves of cross-entropy's gradient.

    classes: C. Drawn: epsilon 0, which is cross-entropy, `others`, the published ones with the slope b / a that they
    have at 21 classes, and (C - 1) / C, where nothing is learned. Raises ValueError for an epsilon above that.
    """
    lines = [(0.0, "0: cross-entropy", {"color": style.INK, "linestyle": "-"})]
    shades = mpl.colormaps["viridis"](np.linspace(0.9, 0.05, len(PUBLISHED)))
    greys = (style.GREY, style.BROWN, style.PINK, style.ORANGE)
    lines += [(one, f"{one:g}", {"color": greys[n % 4], "linestyle": "-."}) for n, one in enumerate(others)]
    for (length, tuned), shade in zip(PUBLISHED.items(), shades, strict=True):
        epsilon = rescaled_epsilon(tuned.epsilon, PUBLISHED_CLASSES, classes)
        former = "" if classes == PUBLISHED_CLASSES else f" for {tuned.epsilon:g} at C = {PUBLISHED_CLASSES}"
        lines.append((epsilon, f"{epsilon:.4f}{former}, length {100 * length:g} %", {"color": shade, "linestyle": "-"}))
    limit = (classes - 1) / classes
    lines.append((limit, f"(C - 1) / C = {limit:.4f}", {"color": style.RED, "linestyle": ":"}))
    figure = Drawing(figsize=(10, 5.1), layout="constrained")
    figure.suptitle(f"Robust cross-entropy with C = {classes} classes\nprobability of a proposal under the prediction: "
                    "a + b s, a = ε / (C - 1), b = 1 - C a")  # fmt: skip
    left, right = figure.subplots(1, 2)
    zoomed = left.inset_axes((0.47, 0.52, 0.5, 0.38))
    s = torch.linspace(0, 1, 501, dtype=torch.float64).square()  # closer together where the loss is steep
    for epsilon, name, look in lines:
        a, b = outlier_model(epsilon, classes)
        loss = robust_surprise(s.log(), epsilon, classes).numpy()
        reach = f" (range {loss[0] - loss[-1]:.2g} nats)" if math.isfinite(loss[0]) else ""
        left.plot(s, loss, label=f"ε = {name}{reach}", **look)
        zoomed.plot(s, loss, **look)
        if b > 0:
            right.plot(s[1:], (b * s / (a + b * s))[1:], **look)
    left.set(xlabel="s: predicted probability of the proposal's label", ylabel="loss (nats)")
    left.set_ylim(-0.1, 2.5 * math.log(classes))  # room for the others above those that are nearly log C
    right.set(xlabel="s: predicted probability of the proposal's label", yscale="log", ylim=(1e-6, 2))
    right.set(ylabel="share of cross-entropy's gradient\nthat is left: b s / (a + b s)")
    zoomed.set(xlim=(0, 1), xticks=(), ylim=(math.log(classes) - 0.19, math.log(classes) + 0.05))
    zoomed.set_title("published ones, enlarged", fontsize=8.5)
    zoomed.tick_params(labelsize=8)
    outside_legend(figure, left, columns=2)
    return figure


# Over training


@themed
def energy_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """Potts energy of the labels of test images, and mIoU, over the steps; line: mean, band: range over seeds.

    Dotted: the end of partial cross-entropy, where each method begins.
    """
    check_reporting("last", weights)
    names = {"potts_energy": "Potts energy R of the argmax", "miou": METRICS["miou"].title}
    title = f"Potts energy and mIoU of test images over training ({WEIGHTS[weights]})"
    if not any(_evaluations(item, root) for item in experiments):
        return unavailable(title, experiments, root)
    figure = _curves(title, experiments, root, weights, names)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[1].yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    return figure


@themed
def proposal_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """Accuracy and mIoU of the proposals over the steps, against hidden masks; line: mean, band: range over seeds.

    Methods without proposals are named. A proposal stays as it is until stage A is solved again.
    """
    check_reporting("last", weights)
    title = "Proposals of training images over training, against hidden masks"
    kept = [item for item in experiments if any(_proposed(row, weights) for row in _evaluations(item, root))]
    if not kept:
        return unavailable(title, experiments, root)
    done = [item for item in experiments if is_finished(item, root)]
    names = {"proposal_accuracy": "pixel accuracy of proposals (%)", "proposal_miou": "mIoU of proposals (%)"}
    without = named("without proposals", done, kept) + named(NOT_RUN, experiments, [*done, *kept])
    figure = _curves(title, kept, root, weights, names, without)
    for axes in figure.axes:
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    return figure


def _curves(
    title: str, experiments: Sequence[Experiment], root: Path | None, weights: str, names: Mapping[str, str],
    more: str = "",
) -> Figure:  # fmt: skip
    """A panel for each metric of evaluations, with the stages' bounds. names: metric -> label. more: of the caption."""
    figure = Drawing(figsize=(10, 4.1), layout="constrained")
    banded = "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)
    figure.suptitle(f"{title}\n{where_of(experiments)}{banded}{more}")
    panels = figure.subplots(1, len(names))
    ends = stage_ends(experiments, root)
    for (name, label), axes in zip(names.items(), panels, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, name=name: row[weights][name])
        axes.set(xlabel="training step", ylabel=label)
        axes.set_xlim(left=0)
        for end in ends:
            axes.axvline(end, color=style.INK, linestyle=":", linewidth=1.2, zorder=1)
            axes.annotate("stage 2", (end, 1), (0, 2), xycoords=("data", "axes fraction"), ha="center", fontsize=8,
                          textcoords="offset points", color=style.INK)  # fmt: skip
    outside_legend(figure, panels[0], columns=5)
    return figure


def stage_ends(experiments: Iterable[Experiment], root: Path | None = None) -> list[int]:
    """The steps at which runs left their first stage, as far as their histories say, in rising order."""
    ends = set()
    for item in experiments:
        stages = [(row["step"], row["stage"]) for row in load_history(folder_of(item, root)).of("train")]
        before = [step for step, stage in stages if stage == 0]
        if before and len(before) < len(stages):
            ends.add(max(before))
    return sorted(ends)


def _evaluations(experiment: Experiment, root: Path | None) -> list[dict]:
    return load_history(folder_of(experiment, root)).of("evaluation")


def _proposed(row: dict, weights: str) -> bool:
    return row[weights]["proposal_accuracy"] is not None


# The report's


def published_by_method(table: Table, metric: str = "miou") -> dict[str, Published]:
    """What the table's first reference that prints a metric says of each row's method, at the longest scribbles.

    Method -> number, of those that it has a number for; {} where no reference has any.
    """
    column = max(table.columns, key=lambda column: column.labels)
    for reference in [one for one in table.references if one.metric == metric]:
        found: dict[str, Published] = {}
        for row in table.rows:
            names = row.published or (row.method,)
            number = lookup(table.published, reference, column.data, column.labels, names)
            if number.value is not None:
                found.setdefault(row.method, number)
        if found:
            return found
    return {}


def trust_region_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What the finished runs can draw, as `plots.commatch_figures`.

    Curves and images are of one scribble length, that of the first experiment of the main job that is finished: of the
    main job's experiments, and of all others of the first table that are finished.
    """
    module = PAPERS["trust_region"]
    experiments, table = module.main_experiments(scale, seeds), next(iter(module.TABLES.values()))
    classes = len(classes_of(experiments[0].data))
    drawn: Drawn = [("robust_loss", "The robust loss", robust_loss_curves(classes))]
    every = list(dict.fromkeys([*table.experiments(scale, seeds), *experiments]))
    done = [item for item in every if is_finished(item, root)]
    if any(item.method != CEILING for item in done):
        drawn += [
            ("lengths", "mIoU by scribble length", by_length(every, root, published_by_method(table))),
            ("boundaries", "Boundary F-score by scribble length", by_length(every, root, metric="boundary_f")),
        ]
    finished = [item for item in experiments if item.method != CEILING and item in done]
    if finished:
        shown = [item for item in every if item in experiments or item in done]
        alike = _of_length(shown, finished[0].labels)
        first = [item for item in alike if item.seed == finished[0].seed]
        drawn += [
            ("energy", "Potts energy and mIoU over training", energy_curves(alike, root)),
            ("proposals", "Proposals over training", proposal_curves(alike, root)),
            ("methods", "Predictions by method", method_panels(first, root)),
            ("scribbles", "Scribbles by length", length_panels(finished[0], root)),
        ]
    for item in [item for item in finished if item.method == "robust_trust_region"][:1]:
        drawn += [
            ("panels", "Scribbles, proposals and predictions", proposal_panels(item, root)),
            ("loss", "Loss terms over training", loss_curves(item, root)),
        ]
    return drawn + table_figures("trust_region", scale, seeds, root)


def _of_length(experiments: Sequence[Experiment], length: int) -> list[Experiment]:
    """The experiments of one scribble length, and full supervision at that length, else at the first that it has."""
    full = [item.labels for item in experiments if item.method == CEILING]
    masks = length if length in full else next(iter(full), length)
    kept = [item for item in experiments if item.labels == (masks if item.method == CEILING else length)]
    return sorted(kept, key=lambda item: item.method == CEILING)  # last, beside the truth

