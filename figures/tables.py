"""Measured beside published: reads the runs of a table, aggregates over seeds, and lays both out as text.

`collect` reads finished runs into one tidy frame, `compare` aggregates it, `layout` puts the result beside the
published cells, `to_markdown` prints it. A small scale has columns of its own and never fills a published one.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from figures.agreement import FACTS, facts
from repro.experiment import Experiment, resolve, run_id
from repro.grid import TITLES, Column, Row, Table, experiment
from repro.measure.metrics import METRICS, Metric
from repro.papers.published import DATASETS, NOT_AVAILABLE, PARTS, Published, Reference, lookup
from repro.runs import folder_of, is_finished, load_metrics
from repro.settings import unknown

NOT_RUN, FINISHED = "not run", "finished"
RULES = {
    "last": "last evaluation",
    "median20": "median of the last 20 evaluations",
    "best": "best evaluation, selected on test",
}
WEIGHTS = {"ema": "EMA weights", "live": "live weights"}
PROVENANCE = ("commit", "dirty", "finished")
COLUMNS = ("run", *(item.name for item in dataclasses.fields(Experiment)), "status", "rule", "weights",
           "selected_on_test", "metric", "value", "train_seconds", *PROVENANCE, *FACTS)  # fmt: skip


# Reading runs


def collect(experiments: Iterable[Experiment], root: Path | None = None) -> pd.DataFrame:
    """One row a run, reporting rule, weights and metric; an unfinished run has one row, of status `not run`.

    experiments: those that share a run are listed once. root: folder of runs.
    Columns: see COLUMNS; value is a fraction for percentages, NaN where undefined. The pseudo-labels of the last logged
    steps are metrics too, for example `positive_coverage`, of rule `last` and live weights.
    Raises CorruptFile naming a metrics file that is not what it should be.
    """
    rows, unique = [], {run_id(item): item for item in experiments}
    for run, item in unique.items():
        identity = {"run": run, **dataclasses.asdict(item), "overrides": json.dumps(dict(item.overrides))}
        if not is_finished(item, root):
            rows.append(identity | {"status": NOT_RUN})
            continue
        saved = load_metrics(folder_of(item, root))
        about = {"status": FINISHED, "train_seconds": saved["cost"]["train_seconds"]}
        about |= {name: saved["provenance"][name] for name in PROVENANCE} | facts(saved)
        for rule, weights, metric, value in _values(saved):
            number = {"metric": metric, "value": math.nan if value is None else float(value)}
            chosen = {"rule": rule, "weights": weights, "selected_on_test": rule == "best"}
            rows.append(identity | about | chosen | number)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _values(saved: dict) -> Iterator[tuple[str, str, str, float | None]]:
    """(rule, weights, metric, value) of every scalar that a run reports."""
    groups = [(rule, weights, "", metrics) for rule, by in saved["reported"].items() for weights, metrics in by.items()]
    groups += [("last", "live", f"{kind}_", metrics) for kind, metrics in saved["pseudo_labels"].items()]
    for rule, weights, prefix, metrics in groups:
        for metric, value in metrics.items():
            if value is None or type(value) in (int, float):
                yield rule, weights, prefix + metric, value


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of n values; mean is None at n = 0, sd at n < 2."""

    mean: float | None
    sd: float | None
    n: int


def summarise(values: Iterable[float]) -> Summary:
    """The Summary of the defined values: NaN, a metric that a run could not define, does not count in n."""
    defined = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(defined) if defined else None
    return Summary(mean, statistics.stdev(defined) if len(defined) > 1 else None, len(defined))


def show(summary: Summary, metric: Metric, planned: int, finished: int, signed: bool = False) -> str:
    """`12.34 ± 0.56 (n = 3)`, `12.34 (n = 1 of 3)`, `not run`, or `undefined` where finished runs have none."""
    if summary.n == 0:
        return "undefined" if finished else NOT_RUN
    spread = "" if summary.sd is None else f" ± {metric.show(summary.sd)}"
    of = "" if summary.n == planned else f" of {planned}"
    return f"{metric.show(summary.mean, signed)}{spread} (n = {summary.n}{of})"


