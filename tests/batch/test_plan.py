"""Plans: which runs are wanted and by whom, what became of each, why it will run, and what that costs."""

import json
from collections import defaultdict

import pytest
import torch

from repro import runs
from repro.batch import plan, records
from repro.batch.plan import Planned, bill, select
from repro.experiment import Experiment, record, run_id
from repro.files import read_json, save_state, write_json
from repro.grid import PAPERS
from repro.settings import SettingError
from repro.train import CHECKPOINT
from tests.fake_runs import write_run

SUPERVISED = Experiment("commatch", "supervised")
FIXMATCH = SUPERVISED.with_(method="fixmatch")


@pytest.fixture(autouse=True)
def nothing_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "COMMITTED_RUNS", tmp_path / "none.csv")


def finish(experiment, root, seconds=10.0, wall=0.0, device="cpu", code=None, **recipe):
    """A finished run that this code made, unless `code` is another digest; recipe: fields that it had instead."""
    folder = write_run(experiment, root)
    metrics = read_json(folder / "metrics.json")
    metrics["cost"] |= {"train_seconds": seconds, "wall_seconds": wall}
    metrics["provenance"] |= {"device": device, "source_digest": code or runs.source_digest()}
    if recipe:  # another recipe has another folder
        metrics["recipe"] |= recipe
        folder = folder.rename(f"{folder}"[:-10] + "0123456789")
        metrics["run"] = folder.name
    write_json(folder / "metrics.json", metrics)
    return folder


def planned(experiment, root, **options) -> Planned:
    (item,) = plan.plan({experiment: ("commatch main job",)}, root, **options)
    return item


# Which experiments


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_by_default_every_table_ablation_claim_and_main_job_is_wanted_once_a_run(scale):
    by = defaultdict(set)
    for name, paper in PAPERS.items():
        for kind, grids in (("table", paper.tables), ("ablation", paper.ablations)):
            for key, table in grids.items():
                for column in table.columns_at(scale):
                    for row in table.rows:
                        by[run_id(table.cell(row, column, scale, (3,))[0])].add(f"{name} {kind} {key}")
        for claim in paper.claims.values():
            for side in claim.pair(scale, 3):
                by[side and run_id(side)].add(f"{name} claims")
        for experiment in paper.main_experiments(scale, (3,)):
            by[run_id(experiment)].add(f"{name} main job")
    by.pop(None, None)
    selection = select(scale=scale, seeds=(3,))
    assert {run_id(experiment): set(who) for experiment, who in selection.items()} == by
    assert all(len(set(who)) == len(who) for who in selection.values())


def test_a_run_that_papers_share_names_all_who_want_it():
    selection = select(["commatch", "calibratemix"])
    (who,) = (who for experiment, who in selection.items() if run_id(experiment) == run_id(FIXMATCH))
    assert who[:4] == ("commatch main job", "calibratemix main job", "commatch claims", "calibratemix claims")
    assert {"commatch table 2", "commatch ablation dropout", "calibratemix table main"} == set(who[4:])


def test_a_table_may_be_an_ablation_and_one_seed_comes_before_the_next():
    selection = select(["pcre"], tables=["1a"], seeds=(0, 1))
    asked = [(experiment.seed, dict(experiment.overrides)["tau"]) for experiment in selection]
    assert asked == [(seed, tau) for seed in (0, 1) for tau in (0.8, 0.7, 0.6, 0.5)]
    assert set(selection.values()) == {("pcre ablation 1a",)}
    assert select(["pcre"], ablations=["1a"], seeds=(0, 1)) == selection == select(tables=["1a"], seeds=(0, 1))


def test_what_is_asked_for_together_is_joined():
    both = select(["csl"], tables=["main"], claims=["scope"])
    parts = select(["csl"], tables=["main"]) | select(["csl"], claims=["scope"])
    assert {run_id(item) for item in both} == {run_id(item) for item in parts}
    assert {item.overrides for item in select(["csl"], claims=["scope"])} == {(), (("scope", "class"),)}
    assert len(select(["csl"], claims=True)) > len(select(["csl"], claims=["scope"])) == 2
    assert select(["pcre"], tables=["coco"]) == {}  # a table of published data alone has nothing at a small scale


def test_the_main_job_is_what_papers_say_and_first_seeds_come_first():
    wanted = [e for seed in (0, 1) for paper in PAPERS.values() for e in paper.main_experiments("tiny", (seed,))]
    ids = [run_id(item) for item in select(main=True, scale="tiny", seeds=(0, 1))]
    assert ids == list(dict.fromkeys(map(run_id, wanted)))


