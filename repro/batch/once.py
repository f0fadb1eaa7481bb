"""One run as a notebook: papermill executes `notebooks/run.ipynb` in a kernel of its own.

This is the command of every job of a batch. For one run by hand there is `python -m repro run`. A run succeeded if and
only if its `metrics.json` exists: the notebook can look complete although its kernel died. A finished run leaves
`notebook.ipynb`. A failed one leaves `failed.ipynb`, executed up to the failure, and `failure.json` with its class.

The batch has checked the record. Nothing here needs torch, since the kernel loads it anyway.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

CLASSES = {"bug": 1, "bad input": 2, "dead kernel": 70, "out of memory": 71, "time limit": 124, "preempted": 143}
RETRIED = ("dead kernel", "out of memory", "preempted")
NOTEBOOK, RUNNING, FAILED, FAILURE = "notebook.ipynb", "running.ipynb", "failed.ipynb", "failure.json"
NOTEBOOK_OF_A_RUN = Path(__file__).resolve().parents[2] / "notebooks" / "run.ipynb"
GRACE = 15.0  # seconds in which a run may save its checkpoint; Slurm and Kubernetes give 30 between TERM and KILL
TAIL = 20


@dataclass(frozen=True)
class Failure:
    """Why an attempt at a run left no metrics. kind: one of `CLASSES`."""

    kind: str
    message: str
    attempt: int = 1


class Stopped(BaseException):
    """The run was told to stop before its kernel had started; the argument is a failure class."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute one run and return 0, or the status of its failure class (`CLASSES`)."""
    options = parser().parse_args(arguments)
    if options.parent:
        end_with(options.parent, os.getpid(), signal.SIGTERM)
    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    folder = options.runs.resolve() / options.run
    failure = execute(
        json.loads(options.record), folder, data_root=options.data_root, device=options.device,
        gpus=[name for name in options.gpus.split(",") if name], time_limit=options.time_limit,
        attempt=options.attempt, notebook=options.notebook,
    )  # fmt: skip
    for file, copy in (("metrics.json", options.output), (NOTEBOOK, options.log)):
        _copy(folder / file, copy)
    if failure is not None:
        print(f"repro: {options.run}: {failure.kind} (attempt {options.attempt}): {failure.message}", file=sys.stderr)
        return CLASSES[failure.kind]
    print(f"{folder}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line of one run."""
    top = argparse.ArgumentParser(prog="python -m repro.batch.once", description=__doc__.partition("\n")[0])
    top.add_argument("--record", required=True, help="the experiment as one JSON object")
    top.add_argument("--run", required=True, help="its run id")
    top.add_argument("--runs", type=Path, required=True, help="folder of runs")
    top.add_argument("--data-root", type=Path, help="folder of local data sets (default: REPRO_DATA, then the hub)")
    top.add_argument("--device", default="auto")
    top.add_argument("--gpus", default="", help="CUDA devices, as in CUDA_VISIBLE_DEVICES: one that is free is taken")
    top.add_argument("--threads", type=int, default=0, help="CPU threads, unless OMP_NUM_THREADS is set")
    top.add_argument("--time-limit", type=float, help="seconds")
    top.add_argument("--parent", type=int, help="stop when this process, which started the command, is gone")
    top.add_argument("--attempt", type=int, default=1, help="above 1: only after a failure that may pass by itself")
    top.add_argument("--output", type=Path, help="a second place for metrics.json, for a machine without its folder")
    top.add_argument("--log", type=Path, help="a second place for notebook.ipynb")
    top.add_argument("--notebook", type=Path, default=NOTEBOOK_OF_A_RUN, help="what is executed")
    return top


def _copy(file: Path, to: Path | None) -> None:
    if to and file.exists() and not (to.exists() and to.samefile(file)):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)


def execute(
    record: dict, folder: Path, *, data_root: Path | None = None, device: str = "auto", gpus: Sequence[str] = (),
    time_limit: float | None = None, attempt: int = 1, notebook: Path = NOTEBOOK_OF_A_RUN,
) -> Failure | None:  # fmt: skip
    """Execute the notebook for a record that was checked; None when the run has its metrics.

    folder: the run folder. gpus: CUDA devices to take one of, none to leave the choice to the notebook.
    attempt: above 1 the run is left alone if it failed before in a way that another attempt cannot change.
    """
    former = read_failure(folder)
    if is_finished(folder) or (attempt > 1 and former and former.kind not in RETRIED):
        return None if is_finished(folder) else former
    killed_before, error, watch = oom_kills(), None, Watch(time_limit)
    try:
        (folder / FAILURE).unlink(missing_ok=True)
        _wait_until_free(folder)
        with one_gpu(gpus) as gpu:
            if gpu is not None:
                os.environ["CUDA_VISIBLE_DEVICES"], device = gpu, "cuda"
            parameters = record | {"runs_root": str(folder.parent), "device": device}
            parameters["data_root"] = str(data_root) if data_root else None
            _papermill(notebook, folder, parameters, watch)
    except BaseException as caught:
        error = caught
    finally:
        watch.close()
    failure = None
    if not is_finished(folder):
        failure = dataclasses.replace(classify(error, watch.reason, oom_kills() > killed_before), attempt=attempt)
    elif error is not None:
        print(f"trained, but its notebook stopped: {_described(error)[1]}", file=sys.stderr)
    settle(folder, failure, whole=error is None)
    return failure


