"""Tables: what is collected of a run, aggregation over seeds, measured beside published, and their text."""

import dataclasses
import hashlib
import json
import math
import statistics

import pandas as pd
import pytest
import torch

from figures import tables
from figures.tables import Summary, collect, compare, layout, notes, published_grid, show, summarise
from repro.files import CorruptFile, read_json, write_json
from repro.grid import CALIBRATED, MASKED, PAPERS, Column, Row, Table
from repro.measure.calibration import all_metrics
from repro.measure.metrics import METRICS
from repro.papers.published import MASKS, Published, Reference
from repro.runs import folder_of
from repro.settings import SettingError
from repro.tasks import monitors
from tests.fake_mask_runs import measured, write_mask_run
from tests.fake_runs import write_run

CIFAR, FASHION = Column("cifar10", 40), Column("fashion", 100)
USB, OWN = Reference("USB", "T1"), Reference("ComMatch", "Table 2")
MEASURED = "measured: Fashion-MNIST part, 100 labels, mini scale, last evaluation, EMA weights"


def printed(method, value, std=None, paper="USB", table="T1", dataset="CIFAR-10", split="40", backbone="WRN-28-2"):
    return Published(paper, table, dataset, split, backbone, method, "best", "error_rate", value, std, "readme")


ROWS = (
    Row("Supervised", "supervised", published=("Supervised",)),
    Row("FixMatch", "fixmatch", published=("FixMatch",)),
)
NUMBERS = (printed("FixMatch", 8.33, 1.41),)
TABLE = Table("t", "Test table", "commatch", ROWS, (CIFAR,), (FASHION,), NUMBERS, (USB, OWN))

SCENES, PASCAL = Column("scenes", 20, MASKS), Column("voc", 92, MASKS)


def masked(value, dataset="Pascal VOC 2012 (classic)", split="1/16 (92)", backbone="ResNet-101"):
    return Published(
        "UniMatch", "README", dataset, split, backbone, "UniMatch", "crop 321", "mIoU", value, None, "readme"
    )


MASK_ROWS = (Row("UniMatch", "unimatch", published=("UniMatch",)), Row("CSL", "csl"))
OF_MASKS = Table("m", "Masks", "csl", MASK_ROWS, (PASCAL,), (SCENES,), (masked(75.2),),
                 (Reference("UniMatch", "README", "miou"),), MASKED)  # fmt: skip


def write_cells(table, errors, root, scale="mini", **more):
    """Write runs of the table's first column with these errors, by row label, one a seed."""
    for row in table.rows:
        for seed, error in enumerate(errors.get(row.label, ())):
            write_run(table.cell(row, table.columns_at(scale)[0], scale, [seed])[0], root, error=error, **more)


def block(table, root, scale="mini", seeds=(0, 1), rule="last"):
    return layout(table, compare(table, scale, seeds, root, rule), table.columns_at(scale)[0])


# Collecting


