import pandas as pd
import pytest

from figures import desk
from repro.experiment import Experiment
from repro.grid import PAPERS
from repro.methods.few_labels import commatch
from repro.settings import SettingError
from tests.fake_outputs import write_run

ONE = {"paper": "commatch", "method": "commatch", "data": "fashion", "labels": 100, "seed": 0, "scale": "tiny",
       "overrides": {}, "beside": "fixmatch", "rule": "last", "weights": "ema", "runs_root": None, "data_root": None,
       "device": "cpu"}  # fmt: skip
MANY = {"paper": "commatch", "scale": "tiny", "seeds": 2, "rule": "last", "weights": "ema", "runs_root": None,
        "run_missing": False}  # fmt: skip
SCENES = {name: {"data": "scenes", "labels": labels} for name, labels in (("csl", 20), ("pcre", 20),
                                                                          ("trust_region", 30))}  # fmt: skip


def test_one_run_gives_the_experiment_and_the_one_beside_it(tmp_path):
    overrides = {"negative_weight": 0.0, "dropout": 0.2}
    asked = desk.one_run(**ONE | {"overrides": overrides, "seed": 3, "runs_root": str(tmp_path)})
    assert asked.experiment == Experiment(seed=3, scale="tiny", overrides=tuple(overrides.items()))
    assert asked.beside == Experiment(method="fixmatch", seed=3, scale="tiny", overrides=(("dropout", 0.2),))
    assert asked.experiments == [asked.beside, asked.experiment] and asked.root == tmp_path


def test_nothing_stands_beside_when_it_is_empty_or_the_same():
    assert desk.one_run(**ONE | {"beside": ""}).experiments == [Experiment(scale="tiny")]
    assert desk.one_run(**ONE | {"method": "fixmatch"}).experiments == [Experiment(method="fixmatch", scale="tiny")]


def test_a_base_stands_beside_calibratemix_under_the_settings_that_it_has():
    given = {name: value for name, value in ONE.items() if name != "beside"} | {"paper": "calibratemix"}
    overrides = {"threshold": 0.9, "partner": "random", "dropout": 0.2}
    asked = desk.one_run(**given | {"method": "calibratemix", "overrides": overrides}, base="flexmatch")
    assert dict(asked.experiment.overrides) == {"base": "flexmatch"} | overrides
    assert asked.beside.method == "flexmatch" and dict(asked.beside.overrides) == {"threshold": 0.9, "dropout": 0.2}
    other = desk.one_run(**given | {"method": "calibratemix", "overrides": {"base": "softmatch"}}, base="flexmatch")
    assert other.beside.method == "softmatch"
    alone = desk.one_run(**given | {"method": "freematch"}, base="fixmatch")
    assert [item.method for item in alone.experiments] == ["fixmatch", "freematch"]
    for method in ("calibratemix", "freematch"):
        with pytest.raises(SettingError, match="fixmach"):
            desk.one_run(**given | {"method": method}, base="fixmach")


def test_a_base_that_is_not_to_be_trained_is_shown_if_it_has_been(tmp_path, monkeypatch):
    given = {name: value for name, value in ONE.items() if name != "beside"} | {"runs_root": str(tmp_path)}
    given |= {"paper": "calibratemix", "method": "calibratemix", "base": "fixmatch"}
    asked = desk.one_run(**given, train_base=False)
    monkeypatch.setattr(desk, "train", lambda experiment, asked: f"trained {experiment.method}")
    assert (desk.train_base(asked) == "not run").all(axis=None)
    write_run(tmp_path, asked.beside, accuracy=(0.2, 0.5))
    assert desk.train_base(asked).loc["FixMatch, seed 0", "accuracy (%)"] == "50.00"
    assert desk.train_base(desk.one_run(**given)) == "trained fixmatch"
    with pytest.raises(SettingError, match="train_base is 'no'; it must be True or False"):
        desk.one_run(**given, train_base="no")


def test_a_method_without_settings_of_its_own_has_an_empty_table():
    frame = desk.settings_table(Experiment(method="supervised")).data
    assert frame.empty and list(frame.columns) == ["symbol", "value", "default", "allowed", "source"]


