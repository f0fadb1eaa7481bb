"""Results that travel: one tidy table of finished runs, written for others and read from them.

A row a run, reporting rule, kind of weights and metric (one more for each class of a metric by class), with what a
reader needs to judge it: recipe changes, cost, machine, versions, commit. `datasets.load_dataset` reads either format.
Imported results keep a file of their own beside the runs and are never mistaken for local ones.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from figures.tables import RULES, WEIGHTS
from repro import runs
from repro.data.catalogue import DataError
from repro.experiment import Experiment, run_id
from repro.files import atomic_path
from repro.grid import PAPERS
from repro.recipe import SCALES
from repro.settings import SettingError, unknown

FOLDER = "imported"
UNKNOWN, UNNAMED = "unknown", "unnamed"
# No column has an empty cell but `value`, so that a reader that takes a file in parts finds one type in each column.
TYPES: dict[str, type] = {
    "run": str, "paper": str, "method": str, "data": str, "labels": int, "seed": int, "scale": str, "overrides": str,
    "rule": str, "weights": str, "metric": str, "class": int, "value": float,
    "train_seconds": float, "samples_per_second": float, "peak_memory_mib": float,
    "device": str, "precision": str, "threads": int, "processor": str, "platform": str, "python": str, "torch": str,
    "packages": str, "commit": str, "dirty": str, "source_digest": str, "data_digest": str, "finished": str,
    "exported_by": str,
}  # fmt: skip
COSTS = ("train_seconds", "samples_per_second", "peak_memory_mib")
ORIGIN = ("device", "precision", "processor", "platform", "python", "torch", "packages", "commit", "dirty",
          "source_digest", "data_digest", "finished")  # fmt: skip
KEY = ["run", "rule", "weights", "metric", "class"]
ALL_CLASSES = -1
# Lists of numbers that are not a number a class.
NOT_CLASSES = {"cam_curve", "reliability", "confusion", "cam_confusion"}
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SHOWN = 5  # examples in a message


# Out


def export(path: Path, root: Path | None = None, scale: str | None = None, label: str = UNNAMED) -> pd.DataFrame:
    """Write the finished runs of a folder as `.csv` or `.parquet`, and return the frame.

    scale: only its runs; None for all. label: who exports, letters, digits and `._-`.
    Columns: TYPES; `class` is a class's number, or -1 for the whole; `value` is as stored (fractions for percentages),
    missing where undefined; other unknown facts are `unknown`, 0 threads. Raises SettingError, CorruptFile, OSError.
    """
    path = Path(path)
    _check_format(path)
    _check_label(label)
    if scale is not None and scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    root = Path(root or runs.runs_folder())
    frame = collect(root, scale, label)
    if frame.empty:
        raise SettingError(f"no finished run {f'at scale {scale} ' if scale else ''}in {root}; nothing to export")
    _write(frame, path)
    return frame


def collect(root: Path, scale: str | None = None, label: str = UNNAMED) -> pd.DataFrame:
    """The tidy frame of all finished runs in a folder, in order of their ids."""
    rows = []
    for path in sorted(Path(root).glob("*/metrics.json")):
        saved = runs.load_metrics(path.parent)
        if scale in (None, saved["experiment"]["scale"]):
            about = identity(saved) | origin(saved) | {"exported_by": label}
            rows += [about | number for number in numbers(saved)]
    return pd.DataFrame(rows, columns=list(TYPES)).astype(_dtypes())


def identity(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Run id and experiment of a run's metrics."""
    asked = dict(saved["experiment"])
    return {"run": saved["run"]} | asked | {"overrides": json.dumps(asked["overrides"], sort_keys=True)}


