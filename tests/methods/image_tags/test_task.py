"""The task end to end on small scenes: what runs keep and measure, resuming, and masks that no method can reach."""

import dataclasses
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from repro import cam
from repro.data.masks import tags_of
from repro.data.scenes import scenes
from repro.experiment import TagRecipe
from repro.history import History
from repro.methods.image_tags import METHODS, task
from repro.methods.image_tags.task import cam_report, prepare, spread, thresholds
from repro.models.pretrained import WeightsError
from repro.models.vit import DILATIONS
from repro.runs import load_moments
from repro.settings import SettingError
from repro.training import Interrupted, Items, Now, seed_everything, train
from tests.methods.few_labels.test_task import NoWaiting
from tests.methods.image_tags.fakes import gradients, scene_stub

SIDE, IMAGES, TESTS, STEPS = 48, 24, 8, 6
SETTINGS = {
    "plain": {}, "toco": {"side": 16, "hidden": 32, "crops": 3}, "dupl": {"least": 20}, "pcre": {"resize": "group"},
}  # fmt: skip
TERMS = {
    "plain": {"tags", "tags_aux", "segmentation"},
    "toco": {"tags", "tags_aux", "segmentation", "patches", "crops"},
    "dupl": {"tags", "tags_aux", "segmentation", "patches", "apart", "consistency"},
    "pcre": {"tags", "tags_aux", "segmentation", "patches", "confidence", "prototypes", "refine"},
}
FAST = {
    "network": "vit-mini", "weights": "scratch", "crop": SIDE, "images": IMAGES, "tests": TESTS, "batch": 2,
    "steps": STEPS, "cam_scales": "1,0.5", "optimiser": "adamw", "lr": 1e-3, "schedule": "poly-0.9", "ema": 0.0,
    "precision": "fp32", "warm_up": 0.2, "eval_every": 3, "log_every": 1, "checkpoint_every": 2,
}  # fmt: skip


def recipe_of(method, **changes):
    settings = METHODS[method].Settings(**SETTINGS[method])
    return TagRecipe(method=settings, **FAST | changes)


def prepared(method, seed=0, **changes):
    recipe = recipe_of(method, **changes)
    seed_everything(seed)
    return prepare(scene_stub(method, seed), recipe, torch.device("cpu")), recipe


