"""The report: what its pages say of runs, that they need no network and name no machine, what a checkout gets."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from matplotlib.figure import Figure

from figures import agreement, exchange, report
from figures.report import content, pages
from repro import runs
from repro.batch import local
from repro.batch.records import numbers_of, save
from repro.experiment import Experiment
from repro.grid import PAPERS
from tests.fake_mask_runs import write_mask_run
from tests.fake_runs import METRICS, write_run
from tests.fake_scribble_runs import write_scribble_run
from tests.fake_tag_runs import write_tag_run

MASKS = {"supervised": 0.4, "fixmatch": 0.5, "unimatch": 0.6, "csl": 0.625}


def write_runs(root):
    """The main job's runs of a label paper and of the paper from masks, one seed each."""
    for experiment in commatch.main_experiments("mini", (0,)):
        write_run(experiment, root, error=0.25)
    for experiment in csl.main_experiments("mini", (0,)):
        write_mask_run(experiment, root, figures=False, miou=MASKS[experiment.method], ece_15=0.05)


def leave_out(monkeypatch, committed):
    """Figures drawn from arrays, executed notebooks and the checkout's committed runs."""
    figures = {name: lambda *_: [("main", "Main", Figure()), ("empty", "An empty figure", Figure())] for name in PAPERS}
    monkeypatch.setattr(content, "FIGURES", figures)
    monkeypatch.setattr(report, "NOTEBOOKS", ())
    monkeypatch.setattr(local, "COMMITTED", committed)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A report with all that it can show: runs of four papers, a run's notebook, imported results, committed ones."""
    folder = tmp_path_factory.mktemp("built")
    root = folder / "runs"
    write_runs(root)
    for experiment in pcre.main_experiments("mini", (0,)):
        write_tag_run(experiment, root, figures=False, evaluations=1, cam_miou=0.3)
    for experiment in trust_region.main_experiments("mini", (0,)):
        write_scribble_run(experiment, root, figures=False, miou=0.5)
    first = commatch.main_experiments("mini", (0,))[0]
    write_notebook(runs.folder_of(first, root))
    theirs = folder / "theirs" / "runs"
    for seed in (0, 1):
        write_run(first.with_(seed=seed), theirs, error=0.31 + 0.02 * seed)
    exchange.export(folder / "theirs.csv", theirs, label="them")
    exchange.bring_in(folder / "theirs.csv", "elsewhere", root)
    committed = folder / "committed.csv"
    save(report.tables.collect(commatch.main_experiments("mini", (0,)), root), committed)
    numbers = numbers_of(committed)  # the first number is of a last evaluation with EMA weights
    numbers.write_text(numbers.read_text().replace(",0.25,", ",0.75,", 1))
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, committed)
        return report.build("mini", (0,), root).parent


def write_notebook(folder):
    """An executed notebook that holds what pages must not: paths, scripts, widgets; and what they must: an equation."""
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nThe sum $\\sum_i x_i^2$ and `$HOME`.\n\n$$\\frac12 \\ge \\bar p$$"),
        nbformat.v4.new_code_cell('runs_root = "/home/someone/project/runs"'),
    ]
    png = "iVBORw0KGgo/AAA/BBB/CCC="
    cells[1].outputs = [
        nbformat.v4.new_output("stream", text="wrote /scratch/user7/runs/a.json in 3 s\n"),
        nbformat.v4.new_output("display_data", {"image/png": png}),
        nbformat.v4.new_output("display_data", {"text/html": "<b>bold</b> of /mnt/disk/x"}),
        nbformat.v4.new_output("display_data", {pages.WIDGET: {"model_id": "1"}, "text/plain": "HBox()"}),
        nbformat.v4.new_output("display_data", {"application/javascript": "load('https://example.org')"}),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "notebook.ipynb")


class Page(HTMLParser):
    """What a page links to, loads and names."""

    LOADING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.tags, self.styles = [], [], set(), set(), ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.add(tag)
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if self.LOADING.get(tag) in given:
            self.loads.append(given[self.LOADING[tag]])
        self.styles += given.get("style", "")

    def handle_data(self, data):
        if self.lasttag == "style":
            self.styles += data

    @property
    def words(self):
        return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", self.text))).replace("\u00a0", " ")


def every_page(folder):
    return {path.relative_to(folder).as_posix(): Page(path) for path in sorted(folder.rglob("*.html"))}


# Pages


def test_there_is_a_page_for_each_paper_one_across_and_one_a_notebook(built):
    of_run = f"runs/{runs.folder_of(commatch.main_experiments('mini', (0,))[0], built.parent).name}.html"
    assert set(every_page(built)) == {"index.html", "across.html", of_run, *(f"{name}.html" for name in PAPERS)}


