"""The task end to end: what runs keep and measure, resuming between refreshes, hidden masks, ScribbleSup in files."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from repro.data.catalogue import DataError
from repro.data.folders import MaskFolder
from repro.data.scenes import scenes
from repro.data.scribbles import PaddedViews, draw_scribbles, reaches_of
from repro.experiment import Experiment, resolve
from repro.methods.scribbles import METHODS, settings_for
from repro.models.pretrained import WeightsError
from repro.papers import SPECS, Spec, Supervision
from repro.recipe import ScribbleRecipe
from repro.runs import execute, folder_of, load_history, load_metrics, load_moments, load_outputs
from repro.settings import SettingError
from repro.tasks import scribbles as task
from repro.tasks.common import build_deeplab
from repro.train import Interrupted, Now, seed_everything
from tests.data.mask_fixtures import mask_of, name_of, size_of
from tests.data.test_scribbles import write_scribbles
from tests.host_waits import NoWaiting
from tests.tasks.test_masks import normalised, read, untimed

SIDE, IMAGES, TESTS, LENGTH = 48, 10, 5, 50
START, STEPS = 3, 6
FAST = {
    "network": "resnet-mini", "crop": SIDE, "batch": 2, "start_steps": START, "steps": STEPS, "epoch_steps": 2,
    "width": 1, "lr": 0.01, "precision": "fp32", "eval_every": 3, "log_every": 1, "checkpoint_every": 2,
    "images": IMAGES, "tests": TESTS,
}  # fmt: skip
TERMS = {
    "partial_ce": {"seeds"}, "dense_gd": {"seeds", "dense"}, "grid_gd": {"seeds", "potts"},
    "adm": {"seeds", "proposals"}, "trust_region": {"seeds", "proposals"},
    "robust_trust_region": {"seeds", "proposals"}, "full": {"masks"},
}  # fmt: skip
SOLVED = ("trust_region", "robust_trust_region")
PAPER = "scribbles of these tests"


def recipe(method, data, labels, scale):
    """Stage A runs at the first and the third epoch of the second stage."""
    settings = settings_for(method, labels / 100 if labels <= 100 else 1.0, 6 if data == "scenes" else 21)
    if method in SOLVED:
        settings = dataclasses.replace(settings, refresh=2, rate=1.0)
    return ScribbleRecipe(method=settings, **FAST)


@pytest.fixture(scope="module", autouse=True)
def paper():
    """A paper of these methods whose recipes are small."""
    supervision = Supervision("scribble length {} %", task, recipe, lambda *_: None, lambda _: None)
    stand_in = Spec(PAPER, "", "", supervision, tuple(METHODS), ("scenes", "voc"), ("miou",), ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, PAPER, stand_in)
        yield


def scene_run(method, seed=0, labels=LENGTH, **changes):
    return Experiment(PAPER, method, "scenes", labels, seed, "tiny", changes)


def prepared(method, **changes):
    experiment = scene_run(method, **changes)
    resolved = resolve(experiment)
    seed_everything(0)
    return task.prepare(experiment, resolved, torch.device("cpu")), resolved


@pytest.fixture(scope="module")
def root(paper, tmp_path_factory):
    """All methods, finished and undisturbed."""
    folder = tmp_path_factory.mktemp("scribbles")
    torch.set_num_threads(1)
    for method in METHODS:
        execute(scene_run(method), folder)
    return folder


def trained(experiment, folder, classes):
    """The network of a finished run, in eval mode and in the memory format of training."""
    network, _ = build_deeplab(resolve(experiment), classes)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.eval().to(memory_format=torch.channels_last)


def last(folder):
    return load_metrics(folder)["reported"]["last"]["ema"]


def grid_potts(image, cost):
    """1 / |N| sum w_pq cost(p, q) by loops over the 8 neighbours. image: (3, H, W) normalised, float64."""
    _, height, width = image.shape
    pairs = [
        ((i, j), (i + down, j + right), math.hypot(down, right))
        for down, right in ((0, 1), (1, 0), (1, 1), (-1, 1))
        for i in range(height)
        for j in range(width)
        if 0 <= i + down < height and j + right < width
    ]
    squares = [((image[:, i, j] - image[:, k, m]) ** 2).sum() for (i, j), (k, m), _ in pairs]
    variance = np.mean(squares)
    weights = [math.exp(-square / (2 * variance)) / pair[2] for square, pair in zip(squares, pairs, strict=True)]
    return sum(weight * cost(p, q) for weight, (p, q, _) in zip(weights, pairs, strict=True)) / len(pairs)


# Runs on scenes


@pytest.mark.parametrize("method", METHODS)
def test_a_run_keeps_what_figures_need(root, method):
    folder = folder_of(scene_run(method), root)
    outputs = load_outputs(folder)
    maps, eight = (SIDE, SIDE), (8, SIDE, SIDE)
    expected = {
        "test_images": (torch.uint8, (TESTS, 3, *maps)), "test_truth": (torch.uint8, (TESTS, *maps)),
        "test_prediction": (torch.uint8, (TESTS, *maps)), "test_confidence": (torch.float32, (TESTS, *maps)),
        "pool_index": (torch.int64, (8,)), "pool_images": (torch.uint8, (8, 3, *maps)),
        "pool_truth": (torch.uint8, eight), "pool_scribbles": (torch.uint8, eight),
        "pool_reach": (torch.float16, eight), "pool_log_probs": (torch.float16, (8, 6, *maps)),
        "pool_prediction": (torch.uint8, eight),
    } | ({"pool_proposal": (torch.uint8, eight)} if method in SOLVED else {})  # fmt: skip
    assert {name: (value.dtype, tuple(value.shape)) for name, value in outputs.items()} == expected
    train, index = scenes("train", IMAGES, SIDE), outputs["pool_index"]
    scribbled, truth = draw_scribbles(train, 0.5, 1)
    assert index.tolist() == [0, 1, 2, 3, 5, 6, 7, 9]
    assert torch.equal(outputs["pool_images"], train.images[index])
    assert torch.equal(outputs["pool_truth"], truth[index])
    assert torch.equal(outputs["pool_scribbles"], scribbled.labels[index])
    reach = torch.from_numpy(reaches_of(train.masks[index].numpy(), 1)).half()
    assert torch.equal(outputs["pool_reach"], reach)
    # what is marked by the reach is what is scribbled, but for an end that falls between two halves
    marked = outputs["pool_reach"] <= torch.tensor(0.5).half()
    assert ((outputs["pool_scribbles"] != 255) != marked).sum() <= 2
    assert torch.equal(outputs["test_truth"], scenes("test", TESTS, SIDE).masks)


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_those_of_the_saved_network(root, method):
    folder = folder_of(scene_run(method), root)
    outputs, network = load_outputs(folder), trained(scene_run(method), folder, 6)
    with torch.no_grad():
        log_probs = network(normalised(outputs["pool_images"])).log_softmax(1)
        probs = network(normalised(outputs["test_images"])).softmax(1)
    torch.testing.assert_close(outputs["pool_log_probs"], log_probs.half(), rtol=1e-3, atol=1e-3)
    for scores, name in ((log_probs, "pool_prediction"), (probs, "test_prediction")):
        chosen = scores.gather(1, outputs[name].long()[:, None])[:, 0]
        assert (scores.amax(1) - chosen).max() < 1e-5 and (outputs[name] == scores.argmax(1)).float().mean() > 0.999
    torch.testing.assert_close(outputs["test_confidence"], probs.amax(1))
    moments = load_moments(folder)
    assert list(moments) == [3, 6, 9]
    for step, arrays in moments.items():
        assert set(arrays) == {"prediction"} | ({"proposal"} if method in SOLVED and step > START else set())
        assert all(value.dtype == torch.uint8 and value.shape == (8, SIDE, SIDE) for value in arrays.values())
    assert torch.equal(moments[9]["prediction"], outputs["pool_prediction"])
    assert not torch.equal(moments[3]["prediction"], moments[9]["prediction"])
    if method in SOLVED:
        assert torch.equal(moments[9]["proposal"], outputs["pool_proposal"])


@pytest.mark.parametrize("method", ["partial_ce", "robust_trust_region"])
def test_measures_are_those_of_loops_over_what_is_kept(root, method):
    """All five test images are kept: accuracy and both Potts energies, pair by pair in float64."""
    folder = folder_of(scene_run(method), root)
    outputs, network, measured = load_outputs(folder), trained(scene_run(method), folder, 6), last(folder)
    prediction, truth = (outputs[f"test_{name}"].numpy() for name in ("prediction", "truth"))
    assert measured["pixel_accuracy"] == pytest.approx((prediction == truth).mean())
    assert measured["pixels"] == TESTS * SIDE**2 and len(measured["iou"]) == len(measured["confusion"]) == 6
    assert {"miou", "miou_present", "mean_class_accuracy", "boundary_iou", "boundary_f", "ece_15"} <= set(measured)
    images = normalised(outputs["test_images"])
    with torch.no_grad():
        soft = network(images).double().softmax(1).numpy()
    images = images.double().numpy()
    hard = [grid_potts(image, lambda p, q, x=x: x[p] != x[q]) for image, x in zip(images, prediction, strict=True)]
    assert measured["potts_energy"] == pytest.approx(np.mean(hard), rel=1e-4)
    relaxed = [
        grid_potts(image, lambda p, q, s=s: 1 - s[:, p[0], p[1]] @ s[:, q[0], q[1]])
        for image, s in zip(images, soft, strict=True)
    ]
    assert measured["potts_energy_soft"] == pytest.approx(np.mean(relaxed), rel=1e-4)
    json.dumps(measured, allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_the_history_tells_terms_by_stage_and_when_there_are_proposals(root, method):
    history = load_history(folder_of(scene_run(method), root))
    for row in history.of("train"):
        first = "masks" if method == "full" else "seeds"
        assert set(row["terms"]) == (TERMS[method] if row["step"] > START else {first})
        told = method in (*SOLVED, "adm") and row["step"] > START
        assert set(row["pseudo"]) == ({"proposals"} if told else set())
        assert not told or row["pseudo"]["proposals"]["coverage"] > 0.8
        assert method not in SOLVED or not told or row["pseudo"]["proposals"]["accuracy"] > 0.5
    evaluations = history.of("evaluation")
    assert [row["step"] for row in evaluations] == [3, 6, 9]
    for row in evaluations:
        assert row["live"] == row["ema"]
        for name in ("proposal_accuracy", "proposal_miou"):
            value = row["ema"][name]
            assert value is None if method not in SOLVED or row["step"] == 3 else 0 < value <= 1


@pytest.mark.parametrize("method", SOLVED)
def test_the_quality_of_proposals_is_over_all_training_pixels(tmp_path, method):
    """With as many images as are kept, it can be counted again."""
    experiment = scene_run(method, images=8)
    execute(experiment, tmp_path)
    folder = folder_of(experiment, tmp_path)
    outputs, measured = load_outputs(folder), last(folder)
    proposal, truth = (outputs[f"pool_{name}"].numpy() for name in ("proposal", "truth"))
    seeds = outputs["pool_scribbles"].numpy() != 255
    assert np.array_equal(proposal[seeds], truth[seeds]) and proposal.max() < 6
    assert measured["proposal_accuracy"] == pytest.approx((proposal == truth).mean())
    scores = []
    for label in range(6):
        both, either = ((proposal == label) & (truth == label)).sum(), ((proposal == label) | (truth == label)).sum()
        scores.append(both / either if either else 0)
    assert measured["proposal_miou"] == pytest.approx(np.mean(scores))


def test_quality_without_proposals_or_truth_is_unknown():
    some = torch.zeros(1, 2, 2, dtype=torch.uint8)
    for pair in ((None, some), (some, None), (None, None)):
        assert task.proposal_quality(*pair, 3) == {"proposal_accuracy": None, "proposal_miou": None}
    void = torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)
    found = task.proposal_quality(torch.tensor([[[0, 255], [1, 1]]], dtype=torch.uint8), void, 3)
    assert found == {"proposal_accuracy": 0.5, "proposal_miou": pytest.approx(1 / 3)}


def test_all_methods_share_the_first_stage(root):
    """Terms bit for bit with the same seed, so second stages start from one network. Full supervision has masks."""
    terms = {}
    for method in METHODS:
        rows = load_history(folder_of(scene_run(method), root)).of("train")
        terms[method] = [row["terms"] for row in rows if row["step"] <= START]
    assert len(terms["partial_ce"]) == START
    assert all(terms[method] == terms["partial_ce"] for method in METHODS if method != "full")


# Weak supervision


@pytest.mark.parametrize("method", METHODS)
def test_no_method_but_full_supervision_can_reach_a_mask(method):
    run, _ = prepared(method)
    scribbled, truth = draw_scribbles(scenes("train", IMAGES, SIDE), 0.5, 1)
    assert torch.equal(run.pool.labels, truth if method == "full" else scribbled.labels)
    assert torch.equal(run.pool.labelled, torch.arange(IMAGES)) and run.pool.tags is None
    assert torch.equal(run.monitor.truth, truth)
    kept = {name: value for name, value in run.method.state_dict().items() if value.shape == truth.shape}
    assert set(kept) == ({"proposals"} if method in SOLVED else set())
    assert all((value == 255).all() for value in kept.values())
    held = [value for value in vars(run.method).values() if isinstance(value, torch.Tensor)]
    assert held == []


@pytest.mark.parametrize("method", ["robust_trust_region", "adm"])
def test_other_hidden_masks_train_the_same_network(root, tmp_path, monkeypatch, method):
    """The truth is drawn by lot wherever there is no scribble: weights and terms stay as they are, bit for bit."""

    def scrambled(*arguments):
        pool, truth = draw_scribbles(*arguments)
        lot = torch.randint(6, truth.shape, generator=torch.Generator().manual_seed(0)).byte()
        return pool, torch.where(pool.labels == 255, lot, truth)

    monkeypatch.setattr(task, "draw_scribbles", scrambled)
    execute(scene_run(method), tmp_path)
    ours, theirs = (folder_of(scene_run(method), place) for place in (tmp_path, root))
    first, second = (load_file(folder / "weights.safetensors") for folder in (ours, theirs))
    assert all(torch.equal(first[name], second[name]) for name in second)
    rows = [load_history(folder).of("train") for folder in (ours, theirs)]
    assert [row["terms"] for row in rows[0]] == [row["terms"] for row in rows[1]]
    told = [[row["pseudo"].get("proposals", {}).get("accuracy") for row in part] for part in rows]
    assert told[0] != told[1] and [value is None for value in told[0]] == [value is None for value in told[1]]
    assert not torch.equal(load_outputs(ours)["pool_truth"], load_outputs(theirs)["pool_truth"])


def test_lengths_are_percent_and_every_seed_has_the_same_scribbles():
    shares = {length: (prepared("partial_ce", labels=length)[0].pool.labels != 255).sum() for length in (0, 30, 100)}
    assert 0 < shares[0] < shares[30] < shares[100]
    first, second = (prepared("partial_ce", seed=seed)[0] for seed in (0, 1))
    assert torch.equal(first.pool.labels, second.pool.labels)
    assert not torch.equal(first.method.network.classifier.weight, second.method.network.classifier.weight)
    digests = {prepared("partial_ce", labels=length)[0].data_digest for length in (0, 30, 100)}
    assert len(digests | {prepared("full")[0].data_digest, prepared("partial_ce", width=2)[0].data_digest}) == 5


# Repeating and resuming


def same_result(a, b):
    """Weights, outputs, moments, history and metrics, bit for bit."""
    assert untimed(a) == untimed(b)
    files = [path.relative_to(a) for path in sorted(a.rglob("*.safetensors"))]
    assert files == [path.relative_to(b) for path in sorted(b.rglob("*.safetensors"))] and len(files) == 5
    for name in files:
        first, second = load_file(a / name), load_file(b / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name


def test_a_run_that_was_killed_between_refreshes_solves_nothing_anew(root, tmp_path, monkeypatch):
    """The stored proposals are in the checkpoint of step 4; stage A ran before step 4 and runs again before step 8."""
    experiment = scene_run("robust_trust_region")

    def fail(done, total, row):
        if done == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        execute(experiment, tmp_path, on_step=fail)
    solved = []
    from repro.methods.scribbles import trust_region as module

    original = module.refresh
    monkeypatch.setattr(module, "refresh", lambda *arguments: solved.append(0) or original(*arguments))
    execute(experiment, tmp_path)
    assert len(solved) == 1
    same_result(folder_of(experiment, tmp_path), folder_of(experiment, root))


def test_worker_processes_solve_the_same(root, tmp_path):
    experiment = scene_run("trust_region", workers=2)
    execute(experiment, tmp_path)
    outputs = (load_outputs(folder_of(run, place)) for run, place in (
        (experiment, tmp_path), (scene_run("trust_region"), root)
    ))  # fmt: skip
    first, second = outputs
    assert all(torch.equal(first[name], second[name]) for name in second)


# Steps on the device


def test_measuring_leaves_modes_weights_and_generators_alone():
    run, _ = prepared("robust_trust_region")
    run.method.train().begin_stage(1, run.pool)
    run.method.begin_epoch(0, run.pool)
    state = {name: value.clone() for name, value in run.method.state_dict().items()}
    drawn = run.generators["views"].get_state(), torch.get_rng_state()
    for measure in (run.evaluate, run.moments, run.outputs):
        measure(run.method.network)
    assert all(module.training for module in run.method.modules())
    assert all(torch.equal(value, state[name]) for name, value in run.method.state_dict().items())
    assert torch.equal(drawn[0], run.generators["views"].get_state()) and torch.equal(drawn[1], torch.get_rng_state())


# The recipe and its network


def test_the_small_network_has_half_the_strides_and_no_dropout():
    run, _ = prepared("trust_region")
    network = run.method.network
    assert network.backbone.output_stride == 8 and [network.fuse[1].p, network.fuse[3].p] == [0, 0]
    assert run.weights["source"] == "shipped" and run.method.views.photometric.sigma_high == 1
    assert prepared("trust_region", output_stride=8)[0].method.network.backbone.output_stride == 4
    again = prepared("partial_ce")[0].method.network
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": 101}, SettingError, "labels is 101; it is the length of scribbles in percent, 0 to 100"),
        ({"images": 0}, SettingError, "images is 0, tests 5: scenes need at least one of both"),
        ({"crop": 32}, SettingError, "crop is 32; scenes are made at the crop's size, 48 to 128"),
        ({"weights": "nowhere.safetensors"}, WeightsError, "there is no file nowhere.safetensors"),
    ],
)
def test_bad_combinations_are_refused_before_training(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        execute(scene_run("trust_region", **changes), tmp_path)
    assert os.listdir(folder_of(scene_run("trust_region", **changes), tmp_path)) == [".lock"]


# ScribbleSup in its folders

FRAME = 36
FILES = {"crop": 32, "images": 0, "tests": 0}


def file_run(method, labels=100):
    return Experiment(PAPER, method, "voc", labels, 0, "tiny", FILES)


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Four training images with scribbles, one validation image; no mask of training can be read."""
    monkeypatch.setattr(task, "FRAME", FRAME)
    base = write_scribbles(monkeypatch, tmp_path)
    for number in range(4):
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            path = base / folder / f"{name_of(number)}.png"
            if path.exists():
                path.write_bytes(b"not a mask")
    return base


