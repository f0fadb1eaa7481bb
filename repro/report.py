"""The report of a batch: tables beside published numbers, claims, figures, executed notebooks, one HTML page.

Everything is drawn from run records. The page embeds its figures, so it can be mailed or opened from a file.
"""

import base64
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from repro import claims, plots, plots_calibration, plots_masks, plots_tags, runs, style, tables
from repro.checkpoints import atomic_path, read_json, write_json, write_text
from repro.experiment import Experiment, from_record
from repro.grids import place
from repro.metrics import sentence
from repro.papers import PAPERS

PACKAGE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTEBOOKS = ("commatch", "calibratemix", "csl", "pcre", "tables")
# Paper -> its figures: (scale, seeds, folder of runs) -> those that its finished runs can draw.
FIGURES = {
    "commatch": plots.commatch_figures,
    "calibratemix": plots_calibration.calibratemix_figures,
    "csl": plots_masks.csl_figures,
    "pcre": plots_tags.pcre_figures,
}


def build(scale: str, seeds: Sequence[int], root: Path, committed: Path | None = None) -> Path:
    """Write the report of the main job's runs and return its page.

    scale, seeds: of the main job. root: folder of runs; the report goes to `root/report-<scale>`.
    committed: a checkout whose `figures/` and README block are renewed too; None leaves them alone.
    Nothing is written when no record changed since the last report.
    """
    folder = Path(root) / f"report-{scale}"
    page = folder / "index.html"
    inputs = {"runs": _records(root, scale), "code": runs.source_digest(), "seeds": list(seeds)}
    made = folder / "inputs.json"
    if page.exists() and made.exists() and read_json(made) == inputs:
        return page
    made.unlink(missing_ok=True)
    parts = [paper_parts(name, scale, seeds, root, folder) for name in PAPERS]
    notebooks = execute_notebooks(folder, scale, root)
    experiments = [e for seed in seeds for paper in PAPERS.values() for e in paper.main_experiments(scale, (seed,))]
    write_text(page, render(scale, seeds, parts, notebooks, finished(experiments, root)))
    write_text(folder / "results.md", results_markdown(scale, seeds, parts))
    tables.collect(experiments, root).to_csv(folder / "runs.csv", index=False)
    if committed is not None:
        publish(folder, parts, committed)
    write_json(made, inputs)
    return page


def paper_parts(name: str, scale: str, seeds: Sequence[int], root: Path, folder: Path) -> dict:
    """Claims, tables and figures of one paper, as the page and the Markdown need them."""
    paper = PAPERS[name]
    blocks, not_run = [], []
    for table in (*paper.TABLES.values(), *paper.ABLATIONS.values()):
        blocks_here = table_blocks(table, scale, seeds, root)
        blocks += blocks_here
        if not blocks_here:
            not_run.append(table.title)
    figures = []
    for key, title, figure in FIGURES[name](scale, seeds, root):
        path = folder / "figures" / f"{name}_{key}.png"
        style.save(figure, path)
        figures.append({"title": title, "path": path, "source": _embedded(path)})
    decided = claims.verdicts(paper.CLAIMS.values(), scale, seeds, root)
    first = paper.main_experiments(scale, seeds)[0]
    return {
        "name": name,
        "title": paper.TITLE,
        "column": place(first),
        "note": paper.NOTE,
        "scope": claims.scope(next(iter(paper.CLAIMS.values())), scale),
        "claims": decided.to_dict("records"),
        "tables": blocks,
        "not_run": not_run,
        "figures": figures,
    }


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
                "title": f"{table.title} — {column.title}",
                "column": column,
                "frame": laid,
                "html": tables.to_html(laid),
                "markdown": tables.to_markdown(laid),
                "notes": tables.notes(table, column, scale),
            }
        )
    return blocks


def execute_notebooks(folder: Path, scale: str, root: Path) -> list[dict]:
    """Run the notebooks with papermill, each in a process of its own, and convert them to HTML."""
    source = PACKAGE.parent / "notebooks"
    made = []
    for name in NOTEBOOKS:
        path = source / f"{name}.ipynb"
        if not path.exists():
            continue
        executed, page = folder / f"{name}.ipynb", folder / f"{name}.html"
        papermill = [
            "-m",
            "papermill",
            str(path),
            str(executed),
            "-p",
            "scale",
            scale,
            "-p",
            "runs_root",
            str(root),
            "--cwd",
            str(source),
            "--no-progress-bar",
        ]
        convert = ["-m", "nbconvert", "--to", "html", "--output-dir", str(folder), str(executed)]
        for arguments in (papermill, convert):
            done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}.ipynb: {arguments[1]} failed\n{done.stderr[-3000:]}")
        made.append({"title": f"{name}.ipynb", "href": page.name})
    return made


