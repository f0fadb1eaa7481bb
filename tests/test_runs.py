"""Runs end to end: what a folder holds, resuming after kills, and every file that may have gone wrong."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro import files, runs
from repro.data import catalogue
from repro.data.augment import Views
from repro.experiment import Experiment, record, resolve, run_id
from repro.files import CorruptFile, History
from repro.models.wide_resnet import wide_resnet
from repro.runs import RunBusy, execute
from repro.settings import SettingError
from repro.tasks import labels as task
from repro.tasks.monitors import REPORTING, measure, predict
from repro.train import CHECKPOINT, MOMENTS, Interrupted

FAST = {"steps": 6, "batch": 4, "log_every": 1, "checkpoint_every": 2, "eval_every": 3}
SUPERVISED = Experiment("commatch", "supervised", "fashion", 100, 0, "tiny", FAST)
COMMATCH = Experiment(
    "commatch", "commatch", "fashion", 100, 0, "tiny", FAST | {"steps": 10, "eval_every": 10, "passes": 2}
)
COMMAND = [
    sys.executable,
    "-m",
    "repro",
    "run",
    "--progress-lines",
    "--record",
    json.dumps(record(COMMATCH)["experiment"]),
]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Keep the predictions of 60 pool images for figures, not a thousand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "SHOWN", 60)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with both runs finished, undisturbed."""
    folder = tmp_path_factory.mktemp("runs")
    for experiment in (SUPERVISED, COMMATCH):
        execute(experiment, folder)
    return folder


