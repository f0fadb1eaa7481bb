"""CSL as data: what its tables, ablations and claims ask for, and what they may say was published."""

import pytest

from figures.tables import incomparable, notes, published_grid
from repro.experiment import resolve, run_id
from repro.grid import EMBEDDED, MASKED, experiment
from repro.measure.metrics import METRICS
from repro.papers import csl, few_masks
from repro.papers.published import NOT_AVAILABLE, Reference, lookup
from repro.recipe import SCALES
from repro.settings import SettingError

TABLES = [*csl.TABLES.values(), *csl.ABLATIONS.values()]
MAIN = csl.TABLES["main"]


def differences(row, column=csl.SCENES_20, scale="mini"):
    """What a row's recipe and method's settings change of the method's own."""
    changed = experiment("csl", row, column, scale, 0)
    pairs = [(resolve(changed), resolve(changed.with_(overrides=())))]
    pairs += [tuple(recipe.method for recipe in pairs[0])]
    return {
        name: value
        for ours, plain in pairs
        for name, value in vars(ours).items()
        if name != "method" and value != getattr(plain, name)
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_experiment_of_tables_and_ablations_resolves_and_is_another_run(table, scale):
    experiments = table.experiments(scale, (0, 1))
    assert (
        len({run_id(item) for item in experiments})
        == len(experiments)
        == 2 * len(table.rows) * len(table.columns_at(scale))
    )
    assert all(resolve(item).steps > 0 for item in experiments)
    assert table.metrics == MASKED and set(MASKED) <= set(METRICS)
    assert scale == "paper" or {item.data for item in experiments} <= set(EMBEDDED)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", csl.CLAIMS.values(), ids=lambda claim: claim.id)
def test_claims_pair_like_with_like(claim, scale):
    left, right = claim.pair(scale, 3)
    assert left.split == right.split == ("voc.3@183" if scale == "paper" else "scenes.3@20")
    assert run_id(left) != run_id(right) and claim.metric in METRICS
    assert (claim.direction == "lower") == METRICS[claim.metric].lower


def test_the_tables_have_the_published_numbers_of_masks():
    masks = {name: [column.labels for column in table.columns] for name, table in csl.TABLES.items()}
    assert masks == {
        "main": [92, 183, 366, 732, 1464],
        "cityscapes": [186, 372, 744, 1488],
        "coco": [232, 463, 925, 1849, 3697],
    }
    assert [column.labels for column in MAIN.small] == [10, 20, 40] and not csl.TABLES["coco"].small
    for table in csl.TABLES.values():
        assert {column.labels for column in table.columns} <= set(few_masks.BUDGETS[table.columns[0].data])
    assert [row.method for row in MAIN.rows] == ["supervised", "fixmatch", "unimatch", "unimatch", "csl"]


@pytest.mark.parametrize("table", csl.TABLES.values(), ids=lambda table: table.name)
def test_the_lost_tables_stay_empty_and_no_peer_speaks_for_csl(table):
    assert (published_grid(table, csl.LOST) == NOT_AVAILABLE).all(axis=None)
    for reference in table.references:
        grid = published_grid(table, reference)
        assert (grid.loc[["FixMatch", "CSL", "UniMatch, output stride 8"]] == NOT_AVAILABLE).all(axis=None)
    assert not any(row.method == "CSL" or row.paper == "CSL" for row in csl.PUBLISHED)


@pytest.mark.parametrize(
    ("table", "reference", "supervised", "unimatch"),
    [  # typed from the READMEs' tables
        ("main", 1, ["45.10", "55.30", "64.80", "69.70", "73.50"], ["75.20", "77.20", "78.80", "79.90", "81.20"]),
        ("main", 2, ["45.10", "55.30", "64.80", "69.70", "73.50"], ["75.20", "77.20", "78.80", "79.90", "81.20"]),
        ("cityscapes", 1, ["66.30", "72.80", "75.00", "78.00"], ["76.60", "77.90", "79.20", "79.50"]),
        ("cityscapes", 2, ["63.30", "70.20", "73.10", "76.60"], ["75.00", "76.80", "77.50", "78.60"]),
        ("cityscapes", 3, ["65.70", "72.50", "74.40", "77.80"], ["76.60", "77.90", "79.20", "79.50"]),
        ("coco", 1, ["22.90", "28.00", "33.60", "37.80", "42.20"], ["31.90", "38.90", "44.40", "48.20", "49.80"]),
    ],
)
def test_peers_numbers_stand_in_their_columns(table, reference, supervised, unimatch):
    grid = published_grid(csl.TABLES[table], csl.TABLES[table].references[reference])
    assert grid.loc["Supervised"].tolist() == supervised and grid.loc["UniMatch"].tolist() == unimatch


def test_unimatch_v2_repeats_unimatch_so_it_has_no_column():
    for table, first in (("main", 1), ("cityscapes", 1), ("coco", 1)):
        reference = csl.TABLES[table].references[first]
        for column in csl.TABLES[table].columns:
            where = (column.data, column.labels, csl.UNIMATCH.published)
            v1 = lookup(csl.PUBLISHED, Reference("UniMatch V2", reference.table, "miou", "ResNet-101"), *where)
            assert v1.method == "UniMatch V1" and v1.value == lookup(csl.PUBLISHED, reference, *where).value
    assert not any(reference.paper == "UniMatch V2" for table in TABLES for reference in table.references)


def test_differences_are_taken_from_the_same_network_only():
    for table, comparable in (("main", [False, True, True]), ("cityscapes", [False, True, False, True]),
                              ("coco", [False, False])):  # fmt: skip
        place = csl.TABLES[table].columns[0]
        measured = experiment("csl", csl.UNIMATCH, place, "paper", 0)
        for reference, fits in zip(csl.TABLES[table].references, comparable, strict=True):
            number = lookup(csl.PUBLISHED, reference, place.data, place.labels, csl.UNIMATCH.published)
            assert bool(incomparable(number, measured)) == (not fits), reference.title
    said = " ".join(notes(csl.TABLES["coco"], csl.TABLES["coco"].columns[0], "paper"))
    assert "published with Xception-65, ours is resnet101s" in said


def test_notes_state_corrmatchs_own_numbers_and_what_is_lost():
    assert "76.4 (92), 78.5 (183), 79.4 (366), 80.6 (732), 81.8 (1464)" in MAIN.note
    assert "77.3 (186), 78.5 (372), 79.4 (744), 80.4 (1488)" in csl.TABLES["cityscapes"].note
    assert "could not be had" in MAIN.note and "could not be had" in csl.NOTE


def test_the_strides_are_those_that_the_note_states():
    paper = {method: csl.recipe(method, "voc", 183, "paper").output_stride for method in csl.METHODS}
    assert paper == {"supervised": 16, "fixmatch": 16, "unimatch": 16, "csl": 8}
    assert {csl.recipe(method, "scenes", 20, "mini").output_stride for method in csl.METHODS} == {16}
    assert differences(csl.UNIMATCH_8) == {"output_stride": 8}
    rows = {row.label: experiment("csl", row, csl.VOC_183, "paper", 0) for row in csl.ABLATIONS["output_stride"].rows}
    assert {label: (item.method, resolve(item).output_stride) for label, item in rows.items()} == {
        "CSL, 8": ("csl", 8), "CSL, 16": ("csl", 16), "UniMatch, 8": ("unimatch", 8), "UniMatch, 16": ("unimatch", 16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("selection", "split, weights 0 or 1", {"selection": "hard"}),
        ("selection", "threshold .95", {"selection": "threshold"}),
        ("features", "dispersion only", {"features": "dispersion"}),
        ("rule", "both are", {"rule": "and"}),
        ("scope", "the whole batch", {"scope": "batch"}),
        ("alpha", "alpha = 8.0 (default)", {}),
        ("alpha", "alpha = 32.0", {"alpha": 32.0}),
        ("form", "as attributed to the paper, second-hand", {"form": "paper"}),
        ("masking", "any", {"masking": "random"}),
        ("ratio", "ratio = 0.9", {"ratio": 0.9}),
        ("block", "48 px", {"block": 48}),
        ("feature_perturbation", "UniMatch without", {"feature_perturbation": False}),
        ("weights", "supervised, from scratch", {"weights": "scratch"}),
    ],
)
def test_a_variation_changes_what_its_label_says_and_nothing_else(name, label, expected):
    (row,) = (row for row in csl.ABLATIONS[name].rows if row.label == label)
    assert differences(row) == expected


def test_every_ablation_holds_the_unchanged_method():
    default = run_id(csl.main_experiments("mini", (0,))[-1])
    for table in csl.ABLATIONS.values():
        assert default in {run_id(item) for item in table.experiments("mini", (0,))}, table.name


def test_a_threshold_within_csl_is_unimatchs():
    (row,) = (row for row in csl.ABLATIONS["selection"].rows if row.label == "threshold .95")
    ours = resolve(experiment("csl", row, csl.VOC_183, "paper", 0)).method
    theirs = csl.recipe("unimatch", "voc", 183, "paper").method
    assert ours.threshold == theirs.threshold == 0.95


def test_the_stride_claim_compares_at_one_stride_at_every_scale():
    for scale in SCALES:
        assert {resolve(side).output_stride for side in csl.CLAIMS["unimatch-stride"].pair(scale, 0)} == {8}


def test_sources_say_what_is_second_hand_or_ours():
    assert "second-hand" in csl.CLAIMS["scope"].source and "second-hand" in csl.CLAIMS["selection"].source
    ours = ("fixmatch-supervised", "fixmatch", "unimatch-stride", "masking-random", "ece")
    assert all("ours" in csl.CLAIMS[name].source for name in ours)
    assert not any(claim.published for claim in csl.CLAIMS.values())


def test_the_main_job_starts_with_the_cheapest_run_and_finishes_a_seed_at_a_time():
    runs = [(e.seed, e.method) for e in csl.main_experiments()]
    assert runs == [(s, m) for s in (0, 1) for m in ("supervised", "fixmatch", "unimatch", "csl")]
    assert {(e.data, e.labels, e.scale) for e in csl.main_experiments()} == {("scenes", 20, "mini")}
    assert {(e.data, e.labels) for e in csl.main_experiments("paper")} == {("voc", 183)}
    needed = {run_id(item) for item in csl.CLAIMS["unimatch"].experiments("mini", (0, 1))}
    assert needed <= {run_id(item) for item in csl.main_experiments()}


def test_an_unknown_number_of_masks_is_refused():
    with pytest.raises(SettingError, match="labels is 91; the published lists of voc show 92, 183"):
        csl.check_budget("voc", 91)
    assert csl.TABLES["main"].columns[0].title == "Pascal VOC 2012, 92 masks"
