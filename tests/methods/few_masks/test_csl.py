"""CSL: split and weights against the SVD and plain numpy, its step against a second implementation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from repro.data.mask_views import MaskViews
from repro.methods.few_masks import csl as separation
from repro.methods.few_masks.common import cross_entropy, threshold_targets
from repro.methods.few_masks.csl import (
    BLOCK,
    CSL,
    FEATURES,
    FORMS,
    RULES,
    SCOPES,
    CSLSettings,
    Reliable,
    confidence_features,
    csl_targets,
    image_weights,
    pixel_weights,
    reliable_statistics,
    separate,
)
from repro.train import Items
from tests.methods.few_masks import fakes
from tests.methods.few_masks.fakes import (
    NOW,
    Twin,
    blocks,
    box,
    build,
    compare,
    crops,
    labelled_loss,
    pasted,
    pseudo_loss,
    threshold_oracle,
    view,
)


def maps(seed, batch=2, classes=6, size=(9, 13), scale=3.0, dtype=torch.float32):
    """Softmax maps: the larger the scale, the more confident."""
    logits = torch.randn(batch, classes, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * logits).softmax(1).to(dtype)


def some_valid(seed, shape, share=0.8):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def everywhere(probs):
    return torch.ones_like(probs[:, 0], dtype=torch.bool)


def column(*values):
    """One image of H = n, W = 1."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def features_of(probs, form):
    """c, r, q of a (K,) list of probabilities, term by term."""
    q = int(np.argmax(probs))
    others = [p for k, p in enumerate(probs) if k != q]
    m = (1 - probs[q]) / (len(probs) - 1)
    spread = sum((p - m) ** 2 for p in others)
    return probs[q], (spread + m**2 if form == "released" else -spread) / (len(probs) - 1), q


def split_of(c, r):
    """Clusters (n,) from the singular value decomposition itself; one column has one cluster."""
    left = np.linalg.svd(np.stack([c, r], 1), full_matrices=False)[0]
    return np.abs(left).argmax(1)


def weights_of(c, r, alpha=8.0, rule="or", features="both", soft=True, form="released", eps=1e-8):
    """Weights (n,) of one group of valid pixels, written down from the paper's description."""
    a = split_of(c, r)
    best = max((0, 1), key=lambda j: (c[a == j].mean() if (a == j).any() else 0.0, -j))
    rc, rr = c[a == best], r[a == best]
    var_c, var_r = (np.var(v, ddof=1) if len(v) > 1 else 0.0 for v in (rc, rr))
    z_c = (c - rc.mean()) / np.sqrt(var_c + eps)
    z_r = (rr.mean() - r) / np.sqrt(var_r + eps) * (1 if form == "released" else -1)
    z = {"both": [z_c, z_r], "confidence": [z_c], "dispersion": [z_r]}[features]
    out = np.empty(len(c))
    for i, zs in enumerate(zip(*z, strict=True)):
        if rule == "or":
            sure, distance = any(v > 0 for v in zs), sum(v**2 for v in zs)
        else:
            sure, distance = all(v > 0 for v in zs), sum(v**2 for v in zs if v < 0)
        out[i] = 1 if sure else math.exp(-distance / alpha) if soft else float(distance < 1e-12)
    return out


def groups_of(label, valid, scope):
    """Boolean masks (B, H, W) of the pixels that share a split."""
    images = np.broadcast_to(np.arange(len(label))[:, None, None], label.shape)
    if scope == "batch":
        return [valid]
    if scope == "image":
        return [valid & (images == b) for b in range(len(label))]
    return [valid & (images == b) & (label == k) for b in range(len(label)) for k in range(label.max() + 1)]


# Features


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [2, 3, 21])
@pytest.mark.parametrize("scale", [0.3, 4.0, 12.0])
def test_features_term_by_term(form, classes, scale):
    probs = maps(classes, classes=classes, size=(4, 5), scale=scale, dtype=torch.float64)
    found = confidence_features(probs, form)
    for b, i, j in np.ndindex(found.label.shape):
        c, r, q = features_of(probs[b, :, i, j].tolist(), form)
        assert found.confidence[b, i, j] == c and found.label[b, i, j] == q
        # where all others are equal the paper's form is 0 and what is left of it rounding
        assert found.residual[b, i, j].item() == pytest.approx(r, rel=1e-9, abs=1e-30 if form == "released" else 1e-20)
    assert found.label.dtype == torch.int64 and found.confidence.shape == (2, 4, 5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [2.0, 8.0, 14.0])
