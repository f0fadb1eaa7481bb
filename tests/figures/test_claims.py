"""Claims: both resampling tests against brute force and SciPy, verdicts from runs, statistics beyond stored metrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from figures import claims
from figures.claims import MINIMUM_SEEDS, as_frame, bootstrap_interval, decide, gap_correlation, judge, scope
from figures.claims import sign_flip_test as flips
from repro.files import save_state
from repro.grid import PAPERS, Claim, Column, Row
from repro.papers.published import MASKS, Published
from repro.runs import folder_of
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run
from tests.fake_runs import write_evaluations, write_run

DIFFERENCES = st.lists(st.integers(-50, 50).map(lambda x: x / 8), min_size=1, max_size=5)


def claim(**changes) -> Claim:
    sides = {"left": Row("ComMatch", "commatch"), "right": Row("FixMatch", "fixmatch")}
    columns = {"column": Column("cifar10", 40), "small": Column("fashion", 100)}
    words = {"id": "lower", "text": "ComMatch errs less.", "source": "abstract", "paper": "commatch", "metric": "error"}
    return Claim(**words | sides | columns | changes)


def write_pairs(pairs, root, tested=None):
    """Finished runs whose left and right error are these, one pair a seed; None leaves a run out."""
    for seed, values in enumerate(pairs):
        for side, value in zip((tested or claim()).pair("mini", seed), values, strict=True):
            if value is not None:
                write_run(side, root, error=value)


# The tests


def brute_force(differences, level=0.95):
    """All n^n resamples; the interval's ends by counting."""
    n = len(differences)
    means = sorted(math.fsum(pick) / n for pick in itertools.product(differences, repeat=n))
    tail = (1 - level) / 2

    def end(values):
        return next(m for m in values if sum(x <= m + 1e-12 for x in values) / len(values) >= tail - 1e-12)

    return end(means), -end(sorted(-m for m in means))


@given(DIFFERENCES)
def test_the_interval_is_that_of_all_resamples(differences):
    assert bootstrap_interval(differences) == pytest.approx(brute_force(differences), abs=1e-12)


@given(DIFFERENCES, st.floats(0.5, 8))
def test_the_interval_turns_with_the_sign_and_grows_with_the_unit(differences, factor):
    low, high = bootstrap_interval(differences)
    assert bootstrap_interval([-d for d in differences]) == pytest.approx((-high, -low), abs=1e-12)
    assert bootstrap_interval([factor * d for d in differences]) == pytest.approx((factor * low, factor * high))
    assert min(differences) - 1e-12 <= low <= np.mean(differences) + 1e-12 and low <= high


def test_the_interval_by_hand():
    # Means of two draws from (0, 1): 0, 1/2, 1/2, 1. A tail of a fourth reaches 0, a larger one does not.
    assert bootstrap_interval([0.0, 1.0], level=0.5) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], level=0.49) == (0.5, 0.5)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)


@given(DIFFERENCES.filter(lambda values: len(values) > 1))
def test_p_is_that_of_the_permutation_test(differences):
    exact = {"permutation_type": "samples", "alternative": "greater", "n_resamples": np.inf}
    assert flips(differences) == pytest.approx(
        stats.permutation_test((np.array(differences),), np.mean, **exact).pvalue
    )


def test_p_by_hand_with_ties_and_zeros_counted_as_reached():
    for n in range(1, 9):  # 5 is the first n under 5 %
        assert flips([1.0] * n) == 0.5**n and (0.5**n < 0.05) == (n >= MINIMUM_SEEDS == 5)
    assert flips([0.0, 0.0, 0.0]) == flips([-1.0]) == 1.0
    assert flips([1.0, 0.0]) == 0.5
    assert flips([0.1, 0.2, -0.3]) == 0.625  # sums 0.6, 0.4, 0.2, 0, 0, ...: 5 of 8 reach 0


def test_many_seeds_are_drawn_reproducibly_and_near_the_exact_values():
    values = np.random.default_rng(1).normal(0.3, 1, size=17)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    normal = stats.norm.interval(0.95, values.mean(), values.std() / math.sqrt(17))
    assert (low, high) == pytest.approx(normal, abs=0.1)  # near the central limit
    signs = 1 - 2 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    assert flips(values) == flips(values) == pytest.approx((signs @ values >= values.sum() - 1e-9).mean(), abs=0.01)
    assert flips([1.0] * 40) == 1 / (1 + claims.DRAWS), "never zero"


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [[1.0]]])
def test_differences_must_be_finite_numbers(bad):
    for test in (bootstrap_interval, flips):
        with pytest.raises(ValueError, match="one or more finite numbers"):
            test(bad)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.1] * 5, "supported"),
        ([-0.1] * 5, "contradicted"),
        ([0.1] * 4, "inconclusive"),
        ([0.0] * 6, "inconclusive"),
        ([0.1, 0.1, 0.1, 0.1, -0.01], "inconclusive"),
        ([0.1] * 7 + [-0.01], "supported"),
    ],
)
def test_verdicts_need_both_tests(gains, verdict):
    assert judge(gains) == verdict


