"""The task end to end on small scenes and on small folders of published sets: what runs keep and measure, resuming,
masks that no method can reach."""

import dataclasses
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from repro import cam
from repro.data import folders as masks_sources
from repro.data.catalogue import DataError
from repro.data.folders import MaskFolder, open_masks, open_tags
from repro.data.masks import choose, tags_of
from repro.data.scenes import scenes
from repro.measure.segmentation import confusion, iou, mean_iou
from repro.methods.image_tags import METHODS
from repro.methods.image_tags.pcre import refined_regions, shown_classes
from repro.models.pretrained import WeightsError
from repro.recipe import TagRecipe
from repro.runs import load_moments
from repro.settings import SettingError
from repro.tasks import tags as task
from repro.tasks.tags import cam_report, prepare, spread, thresholds
from repro.train import Interrupted, Items, Now, seed_everything, train
from tests.data import mask_fixtures
from tests.data.mask_fixtures import mask_of, name_of, size_of, small_voc, tag_coco, tag_voc, tags_of_number

SIDE, IMAGES, TESTS, STEPS = 48, 24, 8, 6
SETTINGS = {
    "plain": {}, "toco": {"side": 16, "hidden": 32, "crops": 3}, "dupl": {"least": 20}, "afa": {},
    "pcre": {"resize": "group"},
}  # fmt: skip
TERMS = {
    "plain": {"tags", "tags_aux", "segmentation"},
    "toco": {"tags", "tags_aux", "segmentation", "patches", "crops"},
    "dupl": {"tags", "tags_aux", "segmentation", "patches", "apart", "consistency"},
    "afa": {"tags", "tags_aux", "segmentation", "affinity"},
    "pcre": {"tags", "tags_aux", "segmentation", "patches", "confidence", "prototypes", "refine"},
}
FAST = {
    "network": "vit-mini", "weights": "scratch", "crop": SIDE, "images": IMAGES, "tests": TESTS, "batch": 2,
    "steps": STEPS, "cam_scales": "1,0.5", "optimiser": "adamw", "lr": 1e-3, "schedule": "poly-0.9", "ema": 0.0,
    "precision": "fp32", "warm_up": 0.2, "eval_every": 3, "log_every": 1, "checkpoint_every": 2,
}  # fmt: skip


def recipe_of(method, **changes):
    settings = METHODS[method].Settings(**SETTINGS[method])
    return TagRecipe(method=settings, **FAST | {"value_only": method == "pcre"} | changes)


def stub(method, seed=0, data="scenes", labels=IMAGES):
    """An experiment, as far as the task reads it."""
    return SimpleNamespace(method=method, seed=seed, data=data, labels=labels)


def prepared(method, seed=0, labels=IMAGES, data="scenes", root=None, **changes):
    recipe = recipe_of(method, **changes)
    seed_everything(seed)
    return prepare(stub(method, seed, data, labels), recipe, torch.device("cpu"), root), recipe


