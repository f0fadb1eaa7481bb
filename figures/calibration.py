"""CalibrateMix's figures: reliability before and after, ECE by label count, margins, accuracy against ECE."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from figures import common, style
from figures.claims import statistic
from figures.common import Drawn
from figures.labels import image_bins, label_figures
from figures.style import Drawing, Root, Runs, label_of, message, say, setting, start, style_of, themed, where
from figures.tables import NOT_RUN, summarise
from repro.data import splits
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS, Column, Table, column_of
from repro.measure import calibration
from repro.measure.metrics import METRICS
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
    def of(cls, experiment: Experiment, root: Root = None) -> "Predictions":
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


def before_and_after(
    pairs: Sequence[tuple[Experiment, Experiment]], root: Root = None, bins: int = 15, resamples: int = 300
) -> Figure:
    """Reliability of each base and of base + CalibrateMix, each also after temperature scaling; a row a pair.

    pairs: (base, base + CalibrateMix). resamples: of the bootstrap intervals. Scaling divides the logits by the
    temperature that fits the run's held-out labelled images, which neither training nor test contains.
    """
    rows = []
    for pair in pairs:
        rows.append([])
        for item in pair:
            found = Predictions.of(item, root) if is_finished(item, root) else None
            for scaled in (False, True):
                panel = {"title": f"{short_label(item)}, seed {item.seed}", "why": NOT_RUN}
                if found is not None and scaled and found.temperature is None:
                    panel["why"] = "no held-out images to fit a temperature"
                elif found is not None:
                    temperature = found.temperature if scaled else 1.0
                    panel["title"] += f"\nscaled at T = {temperature:.2f}" if scaled else "\nas trained"
                    panel |= image_bins(*found.top(temperature), bins, resamples)
                rows[-1].append(panel)
    how = f"EMA weights, {bins} bins (lo, hi], 95 % bootstrap intervals; {setting(sum(pairs, ()))}"
    title = "Reliability on test images: does training or temperature scaling do the work?"
    return common.reliability_figure(title, [how], rows)


def short_label(experiment: Experiment) -> str:
    """`FixMatch + CalibrateMix` for CalibrateMix on a base, with what else was changed; other methods as usual."""
    changed = dict(experiment.overrides)
    if experiment.method != "calibratemix":
        return label_of(experiment)
    base = changed.pop("base", CalibrateMixSettings.base)
    rest = "".join(f", {name} = {value}" for name, value in changed.items())
    return f"{style_of(base).title} + {style_of('calibratemix').title}{rest}"


# Of tables


def ece_bars(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Root = None, rule: str = "last",
    weights: str = "ema", metrics: Sequence[str] = ("ece_15", "ece_10_left"),
) -> Figure:  # fmt: skip
    """ECE of each row of a table by label count, as `common.table_bars`."""
    title = "Calibration error by method and label count"
    return common.table_bars(title, table, scale, seeds, root, rule, weights, metrics)


@themed
def accuracy_against_ece(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Root = None, rule: str = "last",
    weights: str = "ema", column: Column | None = None,
) -> Figure:  # fmt: skip
    """Every row of a table as a point, accuracy against ECE, as trained and after temperature scaling.

    Point: mean over seeds, lines: standard deviation; an arrow leads from a base to base + CalibrateMix. Scaling keeps
    the accuracy, and is known at the last evaluation of the EMA weights. column: by default the table's first.
    """
    column = column or table.columns_at(scale)[0]
    seeded = f"{column.title}, {scale} scale, seeds {', '.join(map(str, seeds))}, {common.reporting(rule, weights)}"
    cells = [[item for item in table.cell(row, column, scale, seeds) if is_finished(item, root)] for row in table.rows]
    title, caption = "Accuracy against calibration", f"{seeded}; lines: standard deviation"
    if not any(cells):
        return message(title, f"{caption}\n{NOT_RUN}: {', '.join(row.label for row in table.rows)}")
    figure, grid = start(title, [caption], (10.5, 4.6), 1, 2, sharey=True, sharex=True)
    panels = {"ece_15": "as trained", "scaled_ece_15": "after temperature scaling"}
    for axes, (name, when) in zip(grid[0], panels.items(), strict=True):
        bases = {}
        for row, cell, look in zip(table.rows, cells, common.table_looks(table).values(), strict=True):
            ece, accuracy = (summarise(statistic(item, metric, root, rule, weights) for item in cell)
                             for metric in (name, "accuracy"))  # fmt: skip
            if not ece.n:
                axes.errorbar([], [], fmt="o", color="0.8", label=f"{row.label} ({'no holdout' if cell else NOT_RUN})")
                continue
            axes.errorbar(ece.mean, accuracy.mean, accuracy.sd or 0, ece.sd or 0, fmt=look["marker"], elinewidth=1,
                          color=look["colour"], markerfacecolor=look["fill"], markersize=8, capsize=2,
                          label=f"{row.label} (n = {ece.n})")  # fmt: skip
            at = ece.mean, accuracy.mean
            if row.method != "calibratemix":
                bases[row.method] = at
            elif common.base_of(row) in bases:
                arrow = {"arrowstyle": "->", "color": "0.5", "linestyle": "--", "shrinkA": 5, "shrinkB": 5}
                axes.annotate("", at, bases[common.base_of(row)], arrowprops=arrow)
        axes.set(xlabel="ECE (%), 15 bins (lo, hi]", title=when)
        common.percent(axes.xaxis)
        common.percent(axes.yaxis)
    grid[0, 0].set_ylabel("test accuracy (%)")
    common.outside_legend(figure, grid[0, 0], columns=3)
    return figure


# Over training


def calibration_curves(experiments: Runs, root: Root = None, weights: str = "ema") -> Figure:
    """Test accuracy, ECE and NLL over the steps; dotted: CalibrateMix begins to mix."""
    panels = {f"test {METRICS[name].title}": name for name in ("accuracy", "ece_15", "nll")}
    methods = [resolve(item).method for item in experiments]
    warm = {one.warmup: "warm-up ends" for one in methods if isinstance(one, CalibrateMixSettings) and one.warmup}
    return common.over_training("Calibration over training", experiments, root, panels, weights, marks=warm)


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


def read_margins(experiment: Experiment, root: Root = None) -> tuple[Margins, Margins] | None:
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
    experiment: Experiment, root: Root = None, data_root: Root = None, examples: int = EXAMPLES
) -> Figure:
    """Histograms of AUM and APM, split at the median into hard and easy, and the hardest and easiest images of each.

    Training splits each batch; the median over all images stands for it. Hidden labels are for the report only.
    """
    title = f"Margins of {short_label(experiment)}"
    both = read_margins(experiment, root) if is_finished(experiment, root) else None
    if both is None or not len(both[0].index):
        why = "this run keeps no margins" if is_finished(experiment, root) else NOT_RUN
        return message(title, f"{why}\n{where([experiment])}")
    pool, _ = splits.open_pool(experiment.split, data_root)
    figure = Drawing(figsize=(11, 8.6), layout="constrained")
    figure.suptitle(f"{title}\n{where([experiment])}; frames: blue right, orange wrong")
    top, *rest = figure.subfigures(5, 1, height_ratios=(2.6, 1, 1, 1, 1))
    kinds = list(zip(both, ("labelled", "unlabelled"), strict=True))
    for axes, (margins, kind) in zip(top.subplots(1, 2), kinds, strict=True):
        _histogram(axes, margins, kind)
    rows = [(*pair, half) for pair in kinds for half in ("hardest", "easiest")]
    for part, (margins, kind, half) in zip(rest, rows, strict=True):
        part.suptitle(f"{half} {kind} images{'' if len(margins.index) else ': none'}", fontsize=9.5, x=0.01, ha="left")
        order = margins.score.argsort(stable=True, descending=half == "easiest")[:examples].tolist()
        cells = part.subplots(1, examples)
        for axes, at in zip(cells, order, strict=False):
            label, truth, right = int(margins.label[at]), int(margins.truth[at]), bool(margins.right[at])
            image = pool.images[margins.index[at]].permute(1, 2, 0).squeeze(2).numpy()
            wrong = "" if right else f"is {pool.classes[truth]}"
            below = f"{pool.classes[label]}\n{float(margins.score[at]):+.2f}\n{wrong}"
            common.image_panel(axes, image, below=below, cmap="gray", vmin=0, vmax=255)
            for spine in axes.spines.values():
                spine.set(color=RIGHT if right else WRONG, linewidth=2.5)
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
    if not margins.right.all():
        wrong = margins.score[~margins.right].numpy()
        axes.hist(wrong, edges, color=style.INK, histtype="step", linewidth=1.3, label="wrong")
    axes.set_ylim(top=1.4 * axes.get_ylim()[1])
    axes.legend(fontsize=8, loc="upper left")


# The report's


def calibratemix_figures(scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """As `labels.commatch_figures`."""
    module = PAPERS["calibratemix"]
    table = module.tables["main"]
    experiments = module.main_experiments(scale, seeds)
    column = column_of(experiments[0])
    alone = {row.method: row for row in table.rows if row.method != "calibratemix"}
    mixed = [row for row in table.rows if set(row.overrides) == {"base"}]
    pairs = [tuple(table.cell(row, column, scale, (seeds[0],))[0] for row in (alone[common.base_of(one)], one))
             for one in mixed]  # fmt: skip
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