def test_commands_are_those_that_a_person_types():
    experiment = Experiment("calibratemix", "calibratemix", scale="tiny", overrides={"base": "fixmatch"})
    shown = desk.commands([experiment]).data.loc["CalibrateMix, base = fixmatch, seed 0", "command"]
    assert shown == (
        "python -m repro run --paper calibratemix --method calibratemix --data fashion --labels 100 --seed 0 "
        "--scale tiny --set base=fixmatch"
    )


def test_overrides_may_be_the_text_that_papermill_passes():
    asked = desk.one_run(**ONE | {"overrides": '{"negative_weight": 0.5}'})
    assert asked.experiment.overrides == (("negative_weight", 0.5),)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": "fixmach"}, "did you mean 'fixmatch'"),
        ({"beside": "nothing"}, "known: .*commatch"),
        ({"labels": 105}, "multiple of the number of classes"),
        ({"labels": "100"}, "whole number"),
        ({"scale": "small"}, "known: mini, paper, tiny"),
        ({"overrides": {"negative_wait": 1}}, "did you mean 'negative_weight'"),
        ({"overrides": "negative_weight=1"}, "must be JSON"),
        ({"overrides": [1]}, "must be a dict"),
        ({"rule": "worst"}, "known: best, last, median20"),
        ({"weights": "raw"}, "known: ema, live"),
        ({"device": "abacus"}, "must be auto, cpu, cuda"),
        ({"runs_root": 3}, "path of a folder"),
    ],
)
def test_a_wrong_parameter_names_what_is_allowed(change, named):
    with pytest.raises(SettingError, match=named):
        desk.one_run(**ONE | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"paper": "conmatch"}, "did you mean 'commatch'"),
        ({"scale": "maxi"}, "known: mini, paper, tiny"),
        ({"seeds": 0}, "from 1"),
        ({"seeds": "2"}, "from 1"),
        ({"rule": "first"}, "known: best"),
        ({"run_missing": "yes"}, "True or False"),
    ],
)
def test_wrong_parameters_of_tables(change, named):
    with pytest.raises(SettingError, match=named):
        desk.many_runs(**MANY | change)


def test_names_that_papermill_injected_are_checked():
    cells = ["method = 'commatch'", "# Parameters\nmethod = 'uda'\nlabels = 40\n", "other = 1"]
    desk.check_names(["method", "labels"], cells)
    with pytest.raises(SettingError, match="'labels'.*known: method"):
        desk.check_names(["method"], cells)


def test_source_shows_the_code_that_runs():
    shown = desk.source(commatch.thresholds, commatch.instability).data
    assert "threshold_epochs" in shown and "correction" in shown


def test_numbers_are_those_of_the_record_and_missing_runs_are_named(tmp_path):
    asked = desk.one_run(**ONE | {"runs_root": str(tmp_path)})
    write_run(tmp_path, asked.experiment, accuracy=(0.2, 0.5))
    frame = desk.numbers(asked.experiments, asked)
    assert frame.loc["ComMatch, seed 0", "accuracy (%)"] == "50.00"
    assert frame.loc["ComMatch, seed 0", "NLL (nats)"] == "0.200"
    assert (frame.loc["FixMatch, seed 0"] == "not run").all()


def test_finished_runs_counts_every_folder(tmp_path):
    for seed in (0, 2):
        write_run(tmp_path, Experiment(seed=seed, scale="tiny"))
    row = desk.finished_runs(tmp_path).loc["tiny", "fashion", 100, "commatch"]
    assert row["runs"] == 2 and row["seeds"] == "0, 2"
    assert desk.finished_runs(tmp_path / "none").empty


def test_every_ablation_is_listed_with_parameters_that_exist():
    for name, paper in PAPERS.items():
        frame = desk.ablation_list(name).data
        assert isinstance(frame, pd.DataFrame)
        assert len(frame) == sum(len(table.rows) for table in paper.ABLATIONS.values())
        for row in frame.itertuples():
            where = SCENES.get(name, {})
            asked = {"paper": name, "method": row.method, "overrides": row.overrides, "beside": ""}
            desk.one_run(**ONE | asked | where)
