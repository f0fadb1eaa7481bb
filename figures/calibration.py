"""CalibrateMix's figures: reliability before and after, ECE by label count, margins, accuracy against ECE.

Drawn from saved results only and under the conventions of `figures`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from figures import style
from figures.claims import statistic
from figures.common import Drawn, bands, outside_legend, reliability_panel
from figures.labels import label_figures
from figures.style import Drawing, label_of, message, say, setting, style_of, themed, where
from figures.tables import METRICS, NOT_RUN, RULES, WEIGHTS, check_reporting, summarise
from repro.data import splits
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS, Column, Row, Table, column_of
from repro.measure import calibration
from repro.methods.few_labels.calibratemix import CalibrateMixSettings, halves
from repro.runs import folder_of, is_finished, load_outputs

HALVES = {"hard": style.ORANGE, "easy": style.BLUE}
RIGHT, WRONG = style.BLUE, style.RED
EXAMPLES = 12  # images a row


# Reliability


@dataclass(frozen=True)
class Predictions:
    """Test logits (n, K) and labels (n,) of a run, and the temperature fitted on its held-out images, None without."""

    logits: Tensor
    labels: Tensor
    temperature: float | None

    @classmethod
    def of(cls, experiment: Experiment, root: Path | None = None) -> "Predictions":
        """Those that a finished run keeps."""
        kept = load_outputs(folder_of(experiment, root))
        fitted = None
        if "holdout_logits" in kept:
            fitted = calibration.fit_temperature(kept["holdout_logits"], kept["holdout_labels"])
        return cls(kept["test_logits"], kept["test_labels"], fitted)

    def probs(self, temperature: float = 1.0) -> Tensor:
        """Probabilities (n, K), float64, at a temperature."""
        return (self.logits.double() / temperature).softmax(dim=1)

    def top(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Confidence, float64, and correctness (n,) at a temperature."""
        return calibration.top_label(self.probs(temperature), self.labels)


@themed
def before_and_after(
    pairs: Sequence[tuple[Experiment, Experiment]], root: Path | None = None, bins: int = 15, resamples: int = 300
) -> Figure:
    """Reliability of each base and of base + CalibrateMix, each also after temperature scaling; a row a pair.

    pairs: (base, base + CalibrateMix). resamples: of the bootstrap intervals. Scaling divides the logits by the
    temperature that fits the run's held-out labelled images, which neither training nor test contains.
    """
    figure = Drawing(figsize=(13, 4.3 * len(pairs) + 0.5), layout="constrained")
    how = f"EMA weights, {bins} bins (lo, hi], 95 % bootstrap intervals"
    everyone = [item for pair in pairs for item in pair]
    figure.suptitle(f"Reliability on test images: does training or temperature scaling do the work?\n{how}; "
                    f"{setting(everyone)}")  # fmt: skip
    grid = figure.subplots(2 * len(pairs), 4, squeeze=False, sharex=True, height_ratios=(3.2, 1) * len(pairs))
    for number, pair in enumerate(pairs):
        panels = [(item, scaled) for item in pair for scaled in (False, True)]
        diagrams, counts = grid[2 * number], grid[2 * number + 1]
        for diagram, below, (item, scaled) in zip(diagrams, counts, panels, strict=True):
            _panel(diagram, below, item, scaled, root, bins, resamples)
        diagrams[0].set_ylabel("accuracy (%)")
        counts[0].set_ylabel("images")
    return figure


def _panel(diagram: Axes, below: Axes, item: Experiment, scaled: bool, root, bins: int, resamples: int) -> None:
    diagram.set_title(short_label(item))
    below.tick_params(labelbottom=True)
    found = Predictions.of(item, root) if is_finished(item, root) else None
    if found is None or (scaled and found.temperature is None):
        say(diagram, NOT_RUN if found is None else "no held-out images to fit a temperature")
        below.set_axis_off()
        return
    temperature = found.temperature if scaled else 1.0
    part = f"seed {item.seed}, " + (f"scaled at T = {temperature:.2f}" if scaled else "as trained")
    diagram.set_title(f"{short_label(item)}\n{part}")
    reliability_panel(diagram, below, *found.top(temperature), bins, resamples)