def test_residual_keeps_its_digits_in_float32(form, scale):
    probs = maps(2, classes=21, size=(30, 30), scale=scale)
    exact = confidence_features(probs.double(), form).residual
    found = confidence_features(probs, form).residual
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, exact, rtol=2e-6, atol=1e-30)
    if scale == 14:
        assert exact.abs().min() < 1e-10  # not only the easy ones


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    probs = maps(3).to(dtype)
    valid = everywhere(probs)
    for form in FORMS:
        weights, found = image_weights(probs, valid, form=form)
        exact, widened = image_weights(probs.float(), valid, form=form)
        assert weights.dtype == found.residual.dtype == torch.float32
        assert torch.equal(weights, exact) and torch.equal(found.residual, widened.residual)


def test_features_stay_in_their_range_and_have_no_gradient():
    probs = maps(4, classes=3, size=(40, 40), scale=1.0, dtype=torch.float64).requires_grad_()
    for form in FORMS:
        found = confidence_features(probs, form)
        signed = found.residual if form == "released" else -found.residual
        assert ((signed >= 0) & (signed < found.confidence)).all()
        assert not found.confidence.requires_grad and not found.residual.requires_grad
    assert not image_weights(probs, everywhere(probs))[0].requires_grad


# Split


@pytest.mark.parametrize(
    "form, classes", [(form, k) for form in FORMS for k in (2, 3, 6, 11, 21, 81) if (form, k) != ("paper", 2)]
)
@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0, 9.0])
def test_split_equals_the_svd(form, classes, scale):
    size = (40, 40) if classes < 50 else (20, 20)
    probs = maps(classes, batch=3, classes=classes, size=size, scale=scale)
    found, valid = confidence_features(probs, form), some_valid(classes, (3, *size))
    cluster = separate(found.confidence, found.residual, valid)
    assert cluster.dtype == torch.int64 and cluster.shape == valid.shape
    for image in range(3):
        c, r = (x[image][valid[image]].double() for x in (found.confidence, found.residual))
        left = torch.linalg.svd(torch.stack([c, r], 1), full_matrices=False)[0]
        assert torch.equal(cluster[image][valid[image]], left.abs().argmax(1))
        assert 0 < cluster[image].sum() < valid[image].sum()
    assert (cluster[~valid] == 0).all()


@examples(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(-6, 0))
def test_split_equals_the_svd_of_any_plane(seed, n, decade):
    rng = np.random.default_rng(seed)
    c = rng.uniform(0.1, 1, n)
    r = c * rng.uniform(-1, 1, n) * 10**decade
    left = np.abs(np.linalg.svd(np.stack([c, r], 1), full_matrices=False)[0])
    clear = np.abs(left[:, 0] - left[:, 1]) > 1e-9
    got = separate(column(*c), column(*r), torch.ones(1, n, 1, dtype=torch.bool)).flatten().numpy()
    assert (got == left.argmax(1))[clear].all()


def test_columns_of_very_different_size_keep_their_digits():
    """s_2 / s_1 of 1e-9: beyond the square root of float64's resolution, out of reach of eigenvalues of X^T X."""
    rng = np.random.default_rng(0)
    c, r = rng.uniform(0.5, 1, 500), rng.uniform(0, 1, 500) * 1e-9
    cluster = separate(column(*c), column(*r), torch.ones(1, 500, 1, dtype=torch.bool)).flatten()
    assert cluster.tolist() == split_of(c, r).tolist()


def test_split_in_blocks_is_the_split():
    found = confidence_features(maps(9, batch=3, size=(210, 210)))
    assert found.label.numel() > BLOCK
    valid = some_valid(9, found.label.shape)
    cluster = separate(found.confidence, found.residual, valid)
    for image in range(3):
        c, r = (x[image][valid[image]].double().numpy() for x in (found.confidence, found.residual))
        assert cluster[image][valid[image]].tolist() == split_of(c, r).tolist()


