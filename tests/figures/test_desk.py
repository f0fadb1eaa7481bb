"""What notebooks call: checked parameters, numbers, tables of a paper and of all, as a person sees them."""

import pytest

from figures import desk
from repro.experiment import Experiment
from repro.grid import PAPERS
from repro.methods.few_labels import commatch
from repro.papers import FOLDER
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run
from tests.fake_outputs import write_run
from tests.fake_runs import METRICS
from tests.fake_runs import write_run as write_numbers

ONE = {"paper": "commatch", "method": "commatch", "data": "fashion", "labels": 100, "seed": 0, "scale": "tiny",
       "overrides": {}, "beside": "fixmatch", "rule": "last", "weights": "ema", "runs_root": None, "data_root": None,
       "device": "cpu"}  # fmt: skip
BASED = {name: value for name, value in ONE.items() if name != "beside"} | {"paper": "calibratemix"}
MANY = {"paper": "commatch", "scale": "mini", "seeds": 1, "runs_root": None}
SCENES = {name: {"data": "scenes", "labels": labels} for name, labels in (("csl", 20), ("pcre", 20),
                                                                          ("trust_region", 30))}  # fmt: skip


# Parameters


def test_one_run_gives_the_experiment_and_the_one_beside_it(tmp_path):
    overrides = {"negative_weight": 0.0, "dropout": 0.2}
    asked = desk.one_run(**ONE | {"overrides": overrides, "seed": 3, "runs_root": str(tmp_path)})
    assert asked.experiment == Experiment(seed=3, scale="tiny", overrides=tuple(overrides.items()))
    assert asked.beside == Experiment(method="fixmatch", seed=3, scale="tiny", overrides=(("dropout", 0.2),))
    assert asked.experiments == [asked.beside, asked.experiment] and asked.root == tmp_path
    assert desk.over_seeds(asked).how == ("tiny", (0, 1, 2, 3, 4), tmp_path, "last", "ema")
    as_text = desk.one_run(**ONE | {"overrides": '{"negative_weight": 0.5}'})  # what papermill passes
    assert as_text.experiment.overrides == (("negative_weight", 0.5),)
    assert desk.one_run(**ONE | {"beside": ""}).experiments == [Experiment(scale="tiny")]
    assert desk.one_run(**ONE | {"method": "fixmatch"}).experiments == [Experiment(method="fixmatch", scale="tiny")]


def test_a_base_stands_beside_calibratemix_under_the_settings_that_it_has():
    overrides = {"threshold": 0.9, "partner": "random", "dropout": 0.2}
    asked = desk.one_run(**BASED | {"method": "calibratemix", "overrides": overrides}, base="flexmatch")
    assert dict(asked.experiment.overrides) == {"base": "flexmatch"} | overrides
    assert asked.beside.method == "flexmatch" and dict(asked.beside.overrides) == {"threshold": 0.9, "dropout": 0.2}
    other = desk.one_run(**BASED | {"method": "calibratemix", "overrides": {"base": "softmatch"}}, base="flexmatch")
    assert other.beside.method == "softmatch"
    alone = desk.one_run(**BASED | {"method": "freematch"}, base="fixmatch")
    assert [item.method for item in alone.experiments] == ["fixmatch", "freematch"]


