"""What the report's pages show of a paper's runs: claims, tables, ablations, figures, cost, and agreement."""

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

import figures as plots
from figures import agreement, claims, exchange, style, tables
from figures import effort as across
from figures.report import pages
from repro import runs
from repro.batch import local, plan
from repro.experiment import Experiment, from_record
from repro.grid import PAPERS, place
from repro.measure.metrics import METRICS, sentence
from repro.papers.published import LABELS
from repro.settings import SettingError

# Paper -> its figures: (scale, seeds, folder of runs) -> those that its finished runs can draw.
FIGURES = {
    "commatch": plots.labels.commatch_figures,
    "calibratemix": plots.calibration.calibratemix_figures,
    "csl": plots.masks.csl_figures,
    "pcre": plots.tags.pcre_figures,
    "trust_region": plots.scribbles.trust_region_figures,
}
ABLATION, MAIN = "ablation_", "main"  # names of figures that belong to a table
KINDS = across.KINDS | {LABELS: "few labels"}


def paper_parts(name: str, scale: str, seeds: Sequence[int], root: Path, folder: Path) -> dict:
    """Claims, texts, tables, ablations, figures, cost and runs of one paper, as pages and Markdown need them."""
    paper = PAPERS[name]
    figures = {key: save_figure(figure, title, folder / "figures" / f"{name}_{key}.png")
               for key, title, figure in FIGURES[name](scale, seeds, root)}  # fmt: skip
    measured = {kind: [block for table in group.values() for block in table_blocks(table, scale, seeds, root)]
                for kind, group in (("tables", paper.TABLES), ("ablations", paper.ABLATIONS))}  # fmt: skip
    main, further, said = place(paper.main_experiments(scale, seeds)[0]), dict(figures), {}
    whole = [block for block in measured["tables"] if block["column"] == main] or measured["tables"]
    for kind, blocks in measured.items():
        for block in blocks:  # a figure stands below the first block of its ablation, or of the main job's table
            key = f"{ABLATION}{block['name']}" if kind == "ablations" else MAIN if block is whole[0] else ""
            block["figure"] = further.pop(key, None)
            before = said.setdefault(block["title_of_table"], [])
            block["new_notes"] = [note for note in block["notes"] if note not in before]
            before += block["new_notes"]
    done = {block["title_of_table"] for blocks in measured.values() for block in blocks}
    wanted = plan.select([name], scale=scale, seeds=seeds)
    rows = finished(wanted, root)
    decided = [claims.decide(claim, scale, seeds, root) for claim in paper.CLAIMS.values()]
    effects = plots.verdicts.claim_effects(decided, f"Claims of {short(paper.TITLE)}")
    of_claims = save_figure(effects, "Effects of the claims", folder / "figures" / f"{name}_claims.png")
    return {
        "name": name,
        "title": paper.TITLE,
        "short": short(paper.TITLE),
        "href": f"{name}.html",
        "learns_from": KINDS[paper.BUDGET],
        "column": main,
        "note": paper.NOTE,
        "scope": claims.scope(paper.CLAIMS.values(), scale),
        "claims": [verdict.row() for verdict in decided],
        "claims_figure": of_claims,
        "texts": pages.texts(name),
        "not_run": [table.title for table in (*paper.TABLES.values(), *paper.ABLATIONS.values())
                    if table.title not in done],
        "figures": [of_claims, *figures.values()],
        "further": list(further.values()),
        "cost": cost_row(short(paper.TITLE), rows, len(wanted)),
        "runs": rows,
        **measured,
    }  # fmt: skip


def table_blocks(table, scale: str, seeds: Sequence[int], root: Path) -> list[dict]:
    """A block for each measured column of the table in which at least two rows have a finished run."""
    frame = tables.compare(table, scale, seeds, root)
    blocks = []
    for column in table.columns_at(scale):
        here = frame[(frame["data"] == column.data) & (frame["labels"] == column.labels)]
        if here[here["n"] > 0]["row"].nunique() < min(2, len(table.rows)):
            continue
        laid = tables.layout(table, frame, column)
        blocks.append(
            {
                "name": table.name,
                "title_of_table": table.title,
                "title": f"{table.title} — {column.title}",
                "column": column,
                "frame": laid,
                "html": pages.frame_html(laid),
                "markdown": tables.to_markdown(laid),
                "notes": tables.notes(table, column, scale),
            }
        )
    return blocks


def across_parts(scale: str, seeds: Sequence[int], root: Path, folder: Path) -> list[dict]:
    """The sections of the page across papers, figures saved and tables as HTML."""
    made = []
    for section in across.sections(scale, seeds, root):
        figures = [
            save_figure(figure, title, folder / "figures" / f"across_{key}.png")
            for key, title, figure in section["figures"]
        ]
        shown = [{"title": title, "html": pages.plain_html(frame)} for title, frame in section["tables"]]
        made.append(section | {"figures": figures, "tables": shown})
    return made


def save_figure(figure, title: str, path: Path) -> dict:
    """Write a figure; returns its title, path and source."""
    style.save(figure, path)
    return {"title": title, "path": path, "source": pages.embedded(path)}