def trained(method, folder, seed=0, on_step=None, **options):
    """A task, its trained network and history, and its outputs."""
    torch.set_num_threads(1)
    run, recipe = prepared(method, seed, **options)
    network, history = train(
        run.method, run.pool, recipe, folder, seed=seed, evaluate=run.evaluate, monitor=run.monitor,
        generators=run.generators, moments=run.moments, on_step=on_step,
    )  # fmt: skip
    return SimpleNamespace(task=run, network=network, history=history, outputs=run.outputs(network), folder=folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All methods, undisturbed."""
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
    others |= {"ms_confusion": (torch.int64, (6, 6)), "crf_confusion": (torch.int64, (6, 6))}
    patches = SIDE // 4
    explored = {
        "scales": (torch.float32, (3,)), "cam": (torch.float16, (4, 2, 3, 5, SIDE, SIDE)),
        "gradcam": (torch.float16, (4, 5, SIDE, SIDE)), "rollout": (torch.float16, (4, SIDE, SIDE)),
    }  # fmt: skip
    if method == "pcre":
        explored["confidence"] = (torch.float32, (4, patches**2, 5))
        explored["masks"] = (torch.float16, (4, patches**2, patches, patches))
    assert kept == pool | test | others | {f"explore_{name}": value for name, value in explored.items()}
    train_set, test_set, index = scenes("train", IMAGES, SIDE), scenes("test", TESTS, SIDE), run.outputs["pool_index"]
    assert index.tolist() == [0, 3, 6, 9, 13, 16, 19, 23]
    assert torch.equal(run.outputs["pool_images"], train_set.images[index])
    assert torch.equal(run.outputs["pool_truth"], train_set.masks[index])
    assert torch.equal(run.outputs["test_truth"], test_set.masks)
    assert torch.equal(run.outputs["test_tags"], tags_of(test_set.masks, 6)[:, 1:].byte())
    for name in ("pool_cam", "test_cam"):
        assert run.outputs[name].min() >= 0 and run.outputs[name].max() <= 1 and run.outputs[name].isfinite().all()
    moments = load_moments(run.folder)
    own = {"regions", "radius"} if method == "pcre" else set()
    assert list(moments) == [3, 6] and all(set(arrays) == {"cam"} | own for arrays in moments.values())
    assert torch.equal(moments[6]["cam"], run.outputs["pool_cam"])
    assert not torch.equal(moments[3]["cam"], moments[6]["cam"])


@pytest.mark.parametrize("method", METHODS)
def test_the_history_tells_terms_by_stage(runs, method):
    rows = runs[method].history.of("train")
    late = {"consistency"}  # from 40 %, the third of six steps
    for row in rows:
        expected = TERMS[method] - (set() if row["step"] > 3 else late)
        if row["step"] <= 2:  # the warm-up's 20 %
            expected = expected - {"segmentation", "refine", "affinity"}
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
    assert set(held) == {"images", "labels", "labelled", "unlabelled"}
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


# Moments and final scores


def test_regions_are_read_behind_the_gate_of_the_last_step(runs):
    """One scale, no mirror image; the radius is that of the step before the evaluation."""
    run = runs["pcre"]
    network, settings = run.task.method.network, recipe_of("pcre").method
    moments, index = load_moments(run.folder), run.outputs["pool_index"]
    patches = SIDE // 4
    largest = max(1.0, 5 * patches / 28)
    growth = [(progress - 0.1) / 0.3 for progress in (2 / 6, 5 / 6)]
    expected = [1 + (largest - 1) * (1 - math.cos(math.pi * min(share, 1.0))) / 2 for share in growth]
    assert [moments[step]["radius"].item() for step in (3, 6)] == pytest.approx(expected)
    assert moments[3]["radius"].dtype == torch.float32 and moments[3]["radius"].ndim == 0
    radius, tags = moments[6]["radius"].item(), run.outputs["pool_tags"].float()
    network.eval()
    with torch.no_grad():
        x = run.task.method.views.plain(run.outputs["pool_images"])
        tokens = network.encoder(x)
        confidence, masks = network.decoder(x, tokens.patches, tokens.grid)
        for n in range(patches**2):
            for i in range(patches):
                for j in range(patches):
                    if (i - n // patches) ** 2 + (j - n % patches) ** 2 > radius**2:
                        masks[:, n, i, j] = 0
        pairs = shown_classes(tags)
        found = refined_regions(masks, confidence, pairs, tokens.grid, settings.expansion).masks
    regions = moments[6]["regions"]
    assert regions.shape == (8, 5, patches, patches) and regions.dtype == torch.float16
    assert regions.any() and not regions[tags == 0].any()
    for image in range(8):
        for place, channel in enumerate(pairs.classes[image].tolist()):
            if tags[image, channel]:
                torch.testing.assert_close(regions[image, channel].float(), found[image, place], rtol=1e-3, atol=1e-3)
    assert torch.equal(index, run.outputs["pool_index"])


@pytest.mark.parametrize(("options", "radius"), [({"gating": "none"}, 12.0), ({"r_max": 0.0}, 12.0)])
def test_without_a_gate_the_radius_is_the_side_of_the_grid(options, radius, monkeypatch):
    monkeypatch.setitem(SETTINGS, "pcre", SETTINGS["pcre"] | options)
    run, _ = prepared("pcre")
    index = run.pool.labelled[:4]
    batch = {"tagged": Items(index, run.pool.images[index], run.pool.labels[index])}
    run.method.losses(batch, Now(5, STEPS, 0, 0, None))
    found = run.moments(run.method.network)
    assert found["radius"].item() == radius and found["regions"].shape == (8, 5, 12, 12)


@pytest.mark.parametrize("method", METHODS)
def test_protocol_scores_follow_from_the_counts_and_are_made_once(runs, method):
    run = runs[method]
    scores = run.task.after(run.outputs)
    for name in ("ms", "crf"):
        counts = run.outputs[f"{name}_confusion"]
        assert counts.sum() == TESTS * SIDE**2
        assert scores[f"miou_{name}"] == mean_iou(counts).item()
        assert scores[f"iou_{name}"] == [None if math.isnan(value) else value for value in iou(counts).tolist()]
    truth = run.outputs["test_truth"].flatten()
    assert run.outputs["ms_confusion"].sum(1).tolist() == torch.bincount(truth.long(), minlength=6).tolist()
    json.dumps(scores, allow_nan=False)
    assert not any(name in run.history.of("evaluation")[-1]["live"] for name in scores)


def test_only_some_scenes_meet_the_crf(monkeypatch):
    monkeypatch.setattr(task, "CRF_SCENES", 3)
    run, _ = prepared("plain")
    outputs = run.outputs(run.method.network)
    truth = scenes("test", TESTS, SIDE).masks[[0, 3, 7]]
    rows = torch.bincount(truth.flatten().long(), minlength=6)
    assert outputs["crf_confusion"].sum(1).tolist() == rows.tolist()
    assert outputs["ms_confusion"].sum() == TESTS * SIDE**2


# Fewer tags


def test_hidden_tags_are_not_in_the_pool_and_not_trained_on():
    run, recipe = prepared("plain", labels=5, seed=3)
    expected = choose(IMAGES, 5, 3)[0]
    tags = tags_of(scenes("train", IMAGES, SIDE).masks, 6)[:, 1:].float()
    assert torch.equal(run.pool.labelled, expected) and torch.equal(run.pool.labels[expected], tags[expected])
    hidden = torch.ones(IMAGES, dtype=torch.bool)
    hidden[expected] = False
    assert not run.pool.labels[hidden].any() and run.pool.tags is None
    assert torch.equal(run.method.streams(run.pool, recipe)["tagged"][0], expected)
    outputs = run.outputs(run.method.network)
    assert torch.equal(outputs["pool_index"], expected) and torch.equal(outputs["pool_tags"], tags[expected].byte())
    digests = {prepared("plain", labels=labels, seed=seed)[0].data_digest for labels, seed in ((5, 3), (5, 4), (6, 3))}
    assert len(digests | {prepared("plain")[0].data_digest, prepared("plain", seed=1)[0].data_digest}) == 4


# Published sets in their folders

FILES = {"crop": 32, "images": 0, "tests": 0, "scale_low": 0.5, "scale_high": 1.0}
SMALL = {"toco": {"side": 8, "hidden": 32, "crops": 3}}


@pytest.fixture
def voc(monkeypatch, tmp_path):
    """Seven training images and three of val, without the package that CRFs of large images need."""
    monkeypatch.setattr("repro.tasks.tags.has_lattice", lambda: False)
    small_voc(monkeypatch, tmp_path, train=4, extra=3, val=3)
    tag_voc(tmp_path / "VOCdevkit" / "VOC2012")
    return tmp_path


def voc_tags(numbers):
    """(n, 20) by the annotations' names."""
    names = mask_fixtures.VOC_CLASSES[1:]
    return torch.tensor([[float(name in tags_of_number(number)) for name in names] for number in numbers])


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
@pytest.mark.parametrize("method", METHODS)
def test_training_on_voc_opens_no_mask(voc, tmp_path, monkeypatch, method):
    monkeypatch.setitem(SETTINGS, method, SETTINGS[method] | SMALL.get(method, {}))
    opened, decode = [], masks_sources.MASK_SOURCES["voc"].decode
    watched = dataclasses.replace(
        masks_sources.MASK_SOURCES["voc"], decode=lambda path: opened.append(path.stem) or decode(path)
    )
    monkeypatch.setitem(masks_sources.MASK_SOURCES, "voc", watched)
    run = trained(method, tmp_path / "run", labels=7, data="voc", root=voc, **FILES)
    assert set(opened) == {name_of(number) for number in (7, 8, 9)}
    measured = run.history.of("evaluation")[-1]["live"]
    assert measured["cam_miou_train"] is None and len(measured["iou"]) == 21
    pixels = sum(int((mask_of(number, 21) != 255).sum()) for number in (7, 8, 9))
    assert measured["pixels"] == pixels and measured["ignored"] > 0
    assert torch.tensor(measured["cam_confusion"]).sum() == pixels
    assert (run.outputs["pool_truth"] == 255).all() and run.outputs["pool_index"].tolist() == list(range(7))
    assert torch.equal(run.outputs["pool_tags"], voc_tags(range(7)).byte())
    assert torch.equal(run.outputs["test_tags"], voc_tags((7, 8, 9)).byte())
    assert run.outputs["test_cam"].shape == (3, 20, 32, 32)
    assert run.outputs["explore_cam"].shape == (3, 2, 3, 20, 32, 32)
    assert "crf_confusion" not in run.outputs and run.outputs["ms_confusion"].sum() == pixels
    scores = run.task.after(run.outputs)
    assert scores["miou_crf"] is None and scores["miou_ms"] == mean_iou(run.outputs["ms_confusion"]).item()
    json.dumps(measured | scores, allow_nan=False)


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
def test_voc_is_measured_at_native_sizes(voc):
    """Each image goes through a square of the crop's side; its logits and its CAM come back to the mask's size."""
    run, recipe = prepared("plain", labels=7, data="voc", root=voc, **FILES)
    network, tags = run.method.network.eval(), voc_tags((7, 8, 9))
    counts, cams = torch.zeros(21, 21, dtype=torch.long), torch.zeros(21, 21, dtype=torch.long)
    folder = open_masks("voc", "val", voc)

    def resized(maps, size):
        return torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    for index in range(3):
        image, mask = folder.read(index)
        assert image.shape[1:] == size_of(7 + index)[::-1]
        x = resized(run.method.views.plain(image[None]), (32, 32))
        with torch.no_grad():
            predicted = resized(network(x), mask.shape).argmax(1)
            maps = resized(network.activation(x, recipe.scales, tags[index, None]), mask.shape)
        value, label = (maps * tags[index][None, :, None, None]).max(1)
        counts += confusion(mask[None], predicted, 21)[0]
        cams += confusion(mask[None], torch.where(value > 0.5, label + 1, 0), 21)[0]
    measured = run.evaluate(run.method.network)
    assert measured["confusion"] == counts.tolist() and measured["cam_confusion"] == cams.tolist()


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
def test_padding_of_files_reaches_the_losses(voc):
    """Scaled down to half, no image fills a crop of 64: what is left of it is no label's pixel."""
    run, recipe = prepared("plain", labels=7, data="voc", root=voc, **FILES | {"crop": 64, "scale_high": 0.5})
    state = run.pool.generator.get_state()
    items = run.pool.take(torch.arange(7))
    run.pool.generator.set_state(state)
    assert torch.equal(items.labels, voc_tags(range(7)))
    view = run.method.view(items)
    filled = (~view.crop.padding).flatten(1).sum(1)
    for number in range(7):
        width, height = size_of(number)
        share = int(max(width, height) * 0.5) / max(width, height)
        assert filled[number].item() == pytest.approx(width * height * share**2, rel=0.1)
    assert view.x.shape == (7, 3, 64, 64)
    assert run.method.pixels(view).permute(0, 2, 3, 1)[view.crop.padding].max() < 1e-6  # black
    labels = run.method.labels(view, torch.rand(7, 20, 64, 64))
    assert (labels[view.crop.padding] == 255).all()


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
def test_a_stopped_run_on_files_ends_as_if_undisturbed(voc, tmp_path):
    def stop(done, total, row):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"labels": 6, "data": "voc", "root": voc} | FILES
    whole = trained("plain", tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        trained("plain", tmp_path / "cut", on_step=stop, **options)
    same(trained("plain", tmp_path / "cut", **options), whole)


def test_coco_needs_masks_of_val_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("repro.tasks.tags.has_lattice", lambda: False)
    tag_coco(monkeypatch, tmp_path)
    read = []
    real = MaskFolder.mask
    monkeypatch.setattr(
        MaskFolder, "mask", lambda self, index, size: read.append((self.split, index)) or real(self, index, size)
    )
    with pytest.warns(UserWarning, match="miou_crf is left out: above 9,216 pixels it needs pydensecrf2: pip install"):
        run, _ = prepared("plain", labels=2, data="coco2014", root=tmp_path, **FILES)
    assert run.pool.labelled.tolist() == [0, 2] and run.pool.labels.shape == (3, 80)
    assert run.pool.labels[2].nonzero().flatten().tolist() == [1]
    measured = run.evaluate(run.method.network)
    # the third image of val shows no object, and is left out
    assert set(read) == {("val", 0), ("val", 1), ("val", 3)}
    masks = [open_masks("coco2014", "val", tmp_path).read(index)[1] for index in (0, 1, 3)]
    assert measured["pixels"] == sum(int((mask != 255).sum()) for mask in masks) and len(measured["iou"]) == 81
    tags = open_tags("coco2014", "val", tmp_path)[1]
    assert torch.equal(run.outputs(run.method.network)["test_tags"], tags[[0, 1, 3]].byte())


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
def test_a_part_of_val_can_be_measured(voc):
    run, _ = prepared("plain", labels=7, data="voc", root=voc, **FILES | {"tests": 2})
    pixels = sum(int((mask_of(number, 21) != 255).sum()) for number in (7, 9))
    assert run.evaluate(run.method.network)["pixels"] == pixels


@pytest.mark.filterwarnings("ignore:miou_crf is left out")
def test_large_pictures_are_kept_small(voc, monkeypatch):
    monkeypatch.setattr(task, "LARGEST", 24)
    run, _ = prepared("pcre", labels=7, data="voc", root=voc, **FILES | {"crop": 48})
    network = run.method.network
    outputs = run.outputs(network)
    for name in ("pool_images", "pool_truth", "pool_cam", "test_images", "test_truth", "test_prediction", "test_cam",
                 "explore_cam", "explore_gradcam", "explore_rollout"):  # fmt: skip
        assert outputs[name].shape[-2:] == (24, 24), name
    assert outputs["explore_masks"].shape == (3, 144, 12, 12)  # the network saw crops at their full size
    assert outputs["test_truth"].dtype == torch.uint8 and outputs["test_images"].dtype == torch.uint8


def test_missing_data_and_wrong_numbers_are_named(voc, tmp_path):
    with pytest.raises(SettingError, match="labels is 8: voc has tags of fewer images .*ask for 1 to 7"):
        prepared("plain", labels=8, data="voc", root=voc, **FILES)
    (voc / "VOCdevkit" / "VOC2012" / "Annotations" / f"{name_of(2)}.xml").unlink()
    with pytest.raises(DataError, match="voc/train_aug: 1 files are missing, first .*2007_000002.xml.*VOCtrainval"):
        prepared("plain", labels=7, data="voc", root=voc, **FILES)
    with pytest.raises(DataError, match="coco2014: none of coco, COCO in"):
        prepared("plain", labels=7, data="coco2014", root=voc, **FILES)


# Repeating and resuming


def untimed(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in history.rows]


def same(a, b):
    assert untimed(a.history) == untimed(b.history)
    for first, second in ((a.network.state_dict(), b.network.state_dict()), (a.outputs, b.outputs)):
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Steps on the device


# The network


def test_the_network_is_the_method_s():
    for method in METHODS:
        head = "DilatedHead" if method == "pcre" else "LargeFov"
        network, weights = task.build(method, recipe_of(method), 5)
        trunks = [network.first, network.second] if method == "dupl" else [network]
        assert weights == {"source": "scratch"}
        for trunk in trunks:
            own = method == "pcre"
            assert trunk.encoder.class_tokens == (5 if own else 1) and trunk.encoder.value_only is own
            assert trunk.encoder.hidden == (5 if own else 0) and trunk.encoder.pos_embed.requires_grad is own
            assert trunk.classifier.out_features == 5 and type(trunk.head).__name__ == head
            assert trunk.encoder.auxiliary == trunk.encoder.depth - 3
    assert not task.build("pcre", recipe_of("pcre", value_only=False), 5)[0].encoder.value_only
    assert task.build("plain", recipe_of("plain", value_only=True), 5)[0].encoder.value_only
    first, second = task.build("dupl", recipe_of("dupl"), 5)[0].children()
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_the_recipe_s_number_of_classes_bounds_the_label_maps():
    run, _ = prepared("pcre")
    assert run.method.most == int(tags_of(scenes("train", IMAGES, SIDE).masks, 6)[:, 1:].sum(1).max())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": 0}, SettingError, "images is 0, tests 8: scenes need at least one of both"),
        ({"tests": 0}, SettingError, "tests 0: scenes need"),
        ({"crop": 32}, SettingError, "crop is 32; scenes are made at the crop's size, 48 to 128"),
        ({"labels": 0}, SettingError, "labels is 0, the number of scenes whose tags are shown: 1 to images, 24"),
        ({"labels": 25}, SettingError, "labels is 25, the number of scenes whose tags are shown: 1 to images, 24"),
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


def test_mean_over_activation_is_over_classes_that_have_one():
    counts = torch.zeros(100, 4, 4, dtype=torch.long)
    counts[:, 0] = torch.tensor([9, 3, 1, 4])
    counts[:, 1, 1], counts[:, 2, 2] = 6, 4  # ratios 1/2 and 1/4; the third class is never right
    report = cam_report(counts, 0.5)
    assert report["over_activation_mean"] == pytest.approx((3 / 6 + 1 / 4) / 2)
    assert report["over_activation_bounded_mean"] == pytest.approx((3 / 9 + 1 / 5 + 1) / 3)
    nothing = cam_report(torch.zeros(100, 3, 3, dtype=torch.long), 0.5)
    assert nothing["over_activation_mean"] is None and nothing["over_activation_bounded_mean"] is None


def test_chance_is_the_best_of_a_cone_round_the_centre(runs):
    """It sees no pixel: the true tags alone, the first of them everywhere, at whichever threshold scores best."""
    masks = scenes("test", TESTS, SIDE).masks
    tags = tags_of(masks, 6)[:, 1:].float()
    cone = task.centred(tags, masks)[0, 0]
    middle, corner = (SIDE - 1) / 2, (SIDE - 1) / 2 * 2**0.5
    for row, column in ((0, 0), (5, 30), (24, 24), (47, 0)):
        away = math.dist((row, column), (middle, middle))
        assert cone[row, column].item() == pytest.approx(max(0.0, 1 - away / corner), abs=1e-6)
    best = 0.0
    for step in range(100):
        found = torch.where(cone > step / 100, tags.argmax(1)[:, None, None] + 1, 0)
        best = max(best, mean_iou(confusion(masks, found, 6).sum(0), "skip").item())
    for method in METHODS:
        measured = runs[method].history.of("evaluation")[-1]["live"]
        assert measured["cam_above_chance"] == pytest.approx(measured["cam_miou"] - best, abs=2e-3)


def test_spread_takes_first_and_last():
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(2, 5).tolist() == [0, 1] and spread(1, 1).tolist() == [0]