# Deciding from runs


def test_a_supported_claim_whose_opposite_the_same_runs_contradict(tmp_path):
    pairs = [(0.20 + 0.01 * seed, 0.25 + 0.02 * seed) for seed in range(5)]
    write_pairs(pairs, tmp_path)
    found, differences = decide(claim(), root=tmp_path), [left - right for left, right in pairs]
    assert found.verdict == "supported" and found.n == 5 and not found.missing and found.p == 0.5**5
    assert found.differences == pytest.approx(differences) and found.seeds == (0, 1, 2, 3, 4)
    assert found.effect == pytest.approx(-0.07) and (found.low, found.high) == pytest.approx(brute_force(differences))
    row = found.row()
    assert row["effect"] == "-7.00 points" and row["scope"] == (
        "on the embedded data (Fashion-MNIST part, 100 labels), mini scale"
    )
    assert row["95 % interval"] == f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
    opposite = decide(claim(direction="higher"), root=tmp_path)
    assert (opposite.verdict, opposite.p) == ("contradicted", 1.0)
    frame = as_frame([found, decide(claim(id="other", metric="nll"), root=tmp_path)])
    assert frame["verdict"].to_dict() == {"lower": "supported", "other": "inconclusive"}
    assert frame.loc["other", "effect"] == "+0.000" and as_frame([]).empty


def test_too_few_seeds_show_the_effect_and_how_many_more_are_needed(tmp_path):
    write_pairs([(0.2, 0.3), (0.2, 0.4)], tmp_path)
    found = decide(claim(), seeds=(0, 1), root=tmp_path)
    assert (found.verdict, found.n) == ("inconclusive", 2)
    assert found.effect == pytest.approx(-0.15) and (found.low, found.high) == pytest.approx((-0.2, -0.1))
    assert "needs 3 more seeds" in found.explanation and "with 2, p is at least 0.25" in found.explanation
    one = decide(claim(), seeds=(0,), root=tmp_path)
    assert (one.verdict, one.n, one.low, one.high) == ("inconclusive", 1, None, None)
    assert one.row()["95 % interval"] == "" and one.row()["effect"] == "-10.00 points"


def test_only_complete_pairs_count_and_missing_runs_are_named(tmp_path):
    none = decide(claim(), root=tmp_path)
    assert (none.verdict, none.n, none.effect, none.p, none.row()["effect"]) == ("not run", 0, None, None, "")
    assert len(none.missing) == 10 and none.explanation == "no seed is finished; needs 5 seeds"
    write_pairs([(0.2, 0.3), (0.2, None), (None, None)], tmp_path)
    found = decide(claim(), seeds=(0, 1, 2), root=tmp_path)
    pairs = [claim().pair("mini", seed) for seed in (1, 2)]
    assert found.seeds == (0,)
    assert found.missing == tuple(folder_of(side).name for side in (pairs[0][1], *pairs[1]))


def test_a_margin_forgives_a_small_loss_and_no_larger_one(tmp_path):
    write_pairs([(0.302, 0.300)] * 5, tmp_path)
    for margin, verdict in ((0.0, "contradicted"), (0.005, "supported"), (0.001, "contradicted")):
        assert decide(claim(margin=margin), root=tmp_path).verdict == verdict
    write_pairs([(0.3, 0.3)] * 5, tmp_path)
    found = decide(claim(), root=tmp_path)
    assert (found.verdict, found.effect, found.low, found.high, found.p) == ("inconclusive", 0, 0, 0, 1)


def test_rule_and_weights_choose_the_number(tmp_path):
    left, right = claim().pair("mini", 0)
    write_run(left, tmp_path, error=0.2, live={"error": 0.5})
    write_run(right, tmp_path, error=0.3, live={"error": 0.3}, best={"error": 0.1})
    for options, effect in (({}, -0.1), ({"rule": "best"}, 0.1), ({"weights": "live"}, 0.2)):
        assert decide(claim(), seeds=(0,), root=tmp_path, **options).effect == pytest.approx(effect)
    with pytest.raises(SettingError, match="unknown reporting rule"):
        decide(claim(), root=tmp_path, rule="first")
    with pytest.raises(SettingError, match="unknown metric 'ece'"):
        decide(claim(metric="ece"), root=tmp_path)


