"""Pages of the report: templates, a paper's texts, executed notebooks. A page fetches nothing and names no machine.

Styles, figures and equations are inside each page, so that it works from a file and can be mailed.
"""

import base64
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from figures import tables
from figures.report import mathml
from repro.files import write_text

PACKAGE = Path(__file__).resolve().parents[2] / "repro"
TEMPLATES = Path(__file__).resolve().parent / "templates"
# Heading of repro/papers/<paper>.md -> its name in the template.
HEADINGS = {
    "Method in short": "method",
    "Deviations and reconstructions": "deviations",
    "What was easy": "easy",
    "What was difficult": "difficult",
}
# An absolute path of two parts or more; not a part of a URL, a tag, a word or a base64 picture.
MACHINE_PATH = re.compile(r"(?<![\w.:/<>~+])(?<!base64,)/(?:[\w.@+ -]*[\w.@+-]/)+([\w.@+-]*)")
UNBROKEN = re.compile(r"[\d.]+ ± [\d.]+|\(n = \d+( of \d+)?\)")
WIDGET = "application/vnd.jupyter.widget-view+json"
EXPLORER = "(An explorer with sliders stands here: open the notebook in JupyterLab to use it.)"
ACTIVE = (WIDGET, "application/javascript")  # outputs that need a script


def write(path: Path, template: str, **values: Any) -> Path:
    """Fill a template of `figures/report/templates` and write it, atomically; a value that is missing is an error."""
    write_text(path, _environment().get_template(template).render(**{"up": "", "here": Path(path).name} | values))
    return Path(path)


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def texts(paper: str, folder: Path = PACKAGE / "papers") -> dict[str, Markup]:
    """The texts about a paper as HTML, by the names in HEADINGS, from `<paper>.md`.

    Raises ValueError unless the file has exactly these headings, of level 2, each with a text.
    """
    from nbconvert.filters import markdown2html

    path = Path(folder) / f"{paper}.md"
    before, *parts = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings, bodies = [heading.strip() for heading in parts[::2]], [body.strip() for body in parts[1::2]]
    if before.strip() or headings != list(HEADINGS) or not all(bodies):
        raise ValueError(f"{path} must have these headings, each with a text: {', '.join(HEADINGS)}")
    return {HEADINGS[heading]: Markup(markdown2html(body)) for heading, body in zip(headings, bodies, strict=True)}


def frame_html(frame: pd.DataFrame) -> Markup:
    """A frame of text as a table; pandas escapes the cells. A cell may break between its spread and its n."""
    return _unbroken(tables.to_html(frame))


def plain_html(frame: pd.DataFrame) -> Markup:
    """A frame of text without its index, as a table whose cells may wrap."""
    return _unbroken(frame.to_html(classes="plain", border=0, justify="left", index=False))


def _unbroken(table: str) -> Markup:
    return Markup(UNBROKEN.sub(lambda found: found[0].replace(" ", "\u00a0"), table))


def embedded(path: Path) -> str:
    """A PNG as the source of an image."""
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def href(path: str) -> str:
    """A relative path as an address: run ids hold characters that addresses quote."""
    return quote(path)


# Notebooks


def notebook_page(source: Path, page: Path, title: str, about: str, site: list[dict], up: str = "") -> Path:
    """An executed notebook as a page of the report. up: the way from the page to the report's folder."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic")
    exporter.register_preprocessor(lambda book, resources: (cleaned(book), resources), enabled=True)
    body, _ = exporter.from_filename(str(source))
    values = {"title": title, "about": about, "site": site, "up": up, "here": ""}
    return write(page, "notebook.html", body=Markup(body), **values)


def cleaned(book: Any) -> Any:
    """The same notebook, changed in place: equations as MathML, paths of the machine cut to their last part, words in
    place of what only a running Jupyter can show."""
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        cell.source = without_paths(cell.source)
        if cell.cell_type == "markdown":
            cell.source = mathml.in_markdown(cell.source)
        for output in cell.get("outputs", []):
            _clean_output(output)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
    return book


def _clean_output(output: Any) -> None:
    data = output.get("data")
    if data is not None and any(kind in data for kind in ACTIVE):
        output["data"] = data = {"text/plain": EXPLORER} if WIDGET in data else {}
    for name in ("text", "evalue"):
        if name in output:
            output[name] = without_paths(_joined(output[name]))
    for kind in filter(_is_text, list(data or ())):
        data[kind] = without_paths(_joined(data[kind]))
    if data and "text/markdown" in data:
        data["text/markdown"] = mathml.in_markdown(data["text/markdown"])
    if "traceback" in output:
        output["traceback"] = [without_paths(line) for line in output["traceback"]]


def _is_text(kind: str) -> bool:
    return kind.startswith("text/") or kind.endswith("svg+xml")


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def without_paths(text: str) -> str:
    """Text with each absolute path cut to its last part: `…/runs`."""
    return MACHINE_PATH.sub(lambda found: f"…/{found[1]}", text)


def address_of(run: str) -> str:
    """Where the page of a run's notebook is, from the report's folder."""
    return href(f"runs/{run}.html")


def run_pages(root: Path, folder: Path, scale: str, site: list[dict], titles: Mapping[str, str]) -> dict[str, str]:
    """A page for each run of the scale whose folder holds `notebook.ipynb`; those that are newer are left alone.

    root: folder of runs; folder: of the report. titles: run id -> the page's title, by default the id.
    Returns run id -> address.
    """
    made = {}
    newest = max(path.stat().st_mtime_ns for path in (Path(__file__), Path(mathml.__file__), *_templates()))
    for source in sorted(Path(root).glob(f"*-{scale}-*/notebook.ipynb")):
        run = source.parent.name
        page = folder / "runs" / f"{run}.html"
        if not page.exists() or page.stat().st_mtime_ns < max(newest, source.stat().st_mtime_ns):
            notebook_page(source, page, titles.get(run, run), f"Run {run}: its notebook, executed.", site, up="../")
        made[run] = address_of(run)
    for page in (folder / "runs").glob("*.html"):  # of runs that are gone
        if page.stem not in made:
            page.unlink()
    return made


def _templates() -> list[Path]:
    return sorted((TEMPLATES).iterdir())
