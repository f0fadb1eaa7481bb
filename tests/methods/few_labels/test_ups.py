"""UPS: selection, balancing, batch shares, rounds, losses; the whole through the loop with a resume."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from repro.methods.few_labels.ups import UPS, UPSSettings, balance, batch_shares
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    cross_entropy,
    gradient_reaches,
    items,
    now,
    pool,
    softmax,
    view,
)


def balanced_by_loops(label, deviation, selected, classes, minimum):
    """The released code's balancing, on lists."""
    members = {k: [i for i, c in enumerate(label) if c == k and selected[i]] for k in range(classes)}
    quota = max(minimum, min(len(m) for m in members.values()))
    kept = {i for m in members.values() for i in sorted(m, key=lambda i: (deviation[i], i))[:quota]}
    return [i in kept for i in range(len(label))]


@pytest.mark.parametrize("minimum", [1, 3, 25])
@pytest.mark.parametrize("seed", range(5))
def test_balance_by_loops(minimum, seed):
    rng = np.random.default_rng(seed)
    label, selected = rng.choice(3, size=40, p=[0.7, 0.2, 0.1]), rng.random(40) < 0.7
    deviation = rng.integers(5, size=40) / 100  # many ties
    got = balance(torch.tensor(label), torch.tensor(deviation), torch.tensor(selected), 3, minimum)
    assert got.tolist() == balanced_by_loops(label, deviation, selected, 3, minimum)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (40, 0, (128, 0)),
        (300, 100, (96, 32)),
        (100, 100, (64, 64)),
        (40, 40000, (64, 64)),
        (1000, 1, (128, 0)),
    ],
)
def test_batch_shares(positives, negatives, expected):
    assert batch_shares(128, positives, negatives) == expected


def build(network=None, size=12, **changes):
    return UPS(UPSSettings(**changes), network or TinyNetwork(dropout=0.3), FakeViews(), CLASSES, size)


def by_hand(logits, candidates, settings, balanced, size):
    """Buffers after a relabelling from the logits (T, n, K) of the candidates, with loops."""
    probs, soft = softmax(logits), softmax(logits / settings.negative_temperature)
    mean, spread = probs.mean(0), probs.std(0, ddof=1)
    label = mean.argmax(1)
    at_label = spread[np.arange(len(label)), label]
    selected = [mean[i].max() >= settings.positive_threshold and at_label[i] < settings.positive_stability
                for i in range(len(label))]  # fmt: skip
    if balanced:
        selected = balanced_by_loops(label, at_label, selected, CLASSES, settings.class_minimum)
    positive, negative = np.full(size, -1), np.zeros((size, CLASSES), dtype=bool)
    for row, i in enumerate(candidates):
        if selected[row]:
            positive[i] = label[row]
            continue
        for k in range(CLASSES):
            steady = soft.std(0, ddof=1)[row, k] < settings.negative_stability
            negative[i, k] = soft.mean(0)[row, k] < settings.negative_threshold and steady and k != label[row]
    return positive, negative, mean.max(1), 1 - soft.mean(0)


