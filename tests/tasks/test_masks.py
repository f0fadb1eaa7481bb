"""The task end to end: what runs keep, resuming, hidden masks that stay hidden, data sets in their folders."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from repro.data.catalogue import DataError
from repro.data.folders import MaskFolder, open_masks
from repro.data.masks import IGNORE, draw_masks
from repro.data.pools import draw_folder
from repro.data.scenes import scenes
from repro.experiment import Experiment, resolve
from repro.files import History
from repro.measure.segmentation import sliding_window, whole_image
from repro.methods.few_masks import METHODS
from repro.models.pretrained import WeightsError
from repro.runs import execute, folder_of, load_history, load_metrics, load_moments, load_outputs
from repro.settings import SettingError
from repro.tasks import masks as task
from repro.tasks.common import build_deeplab
from repro.train import Interrupted, seed_everything
from tests.data import mask_fixtures
from tests.data.mask_fixtures import mask_of, name_of, size_of, small_cityscapes, small_voc

SIDE, SHOWN, IMAGES, TESTS = 48, 4, 12, 5
FAST = {"crop": SIDE, "images": IMAGES, "tests": TESTS, "batch": 2, "steps": 6, "eval_every": 3, "log_every": 1,
        "checkpoint_every": 2}  # fmt: skip
TERMS = {
    "supervised": {"supervised"},
    "fixmatch": {"supervised", "consistency"},
    "unimatch": {"supervised", "consistency", "consistency_2", "features"},
    "csl": {"supervised", "consistency", "masked", "features"},
}


def scene_run(method, seed=0, **changes):
    return Experiment("csl", method, "scenes", SHOWN, seed, "tiny", FAST | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """All four methods, finished and undisturbed."""
    folder = tmp_path_factory.mktemp("masks")
    torch.set_num_threads(1)
    for method in METHODS:
        execute(scene_run(method), folder)
    return folder


def normalised(images):
    """(B, 3, H, W) uint8 as ImageNet's networks want them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images.float() / 255 - mean) / std


def trained(experiment, folder, classes):
    """The network of a finished run, in eval mode and in the memory format of training."""
    network, _ = build_deeplab(resolve(experiment), classes)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.eval().to(memory_format=torch.channels_last)


def prepared(method, **changes):
    experiment = scene_run(method, **changes)
    recipe = resolve(experiment)
    seed_everything(0)
    return task.prepare(experiment, recipe, torch.device("cpu")), recipe


def untimed(folder):
    metrics = {k: v for k, v in load_metrics(folder).items() if k not in ("cost", "provenance", "experiment")}
    timed = ("seconds", "samples_per_second")
    return metrics, [{k: v for k, v in row.items() if k not in timed} for row in History(folder).rows]


def same_result(a, b):
    """Weights, outputs, moments, history and metrics, bit for bit."""
    assert untimed(a) == untimed(b)
    files = [path.relative_to(a) for path in sorted(a.rglob("*.safetensors"))]
    assert files == [path.relative_to(b) for path in sorted(b.rglob("*.safetensors"))]
    assert [str(name) for name in files] == [
        *(f"moments/{step}.safetensors" for step in (3, 6)), "outputs.safetensors", "weights.safetensors",
    ]  # fmt: skip
    for name in files:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name


# Runs on scenes


