"""The report of a batch: an overview, a page a paper, one across papers, executed notebooks; drawn from run records.

Training and pages are two levels: a changed plot, text or template writes the pages again and trains nothing.
"""

import ast
import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from figures import claims, exchange, tables
from figures.report import pages
from figures.report.content import across_parts, compared, cost_row, of_others, paper_parts
from repro import runs
from repro.batch import local, plan, records
from repro.files import atomic_path, read_json, write_json, write_text
from repro.grid import PAPERS
from repro.settings import SettingError

PACKAGE = Path(__file__).resolve().parents[2] / "repro"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTEBOOKS = ("commatch", "calibratemix", "csl", "pcre", "trust_region", "tables")
TITLE = "Learning from few or weak labels: measured beside published"
SUMMARY = (
    "Papers on learning from few or weak labels, rebuilt in one package. Each number here is read from the record of a "
    "run. Numbers of a small scale stand in columns of their own and decide claims only for the data and scale named; "
    "published numbers carry their source. There is a page for each paper, in the shape of a report of a reproduction."
)
SPREAD = (
    "Cells: mean ± standard deviation over n seeds. Last evaluation of the averaged (EMA) weights. Rows of an ablation "
    "may have other seeds than its default: its column of differences takes the seeds that both have, its figures "
    "those that all rows have."
)
DECIDED = (claims.SUPPORTED, claims.CONTRADICTED)
CONTENTS = (
    ("claims", "Claims"), ("method", "Method"), ("deviations", "Deviations"), ("easy", "What was easy"),
    ("difficult", "What was difficult"), ("tables", "Tables"), ("ablations", "Ablations"), ("figures", "Figures"),
    ("cost", "Cost"), ("commands", "Commands"),
)  # fmt: skip


def build(scale: str, seeds: Sequence[int], root: Path, checkout: Path | None = None) -> Path:
    """Write the report of the runs and return its first page.

    scale, seeds: of the runs that are read. root: folder of runs; the report goes to `root/report-<scale>`.
    checkout: one whose `figures/` and README block are renewed too; None leaves them alone.
    Nothing is written when no record, notebook, text or code changed since the last report, unless that one renewed no
    checkout and this one shall.
    """
    folder = Path(root) / f"report-{scale}"
    page, made = folder / "index.html", folder / "inputs.json"
    inputs = _inputs(scale, seeds, root)
    last = read_json(made) if page.exists() and made.exists() else {}
    if last.pop("published", False) >= (checkout is not None) and last == inputs:
        return page
    made.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, runs.cores() - 1)) as pool:  # notebooks run while this process draws
        executing = start_notebooks(pool, folder, scale, root)
        parts = [paper_parts(name, scale, seeds, root, folder) for name in PAPERS]
        between = across_parts(scale, seeds, root, folder)
        executed = {name: notebook.result() for name, notebook in executing.items()}
    write_pages(folder, scale, seeds, root, parts, between, executed)
    write_text(folder / "results.md", results_markdown(scale, seeds, parts))
    saved = records.save(tables.collect(plan.select(scale=scale, seeds=seeds), root), folder / "runs.csv")
    if checkout is not None:
        publish(saved, folder, parts, checkout, [figure for section in between for figure in section["figures"]])
    write_json(made, inputs | {"committed": _committed_digest(), "published": checkout is not None})
    return page


def _inputs(scale: str, seeds: Sequence[int], root: Path) -> dict:
    """All that the pages are made of."""
    imported = sorted((Path(root) / exchange.FOLDER).glob("*.parquet"))
    read = [path for kind in ("*.md", "*.csv") for path in sorted((PACKAGE / "papers").glob(kind))]
    read += sorted((PACKAGE / "report" / "templates").iterdir())
    read += sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
    return {
        "runs": _times(root, f"*-{scale}-*/metrics.json"),
        "notebooks": _times(root, f"*-{scale}-*/notebook.ipynb"),
        "imported": {path.name: path.stat().st_mtime_ns for path in imported},
        "committed": _committed_digest(),
        "code": runs.source_digest(),
        "texts": _digest(read),
        "seeds": list(seeds),
    }


def _times(root: Path, pattern: str) -> dict[str, int]:
    """The time of each run's file by run."""
    return {path.parent.name: path.stat().st_mtime_ns for path in sorted(Path(root).glob(pattern))}


def _committed_digest() -> str:
    return _digest([local.COMMITTED, records.numbers_of(local.COMMITTED)])


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


# Pages


