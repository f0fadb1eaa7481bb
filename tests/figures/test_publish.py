"""The published files: the committed runs give the committed `results.md` and CSV files again."""

import json

import pandas as pd
import pytest

from figures import desk, publish
from repro.batch import records
from repro.experiment import Experiment, run_id
from repro.files import read_json, write_json
from tests.fake_runs import write_run

RENDERED = records.COMMITTED_RUNS.parent


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """Finished runs with the committed numbers of every rule and kind of weights."""
    root = tmp_path_factory.mktemp("committed")
    numbers = pd.read_csv(records.numbers_of(records.COMMITTED_RUNS), dtype=str, keep_default_na=False)
    by_run = {run: part.to_dict("records") for run, part in numbers.groupby("run")}
    for row in records.load_runs(records.COMMITTED_RUNS).to_dict("records"):
        of_run = [row["paper"], row["method"], row["data"], int(row["labels"]), int(row["seed"]), row["scale"]]
        item, reported = Experiment(*of_run, tuple(json.loads(row["overrides"]).items())), {}
        assert run_id(item) == row["run"]
        for cells in by_run[row["run"]]:
            texts = {name: text for name, text in cells.items() if text and name not in records.KEY}
            found = {name: None if text == "nan" else float(text) for name, text in texts.items()}
            reported.setdefault(cells["rule"], {})[cells["weights"]] = found
        path = write_run(item, root) / "metrics.json"
        write_json(path, read_json(path) | {"reported": reported, "pseudo_labels": {}})
    return root


def test_results_are_those_that_are_committed(committed, tmp_path):
    asked = desk.many_runs(scale="mini", seeds=5, runs_root=committed, save_to=tmp_path)
    publish.results(asked)
    written, expected = ((folder / "results.md").read_text().splitlines() for folder in (tmp_path, RENDERED))
    apart = [line for line, other in zip(written, expected, strict=True) if line != other]
    # Two claims are about statistics of histories and outputs, which are not committed.
    assert len(apart) == 2 and all("| not run |" in line for line in apart)
    for name in ("runs.csv", "runs_numbers.csv"):
        new, old = (pd.read_csv(folder / name, dtype=str).set_index("run") for folder in (tmp_path, RENDERED))
        assert list(new.index) == list(old.index) and list(new) == list(old)
        if name == "runs_numbers.csv":
            pd.testing.assert_frame_equal(new, old)


def test_nothing_is_written_unless_asked(committed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish.results(desk.many_runs(scale="mini", seeds=1, runs_root=committed))
    assert not list(tmp_path.iterdir())
