"""CalibrateMix: halves, partners, mixed loss and whole steps against loops and hand-computed cases."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.few_labels import calibratemix
from repro.methods.few_labels.calibratemix import (
    BASES,
    PAIRINGS,
    CalibrateMix,
    CalibrateMixSettings,
    cosine_similarity,
    draw_pairs,
    draw_partner,
    halves,
    mixed_loss,
)
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    bn_state,
    items,
    now,
    view,
)

# Pairs


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


@pytest.mark.parametrize(("b", "u"), [(1, 5), (5, 1)])
def test_batches_too_small_to_halve_are_refused(b, u):
    with pytest.raises(ValueError, match=f"batches of {b} and {u}"):
        draw_pairs(torch.zeros(b), torch.zeros(u), torch.zeros(b, u), "easy-hard", 15, "dissimilar")


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


# Steps


N = 12


def build(network=None, **changes):
    settings = CalibrateMixSettings(**{"warmup": 100, "ema_p": 0.6, "threshold": 0.4} | changes)
    return CalibrateMix(settings, network or TinyNetwork(), FakeViews(), CLASSES, N)


@pytest.mark.parametrize("base", BASES)
def test_settings_are_flat_and_have_the_base_s_defaults_and_ranges(base):
    mine = {field.name: field for field in dataclasses.fields(CalibrateMixSettings)}
    for field in dataclasses.fields(BASES[base].Settings):
        assert mine[field.name].default == field.default, field.name
        assert mine[field.name].type is field.type, field.name
        for rule in ("low", "high", "choices"):
            assert mine[field.name].metadata[rule] == field.metadata[rule], field.name
    assert CalibrateMixSettings(base=base).base_settings() == BASES[base].Settings()
    changed = CalibrateMixSettings(base=base, unlabelled_weight=2.0).base_settings()
    assert changed == BASES[base].Settings(unlabelled_weight=2.0)


@pytest.mark.parametrize("base", BASES)
def test_a_warm_up_is_its_base_bit_by_bit(base):
    method = build(base=base)
    alone = BASES[base](method.settings.base_settings(), TinyNetwork(), FakeViews(), CLASSES, N)
    for step in range(4):
        samples = batch()
        expected, got = alone.losses(samples, now(step)), method.losses(samples, now(step))
        assert got.terms.keys() == expected.terms.keys()
        for name, term in expected.terms.items():
            assert torch.equal(got.terms[name], term), name
        assert torch.equal(got.pseudo["positive"].mask, expected.pseudo["positive"].mask)
        for key, value in alone.state_dict().items():
            assert torch.equal(method.base.state_dict()[key], value), key
    assert method.base.views.calls == alone.views.calls


class Reference:
    """Steps 1 to 8 of the note in dicts and loops; the base's own loss comes from a base of its own."""

    def __init__(self, settings):
        self.settings, self.network = settings, TinyNetwork()
        self.base = BASES[settings.base](settings.base_settings(), self.network, FakeViews(), CLASSES, N)
        self.sum, self.visits, self.apm, self.seen = {}, {}, {}, {}

    def forward(self, own, mixed, weak, strong, samples):
        sizes = [len(own), sum(map(len, mixed)), len(weak), len(strong)]
        z, z_mixed, z_weak, z_strong = self.network(torch.cat([own, *mixed, weak, strong])).split(sizes)
        terms = self.base.unlabelled(z_weak.detach(), z_strong, samples["unlabelled"].index).terms
        return {"supervised": F.cross_entropy(z, samples["labelled"].labels)} | terms, z, z_mixed, z_weak

    def margin(self, z, k):
        return float(z[k] - max(value for j, value in enumerate(z) if j != k))

    def step(self, samples, mixing, draw, weights):
        labelled, unlabelled, settings = samples["labelled"], samples["unlabelled"], self.settings
        own, weak = view(labelled.images, 2 * draw + 1), view(unlabelled.images, 2 * draw)
        strong = -view(unlabelled.images, draw)
        terms, z, _, z_weak = self.forward(own, [], weak, strong, samples)
        z, z_weak = z.detach(), z_weak.detach()
        label, aum, apm = z_weak.argmax(dim=1).tolist(), [], []
        for i, row, y in zip(labelled.index.tolist(), z, labelled.labels.tolist(), strict=True):
            self.sum[i] = self.sum.get(i, 0.0) + self.margin(row, y)
            self.visits[i] = self.visits.get(i, 0) + 1
            aum.append(self.sum[i] / self.visits[i])
        if not mixing:
            return terms
        for i, row, k in zip(unlabelled.index.tolist(), z_weak, label, strict=True):
            a = settings.delta / (1 + self.seen.get(i, 0))
            former = self.apm.get(i, np.zeros(CLASSES))
            self.apm[i] = a * np.array([self.margin(row, c) for c in range(CLASSES)]) + (1 - a) * former
            self.seen[i] = self.seen.get(i, 0) + 1
            apm.append(self.apm[i][k])
        images, partners, rows = [], [], []
        ranked = {"l": sorted(range(len(aum)), key=aum.__getitem__), "u": sorted(range(len(apm)), key=apm.__getitem__)}
        for (mine, other), weight in zip(PAIRINGS[settings.pairing], weights, strict=False):
            half = {
                (name, part): order[: len(order) // 2] if part == "hard" else order[len(order) // 2 :]
                for name, order in ranked.items()
                for part in ("hard", "easy")
            }
            mixed = []
            for i in half["l", mine]:
                j = min(
                    half["u", other],
                    key=lambda j: F.cosine_similarity(own[i].flatten(), weak[j].flatten(), dim=0).item(),
                )
                mixed.append(weight * own[i] + (1 - weight) * weak[j])
                partners.append(label[j])
                rows.append(int(labelled.labels[i]))
            images.append(torch.stack(mixed))
        if settings.ssl_terms == "first":
            z_mixed, second = self.network(torch.cat(images)), {}
        else:
            second, _, z_mixed, _ = self.forward(own, images, weak, strong, samples)
        first = {} if settings.ssl_terms == "second" else terms
        total = {name: first.get(name, 0) + second.get(name, 0) for name in terms}
        total["mixed"], start = 0.0, 0
        for part, weight in zip(images, weights, strict=False):
            end = start + len(part)
            total["mixed"] += mixed_by_loops(
                z_mixed[start:end].detach().double().numpy(),
                rows[start:end],
                partners[start:end],
                weight,
                settings.mixed_loss,
            )
            start = end
        return total


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_loss": "ce"},
        {"ssl_terms": "first"},
        {"ssl_terms": "second"},
        {"pairing": "M1"},
        {"pairing": "M2", "delta": 0.5},
        {"pairing": "easy-easy"},
        {"pairing": "hard-hard", "unlabelled_weight": 2.0},
    ],
)
@pytest.mark.parametrize(("b", "u"), [(4, 8), (5, 7)])
def test_steps_across_the_end_of_warm_up(monkeypatch, base, changes, b, u):
    weights = [0.3, 0.85]
    method = build(base=base, pool=1, **changes)
    reference = Reference(method.settings)
    mixups = len(PAIRINGS[method.settings.pairing])
    for draw, step in enumerate([98, 99, 100, 101]):
        drawn = iter(weights[:mixups])
        monkeypatch.setattr(calibratemix, "draw_weight", lambda alpha, device, drawn=drawn: torch.tensor(next(drawn)))
        samples = {"labelled": items(b, 10 + draw), "unlabelled": items(u, 20 + draw, torch.full((u,), -1))}
        got = method.losses(samples, now(step)).terms
        expected = reference.step(samples, step >= 100, draw, weights)
        assert got.keys() == expected.keys()
        assert {k: float(v.detach()) for k, v in got.items()} == pytest.approx(
            {k: float(torch.as_tensor(v).detach()) for k, v in expected.items()}, rel=1e-4, abs=1e-6
        )
    for i in range(b):
        assert method.margin_sum[i].item() == pytest.approx(reference.sum[i], rel=1e-5)
        assert method.visits[i] == reference.visits[i]
    for i in range(u):
        np.testing.assert_allclose(method.apm[i], reference.apm[i], rtol=1e-4, atol=1e-6)
        assert method.apm_visits[i] == reference.seen[i] == 2
    for key, value in bn_state(reference.network).items():
        np.testing.assert_allclose(bn_state(method.network)[key], value, rtol=1e-5, atol=1e-7)


