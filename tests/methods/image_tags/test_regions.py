"""Confidence regions against loops written from the equations, hand-made masks and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.image_tags.pcre import (
    Expansion,
    by_class,
    candidates,
    gate,
    grow,
    image_score,
    joint_confidence,
    largest,
    radius,
    refined_regions,
    region_masks,
    shown_classes,
    squared_distances,
)
from repro.settings import SettingError


def drawn(seed, batch=2, grid=(4, 5), classes=4, sharp=3.0):
    """Masks, S and tags of random images; the last image shows nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return sharp * torch.randn(*shape, generator=generator)

    patches = grid[0] * grid[1]
    masks = normal(batch, patches, *grid).sigmoid()
    confidence = joint_confidence(normal(batch, patches, classes), normal(batch, patches, classes))
    tags = (torch.rand(batch, classes, generator=generator) < 0.6).float()
    tags[-1] = 0
    return masks, confidence, tags


def listed(confidence, image, c, limit, ranking):
    """The list Q of one pair, by loops."""
    rows = confidence[image].tolist()
    best = [max(row[k] for row in rows) for k in range(len(rows[0]))]
    found = []
    for n, row in enumerate(rows):
        relative = [value / top if top > 0 else 0.0 for value, top in zip(row, best, strict=True)]
        if relative.index(max(relative)) == c and max(row) > 0:
            found.append((-relative[c], n))
    numbers = [n for _, n in sorted(found)]
    if ranking == "index" and len(numbers) > limit:
        numbers.sort(reverse=True)
    return numbers[:limit]


def grown(masks, numbers, rules):
    """Seeds and groups of one pair from its list, by loops over rounds and candidates."""
    inside = {
        n: {at for at, value in enumerate(masks[n].flatten().tolist()) if value > rules.threshold} for n in numbers
    }
    unused, seeds, groups = list(numbers), [], []
    while unused and len(seeds) < (rules.rounds if rules.expand else 1):
        q = unused[0]
        overlap = {n: len(inside[n] & inside[q]) / max(len(inside[q]), 1e-6) for n in numbers}
        group = {q}
        if rules.expand:
            group |= {n for n in numbers if rules.low <= overlap[n] <= rules.high}
        unused = [n for n in unused if n not in group and overlap[n] <= rules.high]
        seeds.append(q)
        groups.append(group)
    return seeds, groups


def resized(mask, size):
    return F.interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def reference(masks, confidence, tags, size, rules):
    """{(image, class): (m_r, found, seeds, groups)} by loops over pairs."""
    out = {}
    for image, c in tags.nonzero().tolist():
        numbers = listed(confidence, image, c, rules.limit, rules.ranking)
        seeds, groups = grown(masks[image], numbers, rules)
        region = torch.zeros(size)
        for group in groups:
            chosen = [masks[image, n] for n in sorted(group)]
            if rules.resize == "each":
                parts = [resized(mask, size) for mask in chosen]
            else:
                parts = [resized(torch.stack(chosen).amax(0), size)]
            region = torch.stack([region, *parts]).amax(0)
        if rules.resize == "group" and groups:
            joined = sorted(set().union(*groups))
            region = resized(masks[image, joined].amax(0), size)
        out[image, c] = region, bool(numbers), seeds, groups
    return out


def same(masks, confidence, tags, size, rules, most=None):
    """Assert that the batched regions are those of the loops."""
    pairs = shown_classes(tags, most)
    regions = refined_regions(masks, confidence, pairs, size, rules)
    expected = reference(masks, confidence, tags, size, rules)
    seen = set()
    for image, place in pairs.shown.nonzero().tolist():
        c = pairs.classes[image, place].item()
        region, found, seeds, groups = expected[image, c]
        seen.add((image, c))
        torch.testing.assert_close(regions.masks[image, place], region, rtol=1e-5, atol=1e-6)
        assert regions.found[image, place].item() == found
        growth = [part[image, place] for part in regions.growth]
        assert [seed for seed in growth[0].tolist() if seed >= 0] == seeds
        assert [set(row.nonzero()[:, 0].tolist()) for row in growth[1]][: len(groups)] == groups
        assert not growth[1][len(groups) :].any()
    assert seen == set(expected)
    assert not regions.masks[~pairs.shown].any() and not regions.found[~pairs.shown].any()
    return regions


