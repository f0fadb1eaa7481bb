"""Wide ResNets and CNN-13 against published parameter counts and functional references."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repro.models.wide_resnet import LAYOUTS, VARIANTS, wide_resnet

STRIDES = {name: (1, 2, 2) for name in ("wrn-10-1", "wrn-10-1-half", "wrn-28-2", "wrn-28-8")}
STRIDES["wrn-37-2"] = (2, 2, 2, 2)
EPSILONS = {"usb": (1e-5, 1e-3), "torchssl": (1e-3, 1e-3), "kekmodel": (1e-5, 1e-5), "ups": (1e-5, 1e-5)}


def size(network):
    return sum(parameter.numel() for parameter in network.parameters())


def reference_logits(state, x, strides, eps, transition, train, ups=False, stem_stride=1):
    """The forward pass in functional form, from a state dict alone."""
    block_eps, final_eps = eps

    def bn_act(x, key, eps):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
        x = x * state[f"{key}.weight"][:, None, None] + state[f"{key}.bias"][:, None, None]
        return (x + 0.1) * torch.tanh(F.softplus(x + 0.1)) if ups else F.leaky_relu(x, 0.1)

    def conv(x, key, stride=1, padding=1):
        return F.conv2d(x, state[f"{key}.weight"], state.get(f"{key}.bias"), stride, padding)

    x = conv(x, "stem", stem_stride)
    per_stage = sum(key.endswith("conv2.weight") for key in state) // len(strides)
    for index in range(per_stage * len(strides)):
        key, (stage, position) = f"blocks.{index}", divmod(index, per_stage)
        stride = strides[stage] if position == 0 else 1
        inner = bn_act(x, f"{key}.bn1", block_eps)
        if f"{key}.shortcut.weight" not in state:
            skip = x
        elif stage == 0 or transition == "shared":
            skip = conv(inner, f"{key}.shortcut", stride, 0)
        else:
            skip = conv(x, f"{key}.shortcut", stride, 0)
            inner = x if transition == "discard" else inner
        inner = conv(inner, f"{key}.conv1", stride)
        x = skip + conv(bn_act(inner, f"{key}.bn2", block_eps), f"{key}.conv2")
    pooled = F.adaptive_avg_pool2d(bn_act(x, "bn", final_eps), 1).flatten(1)
    return F.linear(pooled, state["head.weight"], state["head.bias"])


def shaken(network, seed=0):
    """The network in float64 with every parameter and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return network


@pytest.mark.parametrize(
    ("name", "classes", "variant", "count"),
    [
        ("wrn-28-2", 10, "kekmodel", 1_467_610),
        ("wrn-28-2", 10, "ups", 1_467_610),
        ("wrn-28-2", 10, "usb", 1_467_626),
        ("wrn-28-2", 10, "torchssl", 1_469_642),
        ("wrn-28-2", 100, "usb", 1_479_236),
        ("wrn-28-8", 10, "usb", 23_354_858),
        ("wrn-28-8", 100, "kekmodel", 23_401_012),
        ("wrn-28-8", 100, "usb", 23_401_028),
        ("wrn-28-8", 100, "torchssl", 23_409_092),
    ],
)
def test_published_parameter_counts(name, classes, variant, count):
    with torch.device("meta"):
        assert size(wide_resnet(name, classes, variant=variant)) == count
        assert size(wide_resnet(name, classes, variant=variant, discard_bn=False)) == count


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count_by_hand(name, variant):
    _, depth, width, *_ = name.split("-")
    stages, depth = (4, 28) if name == "wrn-37-2" else (3, int(depth))
    stem_bias = variant != "kekmodel" and variant != "ups"
    block_bias = variant == "torchssl" or (variant == "usb" and stages == 4)
    count, c_in = 1 * 16 * 9 + 16 * stem_bias, 16
    for stage in range(stages):
        c_out = 16 * int(width) * 2**stage
        for _ in range((depth - 4) // 6):
            convolutions = [c_in * c_out * 9, c_out * c_out * 9] + ([c_in * c_out] if c_in != c_out else [])
            count += sum(convolutions) + 2 * (c_in + c_out) + block_bias * c_out * len(convolutions)
            c_in = c_out
    count += 2 * c_in + 7 * (c_in + 1)
    with torch.device("meta"):
        assert size(wide_resnet(name, 7, channels=1, variant=variant)) == count


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("discard", [None, True, False])
@pytest.mark.parametrize(
    ("name", "variant"),
    [*(("wrn-10-1", variant) for variant in VARIANTS), *((name, "usb") for name in STRIDES if name != "wrn-28-8")],
)
def test_forward_equals_the_functional_reference(name, variant, discard, train):
    network = shaken(wide_resnet(name, 5, channels=2, variant=variant, discard_bn=discard)).train(train)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    four_stage_usb = name == "wrn-37-2" and variant == "usb"
    released = "shared" if four_stage_usb else "discard"
    transition = {None: released, True: "discard", False: "separate"}[discard]
    eps = (1e-3, 1e-3) if four_stage_usb else EPSILONS[variant]
    half = 2 if name.endswith("-half") else 1
    expected = reference_logits(state, x, STRIDES[name], eps, transition, train, variant == "ups", half)
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.head(network.features(x)), expected, rtol=1e-9, atol=1e-9)


