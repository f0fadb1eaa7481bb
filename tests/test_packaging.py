"""Set-up: one source of versions, data inside the package, a quick import, a Makefile that installs once."""

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import repro

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")


def pins(python: str) -> dict[str, Requirement]:
    """The lines of constraints.txt that hold for one Python on Linux, by canonical name."""
    rows = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    found = [Requirement(row) for row in rows]
    names = [canonicalize_name(pin.name) for pin in found]
    assert len(names) == len(set(names)), "a package is pinned twice"
    place = {"python_version": python, "python_full_version": f"{python}.0", "platform_system": "Linux"}
    return {
        name: pin
        for name, pin in zip(names, found, strict=True)
        if not pin.marker or pin.marker.evaluate(place)
    }


def declared() -> list[Requirement]:
    """Core dependencies and those of every extra."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(text) for text in sum(extras, PROJECT["project"]["dependencies"])]


def test_every_pin_is_one_exact_public_version():
    for python in PYTHONS:
        for pin in pins(python).values():
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), (
                f"{pin}: not an exact public version"
            )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_declared_dependency_is_pinned_within_its_range(python):
    pinned = pins(python)
    for wanted in declared():
        pin = pinned[canonicalize_name(wanted.name)]
        version = str(pin.specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"{pin} lies outside {wanted}"
    assert PROJECT["project"]["requires-python"] == ">=3.11,<3.14"
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(f"{python}.0")


def test_everything_that_the_installation_brings_is_pinned():
    pinned = pins("{}.{}".format(*sys.version_info))
    waiting, seen = [("repro", "test")], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            wanted = Requirement(text)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(wanted.name), extra) for extra in ("", *wanted.extras)]
    reached = {name for name, _ in seen} - {"repro"}
    assert {"torch", "sympy", "papermill", "playwright", "greenlet"} <= reached
    assert reached <= set(pinned), f"add to constraints.txt: {sorted(reached - set(pinned))}"


def test_every_imported_package_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    texts = PROJECT["project"]["dependencies"] + extras["batch"] + extras["cuts"] + extras["crf"]
    allowed = {canonicalize_name(Requirement(text).name) for text in texts}
    optional = {"maxflow": ["PyMaxflow"], "pydensecrf": ["pydensecrf2"]}  # need not be installed
    owners = metadata.packages_distributions() | optional
    for path in (ROOT / "repro").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for package in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"repro"}:
                owned = {canonicalize_name(owner) for owner in owners.get(package, [package])}
                assert owned & allowed, (
                    f"{path.relative_to(ROOT)} imports {package}; add it to pyproject.toml"
                )


def test_no_second_copy_of_a_version():
    for name in ("pyproject.toml", "environment.yml", "Makefile", ".ci/run", "README.md", "CONTRIBUTING.md"):
        assert not re.search(r"==\s*\d", (ROOT / name).read_text()), (
            f"{name} pins a version; use constraints.txt"
        )


def test_conda_environment_takes_its_versions_from_the_same_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip" and by_pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    assert python.removeprefix("python=") in PYTHONS


def test_version_is_stated_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert metadata.version("repro") == repro.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (repro.__version__, PROJECT["project"]["license"])


def test_every_data_file_travels_in_the_wheel():
    globs = PROJECT["tool"]["setuptools"]["package-data"]
    patterns = [f"{package.replace('.', '/')}/{glob}" for package, found in globs.items() for glob in found]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "repro").rglob("*") if path.is_file()]
    data = [name for name in files if not name.endswith((".py", ".pyc"))]
    assert "repro/data/embedded/LICENSE" in data
    left_out = [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not left_out, f"add to package-data: {left_out}"
    folders = {path.parent for path in (ROOT / "repro").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders), "a folder of code is not a package"


def test_import_is_quick_and_loads_no_torch():
    script = (
        "import time; t = time.perf_counter(); import repro; t = time.perf_counter() - t; import sys;"
        "print(t, {'torch', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules) or '')"
    )
    printed = [subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT) for _ in range(3)]
    seconds, _, heavy = min(printed, key=lambda line: float(line.split()[0])).partition(" ")
    assert float(seconds) < 1 and not heavy.strip()


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`make` in `folder`, without what a surrounding make or virtual environment would hand down."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SCALE", "SEEDS")
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=clean | environment, capture_output=True, text=True
    )


@pytest.fixture
def clone(tmp_path):
    """A folder with the Makefile and a stand-in for Python that records its calls instead of working."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin && cp {stand_in} .venv/bin/python; fi\n'
    )
    stand_in.chmod(0o755)
    return tmp_path