# Statistics


def test_statistics_are_numpys():
    rng = np.random.default_rng(0)
    c, r = (rng.random((4, 7, 6)).astype(np.float32) for _ in range(2))
    cluster, valid = rng.integers(0, 2, c.shape), rng.random(c.shape) < 0.7
    cluster[0] = c[0] > 0.4  # so that at least here cluster 1 wins
    got = reliable_statistics(*map(torch.from_numpy, (c, r, cluster, valid)))
    chosen = set()
    for image in range(4):
        members = [valid[image] & (cluster[image] == j) for j in (0, 1)]
        best = int(c[image][members[1]].mean(dtype=float) > c[image][members[0]].mean(dtype=float))
        chosen.add(best)
        for name, x in (("c", c), ("r", r)):
            values = x[image][members[best]].astype(float)
            assert getattr(got, f"mean_{name}")[image].item() == pytest.approx(values.mean(), rel=1e-12)
            assert getattr(got, f"var_{name}")[image].item() == pytest.approx(np.var(values, ddof=1), rel=1e-12)
    assert chosen == {0, 1} and got.mean_c.dtype == torch.float64 and got.var_r.shape == (4,)


def test_variance_survives_a_large_mean():
    c = (1 - 1e-6 * np.random.default_rng(0).random((1, 50, 50))).astype(np.float32)
    cluster, valid = torch.zeros(1, 50, 50, dtype=torch.int64), torch.ones(1, 50, 50, dtype=torch.bool)
    got = reliable_statistics(torch.from_numpy(c), torch.from_numpy(c), cluster, valid)
    assert got.var_c.item() == pytest.approx(np.var(c.astype(float), ddof=1), rel=1e-9)


def test_only_confidence_picks_the_cluster():
    ones = torch.ones(1, 4, 1, dtype=torch.bool)
    got = reliable_statistics(column(0.9, 0.9, 0.8, 0.8), column(0.1, 0.3, 0, 0), column(0, 0, 1, 1).long(), ones)
    assert got.mean_r.item() == pytest.approx(0.2) and got.var_r.item() == pytest.approx(0.02)
    equal = reliable_statistics(column(0.9, 0.9), column(0.1, 0.2), column(0, 1).long(), ones[:, :2])
    assert equal.mean_r.item() == 0.1


# Weights


def stats(mean_c=0.8, mean_r=0.1, var_c=0.01, var_r=0.0004):
    return Reliable(*(torch.tensor([v], dtype=torch.float64) for v in (mean_c, mean_r, var_c, var_r)))


def weigh(c, r, **changes):
    c, r = column(*c), column(*r)
    return pixel_weights(c, r, torch.ones_like(c, dtype=torch.bool), stats(), eps=0.0, **changes).flatten().tolist()


def test_weights_by_hand():
    """Means (0.8, 0.1), deviations (0.1, 0.02): z are (1, 1), (1, -1), (-1, 1), (-1, -2)."""
    c, r = (0.9, 0.9, 0.7, 0.7), (0.08, 0.12, 0.08, 0.14)
    assert weigh(c, r) == pytest.approx([1, 1, 1, math.exp(-5 / 8)])
    assert weigh(c, r, rule="and") == pytest.approx([1, math.exp(-1 / 8), math.exp(-1 / 8), math.exp(-5 / 8)])
    for rule in RULES:  # one feature has nothing to combine
        assert weigh(c, r, features="confidence", rule=rule) == pytest.approx([1, 1, *[math.exp(-1 / 8)] * 2])
        assert weigh(c, r, features="dispersion", rule=rule) == pytest.approx(
            [1, math.exp(-1 / 8), 1, math.exp(-4 / 8)]
        )
    assert weigh(c, r, soft=False) == [1, 1, 1, 0] and weigh(c, r, soft=False, rule="and") == [1, 0, 0, 0]
    assert weigh(c, r, alpha=2.0)[3] == pytest.approx(math.exp(-5 / 2))
    assert weigh(c, r, form="paper") == pytest.approx([1, 1, math.exp(-2 / 8), 1])


