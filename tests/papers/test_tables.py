"""All papers as data: what their tables, ablations and claims ask for, and what they may show as published."""

import re

import pytest

from figures.tables import incomparable, notes, published_grid
from repro import grid
from repro.experiment import resolve, run_id
from repro.grid import EMBEDDED, PAPERS, TITLES, Claim, Column, Row, Table, checked_seeds, column_of, experiment
from repro.measure.metrics import METRICS
from repro.methods.scribbles.common import PUBLISHED as TUNED
from repro.papers.published import MASKS, NOT_AVAILABLE, SCRIBBLES, TAGS, Reference, lookup
from repro.recipe import SCALES
from repro.settings import SettingError

PAPER, SMALL = (Column("cifar10", 40),), (Column("fashion", 100), Column("fashion", 250))
FIXMATCH, STRICT = Row("FixMatch", "fixmatch"), Row("strict", "fixmatch", {"threshold": 0.99})
TABLE = Table("t", "T", "commatch", (FIXMATCH, STRICT), PAPER, SMALL)
GRIDS = [pytest.param(paper, table, id=f"{name}-{table.name}") for name, paper in PAPERS.items()
         for table in (*paper.tables.values(), *paper.ablations.values())]  # fmt: skip
ABLATIONS = [(name, key) for name, paper in PAPERS.items() for key in paper.ablations]
STATISTICS = {"early_error", "instability_correlation"}
COMMATCH, CALIBRATEMIX, CSL, PCRE, TRUST_REGION = PAPERS.values()


def row(paper: str, name: str) -> Row:
    return grid._row(PAPERS[paper].spec, name)


def claim(**changes) -> Claim:
    words = {"id": "c", "text": "", "source": "", "paper": "commatch", "metric": "error"}
    sides = {"left": FIXMATCH, "right": STRICT, "column": PAPER[0], "small": SMALL[0]}
    return Claim(**words | sides | changes)


def changed(item) -> dict:
    """What an experiment's recipe and method settings change of those without its overrides."""
    ours, plain = resolve(item), resolve(item.with_(overrides=()))
    pairs = ((ours, plain), (ours.method, plain.method))
    return {name: value for mine, other in pairs for name, value in vars(mine).items()
            if name != "method" and value != getattr(other, name)}  # fmt: skip


# Tables in general


def test_experiments_fill_every_cell_and_finish_one_seed_before_the_next():
    asked = [(e.seed, e.labels, dict(e.overrides)) for e in TABLE.experiments("mini", (3, 0))]
    one_seed = [(100, {}), (100, {"threshold": 0.99}), (250, {}), (250, {"threshold": 0.99})]
    assert asked == [(seed, *cell) for seed in (3, 0) for cell in one_seed]
    assert [(e.data, e.labels, e.scale) for e in TABLE.experiments("paper", (0,))] == [("cifar10", 40, "paper")] * 2


def test_a_default_spelt_out_shares_the_run_of_the_default():
    spelt = TABLE.only(["FixMatch"], SMALL[:1]), Row("same", "fixmatch", {"threshold": 0.95})
    same = Table("t", "T", "commatch", (*spelt[0].rows, spelt[1]), PAPER, SMALL[:1])
    assert len({run_id(e) for e in same.experiments("mini", (0,))}) == 1


@pytest.mark.parametrize(
    ("column", "title"),
    [
        (("fashion", 100), "Fashion-MNIST part, 100 labels"),
        (("svhn_extra", 40), "SVHN with extra, 40 labels"),
        (("voc", 92, MASKS), "Pascal VOC 2012, 92 masks"),
        (("scenes", 500, TAGS), "Fashion scenes, 500 tagged images"),
        (("voc", 100, SCRIBBLES), "Pascal VOC 2012, scribble length 100 %"),
    ],
)
def test_a_column_states_what_its_number_counts(column, title):
    assert Column(*column).title == title


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TABLE.experiments("huge"), "unknown scale 'huge'.*known: mini, paper, tiny"),
        (lambda: TABLE.only(["Strict"]), "unknown row of t 'Strict'.*did you mean 'strict'"),
        (lambda: claim(direction="below"), "unknown direction 'below'"),
        (lambda: claim(margin=-0.1), "margin of claim c is -0.1"),
        (lambda: experiment("commatch", Row("typo", "commatch", {"negative_wieght": 0.0}), SMALL[0], "mini", 0),
         "negative_wieght.*did you mean 'negative_weight'"),
        *((lambda seeds=seeds: checked_seeds(seeds), "one or more different whole numbers from 0")
          for seeds in ((), (0, 0), (-1,), (0.0,), (True,), ("0",))),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_reason(call, message):
    with pytest.raises(SettingError, match=message):
        call()


