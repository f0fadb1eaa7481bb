"""AFA's network and steps: every term recomputed by loops, its stages, frozen norms, and what is evaluated."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repro.cam import refined_labels
from repro.methods.image_tags import METHODS
from repro.methods.image_tags.afa import AFA, AFANetwork, AFASettings
from repro.methods.image_tags.common import Trunk
from repro.models.vit import vit
from repro.settings import SettingError
from repro.train import Ema
from tests.methods.image_tags.fakes import (
    CLASSES,
    LAYOUT,
    SCALES,
    SIDE,
    Head,
    aux_cam,
    balanced_oracle,
    bilinear,
    cam_oracle,
    encoder,
    gradients,
    items,
    main_cam,
    now,
    recipe,
    replayed,
    same_gradients,
    views,
)

TAGS = torch.ones(2, CLASSES)


def network(settings=None, **tokens):
    """AFA's network of 4 x 4 patches; its projection is small, for the fakes' scores are large."""
    settings = settings or AFASettings(radius=2)
    made = AFANetwork(encoder(**tokens), CLASSES, Head(), settings)
    with torch.no_grad():
        made.projection.weight.mul_(0.05)
    return made


def built(changes=None, **options):
    settings = AFASettings(**{"radius": 2} | options)
    torch.manual_seed(7)
    return AFA(settings, network(settings), views(), recipe(settings, **changes or {})).train()


def images(count=2, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def affinity_oracle(made, x):
    """sigmoid(conv(S + S^T)) pair by pair, S from the queries and keys of the last two blocks; patches only."""
    blocks, seen = made.encoder.blocks[-2:], []
    hooks = [block.norm1.register_forward_hook(lambda module, given, out: seen.append(out)) for block in blocks]
    grid = made.encoder(x).grid
    for hook in hooks:
        hook.remove()
    each, logits = LAYOUT.width // LAYOUT.heads, 0
    for number, (block, tokens) in enumerate(zip(blocks, seen, strict=True)):
        query, key = (
            tokens[:, 1:] @ block.attn.qkv.weight[part].T + block.attn.qkv.bias[part]
            for part in (slice(0, LAYOUT.width), slice(LAYOUT.width, 2 * LAYOUT.width))
        )
        for head in range(LAYOUT.heads):
            at = slice(head * each, (head + 1) * each)
            scores = torch.einsum("bid,bjd->bij", query[..., at], key[..., at])
            weight = made.projection.weight[0, number * LAYOUT.heads + head, 0, 0]
            logits = logits + weight * (scores + scores.transpose(1, 2))
    return (logits + made.projection.bias).sigmoid(), grid


def close(i, j, columns, radius):
    return abs(i // columns - j // columns) <= radius and abs(i % columns - j % columns) <= radius


def affinity_loss_oracle(affinity, labels, radius):
    """Spec 6.9 by loops over pairs of patches; labels (B, 16, 16), of which every fourth pixel is a patch."""
    patches = labels[:, ::4, ::4].flatten(1).tolist()
    alike, apart = [], []
    for b, patch in enumerate(patches):
        for i in range(16):
            for j in range(16):
                if close(i, j, 4, radius) and 255 not in (patch[i], patch[j]):
                    (alike if patch[i] == patch[j] else apart).append(affinity[b, i, j])
    assert len(alike) > 20 and len(apart) > 20
    pull = sum(1 - a for a in alike) / (len(alike) + 1)
    return 0.5 * pull + 0.5 * sum(apart) / (len(apart) + 1)


def walk_oracle(cam, affinity, grid, radius, power=2):
    """Each patch the mean of the patches around it, weighted by powers of the affinity; cam (B, C, H, W)."""
    maps = bilinear(cam, grid).flatten(2)
    walked = torch.zeros_like(maps)
    for b in range(len(cam)):
        for i in range(maps.shape[2]):
            weights = [
                affinity[b, i, j] ** power if close(i, j, grid[1], radius) else affinity.new_zeros(())
                for j in range(maps.shape[2])
            ]
            walked[b, :, i] = sum(w * maps[b, :, j] for j, w in enumerate(weights)) / sum(weights)
    return bilinear(walked.unflatten(2, grid), cam.shape[2:])


# Steps


@pytest.mark.parametrize("step", [0, 9, 10, 29, 30, 99])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(seg_weight=0.3, aff_weight=0.7), items(3)
    view, made = replayed(method, samples), method.network
    tokens = made.encoder(view.x)
    expected = {
        "tags": F.multilabel_soft_margin_loss(made.classifier(tokens.patches.amax(1)), samples.labels),
        "tags_aux": F.multilabel_soft_margin_loss(made.classifier_aux(tokens.auxiliary.amax(1)), samples.labels),
    }
    if step >= 10:
        affinity, grid = affinity_oracle(made, view.x)
        cam = cam_oracle(main_cam(made), view.x).detach()
        pixels, valid = view.crop.images.float() / 255, ~view.crop.padding
        labels = refined_labels(pixels, cam, samples.labels, 0.25, 0.7, valid)
        expected["affinity"] = 0.7 * affinity_loss_oracle(affinity, labels, 2)
        if step >= 30:
            walked = walk_oracle(cam, affinity.detach(), grid, 2)
            taught = refined_labels(pixels, walked, samples.labels, 0.25, 0.7, valid)
            assert not torch.equal(taught, labels)
            labels = taught
        maps = tokens.patches.mT.reshape(3, -1, 4, 4)
        expected["segmentation"] = 0.3 * balanced_oracle(bilinear(made.head(maps), (SIDE, SIDE)), labels)
    found = method.losses({"tagged": samples}, now(step))
    assert found.terms.keys() == expected.keys() and found.pseudo == {}
    for name, term in found.terms.items():
        same_gradients(term, expected[name], method)
    assert made.walking.item() is (step >= 30)


def test_the_affinity_learns_the_map_that_has_not_walked_and_the_head_the_one_that_has(monkeypatch):
    method, samples = built(), items(2)
    asked, made = [], iter((torch.zeros(2, SIDE, SIDE), torch.ones(2, SIDE, SIDE)))
    monkeypatch.setattr(method, "labels", lambda view, cam: asked.append(cam) or next(made).long())
    view = replayed(method, samples)
    logs = method.network(view.x).log_softmax(1)
    terms = method.losses({"tagged": samples}, now(50)).terms
    plain, walked = method.network.maps(view.x, SCALES, True)
    assert torch.equal(asked[0], plain) and torch.equal(asked[1], walked) and not torch.allclose(plain, walked)
    # labels that are all 0 make the affinity's pairs, labels that are all 1 teach the head
    torch.testing.assert_close(terms["segmentation"], -0.05 * logs[:, 1].mean(), rtol=1e-4, atol=1e-6)
    affinity, _ = affinity_oracle(method.network, view.x)
    near = torch.tensor([[close(i, j, 4, 2) for j in range(16)] for i in range(16)])
    pull = (1 - affinity)[:, near].sum() / (2 * near.sum() + 1)
    torch.testing.assert_close(terms["affinity"], 0.05 * pull, rtol=1e-4, atol=1e-6)


def test_the_affinity_s_loss_reaches_projection_and_encoder_but_neither_classifier_nor_head():
    method = built(freeze_norms=False)
    reached = gradients(method.losses({"tagged": items()}, now(50)).terms["affinity"], method.network)
    assert {name.split(".")[0] for name in reached} == {"encoder", "projection"}
    assert {"projection.weight", "projection.bias", "encoder.blocks.2.attn.qkv.weight"} <= reached
    assert not any(name.startswith("encoder.norm") for name in reached)  # scores are read in front of the final norm
    other = gradients(method.losses({"tagged": items()}, now(50)).terms["segmentation"], method.network)
    assert {name.split(".")[0] for name in other} == {"encoder", "head"}


def test_the_walk_begins_when_the_settings_say_and_not_before_the_warm_up():
    method = built(propagate_from=0.05)
    method.losses({"tagged": items(2)}, now(9))
    assert not method.network.walking
    method.losses({"tagged": items(2)}, now(10))
    assert method.network.walking
    late = built(propagate_from=1.0)
    late.losses({"tagged": items(2)}, now(99))
    assert not late.network.walking


def test_images_without_a_sure_pixel_teach_no_affinity(monkeypatch):
    method = built()
    monkeypatch.setattr(method, "labels", lambda view, cam: torch.full((2, SIDE, SIDE), 255))
    terms = method.losses({"tagged": items(2)}, now(50)).terms
    assert terms["affinity"].item() == 0 and terms["segmentation"].item() == 0


# What learns


def test_norms_of_the_encoder_are_frozen():
    method = built()
    groups = method.parameter_groups(0.01)
    learning = {id(value) for group in groups for value in group["params"]}
    named = dict(method.network.named_parameters())
    norms = {name for name in named if name.startswith("encoder.") and "norm" in name}
    assert len(norms) == 2 * (2 * LAYOUT.depth + 1)
    assert {name for name, value in named.items() if id(value) not in learning} == norms
    before = {name: named[name].clone() for name in norms}
    terms = method.losses({"tagged": items(2)}, now(50)).terms
    sum(terms.values()).backward()
    torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(named[name], before[name]) for name in norms)
    free = built(freeze_norms=False)
    assert all(value.requires_grad for value in free.parameters())


def test_norms_of_a_convolutional_stem_are_frozen_too():
    settings = AFASettings()
    made = AFANetwork(vit("vit-mini"), CLASSES, Head(), settings)
    AFA(settings, made, views(), recipe(settings))
    norms = [module for module in made.encoder.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and not any(value.requires_grad for norm in norms for value in norm.parameters())
    assert all(v.requires_grad for m in made.encoder.modules() if isinstance(m, nn.Conv2d) for v in m.parameters())


def test_the_projection_learns_as_fast_as_heads_and_classifiers():
    method = built()
    slow, fast = method.parameter_groups(0.01)
    assert (slow["lr_factor"], fast["lr_factor"]) == (1.0, 10.0)
    names = {id(value): name for name, value in method.network.named_parameters()}
    assert {names[id(value)].split(".")[0] for value in fast["params"]} == {
        "classifier", "classifier_aux", "head", "projection"
    }  # fmt: skip
    assert {names[id(value)].split(".")[0] for value in slow["params"]} == {"encoder"}


def test_the_projection_reads_the_heads_of_two_blocks_and_starts_as_released():
    torch.manual_seed(0)
    weights = torch.cat(
        [AFANetwork(encoder(seed), CLASSES, Head(), AFASettings()).projection.weight.flatten() for seed in range(100)]
    )
    assert len(weights) == 100 * 2 * LAYOUT.heads  # one output channel
    assert weights.std().item() == pytest.approx(3**-0.5, rel=0.1)  # gain sqrt(2 / 6) over sqrt(1)


# The network


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
    expected = cam_oracle(main_cam(made), x, scales)
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-5)
    side = int(max(scales) * SIDE)
    affinity, grid = affinity_oracle(made, bilinear(x, (side, side)))
    assert grid == (side // 4, side // 4)
    torch.testing.assert_close(walked, walk_oracle(expected, affinity, grid, 1, 3), rtol=1e-3, atol=1e-4)
    assert not walked.requires_grad and walked.min() >= 0 and walked.max() <= 1


def test_without_a_walk_no_attention_is_asked_for(monkeypatch):
    made, x, asked = network(), images(), []
    forward = made.encoder.forward
    monkeypatch.setattr(made.encoder, "forward", lambda *args, **kw: asked.append(args[1:]) or forward(*args, **kw))
    cam, same = made.maps(x, SCALES, False)
    assert same is cam and asked == [((),), ((),)]
    asked.clear()
    made.maps(x, SCALES, True)
    assert asked == [((-2, -1),), ((),)]


def test_the_evaluated_cam_walks_once_training_has_walked_it():
    made, x = network(), images()
    expected = cam_oracle(main_cam(made), x)
    torch.testing.assert_close(made.activation(x, SCALES, TAGS), expected, rtol=1e-4, atol=1e-5)
    made.walking.fill_(True)
    affinity, grid = affinity_oracle(made, x)
    torch.testing.assert_close(
        made.activation(x, SCALES, TAGS), walk_oracle(expected, affinity, grid, 2), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(made.both_cams(x, SCALES)[1], cam_oracle(aux_cam(made), x), rtol=1e-4, atol=1e-5)


def test_whether_the_cam_walks_is_saved_and_copied():
    method = built()
    method.losses({"tagged": items(2)}, now(50))
    again = built()
    again.load_state_dict(method.state_dict())
    assert again.network.walking
    other = built()
    teacher = Ema(other.network, 0.5)
    other.losses({"tagged": items(2)}, now(50))
    assert not teacher.network.walking
    teacher.update()
    assert teacher.network.walking


@pytest.mark.parametrize("radius", [0, 100])
def test_extreme_radii(radius):
    """A radius of 0 changes the map only by resizing it to the patch grid and back; a huge one takes all patches."""
    made, x = network(AFASettings(radius=radius)), images()
    cam, walked = made.maps(x, SCALES, True)
    if radius == 0:
        torch.testing.assert_close(walked, bilinear(bilinear(cam, (4, 4)), (SIDE, SIDE)))
    else:
        affinity, grid = affinity_oracle(made, x)
        torch.testing.assert_close(walked, walk_oracle(cam, affinity, grid, 4), rtol=1e-3, atol=1e-4)


def test_an_encoder_without_attention_at_its_end_is_refused():
    with pytest.raises(ValueError, match="attention of the last 2 blocks"):
        network(value_only=True)


def test_settings_are_checked_and_the_method_has_its_name():
    assert METHODS["afa"] is AFA and AFA.Settings is AFASettings
    with pytest.raises(SettingError, match="radius is -1"):
        AFASettings(radius=-1)
    with pytest.raises(SettingError, match="propagate_from is 2"):
        AFASettings(propagate_from=2)
