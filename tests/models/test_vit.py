"""ViTs against transformers' ViT on copied weights, attention written out, and what a mask and a resize must keep."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from repro.models.pretrained import WeightsError, fill
from repro.models.vit import DILATIONS, LAYOUTS, DilatedHead, LargeFov, Layout, PatchEmbed, ViT, resized, to_map, vit

SMALL = Layout(width=24, depth=4, heads=3, patch=4, grid=4, ratio=2)
STEM = Layout(width=16, depth=3, heads=2, patch=4, grid=4, ratio=2, stem=((8, 2), (8, 1), (16, 2)))


def network(class_tokens=1, masked=False, value_only=False, auxiliary=-3, layout=SMALL, seed=0):
    """In float64, with every parameter away from 0 and 1, so that nothing left out can hide."""
    torch.manual_seed(seed)
    net = ViT(layout, class_tokens, masked, value_only, auxiliary, 3).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return net


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def timm_shapes(width=768, depth=12, grid=14, patch=16):
    """Names and shapes of timm's ViT without head."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    for block in range(depth):
        for name, c_in, c_out in (
            ("attn.qkv", width, 3 * width), ("attn.proj", width, width),
            ("mlp.fc1", width, 4 * width), ("mlp.fc2", 4 * width, width),
        ):  # fmt: skip
            shapes |= {f"blocks.{block}.{name}.weight": (c_out, c_in), f"blocks.{block}.{name}.bias": (c_out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.{part}": (width,) for part in ("weight", "bias")}
    return shapes | {"norm.weight": (width,), "norm.bias": (width,)}


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "deit_base_patch16_224"])
def test_names_shapes_and_counts_are_those_of_timm(name):
    with torch.device("meta"):
        net = vit(name)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == timm_shapes()
    assert sum(parameter.numel() for parameter in net.parameters()) == 85_798_656  # timm, num_classes=0