def test_the_quirk_changes_the_function_but_not_the_parameters():
    networks = [wide_resnet("wrn-10-1", 4, discard_bn=discard) for discard in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert (networks[0](x) - networks[1](x)).abs().max() > 1e-3


def test_the_discarded_batch_norm_has_no_gradient_but_keeps_statistics():
    network = wide_resnet("wrn-28-2", 4, bn_momentum=1.0)
    inputs = {}
    for index in (0, 4, 8):
        network.blocks[index].register_forward_pre_hook(
            lambda module, args, index=index: inputs.update({index: args[0].detach()})
        )
    network(torch.randn(6, 3, 8, 8)).square().sum().backward()
    idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert idle == {f"blocks.{index}.bn1.{kind}" for index in (4, 8) for kind in ("weight", "bias")}
    for index in (4, 8):
        bn1 = network.blocks[index].bn1
        torch.testing.assert_close(bn1.running_mean, inputs[index].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert bn1.num_batches_tracked == 1
    network.zero_grad()
    separate = wide_resnet("wrn-28-2", 4, discard_bn=False)
    separate(torch.randn(6, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in separate.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_initialisation_follows_the_released_codes(variant):
    torch.manual_seed(0)
    network = wide_resnet("wrn-28-2", 10, variant=variant)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            # the standard error of a standard deviation is 1/sqrt(2n) of it; 6 of them allow for 28 layers
            deviation = module.weight.std().item() / (2 / fan_out) ** 0.5
            assert abs(deviation - 1) < 6 / (2 * module.weight.numel()) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            assert module.momentum == 0.001
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (network.head.bias == 0).all()
    assert abs(network.head.weight.std().item() / (2 / (128 + 10)) ** 0.5 - 1) < 6 / (2 * 1280) ** 0.5


def test_spatial_sizes_and_feature_widths():
    stl = wide_resnet("wrn-37-2", 10)
    shapes = []
    stl.blocks.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
    mini = wide_resnet("wrn-10-1", 10, channels=1)
    mini.blocks.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert stl.features(torch.randn(1, 3, 96, 96)).shape == (1, 256)
        assert mini.features(torch.randn(1, 1, 28, 28)).shape == (1, 64)
    assert shapes == [(256, 6, 6), (64, 7, 7)]
    assert [block.conv1.out_channels for block in mini.blocks] == [16, 32, 64]
    assert mini.stem.out_channels == 16


@pytest.mark.parametrize(("variant", "follower"), [("usb", "conv2"), ("ups", "bn2")])
def test_dropout_sits_where_the_code_puts_it(variant, follower):
    block = wide_resnet("wrn-10-1", 4, variant=variant, dropout=0.5).blocks[0]
    order = []
    for name in ("conv1", "bn2", "dropout", "conv2"):
        getattr(block, name).register_forward_hook(lambda *_, name=name: order.append(name))
    block(torch.randn(2, 16, 8, 8))
    assert order[order.index("dropout") + 1] == follower


def test_channels_last_and_autocast_agree_with_float32():
    network = wide_resnet("wrn-10-1", 4).eval()
    x = torch.randn(4, 3, 16, 16)
    expected = network(x)
    network.to(memory_format=torch.channels_last)
    actual = network(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "wrn-28-3"}, "unknown wide ResNet 'wrn-28-3'; known: wrn-10-1, wrn-10-1-half, wrn-28-2"),
        ({"variant": "timm"}, "unknown variant 'timm'; known: usb, torchssl, kekmodel, ups"),
        ({"classes": 0}, "classes is 0"),
        ({"channels": 0}, "channels is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"bn_momentum": 0.0}, r"bn_momentum is 0.0; it must lie in \(0, 1\]"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        wide_resnet(**({"name": "wrn-10-1", "classes": 4} | settings))


@given(momentum=st.floats(0.001, 1.0), steps=st.integers(1, 3))
def test_bn_momentum_decides_how_much_of_the_start_is_left(momentum, steps):
    network = wide_resnet("wrn-10-1", 2, channels=1, bn_momentum=momentum)
    x = torch.ones(2, 1, 4, 4)
    with torch.no_grad():
        network.stem.weight.zero_(), network.stem.bias.zero_()
        for _ in range(steps):
            network(x)
    left = network.blocks[0].bn1.running_var  # the batch variance is 0, the start is 1
    torch.testing.assert_close(left, torch.full_like(left, (1 - momentum) ** steps), atol=1e-6, rtol=1e-4)
