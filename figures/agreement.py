"""Whether a run's numbers agree with the committed ones of that very run: identical, within a tolerance, or not.

Training on a CPU repeats its bits where processor, operating system, packages, threads, data and sources are the
same; there identical numbers are expected, and anything else is a warning. Elsewhere sums are rounded in another order.
Training amplifies that within some hundred steps, so the same seed may end almost as far away as another seed would;
seeds differ in their labelled images too, so their spread bounds it. The tolerance elsewhere is therefore `SPREADS`
standard deviations of the committed seeds of the same cell (the difference of two draws has a deviation of sqrt(2) of
these), but at least `FLOOR`; with fewer than `SEEDS` committed seeds, whose deviation says little, it is `FEW`.
Measured on one run only, restricted to older instructions of the processor (AVX2, then SSE): supervised training on
100 labels moved by .5 points of error and .2 of ECE, at tolerances of 5.9 and 4.4 points. Source: ours.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repro import runs
from repro.batch import local, records
from repro.experiment import Experiment, run_id
from repro.grid import PAPERS
from repro.measure.metrics import METRICS

IDENTICAL, WITHIN, DIFFERS, ABSENT = VERDICTS = ("identical", "within tolerance", "differs", "not committed")
SPREADS, SEEDS = 3.0, 3
# Least tolerance, and that of few committed seeds: fractions of one, and relative for numbers of other units.
FLOOR, FLOOR_RELATIVE = 0.01, 0.05
FEW, FEW_RELATIVE = 0.05, 0.2
FACTS = (
    "device", "processor", "instructions", "platform", "threads", "precision", "torch", "packages", "data_digest",
    "source_digest",
)  # fmt: skip
THE_SAME = "it is the committed run"


@dataclass(frozen=True)
class Agreement:
    """One headline metric of one finished run beside its committed number.

    measured, committed: as stored; None where undefined or not committed. tolerance: of their absolute difference, as
    stored; 0 where identical numbers are expected. verdict: one of VERDICTS.
    expected: whether platform, packages and sources are those of the committed run. because: in words, what is not.
    """

    experiment: Experiment
    run: str
    metric: str
    measured: float | None
    committed: float | None
    tolerance: float | None
    verdict: str
    expected: bool
    because: str

    @property
    def warning(self) -> bool:
        """Whether somebody should look: identical numbers were expected and are not there."""
        return self.expected and self.verdict not in (IDENTICAL, ABSENT)

    def row(self) -> dict[str, str]:
        """The comparison as text, for a table."""
        metric, both = METRICS[self.metric], None not in (self.measured, self.committed)
        shown, stated, allowed = (
            "undefined" if value is None else metric.show(value)
            for value in (self.measured, self.committed, self.tolerance)
        )
        return {
            "run": self.run,
            "metric": metric.title,
            "measured": shown,
            "committed": "" if self.verdict == ABSENT else stated,
            "difference": metric.show(self.measured - self.committed, signed=True) if both else "",
            "tolerance": "" if self.tolerance is None else allowed,
            "agreement": self.verdict,
            "because": self.because,
        }


def verdict(measured: float | None, committed: float | None, tolerance: float) -> str:
    """IDENTICAL, WITHIN or DIFFERS; None and NaN are undefined, and agree with each other alone."""
    first, second = (math.nan if value is None else float(value) for value in (measured, committed))
    if first == second or (math.isnan(first) and math.isnan(second)):
        return IDENTICAL
    return WITHIN if abs(first - second) <= tolerance else DIFFERS


def tolerance(metric: str, committed: float | None, seeds: Sequence[float]) -> float:
    """How far a number may lie from the committed one on another platform, as stored.

    committed: that number. seeds: the committed numbers of all seeds of the cell, this one among them. See the module.
    """
    unit = 1.0 if METRICS[metric].percent else abs(committed or 0.0)
    floor, few = (FLOOR, FEW) if METRICS[metric].percent else (FLOOR_RELATIVE * unit, FEW_RELATIVE * unit)
    defined = [value for value in seeds if not math.isnan(value)]
    return few if len(defined) < SEEDS else max(floor, SPREADS * statistics.stdev(defined))


def facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What decides whether identical numbers may be expected of a run: its platform and sources, as text.

    metrics: of a finished run. Facts that its record does not have are absent. Of packages and data only a short digest
    is kept, since the record of the run has the whole.
    """
    known = dict(metrics["provenance"]) | {"data_digest": _short(metrics.get("data_digest"))}
    if packages := known.get("packages"):
        known |= {"packages": _short(json.dumps(packages, sort_keys=True)), "torch": packages.get("torch")}
    return {name: str(known[name]) for name in FACTS if known.get(name) is not None}