def untimed(folder):
    """Everything that a run says of its result: not its time and place, nor the spelling of its experiment."""
    metrics = runs.load_metrics(folder)
    rows = [
        {k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in History(folder).rows
    ]
    return {k: v for k, v in metrics.items() if k not in ("cost", "provenance", "experiment")}, rows


def tensors(folder):
    return load_file(folder / "weights.safetensors") | runs.load_outputs(folder)


def same_result(a, b):
    assert untimed(a) == untimed(b)
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def half_trained(root, experiment=SUPERVISED):
    """Stop a run by SIGTERM after some steps, as a scheduler would; returns its folder."""

    def stop(done, total, row):
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped at step 4 of 6; run it again to continue"):
        execute(experiment, root, on_step=stop)
    return runs.folder_of(experiment, root)


# What a finished run holds


@pytest.mark.parametrize("experiment", [SUPERVISED, COMMATCH], ids=lambda e: e.method)
def test_a_finished_run_holds_its_files_and_nothing_else(root, experiment):
    folder = runs.folder_of(experiment, root)
    assert sorted(os.listdir(folder)) == [
        ".lock", "experiment.json", "history.jsonl", "metrics.json", "outputs.safetensors", "weights.safetensors",
    ]  # fmt: skip
    assert folder.name == run_id(experiment) and runs.is_finished(experiment, root)


@pytest.mark.parametrize("experiment", [SUPERVISED, COMMATCH], ids=lambda e: e.method)
def test_metrics_say_what_was_run_what_came_out_and_how(root, experiment):
    folder = runs.folder_of(experiment, root)
    metrics = runs.load_metrics(folder)
    saved = json.loads(json.dumps(record(experiment)))
    assert {key: metrics[key] for key in saved} == saved
    assert json.loads((folder / "experiment.json").read_text()) == saved | {"data_digest": metrics["data_digest"]}
    assert set(metrics["reported"]) == set(REPORTING)
    for rule in REPORTING:
        for weights in ("ema", "live"):
            row = metrics["reported"][rule][weights]
            assert row["accuracy"] + row["error"] == pytest.approx(1, abs=1e-12)
            assert {"ece_15", "ece_10_left", "nll", "brier"} <= set(row)
    assert metrics["reported"]["best"]["ema"]["selected_on_test"] is True
    history = runs.load_history(folder)
    last = history.of("evaluation")[-1]
    reported = metrics["reported"]["last"]
    assert reported["live"] == last["live"] and reported["ema"] | last["ema"] == reported["ema"]
    assert all(
        name == "temperature" or name.startswith("scaled_") for name in reported["ema"].keys() - last["ema"].keys()
    )
    assert metrics["pseudo_labels"] == history.of("train")[-1]["pseudo"]
    assert set(metrics["pseudo_labels"]) == ({"positive", "negative"} if experiment is COMMATCH else set())
    cost = metrics["cost"]
    assert 0 < cost["train_seconds"] <= cost["wall_seconds"] and cost["peak_memory_mib"] > 100
    samples = resolve(experiment).steps * (4 + 20 * (experiment is COMMATCH))
    assert cost["samples_per_second"] * cost["train_seconds"] == pytest.approx(samples, rel=1e-6)


def test_the_summary_selects_by_the_metric_that_the_paper_names(tmp_path):
    history = History(tmp_path)
    for step, (live, ema) in enumerate(((0.2, 0.9), (0.7, 0.8), (0.5, 0.6))):
        history.append({"kind": "evaluation", "step": step, "live": {"miou": live}, "ema": {"miou": ema}})
    reported = runs.summary(history, "miou")
    assert {rule: reported[rule]["live"]["miou"] for rule in REPORTING} == {"last": 0.5, "median20": 0.5, "best": 0.7}
    assert reported["best"]["ema"] == {"miou": 0.9, "selected_on_test": True}


def test_provenance_names_code_packages_and_machine(root):
    provenance = runs.load_metrics(runs.folder_of(SUPERVISED, root))["provenance"]
    assert provenance["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(provenance["packages"]) == set(runs.PACKAGES)
    assert provenance["device"] == "cpu" and provenance["precision"] == "fp32" and provenance["threads"] == 1
    assert provenance["source_digest"] == runs.source_digest() and len(provenance["source_digest"]) == 16
    assert provenance["finished"].endswith("Z") and provenance["python"] == sys.version.split()[0]
    assert f"CPU capability usage: {provenance['instructions']}" in torch.__config__.show()
    assert {"commit", "dirty", "platform", "processor", "cores"} <= set(provenance)


def test_dirty_means_a_change_in_the_package(tmp_path, monkeypatch):
    package = tmp_path / "repro"
    package.mkdir()
    (package / "runs.py").write_text("one = 1\n")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", tmp_path, *arguments], check=True,
                       capture_output=True)  # fmt: skip

    def state():
        provenance = runs.provenance(torch.device("cpu"), resolve(SUPERVISED))
        return provenance["commit"], provenance["dirty"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert state() == (None, None)
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit, dirty = state()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "notes.txt").write_text("changed")
    assert state() == (commit, False)
    (package / "runs.py").write_text("two = 2\n")
    assert state() == (commit, True)


def test_saved_weights_reproduce_the_reported_numbers(root):
    folder = runs.folder_of(COMMATCH, root)
    recipe, source = resolve(COMMATCH), catalogue.SOURCES["fashion"]
    network = wide_resnet(recipe.network, 10, 1, recipe.variant, recipe.dropout, None, recipe.bn_momentum)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    test = catalogue.load("fashion", "test")
    logits = predict(network, test.images, Views(source.mean, source.std, source.flip))
    reported = runs.load_metrics(folder)["reported"]["last"]["ema"]
    measured = measure(logits, test.labels)
    assert measured.pop("per_class_accuracy") == reported["per_class_accuracy"]
    assert measured == pytest.approx({name: reported[name] for name in measured}, rel=1e-9)
    torch.testing.assert_close(runs.load_outputs(folder)["test_logits"], logits)


def test_a_second_call_reads_and_touches_nothing(root, monkeypatch):
    folder = runs.folder_of(SUPERVISED, root)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    monkeypatch.setattr(task, "prepare", None)  # calling it would fail
    assert execute(SUPERVISED, root, device="cuda:99") == runs.load_metrics(folder)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before


def test_the_first_call_returns_what_the_file_says(tmp_path, root):
    assert execute(SUPERVISED, tmp_path) == runs.load_metrics(runs.folder_of(SUPERVISED, tmp_path))
    same_result(runs.folder_of(SUPERVISED, tmp_path), runs.folder_of(SUPERVISED, root))


def test_moments_are_read_in_the_order_of_their_steps(tmp_path):
    expected = {step: {"confidence": torch.rand(2, 3), "label": torch.full((2, 3), step % 256).byte()}
                for step in (1000, 30, 200, 4)}  # fmt: skip
    for step, arrays in expected.items():
        files.save_state(tmp_path / MOMENTS / f"{step}.safetensors", arrays)
    (tmp_path / MOMENTS / ".5.safetensors.abc.part").write_text("what a kill in the middle of a write leaves")
    found = runs.load_moments(tmp_path)
    assert list(found) == [4, 30, 200, 1000]
    for step, arrays in found.items():
        assert arrays.keys() == expected[step].keys()
        assert all(torch.equal(arrays[name], expected[step][name]) for name in arrays)
    path = tmp_path / MOMENTS / "30.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match="30.safetensors cannot be read"):
        runs.load_moments(tmp_path)


def test_a_run_without_moments_has_none(root, tmp_path):
    assert runs.load_moments(runs.folder_of(SUPERVISED, root)) == {} == runs.load_moments(tmp_path / "nowhere")


# Kills


def start(tmp_path):
    return subprocess.Popen(
        [*COMMAND, "--runs", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip


def wait_for_step(child, step):
    for line in child.stdout:
        if json.loads(line)["done"] >= step:
            return
    raise AssertionError(child.stderr.read())


def test_a_run_killed_outright_ends_as_if_undisturbed(tmp_path, root):
    folder = runs.folder_of(COMMATCH, tmp_path)
    child = start(tmp_path)
    wait_for_step(child, 5)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not runs.is_finished(COMMATCH, tmp_path)
    assert (folder / CHECKPOINT).exists()
    (folder / ".metrics.json.abc.part").write_text("half")  # what a kill in the middle of a write leaves
    execute(COMMATCH, tmp_path)
    same_result(folder, runs.folder_of(COMMATCH, root))
    assert not list(folder.glob(".*.part"))


def test_a_terminated_run_saves_says_so_and_ends_as_if_undisturbed(tmp_path, root):
    folder = runs.folder_of(COMMATCH, tmp_path)
    child = start(tmp_path)
    wait_for_step(child, 1)
    with pytest.raises(RunBusy, match=f"{folder} is being run by another process; wait for it or stop it"):
        execute(COMMATCH, tmp_path)
    child.terminate()
    _, errors = child.communicate()
    assert child.returncode == 130 and errors.startswith("repro: stopped at step ") and errors.count("\n") == 1, errors
    assert (folder / CHECKPOINT).exists()
    execute(COMMATCH, tmp_path)
    same_result(folder, runs.folder_of(COMMATCH, root))


def test_a_run_killed_between_training_and_metrics_ends_as_if_undisturbed(tmp_path, root, monkeypatch):
    def write(path, value):
        if path.name == "metrics.json":
            raise KeyboardInterrupt
        files.write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "write_json", write)
        execute(SUPERVISED, tmp_path)
    assert not runs.is_finished(SUPERVISED, tmp_path)
    execute(SUPERVISED, tmp_path)
    same_result(runs.folder_of(SUPERVISED, tmp_path), runs.folder_of(SUPERVISED, root))


# Bad files, disks and devices


@pytest.mark.parametrize("spelling", [{"momentum": 0.9}, {"lr": 0.03, "nesterov": True}])
def test_a_half_trained_run_continues_under_another_spelling_of_its_recipe(tmp_path, root, spelling):
    """Defaults spelt out, as an ablation's default row does, and another paper's name lead to the same folder."""
    folder = half_trained(tmp_path)
    execute(SUPERVISED.with_(**spelling), tmp_path)
    same_result(folder, runs.folder_of(SUPERVISED, root))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda saved: saved["recipe"].update(lr=0.5), "since this run began: recipe differ; delete the folder"),
        (lambda saved: saved["recipe"]["method"].update(new=1), "recipe differ"),
        (lambda saved: saved["experiment"].update(seed=1, labels=250), "labels, seed differ"),
        (lambda saved: saved.update(data_digest="0"), "data_digest differ"),
        (lambda saved: saved.pop("recipe"), "recipe differ"),
        (lambda saved: saved.pop("experiment"), "is not the record of a run; delete the folder"),
    ],
)
def test_an_edited_record_is_refused(tmp_path, edit, message):
    path = half_trained(tmp_path) / "experiment.json"
    saved = json.loads(path.read_text())
    edit(saved)
    path.write_text(json.dumps(saved))
    with pytest.raises(CorruptFile, match=f"{path} .*{message}"):
        execute(SUPERVISED, tmp_path)


