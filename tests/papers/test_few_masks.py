"""Recipes for few masks: the published numbers cell by cell, and what is refused before anything runs."""

import dataclasses

import pytest

from repro.data.masks_sources import MASK_SOURCES
from repro.experiment import Experiment, resolve
from repro.methods.few_masks import METHODS
from repro.papers import few_masks
from repro.settings import SettingError

# Released configurations, and the sizes of their splits: masks, unlabelled images, crop, epochs, rate of the backbone,
# factor of the head, loss on labels, side of the window (0: whole images). COCO's rate is an assumption.
PUBLISHED = [
    ("voc", 92, 10_490, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 183, 10_399, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 366, 10_216, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 732, 9_850, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 1464, 9_118, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 662, 9_920, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 1323, 9_259, 321, 80, 0.001, 10.0, "ce", 0),
    ("voc", 2646, 7_936, 321, 80, 0.001, 10.0, "ce", 0),
    ("cityscapes", 100, 2_875, 801, 240, 0.005, 1.0, "ohem", 801),
    ("cityscapes", 186, 2_789, 801, 240, 0.005, 1.0, "ohem", 801),
    ("cityscapes", 372, 2_603, 801, 240, 0.005, 1.0, "ohem", 801),
    ("cityscapes", 744, 2_231, 801, 240, 0.005, 1.0, "ohem", 801),
    ("cityscapes", 1488, 1_487, 801, 240, 0.005, 1.0, "ohem", 801),
    ("coco2017", 232, 118_055, 513, 30, 0.004, 10.0, "ce", 0),
    ("coco2017", 463, 117_824, 513, 30, 0.004, 10.0, "ce", 0),
    ("coco2017", 925, 117_362, 513, 30, 0.004, 10.0, "ce", 0),
    ("coco2017", 1849, 116_438, 513, 30, 0.004, 10.0, "ce", 0),
    ("coco2017", 3697, 114_590, 513, 30, 0.004, 10.0, "ce", 0),
]


