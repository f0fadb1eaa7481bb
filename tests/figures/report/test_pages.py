"""Pages: a paper's texts, paths of the machine, notebooks of runs written again when they changed."""

import os

import nbformat
import pandas as pd
import pytest

from figures.report import pages
from repro.grid import PAPERS


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_its_texts_without_results(paper):
    found = pages.texts(paper)
    assert list(found) == ["method", "deviations", "easy", "difficult"]
    for text in found.values():
        assert len(text) > 200 and "<script" not in text and "<img" not in text
        assert "±" not in text and "%" not in text  # results stand in tables


def test_texts_must_have_the_fixed_headings(tmp_path):
    whole = "".join(f"## {heading}\n\nText *here*.\n\n" for heading in pages.HEADINGS)
    (tmp_path / "x.md").write_text(whole)
    assert "<em>here</em>" in pages.texts("x", tmp_path)["easy"]
    for broken in (whole.replace("easy", "simple"), whole.rpartition("Text")[0], f"Title\n\n{whole}", whole + whole):
        (tmp_path / "x.md").write_text(broken)
        with pytest.raises(ValueError, match="What was difficult"):
            pages.texts("x", tmp_path)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/srv/data/one/runs", "…/runs"),
        ("root='/tmp/x.1/runs' # no", "root='…/runs' # no"),
        ("File /opt/env/lib/python3.11/site-packages/a b/c.py:3", "File …/c.py:3"),
        ("(/scratch/u-7/data/)", "(…/)"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("figures/report/pages.py and a/b/c", "figures/report/pages.py and a/b/c"),
        ("<b>x</b> 1/2/3 and/or ../runs", "<b>x</b> 1/2/3 and/or ../runs"),
        ("data:image/jpeg;base64,/9j/4AAQ/x+/y/z=", "data:image/jpeg;base64,/9j/4AAQ/x+/y/z="),
        ("/usr", "/usr"),
    ],
)
def test_paths_are_cut_to_their_last_part(text, shown):
    assert pages.without_paths(text) == shown


def test_cells_break_only_before_their_n():
    frame = pd.DataFrame({"error": ["1.00 ± 0.50 (n = 2 of 5)", "<b>"]}, index=["A", "B"])
    text = pages.frame_html(frame)
    assert "1.00\u00a0±\u00a00.50 (n\u00a0=\u00a02\u00a0of\u00a05)" in text and "&lt;b&gt;" in text
    assert "1.00\u00a0±\u00a00.50 (n" in pages.plain_html(frame) and "<th>A</th>" not in pages.plain_html(frame)


def notebook(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)]), folder / "notebook.ipynb")


def test_notebooks_of_runs_are_pages_and_only_changed_ones_are_written_again(tmp_path):
    root, folder = tmp_path / "runs", tmp_path / "report"
    site = [{"href": "index.html", "title": "Overview"}]
    for name in ("a-x.0@1-mini-1", "b-x.0@1-mini-2", "c-x.0@1-tiny-3"):
        notebook(root / name, f"Notebook of {name}")
    (root / "d-x.0@1-mini-4").mkdir()
    made = pages.run_pages(root, folder, "mini", site, {"a-x.0@1-mini-1": "the first"})
    assert made == {f"{name}": f"runs/{name.replace('@', '%40')}.html" for name in ("a-x.0@1-mini-1", "b-x.0@1-mini-2")}
    first, second = (folder / "runs" / f"{name}.html" for name in made)
    assert "<title>the first</title>" in first.read_text() and "Notebook of b-x" in second.read_text()
    assert 'href="../index.html"' in first.read_text()
    ages = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    notebook(root / "a-x.0@1-mini-1", "another")
    os.utime(root / "a-x.0@1-mini-1" / "notebook.ipynb", ns=(ages[0] + 1, ages[0] + 1))
    pages.run_pages(root, folder, "mini", site, {})
    assert "another" in first.read_text() and second.stat().st_mtime_ns == ages[1]
    (root / "b-x.0@1-mini-2" / "notebook.ipynb").unlink()
    assert set(pages.run_pages(root, folder, "mini", site, {})) == {"a-x.0@1-mini-1"} and not second.exists()
