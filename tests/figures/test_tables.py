import dataclasses
import hashlib
import json
import math
import statistics
from html.parser import HTMLParser

import pandas as pd
import pytest

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
USB, OURS = Reference("USB", "T1"), Reference("ComMatch", "Table 2")


def printed(method, value, std=None, paper="USB", table="T1", dataset="CIFAR-10", split="40", backbone="WRN-28-2"):
    return Published(paper, table, dataset, split, backbone, method, "best", "error_rate", value, std, "readme")


TABLE = Table(
    "t",
    "Test table",
    "commatch",
    (
        Row("Supervised", "supervised", published=("Supervised",)),
        Row("FixMatch", "fixmatch", published=("FixMatch",)),
    ),
    (CIFAR,),
    (FASHION,),
    (printed("FixMatch", 8.33, 1.41),),
    (USB, OURS),
)


def cells(table, errors, root, scale="mini", **more):
    """Write runs of the table's first column with these errors, by row label, one a seed."""
    column = table.columns_at(scale)[0]
    for row in table.rows:
        for seed, error in enumerate(errors.get(row.label, ())):
            write_run(table.cell(row, column, scale, [seed])[0], root, error=error, **more)
    return column


# Collecting


def test_collect_lists_every_scalar_of_a_run_with_its_origin(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[1]
    folder = write_run(experiment, tmp_path, error=0.25, live={"error": 0.5}, best={"error": 0.2})
    frame = collect([experiment], tmp_path)
    assert list(frame.columns) == list(tables.COLUMNS) and set(frame["run"]) == {folder.name}
    by = frame.set_index(["rule", "weights", "metric"])["value"]
    assert by["last", "ema", "error"] == 0.25 and by["median20", "live", "error"] == 0.5
    assert by["best", "ema", "error"] == 0.2 and by["last", "ema", "ece_10_left"] == 0.11
    assert by["last", "live", "positive_coverage"] == 0.25 and math.isnan(by["last", "live", "positive_ece"])
    assert "per_class_accuracy" not in set(frame["metric"]) and "selected_on_test" not in set(frame["metric"])
    assert set(frame["metric"]) >= set(CALIBRATED)
    first = frame.iloc[0]
    assert (first.method, first.data, first.labels, first.seed, first.scale) == (
        "fixmatch",
        "fashion",
        100,
        0,
        "mini",
    )
    assert (first.commit, first.dirty, first.torch, first.train_seconds) == ("c0ffee", False, "1.0", 12.0)
    assert (
        frame.groupby("rule")["selected_on_test"].all() == pd.Series({"best": True, "last": False, "median20": False})
    ).all()


def test_collect_has_the_facts_that_decide_whether_numbers_must_agree(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[1]
    path = write_run(experiment, tmp_path) / "metrics.json"
    saved = read_json(path)
    saved["provenance"] |= {"processor": "P", "instructions": "AVX2", "platform": "Linux", "source_digest": "0123"}
    del saved["provenance"]["precision"]
    write_json(path, saved)
    first = collect([experiment], tmp_path).iloc[0]
    assert (first.device, first.processor, first.instructions, first.platform) == ("cpu", "P", "AVX2", "Linux")
    assert (first.threads, first.torch, first.source_digest) == ("1", "1.0", "0123") and pd.isna(first.precision)
    packages = json.dumps(saved["provenance"]["packages"], sort_keys=True)
    for kept, whole in ((first.packages, packages), (first.data_digest, saved["data_digest"])):
        assert kept == "d" + hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()


def test_a_missing_run_is_listed_and_a_shared_one_once(tmp_path):
    done, missing = TABLE.experiments("mini", (0,))
    write_run(done, tmp_path)
    frame = collect([done, missing, done], tmp_path)
    assert len(frame[frame["run"] == folder_of(done).name]) == len(frame) - 1
    (row,) = frame[frame["status"] == "not run"].to_dict("records")
    assert row["run"] == folder_of(missing).name and row["method"] == "fixmatch" and math.isnan(row["value"])
    assert list(collect([], tmp_path).columns) == list(tables.COLUMNS)


def test_overrides_are_readable_in_the_frame(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[1].with_(threshold=0.9)
    assert json.loads(collect([experiment], tmp_path).iloc[0]["overrides"]) == {"threshold": 0.9}


def test_an_edited_run_is_an_error_that_names_it(tmp_path):
    experiment = TABLE.experiments("mini", (0,))[0]
    path = write_run(experiment, tmp_path) / "metrics.json"
    write_json(path, read_json(path) | {"run": "another"})
    with pytest.raises(CorruptFile, match="metrics.json.*does not belong to its folder"):
        collect([experiment], tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptFile, match="not valid JSON"):
        collect([experiment], tmp_path)


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
def test_cells_say_value_spread_and_n(summary, metric, planned, finished, text):
    assert show(summary, METRICS[metric], planned, finished) == text


def test_compare_aggregates_over_seeds_and_counts_what_is_missing(tmp_path):
    errors = {"FixMatch": [0.10, 0.14, 0.12], "Supervised": [0.3]}
    cells(TABLE, errors, tmp_path)
    frame = compare(TABLE, "mini", (0, 1, 2), tmp_path).set_index(["row", "metric"])
    fixmatch, supervised = frame.loc[("FixMatch", "error")], frame.loc[("Supervised", "error")]
    assert fixmatch["mean"] == pytest.approx(0.12) and fixmatch["sd"] == pytest.approx(
        statistics.stdev(errors["FixMatch"])
    )
    assert (fixmatch["n"], fixmatch["finished"], fixmatch["planned"]) == (3, 3, 3)
    assert (supervised["n"], supervised["planned"]) == (1, 3) and math.isnan(supervised["sd"])
    assert len(frame) == 2 * len(CALIBRATED)


def test_rule_and_weights_choose_the_number_and_unknown_ones_are_refused(tmp_path):
    cells(TABLE, {"FixMatch": [0.2]}, tmp_path, live={"error": 0.4}, best={"error": 0.1})

    def error(**options):
        return compare(TABLE, "mini", (0,), tmp_path, **options).set_index(["row", "metric"])["mean"][
            "FixMatch", "error"
        ]

    assert (error(), error(rule="best"), error(weights="live")) == (0.2, 0.1, 0.4)
    with pytest.raises(SettingError, match="unknown reporting rule 'median'.*did you mean 'median20'"):
        error(rule="median")
    with pytest.raises(SettingError, match="unknown kind of weights 'student'; known: ema, live"):
        error(weights="student")


def test_names_agree_with_what_runs_store():
    import torch

    from repro.tasks.labels import temperature_scaled
    from repro.tasks.tags import cam_report, protocol_scores

    probs, labels = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), torch.tensor([0, 1, 1])
    arrays = {
        "test_logits": probs.log(),
        "test_labels": labels,
        "holdout_logits": probs.log(),
        "holdout_labels": labels,
    }
    stored = all_metrics(probs, labels) | temperature_scaled(arrays)
    of_masks = measured(torch.full((1, 6, 4, 4), 1 / 6), torch.zeros(1, 4, 4, dtype=torch.uint8))
    of_tags = cam_report(torch.ones(100, 6, 6, dtype=torch.int64), 0.5) | protocol_scores({})
    beside = {"cam_miou_train", "cam_above_chance", "potts_energy", "potts_energy_soft", "proposal_accuracy",
              "proposal_miou"}  # fmt: skip
    assert set(METRICS) <= set(stored) | set(of_masks) | set(of_tags) | beside
    assert set(CALIBRATED) <= set(METRICS) & set(stored) and set(MASKED) <= set(METRICS) & set(of_masks)
    assert tuple(tables.RULES) == monitors.REPORTING


# Laying out


def block(table, root, scale="mini", seeds=(0, 1), rule="last"):
    return layout(table, compare(table, scale, seeds, root, rule), table.columns_at(scale)[0])


def test_a_mini_run_has_its_own_column_and_fills_no_published_cell(tmp_path):
    cells(TABLE, {"FixMatch": [0.2, 0.3]}, tmp_path)
    shown = block(TABLE, tmp_path)
    measured = "measured: Fashion-MNIST part, 100 labels, mini scale, last evaluation, EMA weights"
    assert shown.loc["FixMatch", (measured, "error (%)")] == "25.00 ± 7.07 (n = 2)"
    assert shown.loc["FixMatch", (measured, "ECE (%), 15 bins (lo, hi]")] == "10.00 ± 0.00 (n = 2)"
    assert shown.loc["Supervised", (measured, "NLL (nats)")] == "not run"
    assert shown["published: CIFAR-10, 40 labels, error (%)", "USB, T1"].tolist() == [
        "not available",
        "8.33 ± 1.41",
    ]
    assert shown["published: CIFAR-10, 40 labels, error (%)", "ComMatch, Table 2"].tolist() == ["not available"] * 2
    assert not any("minus" in str(name) for name in shown.columns)
    assert "ours is at mini scale" in " ".join(notes(TABLE, FASHION, "mini"))


def test_a_paper_run_shows_its_difference_in_points(tmp_path):
    cells(TABLE, {"FixMatch": [0.0900, 0.0866]}, tmp_path, scale="paper")
    shown = block(TABLE, tmp_path, "paper")
    name = ("published: CIFAR-10, 40 labels, error (%)", "measured minus USB, T1 (points)")
    assert shown[name].tolist() == ["", "+0.50"]
    assert not any("minus ComMatch" in second for _, second in shown.columns)


SVHN = printed("FixMatch", 2.0, dataset="SVHN")


@pytest.mark.parametrize(
    ("number", "data", "reason"),
    [
        (SVHN, "svhn", "published on SVHN with extra, 40 labels"),
        (SVHN, "svhn_extra", ""),
        (dataclasses.replace(SVHN, paper="FixMatch"), "svhn", "published on SVHN (which parts"),
        (
            printed("FixMatch", 2.0, backbone="WRN-28-8"),
            "cifar10",
            "published with WRN-28-8, ours is wrn-28-2",
        ),
        (printed("FixMatch", 2.0, split="250"), "cifar10", "published on CIFAR-10, 250 labels"),
        (printed("FixMatch", None), "cifar10", "not available"),
        (printed("FixMatch", 2.0, backbone="WRN-28-2 (per committed config)"), "cifar10", ""),
    ],
)
def test_only_like_is_compared_with_like(number, data, reason):
    experiment = TABLE.experiments("paper", (0,))[1].with_(data=data)
    assert tables.incomparable(number, experiment).startswith(reason)
    assert bool(tables.incomparable(number, experiment)) == bool(reason)


def test_numbers_of_other_data_keep_their_own_header_and_no_difference(tmp_path):
    svhn = Column("svhn", 40)
    numbers = (printed("FixMatch", 2.08, dataset="SVHN"),)
    table = dataclasses.replace(TABLE, columns=(svhn,), published=numbers, references=(USB,))
    cells(table, {"FixMatch": [0.03]}, tmp_path, scale="paper")
    shown = block(table, tmp_path, "paper", (0,))
    assert list(shown.columns[len(CALIBRATED) :]) == [("published: SVHN with extra, 40 labels, error (%)", "USB, T1")]
    assert any("published on SVHN with extra" in line for line in notes(table, svhn, "paper"))


def test_the_rule_best_is_marked_as_selected_on_test(tmp_path):
    cells(TABLE, {"FixMatch": [0.2]}, tmp_path)
    assert "selected on test" in block(TABLE, tmp_path, seeds=(0,), rule="best").columns[0][0]


def test_an_unmeasured_column_is_refused(tmp_path):
    frame = compare(TABLE, "mini", (0,), tmp_path)
    with pytest.raises(SettingError, match="unknown measured column 'CIFAR-10, 40 labels'.*Fashion-MNIST part, 100"):
        layout(TABLE, frame, CIFAR)


def test_every_measured_column_names_its_bins_and_error_never_stands_alone(tmp_path):
    heads = [second for first, second in block(TABLE, tmp_path).columns if first.startswith("measured")]
    assert [head for head in heads if "ECE" in head] == [
        "ECE (%), 15 bins (lo, hi]",
        "ECE (%), 10 bins [lo, hi)",
    ]
    assert len(heads) == 5


def test_published_grid_shows_all_columns_of_one_source():
    table = dataclasses.replace(TABLE, columns=(CIFAR, Column("cifar10", 250)))
    grid = published_grid(table, USB)
    assert grid.to_dict("list") == {
        "CIFAR-10, 40 labels": ["not available", "8.33 ± 1.41"],
        "CIFAR-10, 250 labels": ["not available"] * 2,
    }


def test_a_printed_accuracy_is_shown_as_the_error_that_the_column_promises():
    accuracy = dataclasses.replace(printed("FixMatch", 91.67, 1.41), metric="accuracy")
    grid = published_grid(dataclasses.replace(TABLE, published=(accuracy,)), USB)
    assert grid.loc["FixMatch"].item() == "8.33 ± 1.41"


# Masks

SCENES, PASCAL = Column("scenes", 20, MASKS), Column("voc", 92, MASKS)
README = Reference("UniMatch", "README", "miou")


def masked(value, dataset="Pascal VOC 2012 (classic)", split="1/16 (92)", backbone="ResNet-101", table="README"):
    return Published("UniMatch", table, dataset, split, backbone, "UniMatch", "crop 321", "mIoU", value, None, "readme")


MASKS = Table(
    "m",
    "Masks",
    "csl",
    (Row("UniMatch", "unimatch", published=("UniMatch",)), Row("CSL", "csl")),
    (PASCAL,),
    (SCENES,),
    (masked(75.2),),
    (README,),
    MASKED,
)


def test_the_scalars_of_a_mask_run_are_collected_and_its_lists_are_not(tmp_path):
    experiment = MASKS.experiments("mini", (0,))[1]
    write_mask_run(experiment, tmp_path, figures=False, miou=0.6, boundary_f=None)
    frame = collect([experiment], tmp_path)
    by = frame.set_index(["rule", "weights", "metric"])["value"]
    assert by["last", "ema", "miou"] == 0.6 and by["last", "live", "miou"] != 0.6
    assert math.isnan(by["last", "ema", "boundary_f"]) and 0 < by["last", "live", "pixels_coverage"] <= 1
    assert not set(frame["metric"]) & {"iou", "confusion", "reliability", "pixels_ranges"}
    assert set(frame["metric"]) >= set(MASKED)


def test_scenes_stand_beside_pascal_without_a_difference(tmp_path):
    for seed, miou in enumerate((0.5, 0.6)):
        write_mask_run(MASKS.cell(MASKS.rows[1], SCENES, "mini", [seed])[0], tmp_path, figures=False, miou=miou)
    shown = block(MASKS, tmp_path)
    ours = "measured: Fashion scenes, 20 masks, mini scale, last evaluation, EMA weights"
    assert shown.loc["CSL", (ours, "mIoU (%)")] == "55.00 ± 7.07 (n = 2)"
    assert shown.loc["UniMatch", (ours, "boundary F-score (%)")] == "not run"
    published = shown["published: Pascal VOC 2012, 92 masks, mIoU (%)", "UniMatch, README"]
    assert published.to_dict() == {"UniMatch": "75.20", "CSL": "not available"}
    assert not any("minus" in name for _, name in shown.columns)


def test_a_paper_run_from_masks_shows_by_how_much_its_miou_is_higher(tmp_path):
    write_mask_run(MASKS.cell(MASKS.rows[0], PASCAL, "paper", [0])[0], tmp_path, figures=False, miou=0.76)
    shown = block(MASKS, tmp_path, "paper", (0,))
    name = ("published: Pascal VOC 2012, 92 masks, mIoU (%)", "measured minus UniMatch, README (points)")
    assert shown[name].tolist() == ["+0.80", ""]
    (said,) = notes(MASKS, PASCAL, "paper")
    assert said.startswith("UniMatch, README: ResNet-101 (deep stem in UniMatch's released code); crop 321; read from")


@pytest.mark.parametrize(
    ("number", "changes", "reason"),
    [
        (masked(75.2), {}, ""),
        (masked(75.2), {"labels": 183}, "published on Pascal VOC 2012, 92 masks"),
        (masked(81.2, split="Full (1464)"), {"labels": 1464}, ""),
        (masked(75.2, backbone="ResNet-50"), {"network": "resnet50s"}, ""),
        (masked(75.2), {"network": "resnet101"}, "published with ResNet-101 (deep stem in UniMatch's"),
        (masked(31.9, "COCO", "1/512 (232)", "Xception-65"), {"data": "coco2017", "labels": 232}, "published with Xc"),
        (masked(76.6, "Cityscapes", "1/16 (186)"), {"data": "cityscapes", "labels": 186}, ""),
        (masked(76.6, "Cityscapes", "1/16 (186)"), {"data": "voc", "labels": 183}, "published on Cityscapes, 186"),
    ],
)
def test_masks_are_compared_by_data_number_and_network(number, changes, reason):
    experiment = MASKS.experiments("paper", (0,))[0].with_(**changes)
    assert tables.incomparable(number, experiment).startswith(reason)
    assert bool(tables.incomparable(number, experiment)) == bool(reason)


# Printing


def test_markdown_is_a_table_of_equal_rows_with_pipes_escaped():
    frame = pd.DataFrame({"b|c": ["1", "2"], "d": ["x", "y|z"]}, index=pd.Index(["r", "s"], name="n"))
    assert tables.to_markdown(frame) == ("| n | b\\|c | d |\n| --- | --- | --- |\n| r | 1 | x |\n| s | 2 | y\\|z |\n")


def test_markdown_names_a_group_of_columns_once():
    frame = pd.DataFrame([["1", "2", "3"]], index=["r"])
    frame.columns = pd.MultiIndex.from_tuples([("a", "x"), ("a", "y"), ("b", "x")])
    assert tables.to_markdown(frame) == (
        "|  | a |  | b |\n| --- | --- | --- | --- |\n|  | **x** | **y** | **x** |\n| r | 1 | 2 | 3 |\n"
    )


def test_html_holds_every_cell_escaped():
    texts = []
    parser = HTMLParser()
    parser.handle_data = lambda data: texts.append(data.strip())
    frame = pd.DataFrame({"h": ["1 < 2", "<b>"]}, index=["r", "s"])
    parser.feed(tables.to_html(frame))
    assert [text for text in texts if text] == ["h", "r", "1 < 2", "s", "<b>"]


PASSES = PAPERS["commatch"].ABLATIONS["passes"]


def write_passes(root, errors):
    """Runs of the ablation of dropout passes. errors: by number of passes, then seed."""
    for row in PASSES.rows:
        for seed, error in errors.get(row.overrides["passes"], {}).items():
            write_run(PASSES.cell(row, PASSES.small[0], "mini", (seed,))[0], root, error=error)


def test_an_ablations_rows_are_compared_with_its_default_on_the_seeds_that_both_have(tmp_path):
    write_passes(tmp_path, {10: {0: 0.20, 1: 0.40, 2: 0.30}, 2: {0: 0.21}, 5: {0: 0.19, 2: 0.32, 3: 0.9}})
    frame = compare(PASSES, "mini", range(4), tmp_path)
    error = frame[frame["metric"] == "error"].set_index("row")
    assert error.loc["T = 10 (default)", "n"] == 3 and error.loc["T = 10 (default)", "less_n"] == 0
    assert error.loc["T = 2", "less_mean"] == pytest.approx(0.01) and error.loc["T = 2", "less_n"] == 1
    assert error.loc["T = 5", "less_mean"] == pytest.approx(0.005) and error.loc["T = 5", "less_n"] == 2
    assert error.loc["T = 5", "less_sd"] == pytest.approx(math.sqrt(0.015**2 + 0.015**2))
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
    for table in paper.TABLES.values():
        assert tables.defaults(table, table.columns[0], "paper") == {}
    for table in paper.ABLATIONS.values():
        default = tables.defaults(table, table.small[0], "mini")
        assert set(default) == {row.label for row in table.rows}
