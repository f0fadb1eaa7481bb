"""Recipes: the published numbers cell by cell, and what is refused before anything runs."""

import dataclasses
import math

import pytest

from repro.data.folders import MASK_SOURCES
from repro.data.scribbles import LENGTHS as DRAWN
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.methods import few_labels, few_masks, image_tags, scribbles
from repro.methods.scribbles.common import outlier_model
from repro.papers import recipes
from repro.settings import SettingError


def resolved(paper, method, data, labels, scale="mini", **changes):
    return resolve(Experiment(paper, method, data, labels, 0, scale, changes))


def fields(recipe, *names):
    return tuple(getattr(recipe, name) for name in names)


def differences(one, other) -> set[str]:
    return {field.name for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)}


# Few labels

NETWORKS = {  # network, weight decay, flip, padding, label budgets
    "cifar10": ("wrn-28-2", 5e-4, True, 4, (40, 250, 4000)),
    "cifar100": ("wrn-28-8", 1e-3, True, 4, (400, 2500, 10_000)),
    "svhn": ("wrn-28-2", 5e-4, False, 4, (40, 250, 1000)),
    "stl10": ("wrn-37-2", 5e-4, True, 12, (40, 250, 1000)),
}
PAIRED = {"mean_teacher", "mixmatch", "remixmatch", "pseudo_label"}


@pytest.mark.parametrize("data", NETWORKS)
@pytest.mark.parametrize("method", PAPERS["commatch"].spec.methods)
def test_paper_recipes_of_few_labels_have_the_published_numbers(method, data):
    network, weight_decay, flip, padding, budgets = NETWORKS[data]
    for labels in budgets:
        recipe = resolved("commatch", method, data, labels, "paper")
        assert (recipe.network, recipe.flip, recipe.padding) == (network, flip, padding)
        assert fields(recipe, "lr", "momentum", "nesterov", "bn_momentum") == (0.03, 0.9, True, 0.001)
        own = (0.0, 0.0, "ups", 64 if labels < 4000 else 128) if method == "ups" else (weight_decay, 0.999, "usb", 64)
        assert fields(recipe, "weight_decay", "ema", "variant", "batch") == own
        assert fields(recipe, "steps", "epoch_steps", "schedule") == (2**20, 1024, "cosine-7/16")
        assert recipe.unlabelled_ratio == (1 if method in PAIRED else 5)
        assert recipe.dropout == (0.3 if method in ("commatch", "ups") else 0.0)
        assert isinstance(recipe.method, few_labels.METHODS[method].Settings)


def test_commatch_has_what_the_text_states():
    settings = resolved("commatch", "commatch", "cifar10", 40, "paper").method
    stated = {
        "positive_start": 0.9, "positive_end": 0.95, "negative_start": 0.3, "negative_end": 3e-4, "threshold_epochs": 3,
        "positive_stability": 0.05, "negative_stability": 0.005, "passes": 10,
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in stated} == stated
    assert settings.positive_weight < settings.negative_weight


@pytest.mark.parametrize("data", NETWORKS)
def test_calibratemixs_recipe_is_the_released_one(data):
    recipe = resolved("calibratemix", "calibratemix", data, 1000, "paper")
    assert fields(recipe, "network", "weight_decay") == NETWORKS[data][:2]
    assert fields(recipe, "batch", "unlabelled_ratio", "steps", "ema") == (64, 7, 2**20, 0.999)
    assert fields(recipe.method, "base", "warmup", "delta") == ("softmatch", 150_000, 0.997)
    assert fields(recipe.method, "beta_alpha", "pool", "mixed_loss") == (0.4, 15, "bce")


# Few masks: data, crop, epochs, rate of the backbone, factor of the head, loss on labels, side of the window (0: whole
# images); then {masks: unlabelled images}. COCO's rate is an assumption.
MASKS = [
    ("voc", 321, 80, 0.001, 10.0, "ce", 0, {92: 10_490, 183: 10_399, 366: 10_216, 732: 9_850, 1464: 9_118, 662: 9_920,
                                            1323: 9_259, 2646: 7_936}),
    ("cityscapes", 801, 240, 0.005, 1.0, "ohem", 801, {100: 2_875, 186: 2_789, 372: 2_603, 744: 2_231, 1488: 1_487}),
    ("coco2017", 513, 30, 0.004, 10.0, "ce", 0, {232: 118_055, 463: 117_824, 925: 117_362, 1849: 116_438,
                                                 3697: 114_590}),
]  # fmt: skip