def test_a_claim_that_more_is_better_has_its_published_effect_and_scope(tmp_path):
    stated = Published("CSL", "T", "Cityscapes", "1/16 (186)", "", "CSL", "", "mIoU", 1.5, None, "invented for a test")
    sides = {"paper": "csl", "left": Row("CSL", "csl"), "right": Row("UniMatch", "unimatch"), "metric": "miou"}
    columns = {"column": Column("voc", 92, MASKS), "small": Column("scenes", 20, MASKS)}
    tested = claim(**sides, **columns, direction="higher", published=stated)
    for seed in range(5):
        for side, miou in zip(tested.pair("mini", seed), (0.62 + 0.01 * seed, 0.6), strict=True):
            write_mask_run(side, tmp_path, steps=(100,), figures=False, miou=miou)
    found = decide(tested, root=tmp_path)
    assert found.verdict == "supported" and found.effect == pytest.approx(0.04)
    row = found.row()
    assert (row["effect"], row["metric"], row["published effect"]) == (
        "+4.00 points", "mIoU (%)", "+1.50 points, Cityscapes, 186 masks",
    )  # fmt: skip
    assert decide(tested, "paper", root=tmp_path).scope == "on Pascal VOC 2012, 92 masks, paper scale"
    less = Published("P", "T", "CIFAR-10", "40", "", "M", "", "error_rate_reduction_points", 3.6, None, "readme")
    assert decide(claim(published=less), root=tmp_path).row()["published effect"] == "-3.60 points, CIFAR-10, 40 labels"


def test_several_claims_share_one_scope():
    several = list(PAPERS["trust_region"].claims.values())
    places = "Fashion scenes, scribble length 0 / 30 / 50 / 80 / 100 %"
    assert scope(several, "mini") == f"on the embedded data ({places}), mini scale"
    title = several[0].column_at("paper").title
    assert scope([several[0], claim()], "paper") == f"on {title} and CIFAR-10, 40 labels, paper scale"


# Statistics beyond stored metrics


def test_the_early_error_is_the_first_from_a_tenth_of_the_steps_and_decides_a_faster_start(tmp_path):
    for errors, early in (({50: 0.9, 100: 0.8, 500: 0.5, 1000: 0.2}, 0.8), ({100: 0.7, 200: 0.6, 300: 0.5}, 0.7)):
        write_evaluations(tmp_path, errors)
        assert claims.early_error(tmp_path) == early
        assert claims.early_error(tmp_path, "live") == pytest.approx(early + 0.01)
    assert math.isnan(claims.early_error(tmp_path / "without a history"))
    tested = claim(metric="early_error")
    write_pairs([(0.3, 0.3)] * 5, tmp_path)
    for seed in range(5):
        for side, error in zip(tested.pair("mini", seed), (0.4, 0.6), strict=True):
            write_evaluations(folder_of(side, tmp_path), {100: error, 600: 0.3})
    found = decide(tested, root=tmp_path)
    assert found.verdict == "supported" and found.effect == pytest.approx(-0.2)


def test_the_correlation_is_spearmans_over_equal_bins():
    rng = np.random.default_rng(3)
    instability, confidence, correct = rng.random(200), rng.random(200), rng.random(200) < 0.5
    bins = np.argsort(instability).reshape(10, 20)
    gaps = [abs(sum(correct[members]) / 20 - sum(confidence[members]) / 20) for members in bins]
    expected = stats.spearmanr([sum(instability[members]) / 20 for members in bins], gaps).statistic
    assert gap_correlation(instability, confidence, correct) == pytest.approx(expected)


def test_the_correlation_at_its_ends_and_where_it_is_undefined():
    instability, correct = np.repeat(np.arange(5) / 10, 4), np.ones(20, dtype=bool)
    assert gap_correlation(instability, 1 - instability, correct, bins=5) == pytest.approx(1)
    assert gap_correlation(instability, 0.5 + instability, correct, bins=5) == pytest.approx(-1)
    assert math.isnan(gap_correlation(instability, np.ones(20), correct))
    assert math.isnan(gap_correlation(np.zeros(20), instability, correct))
    assert math.isnan(gap_correlation(instability[:2], instability[:2], correct[:2]))
    assert math.isnan(gap_correlation(np.zeros(0), np.zeros(0), np.zeros(0, dtype=bool)))


def write_outputs(folder, n=40, dropout=True):
    """Instability and gap rise together: two passes over n images, all right, around a falling confidence."""
    shift = torch.arange(n).div(4, rounding_mode="floor") / 50
    top = torch.stack([0.95 - shift + shift / 2, 0.95 - shift - shift / 2])
    kept = {"pool_truth": torch.zeros(n, dtype=torch.int64), "pool_passes": torch.stack([top, 1 - top], dim=2)}
    kept["pool_truth"][-2:] = -1  # images whose truth even the report does not know
    save_state(folder / "outputs.safetensors", kept if dropout else {"pool_truth": kept["pool_truth"]})


def test_a_one_sided_claim_compares_with_zero_and_reports_undefined_seeds(tmp_path):
    assert math.isnan(claims.instability_correlation(tmp_path))
    tested = claim(right=None, metric="instability_correlation", direction="higher")
    for seed in range(6):
        write_outputs(write_run(tested.pair("mini", seed)[0], tmp_path), dropout=seed < 5)
    found = decide(tested, seeds=range(6), root=tmp_path)
    assert (found.verdict, found.n, found.undefined) == ("supported", 5, (5,))
    assert found.row()["effect"] == "+1.000"
    assert decide(tested, seeds=(5,), root=tmp_path).explanation == "undefined for seeds 5; needs 5 seeds"
