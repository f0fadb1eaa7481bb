"""ComMatch as data: what its tables, ablations and claims ask for, and what they may say was published."""

import pytest

from figures.tables import METRICS, published_grid
from repro.experiment import resolve, run_id
from repro.grid import CALIBRATED, Column
from repro.methods.few_labels import METHODS
from repro.papers import commatch
from repro.recipe import SCALES

GRIDS = [*commatch.TABLES.values(), *commatch.ABLATIONS.values(), *commatch.CLAIMS.values()]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: getattr(grid, "name", None) or grid.id)
def test_every_experiment_that_is_named_exists(grid, scale):
    experiments = grid.experiments(scale, (0, 1))
    assert {e.seed for e in experiments} == {0, 1} and {e.scale for e in experiments} == {scale}
    assert all(resolve(e).steps > 0 for e in experiments)
    assert {e.data for e in experiments} == {"fashion"} or scale == "paper"


def test_table_2_holds_every_method_and_the_papers_columns():
    table = commatch.TABLES["2"]
    assert {row.method for row in table.rows} == set(commatch.METHODS) <= set(METHODS)
    assert [(c.data, c.labels) for c in table.columns] == [
        *(("cifar10", n) for n in (40, 250, 4000)),
        *(("cifar100", n) for n in (400, 2500, 10000)),
        *(("svhn", n) for n in (40, 250, 1000)),
    ]
    assert all(
        table.metrics == CALIBRATED for table in (*commatch.TABLES.values(), *commatch.ABLATIONS.values())
    )
    assert set(CALIBRATED) <= set(METRICS)


@pytest.mark.parametrize(("grid", "reference"), [("2", commatch.TABLE_2), ("3", commatch.TABLE_3)])
def test_the_lost_tables_stay_empty(grid, reference):
    table = (commatch.TABLES | commatch.ABLATIONS)[grid]
    cells = published_grid(table, reference)
    assert cells.shape == (len(table.rows), len(table.columns)) and (cells == "not available").all(axis=None)


def test_the_seeds_numbers_stand_under_the_place_that_states_them():
    introduction = published_grid(commatch.TABLES["introduction"], commatch.INTRODUCTION)
    assert introduction.loc["ComMatch"].tolist() == ["8.25", "4.74", "3.92"]
    figure = published_grid(commatch.TABLES["fig3"], commatch.FIGURE_3)
    assert figure.loc["ComMatch"].tolist() == ["5.83"]


def test_toolbox_columns_cover_the_rows_they_publish():
    for reference in commatch.TABLES["2"].references[2:]:
        grid = published_grid(commatch.TABLES["2"], reference)
        assert (grid.loc[["UPS", "ComMatch"]] == "not available").all(axis=None)
        assert (grid.loc["FixMatch"] != "not available").all()
    assert (grid.loc["FlexMatch"] == "not available").all()  # FixMatch's table is older


def test_derived_numbers_follow_from_published_ones_and_are_in_no_table():
    values = [derived.value for derived in commatch.DERIVED]
    assert values == pytest.approx(
        [4.31 - 0.54, 6.42 - 2.65, 91.75 - 3.6, 91.75 - 1.82, 94.17 - 3.6, 94.17 - 1.82]
    )
    assert not any(row.paper == "ComMatch" and row.value in values for row in commatch.PUBLISHED)


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("3", "no negatives", {"negative_weight": 0.0}),
        ("3", "no stability", {"stability": "none"}),
        ("3", "fixed thresholds", {"moving_positive": False, "moving_negative": False}),
        ("stability", "label consistency (ablation text)", {"stability": "labels"}),
        ("dropout", "FixMatch, dropout .3", {"dropout": 0.3}),
        ("augmentation", "CTAugment", {"strong": "ctaugment"}),
        ("weights", "lambda = 1, mu = 0.5", {"positive_weight": 1.0, "negative_weight": 0.5}),
        ("passes", "T = 2", {"passes": 2}),
    ],
)
def test_a_variation_changes_what_its_label_says_and_nothing_else(name, label, expected):
    table = commatch.ABLATIONS[name]
    (row,) = (row for row in table.rows if row.label == label)
    (experiment,) = table.cell(row, Column("fashion", 100), "mini", (0,))
    changed, plain = resolve(experiment), resolve(experiment.with_(overrides=()))
    differs = {
        key: value
        for settings, base in ((changed, plain), (changed.method, plain.method))
        for key, value in vars(settings).items()
        if key != "method" and value != getattr(base, key)
    }
    assert differs == expected


def test_every_ablation_holds_the_unchanged_method_and_no_row_twice():
    default = run_id(commatch.main_experiments("mini", (0,))[-1])
    for table in commatch.ABLATIONS.values():
        runs = [run_id(experiment) for experiment in table.experiments("mini", (0,))]
        assert default in runs and len(set(runs)) == len(runs) == len(table.rows)


def test_claims_carry_the_papers_effects():
    stated = {claim.id: claim.published.value for claim in commatch.CLAIMS.values() if claim.published}
    assert stated == {"fixmatch": 3.6, "flexmatch": 1.82, "fixmatch-many": 0.54, "mixmatch-many": 2.65}


def test_the_main_job_starts_with_the_cheapest_run_and_finishes_a_seed_at_a_time():
    runs = [(e.seed, e.method) for e in commatch.main_experiments()]
    assert runs == [(s, m) for s in (0, 1) for m in ("supervised", "fixmatch", "flexmatch", "commatch")]
    assert {(e.data, e.labels, e.scale) for e in commatch.main_experiments()} == {("fashion", 100, "mini")}
    assert {(e.data, e.labels) for e in commatch.main_experiments("paper")} == {("cifar10", 40)}
