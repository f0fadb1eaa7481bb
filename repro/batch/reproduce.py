"""The main job: the runs of `plan.select(main=True)`, then the report, then the commands for the other runs.

It needs embedded data only, and no network. A second call finds everything done; a killed one continues.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from repro import runs
from repro.batch import plan, records, report
from repro.batch.execute import execute
from repro.experiment import Experiment
from repro.grid import PAPERS

VERDICT_SEEDS = 5  # no claim gets a verdict from fewer


def reproduce(
    scale: str = "mini", seeds: int = 1, workers: int = 0, root: Path | None = None, device: str = "auto"
) -> int:
    """Run the main job; returns the exit status: 0, or 1 when a run failed (the report then shows `not run` there).

    scale: `tiny`, `mini` or `paper`. seeds: how many, from 0. workers: runs at a time, 0 for one a core.
    root: folder of runs. A `mini` job in the usual folder also renews the checkout's `figures/rendered/`, unless runs
    that are committed there would be dropped.
    """
    root, numbers = Path(root or runs.runs_folder()), plan.first_seeds(seeds)
    selection = plan.select(main=True, scale=scale, seeds=numbers)
    print(
        f"main job: {len(selection)} runs at scale {scale}, seeds {', '.join(map(str, numbers))}, {', '.join(PAPERS)}",
        flush=True,
    )
    outcome = execute(plan.plan(selection, root), root, engine="local", workers=workers, device=device)
    usual = scale == "mini" and root == runs.runs_folder()
    kept = report.unpublished(scale, numbers, root) if usual else ""
    page = report.build(scale, numbers, root, publish=usual and not kept)
    print(f"report: {page}")
    told = [f"figures/rendered/ is left as it is: {kept}"] if kept else []
    print("\n".join([*told, *left_out(selection, scale, numbers, root)]))
    return outcome.exit_status


def left_out(experiments: Collection[Experiment], scale: str, seeds: Sequence[int], root: Path) -> list[str]:
    """Lines: how many runs of all tables, ablations and claims the main job leaves out, and the commands for them.

    experiments: of the main job, as `plan.select` gives them.
    """
    whole, done = plan.select(scale=scale, seeds=seeds), set(experiments)
    rest = [experiment for experiment in whole if experiment not in done]
    there = sum(runs.is_finished(experiment, root) for experiment in rest)
    enough = max(VERDICT_SEEDS, records.committed_seeds(scale))
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"
