"""PCRE as data: what its tables, ablations and claims ask for, and what they may say was published."""

import pytest

from figures.tables import incomparable, published_grid
from repro.experiment import resolve, run_id
from repro.grid import EMBEDDED, experiment
from repro.measure.metrics import METRICS
from repro.papers import pcre
from repro.papers.published import NOT_AVAILABLE, lookup
from repro.recipe import SCALES

TABLES = [*pcre.TABLES.values(), *pcre.ABLATIONS.values()]
MAIN = pcre.TABLES["main"]
CHANGED = {"1a": "tau", "1b": "beta", "1c": "rounds", "1d": "prototype_momentum", "1e": "conf_weight",
           "1f": "refine_weight", "1g": "cpe_weight", "1h": "gating"}  # fmt: skip
# Typed from the supplementary: (CAM, segmentation) of each row, top to bottom.
TABLE_1 = {
    "1a": [(75.8, 73.4), (76.3, 73.8), (75.7, 73.6), (75.3, 73.1)],
    "1b": [(74.3, 72.9), (75.1, 73.6), (76.3, 73.8), (75.2, 73.4)],
    "1c": [(75.4, 72.8), (76.3, 73.8), (75.8, 73.8), (75.0, 73.4)],
    "1d": [(75.0, 72.6), (76.3, 73.8), (75.2, 73.2), (75.3, 73.3)],
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_experiment_of_tables_and_ablations_resolves_and_is_another_run(table, scale):
    experiments = table.experiments(scale, (0, 1))
    count = 2 * len(table.rows) * len(table.columns_at(scale))
    assert len({run_id(item) for item in experiments}) == len(experiments) == count
    assert all(resolve(item).steps > 0 for item in experiments) and set(table.metrics) <= set(METRICS)
    assert scale == "paper" or {item.data for item in experiments} <= set(EMBEDDED)


@pytest.mark.parametrize("name", CHANGED)
def test_a_row_changes_the_one_setting_that_its_table_is_about(name):
    table = pcre.ABLATIONS[name]
    default = run_id(experiment("pcre", pcre.PCRE, pcre.SCENES, "mini", 0))
    same = [row.label for row in table.rows if run_id(experiment("pcre", row, pcre.SCENES, "mini", 0)) == default]
    assert len(same) == 1 and same[0].endswith("(default on scenes)" if name == "1b" else "(default)")
    assert {key for row in table.rows for key in row.overrides} == {CHANGED[name]}


@pytest.mark.parametrize("name", CHANGED)
def test_all_published_cells_of_table_1_stand_beside_their_rows(name):
    table = pcre.ABLATIONS[name]
    grids = [published_grid(table, reference) for reference in table.references]
    for row in table.rows:
        found = [grid.loc[row.label].tolist() for grid in grids]
        stated = row.published[0] != row.label
        assert (NOT_AVAILABLE in found[0]) == (not stated), row.label
    if name in TABLE_1:
        printed = [row for row in table.rows if row.published[0] != row.label]
        texts = [tuple(float(grid.loc[row.label].iloc[0]) for grid in grids) for row in printed]
        assert texts == TABLE_1[name]
    best = [grid.loc[next(row.label for row in table.rows if "default" in row.label)].tolist() for grid in grids]
    assert best == [["76.30"], ["73.80"]]


def test_the_main_table_has_the_peers_numbers_and_none_for_plain_training():
    grids = {reference.title: published_grid(MAIN, reference) for reference in MAIN.references}
    assert all(grid.loc["Plain CAM"].tolist() == [NOT_AVAILABLE] for grid in grids.values())
    quoted = [grid.loc[["AFA", "ToCo", "DuPL", "PCRE"]].iloc[:, 0].tolist() for grid in grids.values()]
    assert quoted == [
        ["66.50", "72.30", "74.10", "76.30"],
        ["68.70", "73.60", "76.00", "77.60"],
        ["66.00", "71.10", "73.30", "75.50"],
        [NOT_AVAILABLE, "69.20", NOT_AVAILABLE, NOT_AVAILABLE],
        [NOT_AVAILABLE, NOT_AVAILABLE, "69.90", NOT_AVAILABLE],
    ]


def test_a_difference_needs_the_same_network():
    for reference, row, comparable in ((MAIN.references[0], pcre.PCRE, True), (MAIN.references[0], pcre.AFA, False),
                                       (MAIN.references[4], pcre.DUPL, False)):  # fmt: skip
        number = lookup(pcre.PUBLISHED, reference, "voc", pcre.VOC.labels, row.published)
        assert bool(incomparable(number, experiment("pcre", row, pcre.VOC, "paper", 0))) == (not comparable)
        assert incomparable(number, experiment("pcre", row, pcre.SCENES, "mini", 0)) == "ours is at mini scale"


def test_per_class_numbers_are_complete_and_average_to_the_table():
    rows = [row for row in pcre.PUBLISHED if row.table == "Tab. 2"]
    methods = {row.method for row in rows}
    assert methods == {"1Stage", "AFA", "ToCo", "DuPL", "PCRE"}
    for method in methods:
        classes = [row.value for row in rows if row.method == method and row.metric == "seg_iou"]
        mean = next(row.value for row in rows if row.method == method and row.metric == "seg_miou")
        assert len(classes) == 21 and abs(sum(classes) / 21 - mean) < 0.15, "AFA's mean is 66.1, printed 66.0"


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", pcre.CLAIMS.values(), ids=lambda claim: claim.id)
def test_claims_pair_like_with_like(claim, scale):
    left, right = claim.pair(scale, 3)
    assert left.split == ("voc.3@10582" if scale == "paper" else "scenes.3@500")
    assert right is None or (left.split == right.split and run_id(left) != run_id(right))
    assert claim.metric in METRICS and (claim.direction == "lower") == METRICS[claim.metric].lower


def test_the_main_job_runs_the_four_methods_of_the_issue():
    asked = [(item.seed, item.method) for item in pcre.main_experiments("mini", (0, 2))]
    assert asked == [(seed, method) for seed in (0, 2) for method in ("plain", "toco", "dupl", "pcre")]
    assert {item.data for item in pcre.main_experiments("paper", (0,))} == {"voc"}
