"""What a batch survives: being killed again and again, a full or read-only disk, a second batch, files edited by hand.

Runs are real (papermill, kernels, training at scale tiny); their notebook holds nothing but the run.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from repro import runs
from repro.batch import once
from repro.batch.execute import alone, execute
from repro.batch.plan import plan
from repro.files import read_json
from tests import small_notebooks
from tests.small_notebooks import TINY

pytestmark = pytest.mark.timeout(400)  # seconds on a core of its own, many times that on a busy machine
KILLS = 12
LONG = TINY.with_(steps=120, eval_every=120, checkpoint_every=10, log_every=10)
EXPERIMENTS = [LONG, LONG.with_(seed=1), LONG.with_(method="pseudo_label")]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    return small_notebooks.training(tmp_path_factory.mktemp("notebooks"), "1 + 1")


def planned(experiments, root):
    return plan(dict.fromkeys(experiments, ("test",)), root)


def batch_process(experiments, root, notebook) -> int:
    """A batch in a process of its own, forked: what a fresh one would import is there already. Returns its pid."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1), os.dup2(silent, 2)
            status = execute(planned(experiments, root), root, engine="local", workers=1, device="cpu",
                           notebook=notebook).exit_status  # fmt: skip
        finally:
            os._exit(status)
    return pid


def kill_all(pid: int) -> None:
    """SIGKILL for a batch, its runs and their kernels."""
    with contextlib.suppress(psutil.NoSuchProcess):
        batch = psutil.Process(pid)
        batch.suspend()
        for process in [*batch.children(recursive=True), batch]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    os.waitpid(pid, 0)


def progress(folders) -> tuple[int, int]:
    """Lines of the runs' histories and finished runs."""
    histories = [folder / "history.jsonl" for folder in folders]
    lines = sum(path.read_bytes().count(b"\n") for path in histories if path.exists())
    return lines, sum(map(once.is_finished, folders))


def is_over(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.timeout(900)  # a minute on a core of its own
def test_a_batch_killed_at_random_moments_ends_like_an_undisturbed_one_and_repeats_nothing(notebook, tmp_path):
    """Two kills of five fall anywhere from the start of the batch on, the others after some steps, or a run's end.

    When all runs are finished, their folders are removed and the batch begins anew, until the kills are enough.
    """
    root, draw = tmp_path / "killed", random.Random(7)
    folders = [runs.folder_of(experiment, root) for experiment in EXPERIMENTS]
    finished: dict[Path, tuple] = {}
    training = skipped = kills = 0
    while kills < KILLS:
        anywhere = kills % 5 < 2
        rows, delay = (0, draw.uniform(0.3, 3)) if anywhere else (draw.randint(1, 10), draw.uniform(0, 0.3))
        before, since = progress(folders), None
        pid = batch_process(EXPERIMENTS, root, notebook)
        while not is_over(pid):
            now = progress(folders)
            if since is None and (now[0] >= before[0] + rows or now[1] > before[1]):
                since = time.monotonic()
            if since is not None and time.monotonic() - since >= delay:
                break
            time.sleep(0.01)
        kills += not is_over(pid)
        kill_all(pid)
        training += progress(folders) != before
        skipped += len(finished)
        for folder in filter(once.is_finished, folders):
            stamp = finishing_time(folder)
            assert finished.setdefault(folder, stamp) == stamp, "a finished run was repeated"
        if len(finished) == len(folders):
            for folder in folders:
                compare(folder, tmp_path)
                shutil.rmtree(folder)
            finished.clear()
    assert training >= KILLS // 2 and skipped >= KILLS // 4, "too few kills fell where they show anything"
    summary = batch(EXPERIMENTS, root, notebook)
    assert len(summary.skipped) == len(finished) and len(summary.finished) == len(folders) - len(finished)
    for folder in folders:
        compare(folder, tmp_path)
        assert finishing_time(folder) == finished.get(folder, finishing_time(folder))
        assert not any(folder.glob(".*.part")) and not (folder / once.RUNNING).exists()


def finishing_time(folder: Path) -> int:
    return (folder / "metrics.json").stat().st_mtime_ns


def compare(folder: Path, tmp_path: Path) -> None:
    """A finished run's numbers and weights are those of the same run, undisturbed."""
    experiment = next(item for item in EXPERIMENTS if runs.folder_of(item).name == folder.name)
    undisturbed = runs.folder_of(experiment, tmp_path / "undisturbed")
    expected = runs.execute(experiment, undisturbed.parent, device="cpu")
    assert runs.load_metrics(folder)["reported"] == expected["reported"]
    assert small_notebooks.weights_of(folder) == small_notebooks.weights_of(undisturbed)
    evaluations = [runs.load_history(one).of("evaluation") for one in (folder, undisturbed)]
    assert evaluations[0] == evaluations[1]


def batch(experiments, root, notebook, **how):
    how = {"engine": "local", "workers": 1, "device": "cpu", "retries": 0} | how
    return execute(planned(experiments, root), root, notebook=notebook, **how)


def test_a_killed_kernel_is_a_failed_run_and_the_next_batch_continues_it(tmp_path):
    kill_once = (
        "import os, pathlib, threading, time\n"
        "marker, history = pathlib.Path(runs_root, 'killed'), 'history.jsonl'\n"
        "def kill():\n"
        "    while not any(path.stat().st_size for path in pathlib.Path(runs_root).glob('*/checkpoint.safetensors')):\n"
        "        time.sleep(0.01)\n"
        "    marker.touch()\n"
        "    os.kill(os.getpid(), 9)\n"
        "marker.exists() or threading.Thread(target=kill, daemon=True).start()"
    )
    notebook = small_notebooks.training(tmp_path / "notebooks", before=(kill_once,))
    root, folder = tmp_path / "killed", runs.folder_of(LONG, tmp_path / "killed")
    ((experiment, kind, _),) = batch([LONG], root, notebook).failed
    assert (experiment, kind) == (LONG, "dead kernel") and (folder / "failed.ipynb").exists()
    assert read_json(folder / "failure.json")["class"] == "dead kernel"
    (again,) = planned([LONG], root)
    assert again.state == "failed" and "dead kernel" in again.reason
    assert batch([LONG], root, notebook).finished == [LONG]
    compare(folder, tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_is_named_and_what_was_finished_stays(small_disk, notebook, tmp_path):
    root = small_disk / "runs"
    first, second = TINY, TINY.with_(seed=1)
    assert batch([first], root, notebook).finished == [first]
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 64 * 1024))
    before = (runs.folder_of(first, root) / "metrics.json").read_bytes()
    summary = batch([first, second], root, notebook)
    ((experiment, kind, said),) = summary.failed
    assert (experiment, kind, summary.skipped) == (second, "bad input", [first])
    assert "No space left on device" in said and str(root) in said
    assert (runs.folder_of(first, root) / "metrics.json").read_bytes() == before
    (small_disk / "filler").unlink()
    assert batch([first, second], root, notebook).finished == [second]
    assert not (runs.folder_of(second, root) / "failure.json").exists()


