"""AFA: affinity, walk and every term recomputed by loops over pairs of patches, stages, frozen norms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.cam import refined_labels
from repro.methods.image_tags.afa import (
    AFA,
    AFANetwork,
    AFASettings,
    affinity_loss,
    affinity_pairs,
    neighbours,
    random_walk,
    symmetric_scores,
    transition,
)
from repro.methods.image_tags.common import Trunk
from tests.methods.image_tags import fakes
from tests.methods.image_tags.fakes import CLASSES, SCALES, SIDE, Head

GRID, N = (3, 4), 12
TAGS = torch.ones(2, CLASSES)


def symmetric(seed, batch=2):
    logits = 2 * fakes.normal(seed, batch, N, N)
    return logits + logits.mT


def label_map(seed, size=(9, 12), batch=2):
    """Background, two classes and ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (batch, *size), generator=generator)
    return labels.masked_fill(torch.rand(batch, *size, generator=generator) < 0.2, 255)


def close(i, j, radius, columns=GRID[1]):
    return abs(i // columns - j // columns) <= radius and abs(i % columns - j % columns) <= radius


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


def loss_oracle(affinity, alike, apart):
    pull = sum(1 - affinity[pair] for pair in alike) / (len(alike) + 1)
    return 0.5 * pull + 0.5 * sum(affinity[pair] for pair in apart) / (len(apart) + 1)


def test_scores_of_patches_are_added_to_their_mirror_image():
    blocks = [fakes.normal(seed, 2, 3, N + 2, N + 2) for seed in (0, 1)]
    blocks[0][:, :, :, :2] = -math.inf  # nobody looks at class tokens
    seen = symmetric_scores(blocks, 2)
    assert seen.shape == (2, 6, N, N) and torch.equal(seen, seen.mT)
    for block, head, i, j in [(0, 0, 0, 5), (0, 2, 7, 7), (1, 1, 11, 3)]:
        scores = blocks[block][:, head]
        expected = scores[:, 2 + i, 2 + j] + scores[:, 2 + j, 2 + i]
        torch.testing.assert_close(seen[:, 3 * block + head, i, j], expected, rtol=0, atol=0)
    assert symmetric_scores([blocks[1].half()], 2).dtype == torch.float32


@given(st.integers(0, 10**6), st.integers(0, 5), st.sampled_from([(9, 12), (10, 13), (3, 4)]))
@settings(max_examples=25, deadline=None)
def test_pairs_and_loss_are_the_loops(seed, radius, size):
    labels, logits = label_map(seed, size), symmetric(seed + 1)
    alike, apart = affinity_pairs(labels, GRID, radius)
    expected = pair_oracle(labels, GRID, radius)
    assert [[tuple(pair) for pair in kind.nonzero().tolist()] for kind in (alike, apart)] == list(expected)
    assert affinity_loss(logits, alike, apart).item() == pytest.approx(
        float(loss_oracle(logits.sigmoid(), *expected)), rel=1e-12
    )
    for kind in (torch.uint8, torch.int32):
        again = affinity_pairs(labels.to(kind), GRID, radius)
        assert torch.equal(again[0], alike) and torch.equal(again[1], apart)


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


def walk_oracle(cam, affinity, grid, radius, power=2):
    """Each patch the mean of the patches around it, weighted by powers of the affinity; cam (B, C, H, W)."""
    maps = fakes.bilinear(cam, grid).flatten(2)
    walked = torch.zeros_like(maps)
    for b in range(len(cam)):
        for i in range(maps.shape[2]):
            weights = [
                affinity[b, i, j] ** power if close(i, j, radius, grid[1]) else affinity.new_zeros(())
                for j in range(maps.shape[2])
            ]
            walked[b, :, i] = sum(w * maps[b, :, j] for j, w in enumerate(weights)) / sum(weights)
    return fakes.bilinear(walked.unflatten(2, grid), cam.shape[2:])


@given(st.integers(0, 10**6), st.integers(0, 4), st.sampled_from([0.0, 1.0, 2.0, 3.5]))
@settings(max_examples=20, deadline=None)
def test_the_walk_is_the_loop(seed, radius, power):
    cam, logits = fakes.normal(seed, 2, 3, *GRID).sigmoid(), symmetric(seed + 1)
    steps = transition(logits, neighbours(GRID, radius), power)
    torch.testing.assert_close(steps.sum(2), torch.ones(2, N, dtype=torch.float64))
    assert not steps[:, ~neighbours(GRID, radius)].any()
    walked = random_walk(cam, steps)
    torch.testing.assert_close(walked, walk_oracle(cam, logits.sigmoid(), GRID, radius, power), rtol=1e-10, atol=1e-12)
    assert (walked <= cam.amax((2, 3), keepdim=True) + 1e-12).all()
    assert (walked >= cam.amin((2, 3), keepdim=True) - 1e-12).all()


def test_walks_with_a_known_end():
    cam = fakes.normal(0, 2, 3, *GRID).sigmoid()
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


def test_vanishing_affinities_divide_nothing_by_0():
    """sigmoid(-200) squared is 0 in float32; what counts is that all are equal."""
    steps = transition(torch.full((1, N, N), -200.0), neighbours(GRID, 1))
    expected = neighbours(GRID, 1) / neighbours(GRID, 1).sum(1, keepdim=True)
    torch.testing.assert_close(steps[0], expected)


def test_the_walk_in_half_precision_and_under_autocast():
    cam, logits = fakes.normal(0, 2, 3, *GRID).sigmoid().half(), symmetric(1).half()
    steps = transition(logits, neighbours(GRID, 1))
    expected = random_walk(cam.double(), transition(logits.double(), neighbours(GRID, 1)))
    with torch.autocast("cpu", torch.bfloat16):
        walked = random_walk(cam, transition(logits, neighbours(GRID, 1)))
    assert steps.dtype == walked.dtype == torch.float32
    torch.testing.assert_close(walked.double(), expected, rtol=1e-5, atol=1e-6)


def network(settings=None, **tokens):
    """AFA's network of 4 x 4 patches; its projection is small, for the fakes' scores are large."""
    settings = settings or AFASettings(radius=2)
    made = AFANetwork(fakes.encoder(**tokens), CLASSES, Head(), settings)
    with torch.no_grad():
        made.projection.weight.mul_(0.05)
    return made


def built(changes=None, **options):
    settings = AFASettings(**{"radius": 2} | options)
    torch.manual_seed(7)
    return AFA(settings, network(settings), fakes.views(), fakes.recipe(settings, **changes or {})).train()


def images(count=2, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def affinity_oracle(made, x):
    """sigmoid(conv(S + S^T)) pair by pair, S from the queries and keys of the last two blocks; patches only."""
    blocks, seen = made.encoder.blocks[-2:], []
    hooks = [block.norm1.register_forward_hook(lambda module, given, out: seen.append(out)) for block in blocks]
    grid = made.encoder(x).grid
    for hook in hooks:
        hook.remove()
    each, logits = fakes.LAYOUT.width // fakes.LAYOUT.heads, 0
    for number, (block, tokens) in enumerate(zip(blocks, seen, strict=True)):
        query, key = (
            tokens[:, 1:] @ block.attn.qkv.weight[part].T + block.attn.qkv.bias[part]
            for part in (slice(0, fakes.LAYOUT.width), slice(fakes.LAYOUT.width, 2 * fakes.LAYOUT.width))
        )
        for head in range(fakes.LAYOUT.heads):
            at = slice(head * each, (head + 1) * each)
            scores = torch.einsum("bid,bjd->bij", query[..., at], key[..., at])
            weight = made.projection.weight[0, number * fakes.LAYOUT.heads + head, 0, 0]
            logits = logits + weight * (scores + scores.transpose(1, 2))
    return (logits + made.projection.bias).sigmoid(), grid


@pytest.mark.parametrize("step", [0, 9, 10, 29, 30, 99])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(seg_weight=0.3, aff_weight=0.7), fakes.items(3)
    view, made = fakes.replayed(method, samples), method.network
    tokens = made.encoder(view.x)
    expected = fakes.tag_oracles(made, tokens, samples.labels)
    if step >= 10:
        affinity, grid = affinity_oracle(made, view.x)
        cam = fakes.cam_oracle(fakes.main_cam(made), view.x).detach()
        pixels, valid = view.crop.images.float() / 255, ~view.crop.padding
        labels = refined_labels(pixels, cam, samples.labels, 0.25, 0.7, valid)
        pairs = pair_oracle(labels, (4, 4), 2)
        assert min(map(len, pairs)) > 20
        expected["affinity"] = 0.7 * loss_oracle(affinity, *pairs)
        if step >= 30:
            walked = walk_oracle(cam, affinity.detach(), grid, 2)
            taught = refined_labels(pixels, walked, samples.labels, 0.25, 0.7, valid)
            assert not torch.equal(taught, labels)
            labels = taught
        expected["segmentation"] = 0.3 * fakes.head_oracle(made, tokens, labels)
    found = method.losses({"tagged": samples}, fakes.now(step))
    assert found.terms.keys() == expected.keys() and found.pseudo == {}
    for name, term in found.terms.items():
        fakes.same_gradients(term, expected[name], method)
    assert made.walking.item() is (step >= 30)


def test_the_affinity_learns_the_map_that_has_not_walked_and_the_head_the_one_that_has(monkeypatch):
    method, samples = built(), fakes.items(2)
    asked, made = [], iter((torch.zeros(2, SIDE, SIDE), torch.ones(2, SIDE, SIDE)))
    monkeypatch.setattr(method, "labels", lambda view, cam: asked.append(cam) or next(made).long())
    view = fakes.replayed(method, samples)
    logs = method.network(view.x).log_softmax(1)
    terms = method.losses({"tagged": samples}, fakes.now(50)).terms
    plain, walked = method.network.maps(view.x, SCALES, True)
    assert torch.equal(asked[0], plain) and torch.equal(asked[1], walked) and not torch.allclose(plain, walked)
    # labels that are all 0 make the affinity's pairs, labels that are all 1 teach the head
    torch.testing.assert_close(terms["segmentation"], -0.05 * logs[:, 1].mean(), rtol=1e-4, atol=1e-6)
    affinity, _ = affinity_oracle(method.network, view.x)
    near = torch.tensor([[close(i, j, 2, 4) for j in range(16)] for i in range(16)])
    pull = (1 - affinity)[:, near].sum() / (2 * near.sum() + 1)
    torch.testing.assert_close(terms["affinity"], 0.05 * pull, rtol=1e-4, atol=1e-6)


def test_the_affinity_s_loss_reaches_projection_and_encoder_but_neither_classifier_nor_head():
    method = built(freeze_norms=False)
    reached = fakes.gradients(method.losses({"tagged": fakes.items()}, fakes.now(50)).terms["affinity"], method.network)
    assert {name.split(".")[0] for name in reached} == {"encoder", "projection"}
    assert {"projection.weight", "projection.bias", "encoder.blocks.2.attn.qkv.weight"} <= reached
    assert not any(name.startswith("encoder.norm") for name in reached)  # scores are read in front of the final norm
    other = fakes.gradients(
        method.losses({"tagged": fakes.items()}, fakes.now(50)).terms["segmentation"], method.network
    )
    assert {name.split(".")[0] for name in other} == {"encoder", "head"}


def test_the_walk_begins_when_the_settings_say_and_not_before_the_warm_up():
    method = built(propagate_from=0.05)
    method.losses({"tagged": fakes.items(2)}, fakes.now(9))
    assert not method.network.walking
    method.losses({"tagged": fakes.items(2)}, fakes.now(10))
    assert method.network.walking
    late = built(propagate_from=1.0)
    late.losses({"tagged": fakes.items(2)}, fakes.now(99))
    assert not late.network.walking


def test_norms_of_the_encoder_are_frozen():
    method = built()
    groups = method.parameter_groups(0.01)
    learning = {id(value) for group in groups for value in group["params"]}
    named = dict(method.network.named_parameters())
    norms = {name for name in named if name.startswith("encoder.") and "norm" in name}
    assert len(norms) == 2 * (2 * fakes.LAYOUT.depth + 1)
    assert {name for name, value in named.items() if id(value) not in learning} == norms
    before = {name: named[name].clone() for name in norms}
    terms = method.losses({"tagged": fakes.items(2)}, fakes.now(50)).terms
    sum(terms.values()).backward()
    torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(named[name], before[name]) for name in norms)
    free = built(freeze_norms=False)
    assert all(value.requires_grad for value in free.parameters())


def test_the_projection_reads_the_heads_of_two_blocks_and_starts_as_released():
    torch.manual_seed(0)
    weights = torch.cat(
        [
            AFANetwork(fakes.encoder(seed), CLASSES, Head(), AFASettings()).projection.weight.flatten()
            for seed in range(100)
        ]
    )
    assert len(weights) == 100 * 2 * fakes.LAYOUT.heads  # one output channel
    assert weights.std().item() == pytest.approx(3**-0.5, rel=0.1)  # gain sqrt(2 / 6) over sqrt(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_affinity_is_that_of_queries_and_keys(seed):
    made, x = network(seed=seed), images(seed=seed)
    predicted = made.predict(x)
    logits = made.affinity(predicted.tokens.attention.values())
    expected, _ = affinity_oracle(made, x)
    torch.testing.assert_close(logits.sigmoid(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, logits.mT)
    assert logits.shape == (2, 16, 16) and list(predicted.tokens.attention) == [1, 2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.affinity(predicted.tokens.attention.values()), logits)
    # everything else is the trunk's
    plain = Trunk.predict(made, x)
    for ours, theirs in zip(predicted[:3], plain[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.5, 1.5, 1.0), (0.5,), (1.0, 1.0)])
def test_the_walk_is_on_the_grid_of_the_largest_scale(scales):
    made, x = network(AFASettings(radius=1, power=3)), images()
    cam, walked = made.maps(x, scales, True)
    expected = fakes.cam_oracle(fakes.main_cam(made), x, scales)
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-5)
    side = int(max(scales) * SIDE)
    affinity, grid = affinity_oracle(made, fakes.bilinear(x, (side, side)))
    assert grid == (side // 4, side // 4)
    torch.testing.assert_close(walked, walk_oracle(expected, affinity, grid, 1, 3), rtol=1e-3, atol=1e-4)
    assert not walked.requires_grad and walked.min() >= 0 and walked.max() <= 1


def test_the_evaluated_cam_walks_once_training_has_walked_it():
    made, x = network(), images()
    expected = fakes.cam_oracle(fakes.main_cam(made), x)
    torch.testing.assert_close(made.activation(x, SCALES, TAGS), expected, rtol=1e-4, atol=1e-5)
    made.walking.fill_(True)
    affinity, grid = affinity_oracle(made, x)
    torch.testing.assert_close(
        made.activation(x, SCALES, TAGS), walk_oracle(expected, affinity, grid, 2), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        made.both_cams(x, SCALES)[1], fakes.cam_oracle(fakes.aux_cam(made), x), rtol=1e-4, atol=1e-5
    )


def test_an_encoder_without_attention_at_its_end_is_refused():
    with pytest.raises(ValueError, match="attention of the last 2 blocks"):
        network(value_only=True)
