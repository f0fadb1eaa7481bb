"""Batches: what is skipped, what a failure or an interruption does to the others, and the estimate of time."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from repro import runs
from repro.batch import local, plan
from repro.batch.local import Outcome, clock, default_workers, expected_seconds, run_all, title
from repro.experiment import Experiment, record
from repro.files import load_state
from repro.train import CHECKPOINT
from tests.fake_mask_runs import write_mask_run

QUICK = Experiment("commatch", "supervised", "fashion", 100, 0, "tiny", {"steps": 1, "batch": 2})


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Have the runs be a shell script (its arguments are those of Python) instead of training."""

    def replace(body):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        monkeypatch.setattr(local.sys, "executable", str(path))

    return replace


def finish(root, experiment, seconds=1.0):
    """A finished run's metrics, as far as a batch reads them."""
    folder = runs.folder_of(experiment, root)
    folder.mkdir(parents=True)
    metrics = record(experiment) | {
        "run": folder.name, "cost": {"train_seconds": seconds, "wall_seconds": 0.0}, "provenance": {"device": "cpu"},
        "reported": {"last": {"ema": {"error": 0.5, "ece_15": 0.125}}},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_finished_runs_are_skipped_and_a_failing_one_stops_no_other(tmp_path, capsys, monkeypatch):
    """Real processes: one diverges, one repeats another under a spelt-out default, one was finished before."""
    monkeypatch.setattr(local, "expected_seconds", lambda experiments, _: dict.fromkeys(experiments, 1.0))
    before, diverging = QUICK.with_(seed=1), QUICK.with_(lr=1e30, steps=30)
    finish(tmp_path, before)
    same = QUICK.with_(momentum=0.9)
    outcome = run_all([before, diverging, QUICK, same, QUICK], tmp_path, workers=2, device="cpu")
    assert outcome.skipped == [before] and outcome.finished == [QUICK]
    ((failed, text),) = outcome.failed
    assert failed == diverging and "NonFiniteLoss: step" in text and "lower lr (1e+30)" in text
    assert not runs.is_finished(diverging, tmp_path) and runs.is_finished(QUICK, tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("2 runs to do, 1 finished before; 2 at a time; estimate 0:01")
    error = runs.load_metrics(runs.folder_of(QUICK, tmp_path))["reported"]["last"]["ema"]["error"]
    assert f"supervised on fashion, 100 labels, seed 0, batch=2, steps=1: error {100 * error:.2f} %" in printed
    assert "lr=1e+30, steps=30: FAILED\nrepro: NonFiniteLoss" in printed


def test_an_interruption_has_the_running_save_and_starts_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "expected_seconds", lambda experiments, _: dict.fromkeys(experiments, 1.0))
    long = QUICK.with_(steps=100_000, log_every=1, eval_every=100_000, checkpoint_every=100_000)
    folder = runs.folder_of(long, tmp_path)

    def interrupt():
        history = folder / "history.jsonl"
        while not (history.exists() and history.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_all([long, long.with_(seed=1)], tmp_path, workers=1, device="cpu")
    assert load_state(folder / CHECKPOINT)["at"]["done"] >= 1
    with runs._lock(folder):  # free: its process is gone
        assert not (folder / "metrics.json").exists()
    assert not runs.folder_of(long.with_(seed=1), tmp_path).exists()


def test_all_runs_are_asked_before_any_is_waited_for(tmp_path, script):
    """Each takes .7 s to save; one after the other they would take 2.8 s."""
    script("trap 'sleep 0.7; exit 130' TERM\necho '{\"done\": 1, \"total\": 2}'\nwhile :; do sleep 0.02; done")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all([QUICK.with_(seed=s) for s in range(4)], tmp_path, workers=4, device="cpu")
    assert time.monotonic() - started < 2.2


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('printf \'{"done": 3, "to\'; kill -9 $$', '{"done": 3, "to'),
        ("kill -9 $$", "it printed nothing (exit status -9)"),
        ("printf '\\xff\\xfe broken\\n'; exit 1", "\ufffd\ufffd broken"),
        ("exit 0", "it printed nothing (exit status 0)"),  # without metrics.json nothing succeeded
        ("for i in $(seq 100); do echo line $i; done; exit 3", "\n".join(f"line {i}" for i in range(61, 101))),
    ],
    ids=["half a progress line", "killed", "not utf-8", "no metrics", "long"],
)
def test_whatever_a_run_prints_it_is_reported_and_the_batch_goes_on(tmp_path, script, body, text):
    script(body)
    outcome = run_all([QUICK, QUICK.with_(seed=1)], tmp_path, workers=1, device="cpu")
    assert outcome == Outcome(failed=[(QUICK, text), (QUICK.with_(seed=1), text)])


