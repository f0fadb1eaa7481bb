"""Margins and their running records, sharpening, mixing and chunked forwards against loops and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repro.methods.few_labels.common import (
    add_margins,
    area_under_margin,
    average_margins,
    chunked_logits,
    draw_weight,
    interleaving,
    last_of_each,
    margins,
    mixup,
    sharpen,
    zeroed_margins,
)
from tests.methods.few_labels.fakes import TinyNetwork, bn_state

# Margins


SEEDS = st.integers(0, 10_000)


def margin_by_loop(row, k):
    return row[k] - max(z for j, z in enumerate(row) if j != k)


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 6), st.integers(2, 6), st.booleans())
def test_margins_are_the_lead_over_the_best_other_class(seed, n, classes, ties):
    logits = np.random.default_rng(seed).normal(size=(n, classes)) * 3
    logits = logits.round() if ties else logits
    expected = [[margin_by_loop(row, k) for k in range(classes)] for row in logits]
    got = margins(torch.tensor(logits, requires_grad=True))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert not got.requires_grad
    assert ((got > 0).sum(dim=1) <= 1).all()
    np.testing.assert_allclose(margins(torch.tensor(logits) + 7.5), expected, atol=1e-12)  # shifts cancel


def test_margins_by_hand():
    got = margins(torch.tensor([[2.0, 5.0, 1.0], [-3.0, -1.0, -2.0], [4.0, 4.0, 0.0]]))
    assert got.tolist() == [[-3, 3, -4], [-2, 1, -1], [0, 0, -4]]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_last_of_each(index):
    expected = [value not in index[position + 1 :] for position, value in enumerate(index)]
    assert last_of_each(torch.tensor(index)).tolist() == expected


def batches(seed, steps=5, pool=6, classes=3, largest=9):
    """Indices with repeats, and margins of every class."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        n = int(rng.integers(1, largest))
        yield rng.integers(pool, size=n), rng.normal(size=(n, classes)) * 3


@settings(max_examples=40)
@given(SEEDS, st.sampled_from(["one", "count", "some"]))
def test_sums_count_what_they_are_told(seed, which):
    total, visits = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    heard = {i: [] for i in range(6)}
    for index, margin in batches(seed):
        counted = chosen(index, which)
        total, visits = add_margins(
            total, visits, torch.tensor(index), torch.tensor(margin[:, 0]), torch.tensor(counted)
        )
        for i, m, yes in zip(index, margin[:, 0], counted, strict=True):
            if yes:
                heard[i].append(m)
    assert visits.tolist() == [len(heard[i]) for i in range(6)]
    np.testing.assert_allclose(total, [sum(heard[i]) for i in range(6)], atol=1e-12)
    np.testing.assert_allclose(
        area_under_margin(total, visits), [np.mean(heard[i]) if heard[i] else 0 for i in range(6)], atol=1e-12
    )


def chosen(index, which):
    """Which entries count: the last of each index, all, or whole indices (an odd one's last alone)."""
    last = np.array([value not in index[position + 1 :] for position, value in enumerate(index)])
    return {"one": last, "count": np.ones(len(index), bool), "some": last & (index % 2 == 1)}[which]


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(["one", "count", "some"]), st.sampled_from([0.997, 1.0, 0.5, 0.0]))
def test_averages_follow_the_recursion_in_the_order_of_the_batch(seed, which, delta):
    apm, visits = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    table, seen = np.zeros((6, 3)), np.zeros(6, int)
    for index, margin in batches(seed):
        counted = chosen(index, which)
        apm, visits = average_margins(
            apm, visits, torch.tensor(index), torch.tensor(margin), delta, torch.tensor(counted)
        )
        for i, m, yes in zip(index, margin, counted, strict=True):
            if yes:
                a = delta / (1 + seen[i])
                table[i] = a * m + (1 - a) * table[i]
                seen[i] += 1
        assert visits.tolist() == seen.tolist()
        np.testing.assert_allclose(apm, table, atol=1e-10)


