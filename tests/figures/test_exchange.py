"""Results that travel: what is exported, that `datasets` reads it, and what an import refuses, merges and keeps."""

import math
import shutil

import datasets
import pandas as pd
import pytest

from figures import exchange
from figures.exchange import ALL_CLASSES, TYPES, bring_in, export, imported
from repro import runs
from repro.data.catalogue import DataError
from repro.experiment import Experiment, run_id
from repro.files import CorruptFile, read_json, write_json
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run
from tests.fake_runs import write_run

LABELS = Experiment("commatch", "fixmatch", seed=1, overrides={"threshold": 0.9})
MASKS = Experiment("csl", "csl", "scenes", 20, scale="tiny")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Two finished runs, of labels and of masks (by a code whose digest is made of digits), and an unfinished one."""
    root = tmp_path_factory.mktemp("theirs")
    known = {"source_digest": "1234567890123e10", "processor": "P", "dirty": None, "python": "3.12.1"}
    known |= {"packages": {"torch": "2.13.0", "numpy": "2.4.6"}}
    for folder in (
        write_run(LABELS, root, error=0.1 + 0.2, nll=None),
        write_mask_run(MASKS, root, figures=False),
    ):
        metrics = read_json(folder / "metrics.json")
        metrics["provenance"] |= known
        write_json(folder / "metrics.json", metrics)
    runs.folder_of(LABELS.with_(seed=9), root).mkdir()
    return root


@pytest.fixture
def root(theirs, tmp_path):
    """The same runs in a folder of the test's own."""
    return shutil.copytree(theirs, tmp_path / "theirs")


@pytest.fixture(scope="module")
def exported(theirs):
    """What they export, as text cells, runs of labels first."""
    export(theirs / "sent.csv", theirs, label="ann")
    frame = pd.read_csv(theirs / "sent.csv", dtype=str, keep_default_na=False)
    (theirs / "sent.csv").unlink()
    return frame.sort_values("run", ascending=False, kind="stable", ignore_index=True)


@pytest.fixture
def sent(exported, tmp_path):
    """The exported cells, which a test may spoil, and a function that writes them."""
    frame = exported.copy()

    def write(**cells):
        """Cells of the third row are changed."""
        for name, value in cells.items():
            frame.loc[2, name] = value
        frame.to_csv(tmp_path / "spoilt.csv", index=False)
        return tmp_path / "spoilt.csv"

    return frame, write


def test_every_number_of_every_run_is_a_row_with_its_origin(root):
    frame = exchange.collect(root, label="ann")
    assert list(frame) == list(TYPES) and set(frame["run"]) == {run_id(LABELS), run_id(MASKS)}
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
    found = {tuple(row[:4]): row[4] for row in mine[[*exchange.KEY[1:], "value"]].itertuples(index=False)}
    assert {key: None if math.isnan(value) else value for key, value in found.items()} == expected
    about = mine.iloc[0]
    assert (about["overrides"], about["seed"], about["threads"], about["exported_by"]) == (
        '{"threshold": 0.9}',
        1,
        1,
        "ann",
    )
    assert (about["processor"], about["platform"], about["dirty"], about["data_digest"]) == (
        "P",
        "unknown",
        "unknown",
        "d",
    )
    masks = frame[(frame["run"] == run_id(MASKS)) & (frame["rule"] == "last") & (frame["weights"] == "ema")]
    assert sorted(masks.loc[masks["metric"] == "iou", "class"]) == list(range(6))
    assert not set(frame["metric"]) & {"confusion", "reliability", "cam_curve"}


def test_a_metric_of_several_numbers_a_class_is_told_by_name_and_class():
    metrics = {"over_activation": {"ratio": [0.5, None], "share": [0.25, 1]}, "cam_curve": [0.1, 0.2], "miou": 0.5}
    rows = list(exchange._flat(metrics))
    assert [row[:2] for row in rows] == [
        ("over_activation_ratio", 0), ("over_activation_ratio", 1), ("over_activation_share", 0),
        ("over_activation_share", 1), ("miou", ALL_CLASSES),
    ]  # fmt: skip
    assert math.isnan(rows[1][2]) and [row[2] for row in rows if row[2] == row[2]] == [0.5, 0.25, 1.0, 0.5]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_datasets_reads_what_is_exported(root, tmp_path, kind):
    path = tmp_path / f"results.{kind}"
    frame = export(path, root)
    loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == list(TYPES) and len(loaded) == len(frame)
    for name, kind_of in TYPES.items():
        if (kind, name) != ("csv", "source_digest"):  # digits alone: a reader of text may take them for a number
            words = {str: ("string", "large_string"), int: ("int64",), float: ("float64",)}[kind_of]
            assert loaded.features[name].dtype in words, name
    values = [math.nan if value is None else value for value in loaded["value"]]
    assert values == pytest.approx(frame["value"].tolist(), rel=1e-15, nan_ok=True)