def compare(
    table: Table, scale: str = "mini", seeds: Sequence[int] = (0, 1), root: Path | None = None, rule: str = "last",
    weights: str = "ema",
) -> pd.DataFrame:  # fmt: skip
    """Mean, sd and n over seeds of every cell and metric, as stored: one row each, in the table's order.

    rule: a key of RULES. weights: a key of WEIGHTS. Columns: row, method, data, labels, words, scale, rule, weights,
    finished (runs), planned (seeds), metric, n, summary (a Summary), less: the Summary of an ablation's row minus its
    default (`defaults`) on the seeds that both have.
    """
    check_reporting(rule, weights)
    frame = collect(table.experiments(scale, seeds), root)
    chosen = frame[(frame["rule"] == rule) & (frame["weights"] == weights)]
    values = {(run, metric): value for run, metric, value in chosen[["run", "metric", "value"]].itertuples(index=False)}
    done = set(frame.loc[frame["status"] == FINISHED, "run"])
    rows = []
    for column in table.columns_at(scale):
        default = defaults(table, column, scale)
        for row in table.rows:
            runs = [run_id(item) for item in table.cell(row, column, scale, seeds)]
            other = default.get(row.label, row)
            others = [run_id(item) for item in table.cell(other, column, scale, seeds)] if other is not row else []
            cell = {"row": row.label, "method": row.method, **dataclasses.asdict(column), "scale": scale, "rule": rule,
                    "weights": weights, "finished": sum(run in done for run in runs), "planned": len(runs)}  # fmt: skip
            for metric in table.metrics:
                own = [values.get((run, metric), math.nan) for run in runs]
                less = [one - values.get((run, metric), math.nan) for one, run in zip(own, others, strict=False)]
                summary = summarise(own)
                rows.append(cell | {"metric": metric, "n": summary.n, "summary": summary, "less": summarise(less)})
    return pd.DataFrame(rows)


def defaults(table: Table, column: Column, scale: str) -> dict[str, Row]:
    """Label -> the row of the same method that changes nothing, where the table is an ablation and has one.

    What all rows set alike, such as CalibrateMix's base, is no change.
    """
    if not table.varies:
        return {}
    common = set.intersection(*(set(row.overrides.items()) for row in table.rows))
    plain = {}
    for row in table.rows:
        own = experiment(table.paper, row, column, scale, 0)
        if run_id(own) == run_id(dataclasses.replace(own, overrides=tuple(common))):
            plain[row.method] = row
    return {row.label: plain[row.method] for row in table.rows if row.method in plain}


def shared_seeds(
    table: Table, column: Column, scale: str, seeds: Sequence[int], root: Path | None = None
) -> tuple[int, ...]:
    """The seeds that all rows with a finished run have finished: with others, rows would differ in their seeds.

    Empty where rows share none; all of `seeds` where no row has a finished run.
    """
    finished = [
        {item.seed for item in table.cell(row, column, scale, seeds) if is_finished(item, root)} for row in table.rows
    ]
    shared = set(seeds).intersection(*filter(None, finished))
    return tuple(seed for seed in seeds if seed in shared)


def check_reporting(rule: str, weights: str) -> None:
    """Raise SettingError for an unknown reporting rule or kind of weights."""
    if rule not in RULES:
        raise unknown("reporting rule", rule, RULES)
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)


# Showing them


def incomparable(published: Published, measured: Experiment) -> str:
    """Why no difference to a published number may be taken; empty where data, labels, scale, network fit."""
    if published.value is None:
        return NOT_AVAILABLE
    if measured.scale != "paper":
        return f"ours is at {measured.scale} scale"
    labels = None if published.split in PARTS else measured.labels
    if published.data != measured.data or published.labels != labels:
        return f"published on {_printed_on([published])}"
    if published.network != (network := resolve(measured).network):
        return f"published with {published.encoder or 'an unknown network'}, ours is {network}"
    return ""


def layout(table: Table, frame: pd.DataFrame, column: Column) -> pd.DataFrame:
    """One block of a comparison as text: a row a method; measured metrics, published columns, differences.

    frame: what `compare` returned. column: a measured column of it. Published cells are those of the column where it is
    published, else of the table's first. A difference column appears only where data, labels, scale and network agree
    for some row, and stays empty elsewhere. Headers have two levels. Raises SettingError for an unmeasured column.
    """
    part = of_column(frame, column).set_index(["row", "metric"])
    if part.empty:
        known = {Column(*key).title for key in zip(frame["data"], frame["labels"], frame["words"], strict=True)}
        raise unknown("measured column", column.title, known)
    scale, rule, weights = part.iloc[0][["scale", "rule", "weights"]]
    measured = f"measured: {column.title}, {scale} scale, {RULES[rule]}, {WEIGHTS[weights]}"
    cells: dict[tuple[str, str], list[str]] = {}
    for name in table.metrics:
        rows = [part.loc[(row.label, name)] for row in table.rows]
        cells[measured, METRICS[name].title] = [
            show(row["summary"], METRICS[name], row["planned"], row["finished"]) for row in rows
        ]
    first = METRICS[table.metrics[0]]
    if any(less.n for less in part["less"]):
        default = defaults(table, column, scale)
        less = {row.label: part.loc[(row.label, table.metrics[0])]["less"] for row in table.rows}
        cells[measured, f"{first.name} less the default's, same seeds{' (points)' * first.percent}"] = [
            "" if default.get(row.label, row) is row else show(one := less[row.label], first, one.n, 0, signed=True)
            for row in table.rows
        ]
    beside = _published_beside(table, column)
    for reference in table.references:
        metric = METRICS[reference.metric]
        numbers = [_published(table, row, beside, reference) for row in table.rows]
        header = f"published: {_printed_on(numbers)}, {metric.title}"
        cells[header, reference.title] = [_in_percent(number, reference) for number in numbers]
        differences = []
        for row, number in zip(table.rows, numbers, strict=True):
            mean = part.loc[(row.label, reference.metric)]["summary"].mean
            if mean is None or incomparable(number, experiment(table.paper, row, column, scale, 0)):
                differences.append("")
            else:
                differences.append(metric.show(mean - number.fraction(reference.metric)[0], signed=True))
        if any(differences):
            cells[header, f"measured minus {reference.title}{' (points)' * metric.percent}"] = differences
    laid = pd.DataFrame(cells, index=pd.Index([row.label for row in table.rows], name=table.title))
    laid.columns = pd.MultiIndex.from_tuples(cells)
    return laid


