"""Batches: the notebook of every planned run, executed once each, by Snakemake or by this process.

Both engines start the same command for a run, so they give the same results; Snakemake also takes the
batch to Slurm or Kubernetes. A finished run is never repeated, a half-trained one continues, a failed one stops no
other. What became of a run is read from its folder alone.
"""

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from repro import runs
from repro.batch import once, snakemake
from repro.batch.local import clock, default_workers, title
from repro.batch.once import CLASSES, RETRIED, Failure
from repro.batch.plan import STALE, Planned
from repro.experiment import Experiment, record
from repro.files import CorruptFile, read_json
from repro.grid import PAPERS
from repro.measure.metrics import sentence
from repro.settings import SettingError, unknown

ENGINES = ("auto", "sequential", "snakemake")
LOCK, REPLACED = ".batch.lock", "replaced"


@dataclass
class Summary:
    """What became of a batch. failed: experiment, failure class, the last that was said.

    notes: finished runs whose notebook stopped later, at a figure for example.
    """

    finished: list[Experiment] = field(default_factory=list)
    skipped: list[Experiment] = field(default_factory=list)
    failed: list[tuple[Experiment, str, str]] = field(default_factory=list)
    notes: list[tuple[Experiment, str]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0, or 1 when a run failed."""
        return 1 if self.failed else 0

    def __str__(self) -> str:
        """Counts, and a table of failures: class, run, last line."""
        counts = f"{len(self.finished)} finished, {len(self.skipped)} finished before, {len(self.failed)} failed"
        rows = [(kind, title(experiment), _last_line(said)) for experiment, kind, said in self.failed]
        rows += [("notebook", title(experiment), _last_line(said)) for experiment, said in self.notes]
        if not rows:
            return counts
        table = [("class", "run", "last line"), *rows]
        widths = [max(len(row[column]) for row in table) for column in (0, 1)]
        return "\n".join([counts, "", *(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in table)])


@dataclass(frozen=True)
class Job:
    """One run to execute, and the command that does it, without the number of the attempt."""

    experiment: Experiment
    folder: Path
    command: tuple[str, ...]
    seconds: float


def rerun(
    planned: Sequence[Planned], root: Path | None = None, *, engine: str = "auto", workers: int = 0,
    device: str = "auto", retries: int = 1, time_limit: float | None = None, profile: str | None = None,
    data_root: Path | None = None, notebooks: Path = once.NOTEBOOKS,
) -> Summary:  # fmt: skip
    """Execute every planned run that is not finished, and print what became of it.

    planned: of `plan.plan`; its `stale` runs are executed anew, their former folder goes to `replaced/`.
    engine: `sequential`, `snakemake`, or `auto`: Snakemake where it is installed.
    workers: runs at a time; 0: one a CPU core or a GPU, or what the profile says.
    retries: further attempts after a failure that may pass (`once.RETRIED`). time_limit: seconds of one attempt.
    profile: `slurm`, `kubernetes`, or a folder with a Snakemake profile; without one, runs stay on this machine.
    Raises SettingError, RunBusy (a batch is busy in this folder), OSError (the folder cannot be written) before
    anything runs, and KeyboardInterrupt after running ones have saved a checkpoint.
    """
    engine = _checked(engine, workers, retries, time_limit, profile)
    _check_notebooks(planned, notebooks)
    gpus = visible_gpus(device) if profile is None else []
    workers = workers or (0 if profile else len(gpus) or default_workers(device))
    root = Path(root or runs.runs_folder()).resolve()
    with alone(root):
        summary = Summary()
        how = _arguments(root, device, gpus, time_limit, data_root, notebooks)
        jobs = [_job(item, root, how) for item in _sort(planned, root, summary)]
        report = _Report(summary, len(jobs))
        if jobs:
            print(_opening(jobs, summary, workers, engine, profile), flush=True)
            with _sigterm_interrupts():
                if engine == "sequential":
                    _sequential(jobs, workers, retries, report)
                else:
                    on_gpu = device.startswith("cuda") or any(job.experiment.scale == "paper" for job in jobs)
                    snakemake.execute(
                        jobs, root, workers, retries, report.ended, profile=profile, gpu=on_gpu,
                        threads=1 if profile else threads_of(workers), time_limit=time_limit,
                    )  # fmt: skip
    print(summary, flush=True)
    return summary


def _checked(engine: str, workers: int, retries: int, time_limit: float | None, profile: str | None) -> str:
    """The engine that `auto` stands for; SettingError for what cannot be."""
    installed = importlib.util.find_spec("snakemake") is not None
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if profile and engine == "sequential":
        raise SettingError(f"profile {profile!r} needs Snakemake; leave out --engine sequential")
    if not installed and (profile or engine == "snakemake"):
        raise SettingError("Snakemake is not installed; pip install -c constraints.txt -e '.[batch]', or leave it out")
    for name, value in (("workers", workers), ("retries", retries)):
        if type(value) is not int or value < 0:
            raise SettingError(f"{name} is {value!r}; it must be a whole number from 0")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise SettingError(f"time_limit is {time_limit!r}; it must be a number of seconds above 0, or None")
    if profile:
        snakemake.profile_folder(profile)
    return ("snakemake" if installed else "sequential") if engine == "auto" else engine


def _check_notebooks(planned: Sequence[Planned], notebooks: Path) -> None:
    for paper in sorted({item.experiment.paper for item in planned}):
        if not (notebooks / f"{paper}.ipynb").exists():
            raise SettingError(f"{notebooks} has no {paper}.ipynb; batches need a checkout of the repository")


def visible_gpus(device: str) -> list[str]:
    """The CUDA devices that `device` allows, as `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    chosen = runs.choose_device(device)
    if chosen.type != "cuda":
        return []
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    named = named or [str(index) for index in range(torch.cuda.device_count())]
    return named if device in ("auto", "cuda") else [named[chosen.index or 0]]


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a folder of runs against other batches; the lock dies with its process.

    Raises RunBusy naming the process that holds it, OSError when nothing can be written here.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(root, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise runs.RunBusy(
                f"{root} is being rerun by {file.read().strip() or 'another process'}; "
                f"wait for it, stop it, or name another folder: --runs"
            ) from error
        try:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        except OSError as error:
            raise _unwritable(root, error) from error
        yield


def _unwritable(root: Path, error: OSError) -> OSError:
    return OSError(f"cannot write in {root} ({error}); free space there, or name another folder: --runs, or REPRO_RUNS")


def _sort(planned: Sequence[Planned], root: Path, summary: Summary) -> list[Planned]:
    """What is to run. Finished runs go to the summary, those whose files were edited as failures."""
    todo = []
    for item in {item.run: item for item in planned}.values():
        folder = root / item.run
        if not once.is_finished(folder):
            todo.append(item)
        elif item.state == STALE:
            _set_aside(folder, root / REPLACED)
            todo.append(item)
        else:
            try:
                _check_finished(item.experiment, folder)
                summary.skipped.append(item.experiment)
            except CorruptFile as error:
                summary.failed.append((item.experiment, "bad input", str(error)))
    return todo


def _check_finished(experiment: Experiment, folder: Path) -> None:
    """Raise CorruptFile unless the files of a finished run are those of this experiment."""
    wanted = json.loads(json.dumps(record(experiment)["recipe"]))
    for name, saved in (("metrics.json", runs.load_metrics(folder)), ("experiment.json", None)):
        if name == "experiment.json" and (folder / name).exists():
            saved = read_json(folder / name)
        if saved is not None and (not isinstance(saved, dict) or saved.get("recipe", wanted) != wanted):
            raise CorruptFile(
                f"{folder / name} was edited: it is not the record of this run; restore it, or delete the folder to "
                f"run it again"
            )
    once.settle(folder, None, whole=False)


def _set_aside(folder: Path, replaced: Path) -> None:
    replaced.mkdir(exist_ok=True)
    number = 1
    while (replaced / f"{folder.name}-{number}").exists():
        number += 1
    os.replace(folder, replaced / f"{folder.name}-{number}")


def _arguments(root, device, gpus, time_limit, data_root, notebooks) -> list[str]:
    """The part of the command that all runs of a batch share."""
    arguments = ["--runs", str(root), "--device", device, "--notebooks", str(Path(notebooks).resolve())]
    arguments += ["--gpus", ",".join(gpus)] if gpus else []
    arguments += ["--time-limit", str(time_limit)] if time_limit else []
    return arguments + (["--data-root", str(Path(data_root).resolve())] if data_root else [])


def _job(item: Planned, root: Path, how: Sequence[str]) -> Job:
    asked = json.dumps(record(item.experiment)["experiment"])
    return Job(item.experiment, root / item.run, ("--record", asked, "--run", item.run, *how), item.seconds or 0.0)


def _opening(jobs: Sequence[Job], summary: Summary, workers: int, engine: str, profile: str | None) -> str:
    total = sum(job.seconds for job in jobs)
    at_a_time = f"; {workers} at a time" * bool(workers)
    time_needed = f"; training takes about {clock(total / max(1, min(workers, len(jobs))))}" * bool(workers and total)
    by = f"{engine}{f', profile {profile}' * bool(profile)}"
    return f"{len(jobs)} runs to do, {len(summary.skipped)} finished before{at_a_time}{time_needed} ({by})"


class _Report:
    """Prints a line as each run ends, and enters it in the summary."""

    def __init__(self, summary: Summary, total: int) -> None:
        self.summary, self.total, self.done, self.started = summary, total, 0, time.monotonic()

    def ended(self, job: Job, failure: Failure | None) -> None:
        self.done += 1
        if failure is None:
            metrics = runs.load_metrics(job.folder)
            headlines = PAPERS[job.experiment.paper].HEADLINES
            numbers, seconds = sentence(metrics["reported"]["last"]["ema"], headlines), metrics["cost"]["train_seconds"]
            said = f"{numbers}, {seconds:.0f} s"
            self.summary.finished.append(job.experiment)
            if (job.folder / once.FAILED).exists():
                self.summary.notes.append((job.experiment, f"trained; its notebook stopped: {once.FAILED}"))
        else:
            said = f"FAILED, {failure.kind}: {_last_line(failure.message)}"
            self.summary.failed.append((job.experiment, failure.kind, failure.message))
        spent = clock(time.monotonic() - self.started)
        print(f"[{spent}] {self.done} of {self.total}: {title(job.experiment)}: {said}", flush=True)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 200, placeholder=" ...") if lines else ""


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM stops a batch as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_) -> None:
        raise KeyboardInterrupt("stopped by SIGTERM; run it again to continue")

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def threads_of(workers: int) -> int:
    """CPU threads of each of `workers` runs: what OMP_NUM_THREADS says, else an equal share of the cores."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() and int(chosen) else max(1, runs.cores() // workers)


# The plain engine


def _sequential(jobs: Sequence[Job], workers: int, retries: int, report: _Report) -> None:
    """Run the jobs, `workers` at a time, in processes of their own."""
    stop, running = threading.Event(), set()
    here = [sys.executable, "-m", "repro.batch.once", "--parent", str(os.getpid())]
    here += ["--threads", str(threads_of(workers))]
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_attempts, job, here, retries, stop, running): job for job in jobs}
        try:
            for future in as_completed(waiting):
                report.ended(waiting[future], future.result())
        except BaseException:
            stop.set()
            for process in list(running):
                process.terminate()
            raise


def _attempts(job: Job, here: Sequence[str], retries: int, stop: threading.Event, running: set) -> Failure | None:
    failure = None
    for attempt in range(1, retries + 2):
        if stop.is_set():
            return failure
        killed_before, failed_before = once.oom_kills(), once.failed_at(job.folder)
        process = subprocess.Popen(
            [*here, *job.command, "--attempt", str(attempt)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        running.add(process)
        if stop.is_set():
            process.terminate()
        printed = process.communicate()[0]
        running.discard(process)
        told = once.failed_at(job.folder) != failed_before
        failure = _outcome(job, process.returncode, printed, attempt, told, once.oom_kills() > killed_before)
        if failure is None or failure.kind not in RETRIED:
            break
    return failure


def _outcome(job: Job, status: int, printed: str, attempt: int, told: bool, oom: bool) -> Failure | None:
    """What became of an attempt: its metrics, the failure.json that it wrote (`told`), else how its process ended."""
    if once.is_finished(job.folder):
        once.settle(job.folder, None, whole=False)  # killed while it drew
        return None
    if told and (failure := once.read_failure(job.folder)):
        return failure
    kinds = {-signal.SIGTERM: "preempted", -signal.SIGKILL: "out of memory" if oom else "dead kernel"}
    kind = (kinds | {status: kind for kind, status in CLASSES.items()}).get(status, "bug")
    printed = "\n".join(printed.strip().splitlines()[-once.TAIL :])
    failure = Failure(kind, printed or f"its process ended with status {status} and said nothing", attempt)
    once.settle(job.folder, failure)
    return failure


__all__ = ["ENGINES", "Job", "Summary", "alone", "rerun", "visible_gpus"]