@pytest.mark.parametrize(
    ("data", "masks", "unlabelled", "crop", "epochs", "lr", "head_factor", "loss", "window"), PUBLISHED, ids=str
)
def test_paper_recipes_have_the_published_numbers(data, masks, unlabelled, crop, epochs, lr, head_factor, loss, window):
    for method in METHODS:
        recipe = resolve(Experiment("csl", method, data, masks, scale="paper"))
        assert (recipe.crop, recipe.lr, recipe.head_factor) == (crop, lr, head_factor)
        assert (recipe.labelled_loss, recipe.window) == (loss, window)
        assert (recipe.batch, recipe.unlabelled_ratio) == (8, 1)
        assert (recipe.steps, recipe.epoch_steps) == (unlabelled // 8 * epochs, unlabelled // 8)
        assert recipe.eval_every == recipe.checkpoint_every == recipe.epoch_steps, "once an epoch"
        assert recipe.output_stride == (8 if method == "csl" else 16)
        fixed = ("network", "weights", "scale_low", "scale_high", "optimiser", "momentum", "nesterov", "weight_decay",
                 "schedule", "warmup_steps", "ema", "precision")  # fmt: skip
        assert tuple(getattr(recipe, name) for name in fixed) == (
            "resnet101s", "pretrained", 0.5, 2.0, "sgd", 0.9, False, 1e-4, "poly-0.9", 0, 0.0, "bf16",
        )  # fmt: skip
        if method in ("fixmatch", "unimatch"):
            assert recipe.method.threshold == (0.0 if data == "cityscapes" else 0.95)
        else:
            assert recipe.method == METHODS[method].Settings(), "CSL: alpha 8, blocks of 32, ratio .7"


def test_the_step_count_of_one_cell_by_hand():
    """9,118 // 8 = 1,139 steps an epoch."""
    assert resolve(Experiment("csl", "csl", "voc", 1464, scale="paper")).steps == 91_120


def test_every_published_list_has_a_row_and_sizes_are_those_of_the_sources():
    assert {(row[0], row[1]) for row in PUBLISHED} == {
        (data, count) for data in few_masks.TRAINING for count in few_masks.BUDGETS[data]
    }
    for data, masks, unlabelled, *_ in PUBLISHED:
        source = MASK_SOURCES[data]
        assert masks + unlabelled == few_masks.TRAINING[data] == max(source.counts.values())
        assert masks in source.budgets.values()
        assert set(few_masks.BUDGETS[data]) == set(source.budgets.values())


def test_all_masks_shown_make_an_epoch_of_the_whole_set():
    recipe = resolve(Experiment("csl", "supervised", "voc", 10_582, scale="paper"))
    assert (recipe.epoch_steps, recipe.steps) == (10_582 // 8, 10_582 // 8 * 80)


@pytest.mark.parametrize("method", METHODS)
def test_small_scales_change_numbers_only(method):
    """One code path: mini and tiny differ in sizes and lengths, never in what a method does."""
    paper, mini, tiny = (
        resolve(Experiment("csl", method, data, masks, scale=scale))
        for data, masks, scale in (("voc", 183, "paper"), ("scenes", 20, "mini"), ("scenes", 20, "tiny"))
    )
    assert (mini.network, mini.crop, mini.steps, mini.images, mini.tests) == ("resnet-mini", 64, 300, 500, 200)
    assert mini.output_stride == 16 and mini.window == 0 and mini.labelled_loss == "ce"
    sizes = {"network", "output_stride", "crop", "batch", "images", "tests", "lr", "steps", "epoch_steps", "eval_every",
             "log_every", "checkpoint_every", "precision", "threads", "method"}  # fmt: skip
    for recipe in (mini, tiny):
        changed = {f.name for f in dataclasses.fields(recipe) if getattr(recipe, f.name) != getattr(paper, f.name)}
        assert changed <= sizes
        settings = {k for k, v in vars(recipe.method).items() if v != vars(paper.method)[k]}
        assert settings == ({"block"} if method == "csl" else set())
    assert tiny.steps < mini.steps and tiny.images < mini.images and tiny.method == mini.method
    assert mini.steps % mini.eval_every == 0 and mini.steps // mini.eval_every == 10, "ten evaluations, ten moments"
    if method == "csl":
        assert mini.method.block == 8


@pytest.mark.parametrize(
    ("data", "masks", "changes", "message"),
    [
        ("scenes", 0, {}, "labels is 0; it is the number of masks shown, at least 1"),
        ("voc", 0, {}, "labels is 0; the published lists of voc show 92, 183, 366, 662, 732, 1323, 1464, 2646, 10582"),
        ("voc", 100, {}, "labels is 100; the published lists of voc show 92,"),
        ("cityscapes", 187, {}, "labels is 187; the published lists of cityscapes show 100, 186, 372, 744, 1488, 2975"),
        ("coco2017", 92, {}, "the published lists of coco2017 show 232, 463, 925, 1849, 3697, 118287 masks"),
        ("scenes", 20, {"network": "wrn-28-2"}, "unknown network 'wrn-28-2'.*known: resnet-mini, resnet101"),
        ("scenes", 20, {"scale_low": 2.5}, "scale_low is 2.5, above scale_high, 2.0"),
        ("scenes", 20, {"batch": 1}, "batch is 1; the pyramid's pooled branch needs at least 2"),
        ("scenes", 20, {"block": 128}, "block is 128; it must be below twice the crop, 64"),
        ("scenes", 20, {"output_stride": 4}, "output_stride is 4; allowed: 8, 16"),
        ("scenes", 20, {"labelled_loss": "focal"}, "labelled_loss is 'focal'; allowed: 'ce', 'ohem'"),
        ("scenes", 20, {"bn_momentum": 0.1}, "unknown setting of csl 'bn_momentum'"),
        ("scenes", 20, {"crop": 8}, "crop is 8; it must lie in"),
    ],
)
def test_bad_input_is_refused_with_its_reason(data, masks, changes, message):
    with pytest.raises(SettingError, match=message):
        Experiment("csl", "csl", data, masks, 0, "paper" if data != "scenes" else "mini", changes)


def test_a_scene_budget_need_not_be_published():
    assert resolve(Experiment("csl", "csl", "scenes", 7)) == resolve(Experiment("csl", "csl", "scenes", 10))


@pytest.mark.parametrize("data", few_masks.BUDGETS)
@pytest.mark.parametrize("method", ("supervised", "csl"))
def test_the_scale_decides_the_size_on_every_data_set(method, data):
    """Small scales have one network, crop and length, whatever the data; none of them is the published recipe."""
    labels = few_masks.BUDGETS[data][0]
    for scale, steps in (("tiny", 6), ("mini", 300)):
        small = few_masks.recipe(method, data, labels, scale)
        assert (small.network, small.crop, small.steps, small.output_stride) == ("resnet-mini", 64, steps, 16)
        assert (small.images > 0) == (small.tests > 0) == (data == "scenes")
        assert getattr(small.method, "block", 8) == 8
    if data == "scenes":
        with pytest.raises(SettingError, match="no published setting"):
            few_masks.recipe(method, data, labels, "paper")
    else:
        published = few_masks.recipe(method, data, labels, "paper")
        assert published.network == "resnet101s" and published.steps > 10_000
        # a crop of a file shows the same share of its image at every scale, to a tenth
        for side in ("scale_low", "scale_high"):
            assert getattr(published, side) / 321 == pytest.approx(getattr(small, side) / 64, rel=0.1)