def origin(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Cost and provenance of a run's metrics, `unknown` where it has none."""
    known, cost = saved["provenance"], saved["cost"]
    packages = known.get("packages") or {}
    facts = {"torch": packages.get("torch"), "packages": json.dumps(packages, sort_keys=True)}
    facts |= {"dirty": {True: "yes", False: "no"}.get(known.get("dirty")), "data_digest": saved.get("data_digest")}
    costs = {name: cost.get(name, math.nan) for name in COSTS}
    return (
        costs | {name: (known | facts).get(name) or UNKNOWN for name in ORIGIN} | {"threads": known.get("threads", 0)}
    )


def numbers(saved: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rule, weights, metric, class and value of every number that a run reports, of the whole and by class."""
    for rule, by_weights in saved["reported"].items():
        for weights, metrics in by_weights.items():
            for metric, index, value in _flat(metrics):
                yield {"rule": rule, "weights": weights, "metric": metric, "class": index, "value": value}
    for kind, metrics in saved["pseudo_labels"].items():
        for metric, index, value in _flat({k: v for k, v in metrics.items() if not isinstance(v, dict)}):
            yield {"rule": "last", "weights": "live", "metric": f"{kind}_{metric}", "class": index, "value": value}


def _flat(metrics: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    for metric, value in metrics.items():
        if metric in NOT_CLASSES:
            continue
        if isinstance(value, dict):  # over-activation: several numbers a class
            yield from ((f"{metric}_{name}", index, number) for name, index, number in _flat(value))
        elif isinstance(value, list):
            for index, number in enumerate(value):
                yield metric, index, math.nan if number is None else float(number)
        elif value is None or type(value) in (int, float):
            yield metric, ALL_CLASSES, math.nan if value is None else float(value)


# In


@dataclass(frozen=True)
class Import:
    """What an import did.

    path: the file that now holds the label's results. added: runs that are new under it. repeated: runs that it held
    already, with the same numbers. also_here: runs that this folder has finished itself; both are kept and shown.
    unlike: runs whose recipe is not the one that this code would use for that experiment.
    """

    path: Path
    added: tuple[str, ...]
    repeated: tuple[str, ...]
    also_here: tuple[str, ...]
    unlike: tuple[str, ...]

    def lines(self) -> list[str]:
        """The same in sentences."""
        told = [f"{len(self.added)} runs added to {self.path}"]
        for names, what in (
            (self.repeated, "were there already, with the same numbers"),
            (self.also_here, "are finished here too; nothing of yours was changed, reports show both"),
            (self.unlike, "have a recipe that differs from this code's; they are no repetition of a run here"),
        ):
            if names:
                told.append(f"{len(names)} {what}: {_examples(names)}")
        return told


def bring_in(path: Path, label: str, root: Path | None = None) -> Import:
    """Validate a file of exported results and merge it into `imported/<label>.parquet` below a folder of runs.

    label: whose results they are. Their provenance and `exported_by` stay; a column `origin` holds the label.
    Raises DataError naming columns or rows (counted from 1 below the header) that are not what they should be, or
    runs that the label holds with other numbers; SettingError for a label that is no file name.
    """
    _check_label(label)
    root = Path(root or runs.runs_folder())
    frame = read(Path(path)).assign(origin=label)
    target = root / FOLDER / f"{label}.parquet"
    former = pd.read_parquet(target) if target.exists() else frame.iloc[:0]
    new, old = set(frame["run"]), set(former["run"])
    here, there = (dict(list(part.groupby("run"))) for part in (frame, former))
    for run in sorted(new & old):
        if not _same(here[run], there[run]):
            raise DataError(
                f"{path}: run {run} has other numbers or provenance than under label {label!r} in {target}; import it "
                f"under another --label, or delete that file"
            )
    merged = pd.concat([former, frame[~frame["run"].isin(old)]], ignore_index=True) if old else frame
    if new - old:
        _write(merged, target)
    also_here = tuple(run for run in sorted(new) if (root / run / "metrics.json").exists())
    return Import(target, tuple(sorted(new - old)), tuple(sorted(new & old)), also_here, _unlike(frame))


def imported(root: Path | None = None) -> pd.DataFrame:
    """All imported results below a folder of runs: the columns TYPES and `origin`; empty where there are none.

    Raises DataError for a file that is not what `bring_in` wrote.
    """
    frames = []
    for path in sorted((Path(root or runs.runs_folder()) / FOLDER).glob("*.parquet")):
        frames.append(read(path).assign(origin=path.stem))
    empty = pd.DataFrame(columns=[*TYPES, "origin"]).astype(_dtypes() | {"origin": str})
    return pd.concat(frames, ignore_index=True) if frames else empty


def read(path: Path) -> pd.DataFrame:
    """A validated frame of results; further columns are dropped. Raises DataError, SettingError (file name)."""
    _check_format(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; name a file that `python -m repro export` wrote")
    try:  # as text, since a digest may be made of digits alone
        raw = pd.read_csv(path, dtype=str, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as {path.suffix[1:]} ({error})") from error
    if missing := [name for name in TYPES if name not in raw]:
        raise DataError(f"{path} lacks columns {', '.join(missing)}; it must have those that `export` writes")
    if raw.empty:
        raise DataError(f"{path} has no rows")
    frame = raw[list(TYPES)].reset_index(drop=True)
    for name, kind in TYPES.items():
        frame[name] = _typed(path, frame[name], name, kind)
    _check_rows(path, frame)
    return frame


def _typed(path: Path, column: pd.Series, name: str, kind: type) -> pd.Series:
    """A column as its type; DataError names the first cells that have another."""
    if kind is str:
        wrong = [i for i, cell in enumerate(column) if not isinstance(cell, str) or not cell]
        _refuse(path, column, wrong, f"{name} must be text, {UNKNOWN!r} where it is not known")
        return column.astype(str)
    cells, wrong = [], []
    for i, cell in enumerate(column):
        try:
            number = math.nan if cell is None or cell == "" else float(cell)
            if math.isinf(number) or (kind is int and number != int(number)):
                raise ValueError
            cells.append(kind(number))
        except (TypeError, ValueError):
            wrong.append(i)
    what = "a whole number" if kind is int else "a finite number, or empty"
    _refuse(path, column, wrong, f"{name} must be {what}")
    return pd.Series(cells, dtype=_dtypes()[name])


def _check_rows(path: Path, frame: pd.DataFrame) -> None:
    """DataError for unknown names, impossible numbers, ids that do not fit their experiment, and repeated rows."""
    known = {"paper": PAPERS, "scale": SCALES, "rule": RULES, "weights": WEIGHTS, "dirty": ("yes", "no", UNKNOWN)}
    for name, allowed in known.items():
        wrong = frame.index[~frame[name].isin(list(allowed))]
        _refuse(path, frame[name], wrong, f"{name} must be one of {', '.join(sorted(allowed))}")
    for name, attribute in (("method", "METHODS"), ("data", "DATA")):
        pairs = frame[["paper", name]].drop_duplicates()
        for paper, value in pairs.itertuples(index=False):
            if value not in (names := getattr(PAPERS[paper], attribute)):
                wrong = frame.index[(frame["paper"] == paper) & (frame[name] == value)]
                _refuse(path, frame[name], wrong, f"{name} of {paper} must be one of {', '.join(names)}")
    for name, least in (("labels", 0), ("seed", 0), ("threads", 0), ("class", ALL_CLASSES)):
        _refuse(path, frame[name], frame.index[frame[name] < least], f"{name} must be at least {least}")
    wrong = [i for i, text in enumerate(frame["overrides"]) if not _is_object(text)]
    _refuse(path, frame["overrides"], wrong, "overrides must be a JSON object")
    named = frame["method"] + "-" + frame["data"] + "." + frame["seed"].astype(str) + "@" + frame["labels"].astype(str)
    named += "-" + frame["scale"] + "-"
    wrong = [i for i, (run, start) in enumerate(zip(frame["run"], named, strict=True)) if not _fits(run, start)]
    _refuse(
        path, frame["run"], wrong, "run must be method-data.seed@labels-scale-digest, as in the row's other columns"
    )
    wrong = frame.index[frame.duplicated(KEY)]
    _refuse(path, frame["run"] + ", " + frame["metric"], wrong, f"a row must be the only one with its {', '.join(KEY)}")


def _refuse(path: Path, column: pd.Series, rows: Iterable[int], rule: str) -> None:
    rows = list(rows)
    if rows:
        cells = column.tolist()  # plain values: a numpy number would be shown with its type
        places = ", ".join(f"row {i + 1} ({cells[i]!r})" for i in rows[:SHOWN])
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        raise DataError(f"{path}: {rule}; not so in {places}{more}")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _fits(run: str, start: str) -> bool:
    return run.startswith(start) and re.fullmatch("[0-9a-f]{10}", run[len(start) :]) is not None


def _same(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two frames of one run say the same, whoever exported it and in whatever order."""
    first, second = (
        frame.drop(columns=["exported_by", "origin"]).sort_values(KEY, ignore_index=True) for frame in (one, other)
    )
    return first.equals(second)


def _unlike(frame: pd.DataFrame) -> tuple[str, ...]:
    """Runs whose id is not the one that this code gives to their experiment."""
    names = ["paper", "method", "data", "labels", "seed", "scale"]
    unlike = []
    for row in frame.drop_duplicates("run").to_dict("records"):
        run = None
        with contextlib.suppress(SettingError):  # a setting that this code does not have
            run = run_id(Experiment(**{name: row[name] for name in names}, overrides=json.loads(row["overrides"])))
        if run != row["run"]:
            unlike.append(row["run"])
    return tuple(sorted(unlike))


# Files


def _write(frame: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)


def _check_format(path: Path) -> None:
    if path.suffix not in (".csv", ".parquet"):
        raise SettingError(f"{path} must end in .csv or .parquet, which chooses the format")


def _check_label(label: str) -> None:
    if not LABEL.fullmatch(label):
        raise SettingError(f"label is {label!r}; it must be letters, digits and ._- beginning with a letter or digit")


def _dtypes() -> dict[str, str]:
    return {name: {str: "str", int: "int64", float: "float64"}[kind] for name, kind in TYPES.items()}


def _examples(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