@pytest.mark.parametrize("method", METHODS)
def test_a_run_keeps_what_figures_need(root, method):
    folder = folder_of(scene_run(method), root)
    kept = {name: (value.dtype, tuple(value.shape)) for name, value in load_outputs(folder).items()}
    pictures = {"images": (torch.uint8, (3, SIDE, SIDE)), "truth": (torch.uint8, (SIDE, SIDE))}
    pool = {f"pool_{name}": (dtype, (8, *shape)) for name, (dtype, shape) in pictures.items()}
    test = {f"test_{name}": (dtype, (TESTS, *shape)) for name, (dtype, shape) in pictures.items()}
    assert kept == pool | test | {
        "pool_index": (torch.int64, (8,)),
        "test_prediction": (torch.uint8, (TESTS, SIDE, SIDE)),
        "test_confidence": (torch.float32, (TESTS, SIDE, SIDE)),
    }
    moments = load_moments(folder)
    assert list(moments) == [3, 6]
    for arrays in moments.values():
        assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == {
            "confidence": (torch.float32, (8, SIDE, SIDE)), "residual": (torch.float32, (8, SIDE, SIDE)),
            "label": (torch.uint8, (8, SIDE, SIDE)),
        }  # fmt: skip
        confidence, residual = arrays["confidence"], arrays["residual"]
        assert confidence.min() >= 1 / 6 - 1e-6 and confidence.max() <= 1 + 1e-6 and arrays["label"].max() < 6
        assert residual.min() >= 0 and (residual < confidence).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_history_tells_terms_and_pseudo_labels(root, method):
    folder = folder_of(scene_run(method), root)
    rows = load_history(folder).of("train")
    assert all(set(row["terms"]) == TERMS[method] for row in rows) and [row["step"] for row in rows] == [*range(1, 7)]
    if method == "supervised":
        assert all(row["pseudo"] == {} for row in rows)
        return
    for row in rows:
        (told,) = row["pseudo"].values()
        assert set(told) == {"coverage", "accuracy", "confidence", "ece", "ranges"} and 0 <= told["coverage"] <= 1
        ranges = told["ranges"]
        assert set(ranges) == {"edges", "share", "coverage", "accuracy", "all_accuracy"}
        assert ranges["edges"][0] == 0 and ranges["edges"][-1] == 1
        assert sum(ranges["share"]) == pytest.approx(1)
        assert all(len(values) == len(ranges["edges"]) - (name != "edges") for name, values in ranges.items())
    assert load_metrics(folder)["pseudo_labels"] == rows[-1]["pseudo"]


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_of_all_test_scenes_and_live_and_ema_are_one(root, method):
    folder = folder_of(scene_run(method), root)
    evaluations = load_history(folder).of("evaluation")
    assert [row["step"] for row in evaluations] == [3, 6]
    for row in evaluations:
        assert row["live"] == row["ema"] and row["ema"]["pixels"] == TESTS * SIDE**2 and row["ema"]["ignored"] == 0
        assert len(row["ema"]["iou"]) == len(row["ema"]["confusion"]) == 6 and "ece_15" in row["ema"]
    metrics = load_metrics(folder)
    assert metrics["reported"]["last"]["ema"] == evaluations[-1]["ema"]
    best = max(evaluations, key=lambda row: row["ema"]["miou"])["ema"]["miou"]
    assert metrics["reported"]["best"]["ema"]["miou"] == best
    # The saved weights give the saved predictions, and these the reported accuracy.
    outputs = load_outputs(folder)
    network = trained(scene_run(method), folder, 6)
    with torch.no_grad():
        probs = network(normalised(outputs["test_images"])).softmax(1)
    assert torch.equal(outputs["test_prediction"], probs.argmax(1).byte())
    torch.testing.assert_close(outputs["test_confidence"], probs.amax(1))
    correct = (outputs["test_prediction"] == outputs["test_truth"]).double().mean().item()
    assert correct == pytest.approx(evaluations[-1]["ema"]["pixel_accuracy"])
    assert torch.equal(outputs["test_truth"], scenes("test", TESTS, SIDE).masks)


