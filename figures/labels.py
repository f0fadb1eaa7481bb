"""Figures of classifiers: accuracy and ECE over training, pseudo-labels, reliability; and ComMatch's own."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from figures import style
from figures.claims import INSTABILITY_BINS, instability_correlation
from figures.common import (
    LINES,
    Drawn,
    banded,
    bands,
    loss_curves,
    not_run,
    outside_legend,
    reliability_panel,
    rows_of,
    table_figures,
)
from figures.style import Drawing, label_of, message, say, setting, style_of, themed, where
from figures.tables import NOT_RUN, WEIGHTS, check_reporting
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.measure import calibration
from repro.methods.few_labels import commatch
from repro.runs import folder_of, is_finished, load_outputs


@themed
def accuracy_curves(experiments: Sequence[Experiment], root: Path | None = None, weights: str = "ema") -> Figure:
    """Test accuracy and ECE over the steps; line: mean, band: smallest to largest (ComMatch, Fig. 2b, 3)."""
    check_reporting("last", weights)
    figure = Drawing(figsize=(9, 3.6), layout="constrained")
    title = f"Accuracy and calibration over training ({WEIGHTS[weights]})"
    figure.suptitle(f"{title}\n{banded(experiments)}")
    both = figure.subplots(1, 2)
    for metric, name, axes in zip(("accuracy", "ece_15"), ("accuracy", "ECE, 15 bins"), both, strict=True):
        bands(axes, experiments, root, "evaluation", lambda row, metric=metric: row[weights][metric])
        axes.set(xlabel="training step", ylabel=f"test {name} (%)")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    outside_legend(figure, both[0])
    return figure


@themed
def pseudo_label_quality(experiments: Sequence[Experiment], root: Path | None = None) -> Figure:
    """Coverage, accuracy and ECE of the pseudo-labels over the steps; positives and negatives apart.

    Measured against hidden labels, which no method sees; gaps in a line: nothing was selected.
    """
    title = "Pseudo-labels over training, against hidden labels"
    rows = [row for item in experiments for row in rows_of(item, root, "train")]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["pseudo"]))
    if not kinds:
        return message(title, "no pseudo-labels were selected") if rows else not_run(title, experiments)
    figure = Drawing(figsize=(10, 2.5 * len(kinds) + 0.9), layout="constrained")
    figure.suptitle(f"{title}\n{banded(experiments)}")
    grid = figure.subplots(len(kinds), 3, squeeze=False, sharex=True)
    for kind, row in zip(kinds, grid, strict=True):
        for name, axes in zip(("coverage", "accuracy", "ece"), row, strict=True):
            of = functools.partial(_quality, kind=kind, name=name)
            bands(axes, experiments, root, "train", of)
            axes.set_ylabel(f"{kind} {'ECE, 15 bins' if name == 'ece' else name} (%)")
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    outside_legend(figure, grid[0, 0])
    return figure


def _quality(row: dict, kind: str, name: str) -> float | None:
    return row["pseudo"].get(kind, {}).get(name)


@themed
def threshold_schedules(experiment: Experiment) -> Figure:
    """ComMatch's t_p and t_n over the epochs of an experiment's recipe (`commatch.thresholds`)."""
    recipe = resolve(experiment)
    if not isinstance(recipe.method, commatch.ComMatchSettings):
        return message("Moving thresholds", f"{label_of(experiment)} has none of ComMatch's kind")
    end = math.ceil(recipe.steps / recipe.epoch_steps)
    epochs = range(max(18, min(30, end)))
    positive, negative = zip(*(commatch.thresholds(recipe.method, epoch) for epoch in epochs), strict=True)
    figure = Drawing(figsize=(8, 2.8), layout="constrained")
    figure.suptitle(f"Moving thresholds of {label_of(experiment)}")
    left, right = figure.subplots(1, 2)
    left.step(epochs, positive, where="post", color=style.GREEN)
    left.set(xlabel="epoch", ylabel="$t_p$: least probability\nof a positive")
    right.step(epochs, negative, where="post", color=style.ORANGE)
    right.set(xlabel="epoch", ylabel="$t_n$: largest probability\nof a negative", yscale="log")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if end < len(epochs):
            axes.axvline(end, color=style.INK, linestyle=":", linewidth=1.2)
            axes.annotate("this run ends", (end, 0.92), xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", fontsize=8, color=style.INK)  # fmt: skip
    return figure


@themed
def reliability_diagrams(
    experiments: Sequence[Experiment], root: Path | None = None, bins: int = 15, resamples: int = 300
) -> Figure:
    """Test accuracy against confidence of each run: gap shaded, counts below, ECE in the title (ComMatch, Fig. 4).

    resamples: of the bootstrap interval of the ECE.
    """
    figure = Drawing(figsize=(min(3.5 * len(experiments) + 0.6, 13), 4.6), layout="constrained")
    how = f"EMA weights, {bins} bins (lo, hi], 95 % bootstrap intervals"
    figure.suptitle(f"Reliability on test images ({how})\n{setting(experiments)}")
    grid = figure.subplots(2, len(experiments), squeeze=False, sharex=True, height_ratios=(3.2, 1))
    for (diagram, counts), item in zip(grid.T, experiments, strict=True):
        diagram.set_title(f"{label_of(item)}, seed {item.seed}")
        if not is_finished(item, root):
            say(diagram, NOT_RUN)
            counts.set_axis_off()
            continue
        outputs = load_outputs(folder_of(item, root))
        probs, labels = outputs["test_logits"].double().softmax(dim=1), outputs["test_labels"]
        reliability_panel(diagram, counts, *calibration.top_label(probs, labels), bins, resamples)
    grid[0, 0].set_ylabel("accuracy (%)")
    grid[1, 0].set_ylabel("images")
    return figure


@themed
def ece_against_instability(
    experiments: Sequence[Experiment], root: Path | None = None, resamples: int = 200
) -> Figure:
    """ECE of unlabelled images in tenths by instability, and how many have which (ComMatch, Fig. 5).

    Instability: deviation over the dropout passes at the argmax class. Tenths, since the ECEs of groups of equal
    count are alike in bias; hidden labels are for the report only. resamples: of the bootstrap intervals.
    """
    title = "Calibration against instability of unlabelled images"
    shown = []
    for item in experiments:
        outputs = load_outputs(folder_of(item, root)) if is_finished(item, root) else {}
        if "pool_passes" in outputs:
            shown.append((item, *top_of_passes(outputs["pool_passes"], outputs["pool_truth"])))
    if not shown:
        done = [item for item in experiments if is_finished(item, root)]
        return message(title, "these runs have no dropout passes") if done else not_run(title, experiments)
    figure = Drawing(figsize=(8, 4.4), layout="constrained")
    figure.suptitle(f"{title}\n{where(item for item, *_ in shown)}")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    for number, (item, spread, confidence, correct) in enumerate(shown):
        look, line = style_of(item.method), LINES[number % 4]
        centres, values, lows, highs = [], [], [], []
        for group in spread.argsort(stable=True).tensor_split(INSTABILITY_BINS):
            if len(group):
                pair = confidence[group], correct[group]
                low, high = calibration.bootstrap_interval(calibration.ece, *pair, resamples)
                ece = float(calibration.ece(*pair))
                centres, values = [*centres, float(spread[group].mean())], [*values, ece]
                lows, highs = [*lows, max(ece - low, 0)], [*highs, max(high - ece, 0)]
        correlation = instability_correlation(folder_of(item, root))
        label = (
            f"{label_of(item)}, seed {item.seed}: {len(spread):,} images, "
            f"Spearman correlation with the gap {correlation:+.2f}"
        )
        looks = {"color": look.colour, "linestyle": line, "marker": look.marker, "label": label}
        top.errorbar(centres, values, (lows, highs), capsize=2, elinewidth=1, **looks)
        bottom.hist(spread, bins=40, color=look.colour, histtype="step", linestyle=line, linewidth=1.4)
    top.set(ylabel="ECE, 15 bins (%)\n95 % bootstrap", ylim=(0, None))
    top.yaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    bottom.set(xlabel="instability: standard deviation over dropout passes at the argmax", ylabel="images")
    outside_legend(figure, top, columns=1)
    return figure


def top_of_passes(passes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Instability, confidence and correctness (n,) of the images whose truth is known.

    passes: (T, n, K), softmax of dropout passes; truth: (n,), -1 where unknown.
    """
    mean, deviation = commatch.instability(passes.double())
    confidence, label = mean.max(dim=1)
    known = truth >= 0
    return deviation.gather(1, label[:, None])[:, 0][known], confidence[known], (label == truth)[known]


