"""The report: which notebooks are executed, when nothing is done, what pages must not hold, what publishing refuses."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from figures import tables
from repro import runs
from repro.batch import records, report
from repro.grid import PAPERS
from repro.settings import SettingError
from tests.fake_runs import write_run

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def notebook(name, to, given):
    """Stands for an executed notebook: an equation, an image, and what pages must not hold: paths, scripts, widgets."""
    root = given["runs_root"]
    cells = [
        new_markdown_cell(
            f"# {name} {given.get('paper', '')}\n\n## Part of {name}\n\nThe sum $\\sum_i x_i^2 < y$ and `$HOME`, "
            "[CSL](csl.ipynb), [tables](tables.ipynb), <b onclick='x'>bold</b>.\n\n$$\\frac12 \\ge \\bar p$$"
        ),
        new_code_cell(f'runs_root = "{root}"'),
        new_code_cell("draw()", metadata={"tags": [report.TOLD] if name == "index" else []}),
    ]
    cells[2].outputs = [
        new_output("stream", text=f"agreement of {root}/a.json in {Path(report.__file__).parents[2]}/x.py\n"),
        new_output("display_data", {"image/png": PNG}),
        new_output("display_data", {"text/html": "<table><tr><td>cell</td></tr></table>"}),
        new_output("display_data", {"text/markdown": "weights $w_b$"}),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}),
        new_output("display_data", {"application/javascript": "load('https://example.org')"}),
    ]
    nbformat.write(new_notebook(cells=cells), to)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The main job's runs of one paper, notebooks that are not executed, and no committed runs; returns the calls."""
    calls = []

    def execute(name, to, given):
        calls.append((name, given))
        notebook(name, to, given)

    for experiment in PAPERS["commatch"].main_experiments("mini", (0,)):
        write_run(experiment, tmp_path / "runs", error=0.25)
    monkeypatch.setattr(report, "_execute", execute)
    monkeypatch.setattr(records, "COMMITTED_RUNS", tmp_path / "committed.csv")
    return calls


class Page(HTMLParser):
    """What a page links to, loads and says."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.tags, self.words = [], [], set(), ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in given), given
        if tag == "a":
            self.links.append(given["href"])
        self.loads += [given[name] for name in ("src", "data") if name in given]

    def handle_data(self, data):
        self.words += f" {data}"


def test_pages_work_from_a_file_and_hold_no_script_and_no_path(job, tmp_path):
    folder = report.build("mini", (0, 1), tmp_path / "runs", progress=lambda line: None).parent
    pages = {path.name: Page(path) for path in folder.glob("*.html")}
    assert set(pages) == {"index.html", *(f"{name}.html" for name in PAPERS)}
    for page in pages.values():
        assert set(pages) <= set(page.links) and {link for link in page.links if link[0] != "#"} <= set(pages)
        assert page.loads and all(source.startswith("data:image/png;base64,") for source in page.loads)
        assert "script" not in page.tags and "link" not in page.tags and "example.org" not in page.text
        assert "default-src 'none'" in page.text and "@import" not in page.text and "url(" not in page.text
        assert str(tmp_path) not in page.text and str(report.CHECKOUT) not in page.text
        assert "agreement of runs/a.json in ./x.py" in page.words and "runs_root" in page.words
        assert page.text.count("<math") in (3, 6) and "$HOME" in page.words and "\\sum" not in page.words
        assert "<b onclick='x'>bold</b>" in page.words, "HTML in text is escaped"
        assert 'alt="draw()"' in page.text
    own, other = pages["commatch.html"], pages["csl.html"]
    assert "Part of tables" in own.words and "Part of commatch" in own.words and "Part of csl" not in other.words
    assert '<a aria-current="page" href="commatch.html">' in own.text
    assert own.links.count("#Part-of-commatch") >= 1 and 'id="Part-of-commatch"' in own.text


def test_notebooks_that_would_train_are_left_out_and_the_index_is_last(job, tmp_path):
    told = []
    report.build("mini", (0, 1), tmp_path / "runs", progress=told.append)
    assert [name for name, _ in job[:-1]].count("tables") == len(PAPERS) and job[-1][0] == "index"
    assert {name for name, _ in job} == {"tables", "commatch", "index"}
    assert told[:-1] == [
        f"{name}.ipynb is not executed: its runs are not finished" for name in PAPERS if name != "commatch"
    ]
    assert told[-1].startswith("agreement of")
    given = dict(job)["index"]
    assert (given["scale"], given["seeds"], given["save_to"]) == ("mini", 2, None)
    for name in PAPERS:
        assert report.would_train(name, "tiny", tmp_path / "none")
    assert report.would_train("csl", "paper", tmp_path / "runs")  # scenes have no such scale


def test_a_second_report_does_nothing_until_something_changes(job, tmp_path, monkeypatch):
    root, lines = tmp_path / "runs", []
    report.build("mini", (0,), root)
    page, count = report.build("mini", (0,), root, progress=lines.append), len(job)
    assert lines and lines[-1].startswith("agreement of"), "what was told is told again"
    write_run(PAPERS["commatch"].main_experiments("mini", (1,))[0], root)
    report.build("mini", (0,), root)
    assert len(job) == 2 * count
    records.COMMITTED_RUNS.write_text("run\n")  # agreement is part of the pages
    report.build("mini", (0,), root)
    assert len(job) == 3 * count
    monkeypatch.setattr(report, "CHECKOUT", tmp_path / "other code")
    report.build("mini", (0,), root)
    report.build("mini", (0,), root)
    assert len(job) == 4 * count
    page.unlink()
    report.build("mini", (0,), root)
    assert len(job) == 5 * count


def test_publishing_sets_the_folder_once_and_drops_no_committed_run(job, tmp_path):
    root, experiments = tmp_path / "runs", PAPERS["commatch"].main_experiments("mini", (0,))
    records.save(tables.collect(experiments, root), records.COMMITTED_RUNS)
    report.build("mini", (0,), root)
    report.build("mini", (0,), root, publish=True)
    count = len(job)
    assert dict(job)["index"]["save_to"] == dict(job)["tables"]["save_to"] == str(report.RENDERED)
    report.build("mini", (0,), root, publish=True)
    report.build("mini", (0,), root)
    assert len(job) == count
    (runs.folder_of(experiments[1], root) / "metrics.json").unlink()
    with pytest.raises(
        SettingError, match=r"not published: 1 committed run would be dropped, such as fixmatch-fash.* not"
    ):
        report.build("mini", (0,), root, publish=True)
    assert len(job) == count
    with pytest.raises(SettingError, match="unknown scale 'huge'"):
        report.build("huge", (0,), root)


def test_a_notebook_that_fails_is_named_with_what_was_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        report.subprocess, "run", lambda *_, **__: report.subprocess.CompletedProcess([], 1, "", "NameError")
    )
    with pytest.raises(RuntimeError, match=r"csl\.ipynb: papermill failed\nNameError"):
        report._execute("csl", tmp_path / "done.ipynb", {})
