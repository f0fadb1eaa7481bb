import pytest

from repro.experiment import Experiment, run_id
from repro.grid import EMBEDDED, PAPERS, TITLES, Claim, Column, Row, Table, ablation, checked_seeds, place
from repro.papers.published import MASKS, TAGS
from repro.settings import SettingError

PAPER, SMALL = (Column("cifar10", 40),), (Column("fashion", 100), Column("fashion", 250))
FIXMATCH, STRICT = Row("FixMatch", "fixmatch"), Row("strict", "fixmatch", {"threshold": 0.99})
TABLE = Table("t", "T", "commatch", (FIXMATCH, STRICT), PAPER, SMALL)


def claim(**changes) -> Claim:
    words = {"id": "c", "text": "", "source": "", "paper": "commatch", "metric": "error"}
    sides = {"left": FIXMATCH, "right": STRICT, "column": PAPER[0], "small": SMALL[0]}
    return Claim(**words | sides | changes)


def test_experiments_fill_every_cell_and_finish_one_seed_before_the_next():
    asked = [(e.seed, e.labels, dict(e.overrides)) for e in TABLE.experiments("mini", (3, 0))]
    one_seed = [(100, {}), (100, {"threshold": 0.99}), (250, {}), (250, {"threshold": 0.99})]
    assert asked == [(seed, *cell) for seed in (3, 0) for cell in one_seed]


def test_a_scale_changes_the_columns_and_nothing_else():
    paper = TABLE.experiments("paper", (0,))
    assert [(e.data, e.labels, e.scale) for e in paper] == [("cifar10", 40, "paper")] * 2
    assert {e.scale for e in TABLE.experiments("tiny", (0,))} == {"tiny"}
    with pytest.raises(SettingError, match="unknown scale 'huge'.*known: mini, paper, tiny"):
        TABLE.experiments("huge")


@pytest.mark.parametrize(
    ("column", "title"),
    [
        (("fashion", 100), "Fashion-MNIST part, 100 labels"),
        (("svhn_extra", 40), "SVHN with extra, 40 labels"),
        (("scenes", 20, MASKS), "Fashion scenes, 20 masks"),
        (("voc", 92, MASKS), "Pascal VOC 2012, 92 masks"),
        (("scenes", 500, TAGS), "Fashion scenes, 500 tagged images"),
    ],
)
def test_a_column_says_what_its_number_counts(column, title):
    assert Column(*column).title == title


def test_every_data_set_has_a_title():
    assert {name for paper in PAPERS.values() for name in paper.DATA} <= set(TITLES) and set(EMBEDDED) <= set(TITLES)


@pytest.mark.parametrize("paper", PAPERS.values(), ids=lambda paper: paper.TITLE)
def test_all_columns_of_a_paper_count_its_own_kind_of_label(paper):
    tables = (*paper.TABLES.values(), *paper.ABLATIONS.values())
    columns = {column for table in tables for column in (*table.columns, *table.small)}
    columns |= {column for claim in paper.CLAIMS.values() for column in (claim.column, claim.small)}
    assert {column.words for column in columns} == {paper.BUDGET}
    assert {place(item) for item in paper.main_experiments("mini", (0,))} <= columns


@pytest.mark.parametrize("seeds", [(), (0, 0), (-1,), (0.0,), (True,), ("0",)])
def test_seeds_must_be_different_whole_numbers(seeds):
    with pytest.raises(SettingError, match="one or more different whole numbers from 0"):
        checked_seeds(seeds)


def test_an_ablation_is_parameters():
    variations = (
        ("whole", {}),
        ("no negatives", {"negative_weight": 0.0}),
        ("another method", {"method": "fixmatch", "dropout": 0.3}),
    )
    table = ablation("a", "A", "commatch", "commatch", variations, PAPER, SMALL[:1])
    whole, without, other = table.experiments("mini", (1,))
    assert whole == Experiment(method="commatch", seed=1)
    assert without == whole.with_(negative_weight=0.0)
    assert other == Experiment(method="fixmatch", seed=1, overrides=(("dropout", 0.3),))


def test_an_unknown_parameter_of_an_ablation_is_refused_by_name():
    table = ablation("a", "A", "commatch", "commatch", [("typo", {"negative_wieght": 0.0})], PAPER, SMALL)
    with pytest.raises(SettingError, match="negative_wieght.*did you mean 'negative_weight'"):
        table.experiments("mini", (0,))


def test_a_default_spelt_out_shares_the_run_of_the_default():
    spelt = Table(
        "t", "T", "commatch", (FIXMATCH, Row("same", "fixmatch", {"threshold": 0.95})), PAPER, SMALL[:1]
    )
    assert len({run_id(e) for e in spelt.experiments("mini", (0,))}) == 1


def test_only_keeps_rows_in_order_and_names_unknown_ones():
    assert [row.label for row in TABLE.only(["strict"]).rows] == ["strict"]
    assert TABLE.only(small=SMALL[1:]).columns_at("mini") == SMALL[1:]
    with pytest.raises(SettingError, match="unknown row of t 'Strict'.*did you mean 'strict'"):
        TABLE.only(["Strict"])


def test_both_sides_of_a_claim_share_their_labelled_subset():
    for scale in ("mini", "paper"):
        left, right = claim().pair(scale, 7)
        assert left.split == right.split and left.seed == 7
    assert claim().column_at("tiny") == SMALL[0]
    assert claim(right=None).pair("mini", 0)[1] is None
    assert len(claim(right=None).experiments("mini", (0, 1))) == 2
    assert len(claim().experiments("mini", (0, 1))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"direction": "below"}, "unknown direction 'below'"), ({"margin": -0.1}, "margin of claim c is -0.1")],
)
def test_a_malformed_claim_is_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        claim(**changes)
