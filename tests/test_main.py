"""The command line: what it prints, and the exit status of everything that can go wrong."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from figures import exchange
from repro import runs
from repro.__main__ import main, parse_override
from repro.batch import plan, report
from repro.experiment import Experiment, run_id
from repro.files import CorruptFile
from repro.settings import SettingError
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


@pytest.mark.parametrize("text", ["threshold", "=0.9", ""])
def test_an_override_without_name_or_sign_is_refused(text):
    with pytest.raises(SettingError, match="does not read NAME=VALUE, for example --set threshold=0.9"):
        parse_override(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "fixmtach"], "unknown method of commatch 'fixmtach' (did you mean 'fixmatch'?)"),
        (["--scale", "huge"], "unknown scale 'huge'; known: mini, paper, tiny"),
        (["--labels", "7"], "7 labels: must be a positive multiple"),
        (["--seed", "-1"], "seed is -1"),
        (["--set", "treshold=0.9"], "unknown setting of commatch 'treshold'"),
        (["--set", "threshold"], "--set 'threshold' does not read NAME=VALUE"),
        (["--set", "flip=True"], "Recipe.flip is 'True' (str); it must be of type bool"),
        (["--set", "lr=NaN"], "Recipe.lr is nan; it must be finite"),
        (["--set", "lr=[1]"], "Recipe.lr is [1] (list); it must be of type float"),
        (["--set", "network=null"], "Recipe.network is None (NoneType); it must be of type str"),
        (["--set", "dropout=0"], "the network has none: set dropout > 0"),
        (["--device", "gpu"], "unknown device 'gpu'; use auto, cpu"),
        (["--record", "{"], "--record '{' is not JSON"),
        (["--record", "[]"], "must be a JSON object"),
        (["--record", '{"papr": 1}'], "unknown field of an experiment 'papr' (did you mean 'paper'?)"),
        (["--record", '{"labels": "40"}'], "labels is '40' (str)"),
        (["--data", "cifar10", "--labels", "40"], "cifar10, split 'train' is not available. Looked in:"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "empty"))
    monkeypatch.delenv("REPRO_DATA", raising=False)
    assert main(["run", *arguments, "--runs", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("repro: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["trian"], ["run", "--labels", "many"], ["run", "--scael", "mini"]])
def test_an_unknown_word_is_status_2_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: python -m repro" in capsys.readouterr().err


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
        ([], ([], [], [], False, False, "mini", range(1))),
        (["--claims"], ([], [], [], True, False, "mini", range(1))),
        (["--claims", "toco", "dupl"], ([], [], [], ["toco", "dupl"], False, "mini", range(1))),
        (
            ["--paper", "csl", "pcre", "--table", "main", "--table", "1a", "--ablation", "rule", "--main",
             "--scale", "tiny", "--seeds", "3"],
            (["csl", "pcre"], ["main", "1a"], ["rule"], False, True, "tiny", range(3)),
        ),
    ],
)  # fmt: skip
def test_plan_and_rerun_take_the_same_selection(monkeypatch, tmp_path, arguments, selected):
    asked, reran = [], []
    monkeypatch.setattr(plan, "select", lambda *chosen: asked.append(chosen) or {})
    module = ModuleType("repro.batch.execute")
    module.rerun = lambda *chosen, **settings: reran.append((*chosen, settings)) or SimpleNamespace(exit_status=1)
    monkeypatch.setitem(sys.modules, "repro.batch.execute", module)
    assert main(["plan", *arguments]) == 0
    options = ["--workers", "2", "--retries", "0", "--time-limit", "60", "--engine", "sequential", "--device", "cpu"]
    assert main(["rerun", *arguments, *options, "--runs", str(tmp_path), "--profile", "slurm"]) == 1
    assert main(["rerun", *arguments]) == 1
    assert asked == [selected] * 3
    settings = {"engine": "sequential", "workers": 2, "device": "cpu", "retries": 0, "time_limit": 60.0,
                "profile": "slurm", "data_root": None}  # fmt: skip
    assert reran[0] == ([], tmp_path, settings)
    usual = {"engine": "auto", "workers": 0, "device": "auto", "retries": 1, "time_limit": None, "profile": None}
    assert reran[1] == ([], runs.runs_folder(), usual | {"data_root": None})


def test_stale_runs_are_planned_again_only_when_asked(tmp_path, capsys):
    write_run(Experiment(method="supervised"), tmp_path)
    wanted = ["plan", "--paper", "commatch", "--main", "--runs", str(tmp_path)]
    assert main(wanted) == main([*wanted, "--stale"]) == 0
    out = capsys.readouterr().out
    assert "3 of 4 runs to do (1 finished, 3 missing; 1 finished by other code, which --stale runs again)" in out
    assert "4 of 4 runs to do (1 stale, 3 missing)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--paper", "pcr"], "unknown paper 'pcr' (did you mean 'pcre'?)"),
        (["plan", "--paper", "pcre", "--table", "1z"], "unknown table of pcre '1z'"),
        (["rerun", "--claims", "tocoo"], "did you mean 'toco'?"),
        (["plan", "--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["plan", "--main", "--workers", "-1"], "workers is -1; it must be 0"),
        (["report", "--scale", "huge"], "unknown scale 'huge'"),
        (["export", "--to", "x.txt"], "x.txt must end in .csv or .parquet"),
        (["export", "--to", "x.csv", "--runs", "none"], "no finished run in none; nothing to export"),
        (["import", "none.csv", "--label", "ann"], "none.csv does not exist"),
        (["import", "none.csv", "--label", "../ann"], "label is '../ann'"),
    ],
    ids=str,
)
def test_bad_input_to_a_batch_is_one_line_and_status_2(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    module = ModuleType("repro.batch.execute")
    module.rerun = lambda *_, **__: pytest.fail("it ran")
    monkeypatch.setitem(sys.modules, "repro.batch.execute", module)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("repro: ") and message in err and err.count("\n") == 1


def test_results_go_out_and_come_in(tmp_path, capsys):
    mine = write_run(Experiment(), tmp_path / "theirs").name
    sent = str(tmp_path / "sent.parquet")
    assert main(["export", "--to", sent, "--runs", str(tmp_path / "theirs"), "--label", "ann", "--scale", "mini"]) == 0
    assert capsys.readouterr().out.startswith("1 runs, ")
    assert main(["import", sent, "--label", "ann", "--runs", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out == f"1 runs added to {tmp_path / 'mine' / 'imported' / 'ann.parquet'}\n"
    assert set(exchange.imported(tmp_path / "mine")["run"]) == {mine}


def test_report_builds_from_the_runs_that_are_there_and_commits_nothing(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(report, "build", lambda *chosen: asked.append(chosen) or tmp_path / "index.html")
    assert main(["report", "--scale", "tiny", "--seeds", "2", "--runs", str(tmp_path)]) == 0
    assert main(["report"]) == 0
    assert asked == [("tiny", (0, 1), tmp_path, False), ("mini", (0, 1, 2, 3, 4), runs.runs_folder(), False)]
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n" * 2