def test_a_folder_that_cannot_be_written_is_refused_at_once(small_disk, notebook):
    root = small_disk / "runs"
    root.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match=f"cannot write in {root} .*Read-only file system.*; .* name another folder"):
        batch([TINY], root, notebook)
    assert not list(root.iterdir())


def test_a_second_batch_on_the_same_folder_is_refused_and_disturbs_nothing(notebook, tmp_path):
    root, slow = tmp_path / "runs", LONG.with_(steps=20_000, eval_every=20_000)
    pid = batch_process([slow], root, notebook)
    history = runs.folder_of(slow, root) / "history.jsonl"
    while not (history.exists() and history.stat().st_size):
        assert not is_over(pid)
        time.sleep(0.02)
    with pytest.raises(runs.RunBusy, match=f"{root} is being rerun by process {pid} on .*; wait for it, stop it"):
        batch([slow], root, notebook)
    size = history.stat().st_size
    while history.stat().st_size == size:
        assert not is_over(pid)
        time.sleep(0.02)
    kill_all(pid)
    with alone(root):
        pass  # the lock is gone with its process


def test_run_folders_edited_by_hand_are_named_and_left_as_they_are(notebook, tmp_path, capsys):
    root = tmp_path / "runs"
    cut, other, foreign, fine = (TINY.with_(seed=seed) for seed in range(4))
    for experiment in (cut, other, fine):
        runs.execute(experiment, root, device="cpu")
    folders = {experiment: runs.folder_of(experiment, root) for experiment in (cut, other, foreign, fine)}
    (folders[cut] / "metrics.json").write_text((folders[cut] / "metrics.json").read_text()[:500])
    edited = read_json(folders[other] / "metrics.json")
    edited["recipe"]["lr"] = 0.5
    (folders[other] / "metrics.json").write_text(json.dumps(edited))
    folders[foreign].mkdir()
    changed = read_json(folders[fine] / "experiment.json")
    changed["recipe"]["steps"] = 5
    (folders[foreign] / "experiment.json").write_text(json.dumps(changed))
    kept = {path: path.read_bytes() for folder in folders.values() for path in folder.glob("*.json")}

    summary = batch(list(folders), root, notebook, retries=2)
    said = {experiment: (kind, text) for experiment, kind, text in summary.failed}
    assert {kind for kind, _ in said.values()} == {"bad input"} and summary.skipped == [fine]
    assert f"{folders[cut] / 'metrics.json'} is not valid JSON" in said[cut][1]
    assert f"{folders[other] / 'metrics.json'} was edited" in said[other][1]
    assert f"{folders[foreign] / 'experiment.json'} was edited" in said[foreign][1]
    assert all("delete" in text for _, text in said.values())
    assert kept == {path: path.read_bytes() for path in kept}
    assert read_json(folders[foreign] / "failure.json")["attempt"] == 1, "nothing is gained by another attempt"
    assert capsys.readouterr().out.count("bad input") >= 3

    (folders[foreign] / "experiment.json").unlink()
    assert batch([foreign], root, notebook).finished == [foreign]


def test_a_run_in_somebody_elses_hands_is_waited_for_or_named(notebook, tmp_path, monkeypatch):
    """A kernel that outlives its killed batch holds the run's lock for a moment; then the run goes on by itself."""
    folder = runs.folder_of(TINY, tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import pathlib, sys, time; from filelock import FileLock\n"
         "folder = pathlib.Path(sys.argv[1])\nfolder.mkdir()\nlock = FileLock(folder / '.lock')\nlock.acquire()\n"
         "print('held', flush=True)\ntime.sleep(2)", str(folder)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert batch([TINY], tmp_path, notebook).finished == [TINY] and holder.wait() == 0
