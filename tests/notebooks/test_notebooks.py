"""The notebooks as files, and executed with papermill at scale tiny, each in a process of its own."""

import ast
import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from repro import runs
from repro.experiment import Experiment

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def papermill(name, out, root, *parameters):
    """Execute a notebook in a process of its own; returns (exit status, what it printed, the executed notebook)."""
    command = [sys.executable, "-m", "papermill", str(FOLDER / f"{name}.ipynb"), str(out), "--no-progress-bar"]
    environment = os.environ | {"REPRO_RUNS": str(root), "CI": "true"}
    done = subprocess.run([*command, *parameters], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr, read(out)


def figures(book):
    """Every PNG that the notebook shows."""
    data = [output.get("data", {}) for cell in code_cells(book) for output in cell.outputs]
    return [base64.b64decode(item["image/png"]) for item in data if "image/png" in item]


def shown(book):
    """Every text that the notebook shows."""
    outputs = [output for cell in code_cells(book) for output in cell.outputs]
    return "\n".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_and_in_the_house_form(name):
    book = read(FOLDER / f"{name}.ipynb")
    nbformat.validate(book)
    cells = code_cells(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])] == [cells[0]]
    assert all("  # " in line for line in cells[0].source.splitlines()), "every parameter has a comment"
    assert book.metadata.kernelspec.name == "python3"
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try)
    assert not any(isinstance(node, logic) for cell in cells for node in ast.walk(ast.parse(cell.source)))


def test_first_notebook_and_tables_are_there():
    assert {"index", "tables", "commatch", "calibratemix", "csl", "pcre", "trust_region"} <= set(NAMES)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """ComMatch's notebook, executed once at scale tiny, and its folder of runs."""
    folder = tmp_path_factory.mktemp("executed")
    status, printed, book = papermill("commatch", folder / "out.ipynb", folder / "runs", "-p", "scale", "tiny")
    assert status == 0, printed[-3000:]
    return folder, book


@pytest.mark.timeout(300)
def test_commatch_runs_top_to_bottom_and_leaves_two_finished_runs(executed):
    folder, book = executed
    for method in ("commatch", "fixmatch"):
        assert runs.is_finished(Experiment(method=method, scale="tiny"), folder / "runs")
    assert len(figures(book)) == 7
    assert all(len(figure) > 5000 for figure in figures(book))


@pytest.mark.timeout(300)
def test_a_second_execution_trains_nothing_and_draws_the_same_bytes(executed):
    folder, book = executed
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.json")}
    status, printed, again = papermill("commatch", folder / "again.ipynb", folder / "runs", "-p", "scale", "tiny")
    assert status == 0, printed[-3000:]
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.json")} == before
    assert figures(again) == figures(book)


@pytest.mark.timeout(300)
def test_another_method_labels_and_seed(tmp_path):
    parameters = ("-p", "method", "fixmatch", "-p", "labels", "100", "-p", "seed", "3", "-p", "scale", "tiny")
    status, printed, book = papermill("commatch", tmp_path / "out.ipynb", tmp_path / "runs", *parameters)
    assert status == 0, printed[-3000:]
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/metrics.json")] == [
        runs.folder_of(Experiment(method="fixmatch", seed=3, scale="tiny")).name
    ]
    assert len(figures(book)) == 7, "figures that need dropout passes or thresholds say why there is nothing"


@pytest.mark.timeout(300)
def test_calibratemix_runs_on_another_base(tmp_path):
    parameters = ("-p", "base", "flexmatch", "-p", "scale", "tiny")
    status, printed, book = papermill("calibratemix", tmp_path / "out.ipynb", tmp_path / "runs", *parameters)
    assert status == 0, printed[-3000:]
    mixed = Experiment("calibratemix", "calibratemix", scale="tiny", overrides={"base": "flexmatch"})
    for experiment in (mixed, Experiment("calibratemix", "flexmatch", scale="tiny")):
        assert runs.is_finished(experiment, tmp_path / "runs")
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
    assert len(figures(book)) == 9
    assert "--set base=flexmatch" in shown(book) and "not run" in shown(book)


