"""Losses against closed forms and torch, settings by scribble length, stages and learning rates, one start for all."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from repro.data.mask_views import normalise
from repro.methods.scribbles import METHODS, settings_for
from repro.methods.scribbles.common import (
    PUBLISHED,
    Tuned,
    outlier_model,
    partial_cross_entropy,
    pixel_loss,
    proposal_losses,
    rescaled_epsilon,
    robust_surprise,
    tuned_for,
)
from repro.models.deeplab import deeplab
from repro.settings import SettingError, replace
from repro.solvers.cuts import SolverSettings
from repro.train import seed_everything, train
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import FIRST, START, build
from tests.test_train import ToyRecipe


def sample(seed=0, batch=2, classes=4, side=5, scale=3.0, dtype=torch.float64):
    """Logits, scribbles with 254 and 255, proposals with 255."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, side, side, generator=generator, dtype=torch.float64)
    scribbles = torch.full((batch, side, side), 255, dtype=torch.uint8)
    scribbles[:, 1, 1:4] = torch.arange(3, dtype=torch.uint8)
    scribbles[0, 0, 0] = classes - 1
    scribbles[-1, -1] = 254
    proposals = torch.randint(classes, scribbles.shape, generator=generator, dtype=torch.uint8)
    proposals = torch.where(scribbles < classes, scribbles, proposals)
    proposals[-1, -1], proposals[0, 3, 3] = 255, 255
    return logits.to(dtype), scribbles, proposals


def closed_form(logits, labels, epsilon):
    """-log(a + b s_x) of every pixel, from the probabilities themselves."""
    classes = logits.shape[1]
    a, b = epsilon / (classes - 1), 1 - classes * epsilon / (classes - 1)
    probs = logits.double().softmax(1)
    shown = torch.zeros(labels.shape, dtype=torch.float64)
    for at in torch.nonzero(labels < classes).tolist():
        n, i, j = at
        shown[n, i, j] = -torch.log(a + b * probs[n, int(labels[n, i, j]), i, j])
    return shown


# The outlier model


@pytest.mark.parametrize(
    ("epsilon", "a", "b", "slope", "span"),
    [
        (0.9440, 0.047200, 0.008800, 0.1864, 0.1710),
        (0.9460, 0.047300, 0.006700, 0.1416, 0.1325),
        (0.9514, 0.047570, 0.001030, 0.0217, 0.0214),
        (0.9516, 0.047580, 0.000820, 0.0172, 0.0171),
        (0.9522, 0.047610, 0.000190, 0.0040, 0.0040),
    ],
)
def test_the_model_of_published_values(epsilon, a, b, slope, span):
    found = outlier_model(epsilon, 21)
    assert found == pytest.approx((a, b), abs=5e-7)
    assert found[1] / found[0] == pytest.approx(slope, abs=5e-5)
    ends = robust_surprise(torch.tensor([-200.0, 0.0], dtype=torch.float64), epsilon, 21)
    assert (ends[0] - ends[1]).item() == pytest.approx(span, abs=5e-5)


def test_epsilon_of_other_numbers_of_classes_keeps_the_slope():
    assert rescaled_epsilon(0.9440, 21, 4) == pytest.approx(0.7166, abs=5e-5)  # of the specification
    for classes in (2, 3, 6, 30):
        for epsilon in (0.1, 0.9440, 0.9522):
            (a, b), (a2, b2) = (
                outlier_model(epsilon, 21), outlier_model(rescaled_epsilon(epsilon, 21, classes), classes),
            )  # fmt: skip
            assert b2 / a2 == pytest.approx(b / a, rel=1e-9)
        back = rescaled_epsilon(rescaled_epsilon(0.9460, 21, classes), classes, 21)
        assert back == pytest.approx(0.9460, rel=1e-12)
        assert rescaled_epsilon(0.0, 21, classes) == 0
        at_end = rescaled_epsilon(20 / 21, 21, classes)
        assert at_end == pytest.approx((classes - 1) / classes) and outlier_model(at_end, classes)[1] < 1e-12
    assert rescaled_epsilon(0.9440) == 0.9440


def test_what_is_not_an_outlier_probability_is_refused():
    for epsilon, classes in ((-0.1, 3), (0.67, 3), (0.9440, 6), (1.0, 21), (float("nan"), 3)):
        with pytest.raises(ValueError, match=r"epsilon is .* must lie in \[0, .*rescaled_epsilon"):
            outlier_model(epsilon, classes)
    with pytest.raises(ValueError, match="classes is 1"):
        outlier_model(0.0, 1)
    with pytest.raises(ValueError, match="to_classes is 1"):
        rescaled_epsilon(0.5, 21, 1)