def calls(clone: Path) -> list[str]:
    """The stand-in's calls since last asked."""
    lines = (clone / "calls").read_text().splitlines()
    (clone / "calls").unlink()
    return lines


INSTALL = "-m pip install --disable-pip-version-check -c constraints.txt -e .[test]"
LINT = "-m ruff check ."


@pytest.mark.parametrize("active", [{}, {"VIRTUAL_ENV": "/elsewhere"}])
def test_make_creates_the_environment_once_and_installs_when_the_pins_change(clone, active):
    python = f"PYTHON={clone}/python"
    assert make(clone, "lint", python, **active).returncode == 0
    assert calls(clone)[-3:] == ["-m venv .venv", INSTALL, LINT]
    assert make(clone, "lint", python, **active).returncode == 0
    assert calls(clone) == [LINT]
    newer = (clone / ".venv/.installed").stat().st_mtime + 5
    os.utime(clone / "constraints.txt", (newer, newer))
    assert make(clone, "lint", python, **active).returncode == 0
    assert calls(clone) == [INSTALL, LINT]


def test_make_tries_a_failed_installation_again(clone):
    broken = clone / "python"
    working = broken.read_text()
    broken.write_text(working + 'case "$*" in *"pip install"*) exit 1;; esac\n')
    assert make(clone, "lint", f"PYTHON={broken}").returncode != 0
    assert LINT not in calls(clone)
    (clone / ".venv/bin/python").write_text(working)
    assert make(clone, "lint", f"PYTHON={broken}").returncode == 0
    assert calls(clone) == [INSTALL, LINT]


def test_make_reproduce_passes_scale_and_seeds(clone):
    python = f"PYTHON={clone}/python"
    assert make(clone, "reproduce", python).returncode == 0
    assert calls(clone)[-1] == "-m repro reproduce --scale mini"
    assert make(clone, "reproduce", python, "SCALE=tiny", "SEEDS=1").returncode == 0
    assert calls(clone)[-1] == "-m repro reproduce --scale tiny --seeds 1"


@pytest.mark.parametrize(
    "version, accepted", [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False)]
)
def test_make_refuses_a_python_outside_the_range(clone, version, accepted):
    python, working = clone / "python", (clone / "python").read_text()
    probe = (
        f'[ "$1" = "-c" ] && exec {sys.executable} -c "import sys; sys.version_info = {(*version, 0)}\n$2"\n'
    )
    python.write_text(working.replace("\n", "\n" + probe, 1))
    done = make(clone, "lint", f"PYTHON={python}")
    assert (done.returncode == 0) == (clone / ".venv").exists() == accepted
    refusal = f"Python 3.11 to 3.13 is needed; {sys.executable} is {version[0]}.{version[1]}"
    assert (refusal in done.stderr) != accepted


def test_documents_name_only_what_exists():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s;,.)]|$)", text)) <= targets, name
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / link).exists(), f"{name} points to {link}, which does not exist"


def test_the_readmes_verdicts_are_those_of_the_committed_results():
    results = (ROOT / "figures" / "rendered" / "results.md").read_text().split("\n## ")[1:]
    rows = re.findall(r"^\| .*\| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = ("supported", "contradicted", "inconclusive")
    found = [tuple(len(re.findall(rf"^\|[^|]+\| {word} \|", paper, re.MULTILINE)) for word in words)
             for paper in results]  # fmt: skip
    assert [tuple(map(int, row)) for row in rows] == found and len(found) == 5