def test_collect_lists_every_scalar_of_a_run_with_its_origin(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[1].with_(threshold=0.9)
    folder = write_run(experiment, tmp_path, error=0.25, live={"error": 0.5}, best={"error": 0.2})
    saved = read_json(folder / "metrics.json")
    saved["provenance"] |= {"processor": "P", "platform": "Linux", "source_digest": "0123"}
    del saved["provenance"]["precision"]
    write_json(folder / "metrics.json", saved)
    frame = collect([experiment], tmp_path)
    assert list(frame.columns) == list(tables.COLUMNS) and set(frame["run"]) == {folder.name}
    by = frame.set_index(["rule", "weights", "metric"])["value"]
    assert by["last", "ema", "error"] == 0.25 and by["median20", "live", "error"] == 0.5
    assert by["best", "ema", "error"] == 0.2 and by["last", "ema", "ece_10_left"] == 0.11
    assert by["last", "live", "positive_coverage"] == 0.25 and math.isnan(by["last", "live", "positive_ece"])
    assert "per_class_accuracy" not in set(frame["metric"]) and set(frame["metric"]) >= set(CALIBRATED)
    first = frame.iloc[0]
    assert (first.method, first.data, first.labels, first.seed, first.scale) == ("fixmatch", "fashion", 100, 0, "mini")
    assert (first.commit, first.dirty, first.train_seconds, first.threads) == ("c0ffee", False, 12.0, "1")
    assert (first.processor, first.platform, first.source_digest) == ("P", "Linux", "0123") and pd.isna(first.precision)
    assert json.loads(first.overrides) == {"threshold": 0.9}
    packages = json.dumps(saved["provenance"]["packages"], sort_keys=True)
    for kept, whole in ((first.packages, packages), (first.data_digest, saved["data_digest"])):
        assert kept == "d" + hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
    selected = frame.groupby("rule")["selected_on_test"].all()
    assert selected.to_dict() == {"best": True, "last": False, "median20": False}


def test_the_scalars_of_a_mask_run_are_collected_and_its_lists_are_not(tmp_path):
    experiment = OF_MASKS.experiments("mini", (0,))[1]
    write_mask_run(experiment, tmp_path, figures=False, miou=0.6, boundary_f=None)
    frame = collect([experiment], tmp_path)
    by = frame.set_index(["rule", "weights", "metric"])["value"]
    assert by["last", "ema", "miou"] == 0.6 and by["last", "live", "miou"] != 0.6
    assert math.isnan(by["last", "ema", "boundary_f"]) and 0 < by["last", "live", "pixels_coverage"] <= 1
    assert not set(frame["metric"]) & {"iou", "confusion", "reliability", "pixels_ranges"}


def test_a_missing_run_is_listed_and_a_shared_one_once(tmp_path):
    done, missing = TABLE.experiments("mini", (0,))
    write_run(done, tmp_path)
    frame = collect([done, missing, done], tmp_path)
    assert len(frame[frame["run"] == folder_of(done).name]) == len(frame) - 1
    (row,) = frame[frame["status"] == "not run"].to_dict("records")
    assert row["run"] == folder_of(missing).name and row["method"] == "fixmatch" and math.isnan(row["value"])
    assert list(collect([], tmp_path).columns) == list(tables.COLUMNS)


def test_an_edited_run_is_an_error_that_names_it(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[0]
    path = write_run(experiment, tmp_path) / "metrics.json"
    write_json(path, read_json(path) | {"run": "another"})
    with pytest.raises(CorruptFile, match="metrics.json.*does not belong to its folder"):
        collect([experiment], tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptFile, match="not valid JSON"):
        collect([experiment], tmp_path)


def test_names_agree_with_what_runs_store():
    from repro.tasks.labels import temperature_scaled
    from repro.tasks.tags import cam_report, protocol_scores

    probs, labels = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1])
    arrays = {f"{part}_{kind}": value for part in ("test", "holdout")
              for kind, value in (("logits", probs.log()), ("labels", labels))}  # fmt: skip
    stored = all_metrics(probs, labels) | temperature_scaled(arrays)
    of_masks = measured(torch.full((1, 6, 4, 4), 1 / 6), torch.zeros(1, 4, 4, dtype=torch.uint8))
    of_tags = cam_report(torch.ones(100, 6, 6, dtype=torch.int64), 0.5) | protocol_scores({})
    beside = {"cam_miou_train", "cam_above_chance", "potts_energy", "potts_energy_soft", "proposal_accuracy",
              "proposal_miou"}  # fmt: skip
    assert set(METRICS) <= set(stored) | set(of_masks) | set(of_tags) | beside
    assert set(CALIBRATED) <= set(METRICS) & set(stored) and set(MASKED) <= set(METRICS) & set(of_masks)
    assert tuple(tables.RULES) == monitors.REPORTING


# Aggregating


def test_mean_and_sample_deviation_by_hand():
    assert summarise([0.1, 0.2, 0.6]) == Summary(pytest.approx(0.3), pytest.approx(0.07**0.5), 3)
    assert summarise([0.1]) == Summary(0.1, None, 1)
    assert summarise([]) == summarise([math.nan]) == Summary(None, None, 0)
    assert summarise([0.5, math.nan, 0.5]) == Summary(0.5, 0.0, 2)


