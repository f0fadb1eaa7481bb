"""The main job: what it runs, when it publishes, what it says of what it leaves out, and its exit status."""

import shlex

import pytest
import typer

from figures import tables
from repro import runs
from repro.__main__ import app
from repro.batch import plan, records, report, reproduce
from repro.batch.execute import Summary
from repro.experiment import run_id
from repro.grid import PAPERS
from repro.settings import SettingError
from tests.fake_runs import write_run

NUMBERS = {"miou": 0.5, "cam_miou": 0.5, "potts_energy": 3.0}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The main job of two papers, with runs that no training made and a report that is one file."""
    asked = {"ran": [], "published": []}
    for module in (plan, reproduce):
        monkeypatch.setattr(module, "PAPERS", {name: PAPERS[name] for name in ("commatch", "csl")})

    def execute(planned, root, **how):
        assert how == {"engine": "local", "workers": 0, "device": "auto"}
        summary = Summary()
        for experiment in (item.experiment for item in planned if item.todo):
            asked["ran"].append(experiment)
            if experiment.method == asked.get("failing"):
                summary.failed.append((experiment, "bug", "it broke"))
                continue
            write_run(experiment, root, error=0.25, **NUMBERS)
            summary.finished.append(experiment)
        return summary

    def build(scale, seeds, root, publish=False):
        asked["published"].append(publish)
        return root / f"report-{scale}" / "index.html"

    monkeypatch.setattr(reproduce, "execute", execute)
    monkeypatch.setattr(report, "build", build)
    monkeypatch.setattr(records, "COMMITTED_RUNS", tmp_path / "committed.csv")
    return asked


def commit(path, root, experiments):
    for experiment in experiments:
        write_run(experiment, root, error=0.25, **NUMBERS)
    records.save(tables.collect(experiments, root), path)


def test_one_seed_of_every_papers_main_job_by_default(job, tmp_path, capsys):
    assert reproduce.reproduce(root=tmp_path) == 0
    wanted = [item for paper in plan.PAPERS.values() for item in paper.main_experiments("mini", (0,))]
    assert [run_id(item) for item in job["ran"]] == list(dict.fromkeys(map(run_id, wanted)))
    out = capsys.readouterr().out
    assert out.startswith(f"main job: {len(job['ran'])} runs at scale mini, seeds 0, commatch, csl\n")
    assert f"report: {tmp_path / 'report-mini' / 'index.html'}\n" in out
    job["ran"].clear()
    assert reproduce.reproduce(root=tmp_path) == 0 and not job["ran"]


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
        name, *words = shlex.split(command)[3:]
        options = typer.main.get_command(app).commands[name].make_context(name, words).params
        assert (options["seeds"], options["scale"], list(options["paper"])) == (5, "mini", [])


def test_with_enough_seeds_only_the_rest_is_left_out(job, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "VERDICT_SEEDS", 2)
    experiments = list(plan.select(main=True, scale="tiny", seeds=(0, 1)))
    lines = reproduce.left_out(experiments, "tiny", (0, 1), tmp_path)
    assert "further seed" not in lines[0] and not any("make" in line for line in lines)
    assert reproduce.left_out(experiments, "tiny", (0,), tmp_path)[1].endswith("make reproduce SCALE=tiny SEEDS=2")


def test_a_failed_run_is_status_1_and_the_rest_is_still_told(job, tmp_path, capsys):
    job["failing"] = "flexmatch"
    assert reproduce.reproduce(root=tmp_path) == 1
    assert "report: " in (out := capsys.readouterr().out) and "left out: " in out


def test_committed_results_are_renewed_only_where_none_is_dropped(job, tmp_path, monkeypatch, capsys):
    """Of a `mini` job in the usual folder; a committed ablation that is not finished here is kept as well."""
    monkeypatch.setattr(reproduce, "left_out", lambda *_: [])
    usual, main = runs.runs_folder(), plan.select(main=True, seeds=(0, 1))
    ablated = next(item for item in plan.select(seeds=(0,)) if item not in main)
    commit(tmp_path / "committed.csv", tmp_path / "theirs", [*main, ablated])
    reproduce.reproduce(seeds=1)
    assert "figures/rendered/ is left as it is: " in capsys.readouterr().out
    reproduce.reproduce(seeds=2)
    assert f"1 committed run would be dropped, such as {run_id(ablated)}" in capsys.readouterr().out
    write_run(ablated, usual)
    reproduce.reproduce(seeds=2)
    assert "left as it is" not in capsys.readouterr().out
    reproduce.reproduce(seeds=2, root=tmp_path / "elsewhere")
    reproduce.reproduce("tiny", seeds=2, root=usual)
    assert job["published"] == [False, False, True, False, False]


@pytest.mark.parametrize(("changes", "message"), [({"scale": "huge"}, "unknown scale"), ({"seeds": 0}, "at least 1")])
def test_bad_input_runs_nothing(job, tmp_path, changes, message):
    with pytest.raises(SettingError, match=message):
        reproduce.reproduce(root=tmp_path, **changes)
    assert not job["ran"]