class Played(torch.nn.Module):
    """A network that plays recorded logits, a pass a call, for images whose first pixel is their index."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = logits, 0
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, images):
        index = (images[:, 0, 0, 0] * 255).round().long()
        chunk, self.calls = self.calls % len(self.logits), self.calls + 1
        return self.logits[chunk][index]


@pytest.mark.parametrize("balanced", [True, False])
def test_relabel_by_loops(balanced, monkeypatch):
    rng = np.random.default_rng(4)
    size, labelled = 60, {5: 0, 17: 1, 40: 2}
    scale = rng.choice([0.5, 3.0, 9.0], size=(1, size, 1))
    logits = rng.normal(size=(1, size, CLASSES)) * scale + rng.normal(size=(10, size, CLASSES)) * 0.05
    given = pool(size, labelled)
    given.images[:, 0, 0, 0] = torch.arange(size, dtype=torch.uint8)
    monkeypatch.setattr("repro.methods.few_labels.ups.IMAGES_PER_PASS", 25)  # several batches, each of ten passes
    method = build(Played(torch.tensor(logits)), size, class_minimum=2)
    method.relabel(given, balanced)
    candidates = [i for i in range(size) if i not in labelled]
    positive, negative, confidence, rejected = by_hand(
        logits[:, candidates], candidates, method.settings, balanced, size
    )
    assert 3 < (positive >= 0).sum() < 50 and negative.any() and not negative.all(axis=1).any()
    assert method.positive.tolist() == positive.tolist()
    assert method.negative.tolist() == negative.tolist()
    np.testing.assert_allclose(method.confidence[candidates], confidence, rtol=1e-5)
    np.testing.assert_allclose(method.negative_confidence[candidates], rejected, rtol=1e-5, atol=1e-6)
    assert method.positive[list(labelled)].tolist() == [-1] * 3 and not method.negative[list(labelled)].any()


def test_relabelling_forgets_the_last_round_and_leaves_the_network_as_it_was():
    method, given = build(positive_threshold=1.0, negative_threshold=0.0), pool(12, {0: 0, 1: 1})
    method.positive[5], method.negative[6, 2] = 1, True
    before = {key: value.clone() for key, value in method.network.state_dict().items()}
    method.relabel(given, balanced=True)
    assert (method.positive == -1).all() and not method.negative.any()
    assert method.network.training and method.network.body[3].training
    assert all(torch.equal(value, method.network.state_dict()[key]) for key, value in before.items())
    assert method.views.calls == [("plain", 10)]


def test_a_pool_without_hidden_labels_gets_no_pseudo_labels():
    method, given = build(size=3), pool(3, {0: 0, 1: 1, 2: 2})
    method.relabel(given, balanced=True)
    assert (method.positive == -1).all() and not method.negative.any()


def test_begin_stage_restarts_from_the_first_weights_after_relabelling(monkeypatch):
    method, given = build(balanced_rounds=2), pool(12, {0: 0, 1: 1})
    start = {key: value.clone() for key, value in method.network.state_dict().items()}
    parameters = list(method.network.parameters())
    seen = []
    monkeypatch.setattr(
        method, "relabel", lambda pool, balanced: seen.append((balanced, method.network.head.bias.clone()))
    )
    method.begin_stage(0, given)
    assert seen == []
    for stage in (1, 2, 3):
        with torch.no_grad():
            method.network.head.bias.fill_(stage)
            method.network.body[2].running_mean.fill_(9)
        method.begin_stage(stage, given)
        assert all(torch.equal(value, method.network.state_dict()[key]) for key, value in start.items())
    # Balanced before round 2 only, and judged by the network of the round that has just ended.
    assert [balanced for balanced, _ in seen] == [True, False, False]
    assert [bias[0].item() for _, bias in seen] == [1, 2, 3]
    assert all(a is b for a, b in zip(parameters, method.network.parameters(), strict=True))


def test_streams_follow_from_the_buffers():
    method, given = build(), pool(12, {0: 0, 1: 1})
    recipe = SimpleNamespace(batch=8)
    streams = method.streams(given, recipe)
    assert streams.keys() == {"positive"} and streams["positive"][0].tolist() == [0, 1]
    method.positive[[3, 7]] = torch.tensor([2, 0])
    method.negative[4, 1] = method.negative[5, 0] = method.negative[5, 2] = True
    other = build()
    other.load_state_dict(method.state_dict())
    for one in (method, other):
        streams = one.streams(given, recipe)
        assert streams["positive"][0].tolist() == [0, 1, 3, 7] and streams["positive"][1] == 6
        assert streams["negative"][0].tolist() == [4, 5] and streams["negative"][1] == 2


def step_samples(method):
    method.positive[[3, 7]] = torch.tensor([2, 0])
    method.negative[4] = torch.tensor([False, True, False])
    method.negative[5] = torch.tensor([True, False, True])
    given = torch.tensor([1, -1, -1, 1])  # index 3 twice: a duplicate counts twice
    return {
        "positive": items(4, 1, given, torch.tensor([0, 3, 7, 1])),
        "negative": items(3, 2, torch.full((3,), -1), torch.tensor([4, 5, 5])),
    }


@pytest.mark.parametrize("name", ["strong", "weak"])
def test_losses_of_a_step(name):
    method = build(TinyNetwork(dropout=1e-9), view=name)
    samples = step_samples(method)
    losses = method.losses(samples, now(3, 10, stage=1))
    sign = -1 if name == "strong" else 1
    images = torch.cat([samples["positive"].images, samples["negative"].images])
    logits = TinyNetwork()(sign * view(images)).detach().numpy()
    assert method.views.calls == [(name, 7)] and losses.pseudo == {}
    expected = cross_entropy(logits[:4], np.array([1, 2, 0, 1])).mean()
    assert losses.terms["positive"].item() == pytest.approx(expected, rel=1e-5)
    total = 0.0
    for probs, classes in zip(softmax(logits[4:]), [[1], [0, 2], [0, 2]], strict=True):
        total += sum(-np.log(max(1 - probs[k], 1e-7)) for k in classes) / (len(classes) + 1e-7)
    assert losses.terms["negative"].item() == pytest.approx(total / 3, rel=1e-5)
    assert all(gradient_reaches(term, method.network.parameters()) for term in losses.terms.values())


def test_the_first_round_is_supervised():
    method = build(TinyNetwork(dropout=1e-9))
    given = items(4, 1)
    losses = method.losses({"positive": given}, now(0, 10, stage=0))
    logits = TinyNetwork()(-view(given.images)).detach()
    assert losses.terms.keys() == {"positive"} and losses.pseudo == {}
    assert losses.terms["positive"].item() == pytest.approx(cross_entropy(logits, given.labels).mean(), rel=1e-5)


def test_pseudo_labels_of_the_pool_are_reported_once_a_round():
    method = build()
    samples = step_samples(method)
    method.confidence[3], method.negative_confidence[5] = 0.9, torch.tensor([0.99, 0.5, 0.98])
    pseudo = method.losses(samples, now(0, 10, stage=1)).pseudo
    positive, negative = pseudo["positive"], pseudo["negative"]
    assert positive.index.tolist() == list(range(12))
    assert positive.mask.nonzero()[:, 0].tolist() == [3, 7] and positive.label[[3, 7]].tolist() == [2, 0]
    assert positive.label.min() >= 0 and positive.confidence[3].item() == pytest.approx(0.9)
    assert negative.mask.nonzero().tolist() == [[4, 1], [5, 0], [5, 2]]
    assert negative.label[5].tolist() == [0, 1, 2]
    np.testing.assert_allclose(negative.confidence[5], [0.99, 0.5, 0.98])


def test_needs_dropout():
    with pytest.raises(ValueError, match="dropout > 0"):
        build(TinyNetwork())