def test_the_means_themselves_are_reliable():
    for rule in RULES:
        for soft in (True, False):
            assert weigh((0.8,), (0.1,), rule=rule, soft=soft) == [1]
            assert weigh((0.8, 0.9), (0.14, 0.1), rule=rule, soft=soft)[1] == 1  # z_c > 0 and z_r = 0
    assert weigh((0.8,), (0.14,)) == pytest.approx([math.exp(-4 / 8)])  # strict: z_c = 0 is not enough


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("scope", SCOPES)
def test_chain_is_plain_numpy(form, rule, features, soft, scope):
    probs = maps(11, batch=3, classes=4, size=(12, 11), scale=2.0, dtype=torch.float64)
    valid = some_valid(11, (3, 12, 11))
    options = dict(form=form, rule=rule, features=features, soft=soft, alpha=5.0, eps=1e-6)
    weights, found = image_weights(probs, valid, scope=scope, **options)
    c, r = found.confidence.numpy(), found.residual.numpy()
    expected = np.zeros(c.shape)
    for members in groups_of(found.label.numpy(), valid.numpy(), scope):
        expected[members] = weights_of(c[members], r[members], **options)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    share = (weights == 1).double().mean()
    assert 0.1 < share < 0.8 and weights.dtype == torch.float64


@pytest.mark.parametrize("classes, scale", [(21, 4.0), (81, 6.0), (6, 0.5)])
def test_chain_in_float32_is_plain_numpy_in_float64(classes, scale):
    probs = maps(12, batch=1, classes=classes, size=(30, 30), scale=scale)
    weights, found = image_weights(probs, everywhere(probs))
    c, r = (x.double().flatten().numpy() for x in (found.confidence, found.residual))
    assert weights.dtype == torch.float32
    expected = weights_of(c, r)
    np.testing.assert_allclose(weights.flatten(), expected, rtol=1e-5, atol=1e-30)
    assert ((weights.flatten().numpy() == 1) == (expected.astype(np.float32) == 1)).all()


@examples(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(FORMS), st.sampled_from(RULES), st.sampled_from(FEATURES))
def test_weights_lie_in_the_unit_interval_and_rise_with_the_reliable_side(seed, form, rule, features):
    rng = np.random.default_rng(seed)
    sign = 1 if form == "released" else -1
    reliable = stats(*rng.uniform(0.2, 0.9, 2), *10.0 ** rng.uniform(-9, -1, 2))
    c, r = (torch.from_numpy(np.sort(rng.random((1, 8, 8)), axis=axis)) for axis in (1, 2))

    def weigh(c, r, soft=True):
        return pixel_weights(c, r, torch.ones_like(c).bool(), reliable, 8.0, rule, features, soft, form)

    weights = weigh(c, r)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weigh(c, r[:, :1].expand_as(c)).diff(dim=1) >= 0).all()  # more confident, never less weight
    assert (sign * weigh(c[..., :1].expand_as(r), r).diff(dim=2) <= 0).all()  # more dispersed, never more
    z = {"confidence": c - reliable.mean_c, "dispersion": sign * (reliable.mean_r - r)}
    above = torch.stack([v > 0 for name, v in z.items() if features in (name, "both")])
    sure = above.any(0) if rule == "or" else above.all(0)
    assert (weights[sure] == 1).all()
    assert torch.equal(weigh(c, r, soft=False), (weights == 1).double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, v: confidence_features(p[:, :1]), "K of at least 2"),
        (lambda p, v: confidence_features(p[0]), "K of at least 2"),
        (lambda p, v: confidence_features(p.long()), "must be floating"),
        (lambda p, v: image_weights(p, v, form="x"), "form is 'x'; it must be one of 'released', 'paper'"),
        (lambda p, v: image_weights(p, v, rule="xor"), "rule is 'xor'; it must be one of 'or', 'and'"),
        (lambda p, v: image_weights(p, v, features="all"), "features is 'all'"),
        (lambda p, v: image_weights(p, v, scope="pixel"), "scope is 'pixel'; it must be one of 'image', 'class'"),
        (lambda p, v: image_weights(p, v.byte()), r"valid is torch.uint8 \(2, 9, 13\); it must be bool"),
        (lambda p, v: image_weights(p, v[:1]), "must be bool"),
    ],
)
def test_refused(call, message):
    probs = maps(14)
    with pytest.raises(ValueError, match=message):
        call(probs, everywhere(probs))


