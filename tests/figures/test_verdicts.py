"""The figure of claims: where effects lie, how they look by verdict, and what is said of pairs that did not run."""

import pytest

from figures import claims
from figures.verdicts import LOOKS, claim_effects
from repro.grid import PAPERS
from tests.fake_runs import write_run

CLAIMS = PAPERS["commatch"].claims


def decided(root, names):
    return [claims.decide(CLAIMS[name], "mini", range(5), root) for name in names]


def lines(axes, marker):
    return [line for line in axes.lines if line.get_marker() == marker]


@pytest.fixture
def few(tmp_path):
    """ComMatch above FixMatch in error by 1 to 3 points, FixMatch at .2; supervised ran once."""
    claim = next(claim for claim in CLAIMS.values() if claim.metric == "error" and claim.right.method == "fixmatch")
    for seed in range(5):
        left, right = claim.pair("mini", seed)
        write_run(left, tmp_path, error=0.21 + seed / 200)
        write_run(right, tmp_path, error=0.2)
    return tmp_path, claim.id


def test_an_effect_lies_at_the_right_of_zero_only_where_it_is_as_claimed(few):
    root, name = few
    (verdict,) = decided(root, [name])
    (axes,) = claim_effects([verdict], "Claims").axes
    assert verdict.verdict == claims.CONTRADICTED and verdict.effect > 0 and verdict.claim.direction == "lower"
    colour, marker, _ = LOOKS[claims.CONTRADICTED]
    (mean,) = lines(axes, marker)
    assert mean.get_xdata()[0] == pytest.approx(-2.0) and mean.get_color() == colour
    (seeds,) = lines(axes, "|")
    assert sorted(seeds.get_xdata()) == pytest.approx([-3, -2.5, -2, -1.5, -1])
    interval = next(line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_linewidth() == 2)
    assert sorted(interval.get_xdata()) == pytest.approx(sorted([-100 * verdict.low, -100 * verdict.high]))


def test_claims_that_were_not_run_say_so_and_units_have_panels(few):
    root, name = few
    every = decided(root, CLAIMS)
    figure = claim_effects(every, "Claims of ComMatch")
    units = ["points" if one.metric.percent else one.metric.title for one in every]
    assert len(figure.axes) == len(dict.fromkeys(units)) > 1
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert said == [claims.NOT_RUN] * sum(one.verdict == claims.NOT_RUN for one in every) and said
    labels = [label.get_text().replace("\n", " ") for axes in figure.axes for label in axes.get_yticklabels()]
    assert len(labels) == len(every) and any("(n = 5)" in label for label in labels)


def test_a_margin_is_drawn_and_nothing_at_all_is_a_message(tmp_path):
    claim = next(claim for claim in PAPERS["calibratemix"].claims.values() if claim.margin)
    for seed in (0, 1):
        for side in claim.pair("mini", seed):
            write_run(side, tmp_path, error=0.2)
    verdict = claims.decide(claim, "mini", range(5), tmp_path)
    (axes,) = claim_effects([verdict], "Claims").axes
    (margin,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert list(margin.get_xdata()) == pytest.approx([-100 * claim.margin] * 2)
    figure = claim_effects(decided(tmp_path, list(CLAIMS)[:2]), "Claims")
    assert "no pair of runs is finished" in figure.axes[0].texts[0].get_text()