def test_voc_trains_on_scribbles_and_never_opens_a_mask(files, tmp_path, monkeypatch):
    opened, original = [], MaskFolder.mask
    monkeypatch.setattr(MaskFolder, "mask", lambda self, index, size: opened.append(self.pairs[index][1]) or original(
        self, index, size
    ))  # fmt: skip
    experiment = file_run("robust_trust_region")
    execute(experiment, tmp_path / "runs", data_root=tmp_path)
    folder = folder_of(experiment, tmp_path / "runs")
    validation = files / "SegmentationClass" / f"{name_of(4)}.png"
    assert validation in opened
    assert {path.parent.name for path in opened if path != validation} == {"pascal_2012_scribble"}

    outputs, measured, network = load_outputs(folder), last(folder), trained(experiment, folder, 21)
    image, truth = read(files / "JPEGImages" / f"{name_of(4)}.jpg"), mask_of(4, 21)
    with torch.no_grad():
        scores = network(normalised(image))[0]
    prediction = scores.argmax(0).numpy()
    assert prediction.shape == size_of(4)[::-1] and measured["ignored"] == (truth == 255).sum()
    counts = np.zeros((21, 21), int)
    np.add.at(counts, (truth[truth < 255], prediction[truth < 255]), 1)
    assert measured["confusion"] == counts.tolist()
    expected = grid_potts(normalised(image)[0].double().numpy(), lambda p, q: prediction[p] != prediction[q])
    assert measured["potts_energy"] == pytest.approx(expected, rel=1e-4)
    assert measured["proposal_accuracy"] is None and measured["proposal_miou"] is None

    shown = outputs["pool_index"].tolist()
    assert shown == [0, 1, 2, 3] and outputs["pool_images"].shape == (4, 3, FRAME, FRAME)
    for number in shown:
        width, height = size_of(number)
        scribbles = outputs["pool_scribbles"][number]
        given = np.array(Image.open(files / "pascal_2012_scribble" / f"{name_of(number)}.png"))
        assert np.array_equal(scribbles[:height, :width], given) and (given != 255).any()
        outside = torch.ones(FRAME, FRAME, dtype=torch.bool)
        outside[:height, :width] = False
        proposal, prediction = outputs["pool_proposal"][number], outputs["pool_prediction"][number]
        assert (scribbles[outside] == 254).all() and (proposal[outside] == 255).all()
        assert torch.equal(prediction == 255, outside)
        assert set(proposal[~outside].tolist()) <= {0, number + 1}  # the labels of its scribbles
        seeds = scribbles < 21
        assert torch.equal(proposal[seeds], scribbles[seeds])
        assert torch.equal(outputs["pool_reach"][number] == 1, seeds)
        assert torch.equal(outputs["pool_reach"][number].isinf(), ~seeds)
    assert (outputs["pool_truth"] == 255).all() and outputs["pool_log_probs"].shape == (4, 21, FRAME, FRAME)