@pytest.mark.timeout(300)
def test_csl_shows_the_runs_that_it_trains_and_so_do_the_tables(tmp_path):
    root, experiment = tmp_path / "runs", Experiment("csl", "csl", "scenes", 10, 0, "tiny", {"alpha": 2.0})
    parameters = ("-p", "scale", "tiny", "-p", "labels", "10", "-y", "overrides: {alpha: 2.0}")
    status, printed, book = papermill("csl", tmp_path / "out.ipynb", root, *parameters)
    assert status == 0, printed[-3000:]
    for item in (experiment, Experiment("csl", "unimatch", "scenes", 10, 0, "tiny")):
        assert runs.is_finished(item, root)
    assert len(figures(book)) == 13 and all(len(figure) > 5000 for figure in figures(book))
    reported = runs.load_metrics(runs.folder_of(experiment, root))["reported"]["last"]["ema"]
    numbers = next(cell.outputs for cell in code_cells(book) if cell.source == "notebook.train(experiment, asked)")
    assert "mIoU (%)" in str(numbers) and f"{100 * reported['miou']:.2f}" in str(numbers)
    published = next(cell.outputs for cell in code_cells(book) if "beside_published" in cell.source)
    assert "75.20" in str(published) and "not available" in str(published)
    parameters = ("-p", "paper", "csl", "-p", "scale", "tiny", "-p", "seeds", "1")
    status, printed, tables = papermill("tables", tmp_path / "tables.ipynb", root, *parameters)
    assert status == 0, printed[-3000:]
    assert "0 of 4 runs finished" in shown(tables) and "UniMatch, README Pascal VOC 2012" in shown(tables)


@pytest.mark.timeout(300)
def test_pcre_shows_its_runs_beside_published_numbers(tmp_path):
    root, experiment = tmp_path / "runs", Experiment("pcre", "pcre", "scenes", 60, 0, "tiny", {"tau": 0.5})
    parameters = ("-p", "scale", "tiny", "-p", "labels", "60", "-p", "beside", "plain", "-y", "overrides: {tau: 0.5}")
    status, printed, book = papermill("pcre", tmp_path / "out.ipynb", root, *parameters)
    assert status == 0, printed[-3000:]
    for item in (experiment, Experiment("pcre", "plain", "scenes", 60, 0, "tiny")):
        assert runs.is_finished(item, root)
    assert len(figures(book)) == 10 and all(len(figure) > 5000 for figure in figures(book))
    reported = runs.load_metrics(runs.folder_of(experiment, root))["reported"]["last"]["ema"]
    numbers = next(cell.outputs for cell in code_cells(book) if cell.source == "notebook.train(experiment, asked)")
    assert "CAM mIoU (%)" in str(numbers) and f"{100 * reported['cam_miou']:.2f}" in str(numbers)
    published = next(cell.outputs for cell in code_cells(book) if "beside_published" in cell.source)
    assert "76.30" in str(published) and "not available" in str(published)