@pytest.mark.parametrize(
    ("summary", "metric", "planned", "finished", "text"),
    [
        (Summary(0.12345, 0.00567, 3), "error", 3, 3, "12.35 ± 0.57 (n = 3)"),
        (Summary(0.12, None, 1), "error", 1, 1, "12.00 (n = 1)"),
        (Summary(0.12, None, 1), "error", 5, 1, "12.00 (n = 1 of 5)"),
        (Summary(1.5, 0.25, 2), "nll", 2, 2, "1.500 ± 0.250 (n = 2)"),
        (Summary(None, None, 0), "error", 2, 0, "not run"),
        (Summary(None, None, 0), "error", 2, 2, "undefined"),
    ],
)
def test_cells_have_value_spread_and_n(summary, metric, planned, finished, text):
    assert show(summary, METRICS[metric], planned, finished) == text


def test_compare_aggregates_over_seeds_and_counts_what_is_missing(tmp_path):
    errors = {"FixMatch": [0.10, 0.14, 0.12], "Supervised": [0.3]}
    write_cells(TABLE, errors, tmp_path, live={"error": 0.4}, best={"error": 0.05})
    frame = compare(TABLE, "mini", (0, 1, 2), tmp_path).set_index(["row", "metric"])
    fixmatch, supervised = frame.loc[("FixMatch", "error")], frame.loc[("Supervised", "error")]
    deviation = statistics.stdev(errors["FixMatch"])
    assert fixmatch["summary"] == Summary(pytest.approx(0.12), pytest.approx(deviation), 3)
    assert (fixmatch["finished"], fixmatch["planned"], supervised["planned"]) == (3, 3, 3)
    assert supervised["summary"] == Summary(0.3, None, 1) and len(frame) == 2 * len(CALIBRATED)
    for options, mean in (({"weights": "live"}, 0.4), ({"rule": "best"}, 0.05)):
        other = compare(TABLE, "mini", (0,), tmp_path, **options).set_index(["row", "metric"])
        assert other.loc[("FixMatch", "error"), "summary"].mean == mean
    for options in ({"rule": "first"}, {"weights": "student"}):
        with pytest.raises(SettingError, match="unknown"):
            compare(TABLE, "mini", (0,), tmp_path, **options)


# Laying out


def test_a_mini_run_has_its_own_column_and_fills_no_published_cell(tmp_path):
    write_cells(TABLE, {"FixMatch": [0.2, 0.3]}, tmp_path)
    laid = block(TABLE, tmp_path)
    assert laid.loc["FixMatch", (MEASURED, "error (%)")] == "25.00 ± 7.07 (n = 2)"
    assert laid.loc["FixMatch", (MEASURED, "ECE (%), 15 bins (lo, hi]")] == "10.00 ± 0.00 (n = 2)"
    assert laid.loc["Supervised", (MEASURED, "NLL (nats)")] == "not run"
    published = "published: CIFAR-10, 40 labels, error (%)"
    assert laid[published, "USB, T1"].tolist() == ["not available", "8.33 ± 1.41"]
    assert laid[published, "ComMatch, Table 2"].tolist() == ["not available"] * 2
    assert not any("minus" in str(name) for name in laid.columns)
    assert "ours is at mini scale" in " ".join(notes(TABLE, FASHION, "mini"))
    heads = [second for first, second in laid.columns if first.startswith("measured")]
    assert [head for head in heads if "ECE" in head] == ["ECE (%), 15 bins (lo, hi]", "ECE (%), 10 bins [lo, hi)"]
    assert "selected on test" in block(TABLE, tmp_path, seeds=(0,), rule="best").columns[0][0]
    with pytest.raises(SettingError, match="unknown measured column 'CIFAR-10, 40 labels'.*Fashion-MNIST part, 100"):
        layout(TABLE, compare(TABLE, "mini", (0,), tmp_path), CIFAR)


def test_a_paper_run_shows_its_difference_in_points(tmp_path):
    write_cells(TABLE, {"FixMatch": [0.0900, 0.0866]}, tmp_path, scale="paper")
    laid = block(TABLE, tmp_path, "paper")
    name = ("published: CIFAR-10, 40 labels, error (%)", "measured minus USB, T1 (points)")
    assert laid[name].tolist() == ["", "+0.50"]
    assert not any("minus ComMatch" in second for _, second in laid.columns)


