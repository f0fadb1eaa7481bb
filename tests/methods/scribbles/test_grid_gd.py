"""Grid-GD: seeds and lambda times the relaxed Potts energy of the view, both by loops."""

import math

import pytest

from repro.methods.scribbles.baselines import GridGD
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import SECOND, build

COSTS = {
    "bilinear": lambda s, t: (s * (1 - t)).sum(), "quadratic": lambda s, t: ((s - t) ** 2).sum(),
    "tv": lambda s, t: (s - t).abs().sum(),
}  # fmt: skip


def potts(probs, x, roi, neighbours, cost):
    """Batch mean of 1 / |N| sum w cost of pairs inside the region of interest."""
    steps = [(0, 1), (1, 0), (1, 1), (-1, 1)][: neighbours // 2]
    means = []
    for s, image, inside in zip(probs.double(), x.double(), roi, strict=True):
        height, width = inside.shape
        pairs = [
            ((i, j), (i + down, j + right), math.hypot(down, right))
            for down, right in steps for i in range(height) for j in range(width)
            if 0 <= i + down < height and j + right < width and inside[i, j] and inside[i + down, j + right]
        ]  # fmt: skip
        gaps = [((image[:, *p] - image[:, *q]) ** 2).sum().item() for p, q, _ in pairs]
        variance = sum(gaps) / len(gaps)
        total = sum(
            math.exp(-gap / 2 / variance) / far * cost(s[:, *p], s[:, *q])
            for gap, (p, q, far) in zip(gaps, pairs, strict=True)
        )
        means.append(total / len(pairs))
    return (sum(means) / len(means)).item()


@pytest.mark.parametrize(("relaxation", "neighbours"), [("bilinear", 8), ("quadratic", 8), ("tv", 4)])
def test_a_step_is_that_of_loops(relaxation, neighbours):
    sample = fakes.items((1, 4))
    built = build(GridGD, potts_weight=7.0, relaxation=relaxation, neighbours=neighbours)
    losses = built.losses({"scribbles": sample}, SECOND)
    crop, x = fakes.again(sample), built.network.passes[0][0]
    assert crop.padding.any()
    logits = fakes.TinyNetwork()(x).detach()
    expected = potts(logits.softmax(1), x, ~crop.padding, neighbours, COSTS[relaxation])
    assert list(losses.terms) == ["seeds", "potts"] and losses.pseudo == {}
    assert losses.terms["potts"].item() == pytest.approx(7 * expected, rel=1e-4)
    surprise = fakes.surprise(logits, crop.masks)
    assert losses.terms["seeds"].item() == pytest.approx(sum(surprise.values()).item() / len(surprise) / 2, rel=1e-4)