def test_a_record_that_is_no_record_is_refused(tmp_path):
    path = half_trained(tmp_path) / "experiment.json"
    for text in ("[]", '{"experiment": {', "3"):
        path.write_text(text)
        with pytest.raises(CorruptFile, match=f"{path} .*delete "):
            execute(SUPERVISED, tmp_path)


def test_changed_data_are_refused(tmp_path, monkeypatch):
    half_trained(tmp_path)
    original = task.prepare
    monkeypatch.setattr(task, "prepare", lambda *a: dataclasses.replace(original(*a), data_digest="other"))
    with pytest.raises(CorruptFile, match="the data changed, since this run began: data_digest differ"):
        execute(SUPERVISED, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"run": "another"}'])
def test_metrics_that_are_cut_or_of_another_run_are_refused(tmp_path, text):
    folder = runs.folder_of(SUPERVISED, tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(text)
    for read in (lambda: execute(SUPERVISED, tmp_path), lambda: runs.load_metrics(str(folder))):
        with pytest.raises(CorruptFile, match="metrics.json .*delete .*folder to run it again"):
            read()


def test_a_full_disk_is_named_and_the_run_continues_when_there_is_space(tmp_path, root, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(done, total, row):
        if done == 3:
            patch.setattr(files.os, "fsync", full)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"cannot write .*checkpoint.* \(.*No space left"):
        execute(SUPERVISED, tmp_path, on_step=fill)
    execute(SUPERVISED, tmp_path)
    same_result(runs.folder_of(SUPERVISED, tmp_path), runs.folder_of(SUPERVISED, root))


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write in .*/file/supervised.*; name another folder: --runs, or REPRO_RUNS"
    ):
        execute(SUPERVISED, tmp_path / "file")


