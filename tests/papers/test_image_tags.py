"""Recipes for image tags: the published numbers cell by cell, and what is refused before anything runs."""

import pytest

from repro.experiment import Experiment, resolve
from repro.methods.image_tags import METHODS
from repro.papers import image_tags
from repro.settings import SettingError

COUNTS = {"voc": 10_582, "coco2014": 82_081}
# Method, data, batch, steps, learning rate, crop, CAM scales, high, low, beta, colours.
PUBLISHED = [
    ("pcre", "voc", 4, 20_000, 3e-5, 448, (1, 0.5, 0.75, 1.5), 0.7, 0.25, 0.5, True),
    ("pcre", "coco2014", 8, 80_000, 6e-5, 448, (1, 0.5, 0.75, 1.5), 0.7, 0.25, 0.5, False),
    ("toco", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("toco", "coco2014", 8, 80_000, 6e-5, 448, (1, 0.5, 1.5), 0.65, 0.25, 0.45, False),
    ("dupl", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("plain", "voc", 4, 20_000, 6e-5, 448, (1, 0.5, 1.5), 0.7, 0.25, 0.5, False),
    ("afa", "voc", 4, 20_000, 6e-5, 320, (1, 0.5, 1.5), 0.55, 0.35, 0.45, False),
]


@pytest.mark.parametrize(
    ("method", "data", "batch", "steps", "lr", "crop", "scales", "high", "low", "beta", "colour"), PUBLISHED, ids=str
)
def test_paper_recipes_have_the_published_numbers(
    method, data, batch, steps, lr, crop, scales, high, low, beta, colour
):
    recipe = resolve(Experiment("pcre", method, data, COUNTS[data], scale="paper"))
    assert (recipe.batch, recipe.steps, recipe.lr, recipe.crop, recipe.scales) == (batch, steps, lr, crop, scales)
    assert (recipe.cam_high, recipe.cam_low, recipe.beta, recipe.colour) == (high, low, beta, colour)
    assert (recipe.network, recipe.weights, recipe.auxiliary) == ("vit_base_patch16_224", "pretrained", -3)
    assert (recipe.optimiser, recipe.weight_decay, recipe.schedule) == ("adamw", 0.01, "warmup-poly-0.9")
    assert (recipe.warmup_steps, recipe.warm_up, recipe.head_factor, recipe.ema) == (1500, 0.1, 10.0, 0.0)
    assert (recipe.scale_low, recipe.scale_high, recipe.precision) == (0.5, 2.0, "fp32")
    assert recipe.value_only == (method == "pcre")


def test_coco_changes_the_weights_that_its_script_changes():
    voc, coco = (resolve(Experiment("pcre", "pcre", data, n, scale="paper")).method for data, n in COUNTS.items())
    changed = {name: value for name, value in vars(coco).items() if value != getattr(voc, name)}
    assert changed == {"cpe_weight": 0.5, "ptc_weight": 0.2, "prototype_momentum": 0.9, "prototype_high": 0.9}
    assert resolve(Experiment("pcre", "toco", "coco2014", 82_081, scale="paper")).method.temperature == 1.0


@pytest.mark.parametrize("scale", ["mini", "tiny"])
@pytest.mark.parametrize("method", METHODS)
def test_small_recipes_share_everything_that_the_comparison_rests_on(method, scale):
    recipe = resolve(Experiment("pcre", method, "scenes", 500, scale=scale))
    plain = resolve(Experiment("pcre", "plain", "scenes", 500, scale=scale))
    own = {"method"} | ({"cam_high", "cam_low", "beta", "value_only"} if method == "afa" else set())
    differ = {name for name, value in vars(recipe).items() if value != getattr(plain, name)}
    assert differ <= own, "one budget, network, views and optimiser for all"
    assert recipe.network == "vit-mini" and recipe.threads == 1 and recipe.images == 500


def test_mini_warms_up_before_the_head_learns_and_is_evaluated_at_its_end():
    for method in METHODS:
        recipe = resolve(Experiment("pcre", method, "scenes", 500))
        assert recipe.steps % recipe.eval_every == recipe.steps % recipe.checkpoint_every == 0
        assert 3 <= recipe.steps // recipe.eval_every <= 10, "every evaluation is kept as a moment"
        assert recipe.warmup_steps <= recipe.warm_up * recipe.steps
        published = resolve(Experiment("pcre", method, "voc", COUNTS["voc"], scale="paper"))
        assert recipe.head_factor == published.head_factor and recipe.lr > published.lr
        assert recipe.value_only == (method != "afa") and recipe.weights == "pretrained"


def test_small_recipes_keep_every_weight_of_a_loss():
    for method in METHODS:
        small = resolve(Experiment("pcre", method, "scenes", 500)).method
        published = METHODS[method].Settings()
        changed = {name for name, value in vars(small).items() if value != getattr(published, name)}
        assert changed == set(image_tags.SMALL.get(method, {}))
        assert not any(name.endswith("weight") for name in changed)


def test_a_published_data_set_shows_all_tags_and_scenes_up_to_500():
    image_tags.check_budget("scenes", 1)
    image_tags.check_budget("coco2014", 82_081)
    with pytest.raises(SettingError, match="labels is 501; it is the number of scenes whose tags are shown, 1 to 500"):
        Experiment("pcre", "pcre", "scenes", 501)
    with pytest.raises(SettingError, match="labels is 0"):
        Experiment("pcre", "pcre", "scenes", 0)
    with pytest.raises(SettingError, match="papers show the tags of all 10582 images of voc"):
        Experiment("pcre", "pcre", "voc", 92, scale="paper")


def test_what_does_not_fit_is_refused_before_anything_runs():
    pcre = Experiment("pcre", "pcre", "scenes", 500)
    with pytest.raises(SettingError, match="unknown network 'resnet-mini'"):
        pcre.with_(network="resnet-mini")
    with pytest.raises(SettingError, match="scale_low is 3.0, above scale_high"):
        pcre.with_(scale_low=3.0)
    with pytest.raises(SettingError, match="smallest of cam_scales makes 3 px of a crop, less than a patch of 4"):
        pcre.with_(cam_scales="1,0.05")
    with pytest.raises(SettingError, match="scenes have no published setting"):
        pcre.with_(scale="paper")
    with pytest.raises(SettingError, match="unknown setting of plain 'tau'"):
        Experiment("pcre", "plain", "scenes", 500, overrides={"tau": 0.5})
