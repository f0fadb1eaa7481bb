"""CalibrateMix as data: every experiment resolves, runs are shared with ComMatch, and claims compare like with like."""

import pytest

from figures.tables import METRICS, NOT_AVAILABLE, published_grid
from repro.experiment import resolve, run_id
from repro.grid import Column
from repro.papers import calibratemix, commatch
from repro.recipe import SCALES


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "table", [*calibratemix.TABLES.values(), *calibratemix.ABLATIONS.values()], ids=lambda t: t.name
)
def test_every_experiment_of_tables_and_ablations_resolves(table, scale):
    experiments = table.experiments(scale, (0,))
    assert len(experiments) == len(table.rows) * len(table.columns_at(scale))
    assert len({run_id(item) for item in experiments}) == len(experiments), "two rows are the same run"
    assert set(table.metrics) <= set(METRICS)


def test_small_runs_of_the_bases_are_those_of_commatch():
    shared = {run_id(item) for item in commatch.main_experiments("mini", (0, 1))}
    ours = {run_id(item) for item in calibratemix.main_experiments("mini", (0, 1)) if item.method == "fixmatch"}
    assert len(ours) == 2 and ours <= shared


def test_the_published_recipe_is_the_released_one():
    for data, network, decay in (("cifar10", "wrn-28-2", 5e-4), ("cifar100", "wrn-28-8", 1e-3),
                                 ("svhn", "wrn-28-2", 5e-4), ("stl10", "wrn-37-2", 5e-4)):  # fmt: skip
        recipe = calibratemix.recipe("calibratemix", data, 1000, "paper")
        assert (recipe.network, recipe.weight_decay) == (network, decay)
        assert (recipe.batch, recipe.unlabelled_ratio, recipe.steps, recipe.ema) == (64, 7, 2**20, 0.999)
        settings = recipe.method
        assert (settings.base, settings.warmup, settings.delta) == ("softmatch", 150_000, 0.997)
        assert (settings.beta_alpha, settings.pool, settings.mixed_loss) == (0.4, 15, "bce")


def test_rows_differ_from_their_base_in_the_method_alone():
    base, mixed = (calibratemix.experiment("calibratemix", row, Column("fashion", 100), "mini", 3)
                   for row in (calibratemix.few_labels.ROWS["fixmatch"], calibratemix.MIXED["fixmatch"]))  # fmt: skip
    a, b = resolve(base), resolve(mixed)
    assert b.method.base_settings() == a.method
    assert {k: v for k, v in vars(a).items() if k != "method"} == {k: v for k, v in vars(b).items() if k != "method"}


def test_claims_pair_a_base_with_itself_and_calibration():
    for base in calibratemix.BASES:
        for kind, margin in (("ece", 0.0), ("error", 0.005)):
            claim = calibratemix.CLAIMS[f"{kind}-{base}"]
            left, right = claim.pair("mini", 4)
            assert (right.method, dict(left.overrides)["base"], claim.margin) == (base, base, margin)
            assert left.split == right.split == "fashion.4@100"


def test_published_cells_are_not_available_and_the_average_is_quoted_with_its_source():
    grid = published_grid(calibratemix.TABLES["main"], calibratemix.TABLE)
    assert (grid == NOT_AVAILABLE).all().all()
    assert "32.7 %" in calibratemix.NOTE and "not checked against the paper" in calibratemix.NOTE