# Every table, ablation and claim


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("paper", "table"), GRIDS)
def test_every_experiment_resolves_and_is_another_run(paper, table, scale):
    experiments, columns = table.experiments(scale, (0, 1)), table.columns_at(scale)
    count = 2 * sum(len(columns) if row.labels is None else 1 for row in table.rows)
    assert len({run_id(item) for item in experiments}) == len(experiments) == count
    assert all(resolve(item).steps > 0 for item in experiments) and set(table.metrics) <= set(METRICS)
    assert scale == "paper" or {item.data for item in experiments} <= set(EMBEDDED)
    assert any("ece" in metric for metric in table.metrics), "accuracy never stands without calibration"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("paper", PAPERS)
def test_claims_pair_like_with_like(paper, scale):
    for one in PAPERS[paper].claims.values():
        left, right = one.pair(scale, 3)
        assert left.split.startswith(f"{one.column_at(scale).data}.3@")
        assert right is None or (left.split == right.split and run_id(left) != run_id(right))
        assert one.metric in STATISTICS or (one.direction == "lower") == METRICS[one.metric].lower
        assert set(one.experiments(scale, (3,))) == {side for side in (left, right) if side is not None}


@pytest.mark.parametrize("paper", PAPERS.values(), ids=PAPERS)
def test_a_papers_columns_count_its_own_kind_of_label_and_its_main_job_is_in_its_tables(paper):
    columns = {column for table in (*paper.tables.values(), *paper.ablations.values())
               for column in (*table.columns, *table.small)}  # fmt: skip
    columns |= {column for one in paper.claims.values() for column in (one.column, one.small)}
    assert {column.words for column in columns} == {paper.spec.supervision.budget}
    assert {column_of(item) for item in paper.main_experiments("mini", (0,))} <= columns
    assert set(paper.spec.data) <= set(TITLES) and set(EMBEDDED) <= set(TITLES)
    assert any("ece" in name for name in paper.spec.headlines)


@pytest.mark.parametrize(("paper", "name"), ABLATIONS)
def test_every_ablation_holds_the_unchanged_method(paper, name):
    runs = {run_id(item): dict(item.overrides) for item in PAPERS[paper].ablations[name].experiments("mini", (0,))}
    plain = {run_id(item.with_(overrides=())) for item in PAPERS[paper].ablations[name].experiments("mini", (0,))}
    based = {run_id(experiment(paper, row(paper, key), column_of(item), "mini", 0))
             for item in PAPERS[paper].ablations[name].experiments("mini", (0,))
             for key in PAPERS[paper].spec.tables["rows"]}  # fmt: skip
    assert runs.keys() & (plain | based)


@pytest.mark.parametrize(
    ("paper", "methods", "places", "published"),
    [
        ("commatch", "supervised fixmatch flexmatch commatch", [("fashion", 100)], ("cifar10", 40)),
        ("calibratemix", "fixmatch calibratemix calibratemix", [("fashion", 100)], ("cifar10", 40)),
        ("csl", "supervised fixmatch unimatch csl", [("scenes", 20)], ("voc", 183)),
        ("pcre", "plain toco dupl pcre", [("scenes", 500)], ("voc", 10582)),
        ("trust_region", "partial_ce grid_gd trust_region robust_trust_region", [("scenes", 30), ("scenes", 100)],
         ("voc", 100)),
    ],
)  # fmt: skip
def test_the_main_job_starts_with_the_cheapest_run_and_finishes_a_seed_at_a_time(paper, methods, places, published):
    asked = [(e.seed, e.data, e.labels, e.method) for e in PAPERS[paper].main_experiments("mini", (0, 2))]
    assert asked == [(seed, *where, method) for seed in (0, 2) for where in places for method in methods.split()]
    at_paper = PAPERS[paper].main_experiments("paper", (0,))
    assert [(e.data, e.labels, e.method) for e in at_paper] == [(*published, method) for method in methods.split()]