def finished(experiments: Iterable[Experiment], root: Path) -> list[dict]:
    """A row for each finished run: result, cost, origin, and the command that repeats it."""
    rows = []
    for folder, experiment in {runs.folder_of(item, root): item for item in experiments}.items():  # papers share runs
        if not (folder / "metrics.json").exists():
            continue
        metrics = runs.load_metrics(folder)
        final, cost, origin = metrics["reported"]["last"]["ema"], metrics["cost"], metrics["provenance"]
        rows.append(
            {
                "id": folder.name,
                "title": local.title(experiment),
                "result": sentence(final, PAPERS[experiment.paper].HEADLINES),
                "seconds": f"{cost['train_seconds']:.0f}",
                "rate": f"{cost['samples_per_second']:,.0f}",
                "memory": f"{cost['peak_memory_mib']:,.0f}",
                "device": f"{origin['device']}, {origin['precision']}, {origin['threads']}",
                "commit": f"{(origin['commit'] or 'unknown')[:10]}{' + changes' if origin['dirty'] else ''}",
                "command": command(from_record(metrics)),
                "cost": cost,
            }
        )
    return rows


def cost_row(name: str, rows: Sequence[dict], planned: int) -> dict[str, str]:
    """What finished runs took, as text. rows: of `finished`. planned: runs that tables, ablations and claims need."""
    row = {"name": name, "finished": len(rows), "planned": planned}
    if not rows:
        return row | dict.fromkeys(("total", "each", "rate", "memory", "device"), "")
    seconds, rates, memory = (
        [item["cost"][key] for item in rows] for key in ("train_seconds", "samples_per_second", "peak_memory_mib")
    )
    devices = Counter(item["device"] for item in rows)
    return row | {
        "total": local.clock(sum(seconds)),
        "each": f"{min(seconds):,.0f} to {max(seconds):,.0f} s, median {statistics.median(seconds):,.0f} s",
        "rate": f"{min(rates):,.0f} to {max(rates):,.0f}",
        "memory": f"{max(memory):,.0f} MiB",
        "device": "; ".join(f"{device} ({count})" for device, count in devices.most_common()),
    }


def command(experiment: Experiment) -> str:
    """The shell command that runs one experiment."""
    names = ("paper", "method", "data", "labels", "seed", "scale")
    words = [word for name in names for word in (f"--{name}", str(getattr(experiment, name)))]
    words += [word for name, value in experiment.overrides for word in ("--set", f"{name}={_json(value)}")]
    return "python -m repro run " + " ".join(shlex.quote(word) for word in words)


def short(title: str) -> str:
    """`ComMatch` of a paper's title."""
    return title.partition(":")[0]


def compared(experiments: Iterable[Experiment], root: Path) -> dict:
    """How finished runs agree with the committed numbers: a sentence, a table of what is not identical, warnings."""
    rows = agreement.compare_all(experiments, root)
    apart = [row for row in rows if row.verdict in (agreement.WITHIN, agreement.DIFFERS)]
    frame = pd.DataFrame([row.row() | {"warning": "yes" if row.warning else ""} for row in apart])
    said = agreement.summary(rows)[0]
    return {"said": said[0].upper() + said[1:], "html": pages.plain_html(frame) if apart else "",
            "warnings": sum(row.warning for row in rows)}  # fmt: skip


def of_others(scale: str, seeds: Sequence[int], root: Path) -> pd.DataFrame:
    """Imported results beside those of this folder, a row a cell and origin, as text; empty where nothing was imported.

    Headline metrics of the last evaluation and EMA weights, over all seeds that either side has. Raises DataError.
    """
    frame = exchange.imported(root)
    last = (frame["rule"] == "last") & (frame["weights"] == "ema") & (frame["class"] == exchange.ALL_CLASSES)
    frame = frame[last & (frame["scale"] == scale)]
    cell, rows = ["paper", "method", "data", "labels", "overrides"], []
    for (paper, method, data, labels, overrides, origin), part in frame.groupby([*cell, "origin"], sort=True):
        changes = json.loads(overrides)
        mine = _finished_here((paper, method, data, labels), scale, changes, {*seeds, *part["seed"].tolist()}, root)
        changed = "".join(f", {key} = {value}" for key, value in changes.items())
        facts = part.iloc[0]
        for name in PAPERS[paper].HEADLINES:
            theirs = part.loc[part["metric"] == name, "value"]
            ours = [float("nan") if (value := found.get(name)) is None else value for found in mine.values()]
            rows.append(
                {
                    "paper": short(PAPERS[paper].TITLE),
                    "method": f"{style.style_of(method).title}{changed}",
                    "where": f"{data}, {PAPERS[paper].BUDGET.format(labels)}",
                    "metric": METRICS[name].title,
                    "here": _over_seeds(ours, name),
                    "there": _over_seeds(theirs, name),
                    "origin": origin,
                    "exported by": facts["exported_by"],
                    "device": facts["device"],
                    "torch": facts["torch"],
                    "commit": f"{facts['commit'][:10]}{' + changes' * (facts['dirty'] == 'yes')}",
                    "runs of both": len(set(part["run"]) & set(mine)),
                }
            )
    return pd.DataFrame(rows)


def _finished_here(cell: tuple, scale: str, overrides: dict, seeds: Iterable[int], root: Path) -> dict[str, dict]:
    """Run -> metrics of this folder's finished runs of a cell; {} of settings that this code does not have."""
    try:
        paper, method, data, labels = cell
        items = [Experiment(paper, method, data, int(labels), int(seed), scale, tuple(overrides.items()))
                 for seed in sorted(seeds)]  # fmt: skip
    except SettingError:
        return {}
    folders = [runs.folder_of(item, root) for item in items if runs.is_finished(item, root)]
    return {folder.name: runs.load_metrics(folder)["reported"]["last"]["ema"] for folder in folders}


def _over_seeds(values: Iterable[float], metric: str) -> str:
    values = list(values)
    return tables.show(tables.summarise(values), METRICS[metric], len(values), len(values))


def _json(value) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
