"""Results as files: the committed runs, and one tidy table for others.

Of the committed results, `runs.csv` has a row a run and `runs_numbers.csv` a row a run, reporting rule and kind of
weights, with a column a metric. An empty cell is a metric that the run does not have, `nan` one that it could not
define. Numbers are written so that they are read back bit by bit.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from repro import runs
from repro.experiment import Experiment, run_id
from repro.files import atomic_path
from repro.recipe import SCALES
from repro.settings import SettingError, unknown

COMMITTED_RUNS = Path(__file__).resolve().parents[2] / "figures" / "rendered" / "runs.csv"
KEY = ["run", "rule", "weights"]
OF_NUMBERS = ["status", "rule", "weights", "selected_on_test", "metric", "value"]
# Columns of an export. Only `value` may be empty, so that readers infer one type a column.
TYPES: dict[str, str] = {
    "run": "str", "paper": "str", "method": "str", "data": "str", "labels": "int64", "seed": "int64", "scale": "str",
    "overrides": "str", "rule": "str", "weights": "str", "metric": "str", "class": "int64", "value": "float64",
    "train_seconds": "float64", "samples_per_second": "float64", "peak_memory_mib": "float64",
    "device": "str", "precision": "str", "threads": "int64", "processor": "str", "platform": "str", "python": "str",
    "torch": "str", "packages": "str", "commit": "str", "dirty": "str", "source_digest": "str", "data_digest": "str",
    "finished": "str", "exported_by": "str",
}  # fmt: skip
COSTS = ("train_seconds", "samples_per_second", "peak_memory_mib")
ORIGIN = ("device", "precision", "processor", "platform", "python", "torch", "packages", "commit", "dirty",
          "source_digest", "data_digest", "finished")  # fmt: skip
ALL_CLASSES = -1
NOT_CLASSES = {"cam_curve", "reliability", "confusion", "cam_confusion"}  # lists that are not a number a class


# Committed runs


def numbers_of(path: Path) -> Path:
    """The file of numbers beside a file of runs."""
    return path.with_name(f"{path.stem}_numbers.csv")


def save(frame: pd.DataFrame, path: Path) -> list[Path]:
    """Write the finished runs of a frame as a file of runs at `path` and one of numbers; both are returned.

    frame: a row a run, rule, kind of weights and metric, with columns OF_NUMBERS and those of the file of runs.
    """
    finished = frame[frame["metric"].notna()]
    rows = {}
    for key, part in finished.groupby(KEY, sort=False):
        cells = zip(part["metric"], part["value"], strict=True)
        rows[key] = dict(zip(KEY, key, strict=True)) | {metric: repr(float(value)) for metric, value in cells}
    metrics = sorted(finished["metric"].unique())
    for target, written in (  # numbers first, so that every run in the other file has them
        (numbers_of(path), pd.DataFrame(list(rows.values()), columns=[*KEY, *metrics])),
        (path, finished.drop_duplicates("run").drop(columns=OF_NUMBERS)),
    ):
        with atomic_path(target) as part:
            written.to_csv(part, index=False)
    return [path, numbers_of(path)]


def load_runs(path: Path) -> pd.DataFrame:
    """The file of runs, every cell as text (a digest may be made of digits alone); empty where there is none."""
    if not path.exists():
        return pd.DataFrame(columns=["run", "finished"], dtype=str)
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def committed_seeds(scale: str) -> int:
    """How many seeds the committed results of a scale have; 0 without any."""
    frame = load_runs(COMMITTED_RUNS)
    return int(frame.loc[frame["scale"] == scale, "seed"].nunique()) if len(frame) else 0


def lost(path: Path, experiments: Iterable[Experiment], root: Path) -> list[str]:
    """Committed runs that `experiments` would not reproduce: not listed, or not finished in `root`."""
    there = {run_id(experiment) for experiment in experiments if runs.is_finished(experiment, root)}
    return [run for run in load_runs(path)["run"] if run not in there]


def load_numbers(path: Path, rule: str = "last", weights: str = "ema") -> pd.DataFrame:
    """A row a run and metric of one rule and kind of weights: columns of the file of runs, metric, value (float)."""
    frame = load_runs(path)
    if frame.empty or not numbers_of(path).exists():
        return frame.iloc[:0].assign(metric=[], value=[])
    wide = pd.read_csv(numbers_of(path), dtype=str, keep_default_na=False)
    wide = wide[(wide["rule"] == rule) & (wide["weights"] == weights)].drop(columns=["rule", "weights"])
    long = wide.melt("run", var_name="metric", value_name="value")
    long = long[long["value"] != ""].reset_index(drop=True)
    long["value"] = [float(value) for value in long["value"]]  # pandas' own parser may miss the last bit
    return frame.merge(long, on="run")


# Export


def export(path: Path, root: Path | None = None, scale: str | None = None, label: str = "unnamed") -> pd.DataFrame:
    """Write the finished runs of a folder as `.csv` or `.parquet`, and return the frame.

    scale: only its runs; None for all. label: who exports, letters, digits and `._-`.
    A row a run, rule, kind of weights, metric and class, columns TYPES. `class` is a class's number, or -1 for the
    whole. `value` is as stored (fractions for percentages), missing where undefined. Other unknown facts are `unknown`,
    0 threads. Raises SettingError, CorruptFile, OSError.
    """
    path, root = Path(path), Path(root or runs.runs_folder())
    if path.suffix not in (".csv", ".parquet"):
        raise SettingError(f"{path} must end in .csv or .parquet, which chooses the format")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise SettingError(f"label is {label!r}; it must be letters, digits and ._- beginning with a letter or digit")
    if scale not in (None, *SCALES):
        raise unknown("scale", scale, SCALES)
    rows = []
    for metrics in sorted(root.glob("*/metrics.json")):
        saved = runs.load_metrics(metrics.parent)
        if scale in (None, saved["experiment"]["scale"]):
            about = _about(saved) | {"exported_by": label}
            rows += [about | number for number in _numbers(saved)]
    if not rows:
        raise SettingError(f"no finished run {f'at scale {scale} ' if scale else ''}in {root}; nothing to export")
    frame = pd.DataFrame(rows, columns=list(TYPES)).astype(TYPES)
    with atomic_path(path) as part:
        frame.to_csv(part, index=False) if path.suffix == ".csv" else frame.to_parquet(part, index=False)
    return frame


def _about(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Run id, experiment, cost and provenance of a run's metrics."""
    asked, known, cost = saved["experiment"], saved["provenance"], saved["cost"]
    packages = known.get("packages") or {}
    facts = dict(known) | {"torch": packages.get("torch"), "packages": json.dumps(packages, sort_keys=True)}
    facts |= {"dirty": {True: "yes", False: "no"}.get(known.get("dirty")), "data_digest": saved.get("data_digest")}
    about = {"run": saved["run"], **asked, "overrides": json.dumps(asked["overrides"], sort_keys=True)}
    about |= {name: cost.get(name, math.nan) for name in COSTS}
    return about | {name: facts.get(name) or "unknown" for name in ORIGIN} | {"threads": known.get("threads", 0)}


def _numbers(saved: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rule, weights, metric, class and value of every number that a run reports."""
    groups = [(rule, weights, "", metrics) for rule, by in saved["reported"].items() for weights, metrics in by.items()]
    for kind, metrics in saved["pseudo_labels"].items():
        groups.append(("last", "live", f"{kind}_", {k: v for k, v in metrics.items() if not isinstance(v, dict)}))
    for rule, weights, prefix, metrics in groups:
        for metric, index, value in _by_class(metrics):
            yield {"rule": rule, "weights": weights, "metric": prefix + metric, "class": index, "value": value}


def _by_class(metrics: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    for metric, value in metrics.items():
        if metric in NOT_CLASSES:
            continue
        if isinstance(value, dict):  # over-activation: several numbers a class
            yield from ((f"{metric}_{name}", index, number) for name, index, number in _by_class(value))
        elif isinstance(value, list):
            yield from ((metric, i, math.nan if number is None else float(number)) for i, number in enumerate(value))
        elif value is None or type(value) in (int, float):
            yield metric, ALL_CLASSES, math.nan if value is None else float(value)