def write_pages(
    folder: Path, scale: str, seeds: Sequence[int], root: Path, parts: Sequence[dict], between: Sequence[dict],
    executed: Mapping[str, Path],
) -> None:  # fmt: skip
    """All pages of the report. parts: `paper_parts` of each paper; between: `across_parts`; executed: notebooks."""
    site = [{"href": "index.html", "title": "Overview"}]
    site += [{"href": part["href"], "title": part["short"]} for part in parts]
    site += [{"href": "across.html", "title": "Across papers"}]
    every = {row["id"]: row for part in parts for row in part["runs"]}
    notebooks = notebook_pages(folder, scale, executed, site)
    of_runs = pages.run_pages(root, folder, scale, site, {run: row["title"] for run, row in every.items()})
    common = {"site": site, "scale": scale, "seeds": ", ".join(map(str, seeds)), "spread": SPREAD}
    for part in parts:
        pages.write(
            folder / part["href"],
            "paper.html",
            title=part["title"],
            paper=part,
            contents=CONTENTS,
            scope=f"Verdicts hold {part['scope']} only.",
            commits=_commits(part["runs"]),
            notebook=next((item for item in notebooks if item["name"] == part["name"]), None),
            pages=of_runs,
            commands=paper_commands(part["name"], scale, len(seeds)),
            **common,
        )
    pages.write(folder / "across.html", "across.html", title="Across papers", sections=between, **common)
    everything = plan.select(scale=scale, seeds=seeds)
    counted = [Counter(claim["verdict"] for claim in part["claims"]) for part in parts]
    pages.write(
        folder / "index.html",
        "index.html",
        title=TITLE,
        summary=SUMMARY,
        finished=len(every),
        commits=_commits(every.values()),
        kinds=claims.VERDICTS,
        least=claims.MINIMUM_SEEDS,
        papers=[part | {"counts": counts, "main": _main_block(part)}
                for part, counts in zip(parts, counted, strict=True)],
        decided=[{"paper": part["short"], "href": part["href"], "claims": settled} for part in parts
                 if (settled := [claim for claim in part["claims"] if claim["verdict"] in DECIDED])],
        across=" and ".join(section["title"][0].lower() + section["title"][1:] for section in between),
        agreement=compared(everything, root),
        imported=pages.plain_html(found) if len(found := of_others(scale, seeds, root)) else "",
        cost=[*(part["cost"] for part in parts), cost_row("all, each run once", list(every.values()), len(everything))],
        notebooks=notebooks,
        skipped=[f"{name}.ipynb" for name in NOTEBOOKS if name not in {item["name"] for item in notebooks}],
        runs=[{"href": address, "title": run} for run, address in of_runs.items()],
        commands=[
            f"make reproduce SCALE={scale} SEEDS={len(seeds)}  # the main job, and this report",
            f"python -m repro plan --scale {scale} --seeds {len(seeds)}  # the runs of all tables and claims",
            f"python -m repro rerun --scale {scale} --seeds {len(seeds)}  # trains those that are missing",
            f"python -m repro report --scale {scale} --seeds {len(seeds)}  # this report alone; trains nothing",
        ],
        **common,
    )  # fmt: skip


def paper_commands(name: str, scale: str, seeds: int) -> list[str]:
    """The shell commands that list, and make, all runs of a paper's page."""
    return [f"python -m repro {word} --paper {name} --scale {scale} --seeds {seeds}" for word in ("plan", "rerun")]


def _commits(rows: Iterable[dict]) -> str:
    found = sorted({row["commit"] for row in rows})
    return f"commit{'s'[: len(found) > 1]} {', '.join(found)}" if found else "no run yet"


def start_notebooks(pool: ThreadPoolExecutor, folder: Path, scale: str, root: Path) -> dict[str, Future[Path]]:
    """Name -> executed notebook, run by papermill in a process of its own.

    A notebook that would train is left out, so that pages never wait for a training.
    """
    source = PACKAGE.parent / "notebooks"
    paths = {name: source / f"{name}.ipynb" for name in NOTEBOOKS}
    return {
        name: pool.submit(execute_notebook, path, folder / f"notebook-{name}.ipynb", scale, root)
        for name, path in paths.items()
        if path.exists() and not would_train(path, scale, root)
    }


def execute_notebook(path: Path, executed: Path, scale: str, root: Path) -> Path:
    """Run one notebook; returns the executed one. Raises RuntimeError with the end of what papermill said."""
    parameters = ["-p", "scale", scale, "-p", "runs_root", str(root)]
    papermill = ["papermill", str(path), str(executed), *parameters, "--cwd", str(path.parent), "--no-progress-bar"]
    done = subprocess.run([sys.executable, "-m", *papermill], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path.name}: papermill failed\n{done.stderr[-3000:]}")
    return executed