# One pixel


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 0.2, 0.6, 0.749, 0.75])
def test_the_robust_loss_and_its_gradient_are_the_closed_forms(epsilon):
    logits, _, labels = sample()
    logits.requires_grad_()
    loss = pixel_loss(logits.log_softmax(1), labels, epsilon)
    torch.testing.assert_close(loss, closed_form(logits, labels, epsilon))
    (found,) = torch.autograd.grad(loss.sum(), logits)
    a, b = epsilon / 3, 1 - 4 * epsilon / 3
    probs = logits.detach().softmax(1)
    expected = torch.zeros_like(found)
    for n, i, j in torch.nonzero(labels < 4).tolist():
        s = probs[n, :, i, j]
        x = int(labels[n, i, j])
        one = F.one_hot(torch.tensor(x), 4)
        expected[n, :, i, j] = -(b * s[x] / (a + b * s[x])) * (one - s)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_differences():
    logits, scribbles, proposals = sample()
    logits.requires_grad_()
    for epsilon, soften in ((0.0, 0.0), (0.6, 0.0), (0.6, 0.3)):
        assert gradcheck(lambda z: torch.stack(proposal_losses(z, scribbles, proposals, epsilon, soften)), logits)  # noqa: B023
    assert gradcheck(lambda z: partial_cross_entropy(z, scribbles), logits)


def test_epsilon_zero_is_cross_entropy_exactly():
    logits, _, labels = sample(dtype=torch.float32, scale=30.0)
    logits.requires_grad_()
    whole = torch.where(labels < 4, labels.long(), -1)
    expected = F.cross_entropy(logits, whole, ignore_index=-1, reduction="none")
    loss = pixel_loss(logits.log_softmax(1), labels)
    assert torch.equal(loss, expected)
    (found,), (wanted,) = (torch.autograd.grad(part.sum(), logits) for part in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_largest_epsilon_is_a_constant_without_gradient():
    for classes in (2, 3, 4, 7, 21):
        logits, _, labels = sample(classes=classes, dtype=torch.float32)
        logits.requires_grad_()
        loss = pixel_loss(logits.log_softmax(1), labels, (classes - 1) / classes)
        known = labels < classes
        torch.testing.assert_close(loss[known], torch.full_like(loss[known], math.log(classes)))
        assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.749, 0.75])
def test_half_precision_and_confident_errors_stay_finite(dtype, epsilon):
    logits, scribbles, proposals = sample(dtype=dtype, scale=100.0)
    logits.requires_grad_()
    seeds, others = proposal_losses(logits, scribbles, proposals, epsilon)
    assert seeds.dtype == others.dtype == torch.float32
    exact = [part.item() for part in proposal_losses(logits.detach().double(), scribbles, proposals, epsilon)]
    assert [seeds.item(), others.item()] == pytest.approx(exact, rel=1e-5)
    (gradient,) = torch.autograd.grad(seeds + others, logits)
    assert gradient.isfinite().all() and gradient.dtype == dtype


def test_soft_proposals_are_label_smoothing():
    logits, _, labels = sample()
    log_probs = logits.log_softmax(1)
    whole = torch.where(labels < 4, labels.long(), -1)
    expected = F.cross_entropy(logits, whole, ignore_index=-1, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(pixel_loss(log_probs, labels, 0.0, 0.3), expected)
    robust = torch.zeros_like(expected)
    for k in range(4):
        share = 0.7 * (labels == k) + 0.3 / 4
        robust += share * closed_form(logits, torch.full_like(labels, k), 0.6)
    robust[labels >= 4] = 0
    torch.testing.assert_close(pixel_loss(log_probs, labels, 0.6, 0.3), robust)


# Sums over a batch


def test_partial_cross_entropy_is_torchs_over_the_batch():
    logits, scribbles, _ = sample(batch=3)
    target = scribbles.long().masked_fill(scribbles == 254, 255)
    expected = F.cross_entropy(logits, target, ignore_index=255) / 3
    assert partial_cross_entropy(logits, scribbles).item() == pytest.approx(expected.item(), rel=1e-12)
    other = logits.clone().masked_fill((scribbles >= 4)[:, None], 7.0)
    assert partial_cross_entropy(other, scribbles).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.6])
