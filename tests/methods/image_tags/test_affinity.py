"""AFA's affinity against loops over pairs of patches, closed forms and finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.image_tags.afa import (
    affinity_loss,
    affinity_pairs,
    neighbours,
    random_walk,
    symmetric_scores,
    transition,
)

GRID, N = (3, 4), 12


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric(seed, batch=2):
    logits = 2 * normal(seed, batch, N, N)
    return logits + logits.mT


def label_map(seed, size=(9, 12), batch=2):
    """Background, two classes and ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batch, *size), generator=generator)
    return labels.masked_fill(torch.rand(batch, *size, generator=generator) < 0.2, 255)


def close(i, j, radius, columns=GRID[1]):
    rows = abs(i // columns - j // columns)
    return rows <= radius and abs(i % columns - j % columns) <= radius


def pair_oracle(labels, grid, radius):
    """Lists of pairs (image, i, j) alike and apart; a patch takes the pixel at its first corner, rounded down."""
    alike, apart = [], []
    height, width = labels.shape[1:]
    for b, image in enumerate(labels.tolist()):
        patch = [image[i * height // grid[0]][j * width // grid[1]] for i in range(grid[0]) for j in range(grid[1])]
        for i, first in enumerate(patch):
            for j, second in enumerate(patch):
                if 255 not in (first, second) and close(i, j, radius, grid[1]):
                    (alike if first == second else apart).append((b, i, j))
    return alike, apart


def loss_oracle(logits, alike, apart):
    a = [[[1 / (1 + math.exp(-z)) for z in row] for row in image] for image in logits.tolist()]
    pull = sum(1 - a[b][i][j] for b, i, j in alike) / (len(alike) + 1)
    return 0.5 * pull + 0.5 * sum(a[b][i][j] for b, i, j in apart) / (len(apart) + 1)


# What the affinity is read from


def test_scores_of_patches_are_added_to_their_mirror_image():
    blocks = [normal(seed, 2, 3, N + 2, N + 2) for seed in (0, 1)]
    blocks[0][:, :, :, :2] = -math.inf  # nobody looks at class tokens
    seen = symmetric_scores(blocks, 2)
    assert seen.shape == (2, 6, N, N) and torch.equal(seen, seen.mT)
    for block, head, i, j in [(0, 0, 0, 5), (0, 2, 7, 7), (1, 1, 11, 3)]:
        scores = blocks[block][:, head]
        expected = scores[:, 2 + i, 2 + j] + scores[:, 2 + j, 2 + i]
        torch.testing.assert_close(seen[:, 3 * block + head, i, j], expected, rtol=0, atol=0)
    assert symmetric_scores([blocks[1].half()], 2).dtype == torch.float32


@pytest.mark.parametrize("radius", [0, 1, 2, 8])
def test_neighbours_are_the_square_window(radius):
    near = neighbours(GRID, radius)
    assert near.tolist() == [[close(i, j, radius) for j in range(N)] for i in range(N)]
    if radius == 0:
        assert torch.equal(near, torch.eye(N, dtype=torch.bool))
    assert near.all().item() == (radius >= 3)
    # a corner patch sees (r + 1)^2 patches, one in the middle of a wide grid (2 r + 1)^2
    wide = neighbours((9, 9), 2)
    assert wide[0].sum() == 9 and wide[40].sum() == 25 and torch.equal(wide, wide.mT)


# Labels and loss


@given(st.integers(0, 10**6), st.integers(0, 5), st.sampled_from([(9, 12), (10, 13), (3, 4)]))
@settings(max_examples=25, deadline=None)
def test_pairs_and_loss_are_the_loops(seed, radius, size):
    labels, logits = label_map(seed, size), symmetric(seed + 1)
    alike, apart = affinity_pairs(labels, GRID, radius)
    expected = pair_oracle(labels, GRID, radius)
    assert [[tuple(pair) for pair in kind.nonzero().tolist()] for kind in (alike, apart)] == list(expected)
    assert affinity_loss(logits, alike, apart).item() == pytest.approx(loss_oracle(logits, *expected), rel=1e-12)
    for kind in (torch.uint8, torch.int32):
        again = affinity_pairs(labels.to(kind), GRID, radius)
        assert torch.equal(again[0], alike) and torch.equal(again[1], apart)


def test_loss_by_hand():
    """Two patches of class 3 and one of the background: 5 pairs alike, themselves among them, and 4 apart."""
    alike, apart = affinity_pairs(torch.tensor([[[3, 3, 0]]]), (1, 3), 8)
    assert (alike.sum().item(), apart.sum().item()) == (5, 4)
    logits = torch.full((1, 3, 3), math.log(3.0))  # a = .75
    assert affinity_loss(logits, alike, apart).item() == pytest.approx(0.5 * 5 * 0.25 / 6 + 0.5 * 4 * 0.75 / 5)
    # at radius 1 the outer two are no pair
    alike, apart = affinity_pairs(torch.tensor([[[3, 3, 0]]]), (1, 3), 1)
    assert (alike.sum().item(), apart.sum().item()) == (5, 2)


@pytest.mark.parametrize("value", [0, 2])
def test_one_label_makes_no_pair_apart(value):
    alike, apart = affinity_pairs(torch.full((2, 9, 12), value), GRID, 2)
    assert not apart.any() and torch.equal(alike, neighbours(GRID, 2).expand(2, -1, -1))
    count = alike.sum().item()
    loss = affinity_loss(torch.zeros(2, N, N), alike, apart)
    assert loss.item() == pytest.approx(0.25 * count / (count + 1))


def test_radius_0_leaves_each_patch_with_itself_and_a_large_one_takes_all():
    labels = label_map(3)
    alike, apart = affinity_pairs(labels, GRID, 0)
    known = labels[:, ::3, ::3].flatten(1) != 255
    assert torch.equal(alike, torch.diag_embed(known)) and not apart.any()
    assert known.any() and not known.all()
    alike, apart = affinity_pairs(labels, GRID, 100)
    assert torch.equal(alike | apart, known[:, :, None] & known[:, None])


def test_without_pairs_the_loss_is_0_and_so_is_its_gradient():
    pairs = affinity_pairs(torch.full((2, 9, 12), 255), GRID, 8)
    logits = symmetric(0).requires_grad_()
    loss = affinity_loss(logits, *pairs)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any() and not (pairs[0] | pairs[1]).any()


def test_gradient_of_the_loss():
    alike, apart = affinity_pairs(label_map(5), GRID, 2)
    logits = symmetric(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: affinity_loss(z, alike, apart), logits)
    affinity_loss(logits, alike, apart).backward()
    assert (logits.grad[alike] < 0).all() and (logits.grad[apart] > 0).all()
    assert not logits.grad[~(alike | apart)].any()


def test_sure_pairs_keep_a_gradient_and_half_precision_is_widened():
    alike, apart = affinity_pairs(torch.tensor([[[1, 0]]]), (1, 2), 1)
    logits = torch.tensor([[[30.0, -30], [-30, 30]]], requires_grad=True)
    affinity_loss(logits, alike, apart).backward()
    torch.testing.assert_close(
        logits.grad.abs().double(), torch.full((1, 2, 2), math.exp(-30) / 6, dtype=torch.float64), rtol=1e-5, atol=0
    )
    coarse = symmetric(7).half()
    pairs = affinity_pairs(label_map(1), GRID, 2)
    loss = affinity_loss(coarse, *pairs)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(affinity_loss(coarse.double(), *pairs).item(), rel=1e-6)


# The walk


def walk_oracle(cam, logits, radius, power=2.0):
    walked = torch.zeros_like(cam)
    for b in range(len(cam)):
        for c in range(cam.shape[1]):
            values = cam[b, c].flatten().tolist()
            for i in range(N):
                weights = {
                    j: (1 / (1 + math.exp(-logits[b, i, j].item()))) ** power for j in range(N) if close(i, j, radius)
                }
                total = sum(weight * values[j] for j, weight in weights.items())
                walked[b, c, i // GRID[1], i % GRID[1]] = total / sum(weights.values())
    return walked


@given(st.integers(0, 10**6), st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, 3.5]))
@settings(max_examples=20, deadline=None)
def test_the_walk_is_the_loop(seed, radius, power):
    cam, logits = normal(seed, 2, 3, *GRID).sigmoid(), symmetric(seed + 1)
    steps = transition(logits, neighbours(GRID, radius), power)
    torch.testing.assert_close(steps.sum(2), torch.ones(2, N, dtype=torch.float64))
    assert not steps[:, ~neighbours(GRID, radius)].any()
    walked = random_walk(cam, steps)
    torch.testing.assert_close(walked, walk_oracle(cam, logits, radius, power), rtol=1e-10, atol=1e-12)
    assert (walked <= cam.amax((2, 3), keepdim=True) + 1e-12).all()
    assert (walked >= cam.amin((2, 3), keepdim=True) - 1e-12).all()


def test_the_power_is_of_elements_not_of_the_matrix():
    logits, near = symmetric(0), neighbours(GRID, 100)
    affinity = logits.sigmoid()
    squared = affinity**2 / (affinity**2).sum(2, keepdim=True)
    torch.testing.assert_close(transition(logits, near), squared)
    assert not torch.allclose(
        transition(logits, near), (affinity @ affinity) / (affinity @ affinity).sum(2)[:, :, None]
    )


def test_walks_with_a_known_end():
    cam = normal(0, 2, 3, *GRID).sigmoid()
    # radius 0 goes nowhere, whatever the affinity
    same = random_walk(cam, transition(symmetric(1), neighbours(GRID, 0)))
    torch.testing.assert_close(same, cam, rtol=0, atol=0)
    # equal affinities everywhere: the mean of the map
    flat = random_walk(cam, transition(torch.full((2, N, N), -3.0).double(), neighbours(GRID, 100)))
    torch.testing.assert_close(flat, cam.mean((2, 3), keepdim=True).expand_as(cam))
    # a constant map stays
    constant = torch.full_like(cam, 0.4)
    stayed = random_walk(constant, transition(symmetric(2), neighbours(GRID, 1)))
    torch.testing.assert_close(stayed, constant)


def test_two_objects_do_not_mix():
    """Affinity 1 inside the left and inside the right half, 0 between them: each half gets its own mean."""
    left = torch.arange(N) % GRID[1] < 2
    logits = torch.where(left[:, None] == left, 60.0, -60.0).expand(2, -1, -1)
    cam = normal(3, 2, 2, *GRID, dtype=torch.float32).sigmoid()
    walked = random_walk(cam, transition(logits, neighbours(GRID, 100))).flatten(2)
    for half in (left, ~left):
        expected = cam.flatten(2)[:, :, half].mean(2, keepdim=True)
        torch.testing.assert_close(walked[:, :, half], expected.expand(-1, -1, 6), rtol=1e-5, atol=1e-6)


def test_vanishing_affinities_divide_nothing_by_0():
    """sigmoid(-200) squared is 0 in float32; what counts is that all are equal."""
    steps = transition(torch.full((1, N, N), -200.0), neighbours(GRID, 1))
    expected = neighbours(GRID, 1) / neighbours(GRID, 1).sum(1, keepdim=True)
    torch.testing.assert_close(steps[0], expected)


def test_the_walk_in_half_precision_and_under_autocast():
    cam, logits = normal(0, 2, 3, *GRID).sigmoid().half(), symmetric(1).half()
    steps = transition(logits, neighbours(GRID, 1))
    expected = random_walk(cam.double(), transition(logits.double(), neighbours(GRID, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        walked = random_walk(cam, transition(logits, neighbours(GRID, 1)))
    assert steps.dtype == walked.dtype == torch.float32
    torch.testing.assert_close(walked.double(), expected, rtol=1e-5, atol=1e-6)