def trained(method, folder, seed=0, on_step=None):
    """A task, its trained network and history, and its outputs."""
    torch.set_num_threads(1)
    run, recipe = prepared(method, seed)
    network, history = train(
        run.method, run.pool, recipe, folder, seed=seed, evaluate=run.evaluate, monitor=run.monitor,
        generators=run.generators, moments=run.moments, on_step=on_step,
    )  # fmt: skip
    return SimpleNamespace(task=run, network=network, history=history, outputs=run.outputs(network), folder=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All four methods, undisturbed."""
    return {method: trained(method, tmp_path_factory.mktemp(method)) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_keeps_what_figures_need(runs, method):
    run = runs[method]
    kept = {name: (value.dtype, tuple(value.shape)) for name, value in run.outputs.items()}
    arrays = {
        "images": (torch.uint8, (3, SIDE, SIDE)), "truth": (torch.uint8, (SIDE, SIDE)), "tags": (torch.uint8, (5,)),
        "cam": (torch.float16, (5, SIDE, SIDE)),
    }  # fmt: skip
    pool = {f"pool_{name}": (dtype, (8, *shape)) for name, (dtype, shape) in arrays.items()}
    test = {f"test_{name}": (dtype, (TESTS, *shape)) for name, (dtype, shape) in arrays.items()}
    others = {"pool_index": (torch.int64, (8,)), "test_prediction": (torch.uint8, (TESTS, SIDE, SIDE))}
    assert kept == pool | test | others
    train_set, test_set, index = scenes("train", IMAGES, SIDE), scenes("test", TESTS, SIDE), run.outputs["pool_index"]
    assert index.tolist() == [0, 3, 6, 9, 13, 16, 19, 23]
    assert torch.equal(run.outputs["pool_images"], train_set.images[index])
    assert torch.equal(run.outputs["pool_truth"], train_set.masks[index])
    assert torch.equal(run.outputs["test_truth"], test_set.masks)
    assert torch.equal(run.outputs["test_tags"], tags_of(test_set.masks, 6)[:, 1:].byte())
    for name in ("pool_cam", "test_cam"):
        assert run.outputs[name].min() >= 0 and run.outputs[name].max() <= 1 and run.outputs[name].isfinite().all()
    moments = load_moments(run.folder)
    assert list(moments) == [3, 6] and all(list(arrays) == ["cam"] for arrays in moments.values())
    assert torch.equal(moments[6]["cam"], run.outputs["pool_cam"])
    assert not torch.equal(moments[3]["cam"], moments[6]["cam"])


@pytest.mark.parametrize("method", METHODS)
def test_the_history_tells_terms_by_stage(runs, method):
    rows = runs[method].history.of("train")
    late = {"consistency"}  # from 40 %, the third of six steps
    for row in rows:
        expected = TERMS[method] - (set() if row["step"] > 3 else late)
        if row["step"] <= 2:  # the warm-up's 20 %
            expected = expected - {"segmentation", "refine"}
        assert set(row["terms"]) == expected and row["pseudo"] == {}
        assert all(math.isfinite(value) for value in row["terms"].values())


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_those_of_the_saved_maps(runs, method):
    """Counted again pixel by pixel from CAMs (in half precision, so that a few pixels may differ) and predictions."""
    run = runs[method]
    measured = run.history.of("evaluation")[-1]["ema"]
    maps, tags, truth = (run.outputs[f"test_{name}"] for name in ("cam", "tags", "truth"))
    value, label = (maps.float() * tags[:, :, None, None]).max(1)
    cells = TESTS * SIDE**2
    for at, miou in ((0.5, measured["cam_miou"]), (0.2, measured["cam_curve"][20]), (0.9, measured["cam_curve"][90])):
        found = torch.where(value > at, label + 1, 0)
        counts = torch.zeros(6, 6, dtype=torch.long)
        counts.view(-1).scatter_add_(0, (truth.long() * 6 + found).flatten(), torch.ones(cells, dtype=torch.long))
        hits = counts.diagonal().double()
        scores = hits / (counts.sum(0) + counts.sum(1) - hits)
        assert scores[counts.sum(1) > 0].mean().item() == pytest.approx(miou, abs=5e-3)
        if at == 0.5:
            wrong = counts.sum(0) - hits
            spilled = measured["over_activation"]
            for name, expected in (("ratio", wrong / hits), ("share", wrong / (wrong + hits))):
                for ours, theirs in zip(spilled[name], expected.tolist(), strict=True):
                    assert not math.isfinite(theirs) if ours is None else ours == pytest.approx(theirs, rel=0.1)
            assert spilled["spill"][0] is None and len(spilled["spill"]) == 6
            difference = torch.tensor(measured["cam_confusion"]) - counts
            assert difference.abs().sum() <= 0.002 * cells and difference.sum() == 0
    assert len(measured["cam_curve"]) == 100 and measured["cam_curve"][50] == measured["cam_miou"]
    best = max(measured["cam_curve"])
    assert measured["cam_miou_best"] == best == measured["cam_curve"][round(100 * measured["cam_beta_best"])]
    hit = (run.outputs["test_prediction"] == truth).double().mean().item()
    assert measured["pixel_accuracy"] == pytest.approx(hit) and measured["pixels"] == cells
    assert len(measured["iou"]) == 6 and "ece_15" in measured and 0 <= measured["cam_miou_train"] <= 1
    live = run.history.of("evaluation")[-1]["live"]
    assert live == measured
    json.dumps(measured, allow_nan=False)


def test_the_cam_is_that_of_the_network_in_eval_mode_with_true_tags(runs):
    run = runs["pcre"]
    outputs, network = run.outputs, run.network
    assert network.fusing and not network.training
    x = run.task.method.views.plain(outputs["test_images"])
    with torch.no_grad():
        expected = network.activation(x, (1.0, 0.5), outputs["test_tags"].float())
        logits = network(x)
    assert torch.equal(outputs["test_cam"], expected.half())
    assert torch.equal(outputs["test_prediction"], logits.argmax(1).byte())
    # measuring leaves modes and weights alone
    run.task.method.train()
    state = {name: value.clone() for name, value in run.task.method.state_dict().items()}
    run.task.evaluate(run.task.method.network)
    assert all(module.training for module in run.task.method.modules())
    assert all(torch.equal(value, state[name]) for name, value in run.task.method.state_dict().items())


def test_train_images_are_measured_too(runs):
    run = runs["plain"]
    some = spread(IMAGES, TESTS)
    found = run.task.method.network.eval()
    train_set = scenes("train", IMAGES, SIDE)
    tags = tags_of(train_set.masks, 6)[some, 1:].float()
    with torch.no_grad():
        maps = found.activation(run.task.method.views.plain(train_set.images[some]), (1.0, 0.5), tags)
    counts = cam.threshold_counts(maps, tags, train_set.masks[some])
    expected = cam.curve_report(counts)["fixed"]["miou"]
    assert run.history.of("evaluation")[-1]["live"]["cam_miou_train"] == pytest.approx(expected, abs=1e-6)
    run.task.method.train()


# Weak supervision


@pytest.mark.parametrize("method", METHODS)
def test_no_method_can_reach_a_mask(method):
    run, recipe = prepared(method)
    train_set = scenes("train", IMAGES, SIDE)
    expected = tags_of(train_set.masks, 6)[:, 1:]
    assert torch.equal(run.pool.labels, expected.float()) and run.pool.labels.shape == (IMAGES, 5)
    assert run.monitor is None and torch.equal(run.pool.labelled, torch.arange(IMAGES))
    held = {name: value for name, value in vars(run.pool).items() if isinstance(value, torch.Tensor)}
    assert set(held) == {"images", "labels", "labelled", "unlabelled", "tags"}
    assert held["tags"].shape == (IMAGES, 6)
    masks = train_set.masks
    owned = [*run.method.state_dict().values(), *held.values()]
    assert not any(value.shape == masks.shape for value in owned)
    # a step gets images, tags and numbers, and the crop is asked for with an empty mask
    ((index, batch),) = run.method.streams(run.pool, recipe).values()
    given, crop = [], run.method.views.crop
    run.method.views.crop = lambda images, masks: given.append(masks) or crop(images, masks)
    samples = Items(index[:2], run.pool.images[:2], run.pool.labels[:2])
    run.method.losses({"tagged": samples}, Now(3, STEPS, 0, 0, None))
    assert batch == 2 and given and not any(masks.any() for masks in given)


def test_other_masks_with_the_same_tags_train_the_same_network(monkeypatch, tmp_path):
    """The truth is shuffled inside every image: terms and weights stay as they are, bit for bit."""
    plain = trained("pcre", tmp_path / "a")

    def shuffled(split, count, size):
        found = scenes(split, count, size)
        if split == "test":
            return found
        order = torch.randperm(size * size, generator=torch.Generator().manual_seed(0))
        return dataclasses.replace(found, masks=found.masks.flatten(1)[:, order].view_as(found.masks))

    monkeypatch.setattr(task, "scenes", shuffled)
    other = trained("pcre", tmp_path / "b")
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name
    pairs = zip(plain.history.of("train"), other.history.of("train"), strict=True)
    assert all(first["terms"] == second["terms"] for first, second in pairs)
    assert not torch.equal(plain.outputs["pool_truth"], other.outputs["pool_truth"])


# Repeating and resuming


def untimed(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history.rows]


def same(a, b):
    assert untimed(a.history) == untimed(b.history)
    for first, second in ((a.network.state_dict(), b.network.state_dict()), (a.outputs, b.outputs)):
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("method", ["pcre", "toco"])
@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_a_stopped_run_ends_as_if_undisturbed(runs, tmp_path, method, stop_at):
    """Before prototypes move, when they do, and when masks are mixed in; ToCo's teacher head comes back as well."""

    def stop(done, total, row):
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trained(method, tmp_path, on_step=stop)
    assert History(tmp_path).rows[-1]["step"] <= stop_at + 1
    same(trained(method, tmp_path), runs[method])


def test_another_seed_is_another_run(runs, tmp_path):
    other = trained("plain", tmp_path, seed=1)
    weight = "encoder.blocks.0.mlp.fc1.weight"
    assert not torch.equal(other.network.state_dict()[weight], runs["plain"].network.state_dict()[weight])


# Steps on the device


def one_batch(run, count=4):
    index = torch.arange(count)
    return {"tagged": Items(index, run.pool.images[index], run.pool.labels[index])}


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_on_the_host(method, step):
    run, _ = prepared(method)
    run.method.train()
    batch = one_batch(run)
    run.method.losses(batch, Now(step, STEPS, 0, 0, None))  # tables of neighbours are made once, on the host
    with NoWaiting():
        terms = run.method.losses(batch, Now(step, STEPS, 0, 0, None)).terms
        torch.stack([term.float() for term in terms.values()]).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_bf16_reaches_every_parameter_that_fp32_reaches(method):
    reached = {}
    for precision in ("fp32", "bf16"):
        run, _ = prepared(method)
        run.method.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            terms = run.method.losses(one_batch(run), Now(4, STEPS, 0, 0, None)).terms
        assert all(term.isfinite() for term in terms.values())
        reached[precision] = gradients(torch.stack([term.float() for term in terms.values()]).sum(), run.method)
    assert reached["bf16"] == reached["fp32"]
    learnable = {name for name, value in run.method.named_parameters() if value.requires_grad}
    weights = {name for name in learnable if name.endswith("weight")}
    assert weights <= reached["fp32"]


# The network


def test_the_network_is_the_method_s():
    heads = {"plain": "LargeFov", "toco": "LargeFov", "dupl": "LargeFov", "pcre": "DilatedHead"}
    for method in METHODS:
        network, weights = task.build(method, recipe_of(method), 5)
        trunks = [network.first, network.second] if method == "dupl" else [network]
        assert weights == {"source": "scratch"}
        for trunk in trunks:
            own = method == "pcre"
            assert trunk.encoder.class_tokens == (5 if own else 1) and trunk.encoder.value_only is own
            assert trunk.encoder.hidden == (5 if own else 0) and trunk.encoder.pos_embed.requires_grad is own
            assert trunk.classifier.out_features == 5 and type(trunk.head).__name__ == heads[method]
            assert trunk.encoder.auxiliary == trunk.encoder.depth - 3
    first, second = task.build("dupl", recipe_of("dupl"), 5)[0].children()
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_published_sizes():
    network, _ = task.build("pcre", recipe_of("pcre", network="vit_base_patch16_224", crop=64), 20)
    layer = network.decoder.layers.layers[0]
    assert layer.self_attn.num_heads == 8 and layer.linear1.out_features == 2048
    assert [branch.dilation[0] for branch in network.head.branches] == list(DILATIONS)
    assert network.decoder.pixels[2].num_groups == 32 and network.prototypes.shape == (20, 768)
    assert network.decoder.patch_embed.proj.kernel_size == (16, 16)


def test_the_recipe_s_number_of_classes_bounds_the_label_maps():
    run, _ = prepared("pcre")
    assert run.method.most == int(tags_of(scenes("train", IMAGES, SIDE).masks, 6)[:, 1:].sum(1).max())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": 0}, SettingError, "images is 0, tests 8: scenes need at least one of both"),
        ({"tests": 0}, SettingError, "tests 0: scenes need"),
        ({"crop": 32}, SettingError, "crop is 32; scenes are made at the crop's size, 48 to 128"),
        ({"cam_scales": ""}, SettingError, "scales are ''; they must be positive numbers between commas"),
        ({"cam_scales": "1,0"}, SettingError, "scales are '1,0'"),
        ({"cam_scales": "1,inf"}, SettingError, "scales are '1,inf'"),
        ({"cam_low": 0.8}, SettingError, "cam_low is 0.8, cam_high 0.7"),
        ({"weights": "nowhere.safetensors"}, WeightsError, "there is no file nowhere.safetensors"),
    ],
)
def test_bad_combinations_are_refused_before_training(changes, error, message):
    with pytest.raises(error, match=message):
        prepared("plain", **changes)


