"""Many runs: each planned run is executed once, as a notebook, by a local pool of processes or by Snakemake.

Both start the same command for a run (`python -m repro.batch.once`), so they give the same results. Snakemake also
takes the batch to Slurm or Kubernetes with a profile of `profiles/` or of the user. A finished run is never repeated, a
half-trained one continues, and a failed one stops no other. The outcome of a run is read from its folder alone.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from repro import runs
from repro.batch import once
from repro.batch.once import CLASSES, RETRIED, Failure
from repro.batch.plan import STALE, Planned
from repro.batch.progress import BatchBar, clock, title
from repro.experiment import Experiment, record
from repro.files import CorruptFile, read_json, write_json
from repro.measure.metrics import sentence
from repro.papers import SPECS
from repro.settings import SettingError, unknown

HERE = Path(__file__).parent
PROFILES = HERE / "profiles"
ENGINES = ("auto", "local", "snakemake")
LOCK, HOLDER, REPLACED, BATCH = ".batch.lock", ".batch.holder", "replaced", ".batch"
POLL = 0.5  # seconds between two looks at the running runs


@dataclass
class Summary:
    """The outcome of a batch. failed: experiment, failure class, message.

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
        rows = [(kind, title(experiment), _last_line(message)) for experiment, kind, message in self.failed]
        rows += [("notebook", title(experiment), _last_line(message)) for experiment, message in self.notes]
        if not rows:
            return counts
        table = [("class", "run", "last line"), *rows]
        widths = [max(len(row[column]) for row in table) for column in (0, 1)]
        return "\n".join([counts, "", *(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in table)])


@dataclass(frozen=True)
class Job:
    """One run to execute. command: options of `once` without the attempt's number. seconds: expected."""

    experiment: Experiment
    folder: Path
    command: tuple[str, ...]
    seconds: float


def execute(
    planned: Sequence[Planned], root: Path | None = None, *, engine: str = "auto", workers: int = 0,
    device: str = "auto", retries: int = 1, time_limit: float | None = None, profile: str | None = None,
    data_root: Path | None = None, notebook: Path = once.NOTEBOOK_OF_A_RUN,
) -> Summary:  # fmt: skip
    """Execute every planned run that is not finished, and print its outcome.

    planned: of `plan.plan`. Its `stale` runs are executed anew, and their former folder goes to `replaced/`.
    engine: `local` (a pool of processes), `snakemake`, or `auto`: Snakemake where it is installed.
    workers: runs at a time; 0: one a CPU core or a GPU, or what the profile states.
    retries: further attempts after a failure that may pass (`once.RETRIED`). time_limit: seconds of one attempt.
    profile: `slurm`, `kubernetes`, or a folder with a Snakemake profile; without one, runs stay on this machine.
    Raises SettingError, RunBusy (a batch is busy in this folder), OSError (the folder cannot be written) before
    anything runs, and KeyboardInterrupt after running ones have saved a checkpoint.
    """
    engine = _checked(engine, workers, retries, time_limit, profile, notebook)
    gpus = visible_gpus(device) if profile is None else []
    workers = workers or (0 if profile else len(gpus) or default_workers(device))
    root = Path(root or runs.runs_folder()).resolve()
    with alone(root):
        summary = Summary()
        how = _arguments(root, device, gpus, time_limit, data_root, notebook)
        jobs = ordered(_job(item, root, how) for item in _unfinished(planned, root, summary))
        if jobs:
            print(_opening(jobs, summary, workers, profile), flush=True)
            with _sigterm_interrupts(), BatchBar([(job.experiment, job.folder, job.seconds) for job in jobs]) as bar:
                report = _Report(summary, jobs, workers, bar)
                if engine == "local":
                    _in_pool(jobs, workers, retries, report)
                else:
                    on_gpu = device.startswith("cuda") or any(job.experiment.scale == "paper" for job in jobs)
                    _by_snakemake(jobs, root, workers, retries, report, profile, on_gpu, time_limit)
    print(summary, flush=True)
    return summary


def _checked(
    engine: str, workers: int, retries: int, time_limit: float | None, profile: str | None, notebook: Path
) -> str:
    """The engine, with `auto` resolved; SettingError for settings that are not possible."""
    installed = importlib.util.find_spec("snakemake") is not None
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if profile and engine == "local":
        raise SettingError(f"profile {profile!r} needs Snakemake; leave out --engine local")
    if not installed and (profile or engine == "snakemake"):
        raise SettingError("Snakemake is not installed; pip install -c constraints.txt -e '.[batch]', or leave it out")
    for name, value in (("workers", workers), ("retries", retries)):
        if type(value) is not int or value < 0:
            raise SettingError(f"{name} is {value!r}; it must be a whole number from 0")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise SettingError(f"time_limit is {time_limit!r}; it must be a number of seconds above 0, or None")
    if profile:
        profile_folder(profile)
    if not notebook.exists():
        raise SettingError(f"there is no {notebook}; batches need a checkout of the repository")
    return ("snakemake" if installed else "local") if engine == "auto" else engine


