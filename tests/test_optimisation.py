"""Schedules against closed forms, parameter groups, optimisers and the average of weights against loops."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repro.models.wide_resnet import wide_resnet
from repro.train import OPTIMISERS, SCHEDULES, Ema, make_optimiser, parameter_groups, schedule_factor


def test_cosine_runs_from_one_to_the_published_end():
    steps = 2**20
    assert schedule_factor("cosine-7/16", 0, steps) == 1
    assert schedule_factor("cosine-7/16", steps // 2, steps) == pytest.approx(math.cos(7 * math.pi / 32), rel=1e-12)
    assert schedule_factor("cosine-7/16", steps, steps) == pytest.approx(0.19509, abs=5e-6)


def test_poly_is_deeplabs():
    factors = [schedule_factor("poly-0.9", step, 4) for step in range(5)]
    assert factors == pytest.approx([1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0])


def test_warm_up_rises_in_a_line_then_joins_poly():
    factors = [schedule_factor("warmup-poly-0.9", step, 10, warmup=4) for step in range(6)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 0.6**0.9, 0.5**0.9])
    assert schedule_factor("warmup-poly-0.9", 0, 10) == 1


def test_constant_stays_and_an_unknown_schedule_lists_the_known():
    assert {schedule_factor("constant", step, 7) for step in range(8)} == {1.0}
    with pytest.raises(ValueError, match="unknown schedule 'cosine'; known: constant, cosine-7/16"):
        schedule_factor("cosine", 0, 1)


@given(st.sampled_from(SCHEDULES), st.integers(1, 10**7), st.data())
def test_factors_lie_in_zero_to_one_and_fall_after_the_warm_up(name, steps, data):
    warmup = data.draw(st.integers(0, steps))
    step = data.draw(st.integers(0, steps - 1))
    now, following = (schedule_factor(name, s, steps, warmup) for s in (step, min(step + 1, steps - 1)))
    assert 0 <= now <= 1
    assert following <= now or step < warmup


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-37-2"])  # convolutions without and with biases
def test_only_weights_of_convolutions_and_the_head_are_decayed(name):
    network = wide_resnet(name, 10)
    frozen = network.blocks[0].conv1.weight.requires_grad_(False)
    decayed, plain = parameter_groups(network, 5e-4)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0.0)
    expected = {
        id(module.weight) for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    } - {id(frozen)}  # fmt: skip
    assert {id(p) for p in decayed["params"]} == expected
    everything = {id(p) for p in network.parameters()} - {id(frozen)}
    assert {id(p) for p in plain["params"]} == everything - expected


def descend(optimiser, weight, target, steps):
    for _ in range(steps):
        optimiser.zero_grad()
        (0.5 * (weight - target).square()).sum().backward()
        optimiser.step()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
def test_sgd_against_a_loop(momentum, nesterov):
    weight, target = nn.Parameter(torch.tensor([[3.0, -2.0]])), torch.tensor([[1.0, 1.0]])
    w, velocity = weight.detach().clone(), torch.zeros(1, 2)
    groups = [{"params": [weight], "weight_decay": 0.1, "lr_factor": 1.0}]
    descend(make_optimiser("sgd", groups, 0.2, momentum, nesterov), weight, target, 4)
    for _ in range(4):
        gradient = w - target + 0.1 * w
        velocity = momentum * velocity + gradient
        w = w - 0.2 * (gradient + momentum * velocity if nesterov else velocity)
    torch.testing.assert_close(weight.detach(), w)


def test_adamw_against_a_loop():
    weight, target = nn.Parameter(torch.tensor([[3.0, -2.0]])), torch.tensor([[1.0, 1.0]])
    w, first, second = weight.detach().clone(), torch.zeros(1, 2), torch.zeros(1, 2)
    groups = [{"params": [weight], "weight_decay": 0.1, "lr_factor": 1.0}]
    descend(make_optimiser("adamw", groups, 0.2), weight, target, 4)
    for t in range(1, 5):
        gradient = w - target
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        w = w * (1 - 0.2 * 0.1)  # decoupled: not through the moments
        w = w - 0.2 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), w)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_groups_without_parameters_are_left_out_and_factors_kept(name):
    groups = [
        {"params": [], "weight_decay": 0.1, "lr_factor": 1.0},
        {"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.0, "lr_factor": 10.0},
    ]
    (group,) = make_optimiser(name, groups, 0.1).param_groups
    assert group["lr_factor"] == 10 and group["lr"] == 0.1 and group["weight_decay"] == 0


def test_an_unknown_optimiser_lists_the_known():
    with pytest.raises(ValueError, match="unknown optimiser 'adam'; known: sgd, adamw"):
        make_optimiser("adam", [{"params": [nn.Parameter(torch.zeros(1))]}], 0.1)


def test_ema_averages_parameters_and_copies_buffers():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    network[0].bias.requires_grad_(False)
    ema = Ema(network, 0.9)
    averages = {name: p.detach().clone().double() for name, p in network.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1 * (step + 1) if p.requires_grad else 0
        network(torch.randn(4, 1, 5, 5))
        ema.update()
        for name, p in network.named_parameters():
            averages[name] = 0.9 * averages[name] + 0.1 * p.detach().double()
    for name, p in ema.network.named_parameters():
        torch.testing.assert_close(p.double(), averages[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.network[0].bias, network[0].bias)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, ema.network.get_buffer(name))
    assert ema.network[1].num_batches_tracked.item() == 5
    assert ema.network[1].num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize(("decay", "follows"), [(0.0, True), (1.0, False)])
def test_ema_ends(decay, follows):
    network = nn.Linear(2, 2)
    start = copy.deepcopy(network.weight.detach())
    ema = Ema(network, decay)
    with torch.no_grad():
        network.weight += 1
    ema.update()
    assert torch.equal(ema.network.weight, network.weight if follows else start)


def test_ema_is_frozen_in_evaluation_mode_and_leaves_the_live_network_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = Ema(network, 0.9)
    assert not any(module.training for module in ema.network.modules())
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert all(module.training for module in network.modules()) and all(p.requires_grad for p in network.parameters())
    ema.update()
    network(torch.ones(1, 2)).sum().backward()
    assert network[0].weight.grad is not None