def test_moments_are_of_the_live_network_on_the_shown_pool_images(root):
    folder = folder_of(scene_run("csl"), root)
    run, _ = prepared("csl")
    run.method.network = trained(scene_run("csl"), folder, 6)
    run.method.train()
    outputs, moment = load_outputs(folder), load_moments(folder)[6]
    state = {name: value.clone() for name, value in run.method.network.state_dict().items()}
    again = run.moments(run.method.network)
    assert all(torch.equal(again[name], moment[name]) for name in moment)
    assert all(torch.equal(value, state[name]) for name, value in run.method.network.state_dict().items())
    assert all(module.training for module in run.method.network.modules())
    with torch.no_grad():
        probs = run.method.network.eval()(normalised(outputs["pool_images"])).softmax(1).double()
    c, q = probs.max(1)
    m = (1 - c) / 5
    others = (probs - m[:, None]).square().sum(1) - (c - m) ** 2
    torch.testing.assert_close(moment["confidence"].double(), c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moment["residual"].double(), (others + m**2) / 5, rtol=1e-3, atol=1e-6)
    assert torch.equal(moment["label"], q.byte())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_shows_the_same_scenes_to_every_method(root, method):
    """And another seed others; hidden masks are in the monitor alone."""
    run, _ = prepared(method)
    train = scenes("train", IMAGES, SIDE)
    pool, truth = draw_masks(train, SHOWN, 0)
    assert torch.equal(run.pool.labelled, pool.labelled) and len(pool.labelled) == SHOWN
    assert torch.equal(run.pool.labels[pool.labelled], truth[pool.labelled])
    assert (run.pool.labels[pool.unlabelled] == IGNORE).all() and len(pool.unlabelled) == IMAGES - SHOWN
    assert torch.equal(run.monitor.truth, truth)
    for name, value in run.method.state_dict().items():
        assert value.shape != truth.shape and not name.startswith("views"), "a method keeps weights alone"
    assert not torch.equal(prepared(method, seed=1)[0].pool.labelled, pool.labelled)
    outputs = load_outputs(folder_of(scene_run(method), root))
    assert set(outputs["pool_index"].tolist()) <= set(pool.unlabelled.tolist())
    assert torch.equal(outputs["pool_truth"], truth[outputs["pool_index"]])
    assert torch.equal(outputs["pool_images"], train.images[outputs["pool_index"]])


def test_a_run_that_failed_after_a_moment_writes_it_again(root, tmp_path):
    """The moment of step 3 is newer than the checkpoint of step 2."""
    folder = folder_of(scene_run("csl"), tmp_path)

    def fail(done, total, row):
        if done == 4:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        execute(scene_run("csl", checkpoint_every=2, log_every=1), tmp_path, on_step=fail)
    moment = folder / "moments" / "3.safetensors"
    before = moment.stat().st_ino
    (folder / "moments" / ".6.safetensors.abc.part").write_text("half")
    execute(scene_run("csl"), tmp_path)
    same_result(folder, folder_of(scene_run("csl"), root))
    assert moment.stat().st_ino != before and not list(folder.rglob("*.part"))


def test_every_mask_shown_leaves_every_image_unlabelled_too(tmp_path):
    experiment = dataclasses.replace(scene_run("fixmatch", steps=1, eval_every=1), labels=IMAGES)
    execute(experiment, tmp_path)
    assert load_outputs(folder_of(experiment, tmp_path))["pool_index"].numel() == 8


# Steps on the device