def test_nothing_moves_in_place_and_autocast_does_not_round():
    apm, visits = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    index, margin = torch.tensor([1, 1]), torch.tensor([[1.2345678, 3.0], [2.3456789, 5.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved, _ = average_margins(apm, visits, index, margin, 1.0, torch.tensor([True, True]))
    np.testing.assert_allclose(moved[1], [1.79012335, 4.0], rtol=1e-6)
    assert apm.abs().sum() == 0 and visits.sum() == 0


def test_a_million_margins_add_up():
    """Single precision would stop near 2^24 steps of 1; the sum of a long run is kept in double."""
    total, visits = torch.tensor([3e7], dtype=torch.float64), torch.tensor([30_000_000])
    margin = torch.full((1,), 0.25)
    for _ in range(4):
        total, visits = add_margins(total, visits, torch.tensor([0]), margin, torch.tensor([True]))
    assert total.item() == 3e7 + 1 and visits.item() == 30_000_004


# Mixing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 3.0))
def test_sharpen_is_the_normalised_power(seed, temperature):
    probs = np.random.default_rng(seed).dirichlet(np.ones(5), size=4)
    powered = np.array([[p ** (1 / temperature) for p in row] for row in probs])
    expected = powered / powered.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sharpen(torch.tensor(probs), temperature), expected, rtol=1e-8)


def test_sharpen_at_its_edges():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.6, 0.3, 0.1]])
    np.testing.assert_allclose(sharpen(probs, 1.0), probs, atol=1e-7)
    # p ** 100 is below the smallest float32 for every class of the uniform row; its logarithm is not.
    cold = sharpen(torch.cat([probs, torch.full((1, 3), 1 / 3)]), 0.01)
    np.testing.assert_allclose(cold, [[0.5, 0.5, 0], [0, 1, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], atol=1e-6)
    np.testing.assert_allclose(sharpen(torch.full((1, 200), 1 / 200), 0.01).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_draws_follow_beta(alpha):
    torch.manual_seed(0)
    drawn = torch.stack([draw_weight(alpha, torch.device("cpu")) for _ in range(2000)])
    assert drawn[0].ndim == 0
    assert stats.kstest(drawn.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_mixup_gives_images_and_targets_the_same_partner_and_weight():
    torch.manual_seed(3)
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 2, 3, 3)
    targets = torch.eye(6)
    mixed, soft = mixup(images, targets, 0.75)
    np.testing.assert_allclose(soft.sum(dim=1), np.ones(6), rtol=1e-6)
    # A row of `soft` is the recipe of its image: weight at itself, the rest at its partner.
    np.testing.assert_allclose(mixed[:, 0, 0, 0], soft @ torch.arange(6.0), rtol=1e-5)
    own = soft.diag()
    assert (own >= 0.5).all() and len({round(v, 5) for v in own[own < 1].tolist()}) == 1
    np.testing.assert_allclose(soft.sum(dim=0), np.ones(6), rtol=1e-6)  # the partners are a permutation


def swapped_lists(chunks):
    """The released codes' exchange, on lists: group g of chunk 0 for that of chunk g; longer groups last."""
    count, size = len(chunks), len(chunks[0])
    lengths = [size // count + (g >= count - size % count) for g in range(count)]
    starts = [sum(lengths[:g]) for g in range(count)]
    pieces = [[list(c[s : s + n]) for s, n in zip(starts, lengths, strict=True)] for c in chunks]
    for g in range(1, count):
        pieces[0][g], pieces[g][g] = pieces[g][g], pieces[0][g]
    return [value for piece in pieces for group in piece for value in group]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6))
def test_interleaving(size, chunks):
    order = interleaving(size, chunks, "cpu")
    expected = swapped_lists([range(c * size, (c + 1) * size) for c in range(chunks)])
    assert order.tolist() == expected
    assert order[order].tolist() == list(range(size * chunks))


def test_interleaving_gives_the_first_chunk_a_share_of_all():
    shares = torch.bincount(interleaving(7, 3, "cpu")[:7] // 7, minlength=3)
    assert shares.tolist() == [2, 2, 3]


@pytest.mark.parametrize("interleaved", [False, True])
def test_chunked_logits(interleaved):
    images = torch.randn(12, 3, 2, 2)
    network, reference = TinyNetwork().train(), TinyNetwork().train()
    got = chunked_logits(network, images, 4, interleaved)
    order = interleaving(4, 3, "cpu") if interleaved else torch.arange(12)
    expected = torch.empty(12, 3)
    for start in range(0, 12, 4):
        rows = order[start : start + 4]
        expected[rows] = reference(images[rows])  # its own batch statistics
        if start == 0:
            moved = bn_state(reference)
    np.testing.assert_allclose(got.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    for key, value in bn_state(network).items():
        assert torch.equal(value, moved[key]), key


def test_chunked_logits_pass_gradients_from_every_chunk():
    images = torch.randn(6, 3, 2, 2, requires_grad=True)
    logits = chunked_logits(TinyNetwork(), images, 2, True)
    (logits * torch.randn(6, 3)).sum().backward()
    assert (images.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_zeroed_margins_follow_the_released_steps():
    """The runner-up of all-negative logits is the zero in place of the top one, so the lead there is wrong."""
    got = zeroed_margins(torch.tensor([[2.0, 5.0, 1.0], [-3.0, -1.0, -2.0], [4.0, 4.0, 0.0]]))
    assert got.tolist() == [[-3, 3, -4], [-2, -1, -1], [4, 4, -4]]
    logits = np.random.default_rng(0).normal(size=(40, 5)) * 3
    expected = np.empty_like(logits)
    for row, z in enumerate(logits):
        others = [0.0 if j == z.argmax() else value for j, value in enumerate(z)]
        expected[row] = z - z.max()
        expected[row, z.argmax()] = z.max() - max(others)
    np.testing.assert_allclose(zeroed_margins(torch.tensor(logits)), expected, atol=1e-12)