@pytest.mark.parametrize(
    ("paper", "name", "label", "expected"),
    [
        ("commatch", "3", "no negatives", {"negative_weight": 0.0}),
        ("commatch", "3", "fixed thresholds", {"moving_positive": False, "moving_negative": False}),
        ("commatch", "stability", "label consistency (ablation text)", {"stability": "labels"}),
        ("commatch", "dropout", "FixMatch, dropout .3", {"dropout": 0.3}),
        ("commatch", "augmentation", "CTAugment", {"strong": "ctaugment"}),
        ("commatch", "weights", "lambda = 1, mu = 0.5", {"positive_weight": 1.0, "negative_weight": 0.5}),
        ("commatch", "passes", "T = 2", {"passes": 2}),
        ("csl", "selection", "split, weights 0 or 1", {"selection": "hard"}),
        ("csl", "features", "dispersion only", {"features": "dispersion"}),
        ("csl", "rule", "both are", {"rule": "and"}),
        ("csl", "scope", "the whole batch", {"scope": "batch"}),
        ("csl", "alpha", "alpha = 8.0 (default)", {}),
        ("csl", "alpha", "alpha = 32.0", {"alpha": 32.0}),
        ("csl", "form", "as attributed to the paper, second-hand", {"form": "paper"}),
        ("csl", "masking", "any", {"masking": "random"}),
        ("csl", "block", "48 px", {"block": 48}),
        ("csl", "feature_perturbation", "UniMatch without", {"feature_perturbation": False}),
        ("csl", "weights", "supervised, from scratch", {"weights": "scratch"}),
        ("pcre", "1c", "T = 1", {"rounds": 1}),
        ("pcre", "1h", "fixed", {"gating": "fixed"}),
        ("trust_region", "start", "Robust Grid-TR, at once", {"start_steps": 0}),
        ("trust_region", "neighbours", "Grid-GD, 4", {"neighbours": 4}),
    ],
)
def test_a_variation_changes_what_its_label_states_and_nothing_else(paper, name, label, expected):
    table = PAPERS[paper].ablations[name]
    (one,) = (one for one in table.rows if one.label == label)
    assert changed(table.cell(one, table.small[0], "mini", (0,))[0]) == expected


# Published numbers beside the rows


@pytest.mark.parametrize(
    ("paper", "table", "reference"),
    [("commatch", "2", 0), ("commatch", "3", 0), ("calibratemix", "main", 0), ("csl", "main", 0),
     ("csl", "cityscapes", 0), ("csl", "coco", 0), ("trust_region", "main", 0)],
)  # fmt: skip
def test_the_lost_tables_stay_empty(paper, table, reference):
    table = (PAPERS[paper].tables | PAPERS[paper].ablations)[table]
    cells = published_grid(table, table.references[reference])
    assert cells.shape == (len(table.rows), len(table.columns)) and (cells == NOT_AVAILABLE).all(axis=None)


PASCAL = (["45.10", "55.30", "64.80", "69.70", "73.50"], ["75.20", "77.20", "78.80", "79.90", "81.20"])