def test_a_lock_that_the_file_system_cannot_give_is_not_called_busy(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="not supported") as error:
        execute(SUPERVISED, tmp_path)
    assert not isinstance(error.value, RunBusy)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gpu", "unknown device 'gpu'; use auto, cpu"), ("cuda:99", r"device 'cuda:99' is not there: \d+ CUDA")],
)
def test_a_wrong_device_is_refused_before_a_folder_is_made(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        execute(SUPERVISED, tmp_path, device=name)
    assert not list(tmp_path.iterdir())


def test_devices_by_name(monkeypatch):
    assert runs.choose_device("cpu") == torch.device("cpu")
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert runs.choose_device("auto").type == kind


def test_a_bad_combination_leaves_no_record(tmp_path):
    with pytest.raises(SettingError, match="dropout > 0"):
        execute(COMMATCH.with_(dropout=0.0), tmp_path)
    assert os.listdir(runs.folder_of(COMMATCH.with_(dropout=0.0), tmp_path)) == [".lock"]


def test_the_number_of_threads_is_the_recipes_and_put_back(tmp_path, monkeypatch):
    seen = []

    def prepare(*_):
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "prepare", prepare)
    for threads in (2, 0):
        with pytest.raises(KeyboardInterrupt):
            execute(SUPERVISED.with_(threads=threads), tmp_path)
    assert seen == [2, 1] and torch.get_num_threads() == 1


def test_metrics_are_json_even_when_a_number_is_not_finite():
    values = {"a": float("nan"), "b": [float("inf"), 1.0, None], "c": {"d": float("-inf"), "e": True, "f": "nan"}}
    assert runs._finite(values) == {"a": None, "b": [None, 1.0, None], "c": {"d": None, "e": True, "f": "nan"}}


def test_runs_live_where_the_environment_says_or_beside_the_package(tmp_path, monkeypatch):
    assert runs.runs_folder() == tmp_path / "runs" and runs.folder_of(SUPERVISED).parent == tmp_path / "runs"
    monkeypatch.setenv("REPRO_RUNS", "")
    assert runs.runs_folder() == Path(runs.__file__).parents[1] / "runs"
