"""Recipes for scribbles: the released numbers cell by cell, and what is refused before anything runs."""

import dataclasses
import math

import pytest

from repro.data.scribbles import LENGTHS as DRAWN
from repro.experiment import Experiment, resolve
from repro.methods.scribbles import METHODS
from repro.methods.scribbles.losses import outlier_model
from repro.papers import scribbles
from repro.recipe import ScribbleRecipe
from repro.settings import SettingError

# Length, epsilon at C = 21 and at C = 6 by hand, (C - 1) / (C + r) with r = b / a, and gamma.
LENGTHS = [
    (100, 0.9440, 5 / 6.186441, 0.05),
    (80, 0.9460, 5 / 6.141649, 0.075),
    (50, 0.9514, 5 / 6.021652, 0.1),
    (30, 0.9516, 5 / 6.017234, 0.1),
    (0, 0.9522, 5 / 6.003991, 0.1),
]
REGION = ("trust_region", "robust_trust_region")


def resolved(method, data="scenes", labels=30, scale="mini", **changes) -> ScribbleRecipe:
    return resolve(Experiment("trust_region", method, data, labels, 0, scale, changes))


@pytest.mark.parametrize("method", METHODS)
def test_paper_recipes_have_the_released_numbers(method):
    recipe = resolved(method, "voc", 100, "paper")
    fixed = ("network", "weights", "output_stride", "crop", "batch", "lr", "head_factor", "optimiser", "momentum",
             "nesterov", "weight_decay", "schedule", "ema", "blur", "precision")  # fmt: skip
    assert tuple(getattr(recipe, name) for name in fixed) == (
        "mobilenetv2_100", "pretrained", 16, 513, 12, 7e-3, 10.0, "sgd", 0.9, False, 5e-4, "poly-0.9", 0.0, True,
        "fp32",
    )  # fmt: skip
    assert recipe.epoch_steps == math.ceil(10_582 / 12) == math.ceil(10_581 / 12), "of either count of images"
    assert recipe.start_steps == recipe.steps == 52_920, "60 epochs of 882 steps each"
    assert (recipe.scale_low, recipe.scale_high, recipe.width) == (0.5, 2.0, 3), "short sides of 256 to 1026 px"
    assert recipe.eval_every == recipe.checkpoint_every == recipe.epoch_steps and recipe.images == recipe.tests == 0


def test_second_stages_have_the_released_learning_rates():
    rates = {method: resolved(method, "voc", 100, "paper") for method in METHODS}
    assert {method: recipe.lr * recipe.method.rate for method, recipe in rates.items()} == pytest.approx(
        {"partial_ce": 7e-4, "dense_gd": 7e-3, "grid_gd": 7e-7, "adm": 7e-4, "trust_region": 7e-4,
         "robust_trust_region": 7e-4, "full": 7e-4}
    )  # fmt: skip


@pytest.mark.parametrize(("length", "published", "rescaled", "gamma"), LENGTHS, ids=str)
def test_epsilon_and_gamma_follow_the_length_and_epsilon_the_classes(length, published, rescaled, gamma):
    for data, scale, epsilon, classes in (("voc", "paper", published, 21), ("voc", "mini", published, 21),
                                          ("scenes", "mini", rescaled, 6)):  # fmt: skip
        robust, plain = (resolved(method, data, length, scale).method for method in REGION[::-1])
        assert robust.epsilon == pytest.approx(epsilon, abs=1e-6) and plain.epsilon == 0
        assert robust.gamma == plain.gamma == gamma
        outlier_model(robust.epsilon, classes)  # raises above the limit of that many classes


def test_lengths_are_those_that_data_and_settings_know():
    assert [length / 100 for length in scribbles.LENGTHS] == list(DRAWN)
    assert sorted(row[0] for row in LENGTHS) == list(scribbles.LENGTHS)


@pytest.mark.parametrize("scale", ["mini", "tiny"])
@pytest.mark.parametrize("data", ["scenes", "voc"])
@pytest.mark.parametrize("method", METHODS)
def test_small_recipes_share_everything_that_the_comparison_rests_on(method, data, scale):
    """One budget, network, views, optimiser and first stage for all."""
    recipe, partial = resolved(method, data, 50, scale), resolved("partial_ce", data, 50, scale)
    assert {name for name, value in vars(recipe).items() if value != getattr(partial, name)} <= {"method"}
    assert (recipe.network, recipe.crop, recipe.threads) == ("resnet-mini", 64, 1)
    assert recipe.start_steps + recipe.steps == (360 if scale == "mini" else 6)
    assert (recipe.images > 0) == (data == "scenes") and recipe.tests > 0


