"""The command line: what it prints, and the exit status of everything that can go wrong."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from repro import runs
from repro.__main__ import main, parse_override
from repro.batch import execute, plan, report
from repro.experiment import Experiment, run_id
from repro.files import CorruptFile
from repro.tasks import labels as task
from repro.train import Interrupted, NonFiniteLoss
from tests.fake_runs import write_run

TINY = ["--method", "supervised", "--scale", "tiny", "--set", "steps=1", "--set", "batch=2"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("threshold=0.9", 0.9), ("lr=1e-3", 1e-3), ("batch=64", 64), ("flip=false", False), ("flip=true", True),
        ("strong=ctaugment", "ctaugment"), ("network=wrn-28-2", "wrn-28-2"), ("strong=", ""), ("a=b=c", "b=c"),
        ('strong="64"', "64"), ("x=null", None), ("x=[1, 2]", [1, 2]), ("flip=True", "True"),
    ],
)  # fmt: skip
def test_an_override_is_read_as_json_or_as_a_string(text, value):
    name, read = parse_override(text)
    assert name == text.partition("=")[0] and read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--method", "fixmtach"], "unknown method of commatch 'fixmtach' (did you mean 'fixmatch'?)"),
        (["run", "--scale", "huge"], "unknown scale 'huge'; known: mini, paper, tiny"),
        (["run", "--labels", "7"], "7 labels: must be a positive multiple"),
        (["run", "--seed", "-1"], "seed is -1"),
        (["run", "--set", "treshold=0.9"], "unknown setting of commatch 'treshold'"),
        (["run", "--set", "threshold"], "--set 'threshold' does not read NAME=VALUE, for example --set threshold=0.9"),
        (["run", "--set", "=0.9"], "--set '=0.9' does not read NAME=VALUE"),
        (["run", "--set", "flip=True"], "Recipe.flip is 'True' (str); it must be of type bool"),
        (["run", "--set", "lr=NaN"], "Recipe.lr is nan; it must be finite"),
        (["run", "--set", "lr=[1]"], "Recipe.lr is [1] (list); it must be of type float"),
        (["run", "--set", "network=null"], "Recipe.network is None (NoneType); it must be of type str"),
        (["run", "--set", "dropout=0"], "the network has none: set dropout > 0"),
        (["run", "--device", "gpu"], "unknown device 'gpu'; use auto, cpu"),
        (["run", "--record", "{"], "--record '{' is not JSON"),
        (["run", "--record", "[]"], "must be a JSON object"),
        (["run", "--record", '{"papr": 1}'], "unknown field of an experiment 'papr' (did you mean 'paper'?)"),
        (["run", "--record", '{"labels": "40"}'], "labels is '40' (str)"),
        (["run", "--data", "cifar10", "--labels", "40"], "cifar10, split 'train' is not available. Looked in:"),
        (["plan", "--paper", "pcr"], "unknown paper 'pcr' (did you mean 'pcre'?)"),
        (["plan", "--paper", "pcre", "--table", "1z"], "unknown table of pcre '1z'"),
        (["rerun", "--claims", "tocoo"], "did you mean 'toco'?"),
        (["plan", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["plan", "--main", "--workers", "-1"], "workers is -1; it must be 0"),
        (["report", "--scale", "huge"], "unknown scale 'huge'"),
        (["export", "--to", "x.txt"], "x.txt must end in .csv or .parquet"),
        (["export", "--to", "x.csv", "--runs", "none"], "no finished run in none; nothing to export"),
        (["export", "--to", "x.csv", "--label", "../ann"], "label is '../ann'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("REPRO_DATA", raising=False)
    monkeypatch.setattr(execute, "execute", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("repro: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["trian"], ["run", "--labels", "many"], ["run", "--scael", "mini"]])
def test_an_unknown_word_is_status_2_with_usage(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Usage: python -m repro")


def test_help_does_not_load_torch():
    code = "import sys\nfrom repro.__main__ import main\nassert main(['--help']) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and " export " in done.stdout


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (CorruptFile("a is cut"), 1, "repro: CorruptFile: a is cut\n"),
        (runs.RunBusy("a is busy"), 1, "repro: RunBusy: a is busy\n"),
        (NonFiniteLoss("step 3"), 1, "repro: NonFiniteLoss: step 3\n"),
        (OSError("cannot write a"), 1, "repro: OSError: cannot write a\n"),
        (Interrupted("stopped at step 3"), 130, "repro: stopped at step 3\n"),
        (KeyboardInterrupt(), 130, "repro: interrupted\n"),
    ],
)
def test_what_goes_wrong_while_running_has_its_status(monkeypatch, capsys, error, status, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(runs, "execute", fail)
    assert main(["run", *TINY]) == status
    assert capsys.readouterr().err == text


def test_a_programming_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(runs, "execute", lambda *_, **__: {}["missing"])
    with pytest.raises(KeyError):
        main(["run", *TINY])


def test_show_prints_the_id_and_the_recipe_and_runs_nothing(tmp_path, capsys):
    assert main(["show", *TINY, "--seed", "2", "--set", "lr=1"]) == 0
    first, rest = capsys.readouterr().out.split("\n", 1)
    shown = json.loads(rest)
    assert first == run_id(
        Experiment(method="supervised", scale="tiny", seed=2, overrides={"lr": 1.0, "steps": 1, "batch": 2})
    )
    assert shown["recipe"]["lr"] == 1.0 and shown["experiment"]["seed"] == 2
    assert not list(tmp_path.iterdir())


def test_run_trains_once_and_reports_the_same_the_second_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(task, "SHOWN", 60)
    assert main(["run", *TINY, "--progress-lines"]) == 0
    *progress, folder, result = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in progress] == [{"done": 1, "total": 1}]
    assert Path(folder).parent == tmp_path / "runs"  # REPRO_RUNS
    final = runs.load_metrics(Path(folder))["reported"]["last"]["ema"]
    assert result.startswith(
        f"error {100 * final['error']:.2f} %, ECE {100 * final['ece_15']:.2f} % (15 right-closed bins)"
    )
    experiment = {"method": "supervised", "scale": "tiny", "overrides": {"steps": 1, "batch": 2}}
    assert main(["run", "--record", json.dumps(experiment), "--progress-lines"]) == 0
    assert capsys.readouterr().out.splitlines() == [folder, result]


@pytest.mark.parametrize(
    ("paper", "stored", "line"),
    [
        (
            "commatch",
            {"error": 0.25, "ece_15": 0.05, "ece_10_left": 0.06, "nll": 1.5, "brier": 0.4, "accuracy": 0.75},
            "error 25.00 %, ECE 5.00 % (15 right-closed bins), NLL 1.500, Brier 0.400 (EMA weights, last evaluation)",
        ),
        (
            "csl",
            {"miou": 0.6, "ece_15": 0.05, "pixel_accuracy": 0.9, "boundary_f": None, "iou": [0.6]},
            "mIoU 60.00 %, ECE 5.00 % (15 right-closed bins), pixel accuracy 90.00 %, boundary F-score undefined "
            "(EMA weights, last evaluation)",
        ),
    ],
)
def test_a_result_is_told_in_the_papers_metrics(monkeypatch, capsys, paper, stored, line):
    monkeypatch.setattr(runs, "execute", lambda *_, **__: {"reported": {"last": {"ema": stored}}})
    data = ["--data", "scenes", "--labels", "20"] if paper == "csl" else []
    assert main(["run", "--paper", paper, "--method", "supervised", *data]) == 0
    assert capsys.readouterr().out.splitlines()[1] == line


def test_the_command_itself_exits_with_the_status():
    command = [sys.executable, "-m", "repro", "run", "--set", "bogus=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("repro: unknown setting of commatch 'bogus'") and done.stderr.count("\n") == 1


def test_plan_prints_the_runs_of_an_ablation_and_their_bill(tmp_path, capsys):
    wanted = ["plan", "--paper", "pcre", "--table", "1a", "--seeds", "2", "--runs", str(tmp_path / "none")]
    assert main([*wanted, "--workers", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("time      why ") and out.count("pcre: ablation 1a") == 8 and ", 3 at a time (" in out
    assert main([*wanted, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["bill"]["todo"] == len(shown["runs"]) == 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "selected"),
    [
        ([], ([], [], [], [], False, "mini", range(1))),
        (["--claims"], ([], [], [], True, False, "mini", range(1))),
        (["--claims", "--main"], ([], [], [], True, True, "mini", range(1))),
        (["--claims", "toco", "dupl"], ([], [], [], ["toco", "dupl"], False, "mini", range(1))),
        (
            ["--paper", "csl", "pcre", "--table", "main", "--table", "1a", "--ablation=rule", "--main",
             "--scale", "tiny", "--seeds", "3"],
            (["csl", "pcre"], ["main", "1a"], ["rule"], [], True, "tiny", range(3)),
        ),
    ],
)  # fmt: skip
def test_plan_and_rerun_take_the_same_selection(monkeypatch, tmp_path, arguments, selected):
    asked, reran = [], []

    def select(*chosen):
        asked.append(tuple(list(item) if isinstance(item, tuple) else item for item in chosen))
        return {}

    def stand_in(*chosen, **settings):
        reran.append((*chosen, settings))
        return SimpleNamespace(exit_status=1)

    monkeypatch.setattr(plan, "select", select)
    monkeypatch.setattr(execute, "execute", stand_in)
    assert main(["plan", *arguments]) == 0
    options = ["--workers", "2", "--retries", "0", "--time-limit", "60", "--engine", "local", "--device", "cpu"]
    assert main(["rerun", *arguments, *options, "--runs", str(tmp_path), "--profile", "slurm"]) == 1
    assert main(["rerun", *arguments]) == 1
    assert asked == [selected] * 3
    settings = {"engine": "local", "workers": 2, "device": "cpu", "retries": 0, "time_limit": 60.0,
                "profile": "slurm", "data_root": None}  # fmt: skip
    usual = {"engine": "auto", "workers": 0, "device": "auto", "retries": 1, "time_limit": None, "profile": None}
    assert reran == [([], tmp_path, settings), ([], None, usual | {"data_root": None})]


def test_stale_runs_are_planned_again_only_when_asked(tmp_path, capsys):
    write_run(Experiment(method="supervised"), tmp_path)
    wanted = ["plan", "--paper", "commatch", "--main", "--runs", str(tmp_path)]
    assert main(wanted) == main([*wanted, "--stale"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 runs to do (1 finished, 3 missing; 1 finished by other code, which --stale runs again)" in out
    assert "4 of 4 runs to do (1 stale, 3 missing)" in out


def test_finished_runs_are_exported(tmp_path, capsys):
    mine = write_run(Experiment(), tmp_path / "mine").name
    sent = tmp_path / "sent.parquet"
    assert main(["export", "--to", str(sent), "--runs", str(tmp_path / "mine"), "--label", "ann"]) == 0
    assert capsys.readouterr().out.startswith("1 runs, ")
    assert set(pd.read_parquet(sent)["run"]) == {mine}


def test_reports_are_built_from_the_runs_that_are_there_and_published_only_when_asked(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(report, "build", lambda *chosen, **how: asked.append((*chosen, how)) or tmp_path / "index.html")
    assert main(["report", "--scale", "tiny", "--seeds", "2", "--runs", str(tmp_path)]) == 0
    assert main(["report", "--publish"]) == 0
    assert asked == [
        ("tiny", range(2), tmp_path, {"publish": False}), ("mini", range(5), runs.runs_folder(), {"publish": True}),
    ]  # fmt: skip
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n" * 2