@pytest.mark.parametrize(("data", "crop", "epochs", "lr", "head", "loss", "window", "budgets"), MASKS, ids=str)
def test_paper_recipes_of_few_masks_have_the_published_numbers(
    data, crop, epochs, lr, head, loss, window, budgets
):
    assert set(budgets) == set(recipes.MASK_BUDGETS[data]) == set(MASK_SOURCES[data].budgets.values())
    for method in few_masks.METHODS:
        for masks, unlabelled in budgets.items():
            recipe = resolved("csl", method, data, masks, "paper")
            assert masks + unlabelled == recipes.MASK_TRAINING[data] == max(MASK_SOURCES[data].counts.values())
            stated = (crop, lr, head, loss, window)
            assert fields(recipe, "crop", "lr", "head_factor", "labelled_loss", "window") == stated
            assert fields(recipe, "batch", "unlabelled_ratio") == (8, 1)
            assert fields(recipe, "steps", "epoch_steps") == (unlabelled // 8 * epochs, unlabelled // 8)
            assert recipe.eval_every == recipe.checkpoint_every == recipe.epoch_steps, "once an epoch"
            assert recipe.output_stride == (8 if method == "csl" else 16)
            assert fields(
                recipe, "network", "weights", "scale_low", "scale_high", "optimiser", "momentum", "nesterov",
                "weight_decay", "schedule", "warmup_steps", "ema", "precision",
            ) == (
                "resnet101s", "pretrained", 0.5, 2.0, "sgd", 0.9, False, 1e-4, "poly-0.9", 0, 0.0, "bf16",
            )  # fmt: skip
            if method in ("fixmatch", "unimatch"):
                assert recipe.method.threshold == (0.0 if data == "cityscapes" else 0.95)
            else:
                assert recipe.method == few_masks.METHODS[method].Settings(), "CSL: alpha 8, blocks of 32, ratio .7"
    assert resolved("csl", "csl", "voc", 1464, "paper").steps == 91_120, "by hand: 9,118 // 8 = 1,139 steps an epoch"
    everything = resolved("csl", "supervised", "voc", 10_582, "paper")
    assert fields(everything, "epoch_steps", "steps") == (10_582 // 8, 10_582 // 8 * 80)


# Image tags: method, data, batch, steps, learning rate, crop, CAM scales, high, low, beta, colours.
COUNTS = {"voc": 10_582, "coco2014": 82_081}
TAGS = [
    ("pcre", "voc", 4, 20_000, 3e-5, 448, (1, 0.5, 0.75, 1.5), 0.7, 0.25, 0.5, True),
    ("pcre", "coco2014", 8, 80_000, 6e-5, 448, (1, 0.5, 0.75, 1.5), 0.7, 0.25, 0.5, False),
    ("toco", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("toco", "coco2014", 8, 80_000, 6e-5, 448, (1, 0.5, 1.5), 0.65, 0.25, 0.45, False),
    ("dupl", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("plain", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("afa", "voc", 4, 20_000, 6e-5, 320, (1, 0.5, 1.5), 0.55, 0.35, 0.45, False),
]


@pytest.mark.parametrize(("method", "data", "batch", "steps", "lr", "crop", "scales", "high", "low", "beta", "colour"),
                         TAGS, ids=str)  # fmt: skip
def test_paper_recipes_of_image_tags_have_the_published_numbers(
    method, data, batch, steps, lr, crop, scales, high, low, beta, colour
):
    recipe = resolved("pcre", method, data, COUNTS[data], "paper")
    assert fields(recipe, "batch", "steps", "lr", "crop", "scales") == (batch, steps, lr, crop, scales)
    assert fields(recipe, "cam_high", "cam_low", "beta", "colour") == (high, low, beta, colour)
    assert fields(recipe, "network", "weights", "auxiliary") == ("vit_base_patch16_224", "pretrained", -3)
    assert fields(recipe, "optimiser", "weight_decay", "schedule") == ("adamw", 0.01, "warmup-poly-0.9")
    assert fields(recipe, "warmup_steps", "warm_up", "head_factor", "ema") == (1500, 0.1, 10.0, 0.0)
    assert fields(recipe, "scale_low", "scale_high", "precision") == (0.5, 2.0, "fp32")
    assert recipe.value_only == (method == "pcre")


def test_coco_changes_the_weights_that_its_script_changes():
    voc, coco = (resolved("pcre", "pcre", data, n, "paper").method for data, n in COUNTS.items())
    changed = {name: getattr(coco, name) for name in differences(coco, voc)}
    assert changed == {"cpe_weight": 0.5, "ptc_weight": 0.2, "prototype_momentum": 0.9, "prototype_high": 0.9}
    assert resolved("pcre", "toco", "coco2014", 82_081, "paper").method.temperature == 1.0


# Scribbles: length, epsilon at C = 21 and at C = 6 by hand, (C - 1) / (C + r) with r = b / a, and gamma.
LENGTHS = [
    (100, 0.9440, 5 / 6.186441, 0.05),
    (80, 0.9460, 5 / 6.141649, 0.075),
    (50, 0.9514, 5 / 6.021652, 0.1),
    (30, 0.9516, 5 / 6.017234, 0.1),
    (0, 0.9522, 5 / 6.003991, 0.1),
]
REGION = ("trust_region", "robust_trust_region")


@pytest.mark.parametrize("method", scribbles.METHODS)
def test_paper_recipes_of_scribbles_have_the_released_numbers(method):
    recipe = resolved("trust_region", method, "voc", 100, "paper")
    assert fields(
        recipe, "network", "weights", "output_stride", "crop", "batch", "lr", "head_factor", "optimiser", "momentum",
        "nesterov", "weight_decay", "schedule", "ema", "blur", "precision",
    ) == ("mobilenetv2_100", "pretrained", 16, 513, 12, 7e-3, 10.0, "sgd", 0.9, False, 5e-4, "poly-0.9", 0.0, True,
          "fp32")  # fmt: skip
    assert recipe.epoch_steps == math.ceil(10_582 / 12) == math.ceil(10_581 / 12), "of either count of images"
    assert recipe.start_steps == recipe.steps == 52_920, "60 epochs of 882 steps each"
    assert fields(recipe, "scale_low", "scale_high", "width") == (0.5, 2.0, 3), "short sides of 256 to 1026 px"
    assert recipe.eval_every == recipe.checkpoint_every == recipe.epoch_steps and recipe.images == recipe.tests == 0
    rate = {"dense_gd": 7e-3, "grid_gd": 7e-7}.get(method, 7e-4)
    assert recipe.lr * recipe.method.rate == pytest.approx(rate), "of the second stage"


@pytest.mark.parametrize(("length", "published", "rescaled", "gamma"), LENGTHS, ids=str)
def test_epsilon_and_gamma_follow_the_length_and_epsilon_the_classes(length, published, rescaled, gamma):
    for data, scale, epsilon, classes in (("voc", "paper", published, 21), ("voc", "mini", published, 21),
                                          ("scenes", "mini", rescaled, 6)):  # fmt: skip
        plain, robust = (resolved("trust_region", method, data, length, scale).method for method in REGION)
        assert robust.epsilon == pytest.approx(epsilon, abs=1e-6) and plain.epsilon == 0
        assert robust.gamma == plain.gamma == gamma
        outlier_model(robust.epsilon, classes)  # raises above the limit of that many classes


def test_small_crops_get_the_dense_energy_of_the_published_ones():
    """As many pairs times the weight; the same reach in shares of the crop."""
    paper, mini = (resolved("trust_region", "dense_gd", data, 100, scale)
                   for data, scale in (("voc", "paper"), ("scenes", "mini")))  # fmt: skip
    assert fields(paper.method, "weight", "sigma_rgb", "sigma_xy") == (2e-9, 15.0, 100.0)
    assert mini.method.weight * mini.crop**4 == pytest.approx(2e-9 * 513**4)
    assert mini.method.sigma_xy / mini.crop == pytest.approx(100 / 513) and mini.method.sigma_rgb == 15.0


def test_stage_a_runs_twice_in_a_mini_run_and_twelve_times_in_a_published_one():
    for method in REGION:
        mini, paper = (resolved("trust_region", method, data, 100, scale)
                       for data, scale in (("scenes", "mini"), ("voc", "paper")))  # fmt: skip
        assert mini.epoch_steps == 500 // 12
        assert len(range(0, -(-mini.steps // mini.epoch_steps), mini.method.refresh)) == 2
        assert len(range(0, paper.steps // paper.epoch_steps, paper.method.refresh)) == 12


def test_scribble_lengths_are_those_that_are_drawn_and_full_supervision_ignores_them():
    assert [length / 100 for length in recipes.SCRIBBLE_LENGTHS] == list(DRAWN)
    assert len({resolved("trust_region", "full", "scenes", length) for length in recipes.SCRIBBLE_LENGTHS}) == 1


# Small scales change numbers only; settings of a method only where they count steps, pixels or patches

SIZES = {"network", "crop", "batch", "lr", "steps", "epoch_steps", "eval_every", "log_every", "checkpoint_every",
         "precision", "threads", "images", "tests", "method"}  # fmt: skip
OF_MASKS = SIZES | {"output_stride"}
OF_TAGS = SIZES | {"warmup_steps", "cam_scales", "colour", "scale_low", "scale_high", "cam_low", "cam_high", "beta",
                   "value_only"}  # fmt: skip
OF_SCRIBBLES = SIZES | {"start_steps", "head_factor", "scale_low", "scale_high", "blur", "width", "workers"}
KINDS = [
    *(("csl", method, "scenes", 20, "voc", 183, OF_MASKS, {"block"} if method == "csl" else set())
      for method in few_masks.METHODS),
    *(("pcre", method, "scenes", 500, "voc", 10_582, OF_TAGS, set(recipes.TAG_SMALL.get(method, {})))
      for method in image_tags.METHODS),
    *(("trust_region", method, "scenes", 30, "voc", 30, OF_SCRIBBLES, set(recipes.SCRIBBLE_SMALL.get(method, {}))
       | ({"weight", "sigma_xy"} if method == "dense_gd" else set()) | {"epsilon"})
      for method in scribbles.METHODS),
]  # fmt: skip


@pytest.mark.parametrize(("paper", "method", "data", "labels", "large", "budget", "sizes", "own"), KINDS)
def test_small_scales_change_sizes_lengths_and_what_counts_pixels(
    paper, method, data, labels, large, budget, sizes, own
):
    published = resolved(paper, method, large, budget, "paper")
    mini, tiny = (resolved(paper, method, data, labels, scale) for scale in ("mini", "tiny"))
    for small in (mini, tiny):
        assert differences(small, published) <= sizes
        assert differences(small.method, published.method) <= own
        assert small.images > 0 and small.tests > 0 and small.threads == 1
    assert tiny.steps < mini.steps and tiny.images <= mini.images
    assert mini.steps % mini.eval_every == 0 and 3 <= mini.steps // mini.eval_every <= 10, "each is kept as a moment"
    of_files = resolved(paper, method, large, budget)
    assert (of_files.network, of_files.crop, of_files.steps) == (mini.network, mini.crop, mini.steps)


@pytest.mark.parametrize("scale", ["mini", "tiny"])
@pytest.mark.parametrize(
    ("paper", "data", "labels", "plain", "own"),
    [
        ("pcre", "scenes", 500, "plain", {"afa": {"cam_high", "cam_low", "beta", "value_only"}}),
        ("trust_region", "scenes", 50, "partial_ce", {}),
        ("trust_region", "voc", 50, "partial_ce", {}),
    ],
)
def test_small_recipes_share_everything_that_the_comparison_rests_on(paper, data, labels, plain, own, scale):
    """One budget, network, views and optimiser for all methods of a paper."""
    base = resolved(paper, plain, data, labels, scale)
    for method in PAPERS[paper].spec.methods:
        recipe = resolved(paper, method, data, labels, scale)
        assert differences(recipe, base) <= {"method"} | own.get(method, set())


def test_a_crop_of_a_file_shows_the_same_share_of_its_image_at_every_scale():
    for data, (masks, *_) in recipes.MASK_BUDGETS.items():
        if data != "scenes":
            paper, mini = (resolved("csl", "csl", data, masks, scale) for scale in ("paper", "mini"))
            for side in ("scale_low", "scale_high"):
                assert getattr(paper, side) / 321 == pytest.approx(getattr(mini, side) / 64, rel=0.1)
    paper, mini = (resolved("trust_region", "full", "voc", 100, scale) for scale in ("paper", "mini"))
    assert fields(mini, "scale_low", "scale_high", "width") == fields(paper, "scale_low", "scale_high", "width")


def test_any_number_of_scenes_can_be_shown():
    assert resolved("csl", "csl", "scenes", 7) == resolved("csl", "csl", "scenes", 10)
    assert resolved("pcre", "pcre", "scenes", 1).batch == resolved("pcre", "pcre", "scenes", 500).batch


@pytest.mark.parametrize(
    ("paper", "method", "data", "labels", "changes", "message"),
    [
        ("csl", "csl", "scenes", 0, {}, "labels is 0; it is the number of masks shown, at least 1"),
        ("csl", "csl", "voc", 0, {}, "the published lists of voc show 92, 183, 366, 662, 732, 1323, 1464, 2646, 10582"),
        ("csl", "csl", "voc", 91, {}, "labels is 91; the published lists of voc show 92, 183"),
        ("csl", "csl", "cityscapes", 187, {}, "lists of cityscapes show 100, 186, 372, 744, 1488, 2975"),
        ("csl", "csl", "coco2017", 92, {}, "lists of coco2017 show 232, 463, 925, 1849, 3697, 118287 masks"),
        ("csl", "csl", "scenes", 20, {"network": "wrn-28-2"}, "unknown network 'wrn-28-2'.*known: resnet-mini"),
        ("csl", "csl", "scenes", 20, {"scale_low": 2.5}, "scale_low is 2.5, above scale_high, 2.0"),
        ("csl", "csl", "scenes", 20, {"batch": 1}, "batch is 1; the pyramid's pooled branch needs at least 2"),
        ("csl", "csl", "scenes", 20, {"block": 128}, "block is 128; it must be below twice the crop, 64"),
        ("csl", "csl", "scenes", 20, {"output_stride": 4}, "output_stride is 4; allowed: 8, 16"),
        ("csl", "csl", "scenes", 20, {"labelled_loss": "focal"}, "labelled_loss is 'focal'; allowed: 'ce', 'ohem'"),
        ("csl", "csl", "scenes", 20, {"bn_momentum": 0.1}, "unknown setting of csl 'bn_momentum'"),
        ("csl", "csl", "scenes", 20, {"crop": 8}, "crop is 8; it must lie in"),
        ("pcre", "pcre", "scenes", 501, {}, "labels is 501; it is the number of scenes whose tags are shown, 1 to 500"),
        ("pcre", "pcre", "scenes", 0, {}, "labels is 0"),
        ("pcre", "pcre", "voc", 92, {}, "papers show the tags of all 10582 images of voc"),
        ("pcre", "pcre", "scenes", 500, {"network": "resnet-mini"}, "unknown network 'resnet-mini'"),
        ("pcre", "pcre", "scenes", 500, {"scale_low": 3.0}, "scale_low is 3.0, above scale_high"),
        ("pcre", "pcre", "scenes", 500, {"cam_scales": "1,0.05"}, "makes 3 px of a crop, less than a patch of 4"),
        ("pcre", "plain", "scenes", 500, {"tau": 0.5}, "unknown setting of plain 'tau'"),
        ("trust_region", "full", "scenes", 40, {}, r"scenes's scribbles in percent: 0, 30, 50, 80, 100 \(0: a click\)"),
        ("trust_region", "full", "scenes", 30, {"network": "wrn-28-2"}, "known: mobilenetv2_100, resnet-mini"),
        ("trust_region", "full", "scenes", 30, {"scale_low": 2.5}, "scale_low is 2.5, above scale_high, 1.5"),
        ("trust_region", "full", "scenes", 30, {"batch": 1}, "the pyramid's pooled branch needs at least 2"),
        ("trust_region", REGION[1], "scenes", 30, {"downscale": 65}, "blocks must not be larger than the crop, 64"),
        ("trust_region", REGION[1], "scenes", 30, {"neighbours": 6}, "neighbours is 6; allowed: 4, 8"),
        ("trust_region", REGION[1], "scenes", 30, {"relaxation": "tv"}, "unknown setting of robust_trust_region"),
        *((paper, method, "scenes", labels, {"scale": "paper"}, "scenes have no published setting: use scale mini")
          for paper, method, labels in (("csl", "csl", 20), ("pcre", "pcre", 500), ("trust_region", "full", 30))),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_reason(paper, method, data, labels, changes, message):
    with pytest.raises(SettingError, match=message):
        resolved(paper, method, data, labels, **{"scale": "mini" if data == "scenes" else "paper"} | changes)
