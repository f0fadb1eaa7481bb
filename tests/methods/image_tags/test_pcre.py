"""PCRE in the paper's order: confidence, gate, growth, losses, prototypes, network and steps, against loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.cam import refined_labels
from repro.methods.image_tags import pcre
from repro.methods.image_tags.pcre import (
    AUX,
    CAM,
    PCRE,
    PROTOTYPES,
    REGIONS,
    Expansion,
    Pairs,
    PCRENetwork,
    PCRESettings,
    RegionDecoder,
    by_class,
    candidates,
    class_contrast,
    confidence_loss,
    fused,
    gate,
    grow,
    image_score,
    joint_confidence,
    largest,
    prototype_cam,
    refine_loss,
    refined_regions,
    region_masks,
    shown_classes,
    squared_distances,
    updated_prototypes,
)
from repro.settings import SettingError
from repro.train import Ema
from tests.methods.image_tags import fakes
from tests.methods.image_tags.fakes import CLASSES, SCALES, SIDE, Head

B, N, C, D = 3, 6, 4, 5
TAGS = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 0]])
EXPANSION = {"tau": 0.5, "rounds": 3}  # of random masks, more than half of which are above .5


def network(settings=None, seed=0):
    """PCRE's network of 4 x 4 patches, its decoder's weights large enough for masks to differ."""
    made = fakes.encoder(seed, CLASSES, masked=True, value_only=True)
    torch.manual_seed(seed)
    decoder = RegionDecoder(made, fakes.LAYOUT, CLASSES, heads=2, hidden=24, groups=4)
    with torch.no_grad():
        for value in decoder.parameters():
            value.mul_(2 if value.ndim > 1 else 1)
    return PCRENetwork(made, CLASSES, Head(), decoder, settings or PCRESettings())


def built(changes=None, **options):
    settings = PCRESettings(**{**EXPANSION, **options})
    return PCRE(settings, network(settings), fakes.views(), fakes.recipe(settings, **changes or {})).train()


def test_joint_confidence_by_hand():
    confidence = joint_confidence(torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]]), torch.zeros(1, 2, 2))
    torch.testing.assert_close(confidence, torch.tensor([[[0.125, 0.375], [0.25, 0.25]]]))
    torch.testing.assert_close(image_score(confidence), torch.tensor([[0.375, 0.625]]))
    torch.testing.assert_close(image_score(confidence, "max"), torch.tensor([[0.25, 0.375]]))


def decoded(decoder, x, patches, positions):
    """Spec 3.2 (1) and (2) for one image; torch's decoder layers are taken as they are."""
    queries = []
    for i in range(x.shape[1] // 4):
        for j in range(x.shape[2] // 4):
            cell = x[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            queries.append((decoder.patch_embed.proj.weight * cell).sum((1, 2, 3)) + decoder.patch_embed.proj.bias)
    return decoder.layers((torch.stack(queries) + positions)[None], patches[None])[0]


@pytest.mark.parametrize("side", [16, 24])
def test_the_decoder_is_the_equations(side):
    decoder = network().decoder
    grid = (side // 4, side // 4)
    x, patches = (fakes.normal(0, *shape, dtype=torch.float32) for shape in ((2, 3, side, side), (2, grid[0] ** 2, 16)))
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
        reached = fakes.gradients(output.square().sum(), made)
        assert reached and all(name.startswith("decoder.") for name in reached)


def test_a_grid_that_a_stem_rounds_up_is_met():
    """18 pixels: two strides of 2 with padding make 5 patches, one convolution of 4 pixels makes 4."""
    made = network()
    confidence, masks = made.decoder(torch.randn(1, 3, 18, 18), torch.randn(1, 25, 16), (5, 5))
    assert confidence.shape == (1, 25, CLASSES) and masks.shape == (1, 25, 5, 5)


def test_the_decoder_s_layers_are_the_published_ones():
    made = network()
    decoder = RegionDecoder(made.encoder, fakes.LAYOUT, CLASSES, heads=8, groups=16)
    layer = decoder.layers.layers[0]
    assert layer.linear1.out_features == 2048 and layer.self_attn.num_heads == 8 and not layer.norm_first
    assert {module.p for module in decoder.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert decoder.patch_embed.proj is not made.encoder.patch_embed.proj
    assert len(decoder.layers.layers) == 2
    for branch in (decoder.by_class, decoder.by_patch):
        assert not branch.bias.any() and branch.weight.abs().max() <= math.sqrt(6 / (fakes.LAYOUT.width + CLASSES))


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


def tags_of(seed):
    return (fakes.normal(seed, B, C) > 0).double()


def test_confidence_loss_also_at_the_ends_and_under_autocast():
    score, tags = fakes.normal(2, B, C).sigmoid().requires_grad_(), tags_of(3)
    torch.testing.assert_close(confidence_loss(score, tags), F.binary_cross_entropy(score, tags))
    assert torch.autograd.gradcheck(lambda x: confidence_loss(x, tags), score)
    score = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = confidence_loss(score.bfloat16(), torch.tensor([[1, 0, 0, 1]]))
    assert loss.item() == 50  # logarithms end at -100
    loss.backward()
    assert score.grad.isfinite().all()


def test_refine_loss_is_the_loop():
    tags, labels = tags_of(4), labels_of(5)[0]
    tags[0] = 0
    pairs = shown_classes(tags)
    masks = fakes.normal(6, B, C, 2, 3).sigmoid().requires_grad_()
    found = fakes.normal(7, B, C) > -0.5
    total = 0.0
    for b, place in (pairs.shown & found).nonzero().tolist():
        own = (labels[b] == pairs.classes[b, place] + 1).double()
        total += F.binary_cross_entropy(masks[b, place], own)
    torch.testing.assert_close(refine_loss(masks, found, pairs, labels), total / pairs.shown.sum())
    assert torch.autograd.gradcheck(lambda x: refine_loss(x, found, pairs, labels), masks)
    refine_loss(masks, found, pairs, labels.to(torch.uint8)).backward()
    assert not masks.grad[~(found & pairs.shown)].any()


def test_fusion_by_hand():
    cam = torch.tensor([0.5, 1.0]).view(1, 1, 1, 2).repeat(1, 2, 1, 1)
    regions = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    torch.testing.assert_close(fused(cam, regions)[0, :, 0], torch.tensor([[0.65, 0.7], [0.5, 1.0]]))
    torch.testing.assert_close(fused(cam, regions, 0.5)[0, :, 0], torch.tensor([[0.75, 0.5], [0.5, 1.0]]))
    assert torch.equal(fused(cam, regions, 0.0), cam)


def labels_of(seed, shown=0.6):
    """Label maps of a grid of 2 x 3 with background, classes and ignored patches, and tags."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C + 1, (B, 2, 3), generator=generator)
    labels[torch.rand(B, 2, 3, generator=generator) < 0.25] = 255
    return labels, (torch.rand(B, C, generator=generator) < shown).float()


def cpe_oracle(class_tokens, patches, labels, tags):
    """L_CPE by loops over classes and patches."""
    labels = labels.flatten(1)

    def kind(b, c, n):
        label = labels[b, n].item()
        return None if label == 255 or not tags[b, c] else label == c + 1

    return fakes.contrast_oracle(class_tokens, patches.detach(), kind)


@pytest.mark.parametrize("seed", range(5))
def test_class_contrast_is_the_loop(seed):
    patches, tokens, (labels, tags) = fakes.normal(seed, B, N, D), fakes.normal(seed + 1, B, C, D), labels_of(seed)
    expected = cpe_oracle(tokens, patches, labels, tags)
    torch.testing.assert_close(class_contrast(tokens, patches, labels, tags), expected)
    torch.testing.assert_close(class_contrast(tokens, patches, labels.to(torch.uint8), tags), expected)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
@settings(max_examples=25, deadline=None)
def test_prototypes_are_updated_image_by_image(seed, momentum):
    prototypes, tokens, tags = (
        fakes.normal(seed, C, D),
        fakes.normal(seed + 1, 5, C, D),
        (fakes.normal(seed + 2, 5, C) > -0.3).float(),
    )
    tags[:, 0] = 0  # a class that nobody shows
    expected = prototypes.clone()
    for image in range(5):
        for c in range(C):
            if tags[image, c]:
                expected[c] = expected[c] * momentum + (1 - momentum) * tokens[image, c]
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    updated = updated_prototypes(prototypes, tokens, tags, momentum)
    torch.testing.assert_close(updated, expected, rtol=1e-12, atol=1e-13)


def test_prototype_cam_by_hand():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]])
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    half = math.sqrt(0.5)
    cam = prototype_cam(patches, prototypes, (2, 2))
    torch.testing.assert_close(cam, torch.tensor([[[[1, 0], [1, half]], [[0, 1], [0, half]]]]))
    torch.testing.assert_close(prototype_cam(patches, prototypes.expand(1, 2, 2), (2, 2)), cam)


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
            single = Pairs(torch.tensor([[c]]), torch.tensor([[True]]))
            found = refined_regions(masks, confidence, single, size, made.settings.expansion)
            out[c] = found.masks[0, 0]
        return out

    return raw


@pytest.mark.parametrize("resize", ["each", "group"])
def test_maps_are_those_of_loops_over_scales_and_mirror_images(resize):
    made = network(PCRESettings(**EXPANSION, resize=resize))
    x, tags = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), TAGS
    found = made.maps(x, SCALES, tags, (CAM, AUX, PROTOTYPES, REGIONS))
    expected = {CAM: fakes.main_cam(made), AUX: fakes.aux_cam(made), PROTOTYPES: proto_cam(made)}
    expected[REGIONS] = region_map(made, tags)
    assert list(found) == list(expected)
    for name, raw in expected.items():
        torch.testing.assert_close(
            found[name], fakes.cam_oracle(raw, x), rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n} {m}"
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
    torch.testing.assert_close(found[CAM], fakes.cam_oracle(fakes.main_cam(made), x), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        found[REGIONS], fakes.cam_oracle(region_map(made, tags, only={8}), x), rtol=1e-3, atol=1e-5
    )


def test_class_tokens_can_stand_in_for_prototypes():
    made = network(PCRESettings(prototypes=False))
    x, tags = (
        torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)),
        torch.ones(2, CLASSES),
    )
    expected = fakes.cam_oracle(proto_cam(made, points="tokens"), x)
    torch.testing.assert_close(made.maps(x, SCALES, tags, (PROTOTYPES,))[PROTOTYPES], expected, rtol=1e-3, atol=1e-5)


def test_the_evaluated_cam_is_mixed_with_regions_once_training_mixes_them():
    made = network(PCRESettings(**EXPANSION, fusion=0.4))
    x, tags = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3)), TAGS
    cam, grown = fakes.cam_oracle(fakes.main_cam(made), x), fakes.cam_oracle(region_map(made, tags), x)
    torch.testing.assert_close(made.activation(x, SCALES, tags), cam, rtol=1e-3, atol=1e-5)
    made.fusing.fill_(True)
    mixed = torch.where((tags > 0)[:, :, None, None], 0.6 * cam + 0.4 * grown, cam)
    torch.testing.assert_close(made.activation(x, SCALES, tags), mixed, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(made.activation(x, SCALES, torch.zeros_like(tags)), cam, rtol=1e-3, atol=1e-5)


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
        single = Pairs(torch.tensor([[c]]), torch.tensor([[True]]))
        found = refined_regions(gated[b : b + 1], confidence[b : b + 1].detach(), single, (SIDE, SIDE), rules)
        if found.found[0, 0]:
            target = (labels[b] == c + 1).float()
            total = total + F.binary_cross_entropy(found.masks[0, 0], target)
    return total / tags.sum()


@pytest.mark.parametrize("step", [0, 9, 10, 39, 40, 99])
@pytest.mark.parametrize("r_max", [5.0, 20.0])
def test_terms_and_gradients_are_those_of_the_equations(step, r_max):
    weights = {"conf_weight": 0.9, "refine_weight": 1.7, "cpe_weight": 0.3, "ptc_weight": 0.4, "seg_weight": 0.2}
    method, samples = built(**weights, r_max=r_max, fusion=0.4, prototype_high=0.5), fakes.items(3)
    view, made, tags = fakes.replayed(method, samples), method.network, samples.labels
    tokens = made.encoder(view.x)
    confidence, masks = made.decoder(view.x, tokens.patches, tokens.grid)
    aux = fakes.cam_oracle(fakes.aux_cam(made), view.x).detach()
    patches = fakes.patch_label_oracle(aux, tags, view.crop.padding)
    score = confidence.sum(1)
    expected = fakes.tag_oracles(made, tokens, tags) | {
        "patches": 0.4 * fakes.patch_oracle(tokens.patches, patches),
        "confidence": 0.9 * -(tags * score.log() + (1 - tags) * (1 - score).log()).mean(),
        "prototypes": 0.3 * cpe_oracle(tokens.class_tokens, tokens.patches, patches, tags),
    }
    before = made.prototypes.clone()
    if step >= 10:
        pixels, valid = view.crop.images.float() / 255, ~view.crop.padding
        proto = fakes.cam_oracle(proto_cam(made), view.x).detach()  # with the prototypes from before this step
        mask_labels = refined_labels(pixels, proto, tags, 0.25, 0.5, valid)
        cam = fakes.cam_oracle(fakes.main_cam(made), view.x).detach()
        if step >= 40:
            grown = fakes.cam_oracle(region_map(made, tags), view.x).detach()
            cam = torch.where((tags > 0)[:, :, None, None], 0.6 * cam + 0.4 * grown, cam)
        labels = refined_labels(pixels, cam, tags, 0.25, 0.7, valid)
        done = min(max((step - 10) / 30, 0), 1)
        radius = 1 + (max(1, r_max * 4 / 28) - 1) * (1 - math.cos(math.pi * done)) / 2
        rules = Expansion(threshold=0.5, rounds=3)
        expected["refine"] = 1.7 * refine_oracle(masks, confidence, tags, mask_labels, radius, rules)
        expected["segmentation"] = 0.2 * fakes.head_oracle(made, tokens, labels)
    found = method.losses({"tagged": samples}, fakes.now(step)).terms
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        fakes.same_gradients(found[name], term, made)
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
    terms = method.losses({"tagged": fakes.items()}, fakes.now(60)).terms
    reached = {
        name: {part.split(".")[0] for part in fakes.gradients(term, method.network)} for name, term in terms.items()
    }
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
    of_refine = fakes.gradients(terms["refine"], method.network)
    assert not any("by_class" in name or "by_patch" in name for name in of_refine)
    assert any("embed" in name for name in of_refine) and any("pixels" in name for name in of_refine)
    # class tokens draw on patches in the masked blocks, patches never on class tokens
    of_cpe = fakes.gradients(terms["prototypes"], method.network)
    assert "encoder.cls_token" in of_cpe and "encoder.cls_token" not in fakes.gradients(
        terms["patches"], method.network
    )


def test_the_radius_follows_its_schedule_in_the_loss_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(pcre, "gate", lambda masks, r: asked.append((tuple(masks.shape), r)) or gate(masks, r))
    method, samples = built(r_max=14.0), fakes.items(2)
    for step in (9, 10, 25, 40, 80):
        method.losses({"tagged": samples}, fakes.now(step))
    assert [shape for shape, _ in asked] == [(2, 16, 4, 4)] * 4  # once a step, never for masks that make labels
    assert [r for _, r in asked] == pytest.approx([1, 1.5, 2, 2])
    method.network.activation(torch.zeros(1, 3, SIDE, SIDE), SCALES, torch.ones(1, CLASSES))
    assert len(asked) == 4


def test_prototypes_wait_for_the_warm_up_and_keep_their_place():
    method, samples = built(), fakes.items()
    start, place = method.network.prototypes.clone(), method.network.prototypes.data_ptr()
    for step in range(10):
        method.losses({"tagged": samples}, fakes.now(step))
    assert torch.equal(method.network.prototypes, start)
    teacher = Ema(method.network, 0.0)
    method.losses({"tagged": samples}, fakes.now(10))
    assert not torch.equal(method.network.prototypes, start) and method.network.prototypes.data_ptr() == place
    torch.testing.assert_close(method.network.prototypes.norm(dim=1), torch.ones(CLASSES))
    assert not method.network.prototypes.requires_grad
    teacher.update()
    assert torch.equal(teacher.network.prototypes, method.network.prototypes)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {0: [], 10: [PROTOTYPES], 40: [PROTOTYPES, REGIONS]}),
        ({"prototype_labels": False}, {0: [], 10: [], 40: [REGIONS]}),
        ({"fuse_from": 0.05}, {0: [], 6: [], 10: [PROTOTYPES, REGIONS]}),
        ({"fuse_from": 1.0}, {99: [PROTOTYPES]}),
    ],
    ids=str,
)
def test_only_the_maps_that_a_stage_reads_are_made(monkeypatch, options, wanted):
    method, asked, maps = built(**options), [], PCRENetwork.maps
    monkeypatch.setattr(PCRENetwork, "maps", lambda self, *rest: asked.append(rest[3:]) or maps(self, *rest))
    method.most = 2
    for step in wanted:
        method.losses({"tagged": fakes.items()}, fakes.now(step))
    assert asked == [([CAM, AUX, *names], 2) for names in wanted.values()]


def test_the_head_s_labels_can_supervise_the_masks(monkeypatch):
    seen = []
    spy = lambda m, f, p, labels: seen.append(labels) or refine_loss(m, f, p, labels)  # noqa: E731
    monkeypatch.setattr(pcre, "refine_loss", spy)
    method, samples = built(prototype_labels=False), fakes.items()
    view = fakes.replayed(method, samples)
    maps = method.network.maps(view.x, SCALES, view.tags, (CAM, REGIONS))
    method.losses({"tagged": samples}, fakes.now(40))
    expected = method.labels(view, fused(maps[CAM], maps[REGIONS], 0.3))
    assert torch.equal(seen[0], expected) and not torch.equal(expected, method.labels(view, maps[CAM]))


def test_the_largest_score_can_stand_for_the_image():
    method, samples = built(pool="max", conf_weight=1.0), fakes.items()
    view = fakes.replayed(method, samples)
    tokens = method.network.encoder(view.x)
    score = method.network.decoder(view.x, tokens.patches, tokens.grid)[0].amax(1)
    term = method.losses({"tagged": samples}, fakes.now(0)).terms["confidence"]
    torch.testing.assert_close(term, F.binary_cross_entropy(score, view.tags), rtol=1e-4, atol=1e-6)


def test_an_image_without_tags_gives_finite_terms():
    method, samples = built(), fakes.items(2)
    samples.labels.zero_()
    before = method.network.prototypes / method.network.prototypes.norm(dim=1, keepdim=True)
    terms = method.losses({"tagged": samples}, fakes.now(60)).terms
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