def test_no_more_runs_at_a_time_than_workers(tmp_path, script):
    script(f"cd {tmp_path}; mkdir busy.$$; ls -d busy.* | wc -l >> counts; sleep 0.15; rmdir busy.$$; exit 1")
    run_all([QUICK.with_(seed=s) for s in range(6)], tmp_path / "runs", workers=3, device="cpu")
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 6 and max(counts) in (2, 3)


def test_threads_are_shared_among_workers(tmp_path, script, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(local.runs, "cores", lambda: 6)
    script("echo $OMP_NUM_THREADS; exit 1")
    assert run_all([QUICK], tmp_path, workers=4, device="cpu").failed[0][1] == "1"
    assert run_all([QUICK], tmp_path, workers=2, device="cpu").failed[0][1] == "3"
    assert default_workers("cpu") == 6


def test_nothing_to_do_prints_and_starts_nothing(tmp_path, capsys, script):
    script("touch started")
    finish(tmp_path, QUICK)
    assert run_all([QUICK], tmp_path, device="cpu") == Outcome(skipped=[QUICK]) and run_all([], tmp_path) == Outcome()
    assert capsys.readouterr().out == ""


def test_a_negative_number_of_workers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers is -1; it must be 0 "):
        run_all([QUICK], tmp_path, workers=-1)


def test_the_estimate_is_the_mean_of_like_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "COMMITTED", tmp_path / "none.csv")
    assert expected_seconds([QUICK], tmp_path) == {QUICK: local.TINY_SECONDS}
    finish(tmp_path, QUICK.with_(seed=1), seconds=10)
    finish(tmp_path, QUICK.with_(seed=2), seconds=20)
    finish(tmp_path, QUICK.with_(seed=3, steps=9), seconds=999)
    finish(tmp_path, QUICK.with_(method="fixmatch"), seconds=999)
    (tmp_path / "supervised-x-tiny-y").mkdir()
    (tmp_path / "supervised-x-tiny-y" / "metrics.json").write_text("{")  # not this batch's business
    mini, paper = QUICK.with_(scale="mini"), Experiment("commatch", "supervised", "cifar10", 40, 0, "paper")
    assert expected_seconds([QUICK, mini, paper], tmp_path) == {
        QUICK: 15, mini: local.UNKNOWN_SECONDS, paper: local.UNKNOWN_SECONDS,
    }  # fmt: skip
    assert plan.plan({QUICK: ()}, tmp_path)[0].seconds == 15, "a plan says the same"
    assert expected_seconds([], tmp_path) == {}


def test_an_estimate_reads_each_finished_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "COMMITTED", tmp_path / "none.csv")
    for seed in (1, 2, 3):
        finish(tmp_path, QUICK.with_(seed=seed), seconds=10 * seed)
    read, load = [], runs.load_metrics
    monkeypatch.setattr(runs, "load_metrics", lambda folder: read.append(folder.name) or load(folder))
    waiting = [QUICK.with_(seed=seed) for seed in range(4, 20)]
    assert expected_seconds(waiting, tmp_path) == dict.fromkeys(waiting, 20)
    assert len(read) == len(set(read)) == 3


def test_a_finished_run_is_told_by_its_papers_headlines(tmp_path, capsys, script):
    """A run that finds its metrics written: what is printed is what they say."""
    masks = Experiment("csl", "unimatch", "scenes", 20, 1, "tiny")
    ready = tmp_path / "ready"
    write_mask_run(masks, ready, figures=False, miou=0.6125, ece_15=0.05)
    script(f"mkdir -p {tmp_path}/runs && cp -r {ready}/* {tmp_path}/runs")
    assert run_all([masks], tmp_path / "runs", workers=1, device="cpu").finished == [masks]
    told = "unimatch on scenes, 20 masks, seed 1: mIoU 61.25 %, ECE 5.00 % (15 right-closed bins), 12 s"
    assert told in capsys.readouterr().out


def test_titles_and_clocks():
    assert title(QUICK) == "supervised on fashion, 100 labels, seed 0, batch=2, steps=1"
    assert title(Experiment("csl", "csl", "scenes", 20)) == "csl on scenes, 20 masks, seed 0"
    assert [clock(s) for s in (0, 0.4, 59.6, 61, 3599, 3600, 90_061)] == [
        "0:00", "0:00", "1:00", "1:01", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip


def test_runs_use_the_interpreter_of_the_batch():
    worker = local._Worker(QUICK.with_(steps=1), "/nonexistent", "nodevice", 1, local.queue.Queue())
    assert worker.process.args[:4] == [sys.executable, "-m", "repro", "run"]
    worker.process.kill()
    worker.process.wait()


def test_the_quickest_run_comes_first_then_the_longest():
    items = [QUICK.with_(seed=seed) for seed in range(5)]
    expected = dict(zip(items, (30.0, 5.0, 90.0, 30.0, 60.0), strict=True))
    assert [item.seed for item in local.ordered(items, expected)] == [1, 2, 4, 0, 3]
    assert list(local.ordered([], {})) == [] and list(local.ordered(items[:1], expected)) == items[:1]
