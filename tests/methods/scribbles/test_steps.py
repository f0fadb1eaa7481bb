"""What the scribble methods share: stages, learning rates, views, and one start for all."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from repro.data.mask_views import normalise
from repro.methods.scribbles import METHODS
from repro.methods.scribbles.common import partial_cross_entropy
from repro.models.deeplab import deeplab
from repro.train import seed_everything, train
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import FIRST, START, build
from tests.test_train import ToyRecipe

every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
REGULARISED = [name for name in METHODS if name not in ("partial_ce", "full")]


@every
def test_all_methods_have_one_budget(method):
    built = build(method)
    assert built.stages(7) == [START, 7] and not built.is_second(0) and built.is_second(1)
    alone = build(method, recipe=fakes.options(start_steps=0))
    assert alone.stages(7) == [7] and alone.is_second(0)
    streams = built.streams(fakes.pool(), SimpleNamespace(batch=3))
    masks = method is METHODS["full"]
    assert [(name, index.tolist(), size) for name, (index, size) in streams.items()] == [
        ("masks" if masks else "scribbles", [0, 1, 2, 3, 4], 3)
    ]
    assert method.supervision == ("masks" if masks else "scribbles")


@every
def test_learning_rates_of_backbone_head_and_second_stage(method):
    network = deeplab("resnet-mini", fakes.CLASSES, 8)
    built = build(method, network, rate=0.25)
    names = {id(p): name for name, p in network.named_parameters()}
    for stage, factors in ((0, [1.0, 10.0]), (1, [0.25, 2.5])):
        built.begin_stage(stage, None)
        backbone, head = built.parameter_groups(1e-4)
        assert [backbone["lr_factor"], head["lr_factor"]] == factors
        assert backbone["weight_decay"] == head["weight_decay"] == 1e-4
        assert {names[id(p)] for p in backbone["params"]} == {n for n in names.values() if n.startswith("backbone.")}
        assert len(backbone["params"]) + len(head["params"]) == len(names)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "full"])
def test_the_first_stage_is_partial_cross_entropy_alone(name):
    built, sample = build(METHODS[name]), fakes.items()
    losses = built.losses({"scribbles": sample}, FIRST)
    crop = fakes.again(sample)
    expected = partial_cross_entropy(fakes.TinyNetwork()(built.views.weak(crop)), crop.masks)
    assert list(losses.terms) == ["seeds"] and losses.pseudo == {}
    # black padding would be another input
    padded = normalise(crop.images, built.views.mean, built.views.std).masked_fill(crop.padding[:, None], 0)
    assert crop.padding.any() and torch.equal(built.network.passes[0][0], padded)
    again = partial_cross_entropy(fakes.TinyNetwork()(padded), crop.masks)
    assert losses.terms["seeds"].item() == again.item() != expected.item()


def test_blur_is_the_views_own_and_changes_no_place():
    sample = fakes.items((0, 1, 2, 3, 4) * 4)
    built = build(METHODS["partial_ce"], recipe=fakes.options(blur=True))
    found = built.view(sample)
    other = fakes.views()
    crop = other.crop(sample.images, sample.labels)
    expected = other.strong(crop).masked_fill(crop.padding[:, None], 0)
    assert torch.equal(found.x, expected) and torch.equal(found.crop.masks, crop.masks)
    assert torch.equal(found.roi, ~crop.padding)
    weak = build(METHODS["partial_ce"]).view(sample).x
    changed = ((found.x - weak).abs().amax((1, 2, 3)) > 1e-4).sum().item()
    assert 3 < changed < 17  # each of 20 with probability 1/2


@dataclass(frozen=True)
class Short(ToyRecipe):
    batch: int = 3
    steps: int = 6
    epoch_steps: int = 3
    schedule: str = "poly-0.9"
    ema: float = 0.0
    lr: float = 0.02
    eval_every: int = 2
    log_every: int = 1
    checkpoint_every: int = 1000


def trained(folder, name, **changes):
    """A run of 4 + 6 steps; returns its history and the seed terms of each step."""
    seed_everything(5)
    built = build(METHODS[name], **changes)
    generators = {"views": built.views.generator}
    evaluate = lambda net: {"sum": sum(p.double().sum().item() for p in net.parameters())}  # noqa: E731
    _, history = train(built, fakes.pool(), Short(), folder, seed=5, evaluate=evaluate, generators=generators)
    return built, history


def test_every_method_starts_from_the_same_partial_cross_entropy(tmp_path):
    runs = {name: trained(tmp_path / name, name)[1] for name in METHODS if name != "full"}

    def seen(name, upto):
        rows = [row["live"]["sum"] for row in runs[name].of("evaluation") if row["step"] <= upto]
        return rows + [row["terms"]["seeds"] for row in runs[name].of("train") if row["step"] <= upto]

    for name in REGULARISED:
        assert seen(name, START) == seen("partial_ce", START) and len(seen(name, START)) == START + 2
        assert seen(name, 10) != seen("partial_ce", 10), name
        assert [row["stage"] for row in runs[name].of("train")] == [0] * START + [1] * 6
    factors = {name: METHODS[name].Settings().rate for name in runs}
    for name, history in runs.items():
        rows = history.of("train")
        assert [row["lr"] for row in rows][:2] == pytest.approx([0.02, 0.02 * 0.75**0.9])
        assert rows[START]["lr"] == pytest.approx(0.02 * factors[name])  # a fresh schedule