def short_label(experiment: Experiment) -> str:
    """`FixMatch + CalibrateMix` for CalibrateMix on a base, with what else was changed; other methods as usual."""
    changed = dict(experiment.overrides)
    if experiment.method != "calibratemix":
        return label_of(experiment)
    base = changed.pop("base", CalibrateMixSettings.base)
    rest = "".join(f", {name} = {value}" for name, value in changed.items())
    return f"{style_of(base).title} + {style_of('calibratemix').title}{rest}"


# Of tables


def base_of(row: Row) -> str:
    """The method that a row mixes, or the method itself."""
    return row.overrides.get("base", CalibrateMixSettings.base) if row.method == "calibratemix" else row.method


def _look(row: Row) -> dict:
    """Colour of the base; hatched where CalibrateMix is on top, dotted where its mixup is another."""
    hatch = "" if row.method != "calibratemix" else "..." if len(row.overrides) > 1 else "///"
    return {"color": style_of(base_of(row)).colour, "hatch": hatch}


@themed
def ece_bars(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema", metrics: Sequence[str] = ("ece_15", "ece_10_left"),
) -> Figure:  # fmt: skip
    """ECE of each row of a table by label count: bar: mean, line: standard deviation, dots: seeds, n above.

    Columns without a finished run have no bars, rows without one are named below. rule, weights: as in
    `tables.compare`.
    """
    check_reporting(rule, weights)
    heading = f"{scale} scale, {RULES[rule]}, {WEIGHTS[weights]}, seeds {', '.join(map(str, seeds))}"
    title = f"Calibration error by method and label count\n{heading}; line: standard deviation, above: n"
    cells = {
        (row.label, column): [item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)]
        for row in table.rows
        for column in table.columns_at(scale)
    }
    rows = [row for row in table.rows if any(cells[row.label, column] for column in table.columns_at(scale))]
    columns = [column for column in table.columns_at(scale) if any(cells[row.label, column] for row in rows)]
    if not rows:
        return message(title, f"{NOT_RUN}: {', '.join(row.label for row in table.rows)}")
    figure = Drawing(figsize=(11, 2.6 * len(metrics) + 2.1), layout="constrained")
    missing = [row.label for row in table.rows if row not in rows]
    figure.suptitle(title + (f"\n{NOT_RUN}: {', '.join(missing)}" if missing else ""))
    width = 0.86 / len(rows)
    for name, axes in zip(metrics, figure.subplots(len(metrics), 1, squeeze=False)[:, 0], strict=True):
        for number, row in enumerate(rows):
            at = np.arange(len(columns)) + (number - (len(rows) - 1) / 2) * width
            for x, column, label in zip(at, columns, [row.label] + [None] * len(columns), strict=False):
                values = [statistic(item, name, root, rule, weights) for item in cells[row.label, column]]
                _bar(axes, x, width, values, label, _look(row))
        axes.set(ylabel=METRICS[name].title, ylim=(0, axes.get_ylim()[1]))
        axes.set_xticks(range(len(columns)), [column.title for column in columns])
        axes.grid(axis="x", visible=False)
    outside_legend(figure, axes)
    return figure


