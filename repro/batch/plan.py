"""What would run, why, and what it costs: the runs behind tables, ablations, claims and the main job.

`select` chooses experiments, `plan` finds the state of each in a folder of runs, `bill` sums up the work that is left.
Nothing here trains or writes.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from repro import runs
from repro.batch import once
from repro.batch import records as committed
from repro.batch.progress import clock, title
from repro.experiment import Experiment, record, run_id
from repro.files import CorruptFile, load_state, read_json
from repro.grid import PAPERS, checked_seeds
from repro.recipe import SCALES
from repro.settings import SettingError, unknown
from repro.train import CHECKPOINT

FINISHED, STALE, HALF, CHANGED, MISSING, FAILED = STATES = (
    "finished", "stale", "half-trained", "changed", "missing", "failed",
)  # fmt: skip
OTHER_CODE = "finished by other code"
HERE, COMMITTED, GUESS = "runs in this folder", "committed runs of another machine", "guess"
UNKNOWN = "unknown: no CUDA run of this method yet"
UNKNOWN_SECONDS, TINY_SECONDS = 120.0, 5.0  # guesses for a method that was never run, for the estimate of time only


# Which experiments


def first_seeds(count: int) -> range:
    """The first `count` seeds; SettingError below 1."""
    if count < 1:
        raise SettingError(f"seeds is {count}; it must be at least 1")
    return range(count)


def select(
    papers: Sequence[str] = (), tables: Sequence[str] = (), ablations: Sequence[str] = (),
    claims: bool | Sequence[str] = False, main: bool = False, scale: str = "mini", seeds: Sequence[int] = (0,),
) -> dict[Experiment, tuple[str, ...]]:  # fmt: skip
    """Experiment -> who wants it (`("pcre main job", "pcre claims", "pcre ablation 1a")`), one entry a run folder.

    papers: all if none is named. tables: names of tables or of ablations. ablations: names of ablations. claims: ids,
    or True for all. main: the main job. Without any of these four, everything of the papers is selected.
    Order: seed by seed; of each seed the main job, claims, tables, ablations; a shared run where it first occurs.
    Raises SettingError for a name that none of the papers has.
    """
    names = tuple(dict.fromkeys(papers)) or tuple(PAPERS)
    for name in names:
        if name not in PAPERS:
            raise unknown("paper", name, PAPERS)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    everything, whose = not (tables or ablations or claims or main), f"of {', '.join(names)}"
    chosen = {name: PAPERS[name] for name in names}
    of_tables = {(name, key): table for name, paper in chosen.items() for key, table in paper.tables.items()}
    of_ablations = {(name, key): table for name, paper in chosen.items() for key, table in paper.ablations.items()}
    of_claims = {(name, key): claim for name, paper in chosen.items() for key, claim in paper.claims.items()}
    if everything:
        named_tables, named_claims = of_tables | of_ablations, of_claims
    else:
        named_tables = _named(f"table {whose}", tables, of_ablations | of_tables)
        named_tables |= _named(f"ablation {whose}", ablations, of_ablations)
        named_claims = of_claims if claims is True else _named(f"claim {whose}", claims or (), of_claims)

    wanted = [(f"{name} main job", paper.main_experiments) for name, paper in chosen.items() if main or everything]
    wanted += [(f"{name} claims", claim.experiments) for (name, _), claim in named_claims.items()]
    for (name, key), table in named_tables.items():
        kind = "ablation" if (name, key) in of_ablations else "table"
        wanted.append((f"{name} {kind} {key}", table.experiments))

    selection: dict[str, tuple[Experiment, dict[str, None]]] = {}
    for seed in checked_seeds(seeds):
        for who, experiments in wanted:
            for experiment in experiments(scale, (seed,)):
                selection.setdefault(run_id(experiment), (experiment, {}))[1][who] = None
    return {experiment: tuple(by) for experiment, by in selection.values()}


def _named(kind: str, names: Iterable[str], known: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """The entries, keyed (paper, name), with these names; SettingError for a name that no paper has."""
    chosen = {}
    for name in dict.fromkeys(names):
        found = {key: value for key, value in known.items() if key[1] == name}
        if not found:
            raise unknown(kind, name, {key for _, key in known})
        chosen |= found
    return chosen


# Their state


@dataclass(frozen=True)
class Planned:
    """A wanted run.

    state: `finished`; `stale` (finished by other sources, to be run again); `half-trained`; `changed` (the same
    experiment ran with other parameters); `missing`; `failed`. reason: the state in words. seconds: expected time of
    the training that is left, None if nothing is left or nothing is known. rate: where `seconds` comes from.
    """

    experiment: Experiment
    run: str
    wanted_by: tuple[str, ...]
    state: str
    reason: str
    seconds: float | None = None
    rate: str = ""

    @property
    def todo(self) -> bool:
        """Whether it will run."""
        return self.state != FINISHED


def plan(
    selection: Mapping[Experiment, tuple[str, ...]], root: Path | None = None, stale: bool = False
) -> list[Planned]:
    """The state of each selected run in a folder of runs, in the selection's order.

    stale: finished runs that other sources made are to run again; otherwise their reason only says so.
    """
    root = Path(root or runs.runs_folder())
    found = records(root, {experiment.scale for experiment in selection})
    measured = Rates(found.values())
    planned = []
    for experiment, wanted_by in selection.items():
        run = run_id(experiment)
        state, reason, spent = _state(experiment, root / run, found, stale)
        seconds, rate = (None, "") if state == FINISHED else measured.seconds(experiment)
        if seconds is not None:
            seconds = max(0.0, seconds - spent)
        planned.append(Planned(experiment, run, wanted_by, state, reason, seconds, rate))
    return planned


def records(root: Path, scales: Iterable[str]) -> dict[str, dict]:
    """Run -> its metrics, or `experiment.json` of an unfinished run; {} if it cannot be read. scales: only these."""
    found = {}
    for folder in (folder for scale in sorted(scales) for folder in sorted(root.glob(f"*-{scale}-*"))):
        found[folder.name] = {}
        with contextlib.suppress(CorruptFile, OSError):
            saved = runs.load_metrics(folder) if once.is_finished(folder) else read_json(folder / "experiment.json")
            found[folder.name] = saved if isinstance(saved, dict) else {}
    return found


def _state(experiment: Experiment, folder: Path, records: Mapping[str, dict], stale: bool) -> tuple[str, str, float]:
    """State, reason, and the seconds of training that need not be repeated."""
    if once.is_finished(folder):
        try:
            digest = runs.load_metrics(folder).get("provenance", {}).get("source_digest")
        except CorruptFile as error:
            return FAILED, f"failed: {error}", 0.0
        if digest == runs.source_digest():
            return FINISHED, FINISHED, 0.0
        if stale:
            return STALE, f"code changed: sources {digest} -> {runs.source_digest()}", 0.0
        return FINISHED, OTHER_CODE, 0.0
    step, spent = _progress(folder)
    if (folder / once.FAILURE).exists():
        further = "" if step is None else f"; goes on at step {step}"
        return FAILED, f"failed: {_failure(folder)}{further}", spent
    if step is not None:
        return HALF, f"half-trained at step {step}", spent
    if changed := _changed(experiment, folder.name, records):
        return CHANGED, f"parameter changed: {changed}", 0.0
    return MISSING, MISSING, 0.0


def _progress(folder: Path) -> tuple[int | None, float]:
    """The step of a run's checkpoint, None without one, and the seconds of training behind it."""
    if not (folder / CHECKPOINT).exists():
        return None, 0.0
    try:
        step = load_state(folder / CHECKPOINT)["at"]["done"]
        rows = runs.load_history(folder).of("train")
        return step, sum(row["seconds"] for row in rows if row["step"] <= step)
    except (CorruptFile, KeyError, TypeError):
        return None, 0.0


