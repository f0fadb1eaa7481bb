"""The experiment record: what to run, as frozen, validated data, and the run id that its result depends on."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from repro.papers import SPECS
from repro.recipe import SCALES, Recipe
from repro.settings import SettingError, replace, unknown


@dataclass(frozen=True)
class Experiment:
    """One cell of a table: paper, method, data set, label budget, seed, scale, and changed settings.

    labels: number of labelled images, or of masks. seed: of the labelled subset, the weights and the order of samples.
    overrides: ((name, value), ...) or a dict, each a field of `Recipe` or of the method's settings.
    """

    paper: str = "commatch"
    method: str = "commatch"
    data: str = "fashion"
    labels: int = 100
    seed: int = 0
    scale: str = "mini"
    overrides: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        for name in ("paper", "method", "data", "scale"):
            value = getattr(self, name)
            if type(value) is not str:
                raise SettingError(f"{name} is {value!r} ({type(value).__name__}); it must be of type str")
        if self.paper not in SPECS:
            raise unknown("paper", self.paper, SPECS)
        paper = SPECS[self.paper]
        if self.method not in paper.methods:
            raise unknown(f"method of {self.paper}", self.method, paper.methods)
        if self.data not in paper.data:
            raise unknown(f"data set of {self.paper}", self.data, paper.data)
        if self.scale not in SCALES:
            raise unknown("scale", self.scale, SCALES)
        for name in ("labels", "seed"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**32:
                raise SettingError(
                    f"{name} is {value!r} ({type(value).__name__}); it must be a whole number (int) from 0 to 2**32 - 1"
                )
        try:
            overrides = {str(name): value for name, value in dict(self.overrides).items()}
        except (TypeError, ValueError) as error:
            raise SettingError(f"overrides is {self.overrides!r}; it must be a dict or pairs of name, value") from error
        object.__setattr__(self, "overrides", tuple(sorted(overrides.items())))
        paper.supervision.check_budget(self.data, self.labels)
        object.__setattr__(self, "recipe", self._resolved())  # once an experiment

    def _resolved(self) -> Recipe:
        """The paper's recipe, then the overrides. Raises SettingError naming what exists."""
        recipe = SPECS[self.paper].recipe(self.method, self.data, self.labels, self.scale)
        of_recipe = {field.name for field in dataclasses.fields(recipe)} - {"method"}
        of_method = {field.name for field in dataclasses.fields(recipe.method)}
        for name, _ in self.overrides:
            if name not in of_recipe | of_method:
                raise unknown(f"setting of {self.method}", name, of_recipe | of_method)
        changes = dict(self.overrides)
        method = replace(recipe.method, **{k: v for k, v in changes.items() if k in of_method})
        recipe = replace(recipe, method=method, **{k: v for k, v in changes.items() if k in of_recipe})
        SPECS[self.paper].supervision.check_recipe(recipe)
        return recipe

    @property
    def split(self) -> str:
        """The labelled subset's name: `cifar10.3@40` is data set, seed, labels."""
        return f"{self.data}.{self.seed}@{self.labels}"

    def with_(self, **changes: Any) -> "Experiment":
        """A variation: fields of the record by name, any other name becomes an override."""
        names = {field.name for field in dataclasses.fields(self)}
        overrides = dict(self.overrides) | {k: v for k, v in changes.items() if k not in names}
        fields = {k: v for k, v in changes.items() if k in names}
        return dataclasses.replace(self, **{"overrides": tuple(overrides.items())} | fields)


def resolve(experiment: Experiment) -> Recipe:
    """The experiment's complete recipe."""
    return experiment.recipe


def record(experiment: Experiment) -> dict:
    """The experiment and its resolved recipe as plain JSON values."""
    recipe = resolve(experiment)
    return {
        "experiment": dataclasses.asdict(experiment) | {"overrides": dict(experiment.overrides)},
        "recipe": dataclasses.asdict(recipe),
    }


def from_record(saved: dict) -> Experiment:
    """The experiment of a `record`; fields that are not there have their defaults. Raises SettingError."""
    names = [field.name for field in dataclasses.fields(Experiment)]
    fields = saved["experiment"]
    if not isinstance(fields, dict):
        raise SettingError(f"an experiment must be a JSON object with some of {', '.join(names)}; it is {fields!r}")
    for name in fields:
        if name not in names:
            raise unknown("field of an experiment", name, names)
    return Experiment(**fields)


def run_id(experiment: Experiment) -> str:
    """A readable name ending in a digest of everything that decides the result.

    Two papers that ask for the same method, data and recipe share one run; source code is not part of the id
    (the run's provenance records it), so a changed plot or comment retrains nothing.
    """
    saved = record(experiment)
    decides = {k: v for k, v in saved["experiment"].items() if k not in ("paper", "scale", "overrides")}
    text = json.dumps([decides, saved["recipe"]], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
    return f"{experiment.method}-{experiment.split}-{experiment.scale}-{digest}"
