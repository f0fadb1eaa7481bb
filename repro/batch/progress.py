"""Progress of long work: one bar with rate and time left on a terminal or in Jupyter, quiet where nobody watches."""

import os
import sys

from tqdm.auto import tqdm


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
