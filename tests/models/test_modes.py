"""Modes of a network: what they change, and that they leave no trace."""

import copy

import pytest
import torch
from torch import nn

from repro.models.modes import dropout_only, evaluating, held_statistics, stochastic_logits, stochastic_probs
from repro.models.wide_resnet import wide_resnet


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = wide_resnet("wrn-10-1", 4, channels=1, dropout=0.3, bn_momentum=0.1)
    for _ in range(20):
        network(torch.randn(16, 1, 8, 8))  # statistics away from their start, so that modes differ
    network.blocks[1].eval()  # a partly frozen network: its modes are mixed
    network.blocks[2].bn1.eval()
    return network


@pytest.fixture
def x():
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def modes(network):
    return [(name, module.training, getattr(module, "track_running_stats", None))
            for name, module in network.named_modules()]  # fmt: skip


def same_state(before, network):
    return all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_held_statistics_uses_the_batch_and_touches_nothing(network, x):
    twin = copy.deepcopy(network)
    state, flags = copy.deepcopy(network.state_dict()), modes(network)
    for name in ("blocks.1", "blocks.2"):  # all batch norms of the twin train, its dropout stays as it is
        for module in twin.get_submodule(name).modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
    torch.manual_seed(3)
    expected = twin(x)
    torch.manual_seed(3)
    with held_statistics(network):
        actual = network(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert same_state(state, network) and modes(network) == flags
    assert not same_state(state, twin)


def test_held_statistics_still_gives_gradients(network, x):
    with held_statistics(network):
        network(x).square().sum().backward()
    assert network.stem.weight.grad.abs().max() > 0


def test_evaluating_is_eval_mode_for_a_while(network, x):
    """Nothing draws, running averages serve and stay, gradients flow; a partly frozen network returns as it came."""
    flags, state = modes(network), copy.deepcopy(network.state_dict())
    quiet = copy.deepcopy(network).eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        logits = network(x)
        torch.testing.assert_close(logits, quiet(x), rtol=0, atol=0)
        with evaluating(network):
            assert torch.equal(network(x), logits)
        assert not network.training
        logits.square().sum().backward()
    assert modes(network) == flags and same_state(state, network)
    assert network.stem.weight.grad.abs().max() > 0
    network.eval()
    with evaluating(network):
        pass
    assert not any(module.training for module in network.modules())


def test_dropout_only_is_eval_with_dropout(network, x):
    flags, state = modes(network), copy.deepcopy(network.state_dict())
    quiet = copy.deepcopy(network).eval()
    with dropout_only(network):
        training = {name for name, module in network.named_modules() if module.training}
        assert training == {f"blocks.{index}.dropout" for index in range(3)}
        first, second = network(x), network(x)
        for block in network.blocks:
            block.dropout.p = 0.0
        torch.testing.assert_close(network(x), quiet(x), rtol=0, atol=0)
    assert (first - second).abs().max() > 1e-3
    assert modes(network) == flags and same_state(state, network)


@pytest.mark.parametrize("mode", [held_statistics, evaluating, dropout_only])
def test_modes_return_after_an_exception_and_when_nested(network, x, mode):
    flags = modes(network)
    with pytest.raises(RuntimeError, match="stop"), held_statistics(network), mode(network):
        network(x)
        raise RuntimeError("stop")
    assert modes(network) == flags


def test_a_user_set_flag_survives(network):
    network.blocks[0].bn1.track_running_stats = False
    with held_statistics(network):
        assert not network.blocks[0].bn2.track_running_stats
    assert not network.blocks[0].bn1.track_running_stats and network.blocks[0].bn2.track_running_stats


def test_stochastic_probs_shape_softmax_and_temperature(network, x):
    flags, state = modes(network), copy.deepcopy(network.state_dict())
    torch.manual_seed(5)
    logits = stochastic_logits(network, x, 7)
    torch.manual_seed(5)
    probs = stochastic_probs(network, x, 7, temperature=2.0)
    assert logits.shape == probs.shape == (7, 6, 4) and not logits.requires_grad
    exponentials = (logits / 2).exp()
    torch.testing.assert_close(probs, exponentials / exponentials.sum(-1, keepdim=True))
    assert (probs.std(0) > 0).all()
    assert modes(network) == flags and same_state(state, network)


def test_passes_draw_from_the_law_of_dropout():
    """A linear unit behind dropout: the logit is a sum of kept inputs, whose mean and variance are known."""
    p, inputs, passes = 0.3, 8, 4000
    network = nn.Sequential(nn.Dropout(p), nn.Linear(inputs, 2, bias=False))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.ones(inputs), torch.zeros(inputs)]))
    torch.manual_seed(0)
    logits = stochastic_logits(network, torch.ones(5, inputs), passes)[..., 0]
    variance = inputs * p / (1 - p)  # each kept input counts 1/(1-p) with probability 1-p
    assert (logits.mean(0) - inputs).abs().max() < 5 * (variance / passes) ** 0.5
    assert (logits.var(0) / variance - 1).abs().max() < 5 * (2 / passes) ** 0.5
    correlation = torch.corrcoef(logits.T) - torch.eye(5)
    assert correlation.abs().max() < 5 / passes**0.5  # samples of one pass are independent


def test_half_precision_logits_give_float32_probabilities():
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).bfloat16()
    probs = stochastic_probs(network, torch.ones(2, 4, dtype=torch.bfloat16), 3)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, 2))


def test_compiled_and_channels_last_networks_behave_the_same(network, x):
    network = network.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    flags, state = modes(network), copy.deepcopy(network.state_dict())
    compiled = torch.compile(network, backend="eager")
    torch._dynamo.reset()
    network.eval()
    expected, eval_flags = network(x), modes(network)
    torch.testing.assert_close(compiled(x), expected)
    torch.manual_seed(2)
    plain = stochastic_logits(network, x, 3)
    torch.manual_seed(2)
    torch.testing.assert_close(stochastic_logits(compiled, x, 3), plain)
    with held_statistics(compiled):
        held = compiled(x)
    with held_statistics(network):
        torch.testing.assert_close(held, network(x))
    assert (held - expected).abs().max() > 1e-3
    torch.testing.assert_close(compiled(x), expected)  # and back again
    assert modes(network) == eval_flags != flags and same_state(state, network)


def test_wrong_requests_are_named(network, x):
    with pytest.raises(ValueError, match="passes is 1; a spread over passes needs at least 2"):
        stochastic_probs(network, x, 1)
    with pytest.raises(ValueError, match="temperature is 0; it must be positive"):
        stochastic_probs(network, x, 2, temperature=0)
    flags = modes(plain := wide_resnet("wrn-10-1", 4, channels=1))
    with pytest.raises(ValueError, match="no dropout module has p > 0"):
        stochastic_probs(plain, x, 2)
    assert modes(plain) == flags
