"""Typed, validated settings: dataclass fields that carry their symbol, source and range.

Every recipe and every method's hyper-parameters are frozen dataclasses whose fields are made by `hyper`. The
same metadata validates values, names the allowed ones in errors, and fills the tables of the notebooks.
"""

import dataclasses
import difflib
import functools
import math
from typing import Any, get_type_hints


class SettingError(ValueError):
    """A setting that does not exist, has the wrong type or lies outside its range."""


def hyper(
    default: Any,
    symbol: str = "",
    source: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """A dataclass field for one hyper-parameter.

    default: the published value (or ours, then `source` says so).
    symbol: the paper's symbol; source: where the value is stated.
    low, high: inclusive range; choices: the allowed values.
    """
    metadata = {"symbol": symbol, "source": source, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


_hints = functools.cache(get_type_hints)  # slow, and a plan checks thousands of recipes


def check(settings: Any) -> None:
    """Raise SettingError unless every field of the dataclass instance has its type and lies in its range."""
    owner = type(settings).__name__
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind, rule = getattr(settings, field.name), hints[field.name], field.metadata
        if kind not in (int, float, bool, str):
            continue
        if kind is float and type(value) is int and abs(value) < 2**53:
            object.__setattr__(settings, field.name, float(value))
            value = float(value)
        if type(value) is not kind:
            raise SettingError(
                f"{owner}.{field.name} is {value!r} ({type(value).__name__}); it must be of type {kind.__name__}"
            )
        if kind is float and not math.isfinite(value):
            raise SettingError(f"{owner}.{field.name} is {value!r}; it must be finite")
        choices, low, high = rule.get("choices"), rule.get("low"), rule.get("high")
        if choices is not None and value not in choices:
            raise SettingError(f"{owner}.{field.name} is {value!r}; allowed: {', '.join(map(repr, choices))}")
        if (low is not None and value < low) or (high is not None and value > high):
            raise SettingError(
                f"{owner}.{field.name} is {value!r}; it must lie in "
                f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
            )


def unknown(kind: str, name: str, known: Any) -> SettingError:
    """The error for a name that does not exist: it lists what does, and the nearest spelling first."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return SettingError(f"unknown {kind} {name!r}{hint}; known: {', '.join(names)}")


def replace(settings: Any, **changes: Any) -> Any:
    """dataclasses.replace that names the known fields on an unknown one, and validates the result."""
    names = [field.name for field in dataclasses.fields(settings)]
    for name in changes:
        if name not in names:
            raise unknown(f"setting of {type(settings).__name__}", name, names)
    return dataclasses.replace(settings, **changes)


def describe(settings: Any) -> list[dict[str, Any]]:
    """One row a hyper-parameter: name, symbol, value, default, range or choices, source."""
    rows = []
    for field in dataclasses.fields(settings):
        rule = field.metadata
        if rule.get("choices"):
            allowed = ", ".join(map(str, rule["choices"]))
        elif rule.get("low") is None and rule.get("high") is None:
            allowed = ""
        else:
            low, high = ("" if rule[end] is None else rule[end] for end in ("low", "high"))
            allowed = f"[{low}, {high}]"
        rows.append(
            {
                "name": field.name,
                "symbol": rule.get("symbol", ""),
                "value": getattr(settings, field.name),
                "default": field.default,
                "allowed": allowed,
                "source": rule.get("source", ""),
            }
        )
    return rows