def test_both_parts_are_sums_by_loops_over_the_seeds(epsilon):
    logits, scribbles, proposals = sample(batch=3)
    count = sum(1 for label in scribbles.flatten().tolist() if label < 4)
    on_seeds = on_others = 0.0
    seed_loss, robust = closed_form(logits, scribbles, 0.0), closed_form(logits, proposals, epsilon)
    for n in range(3):
        for i in range(5):
            for j in range(5):
                if scribbles[n, i, j] < 4:
                    on_seeds += seed_loss[n, i, j].item()
                elif proposals[n, i, j] != 255:
                    on_others += robust[n, i, j].item()
    seeds, others = proposal_losses(logits, scribbles, proposals, epsilon)
    assert seeds.item() == pytest.approx(on_seeds / count / 3) and others.item() == pytest.approx(on_others / count / 3)
    assert seeds.item() == pytest.approx(partial_cross_entropy(logits, scribbles).item())
    wrong = torch.where(scribbles < 4, 3 - scribbles, proposals)  # a proposal on a seed is not read
    assert proposal_losses(logits, scribbles, wrong, epsilon)[1].item() == others.item()


def test_without_a_seed_nothing_is_learnt_and_nothing_is_nan():
    logits, scribbles, proposals = sample()
    logits.requires_grad_()
    for value in (255, 254):
        none = torch.full_like(scribbles, value)
        seeds, others = proposal_losses(logits, none, proposals, 0.6)
        single = partial_cross_entropy(logits, none)
        assert seeds.item() == others.item() == single.item() == 0
        assert (torch.autograd.grad(seeds + others + single, logits)[0] == 0).all()
    ignored = torch.full_like(proposals, 255)
    seeds, others = proposal_losses(logits, scribbles, ignored, 0.6)
    assert others.item() == 0 and seeds.item() > 0


# Settings by scribble length


def test_the_table_is_the_readmes():
    assert {length: (tuned.epsilon, tuned.gamma) for length, tuned in PUBLISHED.items()} == {
        1.0: (0.9440, 0.05), 0.8: (0.9460, 0.075), 0.5: (0.9514, 0.1), 0.3: (0.9516, 0.1), 0.0: (0.9522, 0.1),
    }  # fmt: skip
    assert all(tuned_for(length) == tuned for length, tuned in PUBLISHED.items())


def test_other_classes_keep_slope_and_gamma():
    for length, tuned in PUBLISHED.items():
        a, b = outlier_model(tuned.epsilon, 21)
        found = tuned_for(length, 6)
        slope = (lambda a, b: b / a)(*outlier_model(found.epsilon, 6))
        assert slope == pytest.approx(b / a) and found.gamma == tuned.gamma
    assert tuned_for(1, 4) == Tuned(pytest.approx(0.7166, abs=5e-5), 0.05)


def test_lengths_between_are_refused():
    with pytest.raises(ValueError, match="length is 0.6; published values are for 0, 0.3, 0.5, 0.8, 1"):
        tuned_for(0.6)


def test_settings_of_each_method():
    assert list(METHODS) == [
        "partial_ce", "dense_gd", "grid_gd", "adm", "trust_region", "robust_trust_region", "full",
    ]  # fmt: skip
    for name, method in METHODS.items():
        published = settings_for(name, 1.0)
        assert published == method.Settings() and type(published) is method.Settings, name
    plain, robust = (settings_for(name, 0.3, 6) for name in ("trust_region", "robust_trust_region"))
    assert (plain.epsilon, plain.gamma, robust.gamma) == (0.0, 0.1, 0.1)
    assert robust.epsilon == tuned_for(0.3, 6).epsilon
    assert replace(plain, epsilon=robust.epsilon).solver == robust.solver
    assert settings_for("adm", 0.6) == METHODS["adm"].Settings()
    with pytest.raises(ValueError, match="length is 0.6"):
        settings_for("trust_region", 0.6)


def test_published_defaults_of_stage_a_reach_the_solver():
    assert METHODS["trust_region"].Settings().solver == SolverSettings(100.0, 0.05, 5, True, 1, "scipy")
    changed = METHODS["trust_region"].Settings(
        potts_weight=3.0, gamma=0.2, sweeps=2, restricted=False, downscale=2, back_end="ortools"
    )
    assert changed.solver == SolverSettings(3.0, 0.2, 2, False, 2, "ortools")


def test_an_epsilon_of_other_classes_is_refused():
    method = METHODS["robust_trust_region"]
    with pytest.raises(SettingError, match="epsilon is 0.944; with 3 classes"):
        method(method.Settings(), fakes.TinyNetwork(), fakes.views(), 3, fakes.options(), (5, 10, 10))


# Stages, learning rates, views


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