@pytest.mark.parametrize(
    ("paper", "table", "reference", "rows"),
    [  # typed from the sources
        ("commatch", "introduction", 0, {"ComMatch": ["8.25", "4.74", "3.92"]}),
        ("commatch", "fig3", 0, {"ComMatch": ["5.83"]}),
        ("csl", "main", 1, {"Supervised": PASCAL[0], "UniMatch": PASCAL[1], "CSL": [NOT_AVAILABLE] * 5}),
        ("csl", "main", 2, {"Supervised": PASCAL[0], "UniMatch": PASCAL[1], "FixMatch": [NOT_AVAILABLE] * 5}),
        ("csl", "cityscapes", 1, {"Supervised": ["66.30", "72.80", "75.00", "78.00"],
                                  "UniMatch": ["76.60", "77.90", "79.20", "79.50"]}),
        ("csl", "cityscapes", 2, {"Supervised": ["63.30", "70.20", "73.10", "76.60"],
                                  "UniMatch": ["75.00", "76.80", "77.50", "78.60"]}),
        ("csl", "coco", 1, {"Supervised": ["22.90", "28.00", "33.60", "37.80", "42.20"],
                            "UniMatch": ["31.90", "38.90", "44.40", "48.20", "49.80"]}),
        ("pcre", "main", 0, {"Plain CAM": [NOT_AVAILABLE], "AFA": ["66.50"], "ToCo": ["72.30"], "DuPL": ["74.10"],
                             "PCRE": ["76.30"]}),
        ("pcre", "main", 1, {"AFA": ["68.70"], "ToCo": ["73.60"], "DuPL": ["76.00"], "PCRE": ["77.60"]}),
        ("pcre", "main", 2, {"AFA": ["66.00"], "ToCo": ["71.10"], "DuPL": ["73.30"], "PCRE": ["75.50"]}),
        ("pcre", "main", 3, {"ToCo": ["69.20"], "AFA": [NOT_AVAILABLE]}),
        ("pcre", "main", 4, {"DuPL": ["69.90"], "PCRE": [NOT_AVAILABLE]}),
        *(("trust_region", "main", 1, {row: [number, *[NOT_AVAILABLE] * 4]}) for row, number in (
            ("Partial CE", "65.80"), ("Dense-GD", "69.40"), ("Full supervision", "72.10"), ("ADM", NOT_AVAILABLE),
            ("Grid-TR", NOT_AVAILABLE), ("Robust Grid-TR", NOT_AVAILABLE))),
    ],
)  # fmt: skip
def test_published_numbers_stand_in_the_rows_and_columns_that_state_them(paper, table, reference, rows):
    table = PAPERS[paper].tables[table]
    cells = published_grid(table, table.references[reference])
    assert {name: cells.loc[name].tolist() for name in rows} == rows


def test_toolbox_columns_cover_the_rows_they_publish():
    for reference in COMMATCH.tables["2"].references[2:]:
        cells = published_grid(COMMATCH.tables["2"], reference)
        assert (cells.loc[["UPS", "ComMatch"]] == NOT_AVAILABLE).all(axis=None)
        assert (cells.loc["FixMatch"] != NOT_AVAILABLE).all()
    assert (cells.loc["FlexMatch"] == NOT_AVAILABLE).all()  # FixMatch's table is older


# Typed from the supplementary: (CAM, segmentation) of each row, top to bottom.
TABLE_1 = {
    "1a": [(75.8, 73.4), (76.3, 73.8), (75.7, 73.6), (75.3, 73.1)],
    "1b": [(74.3, 72.9), (75.1, 73.6), (76.3, 73.8), (75.2, 73.4)],
    "1c": [(75.4, 72.8), (76.3, 73.8), (75.8, 73.8), (75.0, 73.4)],
    "1d": [(75.0, 72.6), (76.3, 73.8), (75.2, 73.2), (75.3, 73.3)],
}


@pytest.mark.parametrize("name", ["1a", "1b", "1c", "1d", "1e", "1f", "1g", "1h"])
def test_all_published_cells_of_pcres_table_1_stand_beside_their_rows(name):
    table = PCRE.ablations[name]
    cells = [published_grid(table, reference) for reference in table.references]
    stated = [one for one in table.rows if one.published[0] != one.label]
    for one in table.rows:
        assert (NOT_AVAILABLE in cells[0].loc[one.label].tolist()) == (one not in stated), one.label
    found = [tuple(float(grid.loc[one.label].iloc[0]) for grid in cells) for one in stated]
    assert found == TABLE_1.get(name, found)
    default = next(one.label for one in table.rows if "default" in one.label)
    assert [grid.loc[default].tolist() for grid in cells] == [["76.30"], ["73.80"]]


