"""PCRE's network and steps: every term recomputed from the equations, stages, radius, prototypes, fusion, switches."""

import math

import pytest
import torch
import torch.nn.functional as F

from repro.cam import refined_labels
from repro.methods.image_tags import pcre as losses
from repro.methods.image_tags import pcre as regions
from repro.methods.image_tags.pcre import AUX, CAM, PCRE, PROTOTYPES, REGIONS, PCRENetwork, PCRESettings, RegionDecoder
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
    contrast_oracle,
    encoder,
    gradients,
    items,
    main_cam,
    now,
    patch_label_oracle,
    patch_oracle,
    recipe,
    replayed,
    same_gradients,
    views,
)

TAGS = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 0]])
EXPANSION = {"tau": 0.5, "rounds": 3}  # of random masks, more than half of which are above .5


def network(settings=None, seed=0):
    """PCRE's network of 4 x 4 patches, its decoder's weights large enough for masks to differ."""
    made = encoder(seed, CLASSES, masked=True, value_only=True)
    torch.manual_seed(seed)
    decoder = RegionDecoder(made, LAYOUT, CLASSES, heads=2, hidden=24, groups=4)
    with torch.no_grad():
        for value in decoder.parameters():
            value.mul_(2 if value.ndim > 1 else 1)
    return PCRENetwork(made, CLASSES, Head(), decoder, settings or PCRESettings())


def built(changes=None, **options):
    settings = PCRESettings(**{**EXPANSION, **options})
    return PCRE(settings, network(settings), views(), recipe(settings, **changes or {})).train()


# The decoder