# Scopes and invariances


@pytest.mark.parametrize("rows", [1, 2 * 9 * 13 * 4, 2**22])
def test_classes_in_chunks(rows, monkeypatch):
    probs, valid = maps(21), some_valid(21, (2, 9, 13))
    expected = image_weights(probs, valid, scope="class")[0]
    monkeypatch.setattr(separation, "ROWS", rows)
    assert torch.equal(image_weights(probs, valid, scope="class")[0], expected)


# Edge cases of the released code


def test_no_valid_pixel():
    probs, valid = maps(23), some_valid(23, (2, 9, 13))
    valid[0] = False
    found = confidence_features(probs)
    cluster = separate(found.confidence, found.residual, valid)
    got = reliable_statistics(found.confidence, found.residual, cluster, valid)
    assert [getattr(got, name)[0].item() for name in ("mean_c", "mean_r", "var_c", "var_r")] == [1, 0, 1, 1]
    assert cluster[0].sum() == 0
    for scope in SCOPES:
        weights = image_weights(probs, valid, scope=scope)[0]
        assert (weights[0] == 0).all() and (weights[1][valid[1]] > 0).any()
        assert (image_weights(probs, torch.zeros_like(valid), scope=scope)[0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_one_valid_pixel(form):
    probs, valid = maps(24), torch.zeros(2, 9, 13, dtype=torch.bool)
    valid[0, 3, 4] = valid[1, 0, 0] = True
    found = confidence_features(probs, form)
    cluster = separate(found.confidence, found.residual, valid)
    assert (cluster == 0).all()
    got = reliable_statistics(found.confidence, found.residual, cluster, valid)
    assert got.mean_c[0] == found.confidence[0, 3, 4] and got.mean_r[0] == found.residual[0, 3, 4]
    assert got.var_c.tolist() == [0, 0] and got.var_r.tolist() == [0, 0]
    for soft in (True, False):
        weights = image_weights(probs, valid, form=form, soft=soft)[0]
        assert torch.equal(weights, valid.float())


@pytest.mark.parametrize("full", [0, 1])
def test_an_empty_cluster_loses(full):
    c, r, valid = column(0.3, 0.5), column(0.1, 0.2), torch.ones(1, 2, 1, dtype=torch.bool)
    got = reliable_statistics(c, r, torch.full((1, 2, 1), full), valid)
    assert got.mean_c.item() == pytest.approx(0.4) and got.var_c.item() == pytest.approx(0.02)
    assert got.mean_r.item() == pytest.approx(0.15) and got.var_r.item() == pytest.approx(0.005)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soft", [True, False])
def test_equal_pixels_all_weigh_one(form, soft):
    for row in ([0.55, 0.3, 0.1, 0.05], [0.25] * 4, [1.0, 0, 0, 0], [0.9, 0.1, 0, 0]):
        probs = torch.tensor(row)[None, :, None, None].expand(2, 4, 33, 29)
        valid = some_valid(25, (2, 33, 29))
        for scope in SCOPES:
            weights = image_weights(probs, valid, form=form, soft=soft, scope=scope)[0]
            assert torch.equal(weights, valid.float())


def test_zero_variance_is_measured_in_the_root_of_eps():
    c = torch.tensor([[[0.8, 0.8 - 3e-4]]], dtype=torch.float64)
    r = torch.full_like(c, 0.1)
    weights = pixel_weights(c, r + 1e-4, torch.ones_like(c).bool(), stats(0.8, 0.1, 0, 0))
    assert weights.flatten().tolist() == pytest.approx([math.exp(-1 / 8), math.exp(-(9 + 1) / 8)], rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", FORMS)
def test_what_ignored_pixels_hold_does_not_matter(value, scope, form):
    probs, valid = maps(27), some_valid(27, (2, 9, 13))
    expected = image_weights(probs, valid, scope=scope, form=form)[0]
    poisoned = torch.where(valid[:, None], probs, value)
    weights = image_weights(poisoned, valid, scope=scope, form=form)[0]
    assert torch.equal(weights, expected) and (weights[~valid] == 0).all()
    found = confidence_features(probs)
    c, r = (torch.where(valid, x, value) for x in (found.confidence, found.residual))
    cluster = separate(c, r, valid)
    assert torch.equal(cluster, separate(found.confidence, found.residual, valid)) and (cluster[~valid] == 0).all()


# How it runs


@pytest.mark.parametrize("scope", SCOPES)
def test_autocast_changes_nothing(scope):
    probs, valid = maps(30), some_valid(30, (2, 9, 13))
    expected = image_weights(probs, valid, scope=scope)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(image_weights(probs, valid, scope=scope)[0], expected)


# The step


def csl_oracle(logits, padding, alpha, soft):
    """CSL's pseudo-labels and weights image by image, in float64."""
    probs = fakes.softmax(logits)
    confidence, label = probs.max(1), probs.argmax(1)
    residual = np.zeros_like(confidence)
    for b, i, j in np.ndindex(confidence.shape):
        residual[b, i, j] = features_of(probs[b, :, i, j].tolist(), "released")[1]
    weight = np.zeros_like(confidence)
    for image, inside in enumerate(~padding.numpy()):
        weight[image][inside] = weights_of(confidence[image][inside], residual[image][inside], alpha, soft=soft)
    return fakes.targets_of(confidence, label, weight, padding)


def twin_step(twin, samples, settings):
    """L = (L_x + L_s / 4 + L_m / 4 + L_fp / 2) / 2; only [x_l; x_w] moves the averages."""

    def weigh(logits, padding):
        if settings.selection == "threshold":
            return threshold_oracle(logits, padding, settings.threshold)
        return csl_oracle(logits, padding, settings.alpha, settings.selection == "gaussian")

    x, u, mix = crops(samples)
    count = len(x.images)
    mix_targets = weigh(twin.trained(view(mix), move=False), mix.padding)
    weak = torch.cat([view(x), view(u)])
    logits = twin.trained(weak)
    targets = weigh(logits[count:], u.padding)
    where = box(0, len(u.images))
    candidates = blocks(len(u.images))
    hidden = {"none": candidates & False, "random": candidates, "reliable": candidates & (targets.weight == 1)}
    masked = view(u, 0.5) * ~hidden[settings.masking][:, None]
    strong = pasted(view(u, 1.5), view(mix, 2.0), where)
    strong_logits, masked_logits = twin.trained(torch.cat([strong, masked]), move=False).chunk(2)
    terms = {
        "supervised": labelled_loss(logits[:count], x.masks) / 2,
        "consistency": pseudo_loss(strong_logits, pasted(targets, mix_targets, where)) / 8,
        "masked": pseudo_loss(masked_logits, targets) / 8,
    }
    if settings.feature_perturbation:
        terms["features"] = pseudo_loss(twin.trained(weak, move=False, factor=2.0)[count:], targets) / 4
    return terms, targets, masked


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"masking": "random"},
        {"masking": "none"},
        {"feature_perturbation": False},
        {"alpha": 2.0},
        {"selection": "hard"},
        {"selection": "threshold", "threshold": 0.6},
    ],
    ids=str,
)
def test_a_step_is_that_of_a_second_implementation(changes):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(CSL, network, **changes)
    losses = method.losses(samples, NOW)
    expected, targets, masked = twin_step(twin, samples, method.settings)
    compare(losses.terms, expected, network, twin)
    torch.testing.assert_close(network.passes[2][0][3:], masked.float())
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.index, samples["unlabelled"].index) and pixels.window == "window 1"
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    torch.testing.assert_close(pixels.weight.double(), targets.weight, rtol=1e-3, atol=1e-4)
    sure = (targets.weight == 1).sum()
    assert 0 < sure < targets.valid.sum() < targets.valid.numel()


