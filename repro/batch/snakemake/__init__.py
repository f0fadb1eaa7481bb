"""Batches through Snakemake: the same command for each run, as a rule of `Snakefile`, here or where a profile says.

`slurm/` and `kubernetes/` are profiles; a folder of one's own may take their place.
"""

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repro.batch import once
from repro.batch.once import Failure
from repro.files import write_json
from repro.settings import SettingError

HERE, BATCH = Path(__file__).parent, ".batch"


def execute(
    jobs: Sequence[Any], root: Path, workers: int, retries: int, ended: Callable[[Any, Failure | None], None], *,
    profile: str | None, gpu: bool, threads: int, time_limit: float | None,
) -> None:  # fmt: skip
    """Run the jobs of a batch and tell `ended` what became of each.

    jobs: `rerun.Job`s. workers: runs at a time, 0 for what the profile says. threads: of each run; a profile may set
    others. gpu: whether a run asks a cluster for one. time_limit: seconds, to which a cluster adds a margin.
    Raises OSError when Snakemake itself fails.
    """
    plan = root / BATCH / "plan.json"
    resources: dict[str, int] = {"gpu": 1} if gpu and profile else {}
    if time_limit:
        resources["runtime"] = math.ceil(time_limit / 60) + 5
    write_json(plan, {
        "batch": os.getpid(), "threads": threads, "retries": retries, "resources": resources,
        "commands": {job.folder.name: shlex.join(job.command) for job in jobs},
    })  # fmt: skip
    shutil.copy(HERE / "Snakefile", plan.with_name("Snakefile"))  # where jobs on other machines can read it
    command = [
        sys.executable, "-m", "snakemake", "--snakefile", str(plan.with_name("Snakefile")), "--directory", str(root),
        "--config", f"plan={plan}", "--nocolor", "--keep-going", "--scheduler", "greedy",
        # Our own lock dies with its process, and metrics.json is whole or absent: what a kill leaves is no obstacle.
        "--nolock", "--ignore-incomplete", "--keep-incomplete", "--rerun-triggers", "mtime",
        *_where(profile, workers, threads),
    ]  # fmt: skip
    log = plan.with_name("snakemake.log")
    before = {job.folder: once.failed_at(job.folder) for job in jobs}
    waiting, failures = list(jobs), []
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                for job in [job for job in waiting if _is_over(job.folder, before[job.folder], retries)]:
                    waiting.remove(job)
                    failures.append(None if once.is_finished(job.folder) else once.read_failure(job.folder))
                    ended(job, failures[-1])
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    said = log.read_text(encoding="utf-8", errors="replace")
    of_jobs = failures_in_log(said)
    for job in waiting:
        failures.append(_failure(job.folder, once.failed_at(job.folder) != before[job.folder], of_jobs, said))
        ended(job, failures[-1])
    for job in jobs:
        _drop_empty(job.folder / once.NOTEBOOK)
    if process.returncode and not any(failures):
        raise OSError(f"Snakemake ended with status {process.returncode}; see {log}")


def _where(profile: str | None, workers: int, threads: int) -> list[str]:
    if profile is None:
        return ["--cores", str(workers * threads), "--latency-wait", "0"]
    return ["--profile", str(profile_folder(profile)), *(["--jobs", str(workers)] if workers else [])]


def profile_folder(profile: str) -> Path:
    """The folder of a profile: one of this package's, by name, or any with a `config.yaml`. Raises SettingError."""
    folder = HERE / profile if (HERE / profile / "config.yaml").exists() else Path(profile).resolve()
    if not any((folder / name).exists() for name in ("config.yaml", "config.v9+.yaml")):
        known = sorted(path.parent.name for path in HERE.glob("*/config.yaml"))
        raise SettingError(f"profile {profile!r} is neither one of {', '.join(known)} nor a folder with config.yaml")
    return folder


def _drop_empty(log: Path) -> None:
    """Remove the empty file that Snakemake puts where a log is missing."""
    with contextlib.suppress(FileNotFoundError):
        if not log.stat().st_size:
            log.unlink()


def _is_over(folder: Path, failed_before: int, retries: int) -> bool:
    """Whether a run is finished and its notebook is drawn, or has failed and is not tried again."""
    if once.is_finished(folder):
        return not (folder / once.RUNNING).exists()
    failure = once.read_failure(folder) if once.failed_at(folder) != failed_before else None
    return failure is not None and (failure.kind not in once.RETRIED or failure.attempt > retries)


def _failure(folder: Path, told: bool, of_jobs: Mapping[str, Failure], said: str) -> Failure | None:
    """What became of a run when Snakemake has ended. told: whether the run itself wrote why it failed."""
    if once.is_finished(folder):
        once.settle(folder, None, whole=False)  # killed while it drew
        return None
    if told and (failure := once.read_failure(folder)):
        return failure
    failure = of_jobs.get(folder.name) or Failure("bug", f"Snakemake did not run it:\n{said.strip()[-2000:]}")
    once.settle(folder, failure)
    return failure


STATES = {
    "OUT_OF_MEMORY": "out of memory", "TIMEOUT": "time limit", "DEADLINE": "time limit", "PREEMPTED": "preempted",
    "CANCELLED": "preempted", "NODE_FAIL": "dead kernel",
}  # fmt: skip


def failures_in_log(log: str) -> dict[str, Failure]:
    """Run -> why Snakemake, or the cluster behind it, says that its job failed; of the last attempt."""
    found = {}
    for block in re.split(r"\n(?=Error in rule )", log)[1:]:
        run = re.search(r"^    output: (.+)/metrics\.json", block, re.MULTILINE)
        message = re.search(r"^    message: (.+)", block, re.MULTILINE)
        if run:
            text = message[1] if message else "its job ended without a word"
            state = re.search(r"status is: '?([A-Z_]+)", text)
            found[Path(run[1]).name] = Failure(STATES.get(state[1] if state else "", "dead kernel"), text)
    return found