def test_a_base_that_is_not_to_be_trained_is_shown_if_it_has_been(tmp_path, monkeypatch):
    given = BASED | {"runs_root": str(tmp_path), "method": "calibratemix", "base": "fixmatch"}
    asked = desk.one_run(**given, train_base=False)
    monkeypatch.setattr(desk, "train", lambda experiment, asked: f"trained {experiment.method}")
    assert (desk.train_base(asked) == "not run").all(axis=None)
    write_run(tmp_path, asked.beside, accuracy=(0.2, 0.5))
    assert desk.train_base(asked).loc["FixMatch, seed 0", "accuracy (%)"] == "50.00"
    assert desk.train_base(desk.one_run(**given)) == "trained fixmatch"


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: desk.one_run(**ONE | {"method": "fixmach"}), "did you mean 'fixmatch'"),
        (lambda: desk.one_run(**ONE | {"beside": "nothing"}), "known: .*commatch"),
        (lambda: desk.one_run(**ONE | {"labels": 105}), "multiple of the number of classes"),
        (lambda: desk.one_run(**ONE | {"labels": "100"}), "whole number"),
        (lambda: desk.one_run(**ONE | {"scale": "small"}), "known: mini, paper, tiny"),
        (lambda: desk.one_run(**ONE | {"overrides": {"negative_wait": 1}}), "did you mean 'negative_weight'"),
        (lambda: desk.one_run(**ONE | {"overrides": "negative_weight=1"}), "must be JSON"),
        (lambda: desk.one_run(**ONE | {"overrides": [1]}), "must be a dict"),
        (lambda: desk.one_run(**ONE | {"rule": "worst"}), "known: best, last, median20"),
        (lambda: desk.one_run(**ONE | {"weights": "raw"}), "known: ema, live"),
        (lambda: desk.one_run(**ONE | {"device": "abacus"}), "must be auto, cpu, cuda"),
        (lambda: desk.one_run(**ONE | {"runs_root": 3}), "path of a folder"),
        (lambda: desk.one_run(**BASED | {"method": "freematch"}, base="fixmach"), "fixmach"),
        (lambda: desk.one_run(**BASED | {"method": "calibratemix"}, base="fixmach"), "fixmach"),
        (lambda: desk.one_run(**BASED, base="fixmatch", train_base="no"), "train_base is 'no'; it must be True or"),
        (lambda: desk.many_runs(**MANY | {"paper": "conmatch"}), "did you mean 'commatch'"),
        (lambda: desk.many_runs(**MANY | {"scale": "maxi"}), "known: mini, paper, tiny"),
        (lambda: desk.many_runs(**MANY | {"seeds": 0}), "from 1"),
        (lambda: desk.many_runs(**MANY | {"seeds": "2"}), "from 1"),
        (lambda: desk.many_runs(**MANY | {"rule": "first"}), "known: best"),
        (lambda: desk.many_runs(**MANY | {"run_missing": "yes"}), "True or False"),
        (lambda: desk.check_names(["method"], ["x = 1", "# Parameters\nlabels = 40\n"]), "'labels'.*known: method"),
    ],
)
def test_a_wrong_parameter_names_what_is_allowed(check, message):
    with pytest.raises(SettingError, match=message):
        check()


def test_only_names_that_papermill_injected_are_checked():
    desk.check_names(["method", "labels"], ["m = 'x'", "# Parameters\nmethod = 'uda'\nlabels = 40\n", "other = 1"])


# Tables


def test_source_settings_and_commands_are_those_of_the_package():
    code = desk.source(commatch.thresholds, commatch.instability).data
    assert "threshold_epochs" in code and "correction" in code
    frame = desk.settings_table(Experiment(method="supervised")).data  # a method without settings of its own
    assert frame.empty and list(frame.columns) == ["symbol", "value", "default", "allowed", "source"]
    assert "lr" in desk.recipe_table(Experiment()).data.index
    experiment = Experiment("calibratemix", "calibratemix", scale="tiny", overrides={"base": "fixmatch"})
    assert desk.commands([experiment]).data.loc["CalibrateMix, base = fixmatch, seed 0", "command"] == (
        "python -m repro run --paper calibratemix --method calibratemix --data fashion --labels 100 --seed 0 "
        "--scale tiny --set base=fixmatch"
    )
    assert desk.command(Experiment(overrides={"moving_negative": False})).endswith("--set moving_negative=false")
    assert "&lt;b&gt;" in desk.text_table(desk.pd.DataFrame({"x": ["<b>"]})).to_html()


def test_numbers_are_those_of_the_record_and_missing_runs_are_named(tmp_path):
    asked = desk.one_run(**ONE | {"runs_root": str(tmp_path)})
    write_run(tmp_path, asked.experiment, accuracy=(0.2, 0.5))
    frame = desk.numbers(asked.experiments, asked)
    assert frame.loc["ComMatch, seed 0", ["accuracy (%)", "NLL (nats)"]].tolist() == ["50.00", "0.200"]
    assert (frame.loc["FixMatch, seed 0"] == "not run").all()
    beside = desk.beside_published(asked).data
    assert beside.loc[("measured: Fashion-MNIST part, 100 labels, tiny scale, last evaluation, EMA weights",
                       "error (%)")].to_dict() == {"FixMatch": "not run", "ComMatch": "50.00 (n = 1)"}  # fmt: skip


def test_every_ablation_is_listed_with_parameters_that_exist():
    for name, paper in PAPERS.items():
        frame = desk.ablation_list(name).data
        assert len(frame) == sum(len(table.rows) for table in paper.ablations.values())
        for row in frame.itertuples():
            asked = {"paper": name, "method": row.method, "overrides": row.overrides, "beside": ""}
            desk.one_run(**ONE | asked | SCENES.get(name, {}))