def test_numbers_of_other_data_keep_their_own_header_and_no_difference(tmp_path):
    svhn, numbers = Column("svhn", 40), (printed("FixMatch", 2.08, dataset="SVHN"),)
    table = dataclasses.replace(TABLE, columns=(svhn,), published=numbers, references=(USB,))
    write_cells(table, {"FixMatch": [0.03]}, tmp_path, scale="paper")
    laid = block(table, tmp_path, "paper", (0,))
    assert list(laid.columns[len(CALIBRATED) :]) == [("published: SVHN with extra, 40 labels, error (%)", "USB, T1")]
    assert any("published on SVHN with extra" in line for line in notes(table, svhn, "paper"))


def test_scenes_stand_beside_pascal_without_a_difference_which_a_paper_run_has(tmp_path):
    for seed, miou in enumerate((0.5, 0.6)):
        write_mask_run(OF_MASKS.cell(MASK_ROWS[1], SCENES, "mini", [seed])[0], tmp_path, figures=False, miou=miou)
    laid = block(OF_MASKS, tmp_path)
    here = "measured: Fashion scenes, 20 masks, mini scale, last evaluation, EMA weights"
    assert laid.loc["CSL", (here, "mIoU (%)")] == "55.00 ± 7.07 (n = 2)"
    published = laid["published: Pascal VOC 2012, 92 masks, mIoU (%)", "UniMatch, README"]
    assert published.to_dict() == {"UniMatch": "75.20", "CSL": "not available"}
    assert not any("minus" in name for _, name in laid.columns)
    write_mask_run(OF_MASKS.cell(MASK_ROWS[0], PASCAL, "paper", [0])[0], tmp_path, figures=False, miou=0.76)
    laid = block(OF_MASKS, tmp_path, "paper", (0,))
    name = ("published: Pascal VOC 2012, 92 masks, mIoU (%)", "measured minus UniMatch, README (points)")
    assert laid[name].tolist() == ["+0.80", ""]
    (note,) = notes(OF_MASKS, PASCAL, "paper")
    assert note.startswith("UniMatch, README: ResNet-101 (deep stem in UniMatch's released code); crop 321; read from")


SVHN = printed("FixMatch", 2.0, dataset="SVHN")
COCO = masked(31.9, "COCO", "1/512 (232)", "Xception-65")


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (SVHN, {"data": "svhn"}, "published on SVHN with extra, 40 labels"),
        (SVHN, {"data": "svhn_extra"}, ""),
        (dataclasses.replace(SVHN, paper="FixMatch"), {"data": "svhn"}, "published on SVHN (which parts"),
        (printed("FixMatch", 2.0, backbone="WRN-28-8"), {}, "published with WRN-28-8, ours is wrn-28-2"),
        (printed("FixMatch", 2.0, split="250"), {}, "published on CIFAR-10, 250 labels"),
        (printed("FixMatch", None), {}, "not available"),
        (printed("FixMatch", 2.0, backbone="WRN-28-2 (per committed config)"), {}, ""),
        (masked(75.2), {}, ""),
        (masked(75.2), {"labels": 183}, "published on Pascal VOC 2012, 92 masks"),
        (masked(81.2, split="Full (1464)"), {"labels": 1464}, ""),
        (masked(75.2, backbone="ResNet-50"), {"network": "resnet50s"}, ""),
        (masked(75.2), {"network": "resnet101"}, "published with ResNet-101 (deep stem in UniMatch's"),
        (COCO, {"data": "coco2017", "labels": 232}, "published with Xc"),
        (masked(76.6, "Cityscapes", "1/16 (186)"), {"data": "cityscapes", "labels": 186}, ""),
        (masked(76.6, "Cityscapes", "1/16 (186)"), {"data": "voc", "labels": 183}, "published on Cityscapes, 186"),
    ],
)
def test_only_like_is_compared_with_like(number, changes, reason):
    table, row = (OF_MASKS, 0) if number.metric == "mIoU" else (TABLE, 1)
    found = tables.incomparable(number, table.experiments("paper", (0,))[row].with_(**changes))
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_published_grid_shows_all_columns_of_one_source_and_accuracies_as_errors():
    table = dataclasses.replace(TABLE, columns=(CIFAR, Column("cifar10", 250)))
    assert published_grid(table, USB).to_dict("list") == {
        "CIFAR-10, 40 labels": ["not available", "8.33 ± 1.41"],
        "CIFAR-10, 250 labels": ["not available"] * 2,
    }
    accuracy = dataclasses.replace(printed("FixMatch", 91.67, 1.41), metric="accuracy")
    assert (
        published_grid(dataclasses.replace(TABLE, published=(accuracy,)), USB).loc["FixMatch"].item() == "8.33 ± 1.41"
    )