def notebook_pages(folder: Path, scale: str, executed: Mapping[str, Path], site: list[dict]) -> list[dict]:
    """A page of each executed notebook: its name, title and address."""
    made = []
    for name, notebook in executed.items():
        page = folder / f"notebook-{name}.html"
        pages.notebook_page(notebook, page, f"{name}.ipynb", f"Executed by papermill at scale {scale}.", site)
        made.append({"name": name, "title": f"{name}.ipynb", "href": page.name})
    return made


def would_train(path: Path, scale: str, root: Path) -> bool:
    """Whether a notebook's runs, by its own parameters at this scale, are not all finished, or do not exist."""
    from figures import desk  # which imports this module

    cells = read_json(path)["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    given = {item.targets[0].id: ast.literal_eval(item.value) for item in ast.parse(source).body}
    if "method" not in given:
        return bool(given.get("run_missing"))
    try:
        asked = desk.one_run(**given | {"scale": scale, "runs_root": str(root)})
    except SettingError:
        return True
    return not all(runs.is_finished(item, root) for item in asked.experiments)


# Text for the checkout


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
        for block in (*part["tables"], *part["ablations"]):
            lines += [f"### {block['title']}", "", block["markdown"], *(f"- {note}" for note in block["notes"]), ""]
        lines += ["### Claims", "", claims_markdown(part), ""]
    return "\n".join(lines)


def claims_markdown(part: dict) -> str:
    """The claims of a paper as a Markdown table."""
    columns = ["claim", "verdict", "effect", "95 % interval", "n", "published effect"]
    frame = pd.DataFrame(part["claims"])[columns].set_index("claim")
    frame = frame.replace({"published effect": {"": "not available"}})
    return tables.to_markdown(frame) + f"\nVerdicts hold {part['scope']} only.\n"


def folded_claims(part: dict) -> str:
    """The same behind a line that counts the verdicts: a reader opens what concerns them."""
    counts = Counter(claim["verdict"] for claim in part["claims"])
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in claims.VERDICTS if counts[verdict])
    summary = f"<summary>{len(part['claims'])} claims: {counted}</summary>"
    picture = f"![Effects of the claims with their intervals](figures/rendered/{part['claims_figure']['path'].name})"
    return f"<details>\n{summary}\n\n{picture}\n\n{claims_markdown(part)}\n</details>\n"


def publish(
    saved: Sequence[Path], folder: Path, parts: list[dict], checkout: Path, further: Sequence[dict] = ()
) -> None:
    """Renew a checkout's figures, `figures/results.md`, files of runs and the README's result block.

    saved: the files of runs. further: figures of no paper.
    """
    target = checkout / "figures" / "rendered"
    target.mkdir(exist_ok=True)
    sources = [figure["path"] for part in parts for figure in part["figures"]]
    sources += [figure["path"] for figure in further]
    for source in (*sources, folder / "results.md", *saved):
        with atomic_path(target / source.name) as part:
            part.write_bytes(source.read_bytes())
    readme = checkout / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, marker, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if marker and end:
        block = "\n\n".join(f"{_first_table(part)}\n{folded_claims(part)}" for part in parts)
        write_text(readme, f"{before}{BEGIN}\n{block}\n{END}{after}")


def _first_table(part: dict) -> str:
    """The main table of a paper for the README."""
    found = main_table(part)
    if found is None:
        return "No finished run yet."
    return f"{part['title']}: {found[0]}\n\n{tables.to_markdown(found[1])}"


def _main_block(part: dict) -> dict | None:
    """The main table of a paper for the first page."""
    found = main_table(part)
    return found and {"caption": found[0], "html": pages.frame_html(found[1])}


def main_table(part: dict) -> tuple[str, pd.DataFrame] | None:
    """Caption and frame of a paper's main table: where its main job runs, measured columns only, rows that ran.

    part: of `paper_parts`. None before two of its rows have a finished run.
    """
    if not part["tables"]:
        return None
    main = [block for block in part["tables"] if block["column"] == part["column"]]
    frame = (main or part["tables"])[0]["frame"]
    measured = frame.loc[:, [top for top in frame.columns.get_level_values(0).unique() if top.startswith("measured")]]
    ran = measured[~measured.eq(tables.NOT_RUN).all(axis=1)]
    caption = ran.columns.get_level_values(0)[0]
    ran.columns = ran.columns.get_level_values(1)
    return caption, ran