def finished(experiments: Sequence[Experiment], root: Path) -> list[dict]:
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
                "result": sentence(final, PAPERS[experiment.paper].HEADLINES),
                "seconds": f"{cost['train_seconds']:.0f}",
                "rate": f"{cost['samples_per_second']:,.0f}",
                "memory": f"{cost['peak_memory_mib']:,.0f}",
                "device": f"{origin['device']}, {origin['precision']}, {origin['threads']}",
                "commit": f"{(origin['commit'] or 'unknown')[:10]}{' + changes' if origin['dirty'] else ''}",
                "command": command(from_record(metrics)),
            }
        )
    return rows


def command(experiment: Experiment) -> str:
    """The shell command that runs one experiment."""
    names = ("paper", "method", "data", "labels", "seed", "scale")
    words = [word for name in names for word in (f"--{name}", str(getattr(experiment, name)))]
    words += [word for name, value in experiment.overrides for word in ("--set", f"{name}={_json(value)}")]
    return "python -m repro run " + " ".join(shlex.quote(word) for word in words)


def render(scale: str, seeds: Sequence[int], parts: list[dict], notebooks: list[dict], rows: list[dict]) -> str:
    """The HTML page."""
    environment = Environment(
        loader=FileSystemLoader(PACKAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    from markupsafe import Markup

    for part in parts:
        for block in part["tables"]:
            block["html"] = Markup(block["html"])  # pandas escaped the cells
    return environment.get_template("report.html").render(
        title="Learning from few or weak labels: measured beside published",
        summary="Each number is read from the record of a run. Numbers of a small scale stand in columns of their own "
        "and decide claims only for the data and scale named; published numbers carry their source.",
        scale=scale,
        seeds=", ".join(map(str, seeds)),
        papers=parts,
        notebooks=notebooks,
        runs=rows,
        commits=" and ".join(sorted({f"commit {row['commit']}" for row in rows})) or "no commit",
        command=f"make reproduce SCALE={scale} SEEDS={len(seeds)}",
    )


def results_markdown(scale: str, seeds: Sequence[int], parts: list[dict]) -> str:
    """All tables and claims as Markdown: `figures/results.md`."""
    lines = [
        f"# Results at scale {scale}, seeds {', '.join(map(str, seeds))}",
        "",
        f"Written by `make reproduce SCALE={scale} SEEDS={len(seeds)}` from run records; do not edit.",
        "",
    ]
    for part in parts:
        lines += [f"## {part['title']}", "", part["note"], ""]
        for block in part["tables"]:
            lines += [f"### {block['title']}", "", block["markdown"], *(f"- {note}" for note in block["notes"]), ""]
        lines += ["### Claims", "", claims_markdown(part), ""]
    return "\n".join(lines)


def claims_markdown(part: dict) -> str:
    """The claims of a paper as a Markdown table."""
    columns = ["claim", "verdict", "effect", "95 % interval", "n", "published effect"]
    frame = pd.DataFrame(part["claims"])[columns].set_index("claim")
    frame = frame.replace({"published effect": {"": "not available"}})
    return tables.to_markdown(frame) + f"\nVerdicts hold {part['scope']} only.\n"


def publish(folder: Path, parts: list[dict], checkout: Path) -> None:
    """Renew the committed figures, `figures/results.md`, `figures/runs.csv` and the README's result block."""
    target = checkout / "figures"
    target.mkdir(exist_ok=True)
    sources = [figure["path"] for part in parts for figure in part["figures"]]
    for source in (*sources, folder / "results.md", folder / "runs.csv"):
        with atomic_path(target / source.name) as part:
            part.write_bytes(source.read_bytes())
    readme = checkout / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, marker, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if marker and end:
        block = "\n\n".join([_first_table(part) + "\n" + claims_markdown(part) for part in parts])
        write_text(readme, f"{before}{BEGIN}\n{block}\n{END}{after}")


def _first_table(part: dict) -> str:
    """The main table of a paper for the README: where its main job runs, measured columns only, rows that ran."""
    if not part["tables"]:
        return "No finished run yet."
    main = [block for block in part["tables"] if block["column"] == part["column"]]
    frame = (main or part["tables"])[0]["frame"]
    measured = frame.loc[:, [top for top in frame.columns.get_level_values(0).unique() if top.startswith("measured")]]
    ran = measured[~measured.eq(tables.NOT_RUN).all(axis=1)]
    caption = ran.columns.get_level_values(0)[0]
    ran.columns = ran.columns.get_level_values(1)
    return f"{part['title']}: {caption}\n\n{tables.to_markdown(ran)}"


def _records(root: Path, scale: str) -> dict[str, int]:
    """Every finished run of the scale with the time of its record."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(Path(root).glob(f"*-{scale}-*/metrics.json"))}


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _json(value) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
