"""The papers as data: one TOML file each (texts, tables, ablations, claims), CSV files of published numbers, recipes.

`repro.grid` turns the tables of these files into experiments.
"""

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from repro.papers import published, recipes
from repro.papers.published import LABELS, MASKS, SCRIBBLES, TAGS, Published
from repro.recipe import Recipe
from repro.tasks import labels, masks, scribbles, tags

FOLDER = Path(__file__).parent
NAMES = ("commatch", "calibratemix", "csl", "pcre", "trust_region")


@dataclass(frozen=True)
class Supervision:
    """A kind of supervision: the wording of its budget, its task, its recipes and their checks (SettingError)."""

    budget: str
    task: ModuleType
    recipe: Callable[..., Recipe]
    check_budget: Callable[[str, int], None]
    check_recipe: Callable[[Any], None]


SUPERVISION = {
    "labels": Supervision(
        LABELS, labels, recipes.label_recipe, recipes.check_label_budget, recipes.check_label_recipe
    ),
    "masks": Supervision(MASKS, masks, recipes.mask_recipe, recipes.check_mask_budget, recipes.check_mask_recipe),
    "tags": Supervision(TAGS, tags, recipes.tag_recipe, recipes.check_tag_budget, recipes.check_tag_recipe),
    "scribbles": Supervision(
        SCRIBBLES, scribbles, recipes.scribble_recipe, recipes.check_scribble_budget, recipes.check_scribble_recipe
    ),
}


@dataclass(frozen=True)
class Spec:
    """What an experiment needs of its paper, and the paper's tables as they stand in the TOML file.

    note: what a reader has to know about the sources. methods, data: those with recipes. headlines: metrics of a
    one-line result. recipe_changes: fields that the paper states differently from the recipes it shares.
    """

    name: str
    title: str
    note: str
    supervision: Supervision
    methods: tuple[str, ...]
    data: tuple[str, ...]
    headlines: tuple[str, ...]
    published: tuple[Published, ...]
    recipe_changes: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, method: str, data: str, labels: int, scale: str) -> Recipe:
        """The recipe of a method on a data set with a label budget at a scale."""
        return self.supervision.recipe(method, data, labels, scale, **self.recipe_changes)


@functools.cache
def load(name: str) -> Spec:
    """Read `papers/<name>.toml`."""
    raw = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    rows = tuple(row for file in raw["published"] for row in published.load(file))
    return Spec(
        name=name,
        title=raw["title"],
        note=raw["note"],
        supervision=SUPERVISION[raw["supervision"]],
        methods=tuple(raw["methods"]),
        data=tuple(raw["data"]),
        headlines=tuple(raw["headlines"]),
        published=rows,
        recipe_changes=raw.get("recipe_changes", {}),
        tables={key: raw[key] for key in ("main", "rows", "tables", "ablations", "claims")},
    )


SPECS = {name: load(name) for name in NAMES}
