"""Explorers of runs from few labels: ComMatch's thresholds, reliability of test predictions, CalibrateMix's margins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from figures import style
from figures.calibration import Margins, Predictions, read_margins, short_label
from figures.explore.panel import (  # fmt: skip
    Explorer,
    Missing,
    Numbers,
    Panel,
    Thumb,
    bare,
    buttons,
    looks,
    opened,
    percent,
    thumbnails,
    whole,
)
from figures.style import label_of, where
from repro.data import splits
from repro.data.augment import Views
from repro.data.catalogue import SOURCES
from repro.experiment import Experiment, resolve
from repro.measure import calibration
from repro.measure.reliability import Bins, reliability
from repro.methods.few_labels import commatch
from repro.methods.few_labels.calibratemix import CalibrateMixSettings
from repro.methods.few_labels.pairing import PAIRINGS, cosine_similarity, draw_pairs
from repro.runs import folder_of, load_outputs

# ComMatch: which pseudo-labels some thresholds select

BINS = 15
LOOSEST = 0.53  # no deviation of ten values in [0, 1] reaches it
FLOOR = 1e-5  # smaller probabilities and deviations are drawn here


@dataclass(frozen=True, eq=False)
class Selection:
    """Pseudo-labels under limits. label, mask, confidence, deviation: (n,), of positives. negative_mask,
    negative_mean: (n, K). limits: t_p, s_p, t_n, s_n."""

    label: Tensor
    mask: Tensor
    confidence: Tensor
    deviation: Tensor
    negative_mask: Tensor
    negative_mean: Tensor
    limits: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Thresholds(Explorer):
    """Moves ComMatch's limits over n unlabelled images of a run's pool.

    passes: (T, n, K), softmax of dropout passes; the plain prediction alone for a run without. truth: (n,) hidden
    classes for the report, -1 unknown. images: (n, C, H, W) uint8. start: the four limits. temperature: of negatives.
    """

    passes: Tensor
    truth: Tensor
    images: Tensor
    classes: tuple[str, ...]
    title: str
    start: tuple[float, ...] = (0.95, 0.05, 3e-4, 0.005)
    temperature: float = 1.0
    words = "Probability and instability of pool images, and which of them are selected."
    size = (9.0, 6.9)

    @classmethod
    def read(cls, experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> "Thresholds":
        """A finished run at the end of its training, under ComMatch's published limits if its method has none."""
        outputs, recipe = load_outputs(folder_of(experiment, root)), resolve(experiment)
        pool, _ = splits.open_pool(experiment.split, data_root)
        own = recipe.method if isinstance(recipe.method, commatch.ComMatchSettings) else commatch.ComMatchSettings()
        positive, negative = commatch.thresholds(own, (recipe.steps - 1) // recipe.epoch_steps)
        stable = own.stability == "dropout"
        start = (positive, own.positive_stability if stable else LOOSEST,
                 negative, own.negative_stability if stable else LOOSEST)  # fmt: skip
        passes = outputs.get("pool_passes", outputs["pool_logits"].softmax(1)[None])
        note = ". This run kept no dropout passes: instability is 0, its limits do nothing" * (len(passes) == 1)
        title = f"{label_of(experiment)}, {where([experiment])}{note}"
        images = pool.images[outputs["pool_index"]]
        return cls(passes, outputs["pool_truth"], images, pool.classes, title, start, own.negative_temperature)

    def controls(self) -> dict[str, widgets.Widget]:
        off, (t_p, s_p, t_n, s_n) = len(self.passes) == 1, self.start

        def linear(words: str, value: float, high: float, step: float, **more) -> widgets.FloatSlider:
            return widgets.FloatSlider(value, min=0, max=high, step=step, readout_format=".3f", **looks(words), **more)

        def powers(words: str, value: float, high: float, **more) -> widgets.FloatLogSlider:
            step, exponent = 0.05, math.log10(max(value, FLOOR))
            low = -5 + (exponent + 5) % step  # the steps pass through `value`, or the page would round it away
            how = {"min": low, "max": high, "step": step, "readout_format": ".5f"}
            return widgets.FloatLogSlider(10**exponent, **how, **looks(words), **more)

        return {
            "positive_threshold": linear("t_p, positive threshold", t_p, 1, 0.005),
            "positive_stability": linear("s_p, positive stability", s_p, LOOSEST, 0.001, disabled=off),
            "negative_threshold": powers("t_n, negative threshold", t_n, 0),
            "negative_stability": powers("s_n, negative stability", s_n, math.log10(LOOSEST), disabled=off),
        }

    def spread(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n, K) over the passes at a temperature."""
        passes = self.passes
        if temperature != 1.0:
            passes = (passes.clamp(min=1e-12).log() / temperature).softmax(dim=-1)
        if len(passes) > 1:
            return commatch.instability(passes)
        return passes[0], torch.zeros_like(passes[0])

    def compute(self, positive_threshold, positive_stability, negative_threshold, negative_stability) -> Selection:
        mean, deviation = self.spread()
        label, mask, confidence = commatch.select_positive(mean, deviation, positive_threshold, positive_stability)
        own = deviation.gather(1, label[:, None])[:, 0]
        mean, deviation = self.spread(self.temperature)
        negative = commatch.select_negative(mean, deviation, negative_threshold, negative_stability, spared=label)
        limits = (positive_threshold, positive_stability, negative_threshold, negative_stability)
        return Selection(label, mask, confidence, own, negative, mean, limits)

    def numbers(self, seen: Selection) -> Numbers:
        columns = ("", "selected", "coverage", "accuracy", "mean confidence", f"ECE, {BINS} bins")
        known, wrong = self.truth >= 0, torch.arange(seen.negative_mask.shape[1]) != self.truth[:, None]
        groups = (
            ("positives", seen.mask, known, seen.confidence, seen.label == self.truth),
            ("negatives", seen.negative_mask, known[:, None], 1 - seen.negative_mean, wrong),
        )
        rows = []
        for name, mask, judged, confidence, correct in groups:
            shares = [float(mask.double().mean()), *quality(confidence[mask & judged], correct[mask & judged])]
            cells = ("none" if share is None else percent(share, 2) for share in shares)
            rows.append((name, f"{int(mask.sum()):,} of {mask.numel():,}", *cells))
        limits = zip(("t_p", "s_p", "t_n", "s_n"), seen.limits, strict=True)
        return Numbers("At " + ", ".join(f"{name} = {value:.3g}" for name, value in limits) + ".", columns, rows)

    def strips(self, seen: Selection, shown: int = 12) -> list[tuple[str, list[int], bool]]:
        """Images worth a look, as heading, places and whether they are mistaken negatives: the surest positives, the
        least sure ones, and those whose true class is held to be wrong, the least probable first."""
        chosen = seen.mask.nonzero()[:, 0]
        order = chosen[seen.confidence[chosen].argsort(descending=True, stable=True)].tolist()
        true = self.truth.clamp(min=0)[:, None]
        worst = (seen.negative_mask.gather(1, true)[:, 0] & (self.truth >= 0)).nonzero()[:, 0]
        worst = worst[seen.negative_mean.gather(1, true)[worst, 0].argsort(stable=True)].tolist()
        return [
            (f"Surest positives ({len(order):,} in all)", order[:shown], False),
            ("Least sure positives", order[shown:][::-1][:shown], False),
            (f"True class among the negatives ({len(worst):,} in all)", worst[:shown], True),
        ]

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
            for axis in (axes.xaxis, axes.yaxis):  # minor ticks and mathematical text take longer than all the rest
                axis.set_minor_locator(NullLocator())
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.tick_params(labelsize=7)
        left.set_title("Positives: image, most probable class", fontsize=9)
        left.set(xlim=(0, 1.01), xlabel="confidence (mean over passes)", ylabel="instability (deviation)")
        right.set_title("Negatives: image, any other class", fontsize=9)
        right.set(xlim=(FLOOR, 1), xlabel="probability (mean over passes)")
        left.legend(loc="lower left", fontsize=7, markerscale=3)
        strips = [figure.add_axes((0.01, 0.345 - 0.165 * number, 0.98, 0.14)) for number in range(3)]
        for axes in strips:
            bare(axes)
        return [left, right, *strips]

    def draw(self, axes: Sequence[Axes], seen: Selection) -> None:
        left, right, *strips = axes
        t_p, s_p, t_n, s_n = seen.limits
        region = {"facecolor": (*style.BLUE, 0.15), "edgecolor": style.BLUE, "linewidth": 1.5}
        left.add_patch(Rectangle((t_p, FLOOR / 2), 1.01 - t_p, max(s_p, FLOOR) - FLOOR / 2, **region))
        right.add_patch(Rectangle((FLOOR, FLOOR / 2), max(t_n - FLOOR, 0), max(s_n, FLOOR) - FLOOR / 2, **region))
        for strip, (heading, places, mistaken) in zip(strips, self.strips(seen), strict=True):
            thumbs = []
            for place in places:
                truth, label = int(self.truth[place]), int(seen.label[place])
                p = float(seen.negative_mean[place, truth] if mistaken else seen.confidence[place])
                share = f"{100 * p:.1f} %" if p > 1e-3 else f"{100 * p:.0e} %"
                name = self.classes[truth if mistaken else label][:11]
                good = not mistaken and truth in (label, -1)
                thumbs.append(Thumb(self.images[place], good, f"{name}\n{share}"))
            thumbnails(strip, heading if places else f"{heading}: none", thumbs)


def quality(confidence: Tensor, correct: Tensor) -> tuple[float | None, ...]:
    """Accuracy, mean confidence and ECE of (m,) predictions, None of none."""
    if not len(confidence):
        return None, None, None
    confidence = confidence.double()
    means = correct.double().mean(), confidence.mean(), calibration.ece(confidence, correct, BINS)
    return tuple(float(value) for value in means)


def thresholds(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Panel | Figure:
    """Which pseudo-labels of a finished run ComMatch's limits would select, and how right they would be."""
    title = "Thresholds over a saved run"
    return opened(title, [experiment], root, lambda _: Thresholds.read(experiment, root, data_root))


# Reliability of test predictions

SWEEP = torch.logspace(-1, 1, 41, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Diagram:
    """A run's reliability: bins at the position, ECE and NLL (nats) along SWEEP, and rows of name, temperature,
    accuracy, ECE, adaptive ECE, MCE, NLL, Brier score."""

    run: str
    bins: Bins
    ece: list[float]
    nll: list[float]
    rows: list[tuple]


class Reliability(Explorer):
    """Temperature, bins and closing over the test predictions of runs, by name."""

    title = "Reliability on test images"
    words = "Accuracy against confidence in bins, and the errors along the temperature."
    size = (9.0, 4.3)

    def __init__(self, runs: dict[str, Predictions]) -> None:
        self.runs, self.along = runs, {}
        for name, predictions in runs.items():  # what no control changes
            probs = [predictions.probs(float(temperature)) for temperature in SWEEP]
            nll = [float(calibration.nll(at, predictions.labels)) for at in probs]
            self.along[name] = [at.amax(1) for at in probs], nll

    def controls(self) -> dict[str, widgets.Widget]:
        scale = {"min": -1, "max": 1, "step": 0.02, "readout_format": ".3f"}
        return {
            "run": buttons("run", {name: name for name in self.runs}, next(iter(self.runs))),
            "temperature": widgets.FloatLogSlider(1.0, **scale, **looks("T, temperature")),
            "bins": whole("bins", 15, 1, 50),
            "closing": buttons("closing", {"(lo, hi]": "right", "[lo, hi)": "left"}, "right"),
            "spacing": buttons("spacing", {"equal width": "width", "equal count": "mass"}, "width"),
        }

    def compute(self, run: str, temperature: float, bins: int, closing: str, spacing: str) -> Diagram:
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
        return Diagram(run, at["here"], errors, nll, rows)

    def numbers(self, seen: Diagram) -> Numbers:
        columns = ("", "accuracy", "ECE", "adaptive ECE", "MCE", "NLL (nats)", "Brier")
        rows = [
            (f"{name}, T = {heat:.3g}", *(percent(share, 2) for share in shares), f"{nll:.4f}", f"{brier:.4f}")
            for name, heat, *shares, nll, brier in seen.rows
        ]
        return Numbers(f"{seen.run}, {len(seen.bins.count)} bins.", columns, rows)

    def layout(self, figure: FigureBase) -> list[Axes]:
        diagram, counts = figure.add_axes((0.07, 0.3, 0.4, 0.62)), figure.add_axes((0.07, 0.1, 0.4, 0.17))
        errors = figure.add_axes((0.56, 0.1, 0.37, 0.82))
        losses = errors.twinx()
        diagram.plot([0, 1], [0, 1], color=style.INK, linewidth=1)
        diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", xticklabels=[])
        diagram.set_title("Accuracy (blue) and its gap to the mean confidence (orange)", fontsize=9)
        counts.set(xlim=(0, 1), xlabel="confidence", ylabel="images")
        errors.set(xscale="log", xlim=(0.1, 10), xlabel="temperature", xticks=[0.1, 0.3, 1, 3, 10])
        errors.xaxis.set_minor_locator(NullLocator())
        errors.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        errors.yaxis.set_label_text("ECE", color=style.BLUE)
        losses.yaxis.set_label_text("NLL (nats)", color=style.ORANGE)
        losses.grid(False)
        for axes in (diagram, counts, errors, losses):
            axes.tick_params(labelsize=7)
        return [diagram, counts, errors, losses]

    def draw(self, axes: Sequence[Axes], seen: Diagram) -> None:
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


def reliability_of(experiments: Sequence[Experiment], root: Path | None = None) -> Panel | Figure:
    """Reliability diagrams and calibration errors of finished runs at any temperature and binning."""

    def read(done: list[Experiment]) -> Reliability:
        return Reliability({f"{short_label(item)}, {where([item])}": Predictions.of(item, root) for item in done})

    return opened("Reliability of saved runs", experiments, root, read)


# CalibrateMix: hard and easy images, and what is mixed with what

KINDS = ("labelled", "unlabelled")
AROUND = 24  # images shown around a percentile
TRIOS = 4  # mixtures shown of each mixup


@dataclass(frozen=True)
class Mixup:
    """One mixup of a batch: which halves meet, and the pairs (n,).

    similarity: mean cosine of the pairs. candidates: mean cosine of every labelled image with all in the batch.
    """

    halves: tuple[str, str]
    labelled: Margins
    unlabelled: Margins
    similarity: float
    candidates: float


@dataclass(frozen=True, eq=False)
class Mixing:
    """The images around a percentile of the margin, hardest first, and the mixups of a batch, [] of too few images.

    score: at the percentile. shares: of right labels, None of none: of the images shown, of the harder ones and of the
    easier ones. weight: lambda.
    """

    kind: str
    percentile: int
    images: Margins
    score: float
    shares: dict[str, float | None]
    mixups: list[Mixup]
    weight: float


@dataclass(frozen=True, eq=False)
class Mixtures(Explorer):
    """Margins of a run, and mixtures of its images by the method's own functions.

    margins: by KINDS. images: (N, C, H, W) uint8, the pool. plain: normalises them. sizes: of both batches.
    """

    margins: dict[str, Margins]
    images: Tensor
    plain: Views
    classes: tuple[str, ...]
    settings: CalibrateMixSettings
    sizes: tuple[int, int]
    title: str
    words = "Images by margin, and mixtures."
    size = (9.0, 5.4)

    @classmethod
    def read(cls, experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> "Mixtures":
        """A finished run and its images; raises Missing for one without margins."""
        both = read_margins(experiment, root)
        if both is None:
            raise Missing("margins")
        recipe, source = resolve(experiment), SOURCES[experiment.data]
        pool, _ = splits.open_pool(experiment.split, data_root)
        plain, sizes = Views(source.mean, source.std, flip=False), (recipe.batch, recipe.batch * recipe.unlabelled_ratio)
        title = f"{short_label(experiment)}, {where([experiment])}"
        margins = dict(zip(KINDS, both, strict=True))
        return cls(margins, pool.images, plain, pool.classes, recipe.method, sizes, title)

    def controls(self) -> dict[str, widgets.Widget]:
        own, partners = self.settings, ("dissimilar", "random", "similar")
        return {
            "kind": buttons("images", {name: name for name in KINDS}, "unlabelled"),
            "percentile": whole("percentile of the margin", 5, 0, 100),
            "weight": widgets.FloatSlider(0.5, min=0, max=1, step=0.05, **looks("lambda, labelled share")),
            "batch": whole("batch", 0, 0, 99),
            "partner": widgets.Dropdown(options=partners, value=own.partner, **looks("partner")),
            "pool": whole("k, candidates", own.pool, 1, max(45, own.pool)),
        }

    def compute(self, kind: str, percentile: int, weight: float, batch: int, partner: str, pool: int) -> Mixing:
        """batch: seed of the batch and of the partners. partner, pool: as in `draw_pairs`."""
        margins = self.margins[kind]
        order = margins.score.argsort(stable=True)
        middle = round(percentile / 100 * (len(order) - 1)) if len(order) else 0
        first = max(0, min(middle - AROUND // 2, len(order) - AROUND))
        parts = {"shown": order[first : first + AROUND], "harder": order[:first], "easier": order[first + AROUND :]}
        shares = {}
        for name, places in parts.items():
            known = margins.only(places[margins.truth[places] >= 0])
            shares[name] = float(known.right.double().mean()) if len(known.index) else None
        score = float(margins.score[order[middle]]) if len(order) else math.nan
        mixups = self.mixups(batch, partner, pool)
        return Mixing(kind, percentile, margins.only(parts["shown"]), score, shares, mixups, weight)

    def mixups(self, batch: int, partner: str, pool: int) -> list[Mixup]:
        """The mixups of a batch drawn without repeats; likeness is that of plain pixels, not of weak views."""
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
            Mixup(halves, labelled.only(row), unlabelled.only(column), float(alike[row, column].mean()),
                  float(alike[row].mean()))
            for halves, (row, column) in zip(PAIRINGS[self.settings.pairing], pairs, strict=True)
        ]  # fmt: skip

    def numbers(self, seen: Mixing) -> Numbers:
        count = len(self.margins[seen.kind].index)
        if not count:
            return Numbers(f"No {seen.kind} image has a margin: the warm-up was not over.", (), ())
        what = "labels" if seen.kind == "labelled" else "pseudo-labels"
        shares = [f"{percent(share)} of those {name}" for name, share in seen.shares.items() if share is not None]
        score = f"{seen.images.name}: {seen.score:+.2f} at percentile {seen.percentile} of {count:,} images"
        return Numbers(f"{score}. Right {what}: {', '.join(shares)}.", (), ())

    def layout(self, figure: FigureBase) -> list[Axes]:
        boxes = [(0.01, 0.56, 0.98, 0.38), *((0.01, 0.29 - 0.27 * number, 0.98, 0.19) for number in range(2))]
        strips = [figure.add_axes(box) for box in boxes]
        for axes in strips:
            bare(axes)
        return strips

    def draw(self, axes: Sequence[Axes], seen: Mixing) -> None:
        images, *strips = axes
        heading = f"{seen.kind} images around percentile {seen.percentile} of their margins, hardest first"
        thumbnails(images, heading, [self.thumb(seen.images, place) for place in range(len(seen.images.index))], 2)
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
                mixed = blend(*(self.images[side.index[place]] for _, side in sides), share)
                target = [f"{part:.2f} {self.classes[int(side.label[place])][:9]}" for part, side in sides]
                thumbs += [self.thumb(side, place) for _, side in sides] + [Thumb(mixed, None, "\n".join(target))]
            thumbnails(strip, heading, thumbs)

    def thumb(self, margins: Margins, place: int) -> Thumb:
        """An image with its label, the truth where that is another, and its margin."""
        right, label, truth = bool(margins.right[place]), int(margins.label[place]), int(margins.truth[place])
        lines = [self.classes[label][:11], *[f"is {self.classes[truth][:9]}"] * (not right)]
        lines.append(f"{float(margins.score[place]):+.2f}")
        return Thumb(self.images[margins.index[place]], right, "\n".join(lines))


def blend(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """weight * own + (1 - weight) * other of uint8 images, rounded to uint8."""
    return (weight * own.float() + (1 - weight) * other.float()).round().to(torch.uint8)


def margins(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Panel | Figure:
    """Images of a finished CalibrateMix run by their margins, and what it would mix from a batch."""
    title = "Training pictures by margin"
    return opened(title, [experiment], root, lambda _: Mixtures.read(experiment, root, data_root))