@pytest.mark.parametrize("method", METHODS)
def test_small_scales_change_numbers_only(method):
    paper = resolved(method, "voc", 30, "paper")
    for scale in ("mini", "tiny"):
        small = resolved(method, "voc", 30, scale)
        changed = {f.name for f in dataclasses.fields(small) if getattr(small, f.name) != getattr(paper, f.name)}
        assert changed - {"method"} <= set(scribbles.MINI) | set(scribbles.TINY) | set(scribbles.FILES)
        assert "output_stride" not in changed
        settings = {name for name, value in vars(small.method).items() if value != getattr(paper.method, name)}
        fitted = {"weight", "sigma_xy"} if method == "dense_gd" else set()
        assert settings == fitted | set(scribbles.SMALL.get(method, {}))


def test_stage_a_runs_twice_in_a_mini_run():
    for method in REGION:
        recipe = resolved(method)
        epochs = -(-recipe.steps // recipe.epoch_steps)
        assert recipe.epoch_steps == 500 // 12 and len(range(0, epochs, recipe.method.refresh)) == 2
        paper = resolved(method, "voc", 100, "paper")
        assert len(range(0, paper.steps // paper.epoch_steps, paper.method.refresh)) == 12


def test_small_crops_get_the_dense_energy_of_the_published_ones():
    """As many pairs times the weight; the same reach in shares of the crop."""
    paper, mini = (resolved("dense_gd", data, 100, scale) for data, scale in (("voc", "paper"), ("scenes", "mini")))
    assert (paper.method.weight, paper.method.sigma_rgb, paper.method.sigma_xy) == (2e-9, 15.0, 100.0)
    assert mini.method.weight * mini.crop**4 == pytest.approx(2e-9 * 513**4)
    assert mini.method.sigma_xy / mini.crop == pytest.approx(100 / 513) and mini.method.sigma_rgb == 15.0


def test_a_crop_of_a_file_shows_the_same_share_at_every_scale():
    paper, mini = (resolved("full", "voc", 100, scale) for scale in ("paper", "mini"))
    assert (mini.scale_low, mini.scale_high) == (paper.scale_low, paper.scale_high), "both are relative to the crop"
    assert mini.width == paper.width == 3 and resolved("full").width == 1


def test_full_supervision_has_one_recipe_for_all_lengths():
    assert len({resolved("full", labels=length) for length in scribbles.LENGTHS}) == 1


@pytest.mark.parametrize(
    ("data", "labels", "changes", "message"),
    [
        ("scenes", 40, {}, r"labels is 40; it is the length of scenes's scribbles in percent: 0, 30, 50, 80, 100"),
        ("voc", 1, {}, r"labels is 1; .*0, 30, 50, 80, 100 \(0: a click\)"),
        ("scenes", 30, {"network": "wrn-28-2"}, "unknown network 'wrn-28-2'.*known: mobilenetv2_100, resnet-mini"),
        ("scenes", 30, {"scale_low": 2.5}, "scale_low is 2.5, above scale_high, 1.5"),
        ("scenes", 30, {"batch": 1}, "batch is 1; the pyramid's pooled branch needs at least 2"),
        ("scenes", 30, {"downscale": 65}, "downscale is 65; blocks must not be larger than the crop, 64"),
        ("scenes", 30, {"neighbours": 6}, "neighbours is 6; allowed: 4, 8"),
        ("scenes", 30, {"relaxation": "tv"}, "unknown setting of robust_trust_region 'relaxation'"),
    ],
)
def test_bad_input_is_refused_with_its_reason(data, labels, changes, message):
    with pytest.raises(SettingError, match=message):
        resolved("robust_trust_region", data, labels, **changes)


def test_scenes_have_no_paper_scale():
    with pytest.raises(SettingError, match="scenes have no published setting: use scale mini or tiny"):
        resolved("full", scale="paper")