def default_workers(device: str = "auto") -> int:
    """One run a CPU core, since a `mini` run uses one thread; one run at a time on a CUDA device."""
    return 1 if runs.choose_device(device).type == "cuda" else runs.cores()


def ordered(jobs: Iterable[Job]) -> list[Job]:
    """The quickest job first, for an early result, then from the longest to the shortest, so that workers stay busy."""
    longest = sorted(jobs, key=lambda job: -job.seconds)
    quickest = min(longest, key=lambda job: job.seconds, default=None)
    return [quickest, *(job for job in longest if job is not quickest)] if longest else []


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
    lock, holder, name = FileLock(root / LOCK, timeout=0), root / HOLDER, ""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n", encoding="utf-8")
    except Timeout as error:
        with contextlib.suppress(OSError):
            name = holder.read_text(encoding="utf-8").strip()
        raise runs.RunBusy(
            f"{root} is being rerun by {name or 'another process'}; wait for it, stop it, or name another folder: "
            f"--runs"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"cannot write in {root} ({error}); free space there, or name another folder: --runs, or REPRO_RUNS"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _unfinished(planned: Sequence[Planned], root: Path, summary: Summary) -> list[Planned]:
    """The runs to execute. Finished runs go to the summary, as failures if their files were edited."""
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
    found = {"metrics.json": runs.load_metrics(folder)}
    if (folder / "experiment.json").exists():
        found["experiment.json"] = read_json(folder / "experiment.json")
    for name, saved in found.items():
        if not isinstance(saved, dict) or saved.get("recipe", wanted) != wanted:
            raise CorruptFile(
                f"{folder / name} was edited: it is not the record of this run; restore it, or delete the folder to "
                f"run it again"
            )
    once.settle(folder, None, whole=False)


def _set_aside(folder: Path, replaced: Path) -> None:
    replaced.mkdir(exist_ok=True)
    names = (replaced / f"{folder.name}-{number}" for number in itertools.count(1))
    os.replace(folder, next(name for name in names if not name.exists()))


def _arguments(root, device, gpus, time_limit, data_root, notebook) -> list[str]:
    """The part of the command that all runs of a batch share."""
    arguments = ["--runs", str(root), "--device", device, "--notebook", str(Path(notebook).resolve())]
    arguments += ["--gpus", ",".join(gpus)] if gpus else []
    arguments += ["--time-limit", str(time_limit)] if time_limit else []
    return arguments + (["--data-root", str(Path(data_root).resolve())] if data_root else [])


def _job(item: Planned, root: Path, how: Sequence[str]) -> Job:
    wanted = json.dumps(record(item.experiment)["experiment"])
    return Job(item.experiment, root / item.run, ("--record", wanted, "--run", item.run, *how), item.seconds or 0.0)


def _opening(jobs: Sequence[Job], summary: Summary, workers: int, profile: str | None) -> str:
    text = f"{len(jobs)} runs to do, {len(summary.skipped)} finished before"
    if workers:
        text += f"; {workers} at a time" if workers > 1 else "; one at a time"
    if workers and any(job.seconds for job in jobs):
        text += f"; about {clock(wall_seconds(jobs, workers))} from what earlier runs took"
    return text + (f"; profile {profile}" if profile else "")


def wall_seconds(jobs: Sequence[Job], workers: int) -> float:
    """Expected seconds until the last job ends: at least those of the longest one."""
    seconds = [job.seconds for job in jobs]
    return max(max(seconds), sum(seconds) / workers)


class _Report:
    """Prints a line as each run ends, and enters it in the summary."""

    def __init__(self, summary: Summary, jobs: Sequence[Job], workers: int, bar: BatchBar) -> None:
        self.summary, self.waiting, self.workers, self.bar = summary, list(jobs), workers, bar
        self.total, self.started = len(jobs), time.monotonic()

    def ended(self, job: Job, failure: Failure | None) -> None:
        """failure: None for a finished run."""
        self.waiting.remove(job)
        if failure is None:
            metrics = runs.load_metrics(job.folder)
            numbers = sentence(metrics["reported"]["last"]["ema"], SPECS[job.experiment.paper].headlines)
            outcome = f"{numbers}, {metrics['cost']['train_seconds']:.0f} s"
            self.summary.finished.append(job.experiment)
            if (job.folder / once.FAILED).exists():
                self.summary.notes.append((job.experiment, f"trained; its notebook stopped: {once.FAILED}"))
        else:
            outcome = f"FAILED, {failure.kind}: {_last_line(failure.message)}"
            self.summary.failed.append((job.experiment, failure.kind, failure.message))
        when = clock(time.monotonic() - self.started)
        if self.waiting and self.workers and all(job.seconds for job in self.waiting):
            when += f", about {clock(wall_seconds(self.waiting, self.workers))} left"
        done = self.total - len(self.waiting)
        self.bar.write(f"[{when}] {done} of {self.total}: {title(job.experiment)}: {outcome}")
        self.bar.ended(job.folder)


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


# The local pool


def _in_pool(jobs: Sequence[Job], workers: int, retries: int, report: _Report) -> None:
    """Run the jobs in order, `workers` at a time, in processes of their own."""
    stop, running = threading.Event(), set()
    here = [sys.executable, "-m", "repro.batch.once", "--parent", str(os.getpid())]
    here += ["--threads", str(threads_of(workers))]
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_attempts, job, here, retries, stop, running): job for job in jobs}
        try:
            while waiting:
                for future in wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED).done:
                    report.ended(waiting.pop(future), future.result())
                report.bar.look()
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
        died = _death(process.returncode, printed, attempt, once.oom_kills() > killed_before)
        failure = _outcome(job.folder, failed_before, died)
        if failure is None or failure.kind not in RETRIED:
            break
    return failure


