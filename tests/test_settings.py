"""Settings: types, ranges, choices and names, and what the notebooks' tables show of them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from repro.methods.few_labels import METHODS
from repro.settings import SettingError, check, describe, hyper, replace, unknown


@dataclass(frozen=True)
class Example:
    count: int = hyper(3, "n", "ours", low=1)
    rate: float = hyper(0.5, "p", "Eq. 2", low=0, high=1)
    on: bool = hyper(True)
    kind: str = hyper("dropout", choices=("dropout", "none"))
    below: float = hyper(0.0, high=2)
    nested: Any = None

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"Example.count is 0; it must lie in \[1, inf\]"),
        ({"count": True}, r"Example.count is True \(bool\); it must be of type int"),
        ({"count": 2.0}, r"Example.count is 2.0 \(float\); it must be of type int"),
        ({"count": "3"}, r"Example.count is '3' \(str\); it must be of type int"),
        ({"count": None}, r"Example.count is None \(NoneType\); it must be of type int"),
        ({"rate": True}, r"Example.rate is True \(bool\); it must be of type float"),
        ({"rate": "0.5"}, r"Example.rate is '0.5' \(str\); it must be of type float"),
        ({"rate": 1.0001}, r"Example.rate is 1.0001; it must lie in \[0, 1\]"),
        ({"rate": -1}, r"Example.rate is -1.0; it must lie in \[0, 1\]"),
        ({"rate": float("nan")}, r"Example.rate is nan; it must be finite"),
        ({"below": float("-inf")}, r"Example.below is -inf; it must be finite"),
        ({"rate": 10**400}, r"\(int\); it must be of type float"),
        ({"on": 1}, r"Example.on is 1 \(int\); it must be of type bool"),
        ({"on": "true"}, r"Example.on is 'true' \(str\); it must be of type bool"),
        ({"kind": "Dropout"}, r"Example.kind is 'Dropout'; allowed: 'dropout', 'none'"),
        ({"kind": ["none"]}, r"Example.kind is \['none'\] \(list\); it must be of type str"),
        ({"below": 3}, r"Example.below is 3.0; it must lie in \[-inf, 2\]"),
    ],
)
def test_a_bad_value_names_itself_and_the_rule(change, message):
    with pytest.raises(SettingError, match=message):
        Example(**change)


@pytest.mark.parametrize("change", [{"rate": 0}, {"rate": 1.0}, {"count": 1}, {"below": 2}, {"on": False}])
def test_ends_of_a_range_are_inside(change):
    (name, value), *_ = change.items()
    assert getattr(Example(**change), name) == value


def test_an_int_becomes_the_float_it_equals():
    assert type(Example(rate=1).rate) is float
    assert Example(rate=1) == Example(rate=1.0)


def test_replace_names_known_fields_and_the_nearest():
    assert replace(Example(), count=5).count == 5
    with pytest.raises(
        SettingError, match=r"unknown setting of Example 'cuont' \(did you mean 'count'\?\); known: below, "
    ):
        replace(Example(), cuont=5)
    with pytest.raises(SettingError, match="Example.count is 0"):
        replace(Example(), count=0)


def test_unknown_lists_names_in_order_and_guesses_only_near_ones():
    assert str(unknown("paper", "zzz", {"b": 1, "a": 2})) == "unknown paper 'zzz'; known: a, b"


def test_describe_has_a_row_a_field():
    rows = {row["name"]: row for row in describe(Example(count=7))}
    assert rows["count"] == {
        "name": "count", "symbol": "n", "value": 7, "default": 3, "allowed": "[1, ]", "source": "ours",
    }  # fmt: skip
    assert [rows[name]["allowed"] for name in ("rate", "on", "kind", "below")] == [
        "[0, 1]",
        "",
        "dropout, none",
        "[, 2]",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_can_be_overridden_without_ambiguity(name):
    """An override names a field of the recipe or of the method: no name may mean both, or belong to the record."""
    from repro.experiment import Experiment
    from repro.recipe import LabelRecipe

    settings = METHODS[name].Settings()
    taken = {field.name for field in (*dataclasses.fields(LabelRecipe), *dataclasses.fields(Experiment))}
    assert not taken & {field.name for field in dataclasses.fields(settings)}
    hashable = {type(value) for value in dataclasses.asdict(settings).values()}
    assert hashable <= {int, float, bool, str}, "the command line and papermill cannot pass anything else"
