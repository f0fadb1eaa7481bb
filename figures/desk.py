"""What the notebooks call besides figures: checked parameters, code beside its equation, runs to watch, tables."""

import ast
import dataclasses
import inspect
import json
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, Code, DisplayHandle, Markdown, display
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler

from figures import across, agreement, calibration, claims, effort, labels, masks, scribbles, style, tables, tags
from figures.common import loss_curves, table_points
from figures.plane import classes_of
from figures.verdicts import claim_effects
from repro import papers as paper_files
from repro import runs
from repro.batch import plan, progress
from repro.batch.execute import execute
from repro.experiment import Experiment, from_record, resolve
from repro.files import atomic_path
from repro.grid import PAPERS, Paper, Row, Table, column_of
from repro.measure.metrics import METRICS, sentence
from repro.methods.few_labels import METHODS
from repro.recipe import SCALES
from repro.settings import SettingError, describe, unknown

REDRAW_SECONDS = 3.0
# Paper -> its figures: (scale, seeds, folder of runs) -> those that its finished runs can draw.
FIGURES = {
    "commatch": labels.commatch_figures,
    "calibratemix": calibration.calibratemix_figures,
    "csl": masks.csl_figures,
    "pcre": tags.pcre_figures,
    "trust_region": scribbles.trust_region_figures,
}


# Parameters


@dataclass(frozen=True)
class Request:
    """Checked parameters of a notebook: which runs it reads or trains, where and how.

    paper: "" for all. seeds, rule, weights: of tables and claims. experiment, beside: of a notebook about one run.
    save_to: folder for the figures and tables that are shown; None saves nothing.
    """

    paper: str
    scale: str
    seeds: tuple[int, ...]
    rule: str
    weights: str
    root: Path
    experiment: Experiment | None = None
    beside: Experiment | None = None
    data_root: Path | None = None
    device: str = "auto"
    train_base: bool = True
    run_missing: bool = False
    save_to: Path | None = None

    @property
    def experiments(self) -> list[Experiment]:
        """The experiment and the one beside it, the latter first; one where they are the same."""
        return list(dict.fromkeys(filter(None, (self.beside, self.experiment))))

    @property
    def module(self) -> Paper:
        """The paper with its tables, ablations and claims."""
        return PAPERS[self.paper]

    @property
    def how(self) -> tuple:
        """Scale, seeds, folder of runs, reporting rule and weights: the arguments that tables and claims share."""
        return self.scale, self.seeds, self.root, self.rule, self.weights

    def show(self, figure: Figure, name: str, title: str) -> None:
        """Display a figure, and save it as `name`.png if the notebook is asked to save."""
        png = style.to_png(figure)  # once: a second layout may move by a fraction of a pixel
        display({"image/png": png, "text/plain": title}, raw=True, metadata={"image/png": {"alt": title}})
        if self.save_to:
            with atomic_path(self.save_to / f"{name}.png") as part:
                part.write_bytes(png)


def one_run(
    *, rule: str, weights: str, runs_root: Any, data_root: Any, device: str, beside: str = "", base: str | None = None,
    train_base: bool = True, **fields,
) -> Request:  # fmt: skip
    """Check the parameters of a notebook about one run; fields: those of `Experiment`.

    beside: a method that is run at the same settings, "" for none; overrides of the recipe hold for both, those of the
    method's own settings for the first only. base: replaces `beside` in the CalibrateMix notebook: the method that
    CalibrateMix extends, plotted next to it with the same settings where it has them. train_base: whether the base is
    trained; otherwise it is shown if its run is finished.
    overrides: a dict, or its JSON text (papermill passes text). Raises SettingError naming the allowed values.
    """
    own = ("beside",) if base is None else ("base", "train_base")
    check_names([*fields, *own, "rule", "weights", "runs_root", "data_root", "device"])
    _check_flag("train_base", train_base)
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
    experiment, other = Experiment(**fields, overrides=tuple(overrides.items())), None
    if beside:
        shared = {field.name for field in dataclasses.fields(resolve(experiment))}
        if base is not None and beside in METHODS:
            shared |= {field.name for field in dataclasses.fields(METHODS[beside].Settings)}
        theirs = tuple((name, value) for name, value in overrides.items() if name in shared)
        other = Experiment(**fields | {"method": beside}, overrides=theirs)
    data_root, place = Path(data_root) if data_root else None, _folder(runs_root)
    return Request(experiment.paper, experiment.scale, (experiment.seed,), rule, weights, place, experiment, other,
                   data_root, device, train_base)  # fmt: skip