def is_finished(folder: Path) -> bool:
    """Whether a run folder has its `metrics.json`."""
    return (folder / "metrics.json").exists()


def read_failure(folder: Path) -> Failure | None:
    """The content of a run folder's `failure.json`, None without a readable one."""
    try:
        saved = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
        return Failure(saved["class"], str(saved["message"]), saved["attempt"]) if saved["class"] in CLASSES else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def failed_at(folder: Path) -> int:
    """When `failure.json` of a run folder was written, 0 without one; it separates a new failure from an old one."""
    with contextlib.suppress(OSError):
        return (folder / FAILURE).stat().st_mtime_ns
    return 0


def settle(folder: Path, failure: Failure | None, whole: bool = True) -> None:
    """Name the executed notebook by the outcome of the run, and write or remove `failure.json`.

    whole: whether the notebook was executed to its end. A folder that cannot be written keeps what it has.
    """
    with contextlib.suppress(OSError):
        if (folder / RUNNING).exists():
            os.replace(folder / RUNNING, folder / (FAILED if failure or not whole else NOTEBOOK))
        if failure is None:
            (folder / FAILURE).unlink(missing_ok=True)
            if whole:
                (folder / FAILED).unlink(missing_ok=True)
        elif folder.exists():
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            saved = {"class": failure.kind, "message": failure.message, "attempt": failure.attempt, "when": when}
            part = folder / f".{FAILURE}.part"
            part.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
            os.replace(part, folder / FAILURE)


# Failure classes

BAD_INPUT = ("SettingError", "DataError", "WeightsError", "CorruptFile", "RunBusy", "NonFiniteLoss")
DISK = re.compile(r"(?:Errno|os error) (?:13|27|28|30|122)\b")  # no permission, too large, full, read-only, quota
MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|CUDA out of memory|\[Errno 12\]")
KERNEL = re.compile(r"Kernel (?:died|didn't respond)")


def classify(error: BaseException | None, stopped: str | None, oom: bool) -> Failure:
    """The failure of a run without metrics.

    error: raised by papermill or by the preparation. stopped: the class for which `Watch` stopped it.
    oom: whether the system killed a process for its memory meanwhile. Otherwise it looks like a broken kernel.
    """
    name, message = ("", NO_METRICS) if error is None else _described(error)
    if stopped:
        return Failure(stopped, f"{STOPS[stopped]}; run it again to continue from its checkpoint, if it has one")
    if name in ("Interrupted", "KeyboardInterrupt"):
        return Failure("preempted", message)
    if name.endswith(("MemoryError", "OutOfMemoryError")) or MEMORY.search(message):
        return Failure("out of memory", message)
    if name == "DeadKernelError" or KERNEL.search(message):
        how = ("out of memory", "the system killed the kernel for its memory") if oom else ("dead kernel", message)
        return Failure(*how)
    if name in BAD_INPUT or DISK.search(message):
        return Failure("bad input", message)
    return Failure("bug", "\n".join((*_lines(error), message)))


NO_METRICS = "the notebook ended, but left no metrics.json of this run; was its recipe edited while the batch ran?"
STOPS = {"preempted": "told to stop (SIGTERM or Ctrl-C, or its batch ended)", "time limit": "stopped at its time limit"}


def _described(error: BaseException) -> tuple[str, str]:
    """The name of an exception and `name: message`; of the exception that a cell raised, if there is one."""
    name = getattr(error, "ename", None) or type(error).__name__
    return name, f"{name}: {getattr(error, 'evalue', None) or error}"


def _lines(error: BaseException | None) -> list[str]:
    """The end of a cell's traceback without colours and without its last line."""
    raw = "\n".join(getattr(error, "traceback", None) or ())
    lines = re.sub(r"\x1b\[[0-9;]*m", "", raw).splitlines()
    return [line for line in lines if line.strip()][-TAIL:-1]


