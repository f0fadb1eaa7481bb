"""Committed results: `figures/runs.csv` has a row a run, `figures/runs_numbers.csv` the numbers that it reported.

The second has a row a run, reporting rule and kind of weights, and a column a metric: an empty cell is a metric that
the run does not have, `nan` one that it could not define. Numbers are written so that they are read back bit by bit.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from repro.experiment import Experiment, run_id
from repro.files import atomic_path
from repro.runs import is_finished

COMMITTED_RUNS = Path(__file__).resolve().parents[2] / "figures" / "rendered" / "runs.csv"
KEY = ["run", "rule", "weights"]
OF_NUMBERS = ["status", "rule", "weights", "selected_on_test", "metric", "value"]


def numbers_of(path: Path) -> Path:
    """The file of numbers beside a file of runs."""
    return path.with_name(f"{path.stem}_numbers.csv")


def save(frame: pd.DataFrame, path: Path) -> list[Path]:
    """Write the finished runs of `tables.collect` as a file of runs at `path` and one of numbers; both are returned."""
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
    """The committed runs that results of `experiments` would lack: not among them, or not finished in `root`."""
    there = {run_id(experiment) for experiment in experiments if is_finished(experiment, root)}
    return [run for run in load_runs(path)["run"] if run not in there]


def load_numbers(path: Path, rule: str = "last", weights: str = "ema") -> pd.DataFrame:
    """A row a run and metric, of one rule and kind of weights: what the file of runs says, metric, value (float)."""
    frame = load_runs(path)
    if frame.empty or not numbers_of(path).exists():
        return frame.iloc[:0].assign(metric=[], value=[])
    wide = pd.read_csv(numbers_of(path), dtype=str, keep_default_na=False)
    wide = wide[(wide["rule"] == rule) & (wide["weights"] == weights)].drop(columns=["rule", "weights"])
    long = wide.melt("run", var_name="metric", value_name="value")
    long = long[long["value"] != ""].reset_index(drop=True)
    long["value"] = [float(value) for value in long["value"]]  # pandas' own parser may miss the last bit
    return frame.merge(long, on="run")
