"""What the few-mask methods share: streams, learning rates, crops, pasting and fixed-threshold targets."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from repro.data.mask_views import MaskViews
from repro.methods.few_masks import METHODS
from repro.methods.few_masks.common import MaskMethod, PixelTargets, cross_entropy, detached, threshold_targets
from repro.methods.few_masks.unimatch import FixMatch
from repro.models.deeplab import deeplab
from repro.train import IndexStream, Items, Losses, hash_seed, train
from tests.methods.few_masks import fakes
from tests.test_train import ToyRecipe

RECIPE = SimpleNamespace(batch=4, unlabelled_ratio=1)


def test_mix_draws_the_unlabelled_images_in_another_order():
    pool = SimpleNamespace(labelled=torch.tensor([2, 7]), unlabelled=torch.tensor([0, 1, 3, 4, 5, 6]))
    streams = fakes.build(FixMatch).streams(pool, RECIPE)
    assert list(streams) == ["labelled", "unlabelled", "mix"]
    assert [(indices.tolist(), batch) for indices, batch in streams.values()] == [
        ([2, 7], 4), ([0, 1, 3, 4, 5, 6], 4), ([0, 1, 3, 4, 5, 6], 4),
    ]  # fmt: skip
    drawn = {
        name: torch.cat([IndexStream(*streams[name], hash_seed(0, 0, name)).next() for _ in range(3)])
        for name in ("unlabelled", "mix")
    }
    assert not torch.equal(drawn["unlabelled"], drawn["mix"])
    assert fakes.build(FixMatch).streams(pool, SimpleNamespace(batch=4, unlabelled_ratio=2))["mix"][1] == 8


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_backbone_and_head_are_trained_at_their_own_rates(method):
    network = deeplab("resnet-mini", 4, 8)
    built = method(method.Settings(), network, None, 4, cross_entropy, 7.5)
    backbone, head = built.parameter_groups(1e-4)
    names = {id(p): name for name, p in network.named_parameters()}
    assert {names[id(p)] for p in backbone["params"]} == {n for n in names.values() if n.startswith("backbone.")}
    assert {names[id(p)] for p in head["params"]} == {n for n in names.values() if not n.startswith("backbone.")}
    assert len(backbone["params"]) + len(head["params"]) == len(names)
    assert (backbone["lr_factor"], head["lr_factor"]) == (1.0, 7.5)
    assert backbone["weight_decay"] == head["weight_decay"] == 1e-4  # on batch norms and biases too


@dataclass(frozen=True)
class OneStep(ToyRecipe):
    batch: int = 2
    steps: int = 1
    momentum: float = 0.0
    nesterov: bool = False
    schedule: str = "poly-0.9"
    ema: float = 0.0


def test_the_loop_multiplies_the_heads_rate(tmp_path):
    """One SGD step: theta - lr * factor * (gradient + decay * theta), by hand."""
    network, samples = fakes.TinyNetwork(), fakes.batch()
    labelled = samples["labelled"]
    method = fakes.build(FixMatch, network)
    method.streams = lambda pool, recipe: {"labelled": (torch.arange(2), 2)}
    method.losses = lambda batch, now: Losses({"supervised": network(batch["labelled"].images / 255).square().mean()})
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    loss = network(labelled.images / 255).square().mean()
    gradients = dict(zip(before, torch.autograd.grad(loss, list(network.parameters())), strict=True))
    pool = SimpleNamespace(images=labelled.images, labels=labelled.labels)
    train(method, pool, OneStep(), tmp_path, seed=0, evaluate=lambda net: {"miou": 0.0})
    for name, p in network.named_parameters():
        rate = 0.05 * (1.0 if name.startswith("backbone.") else 10.0)
        expected = before[name] - rate * (gradients[name] + 1e-3 * before[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-6)


def test_void_of_hidden_masks_stays_valid_and_only_padding_does_not():
    """Real views: 255 is ignored by the labelled loss, but just what lies beyond the image, or 254, is padding."""
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = torch.full((4, 16, 16), 255, dtype=torch.uint8)
    labels[:, 12:] = 254  # what a loader padded
    method = FixMatch(FixMatch.Settings(), nn.Identity(), MaskViews(16, (1, 1), flip=False), 3, cross_entropy)
    (crop,) = method.crops({"unlabelled": Items(torch.arange(4), images, labels)})
    assert torch.equal(crop.padding, labels == 254) and (crop.masks == 255).all()
    assert torch.equal(crop.images, images)
    shrunk = FixMatch(FixMatch.Settings(), nn.Identity(), MaskViews(16, (0.5, 0.5), flip=False), 3, cross_entropy)
    (crop,) = shrunk.crops({"unlabelled": Items(torch.arange(4), images, torch.full_like(labels, 255))})
    inside = torch.zeros(4, 16, 16, dtype=torch.bool)
    inside[:, :8, :8] = True
    assert torch.equal(~crop.padding, inside) and not crop.images[:, :, 8:].any() and not crop.images[..., 8:].any()


def test_crops_come_in_the_order_of_the_streams():
    samples = fakes.batch()
    found = MaskMethod(None, nn.Identity(), fakes.FakeViews(), 3, cross_entropy).crops(samples)
    for crop, part in zip(found, samples.values(), strict=True):
        assert torch.equal(crop.images, part.images * (part.labels != 254)[:, None])


# Targets


def targets(seed, batch=3, size=5):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, size, size)
    valid = torch.rand(shape, generator=generator) < 0.7
    return PixelTargets(
        torch.randint(4, shape, generator=generator), torch.rand(shape, generator=generator) * valid,
        torch.rand(shape, generator=generator), valid,
    )  # fmt: skip


def test_pasting_moves_label_weight_confidence_and_validity_together():
    mine, theirs = targets(0), targets(1)
    where = torch.zeros(3, 5, 5, dtype=torch.bool)
    where[1, 1:4, 2:] = True
    where[2] = True
    found = mine.pasted(theirs, where)
    for name in ("label", "weight", "confidence", "valid"):
        ours, other, result = (vars(part)[name] for part in (mine, theirs, found))
        assert torch.equal(result[0], ours[0]) and torch.equal(result[2], other[2])
        assert torch.equal(result[1, 1:4, 2:], other[1, 1:4, 2:])
        assert torch.equal(result[1, :, :2], ours[1, :, :2]) and torch.equal(result[1, 4], ours[1, 4])
        assert result.dtype == ours.dtype
    assert not (found.weight * ~found.valid).any()


def test_the_report_is_of_the_targets_in_their_window():
    part, crop = targets(0), SimpleNamespace(window="here")
    (kind, told), *rest = part.report(torch.tensor([4, 2, 9]), crop).items()
    assert kind == "pixels" and not rest and told.window == "here" and told.index.tolist() == [4, 2, 9]
    assert all(vars(told)[name] is value for name, value in vars(part).items())


def test_a_threshold_is_reached_at_equality_and_padding_never_counts():
    logits = torch.zeros(1, 4, 2, 2)  # a probability of exactly 1/4 everywhere
    logits[0, 2, 0, 1] = 5.0
    padding = torch.tensor([[[False, True], [False, False]]])
    for threshold, chosen in ((0.0, True), (0.25, True), (0.2500001, False)):
        found = threshold_targets(logits, padding, threshold)
        assert found.weight.flatten().tolist() == [chosen, False, chosen, chosen] and found.weight.dtype == torch.bool
    assert found.label.tolist() == [[[0, 2], [0, 0]]] and torch.equal(found.valid, ~padding)
    assert found.confidence[0, 0, 1].item() == pytest.approx(torch.tensor([0.0, 0, 5, 0]).softmax(0)[2].item())


def test_targets_have_no_gradient_and_are_computed_in_float32():
    logits = (3 * torch.randn(2, 3, 4, 4)).bfloat16().requires_grad_()
    found = threshold_targets(logits, torch.zeros(2, 4, 4, dtype=torch.bool), 0.8)
    assert found.confidence.dtype == torch.float32 and not found.confidence.requires_grad
    assert torch.equal(found.confidence, logits.detach().float().softmax(1).amax(1))


def test_detached_logits_keep_the_networks_mode():
    network = fakes.TinyNetwork().train()
    x = torch.rand(3, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = detached(network, x)
    assert logits.dtype == torch.float32 and not logits.requires_grad and network.training
    assert network.backbone[1].num_batches_tracked == 1
    network.eval()
    torch.testing.assert_close(detached(network, x), network(x).detach())