def _short(text: str | None) -> str | None:
    return text and "d" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()  # a letter: never read as a number


def unlike(measured: Mapping[str, str], committed: Mapping[str, str]) -> str:
    """Why no identical numbers are expected: `other processor, packages; unknown: threads`; empty where they are.

    measured, committed: `facts` of either run.
    """
    both = [name for name in FACTS if name in measured and name in committed]
    other = [name for name in both if measured[name] != committed[name]]
    unsure = [name for name in FACTS if name not in both]
    parts = [f"{word} {', '.join(names)}" for word, names in (("other", other), ("unknown", unsure)) if names]
    return "; ".join(parts).replace("_", " ")


def compare(experiment: Experiment, metrics: Mapping[str, Any], committed: pd.DataFrame) -> list[Agreement]:
    """A finished run's headline metrics beside the committed ones: last evaluation, EMA weights.

    metrics: of that run. committed: what `records.load_numbers` returned.
    """
    run, final = run_id(experiment), metrics["reported"]["last"]["ema"]
    cell = committed[_like(committed, experiment)]
    own = cell[cell["run"] == run]
    why = unlike(facts(metrics), _facts_of(own))
    if len(own) and own["finished"].iloc[0] == str(metrics["provenance"].get("finished")):
        why = THE_SAME
    rows = []
    for name in dict.fromkeys(PAPERS[experiment.paper].HEADLINES):
        measured, numbers = final.get(name), own.loc[own["metric"] == name, "value"]
        if numbers.empty:
            because = "no committed run" if own.empty else "the committed run has no such metric"
            rows.append(Agreement(experiment, run, name, measured, None, None, ABSENT, False, because))
            continue
        stated = None if math.isnan(numbers.iloc[0]) else float(numbers.iloc[0])
        same = why in ("", THE_SAME)
        seeds = cell.loc[cell["metric"] == name, "value"].tolist()
        allowed = 0.0 if same else tolerance(name, stated, seeds)
        rows.append(
            Agreement(experiment, run, name, measured, stated, allowed, verdict(measured, stated, allowed), same, why)
        )
    return rows


def compare_all(
    experiments: Iterable[Experiment], root: Path | None = None, path: Path | None = None
) -> list[Agreement]:
    """`compare` for every finished run among the experiments, each run once.

    root: folder of runs. path: of the committed runs (`records.save`), by default the checkout's; without it, nothing
    is compared. Raises CorruptFile for a run that was edited.
    """
    frame = records.load_numbers(Path(path or local.COMMITTED))
    unique = {run_id(experiment): experiment for experiment in experiments}
    if frame.empty:
        return []
    rows = []
    for experiment in unique.values():
        if runs.is_finished(experiment, root):
            rows += compare(experiment, runs.load_metrics(runs.folder_of(experiment, root)), frame)
    return rows


def summary(rows: Sequence[Agreement]) -> list[str]:
    """The comparisons in lines of text: how many runs agree how well, then each that warns or differs."""
    if all(row.verdict == ABSENT for row in rows):
        return ["agreement with the committed results: none is committed of these runs"]
    by_run: dict[str, list[Agreement]] = {}
    for row in rows:
        by_run.setdefault(row.run, []).append(row)
    worst = [
        max(own, key=lambda row: (IDENTICAL, ABSENT, WITHIN, DIFFERS).index(row.verdict)) for own in by_run.values()
    ]
    counts = ", ".join(f"{n} {name}" for name in VERDICTS if (n := sum(row.verdict == name for row in worst)))
    lines = [f"agreement with the committed results, {len(by_run)} runs: {counts}"]
    for row in rows:
        if row.warning or row.verdict == DIFFERS:
            shown = row.row()
            why = "same platform, packages and sources" if row.expected else row.because
            lines.append(
                f"{'WARNING' if row.warning else 'differs'}: {local.title(row.experiment)}: {shown['metric']} "
                f"{shown['measured']}, committed {shown['committed']}, tolerance {shown['tolerance']} ({why})"
            )
    return lines


def _like(committed: pd.DataFrame, experiment: Experiment) -> pd.Series:
    """Which committed rows are of the experiment's cell, any seed."""
    asked = {name: str(getattr(experiment, name)) for name in ("method", "data", "labels", "scale")}
    asked["overrides"] = json.dumps(dict(experiment.overrides))
    return (committed[list(asked)] == list(asked.values())).all(axis=1) | (committed["run"] == run_id(experiment))


def _facts_of(own: pd.DataFrame) -> dict[str, str]:
    return {name: own[name].iloc[0] for name in FACTS if name in own and len(own) and own[name].iloc[0]}