def test_every_link_leads_somewhere(built):
    found = every_page(built)
    for name, page in found.items():
        for link in page.links:
            if link.startswith("http"):
                continue  # a reference for readers; nothing is loaded from it
            address, _, place = link.partition("#")
            target = (built / name).parent / unquote(address) if address else built / name
            assert target.is_file(), f"{name}: {link}"
            assert not place or place in found[target.resolve().relative_to(built.resolve()).as_posix()].ids, link
    linked = {Path(unquote(link.partition("#")[0])).as_posix() for link in found["index.html"].links}
    assert linked >= set(found) - {"index.html"}


def test_no_page_loads_anything_from_outside_or_runs_a_script(built):
    for name, page in every_page(built).items():
        assert all(address.startswith("data:") for address in page.loads), name
        assert "script" not in page.tags and "@import" not in page.styles and "url(" not in page.styles, name


def test_no_page_names_a_place_of_the_machine(built):
    for name, page in every_page(built).items():
        assert str(built.parents[1]) not in page.text and str(Path.home()) + "/" not in page.words, name
        assert not re.search(r"(?<![\w.:/<])/(?:home|tmp|root|scratch|mnt|work)/", page.words), name


def test_every_page_fits_a_phone_and_paper(built):
    for name, page in every_page(built).items():
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page.text, name
        assert "@media print" in page.styles and "overflow-x: auto" in page.styles
        inside = re.sub(r'<div class="(wide|output_)[^>]*>.*?</div>', "", page.text, flags=re.DOTALL)
        assert "<table" not in inside, f"{name}: a table that cannot scroll"


def test_the_overview_counts_verdicts_and_shows_the_main_tables(built):
    page = every_page(built)["index.html"]
    rows = re.findall(r"<tr>(.*?)</tr>", page.text.split('id="verdicts"')[1].split("</table>")[0], re.DOTALL)
    counts = {}
    for row in rows[1:]:
        cells = re.findall(r"<td.*?>(.*?)</td>", row)
        counts[unescape(re.sub("<.*?>", "", cells[0]))] = (cells[1], *map(int, cells[2:]))
    assert list(counts) == [paper.TITLE for paper in PAPERS.values()]
    assert all(sum(row[1:]) == len(paper.CLAIMS) for row, paper in zip(counts.values(), PAPERS.values(), strict=True))
    assert [row[0] for row in counts.values()] == ["few labels", "few labels", "few masks", "image tags", "scribbles"]
    assert (
        all(row[1] == row[2] == 0 for row in counts.values()) and "No claim is decided yet." in page.words
    )  # one seed
    assert "measured: Fashion scenes, 20 masks, mini scale, last evaluation, EMA weights" in page.words
    assert "62.50 (n = 1)" in page.words and "25.00 (n = 1)" in page.words
    assert "make reproduce SCALE=mini SEEDS=1" in page.words


def test_the_overview_tells_disagreement_with_committed_numbers(built):
    words = every_page(built)["index.html"].words
    assert "Agreement with the committed results, 20 runs: 3 identical, 1 differs, 16 not committed." in words
    assert "1 numbers differ where identical ones were expected." in words
    assert re.search(r"error \(%\) 25\.00 75\.00 -50\.00 0\.00 differs it is the committed run yes", words)


def test_the_overview_shows_results_of_others_with_their_origin(built):
    words = every_page(built)["index.html"].words
    rows = words.split("Results of others")[1].split("Cost")[0]
    assert "ComMatch Supervised fashion, 100 labels error (%) 25.00 (n = 1) 32.00 ± 1.41 (n = 2)" in rows
    assert "elsewhere them cpu 1.0 c0ffee 1" in rows  # origin, who exported, device, torch, commit, runs of both


def test_the_overview_states_the_cost_of_each_paper_and_of_all(built):
    cost = every_page(built)["index.html"].words.split(" Cost ")[-1]
    assert re.search(r"CSL 4 of \d+ 0:48 12 to 12 s, median 12 s 50 to 50 400 MiB cpu, fp32, 1 \(4\)", cost)
    assert re.search(r"CalibrateMix 3 of \d+ 0:36", cost)  # runs that ComMatch has, too
    assert re.search(r"all, each run once 20 of \d+ 4:00", cost)


