"""The experiment record: what is refused, with which words, and what a run id depends on."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repro import papers
from repro.experiment import Experiment, from_record, record, resolve, run_id
from repro.recipe import LabelRecipe, Recipe
from repro.settings import SettingError

BASE = Experiment("commatch", "fixmatch", "fashion", 100, 0, "tiny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paper": "comatch"}, r"unknown paper 'comatch' \(did you mean 'commatch'\?\); known: .*commatch"),
        ({"method": "fixmtach"}, r"unknown method of commatch 'fixmtach' \(did you mean 'fixmatch'\?\); known: com"),
        ({"data": "cifar"}, r"unknown data set of commatch 'cifar' \(did you mean 'cifar10'\?\); known: cif"),
        ({"scale": "Mini"}, r"unknown scale 'Mini' \(did you mean 'mini'\?\); known: mini, paper, tiny"),
        ({"labels": "100"}, r"labels is '100' \(str\); it must be a whole number \(int\)"),
        ({"labels": 100.0}, r"labels is 100.0 \(float\); it must be a whole number"),
        ({"labels": True}, r"labels is True \(bool\)"),
        ({"labels": 0}, r"0 labels: must be a positive multiple of the number of classes \(10\), or all 12,000"),
        ({"labels": 101}, r"101 labels: must be a positive multiple"),
        ({"labels": 12_010}, r"12010 labels: must be a positive multiple"),
        ({"seed": -1}, r"seed is -1 \(int\); it must be a whole number \(int\) from 0"),
        ({"seed": None}, r"seed is None \(NoneType\)"),
        ({"seed": 2**32}, r"seed is 4294967296 \(int\); .* to 2\*\*32 - 1"),
        ({"paper": 3}, r"paper is 3 \(int\); it must be of type str"),
        ({"data": ["fashion"]}, r"data is \['fashion'\] \(list\); it must be of type str"),
        ({"overrides": "lr=1"}, r"overrides is 'lr=1'; it must be a dict or pairs"),
        ({"overrides": None}, r"overrides is None; it must be a dict or pairs"),
        ({"overrides": {"treshold": 0.9}}, r"unknown setting of fixmatch 'treshold' \(did you mean 'threshold'\?\)"),
        ({"overrides": {"method": 1}}, r"unknown setting of fixmatch 'method'"),
        ({"overrides": {"passes": 10}}, r"unknown setting of fixmatch 'passes'"),
        ({"overrides": {"batch": "64"}}, r"Recipe.batch is '64' \(str\); it must be of type int"),
        ({"overrides": {"batch": True}}, r"Recipe.batch is True \(bool\); it must be of type int"),
        ({"overrides": {"steps": 1e3}}, r"Recipe.steps is 1000.0 \(float\); it must be of type int"),
        ({"overrides": {"lr": "0.1"}}, r"Recipe.lr is '0.1' \(str\); it must be of type float"),
        ({"overrides": {"lr": float("inf")}}, r"Recipe.lr is inf; it must be finite"),
        ({"overrides": {"lr": -0.1}}, r"Recipe.lr is -0.1; it must lie in \[0, inf\]"),
        ({"overrides": {"flip": "true"}}, r"Recipe.flip is 'true' \(str\); it must be of type bool"),
        ({"overrides": {"threshold": 95}}, r"FixMatchSettings.threshold is 95.0; it must lie in \[0, 1\]"),
        ({"overrides": {"schedule": "cosine"}}, r"Recipe.schedule is 'cosine'; allowed: 'constant', 'cosine-7/16'"),
        ({"overrides": {"network": "wrn-28-3"}}, r"unknown network 'wrn-28-3' \(did you mean 'wrn-28-"),
        ({"overrides": {"strong": "randaugment"}}, r"unknown strong 'randaugment' \(did you mean 'randaugment-"),
        ({"overrides": {"bn_momentum": 0}}, r"Recipe.bn_momentum is 0.0; it must lie in"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_runs(change, message):
    with pytest.raises(SettingError, match=message):
        dataclasses.replace(BASE, **change)


def test_overrides_reach_the_recipe_and_the_method():
    recipe = resolve(dataclasses.replace(BASE, overrides={"lr": 1, "threshold": 0.5, "flip": False}))
    assert (recipe.lr, recipe.method.threshold, recipe.flip) == (1.0, 0.5, False)
    assert type(recipe.lr) is float
    unchanged = resolve(BASE)
    assert dataclasses.replace(recipe, lr=unchanged.lr, flip=unchanged.flip, method=unchanged.method) == unchanged


changes = st.dictionaries(
    st.sampled_from(["lr", "threshold", "momentum", "weight_decay", "unlabelled_weight"]), st.floats(0, 1), max_size=5
)


@given(changes, st.randoms())
def test_the_order_and_the_form_of_overrides_do_not_matter(changes, random):
    pairs = list(changes.items())
    random.shuffle(pairs)
    a, b, c = (dataclasses.replace(BASE, overrides=form) for form in (changes, tuple(pairs), [list(p) for p in pairs]))
    assert a == b == c and hash(a) == hash(b) and run_id(a) == run_id(b) == run_id(c)


@given(changes, st.integers(0, 2**32 - 1))
def test_a_record_survives_json(changes, seed):
    experiment = dataclasses.replace(BASE, seed=seed, overrides=changes)
    again = from_record(json.loads(json.dumps(record(experiment))))
    assert again == experiment and run_id(again) == run_id(experiment)


def test_with_changes_fields_and_adds_overrides():
    changed = BASE.with_(seed=3, threshold=0.5).with_(lr=0.1, threshold=0.6)
    assert changed == dataclasses.replace(BASE, seed=3, overrides={"threshold": 0.6, "lr": 0.1})
    assert changed.with_(overrides={}) == dataclasses.replace(BASE, seed=3)
    with pytest.raises(SettingError, match="unknown setting of supervised 'threshold'"):
        changed.with_(method="supervised")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"papr": "commatch"},
            r"unknown field of an experiment 'papr' \(did you mean 'paper'\?\); known: data, labels",
        ),
        (["commatch"], r"must be a JSON object with some of paper, method"),
        ({"labels": "100"}, r"labels is '100' \(str\)"),
    ],
)
def test_a_bad_record_is_refused(fields, message):
    with pytest.raises(SettingError, match=message):
        from_record({"experiment": fields})


def test_a_record_may_leave_out_what_has_a_default():
    assert from_record({"experiment": {"seed": 4}}) == Experiment(seed=4)


# Run ids


def test_a_published_recipe_keeps_its_id():
    """A literal: when it changes, every finished `paper` run is orphaned. Change it only together with the recipe."""
    assert (
        run_id(Experiment("commatch", "fixmatch", "cifar10", 40, 3, "paper"))
        == "fixmatch-cifar10.3@40-paper-1aafe10ce5"
    )


def test_a_default_spelt_out_is_the_same_run():
    assert run_id(BASE.with_(threshold=0.95, lr=resolve(BASE).lr)) == run_id(BASE)
    assert run_id(BASE.with_(lr=1)) == run_id(BASE.with_(lr=1.0))


OTHER = {
    "method": None, "network": "wrn-28-2", "variant": "ups", "optimiser": "adamw", "schedule": "constant",
    "strong": "ctaugment", "precision": "bf16", "ema": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LabelRecipe) if field.name != "method"])
def test_every_field_of_the_recipe_is_in_the_id(name):
    value = getattr(resolve(BASE), name)
    other = OTHER.get(name, {bool: True, int: 7, float: 0.123, str: ""}[type(value)])
    assert run_id(BASE.with_(**{name: other if other != value else not value})) != run_id(BASE)


@pytest.mark.parametrize(
    "change", [{"method": "flexmatch"}, {"labels": 250}, {"seed": 1}, {"scale": "mini"}, {"threshold": 0.9}], ids=str
)
def test_everything_else_that_decides_is_in_the_id(change):
    assert run_id(BASE.with_(**change)) != run_id(BASE)


def test_the_id_can_be_a_folder_and_says_what_it_is():
    assert run_id(BASE).startswith("fixmatch-fashion.0@100-tiny-")
    assert not set(run_id(BASE)) & set('/\\:*?"<>| ')


def test_papers_share_runs_of_equal_recipes(monkeypatch):
    monkeypatch.setitem(papers.SPECS, "other", papers.SPECS["commatch"])
    assert run_id(dataclasses.replace(BASE, paper="other")) == run_id(BASE)
    assert BASE.split == "fashion.0@100"


def test_recipes_are_frozen_and_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(BASE).lr = 1.0
    with pytest.raises(SettingError, match="Recipe.ema is 2.0"):
        Recipe(ema=2)