def test_joint_confidence_by_hand():
    confidence = joint_confidence(torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]]), torch.zeros(1, 2, 2))
    torch.testing.assert_close(confidence, torch.tensor([[[0.125, 0.375], [0.25, 0.25]]]))
    torch.testing.assert_close(image_score(confidence), torch.tensor([[0.375, 0.625]]))
    torch.testing.assert_close(image_score(confidence, "max"), torch.tensor([[0.25, 0.375]]))


def test_joint_confidence_is_a_product_of_distributions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)
    confidence = joint_confidence(*logits)
    assert confidence.sum(1).le(1).all() and confidence.gt(0).all()
    uniform = joint_confidence(logits[0], torch.zeros(3, 7, 5, dtype=torch.float64))
    torch.testing.assert_close(uniform.sum(2), torch.full((3, 7), 1 / 7, dtype=torch.float64))
    assert torch.autograd.gradcheck(joint_confidence, tuple(logits[:, :1, :3, :2].clone().requires_grad_()))
    half = joint_confidence(logits[0].half(), logits[1].half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), confidence, rtol=1e-2, atol=1e-4)


def test_score_is_a_probability_when_rounding_exceeds_one():
    confidence = torch.full((1, 3, 1), 0.3333334)
    assert confidence.sum() > 1 and image_score(confidence).item() == 1
    with pytest.raises(ValueError, match="mean"):
        image_score(confidence, "mean")


def test_radius_schedule_by_hand():
    assert [radius(p) for p in (0, 0.1, 0.25, 0.4, 0.7, 1)] == pytest.approx([1, 1, 3, 5, 5, 5])
    assert radius(0.175) == pytest.approx(1 + 4 * (1 - math.cos(math.pi / 4)) / 2)
    assert radius(0.25, r_max=9) == pytest.approx(5)
    assert [radius(p, "fixed") for p in (0, 0.2, 1)] == [5, 5, 5]
    assert radius(0.3, "fixed", r_max=0) == 0
    assert radius(0.2, "none") is None and radius(0.2, "fixed", r_max=None) is None


def test_radius_that_grows_over_the_whole_grid():
    grid = (4, 5)
    assert radius(0.05, r_max=None, grid=grid) == 1 and radius(0.4, r_max=None, grid=grid) is None
    before = [radius(p / 100, r_max=None, grid=grid) for p in range(40)]
    assert before == sorted(before) and before[-1] == pytest.approx(5, abs=0.02)
    with pytest.raises(ValueError, match="linear"):
        radius(0.1, "linear")
    with pytest.raises(ValueError, match="begin"):
        radius(0.1, begin=0.4, end=0.4)


@pytest.mark.parametrize("r", [0, 1, 2, math.sqrt(2), 2.9, 100])
def test_gate_is_the_disc(r):
    grid = (3, 5)
    masks = torch.rand(2, 15, *grid, generator=torch.Generator().manual_seed(1)) + 0.1
    gated = gate(masks, r)
    for n in range(15):
        a, b = divmod(n, 5)
        for i in range(3):
            for j in range(5):
                near = (i - a) ** 2 + (j - b) ** 2 <= r * r + 1e-9
                assert torch.equal(gated[:, n, i, j], masks[:, n, i, j] if near else torch.zeros(2))
    assert gate(masks, None) is masks
    assert squared_distances(grid, masks.device) is squared_distances(grid, masks.device)


def test_shown_classes_fill_the_first_places():
    pairs = shown_classes(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]), most=2)
    assert pairs.shown.tolist() == [[True, True], [False, False], [True, True]]
    assert pairs.classes[0].tolist() == [1, 3] and pairs.classes[2].tolist() == [0, 1]
    maps = torch.arange(6.0).view(3, 2, 1, 1) + 1
    spread = by_class(maps, pairs, 4)[:, :, 0, 0]
    assert spread.tolist() == [[0, 1, 0, 2], [0, 0, 0, 0], [5, 6, 0, 0]]