def test_a_papers_page_has_the_shape_of_a_reproduction_report(built):
    page = every_page(built)["csl.html"]
    heads = re.findall(r"<h2 id=\"(\w+)\">(.*?)</h2>", page.text)
    assert [id for id, _ in heads] == [id for id, _ in report.CONTENTS]
    assert [name for _, name in heads][:5] == ["Claims and verdicts", *pages.HEADINGS]
    claims = page.text.split('id="claims"')[1].split("</table>")[0]
    assert claims.count("<tr>") == 1 + len(csl.CLAIMS) and claims.count("verdict inconclusive") == 4
    assert (
        csl.NOTE in page.words
        and "Verdicts hold on the embedded data (Fashion scenes, 20 masks), mini scale only" in page.words
    )
    assert "mIoU by number of masks — Fashion scenes, 20 masks" in page.words
    assert "Cityscapes: mIoU by number of masks" in page.words  # among those not run
    assert page.text.count("<img") == 3 and page.text.count("An empty figure") == 2
    assert page.text.count('alt="Effects of the claims"') == 1
    assert "python -m repro rerun --paper csl --scale mini --seeds 1" in page.words


def test_a_papers_page_names_each_scope_of_its_claims(built):
    words = every_page(built)["trust_region.html"].words
    places = "Fashion scenes, scribble length 0 / 30 / 50 / 80 / 100 %"
    assert f"Verdicts hold on the embedded data ({places}), mini scale only." in words


def test_a_papers_page_lists_each_run_with_the_command_that_repeats_it(built):
    page = every_page(built)["commatch.html"]
    rows = page.text.split('id="commands"')[1].split("<tbody>")[1].split("<tr>")[1:]
    assert len(rows) == 4
    ids = {runs.folder_of(item, built.parent).name: item for item in commatch.main_experiments("mini", (0,))}
    for run, experiment in ids.items():
        row = next(row for row in rows if run in row)
        assert content.command(experiment) in unescape(re.sub("<[^>]*>", "", row)) and "error 25.00 %, ECE" in row
        assert (f'href="runs/{run.replace("@", "%40")}.html"' in row) == (experiment.method == "supervised")


def test_the_notebook_of_a_run_is_readable_without_jupyter(built):
    name = next(name for name in every_page(built) if name.startswith("runs/"))
    page = every_page(built)[name]
    assert page.text.count("<math") == 2 and "$HOME" in page.words and "<munder" not in page.text
    assert 'runs_root = "…/runs"' in page.words and "wrote …/a.json in 3 s" in page.words
    assert "<b>bold</b> of …/x" in page.text and "base64,iVBORw0KGgo/AAA/BBB/CCC=" in page.text
    assert pages.EXPLORER in page.words and "HBox" not in page.words and "example.org" not in page.text
    assert "../index.html" in page.links and "supervised on fashion, 100 labels, seed 0" in page.words


# Parts


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The main job's runs of a label paper and of the paper from masks; only these two papers."""
    write_runs(tmp_path / "runs")
    leave_out(monkeypatch, tmp_path / "none.csv")
    monkeypatch.setattr(report, "PAPERS", {"commatch": commatch, "csl": csl})
    monkeypatch.setattr(report, "across_parts", lambda *_: [])
    return tmp_path / "runs"


def test_each_run_is_told_in_its_own_papers_metrics(root):
    experiments = [*commatch.main_experiments("mini", (0,)), *csl.main_experiments("mini", (0, 1))]
    results = {row["id"]: row["result"] for row in content.finished(experiments, root)}
    assert len(results) == 8  # the second seed of masks is not run
    ids = {item.method: runs.folder_of(item, root).name for item in experiments[4:8]}
    assert results[ids["unimatch"]] == "mIoU 60.00 %, ECE 5.00 % (15 right-closed bins)"
    assert results[runs.folder_of(experiments[0], root).name] == (
        f"error 25.00 %, ECE {100 * METRICS['ece_15']:.2f} % (15 right-closed bins)"
    )


def test_the_command_that_repeats_a_run():
    experiment = Experiment("csl", "csl", "scenes", 20, 1, "mini", {"masking": "none"})
    options = "--paper csl --method csl --data scenes --labels 20 --seed 1 --scale mini --set masking=none"
    assert content.command(experiment) == f"python -m repro run {options}"


