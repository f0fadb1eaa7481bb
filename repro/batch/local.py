"""Many runs: one process each, a bar over all of them, and an estimate of the time before they start.

A run is the same command that a person would type (`python -m repro run ...`); finished ones are skipped, half-trained
ones continue, and one that fails does not stop the others.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from repro import runs
from repro.batch.progress import is_watched
from repro.experiment import Experiment, record
from repro.grid import PAPERS, column_of
from repro.measure.metrics import sentence
from repro.settings import SettingError

UNKNOWN_SECONDS, TINY_SECONDS = 120.0, 5.0  # guesses for a method that was never run, for the estimate of time only
COMMITTED = Path(__file__).resolve().parents[2] / "figures" / "rendered" / "runs.csv"


@dataclass
class Outcome:
    """What became of a batch: finished and failed experiments, the latter with the end of what they printed."""

    finished: list[Experiment] = field(default_factory=list)
    skipped: list[Experiment] = field(default_factory=list)
    failed: list[tuple[Experiment, str]] = field(default_factory=list)


def run_all(
    experiments: Sequence[Experiment], root: Path | None = None, workers: int = 0, device: str = "auto"
) -> Outcome:
    """Execute every experiment that is not finished, `workers` at a time (0: one a CPU core, or one with CUDA).

    Prints a line as each run ends. Raises KeyboardInterrupt after telling the runs to save and stop.
    """
    if workers < 0:
        raise SettingError(f"workers is {workers}; it must be 0 (one a CPU core, or one with CUDA) or more")
    root = Path(root or runs.runs_folder())
    outcome = Outcome()
    waiting: deque[Experiment] = deque()
    # Different overrides may resolve to one recipe (a default spelt out), hence to one folder.
    for experiment in {runs.folder_of(experiment, root): experiment for experiment in experiments}.values():
        (outcome.skipped if runs.is_finished(experiment, root) else waiting).append(experiment)
    workers = workers or default_workers(device)
    expected = expected_seconds(waiting, root)
    total = sum(expected.values())
    waiting = ordered(waiting, expected)
    if waiting:
        print(
            f"{len(waiting)} runs to do, {len(outcome.skipped)} finished before; {workers} at a time; "
            f"estimate {clock(total / min(workers, len(waiting)))} (from earlier runs where there are any)",
            flush=True,
        )
    running: dict[Experiment, _Worker] = {}
    lines: queue.Queue = queue.Queue()
    done = dict.fromkeys(waiting, 0.0)
    bar = tqdm(total=round(total), unit="s", disable=not is_watched(), bar_format=BAR, smoothing=0)
    started = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                experiment = waiting.popleft()
                running[experiment] = _Worker(experiment, root, device, workers, lines)
            experiment, line = lines.get()
            if line is None:
                ended = running.pop(experiment)
                done[experiment] = 1.0
                _settle(experiment, ended, root, outcome, bar, started)
            else:
                done[experiment] = line["done"] / line["total"]
            bar.update(sum(done[e] * expected[e] for e in done) - bar.n)
    except BaseException:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.process.wait()
        raise
    finally:
        bar.close()
    return outcome


def ordered(waiting: Iterable[Experiment], expected: Mapping[Experiment, float]) -> deque[Experiment]:
    """The quickest experiment, so that a first result comes soon, then the longest first, so that none is left alone.

    expected: seconds. Equally long ones keep their order.
    """
    longest = sorted(waiting, key=lambda experiment: -expected[experiment])
    quickest = min(longest, key=lambda experiment: expected[experiment], default=None)
    return deque([quickest, *(item for item in longest if item is not quickest)] if longest else [])


BAR = "{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"


def _settle(experiment, worker, root, outcome, bar, started) -> None:
    if worker.process.returncode == 0 and runs.is_finished(experiment, root):
        outcome.finished.append(experiment)
        metrics = runs.load_metrics(runs.folder_of(experiment, root))
        final = metrics["reported"]["last"]["ema"]
        bar.write(
            f"[{clock(time.monotonic() - started)}] {title(experiment)}: "
            f"{sentence(final, PAPERS[experiment.paper].HEADLINES)}, {metrics['cost']['train_seconds']:.0f} s",
            file=sys.stdout,
        )
    else:
        outcome.failed.append((experiment, worker.tail()))
        bar.write(
            f"[{clock(time.monotonic() - started)}] {title(experiment)}: FAILED\n{worker.tail()}", file=sys.stdout
        )
    sys.stdout.flush()


class _Worker:
    """One `python -m repro run` process; its progress lines go to the queue, then (experiment, None) when it ended."""

    def __init__(self, experiment: Experiment, root: Path, device: str, workers: int, lines: queue.Queue) -> None:
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, runs.cores() // workers)))
        command = [
            sys.executable,
            "-m",
            "repro",
            "run",
            "--record",
            json.dumps(record(experiment)["experiment"]),
            "--runs",
            str(root),
            "--device",
            device,
            "--progress-lines",
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self.printed: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._read, args=(experiment, lines), daemon=True).start()

    def _read(self, experiment: Experiment, lines: queue.Queue) -> None:
        for line in self.process.stdout:
            if line.startswith('{"done"') and line.endswith("}\n"):  # a killed run may leave half a line
                lines.put((experiment, json.loads(line)))
            else:
                self.printed.append(line)
        self.process.wait()
        lines.put((experiment, None))

    def tail(self) -> str:
        """The end of what the process printed."""
        return "".join(self.printed).rstrip() or f"it printed nothing (exit status {self.process.returncode})"


def default_workers(device: str = "auto") -> int:
    """One run a CPU core, since a `mini` run uses one thread; one run at a time on a CUDA device."""
    return 1 if runs.choose_device(device).type == "cuda" else runs.cores()


def expected_seconds(experiments: Sequence[Experiment], root: Path) -> dict[Experiment, float]:
    """Seconds of each whole run, by `plan.Rates`; where it knows nothing (scale `paper`), UNKNOWN_SECONDS."""
    from repro.batch import plan  # which imports this module

    rates = plan.Rates(plan.records(root, {experiment.scale for experiment in experiments}).values())
    known = {experiment: rates.seconds(experiment)[0] for experiment in experiments}
    return {experiment: UNKNOWN_SECONDS if seconds is None else seconds for experiment, seconds in known.items()}


def title(experiment: Experiment) -> str:
    """A short name of an experiment for people."""
    changed = "".join(f", {name}={value}" for name, value in experiment.overrides)
    budget = column_of(experiment).budget
    return f"{experiment.method} on {experiment.data}, {budget}, seed {experiment.seed}{changed}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
