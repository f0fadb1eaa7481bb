"""Progress: who is watching, and what the bar shows of a run."""

import sys
from types import SimpleNamespace

import pytest

from repro.batch import progress
from repro.batch.progress import StepBar, is_watched
from repro.experiment import Experiment

NAMES = ("REPRO_PROGRESS", "CI", "JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")


@pytest.fixture
def surroundings(monkeypatch):
    """Set the environment, whether a kernel runs and whether stderr is a terminal."""

    def build(terminal=False, kernel=False, **environment):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal, write=len, flush=int))
        if kernel:
            monkeypatch.setitem(sys.modules, "ipykernel", sys)
        else:
            monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    return build


@pytest.mark.parametrize(
    ("where", "watched"),
    [
        ({"terminal": True}, True),
        ({"terminal": False}, False),
        ({"terminal": True, "CI": "true"}, False),
        ({"kernel": True, "terminal": True}, False),  # papermill in a terminal
        ({"kernel": True, "JPY_SESSION_NAME": "a.ipynb"}, True),
        ({"kernel": True, "VSCODE_PID": "1"}, True),
        ({"kernel": True, "COLAB_RELEASE_TAG": "r"}, True),
        ({"kernel": True, "JPY_SESSION_NAME": "a.ipynb", "CI": "1"}, False),
        ({"terminal": True, "REPRO_PROGRESS": "0"}, False),
        ({"CI": "true", "REPRO_PROGRESS": "1"}, True),
        ({"terminal": True, "REPRO_PROGRESS": "yes"}, True),
    ],
    ids=str,
)
def test_a_bar_is_drawn_where_somebody_watches(surroundings, where, watched):
    surroundings(**where)
    assert is_watched() == watched


def row(step, **terms):
    return {"kind": "train", "step": step, "terms": terms, "samples_per_second": 1234.5}


def test_the_bar_follows_the_run_also_a_resumed_one(monkeypatch):
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    monkeypatch.setattr(progress, "tqdm", __import__("tqdm").tqdm)  # the plain one, whatever the test runs in
    bar = StepBar("commatch")
    bar(300, 600, row(300, supervised=0.12345))
    assert (bar.bar.n, bar.bar.total) == (300, 600)
    assert bar.bar.postfix == "supervised=0.123, images/s=1234"
    bar(600, 600, row(600, supervised=0.1))
    assert bar.bar.n == 600 and bar.bar.disable  # closed


def test_an_unwatched_bar_prints_nothing(monkeypatch, capfd):
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    bar = StepBar("commatch")
    bar(2, 2, row(2, supervised=1.0))
    assert capfd.readouterr() == ("", "")


def test_titles_and_clocks():
    quick = Experiment("commatch", "supervised", "fashion", 100, 0, "tiny", {"steps": 1, "batch": 2})
    assert progress.title(quick) == "supervised on fashion, 100 labels, seed 0, batch=2, steps=1"
    assert progress.title(Experiment("csl", "csl", "scenes", 20)) == "csl on scenes, 20 masks, seed 0"
    assert [progress.clock(s) for s in (0, 0.4, 59.6, 61, 3599, 3600, 90_061)] == [
        "0:00", "0:00", "1:00", "1:01", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip


def test_the_bar_of_a_batch_moves_while_runs_train(tmp_path, monkeypatch):
    """Two runs of 6 and 4 expected seconds; the first stands at half of its steps, with half a line written."""
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    monkeypatch.setattr(progress, "tqdm", __import__("tqdm").tqdm)
    experiment = Experiment("commatch", "supervised", "fashion", 100, 0, "tiny", {"steps": 20})
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    (first / "history.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    with progress.BatchBar([(experiment, first, 6.0), (experiment, second, 4.0)]) as bar:
        bar.look()
        assert bar.bar.n == 3.0
        bar.ended(second)
        assert bar.bar.n == 7.0
        bar.ended(first)
        assert bar.bar.n == bar.bar.total == 10
