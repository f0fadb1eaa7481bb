"""Deciding claims: paired differences over seeds, their bootstrap interval, and a sign-flip test.

The unit is a seed: both sides train on the same labelled subset, and their difference is one observation. A claim is
supported if the whole interval lies on its side and the sign-flip test gives p < .05, contradicted if both hold on the
other side, and inconclusive otherwise. With n seeds the smallest p is 1 / 2^n, so there is no verdict below 5 seeds,
where 1 / 2^5 = .031 is the first value under .05. Each claim is decided by itself: nothing corrects for their number.
Source: chosen here (standard resampling tests).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from figures.tables import NOT_RUN, check_reporting
from repro.experiment import Experiment, run_id
from repro.grid import EMBEDDED, TITLES, Claim, checked_seeds
from repro.measure.metrics import METRICS, Metric
from repro.runs import folder_of, is_finished, load_history, load_metrics, load_outputs
from repro.settings import unknown

ALPHA = 0.05
MINIMUM_SEEDS = next(n for n in itertools.count(1) if 0.5**n < ALPHA)  # 5
SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
VERDICTS = (SUPPORTED, CONTRADICTED, INCONCLUSIVE, NOT_RUN)
EXACT_RESAMPLES, EXACT_FLIPS, DRAWS = 8, 16, 20_000
INSTABILITY_BINS = 10


# The tests


def bootstrap_interval(differences: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences.

    differences: (n >= 1,) finite, one a seed. level: coverage in (0, 1).
    Up to n = 8 all n^n resamples count (as multisets with their multiplicities), so nothing is random. Beyond, SciPy
    draws 20,000 with `seed`. The lower end is the smallest mean m with P(mean <= m) >= (1 - level) / 2, and the upper
    end its mirror image, so negated differences give the negated interval.
    """
    values = _finite(differences)
    n, tail = len(values), (1 - level) / 2
    if n > EXACT_RESAMPLES:
        from scipy import stats

        drawn = {"confidence_level": level, "method": "percentile", "n_resamples": DRAWS, "rng": seed}
        return tuple(map(float, stats.bootstrap((values,), np.mean, **drawn).confidence_interval))
    picks = itertools.combinations_with_replacement(range(n), n)
    counts = np.array([np.bincount(pick, minlength=n) for pick in picks])
    weights = np.array([math.factorial(n) // math.prod(map(math.factorial, row)) for row in counts.tolist()])
    means = counts @ values / n
    return _lower_quantile(means, weights, tail), -_lower_quantile(-means, weights, tail)


def _lower_quantile(values: np.ndarray, weights: np.ndarray, tail: float) -> float:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    # A tail lowered by 1e-12 counts a cumulative share that equals it as reached despite rounding.
    return float(values[order][np.searchsorted(below, tail * below[-1] * (1 - 1e-12))])


def sign_flip_test(differences: Sequence[float], seed: int = 0) -> float:
    """One-sided p of mean(differences) > 0 if each difference were as likely to have the other sign.

    differences: (n >= 1,) finite. The share of sign patterns whose mean is at least the observed one: of all 2^n up to
    n = 16, so p >= 1 / 2^n. Beyond, SciPy draws 20,000 with `seed` and counts the observed one among them. Ties within
    1e-9 of the sum of magnitudes count as reached.
    """
    values = _finite(differences)
    n = len(values)
    if n > EXACT_FLIPS:
        from scipy import stats

        drawn = {"permutation_type": "samples", "alternative": "greater", "n_resamples": DRAWS, "rng": seed}
        return float(stats.permutation_test((values,), np.mean, **drawn).pvalue)
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    return float((signs @ values >= values.sum() - 1e-9 * np.abs(values).sum()).mean())


def _finite(differences: Sequence[float]) -> np.ndarray:
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences are {differences!r}; they must be one or more finite numbers")
    return values


def judge(gains: Sequence[float]) -> str:
    """The verdict on gains, (n >= 1,), whose sign is such that the claim puts them above 0."""
    if len(gains) < MINIMUM_SEEDS:
        return INCONCLUSIVE
    low, high = bootstrap_interval(gains)
    if low > 0 and sign_flip_test(gains) < ALPHA:
        return SUPPORTED
    if high < 0 and sign_flip_test([-gain for gain in gains]) < ALPHA:
        return CONTRADICTED
    return INCONCLUSIVE


# Statistics of a run that are not stored metrics


def early_error(folder: Path, weights: str = "ema") -> float:
    """Test error at the first evaluation from a tenth of the steps on; NaN without a history. Source: chosen here, for
    Fig. 3's text."""
    rows = load_history(folder).of("evaluation")
    late = [row[weights]["error"] for row in rows if row["step"] >= rows[-1]["step"] / 10]
    return late[0] if late else math.nan


def instability_correlation(folder: Path, weights: str = "ema") -> float:
    """Spearman correlation of instability with the calibration gap |accuracy - confidence|, over bins.

    Bins: tenths, by rank, of the run's kept unlabelled images of known truth. Instability: deviation (T - 1) of the
    argmax class's probability over the dropout passes; confidence and argmax are those of their mean. NaN without
    dropout passes, and as in `gap_correlation`. Outputs are always those of the EMA weights.
    Source: reconstruction of Fig. 5, whose axis cannot be this deviation beyond .53.
    """
    outputs = load_outputs(folder) if (folder / "outputs.safetensors").exists() else {}
    if "pool_passes" not in outputs:
        return math.nan
    passes, truth = outputs["pool_passes"].double(), outputs["pool_truth"]
    mean, deviation = passes.mean(dim=0), passes.std(dim=0)
    confidence, label = mean.max(dim=1)
    columns = deviation.gather(1, label[:, None])[:, 0], confidence, label == truth
    return gap_correlation(*(column[truth >= 0].numpy() for column in columns))


def gap_correlation(
    instability: np.ndarray, confidence: np.ndarray, correct: np.ndarray, bins: int = INSTABILITY_BINS
) -> float:
    """Spearman correlation over equal-count bins of mean instability with |accuracy - mean confidence|.

    instability, confidence: (n,); correct: (n,) bool. NaN with fewer than 3 bins or where either side is constant.
    """
    order = np.argsort(instability, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    centres = np.array([instability[group].mean() for group in groups])
    gaps = np.array([abs(correct[group].mean() - confidence[group].mean()) for group in groups])
    if len(groups) < 3 or np.ptp(centres) == 0 or np.ptp(gaps) == 0:
        return math.nan
    return float(pd.Series(centres).corr(pd.Series(gaps), method="spearman"))


# Name -> (how it is shown, its value from a run folder and kind of weights).
STATISTICS: dict[str, tuple[Metric, Callable[[Path, str], float]]] = {
    "early_error": (Metric("error (%) after a tenth of the steps"), early_error),
    "instability_correlation": (
        Metric("Spearman correlation of instability and calibration gap", percent=False, lower=False),
        instability_correlation,
    ),
}


def statistic(experiment: Experiment, metric: str, root: Path | None, rule: str, weights: str) -> float:
    """A finished run's stored metric under a reporting rule, or one of STATISTICS; NaN where undefined."""
    folder = folder_of(experiment, root)
    if metric in STATISTICS:
        return STATISTICS[metric][1](folder, weights)
    value = load_metrics(folder)["reported"][rule][weights].get(metric)
    return math.nan if value is None else float(value)


# Verdicts


@dataclass(frozen=True)
class Verdict:
    """What the finished runs decide about a claim.

    scope: data and scale that it holds for. metric: how effects are shown. effect: mean of left minus right (of left
    alone if the claim has no right side), as stored; None without a complete pair. low, high: its 95 % bootstrap
    interval, None below two seeds. p: one-sided sign-flip p of the claim. seeds, differences: of the complete pairs.
    missing: ids of runs that are not finished. undefined: seeds whose statistic is undefined.
    """

    claim: Claim
    verdict: str
    scope: str
    metric: Metric
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    seeds: tuple[int, ...] = ()
    differences: tuple[float, ...] = ()
    missing: tuple[str, ...] = ()
    undefined: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Number of complete pairs."""
        return len(self.differences)

    @property
    def explanation(self) -> str:
        """Why this verdict, in a sentence."""
        if self.n == 0:
            undefined = f"undefined for seeds {', '.join(map(str, self.undefined))}"
            return f"{undefined if self.undefined else 'no seed is finished'}; needs {MINIMUM_SEEDS} seeds"
        if (needed := MINIMUM_SEEDS - self.n) > 0:
            return f"needs {needed} more seed{'s' * (needed > 1)}: with {self.n}, p is at least {0.5**self.n:.3g}"
        margin = f" (margin {self.metric.show(self.claim.margin)})" if self.claim.margin else ""
        if self.verdict == INCONCLUSIVE:
            return f"the interval or the sign-flip test does not exclude no effect{margin}"
        return f"the interval and the sign-flip test agree{margin}"

    def row(self) -> dict[str, str | int]:
        """The verdict as text, for a table."""
        show, stated, printed = self.metric.show, self.claim.published, ""
        if stated is not None:
            sign = "-" if self.claim.direction == "lower" else "+"
            printed = f"{sign}{stated} points, {stated.dataset}, {stated.budget}"
        effect, low, high = (
            "" if one is None else show(one, signed=True) for one in (self.effect, self.low, self.high)
        )
        return {
            "claim": self.claim.text,
            "source": self.claim.source,
            "verdict": self.verdict,
            "scope": self.scope,
            "metric": self.metric.title,
            "effect": effect and f"{effect}{self.metric.unit}",
            "95 % interval": low and f"[{low}, {high}]",
            "p (sign flips, one-sided)": "" if self.p is None else f"{self.p:.3g}",
            "n": self.n,
            "published effect": printed,
            "because": self.explanation,
        }


def decide(
    claim: Claim, scale: str = "mini", seeds: Sequence[int] = tuple(range(MINIMUM_SEEDS)), root: Path | None = None,
    rule: str = "last", weights: str = "ema",
) -> Verdict:  # fmt: skip
    """Decide a claim from finished runs; only seeds with both sides count.

    rule, weights: as in `tables.compare`. Raises SettingError for unknown names, CorruptFile for an edited run.
    """
    check_reporting(rule, weights)
    if claim.metric not in METRICS and claim.metric not in STATISTICS:
        raise unknown("metric", claim.metric, [*METRICS, *STATISTICS])
    differences, missing, undefined = {}, [], []
    for seed in checked_seeds(seeds):
        sides = [side for side in claim.pair(scale, seed) if side is not None]
        if absent := [run_id(side) for side in sides if not is_finished(side, root)]:
            missing += absent
            continue
        left, *right = (statistic(side, claim.metric, root, rule, weights) for side in sides)
        difference = left - right[0] if right else left
        if math.isnan(difference):
            undefined.append(seed)
        else:
            differences[seed] = difference
    metric = STATISTICS[claim.metric][0] if claim.metric in STATISTICS else METRICS[claim.metric]
    where, outcome = scope([claim], scale), {"missing": tuple(missing), "undefined": tuple(undefined)}
    if not differences:
        return Verdict(claim, NOT_RUN, where, metric, **outcome)
    values = tuple(differences.values())
    sign = -1 if claim.direction == "lower" else 1
    gains = [sign * value + claim.margin for value in values]
    low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
    outcome |= {"effect": float(np.mean(values)), "low": low, "high": high, "p": sign_flip_test(gains)}
    outcome |= {"seeds": tuple(differences), "differences": values}
    return Verdict(claim, judge(gains), where, metric, **outcome)


def scope(claims: Iterable[Claim], scale: str) -> str:
    """What verdicts are about: `on the embedded data (Fashion-MNIST part, 100 / 250 labels), mini scale`, data once."""
    budgets: dict[tuple[str, str], list[int]] = {}
    for column in dict.fromkeys(claim.column_at(scale) for claim in claims):
        budgets.setdefault((column.data, column.words), []).append(column.labels)
    titles = [(data, f"{TITLES.get(data, data)}, {words.format(' / '.join(map(str, labels)))}")
              for (data, words), labels in budgets.items()]  # fmt: skip
    embedded = "; ".join(title for data, title in titles if data in EMBEDDED)
    places = [f"the embedded data ({embedded})"] if embedded else []
    places += [title for data, title in titles if data not in EMBEDDED]
    return f"on {' and '.join(places)}, {scale} scale"


def as_frame(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a frame of text indexed by claim id."""
    index = pd.Index([verdict.claim.id for verdict in verdicts], name="id")
    return pd.DataFrame([verdict.row() for verdict in verdicts], index=index)
