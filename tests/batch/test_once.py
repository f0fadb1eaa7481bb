"""One run as a notebook: what it leaves, and how each kind of failure is told from the others, with real kernels."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest

from repro import runs
from repro.batch import once
from repro.batch.once import Failure, classify, one_gpu
from repro.files import load_state
from tests import small_notebooks
from tests.small_notebooks import TINY, asked

pytestmark = pytest.mark.timeout(400)  # seconds on a core of its own, many times that on a busy machine
FINISH = "import pathlib; pathlib.Path(runs_root, 'run', 'metrics.json').write_text('{}')"


@pytest.fixture
def execute(tmp_path):
    """Execute a notebook of these cells in the folder `run`; returns its failure."""

    def execute(*cells, **how):
        notebook = small_notebooks.plain(tmp_path / "notebooks", *cells)
        record = asked(TINY) | how.pop("record", {})
        return once.execute(record, tmp_path / "run", device="cpu", notebook=notebook, **how)

    return execute


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_finished_run_leaves_its_notebook_and_its_parameters_arrive(execute, tmp_path):
    cell = "print(json.dumps([method, labels, seed, overrides, runs_root, data_root, device]))"
    overrides = {"lr": 0.5, "strong": "it's `quoted` {x}"}
    assert execute("import json\n" + cell, FINISH, record={"overrides": overrides}) is None
    folder = tmp_path / "run"
    assert files(folder) == {"metrics.json", "notebook.ipynb"}
    (printed,) = nbformat.read(folder / "notebook.ipynb", as_version=4).cells[2].outputs
    assert json.loads(printed["text"]) == ["supervised", 100, 0, overrides, str(tmp_path), None, "cpu"]


@pytest.mark.parametrize("overrides", [TINY.overrides, (("learning", 1.0),)], ids=["a run", "an unknown setting"])
def test_the_notebook_of_batches_shows_the_run(tmp_path, overrides):
    """`run.ipynb` itself: the recipe, the numbers of the run and its loss curves."""
    folder = runs.folder_of(TINY, tmp_path)
    failure = once.execute(asked(TINY) | {"overrides": dict(overrides)}, folder, device="cpu")
    if overrides != TINY.overrides:
        assert failure.kind == "bad input" and "unknown setting of supervised 'learning'" in failure.message
        return
    assert failure is None and runs.load_metrics(folder)["run"] == folder.name
    cells = nbformat.read(folder / "notebook.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    assert folder.name in "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


CASES = {
    "an exception": ("numbers = []\nnumbers[1]", "bug", "IndexError: list index out of range"),
    "no metrics": ("1 + 1", "bug", "the notebook ended, but left no metrics.json of this run"),
    "a bad setting": (
        "from repro.settings import unknown\nraise unknown('setting', 'learning', ['lr'])",
        "bad input", "SettingError: unknown setting 'learning'; known: lr",
    ),
    "memory": ("bytearray(10**18)", "out of memory", "MemoryError"),
    "a killed kernel": ("import os; os.kill(os.getpid(), 9)", "dead kernel", "DeadKernelError: Kernel died"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_failed_is_told_and_the_notebook_kept_as_far_as_it_came(case, execute, tmp_path):
    cell, kind, said = CASES[case]
    failure = execute("print('before')", cell, attempt=2)
    folder = tmp_path / "run"
    assert (failure.kind, failure.attempt) == (kind, 2) and said in failure.message.splitlines()[-1]
    assert files(folder) == {"failed.ipynb", "failure.json"}
    written = json.loads((folder / "failure.json").read_text())
    assert (written["class"], written["message"], written["attempt"]) == (kind, failure.message, 2)
    assert written["when"].endswith("Z") and once.read_failure(folder) == failure
    cells = nbformat.read(folder / "failed.ipynb", as_version=4).cells
    assert "before\n" in [output.get("text") for cell in cells for output in cell.get("outputs", ())]
    if case == "an exception":
        assert "----> 2 numbers[1]" in failure.message and "\x1b" not in failure.message


def test_an_interrupted_kernel_stops_at_the_time_limit(execute, tmp_path):
    started = time.monotonic()
    slow = "import time\nfor _ in range(600): time.sleep(0.1)"
    failure = execute("open(runs_root + '/started', 'w').close()", slow, time_limit=12)
    assert failure.kind == "time limit" and time.monotonic() - started < 60
    assert (tmp_path / "started").exists() and "run it again to continue" in failure.message
    assert (tmp_path / "run" / "failed.ipynb").exists()


def test_a_kernel_that_does_not_listen_is_killed_after_the_grace_period(execute, monkeypatch):
    monkeypatch.setattr(once, "GRACE", 1.0)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(600)"
    assert execute(deaf, time_limit=10).kind == "time limit"


def test_a_run_that_trained_is_finished_whatever_its_notebook_does_later(execute, tmp_path, capfd):
    assert execute(FINISH, "raise ValueError('a figure')") is None
    assert files(tmp_path / "run") == {"metrics.json", "failed.ipynb"}
    assert "trained, but its notebook stopped: ValueError: a figure" in capfd.readouterr().err
    assert execute("raise SystemExit('not executed')") is None


def test_success_removes_what_a_failure_left(execute, tmp_path):
    assert execute("[][1]").kind == "bug"
    assert execute(FINISH) is None
    assert files(tmp_path / "run") == {"metrics.json", "notebook.ipynb"}


def test_a_second_attempt_is_made_only_where_it_can_help(execute, tmp_path):
    assert execute("[][1]").kind == "bug"
    before = (tmp_path / "run" / "failure.json").read_bytes()
    assert execute(FINISH, attempt=2).kind == "bug"
    assert (tmp_path / "run" / "failure.json").read_bytes() == before
    once.settle(tmp_path / "run", Failure("dead kernel", "Kernel died"))
    assert execute(FINISH, attempt=2) is None


def test_sigterm_saves_a_checkpoint_and_the_run_ends_as_if_undisturbed(tmp_path):
    """The command itself, stopped in the middle of training, then typed again without what only a batch knows."""
    notebook = small_notebooks.training(tmp_path / "notebooks")
    experiment = TINY.with_(steps=200, eval_every=200, checkpoint_every=200, log_every=1)
    root, folder = tmp_path / "runs", runs.folder_of(experiment, tmp_path / "runs")
    command = [sys.executable, "-m", "repro.batch.once", "--record", json.dumps(asked(experiment)), "--device", "cpu"]
    command += ["--run", folder.name, "--runs", str(root), "--notebook", str(notebook)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not ((folder / "history.jsonl").exists() and (folder / "history.jsonl").stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == once.CLASSES["preempted"] and "preempted (attempt 1): told to stop" in said
    assert load_state(folder / "checkpoint.safetensors")["at"]["done"] >= 1
    assert once.read_failure(folder).kind == "preempted" and (folder / "failed.ipynb").exists()
    assert subprocess.run([*command, "--attempt", "2"]).returncode == 0
    assert files(folder) == {"experiment.json", "history.jsonl", "metrics.json", "notebook.ipynb",
                             "outputs.safetensors", "weights.safetensors"}  # fmt: skip
    undisturbed = runs.execute(experiment, tmp_path / "other", device="cpu")
    assert runs.load_metrics(folder)["reported"] == undisturbed["reported"]
    other = runs.folder_of(experiment, tmp_path / "other")
    assert small_notebooks.weights_of(folder) == small_notebooks.weights_of(other)


def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    """The starter is killed, which it cannot pass on; the run stops itself, and its kernel with it."""
    notebook = small_notebooks.plain(
        tmp_path / "notebooks",
        "import os, pathlib, time\npathlib.Path(runs_root, 'kernel').write_text(str(os.getpid()))\ntime.sleep(600)",
    )
    starter = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-m', 'repro.batch.once', '--run', 'run', "
        "'--parent', str(os.getpid()), *sys.argv[1:]]\n"
        "subprocess.Popen(command, start_new_session=True).wait()"
    )
    arguments = ["--record", json.dumps(asked(TINY)), "--runs", str(tmp_path), "--notebook", str(notebook)]
    process = subprocess.Popen([sys.executable, "-c", starter, *arguments])
    kernel = tmp_path / "kernel"
    while not (kernel.exists() and kernel.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{kernel.read_text()}").exists() or not (tmp_path / "run" / "failure.json").exists():
        assert time.monotonic() < end, "the run outlived its batch"
        time.sleep(0.05)
    assert once.read_failure(tmp_path / "run").kind == "preempted"


@pytest.mark.parametrize(
    ("error", "stopped", "oom", "kind"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), None, False, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), None, False, "out of memory"),
        (RuntimeError("Kernel died before replying to kernel_info"), None, False, "dead kernel"),
        (RuntimeError("Kernel died before replying to kernel_info"), None, True, "out of memory"),
        (ValueError("wrong"), "preempted", False, "preempted"),
        (KeyboardInterrupt(), None, False, "preempted"),
        (ValueError("wrong"), None, True, "bug"),
        (PermissionError(13, "Permission denied"), None, False, "bad input"),
        (OSError("cannot write x (I/O error: No space left on device (os error 28)); free"), None, False, "bad input"),
        (OSError(28, "No space left on device"), None, False, "bad input"),
        (FileNotFoundError(2, "No such file"), None, False, "bug"),
        (MemoryError(), None, False, "out of memory"),
    ],
)
def test_classes(error, stopped, oom, kind):
    assert classify(error, stopped, oom).kind == kind


@pytest.mark.parametrize("name", ["DataError", "WeightsError", "CorruptFile", "RunBusy", "NonFiniteLoss"])
def test_what_the_user_can_mend_is_bad_input(name):
    assert classify(type(name, (Exception,), {})("why"), None, False) == Failure("bad input", f"{name}: why")


@pytest.mark.parametrize(
    ("place", "file", "text"),
    [
        ("0::/job", "/sys/fs/cgroup/job/memory.events", "low 0\noom 4\noom_kill 3\n"),
        ("9:pids:/\n4:memory:/job\n0::/", "/sys/fs/cgroup/memory/job/memory.oom_control", "under_oom 0\noom_kill 3"),
        ("0::/nowhere", "/proc/vmstat", "pgfault 12\noom_kill 3\n"),
    ],
    ids=["cgroup v2", "cgroup v1", "the machine's"],
)
def test_the_systems_kills_for_memory_are_counted(place, file, text, monkeypatch):
    monkeypatch.setattr(once, "_read", lambda path: {"/proc/self/cgroup": place, file: text}.get(path, ""))
    assert once.oom_kills() == 3


def test_this_machine_counts_them_too():
    assert once.oom_kills() >= 0


def test_one_run_a_gpu(tmp_path):
    """Two devices, three askers: no two hold the same, and the third waits until one is free."""
    with one_gpu(["0", "GPU-7f"], tmp_path) as first, one_gpu(["0", "GPU-7f"], tmp_path) as second:
        assert {first, second} == {"0", "GPU-7f"}
        taken = []

        def ask():
            with one_gpu(["0", "GPU-7f"], tmp_path) as third:
                taken.append(third)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        time.sleep(0.5)
        assert not taken
    thread.join(5)
    assert taken[0] in ("0", "GPU-7f")
    with one_gpu([], tmp_path) as none:
        assert none is None


def test_a_gpu_is_free_when_its_holder_is_killed(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from repro.batch.once import one_gpu\n"
        "with one_gpu(['0'], Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with one_gpu(["0"], tmp_path) as device:
        assert device == "0"


def test_the_gpu_that_is_held_is_the_one_the_kernel_sees(execute, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(once.tempfile, "tempdir", None)
    seen = "import os, pathlib\npathlib.Path(runs_root, 'seen').write_text(os.environ['CUDA_VISIBLE_DEVICES'] + device)"
    assert execute(seen, FINISH, gpus=["3"]) is None
    assert (tmp_path / "seen").read_text() == "3cuda"