def many_runs(
    *, scale: str, seeds: int, runs_root: Any, paper: str = "", rule: str = "last", weights: str = "ema",
    run_missing: bool = False, save_to: Any = None,
) -> Request:  # fmt: skip
    """Check the parameters of a notebook about a paper's tables, or of the index, which has no `paper`.

    seeds: how many, from 0. Raises SettingError naming the allowed values.
    """
    check_names(["scale", "seeds", "runs_root", "save_to", *["paper", "rule", "weights", "run_missing"] * bool(paper)])
    for kind, value, known in (("paper", paper, ["", *PAPERS]), ("scale", scale, SCALES)):
        if value not in known:
            raise unknown(kind, value, filter(None, known))
    if type(seeds) is not int or seeds < 1:
        raise SettingError(f"seeds is {seeds!r}; it must be a whole number from 1: seeds 0 ... seeds - 1 are read")
    _check_flag("run_missing", run_missing)
    tables.check_reporting(rule, weights)
    save_to = Path(save_to).expanduser() if save_to else None
    numbers = tuple(range(seeds))
    return Request(paper, scale, numbers, rule, weights, _folder(runs_root), run_missing=run_missing, save_to=save_to)


def check_names(known: Iterable[str], cells: Iterable[str] | None = None) -> None:
    """Raise SettingError for a parameter that papermill injected and the notebook does not have.

    papermill itself only warns. It injects a cell that begins with "# Parameters"; the assignments are read from the
    kernel's record of executed cells. cells: that record, by default this kernel's.
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


def _check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise SettingError(f"{name} is {value!r}; it must be True or False")


def _overrides(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except json.JSONDecodeError as error:
            raise SettingError(f'overrides is {given!r}; as text it must be JSON, like {{"lr": 0.01}}') from error
    if not isinstance(given, dict):
        raise SettingError(f"overrides is {given!r}; it must be a dict of setting and value, like {{'lr': 0.01}}")
    return given


def _folder(root: Any) -> Path:
    if root is not None and not isinstance(root, str | Path):
        raise SettingError(f"runs_root is {root!r}; it must be the path of a folder, or None for the usual one")
    return Path(root).expanduser() if root else runs.runs_folder()


# Reading


def source(*functions: Callable) -> HTML:
    """The source code of functions, as the package runs it."""
    code = Code("\n\n".join(inspect.getsource(function).rstrip() for function in functions), language="python")
    font = "font-family: var(--jp-code-font-family, monospace); font-size: 13px"  # an exported page has no such font
    return HTML(f'<div style="{font}">{code._repr_html_()}</div>')


def settings_table(experiment: Experiment) -> Styler:
    """The method's own hyper-parameters: symbol, value, default, allowed values, where stated."""
    return _settings(describe(resolve(experiment).method))


def recipe_table(experiment: Experiment) -> Styler:
    """Everything else of the recipe, as `settings_table`."""
    return _settings([row for row in describe(resolve(experiment)) if row["name"] != "method"])


def _settings(rows: list[dict]) -> Styler:
    columns = ["name", "symbol", "value", "default", "allowed", "source"]  # a method may have no settings of its own
    return text_table(pd.DataFrame(rows, columns=columns).set_index("name"))


def text_table(frame: pd.DataFrame) -> Styler:
    """A frame of text, shown whole, escaped and aligned at the left."""
    aligned = [{"selector": "th, td", "props": "text-align: left; vertical-align: top"}]
    table = Styler(frame.astype(str), uuid="", uuid_len=0, cell_ids=False).set_table_styles(aligned)
    return table.format(escape="html").format_index(escape="html")


