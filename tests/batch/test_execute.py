"""Batches: what is run again and what is not, retries, threads, GPUs, locks, and both engines."""

import json
import os
import signal
import sys
import threading
import time

import pytest
import torch

from repro import runs
from repro.batch import execute, once
from repro.batch.execute import Summary, visible_gpus
from repro.batch.plan import STALE, plan
from repro.experiment import record
from repro.files import write_json
from repro.settings import SettingError
from tests import small_notebooks
from tests.small_notebooks import TINY

PYTHON = sys.executable


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run a batch whose jobs are a shell script: `$run` is the run's folder, `$attempt` the number of the attempt."""
    notebook = small_notebooks.plain(tmp_path / "notebooks")
    root = tmp_path / "runs"

    def batch(body, experiments=(TINY,), state="", **how):
        script = tmp_path / "python"
        script.write_text(
            f"#!{PYTHON}\nimport sys\nfrom pathlib import Path\n"
            "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
            "run = Path(value('--runs')) / value('--run')\nrun.mkdir(parents=True, exist_ok=True)\n"
            f"body = 'run=$1; attempt=$2; shift 2\\n' + {body!r}\n"
            "arguments = ['bash', '-c', body, '-', str(run), value('--attempt'), *sys.argv[1:]]\n"
            "import os; os.execvp('bash', arguments)\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(execute.sys, "executable", str(script))
        planned = plan(dict.fromkeys(experiments, ("test",)), root)
        how = {"engine": "local", "workers": 1, "device": "cpu", "notebook": notebook} | how
        return execute.execute(planned, root, **how)

    batch.root = root
    return batch


METRICS = {"reported": {"last": {"ema": {"error": 0.25, "ece_15": 0.125}}}, "cost": {"train_seconds": 1.0}}


def metrics(experiment):
    """What a finished run's metrics.json needs for a batch."""
    return METRICS | record(experiment) | {"run": runs.folder_of(experiment).name}


def finish(root, experiment):
    folder = runs.folder_of(experiment, root)
    write_json(folder / "metrics.json", metrics(experiment))
    return folder


def finishing(experiment):
    """A shell command that finishes this run."""
    return f"cat > $run/metrics.json <<'END'\n{json.dumps(metrics(experiment))}\nEND\n"


def said(kind, message="why"):
    """A shell command that fails with a class."""
    text = json.dumps({"class": kind, "message": message, "attempt": 1, "when": ""})
    return f"cat > $run/failure.json <<'END'\n{text}\nEND\nexit {once.CLASSES[kind]}"


def test_finished_runs_are_left_alone_and_one_run_is_run_once(batch, capsys):
    before = finish(batch.root, TINY.with_(seed=1))
    stamp = (before / "metrics.json").stat().st_mtime_ns
    spelt_out = TINY.with_(momentum=0.9)
    summary = batch(finishing(TINY) + "echo x >> $run/times", [TINY, TINY.with_(seed=1), spelt_out])
    assert summary.skipped == [TINY.with_(seed=1)] and len(summary.finished) == 1 and not summary.failed
    assert (runs.folder_of(TINY, batch.root) / "times").read_text() == "x\n"
    assert (before / "metrics.json").stat().st_mtime_ns == stamp
    printed = capsys.readouterr().out
    assert printed.startswith("1 runs to do, 1 finished before; one at a time; about 0:05 from what ")
    assert "1 of 1: supervised on fashion, 100 labels, seed 0" in printed and "error 25.00 %" in printed
    assert printed.endswith("1 finished, 1 finished before, 0 failed\n")


def test_one_that_fails_stops_no_other_and_the_summary_names_its_class(batch, capsys):
    others = [TINY.with_(seed=seed) for seed in (1, 2)]
    failing = said("bug", "line\nIndexError: 3")
    body = f"case $run in *{runs.folder_of(TINY).name}) {failing};; esac\n"
    body += "".join(f"case $run in *{runs.folder_of(e).name}) {finishing(e)};;\nesac\n" for e in others)
    summary = batch(body, [TINY, *others], workers=2)
    assert set(summary.finished) == set(others) and summary.exit_status == 1
    assert summary.failed == [(TINY, "bug", "line\nIndexError: 3")]
    printed = capsys.readouterr().out
    table = printed.split("2 finished, 0 finished before, 1 failed\n\n")[1].splitlines()
    assert ", about 0:05 left] 1 of 3: " in printed and "] 3 of 3: " in printed
    assert table[0].split() == ["class", "run", "last", "line"]
    assert table[1].startswith("bug    supervised on fashion") and table[1].endswith("  IndexError: 3")


@pytest.mark.parametrize("kind", once.CLASSES)
def test_only_what_may_pass_is_tried_again_and_not_for_ever(batch, kind):
    body = "echo $attempt >> $run/attempts; " + said(kind)
    assert [(item[1], item[2]) for item in batch(body, retries=2).failed] == [(kind, "why")]
    attempts = (runs.folder_of(TINY, batch.root) / "attempts").read_text().split()
    assert attempts == (["1", "2", "3"] if kind in once.RETRIED else ["1"])


def test_a_second_attempt_that_succeeds_leaves_no_failure(batch):
    body = f"if [ $attempt = 1 ]; then kill -9 $$; fi\n{finishing(TINY)}"
    assert batch(body).finished == [TINY] and batch(body).skipped == [TINY]
    assert not (runs.folder_of(TINY, batch.root) / "failure.json").exists()


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ("kill -9 $$", "dead kernel", "its process ended with status -9 and printed nothing"),
        ("kill -15 $$", "preempted", "its process ended with status -15 and printed nothing"),
        ("echo Traceback; echo 'ValueError: x'; exit 1", "bug", "Traceback\nValueError: x"),
        ("exit 0", "bug", "its process ended with status 0 and printed nothing"),
        ("touch $run/running.ipynb; exit 2", "bad input", "its process ended with status 2 and printed nothing"),
    ],
)
def test_a_process_that_left_no_word_is_classified_by_its_end(batch, body, kind, text):
    folder = runs.folder_of(TINY, batch.root)
    assert batch(body, retries=0).failed == [(TINY, kind, text)]
    assert once.read_failure(folder).kind == kind
    assert (folder / "failed.ipynb").exists() == ("running" in body) and not (folder / "running.ipynb").exists()


