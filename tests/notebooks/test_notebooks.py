"""The notebooks as files, refused parameters, and each of them executed once by papermill at scale tiny."""

import ast
import base64
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest

from figures import desk
from repro import runs
from repro.experiment import Experiment
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def execute(name, out, **parameters):
    """Execute a notebook of the folder at scale tiny; returns it."""
    given = {"scale": "tiny"} | parameters
    return papermill.execute_notebook(str(FOLDER / f"{name}.ipynb"), str(out), given, progress_bar=False)


def figures(book):
    """Every PNG that the notebook shows."""
    data = [output.get("data", {}) for cell in code_cells(book) for output in cell.outputs]
    return [base64.b64decode(item["image/png"]) for item in data if "image/png" in item]


def words(book, call=""):
    """Every text that the cells with a call show."""
    outputs = [output for cell in code_cells(book) if call in cell.source for output in cell.outputs]
    return "\n".join(str(output.get("text", "")) + str(output.get("data", "")) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_and_in_the_house_form(name):
    book = read(name)
    nbformat.validate(book)
    cells = code_cells(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])] == [cells[0]]
    assert all("  # " in line for line in cells[0].source.splitlines()), "every parameter has a comment"
    assert book.metadata.kernelspec.name == "python3"
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try)
    assert not any(isinstance(node, logic) for cell in cells for node in ast.walk(ast.parse(cell.source)))


# Refused parameters


@pytest.mark.parametrize(
    ("name", "parameter", "value", "message"),
    [
        ("commatch", "method", "fixmach", "did you mean 'fixmatch'"),
        ("commatch", "sede", 3, "did you mean 'seed'"),
        ("calibratemix", "base", "fixmach", "'fixmach'; allowed: 'fixmatch'"),
        ("calibratemix", "beside", "fixmatch", "unknown parameter of this notebook 'beside'"),
        ("csl", "method", "flexmatch", "known: csl, fixmatch, supervised, unimatch"),
        ("csl", "masks", 20, "unknown parameter of this notebook 'masks'"),
        ("pcre", "method", "csl", "known: afa, dupl, pcre, plain, toco"),
        ("pcre", "labels", 501, "1 to 500"),
        ("trust_region", "method", "csl", "known: adm, dense_gd, full, grid_gd, partial_ce"),
        ("trust_region", "labels", 20, r"0, 30, 50, 80, 100 \(0: a click\)"),
        ("tables", "scale", "maxi", "known: mini, paper, tiny"),
        ("index", "scale", "maxi", "known: mini, paper, tiny"),
    ],
)
def test_a_wrong_parameter_fails_in_the_first_cell_after_the_parameters(name, parameter, value, message, monkeypatch):
    """The cells as a kernel runs them: parameters, what papermill injects, then the one that checks."""
    parameters, check = (cell.source for cell in code_cells(read(name))[:2])
    cells, space = [parameters, f"# Parameters\n{parameter} = {value!r}\n", check], {}
    monkeypatch.setattr(desk, "get_ipython", lambda: SimpleNamespace(user_ns={"In": cells}))
    with pytest.raises(SettingError, match=message):
        for cell in cells:
            exec(cell, space)
    assert not {"asked", "request"} & set(space)


def test_papermill_stops_at_a_wrong_parameter(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'seed'"):
        execute("commatch", tmp_path / "out.ipynb", sede=3, runs_root=str(tmp_path / "runs"))
    executed = [cell.execution_count for cell in code_cells(nbformat.read(tmp_path / "out.ipynb", as_version=4))]
    assert [count for count in executed if count] == [1, 2, 3] and not (tmp_path / "runs").exists()


# Executed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder of runs that all notebooks share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        yield tmp_path_factory.mktemp("notebooks") / "runs"


TRUST = {"method": "robust_trust_region", "labels": 100, "overrides": {"gamma": 0.2}}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "changed", "beside", "least", "shown"),
    [
        ("commatch", {}, "fixmatch", 7, ["accuracy (%)"]),
        ("calibratemix", {"base": "flexmatch"}, "flexmatch", 9, ["--set base=flexmatch", "not run"]),
        ("csl", {"labels": 10, "overrides": {"alpha": 2.0}}, "unimatch", 13, ["mIoU (%)", "75.20", "not available"]),
        ("pcre", {"labels": 60, "beside": "plain"}, "plain", 10, ["CAM mIoU (%)", "76.30", "not available"]),
        ("trust_region", TRUST | {"beside": "partial_ce"}, "partial_ce", 12,
         ["65.80", "proposal: [0 0 0 0 0 1 1 1] after 1 cut", "proposal accuracy (%)"]),
    ],
)  # fmt: skip
def test_a_papers_notebook_trains_two_runs_once_and_shows_them(name, changed, beside, least, shown, root):
    book = execute(name, root.parent / f"{name}.ipynb", runs_root=str(root), **changed)
    space = {}
    exec(code_cells(read(name))[0].source, space)
    space |= {"scale": "tiny"} | changed
    overrides = space["overrides"] | ({"base": space["base"]} if "base" in space else {})
    fields = [space[key] for key in ("data", "labels", "seed", "scale")]
    experiment = Experiment(name, space["method"], *fields, overrides)
    assert all(runs.is_finished(item, root) for item in (experiment, Experiment(name, beside, *fields)))
    assert len(figures(book)) >= least and all(len(figure) > 5000 for figure in figures(book))
    assert all(text in words(book) for text in shown)
    numbers = runs.load_metrics(runs.folder_of(experiment, root))["reported"]["last"]["ema"]
    for metric in [key for key in ("error", "miou", "cam_miou", "proposal_accuracy") if numbers.get(key)]:
        assert f"{100 * numbers[metric]:.2f}" in words(book, "desk.train(experiment, asked)")
    explorers = [cell for cell in code_cells(book) if ".explore(" in cell.source]
    shapes = [[set(one.data) for one in cell.outputs] for cell in explorers]
    assert shapes and all(shape == [{"image/png", "text/plain"}] for shape in shapes), "still figures without a reader"
    if name == "commatch":  # again: nothing trains, and figures have the same bytes
        before = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")}
        again = execute(name, root.parent / "again.ipynb", runs_root=str(root), **changed)
        assert {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.json")} == before
        assert figures(again) == figures(book)


@pytest.mark.timeout(300)
def test_overviews_read_the_runs_that_are_there_and_save_what_they_show(root, tmp_path):
    for method in ("csl", "unimatch"):
        write_mask_run(Experiment("csl", method, "scenes", 20, 0, "tiny"), tmp_path / "runs")
    for name, parameters in (("tables", {"paper": "csl", "seeds": 1}), ("index", {"seeds": 1})):
        book = execute(
            name,
            tmp_path / f"{name}.ipynb",
            runs_root=str(tmp_path / "runs"),
            save_to=str(tmp_path / "saved"),
            **parameters,
        )
        saved = {path.read_bytes() for path in (tmp_path / "saved").glob("*.png")}
        assert figures(book) and set(figures(book)) <= saved
        if name == "tables":
            assert "2 of 4 runs finished" in words(book) and "UniMatch, README" in words(book)
        else:
            assert "unimatch" in words(book) and "none is committed of these runs" in words(book)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    rendered = {path.name for path in (FOLDER.parent / "figures" / "rendered").iterdir()}
    assert names <= rendered
    assert {"csl_claims.png", "across_effort.png", "across_calibration.png", "results.md", "runs.csv"} <= names
