"""Progress of long work: one bar with rate and time left on a terminal or in Jupyter, quiet where nobody watches."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from repro.experiment import Experiment
from repro.files import HISTORY
from repro.grid import column_of

BAR = "{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left"
TAIL_BYTES = 20_000  # of a history: more than its longest row


def is_watched() -> bool:
    """Whether a bar makes sense: a terminal, or a notebook open in a browser; not under papermill, in a pipe or in CI.

    REPRO_PROGRESS=0 or 1 decides regardless. A kernel that papermill or nbconvert started lacks the session name that
    Jupyter's server, VS Code and Colab give to theirs.
    """
    chosen = os.environ.get("REPRO_PROGRESS")
    if chosen in ("0", "1"):
        return chosen == "1"
    if os.environ.get("CI"):
        return False
    if "ipykernel" in sys.modules:
        return any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"))
    return sys.stderr.isatty()


class StepBar:
    """An `on_step` callback that shows steps, samples per second and the running loss terms of one run."""

    def __init__(self, title: str) -> None:
        self.bar = tqdm(total=0, desc=title, unit="step", disable=not is_watched(), leave=False)

    def __call__(self, done: int, total: int, row: dict) -> None:
        self.bar.total = total
        terms = {name: f"{value:.3f}" for name, value in row["terms"].items()}
        self.bar.set_postfix(terms | {"images/s": f"{row['samples_per_second']:.0f}"}, refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()


class BatchBar:
    """A bar over the runs of a batch, in expected seconds of training; it moves while runs train."""

    def __init__(self, jobs: Sequence[tuple[Experiment, Path, float]]) -> None:
        """jobs: experiment, run folder and expected seconds of each run."""
        self.seconds = {folder: seconds for _, folder, seconds in jobs}
        self.steps = {folder: _steps(experiment) for experiment, folder, _ in jobs}
        self.share = dict.fromkeys(self.seconds, 0.0)
        total = round(sum(self.seconds.values()))
        self.bar = tqdm(total=total, unit="s", disable=not is_watched(), bar_format=BAR, smoothing=0)

    def __enter__(self) -> "BatchBar":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def look(self) -> None:
        """Move the bar by what the histories of the running runs hold; reads nothing where nobody watches."""
        if self.bar.disable:
            return
        for folder, share in self.share.items():
            if share < 1:
                self.share[folder] = max(share, min(0.99, steps_done(folder) / self.steps[folder]))
        self._move()

    def ended(self, folder: Path) -> None:
        """Count a run as done, whatever became of it."""
        self.share[folder] = 1.0
        self._move()

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _move(self) -> None:
        self.bar.update(sum(share * self.seconds[folder] for folder, share in self.share.items()) - self.bar.n)


def _steps(experiment: Experiment) -> int:
    return experiment.recipe.steps + getattr(experiment.recipe, "start_steps", 0)


def steps_done(folder: Path) -> int:
    """The step of the last whole row in a run's history, 0 without one."""
    with contextlib.suppress(OSError), (folder / HISTORY).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in reversed(file.read().decode("utf-8", "replace").split("\n")[:-1]):
            with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                return json.loads(line)["step"]
    return 0


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
