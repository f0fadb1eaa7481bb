"""Robust Trust Region as data: what its tables, ablations and claims ask for, and what may be said to be published."""

import pytest

from figures.tables import incomparable, published_grid
from repro.experiment import resolve, run_id
from repro.grid import EMBEDDED, Column, experiment, place
from repro.measure.metrics import METRICS
from repro.methods.scribbles.lengths import PUBLISHED as TUNED
from repro.papers import trust_region
from repro.papers.published import NOT_AVAILABLE, SCRIBBLES, lookup
from repro.recipe import SCALES

TABLES = [*trust_region.TABLES.values(), *trust_region.ABLATIONS.values()]
MAIN = trust_region.TABLES["main"]
VOC_100, SCENES_30 = trust_region.VOC_100, trust_region.SCENES_30


def run(row, column=SCENES_30, scale="mini", seed=0):
    return experiment("trust_region", row, column, scale, seed)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_experiment_of_tables_and_ablations_resolves_and_is_another_run(table, scale):
    experiments, columns = table.experiments(scale, (0, 1)), table.columns_at(scale)
    count = 2 * sum(len(columns) if row.labels is None else 1 for row in table.rows)
    assert len({run_id(item) for item in experiments}) == len(experiments) == count
    assert all(resolve(item).steps > 0 for item in experiments)
    assert set(table.metrics) <= set(METRICS) and set(trust_region.HEADLINES) <= set(table.metrics)
    assert scale == "paper" or {item.data for item in experiments} <= set(EMBEDDED)


def test_the_main_table_has_every_method_at_every_length():
    assert [row.method for row in MAIN.rows] == list(trust_region.METHODS)
    for scale, data in (("paper", "voc"), ("mini", "scenes")):
        assert {(c.data, c.labels) for c in MAIN.columns_at(scale)} == {(data, n) for n in (0, 30, 50, 80, 100)}
    assert MAIN.columns[0].title == "Pascal VOC 2012, scribble length 100 %"
    assert place(run(trust_region.ADM)) == Column("scenes", 30, SCRIBBLES) == SCENES_30


def test_full_supervision_is_trained_once_for_all_lengths():
    column, other = MAIN.small[:2]
    cells = [MAIN.cell(trust_region.FULL, place, "mini", (0, 1)) for place in (column, other)]
    assert cells[0] == cells[1] and [item.labels for item in cells[0]] == [100, 100]
    assert [row.labels for row in MAIN.rows if row is not trust_region.FULL] == [None] * (len(MAIN.rows) - 1)


def test_published_numbers_stand_at_length_100_and_nowhere_else():
    """rloss: 65.8, 69.4 and 72.1, typed from the specification."""
    grid = published_grid(MAIN, trust_region.RLOSS)
    stated = {"Partial CE": "65.80", "Dense-GD": "69.40", "Full supervision": "72.10"}
    assert list(grid.columns) == [f"Pascal VOC 2012, scribble length {n} %" for n in (100, 80, 50, 30, 0)]
    assert grid.iloc[:, 0].to_dict() == {row.label: stated.get(row.label, NOT_AVAILABLE) for row in MAIN.rows}
    assert (grid.iloc[:, 1:] == NOT_AVAILABLE).all(axis=None)


def test_the_papers_own_results_stay_empty_and_no_other_network_speaks_for_it():
    for reference in MAIN.references:
        grid = published_grid(MAIN, reference)
        assert (grid.loc[["Grid-GD", "ADM", "Grid-TR", "Robust Grid-TR"]] == NOT_AVAILABLE).all(axis=None)
    assert (published_grid(MAIN, trust_region.LOST) == NOT_AVAILABLE).all(axis=None)
    own = {row.metric for row in trust_region.PUBLISHED if row.paper == trust_region.LOST.paper}
    assert own == {"epsilon", "unary weight gamma"}, "settings only"
    for said in ("DeepLab-ResNet101: partial CE 69.5", "full supervision 75.6", "grid CRF with ADM 61.7"):
        assert said in MAIN.note


def test_a_difference_needs_the_same_length_network_and_scale():
    number = lookup(trust_region.PUBLISHED, trust_region.RLOSS, "voc", 100, trust_region.DENSE.published)
    shorter = Column("voc", 30, SCRIBBLES)
    assert incomparable(number, run(trust_region.DENSE, VOC_100, "paper")) == ""
    assert incomparable(number, run(trust_region.DENSE)) == "ours is at mini scale"
    assert incomparable(number, run(trust_region.DENSE, shorter, "paper")) == (
        "published on Pascal VOC 2012, scribble length 100 %"
    )
    other = run(trust_region.DENSE, VOC_100, "paper").with_(network="resnet101")
    assert "published with DeepLabV3+ MobileNetV2" in incomparable(number, other)


def test_the_readmes_settings_are_those_that_the_methods_use():
    for row in (row for row in trust_region.PUBLISHED if row.paper == trust_region.LOST.paper):
        tuned = TUNED[row.labels / 100]
        assert row.value == (tuned.epsilon if row.metric == "epsilon" else tuned.gamma)
        assert row.setting.split(" (")[0] == f"scribble length {row.labels / 100:g}"