@pytest.mark.parametrize("paper", PAPERS.values(), ids=PAPERS)
def test_no_table_has_the_name_of_an_ablation(paper):
    assert not set(paper.tables) & set(paper.ablations)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"papers": ["pcr"]}, r"unknown paper 'pcr' \(did you mean 'pcre'\?\); known: calibratemix, commatch, csl"),
        ({"papers": ["pcre"], "tables": ["1z"]}, "unknown table of pcre '1z'.*known: 1a, 1b.*coco.*main, start"),
        ({"papers": ["pcre"], "ablations": ["main"]}, "unknown ablation of pcre 'main'; known: 1a"),
        ({"papers": ["csl"], "tables": ["main", "1a"]}, "unknown table of csl '1a'"),
        ({"papers": ["csl"], "claims": ["scopes"]}, "unknown claim of csl 'scopes'.*did you mean 'scope'"),
        ({"scale": "huge"}, "unknown scale 'huge'; known: mini, paper, tiny"),
        ({"seeds": ()}, "one or more different whole numbers"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(wanted, message):
    with pytest.raises(SettingError, match=message):
        select(**wanted)


# What became of them


def test_a_finished_run_stays_unless_other_code_made_it_and_that_is_asked_for(tmp_path):
    finish(SUPERVISED, tmp_path)
    for stale in (False, True):
        item = planned(SUPERVISED, tmp_path, stale=stale)
        assert (item.state, item.reason, item.todo, item.seconds) == ("finished", "finished", False, None)
    finish(SUPERVISED, tmp_path, code="0ld")
    item = planned(SUPERVISED, tmp_path)
    assert (item.state, item.reason, item.todo) == ("finished", "finished by other code", False)
    item = planned(SUPERVISED, tmp_path, stale=True)
    assert item.state == "stale" and item.todo and item.seconds == 10
    assert item.reason == f"code changed: sources 0ld -> {runs.source_digest()}"


def half_trained(root, step=300):
    folder = runs.folder_of(SUPERVISED, root)
    save_state(folder / CHECKPOINT, {"at": {"done": step}, "weights": torch.ones(2)})
    rows = [{"kind": "train", "step": at, "seconds": 1.5} for at in (100, 200, 300, 400)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "experiment.json", record(SUPERVISED))
    return folder


def test_a_half_trained_run_goes_on_from_its_checkpoint_and_costs_the_rest(tmp_path):
    half_trained(tmp_path)
    finish(SUPERVISED.with_(seed=1), tmp_path, seconds=10)
    item = planned(SUPERVISED, tmp_path)
    assert (item.state, item.reason) == ("half-trained", "half-trained at step 300")
    assert item.seconds == 10 - 3 * 1.5  # what came after the checkpoint is repeated


def test_a_failed_run_says_its_class_and_where_it_goes_on(tmp_path):
    folder = half_trained(tmp_path)
    failure = {"class": "out of memory", "message": "Traceback\nCUDA out of memory", "attempt": 2, "when": "now"}
    write_json(folder / "failure.json", failure)
    item = planned(SUPERVISED, tmp_path)
    assert item.state == "failed"
    assert item.reason == "failed: out of memory (attempt 2): CUDA out of memory; goes on at step 300"
    (folder / CHECKPOINT).unlink()
    assert planned(SUPERVISED, tmp_path).reason == "failed: out of memory (attempt 2): CUDA out of memory"
    for text in ("{", "[]", "{}"):
        (folder / "failure.json").write_text(text)
        assert planned(SUPERVISED, tmp_path).reason == "failed: its failure.json cannot be read"


def test_files_that_cannot_be_read_are_told_and_stop_no_plan(tmp_path):
    folder = half_trained(tmp_path)
    (folder / CHECKPOINT).write_bytes(b"cut")
    (folder / "experiment.json").write_text("{")
    assert planned(SUPERVISED, tmp_path).state == "missing"
    (folder / "metrics.json").write_text("{")
    item = planned(SUPERVISED, tmp_path)
    assert item.state == "failed" and "metrics.json is not valid JSON" in item.reason and item.todo
    write_json(folder / "metrics.json", {"run": "another"})
    assert "does not belong to its folder" in planned(SUPERVISED, tmp_path).reason


def test_a_run_with_other_parameters_is_told_with_both_values(tmp_path):
    finish(SUPERVISED, tmp_path, lr=0.5, method=record(SUPERVISED)["recipe"]["method"] | {"gone": 1})
    item = planned(SUPERVISED, tmp_path)
    lr = record(SUPERVISED)["recipe"]["lr"]
    assert (item.state, item.reason) == ("changed", f"parameter changed: lr 0.5 -> {lr}, method.gone 1 -> gone")
    for other in (SUPERVISED.with_(seed=1), SUPERVISED.with_(lr=0.1), FIXMATCH, SUPERVISED.with_(scale="tiny")):
        assert planned(other, tmp_path).reason == "missing"


def test_a_plan_writes_nothing(tmp_path):
    half_trained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan.as_text(plan.plan(select(["commatch"], main=True), tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# What it costs


def test_time_comes_from_the_same_recipe_then_from_images_a_second(tmp_path):
    finish(FIXMATCH.with_(seed=1), tmp_path, seconds=20)
    finish(FIXMATCH.with_(seed=2), tmp_path, seconds=24, wall=30)
    steps = record(FIXMATCH)["recipe"]["steps"]
    finish(FIXMATCH.with_(steps=2 * steps), tmp_path, seconds=100)
    assert planned(FIXMATCH, tmp_path).seconds == 25
    other = planned(FIXMATCH.with_(threshold=0.9, steps=4 * steps), tmp_path)
    assert (other.seconds, other.rate) == (pytest.approx((80 + 120 + 200) / 3), plan.HERE)
    wider = planned(FIXMATCH.with_(unlabelled_ratio=11), tmp_path)  # 12 images for each of 6, ratio 5
    assert wider.seconds == pytest.approx((40 + 60 + 100) / 3)


def test_without_runs_here_time_comes_from_committed_ones_and_else_is_a_guess(tmp_path, monkeypatch):
    assert (planned(FIXMATCH, tmp_path).seconds, planned(FIXMATCH, tmp_path).rate) == (plan.UNKNOWN_SECONDS, "guess")
    assert planned(FIXMATCH.with_(scale="tiny"), tmp_path).seconds == plan.TINY_SECONDS
    rows = ["run,method,data,scale,overrides,train_seconds"]
    rows += [f'{run},fixmatch,fashion,mini,"{changed}",{seconds}'
             for run, changed, seconds in (("a", "{}", 40), ("b", "{}", 50), ("c", '{""lr"": 0.1}', 90))]  # fmt: skip
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    monkeypatch.setattr(records, "COMMITTED_RUNS", tmp_path / "runs.csv")
    assert (planned(FIXMATCH, tmp_path).seconds, planned(FIXMATCH, tmp_path).rate) == (45, plan.COMMITTED)
    assert planned(FIXMATCH.with_(lr=0.1), tmp_path).seconds == 90
    assert planned(FIXMATCH.with_(lr=0.2), tmp_path).seconds == 60


def test_at_paper_scale_only_runs_with_cuda_of_that_method_and_network_count(tmp_path):
    asked = Experiment("commatch", "fixmatch", "cifar10", 40, 0, "paper")
    finish(asked.with_(seed=1, steps=500), tmp_path, seconds=5, device="cpu")
    finish(FIXMATCH, tmp_path, device="NVIDIA H200")
    finish(asked.with_(method="flexmatch"), tmp_path, device="NVIDIA H200")
    item = planned(asked, tmp_path)
    assert (item.seconds, item.rate) == (None, "unknown: no CUDA run of this method yet")
    text = plan.as_text([item])
    assert "GPU-hours: unknown: no CUDA run of this method yet (fixmatch)" in text and "time:" not in text
    finish(asked.with_(seed=2, steps=500), tmp_path, seconds=50, wall=400, device="NVIDIA H200")
    item = planned(asked, tmp_path)
    assert item.seconds == pytest.approx(50 * record(asked)["recipe"]["steps"] / 500)
    assert f"GPU-hours: {item.seconds / 3600:.1f}" in plan.as_text([item])


def item(state, seconds, rate=plan.HERE, method="fixmatch"):
    experiment = FIXMATCH.with_(method=method)
    return Planned(experiment, "run", ("commatch main job",), state, state, seconds, rate)


def test_a_bill_counts_what_is_left_and_waits_for_the_longest():
    rest = [item("missing", 60.0), item("failed", 40.0), item("stale", 20.0, plan.GUESS), item("finished", None, "")]
    total = bill(rest, workers=2)
    assert (total.todo, total.of, total.seconds, total.wall) == (3, 4, 120.0, 60.0)
    assert bill([*rest, item("missing", 100.0)], workers=2).wall == 110.0
    assert bill([*rest, item("missing", 500.0)], workers=9).wall == 500.0
    assert total.states == {"finished": 1, "stale": 1, "missing": 1, "failed": 1}
    assert total.rates == {plan.HERE: 2, plan.GUESS: 1}
    lines = plan.bill_lines(total, ["mini"])
    assert lines[0] == "3 of 4 runs to do (1 finished, 1 stale, 1 missing, 1 failed)"
    assert lines[1] == "time: 1:00, 2 at a time (2 from runs in this folder; 1 guessed)"
    assert bill([], 2).wall == 0 and plan.bill_lines(bill([]), []) == ["0 of 0 runs to do"]


def test_the_table_wraps_long_cells_and_names_a_few_of_many_who_want_a_run(tmp_path):
    selection = select(["commatch"])
    text = plan.as_text(plan.plan(selection, tmp_path), workers=2)
    assert max(map(len, text.splitlines())) <= sum(plan.WIDTHS.values()) + 6
    whole = next(line for line in text.splitlines() if " commatch on fashion, 100 labels, seed 0 " in line)
    assert whole.startswith("2:00      missing ") and "commatch: main job, claims, table 2, table" in whole
    assert "introduction, and 11 more" in text and text.endswith("guessed)")


def test_json_has_everything(tmp_path):
    finish(SUPERVISED, tmp_path, code="0ld")
    shown = json.loads(json.dumps(plan.as_json(plan.plan({SUPERVISED: ("x y",), FIXMATCH: ("x y",)}, tmp_path), 2)))
    first, second = shown["runs"]
    assert Experiment(**first["experiment"]) == SUPERVISED and first["run"] == run_id(SUPERVISED)
    assert (first["todo"], second["todo"]) == (False, True) and second["reason"] == "missing"
    assert shown["bill"]["todo"] == 1 and shown["bill"]["other_code"] == 1
