"""What the notebooks call besides figures: checked parameters, code beside its equation, runs to watch, tables."""

import ast
import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Code, DisplayHandle, Markdown, display
from pandas.io.formats.style import Styler

from figures import claims, tables
from figures.common import loss_curves, table_points
from figures.plane import classes_of
from figures.report.content import FIGURES, command
from figures.style import label_of
from figures.verdicts import claim_effects
from repro import runs
from repro.batch import local
from repro.batch.progress import StepBar, is_watched
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS, Row, Table, place
from repro.measure.metrics import METRICS
from repro.methods.few_labels import METHODS
from repro.recipe import SCALES
from repro.settings import SettingError, describe, unknown

REDRAW_SECONDS = 3.0


# Parameters


@dataclass(frozen=True)
class Asked:
    """Checked parameters of a notebook about one run: the experiment, the one beside it, where and how to run."""

    experiment: Experiment
    beside: Experiment | None
    root: Path
    data_root: Path | None
    device: str
    rule: str
    weights: str
    train_base: bool = True

    @property
    def experiments(self) -> list[Experiment]:
        """Both experiments, the one beside first; one where they are the same."""
        return list(dict.fromkeys(filter(None, (self.beside, self.experiment))))


@dataclass(frozen=True)
class AskedTables:
    """Checked parameters of the notebook of tables; `module` is the paper's."""

    paper: str
    scale: str
    seeds: tuple[int, ...]
    rule: str
    weights: str
    root: Path
    run_missing: bool

    @property
    def module(self) -> ModuleType:
        """The paper's recipes, tables, ablations and claims."""
        return PAPERS[self.paper]

    @property
    def how(self) -> tuple:
        """Scale, seeds, folder of runs, reporting rule and weights: the arguments that tables and claims share."""
        return self.scale, self.seeds, self.root, self.rule, self.weights


def one_run(
    *, rule: str, weights: str, runs_root: Any, data_root: Any, device: str, beside: str = "", base: str | None = None,
    train_base: bool = True, **fields,
) -> Asked:  # fmt: skip
    """Check the parameters of a notebook about one run; fields: those of `Experiment`.

    beside: a method that is run at the same settings, "" for none; overrides of the recipe hold for both, those of
    the method's own settings for the first only. base: of a notebook that has it in place of `beside`: the method that
    CalibrateMix is put on, and that stands beside it under the same settings, as far as it has them; train_base:
    whether it is trained, or only drawn if it has been.
    overrides: a dict, or its JSON text (papermill passes text). Raises SettingError naming the allowed values.
    """
    own = ("beside",) if base is None else ("base", "train_base")
    check_names([*fields, *own, "rule", "weights", "runs_root", "data_root", "device"])
    if type(train_base) is not bool:
        raise SettingError(f"train_base is {train_base!r}; it must be True or False")
    tables.check_reporting(rule, weights)
    try:
        runs.choose_device(device)
    except (RuntimeError, ValueError) as error:
        raise SettingError(f"device is {device!r}; it must be auto, cpu, cuda, cuda:1 ... ({error})") from error
    overrides = _overrides(fields.pop("overrides"))
    if base is not None:
        if fields["method"] == "calibratemix":
            overrides = {"base": base} | overrides
        beside = overrides.get("base", base)
    experiment = Experiment(**fields, overrides=tuple(overrides.items()))
    other = None
    if beside:
        shared = {field.name for field in dataclasses.fields(resolve(experiment))}
        if base is not None and beside in METHODS:
            shared |= {field.name for field in dataclasses.fields(METHODS[beside].Settings)}
        theirs = tuple((name, value) for name, value in overrides.items() if name in shared)
        other = Experiment(**fields | {"method": beside}, overrides=theirs)
    data_root = Path(data_root) if data_root else None
    return Asked(experiment, other, _root(runs_root), data_root, device, rule, weights, train_base)


def many_runs(
    *, paper: str, scale: str, seeds: int, rule: str, weights: str, runs_root: Any, run_missing: bool
) -> AskedTables:
    """Check the parameters of the notebook of tables. seeds: how many, from 0. Raises SettingError."""
    check_names(["paper", "scale", "seeds", "rule", "weights", "runs_root", "run_missing"])
    if paper not in PAPERS:
        raise unknown("paper", paper, PAPERS)
    if type(seeds) is not int or seeds < 1:
        raise SettingError(f"seeds is {seeds!r}; it must be a whole number from 1: seeds 0 ... seeds - 1 are read")
    if type(run_missing) is not bool:
        raise SettingError(f"run_missing is {run_missing!r}; it must be True or False")
    tables.check_reporting(rule, weights)
    return AskedTables(paper, _scale(scale), tuple(range(seeds)), rule, weights, _root(runs_root), run_missing)


