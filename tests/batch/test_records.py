"""Committed results: what is written is read back bit by bit, and what was not measured stays apart from undefined."""

import math

import pandas as pd

from figures import tables
from repro.batch import records
from repro.experiment import Experiment
from tests.fake_runs import write_run

FIXMATCH = Experiment("commatch", "fixmatch")


def write(tmp_path, experiments, finished):
    for experiment, numbers in finished.items():
        write_run(experiment, tmp_path / "runs", **numbers)
    frame = tables.collect(experiments, tmp_path / "runs")
    return frame, records.save(frame, tmp_path / "runs.csv")[0]


def test_numbers_are_read_back_bit_by_bit(tmp_path):
    frame, path = write(tmp_path, [FIXMATCH], {FIXMATCH: {"error": 0.1 + 0.2, "nll": 1 / 3}})
    back = records.load_numbers(path).set_index("metric")["value"]
    own = frame[(frame["rule"] == "last") & (frame["weights"] == "ema")].set_index("metric")["value"]
    assert back["error"] == 0.1 + 0.2 and back.to_dict() == own.to_dict()


def test_there_is_a_row_a_run_and_none_for_a_run_that_did_not_finish(tmp_path):
    missing = FIXMATCH.with_(seed=7)
    _, path = write(tmp_path, [FIXMATCH, missing], {FIXMATCH: {}})
    assert len(records.load_runs(path)) == 1 and set(records.load_runs(path)["seed"]) == {"0"}
    numbers = pd.read_csv(records.numbers_of(path))
    assert not numbers.duplicated(records.KEY).any() and set(numbers["run"]) == set(records.load_runs(path)["run"])


def test_an_undefined_metric_is_not_an_absent_one(tmp_path):
    other = FIXMATCH.with_(seed=1)
    _, path = write(tmp_path, [FIXMATCH, other], {FIXMATCH: {"error": None}, other: {"further": 2.0}})
    numbers = records.load_numbers(path).pivot(index="seed", columns="metric", values="value")
    found = records.load_numbers(path).groupby("seed")["metric"].agg(set)
    assert "error" in found["0"] and math.isnan(numbers.loc["0", "error"])
    assert "further" in found["1"] and "further" not in found["0"]


def test_nothing_committed_is_an_empty_frame(tmp_path):
    assert records.load_runs(tmp_path / "runs.csv").empty
    frame = records.load_numbers(tmp_path / "runs.csv")
    assert frame.empty and {"run", "metric", "value"} <= set(frame)
    _, path = write(tmp_path, [FIXMATCH], {})
    assert records.load_runs(path).empty and records.load_numbers(path).empty