def from_transformers(state):
    """transformers' tensors by timm's names."""
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm",
    }  # fmt: skip
    inner = {
        "layernorm_before": "norm1", "layernorm_after": "norm2", "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    found, parts = {}, {}
    for key, value in state.items():
        if "layer." in key or "layers." in key:
            _, _, rest = key.partition("layers." if "layers." in key else "layer.")
            block, _, rest = rest.partition(".")
            owner, _, kind = rest.rpartition(".")
            letter = owner.rsplit(".", 1)[-1][0]
            if owner.rsplit(".", 1)[-1] in ("query", "key", "value", "q_proj", "k_proj", "v_proj"):
                parts.setdefault((block, kind), {})[letter] = value
            else:
                found[f"blocks.{block}.{inner[owner]}.{kind}"] = value
        else:
            owner = next(name for name in names if key.startswith(name))
            found[names[owner] + key[len(owner) :]] = value
    for (block, kind), three in parts.items():
        found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([three[letter] for letter in "qkv"])
    return found


@pytest.fixture
def theirs():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4,
        layer_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return model


@pytest.mark.parametrize("size", [(16, 16), (24, 20), (8, 32)])
@pytest.mark.parametrize("auxiliary", [-3, -1, 0])
def test_forward_equals_transformers(theirs, size, auxiliary):
    ours = ViT(SMALL, 1, False, False, auxiliary, 3).double()
    ours.load_state_dict(from_transformers(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = theirs(x, output_hidden_states=True, output_attentions=True, interpolate_pos_encoding=True)
    tokens = ours(x, attention=range(4))
    assert tokens.grid == (size[0] // 4, size[1] // 4)
    near = {"rtol": 1e-5, "atol": 2e-6}  # transformers takes the softmax in float32
    torch.testing.assert_close(tokens.class_tokens, expected.last_hidden_state[:, :1], **near)
    torch.testing.assert_close(tokens.patches, expected.last_hidden_state[:, 1:], **near)
    assert sorted(tokens.attention) == [0, 1, 2, 3]
    for index, attention in enumerate(expected.attentions):
        torch.testing.assert_close(tokens.attention[index], attention, **near)
    hidden, _ = ours.embed(x)
    torch.testing.assert_close(hidden, expected.hidden_states[0])
    for index in range(auxiliary % 4 + 1):
        hidden, _ = ours.block(index, hidden)
        if index < 3:  # transformers' last hidden state is the normalised one in some versions
            torch.testing.assert_close(hidden, expected.hidden_states[index + 1], **near)
    torch.testing.assert_close(tokens.auxiliary, hidden[:, 1:])


def brute_force(net, x, class_tokens, masked, value_only):
    """Tokens behind every block, by sums over tokens and heads with an explicit mask of minus infinity."""
    weights = net.state_dict()
    tokens, _ = net.embed(x)
    count, width = tokens.shape[1:]
    mask = torch.zeros(count, count, dtype=x.dtype)
    if masked:
        mask[:, :class_tokens] = -torch.inf  # nobody attends to a class token: not patches, not class tokens
    states = []
    for index in range(net.depth):

        def linear(values, name, index=index):
            return values @ weights[f"blocks.{index}.{name}.weight"].T + weights[f"blocks.{index}.{name}.bias"]

        def norm(values, name, index=index):
            centred = values - values.mean(-1, keepdim=True)
            scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            return scaled * weights[f"blocks.{index}.{name}.weight"] + weights[f"blocks.{index}.{name}.bias"]

        query, key, value = linear(norm(tokens, "norm1"), "attn.qkv").split(width, dim=2)
        if value_only and index == net.depth - 1:
            mixed = value
        else:
            mixed, each = torch.empty_like(value), width // net.heads
            for head in range(net.heads):
                part = slice(head * each, (head + 1) * each)
                scores = torch.einsum("bid,bjd->bij", query[..., part], key[..., part]) / each**0.5 + mask
                mixed[..., part] = scores.softmax(-1) @ value[..., part]
        tokens = tokens + linear(mixed, "attn.proj")
        tokens = tokens + linear(F.gelu(linear(norm(tokens, "norm2"), "mlp.fc1")), "mlp.fc2")
        states.append(tokens)
    return states


@pytest.mark.parametrize("class_tokens, masked, value_only", [
    (1, False, False), (3, False, True), (3, True, False), (3, True, True), (1, True, True), (5, True, False),
])  # fmt: skip
def test_attention_is_the_masked_sum_written_out(x, class_tokens, masked, value_only):
    net = network(class_tokens, masked, value_only)
    states = brute_force(net, x, class_tokens, masked, value_only)
    final = F.layer_norm(states[-1], (24,), net.norm.weight, net.norm.bias, 1e-6)
    for asked in ((), range(4)):  # fused attention, and the one that returns its maps
        tokens = net(x, attention=asked)
        torch.testing.assert_close(tokens.class_tokens, final[:, :class_tokens])
        torch.testing.assert_close(tokens.patches, final[:, class_tokens:])
        torch.testing.assert_close(tokens.auxiliary, states[1][:, class_tokens:])
    assert tokens.class_tokens.shape == (2, class_tokens, 24) and tokens.patches.shape == (2, 16, 24)


def test_a_value_only_block_is_its_value_path_and_its_mlp(x):
    net = network(2, masked=True, value_only=True)
    block, (tokens, _) = net.blocks[-1], net.embed(x)
    weight, bias = block.attn.qkv.weight[48:], block.attn.qkv.bias[48:]
    moved = tokens + ((block.norm1(tokens) @ weight.T + bias) @ block.attn.proj.weight.T + block.attn.proj.bias)
    expected = moved + block.mlp(block.norm2(moved))
    after, _ = net.block(3, tokens)
    torch.testing.assert_close(after, expected)
    alone = torch.cat([net.block(3, tokens[:, i : i + 1])[0] for i in range(18)], 1)
    torch.testing.assert_close(after, alone)  # each token is on its own
    before, _ = net.block(2, tokens)
    assert not torch.allclose(before[:, :1], net.block(2, torch.cat([tokens[:, :1], tokens[:, 2:]], 1))[0][:, 1:2])


def test_masked_patches_do_not_depend_on_class_tokens_and_class_tokens_not_on_one_another(x):
    net, plain = network(3, masked=True), network(3, masked=False)
    before, plain_before = net(x), plain(x)
    for each in (net, plain):
        with torch.no_grad():
            each.cls_token[:, 1] += torch.arange(24) / 7
    after, plain_after = net(x), plain(x)
    assert torch.equal(before.patches, after.patches) and torch.equal(before.auxiliary, after.auxiliary)
    assert torch.equal(before.class_tokens[:, [0, 2]], after.class_tokens[:, [0, 2]])
    assert (before.class_tokens[:, 1] - after.class_tokens[:, 1]).abs().max() > 0.01
    assert (plain_before.patches - plain_after.patches).abs().max() > 1e-4
    slope = torch.autograd.grad(after.patches.square().sum(), net.cls_token, allow_unused=True)[0]
    assert slope is None or slope.abs().max() == 0


def test_a_masked_network_equals_the_patches_of_a_vit_without_class_token(x):
    net = network(2, masked=True)
    tokens, _ = net.embed(x)
    patches = tokens[:, 2:]
    for index in range(4):
        patches, _ = net.blocks[index](patches, 0, True, False)
    torch.testing.assert_close(net(x).patches, net.norm(patches))


def test_maps_are_distributions_over_the_tokens_that_can_be_seen(x):
    tokens = network(3, masked=True, value_only=True)(x, attention=(0, -1))
    assert sorted(tokens.attention) == [0, 3]
    first, last = tokens.attention[0], tokens.attention[3]
    assert first.shape == (2, 3, 19, 19)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 3, 19, dtype=torch.float64))
    assert (first[..., :3] == 0).all() and (first[..., 3:] > 0).all()
    assert torch.equal(last, torch.eye(19, dtype=torch.float64).expand(2, 3, 19, 19))
    scores = network(3, masked=True, value_only=True)(x, attention=(0, 3), softmax=False).attention
    torch.testing.assert_close(scores[0].softmax(-1), first)
    assert (scores[0][..., :3] == -torch.inf).all() and torch.equal(scores[3].softmax(-1), last)
    net = network(3, masked=True)
    query, key, _ = net.blocks[0].attn.qkv(net.blocks[0].norm1(net.embed(x)[0])).split(24, dim=2)
    expected = query[..., 8:16] @ key[..., 8:16].mT / 8**0.5
    torch.testing.assert_close(scores[0][:, 1, :, 3:], expected[..., 3:])
    assert net(x).attention == {}
    with pytest.raises(ValueError, match=r"no blocks \[4, -5\]; this ViT has -4 to 3"):
        net(x, attention=[4, 0, -5])


def test_new_class_tokens_start_as_copies_and_leave_patches_as_they_are(x):
    torch.manual_seed(5)
    one = ViT(SMALL, 1, True, True, -3, 3).double()
    torch.manual_seed(6)
    five = ViT(SMALL, 5, True, True, -3, 3).double()
    five.load_state_dict(five.fitted(one.state_dict()), strict=True)
    alone, many = one(x), five(x)
    torch.testing.assert_close(alone.patches, many.patches)
    torch.testing.assert_close(alone.class_tokens.expand(-1, 5, -1), many.class_tokens)
    fresh = vit("vit-mini", class_tokens=4)
    assert torch.equal(fresh.cls_token, fresh.cls_token[:, :1].expand(-1, 4, -1))
    assert torch.equal(fresh.pos_embed[:, :4], fresh.pos_embed[:, :1].expand(-1, 4, -1))
    fresh.fitted(fresh.state_dict())["cls_token"].zero_()  # of as many tokens: the same tensor, not a copy
    assert (fresh.cls_token == 0).all()
    many.class_tokens[:, 2].sum().backward()
    assert (five.cls_token.grad.abs().amax(2) > 0).tolist() == [[False, False, True, False, False]]


def test_weights_of_one_token_and_another_grid_fill_a_network(x):
    torch.manual_seed(7)
    big = Layout(width=24, depth=4, heads=3, patch=4, grid=6, ratio=2)
    source = ViT(big, 1, False, False, -3, 3)
    weights = {key: value.half() for key, value in source.state_dict().items()} | {"head.weight": torch.zeros(10, 24)}
    net = ViT(SMALL, 3, True, False, -3, 3)
    two_tokens = weights | {"cls_token": torch.zeros(1, 2, 24), "pos_embed": torch.zeros(1, 2 + 36, 24)}
    with pytest.raises(WeightsError, match="cls_token is"):
        fill(net, two_tokens, "here")
    fill(net, weights, "here")
    assert torch.equal(net.cls_token, weights["cls_token"].float().expand(-1, 3, -1))
    assert torch.equal(net.pos_embed[:, :3], weights["pos_embed"][:, :1].float().expand(-1, 3, -1))
    patches = weights["pos_embed"][:, 1:].mT.reshape(1, 24, 6, 6)
    expected = F.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(net.pos_embed[:, 3:], expected.float(), rtol=0, atol=1e-4)
    assert torch.equal(net.blocks[2].attn.qkv.weight, weights["blocks.2.attn.qkv.weight"].float())
    odd = weights | {"pos_embed": torch.zeros(1, 1 + 7, 24)}  # no square: left as it is, so the check names it
    with pytest.raises(WeightsError, match=r"pos_embed is \(1, 10, 24\)"):
        fill(net, net.fitted(odd), "here")
    assert net.fitted({"norm.bias": 1}) == {"norm.bias": 1}


def test_resizing_keeps_the_grid_it_has_constants_and_symmetry():
    positions = torch.randn(1, 12, 5, dtype=torch.float64)
    assert resized(positions, (3, 4), (3, 4)) is positions
    constant = torch.arange(5.0)[None, None].expand(1, 12, 5).contiguous()
    torch.testing.assert_close(resized(constant, (3, 4), (7, 5)), constant[:, :1].expand(1, 35, 5))
    maps = to_map(positions, (3, 4))
    assert torch.equal(maps[0, :, 1, 2], positions[0, 6])
    larger = to_map(resized(positions, (3, 4), (6, 9)), (6, 9))
    torch.testing.assert_close(larger, F.interpolate(maps, (6, 9), mode="bicubic"))
    mirrored = resized(maps.flip(3).flatten(2).mT, (3, 4), (6, 9))
    torch.testing.assert_close(to_map(mirrored, (6, 9)).flip(3), larger)


def test_images_of_any_size_and_the_border_that_fills_no_patch():
    net = network()
    x = torch.randn(1, 3, 11, 22, dtype=torch.float64, requires_grad=True)
    tokens = net(x)
    assert tokens.grid == (2, 5) and tokens.patches.shape == (1, 10, 24)
    tokens.patches.square().sum().backward()
    assert x.grad[:, :, 8:].abs().max() == 0 and x.grad[:, :, :, 20:].abs().max() == 0
    assert (x.grad[:, :, :8, :20].abs().sum(1) > 0).all()
    torch.testing.assert_close(net(x[:, :, :8, :20]).patches, tokens.patches)
    with pytest.raises(ValueError, match=r"\(3, 16\) pixels are smaller than a patch of 4"):
        net(torch.zeros(1, 3, 3, 16))
    one = net(torch.zeros(1, 3, 4, 4, dtype=torch.float64), attention=[0])
    assert one.grid == (1, 1) and one.patches.shape == (1, 1, 24) and one.attention[0].shape == (1, 3, 2, 2)


@pytest.mark.parametrize("layout", [SMALL, STEM, LAYOUTS["vit-mini"]])
@pytest.mark.parametrize("value_only", [False, True])
def test_gradients_reach_what_is_used(layout, value_only):
    torch.manual_seed(0)
    net = ViT(layout, 2, True, value_only, -2, 3)
    x = torch.randn(2, 3, 24, 32, requires_grad=True)
    tokens = net(x)
    assert tokens.grid == (24 // layout.patch, 32 // layout.patch)
    sum(part.square().sum() for part in tokens[:3]).backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()
    width = layout.width
    for name, parameter in net.named_parameters():
        if value_only and name.startswith(f"blocks.{layout.depth - 1}.attn.qkv"):
            assert parameter.grad[: 2 * width].abs().max() == 0 and parameter.grad[2 * width :].abs().max() > 0
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("layout, seen", [(LAYOUTS["vit-mini"], 39), (STEM, 19)])
def test_a_patch_sees_so_many_pixels_through_the_stem(layout, seen):
    """Without norms, which see everything, and with weights that cancel nothing."""
    stem = PatchEmbed(layout, 3).proj
    convolutions = [layer for layer in stem if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == len(layout.stem) + 1
    assert math.prod(layer.stride[0] for layer in convolutions) == layout.patch
    for layer in convolutions:
        layer.weight.data.fill_(1)
    plain = torch.nn.Sequential(*(layer for layer in stem if not isinstance(layer, torch.nn.GroupNorm))).double()
    x = torch.ones(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    y = plain(x)
    assert y.shape == (1, layout.width, 16, 16)
    y[0, 0, 8, 8].backward()
    rows, columns = x.grad[0].abs().sum(0).nonzero().unbind(1)
    assert all(int(places.max() - places.min()) + 1 == seen for places in (rows, columns))


def test_a_pass_leaves_no_trace():
    net = vit("vit-mini", class_tokens=5, masked=True, value_only=True, auxiliary=-2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.train()
    x = torch.randn(3, 3, 64, 64)
    whole = net(x).patches
    net(F.interpolate(x, scale_factor=0.5))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(net(x[1:2]).patches, whole[1:2], rtol=1e-4, atol=1e-5)  # images are on their own
    torch.testing.assert_close(net.eval()(x).patches, whole)


def test_half_precision_is_close():
    torch.manual_seed(0)
    net = vit("vit-mini", class_tokens=5, masked=True)
    x = torch.randn(2, 3, 64, 64)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        for asked in ((), (0, 1)):
            rough = net(x, attention=asked)
            for name in ("class_tokens", "patches"):
                gap = (getattr(rough, name).float() - getattr(exact, name)).abs().max()
                assert gap < 0.1 * getattr(exact, name).abs().max()


def test_the_dilated_head_sums_its_branches():
    head = DilatedHead(6, 4, (1, 2, 5)).double()
    for value in head.parameters():
        value.data.normal_()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    padded = F.pad(x, (5,) * 4)
    expected = torch.zeros(2, 4, 9, 7, dtype=torch.float64)
    for branch, dilation in zip(head.branches, (1, 2, 5), strict=True):
        expected += branch.bias[:, None, None]
        for i in range(3):
            for j in range(3):
                down, right = 5 + (i - 1) * dilation, 5 + (j - 1) * dilation
                window = padded[:, :, down : down + 9, right : right + 7]
                expected += torch.einsum("bchw,kc->bkhw", window, branch.weight[:, :, i, j])
    torch.testing.assert_close(head(x), expected)
    with torch.device("meta"):
        published = DilatedHead(768, 21)
    assert [branch.dilation[0] for branch in published.branches] == list(DILATIONS) == [6, 12, 18, 24]
    assert sum(value.numel() for value in published.parameters()) == 4 * (768 * 21 * 9 + 21)
    fresh = DilatedHead(64, 6)
    assert fresh.branches[2].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert all((branch.bias == 0).all() for branch in fresh.branches)


def test_large_fov_sees_two_dilations_and_has_no_bias():
    head = LargeFov(6, 4, hidden=5, dilation=2).double()
    x = torch.randn(2, 6, 13, 13, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, head.conv6.weight, padding=2, dilation=2).clamp(min=0)
    y = F.conv2d(y, head.conv7.weight, padding=2, dilation=2).clamp(min=0)
    expected = torch.einsum("bchw,kc->bkhw", y, head.conv8.weight[..., 0, 0])
    torch.testing.assert_close(head(x), expected)
    head(x)[0, :, 6, 6].sum().backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert set(seen.flatten().tolist()) <= {2, 4, 6, 8, 10}
    assert torch.equal(head(torch.zeros_like(x)), torch.zeros(2, 4, 13, 13, dtype=torch.float64))
    with torch.device("meta"):
        published = LargeFov(768, 21)
    assert {name: tuple(value.shape) for name, value in published.named_parameters()} == {
        "conv6.weight": (512, 768, 3, 3), "conv7.weight": (512, 512, 3, 3), "conv8.weight": (21, 512, 1, 1),
    }  # fmt: skip
    assert published.conv6.dilation == published.conv7.dilation == (5, 5)


@pytest.mark.parametrize("arguments, message", [
    ({"name": "vit_tiny"}, "unknown ViT 'vit_tiny'; known: vit_base_patch16_224"),
    ({"name": "vit-mini", "class_tokens": 0}, "class_tokens is 0"),
    ({"name": "vit-mini", "channels": 0}, "channels is 0"),
    ({"name": "vit-mini", "auxiliary": 12}, "auxiliary is 12; vit-mini has blocks"),
    ({"name": "vit-mini", "auxiliary": -13}, "auxiliary is -13"),
])  # fmt: skip
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        vit(**arguments)
