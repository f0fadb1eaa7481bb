"""The main job: what it runs, what it says of agreement and of what it leaves out, and its exit status."""

import shlex

import pandas as pd
import pytest

from figures import agreement, tables
from repro import runs
from repro.__main__ import main, parser
from repro.batch import local, plan, records, reproduce
from repro.batch.local import Outcome
from repro.experiment import run_id
from repro.grid import PAPERS
from repro.settings import SettingError
from tests.fake_runs import write_run


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The main job with runs that no training made and a report that is one file; returns what it was asked."""
    asked = {"ran": [], "published": []}
    for module in (plan, reproduce):  # two papers say as much as all
        monkeypatch.setattr(module, "PAPERS", {name: PAPERS[name] for name in ("commatch", "csl")})

    def run_all(experiments, root, workers, device):
        outcome = Outcome()
        for experiment in experiments:
            asked["ran"].append(experiment)
            if experiment.method == asked.get("failing"):
                outcome.failed.append((experiment, "first\nit broke"))
                continue
            write_run(experiment, root, error=0.25 + experiment.seed / 100, miou=0.5, cam_miou=0.5, potts_energy=3.0)
            outcome.finished.append(experiment)
        return outcome

    def build(scale, seeds, root, checkout=None):
        asked["published"].append(checkout)
        if asked.get("renew"):
            asked["renew"].unlink()
        return root / f"report-{scale}" / "index.html"

    monkeypatch.setattr(reproduce, "run_all", run_all)
    monkeypatch.setattr(reproduce.report, "build", build)
    monkeypatch.setattr(reproduce, "COMMITTED", tmp_path / "committed.csv")
    monkeypatch.setattr(local, "COMMITTED", tmp_path / "committed.csv")
    return asked


def commit(path, root, seeds):
    experiments = plan.select(main=True, seeds=seeds)
    for experiment in experiments:
        write_run(experiment, root, error=0.25 + experiment.seed / 100, miou=0.5, cam_miou=0.5, potts_energy=3.0)
    records.save(tables.collect(experiments, root), path)


def test_one_seed_of_every_papers_main_job_by_default(job, tmp_path, capsys):
    assert reproduce.reproduce(root=tmp_path) == 0
    wanted = [item for paper in plan.PAPERS.values() for item in paper.main_experiments("mini", (0,))]
    assert [run_id(item) for item in job["ran"]] == list(dict.fromkeys(map(run_id, wanted)))
    assert parser().parse_args(["reproduce"]).seeds == 1
    out = capsys.readouterr().out
    assert out.startswith(f"main job: {len(job['ran'])} runs at scale mini, seeds 0, commatch, csl\n")
    assert "agreement with the committed results: none is committed of these runs" in out


def test_agreement_is_told_as_it_was_before_the_report_renewed_what_is_committed(job, tmp_path, capsys):
    commit(tmp_path / "committed.csv", tmp_path / "theirs", (0,))
    job["renew"] = tmp_path / "committed.csv"
    assert reproduce.reproduce(root=tmp_path / "mine") == 0
    count = len(job["ran"])
    assert f"agreement with the committed results, {count} runs: {count} identical" in capsys.readouterr().out


def test_a_disagreement_is_told_and_changes_no_status(job, tmp_path, capsys, monkeypatch):
    commit(tmp_path / "committed.csv", tmp_path / "theirs", (0,))
    runs_file, numbers_file = tmp_path / "committed.csv", tmp_path / "committed_numbers.csv"
    runs_file.write_text(runs_file.read_text().replace("2026-01", "2025-01"))
    frame = pd.read_csv(numbers_file, dtype=str, keep_default_na=False)
    frame.assign(error=frame["error"].replace("0.25", "0.5")).to_csv(numbers_file, index=False)
    assert reproduce.reproduce(root=tmp_path / "mine") == 0
    out = capsys.readouterr().out
    assert "differs: supervised on fashion, 100 labels, seed 0: error (%) 25.00, committed 50.00, tolerance 5.00" in out
    monkeypatch.setattr(agreement, "FACTS", ("device",))
    assert reproduce.reproduce(root=tmp_path / "mine") == 0
    assert "WARNING: supervised on fashion, 100 labels, seed 0: error (%) 25.00" in capsys.readouterr().out


def test_what_was_left_out_is_counted_and_its_commands_are_real(job, tmp_path, capsys):
    whole, main = plan.select(seeds=(0,)), plan.select(main=True)
    rest = [item for item in whole if item not in main]
    write_run(rest[0], tmp_path)
    reproduce.reproduce(root=tmp_path)
    out = capsys.readouterr().out
    told = f"left out: {len(rest)} of the {len(whole)} runs that all tables, ablations and claims need with 1 seed "
    assert told + "(1 of them are finished here); 4 further seeds" in out
    assert "make reproduce SEEDS=5\n" in out
    commands = [line.split(": ", 1)[1] for line in out.splitlines() if ": python -m repro " in line]
    assert len(commands) == 2
    for command in commands:
        options = parser().parse_args(shlex.split(command)[3:])
        assert (options.seeds, options.scale, options.paper) == (5, "mini", [])


def test_with_enough_seeds_only_the_rest_is_left_out(job, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "MINIMUM_SEEDS", 2)
    experiments = list(plan.select(main=True, scale="tiny", seeds=(0, 1)))
    lines = reproduce.left_out(experiments, "tiny", (0, 1), tmp_path)
    assert "further seed" not in lines[0] and not any("make" in line for line in lines)
    assert reproduce.left_out(experiments, "tiny", (0,), tmp_path)[1].endswith("make reproduce SCALE=tiny SEEDS=2")


def test_a_failed_run_is_status_1_and_the_rest_is_still_told(job, tmp_path, capsys):
    job["failing"] = "flexmatch"
    assert reproduce.reproduce(root=tmp_path) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in err and "it broke" in err and "first" not in err and "left out: " in out


def test_committed_results_are_renewed_only_where_none_is_dropped(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "left_out", lambda *_: [])
    usual = runs.runs_folder()
    commit(tmp_path / "committed.csv", tmp_path / "theirs", (0, 1))
    reproduce.reproduce(seeds=1)
    assert "figures/ and README.md are left as they are: " in capsys.readouterr().out
    reproduce.reproduce(seeds=2)
    assert "left as they are" not in capsys.readouterr().out
    reproduce.reproduce(seeds=2, root=tmp_path / "elsewhere")
    reproduce.reproduce("tiny", seeds=2, root=usual)
    assert job["published"] == [None, reproduce.CHECKOUT, None, None]


def test_a_main_job_of_all_seeds_keeps_committed_ablations_that_it_has_not_run(job, tmp_path, monkeypatch, capsys):
    job_runs, whole = plan.select(main=True, seeds=(0,)), plan.select(seeds=(0,))
    ablated = next(item for item in whole if item not in job_runs)
    for item in (*job_runs, ablated):
        write_run(item, tmp_path / "theirs", error=0.3, miou=0.5, cam_miou=0.5, potts_energy=3.0)
    records.save(tables.collect([*job_runs, ablated], tmp_path / "theirs"), tmp_path / "committed.csv")
    reproduce.reproduce(seeds=1)
    assert job["published"] == [None]
    assert f"1 committed run would be dropped, such as {run_id(ablated)}" in capsys.readouterr().out
    write_run(ablated, runs.runs_folder(), error=0.3)
    reproduce.reproduce(seeds=1)
    assert job["published"][1] == reproduce.CHECKOUT


def test_publishing_by_hand_refuses_to_drop_runs(job, tmp_path, capsys):
    commit(tmp_path / "committed.csv", tmp_path / "theirs", (0,))
    asked = ["report", "--seeds", "1", "--publish", "--runs"]
    assert main([*asked, str(tmp_path / "mine")]) == 2
    assert "not published: " in (said := capsys.readouterr().err) and "delete figures/runs.csv" in said
    assert main([*asked, str(tmp_path / "theirs")]) == 0
    assert main(["report", "--seeds", "1", "--runs", str(tmp_path / "mine")]) == 0
    assert job["published"] == [reproduce.CHECKOUT, None]


@pytest.mark.parametrize(("changes", "message"), [({"scale": "huge"}, "unknown scale"), ({"seeds": 0}, "at least 1")])
def test_bad_input_runs_nothing(job, tmp_path, changes, message):
    with pytest.raises(SettingError, match=message):
        reproduce.reproduce(root=tmp_path, **changes)
    assert not job["ran"]