def oom_kills() -> int:
    """How many processes the kernel has killed for their memory: in this control group, else on this machine."""
    for line in _read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        base = f"/sys/fs/cgroup{'/memory' if number != '0' else ''}{path.rstrip('/')}"
        if number == "0" or "memory" in controllers.split(","):
            for file in ("memory.events", "memory.oom_control"):
                if found := re.search(r"^oom_kill (\d+)", _read(f"{base}/{file}"), re.MULTILINE):
                    return int(found[1])
    found = re.search(r"^oom_kill (\d+)", _read("/proc/vmstat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


# Stopping


class Watch:
    """Stops a run in good order on SIGTERM, on Ctrl-C and at its time limit.

    The kernel is interrupted, so that training saves its checkpoint, and killed after `GRACE` seconds. `reason` is
    then the failure class.
    """

    def __init__(self, time_limit: float | None = None) -> None:
        self.reason: str | None = None
        self.kernel: int | None = None
        self.deadline = math.inf
        self.limit = time.monotonic() + time_limit if time_limit else math.inf
        self.closed = threading.Event()
        self.former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self.former:
            signal.signal(number, lambda *_: self.stop("preempted"))
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self, reason: str) -> None:
        """Interrupt the kernel; without one, raise Stopped."""
        if self.reason is None:
            self.reason, self.deadline = reason, time.monotonic() + GRACE
        if self.kernel is None:
            raise Stopped(self.reason)
        _signal(self.kernel, signal.SIGINT)

    def _look(self) -> None:
        """Notice the time limit; interrupt again, since a kernel between two cells ignores it; kill in the end."""
        again = 0.0
        while not self.closed.wait(0.1):
            now = time.monotonic()
            if self.reason is None and now > self.limit:
                self.reason, self.deadline = "time limit", now + GRACE
                _signal(os.getpid(), signal.SIGTERM)  # the main thread may have to raise
            elif self.kernel is not None and now > self.deadline:
                _signal(self.kernel, getattr(signal, "SIGKILL", signal.SIGTERM))
            elif self.kernel is not None and self.reason and now > again:
                again = now + 3
                _signal(self.kernel, signal.SIGINT)

    def close(self) -> None:
        """Give the signals back."""
        self.closed.set()
        for number, handler in self.former.items():
            signal.signal(number, handler)


def end_with(parent: int, pid: int, number: int) -> None:
    """Send a signal to `pid` (0: this process's group) as soon as `parent` is no longer this process's parent."""

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(0.3)
        os.kill(pid, number)

    threading.Thread(target=poll, daemon=True).start()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


# Execution


def _papermill(notebook: Path, folder: Path, parameters: dict, watch: Watch) -> None:
    """Execute a notebook into `running.ipynb`."""
    sys.modules.setdefault("rfc3987_syntax", None)  # checks a format that no notebook has, and takes a second to import
    import papermill
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines

    class Client(PapermillNotebookClient):
        """A client that gives its kernel's process to `watch`, and starts no cell after a stop."""

        def create_kernel_manager(self):
            manager = super().create_kernel_manager()
            if os.name == "posix":
                manager.transport = "ipc"  # kernels that start at once may draw the same TCP ports
            manager.connection_file = str(sockets / "kernel.json")
            return manager

        def start_new_kernel(self, **how) -> None:
            super().start_new_kernel(**how)
            watch.kernel = self.km.provisioner.pid

        def execute_cell(self, *cell, **how):
            if watch.reason:
                raise Stopped(watch.reason)
            return super().execute_cell(*cell, **how)

    class Watched(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **_) -> None:
            Client(nb_man, kernel_name=kernel_name, startup_timeout=120, iopub_timeout=60).execute()

    papermill_engines.register("watched", Watched)
    os.environ["REPRO_PROGRESS"] = "0"
    with tempfile.TemporaryDirectory(prefix="repro-") as short:  # a socket's path is 107 characters at most
        sockets = Path(short)
        papermill.execute_notebook(
            str(notebook), str(folder / RUNNING), parameters=parameters, engine_name="watched", progress_bar=False
        )


def _wait_until_free(folder: Path, seconds: float = 15.0) -> None:
    """Wait until no other process has the run's lock: a kernel that outlived its batch ends after a second."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout), FileLock(folder / ".lock", timeout=seconds, poll_interval=0.2):
            pass  # after a time-out the notebook itself raises RunBusy
    except OSError as error:
        raise OSError(f"cannot write in {folder} ({error}); name another folder: --runs, or REPRO_RUNS") from error


@contextlib.contextmanager
def one_gpu(devices: Sequence[str], folder: Path | None = None) -> Iterator[str | None]:
    """Hold one of the CUDA devices against this user's other runs on this machine, as soon as one is free.

    devices: as `CUDA_VISIBLE_DEVICES` names them; none yields None at once. folder: of the lock files. The lock dies
    with its process.
    """
    if not devices:
        yield None
        return
    user = getattr(os, "getuid", lambda: "user")()
    folder = Path(folder or Path(tempfile.gettempdir()) / f"repro-gpus-{user}")
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for name in devices:
            with contextlib.suppress(Timeout), FileLock(folder / f"{name}.lock", timeout=0):
                yield name
                return
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