def _bar(axes: Axes, x: float, width: float, values: Sequence[float], label: str | None, look: dict) -> None:
    found = summarise(values)
    height, spread = 100 * (found.mean or 0), 100 * (found.sd or 0)
    axes.bar(x, height, 0.92 * width, label=label, edgecolor="white", linewidth=0.8, **look)
    if found.n:
        axes.plot([x] * len(values), 100 * np.array(values), ".", color=style.INK, markersize=3, alpha=0.6)
    if found.sd is not None:
        axes.errorbar(x, height, spread, color=style.INK, capsize=2, linewidth=1)
    top = max([height + spread, *(100 * value for value in values)])
    axes.annotate(f"{found.n}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7, color="0.35")


@themed
def accuracy_against_ece(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema", column: Column | None = None,
) -> Figure:  # fmt: skip
    """Every row of a table as a point, accuracy against ECE, as trained and after temperature scaling.

    Point: mean over seeds, lines: standard deviation; an arrow leads from a base to base + CalibrateMix. Scaling keeps
    the accuracy, and is known at the last evaluation of the EMA weights. column: by default the table's first.
    """
    check_reporting(rule, weights)
    column = column or table.columns_at(scale)[0]
    title = f"Accuracy against calibration\n{column.title}, {scale} scale, seeds {', '.join(map(str, seeds))}, " \
            f"{RULES[rule]}, {WEIGHTS[weights]}\nlines: standard deviation"  # fmt: skip
    cells = [[item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)] for row in table.rows]
    if not any(cells):
        return message(title, f"{NOT_RUN}: {', '.join(row.label for row in table.rows)}")
    figure = Drawing(figsize=(10.5, 4.6), layout="constrained")
    figure.suptitle(title)
    names = ("ece_15", "scaled_ece_15")
    both = figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, name, when in zip(both, names, ("as trained", "after temperature scaling"), strict=True):
        points = {}
        for row, cell in zip(table.rows, cells, strict=True):
            accuracy = summarise(statistic(item, "accuracy", root, rule, weights) for item in cell)
            ece = summarise(statistic(item, name, root, rule, weights) for item in cell)
            if not ece.n:
                none = NOT_RUN if not cell else "no holdout"
                axes.errorbar([], [], fmt="o", color="0.8", label=f"{row.label} ({none})")
                continue
            x, y = 100 * ece.mean, 100 * accuracy.mean
            points[row.label] = x, y, base_of(row)
            looks = {"color": style_of(base_of(row)).colour, "marker": style_of(base_of(row)).marker, "capsize": 2,
                     "markersize": 8, "elinewidth": 1, "linestyle": "",
                     "markerfacecolor": _face(row)}  # fmt: skip
            spread = {"xerr": 100 * (ece.sd or 0), "yerr": 100 * (accuracy.sd or 0)}
            axes.errorbar(x, y, label=f"{row.label} (n = {ece.n})", **spread, **looks)
        for start, end in _arrows(table.rows, points):
            arrow = {"arrowstyle": "->", "color": "0.5", "linestyle": "--", "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", end, start, arrowprops=arrow)
        axes.set(xlabel="ECE (%), 15 bins (lo, hi]", title=when)
    both[0].set_ylabel("test accuracy (%)")
    outside_legend(figure, both[0], columns=3)
    return figure


def _face(row: Row) -> str | None:
    """Full for a base; white for CalibrateMix on it, grey for another mixup."""
    return None if row.method != "calibratemix" else "0.75" if len(row.overrides) > 1 else "white"


def _arrows(rows: Sequence[Row], points: dict) -> Iterator[tuple[tuple, tuple]]:
    """The base's point and its own, of the rows that CalibrateMix mixes, where both are known."""
    alone = {row.method: points[row.label][:2] for row in rows if row.label in points and row.method != "calibratemix"}
    for row in rows:
        if row.method == "calibratemix" and row.label in points and base_of(row) in alone:
            yield alone[base_of(row)], points[row.label][:2]


# Over training