def state_of_base(method):
    return {k: v.clone() for k, v in method.base.named_buffers(recurse=False)}


@pytest.mark.parametrize("base", BASES)
def test_the_base_moves_once_or_twice_in_a_step(base):
    twice, once = build(base=base), build(base=base, second_updates=False)
    alone = BASES[base](once.settings.base_settings(), TinyNetwork(), FakeViews(), CLASSES, N)
    samples = batch()
    alone.losses(samples, now(200))
    twice.losses(samples, now(200))
    losses = once.losses(samples, now(200))
    losses.terms["mixed"].backward()
    assert state_of_base(once).keys() == dict(alone.named_buffers(recurse=False)).keys()
    for key, value in alone.named_buffers(recurse=False):
        assert torch.equal(state_of_base(once)[key], value), key
    for key, value in bn_state(alone.network).items():
        assert torch.equal(bn_state(once.network)[key], value), key
    assert bn_state(twice.network)["body.2.num_batches_tracked"] == 2
    if base in ("softmatch", "freematch"):
        assert not torch.equal(state_of_base(twice)["marginal"], alone.marginal)


def test_held_puts_everything_back_when_its_body_fails():
    method = build(base="softmatch")
    before = state_of_base(method)
    with pytest.raises(ZeroDivisionError), calibratemix.held(method.base):
        method.base.unlabelled(torch.randn(4, 3), torch.randn(4, 3), torch.arange(4))
        1 / 0  # noqa: B018
    for key, value in before.items():
        assert torch.equal(state_of_base(method)[key], value), key