def of_column(frame: pd.DataFrame, column: Column) -> pd.DataFrame:
    """The rows of what `compare` returned that belong to one column."""
    return frame[(frame["data"] == column.data) & (frame["labels"] == column.labels)]


def published_grid(table: Table, reference: Reference) -> pd.DataFrame:
    """All that one reference prints about a table's rows and `paper` columns, in the reference's metric."""
    cells = {}
    for column in table.columns:
        numbers = [_published(table, row, column, reference) for row in table.rows]
        cells[_printed_on(numbers)] = [_in_percent(number, reference) for number in numbers]
    name = f"{reference.title}, {METRICS[reference.metric].title}"
    return pd.DataFrame(cells, index=pd.Index([row.label for row in table.rows], name=name))


def notes(table: Table, column: Column, scale: str) -> list[str]:
    """How each published column of a block was measured, where it was read, and why no difference is taken."""
    beside = _published_beside(table, column)
    lines = [table.note] if table.note else []
    for reference in table.references:
        known: dict[str, list[str]] = {}
        for row in table.rows:
            number = _published(table, row, beside, reference)
            if number.value is None:
                continue
            setting = "" if table.varies else number.setting  # of an ablation the row itself states it
            words = [number.encoder, setting, f"read from {number.source}"]
            if reason := incomparable(number, experiment(table.paper, row, column, scale, 0)):
                words.append(f"no difference taken: {reason}")
            known.setdefault("; ".join(filter(None, words)), []).append(row.label)
        lines += [f"{reference.title}: {words} ({', '.join(rows)})." for words, rows in known.items()]
        if not known:
            lines.append(f"{reference.title}: {NOT_AVAILABLE} for {beside.title}.")
    return list(dict.fromkeys(lines))  # two metrics of one printed table have the same


def to_markdown(frame: pd.DataFrame) -> str:
    """A frame of text, with its index, as a Markdown table; of two header levels the second is a bold row."""
    name = frame.index.name or ""
    rows = [[name, *map(str, frame.columns)], ["---"] * (1 + frame.shape[1])]
    if frame.columns.nlevels == 2:
        groups, heads = zip(*frame.columns, strict=True)
        changes = [group if i == 0 or group != groups[i - 1] else "" for i, group in enumerate(groups)]
        rows = [[name, *changes], rows[1], ["", *(f"**{head}**" for head in heads)]]
    rows += [[label, *cells] for label, *cells in frame.itertuples(name=None)]
    lines = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows)
    return "".join(f"| {line} |\n" for line in lines)


def _published(table: Table, row: Row, column: Column, reference: Reference) -> Published:
    return lookup(table.published, reference, column.data, column.labels, row.published or (row.method,))


def _published_beside(table: Table, column: Column) -> Column:
    return column if column.data.removesuffix("_extra") in DATASETS.values() else table.columns[0]


def _printed_on(numbers: Sequence[Published]) -> str:
    """`CIFAR-10, 40 labels`: what a published column was measured on, as far as that is known."""
    number = next((number for number in numbers if number.value is not None), numbers[0])
    unsure = number.dataset if number.value is None else f"{number.dataset} (which parts is not verified)"
    return f"{TITLES.get(number.data, unsure)}, {number.budget}"


def _in_percent(number: Published, reference: Reference) -> str:
    """A published number in the reference's metric: a printed accuracy appears as an error."""
    value, std = number.fraction(reference.metric)
    if value is None:
        return NOT_AVAILABLE
    metric = METRICS[reference.metric]
    return metric.show(value) + ("" if std is None else f" ± {metric.show(std)}")
