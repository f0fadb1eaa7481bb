"""Whether a run's numbers agree with the committed numbers of the same run: identical, within a tolerance, or not.

Training on a CPU repeats its bits where processor, operating system, packages, threads, data and sources are the same.
There identical numbers are expected, and anything else is a warning. Elsewhere sums are rounded in another order, and
training amplifies that: the same seed may end almost as far away as another seed would. The tolerance elsewhere is
therefore `SPREADS` standard deviations of the committed seeds of the same cell (the difference of two draws deviates by
sqrt(2) of one), and at least `FLOOR`. With fewer than `SEEDS` committed seeds it is `FEW`. Source: chosen here. For
scale: supervised training on 100 labels, restricted to older instructions of one processor (AVX2, then SSE), moved by
.5 points of error and .2 of ECE, at tolerances of 5.9 and 4.4 points.
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
from repro.batch import records
from repro.batch.progress import title
from repro.experiment import Experiment, run_id
from repro.grid import PAPERS
from repro.measure.metrics import METRICS

IDENTICAL, WITHIN, DIFFERS, ABSENT = VERDICTS = ("identical", "within tolerance", "differs", "not committed")
SPREADS, SEEDS = 3.0, 3
# Least tolerance, and that of few committed seeds: fractions of one, and relative for numbers of other units.
FLOOR, FLOOR_RELATIVE = 0.01, 0.05
FEW, FEW_RELATIVE = 0.05, 0.2
FACTS = ("device", "processor", "instructions", "platform", "threads", "precision", "torch", "packages", "data_digest",
         "source_digest")  # fmt: skip
THE_SAME = "it is the committed run"


@dataclass(frozen=True)
class Agreement:
    """One headline metric of one finished run beside its committed number.

    measured, committed, tolerance: as stored; None where undefined or not committed. tolerance: of the absolute
    difference, 0 where identical numbers are expected. verdict: one of VERDICTS. expected: whether platform, packages
    and sources are those of the committed run; because: in words, which are not.
    """

    experiment: Experiment
    metric: str
    measured: float | None
    committed: float | None
    tolerance: float | None
    verdict: str
    expected: bool
    because: str

    @property
    def run(self) -> str:
        """The run's id."""
        return run_id(self.experiment)

    @property
    def warning(self) -> bool:
        """Whether identical numbers were expected and are not there."""
        return self.expected and self.verdict not in (IDENTICAL, ABSENT)

    def row(self) -> dict[str, str]:
        """The comparison as text, for a table."""
        metric, numbers = METRICS[self.metric], (self.measured, self.committed)
        measured, committed = ("undefined" if value is None else metric.show(value) for value in numbers)
        return {
            "run": self.run,
            "metric": metric.title,
            "measured": measured,
            "committed": "" if self.verdict == ABSENT else committed,
            "difference": "" if None in numbers else metric.show(self.measured - self.committed, signed=True),
            "tolerance": "" if self.tolerance is None else metric.show(self.tolerance),
            "agreement": self.verdict,
            "because": self.because,
        }


def verdict(measured: float | None, committed: float | None, tolerance: float) -> str:
    """IDENTICAL, WITHIN or DIFFERS; None and NaN mean undefined, and agree with each other alone."""
    first, second = (math.nan if value is None else float(value) for value in (measured, committed))
    if first == second or (math.isnan(first) and math.isnan(second)):
        return IDENTICAL
    return WITHIN if abs(first - second) <= tolerance else DIFFERS


def tolerance(metric: str, committed: float | None, seeds: Sequence[float]) -> float:
    """How far a number may lie from the committed one on another platform, as stored; see the module.

    seeds: the committed numbers of all seeds of the cell, this one among them.
    """
    unit = 1.0 if METRICS[metric].percent else abs(committed or 0.0)
    floor, few = (FLOOR, FEW) if METRICS[metric].percent else (FLOOR_RELATIVE * unit, FEW_RELATIVE * unit)
    defined = [value for value in seeds if not math.isnan(value)]
    return few if len(defined) < SEEDS else max(floor, SPREADS * statistics.stdev(defined))


def facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The platform and sources of a finished run as text; facts that its record lacks are absent.

    Of packages and data a short digest is kept, since the record of the run has the whole.
    """
    known = dict(metrics["provenance"]) | {"data_digest": _short(metrics.get("data_digest"))}
    if packages := known.get("packages"):
        known |= {"packages": _short(json.dumps(packages, sort_keys=True)), "torch": packages.get("torch")}
    return {name: str(known[name]) for name in FACTS if known.get(name) is not None}


def _short(text: str | None) -> str | None:
    return text and "d" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()  # a letter: never read as a number


def unlike(measured: Mapping[str, str], committed: Mapping[str, str]) -> str:
    """Why identical numbers are not expected: `other processor, packages; unknown threads`; empty if they are.

    measured, committed: `facts` of either run.
    """
    both = [name for name in FACTS if name in measured and name in committed]
    other = [name for name in both if measured[name] != committed[name]]
    unsure = [name for name in FACTS if name not in both]
    parts = [f"{word} {', '.join(names)}" for word, names in (("other", other), ("unknown", unsure)) if names]
    return "; ".join(parts).replace("_", " ")


def compare(experiment: Experiment, metrics: Mapping[str, Any], committed: pd.DataFrame) -> list[Agreement]:
    """A finished run's headline metrics beside the committed ones: last evaluation, EMA weights.

    metrics: of that run. committed: of `records.load_numbers`.
    """
    run, measured = run_id(experiment), metrics["reported"]["last"]["ema"]
    cell_of = {name: str(getattr(experiment, name)) for name in ("method", "data", "labels", "scale")}
    cell_of["overrides"] = json.dumps(dict(experiment.overrides))
    in_cell = (committed[list(cell_of)] == list(cell_of.values())).all(axis=1) | (committed["run"] == run)
    cell = committed[in_cell]  # any seed
    own = cell[cell["run"] == run]
    first = own.iloc[0] if len(own) else {}
    why = unlike(facts(metrics), {name: first[name] for name in FACTS if name in first and first[name]})
    if len(own) and first["finished"] == str(metrics["provenance"].get("finished")):
        why = THE_SAME
    same, rows = why in ("", THE_SAME), []
    for name in dict.fromkeys(PAPERS[experiment.paper].spec.headlines):
        value, numbers = measured.get(name), own.loc[own["metric"] == name, "value"]
        if numbers.empty:
            because = "no committed run" if own.empty else "the committed run has no such metric"
            rows.append(Agreement(experiment, name, value, None, None, ABSENT, False, because))
            continue
        stated = None if math.isnan(numbers.iloc[0]) else float(numbers.iloc[0])
        allowed = 0.0 if same else tolerance(name, stated, cell.loc[cell["metric"] == name, "value"].tolist())
        rows.append(Agreement(experiment, name, value, stated, allowed, verdict(value, stated, allowed), same, why))
    return rows


def compare_all(
    experiments: Iterable[Experiment], root: Path | None = None, path: Path | None = None
) -> list[Agreement]:
    """`compare` for each finished run among the experiments, once; empty where nothing is committed.

    path: of the committed runs (`records.save`), by default the checkout's. Raises CorruptFile for an edited run.
    """
    frame = records.load_numbers(Path(path or records.COMMITTED_RUNS))
    unique = {run_id(item): item for item in experiments if len(frame) and runs.is_finished(item, root)}
    found = (compare(item, runs.load_metrics(runs.folder_of(item, root)), frame) for item in unique.values())
    return [row for rows in found for row in rows]


def summary(rows: Sequence[Agreement]) -> list[str]:
    """The comparisons as lines of text: how many runs agree how well, then each number that differs."""
    if all(row.verdict == ABSENT for row in rows):
        return ["agreement with the committed results: none is committed of these runs"]
    order = (IDENTICAL, ABSENT, WITHIN, DIFFERS)
    worst: dict[str, int] = {}
    for row in rows:
        worst[row.run] = max(worst.get(row.run, 0), order.index(row.verdict))
    counts = ", ".join(f"{n} {name}" for name in VERDICTS if (n := list(worst.values()).count(order.index(name))))
    lines = [f"agreement with the committed results, {len(worst)} runs: {counts}"]
    for row in (row for row in rows if row.warning or row.verdict == DIFFERS):
        cells = row.row()
        why = "same platform, packages and sources" if row.expected else row.because
        lines.append(
            f"{'WARNING' if row.warning else 'differs'}: {title(row.experiment)}: {cells['metric']} "
            f"{cells['measured']}, committed {cells['committed']}, tolerance {cells['tolerance']} ({why})"
        )
    return lines