def test_a_part_has_a_block_for_each_measured_number_of_masks(root):
    part = content.paper_parts("csl", "mini", (0,), root, root / "report")
    assert [block["title"] for block in part["tables"]] == ["mIoU by number of masks — Fashion scenes, 20 masks"]
    frame = part["tables"][0]["frame"]
    assert frame.iloc[:, 0].to_dict() == {
        "Supervised": "40.00 (n = 1)", "FixMatch": "50.00 (n = 1)", "UniMatch": "60.00 (n = 1)",
        "UniMatch, output stride 8": "not run", "CSL": "62.50 (n = 1)",
    }  # fmt: skip
    assert part["tables"][0]["figure"]["title"] == "Main" and [one["title"] for one in part["further"]] == [
        "An empty figure"
    ]
    ran = {block["name"] for block in part["ablations"]}  # those of which two rows are runs of the main job
    assert ran == {"feature_perturbation", "output_stride", "weights"}
    assert csl.ABLATIONS["alpha"].title in part["not_run"] and csl.TABLES["main"].title not in part["not_run"]
    verdicts = {claim["claim"]: claim["verdict"] for claim in part["claims"]}
    assert verdicts["CSL has a higher mIoU than UniMatch."] == "inconclusive" and "not run" in verdicts.values()


def test_a_note_is_told_once_a_table_and_its_figure_stands_below_the_main_block(root):
    for labels in (10, 40):
        for experiment in csl.main_experiments("mini", (0,)):
            write_mask_run(experiment.with_(labels=labels), root, figures=False)
    blocks = content.paper_parts("csl", "mini", (0,), root, root / "report")["tables"]
    assert [block["column"].labels for block in blocks] == [10, 20, 40]
    assert [bool(block["figure"]) for block in blocks] == [False, True, False]
    assert blocks[0]["new_notes"] == blocks[0]["notes"] == blocks[2]["notes"] and not blocks[2]["new_notes"]


def test_costs_of_a_paper():
    rows = [
        {"cost": {"train_seconds": s, "samples_per_second": r, "peak_memory_mib": m}, "device": d}
        for s, r, m, d in ((10.0, 900.0, 500.0, "cpu"), (70.0, 1500.0, 650.0, "cpu"), (31.0, 1000.0, 600.0, "H200"))
    ]
    assert content.cost_row("X", rows, 5) == {
        "name": "X", "finished": 3, "planned": 5, "total": "1:51", "each": "10 to 70 s, median 31 s",
        "rate": "900 to 1,500", "memory": "650 MiB", "device": "cpu (2); H200 (1)",
    }  # fmt: skip
    assert content.cost_row("X", [], 5)["total"] == ""


def test_results_of_others_of_settings_that_this_code_does_not_have(root, tmp_path):
    other = commatch.main_experiments("mini", (0,))[-1].with_(passes=5)
    write_run(other, tmp_path / "theirs", error=0.4)
    frame = exchange.export(tmp_path / "theirs.csv", tmp_path / "theirs")
    text = (tmp_path / "theirs.csv").read_text().replace('""passes"": 5', '""flux"": 5')
    (tmp_path / "theirs.csv").write_text(text)
    exchange.bring_in(tmp_path / "theirs.csv", "lab", root)
    rows = content.of_others("mini", (0,), root)
    assert rows[["method", "here", "there", "runs of both"]].to_dict("records") == [
        {"method": "ComMatch, flux = 5", "here": "not run", "there": shown, "runs of both": 0}
        for shown in ("40.00 (n = 1)", f"{100 * METRICS['ece_15']:.2f} (n = 1)")
    ]
    assert set(frame["exported_by"]) == {"unnamed"} == set(rows["exported by"])
    assert content.of_others("tiny", (0,), root).empty


def test_a_checkout_gets_the_first_measured_table_and_the_claims(root, tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    readme = checkout / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.build("mini", (0,), root, checkout)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n") and "\nold\n" not in text
    assert f"{csl.TITLE}: measured: Fashion scenes, 20 masks, mini scale, last evaluation, EMA weights" in text
    table = text.split(csl.TITLE)[1].split("| claim |")[0]
    assert "| mIoU by number of masks | mIoU (%) | pixel accuracy (%) |" in table and "published" not in table
    assert "| CSL | 62.50 (n = 1) |" in table and "output stride 8" not in table
    count, kept = len(csl.CLAIMS), text.split(csl.TITLE)[1]
    assert f"<details>\n<summary>{count} claims: " in kept and kept.count("<details>") == kept.count("</details>")
    verdicts = [int(said.split()[0]) for said in kept.split("claims: ")[1].split("</summary>")[0].split(", ")]
    assert sum(verdicts) == count
    assert {path.name for path in (checkout / "figures").iterdir()} == {
        "results.md", "runs.csv", "runs_numbers.csv",
        *(f"{name}_{key}.png" for name in ("commatch", "csl") for key in ("main", "empty")),
        *(f"{name}_claims.png" for name in report.PAPERS),
    }  # fmt: skip
    results = (checkout / "figures" / "results.md").read_text()
    assert "### mIoU by number of masks — Fashion scenes, 20 masks" in results and "ResNet-101 (deep stem" in results


def test_nothing_is_written_twice(root, monkeypatch):
    monkeypatch.setattr(report, "PAPERS", {"csl": csl})

    def written():
        page = report.build("mini", (0,), root)
        return page.stat().st_mtime_ns

    before = written()
    assert written() == before
    write_mask_run(csl.main_experiments("mini", (1,))[0], root, figures=False)
    assert (after := written()) != before
    local.COMMITTED.write_text("run\n")  # agreement is part of the pages
    assert (later := written()) != after
    monkeypatch.setattr(report.runs, "source_digest", lambda: "changed")  # a plot, say
    assert written() != later


def test_a_report_that_renewed_no_checkout_does_so_when_asked_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAPERS", {"csl": csl})
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "README.md").write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    report.build("mini", (0,), root)
    page = report.build("mini", (0,), root, checkout)
    assert (checkout / "figures" / "results.md").exists() and "\nold\n" not in (checkout / "README.md").read_text()
    before = page.stat().st_mtime_ns
    report.build("mini", (0,), root, checkout)
    report.build("mini", (0,), root)
    assert page.stat().st_mtime_ns == before


