"""Robust Trust Region's further figures: mIoU by scribble length, the robust loss, Potts energy, proposals.

Hidden masks of training images are for these figures alone; of the methods, only full supervision sees them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from figures import common, style
from figures.claims import statistic
from figures.common import Drawn
from figures.scribble_panels import CEILING, length_panels, method_panels, proposal_panels, where_of
from figures.style import Root, Runs, label_of, start, style_of, themed, where
from figures.tables import NOT_RUN, summarise
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
from repro.runs import is_finished
from repro.settings import unknown

APART = 1.0  # percent of length between methods that stand side by side


# By scribble length


@themed
def by_length(
    experiments: Runs, root: Root = None, published: Mapping[str, Published] | None = None,
    rule: str = "last", weights: str = "ema", metric: str = "miou",
) -> Figure:  # fmt: skip
    """A metric of test images against the length of the scribbles, a line a method, full supervision as a level.

    experiments: of any lengths and seeds. A seed of full supervision that ran at several lengths counts once, with its
    mean. published: method -> number, drawn in a panel of their own, on its own scale; those without a value are left
    out, and the panel where there is none. metric: a percentage of METRICS. Raises SettingError for an unknown metric,
    rule or kind of weights.
    """
    how = common.reporting(rule, weights)
    if metric not in (percentages := [name for name, one in METRICS.items() if one.percent]):
        raise unknown("percentage", metric, percentages)
    title = f"Test images by scribble length: {METRICS[metric].name}, {how}"
    experiments = list(dict.fromkeys(experiments))
    done = {item: statistic(item, metric, root, rule, weights) for item in experiments if is_finished(item, root)}
    if not done:
        return common.unavailable(title, experiments, root)
    numbers = {method: one for method, one in (published or {}).items() if one.value is not None}
    marks = "large: mean, bar: standard deviation, small: seeds; at each length, methods stand side by side"
    captions, ratios = [where(done), marks, _missing(experiments, done)], (3, 0.42 * len(numbers) + 0.3)
    figure, grid = start(title, captions, (10 if numbers else 8.5, 5.3), 1, 1 + bool(numbers),
                         width_ratios=ratios[: 1 + bool(numbers)])  # fmt: skip
    axes, lines = grid[0, 0], {}
    for group, looks, _ in common.variants(item.with_(labels=0) for item in done if item.method != CEILING):
        lines.setdefault(label_of(group[0]), looks)  # one line, whatever lengths ran
    planned = len({item.seed for item in experiments})
    for number, (name, looks) in enumerate(lines.items()):
        mine = [item for item in done if label_of(item) == name]
        lengths = sorted({item.labels for item in mine})
        groups = [[done[item] for item in mine if item.labels == length] for length in lengths]
        n = sorted({summarise(group).n for group in groups})
        count = "" if n[0] == planned else f" (n = {n[0]})" if len(n) == 1 else f" (n = {n[0]} to {n[-1]})"
        common.points(axes, np.array(lengths) + APART * (number - (len(lines) - 1) / 2), groups, name + count, **looks)
    _level(axes, {item: value for item, value in done.items() if item.method == CEILING})
    lengths = sorted({item.labels for item in done if item.method != CEILING} or {item.labels for item in done})
    axes.set_xticks(lengths, [f"{length}\n(click)" if length == 0 else str(length) for length in lengths])
    axes.set(xlabel="scribble length (%)", ylabel=METRICS[metric].title)
    axes.set_xlim(min(lengths) - 6, max(lengths) + 6)
    axes.grid(axis="x", visible=False)
    common.percent(axes.yaxis)
    if numbers:
        _published_panel(grid[0, 1], numbers)
    common.outside_legend(figure, axes, columns=3)
    return figure


def _missing(experiments: Runs, done: Iterable[Experiment]) -> str:
    """A caption of the methods, and of the lengths of scribbles, that did not run at all."""
    ran = {label_of(item) for item in done}
    names = dict.fromkeys(label_of(item) for item in experiments if label_of(item) not in ran)
    asked, had = ({item.labels for item in items if item.method != CEILING} for items in (experiments, done))
    parts = [*names, *(f"length {length} %" for length in sorted(asked - had))]
    return f"{NOT_RUN}: {', '.join(parts)}" if parts else ""


def _level(axes: Axes, values: Mapping[Experiment, float]) -> None:
    """Mean and deviation over seeds as a horizontal line and band."""
    seeds = dict.fromkeys(item.seed for item in values)
    found = summarise(float(np.mean([value for item, value in values.items() if item.seed == seed])) for seed in seeds)
    if found.mean is None:
        return
    look = style_of(CEILING)
    label = f"{look.title}: {100 * found.mean:.1f} % (n = {found.n})"
    axes.axhline(found.mean, color=look.colour, linestyle="--", linewidth=1.4, zorder=1, label=label)
    if found.sd is not None:
        axes.axhspan(found.mean - found.sd, found.mean + found.sd, color=look.colour, alpha=0.12, linewidth=0, zorder=0)


def _published_panel(axes: Axes, numbers: Mapping[str, Published]) -> None:
    """Published numbers as points, each with its value; the title has their data set and network."""
    axes.set_facecolor(common.PUBLISHED_GROUND)
    for at, (method, one) in enumerate(numbers.items()):
        look = style_of(method)
        axes.errorbar(at, one.value, one.std, color=look.colour, marker=look.marker, markersize=8, capsize=3)
        axes.annotate(f"{one.value:g}", (at, one.value), (0, 7), textcoords="offset points", ha="center", fontsize=8.5)
    origins = [dict.fromkeys(getattr(one, name) for one in numbers.values()) for name in ("dataset", "backbone")]
    axes.set_title("published: " + "\n".join(" / ".join(words) for words in origins), fontsize=9)
    settings = dict.fromkeys(one.setting for method, one in numbers.items() if method != CEILING and one.setting)
    axes.set_xticks(range(len(numbers)), [style_of(method).title.replace(" ", "\n") for method in numbers], fontsize=8)
    axes.set_xlabel("; ".join(settings), fontsize=8)
    axes.set(xlim=(-0.6, len(numbers) - 0.4), ylabel=f"{next(iter(numbers.values())).metric} (%)")
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
    shades = colormaps["viridis"](np.linspace(0.9, 0.05, len(PUBLISHED)))
    greys = (style.GREY, style.BROWN, style.PINK, style.ORANGE)
    lines += [(one, f"{one:g}", {"color": greys[n % 4], "linestyle": "-."}) for n, one in enumerate(others)]
    for (length, tuned), shade in zip(PUBLISHED.items(), shades, strict=True):
        epsilon = rescaled_epsilon(tuned.epsilon, PUBLISHED_CLASSES, classes)
        former = "" if classes == PUBLISHED_CLASSES else f" for {tuned.epsilon:g} at C = {PUBLISHED_CLASSES}"
        lines.append((epsilon, f"{epsilon:.4f}{former}, length {100 * length:g} %", {"color": shade, "linestyle": "-"}))
    limit = (classes - 1) / classes
    lines.append((limit, f"(C - 1) / C = {limit:.4f}", {"color": style.RED, "linestyle": ":"}))
    caption = "probability of a proposal under the prediction: a + b s, a = ε / (C - 1), b = 1 - C a"
    title = f"Robust cross-entropy with C = {classes} classes"
    figure, ((left, right),) = start(title, [caption], (10, 5.1), 1, 2)
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
    common.outside_legend(figure, left, columns=2)
    return figure


# Over training


def energy_curves(experiments: Runs, root: Root = None, weights: str = "ema") -> Figure:
    """Potts energy of the labels of test images, and mIoU, over the steps; dotted: the first stage ends."""
    panels = {"Potts energy R of the argmax": "potts_energy", METRICS["miou"].title: "miou"}
    title = "Potts energy and mIoU of test images over training"
    if not any(common.rows_of(item, root, "evaluation") for item in experiments):
        return common.unavailable(title, experiments, root)
    return common.over_training(title, experiments, root, panels, weights, **_stages(experiments, root))


def proposal_curves(experiments: Runs, root: Root = None, weights: str = "ema") -> Figure:
    """Accuracy and mIoU of the proposals over the steps, against hidden masks; dotted: the first stage ends.

    Methods without proposals are named. A proposal stays as it is until stage A is solved again.
    """
    title = "Proposals of training images over training, against hidden masks"
    common.reporting("last", weights)
    kept = [item for item in experiments if any(row[weights]["proposal_accuracy"] is not None
                                                for row in common.rows_of(item, root, "evaluation"))]  # fmt: skip
    if not kept:
        return common.unavailable(title, experiments, root)
    done = [item for item in experiments if is_finished(item, root)]
    panels = {"pixel accuracy of proposals (%)": "proposal_accuracy", "mIoU of proposals (%)": "proposal_miou"}
    captions = [common.absent(done, kept, "without proposals"), common.absent(experiments, [*done, *kept])]
    return common.over_training(title, kept, root, panels, weights, captions, **_stages(kept, root))


def _stages(experiments: Runs, root: Root) -> dict:
    """Marks at the end of first stages, and a caption with the length of the scribbles."""
    band = "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)
    marks = dict.fromkeys(stage_ends(experiments, root), "stage 2")
    return {"marks": marks, "place": where_of(experiments) + band}


def stage_ends(experiments: Iterable[Experiment], root: Root = None) -> list[int]:
    """The steps at which runs left their first stage, in rising order."""
    ends = set()
    for item in experiments:
        stages = [(row["step"], row["stage"]) for row in common.rows_of(item, root, "train")]
        before = [step for step, stage in stages if stage == 0]
        if before and len(before) < len(stages):
            ends.add(max(before))
    return sorted(ends)


# The report's


def published_by_method(table: Table, metric: str = "miou") -> dict[str, Published]:
    """Method -> number at the longest scribbles, of the table's first reference that has any; {} without one.
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


def trust_region_figures(scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """As `labels.commatch_figures`.

    Curves and images are of one scribble length, that of the first experiment of the main job that is finished: of the
    main job's experiments, and of all others of the first table that are finished.
    """
    module = PAPERS["trust_region"]
    experiments, table = module.main_experiments(scale, seeds), next(iter(module.tables.values()))
    classes = len(common.classes_of(experiments[0].data))
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
            ("loss", "Loss terms over training", common.loss_curves(item, root)),
        ]
    return drawn + common.table_figures("trust_region", scale, seeds, root)


def _of_length(experiments: Runs, length: int) -> list[Experiment]:
    """The experiments of one scribble length, and full supervision at that length, else at the first that it has."""
    full = [item.labels for item in experiments if item.method == CEILING]
    masks = length if length in full else next(iter(full), length)
    kept = [item for item in experiments if item.labels == (masks if item.method == CEILING else length)]
    return sorted(kept, key=lambda item: item.method == CEILING)  # last, beside the truth