def attend(queries, keys, weights, heads=2):
    """Multi-head attention of one image by loops over heads; weights: of torch's module."""
    w, b, width = weights.in_proj_weight, weights.in_proj_bias, queries.shape[1]
    q, k, v = (
        source @ w[part * width : (part + 1) * width].T + b[part * width : (part + 1) * width]
        for part, source in enumerate((queries, keys, keys))
    )
    mixed = []
    for head in range(heads):
        at = slice(head * width // heads, (head + 1) * width // heads)
        mixed.append((q[:, at] @ k[:, at].T / math.sqrt(width // heads)).softmax(1) @ v[:, at])
    return torch.cat(mixed, 1) @ weights.out_proj.weight.T + weights.out_proj.bias


def decoded(decoder, x, patches, positions):
    """Spec 3.2 (1) and (2) for one image."""
    queries = []
    for i in range(x.shape[1] // 4):
        for j in range(x.shape[2] // 4):
            cell = x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            queries.append((decoder.patch_embed.proj.weight * cell).sum((1, 2, 3)) + decoder.patch_embed.proj.bias)
    flow = torch.stack(queries) + positions
    for layer in decoder.layers.layers:
        flow = layer.norm1(flow + attend(flow, flow, layer.self_attn))
        flow = layer.norm2(flow + attend(flow, patches, layer.multihead_attn))
        flow = layer.norm3(flow + layer.linear2(layer.linear1(flow).relu()))
    return decoder.layers.norm(flow)


@pytest.mark.parametrize("side", [16, 24])
def test_the_decoder_is_the_equations(side):
    decoder = network().decoder
    generator = torch.Generator().manual_seed(0)
    grid = (side // 4, side // 4)
    x, patches = (
        torch.randn(2, 3, side, side, generator=generator),
        torch.randn(2, grid[0] ** 2, 16, generator=generator),
    )
    confidence, masks = decoder(x, patches, grid)
    positions = decoder.pos_embed.mT.reshape(1, 16, 4, 4)
    if side != 16:
        positions = F.interpolate(positions, grid, mode="bicubic", align_corners=False)
    positions = positions[0].flatten(1).T
    first, second, norm, _, third = decoder.pixels
    for b in range(2):
        flow = decoded(decoder, x[b], patches[b], positions)
        s = (flow @ decoder.by_class.weight.T + decoder.by_class.bias).softmax(1)
        s = s * (flow @ decoder.by_patch.weight.T + decoder.by_patch.bias).softmax(0)
        torch.testing.assert_close(confidence[b], s, rtol=1e-3, atol=1e-6)
        e = flow
        for at in (0, 2, 4):
            e = decoder.embed[at](e if at == 0 else e.relu())
        maps = third(norm(second(first(patches[b].T.reshape(1, 16, *grid)))).relu())[0]
        for n in (0, 5, len(flow) - 1):
            expected = (e[n][:, None, None] * maps).sum(0).sigmoid()
            torch.testing.assert_close(masks[b, n], expected, rtol=1e-3, atol=1e-5)
    assert masks.shape == (2, grid[0] ** 2, *grid) and norm.num_groups == 4


def test_neither_confidence_nor_masks_move_the_encoder():
    made = network()
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens = made.encoder(x)
    assert tokens.patches.requires_grad
    for output in made.decoder(x, tokens.patches, tokens.grid):
        reached = gradients(output.square().sum(), made)
        assert reached and all(name.startswith("decoder.") for name in reached)


def test_a_grid_that_a_stem_rounds_up_is_met():
    """18 pixels: two strides of 2 with padding make 5 patches, one convolution of 4 pixels makes 4."""
    made = network()
    confidence, masks = made.decoder(torch.randn(1, 3, 18, 18), torch.randn(1, 25, 16), (5, 5))
    assert confidence.shape == (1, 25, CLASSES) and masks.shape == (1, 25, 5, 5)


def test_the_decoder_s_layers_are_the_published_ones():
    made = network()
    decoder = RegionDecoder(made.encoder, LAYOUT, CLASSES, heads=8, groups=16)
    layer = decoder.layers.layers[0]
    assert layer.linear1.out_features == 2048 and layer.self_attn.num_heads == 8 and not layer.norm_first
    assert {module.p for module in decoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert decoder.patch_embed.proj is not made.encoder.patch_embed.proj
    assert len(decoder.layers.layers) == 2
    for branch in (decoder.by_class, decoder.by_patch):
        assert not branch.bias.any() and branch.weight.abs().max() <= math.sqrt(6 / (LAYOUT.width + CLASSES))


# Maps


def proto_cam(made, points=None):
    def raw(seen, number):
        tokens = made.encoder(seen)
        anchors = made.prototypes if points is None else tokens.class_tokens[0]
        rows = [[F.cosine_similarity(f, p, dim=0).abs() for f in tokens.patches[0]] for p in anchors]
        return torch.stack([torch.stack(row) for row in rows]).view(CLASSES, *tokens.grid)

    return raw


def region_map(made, tags, size=(SIDE, SIDE), only=None):
    """m_r of one image, class by class, resized straight to the final size; only: sides that masks are read at."""

    def raw(seen, number):
        if only is not None and seen.shape[2] not in only:
            return torch.zeros(CLASSES, *size)
        tokens = made.encoder(seen)
        confidence, masks = made.decoder(seen, tokens.patches, tokens.grid)
        out = torch.zeros(CLASSES, *size)
        for c in tags[number].nonzero()[:, 0].tolist():
            single = regions.Pairs(torch.tensor([[c]]), torch.tensor([[True]]))
            found = regions.refined_regions(masks, confidence, single, size, made.settings.expansion)
            out[c] = found.masks[0, 0]
        return out

    return raw


@pytest.mark.parametrize("resize", ["each", "group"])
def test_maps_are_those_of_loops_over_scales_and_mirror_images(resize):
    made = network(PCRESettings(**EXPANSION, resize=resize))
    x, tags = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), TAGS
    found = made.maps(x, SCALES, tags, (CAM, AUX, PROTOTYPES, REGIONS))
    expected = {
        CAM: main_cam(made), AUX: aux_cam(made), PROTOTYPES: proto_cam(made), REGIONS: region_map(made, tags)
    }  # fmt: skip
    assert list(found) == list(expected)
    for name, raw in expected.items():
        torch.testing.assert_close(
            found[name], cam_oracle(raw, x), rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )
        assert not found[name].requires_grad
    assert found[REGIONS].amax((2, 3))[tags > 0].gt(0.5).all() and not found[REGIONS][tags == 0].any()
    for names in ((CAM,), (REGIONS,), (AUX, REGIONS), (REGIONS, CAM)):
        again = made.maps(x, SCALES, tags, names, most=3)
        assert list(again) == list(names)
        for name in names:
            torch.testing.assert_close(again[name], found[name])


def test_masks_can_be_read_at_some_scales_only():
    made = network(PCRESettings(**EXPANSION, mask_scales="0.5"))
    x, tags = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), TAGS
    found = made.maps(x, SCALES, tags, (CAM, REGIONS))
    torch.testing.assert_close(found[CAM], cam_oracle(main_cam(made), x), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[REGIONS], cam_oracle(region_map(made, tags, only={8}), x), rtol=1e-3, atol=1e-5)


def test_class_tokens_can_stand_in_for_prototypes():
    made = network(PCRESettings(prototypes=False))
    x, tags = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), torch.ones(2, CLASSES)
    expected = cam_oracle(proto_cam(made, points="tokens"), x)
    torch.testing.assert_close(made.maps(x, SCALES, tags, (PROTOTYPES,))[PROTOTYPES], expected, rtol=1e-3, atol=1e-5)


def test_the_evaluated_cam_is_mixed_with_regions_once_training_mixes_them():
    made = network(PCRESettings(**EXPANSION, fusion=0.4))
    x, tags = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), TAGS
    cam, grown = cam_oracle(main_cam(made), x), cam_oracle(region_map(made, tags), x)
    torch.testing.assert_close(made.activation(x, SCALES, tags), cam, rtol=1e-3, atol=1e-5)
    made.fusing.fill_(True)
    mixed = torch.where((tags > 0)[:, :, None, None], 0.6 * cam + 0.4 * grown, cam)
    torch.testing.assert_close(made.activation(x, SCALES, tags), mixed, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(made.activation(x, SCALES, torch.zeros_like(tags)), cam, rtol=1e-3, atol=1e-5)


# Steps


def cpe_oracle(tokens, labels, tags):
    """Spec 3.5 by loops over classes and patches."""
    labels = labels.flatten(1)

    def kind(b, c, n):
        label = labels[b, n].item()
        return None if label == 255 or not tags[b, c] else label == c + 1

    return contrast_oracle(tokens.class_tokens, tokens.patches.detach(), kind)


def refine_oracle(masks, confidence, tags, labels, radius, rules):
    """Spec 3.6 by loops over pairs; the gate by loops over patches."""
    gated = masks.clone()
    for n in range(16):
        for i in range(4):
            for j in range(4):
                if (i - n // 4) ** 2 + (j - n % 4) ** 2 > radius**2:
                    gated[:, n, i, j] = 0
    total = 0.0
    for b, c in tags.nonzero().tolist():
        single = regions.Pairs(torch.tensor([[c]]), torch.tensor([[True]]))
        found = regions.refined_regions(gated[b : b + 1], confidence[b : b + 1].detach(), single, (SIDE, SIDE), rules)
        if found.found[0, 0]:
            target = (labels[b] == c + 1).float()
            total = total + F.binary_cross_entropy(found.masks[0, 0], target)
    return total / tags.sum()


@pytest.mark.parametrize("step", [0, 9, 10, 39, 40, 99])
@pytest.mark.parametrize("r_max", [5.0, 20.0])
def test_terms_and_gradients_are_those_of_the_equations(step, r_max):
    weights = {"conf_weight": 0.9, "refine_weight": 1.7, "cpe_weight": 0.3, "ptc_weight": 0.4, "seg_weight": 0.2}
    method, samples = built(**weights, r_max=r_max, fusion=0.4, prototype_high=0.5), items(3)
    view, made, tags = replayed(method, samples), method.network, samples.labels
    tokens = made.encoder(view.x)
    confidence, masks = made.decoder(view.x, tokens.patches, tokens.grid)
    aux = cam_oracle(aux_cam(made), view.x).detach()
    patches = patch_label_oracle(aux, tags, view.crop.padding)
    score = confidence.sum(1)
    logits, logits_aux = made.classifier(tokens.patches.amax(1)), made.classifier_aux(tokens.auxiliary.amax(1))
    expected = {
        "tags": F.multilabel_soft_margin_loss(logits, tags),
        "tags_aux": F.multilabel_soft_margin_loss(logits_aux, tags),
        "patches": 0.4 * patch_oracle(tokens.patches, patches),
        "confidence": 0.9 * -(tags * score.log() + (1 - tags) * (1 - score).log()).mean(),
        "prototypes": 0.3 * cpe_oracle(tokens, patches, tags),
    }
    before = made.prototypes.clone()
    if step >= 10:
        pixels, valid = view.crop.images.float() / 255, ~view.crop.padding
        proto = cam_oracle(proto_cam(made), view.x).detach()  # with the prototypes from before this step
        mask_labels = refined_labels(pixels, proto, tags, 0.25, 0.5, valid)
        cam = cam_oracle(main_cam(made), view.x).detach()
        if step >= 40:
            grown = cam_oracle(region_map(made, tags), view.x).detach()
            cam = torch.where((tags > 0)[:, :, None, None], 0.6 * cam + 0.4 * grown, cam)
        labels = refined_labels(pixels, cam, tags, 0.25, 0.7, valid)
        done = min(max((step - 10) / 30, 0), 1)
        radius = 1 + (max(1, r_max * 4 / 28) - 1) * (1 - math.cos(math.pi * done)) / 2
        rules = regions.Expansion(threshold=0.5, rounds=3)
        expected["refine"] = 1.7 * refine_oracle(masks, confidence, tags, mask_labels, radius, rules)
        maps = tokens.patches.mT.reshape(3, -1, 4, 4)
        expected["segmentation"] = 0.2 * balanced_oracle(bilinear(made.head(maps), (SIDE, SIDE)), labels)
    found = method.losses({"tagged": samples}, now(step)).terms
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        same_gradients(found[name], term, made)
    # Eq. 12 image by image, after the maps were made
    prototypes = before.clone()
    if step >= 10:
        for b in range(3):
            for c in tags[b].nonzero()[:, 0].tolist():
                prototypes[c] = 0.99 * prototypes[c] + 0.01 * tokens.class_tokens[b, c].detach()
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made.prototypes, prototypes, rtol=1e-4, atol=1e-6)
    assert made.fusing.item() == (step >= 40)


def test_which_part_of_the_network_each_term_moves():
    method = built()
    terms = method.losses({"tagged": items()}, now(60)).terms
    reached = {name: {part.split(".")[0] for part in gradients(term, method.network)} for name, term in terms.items()}
    assert reached == {
        "tags": {"encoder", "classifier"},
        "tags_aux": {"encoder", "classifier_aux"},
        "patches": {"encoder"},
        "confidence": {"decoder"},
        "prototypes": {"encoder"},
        "refine": {"decoder"},
        "segmentation": {"encoder", "head"},
    }
    # the refined masks do not move the confidence that chose them
    of_refine = gradients(terms["refine"], method.network)
    assert not any("by_class" in name or "by_patch" in name for name in of_refine)
    assert any("embed" in name for name in of_refine) and any("pixels" in name for name in of_refine)
    # class tokens draw on patches in the masked blocks, patches never on class tokens
    of_cpe = gradients(terms["prototypes"], method.network)
    assert "encoder.cls_token" in of_cpe and "encoder.cls_token" not in gradients(terms["patches"], method.network)


def test_the_radius_follows_its_schedule_in_the_loss_alone(monkeypatch):
    asked = []
    gate = regions.gate
    monkeypatch.setattr(regions, "gate", lambda masks, r: asked.append((tuple(masks.shape), r)) or gate(masks, r))
    method, samples = built(r_max=14.0), items(2)
    for step in (9, 10, 25, 40, 80):
        method.losses({"tagged": samples}, now(step))
    assert [shape for shape, _ in asked] == [(2, 16, 4, 4)] * 4  # once a step, never for masks that make labels
    assert [r for _, r in asked] == pytest.approx([1, 1.5, 2, 2])
    method.network.activation(torch.zeros(1, 3, SIDE, SIDE), SCALES, torch.ones(1, CLASSES))
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("changes", "grid", "expected"),
    [
        ({}, (28, 28), [1, 1, 3, 5, 5]),
        ({}, (42, 42), [1, 1, 4.25, 7.5, 7.5]),
        ({}, (4, 4), [1, 1, 1, 1, 1]),
        ({"r_max": 1.0}, (16, 16), [1, 1, 1, 1, 1]),
        ({"gating": "fixed"}, (28, 28), [5, 5, 5, 5, 5]),
        ({"gating": "none"}, (28, 28), [None] * 5),
        ({"r_max": 0.0}, (4, 5), [1, 1, 3, None, None]),
        ({"gate_from": 0.0, "gate_to": 0.5}, (28, 28), [1, 1 + 2 * (1 - math.cos(math.pi / 5)), 3, 3, 5]),
    ],
    ids=str,
)
def test_radius_by_hand(changes, grid, expected):
    progress = [0, 0.1, 0.25, 0.4, 0.9] if "gate_to" not in changes else [0, 0.1, 0.25, 0.25, 0.9]
    found = [PCRESettings(**changes).radius(at, grid) for at in progress]
    assert [None if r is None else pytest.approx(r) for r in expected] == found


def test_prototypes_wait_for_the_warm_up_and_keep_their_place():
    method, samples = built(), items()
    start, place = method.network.prototypes.clone(), method.network.prototypes.data_ptr()
    for step in range(10):
        method.losses({"tagged": samples}, now(step))
    assert torch.equal(method.network.prototypes, start)
    teacher = Ema(method.network, 0.0)
    method.losses({"tagged": samples}, now(10))
    assert not torch.equal(method.network.prototypes, start) and method.network.prototypes.data_ptr() == place
    torch.testing.assert_close(method.network.prototypes.norm(dim=1), torch.ones(CLASSES))
    assert not method.network.prototypes.requires_grad
    teacher.update()
    assert torch.equal(teacher.network.prototypes, method.network.prototypes)


def test_fusion_is_told_to_the_teacher_and_survives_a_checkpoint():
    method, samples = built(), items()
    teacher = Ema(method.network, 0.5)
    method.losses({"tagged": samples}, now(39))
    teacher.update()
    assert not method.network.fusing and not teacher.network.fusing
    method.losses({"tagged": samples}, now(40))
    teacher.update()
    assert teacher.network.fusing and teacher.network.fusing.dtype == torch.bool
    again = built()
    again.load_state_dict(method.state_dict())
    assert again.network.fusing and torch.equal(again.network.prototypes, method.network.prototypes)
    method.losses({"tagged": samples}, now(0))
    assert method.network.fusing


def asked_maps(monkeypatch, method, samples, step):
    asked, maps = [], PCRENetwork.maps
    monkeypatch.setattr(
        PCRENetwork, "maps", lambda self, x, scales, tags, wanted, most=None: asked.append((wanted, most))
        or maps(self, x, scales, tags, wanted, most)
    )  # fmt: skip
    method.losses({"tagged": samples}, now(step))
    monkeypatch.undo()
    return asked


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0: (CAM, AUX), 10: (CAM, AUX, PROTOTYPES), 40: (CAM, AUX, PROTOTYPES, REGIONS)}),
        ({"prototype_labels": False}, {0: (CAM, AUX), 10: (CAM, AUX), 40: (CAM, AUX, REGIONS)}),
        ({"fuse_from": 0.05}, {0: (CAM, AUX), 6: (CAM, AUX), 10: (CAM, AUX, PROTOTYPES, REGIONS)}),
        ({"fuse_from": 1.0}, {99: (CAM, AUX, PROTOTYPES)}),
    ],
    ids=str,
)
def test_only_the_maps_that_a_stage_reads_are_made(monkeypatch, options, wanted):
    method = built(**options)
    method.most = 2
    for step, names in wanted.items():
        assert asked_maps(monkeypatch, method, items(), step) == [(names, 2)]