def test_a_changed_text_writes_pages_again_and_trains_nothing(root, tmp_path, monkeypatch):
    package = tmp_path / "package"
    shutil.copytree(report.PACKAGE / "report" / "templates", package / "report" / "templates")
    shutil.copytree(report.PACKAGE / "papers", package / "papers")
    monkeypatch.setattr(report, "PACKAGE", package)
    monkeypatch.setattr(runs, "execute", lambda *_, **__: pytest.fail("it trained"))
    before = report.build("mini", (0,), root).stat().st_mtime_ns
    (package / "papers" / "csl.md").write_text("changed")
    assert report.build("mini", (0,), root).stat().st_mtime_ns != before


def test_a_report_without_runs_says_so(tmp_path, monkeypatch):
    leave_out(monkeypatch, tmp_path / "none.csv")
    monkeypatch.setattr(report, "PAPERS", {"csl": csl})
    monkeypatch.setattr(report, "across_parts", lambda *_: [])
    found = every_page(report.build("mini", (0,), tmp_path / "runs").parent)
    first = found["index.html"].words
    assert first.count("Not run.") == 1 and "none is committed of these runs" in first
    assert found["csl.html"].words.count("Not run.") == 2 and "No finished run." in found["csl.html"].words


@pytest.mark.parametrize("name", report.NOTEBOOKS)
def test_notebooks_that_would_train_are_not_executed(name, root, tmp_path):
    path = report.PACKAGE.parent / "notebooks" / f"{name}.ipynb"
    empty = tmp_path / "empty"
    assert report.would_train(path, "tiny", empty) == (name != "tables")
    if name in ("commatch", "csl"):
        assert not report.would_train(path, "mini", root)
    if name == "csl":
        assert report.would_train(path, "paper", root)  # scenes have no such scale


def test_executed_notebooks_become_pages(root, tmp_path, monkeypatch):
    calls = []

    def papermill(command, **_):
        calls.append(command)
        executed = Path(command[command.index("papermill") + 2])
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("$x$ done")]), executed)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(report, "NOTEBOOKS", ("commatch", "pcre"))  # the second has no finished run here
    monkeypatch.setattr(report.subprocess, "run", papermill)
    (tmp_path / "report").mkdir()
    with ThreadPoolExecutor() as pool:
        executing = report.start_notebooks(pool, tmp_path / "report", "mini", root)
    executed = {name: notebook.result() for name, notebook in executing.items()}
    made = report.notebook_pages(tmp_path / "report", "mini", executed, [])
    assert made == [{"name": "commatch", "title": "commatch.ipynb", "href": "notebook-commatch.html"}]
    assert len(calls) == 1 and ["-p", "scale", "mini", "-p", "runs_root", str(root)] == calls[0][5:11]
    assert "</math> done" in (tmp_path / "report" / "notebook-commatch.html").read_text()


def test_a_notebook_that_fails_is_named_with_what_was_said(root, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "NameError: x")
    monkeypatch.setattr(report.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"commatch\.ipynb: papermill failed\nNameError: x"):
        report.execute_notebook(tmp_path / "commatch.ipynb", tmp_path / "done.ipynb", "mini", root)


def test_agreement_has_the_rows_that_the_overview_reads():
    assert {"run", "metric", "measured", "committed", "tolerance", "agreement"} <= set(
        agreement.Agreement(
            commatch.main_experiments("mini", (0,))[0], "r", "error", 0.1, 0.1, 0.0, "identical", True, ""
        ).row()
    )