def test_apm_starts_after_warm_up_unless_told_otherwise():
    late, early = build(), build(apm_during_warmup=True)
    for method in (late, early):
        method.losses(batch(), now(5))
        assert method.visits.sum() == 4
    assert late.apm.abs().sum() == 0 and late.apm_visits.sum() == 0
    assert early.apm_visits.tolist() == [1] * 8 + [0] * 4 and (early.apm[:8].abs().sum(dim=1) > 0).all()


def test_features_decide_similarity_without_a_trace():
    pixels, features = build(), build(similarity="features")
    own, weak = torch.rand(4, 3, 2, 2), torch.rand(6, 3, 2, 2)
    before = bn_state(features.network)
    got = features.similarity(own, weak)
    assert all(torch.equal(value, before[key]) for key, value in bn_state(features.network).items())
    assert not got.requires_grad
    rows = features.network.features(torch.cat([own, weak])).detach()
    np.testing.assert_allclose(got, cosine_similarity(rows[:4], rows[4:]), atol=1e-6)
    np.testing.assert_allclose(pixels.similarity(own, weak), cosine_similarity(own, weak), atol=1e-7)


@pytest.mark.parametrize("rule", ["one", "count"])
def test_records_of_repeated_indices(rule):
    """As in a batch of 64 drawn from 40 labels: the released code hears the last of equal indices, `count` all."""
    method, rng = build(duplicates=rule), np.random.default_rng(3)
    sums, visits, apm, seen, last = {}, {}, {}, {}, {}
    for _ in range(6):
        index = rng.integers(4, size=7)
        logits, labels = rng.normal(size=(7, CLASSES)), rng.integers(CLASSES, size=7)
        label = logits.argmax(axis=1)
        arguments = [torch.tensor(v) for v in (index, logits)]
        aum = method.record_labelled(*arguments, torch.tensor(labels))
        got_apm = method.record_unlabelled(*arguments, torch.tensor(label))
        for position, (i, z, y) in enumerate(zip(index, logits, labels, strict=True)):
            last[i] = label[position]
            if rule == "one" and i in index[position + 1 :]:
                continue
            lead = np.array([z[c] - max(np.delete(z, c)) for c in range(CLASSES)])
            sums[i], visits[i] = sums.get(i, 0) + lead[y], visits.get(i, 0) + 1
            a = 0.997 / (1 + seen.get(i, 0))
            apm[i], seen[i] = a * lead + (1 - a) * apm.get(i, np.zeros(CLASSES)), seen.get(i, 0) + 1
        np.testing.assert_allclose(aum, [sums[i] / visits[i] for i in index], rtol=1e-9)
        np.testing.assert_allclose(
            got_apm, [apm[i][k] for i, k in zip(index, label, strict=True)], rtol=1e-4, atol=1e-6
        )
    report = method.keep()
    for i in range(N):
        known = i in sums
        assert report["pseudo_label"][i] == (last[i] if known else -1)
        assert report["aum"][i].item() == pytest.approx(sums[i] / visits[i] if known else np.nan, nan_ok=True, rel=1e-6)
        assert report["apm"][i].item() == pytest.approx(apm[i][last[i]] if known else np.nan, nan_ok=True, rel=1e-4)


def test_ctaugment_is_shown_the_labelled_images_once():
    method, samples, teacher = build(), batch(), TinyNetwork(seed=3).eval()
    reference = copy.deepcopy(teacher)
    method.losses(samples, now(200, teacher=teacher))
    ((predict, images, labels),) = method.base.views.learnt
    assert torch.equal(images, samples["labelled"].images) and torch.equal(labels, samples["labelled"].labels)
    np.testing.assert_allclose(predict(view(images)).detach(), reference(view(images)).softmax(dim=1).detach())