@pytest.mark.timeout(300)
def test_trust_region_shows_its_runs_beside_published_numbers(tmp_path):
    root, changes = tmp_path / "runs", {"gamma": 0.2}
    experiment = Experiment("trust_region", "robust_trust_region", "scenes", 100, 0, "tiny", changes)
    parameters = ("-p", "scale", "tiny", "-p", "labels", "100", "-p", "beside", "partial_ce")
    status, printed, book = papermill(
        "trust_region", tmp_path / "out.ipynb", root, *parameters, "-y", "overrides: {gamma: 0.2}"
    )
    assert status == 0, printed[-3000:]
    for item in (experiment, Experiment("trust_region", "partial_ce", "scenes", 100, 0, "tiny")):
        assert runs.is_finished(item, root)
    assert len(figures(book)) == 12 and all(len(figure) > 5000 for figure in figures(book))
    reported = runs.load_metrics(runs.folder_of(experiment, root))["reported"]["last"]["ema"]
    numbers = next(cell.outputs for cell in code_cells(book) if cell.source == "notebook.train(experiment, asked)")
    assert all(f"{100 * reported[name]:.2f}" in str(numbers) for name in ("miou", "proposal_accuracy"))
    published = next(cell.outputs for cell in code_cells(book) if "beside_published" in cell.source)
    assert "65.80" in str(published) and "not available" in str(published)
    solved = next(cell.outputs for cell in code_cells(book) if "every = " in cell.source)
    assert "proposal: [0 0 0 0 0 1 1 1] after 1 cut" in str(solved), "the worked example"


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("commatch", ("-p", "method", "fixmach"), "did you mean 'fixmatch'"),
        ("commatch", ("-p", "sede", "3"), "did you mean 'seed'"),
        ("calibratemix", ("-p", "base", "fixmach"), "'fixmach'; allowed: 'fixmatch'"),
        ("calibratemix", ("-p", "beside", "fixmatch"), "unknown parameter of this notebook 'beside'"),
        ("csl", ("-p", "method", "flexmatch"), "known: csl, fixmatch, supervised, unimatch"),
        ("csl", ("-p", "masks", "20"), "unknown parameter of this notebook 'masks'"),
        ("pcre", ("-p", "method", "csl"), "known: afa, dupl, pcre, plain, toco"),
        ("pcre", ("-p", "labels", "501"), "1 to 500"),
        ("trust_region", ("-p", "method", "csl"), "known: adm, dense_gd, full, grid_gd, partial_ce"),
        ("trust_region", ("-p", "labels", "20"), "0, 30, 50, 80, 100 (0: a click)"),
        ("tables", ("-p", "scale", "maxi"), "known: mini, paper, tiny"),
        ("index", ("-p", "scale", "maxi"), "known: mini, paper, tiny"),
    ],
)
def test_a_wrong_parameter_fails_in_the_first_cell_after_the_parameters(name, parameters, message, tmp_path):
    status, printed, book = papermill(name, tmp_path / "out.ipynb", tmp_path / "runs", *parameters)
    assert status != 0 and message in printed
    failed = [
        number for number, cell in enumerate(code_cells(book)) if "error" in {o.output_type for o in cell.outputs}
    ]
    position = 2 + (code_cells(book)[0].metadata.get("tags") != ["parameters"])  # papermill puts the error on top
    assert position in failed
    assert all(cell.execution_count is None for cell in code_cells(book)[position + 1 :])
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["tables", "index"])
def test_overviews_read_the_runs_that_are_there(name, executed, tmp_path):
    folder, _ = executed
    parameters = ("-p", "scale", "tiny", "-p", "runs_root", str(folder / "runs"))
    status, printed, book = papermill(name, tmp_path / "out.ipynb", tmp_path / "none", *parameters)
    assert status == 0, printed[-3000:]
    assert figures(book) and "commatch" in shown(book)
    if name == "tables":
        assert "2 of 8 runs finished" in shown(book) and "inconclusive" in shown(book)


@pytest.mark.timeout(300)
def test_an_exported_page_shows_the_explorer_as_a_figure(executed, tmp_path):
    folder, book = executed
    cell = next(cell for cell in code_cells(book) if cell.source.startswith("explore."))
    assert [list(output.data) for output in cell.outputs] == [["image/png", "text/plain"]]
    command = [
        sys.executable,
        "-m",
        "nbconvert",
        "--to",
        "html",
        "--output-dir",
        str(tmp_path),
        str(folder / "out.ipynb"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    page = (tmp_path / "out.html").read_text()
    assert json.dumps(cell.outputs[0].data["image/png"].strip())[1:60] in page