def test_candidates_by_hand():
    confidence = torch.tensor([[[0.8, 0.1], [0.4, 0.2], [0.1, 0.15], [0.0, 0.0], [0.2, 0.04]]])
    # relative: [1, .5], [.5, 1], [.125, .75], [0, 0], [.25, .2]
    pairs = shown_classes(torch.ones(1, 2))
    assert candidates(confidence, pairs)[0].tolist() == [[0, 5, 5, 5, 1], [5, 0, 1, 5, 5]]
    assert candidates(confidence, pairs, limit=1)[0].tolist() == [[0, 5, 5, 5, 5], [5, 0, 5, 5, 5]]
    assert candidates(confidence, pairs, limit=1, ranking="index")[0].tolist() == [[5, 5, 5, 5, 0], [5, 5, 0, 5, 5]]
    assert candidates(confidence, pairs, limit=2, ranking="index")[0].tolist() == [[0, 5, 5, 5, 1], [5, 0, 1, 5, 5]]
    # class 1 is not shown, yet its patches are not class 0's
    only = shown_classes(torch.tensor([[1, 0]]))
    assert candidates(confidence, only)[0].tolist() == [[0, 5, 5, 5, 1], [5] * 5]


def test_ties_go_to_the_first_class_and_the_first_patch():
    pairs = shown_classes(torch.ones(1, 2))
    assert candidates(torch.full((1, 3, 2), 0.1), pairs)[0].tolist() == [[0, 1, 2], [3, 3, 3]]
    assert candidates(torch.zeros(1, 3, 2), pairs)[0].tolist() == [[3, 3, 3], [3, 3, 3]]


def bars(*rows):
    """One image with one mask a string: 1 where a character is not a dot, on a grid of one row."""
    return torch.tensor([[[[0.0 if cell == "." else 0.9 for cell in row]] for row in rows]])


def test_growth_by_hand():
    masks = bars(
        "xxxxxxxxxx",  # 0: first seed, 10 patches
        "xxx.......",  # 1: overlap .3, joins
        "xxxxx.....",  # 2: overlap .5, joins
        "xxxxxx....",  # 3: overlap .6, redundant
        "..........",  # 4: empty, second seed
        ".........x",  # 5: overlap .1, third seed
        "........xx",  # 6: overlap .2 with 0, 1 with 5, so redundant then
        "xx........",  # 7: fourth seed, covered by 1, 2 and 3
        "..........",  # 8: not listed
        "xxx.......",  # 9: not listed
    )  # fmt: skip
    rank = torch.tensor([[[0, 1, 2, 3, 4, 5, 6, 7, 10, 10]]])
    seeds, joins = grow(masks, rank)
    assert seeds[0, 0].tolist() == [0, 4, 5, 7, -1]
    assert [row.nonzero()[:, 0].tolist() for row in joins[0, 0]] == [[0, 1, 2], [4], [5], [7], []]
    assert grow(masks, rank, Expansion(rounds=1)).joins[0, 0].nonzero()[:, 1].tolist() == [0, 1, 2]
    alone = grow(masks, rank, Expansion(expand=False))
    assert alone.seeds[0, 0].tolist() == [0] and alone.joins[0, 0].nonzero()[:, 1].tolist() == [0]


def test_used_masks_join_later_groups_again():
    masks = bars("xxxxxx........", "xx..........xx", "..........xxxx")
    seeds, joins = grow(masks, torch.tensor([[[0, 1, 2]]]))
    # mask 1 covers a third of seed 0 and half of seed 2
    assert seeds[0, 0].tolist() == [0, 2, -1, -1, -1]
    assert [row.nonzero()[:, 0].tolist() for row in joins[0, 0]][:2] == [[0, 1], [1, 2]]


@given(st.integers(0, 10**6), st.sampled_from(["each", "group"]), st.sampled_from(["confidence", "index"]))
@settings(max_examples=25, deadline=None)
def test_regions_are_the_loops(seed, resize, ranking):
    masks, confidence, tags = drawn(seed)
    rules = Expansion(rounds=1 + seed % 6, limit=1 + seed % 9, resize=resize, ranking=ranking)
    same(masks, confidence, tags, (10, 13), rules)


