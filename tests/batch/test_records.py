"""Committed results are read back bit by bit, absent apart from undefined; exports have every number."""

import math

import datasets
import pandas as pd
import pytest

from figures import tables
from repro import runs
from repro.batch import records
from repro.experiment import Experiment, run_id
from repro.files import CorruptFile, read_json, write_json
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run
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


# Export

LABELS = Experiment("commatch", "fixmatch", seed=1, overrides={"threshold": 0.9})
MASKS = Experiment("csl", "csl", "scenes", 20, scale="tiny")


@pytest.fixture
def root(tmp_path):
    """Two finished runs, of labels and of masks, whose digest is made of digits, and an unfinished one."""
    known = {"source_digest": "1234567890123e10", "processor": "P", "dirty": None, "python": "3.12.1"}
    known |= {"packages": {"torch": "2.13.0", "numpy": "2.4.6"}}
    root = tmp_path / "mine"
    for folder in (write_run(LABELS, root, error=0.1 + 0.2, nll=None), write_mask_run(MASKS, root, figures=False)):
        metrics = read_json(folder / "metrics.json")
        metrics["provenance"] |= known
        write_json(folder / "metrics.json", metrics)
    runs.folder_of(LABELS.with_(seed=9), root).mkdir()
    return root


def test_every_number_of_every_run_is_a_row_with_its_origin(root, tmp_path):
    frame = records.export(tmp_path / "x.csv", root, label="ann")
    assert list(frame) == list(records.TYPES) and set(frame["run"]) == {run_id(LABELS), run_id(MASKS)}
    mine = frame[frame["run"] == run_id(LABELS)]
    saved = runs.load_metrics(runs.folder_of(LABELS, root))["reported"]
    expected = {
        (rule, weights, metric, -1): value
        for rule, by_weights in saved.items() for weights, metrics in by_weights.items()
        for metric, value in metrics.items() if not isinstance(value, list | bool)
    }  # fmt: skip
    expected |= {
        (rule, weights, "per_class_accuracy", index): value
        for rule in saved for weights in saved[rule] for index, value in enumerate((0.5, None))
    }  # fmt: skip
    pseudo = {"coverage": 0.25, "accuracy": 0.9, "confidence": 0.95, "ece": None}
    expected |= {("last", "live", f"positive_{name}", -1): value for name, value in pseudo.items()}
    rows = mine[["rule", "weights", "metric", "class", "value"]].itertuples(index=False)
    assert {tuple(row[:4]): None if math.isnan(row[4]) else row[4] for row in rows} == expected
    about = mine.iloc[0][["overrides", "seed", "threads", "exported_by", "processor", "platform", "dirty", "torch"]]
    assert about.tolist() == ['{"threshold": 0.9}', 1, 1, "ann", "P", "unknown", "unknown", "2.13.0"]
    masks = frame[(frame["run"] == run_id(MASKS)) & (frame["rule"] == "last") & (frame["weights"] == "ema")]
    assert sorted(masks.loc[masks["metric"] == "iou", "class"]) == list(range(6))
    assert not set(frame["metric"]) & {"confusion", "reliability", "cam_curve"}
    assert set(records.export(tmp_path / "y.parquet", root, "tiny")["run"]) == {run_id(MASKS)}


def test_a_metric_of_several_numbers_a_class_is_exported_by_name_and_class():
    metrics = {"over_activation": {"ratio": [0.5, None], "share": [0.25, 1]}, "cam_curve": [0.1, 0.2], "miou": 0.5}
    rows = list(records._by_class(metrics))
    assert [row[:2] for row in rows] == [
        ("over_activation_ratio", 0), ("over_activation_ratio", 1), ("over_activation_share", 0),
        ("over_activation_share", 1), ("miou", records.ALL_CLASSES),
    ]  # fmt: skip
    assert math.isnan(rows[1][2]) and [row[2] for row in rows if row[2] == row[2]] == [0.5, 0.25, 1.0, 0.5]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_datasets_reads_what_is_exported(root, tmp_path, kind):
    path = tmp_path / f"results.{kind}"
    frame = records.export(path, root)
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == list(records.TYPES) and len(loaded) == len(frame)
    for name, kind_of in records.TYPES.items():
        if (kind, name) != ("csv", "source_digest"):  # digits alone: a reader of text may take them for a number
            words = {"str": ("string", "large_string")}.get(kind_of, (kind_of,))
            assert loaded.features[name].dtype in words, name
    values = [math.nan if value is None else value for value in loaded["value"]]
    assert values == pytest.approx(frame["value"].tolist(), rel=1e-15, nan_ok=True)


def test_an_export_is_refused_and_nothing_is_written(root, tmp_path):
    for path, options, message in (
        ("x.xlsx", {}, "must end in .csv or .parquet"),
        ("x.csv", {"scale": "huge"}, "unknown scale 'huge'"),
        ("x.csv", {"scale": "paper"}, "no finished run at scale paper in .*; nothing to export"),
        ("x.csv", {"label": "ann smith"}, "label is 'ann smith'; it must be letters"),
    ):
        with pytest.raises(SettingError, match=message):
            records.export(tmp_path / path, root, **options)
    (runs.folder_of(MASKS, root) / "metrics.json").write_text("{")
    with pytest.raises(CorruptFile, match="metrics.json is not valid JSON"):
        records.export(tmp_path / "x.csv", root)
    assert not list(tmp_path.glob("x.*"))