def test_markdown_is_a_table_of_equal_rows_with_pipes_escaped_and_groups_named_once():
    frame = pd.DataFrame({"b|c": ["1", "2"], "d": ["x", "y|z"]}, index=pd.Index(["r", "s"], name="n"))
    assert tables.to_markdown(frame) == ("| n | b\\|c | d |\n| --- | --- | --- |\n| r | 1 | x |\n| s | 2 | y\\|z |\n")
    frame = pd.DataFrame([["1", "2", "3"]], index=["r"])
    frame.columns = pd.MultiIndex.from_tuples([("a", "x"), ("a", "y"), ("b", "x")])
    assert tables.to_markdown(frame) == (
        "|  | a |  | b |\n| --- | --- | --- | --- |\n|  | **x** | **y** | **x** |\n| r | 1 | 2 | 3 |\n"
    )


# Ablations

PASSES = PAPERS["commatch"].ablations["passes"]


def write_passes(root, errors):
    """Runs of the ablation of dropout passes. errors: by number of passes, then seed."""
    for row in PASSES.rows:
        for seed, error in errors.get(row.overrides["passes"], {}).items():
            write_run(PASSES.cell(row, PASSES.small[0], "mini", (seed,))[0], root, error=error)


def test_an_ablations_rows_are_compared_with_its_default_on_the_seeds_that_both_have(tmp_path):
    write_passes(tmp_path, {10: {0: 0.20, 1: 0.40, 2: 0.30}, 2: {0: 0.21}, 5: {0: 0.19, 2: 0.32, 3: 0.9}})
    frame = compare(PASSES, "mini", range(4), tmp_path)
    error = frame[frame["metric"] == "error"].set_index("row")
    assert error.loc["T = 10 (default)", "n"] == 3 and error.loc["T = 10 (default)", "less"].n == 0
    assert error.loc["T = 2", "less"] == Summary(pytest.approx(0.01), None, 1)
    assert error.loc["T = 5", "less"] == Summary(pytest.approx(0.005), pytest.approx(0.015 * math.sqrt(2)), 2)
    laid = layout(PASSES, frame, PASSES.small[0])
    (less,) = [column for column in laid if "less the default's, same seeds (points)" in column[1]]
    assert laid[less].to_dict() == {
        "T = 2": "+1.00 (n = 1)", "T = 5": "+0.50 ± 2.12 (n = 2)", "T = 10 (default)": "", "T = 20": "not run",
    }  # fmt: skip


def test_seeds_that_rows_share_leave_out_rows_that_did_not_run(tmp_path):
    write_passes(tmp_path, {10: {0: 0.2, 1: 0.4}, 2: {1: 0.2, 2: 0.3}})
    assert tables.shared_seeds(PASSES, PASSES.small[0], "mini", range(5), tmp_path) == (1,)
    write_passes(tmp_path, {20: {3: 0.2}})
    assert tables.shared_seeds(PASSES, PASSES.small[0], "mini", (0, 3), tmp_path) == ()
    assert tables.shared_seeds(PASSES, PASSES.small[0], "mini", (7, 8), tmp_path) == (7, 8), "no row has run"


@pytest.mark.parametrize("paper", PAPERS.values(), ids=PAPERS)
def test_every_row_of_an_ablation_has_a_default_and_no_row_of_a_table_of_methods(paper):
    assert all(tables.defaults(table, table.columns[0], "paper") == {} for table in paper.tables.values())
    for table in paper.ablations.values():
        assert set(tables.defaults(table, table.small[0], "mini")) == {row.label for row in table.rows}