@pytest.mark.parametrize("r", [0, 1, 2.5])
@pytest.mark.parametrize("expand", [True, False])
def test_regions_behind_the_gate_are_the_loops(r, expand):
    masks, confidence, tags = drawn(3, batch=3, grid=(6, 6), classes=5)
    same(gate(masks, r), confidence, tags, (24, 24), Expansion(expand=expand), most=int(tags.sum(1).max()))


def test_a_long_image_is_resized_in_parts(monkeypatch):
    monkeypatch.setattr("repro.methods.image_tags.pcre.CHUNK", 1)
    masks, confidence, tags = drawn(5, grid=(5, 3))
    same(masks, confidence, tags, (20, 7), Expansion())
    same(masks, confidence, tags, (5, 3), Expansion())  # its own size: nothing to resize
    same(masks, confidence, tags, (3, 2), Expansion())  # smaller


def test_one_patch_and_one_class():
    masks, confidence = torch.full((2, 1, 1, 1), 0.9), torch.full((2, 1, 1), 1.0)
    regions = same(masks, confidence, torch.tensor([[1.0], [0.0]]), (3, 3), Expansion())
    torch.testing.assert_close(regions.masks[0, 0], torch.full((3, 3), 0.9))


def test_no_candidate_gives_zeros_and_nothing_found():
    masks, confidence, tags = drawn(1)
    regions = refined_regions(masks, torch.zeros_like(confidence), shown_classes(torch.ones_like(tags)), (8, 8))
    assert not regions.masks.any() and not regions.found.any() and regions.growth.seeds.eq(-1).all()


def test_half_precision_gives_the_same_growth():
    masks, confidence, tags = drawn(2)
    masks = masks.half()
    pairs = shown_classes(tags)
    ours = refined_regions(masks, confidence, pairs, (8, 10))
    wide = refined_regions(masks.float(), confidence, pairs, (8, 10))
    assert ours.masks.dtype == torch.float32 and torch.equal(ours.growth.joins, wide.growth.joins)
    torch.testing.assert_close(ours.masks, wide.masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(refined_regions(masks, confidence, pairs, (8, 10)).masks, ours.masks)


@pytest.mark.parametrize("resize", ["each", "group"])
def test_gradient_reaches_the_largest_masks(resize):
    masks, confidence, tags = drawn(4, batch=2, grid=(3, 3), classes=2)
    tags[:] = 1
    joined = grow(masks, candidates(confidence, shown_classes(tags))).joins.any(2)
    masks = masks.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: region_masks(x, joined, (5, 4), resize), masks, eps=1e-7)
    (slope,) = torch.autograd.grad(region_masks(masks, joined, (5, 4), resize).sum(), masks)
    assert not slope[~joined.any(1)].any()
    torch.testing.assert_close(slope.sum(), joined.any(2).sum() * 20.0, check_dtype=False)


def test_resizing_after_the_maximum_is_never_smaller():
    masks, confidence, tags = drawn(6)
    joined = grow(masks, candidates(confidence, shown_classes(tags))).joins.any(2)
    assert (region_masks(masks, joined, (9, 9), "group") - region_masks(masks, joined, (9, 9)) > -1e-6).all()


def test_largest_is_the_argmax_of_each_set():
    values = torch.rand(3, 9, 40, generator=torch.Generator().manual_seed(8)).mul(5).round()  # with ties
    owner = torch.randint(0, 4, (3, 9), generator=torch.Generator().manual_seed(9))
    joined = owner[:, None] == torch.arange(3)[:, None]  # set 3 is nobody's
    joined[1, 2] = False
    found = largest(values, joined)
    for image, place in joined.any(2).nonzero().tolist():
        chosen = values[image].masked_fill(~joined[image, place, :, None], -1)
        assert torch.equal(found[image, place], chosen.argmax(0))
    assert found.shape == (3, 3, 40) and found.ge(0).all() and found.lt(9).all()


def test_rules_are_checked():
    with pytest.raises(SettingError, match="rounds"):
        Expansion(rounds=0)
    with pytest.raises(SettingError, match="ranking"):
        Expansion(ranking="random")