def _death(status: int, printed: str, attempt: int, oom: bool) -> Failure:
    """The failure of an attempt as its process ended. oom: whether the system killed a process for its memory."""
    kinds = {-signal.SIGTERM: "preempted", -9: "out of memory" if oom else "dead kernel"}
    kind = (kinds | {status: kind for kind, status in CLASSES.items()}).get(status, "bug")
    printed = "\n".join(printed.strip().splitlines()[-once.TAIL :])
    return Failure(kind, printed or f"its process ended with status {status} and printed nothing", attempt)


def _outcome(folder: Path, failed_before: int, otherwise: Failure) -> Failure | None:
    """The outcome of a run that ended: its metrics, else the failure.json that it wrote, else `otherwise`.

    failed_before: `once.failed_at` before the run started.
    """
    if once.is_finished(folder):
        once.settle(folder, None, whole=False)  # killed while it drew
        return None
    if once.failed_at(folder) != failed_before and (failure := once.read_failure(folder)):
        return failure
    once.settle(folder, otherwise)
    return otherwise


# Snakemake


def _by_snakemake(
    jobs: Sequence[Job], root: Path, workers: int, retries: int, report: _Report, profile: str | None, gpu: bool,
    time_limit: float | None,
) -> None:  # fmt: skip
    """Run the jobs as a rule of `Snakefile`, here or where a profile states.

    workers: runs at a time, 0 for what the profile states. gpu: whether a run asks a cluster for one. time_limit:
    seconds, to which a cluster adds a margin. Raises OSError when Snakemake itself fails.
    """
    plan, threads = root / BATCH / "plan.json", 1 if profile else threads_of(workers)
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
        # The batch's own lock dies with its process, and metrics.json is whole or absent, so a kill leaves no obstacle.
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
                time.sleep(POLL)
                for job in [job for job in waiting if _is_over(job.folder, before[job.folder], retries)]:
                    waiting.remove(job)
                    failures.append(None if once.is_finished(job.folder) else once.read_failure(job.folder))
                    report.ended(job, failures[-1])
                report.bar.look()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            process.wait()
            raise
    printed = log.read_text(encoding="utf-8", errors="replace")
    of_jobs, not_run = failures_in_log(printed), Failure("bug", f"Snakemake did not run it:\n{printed.strip()[-2000:]}")
    for job in waiting:
        failures.append(_outcome(job.folder, before[job.folder], of_jobs.get(job.folder.name, not_run)))
        report.ended(job, failures[-1])
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
    folder = PROFILES / profile if (PROFILES / profile / "config.yaml").exists() else Path(profile).resolve()
    if not any((folder / name).exists() for name in ("config.yaml", "config.v9+.yaml")):
        known = sorted(path.parent.name for path in PROFILES.glob("*/config.yaml"))
        raise SettingError(f"profile {profile!r} is neither one of {', '.join(known)} nor a folder with config.yaml")
    return folder


def _drop_empty(log: Path) -> None:
    """Remove the empty file that Snakemake puts where a log is missing."""
    with contextlib.suppress(FileNotFoundError):
        if not log.stat().st_size:
            log.unlink()


def _is_over(folder: Path, failed_before: int, retries: int) -> bool:
    """Whether a run is finished, its notebook too, or has failed and is not tried again."""
    if once.is_finished(folder):
        return not (folder / once.RUNNING).exists()
    failure = once.read_failure(folder) if once.failed_at(folder) != failed_before else None
    return failure is not None and (failure.kind not in once.RETRIED or failure.attempt > retries)


STATES = {
    "OUT_OF_MEMORY": "out of memory", "TIMEOUT": "time limit", "DEADLINE": "time limit", "PREEMPTED": "preempted",
    "CANCELLED": "preempted", "NODE_FAIL": "dead kernel",
}  # fmt: skip


def failures_in_log(log: str) -> dict[str, Failure]:
    """Run -> the failure that Snakemake, or its cluster, reports for the run's last attempt."""
    found = {}
    for block in re.split(r"\n(?=Error in rule )", log)[1:]:
        run = re.search(r"^    output: (.+)/metrics\.json", block, re.MULTILINE)
        message = re.search(r"^    message: (.+)", block, re.MULTILINE)
        if run:
            text = message[1] if message else "its job ended without a message"
            state = re.search(r"status is: '?([A-Z_]+)", text)
            found[Path(run[1]).name] = Failure(STATES.get(state[1] if state else "", "dead kernel"), text)
    return found
