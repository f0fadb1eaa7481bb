"""Agreement with committed numbers: what is identical, what is near enough where, and when that is a warning."""

import math

import numpy as np
import pandas as pd
import pytest

from figures import agreement, tables
from figures.agreement import ABSENT, DIFFERS, IDENTICAL, WITHIN, compare_all, facts, tolerance, unlike, verdict
from repro.batch import records
from repro.experiment import Experiment
from repro.files import read_json, write_json
from tests.fake_runs import METRICS, write_run

FIXMATCH = Experiment("commatch", "fixmatch")
ERRORS = {0: 0.1 + 0.2, 1: 0.32, 2: 0.28, 3: 0.33, 4: 0.27}
PLATFORM = {
    "processor": "P", "instructions": "AVX2", "platform": "Linux", "source_digest": "123456789012345678",
    "finished": "earlier",
}  # fmt: skip


def run(root, experiment=FIXMATCH, provenance=(), **ema):
    folder = write_run(experiment, root, **ema)
    metrics = read_json(folder / "metrics.json")
    metrics["provenance"] |= PLATFORM | {"finished": "later"} | dict(provenance)
    write_json(folder / "metrics.json", metrics)
    return metrics


@pytest.fixture
def committed(tmp_path):
    """Five seeds as the report commits them, with the platform that made them."""

    def commit(seeds=tuple(ERRORS), **ema):
        experiments = [FIXMATCH.with_(seed=seed) for seed in seeds]
        for experiment in experiments:
            run(tmp_path / "theirs", experiment, PLATFORM, **{"error": ERRORS[experiment.seed]} | ema)
        return records.save(tables.collect(experiments, tmp_path / "theirs"), tmp_path / "committed.csv")[0]

    return commit


@pytest.mark.parametrize(
    ("measured", "stated", "allowed", "word"),
    [
        (0.25, 0.25, 0.0, IDENTICAL), (0.25, 0.25 + 1e-17, 0.0, IDENTICAL), (0.25, np.nextafter(0.25, 1), 0.0, DIFFERS),
        (0.25, 0.28, 0.03125, WITHIN), (0.25, 0.28125, 0.03125, WITHIN), (0.25, 0.29, 0.03125, DIFFERS),
        (None, None, 0.0, IDENTICAL), (None, math.nan, 0.0, IDENTICAL), (None, 0.25, 1.0, DIFFERS),
        (0.25, math.nan, 1.0, DIFFERS),
    ],
)  # fmt: skip
def test_a_verdict_compares_bits_then_the_tolerance(measured, stated, allowed, word):
    assert verdict(measured, stated, allowed) == word


def test_the_tolerance_is_the_spread_of_seeds_with_a_floor_and_a_stand_in_for_few():
    seeds = [0.20, 0.25, 0.31, 0.22, 0.28]
    assert tolerance("error", 0.2, seeds) == pytest.approx(3 * np.std(seeds, ddof=1))
    assert tolerance("error", 0.2, [*seeds, math.nan]) == tolerance("error", 0.2, seeds)
    assert tolerance("error", 0.2, [0.2, 0.2, 0.2001]) == 0.01
    assert tolerance("error", 0.2, [0.1, 0.9]) == tolerance("error", 0.2, []) == 0.05
    # Numbers of another unit have a relative floor.
    assert tolerance("nll", 2.0, [2.0, 2.0, 2.0]) == pytest.approx(0.1)
    assert tolerance("potts_energy", 300.0, [300.0]) == pytest.approx(60.0)


def test_the_same_platform_and_sources_are_expected_to_give_the_same_bits(tmp_path, committed):
    path, root = committed(), tmp_path / "mine"
    run(root, error=0.1 + 0.2)
    for row in compare_all([FIXMATCH], root, path):
        assert (row.verdict, row.tolerance, row.expected, row.because, row.warning) == (IDENTICAL, 0, True, "", False)
    run(root, error=0.3)  # not the same float as .1 + .2
    error, ece = compare_all([FIXMATCH], root, path)
    assert (error.verdict, error.expected, error.warning) == (DIFFERS, True, True) and not ece.warning
    assert agreement.summary([error, ece]) == [
        "agreement with the committed results, 1 runs: 1 differs",
        "WARNING: fixmatch on fashion, 100 labels, seed 0: error (%) 30.00, committed 30.00, tolerance 0.00 "
        "(same platform, packages and sources)",
    ]
    run(root, provenance={"finished": "earlier", "source_digest": "x"}, error=ERRORS[0])
    row = compare_all([FIXMATCH], root, path)[0]
    assert (row.verdict, row.because) == (IDENTICAL, "it is the committed run")