def test_the_head_s_labels_can_supervise_the_masks(monkeypatch):
    seen, refine = [], losses.refine_loss
    monkeypatch.setattr(losses, "refine_loss", lambda m, f, p, labels: seen.append(labels) or refine(m, f, p, labels))
    method, samples = built(prototype_labels=False), items()
    view = replayed(method, samples)
    maps = method.network.maps(view.x, SCALES, view.tags, (CAM, REGIONS))
    method.losses({"tagged": samples}, now(40))
    expected = method.labels(view, losses.fused(maps[CAM], maps[REGIONS], 0.3))
    assert torch.equal(seen[0], expected) and not torch.equal(expected, method.labels(view, maps[CAM]))


def test_the_largest_score_can_stand_for_the_image():
    method, samples = built(pool="max", conf_weight=1.0), items()
    view = replayed(method, samples)
    tokens = method.network.encoder(view.x)
    score = method.network.decoder(view.x, tokens.patches, tokens.grid)[0].amax(1)
    term = method.losses({"tagged": samples}, now(0)).terms["confidence"]
    torch.testing.assert_close(term, F.binary_cross_entropy(score, view.tags), rtol=1e-4, atol=1e-6)


def test_settings_say_how_regions_grow():
    settings = PCRESettings(tau=0.6, rounds=3, expand=False, ranking="index", resize="group")
    assert settings.expansion == regions.Expansion(0.6, 3, expand=False, ranking="index", resize="group")
    assert PCRESettings().expansion == regions.Expansion()


def test_an_image_without_tags_gives_finite_terms():
    method, samples = built(), items(2)
    samples.labels.zero_()
    before = method.network.prototypes / method.network.prototypes.norm(dim=1, keepdim=True)
    terms = method.losses({"tagged": samples}, now(60)).terms
    assert all(term.isfinite() for term in terms.values()) and terms["refine"] == 0
    torch.testing.assert_close(method.network.prototypes, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_from": 0.4}, "gate_from is 0.4 and gate_to 0.4; the first must be smaller"),
        ({"mask_scales": "1,x"}, "scales are '1,x'; they must be positive numbers"),
        ({"mask_scales": "2"}, "mask_scales is '2'; they must be among '1,0.5'"),
        ({"gating": "linear"}, "gating is 'linear'; allowed"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        built(**options)


def test_the_defaults_are_the_tables_optima():
    settings = PCRESettings()
    assert (settings.conf_weight, settings.refine_weight, settings.cpe_weight) == (1.0, 2.0, 0.02)
    assert (settings.tau, settings.rounds, settings.prototype_momentum) == (0.7, 5, 0.99)
    assert (settings.gating, settings.r_max, settings.fusion, settings.fuse_from) == ("cosine", 5.0, 0.3, 0.4)