# One run


def train(experiment: Experiment, request: Request) -> pd.DataFrame:
    """Execute an experiment, or load it at once if it is finished; returns its numbers.

    Where somebody watches, a bar and the loss curves move while it trains; under papermill nothing is drawn.
    """
    bar, started, drawn = progress.StepBar(progress.title(experiment)), time.monotonic(), -REDRAW_SECONDS
    live = DisplayHandle()

    def on_step(done: int, total: int, row: dict) -> None:
        nonlocal drawn
        bar(done, total, row)
        if progress.is_watched() and (done == total or time.monotonic() - drawn > REDRAW_SECONDS):
            (live.update if drawn > 0 else live.display)(loss_curves(experiment, request.root))
            drawn = time.monotonic()

    metrics = runs.execute(
        experiment, request.root, data_root=request.data_root, device=request.device, on_step=on_step
    )
    spent = f"{time.monotonic() - started:.0f} s now, {metrics['cost']['train_seconds']:.0f} s of training in all"
    print(f"{metrics['run']}: {spent}, on {metrics['provenance']['device']}")
    return numbers([experiment], request)


def train_base(request: Request) -> pd.DataFrame:
    """`train` the run beside, or only read its numbers if `train_base` is off."""
    return train(request.beside, request) if request.train_base else numbers([request.beside], request)


def numbers(experiments: Iterable[Experiment], request: Request) -> pd.DataFrame:
    """The metrics of the paper's first table for single runs, as text; accuracy beside an error."""
    names = next(iter(request.module.tables.values())).metrics
    names = ("accuracy", *names) if "error" in names else names
    rows = {}
    for experiment in experiments:
        found = _reported(experiment, request) if runs.is_finished(experiment, request.root) else None
        rows[f"{style.label_of(experiment)}, seed {experiment.seed}"] = {
            METRICS[name].title: tables.NOT_RUN if found is None
            else "undefined" if found.get(name) is None else METRICS[name].show(found[name])
            for name in names
        }  # fmt: skip
    title = f"{tables.RULES[request.rule]}, {tables.WEIGHTS[request.weights]}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(title)


def _reported(experiment: Experiment, request: Request) -> dict[str, Any]:
    return runs.load_metrics(runs.folder_of(experiment, request.root))["reported"][request.rule][request.weights]


def over_seeds(request: Request) -> Request:
    """The request for the same paper's tables, with as many seeds as a verdict takes."""
    return dataclasses.replace(request, seeds=tuple(range(claims.MINIMUM_SEEDS)))


