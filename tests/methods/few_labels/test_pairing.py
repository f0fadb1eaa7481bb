"""CalibrateMix's halves, partners, weights and mixed loss against loops and hand-computed cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels.calibratemix import (
    PAIRINGS,
    cosine_similarity,
    draw_pairs,
    draw_partner,
    draw_weight,
    halves,
    mixed_loss,
)


def test_halves_by_hand():
    parts = halves(torch.tensor([3.0, -1.0, 2.0, -1.0, 0.0]))
    assert parts["hard"].tolist() == [1, 3] and parts["easy"].tolist() == [4, 2, 0]
    tied = halves(torch.zeros(6))
    assert tied["hard"].tolist() == [0, 1, 2] and tied["easy"].tolist() == [3, 4, 5]


def test_similarity_by_loops_and_under_autocast():
    x, y = torch.randn(3, 2, 4), torch.randn(5, 2, 4)
    y[4] = 0
    expected = [[np.dot(a, b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12) for b in y.flatten(1).numpy()]
                for a in x.flatten(1).numpy()]  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cosine_similarity(x, y)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(("rule", "pool_size"), [("dissimilar", 3), ("similar", 3), ("random", 3), ("similar", 50)])
def test_partners_are_uniform_among_their_candidates(rule, pool_size):
    similarity = torch.tensor([[0.5, -0.2, 0.9, -0.7, 0.1, 0.3]]).expand(6000, 6)
    candidates = {"dissimilar": {3, 1, 4}, "similar": {2, 0, 5}, "random": set(range(6))}[rule]
    if pool_size > 6:
        candidates = set(range(6))
    partner = draw_partner(similarity, pool_size, rule)
    counts = torch.bincount(partner, minlength=6) / 6000
    assert {k for k in range(6) if counts[k] > 0} == candidates
    np.testing.assert_allclose(counts[list(candidates)], 1 / len(candidates), atol=0.03)


def test_ties_in_similarity_go_to_the_lower_column():
    assert draw_partner(torch.zeros(4, 7), 1, "dissimilar").tolist() == [0] * 4
    assert draw_partner(torch.zeros(4, 7), 1, "similar").tolist() == [0] * 4


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 11), st.sampled_from(sorted(PAIRINGS)))
def test_pairs_cross_the_divides_as_named(seed, b, u, pairing):
    rng = np.random.default_rng(seed)
    aum, apm = rng.integers(0, 4, size=b).astype(float), rng.integers(0, 4, size=u).astype(float)  # ties
    similarity = rng.normal(size=(b, u))
    arguments = [torch.tensor(v) for v in (aum, apm, similarity)]
    pairs = draw_pairs(*arguments, pairing, 1, "dissimilar")
    order = {name: sorted(range(len(score)), key=lambda i: score[i]) for name, score in (("l", aum), ("u", apm))}
    part = {
        (name, half): ranks[: len(ranks) // 2] if half == "hard" else ranks[len(ranks) // 2 :]
        for name, ranks in order.items()
        for half in ("hard", "easy")
    }
    assert len(pairs) == len(PAIRINGS[pairing])
    if pairing == "random":
        assert sorted(torch.cat([row for row, _ in pairs]).tolist()) == list(range(b))
        sizes = [len(row) for row, _ in pairs]
        assert sizes == [b - b // 2, b // 2]
        return
    for (row, column), (own, other) in zip(pairs, PAIRINGS[pairing], strict=True):
        assert row.tolist() == part["l", own]
        expected = [min(part["u", other], key=lambda j: similarity[i, j]) for i in row.tolist()]
        assert column.tolist() == expected


def test_random_halves_differ_from_step_to_step_and_reach_every_image():
    aum, apm, similarity = torch.arange(4.0), torch.arange(6.0), torch.zeros(4, 6)
    drawn = [draw_pairs(aum, apm, similarity, "random", 15, "random") for _ in range(200)]
    met = {pair for pairs in drawn for row, column in pairs for pair in zip(row.tolist(), column.tolist(), strict=True)}
    assert met == {(i, j) for i in range(4) for j in range(6)}


@pytest.mark.parametrize(("b", "u"), [(1, 5), (5, 1)])
def test_batches_too_small_to_halve_are_refused(b, u):
    with pytest.raises(ValueError, match=f"batches of {b} and {u}"):
        draw_pairs(torch.zeros(b), torch.zeros(u), torch.zeros(b, u), "easy-hard", 15, "dissimilar")


@pytest.mark.parametrize("alpha", [0.4, 2.0])
def test_the_weight_is_beta_and_not_folded(alpha):
    draws = torch.stack([draw_weight(alpha, torch.device("cpu")) for _ in range(4000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    assert (draws < 0.5).float().mean().item() == pytest.approx(0.5, abs=0.04)


def mixed_by_loops(logits, first, second, weight, kind):
    """Released form: one loss for each label, element by element."""

    def loss(labels):
        total = 0.0
        for z, y in zip(logits, labels, strict=True):
            if kind == "ce":
                total += np.log(np.exp(z).sum()) - z[y]
            else:
                p = 1 / (1 + np.exp(-z))
                total -= sum(np.log(p[k] if k == y else 1 - p[k]) for k in range(len(z))) / len(z)
        return total / len(logits)

    return weight * loss(first) + (1 - weight) * loss(second)


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_mixed_loss_by_loops_and_gradcheck(kind):
    rng = np.random.default_rng(0)
    logits, first, second = rng.normal(size=(6, 4)) * 2, rng.integers(4, size=6), rng.integers(4, size=6)
    eye = torch.eye(4, dtype=torch.float64)
    for weight in (0.0, 0.3, 1.0):
        target = weight * eye[first] + (1 - weight) * eye[second]
        got = mixed_loss(torch.tensor(logits), target, kind)
        assert got.item() == pytest.approx(mixed_by_loops(logits, first, second, weight, kind), rel=1e-10)
    z = torch.tensor(logits, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: mixed_loss(z, target, kind), (z,))