def test_whole_images_are_solved_and_crops_of_them_are_trained_on(files, tmp_path):
    experiment = file_run("trust_region")
    run = task.prepare(experiment, resolve(experiment), torch.device("cpu"), tmp_path)
    method = run.method.train()
    assert type(method.views) is PaddedViews and method.proposals.shape == (4, FRAME, FRAME)
    assert set(run.generators) == {"views"} and run.monitor.truth is None
    method.begin_stage(1, run.pool)
    before = run.generators["views"].get_state()
    method.begin_epoch(0, run.pool)
    assert torch.equal(before, run.generators["views"].get_state())  # without chance
    index = torch.tensor([1, 3])
    items = run.pool.take(index)
    losses = method.losses({"scribbles": items}, Now(0, STEPS, 0, 1, None))
    told = losses.pseudo["proposals"]
    assert told.label.shape == (2, 32, 32) and told.valid.any()
    for number, label, valid in zip(index.tolist(), told.label, told.valid, strict=True):
        assert set(label[valid].tolist()) <= {0, number + 1}
    with NoWaiting():
        method.losses({"scribbles": items}, Now(0, STEPS, 0, 1, None))


def test_a_run_on_files_that_was_stopped_ends_as_if_undisturbed(files, tmp_path):
    def stop(done, total, row):
        if done == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    experiment = file_run("robust_trust_region")
    with pytest.raises(Interrupted):
        execute(experiment, tmp_path / "cut", data_root=tmp_path, on_step=stop)
    for place in ("cut", "whole"):
        execute(experiment, tmp_path / place, data_root=tmp_path)
    same_result(*(folder_of(experiment, tmp_path / place) for place in ("cut", "whole")))


def test_full_supervision_on_files_reads_masks_and_no_scribbles(monkeypatch, tmp_path):
    monkeypatch.setattr(task, "FRAME", FRAME)
    base = write_scribbles(monkeypatch, tmp_path)
    (base / "pascal_2012_scribble").rename(tmp_path / "gone")
    experiment = file_run("full")
    run = task.prepare(experiment, resolve(experiment), torch.device("cpu"), tmp_path)
    items, outputs = run.pool.take(torch.arange(4)), run.outputs(run.method.network)
    for number in range(2):  # VOC's own masks; those of the extra images have lost their void
        width, height = size_of(number)
        assert np.array_equal(items.labels[number, :height, :width], mask_of(number, 21))
        assert np.array_equal(outputs["pool_truth"][number, :height, :width], mask_of(number, 21))
    assert not (outputs["pool_truth"] == 254).any() and set(outputs["pool_scribbles"].unique().tolist()) == {254, 255}
    assert outputs["pool_reach"].isinf().all()
    with pytest.raises(DataError, match="none of .*pascal_2012_scribble"):
        task.prepare(file_run("adm"), resolve(file_run("adm")), torch.device("cpu"), tmp_path)
