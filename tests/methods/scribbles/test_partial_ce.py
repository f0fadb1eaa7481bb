"""Partial cross-entropy: the same loss on, at the second stage's rate."""

import pytest

from repro.methods.scribbles.baselines import PartialCE
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import FIRST, SECOND, build


@pytest.mark.parametrize("now", [FIRST, SECOND], ids=["first", "second"])
def test_the_loss_is_the_mean_over_the_seeds_over_the_batch(now):
    built, sample = build(PartialCE), fakes.items()
    losses = built.losses({"scribbles": sample}, now)
    crop = fakes.again(sample)
    surprise = fakes.surprise(fakes.TinyNetwork()(built.network.passes[0][0]), crop.masks)
    assert 5 < len(surprise) < crop.masks.numel() / 4
    expected = sum(surprise.values()).item() / len(surprise) / 3
    assert losses.terms.keys() == {"seeds"} and losses.pseudo == {}
    assert losses.terms["seeds"].item() == pytest.approx(expected, rel=1e-5)
