"""One run: one execution of an experiment in a folder of its own, and the record of how it came about.

A run folder holds `experiment.json` (what was asked), `history.jsonl`, `checkpoint.safetensors` and of segmentation
`moments/` (arrays for figures, at ten evaluations at most) while training, then `weights.safetensors` (EMA network),
`outputs.safetensors` (arrays for figures) and, last of all, `metrics.json`. A run is finished exactly when
`metrics.json` exists.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from repro.experiment import Experiment, record, resolve, run_id
from repro.files import CorruptFile, History, atomic_path, load_state, read_json, save_state, write_json
from repro.papers import SPECS
from repro.recipe import Recipe
from repro.settings import SettingError
from repro.tasks import monitors
from repro.train import CHECKPOINT, MOMENTS, Interrupted, seed_everything, train

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ("torch", "numpy", "pandas", "datasets", "pyarrow", "scipy", "pillow", "safetensors")


class RunBusy(RuntimeError):
    """Another process is executing this run."""


def runs_folder() -> Path:
    """Where runs live: the environment variable REPRO_RUNS, else `runs` beside the package's checkout."""
    return Path(os.environ.get("REPRO_RUNS") or Path(__file__).resolve().parents[1] / "runs")


def folder_of(experiment: Experiment, root: Path | None = None) -> Path:
    """The run folder of an experiment, whether or not it exists."""
    return Path(root or runs_folder()) / run_id(experiment)


def is_finished(experiment: Experiment, root: Path | None = None) -> bool:
    """Whether the experiment's run has its `metrics.json`."""
    return (folder_of(experiment, root) / "metrics.json").exists()


def execute(
    experiment: Experiment,
    root: Path | None = None,
    *,
    data_root: Path | None = None,
    device: str = "auto",
    on_step: Callable[[int, int, dict], None] | None = None,
) -> dict:
    """Run an experiment unless it is finished, continuing a half-trained one; return its metrics.

    root: folder of runs. data_root: folder of local data sets. device: `auto`, `cpu`, `cuda`, `cuda:1`...
    on_step: called as (steps done, steps in all, last row) while training.
    Raises DataError, SettingError, WeightsError (bad input, before work starts), RunBusy, NonFiniteLoss, Interrupted,
    CorruptFile.
    """
    folder = folder_of(experiment, root)
    if (folder / "metrics.json").exists():
        return load_metrics(folder)
    chosen = choose_device(device)
    with _lock(folder):
        if (folder / "metrics.json").exists():
            return load_metrics(folder)
        for part in folder.rglob(".*.part"):  # left by a kill in the middle of a write
            part.unlink()
        return _execute(experiment, folder, data_root, chosen, on_step)


def _execute(experiment, folder, data_root, device, on_step) -> dict:
    recipe = resolve(experiment)
    with _threads(recipe.threads):
        seed_everything(experiment.seed)
        task = SPECS[experiment.paper].supervision.task.prepare(experiment, recipe, device, data_root)
        saved = record(experiment) | {"data_digest": task.data_digest}
        _claim(folder, saved)
        started, origin = time.monotonic(), provenance(device, recipe) | {"weights": task.weights}
        network, history = train(
            task.method, task.pool, recipe, folder, seed=experiment.seed, evaluate=task.evaluate, monitor=task.monitor,
            generators=task.generators, moments=task.moments, on_step=on_step,
        )  # fmt: skip
        outputs = task.outputs(network)
        save_state(folder / "outputs.safetensors", outputs)
        with atomic_path(folder / "weights.safetensors") as part:
            state = {key: value.contiguous().cpu() for key, value in network.state_dict().items()}
            save_file(state, part, metadata={"run": folder.name})
        reported = summary(history, SPECS[experiment.paper].headlines[0])
        reported["last"]["ema"] = reported["last"]["ema"] | task.after(outputs)
        metrics = saved | {
            "run": folder.name,
            "reported": reported,
            "pseudo_labels": history.of("train")[-1]["pseudo"],
            "cost": cost(history, recipe, device, time.monotonic() - started),
            "provenance": origin | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        }
        write_json(folder / "metrics.json", _finite(metrics))
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return load_metrics(folder)


