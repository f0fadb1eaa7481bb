"""FlexMatch: learning status, thresholds and memory against a Counter and a list, over several steps."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels.fixmatch import (
    FlexMatch,
    FlexMatchSettings,
    flexible_threshold,
    learning_status,
    remember,
)
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    cross_entropy,
    gradient_reaches,
    now,
    softmax,
    view,
)


def counted_status(selected, classes, warmup):
    """The toolboxes' way: count, divide by the largest count (unset samples compete only during warm-up)."""
    counts = Counter(selected)
    rivals = [counts[k] for k in range(classes)] + ([counts[-1]] if warmup else [])
    largest = max(rivals)
    return [counts[k] / largest if largest else 0.0 for k in range(classes)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30), st.booleans())
def test_learning_status_counts(selected, warmup):
    got = learning_status(torch.tensor(selected), 5, warmup)
    np.testing.assert_allclose(got, counted_status(selected, 5, warmup), rtol=1e-6)
    assert ((got >= 0) & (got <= 1)).all()


def test_learning_status_of_nothing_and_of_everything():
    assert learning_status(torch.full((7,), -1), 3).tolist() == [0, 0, 0]
    assert learning_status(torch.full((7,), -1), 3, threshold_warmup=False).tolist() == [0, 0, 0]
    assert learning_status(torch.full((7,), 2), 3).tolist() == [0, 0, 1]


def test_warmup_holds_status_down_while_most_samples_are_unset():
    selected = torch.tensor([0, 0, 1] + [-1] * 7)
    np.testing.assert_allclose(learning_status(selected, 3), [2 / 7, 1 / 7, 0])
    np.testing.assert_allclose(learning_status(selected, 3, threshold_warmup=False), [1, 0.5, 0])


def test_flexible_threshold_is_convex_and_ends_at_tau():
    beta = torch.linspace(0, 1, 21, dtype=torch.float64)
    tau = flexible_threshold(beta, 0.95)
    assert (
        tau[0] == 0
        and tau[-1] == pytest.approx(0.95)
        and (tau.diff() > 0).all()
        and (tau.diff().diff() > 0).all()
    )
    assert tau[10].item() == pytest.approx(0.95 / 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_remember_writes_in_order_of_the_batch(seed, size):
    rng = np.random.default_rng(seed)
    before = rng.integers(-1, 3, size=6)
    index, label, confident = rng.integers(6, size=size), rng.integers(3, size=size), rng.random(size) < 0.5
    expected = before.copy()
    for i, k, sure in zip(index, label, confident, strict=True):
        if sure:
            expected[i] = k
    got = remember(*(torch.tensor(v) for v in (before, index, label, confident)))
    assert got.tolist() == expected.tolist()


def build(pool_size=8, **changes):
    return FlexMatch(FlexMatchSettings(**changes), TinyNetwork(), FakeViews(), CLASSES, pool_size)


@pytest.mark.parametrize("warmup", [True, False])
def test_masks_over_several_steps_use_the_status_before_the_step(warmup):
    method, rng = build(threshold=0.6, threshold_warmup=warmup), np.random.default_rng(0)
    memory, seen = [-1] * 8, set()
    for _ in range(12):
        index, label = rng.integers(8, size=6), rng.integers(CLASSES, size=6)  # duplicates on purpose
        confidence = rng.random(6).astype(np.float32)
        beta = counted_status(memory, CLASSES, warmup)
        expected = [p >= 0.6 * beta[k] / (2 - beta[k]) for p, k in zip(confidence, label, strict=True)]
        got = method.select(torch.tensor(index), torch.tensor(label), torch.tensor(confidence))
        assert got.tolist() == expected
        for i, k, p in zip(index, label, confidence, strict=True):
            if p >= 0.6:
                memory[i] = int(k)
        assert method.selected.tolist() == memory
        seen.add(tuple(beta))
    assert len(seen) > 3  # the thresholds did move


def test_losses_of_a_step():
    method, samples = build(unlabelled_weight=3.0), batch()
    method.selected = torch.tensor([0, 0, 0, 1, 1, 2, -1, 0])
    losses = method.losses(samples, now())
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    logits = (
        TinyNetwork()(torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])).detach().numpy()
    )
    weak, strong = softmax(logits[4:12]), logits[12:]
    beta = counted_status([0, 0, 0, 1, 1, 2, -1, 0], CLASSES, True)
    label = weak.argmax(1)
    mask = [p >= 0.95 * beta[k] / (2 - beta[k]) for p, k in zip(weak.max(1), label, strict=True)]
    assert 0 < sum(mask) < 8
    assert losses.pseudo["positive"].mask.tolist() == mask
    expected = 3.0 * (cross_entropy(strong, label) * mask).sum() / 8
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(logits[:4], samples["labelled"].labels).mean(), rel=1e-5
    )
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())


def test_half_precision_confidence():
    method = build(threshold=0.5)
    mask = method.select(
        torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([0.75, 0.25], dtype=torch.bfloat16)
    )
    assert mask.tolist() == [True, True] and method.selected[0] == 1