def check_index(*, runs_root: Any, scale: str) -> Path:
    """Check the parameters of the first notebook and return its folder of runs. Raises SettingError."""
    check_names(["runs_root", "scale"])
    _scale(scale)
    return _root(runs_root)


def _scale(scale: str) -> str:
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    return scale


def check_names(known: Iterable[str], cells: Iterable[str] | None = None) -> None:
    """Raise SettingError for a parameter that papermill injected and the notebook does not have.

    papermill itself only warns. What it injects is a cell that begins with "# Parameters"; its assignments are read
    from the kernel's record of executed cells. cells: that record, by default this kernel's.
    """
    if cells is None:
        shell = get_ipython()
        cells = shell.user_ns.get("In", []) if shell else []
    for cell in cells:
        if cell.lstrip().startswith("# Parameters\n"):
            for statement in ast.parse(cell).body:
                for target in statement.targets if isinstance(statement, ast.Assign) else ():
                    if target.id not in known:
                        raise unknown("parameter of this notebook", target.id, known)


def _overrides(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except json.JSONDecodeError as error:
            raise SettingError(f'overrides is {given!r}; as text it must be JSON, like {{"lr": 0.01}}') from error
    if not isinstance(given, dict):
        raise SettingError(f"overrides is {given!r}; it must be a dict of setting and value, like {{'lr': 0.01}}")
    return given


def _root(folder: Any) -> Path:
    if folder is not None and not isinstance(folder, str | Path):
        raise SettingError(f"runs_root is {folder!r}; it must be the path of a folder, or None for the usual one")
    return Path(folder).expanduser() if folder else runs.runs_folder()


# Reading


def source(*functions: Callable) -> HTML:
    """The source code of functions, as the package runs it."""
    code = Code("\n\n".join(inspect.getsource(function).rstrip() for function in functions), language="python")
    font = (
        "font-family: var(--jp-code-font-family, monospace); font-size: 13px"  # a page exported from Jupyter needs it
    )
    return HTML(f'<div style="{font}">{code._repr_html_()}</div>')


def settings_table(experiment: Experiment) -> Styler:
    """The method's own hyper-parameters: symbol, value, default, allowed values, where stated."""
    return _settings(describe(resolve(experiment).method))


def recipe_table(experiment: Experiment) -> Styler:
    """Everything else of the recipe, as `settings_table`."""
    return _settings([row for row in describe(resolve(experiment)) if row["name"] != "method"])


def _settings(rows: list[dict]) -> Styler:
    columns = ["name", "symbol", "value", "default", "allowed", "source"]  # a method may have no settings of its own
    return left(pd.DataFrame(rows, columns=columns).set_index("name"))


def left(frame: pd.DataFrame) -> Styler:
    """A frame of text, shown whole and aligned at the left."""
    aligned = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    return Styler(frame.astype(str), uuid="", uuid_len=0, cell_ids=False).set_table_styles(aligned)


# Running


def train(experiment: Experiment, asked: Asked) -> pd.DataFrame:
    """Execute an experiment, or load it at once when it is finished; returns its numbers.

    Where somebody watches, a bar and the loss curves move while it trains; under papermill nothing is drawn.
    """
    bar, started, drawn = StepBar(local.title(experiment)), time.monotonic(), -REDRAW_SECONDS
    live = DisplayHandle()

    def on_step(done: int, total: int, row: dict) -> None:
        nonlocal drawn
        bar(done, total, row)
        if is_watched() and (done == total or time.monotonic() - drawn > REDRAW_SECONDS):
            (live.update if drawn > 0 else live.display)(loss_curves(experiment, asked.root))
            drawn = time.monotonic()

    metrics = runs.execute(experiment, asked.root, data_root=asked.data_root, device=asked.device, on_step=on_step)
    spent = f"{time.monotonic() - started:.0f} s now, {metrics['cost']['train_seconds']:.0f} s of training in all"
    print(f"{metrics['run']}: {spent}, on {metrics['provenance']['device']}")
    return numbers([experiment], asked)


def train_base(asked: Asked) -> pd.DataFrame:
    """Execute the run beside, as `train`; where the parameters spare it, only its numbers, if it has been run."""
    return train(asked.beside, asked) if asked.train_base else numbers([asked.beside], asked)


def numbers(experiments: Iterable[Experiment], asked: Asked) -> pd.DataFrame:
    """What the paper's first table measures, of single runs, as text under its headings; accuracy beside an error."""
    shown = next(iter(PAPERS[asked.experiment.paper].TABLES.values())).metrics
    shown = ("accuracy", *shown) if "error" in shown else shown
    rows = {}
    for experiment in experiments:
        name = f"{label_of(experiment)}, seed {experiment.seed}"
        if not runs.is_finished(experiment, asked.root):
            rows[name] = dict.fromkeys((METRICS[key].title for key in shown), tables.NOT_RUN)
            continue
        saved = runs.load_metrics(runs.folder_of(experiment, asked.root))["reported"][asked.rule][asked.weights]
        values = ((METRICS[key], saved.get(key)) for key in shown)
        rows[name] = {one.title: "undefined" if value is None else one.show(value) for one, value in values}
    title = f"{tables.RULES[asked.rule]}, {tables.WEIGHTS[asked.weights]}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(title)


def over_seeds(asked: Asked) -> AskedTables:
    """What the notebook of tables would be asked for the same paper: as many seeds as a verdict takes."""
    experiment, seeds = asked.experiment, tuple(range(claims.MINIMUM_SEEDS))
    return AskedTables(experiment.paper, experiment.scale, seeds, asked.rule, asked.weights, asked.root, False)


def commands(experiments: Iterable[Experiment]) -> Styler:
    """The shell command that reproduces each run; printed numbers are the last evaluation of the EMA weights."""
    rows = {f"{label_of(item)}, seed {item.seed}": command(item) for item in experiments}
    return left(pd.DataFrame.from_dict(rows, orient="index", columns=["command"]).rename_axis("run"))


def beside_published(asked: Asked, table: str | None = None) -> Styler:
    """The runs of a notebook in one of their paper's tables, a column each: measured, published, and the difference
    where like is compared with like. table: by default the first that has the runs' data."""
    whole = PAPERS[asked.experiment.paper].TABLES[table] if table else _table_of(asked.experiment)
    names = {row.method: row for row in reversed(whole.rows)}
    rows = tuple(
        Row(label_of(item), item.method, dict(item.overrides), names[item.method].published)
        for item in asked.experiments
        if item.method in names
    )
    column, scale = place(asked.experiment), asked.experiment.scale
    columns = {"columns": (column,)} if scale == "paper" else {"small": (column,)}
    chosen = dataclasses.replace(whole, rows=rows, **columns)
    frame = tables.compare(chosen, scale, (asked.experiment.seed,), asked.root, asked.rule, asked.weights)
    return left(tables.layout(chosen, frame, column).T)


def measured_by_class(asked: Asked) -> Styler:
    """IoU in percent of the segmentation of every class, a row a finished run of the notebook, and the mean."""
    rows = {}
    for experiment in asked.experiments:
        if runs.is_finished(experiment, asked.root):
            folder = runs.folder_of(experiment, asked.root)
            found = runs.load_metrics(folder)["reported"][asked.rule][asked.weights]
            names = ("mean", *classes_of(experiment.data))
            rows[label_of(experiment)] = dict(zip(names, (found["miou"], *found["iou"]), strict=True))
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("measured: IoU (%)")
    return left(frame.map(lambda value: "undefined" if pd.isna(value) else METRICS["miou"].show(value)))


def published_by_class(paper: str) -> Styler:
    """The published IoU in percent of every class, a row a method, with where they stand."""
    rows = [row for row in PAPERS[paper].PUBLISHED if row.metric == "seg_iou"]
    frame = pd.DataFrame([(row.method, row.setting, str(row)) for row in rows], columns=["method", "class", "IoU"])
    frame = frame.pivot(index="method", columns="class", values="IoU")[list(dict.fromkeys(row.setting for row in rows))]
    where = ", ".join(dict.fromkeys(f"{row.paper}, {row.table}, {row.dataset} {row.split}" for row in rows))
    return left(frame.rename_axis(f"published: IoU (%), {where}").rename_axis(columns=None))


def _table_of(experiment: Experiment) -> Table:
    whole = PAPERS[experiment.paper].TABLES.values()
    on = (table for table in whole if experiment.data in {column.data for column in table.columns_at(experiment.scale)})
    return next(on, next(iter(whole)))


def run_missing(asked: AskedTables) -> None:
    """Say which runs of the main job are missing, and train them if the parameters ask for it."""
    experiments = asked.module.main_experiments(asked.scale, asked.seeds)
    missing = [item for item in experiments if not runs.is_finished(item, asked.root)]
    print(f"main job: {len(experiments) - len(missing)} of {len(experiments)} runs finished")
    if missing and asked.run_missing:
        local.run_all(missing, asked.root)


# Overviews


def papers() -> Styler:
    """The papers that are here, with their methods and data sets."""
    rows = {
        name: {"methods": ", ".join(paper.METHODS), "data": ", ".join(paper.DATA),
               "tables": len(paper.TABLES), "ablations": len(paper.ABLATIONS), "claims": len(paper.CLAIMS)}
        for name, paper in PAPERS.items()
    }  # fmt: skip
    return left(pd.DataFrame.from_dict(rows, orient="index").rename_axis("paper"))


def finished_runs(root: Any = None) -> pd.DataFrame:
    """How many runs of which method, data, labels and scale are finished in a folder of runs."""
    found = [runs.load_metrics(path.parent)["experiment"] for path in sorted(_root(root).glob("*/metrics.json"))]
    keys = ["scale", "data", "labels", "method"]
    frame = pd.DataFrame(found, columns=[*keys, "seed"])
    return frame.groupby(keys)["seed"].agg(runs="size", seeds=lambda s: ", ".join(map(str, sorted(set(s)))))


def ablation_list(paper: str) -> Styler:
    """Every ablation of a paper as parameters: what to set as `overrides` (and `method`) to run it."""
    rows = [
        {
            "ablation": table.title,
            "variation": row.label,
            "method": row.method,
            "overrides": json.dumps(dict(row.overrides)),
        }
        for table in PAPERS[paper].ABLATIONS.values()
        for row in table.rows
    ]
    return left(pd.DataFrame(rows).set_index(["ablation", "variation"]))


def show_tables(asked: AskedTables) -> None:
    """Each table of the paper, a block a measured column that has a finished run, and under it its notes."""
    for table in asked.module.TABLES.values():
        frame = tables.compare(table, *asked.how)
        for column in table.columns_at(asked.scale):
            here = frame[(frame["data"] == column.data) & (frame["labels"] == column.labels)]
            display(Markdown(f"#### {table.title}: {column.title}"))
            if (here["n"] == 0).all():
                display(Markdown(f"{tables.NOT_RUN} at {asked.scale} scale"))
                continue
            laid = tables.layout(table, frame, column)
            for heading in laid.columns.unique(0):
                display(Markdown(heading), left(laid[heading]))
            display(Markdown("\n".join(f"- {note}" for note in tables.notes(table, column, asked.scale))))


def show_figures(asked: AskedTables) -> None:
    """The paper's figures that finished runs can draw; ablations have a heading of their own."""
    for name, _, figure in FIGURES[asked.paper](asked.scale, asked.seeds, asked.root):
        if not name.startswith("ablation"):
            display(figure)


def show_ablations(asked: AskedTables) -> None:
    """A figure for each ablation of which two rows or more have been run, and the names of the others."""
    others = []
    for table in asked.module.ABLATIONS.values():
        if (tables.compare(table, *asked.how).groupby("row")["n"].max() > 0).sum() > 1:
            display(table_points(table, *asked.how, metrics=asked.module.HEADLINES))
        else:
            others.append(table.title)
    if others:
        display(Markdown(f"{tables.NOT_RUN} at {asked.scale} scale:\n" + "\n".join(f"- {title}" for title in others)))


def verdicts(asked: AskedTables) -> Styler:
    """A figure of all effects, and each claim of the paper with its verdict, where it holds, effect, interval and n."""
    decided = [claims.decide(claim, *asked.how) for claim in asked.module.CLAIMS.values()]
    display(claim_effects(decided, f"Claims of {asked.module.TITLE.partition(':')[0]}"))
    shown = ["claim", "source", "verdict", "scope", "metric", "effect", "95 % interval", "n", "published effect"]
    return left(claims.as_frame(decided)[shown])
