"""The report of a batch: its notebooks, executed on the finished runs and converted to HTML pages.

Nothing trains here. Pages work from a file: figures, styles and equations (MathML) are inside, and no script runs.
"""

import ast
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from latex2mathml.converter import convert

from repro import runs
from repro.batch import plan, records
from repro.experiment import Experiment
from repro.files import read_json, write_json, write_text
from repro.grid import PAPERS
from repro.recipe import SCALES
from repro.settings import SettingError, unknown

CHECKOUT = Path(__file__).resolve().parents[2]
NOTEBOOKS, TEMPLATES = CHECKOUT / "notebooks", CHECKOUT / "figures" / "templates"
RENDERED = CHECKOUT / "figures" / "rendered"
TOLD = "tell"  # tag of cells whose printed text goes to `progress` as well


def build(
    scale: str, seeds: Sequence[int], root: Path, publish: bool = False, progress: Callable[[str], Any] = print
) -> Path:
    """Write the report of the finished runs and return its first page, `root/report-<scale>/index.html`.

    seeds: 0 ... n - 1. publish: renew `figures/rendered/` too. progress: takes lines of text.
    A paper's own notebook is executed only if its runs are finished, so that nothing trains. Does nothing if records,
    notebooks, texts and code are unchanged since the last report, unless `publish` is given now and was not then.
    Raises SettingError for an unknown scale, or if publishing would drop committed runs; RuntimeError if a notebook
    fails.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if publish and (reason := unpublished(scale, seeds, root)):
        raise SettingError(
            f"not published: {reason}; train it, or delete {records.COMMITTED_RUNS.name} first if it is to go"
        )
    root = Path(root).resolve()
    folder = root / f"report-{scale}"
    page, made = folder / "index.html", folder / "inputs.json"
    inputs = _inputs(scale, seeds, root)
    last = read_json(made) if page.exists() and made.exists() else {}
    if last.pop("published", False) < publish or last != inputs:
        made.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        _execute_all(scale, seeds, root, folder, publish, progress)
        _convert_all(root, folder)
        write_json(made, _inputs(scale, seeds, root) | {"published": publish})
    for cell in read_json(folder / "index.ipynb")["cells"]:
        for output in cell.get("outputs", []) if TOLD in cell["metadata"].get("tags", []) else []:
            progress("".join(output.get("text", [])).strip()) if "text" in output else None
    return page


def unpublished(scale: str, seeds: Sequence[int], root: Path) -> str:
    """Why results of these runs must not replace the committed ones; empty where they may."""
    lost = records.lost(records.COMMITTED_RUNS, plan.select(scale=scale, seeds=seeds), root)
    if not lost:
        return ""
    return (
        f"{len(lost)} committed run{'s' * (len(lost) > 1)} would be dropped, such as {lost[0]}: not finished in "
        f"{Path(root).name}/, or not planned at scale {scale}, seeds {', '.join(map(str, seeds))}"
    )


def _inputs(scale: str, seeds: Sequence[int], root: Path) -> dict[str, Any]:
    """All that the pages are made of."""
    read = [path for folder, kinds in (("repro", "py md csv toml"), ("figures", "py j2 css"), ("notebooks", "ipynb"))
            for kind in kinds.split() for path in sorted((CHECKOUT / folder).rglob(f"*.{kind}"))]  # fmt: skip
    finished = sorted(root.glob(f"*-{scale}-*/metrics.json"))
    return {
        "runs": {path.parent.name: path.stat().st_mtime_ns for path in finished},
        "committed": _digest([records.COMMITTED_RUNS, records.numbers_of(records.COMMITTED_RUNS)]),
        "code": _digest(read),
        "seeds": list(seeds),
    }


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


# Executing


def _execute_all(
    scale: str, seeds: Sequence[int], root: Path, folder: Path, publish: bool, progress: Callable[[str], Any]
) -> None:
    """Execute the papers' notebooks and the tables of each, then the index, into `folder`."""
    for path in folder.glob("*.ipynb"):
        path.unlink()
    common = {"scale": scale, "runs_root": str(root)}
    many = common | {"seeds": len(seeds), "save_to": str(RENDERED) if publish else None}
    jobs = {f"{paper}-tables": ("tables", many | {"paper": paper}) for paper in PAPERS}
    for paper in PAPERS:
        if would_train(paper, scale, root):
            progress(f"{paper}.ipynb is not executed: its runs are not finished")
        else:
            jobs[paper] = (paper, common)
    with ThreadPoolExecutor(max(1, runs.cores())) as pool:
        done = [pool.submit(_execute, name, folder / f"{to}.ipynb", given) for to, (name, given) in jobs.items()]
        for one in done:
            one.result()
    _execute("index", folder / "index.ipynb", many)