def test_a_failure_of_an_earlier_batch_is_not_taken_for_this_ones(batch):
    assert batch(said("bad input", "old")).failed[0][2] == "old"
    assert batch("echo new; exit 1").failed == [(TINY, "bug", "new")]


def test_threads_are_shared_and_no_more_run_than_workers(batch, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(runs, "cores", lambda: 6)
    body = f"cd {tmp_path}; mkdir busy.$$; ls -d busy.* | wc -l >> counts; sleep 0.2; rmdir busy.$$; echo $*; exit 1"
    summary = batch(body, [TINY.with_(seed=seed) for seed in range(5)], workers=2)
    assert all("--threads 3 " in printed for _, _, printed in summary.failed)
    assert {int(count) for count in (tmp_path / "counts").read_text().split()} <= {1, 2}
    assert "--threads 6 " in batch("echo $*; exit 1").failed[0][2]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "--threads 4 " in batch("echo $*; exit 1").failed[0][2]


def test_visible_gpus_are_handed_to_the_runs_and_count_as_workers(batch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("cpu") == [] and visible_gpus("auto") == ["0", "1", "2"] and visible_gpus("cuda:1") == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7f,6")
    assert visible_gpus("cuda") == ["4", "GPU-7f", "6"] and visible_gpus("cuda:1") == ["GPU-7f"]
    printed = batch("echo $*; exit 1", device="auto", workers=0).failed[0][2]
    assert "--gpus 4,GPU-7f,6 " in printed and "--device auto " in printed


def test_an_interruption_reaches_the_running_and_starts_no_more(batch, tmp_path):
    body = "trap 'echo told > $run/told; exit 143' TERM; touch $run/on; while :; do sleep 0.02; done"
    folders = [runs.folder_of(TINY.with_(seed=seed), batch.root) for seed in range(3)]

    def interrupt(number):
        while sum((folder / "on").exists() for folder in folders) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        threading.Thread(target=interrupt, args=(number,), daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            batch(body, [TINY.with_(seed=seed) for seed in range(3)], workers=2)
        assert [(folder / "told").exists() for folder in folders] == [True, True, False]
        for folder in folders[:2]:
            (folder / "told").unlink()
            (folder / "on").unlink()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stale_run_is_executed_anew_and_its_former_results_are_kept(batch):
    folder = finish(batch.root, TINY)
    (folder / "weights.safetensors").write_text("old")
    (planned,) = plan({TINY: ("test",)}, batch.root, stale=True)
    assert planned.state == STALE
    batch("exit 3")  # writes the script; without --stale the run is skipped
    for number in (1, 2):
        finish(batch.root, TINY)
        execute.execute([planned], batch.root, engine="local", device="cpu", retries=0,
                    notebook=batch.root.parent / "notebooks" / "run.ipynb")  # fmt: skip
        assert not once.is_finished(folder)
        assert (batch.root / "replaced" / f"{folder.name}-{number}" / "metrics.json").exists()
    assert (batch.root / "replaced" / f"{folder.name}-1" / "weights.safetensors").read_text() == "old"


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"engine": "make"}, "'make' .*known: auto, local, snakemake"),
        ({"workers": -1}, "workers is -1; it must be a whole number from 0"),
        ({"retries": 1.5}, "retries is 1.5"),
        ({"time_limit": 0.0}, "seconds above 0"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"profile": "slurm"}, "profile 'slurm' needs Snakemake"),
        ({"notebook": execute.HERE / "no.ipynb"}, "there is no .*no.ipynb; batches need a checkout"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(batch, how, text):
    with pytest.raises(SettingError, match=text):
        batch("exit 1", **how)
    assert not batch.root.exists()


def test_the_quickest_run_comes_first_then_the_longest():
    jobs = [execute.Job(TINY.with_(seed=seed), execute.HERE, (), seconds)
            for seed, seconds in enumerate((30.0, 5.0, 90.0, 30.0, 60.0))]  # fmt: skip
    assert [job.experiment.seed for job in execute.ordered(jobs)] == [1, 2, 4, 0, 3]
    assert execute.ordered([]) == [] and execute.ordered(jobs[:1]) == jobs[:1]
    assert execute.wall_seconds(jobs, 2) == 107.5 and execute.wall_seconds(jobs, 9) == 90.0


def test_without_snakemake_the_local_pool_runs_and_a_profile_says_what_to_install(batch, monkeypatch):
    monkeypatch.setattr(execute.importlib.util, "find_spec", lambda name: None)
    assert batch(finishing(TINY), engine="auto").finished == [TINY]
    with pytest.raises(SettingError, match="Snakemake is not installed; pip install"):
        batch("", engine="snakemake")


def test_the_summary_of_notes():
    text = str(Summary([TINY], notes=[(TINY, "trained; its notebook stopped: failed.ipynb")]))
    assert text.startswith("1 finished, 0 finished before, 0 failed\n\nclass     run") and "\nnotebook  superv" in text


# Snakemake

LOG = """\
Error in rule run:
    message: SLURM-job '7' failed, SLURM status is: 'OUT_OF_MEMORY'. Detailed failure reason unavailable
    jobid: 1
    output: supervised-a/metrics.json (update)
    log: supervised-a/notebook.ipynb (check log file(s) for error details)

Error in rule run:
    message: SLURM-job '8' failed, SLURM status is: 'TIMEOUT'.
    jobid: 2
    output: {folder}/csl-b/metrics.json (update)

Error in rule run:
    message: None
    output: pcre-c/metrics.json (update)
"""


def test_what_a_cluster_says_of_its_jobs():
    found = execute.failures_in_log("Building DAG\n" + LOG.format(folder="/a folder"))
    assert {run: failure.kind for run, failure in found.items()} == {
        "supervised-a": "out of memory", "csl-b": "time limit", "pcre-c": "dead kernel",
    }  # fmt: skip
    assert found["supervised-a"].message.startswith("SLURM-job '7' failed")


def test_profiles_by_name_and_by_folder(tmp_path):
    assert execute.profile_folder("slurm") == execute.PROFILES / "slurm"
    (tmp_path / "config.yaml").write_text("cores: 1\n")
    assert execute.profile_folder(str(tmp_path)) == tmp_path
    with pytest.raises(SettingError, match="neither one of kubernetes, slurm nor a folder with config.yaml"):
        execute.profile_folder("lsf")