def test_the_network_is_the_recipes():
    run, _ = prepared("csl")
    assert run.method.network.classifier.out_channels == 6
    assert run.method.network.backbone.output_stride == 8  # resnet-mini has half of 16
    assert prepared("csl", output_stride=8)[0].method.network.backbone.output_stride == 4
    shipped, scratch = (prepared("csl", weights=w)[0].method.network.backbone for w in ("pretrained", "scratch"))
    assert not torch.equal(shipped.conv1.weight, scratch.conv1.weight)
    again = prepared("supervised")[0].method.network
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), run.method.network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": 3}, SettingError, "labels is 4, images 3: scenes show 1 to `images` masks"),
        ({"tests": 0}, SettingError, "tests 0: scenes need at least one of both"),
        ({"crop": 32}, SettingError, "crop is 32; scenes are made at the crop's size, 48 to 128"),
        ({"weights": "nowhere.safetensors"}, WeightsError, "there is no file nowhere.safetensors"),
    ],
)
def test_bad_combinations_are_refused_before_training(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        execute(scene_run("csl", **changes), tmp_path)
    assert os.listdir(folder_of(scene_run("csl", **changes), tmp_path)) == [".lock"]


# Published data sets in their folders

SMALL = {"network": "resnet-mini", "batch": 2, "steps": 2, "eval_every": 2, "checkpoint_every": 2, "log_every": 1,
         "precision": "fp32"}  # fmt: skip


def read(path):
    """An image file as (1, 3, H, W) uint8."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]


@pytest.mark.parametrize("method", ["supervised", "csl"])
def test_voc_trains_on_files_and_never_opens_a_hidden_mask(tmp_path, monkeypatch, method):
    base = small_voc(monkeypatch, tmp_path, train=6, extra=5, val=3)
    experiment = Experiment("csl", method, "voc", 2, 1, "paper", SMALL | {"crop": 64})
    recipe = resolve(experiment)
    assert recipe.output_stride == (8 if method == "csl" else 16)
    train = open_masks("voc", "train_aug", tmp_path)
    pool = draw_folder(train, "92", 1, 64)
    shown = {train.pairs[index][1] for index in pool.labelled.tolist()}
    hidden = {path for _, path in train.pairs} - shown
    assert len(shown) == 2 and len(hidden) == 9
    for path in hidden:
        path.write_bytes(b"not a mask")
    opened = []
    original = MaskFolder.mask

    def mask(self, index, size):
        opened.append(self.pairs[index][1])
        return original(self, index, size)

    monkeypatch.setattr(MaskFolder, "mask", mask)
    metrics = execute(experiment, tmp_path / "runs", data_root=tmp_path)
    folder = folder_of(experiment, tmp_path / "runs")
    validation = {base / "SegmentationClass" / f"{name_of(number)}.png" for number in (11, 12, 13)}
    assert set(opened) <= shown | validation and set(opened) & shown and validation <= set(opened)

    # Whole images of different sizes, counted pixel by pixel.
    network, confusion = trained(experiment, folder, 21), np.zeros((21, 21), int)
    for number in (11, 12, 13):
        truth = mask_of(number, 21)
        with torch.no_grad():
            image = read(base / "JPEGImages" / f"{name_of(number)}.jpg")
            predicted = network(normalised(image))[0].argmax(0).numpy()
        assert predicted.shape == truth.shape == size_of(number)[::-1]
        np.add.at(confusion, (truth[truth < 255], predicted[truth < 255]), 1)
    last = metrics["reported"]["last"]["ema"]
    assert last["confusion"] == confusion.tolist() and last["ignored"] == 3 * 9
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    assert last["miou"] == pytest.approx((intersection / (union + 1e-10)).mean())  # spec 6, without its x 100

    outputs = load_outputs(folder)
    assert outputs["pool_images"].shape == (8, 3, 64, 64) and outputs["test_images"].shape == (3, 3, 64, 64)
    assert set(outputs["pool_index"].tolist()) <= set(pool.unlabelled.tolist())
    assert (outputs["pool_truth"] == IGNORE).all()
    width, height = size_of(11)
    assert torch.equal(outputs["test_truth"][0, :height, :width], torch.from_numpy(mask_of(11, 21)))
    assert (outputs["test_truth"][0, height:] == IGNORE).all() and not outputs["test_images"][0, :, height:].any()
    if method == "supervised":
        assert metrics["pseudo_labels"] == {}
        return
    told = metrics["pseudo_labels"]["pixels"]
    assert 0 < told["coverage"] <= 1 and sum(told["ranges"]["share"]) == pytest.approx(1)
    assert (told["accuracy"], told["ece"], told["confidence"]) == (None, None, None)
    assert set(told["ranges"]["accuracy"]) == set(told["ranges"]["all_accuracy"]) == {None}
    json.dumps(metrics, allow_nan=False)


def test_a_run_on_files_that_was_stopped_ends_as_if_undisturbed(tmp_path, monkeypatch):
    small_voc(monkeypatch, tmp_path, train=6, extra=5, val=1)
    experiment = Experiment("csl", "csl", "voc", 3, 0, "paper", SMALL | {"crop": 64, "steps": 3, "eval_every": 3})

    def stop(done, total, row):
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        execute(experiment, tmp_path / "cut", data_root=tmp_path, on_step=stop)
    execute(experiment, tmp_path / "cut", data_root=tmp_path)
    execute(experiment, tmp_path / "whole", data_root=tmp_path)
    cut, whole = (folder_of(experiment, tmp_path / name) for name in ("cut", "whole"))
    assert untimed(cut) == untimed(whole)
    for name in ("weights", "outputs", "moments/3"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (cut, whole))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_cityscapes_slides_a_window_and_keeps_probabilities(tmp_path, monkeypatch):
    base = small_cityscapes(monkeypatch, tmp_path)
    mask_fixtures.counts(monkeypatch, "cityscapes", {"1_30": 1}, train=2, val=1)
    changes = SMALL | {"crop": 32, "window": 16, "block": 8, "steps": 1, "eval_every": 1}
    experiment = Experiment("csl", "csl", "cityscapes", 1, 0, "paper", changes)
    recipe = resolve(experiment)
    assert (recipe.labelled_loss, recipe.head_factor) == ("ohem", 1.0)
    metrics = execute(experiment, tmp_path / "runs", data_root=tmp_path)
    folder = folder_of(experiment, tmp_path / "runs")
    network = trained(experiment, folder, 19)

    # Windows of 16 every 10 pixels, cut at the edges, their softmax scores summed.
    x = normalised(read(next((base / "leftImg8bit" / "val").glob("*/*.png"))))
    sums = torch.zeros(19, *x.shape[2:])
    with torch.no_grad():
        for row in range(0, x.shape[2], 10):
            for column in range(0, x.shape[3], 10):
                sums[:, row : row + 16, column : column + 16] += network(
                    x[:, :, row : row + 16, column : column + 16]
                ).softmax(1)[0]
    truth = open_masks("cityscapes", "val", tmp_path).read(0)[1].long()
    predicted = sums.argmax(0)
    known = truth != IGNORE
    last = metrics["reported"]["last"]["ema"]
    assert last["pixel_accuracy"] == pytest.approx((predicted == truth)[known].double().mean().item())
    confidence = (sums.amax(0) / sums.sum(0))[known].double().mean().item()
    assert last["pixel_confidence"] == pytest.approx(confidence, rel=1e-5)

    # Overlapping windows are divided by their number where figures need a probability.
    run = task.prepare(experiment, recipe, torch.device("cpu"), tmp_path)
    outputs, moment = load_outputs(folder), load_moments(folder)[1]
    plain = run.method.views.plain(outputs["pool_images"])
    with torch.no_grad():
        probs = sliding_window(network, plain, 16)
        probs /= probs.sum(1, keepdim=True)
        assert (sliding_window(network, plain, 16).sum(1) > 3.9).any(), "some pixels are seen by four windows"
        assert not torch.allclose(probs, whole_image(network, plain), atol=1e-3)
    torch.testing.assert_close(moment["confidence"], probs.amax(1))
    assert moment["confidence"].max() <= 1 + 1e-6 and outputs["test_confidence"].max() <= 1 + 1e-6


@pytest.mark.parametrize("data", ["voc", "cityscapes", "coco2017"])
def test_missing_data_are_one_clear_error_before_training(tmp_path, monkeypatch, data):
    monkeypatch.delenv("REPRO_DATA", raising=False)
    labels = {"voc": 92, "cityscapes": 186, "coco2017": 232}[data]
    experiment = Experiment("csl", "csl", data, labels, 0, "paper", {"network": "resnet-mini"})
    for place, message in ((None, f"{data}: say where the data is, in root or .REPRO_DATA. To get it"),
                           (tmp_path, f"{data}: none of .* in {tmp_path}. To get it")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            execute(experiment, tmp_path / "runs", data_root=place)
    assert os.listdir(folder_of(experiment, tmp_path / "runs")) == [".lock"]


# Helpers


def test_budgets_name_the_published_lists():
    assert task.budget_of("voc", 92) == "92" and task.budget_of("voc", 1464) == "1464"
    assert task.budget_of("voc", 662) == "1_16" and task.budget_of("voc", 662, "u2pl") == "u2pl_1_16"
    assert task.budget_of("voc", 366, "u2pl") == "366"  # one list only
    assert task.budget_of("voc", 10_582) == "all" and task.budget_of("cityscapes", 2975) == "all"
    assert task.budget_of("cityscapes", 186) == "1_16" and task.budget_of("coco2017", 925) == "1_128"
    with pytest.raises(ValueError, match="labels is 90; the published lists of voc show 92, 183, .*, 10582 masks"):
        task.budget_of("voc", 90)


def test_a_run_says_where_its_weights_come_from(tmp_path):
    given = {"steps": 1, "images": 4, "tests": 2, "batch": 2}
    shipped = execute(Experiment("csl", "supervised", "scenes", 2, 0, "tiny", tuple(given.items())), tmp_path)
    assert shipped["provenance"]["weights"]["source"] == "shipped"
    assert len(shipped["provenance"]["weights"]["sha256"]) == 64
    scratch = given | {"weights": "scratch"}
    own = execute(Experiment("csl", "supervised", "scenes", 2, 0, "tiny", tuple(scratch.items())), tmp_path)
    assert own["provenance"]["weights"] == {"source": "scratch"}
