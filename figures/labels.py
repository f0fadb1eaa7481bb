"""Figures of classifiers: accuracy and ECE over training, pseudo-labels, reliability; and ComMatch's own."""

import functools
import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from figures import common, style
from figures.claims import INSTABILITY_BINS, instability_correlation
from figures.common import Drawn
from figures.style import Root, Runs, label_of, message, setting, start, style_of, themed, where
from figures.tables import NOT_RUN
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.measure import calibration
from repro.methods.few_labels import commatch
from repro.runs import folder_of, is_finished, load_outputs


def accuracy_curves(experiments: Runs, root: Root = None, weights: str = "ema") -> Figure:
    """Test accuracy and ECE over the steps (ComMatch, Fig. 2b, 3)."""
    panels = {"test accuracy (%)": "accuracy", "test ECE (%), 15 bins": "ece_15"}
    return common.over_training("Accuracy and calibration over training", experiments, root, panels, weights)


def pseudo_label_quality(experiments: Runs, root: Root = None) -> Figure:
    """Coverage, accuracy and ECE of the pseudo-labels over the steps; positives and negatives apart.

    Measured against hidden labels, which no method sees; gaps in a line: nothing was selected.
    """
    title = "Pseudo-labels over training, against hidden labels"
    rows = [row for item in experiments for row in common.rows_of(item, root, "train")]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["pseudo"]))
    if not kinds:
        return common.unavailable(title, experiments, root)
    panels = {
        f"{kind} {'ECE, 15 bins' if name == 'ece' else name} (%)": functools.partial(_quality, kind=kind, name=name)
        for kind in kinds
        for name in ("coverage", "accuracy", "ece")
    }
    return common.over_training(title, experiments, root, panels, columns=3)


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
    both = zip(*(commatch.thresholds(recipe.method, epoch) for epoch in epochs), strict=True)
    figure, grid = start(f"Moving thresholds of {label_of(experiment)}", [setting([experiment])], (8, 3), 1, 2)
    for axes, values, colour in zip(grid[0], both, (style.GREEN, style.ORANGE), strict=True):
        axes.step(epochs, values, where="post", color=colour)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if end < len(epochs):
            common.mark(axes, end, "this run ends")
    grid[0, 0].set(xlabel="epoch", ylabel="$t_p$: least probability\nof a positive")
    grid[0, 1].set(xlabel="epoch", ylabel="$t_n$: largest probability\nof a negative", yscale="log")
    return figure


def reliability_diagrams(experiments: Runs, root: Root = None, bins: int = 15, resamples: int = 300) -> Figure:
    """Test accuracy against confidence of each run, and ECE with its bootstrap interval above (ComMatch, Fig. 4)."""
    panels = []
    for item in experiments:
        panel = {"title": f"{label_of(item)}, seed {item.seed}", "why": NOT_RUN}
        if is_finished(item, root):
            outputs = load_outputs(folder_of(item, root))
            probs = outputs["test_logits"].double().softmax(dim=1)
            panel |= image_bins(*calibration.top_label(probs, outputs["test_labels"]), bins, resamples)
        panels.append(panel)
    how = f"EMA weights, {bins} bins (lo, hi], 95 % bootstrap intervals"
    return common.reliability_figure(f"Reliability on test images ({how})", [setting(experiments)], [panels])


def image_bins(confidence: Tensor, correct: Tensor, bins: int, resamples: int) -> dict:
    """A panel of `common.reliability_figure` of images (n,): right-closed bins, ECE with bootstrap interval, error."""
    found = calibration.reliability(confidence, correct, bins)
    low, high = calibration.bootstrap_interval(functools.partial(calibration.ece, bins=bins), confidence, correct,
                                               resamples)  # fmt: skip
    error = 100 * (1 - float(correct.double().mean()))
    numbers = f"ECE {100 * float(found.ece):.1f} % [{100 * low:.1f}, {100 * high:.1f}], error {error:.1f} %"
    return {"bins": (found.accuracy, found.confidence, found.count), "numbers": f"{numbers}\n{len(correct):,} images"}