def test_other_data_sets_are_refused():
    with pytest.raises(SettingError, match="data is 'voc'; image tags are embedded for scenes only"):
        prepare(SimpleNamespace(method="plain", seed=0, data="voc"), recipe_of("plain"), torch.device("cpu"))


# Reports


def test_a_beta_between_whole_percents_is_measured_beside_the_curve():
    generator = torch.Generator().manual_seed(0)
    maps, tags = torch.rand(2, 3, 8, 8, generator=generator), torch.ones(2, 3)
    truth = torch.randint(0, 4, (2, 8, 8), generator=generator)
    at = thresholds(0.555)
    assert len(at) == 101 and at.index(0.555) == 56 and thresholds(0.5) == cam.THRESHOLDS
    report = cam_report(cam.threshold_counts(maps, tags, truth, at), 0.555)
    usual = cam_report(cam.threshold_counts(maps, tags, truth), 0.5)
    assert report["cam_curve"] == usual["cam_curve"] and len(report["cam_curve"]) == 100
    expected = cam.curve_report(cam.threshold_counts(maps, tags, truth, (0.555,)), (0.555,), 0.555)
    assert report["cam_miou"] == expected["fixed"]["miou"] and report["cam_miou"] != usual["cam_miou"]
    assert torch.tensor(report["cam_confusion"]).sum() == truth.numel()


def test_a_class_that_is_never_right_has_no_ratio():
    counts = torch.zeros(100, 3, 3, dtype=torch.long)
    counts[:, 0, 0], counts[:, 0, 1], counts[:, 2, 2] = 5, 3, 2
    spilled = cam_report(counts, 0.5)["over_activation"]
    assert spilled == {"ratio": [0.0, None, 0.0], "share": [0.0, 1.0, 0.0], "spill": [None, None, 0.0]}


def test_spread_takes_first_and_last():
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(2, 5).tolist() == [0, 1] and spread(1, 1).tolist() == [0]