def test_a_scale_may_be_chosen_and_an_empty_export_is_refused(root, tmp_path):
    assert set(export(tmp_path / "x.parquet", root, "tiny")["run"]) == {run_id(MASKS)}
    with pytest.raises(SettingError, match="no finished run at scale paper in .*; nothing to export"):
        export(tmp_path / "y.csv", root, "paper")
    assert not (tmp_path / "y.csv").exists()
    for path, options, message in (
        ("x.xlsx", {}, "must end in .csv or .parquet"),
        ("x.csv", {"scale": "huge"}, "unknown scale 'huge'"),
        ("x.csv", {"label": "ann smith"}, "label is 'ann smith'; it must be letters"),
    ):
        with pytest.raises(SettingError, match=message):
            export(tmp_path / path, root, **options)


def test_an_edited_run_is_named_and_nothing_is_written(root, tmp_path):
    (runs.folder_of(MASKS, root) / "metrics.json").write_text("{")
    with pytest.raises(CorruptFile, match="metrics.json is not valid JSON"):
        export(tmp_path / "x.csv", root)
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_an_import_keeps_every_number_and_its_origin_beside_the_local_runs(root, tmp_path, kind):
    path, mine = tmp_path / f"results.{kind}", tmp_path / "mine"
    frame = export(path, root, label="ann")
    local = write_run(LABELS, mine, error=0.9) / "metrics.json"
    before = local.read_bytes()
    done = bring_in(path, "ann-h200", mine)
    assert done.added == tuple(sorted({run_id(LABELS), run_id(MASKS)})) and done.repeated == done.unlike == ()
    assert done.also_here == (run_id(LABELS),) and local.read_bytes() == before
    assert (
        "1 are finished here too; nothing of yours was changed" in done.lines()[1] and run_id(LABELS) in done.lines()[1]
    )
    read = imported(mine)
    assert set(read["origin"]) == {"ann-h200"} and set(read["exported_by"]) == {"ann"}
    pd.testing.assert_frame_equal(read.drop(columns="origin"), frame, check_exact=True)
    assert set(exchange.collect(mine)["run"]) == {run_id(LABELS)}  # what came in does not go out as one's own


def test_a_second_import_adds_what_is_new_and_never_replaces(root, tmp_path):
    mine = tmp_path / "mine"
    bring_in(_file(root, tmp_path, "tiny"), "ann", mine)
    done = bring_in(_file(root, tmp_path), "ann", mine)
    assert (done.added, done.repeated) == ((run_id(LABELS),), (run_id(MASKS),))
    assert "1 were there already, with the same numbers: " + run_id(MASKS) in done.lines()
    stored = done.path.read_bytes()
    assert bring_in(_file(root, tmp_path), "ann", mine).added == () and done.path.read_bytes() == stored
    write_run(LABELS, root, error=0.5)
    with pytest.raises(DataError, match=f"run {run_id(LABELS)} has other numbers .*another --label"):
        bring_in(_file(root, tmp_path), "ann", mine)
    assert done.path.read_bytes() == stored
    assert bring_in(_file(root, tmp_path), "ben", mine).added == tuple(sorted({run_id(LABELS), run_id(MASKS)}))
    assert imported(mine).groupby("origin")["run"].nunique().to_dict() == {"ann": 2, "ben": 2}


def _file(root, tmp_path, scale=None):
    export(tmp_path / "again.csv", root, scale)
    return tmp_path / "again.csv"


def test_without_imports_the_frame_is_empty_and_has_its_columns(tmp_path):
    frame = imported(tmp_path)
    assert frame.empty and list(frame) == [*TYPES, "origin"] and frame["value"].dtype == "float64"


