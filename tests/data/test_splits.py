from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.data.catalogue import SOURCES, ImageSet, digest_of
from repro.data.splits import FOR_HOLDOUT, FOR_LABELS, balanced, draw, holdout, open_pool, parse
from tests.data.fixtures import small


def labelled_set(labels, classes=5, name="toy") -> ImageSet:
    """One pixel an image, which holds the image's number."""
    labels = torch.as_tensor(labels)
    pixels = torch.arange(len(labels)).view(-1, 1, 1, 1).to(torch.uint8)
    names = tuple("abcdefghij"[:classes])
    return ImageSet(name, "train", pixels, labels, names, digest_of(pixels, labels))


TOY = labelled_set([0, 1, 2, 3, 4] * 20)


def philox_words(key: int, count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011) in plain integers; numpy's counter starts at 1."""
    mask, words = 2**64 - 1, []
    for block in range(1, count // 4 + 2):
        x, k = [block, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(second >> 64) ^ x[1] ^ k[0], second & mask, (first >> 64) ^ x[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += x
    return words[:count]


@pytest.mark.parametrize(("seed", "purpose"), [(0, FOR_LABELS), (3, FOR_HOLDOUT), (2**64 - 1, FOR_LABELS)])
def test_draw_follows_the_published_philox_algorithm(seed, purpose):
    labels = [0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 2, 1, 0]
    words = philox_words(seed + purpose * 2**64, len(labels))
    expected = []
    for label in range(3):
        expected += sorted((word, row) for row, word in enumerate(words) if labels[row] == label)[:2]
    chosen = balanced(torch.tensor(labels), 2, 3, seed, purpose)
    assert chosen.tolist() == sorted(row for _, row in expected)


def test_a_known_name_keeps_its_images():
    """Guards published numbers: changing the draw changes every result."""
    pool, _ = open_pool("fashion.0@40")
    assert pool.labelled[:8].tolist() == [318, 998, 1051, 1926, 2483, 2561, 3085, 3556]
    assert pool.digest == "e8dd256fddb53dbdb58b5730ba32658c498a9502ba35aaa58f471c2777eba371"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(3, 9), min_size=2, max_size=6), st.randoms())
def test_balanced_nested_and_deterministic(seed, counts, random):
    labels = [label for label, count in enumerate(counts) for _ in range(count)] + [-1] * 4
    random.shuffle(labels)
    labels = torch.tensor(labels)
    previous = set()
    for per_class in range(1, min(counts) + 1):
        chosen = balanced(labels, per_class, len(counts), seed, FOR_LABELS)
        assert labels[chosen].bincount(minlength=len(counts)).tolist() == [per_class] * len(counts)
        assert (chosen.diff() > 0).all() and previous < set(chosen.tolist())
        assert torch.equal(chosen, balanced(labels, per_class, len(counts), seed, FOR_LABELS))
        previous = set(chosen.tolist())


def test_every_image_is_equally_likely():
    labels = torch.zeros(20, dtype=torch.int64)
    times = torch.zeros(20)
    for seed in range(2000):
        times[balanced(labels, 5, 1, seed, FOR_LABELS)] += 1
    # Binomial(2000, 1/4): standard deviation 19.4; 5 of them on either side.
    assert (times - 500).abs().max() < 97


def test_pool_hides_every_other_label():
    pool, truth = draw(TOY, labels=10, seed=3)
    assert torch.equal(truth, TOY.labels)
    assert torch.equal(pool.labels[pool.labelled], truth[pool.labelled])
    hidden = torch.ones(100, dtype=torch.bool).index_fill(0, pool.labelled, False)
    assert (pool.labels[hidden] == -1).all() and hidden.sum() == 90
    assert torch.equal(pool.unlabelled, torch.arange(100))
    assert (pool.name, pool.classes) == ("toy.3@10", TOY.classes)
    # No other field of the pool can give a label away.
    tensors = {field.name for field in fields(pool) if isinstance(getattr(pool, field.name), torch.Tensor)}
    assert tensors == {"images", "labels", "labelled", "unlabelled"}
    truth[0] = 99
    assert TOY.labels[0] == 0
    with pytest.raises(FrozenInstanceError):
        pool.labels = truth


def test_labelled_images_can_be_left_out():
    pool, _ = draw(TOY, labels=10, seed=3, include_labelled=False)
    assert sorted(pool.labelled.tolist() + pool.unlabelled.tolist()) == list(range(100))
    with pytest.raises(ValueError, match="leave nothing unlabelled: use include_labelled=True"):
        draw(TOY, labels=100, seed=0, include_labelled=False)


def test_seeds_budgets_and_data_change_the_digest():
    pools = [draw(TOY, 10, 0)[0], draw(TOY, 10, 1)[0], draw(TOY, 20, 0)[0]]
    pools += [draw(TOY, 10, 0, include_labelled=False)[0], draw(replace(TOY, digest="other"), 10, 0)[0]]
    assert len({pool.digest for pool in pools}) == 5
    assert draw(TOY, 10, 0)[0].digest == pools[0].digest
    assert set(pools[0].labelled.tolist()) < set(pools[2].labelled.tolist())


def test_all_labels_of_an_unbalanced_set():
    train = labelled_set([0] * 7 + [1] * 3, classes=2)
    pool, truth = draw(train, labels=10, seed=0)
    assert torch.equal(pool.labels, truth) and torch.equal(pool.labelled, torch.arange(10))


@pytest.mark.parametrize("labels", [0, -5, 7, 101, 105])
def test_a_budget_is_a_multiple_of_the_classes_or_everything(labels):
    with pytest.raises(
        ValueError, match=rf"{labels} labels: .* multiple of the number of classes \(5\), or all 100"
    ):
        draw(TOY, labels, seed=0)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="class 1 has 3 images, 4 are asked for"):
        draw(labelled_set([0] * 7 + [1] * 3, classes=2), labels=8, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_range(seed):
    with pytest.raises(ValueError, match=r"seed -?\d+ must be in 0..2\*\*64 - 1"):
        draw(TOY, 10, seed)


def test_further_unlabelled_images_follow_those_of_train():
    more = labelled_set([-1] * 30)
    pool, truth = draw(TOY, 10, 0, unlabelled=more)
    assert len(pool.images) == len(truth) == 130 and torch.equal(pool.images[100:], more.images)
    assert (truth[100:] == -1).all() and (pool.labels[100:] == -1).all()
    assert pool.labelled.max() < 100 and torch.equal(pool.unlabelled, torch.arange(130))
    assert torch.equal(pool.labelled, draw(TOY, 10, 0)[0].labelled)


def test_holdout_is_balanced_disjoint_and_gone_from_the_pool():
    pool, truth = draw(TOY, 20, 1, unlabelled=labelled_set([-1] * 30))
    smaller, held = holdout(pool, truth, per_class=3, seed=1)
    assert truth[held].bincount().tolist() == [3] * 5
    assert not set(held.tolist()) & (set(pool.labelled.tolist()) | set(smaller.unlabelled.tolist()))
    assert set(smaller.unlabelled.tolist()) | set(held.tolist()) == set(range(130))
    assert (smaller.labels[held] == -1).all() and smaller.digest != pool.digest
    assert torch.equal(smaller.labelled, pool.labelled) and torch.equal(smaller.labels, pool.labels)
    again, larger = holdout(pool, truth, per_class=5, seed=1)
    assert set(held.tolist()) < set(larger.tolist())
    second, other = holdout(smaller, truth, per_class=3, seed=1)
    assert not set(other.tolist()) & set(held.tolist()) and len(second.unlabelled) == 100
    with pytest.raises(ValueError, match="class 0 has 16 images, 17 are asked for"):
        holdout(pool, truth, per_class=17, seed=1)


def test_pool_moves_as_a_whole():
    pool, _ = draw(TOY, 10, 0)
    moved = pool.to("meta")
    assert {getattr(moved, name).device.type for name in ("images", "labels", "labelled", "unlabelled")} == {
        "meta"
    }
    assert (moved.name, moved.digest) == (pool.name, pool.digest)


@pytest.mark.parametrize("name", SOURCES)
def test_parse_accepts_the_budgets_of_the_papers(name):
    for labels in SOURCES[name].budgets:
        assert parse(f"{name}.3@{labels}") == (name, 3, labels)
    everything = SOURCES[name].rows("train")
    assert parse(f"{name}.0@{everything}")[2] == everything


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10@40", "does not read <data set>.<seed>@<labels>, for example 'cifar10.3@40'"),
        ("cifar10.3@", "does not read"),
        ("cifar10.-1@40", "does not read"),
        ("cifar10.3@40 ", "does not read"),
        ("cifar10.٣@40", "does not read"),
        ("mnist.3@40", "unknown data set 'mnist'; known: fashion, cifar10"),
        ("cifar100.3@40", "40 labels: must be a positive multiple .*100"),
        ("cifar10.3@0", "0 labels: must be a positive multiple"),
        ("cifar10.3@60000", "or all 50,000"),
    ],
)
def test_parse_says_what_is_wrong(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_open_pool_of_stl10_adds_its_unlabelled_part(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "stl10", train=40, unlabeled=15)
    pool, truth = open_pool("stl10.2@20")
    assert pool.images.shape == (55, 3, 96, 96) and pool.name == "stl10.2@20"
    assert truth.tolist() == [row % 10 for row in range(40)] + [-1] * 15
    assert pool.labels[pool.labelled].bincount().tolist() == [2] * 10


def test_open_pool_of_svhn_extra_draws_from_both_parts(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "svhn_extra", train=20, extra=30)
    pool, truth = open_pool("svhn_extra.0@40")
    assert len(truth) == 50 and (pool.labelled >= 20).sum() >= 20
    assert np.array_equal(np.bincount(truth[pool.labelled]), [4] * 10)