def test_elsewhere_the_tolerance_holds_and_a_difference_is_no_warning(tmp_path, committed):
    path, allowed = committed(), 3 * np.std(list(ERRORS.values()), ddof=1)
    for shift, word in ((0.0, IDENTICAL), (0.99, WITHIN), (1.01, DIFFERS)):
        run(tmp_path / "mine", provenance={"processor": "Q"}, error=ERRORS[0] + shift * allowed)
        error, ece = compare_all([FIXMATCH], tmp_path / "mine", path)
        assert (error.verdict, error.expected, error.because) == (word, False, "other processor")
        assert error.tolerance == pytest.approx(allowed) and not error.warning
        assert ece.tolerance == 0.01  # all seeds have the same
    assert agreement.summary([error, ece])[1].startswith("differs: fixmatch on fashion, 100 labels, seed 0: error (%)")


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"source_digest": "987654321098765432"}, "other source digest"),
        ({"threads": 2, "device": "NVIDIA H200"}, "other device, threads"),
        ({"packages": {"torch": "1.0", "numpy": "9"}}, "other packages"),
        ({"packages": {"torch": "2.0"}}, "other torch, packages"),
        ({"processor": "Q", "instructions": None}, "other processor; unknown instructions"),
        ({"processor": None, "platform": "mac"}, "other platform; unknown processor"),
    ],
)
def test_any_other_or_unknown_fact_means_elsewhere(tmp_path, committed, change, because):
    path = committed()
    run(tmp_path / "mine", provenance=change, error=0.31)
    row = compare_all([FIXMATCH], tmp_path / "mine", path)[0]
    assert (row.because, row.expected, row.verdict, row.warning) == (because, False, WITHIN, False)


def test_a_digest_of_digits_survives_the_file_and_absent_facts_are_unknown(tmp_path, committed):
    path = committed()
    assert set(records.load_numbers(path)["source_digest"]) == {PLATFORM["source_digest"]}
    known = facts(run(tmp_path / "mine", error=0.31))
    assert unlike(known, {}) == "unknown " + ", ".join(agreement.FACTS).replace("_", " ")
    unknown = ["processor", "instructions", "platform", "packages"]
    pd.read_csv(path, dtype=str).drop(columns=unknown).to_csv(path, index=False)
    row = compare_all([FIXMATCH], tmp_path / "mine", path)[0]
    assert (row.verdict, row.because) == (WITHIN, "unknown processor, instructions, platform, packages")


def test_only_finished_runs_are_compared_each_once_and_absent_numbers_are_named(tmp_path, committed):
    path, root = committed(seeds=(0, 1)), tmp_path / "mine"
    run(root, FIXMATCH, error=0.5)
    run(root, FIXMATCH.with_(seed=3))
    assert compare_all([FIXMATCH], root, tmp_path / "none.csv") == []
    same = FIXMATCH.with_(threshold=0.95)  # a default spelt out
    rows = compare_all([FIXMATCH, same, FIXMATCH.with_(seed=1), FIXMATCH.with_(seed=3)], root, path)
    assert [(row.experiment.seed, row.metric, row.verdict) for row in rows] == [
        (0, "error", DIFFERS), (0, "ece_15", IDENTICAL), (3, "error", ABSENT), (3, "ece_15", ABSENT),
    ]  # fmt: skip
    assert rows[0].tolerance == 0 and rows[2].because == "no committed run" and not rows[2].warning
    assert rows[2].row() | {"run": ""} == {
        "run": "", "metric": "error (%)", "measured": "30.00", "committed": "", "difference": "", "tolerance": "",
        "agreement": "not committed", "because": "no committed run",
    }  # fmt: skip
    cells = rows[0].row()
    assert (cells["measured"], cells["committed"], cells["difference"]) == ("50.00", "30.00", "+20.00")
    assert agreement.summary(rows)[0].endswith("2 runs: 1 differs, 1 not committed")
    nothing = ["agreement with the committed results: none is committed of these runs"]
    assert agreement.summary(rows[2:]) == agreement.summary([]) == nothing


def test_an_undefined_number_agrees_with_an_undefined_one_alone(tmp_path, committed):
    path = committed(ece_15=None)
    run(tmp_path / "mine", error=ERRORS[0], ece_15=None)
    assert [row.verdict for row in compare_all([FIXMATCH], tmp_path / "mine", path)] == [IDENTICAL, IDENTICAL]
    run(tmp_path / "mine", error=ERRORS[0], ece_15=METRICS["ece_15"])
    row = compare_all([FIXMATCH], tmp_path / "mine", path)[1]
    assert (row.verdict, row.row()["committed"], row.row()["difference"]) == (DIFFERS, "undefined", "")