def _failure(folder: Path) -> str:
    """`out of memory (attempt 2): CUDA out of memory`: the content of failure.json."""
    failure = once.read_failure(folder)
    if failure is None:
        return "its failure.json cannot be read"
    message = failure.message.strip().splitlines()
    return f"{failure.kind} (attempt {failure.attempt}){': ' + message[-1] if message else ''}"


def _changed(experiment: Experiment, run: str, records: Mapping[str, dict]) -> str:
    """`lr 0.03 -> 0.01`: how the recipe differs from that of another run of the same experiment; empty without one."""
    asked = record(experiment)
    wanted = _flat(asked["recipe"])
    for name, saved in records.items():
        if name != run and saved.get("experiment") == asked["experiment"] and isinstance(saved.get("recipe"), dict):
            former = _flat(saved["recipe"])
            keys = sorted(key for key in wanted | former if wanted.get(key) != former.get(key))
            if keys:
                return ", ".join(f"{key} {former.get(key, 'not set')} -> {wanted.get(key, 'gone')}" for key in keys)
    return ""


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as one level, the method's own settings as `method.name`."""
    method = recipe.get("method") if isinstance(recipe.get("method"), dict) else {}
    return {k: v for k, v in recipe.items() if k != "method"} | {f"method.{k}": v for k, v in method.items()}