@themed
def calibration_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """Test accuracy, ECE and NLL over the steps; line: mean, band: range; dotted: CalibrateMix begins to mix."""
    check_reporting("last", weights)
    figure = Drawing(figsize=(11.5, 3.9), layout="constrained")
    seeded = "; band: range over seeds" * (len({item.seed for item in experiments}) > 1)
    figure.suptitle(f"Calibration over training ({WEIGHTS[weights]})\n{where(experiments)}{seeded}")
    panels = figure.subplots(1, 3)
    for name, axes in zip(("accuracy", "ece_15", "nll"), panels, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, name=name: row[weights][name])
        axes.set(xlabel="training step", ylabel=f"test {METRICS[name].title}")
        if METRICS[name].percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
        at = 0.05 if name == "accuracy" else 0.95
        for step in sorted({warm for item in experiments if (warm := _warmup(item))}):
            axes.axvline(step, color=style.INK, linestyle=":", linewidth=1.2)
            axes.annotate("warm-up ends", (step, at), xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", fontsize=8, color=style.INK)  # fmt: skip
    outside_legend(figure, panels[0], columns=2)
    return figure


def _warmup(experiment: Experiment) -> int:
    method = resolve(experiment).method
    return method.warmup if isinstance(method, CalibrateMixSettings) else 0


# Margins


@dataclass(frozen=True)
class Margins:
    """The images that a run has margins of, labelled or not.

    index: (n,) places in the pool, ascending. score: (n,) AUM or APM. label: (n,) the label, or the last pseudo-label.
    truth: (n,) hidden classes, -1 where unknown, for reporting only. name: of the score.
    """

    index: Tensor
    score: Tensor
    label: Tensor
    truth: Tensor
    name: str

    @property
    def right(self) -> Tensor:
        """Whether the label is the true class (n,); an unknown one counts as right."""
        return (self.label == self.truth) | (self.truth < 0)

    def split(self) -> dict[str, Tensor]:
        """Places in `index` of the hard half and the easy one, as the method halves a batch."""
        return halves(self.score)

    def only(self, places: Tensor) -> "Margins":
        """Those at `places` of `index`."""
        parts = {name: getattr(self, name)[places] for name in ("index", "score", "label", "truth")}
        return dataclasses.replace(self, **parts)


def read_margins(experiment: Experiment, root: Path | None = None) -> tuple[Margins, Margins] | None:
    """AUM of labelled and APM of unlabelled images of a finished run; None for one that keeps none."""
    kept = load_outputs(folder_of(experiment, root))
    if "aum" not in kept:
        return None
    labelled = (kept["labels"] >= 0) & ~kept["aum"].isnan()
    unlabelled = (kept["labels"] < 0) & ~kept["apm"].isnan()
    return tuple(
        Margins(index := mask.nonzero()[:, 0], kept[key][index], kept[label][index], kept["truth"][index], name)
        for mask, key, label, name in (
            (labelled, "aum", "labels", "AUM, margin of the label"),
            (unlabelled, "apm", "pseudo_label", "APM, margin of the pseudo-label"),
        )
    )  # fmt: skip


@themed
def margin_histograms(
    experiment: Experiment, root: Path | None = None, data_root: Path | None = None, examples: int = EXAMPLES
) -> Figure:
    """Histograms of AUM and APM, split at the median into hard and easy, and the hardest and easiest images of each.

    Training splits each batch; the median over all images stands for it. Hidden labels are for the report only.
    """
    title = f"Margins of {short_label(experiment)}"
    if not is_finished(experiment, root):
        return message(title, f"{NOT_RUN}\n{where([experiment])}")
    both = read_margins(experiment, root)
    if both is None or not len(both[0].index):
        return message(title, f"this run keeps no margins\n{where([experiment])}")
    pool, _ = splits.open_pool(experiment.split, data_root)
    figure = Drawing(figsize=(11, 8.6), layout="constrained")
    figure.suptitle(f"{title}\n{where([experiment])}; frames: blue right, orange wrong")
    top, *rest = figure.subfigures(5, 1, height_ratios=(2.6, 1, 1, 1, 1))
    for axes, margins, kind in zip(top.subplots(1, 2), both, ("labelled", "unlabelled"), strict=True):
        _histogram(axes, margins, kind)
    rows = [(margins, kind, half) for margins, kind in zip(both, ("labelled", "unlabelled"), strict=True)
            for half in ("hardest", "easiest")]  # fmt: skip
    for part, (margins, kind, half) in zip(rest, rows, strict=True):
        found = "" if len(margins.index) else ": none"
        part.suptitle(f"{half} {kind} images{found}", fontsize=9.5, x=0.01, ha="left")
        order = margins.score.argsort(stable=True, descending=half == "easiest")[:examples]
        cells = part.subplots(1, examples)
        for axes, row in zip(cells, order.tolist(), strict=False):
            _tile(axes, pool, margins, row)
        for axes in cells[len(order) :]:
            axes.set_axis_off()
    return figure


def _histogram(axes: Axes, margins: Margins, kind: str) -> None:
    n = len(margins.index)
    axes.set(xlabel=f"{margins.name} (logits)", ylabel="images", title=f"{n:,} {kind} images")
    if not n:
        say(axes, "none recorded: warm-up was not over")
        return
    edges = np.histogram_bin_edges(margins.score.numpy(), bins=40 if n > 1000 else 20)
    for half, places in margins.split().items():
        part = margins.only(places)
        known = part.truth >= 0
        share = f", {100 * float(part.right[known].double().mean()):.1f} % right" if known.any() else ""
        axes.hist(part.score.numpy(), edges, color=HALVES[half], alpha=0.75, label=f"{half} half{share}")
    wrong = margins.score[~margins.right]
    if len(wrong):
        axes.hist(wrong.numpy(), edges, color=style.INK, histtype="step", linewidth=1.3, label="wrong")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left")


def _tile(axes: Axes, pool: splits.Pool, margins: Margins, place: int) -> None:
    image = pool.images[margins.index[place]].permute(1, 2, 0).squeeze(2).numpy()
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    right, label, truth = bool(margins.right[place]), int(margins.label[place]), int(margins.truth[place])
    for spine in axes.spines.values():
        spine.set(color=RIGHT if right else WRONG, linewidth=2.5)
    wrong = "" if right else f"is {pool.classes[truth]}"
    axes.set_xlabel(f"{pool.classes[label]}\n{float(margins.score[place]):+.2f}\n{wrong}", fontsize=6.5, labelpad=2)


# The report's


def calibratemix_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What the finished runs can draw, as `plots.commatch_figures`."""
    module = PAPERS["calibratemix"]
    table = module.TABLES["main"]
    experiments = module.main_experiments(scale, seeds)
    column = column_of(experiments[0])
    alone = {row.method: row for row in table.rows if row.method != "calibratemix"}
    extended = {row.overrides["base"]: row for row in table.rows if set(row.overrides) == {"base"}}
    pairs = [
        tuple(table.cell(row, column, scale, (seeds[0],))[0] for row in (alone[base], mixed))
        for base, mixed in extended.items()
    ]
    pairs = [pair for pair in pairs if all(is_finished(item, root) for item in pair)]
    drawn: Drawn = []
    if pairs:
        drawn += [("before_after", "Reliability before and after CalibrateMix", before_and_after(pairs, root))]
        drawn += [("margins", f"Margins of {short_label(pairs[0][1])}", margin_histograms(pairs[0][1], root))]
    if any(is_finished(item, root) for item in experiments):
        how = table, scale, seeds, root
        drawn += [
            ("curves", "Accuracy, ECE and NLL over training", calibration_curves(experiments, root)),
            ("ece_bars", "ECE by method and label count", ece_bars(*how)),
            ("scatter", "Accuracy against ECE", accuracy_against_ece(*how, column=column)),
        ]
    replaced = {"accuracy"} | ({"reliability"} if pairs else set())
    return drawn + [item for item in label_figures("calibratemix", scale, seeds, root) if item[0] not in replaced]
