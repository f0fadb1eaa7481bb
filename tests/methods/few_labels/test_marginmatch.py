"""MarginMatch: the extra class, its subset and gamma, and whole runs against dicts and loops."""

import numpy as np
import pytest
import torch
from torch import nn

from repro.methods.few_labels.marginmatch import (
    ExtraClassNetwork,
    MarginMatch,
    MarginMatchSettings,
    margin_threshold,
)
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    cross_entropy,
    items,
    now,
    pool,
    softmax,
    view,
)
from tests.methods.few_labels.test_fixmatch import counted_status

N = 12
SMALL = {"warmup": 2, "refresh_every": 2, "redraw_every": 6, "delay": 1, "subset_share": 0.25, "threshold": 0.5}


def build(pool_size=N, **changes):
    torch.manual_seed(4)
    return MarginMatch(MarginMatchSettings(**SMALL | changes), TinyNetwork(), FakeViews(), CLASSES, pool_size)


# The network with one more class


def test_the_wrapped_network_classifies_k_classes_and_trains_one_more():
    inner = TinyNetwork()
    network = ExtraClassNetwork(inner).eval()
    images = torch.randn(5, 3, 2, 2)
    assert torch.equal(network(images), inner(images)) and network(images).shape == (5, CLASSES)
    every = network.all_logits(images)
    assert every.shape == (5, CLASSES + 1)
    torch.testing.assert_close(every[:, :CLASSES], inner(images))
    torch.testing.assert_close(every[:, CLASSES:], inner.features(images) @ network.extra.weight.T)  # bias starts at 0


def test_its_weights_start_as_those_of_a_head_with_one_more_class():
    network = nn.Module()
    network.head = nn.Linear(4000, 10)
    assert ExtraClassNetwork(network).extra.weight.std().item() == pytest.approx((2 / 4011) ** 0.5, rel=0.05)


# Gamma and the subset


@pytest.mark.parametrize(
    ("pool_size", "classes", "expected"), [(50_000, 10, 500), (50_000, 100, 500), (5_000, 1000, 5), (12, 3, 1)]
)
def test_size_of_the_subset(pool_size, classes, expected):
    method = MarginMatch(MarginMatchSettings(), TinyNetwork(), FakeViews(), classes, pool_size)
    assert len(method.subset) == expected


def test_the_subset_comes_after_warm_up_changes_and_ends():
    method, subsets, gammas = build(pool_size=200, subset_until=0.8), [], []
    for step in range(20):
        method.subset_visits += 1  # a redraw clears it
        method.subset_apm += 0.5
        method.renew(now(step, 20))
        members = set(method.mislabelled.nonzero()[:, 0].tolist())
        subsets.append(members)
        gammas.append(method.gamma.item())
        if step in (2, 8, 14):
            assert method.subset_visits.sum() == 0 and method.subset_apm.sum() == 0
            assert members == set(method.subset.tolist())
    assert [len(members) for members in subsets] == [0] * 2 + [50] * 14 + [0] * 4
    assert subsets[2] == subsets[7] and subsets[8] == subsets[13] and subsets[14] == subsets[15]
    assert subsets[2] != subsets[8] != subsets[14]
    # Every second step, from the second after a redraw: ages 2, 4 and so on; constant once the subset has gone.
    assert gammas == [0] * 4 + [1, 1, 2, 2, 2, 2, 1, 1, 2, 2, 2, 2] + [2] * 4


@pytest.mark.parametrize(("delay", "first"), [(0, 4), (1, 4), (2, 6), (3, 6)])
def test_a_new_subset_waits_before_it_moves_gamma(delay, first):
    """Of the refreshes at steps 4 and 6, ages 2 and 4 of the subset, the first that is older than the delay."""
    method, moved = build(delay=delay), []
    for step in range(8):
        method.subset_apm += 1.0
        method.renew(now(step, 20))
        moved += [step] if method.gamma > 0 else []
    assert moved[0] == first


def test_only_unlabelled_images_of_the_pool_are_drawn():
    method, samples = build(), pool(N, {0: 1})
    samples.unlabelled = torch.tensor([1, 4, 6, 11])
    method.begin_stage(0, samples)
    for _ in range(20):
        method.renew(now(2, 20))
        assert len(set(method.subset.tolist())) == 3 and set(method.subset.tolist()) <= {1, 4, 6, 11}