def load_metrics(folder: Path) -> dict:
    """A finished run's metrics; raises CorruptFile when the file was cut short or edited into something else."""
    path = Path(folder) / "metrics.json"
    metrics = read_json(path)
    if not isinstance(metrics, dict) or metrics.get("run") != path.parent.name:
        raise CorruptFile(f"{path} does not belong to its folder; delete the folder to run it again")
    return metrics


def load_history(folder: Path) -> History:
    """The history of a run."""
    return History(folder)


def load_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """The arrays a finished run keeps for figures and explorers."""
    return load_state(Path(folder) / "outputs.safetensors")


def load_moments(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Step -> the arrays that a run kept at that evaluation, in rising order; {} where its task keeps none.

    Raises CorruptFile.
    """
    found = {int(path.stem): path for path in (Path(folder) / MOMENTS).glob("*.safetensors")}
    return {step: load_state(found[step]) for step in sorted(found)}


def summary(history: History, metric: str) -> dict:
    """Metrics by reporting rule (last, median20, best by `metric`) and weights (ema, live)."""
    rows = history.of("evaluation")
    return {
        rule: {weights: monitors.report(rows, rule, weights, metric) for weights in ("ema", "live")}
        for rule in monitors.REPORTING
    }


def cost(history: History, recipe: Recipe, device: torch.device, wall: float) -> dict:
    """Training seconds (all sessions of a resumed run), wall seconds of this session, samples per second, memory."""
    rows = history.of("train")
    seconds = sum(row["seconds"] for row in rows)
    samples = sum(row["seconds"] * row["samples_per_second"] for row in rows)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    elif resource is not None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        memory = math.nan
    return {
        "train_seconds": seconds,
        "wall_seconds": wall,
        "samples_per_second": samples / max(seconds, 1e-9),
        "peak_memory_mib": memory / 2**20,
    }


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device or the CPU. Raises SettingError when a named one is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA device(s); use 'cpu' or 'auto'"
        )
    return device


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance(device: torch.device, recipe: Recipe) -> dict:
    """What a reader needs to know to repeat the run: code, packages, machine, precision, threads."""
    changed = _git("status", "--porcelain", "--", ".")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else changed != "",
        "source_digest": source_digest(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": recipe.precision,
        "threads": torch.get_num_threads(),
        "cores": cores(),
    }


@functools.cache
def source_digest() -> str:
    """Digest of the code that decides a result: everything but batches, the command line and figures."""
    digest, folder = hashlib.blake2b(digest_size=8), Path(__file__).parent
    kinds = (".py", ".toml")
    for path in sorted(path for path in folder.rglob("*") if path.suffix in kinds):
        if path.relative_to(folder).parts[0] not in ("batch", "__main__.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _claim(folder: Path, saved: dict) -> None:
    """Write `experiment.json`, or raise when the folder holds a half-trained run of something else.

    Papers, and overrides that spell out a default, share a run: of the experiment, only what `run_id` reads counts.
    """
    path = folder / "experiment.json"
    saved = json.loads(json.dumps(saved))
    if not path.exists():
        write_json(path, saved)
        return
    former = read_json(path)
    if not isinstance(former, dict) or not isinstance(former.get("experiment"), dict):
        raise CorruptFile(f"{path} is not the record of a run; delete the folder to start it again")
    decides = {"method", "data", "labels", "seed", "scale"}
    different = [key for key in ("recipe", "data_digest") if former.get(key) != saved[key]]
    different += sorted(key for key in decides if former["experiment"].get(key) != saved["experiment"][key])
    if different:
        raise CorruptFile(
            f"{path} was edited, or the data changed, since this run began: {', '.join(different)} differ; delete the "
            f"folder to start it again"
        )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the run folder against other processes; the lock dies with the process that holds it."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise RunBusy(f"{folder} is being run by another process; wait for it or stop it") from error
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise OSError(f"cannot write in {folder} ({error}); name another folder: --runs, or REPRO_RUNS") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    former = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["Interrupted", "RunBusy", "execute", "folder_of", "is_finished", "load_history", "load_metrics",
           "load_moments", "load_outputs", "runs_folder"]  # fmt: skip