def changed(row, column, scale):
    """What a row's recipe and settings change of its method's own, beside the method."""
    ours, plain = resolve(run(row, column, scale)), resolve(run(row, column, scale).with_(overrides=()))
    return {
        name: value
        for mine, other in ((ours, plain), (ours.method, plain.method))
        for name, value in vars(mine).items()
        if name != "method" and value != getattr(other, name)
    }


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("epsilon", {"epsilon"}), ("soften", {"soften"}), ("gamma", {"gamma"}), ("refresh", {"refresh"}),
        ("restriction", {"restricted"}), ("neighbours", {"neighbours"}), ("relaxation", {"relaxation"}),
        ("downscale", {"downscale"}), ("rate", {"rate"}), ("start", {"start_steps", "weights"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", ["paper", "mini"])
def test_an_ablation_changes_what_it_is_about_and_holds_the_unchanged_method(name, settings, scale):
    table = trust_region.ABLATIONS[name]
    (column,) = table.columns_at(scale)
    assert set().union(*(changed(row, column, scale) for row in table.rows)) == settings
    base = trust_region.GRID if name == "relaxation" else trust_region.ROBUST
    unchanged = [row.label for row in table.rows if run_id(run(row, column, scale)) == run_id(run(base, column, scale))]
    if name == "gamma":
        assert unchanged == ["gamma = 0.1" if scale == "mini" else "gamma = 0.05"]
    else:
        assert len(unchanged) == 1 and "default" in unchanged[0]


def test_the_epsilons_of_the_ablation_are_as_labelled_and_allowed_on_both():
    for scale, classes, default in (("mini", 6, 0.831), ("paper", 21, 0.944)):
        table = trust_region.ABLATIONS["epsilon"]
        found = [resolve(item).method.epsilon for item in table.experiments(scale, (0,))]
        assert found == pytest.approx([0, 0.42, 0.75, default], abs=5e-4) and max(found) < (classes - 1) / classes


@pytest.mark.parametrize("scale", SCALES)
def test_plain_is_robust_with_epsilon_0(scale):
    rows = (trust_region.PLAIN, trust_region.ROBUST)
    column = {"column": VOC_100} if scale == "paper" else {}
    plain, robust = (resolve(run(row, *column.values(), scale=scale)).method for row in rows)
    assert vars(plain) == vars(robust) | {"epsilon": 0.0} and robust.epsilon > 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", trust_region.CLAIMS.values(), ids=lambda claim: claim.id)
def test_claims_pair_like_with_like(claim, scale):
    left, right = claim.pair(scale, 3)
    length = int(claim.id.rsplit("-", 1)[1])
    assert left.split == right.split == f"{'voc' if scale == 'paper' else 'scenes'}.3@{length}"
    assert run_id(left) != run_id(right) and f"scribble length {length} %" in claim.text
    assert (claim.direction == "lower") == METRICS[claim.metric].lower and claim.published is None


def test_the_authors_ordering_is_decided_at_every_length():
    pairs = {(c.left.method, c.right.method, c.metric, c.direction) for c in trust_region.CLAIMS.values()}
    robust = "robust_trust_region"
    assert pairs == {
        (robust, "partial_ce", "miou", "higher"), (robust, "grid_gd", "miou", "higher"),
        (robust, "dense_gd", "miou", "higher"), (robust, "trust_region", "miou", "higher"),
        ("trust_region", "grid_gd", "potts_energy", "lower"), ("dense_gd", "partial_ce", "miou", "higher"),
    }  # fmt: skip
    assert {claim.small.labels for claim in trust_region.CLAIMS.values()} == {0, 30, 50, 80, 100}
    assert len(trust_region.CLAIMS) == 5 * len(pairs)
    for name in ("plain-30", "energy-100"):
        assert trust_region.CLAIMS[name].source.startswith("ours")


def test_the_main_job_runs_four_methods_at_two_lengths_seed_by_seed():
    four = ("partial_ce", "grid_gd", "trust_region", "robust_trust_region")
    asked = [(item.seed, item.labels, item.method) for item in trust_region.main_experiments("mini", (0, 2))]
    assert asked == [(seed, length, method) for seed in (0, 2) for length in (30, 100) for method in four]
    published = trust_region.main_experiments("paper", (0,))
    assert [(item.data, item.labels, item.method) for item in published] == [("voc", 100, method) for method in four]
    needed = {run_id(item) for name in ("partial-ce-30", "plain-100", "energy-30")
              for item in trust_region.CLAIMS[name].experiments("mini", (0, 2))}  # fmt: skip
    assert needed <= {run_id(item) for item in trust_region.main_experiments("mini", (0, 2))}


def test_accuracy_never_stands_without_calibration():
    assert trust_region.HEADLINES[0] == "miou" and "ece_15" in trust_region.HEADLINES[1:]
    assert all("ece_15" in table.metrics for table in TABLES)


def test_the_note_says_what_is_lost_and_what_is_ours():
    for said in ("could not", "Reconstructions", "image's tags", "(assumption)", "ignores the length"):
        assert said in trust_region.NOTE
