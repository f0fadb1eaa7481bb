"""Sharpening, mixup, interleaving and chunked forwards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repro.methods.few_labels.common import chunked_logits, draw_weight, interleaving, mixup, sharpen
from tests.methods.few_labels.fakes import TinyNetwork, bn_state


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


def test_sharpen_raises_the_top_class_only():
    probs = torch.tensor([[0.6, 0.3, 0.1]])
    sharp = sharpen(probs, 0.5)
    np.testing.assert_allclose(sharp, [[0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_mixing_weight_is_a_folded_beta(alpha):
    torch.manual_seed(0)
    drawn = torch.stack([mixing_weight(alpha, "cpu") for _ in range(2000)])
    assert drawn[0].ndim == 0 and drawn.min() >= 0.5 and drawn.max() <= 1
    folded = stats.beta(alpha, alpha)
    assert stats.kstest(drawn.numpy(), lambda x: 2 * folded.cdf(x) - 1).pvalue > 1e-3


def test_blend_by_hand():
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
    got = blend(values, torch.tensor([1, 2, 2]), torch.tensor(0.75))
    np.testing.assert_allclose(got, [[0.75, 0.25], [1.0, 1.75], [4.0, 4.0]])


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


def test_mixup_follows_the_global_generator():
    images, targets = torch.rand(5, 3, 2, 2), torch.eye(5)
    torch.manual_seed(1)
    first, state = mixup(images, targets, 0.5), torch.get_rng_state()
    second = mixup(images, targets, 0.5)
    torch.set_rng_state(state)
    again = mixup(images, targets, 0.5)
    assert torch.equal(second[0], again[0]) and torch.equal(second[1], again[1])
    assert not torch.equal(first[0], second[0])


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
