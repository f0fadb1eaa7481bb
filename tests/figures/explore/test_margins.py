import base64
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ipywidgets import VBox
from matplotlib.figure import Figure

from figures.calibration import Margins
from figures.explore import margins as explore
from figures.explore.margins import Position, around, blend, measure, mixups
from repro.data import splits
from repro.data.catalogue import SOURCES
from tests.fake_margins import BASE, MIXED, write_pair
from tests.fake_outputs import texts


def some_margins(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(n, generator=generator)
    label, truth = torch.randint(3, (n,), generator=generator), torch.randint(-1, 3, (n,), generator=generator)
    return Margins(torch.arange(n) + 5, score, label, truth, "APM")


@given(st.integers(1, 60), st.integers(0, 100), st.integers(0, 4))
def test_images_around_a_percentile_and_their_shares_equal_brute_force(n, percentile, seed):
    margins = some_margins(n, seed)
    places = around(margins, percentile, shown=7).tolist()
    order = sorted(range(n), key=lambda i: float(margins.score[i]))
    middle = round(percentile / 100 * (n - 1))
    assert places == order[order.index(places[0]) :][: len(places)] and len(places) == min(7, n)
    assert order[middle] in places
    found = measure(margins, percentile, shown=7)
    assert found.score == float(margins.score[order[middle]])
    first = order.index(places[0])
    for share, part in ((found.shown, places), (found.harder, order[:first]), (found.easier, order[first + 7 :])):
        known = [int(margins.label[i]) == int(margins.truth[i]) for i in part if margins.truth[i] >= 0]
        assert share == (pytest.approx(sum(known) / len(known)) if known else None)


def test_ends_are_the_hardest_and_the_easiest():
    margins = some_margins(50)
    assert margins.score[around(margins, 0)[0]] == margins.score.min()
    assert margins.score[around(margins, 100)[-1]] == margins.score.max()
    assert len(around(some_margins(0), 50)) == 0


@pytest.fixture
def saved(tmp_path):
    write_pair(tmp_path)
    return explore.load_saved(MIXED, tmp_path)


def test_saved_images_are_those_of_the_pool(saved, tmp_path):
    pool, _ = splits.open_pool(MIXED.split)
    assert torch.equal(saved.images, pool.images) and saved.classes == pool.classes
    assert saved.sizes == (10, 50) and explore.load_saved(BASE, tmp_path) is None


def test_mixups_cross_both_divides_with_the_least_alike_of_the_half(saved):
    source = SOURCES["fashion"]
    easy_hard, hard_easy = mixups(saved, Position(pool=1, batch=3))
    assert easy_hard.halves == ("easy", "hard") and hard_easy.halves == ("hard", "easy")
    assert easy_hard.labelled.score.min() >= hard_easy.labelled.score.max()
    assert len(easy_hard.labelled.index) == len(hard_easy.labelled.index) == 5
    mean, std = (torch.tensor(values).double().view(-1, 1, 1) for values in (source.mean, source.std))

    def cosine(i, j):
        a, b = (((saved.images[k].double() / 255 - mean) / std).flatten() for k in (i, j))
        return float(a @ b / (a.norm() * b.norm()))

    for mixup in (easy_hard, hard_easy):
        pairs = list(zip(mixup.labelled.index.tolist(), mixup.unlabelled.index.tolist(), strict=True))
        assert mixup.similarity == pytest.approx(sum(cosine(i, j) for i, j in pairs) / len(pairs), abs=1e-4)
        assert mixup.similarity < mixup.candidates
    alike = mixups(saved, Position(pool=1, batch=3, partner="similar"))
    assert alike[0].similarity > easy_hard.candidates


def test_mixups_follow_from_the_seed_and_leave_the_callers_generator_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (mixups(saved, Position(batch=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first[0].unlabelled.index, second[0].unlabelled.index)
    assert not torch.equal(first[0].unlabelled.index, other[0].unlabelled.index)


def test_other_pairings_and_too_few_margins(saved):
    hard = dataclasses.replace(saved, settings=dataclasses.replace(saved.settings, pairing="hard-hard"))
    (only,) = mixups(hard, Position())
    assert only.halves == ("hard", "hard")
    none = saved.margins["unlabelled"].only(torch.arange(0))
    early = dataclasses.replace(saved, margins=saved.margins | {"unlabelled": none})
    assert mixups(early, Position()) == [] and "warm-up was not over" in explore.text(early, Position())
    assert explore.Canvas(early).draw(Position()).width == explore.WIDTH


def test_a_mixture_is_the_weighted_mean_of_pixels():
    own, other = torch.tensor([[[0, 255, 100]]], dtype=torch.uint8), torch.tensor([[[255, 255, 0]]], dtype=torch.uint8)
    assert blend(own, other, 0.25).tolist() == [[[191, 255, 25]]] and torch.equal(blend(own, other, 1.0), own)


def test_moving_a_slider_changes_the_picture(saved):
    explorer = explore.Explorer(saved)
    moves = {"percentile": 90, "weight": 0.9, "batch": 4, "partner": "similar", "kind": "labelled"}
    for name, value in moves.items():
        drawn, numbers = explorer.picture.value, explorer.numbers.value
        explorer.controls[name].value = value
        assert explorer.picture.value != drawn, name
        assert (explorer.numbers.value != numbers) == (name in ("percentile", "kind"))
    assert "AUM" in explorer.numbers.value and explorer.position.pool == 15


def test_controls_only_where_somebody_can_move_them(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = explore.explore(MIXED, tmp_path)
    assert isinstance(still, Figure) and "percentile 5 of 230 images" in texts(still)
    assert "keeps no margins" in texts(explore.explore(BASE, tmp_path))
    assert "not run" in texts(explore.explore(MIXED.with_(seed=5), tmp_path))
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = explore.explore(MIXED, tmp_path)
    assert isinstance(explorer, VBox)
    assert base64.b64decode(explorer._repr_mimebundle_()["image/png"]).startswith(b"\x89PNG")
