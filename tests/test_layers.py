"""Imports point down the list of layers, also inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest. Modules of one line may import each other; a package counts as a whole.
LAYERS = (
    ("settings", "arrays", "files"),
    ("models", "measure", "solvers", "cam"),
    ("data",),
    ("train",),
    ("recipe",),
    ("methods",),
    ("tasks",),
    ("papers",),
    ("experiment",),
    ("grid",),
    ("runs",),
    ("batch",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Packages that need not be installed, and those that take long to import and that few runs need.
OPTIONAL = {"pydensecrf", "maxflow", "ortools", "snakemake"}
SLOW = {"datasets", "pyarrow", "scipy", "skimage", "huggingface_hub", "nbconvert", "papermill"}
SOURCES = sorted(path for package in ("repro", "figures") for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    """Full names of all modules that a syntax tree imports, at any depth; `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_module_has_a_layer():
    tops = {path.relative_to(ROOT / "repro").parts[0].removesuffix(".py") for path in (ROOT / "repro").rglob("*.py")}
    assert tops - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "repro")], ids=str)
def test_imports_point_down(path):
    here = path.relative_to(ROOT / "repro").parts[0].removesuffix(".py")
    for name in imported(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        assert top != "figures", f"{path}: repro imports figures"
        if top == "repro" and rest and rest[0] in LEVEL and here != "__init__":
            assert rest[0] == here or LEVEL[rest[0]] < LEVEL[here] or LEVEL[here] == LEVEL[rest[0]] < 2, name


# The command line is the highest module; it imports what a command needs when called, so that `--help` is quick.
@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__main__.py"], ids=str)
def test_functions_import_optional_and_slow_packages_only(path):
    tree = ast.parse(path.read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = {name.split(".")[0] for name in imported(function)}
            assert inside <= OPTIONAL | SLOW, f"{path}: {function.name} imports {inside}"


def test_modules_form_no_circle():
    graph = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imported(ast.parse(path.read_text()))
    below = {  # of `from a import b`, the module b, or else a
        name: {full if full in graph else full.rpartition(".")[0] for full in names} & graph.keys() - {name}
        for name, names in graph.items()
    }
    while free := [name for name, names in below.items() if not names & below.keys()]:
        for name in free:
            del below[name]
    assert not below, f"modules in circles: {', '.join(sorted(below))}"