def label_figures(paper: str, scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """What every classification paper shows of its main job, its first table, and the ablations that have been run."""
    module = PAPERS[paper]
    experiments = module.main_experiments(scale, seeds)
    finished = [item for item in experiments if is_finished(item, root)]
    drawn = []
    if finished:
        first = [item for item in finished if item.seed == finished[0].seed]
        drawn += [
            ("accuracy", "Accuracy and ECE over training", accuracy_curves(experiments, root)),
            ("pseudo_labels", "Pseudo-labels over training", pseudo_label_quality(experiments, root)),
            ("reliability", "Reliability", reliability_diagrams(first, root)),
        ]
    return drawn + table_figures(paper, scale, seeds, root)


def commatch_figures(scale: str, seeds: Sequence[int], root: Path | None = None) -> Drawn:
    """ComMatch's Figs. 2 to 5 and its thresholds, then the common ones."""
    whole = [item for item in PAPERS["commatch"].main_experiments(scale, seeds) if item.method == "commatch"]
    done = [item for item in whole if is_finished(item, root)]
    drawn = [("thresholds", "Moving thresholds", threshold_schedules(whole[0]))]
    if done:
        drawn += [
            ("loss", "Loss terms over training (Fig. 2a)", loss_curves(done[0], root)),
            ("instability", "ECE against instability (Fig. 5)", ece_against_instability(done, root)),
        ]
    return drawn + label_figures("commatch", scale, seeds, root)