@pytest.fixture
def csl(tmp_path):
    """The main job's runs of the paper from masks, one seed, as the notebook of tables asks for them."""
    quality = {"supervised": 0.4, "fixmatch": 0.5, "unimatch": 0.6, "csl": 0.625}
    for experiment in PAPERS["csl"].main_experiments("mini", (0,)):
        write_mask_run(experiment, tmp_path, figures=False, miou=quality[experiment.method], ece_15=0.05)
    return desk.many_runs(**MANY | {"paper": "csl", "runs_root": tmp_path})


def test_a_block_for_each_measured_column_with_runs(csl):
    ((title, laid, notes),) = desk.blocks(PAPERS["csl"].tables["main"], csl, 2)
    assert title == "mIoU by number of masks — Fashion scenes, 20 masks" and notes
    assert laid.iloc[:, 0].to_dict() == {
        "Supervised": "40.00 (n = 1)", "FixMatch": "50.00 (n = 1)", "UniMatch": "60.00 (n = 1)",
        "UniMatch, output stride 8": "not run", "CSL": "62.50 (n = 1)",
    }  # fmt: skip
    ran = {name for name, table in PAPERS["csl"].ablations.items() if desk.blocks(table, csl, 2)}
    assert ran == {"feature_perturbation", "output_stride", "weights"}  # of which two rows are runs of the main job


def test_runs_and_their_cost_are_listed_with_the_commands_that_repeat_them(csl):
    runs = desk.finished_table(csl).data
    assert len(runs) == 4
    row = runs.loc[next(run for run in runs.index if run.startswith("unimatch"))]
    assert row["result"] == "mIoU 60.00 %, ECE 5.00 % (15 right-closed bins)" and row["training"] == "12 s"
    assert (
        row["command"]
        == "python -m repro run --paper csl --method unimatch --data scenes --labels 20 --seed 0 --scale mini"
    )
    (cost,) = desk.cost(csl).data.to_dict("records")
    assert cost["finished"].startswith("4 of ") and cost["training"] == "0:48"
    assert cost["one run"] == "12 to 12 s, median 12 s" and cost["images/s"] == "50 to 50"
    assert (cost["memory at most"], cost["device, precision, threads (runs)"]) == ("400 MiB", "cpu, fp32, 1 (4)")


def test_all_papers_verdicts_and_costs_are_counted(tmp_path):
    for experiment in PAPERS["commatch"].main_experiments("mini", range(5)):
        write_numbers(experiment, tmp_path, **METRICS | {"error": 0.2 if experiment.method == "commatch" else 0.3})
    asked = desk.many_runs(scale="mini", seeds=5, runs_root=tmp_path)
    counts = desk.verdict_counts(asked).data.astype(int)
    assert counts.sum(axis=1).to_dict() == {
        paper.spec.title.partition(":")[0]: len(paper.claims) for paper in PAPERS.values()
    }
    decided = desk.decided_claims(asked).data
    assert len(decided) == counts[["supported", "contradicted"]].to_numpy().sum() > 0
    assert "-10.00 points" in decided["effect"].tolist() and set(decided.loc["ComMatch", "n"]) == {"5"}
    cost = desk.cost(asked).data["finished"].to_dict()
    assert cost["ComMatch"].startswith("20 of ") and cost["all, each run once"].startswith("20 of ")
    assert desk.finished_runs(tmp_path).loc[("mini", "fashion", 100, "commatch"), "seeds"] == "0, 1, 2, 3, 4"
    assert desk.finished_runs(tmp_path / "none").empty
    empty = desk.many_runs(scale="mini", seeds=5, runs_root=tmp_path / "none")
    assert desk.decided_claims(empty).data["claim"].tolist() == ["none is decided yet"]


@pytest.mark.parametrize("paper", PAPERS)
def test_the_text_of_every_paper_begins_with_the_same_four_parts(paper):
    lines = (FOLDER / f"{paper}.md").read_text().splitlines()
    heads = ["Method in short", "Deviations and reconstructions", "What was easy", "What was difficult"]
    assert [line for line in lines if line.startswith("#")][:4] == [f"## {head}" for head in heads]
    assert desk.heading(desk.many_runs(**MANY | {"paper": paper})).data.startswith(f"**{PAPERS[paper].spec.title}**")