def test_per_class_numbers_are_complete_and_average_to_the_table():
    rows = [one for one in PCRE.spec.published if one.table == "Tab. 2"]
    assert {one.method for one in rows} == {"1Stage", "AFA", "ToCo", "DuPL", "PCRE"}
    for method in {one.method for one in rows}:
        classes = [one.value for one in rows if one.method == method and one.metric == "seg_iou"]
        mean = next(one.value for one in rows if one.method == method and one.metric == "seg_miou")
        assert len(classes) == 21 and abs(sum(classes) / 21 - mean) < 0.15, "AFA's mean is 66.1, printed 66.0"


def test_unimatch_v2_repeats_unimatch_so_it_has_no_column():
    for table in CSL.tables.values():
        for column in table.columns:
            where = (column.data, column.labels, row("csl", "unimatch").published)
            repeated = Reference("UniMatch V2", table.references[1].table, "miou", "ResNet-101")
            second, first = (lookup(CSL.spec.published, one, *where) for one in (repeated, table.references[1]))
            assert second.method == "UniMatch V1" and second.value == first.value
        assert not any(one.paper in ("UniMatch V2", "CSL") for one in table.references[1:])


@pytest.mark.parametrize(
    ("paper", "table", "name", "reference", "scale", "changes", "reason"),
    [
        ("csl", "main", "unimatch", 1, "paper", {}, ""),
        ("csl", "cityscapes", "unimatch", 1, "paper", {}, ""),
        ("csl", "cityscapes", "unimatch", 2, "paper", {}, "published with ResNet-50"),
        ("csl", "coco", "unimatch", 1, "paper", {}, "published with Xception-65, ours is resnet101s"),
        ("pcre", "main", "pcre", 0, "paper", {}, ""),
        ("pcre", "main", "afa", 0, "paper", {}, "published with MiT-B1"),
        ("pcre", "main", "dupl", 4, "paper", {}, "published with DeiT-B/16"),
        ("pcre", "main", "pcre", 0, "mini", {}, "ours is at mini scale"),
        ("trust_region", "main", "dense_gd", 1, "paper", {}, ""),
        ("trust_region", "main", "dense_gd", 1, "mini", {}, "ours is at mini scale"),
        ("trust_region", "main", "dense_gd", 1, "paper", {"labels": 30}, "published on .*scribble length 100 %"),
        ("trust_region", "main", "dense_gd", 1, "paper", {"network": "resnet101"}, "DeepLabV3. MobileNetV2"),
    ],
)
def test_a_difference_needs_the_same_data_network_and_scale(paper, table, name, reference, scale, changes, reason):
    table, one = PAPERS[paper].tables[table], row(paper, name)
    number = lookup(
        PAPERS[paper].spec.published, table.references[reference], table.columns[0].data, table.columns[0].labels,
        one.published,
    )  # fmt: skip
    measured = experiment(paper, one, table.columns_at(scale)[0], scale, 0).with_(**changes)
    said = incomparable(number, measured)
    assert re.search(reason, said) if reason else said == "", said


def test_numbers_quoted_in_texts_are_those_of_the_published_files():
    corrmatch = [one for one in CSL.spec.published if (one.paper, one.method) == ("CorrMatch", "CorrMatch")]
    for table, dataset in (("main", "Pascal VOC 2012 (classic)"), ("cityscapes", "Cityscapes")):
        quoted = ", ".join(f"{one.value} ({one.labels})" for one in corrmatch if one.dataset == dataset)
        assert quoted and quoted in CSL.tables[table].note
    others = [one for one in TRUST_REGION.spec.published if one.metric == "mIoU"]
    others = [one for one in others if not one.paper.startswith("rloss (T")]
    assert others and all(f"{one.method} {one.value}" in TRUST_REGION.tables["main"].note for one in others)
    (average,) = (one for one in CALIBRATEMIX.spec.published if one.metric == "ece_reduction_percent")
    assert f"{average.value} % ({average.source})" in CALIBRATEMIX.spec.note
    assert {one.id: one.published.value for one in COMMATCH.claims.values() if one.published} == {
        "fixmatch": 3.6, "flexmatch": 1.82, "fixmatch-many": 0.54, "mixmatch-many": 2.65,
    }  # fmt: skip
    assert "published with Xception-65" in " ".join(notes(CSL.tables["coco"], CSL.tables["coco"].columns[0], "paper"))