def test_the_running_averages_move_once_and_by_the_labelled_and_weak_views():
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(CSL, network)
    x, u, _ = crops(samples)
    twin.trained(torch.cat([view(x), view(u)]))
    method.losses(samples, NOW)
    assert twin.count == 1 and twin.same_averages(network)
    assert all(module.training for module in network.modules()) and network.backbone[1].track_running_stats


@pytest.mark.parametrize("features", [True, False])
def test_passes_and_draws(features):
    """Input sizes, the perturbed pass, training mode, whether averages move, gradients."""
    network = fakes.TinyNetwork()
    method = build(CSL, network, feature_perturbation=features, block=3, ratio=0.4)
    method.losses(fakes.batch(), NOW)
    modes = [(len(x), *rest) for x, *rest in network.passes]
    assert modes == [
        (3, False, True, False, False), (5, features, True, True, True), (6, False, True, False, True),
    ]  # fmt: skip
    drawn = [entry[0] for entry in method.views.drawn]
    assert drawn == ["crop"] * 3 + ["boxes", "strong", "strong", "masked"]
    assert method.views.drawn[-1] == ("masked", 3, 0.4)


# Masking through real views: a coin for each image


def real_step(masking, count=12, seed=3):
    """A step on real views; returns its method, the input of the last pass and a second copy of all its draws."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.full((count, 16, 16), 255, dtype=torch.uint8)
    items = Items(torch.arange(count), images, labels)
    samples = {"labelled": items, "unlabelled": items, "mix": items}
    network = fakes.TinyNetwork()
    views, again = (MaskViews(16, (0.5, 2.0), generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    method = CSL(CSLSettings(masking=masking, block=4), network, views, fakes.CLASSES, cross_entropy).train()
    losses = method.losses(samples, NOW)
    _, u, _ = (again.crop(images, labels) for _ in range(3))
    again.boxes(u), again.strong(u), again.strong(u)
    # The coin is the first draw of the masked view.
    state = again.generator.get_state()
    heads = again._uniform(count, 1, 1) < 0.5
    again.generator.set_state(state)
    plain, candidates = again.masked(u, 4, 0.7)
    return losses.pseudo["pixels"], network.passes[2][0][count:], plain, candidates, heads[:, 0, 0]


@pytest.mark.parametrize("masking", ["reliable", "random", "none"])
def test_heads_hide_trusted_pixels_and_tails_none(masking):
    pixels, seen, plain, candidates, heads = real_step(masking)
    where = {"reliable": candidates & (pixels.weight == 1), "random": candidates, "none": candidates & False}[masking]
    expected = torch.where(where[:, None], 0.0, plain)
    assert torch.equal(seen, expected)
    assert 0 < heads.sum() < len(heads) and not candidates[~heads].any()
    assert torch.equal(seen[~heads], plain[~heads])
    if masking == "reliable":
        assert where.any() and (candidates & ~where).any() and not (where & ~pixels.valid).any()
        share = candidates[heads].float().mean().item()
        assert share == pytest.approx(0.7, abs=0.1)
    hidden = (seen == 0).all(1) & ~(plain == 0).all(1)
    assert torch.equal(hidden, where & ~(plain == 0).all(1))


# Pseudo-labels


def logits_and_padding(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, 5, 9, 8, generator=generator), torch.rand(2, 9, 8, generator=generator) < 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"alpha": 3.0}, {"features": "confidence"}, {"features": "dispersion"}, {"rule": "and"}, {"scope": "class"},
        {"scope": "batch"}, {"form": "paper"}, {"selection": "hard"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_reaches_the_weights(changes):
    logits, padding = logits_and_padding()
    settings = CSLSettings(**changes)
    targets = csl_targets(logits.requires_grad_(), padding, settings)
    options = {"soft": settings.selection == "gaussian"} | {k: v for k, v in changes.items() if k != "selection"}
    weight, features = image_weights(logits.detach().softmax(1), ~padding, **options)
    assert torch.equal(targets.weight, weight) and torch.equal(targets.label, logits.argmax(1))
    assert torch.equal(targets.confidence, features.confidence) and torch.equal(targets.valid, ~padding)
    assert not any(part.requires_grad for part in vars(targets).values())
    default = csl_targets(logits, padding, CSLSettings()).weight
    assert torch.equal(weight, default) == (not changes)


def test_the_threshold_ablation_is_fixmatchs_rule():
    logits, padding = logits_and_padding()
    ours = csl_targets(logits, padding, CSLSettings(selection="threshold", threshold=0.8, alpha=1.0, rule="and"))
    theirs = threshold_targets(logits, padding, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
