"""The main job: what runs, in what order, and what is written from it.

Embedded data only, offline. The runs that `plan.select(main=True)` names, then tables, figures and the HTML report,
then whether the numbers agree with the committed ones, and what was left out. A second call finds everything done; a
killed one continues.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from repro import runs
from repro.batch import plan, records, report
from repro.batch.local import COMMITTED, Outcome, run_all
from repro.experiment import Experiment
from repro.grid import PAPERS
from repro.recipe import SCALES
from repro.settings import SettingError, unknown

MINIMUM_SEEDS = 5  # of a verdict


def reproduce(
    scale: str = "mini", seeds: int = 1, workers: int = 0, root: Path | None = None, device: str = "auto"
) -> int:
    """Run the main job; returns the exit status: 0, or 1 when a run failed (the report then says `not run` there).

    scale: `tiny`, `mini` or `paper`. seeds: how many, from 0. workers: runs at a time, 0 for one a core.
    root: folder of runs. Figures and tables stand beside the report; those of a `mini` job in the usual folder also go
    to the checkout's `figures/rendered/`, unless runs that are committed there would be dropped.
    Numbers that disagree with the committed ones are told, and do not change the status.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if seeds < 1:
        raise SettingError(f"seeds is {seeds}; it must be at least 1")
    root = Path(root or runs.runs_folder())
    numbers = tuple(range(seeds))
    experiments = list(plan.select(main=True, scale=scale, seeds=numbers))
    print(
        f"main job: {len(experiments)} runs at scale {scale}, seeds {', '.join(map(str, numbers))}, "
        f"{', '.join(PAPERS)}",
        flush=True,
    )
    outcome = run_all(experiments, root, workers, device)
    usual = scale == "mini" and root == runs.runs_folder()
    kept = report.unpublished(scale, numbers, root) if usual else ""
    page = report.build(scale, numbers, root, usual and not kept)
    _tell(outcome, page)
    told = [f"figures/rendered/ is left as it is: {kept}"] if kept else []
    print("\n".join([*told, *left_out(experiments, scale, numbers, root)]))
    return 1 if outcome.failed else 0


def left_out(experiments: Collection[Experiment], scale: str, seeds: Sequence[int], root: Path) -> list[str]:
    """What the main job leaves out of all tables, ablations and claims, and the commands that run it, as lines.

    experiments: of the main job, as `plan.select` gives them.
    """
    whole, done = plan.select(scale=scale, seeds=seeds), set(experiments)
    rest = [experiment for experiment in whole if experiment not in done]
    there = sum(runs.is_finished(experiment, root) for experiment in rest)
    enough = max(MINIMUM_SEEDS, committed_seeds(scale))
    lines = [
        f"left out: {len(rest)} of the {len(whole)} runs that all tables, ablations and claims need with "
        f"{_count(len(seeds), 'seed')} ({there} of them are finished here)"
    ]
    if len(seeds) < enough:
        lines[0] += f"; {_count(enough - len(seeds), 'further seed')}, without which no claim gets a verdict"
        which = "" if scale == "mini" else f" SCALE={scale}"
        lines.append(f"more seeds of the same: make reproduce{which} SEEDS={enough}")
    options = f"--scale {scale} --seeds {max(enough, len(seeds))}"
    lines.append(f"all of it: python -m repro rerun {options}")
    lines.append(f"what that costs: python -m repro plan {options}")
    return lines


def committed_seeds(scale: str) -> int:
    """How many seeds the committed results of a scale have; 0 without any."""
    frame = records.load_runs(COMMITTED)
    if frame.empty:
        return 0
    return int(frame.loc[frame["scale"] == scale, "seed"].nunique())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def _tell(outcome: Outcome, page: Path) -> None:
    if not outcome.finished and not outcome.failed:
        print("every run was finished before: nothing to do")
    for experiment, said in outcome.failed:
        print(f"FAILED {experiment}: {said.splitlines()[-1] if said else ''}", file=sys.stderr)
    print(f"report: {page}")