def test_a_run_of_another_recipe_is_named(sent, tmp_path):
    frame, write = sent
    frame["run"] = frame["run"].str.replace(run_id(MASKS), run_id(MASKS)[:-10] + "0123456789")
    done = bring_in(write(), "ann", tmp_path / "mine")
    assert done.unlike == (run_id(MASKS)[:-10] + "0123456789",) and "recipe that differs" in done.lines()[-1]
    frame["overrides"] = '{"setting_of_the_future": 1}'
    assert len(bring_in(write(), "ben", tmp_path / "mine").unlike) == 2


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"paper": "mine"}, r"paper must be one of calibratemix, .*; not so in row 3 \('mine'\)$"),
        ({"scale": "huge"}, "scale must be one of mini, paper, tiny; not so in row 3"),
        ({"rule": "first"}, "rule must be one of best, last, median20"),
        ({"weights": "raw"}, "weights must be one of ema, live"),
        ({"dirty": "perhaps"}, "dirty must be one of no, unknown, yes"),
        ({"method": "pcre"}, r"method of commatch must be one of .*row 3 \('pcre'\)"),
        ({"data": "voc"}, r"data of commatch must be one of .*row 3"),
        ({"labels": "many"}, r"labels must be a whole number; not so in row 3 \('many'\)"),
        ({"seed": "1.5"}, r"seed must be a whole number; not so in row 3 \('1.5'\)"),
        ({"seed": ""}, r"seed must be a whole number; not so in row 3 \(''\)"),
        ({"labels": "-1"}, r"labels must be at least 0; not so in row 3 \(-1\)"),
        ({"class": "-2"}, "class must be at least -1"),
        ({"value": "inf"}, r"value must be a finite number, or empty; not so in row 3 \('inf'\)"),
        ({"value": "good"}, "value must be a finite number"),
        ({"commit": ""}, r"commit must be text, 'unknown' where it is not known; not so in row 3"),
        ({"overrides": "[1]"}, "overrides must be a JSON object; not so in row 3"),
        ({"overrides": "{"}, "overrides must be a JSON object"),
        ({"run": "fixmatch-fashion.1@100-mini-xyz"}, "run must be method-data.seed@labels-scale-digest"),
        ({"seed": "2"}, "run must be method-data.seed@labels-scale-digest"),
        ({"metric": "accuracy"}, r"a row must be the only one with its run, rule, weights, metric, class; .*row 3"),
    ],
    ids=str,
)
def test_a_wrong_cell_is_refused_with_its_row_and_nothing_is_merged(sent, tmp_path, cells, message):
    frame, write = sent
    assert frame.loc[:2, "metric"].tolist() == ["error", "accuracy", "ece_15"]
    with pytest.raises(DataError, match=message):
        bring_in(write(**cells), "ann", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_many_wrong_rows_are_counted(sent, tmp_path):
    frame, write = sent
    frame["labels"] = "x"
    with pytest.raises(DataError, match=rf"row 5 \('x'\) and {len(frame) - 5} more"):
        bring_in(write(), "ann", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.csv", None, DataError, "does not exist; name a file that `python -m repro export` wrote"),
        ("a.txt", b"x", SettingError, "must end in .csv or .parquet"),
        ("a.csv", b"", DataError, "cannot be read as csv"),
        ("a.csv", b"\xff\xfe\x00", DataError, "cannot be read as csv"),
        ("a.parquet", b"not parquet", DataError, "cannot be read as parquet"),
        ("a.csv", b"run,paper\n", DataError, "lacks columns method, data, labels"),
        ("a.csv", ",".join(TYPES).encode() + b"\n", DataError, "has no rows"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        bring_in(tmp_path / name, "ann", tmp_path)


@pytest.mark.parametrize("label", ["", "../ann", "a/b", ".hidden", "a b", "ann\n"])
def test_a_label_that_is_no_file_name_is_refused(sent, tmp_path, label):
    with pytest.raises(SettingError, match="it must be letters, digits and ._-"):
        bring_in(sent[1](), label, tmp_path)


def test_further_columns_are_left_out(sent, tmp_path):
    frame, write = sent
    frame["mood"] = "good"
    bring_in(write(), "ann", tmp_path)
    assert "mood" not in imported(tmp_path)