def would_train(paper: str, scale: str, root: Path) -> bool:
    """Whether the runs of a paper's notebook, by its own parameters at this scale, are not all finished."""
    cells = read_json(NOTEBOOKS / f"{paper}.ipynb")["cells"]
    source = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    given = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    fields = {name: given[name] for name in ("paper", "method", "data", "labels", "seed")} | {"scale": scale}
    base = {"base": given["base"]} if "base" in given else {}
    try:
        wanted = [Experiment(**fields, overrides=base | given["overrides"])]
        if beside := given.get("beside") or given.get("base"):
            wanted.append(Experiment(**fields | {"method": beside}))
    except SettingError:  # its data have no such scale
        return True
    return not all(runs.is_finished(experiment, root) for experiment in wanted)


def _execute(name: str, to: Path, parameters: dict[str, Any]) -> None:
    """Execute a notebook by papermill in a process of its own."""
    given = [word for key, value in parameters.items() if value is not None for word in ("-p", key, str(value))]
    notebook = str(NOTEBOOKS / f"{name}.ipynb")
    command = [sys.executable, "-m", "papermill", notebook, str(to), "--no-progress-bar", *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NOTEBOOKS)
    if done.returncode:
        raise RuntimeError(f"{name}.ipynb: papermill failed\n{done.stderr[-3000:]}")


# Converting


def _convert_all(root: Path, folder: Path) -> None:
    """A page of the index and one of each paper: its tables, then its own notebook if that was executed."""
    titles = {paper: spec.spec.title.partition(":")[0] for paper, spec in PAPERS.items()}
    pages = [("index.html", "Overview"), *((f"{paper}.html", title) for paper, title in titles.items())]
    _convert([folder / "index.ipynb"], folder / "index.html", "Overview", pages, root)
    for paper, title in titles.items():
        parts = [folder / f"{paper}-tables.ipynb", folder / f"{paper}.ipynb"]
        _convert([part for part in parts if part.exists()], folder / f"{paper}.html", title, pages, root)


def _convert(parts: Sequence[Path], page: Path, title: str, pages: list[tuple[str, str]], root: Path) -> None:
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        """Markdown with escaped HTML and equations as MathML."""

        def block_math(self, body: str) -> str:
            return convert(body, display="block")

        def inline_math(self, body: str) -> str:
            return convert(body)

    texts = [part.read_text(encoding="utf-8").replace(str(root), root.name) for part in parts]
    books = [nbformat.reads(text.replace(str(CHECKOUT), "."), as_version=4) for text in texts]
    book, contents = books[0], []
    book.cells = [cell for one in books for cell in one.cells]
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):  # words for who cannot see it: a title, or the call that drew it
                output.metadata.setdefault("image/png", {}).setdefault("alt", cell.source.splitlines()[-1])
        found = re.findall(r"^## (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []
        contents += [(heading.replace(" ", "-"), heading) for heading in found]
    exporter = HTMLExporter(template_name="report", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("markdown2html", lambda text: MarkdownWithMath(renderer=Renderer()).render(text))
    about = {"title": title, "here": page.name, "pages": pages, "contents": contents}
    html, _ = exporter.from_notebook_node(book, about)
    here = {f"{href.removesuffix('.html')}.ipynb": href for href, _ in pages} | {"tables.ipynb": pages[1][0]}
    write_text(page, re.sub(r'href="(\w+\.ipynb)"', lambda found: f'href="{here.get(found[1], found[1])}"', html))