def command(experiment: Experiment) -> str:
    """The shell command that runs one experiment."""
    names = ("paper", "method", "data", "labels", "seed", "scale")
    words = [word for name in names for word in (f"--{name}", str(getattr(experiment, name)))]
    for name, value in experiment.overrides:
        words += ["--set", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    return "python -m repro run " + " ".join(shlex.quote(word) for word in words)


def commands(experiments: Iterable[Experiment]) -> Styler:
    """The shell command that reproduces each run; it prints the last evaluation of the EMA weights."""
    rows = {f"{style.label_of(item)}, seed {item.seed}": command(item) for item in experiments}
    return text_table(pd.DataFrame.from_dict(rows, orient="index", columns=["command"]).rename_axis("run"))


def beside_published(request: Request, table: str | None = None) -> Styler:
    """The runs of a notebook in one of their paper's tables, a column each: measured, published, and the difference
    where like is compared with like. table: by default the first that has the runs' data."""
    of_data = (one for one in request.module.tables.values()
               if request.experiment.data in {column.data for column in one.columns_at(request.scale)})  # fmt: skip
    whole = request.module.tables[table] if table else next(of_data, next(iter(request.module.tables.values())))
    published = {row.method: row.published for row in reversed(whole.rows)}
    rows = tuple(
        Row(style.label_of(item), item.method, dict(item.overrides), published[item.method])
        for item in request.experiments
        if item.method in published
    )
    column = column_of(request.experiment)
    columns = {"columns" if request.scale == "paper" else "small": (column,)}
    chosen = dataclasses.replace(whole, rows=rows, **columns)
    frame = tables.compare(
        chosen, request.scale, (request.experiment.seed,), request.root, request.rule, request.weights
    )
    return text_table(tables.layout(chosen, frame, column).T)


def measured_by_class(request: Request) -> Styler:
    """IoU in percent of the segmentation of every class, a row a finished run of the notebook, and the mean."""
    rows = {}
    for experiment in request.experiments:
        if runs.is_finished(experiment, request.root):
            found, names = _reported(experiment, request), ("mean", *classes_of(experiment.data))
            rows[style.label_of(experiment)] = dict(zip(names, (found["miou"], *found["iou"]), strict=True))
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("measured: IoU (%)")
    return text_table(frame.map(lambda value: "undefined" if pd.isna(value) else METRICS["miou"].show(value)))


def published_by_class(paper: str) -> Styler:
    """The published IoU in percent of every class, a row a method, with their sources."""
    rows = [row for row in PAPERS[paper].spec.published if row.metric == "seg_iou"]
    frame = pd.DataFrame([(row.method, row.setting, str(row)) for row in rows], columns=["method", "class", "IoU"])
    frame = frame.pivot(index="method", columns="class", values="IoU")[list(dict.fromkeys(row.setting for row in rows))]
    where = ", ".join(dict.fromkeys(f"{row.paper}, {row.table}, {row.dataset} {row.split}" for row in rows))
    return text_table(frame.rename_axis(f"published: IoU (%), {where}").rename_axis(columns=None))


# A paper


def run_missing(request: Request) -> None:
    """Print how many runs of the main job are missing, and train them if the parameters ask for it."""
    experiments = request.module.main_experiments(request.scale, request.seeds)
    missing = [item for item in experiments if not runs.is_finished(item, request.root)]
    print(f"main job: {len(experiments) - len(missing)} of {len(experiments)} runs finished")
    if missing and request.run_missing:
        execute(plan.plan(dict.fromkeys(missing, ("main job",)), request.root), request.root, engine="local")


def ablation_list(paper: str) -> Styler:
    """Every ablation of a paper as parameters: what to set as `overrides` (and `method`) to run it."""
    rows = [
        (table.title, row.label, row.method, json.dumps(dict(row.overrides)))
        for table in PAPERS[paper].ablations.values()
        for row in table.rows
    ]
    columns = ["ablation", "variation", "method", "overrides"]
    return text_table(pd.DataFrame(rows, columns=columns).set_index(columns[:2]))


def heading(request: Request) -> Markdown:
    """The paper's title, and what a reader has to know about its sources."""
    return Markdown(f"**{request.module.spec.title}**\n\n{request.module.spec.note}")


def show_texts(paper: str) -> None:
    """The paper's method in short, deviations, and what was easy or difficult: `repro/papers/<paper>.md`."""
    display(Markdown((paper_files.FOLDER / f"{paper}.md").read_text(encoding="utf-8")))


def blocks(table: Table, request: Request, rows: int) -> list[tuple[str, pd.DataFrame, list[str]]]:
    """Title, laid out frame and notes of each measured column in which at least `rows` rows have a finished run."""
    frame, found = tables.compare(table, *request.how), []
    for column in table.columns_at(request.scale):
        here = tables.of_column(frame, column)
        if here[here["n"] > 0]["row"].nunique() >= min(rows, len(table.rows)):
            laid, notes = tables.layout(table, frame, column), tables.notes(table, column, request.scale)
            found.append((f"{table.title} — {column.title}", laid, notes))
    return found


def show_tables(request: Request, ablations: bool = False) -> None:
    """Each table (or ablation) of the paper: a block a measured column with runs, and its notes; names of the rest."""
    absent = []
    for table in (request.module.ablations if ablations else request.module.tables).values():
        found, told = blocks(table, request, 2 if ablations else 1), []
        for title, laid, notes in found:
            display(Markdown(f"#### {title}"))
            for heading in laid.columns.unique(0):
                display(Markdown(heading), text_table(laid[heading]))
            display(Markdown("\n".join(f"- {note}" for note in notes if note not in told)))
            told += notes
        if not found:
            absent.append(table.title)
    _not_run(absent, request)


def show_figures(request: Request) -> None:
    """The paper's figures that finished runs can draw, those of ablations last."""
    for name, title, figure in FIGURES[request.paper](request.scale, request.seeds, request.root):
        request.show(figure, f"{request.paper}_{name}", title)


def show_ablations(request: Request) -> None:
    """A figure for each ablation of which two rows or more have been run, and the names of the others."""
    absent = []
    for table in request.module.ablations.values():
        if blocks(table, request, 2):
            display(table_points(table, *request.how, metrics=request.module.spec.headlines))
        else:
            absent.append(table.title)
    _not_run(absent, request)


def _not_run(titles: Sequence[str], request: Request) -> None:
    if titles:
        display(Markdown(f"{tables.NOT_RUN} at {request.scale} scale:\n" + "\n".join(f"- {title}" for title in titles)))


def decided(request: Request, paper: str) -> list[claims.Verdict]:
    """The verdict on each claim of a paper."""
    return [claims.decide(claim, *request.how) for claim in PAPERS[paper].claims.values()]


def verdicts(request: Request) -> Styler:
    """A figure of all effects, and each claim of the paper with its verdict, scope, effect, interval and n."""
    found = decided(request, request.paper)
    title = f"Claims of {_short(request.paper)}"
    request.show(claim_effects(found, title), f"{request.paper}_claims", title)
    return text_table(claims.as_frame(found).drop(columns="p (sign flips, one-sided)"))


def finished_table(request: Request) -> Styler:
    """A row for each finished run of the paper: result, cost, origin, and the command that repeats it."""
    rows = {}
    for run, saved in _finished(request, [request.paper]).items():
        origin, spent = saved["provenance"], saved["cost"]
        rows[run] = {
            "result": sentence(saved["reported"]["last"]["ema"], request.module.spec.headlines),
            "training": f"{spent['train_seconds']:.0f} s",
            "device, precision, threads": _device(origin),
            "commit": f"{(origin['commit'] or 'unknown')[:10]}{' + changes' if origin['dirty'] else ''}",
            "command": command(from_record(saved)),
        }
    return text_table(pd.DataFrame.from_dict(rows, orient="index").rename_axis("run"))


def _finished(request: Request, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Run -> metrics of each finished run that the papers' tables, ablations and claims need."""
    folders = {
        runs.folder_of(item, request.root) for item in plan.select(names, scale=request.scale, seeds=request.seeds)
    }
    return {folder.name: runs.load_metrics(folder) for folder in sorted(folders) if (folder / "metrics.json").exists()}


def _device(origin: dict[str, Any]) -> str:
    return f"{origin['device']}, {origin['precision']}, {origin['threads']}"


def _short(paper: str) -> str:
    return PAPERS[paper].spec.title.partition(":")[0]


def cost(request: Request) -> Styler:
    """Time, speed and memory of the finished runs of the paper, or of each paper and all of them."""
    groups = {_short(name): [name] for name in PAPERS if request.paper in ("", name)}
    groups |= {} if request.paper else {"all, each run once": []}
    rows = {}
    for title, names in groups.items():
        found = list(_finished(request, names).values())
        planned = len(plan.select(names, scale=request.scale, seeds=request.seeds))
        rows[title] = {"finished": f"{len(found)} of {planned}"} | (_cost(found) if found else {})
    return text_table(pd.DataFrame.from_dict(rows, orient="index").fillna(""))


def _cost(found: Sequence[dict[str, Any]]) -> dict[str, str]:
    seconds, rates, memory = (
        [saved["cost"][key] for saved in found] for key in ("train_seconds", "samples_per_second", "peak_memory_mib")
    )
    devices = Counter(_device(saved["provenance"]) for saved in found)
    return {
        "training": progress.clock(sum(seconds)),
        "one run": f"{min(seconds):,.0f} to {max(seconds):,.0f} s, median {statistics.median(seconds):,.0f} s",
        "images/s": f"{min(rates):,.0f} to {max(rates):,.0f}",
        "memory at most": f"{max(memory):,.0f} MiB",
        "device, precision, threads (runs)": "; ".join(f"{name} ({n})" for name, n in devices.most_common()),
    }


# All papers


def papers() -> Styler:
    """The papers, what they learn from, their methods and data sets."""
    rows = {
        name: {"title": paper.spec.title, "methods": ", ".join(paper.spec.methods), "data": ", ".join(paper.spec.data),
               "tables": len(paper.tables), "ablations": len(paper.ablations), "claims": len(paper.claims)}
        for name, paper in PAPERS.items()
    }  # fmt: skip
    return text_table(pd.DataFrame.from_dict(rows, orient="index").rename_axis("paper"))


def finished_runs(root: Any = None) -> pd.DataFrame:
    """How many runs of which method, data, labels and scale are finished in a folder of runs."""
    found = [runs.load_metrics(path.parent)["experiment"] for path in sorted(_folder(root).glob("*/metrics.json"))]
    keys = ["scale", "data", "labels", "method"]
    frame = pd.DataFrame(found, columns=[*keys, "seed"])
    return frame.groupby(keys)["seed"].agg(runs="size", seeds=lambda s: ", ".join(map(str, sorted(set(s)))))


def verdict_counts(request: Request) -> Styler:
    """How many claims of each paper have which verdict."""
    counts = {_short(name): Counter(one.verdict for one in decided(request, name)) for name in PAPERS}
    rows = {title: {verdict: found[verdict] for verdict in claims.VERDICTS} for title, found in counts.items()}
    return text_table(pd.DataFrame.from_dict(rows, orient="index").rename_axis("claims of"))


def decided_claims(request: Request) -> Styler:
    """The claims of all papers that the runs support or contradict, with effect, interval and n."""
    names = ["claim", "verdict", "effect", "95 % interval", "n", "published effect"]
    rows = [{"paper": _short(name)} | {key: one.row()[key] for key in names}
            for name in PAPERS for one in decided(request, name)
            if one.verdict in (claims.SUPPORTED, claims.CONTRADICTED)]  # fmt: skip
    rows = rows or [dict.fromkeys(names, "") | {"paper": "", "claim": "none is decided yet"}]
    return text_table(pd.DataFrame(rows).set_index("paper"))


def show_effort(request: Request) -> None:
    """mIoU of all kinds of supervision on the same scenes against annotation effort."""
    points = effort.supervised(request.scale, request.seeds, request.root)
    if not points:
        display(Markdown(f"The scenes have no recipes at scale {request.scale}; use mini or tiny."))
        return
    request.show(across.effort(points), "across_effort", "mIoU against annotation effort")
    display(text_table(effort.supervision_frame(points).set_index("learns from")))


def show_calibration(request: Request) -> None:
    """Accuracy against calibration of all classifiers."""
    points = effort.classified(request.scale, request.seeds, request.root)
    request.show(across.calibration(points), "across_calibration", "Accuracy against ECE")
    display(text_table(effort.calibration_frame(points).set_index("method")))


def show_agreement(request: Request) -> None:
    """Print how the runs agree with the committed numbers, and list what is not identical."""
    rows = agreement.compare_all(plan.select(scale=request.scale, seeds=request.seeds), request.root)
    print("\n".join(agreement.summary(rows)))
    apart = [row for row in rows if row.verdict in (agreement.WITHIN, agreement.DIFFERS)]
    if apart:
        frame = pd.DataFrame([row.row() | {"warning": "yes" if row.warning else ""} for row in apart])
        display(text_table(frame.set_index("run")))