class Reference:
    """The note in dicts and loops; which images are mislabelled is read from the method, for torch draws them."""

    def __init__(self, method):
        self.settings, self.method = method.settings, method
        self.network = build().network
        self.network.load_state_dict(method.network.state_dict())
        self.apm, self.seen, self.memory, self.gamma, self.subset = {}, {}, [-1] * N, 0.0, []
        self.subset_apm, self.subset_seen = {}, {}

    def renew(self, step, steps):
        settings, age = self.settings, step - self.settings.warmup
        if step / steps >= settings.subset_until:
            self.subset = []
        elif age >= 0 and age % settings.redraw_every == 0:
            self.subset, self.subset_apm, self.subset_seen = self.method.subset.tolist(), {}, {}
        elif age > 0 and step % settings.refresh_every == 0 and age % settings.redraw_every > settings.delay:
            values = [self.subset_apm[i][-1] if i in self.subset_apm else 0.0 for i in self.subset]
            self.gamma = np.quantile(values, settings.percentile)

    def step(self, samples, step, steps, draw):
        settings, labelled, unlabelled = self.settings, samples["labelled"], samples["unlabelled"]
        self.renew(step, steps)
        images = [
            view(labelled.images, 2 * draw + 1),
            view(unlabelled.images, 2 * draw),
            -view(unlabelled.images, draw),
        ]
        logits = self.network.all_logits(torch.cat(images)).detach().double().numpy()
        b, u = len(labelled.labels), len(unlabelled.labels)
        own, weak, strong = logits[:b], logits[b : b + u], logits[b + u :]
        index = unlabelled.index.tolist()
        for position, (i, z) in enumerate(zip(index, weak, strict=True)):
            if i in index[position + 1 :]:
                continue
            table, seen = (self.subset_apm, self.subset_seen) if i in self.subset else (self.apm, self.seen)
            a = settings.delta / (1 + seen.get(i, 0))
            margin = np.array([z[k] - np.delete(z, k).max() for k in range(CLASSES + 1)])
            table[i] = a * margin + (1 - a) * table.get(i, np.zeros(CLASSES + 1))
            seen[i] = seen.get(i, 0) + 1
        probs = softmax(weak[:, :CLASSES])
        beta = counted_status(self.memory, CLASSES, True)
        mask = []
        for i, p in zip(index, probs, strict=True):
            k = p.argmax()
            table = self.subset_apm if i in self.subset else self.apm
            sure = p[k] >= settings.threshold * beta[k] / (2 - beta[k])
            mask.append(sure and (step < settings.warmup or table[i][k] >= self.gamma))
        for i, p in zip(index, probs, strict=True):
            if p.max() >= settings.threshold and i not in self.subset:
                self.memory[i] = int(p.argmax())
        target = [CLASSES if i in self.subset else int(p.argmax()) for i, p in zip(index, probs, strict=True)]
        weight = [np.mean(mask) if i in self.subset else float(m) for i, m in zip(index, mask, strict=True)]
        used = [bool(m) and i not in self.subset for i, m in zip(index, mask, strict=True)]
        consistency = settings.unlabelled_weight * np.mean(cross_entropy(strong, target) * np.array(weight))
        return cross_entropy(own, labelled.labels.numpy()).mean(), consistency, used


@pytest.mark.parametrize("changes", [{}, {"unlabelled_weight": 2.0}, {"percentile": 0.3, "delta": 0.5}])
def test_runs_by_loops(changes):
    method = build(**changes)
    with torch.no_grad():
        method.network.extra.bias += 0.8  # the extra class wins sometimes
        method.network.network.head.weight *= 4
    reference, rng = Reference(method), np.random.default_rng(0)
    extra_wins, thresholds, masked = 0, set(), 0
    for draw, step in enumerate(range(20)):
        unlabelled = items(8, 30 + step, torch.full((8,), -1), torch.tensor(rng.integers(N, size=8)))
        samples = {"labelled": items(4, 60 + step), "unlabelled": unlabelled}
        losses = method.losses(samples, now(step, 20))
        supervised, consistency, used = reference.step(samples, step, 20, draw)
        assert losses.terms["supervised"].item() == pytest.approx(supervised, rel=1e-4)
        assert losses.terms["consistency"].item() == pytest.approx(consistency, rel=1e-4, abs=1e-6)
        assert losses.pseudo["positive"].mask.tolist() == used
        assert method.selected.tolist() == reference.memory
        assert method.gamma.item() == pytest.approx(reference.gamma, rel=1e-4, abs=1e-5)
        thresholds.add(round(reference.gamma, 4))
        masked += sum(used)
        with torch.no_grad():
            extra_wins += int((method.apm.argmax(dim=1) == CLASSES).sum())
    for i in range(N):
        np.testing.assert_allclose(method.apm[i], reference.apm.get(i, np.zeros(CLASSES + 1)), rtol=1e-3, atol=1e-4)
    assert len(thresholds) > 3 and 5 < masked < 150 and extra_wins > 0


def test_mislabelled_images_are_taught_the_extra_class():
    """Their strong view alone: the gradient at class K is negative for them and positive for the others."""
    table = nn.Parameter(torch.zeros(20, CLASSES + 1))
    method = build(threshold=0.0)
    method.network.all_logits = lambda images: table[: len(images)]
    method.mislabelled[2] = True
    losses = method.losses(batch(), now(3, 20))
    (gradient,) = torch.autograd.grad(losses.terms["consistency"], table)
    assert gradient[:12].abs().sum() == 0
    assert gradient[14, CLASSES] < 0
    others = [row for row in range(12, 20) if row != 14]
    assert (gradient[others, CLASSES] >= 0).all() and not losses.pseudo["positive"].mask[2]


@pytest.mark.parametrize("n", [1, 2, 20, 137])
def test_gamma_is_a_percentile_or_near_the_top(n):
    apm = torch.randn(n, dtype=torch.float64)
    for percentile in (0.0, 0.5, 0.95, 1.0):
        assert margin_threshold(apm, percentile).item() == pytest.approx(np.quantile(apm, percentile))
    # .95 of a hundredth of the way down the descending list
    ranked = sorted(apm.tolist(), reverse=True)
    assert margin_threshold(apm, 0.95, "released").item() == ranked[1 if n == 137 else 0]
