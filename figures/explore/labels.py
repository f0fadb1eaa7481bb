"""Explorers of runs from few labels: ComMatch's thresholds, reliability of test predictions, CalibrateMix's margins."""

import math
from collections.abc import Sequence
from pathlib import Path

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Rectangle
from torch import Tensor

from figures import style
from figures.calibration import Margins, Predictions, read_margins, short_label
from figures.explore import panel
from figures.explore.panel import Explorer, Missing, Numbers, Seen
from figures.style import label_of, where
from repro.data import splits
from repro.data.augment import Views
from repro.data.catalogue import SOURCES
from repro.experiment import Experiment, resolve
from repro.measure import calibration
from repro.measure.reliability import reliability
from repro.methods.few_labels import commatch
from repro.methods.few_labels.calibratemix import PAIRINGS, cosine_similarity, draw_pairs
from repro.runs import folder_of, load_outputs

# ComMatch: which pseudo-labels some thresholds select

BINS = 15
LOOSEST = 0.53  # no deviation of ten values in [0, 1] reaches it
FLOOR = 1e-5  # smaller probabilities and deviations are drawn here


class Thresholds(Explorer):
    """ComMatch's limits over n unlabelled images of the pool: which pseudo-labels they select, and how right these are.

    passes: (T, n, K), softmax of dropout passes; the plain prediction alone for a run without. truth: (n,) hidden
    classes for the report, -1 unknown. images: (n, C, H, W) uint8. start: the limits at the end of training, those that
    ComMatch publishes for other methods. temperature: of negatives.
    """

    about = "Thresholds over a saved run"
    words = "Probability and instability of pool images, and which of them are selected."
    size = (9.0, 6.9)

    def __init__(self, experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> None:
        outputs, recipe = load_outputs(folder_of(experiment, root)), resolve(experiment)
        pool, _ = splits.open_pool(experiment.split, data_root)
        self.passes = outputs.get("pool_passes", outputs["pool_logits"].softmax(1)[None])
        self.truth, self.images, self.classes = outputs["pool_truth"], pool.images[outputs["pool_index"]], pool.classes
        own = recipe.method if isinstance(recipe.method, commatch.ComMatchSettings) else commatch.ComMatchSettings()
        t_p, t_n = commatch.thresholds(own, (recipe.steps - 1) // recipe.epoch_steps)
        stable = own.stability == "dropout"
        s_p, s_n = (own.positive_stability, own.negative_stability) if stable else (LOOSEST, LOOSEST)
        self.start, self.temperature = (t_p, s_p, t_n, s_n), own.negative_temperature
        note = ". This run kept no dropout passes: instability is 0, its limits do nothing" * (len(self.passes) == 1)
        self.title = f"{label_of(experiment)}, {where([experiment])}{note}"

    def controls(self) -> dict[str, widgets.Widget]:
        off, (t_p, s_p, t_n, s_n) = len(self.passes) == 1, self.start

        def linear(words: str, value: float, high: float, step: float, **more) -> widgets.FloatSlider:
            return widgets.FloatSlider(
                value, min=0, max=high, step=step, readout_format=".3f", **panel.looks(words), **more
            )

        def powers(words: str, value: float, high: float, **more) -> widgets.FloatLogSlider:
            step, exponent = 0.05, math.log10(max(value, FLOOR))
            low = -5 + (exponent + 5) % step  # the steps pass through `value`, or the page would round it away
            how = {"min": low, "max": high, "step": step, "readout_format": ".5f"}
            return widgets.FloatLogSlider(10**exponent, **how, **panel.looks(words), **more)

        return {
            "positive_threshold": linear("t_p, positive threshold", t_p, 1, 0.005),
            "positive_stability": linear("s_p, positive stability", s_p, LOOSEST, 0.001, disabled=off),
            "negative_threshold": powers("t_n, negative threshold", t_n, 0),
            "negative_stability": powers("s_n, negative stability", s_n, math.log10(LOOSEST), disabled=off),
        }

    def spread(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n, K) over the passes at a temperature."""
        passes = self.passes
        if temperature != 1.0:
            passes = (passes.clamp(min=1e-12).log() / temperature).softmax(dim=-1)
        if len(passes) > 1:
            return commatch.instability(passes)
        return passes[0], torch.zeros_like(passes[0])

    def compute(self, positive_threshold, positive_stability, negative_threshold, negative_stability) -> Seen:
        """label, mask, confidence, deviation: (n,), of positives. negative_mask, negative_mean: (n, K)."""
        mean, deviation = self.spread(1.0)
        label, mask, confidence = commatch.select_positive(mean, deviation, positive_threshold, positive_stability)
        own = deviation.gather(1, label[:, None])[:, 0]
        mean, deviation = self.spread(self.temperature)
        negative = commatch.select_negative(mean, deviation, negative_threshold, negative_stability, spared=label)
        limits = (positive_threshold, positive_stability, negative_threshold, negative_stability)
        return Seen(label=label, mask=mask, confidence=confidence, deviation=own, negative_mask=negative,
                    negative_mean=mean, limits=limits)  # fmt: skip

    def numbers(self, seen: Seen) -> Numbers:
        columns = ("", "selected", "coverage", "accuracy", "mean confidence", f"ECE, {BINS} bins")
        known, wrong = self.truth >= 0, torch.arange(seen.negative_mask.shape[1]) != self.truth[:, None]
        groups = (
            ("positives", seen.mask, known, seen.confidence, seen.label == self.truth),
            ("negatives", seen.negative_mask, known[:, None], 1 - seen.negative_mean, wrong),
        )
        rows = []
        for name, mask, judged, confidence, correct in groups:
            sure, right = confidence[mask & judged].double(), correct[mask & judged]
            error = calibration.ece(sure, right, BINS) if len(sure) else math.nan
            shares = (mask.double().mean(), right.double().mean(), sure.mean(), error)
            cells = (panel.percent(float(share), 2, "none") for share in shares)
            rows.append((name, f"{int(mask.sum()):,} of {mask.numel():,}", *cells))
        limits = zip(("t_p", "s_p", "t_n", "s_n"), seen.limits, strict=True)
        return Numbers("At " + ", ".join(f"{name} = {value:.3g}" for name, value in limits) + ".", columns, rows)

    def layout(self, figure: FigureBase) -> list[Axes]:
        start = self.compute(*self.start)
        other = torch.arange(start.negative_mean.shape[1]) != start.label[:, None]
        left, right = figure.add_axes((0.08, 0.61, 0.41, 0.34)), figure.add_axes((0.57, 0.61, 0.41, 0.34))
        deviation = self.spread(self.temperature)[1][other]
        wrong = (torch.arange(other.shape[1]) != self.truth[:, None])[other]
        for axes, *dots in ((left, start.confidence, start.deviation, start.label == self.truth),
                            (right, start.negative_mean[other], deviation, wrong)):  # fmt: skip
            probability, instability, correct = dots
            for value, colour, label in ((True, style.BLUE, "right"), (False, style.RED, "wrong")):
                x, y = (part[correct == value].clamp(min=FLOOR) for part in (probability, instability))
                axes.plot(x, y, ".", markersize=2, color=colour, label=label)
            axes.set(xscale="log" if axes is right else "linear", yscale="log", ylim=(FLOOR / 2, 0.6))
            panel.plain_ticks(axes)
        left.set_title("Positives: image, most probable class", fontsize=9)
        left.set(xlim=(0, 1.01), xlabel="confidence (mean over passes)", ylabel="instability (deviation)")
        right.set_title("Negatives: image, any other class", fontsize=9)
        right.set(xlim=(FLOOR, 1), xlabel="probability (mean over passes)")
        left.legend(loc="lower left", fontsize=7, markerscale=3)
        strips = [figure.add_axes((0.01, bottom, 0.98, 0.14)) for bottom in (0.345, 0.18, 0.015)]
        return [left, right, *map(panel.bare, strips)]

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        left, right, *strips = axes
        t_p, s_p, t_n, s_n = seen.limits
        region = {"facecolor": (*style.BLUE, 0.15), "edgecolor": style.BLUE, "linewidth": 1.5}
        left.add_patch(Rectangle((t_p, FLOOR / 2), 1.01 - t_p, max(s_p, FLOOR) - FLOOR / 2, **region))
        right.add_patch(Rectangle((FLOOR, FLOOR / 2), max(t_n - FLOOR, 0), max(s_n, FLOOR) - FLOOR / 2, **region))
        chosen, true = seen.mask.nonzero()[:, 0], self.truth.clamp(min=0)[:, None]
        order = chosen[seen.confidence[chosen].argsort(descending=True, stable=True)]
        p, mistaken = (part.gather(1, true)[:, 0] for part in (seen.negative_mean, seen.negative_mask))
        worst = (mistaken & (self.truth >= 0)).nonzero()[:, 0]
        worst, good = worst[p[worst].argsort(stable=True)], (seen.label == self.truth) | (self.truth < 0)
        rows = (
            (f"Surest positives ({len(order):,} in all)", order[:12], seen.label, seen.confidence, good),
            ("Least sure positives", order[12:].flip(0)[:12], seen.label, seen.confidence, good),
            (f"True class among the negatives ({len(worst):,} in all)", worst[:12], self.truth, p, good & False),
        )
        for strip, (heading, places, named, p, good) in zip(strips, rows, strict=True):
            words = [f"{100 * p[i]:.1f} %" if p[i] > 1e-3 else f"{100 * p[i]:.0e} %" for i in places]
            names = [self.classes[named[i]][:11] for i in places]
            thumbs = [panel.Thumb(self.images[i], bool(good[i]), f"{name}\n{word}")
                      for i, name, word in zip(places, names, words, strict=True)]  # fmt: skip
            panel.thumbnails(strip, heading, thumbs)


# Reliability of test predictions

SWEEP = torch.logspace(-1, 1, 41, dtype=torch.float64)


class Reliability(Explorer):
    """Temperature, bins and closing over the test predictions of runs, by name.

    along: of each run the confidences (n,) and the NLL at each temperature of SWEEP.
    """

    about = "Reliability of saved runs"
    title = "Reliability on test images"
    words = "Accuracy against confidence in bins, and the errors along the temperature."
    size = (9.0, 4.3)

    def __init__(self, experiments: Sequence[Experiment], root: Path | None = None) -> None:
        self.runs = {f"{short_label(item)}, {where([item])}": Predictions.of(item, root) for item in experiments}
        self.along = {}
        for name, predictions in self.runs.items():
            probs = [predictions.probs(float(temperature)) for temperature in SWEEP]
            nll = [float(calibration.nll(at, predictions.labels)) for at in probs]
            self.along[name] = [at.amax(1) for at in probs], nll

    def controls(self) -> dict[str, widgets.Widget]:
        scale = {"min": -1, "max": 1, "step": 0.02, "readout_format": ".3f"}
        return {
            "run": panel.buttons("run", {name: name for name in self.runs}, next(iter(self.runs))),
            "temperature": widgets.FloatLogSlider(1.0, **scale, **panel.looks("T, temperature")),
            "bins": panel.whole("bins", 15, 1, 50),
            "closing": panel.buttons("closing", {"right": "(lo, hi]", "left": "[lo, hi)"}, "right"),
            "spacing": panel.buttons("spacing", {"width": "equal width", "mass": "equal count"}, "width"),
        }

    def compute(self, run: str, temperature: float, bins: int, closing: str, spacing: str) -> Seen:
        """bins: at the position. ece, nll: along SWEEP. rows: name, temperature, accuracy, ECE, adaptive ECE, MCE, NLL,
        Brier score."""
        predictions, (confidences, nll) = self.runs[run], self.along[run]
        correct = predictions.top()[1]
        errors = [float(reliability(row, correct, bins, closing, spacing).ece) for row in confidences]
        named = [("as trained", 1.0), ("here", temperature)]
        if predictions.temperature is not None:
            named.append(("fitted", predictions.temperature))
        rows, at = [], {}
        for name, heat in named:
            probs = predictions.probs(heat)
            confidence = probs.amax(1)
            at[name] = reliability(confidence, correct, bins, closing, spacing)
            values = (correct.double().mean(), at[name].ece, calibration.adaptive_ece(confidence, correct, bins),
                      at[name].mce, calibration.nll(probs, predictions.labels),
                      calibration.brier(probs, predictions.labels))  # fmt: skip
            rows.append((name, heat, *map(float, values)))
        return Seen(run=run, bins=at["here"], ece=errors, nll=nll, rows=rows)

    def numbers(self, seen: Seen) -> Numbers:
        columns = ("", "accuracy", "ECE", "adaptive ECE", "MCE", "NLL (nats)", "Brier")
        rows = [
            (f"{name}, T = {heat:.3g}", *(panel.percent(share, 2) for share in shares), f"{nll:.4f}", f"{brier:.4f}")
            for name, heat, *shares, nll, brier in seen.rows
        ]
        return Numbers(f"{seen.run}, {len(seen.bins.count)} bins.", columns, rows)

    def layout(self, figure: FigureBase) -> list[Axes]:
        diagram, counts = figure.add_axes((0.07, 0.3, 0.4, 0.62)), figure.add_axes((0.07, 0.1, 0.4, 0.17))
        errors = figure.add_axes((0.56, 0.1, 0.37, 0.82))
        losses = errors.twinx()
        diagram.plot([0, 1], [0, 1], color=style.INK, linewidth=1)
        diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        diagram.set_title("Accuracy (blue) and its gap to the mean confidence (orange)", fontsize=9)
        counts.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
        errors.set(xscale="log", xlim=(0.1, 10), xlabel="temperature", xticks=[0.1, 0.3, 1, 3, 10])
        errors.yaxis.set_label_text("ECE", color=style.BLUE)
        losses.yaxis.set_label_text("NLL (nats)", color=style.ORANGE)
        losses.grid(False)
        for axes in (diagram, counts, errors, losses):
            panel.plain_ticks(axes)
        diagram.set_xticklabels([])
        return [diagram, counts, errors, losses]

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        diagram, counts, errors, losses = axes
        full, found = seen.bins.count > 0, seen.bins
        lower, upper, accuracy, confidence, count = (
            part[full].numpy() for part in (found.lower, found.upper, found.accuracy, found.confidence, found.count)
        )
        bar = {"width": (upper - lower).clip(0.002), "align": "edge", "edgecolor": "white", "linewidth": 0.6}
        diagram.bar(lower, accuracy, color=style.BLUE, **bar)
        diagram.bar(lower, confidence - accuracy, bottom=accuracy, **bar | {"color": (*style.RED, 0.35)})
        counts.bar(lower, count, color=style.GREY, **bar)
        counts.set_ylim(0, 1.05 * count.max())
        errors.plot(SWEEP, seen.ece, color=style.BLUE)
        errors.set_ylim(0, max(0.02, 1.1 * max(seen.ece)))
        losses.plot(SWEEP, seen.nll, color=style.ORANGE)
        least, most = min(seen.nll), max(seen.nll[len(SWEEP) // 4 :])
        losses.set_ylim(least - 0.1 * (most - least), most + 1e-9)
        for number, (name, heat, *_) in enumerate(seen.rows[1:]):
            x, colour = min(max(heat, 0.1), 10), style.GREEN if name == "fitted" else style.INK
            errors.axvline(x, color=colour, linewidth=1)
            side = {"ha": "right"} if x > 4 else {"ha": "left"}
            errors.text(x, 0.97 - 0.05 * number, f" {name} {heat:.3g} ", color=colour, fontsize=8, va="top", **side,
                        transform=errors.get_xaxis_transform())  # fmt: skip

    def stills(self) -> list[dict]:
        return [{"run": name} for name in self.runs]


# CalibrateMix: hard and easy images, and what is mixed with what

KINDS = ("labelled", "unlabelled")
AROUND = 24  # images shown around a percentile
TRIOS = 4  # mixtures shown of each mixup


class Mixtures(Explorer):
    """Images of a CalibrateMix run by their margins, and what the method would mix from a batch.

    margins: by KINDS. images: (N, C, H, W) uint8, the pool. plain: normalises them. sizes: of both batches.
    """

    about = "Training pictures by margin"
    words = "Images by margin, and mixtures."
    size = (9.0, 5.4)

    def __init__(self, experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> None:
        both = read_margins(experiment, root)
        if both is None:
            raise Missing("margins")
        recipe, source = resolve(experiment), SOURCES[experiment.data]
        pool, _ = splits.open_pool(experiment.split, data_root)
        self.margins, self.images, self.classes = dict(zip(KINDS, both, strict=True)), pool.images, pool.classes
        self.plain, self.settings = Views(source.mean, source.std, flip=False), recipe.method
        self.sizes = recipe.batch, recipe.batch * recipe.unlabelled_ratio
        self.title = f"{short_label(experiment)}, {where([experiment])}"

    def controls(self) -> dict[str, widgets.Widget]:
        own, partners = self.settings, ("dissimilar", "random", "similar")
        return {
            "kind": panel.buttons("images", dict(zip(KINDS, KINDS, strict=True)), "unlabelled"),
            "percentile": panel.whole("percentile of the margin", 5, 0, 100),
            "weight": widgets.FloatSlider(0.5, min=0, max=1, step=0.05, **panel.looks("lambda, labelled share")),
            "batch": panel.whole("batch", 0, 0, 99),
            "partner": widgets.Dropdown(options=partners, value=own.partner, **panel.looks("partner")),
            "pool": panel.whole("k, candidates", own.pool, 1, max(45, own.pool)),
        }

    def compute(self, kind: str, percentile: int, weight: float, batch: int, partner: str, pool: int) -> Seen:
        """batch: seed of the batch and of the partners. weight: lambda. partner, pool: as in `draw_pairs`.

        images: Margins around the percentile, hardest first. score: there. shares: of right labels, NaN of none: of the
        images shown, of the harder and of the easier ones. mixups: of a batch.
        """
        margins = self.margins[kind]
        order = margins.score.argsort(stable=True)
        middle = round(percentile / 100 * (len(order) - 1)) if len(order) else 0
        first = max(0, min(middle - AROUND // 2, len(order) - AROUND))
        parts = {"shown": order[first : first + AROUND], "harder": order[:first], "easier": order[first + AROUND :]}
        shares = {}
        for name, places in parts.items():
            known = places[margins.truth[places] >= 0]
            shares[name] = float(margins.right[known].double().mean())
        score = float(margins.score[order[middle]]) if len(order) else math.nan
        return Seen(kind=kind, percentile=percentile, images=margins.only(parts["shown"]), score=score, shares=shares,
                    weight=weight, mixups=self.mixups(batch, partner, pool))  # fmt: skip

    def mixups(self, batch: int, partner: str, pool: int) -> list[Seen]:
        """The mixups of a batch drawn without repeats, [] of too few images: which halves meet, and the pairs (n,).

        similarity: mean cosine of the pairs, candidates: of every labelled image with all that it could have met, both
        of plain pixels, not of weak views.
        """
        generator = torch.Generator().manual_seed(batch)
        drawn = []
        for kind, size in zip(KINDS, self.sizes, strict=True):
            margins = self.margins[kind]
            drawn.append(margins.only(torch.randperm(len(margins.index), generator=generator)[:size]))
        if min(len(part.index) for part in drawn) < 2:
            return []
        labelled, unlabelled = drawn
        alike = cosine_similarity(*(self.plain.plain(self.images[part.index]) for part in drawn))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch)
            pairs = draw_pairs(labelled.score, unlabelled.score, alike, self.settings.pairing, pool, partner)
        return [
            Seen(halves=halves, labelled=labelled.only(row), unlabelled=unlabelled.only(column),
                 similarity=float(alike[row, column].mean()), candidates=float(alike[row].mean()))
            for halves, (row, column) in zip(PAIRINGS[self.settings.pairing], pairs, strict=True)
        ]  # fmt: skip

    def numbers(self, seen: Seen) -> Numbers:
        count = len(self.margins[seen.kind].index)
        if not count:
            return Numbers(f"No {seen.kind} image has a margin: the warm-up was not over.", (), ())
        what = "labels" if seen.kind == "labelled" else "pseudo-labels"
        shares = [f"{panel.percent(share)} of those {name}" for name, share in seen.shares.items() if share == share]
        score = f"{seen.images.name}: {seen.score:+.2f} at percentile {seen.percentile} of {count:,} images"
        return Numbers(f"{score}. Right {what}: {', '.join(shares)}.", (), ())

    def layout(self, figure: FigureBase) -> list[Axes]:
        boxes = [(0.01, 0.56, 0.98, 0.38), (0.01, 0.29, 0.98, 0.19), (0.01, 0.02, 0.98, 0.19)]
        return [panel.bare(figure.add_axes(box)) for box in boxes]

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        images, *strips = axes
        heading = f"{seen.kind} images around percentile {seen.percentile} of their margins, hardest first"
        shown = [self.thumb(seen.images, place) for place in range(len(seen.images.index))]
        panel.thumbnails(images, heading, shown, 2)
        if not seen.mixups:
            strips[0].set_title("no mixtures: too few images have margins yet", fontsize=9, loc="left")
        for number, (strip, mixup) in enumerate(zip(strips, seen.mixups, strict=False), 1):
            (own, other), share = mixup.halves, seen.weight
            heading = (
                f"M{number}: {share:.2f} of {own} labelled + {1 - share:.2f} of {other} unlabelled; mean cosine "
                f"{mixup.similarity:+.2f}, of all in the batch {mixup.candidates:+.2f}"
            )
            thumbs = []
            for place in range(min(TRIOS, len(mixup.labelled.index))):
                sides = (share, mixup.labelled), (1 - share, mixup.unlabelled)
                pair = (self.images[side.index[place]].float() for side in (mixup.unlabelled, mixup.labelled))
                mixed = torch.lerp(*pair, share).round().byte()
                target = [f"{part:.2f} {self.classes[int(side.label[place])][:9]}" for part, side in sides]
                thumbs += [self.thumb(side, place) for _, side in sides] + [panel.Thumb(mixed, None, "\n".join(target))]
            panel.thumbnails(strip, heading, thumbs)

    def thumb(self, margins: Margins, place: int) -> panel.Thumb:
        """An image with its label, the truth where that is another, and its margin."""
        right, label, truth = bool(margins.right[place]), int(margins.label[place]), int(margins.truth[place])
        lines = [self.classes[label][:11], *[f"is {self.classes[truth][:9]}"] * (not right)]
        lines.append(f"{float(margins.score[place]):+.2f}")
        return panel.Thumb(self.images[margins.index[place]], right, "\n".join(lines))