@themed
def ece_against_instability(experiments: Runs, root: Root = None, resamples: int = 200) -> Figure:
    """ECE of unlabelled images in tenths by instability, and how many have which (ComMatch, Fig. 5).

    Instability: deviation over the dropout passes at the argmax class. Tenths, since the ECEs of groups of equal
    count are alike in bias; hidden labels are for the report only. resamples: of the bootstrap intervals.
    """
    title, found = "Calibration against instability of unlabelled images", {}
    for item in experiments:
        outputs = load_outputs(folder_of(item, root)) if is_finished(item, root) else {}
        if "pool_passes" in outputs:
            found[item] = top_of_passes(outputs["pool_passes"], outputs["pool_truth"])
    if not found:
        return common.unavailable(title, experiments, root)
    figure, ((top,), (bottom,)) = start(title, [where(found)], (8, 4.4), 2, 1, sharex=True, height_ratios=(2.4, 1))
    for number, (item, (spread, confidence, correct)) in enumerate(found.items()):
        look, line, rows = style_of(item.method), common.LINES[number % 4], []
        for group in filter(len, spread.argsort(stable=True).tensor_split(INSTABILITY_BINS)):
            pair = confidence[group], correct[group]
            low, high = calibration.bootstrap_interval(calibration.ece, *pair, resamples)
            ece = float(calibration.ece(*pair))
            rows.append((float(spread[group].mean()), ece, max(ece - low, 0), max(high - ece, 0)))
        centres, values, lows, highs = zip(*rows, strict=True)
        correlation = instability_correlation(folder_of(item, root))
        label = (f"{label_of(item)}, seed {item.seed}: {len(spread):,} images, "
                 f"Spearman correlation with the gap {correlation:+.2f}")  # fmt: skip
        top.errorbar(centres, values, (lows, highs), capsize=2, elinewidth=1, color=look.colour, linestyle=line,
                     marker=look.marker, label=label)  # fmt: skip
        bottom.hist(spread, bins=40, color=look.colour, histtype="step", linestyle=line, linewidth=1.4)
    top.set(ylabel="ECE, 15 bins (%)\n95 % bootstrap", ylim=(0, None))
    common.percent(top.yaxis)
    bottom.set(xlabel="instability: standard deviation over dropout passes at the argmax", ylabel="images")
    common.outside_legend(figure, top, columns=1)
    return figure


def top_of_passes(passes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Instability, confidence and correctness (n,) of the images whose truth is known.

    passes: (T, n, K), softmax of dropout passes; truth: (n,), -1 where unknown.
    """
    mean, deviation = commatch.instability(passes.double())
    confidence, label = mean.max(dim=1)
    known = truth >= 0
    return deviation.gather(1, label[:, None])[:, 0][known], confidence[known], (label == truth)[known]


def label_figures(paper: str, scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """What every classification paper shows of its main job, its first table, and the ablations that have been run."""
    experiments, drawn = PAPERS[paper].main_experiments(scale, seeds), []
    finished = [item for item in experiments if is_finished(item, root)]
    if finished:
        first = [item for item in finished if item.seed == finished[0].seed]
        drawn = [
            ("accuracy", "Accuracy and ECE over training", accuracy_curves(experiments, root)),
            ("pseudo_labels", "Pseudo-labels over training", pseudo_label_quality(experiments, root)),
            ("reliability", "Reliability", reliability_diagrams(first, root)),
        ]
    return drawn + common.table_figures(paper, scale, seeds, root)


def commatch_figures(scale: str, seeds: Sequence[int], root: Root = None) -> Drawn:
    """ComMatch's Figs. 2 to 5 and its thresholds, then the common ones, as far as runs are finished."""
    whole = [item for item in PAPERS["commatch"].main_experiments(scale, seeds) if item.method == "commatch"]
    done = [item for item in whole if is_finished(item, root)]
    drawn = [("thresholds", "Moving thresholds", threshold_schedules(whole[0]))]
    if done:
        drawn += [
            ("loss", "Loss terms over training (Fig. 2a)", common.loss_curves(done[0], root)),
            ("instability", "ECE against instability (Fig. 5)", ece_against_instability(done, root)),
        ]
    return drawn + label_figures("commatch", scale, seeds, root)
