"""DeepLabV3+ against a functional reference, the published size, and what a feature perturbation does."""

import pytest
import torch
from torch.nn import functional as F

from repro.models.deeplab import deeplab


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = deeplab("resnet-mini", 5, output_stride=4).double()
    generator = torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5)
    return network


@pytest.fixture
def x():
    return torch.randn(3, 3, 40, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_the_published_network_has_59_5_million_parameters():
    with torch.device("meta"):
        counts = {
            name: sum(parameter.numel() for parameter in deeplab(name, 21, 8).parameters())
            for name in ("resnet101s", "resnet50s")
        }
    assert counts == {"resnet101s": 59_468_085, "resnet50s": 40_475_957}
    assert round(counts["resnet101s"] / 1e6, 1) == 59.5  # a log of CSL's working copy


def test_the_scribble_network_is_that_of_the_published_sizes():
    """MobileNetV2 of width 1 without timm's head; pyramid of 256; decoder 24 to 48, 304 to 256 to 256 to 21."""
    with torch.device("meta"):
        network = deeplab("mobilenetv2_100", 21, 16, dropout=(0.5, 0.1))
    backbone = 3_504_872 - (320 * 1280 + 2 * 1280 + 1280 * 1000 + 1000)
    pyramid = 2 * 320 * 256 + 3 * 9 * 320 * 256 + 5 * 256 * 256 + 6 * 2 * 256
    decoder = 24 * 48 + 2 * 48 + 9 * (304 + 256) * 256 + 4 * 256 + 256 * 21 + 21
    assert sum(parameter.numel() for parameter in network.parameters()) == backbone + pyramid + decoder
    assert [network.fuse[1].p, network.fuse[3].p] == [0.5, 0.1]
    assert network.backbone.blocks[5][0].conv_dw.dilation == (1, 1)  # the released code's, not timm's
    plain = deeplab("resnet-mini", 5, 8)
    assert [plain.fuse[1].p, plain.fuse[3].p] == [0, 0]


def test_dropout_is_off_in_eval_mode_and_drops_half_when_training(network, x):
    torch.manual_seed(1)
    dropping = deeplab("resnet-mini", 5, output_stride=4, dropout=(0.5, 0.1)).double()
    dropping.load_state_dict(network.state_dict())
    torch.testing.assert_close(dropping.eval()(x), network.eval()(x))
    seen = {}
    dropping.fuse[1].register_forward_hook(lambda _, inputs, out: seen.update(before=inputs[0], after=out))
    dropping.train()(x)
    alive = seen["before"] != 0
    assert 0.45 < (seen["after"][alive] == 0).double().mean() < 0.55


@pytest.mark.parametrize("name, stride, rates", [
    ("resnet101s", 8, [12, 24, 36]), ("resnet101s", 16, [6, 12, 18]),
    ("resnet-mini", 4, [2, 4, 6]), ("resnet-mini", 8, [1, 2, 3]),
    ("mobilenetv2_100", 8, [12, 24, 36]), ("mobilenetv2_100", 16, [6, 12, 18]),
])  # fmt: skip
def test_rates_follow_the_output_stride(name, stride, rates):
    with torch.device("meta"):
        network = deeplab(name, 21, stride)
    assert [branch[0].dilation[0] for branch in network.aspp.branches] == [1, *rates]
    assert network.backbone.output_stride == stride


def reference_head(weights, low, high, rates, size):
    """Logits from features by functional calls alone, batch norms in eval mode."""

    def block(x, name, kernel=1, rate=1):
        x = F.conv2d(x, weights[f"{name}.0.weight"], padding=kernel // 2 * rate, dilation=rate)
        mean, var, scale, shift = (
            weights[f"{name}.1.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    pyramid = [block(high, "aspp.branches.0")]
    pyramid += [block(high, f"aspp.branches.{i}", 3, rate) for i, rate in enumerate(rates, start=1)]
    mean = high.flatten(2).mean(2)[..., None, None]
    pyramid.append(block(mean, "aspp.pool") * torch.ones_like(high[:, :1]))
    pyramid = block(torch.cat(pyramid, 1), "aspp.project")
    pyramid = F.interpolate(pyramid, low.shape[2:], mode="bilinear", align_corners=True)
    both = torch.cat([block(low, "reduce"), pyramid], 1)
    fused = block(block(both, "fuse.0", 3), "fuse.2", 3)
    logits = torch.einsum("bchw,kc->bkhw", fused, weights["classifier.weight"][..., 0, 0])
    logits = logits + weights["classifier.bias"][:, None, None]
    return logits, F.interpolate(logits, size, mode="bilinear", align_corners=True)


def test_forward_equals_a_functional_reference(network, x):
    network.eval()
    low, high = network.backbone.low_high(x)
    assert low.shape == (3, 16, 20, 18) and high.shape == (3, 128, 10, 9)
    small, expected = reference_head(network.state_dict(), low, high, (2, 4, 6), (40, 36))
    logits = network(x)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(logits[..., [0, -1], :][..., [0, -1]], small[..., [0, -1], :][..., [0, -1]])


def test_perturbation_drops_whole_channels_of_both_features(network, x):
    network.eval()
    seen = {}
    network.reduce.register_forward_hook(lambda _, inputs, out: seen.update(low=inputs[0]))
    network.aspp.register_forward_hook(lambda _, inputs, out: seen.update(high=inputs[0]))
    expected = network(x)
    torch.manual_seed(4)
    clean, perturbed = network(x, perturb=True)
    torch.testing.assert_close(clean, expected)
    for features in seen.values():
        before, after = features.chunk(2)
        kept = (after != 0).flatten(2).any(2)
        torch.testing.assert_close(after, 2 * before * kept[..., None, None])
        alive = (before != 0).flatten(2).any(2)
        assert 0.3 < kept[alive].double().mean() < 0.7
    halves = [features.chunk(2)[1] for features in (seen["low"], seen["high"])]
    expected = reference_head(network.state_dict(), *halves, (2, 4, 6), (40, 36))[1]
    torch.testing.assert_close(perturbed, expected)


def test_head_statistics_see_clean_and_perturbed_features_backbone_only_clean(network, x):
    network.train()
    for module in (network.reduce[1], network.backbone.layer4[0].bn1):
        module.momentum = 1.0  # the running mean becomes the last batch's
    seen = {}
    network.reduce[0].register_forward_hook(lambda _, inputs, out: seen.update(reduce=out))
    network.backbone.layer4[0].conv1.register_forward_hook(lambda _, inputs, out: seen.update(last=out))
    network(x, perturb=True)
    assert len(seen["reduce"]) == 6 and len(seen["last"]) == 3
    torch.testing.assert_close(network.reduce[1].running_mean, seen["reduce"].mean((0, 2, 3)))
    torch.testing.assert_close(network.backbone.layer4[0].bn1.running_mean, seen["last"].mean((0, 2, 3)))


def test_the_perturbed_output_trains_backbone_and_head(network, x):
    torch.manual_seed(0)
    _, perturbed = network.train()(x, perturb=True)
    perturbed.square().mean().backward()
    for name in ("backbone.conv1.weight", "aspp.branches.3.0.weight", "classifier.weight"):
        assert network.get_parameter(name).grad.abs().max() > 0


def test_head_parameters_are_all_outside_the_backbone(network):
    head, backbone = network.head_parameters(), list(network.backbone.parameters())
    assert {id(p) for p in head}.isdisjoint(id(p) for p in backbone)
    assert len(head) + len(backbone) == len(list(network.parameters()))


def test_memory_format_and_precision_do_not_change_the_result(network, x):
    network = network.eval().float()
    plain = network(x.float())
    last = network.to(memory_format=torch.channels_last)(x.float().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(x.float()) - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("arguments, message", [
    (("resnet18", 21, 8), "unknown backbone 'resnet18'"),
    (("resnet101s", 21, 32), "output_stride is 32; resnet101s has 8 or 16 here"),
    (("resnet-mini", 21, 16), "output_stride is 16; resnet-mini has 4 or 8 here"),
    (("mobilenetv2_100", 21, 32), "output_stride is 32; mobilenetv2_100 has 8 or 16 here"),
    (("resnet-mini", 0, 8), "classes is 0"),
])  # fmt: skip
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        deeplab(*arguments)