# What it costs


def samples(recipe: Mapping[str, Any]) -> float:
    """Relative work: steps x images per step.

    Compare only recipes of one method, because methods differ in how many streams and stages they use.
    """
    steps = recipe["steps"] + recipe.get("start_steps", 0)
    return steps * recipe["batch"] * (1 + recipe["unlabelled_ratio"])


class Rates:
    """Measured times of finished runs, and estimates from them."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        """records: metrics of finished runs; other values among them are ignored."""
        self.known: list[dict] = []
        for saved in records:
            with contextlib.suppress(KeyError, TypeError):
                cost, asked, recipe = saved["cost"], saved["experiment"], saved["recipe"]
                # Wall time adds data, figures and start-up, but of a resumed run it is the last session's alone.
                seconds = max(cost["train_seconds"], cost["wall_seconds"])
                device, work = saved["provenance"]["device"], samples(recipe)
                time = {"seconds": seconds, "train": cost["train_seconds"]}
                self.known.append({"asked": asked, "recipe": recipe, "samples": work, "on": device} | time)

    def seconds(self, experiment: Experiment) -> tuple[float | None, str]:
        """Expected seconds of a whole run and their origin.

        The first that exists counts: finished runs here of the same recipe and data; of the same method, data and
        scale, by images a second; committed runs of the same cell, else of the same method; a guess. At scale `paper`
        only runs with CUDA of the same method and network count, by images a second while training (a short run is
        enough; time to evaluate is left out), and nothing is guessed.
        """
        recipe = record(experiment)["recipe"]
        if experiment.scale == "paper":
            like = [
                run for run in self.known
                if run["on"] != "cpu" and run["asked"]["method"] == experiment.method
                and all(run["recipe"].get(key) == recipe.get(key) for key in ("network", "crop", "precision"))
            ]  # fmt: skip
            return (_scaled(like, recipe, "train"), HERE) if like else (None, UNKNOWN)
        names = ("method", "data", "scale")
        like = [run for run in self.known if all(run["asked"][name] == getattr(experiment, name) for name in names)]
        same = [run for run in like if (run["asked"]["labels"], run["recipe"]) == (experiment.labels, recipe)]
        if same or like:
            return _scaled(same or like, recipe), HERE
        known = _committed(committed.COMMITTED_RUNS)
        cell = known[(known[list(names)] == [getattr(experiment, name) for name in names]).all(axis=1)]
        exact = cell[cell["overrides"] == json.dumps(dict(experiment.overrides))]
        if len(cell):
            return float((exact if len(exact) else cell)["train_seconds"].mean()), COMMITTED
        return (TINY_SECONDS if experiment.scale == "tiny" else UNKNOWN_SECONDS), GUESS


def _scaled(like: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], time: str = "seconds") -> float:
    return statistics.fmean(run[time] * samples(recipe) / run["samples"] for run in like)


@functools.lru_cache(maxsize=4)
def _committed(path: Path) -> pd.DataFrame:
    """The committed runs, one row each; empty where there are none."""
    frame = committed.load_runs(path)
    if frame.empty:
        return pd.DataFrame(columns=["method", "data", "scale", "overrides", "train_seconds"])
    return frame.assign(train_seconds=pd.to_numeric(frame["train_seconds"])).dropna(subset="train_seconds")


@dataclass(frozen=True)
class Bill:
    """The sum of a plan.

    todo, of: runs. states: number of runs by state. other_code: finished runs that other sources made.
    seconds: training time of the runs to do, where known; wall: with `workers` at a time.
    rates: number of runs to do by the origin of their time. unknown: methods without a known time.
    """

    todo: int
    of: int
    states: dict[str, int]
    other_code: int
    workers: int
    seconds: float
    wall: float
    rates: dict[str, int]
    unknown: tuple[str, ...]


def bill(planned: Sequence[Planned], workers: int = 1) -> Bill:
    """Sum up a plan. workers: runs at a time. Wall time is at least that of the longest run."""
    todo = [item for item in planned if item.todo]
    known = [item.seconds for item in todo if item.seconds is not None]
    wall = max(max(known), sum(known) / workers) if known else 0.0
    lacking = tuple(sorted({item.experiment.method for item in todo if item.seconds is None}))
    counts = Counter(item.state for item in planned)
    states = {state: counts[state] for state in STATES if counts[state]}
    rates = dict(Counter(item.rate for item in todo))
    other_code = sum(item.reason == OTHER_CODE for item in planned)
    return Bill(len(todo), len(planned), states, other_code, workers, float(sum(known)), wall, rates, lacking)


# Showing it


WIDTHS = {"time": 8, "why": 44, "run": 60, "wanted by": 44}
NAMED = 4  # of those that want a run, in the table; JSON has all


def as_text(planned: Sequence[Planned], workers: int = 1) -> str:
    """A plan as a table for people, a run a row, and its bill below."""
    lines = _row(dict(zip(WIDTHS, WIDTHS, strict=True)))
    for item in planned:
        time = "" if not item.todo else "unknown" if item.seconds is None else clock(item.seconds)
        cells = (time, item.reason, title(item.experiment), _who(item.wanted_by))
        lines += _row(dict(zip(WIDTHS, cells, strict=True)))
    return "\n".join([*lines, "", *bill_lines(bill(planned, workers), {item.experiment.scale for item in planned})])


def _row(cells: Mapping[str, str]) -> list[str]:
    """A row of the table: as many lines as its longest cell needs."""
    wrapped = [textwrap.wrap(text, WIDTHS[head], subsequent_indent="  ") for head, text in cells.items()]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return ["  ".join(map(str.ljust, row, WIDTHS.values())).rstrip() for row in rows]


def bill_lines(total: Bill, scales: Iterable[str]) -> list[str]:
    """A bill in sentences; scales: of its runs."""
    counts = ", ".join(f"{count} {state}" for state, count in total.states.items())
    if total.other_code:
        counts += f"; {total.other_code} finished by other code, which --stale runs again"
    lines = [f"{total.todo} of {total.of} runs to do{f' ({counts})' if counts else ''}"]
    if not total.todo:
        return lines
    origins = "; ".join(f"{count} from {origin}" if origin != GUESS else f"{count} guessed"
                        for origin, count in total.rates.items() if origin != UNKNOWN)  # fmt: skip
    at_a_time = f"{total.workers} at a time" if total.workers > 1 else "one at a time"
    if origins:
        lines.append(f"time: {clock(total.wall)}, {at_a_time} ({origins})")
    if "paper" in scales:
        hours = f"{total.seconds / 3600:.1f}" if total.seconds else ""
        lacking = f"{UNKNOWN} ({', '.join(total.unknown)})" if total.unknown else ""
        lines.append(f"GPU-hours: {' and '.join(filter(None, (hours, lacking)))}")
    return lines


def _who(wanted_by: Sequence[str]) -> str:
    """`pcre: main job, claims, ablation 1a; csl: table main, and 3 more`."""
    merged: dict[str, list[str]] = {}
    for who in wanted_by[:NAMED]:
        paper, what = who.split(" ", 1)
        merged.setdefault(paper, []).append(what)
    more = f", and {len(wanted_by) - NAMED} more" if len(wanted_by) > NAMED else ""
    return "; ".join(f"{paper}: {', '.join(what)}" for paper, what in merged.items()) + more


def as_json(planned: Sequence[Planned], workers: int = 1) -> dict:
    """A plan and its bill as plain JSON values."""
    rows = [
        dataclasses.asdict(item) | {"experiment": record(item.experiment)["experiment"], "todo": item.todo}
        for item in planned
    ]
    return {"runs": rows, "bill": dataclasses.asdict(bill(planned, workers))}