# What single papers compare


def test_calibratemix_rows_differ_from_their_base_in_the_method_alone_and_share_its_runs():
    base, mixed = (experiment("calibratemix", row("calibratemix", name), SMALL[0], "mini", 3)
                   for name in ("fixmatch", "fixmatch_calibratemix"))  # fmt: skip
    alone, with_it = resolve(base), resolve(mixed)
    assert with_it.method.base_settings() == alone.method
    assert {k: v for k, v in vars(alone).items() if k != "method"} == {
        k: v for k, v in vars(with_it).items() if k != "method"
    }
    shared = {run_id(item) for item in COMMATCH.main_experiments("mini", (0, 1))}
    assert {run_id(e) for e in CALIBRATEMIX.main_experiments("mini", (0, 1)) if e.method == "fixmatch"} <= shared
    for base in ("fixmatch", "flexmatch", "softmatch"):
        for kind, margin in (("ece", 0.0), ("error", 0.005)):
            one = CALIBRATEMIX.claims[f"{kind}-{base}"]
            left, right = one.pair("mini", 4)
            assert (right.method, dict(left.overrides)["base"], one.margin) == (base, base, margin)


def test_csl_compares_at_equal_stride_and_with_unimatchs_threshold():
    for scale in SCALES:
        assert {resolve(side).output_stride for side in CSL.claims["unimatch-stride"].pair(scale, 0)} == {8}
    (one,) = (one for one in CSL.ablations["selection"].rows if one.label == "threshold .95")
    ours = resolve(experiment("csl", one, Column("voc", 183, MASKS), "paper", 0)).method
    assert ours.threshold == CSL.spec.recipe("unimatch", "voc", 183, "paper").method.threshold == 0.95


def test_scribble_rows_share_full_supervision_and_the_readmes_settings():
    main = TRUST_REGION.tables["main"]
    cells = [main.cell(row("trust_region", "full"), column, "mini", (0, 1)) for column in main.small[:2]]
    assert cells[0] == cells[1] and [item.labels for item in cells[0]] == [100, 100]
    stated = [one for one in TRUST_REGION.spec.published if one.metric in ("epsilon", "unary weight gamma")]
    for one in stated:
        tuned = TUNED[one.labels / 100]
        assert one.value == (tuned.epsilon if one.metric == "epsilon" else tuned.gamma)
    pairs = {(c.left.method, c.right.method, c.metric, c.direction) for c in TRUST_REGION.claims.values()}
    assert len(TRUST_REGION.claims) == 5 * len(pairs) == 30
    assert {c.small.labels for c in TRUST_REGION.claims.values()} == {0, 30, 50, 80, 100}


@pytest.mark.parametrize("scale", SCALES)
def test_plain_trust_region_is_the_robust_one_with_epsilon_0_and_epsilons_are_allowed(scale):
    column = TRUST_REGION.ablations["epsilon"].columns_at(scale)[0]
    plain, robust = (resolve(experiment("trust_region", row("trust_region", name), column, scale, 0)).method
                     for name in ("trust_region", "robust_trust_region"))  # fmt: skip
    assert vars(plain) == vars(robust) | {"epsilon": 0.0} and robust.epsilon > 0
    classes, default = (21, 0.944) if scale == "paper" else (6, 0.831)
    found = [resolve(e).method.epsilon for e in TRUST_REGION.ablations["epsilon"].experiments(scale, (0,))]
    assert found == pytest.approx([0, 0.42, 0.75, default], abs=5e-4) and max(found) < (classes - 1) / classes
