"""Batches through Snakemake on this machine: the same results as without it, and what a kill leaves behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from repro import runs
from repro.batch import once
from repro.batch.execute import execute
from repro.batch.plan import plan
from tests import small_notebooks
from tests.small_notebooks import TINY


@pytest.mark.timeout(300)
def test_both_engines_give_the_same_runs(tmp_path):
    """Real training; one of three runs diverges, one kernel is killed at the first attempt."""
    killed_once = (
        "import os, pathlib\nmarker = pathlib.Path(runs_root, 'killed')\n"
        "if seed == 1 and not marker.exists():\n    marker.touch()\n    os.kill(os.getpid(), 9)"
    )
    notebook = small_notebooks.training(tmp_path / "notebooks", before=(killed_once,))
    killed, diverging = TINY.with_(seed=1), TINY.with_(lr=1e30, steps=30)
    found = {}
    for engine in ("snakemake", "local"):
        root = tmp_path / "a folder" / engine
        planned = plan(dict.fromkeys((TINY, killed, diverging), ("test",)), root)
        summary = execute(planned, root, engine=engine, workers=2, device="cpu", notebook=notebook)
        assert set(summary.finished) == {TINY, killed}
        assert [(experiment, kind) for experiment, kind, _ in summary.failed] == [(diverging, "bad input")]
        assert not (runs.folder_of(diverging, root) / "notebook.ipynb").exists()
        folders = [runs.folder_of(experiment, root) for experiment in (TINY, killed)]
        assert all({path.name for path in folder.iterdir()} == {
            ".lock", "experiment.json", "history.jsonl", "metrics.json", "notebook.ipynb", "outputs.safetensors",
            "weights.safetensors"} for folder in folders)  # fmt: skip
        found[engine] = [(runs.load_metrics(folder)["reported"], small_notebooks.weights_of(folder))
                         for folder in folders]  # fmt: skip
        stamps = [(folder / "metrics.json").stat().st_mtime_ns for folder in folders]
        again = execute(plan({TINY: ()}, root), root, engine=engine, device="cpu", notebook=notebook)
        assert again.skipped == [TINY] and [(f / "metrics.json").stat().st_mtime_ns for f in folders] == stamps
    assert found["snakemake"] == found["local"]


BATCH = """
import sys
from pathlib import Path
from repro.batch.plan import plan
from repro.batch.execute import execute
from tests.small_notebooks import TINY
root, notebook = map(Path, sys.argv[1:])
experiments = dict.fromkeys((TINY, TINY.with_(seed=1, steps=5000, eval_every=5000, checkpoint_every=10)), ())
execute(plan(experiments, root), root, engine="snakemake", workers=2, device="cpu", notebook=notebook)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_batch_takes_its_jobs_along_and_goes_on_where_it_was(tmp_path, number):
    """Only the batch itself is told: Snakemake, the runs and their kernels end with it; nothing finished is lost."""
    notebook, root = small_notebooks.training(tmp_path / "notebooks"), tmp_path / "runs"
    first, second = TINY, TINY.with_(seed=1, steps=5000, eval_every=5000, checkpoint_every=10)
    folders = [runs.folder_of(experiment, root) for experiment in (first, second)]
    command = [sys.executable, "-c", BATCH, str(root), str(notebook)]
    batch = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()})
    while not (once.is_finished(folders[0]) and (folders[1] / "checkpoint.safetensors").exists()):
        assert batch.poll() is None
        time.sleep(0.05)
    stamp = (folders[0] / "metrics.json").stat().st_mtime_ns
    family = psutil.Process(batch.pid).children(recursive=True)
    assert len(family) >= 3  # Snakemake, the run, its kernel
    batch.send_signal(number)
    assert batch.wait() == -number if number == signal.SIGKILL else batch.wait() != 0
    assert not psutil.wait_procs(family, timeout=60)[1], "a process outlived the batch"
    assert once.is_finished(folders[0]) and not once.is_finished(folders[1])
    assert once.read_failure(folders[1]).kind == "preempted"
    again = execute(plan({first: ()}, root), root, engine="snakemake", device="cpu", notebook=notebook)
    assert again.skipped == [first] and (folders[0] / "metrics.json").stat().st_mtime_ns == stamp
