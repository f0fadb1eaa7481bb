"""Notebooks for tests of batches: the parameters of `run.ipynb` and a run, without figures and what takes time.

They train the real method on the real images, read from a copy that is already decoded.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import nbformat
import torch

from repro.data import catalogue
from repro.experiment import Experiment, record

PARAMETERS = "\n".join(
    f"{name} = None"
    for name in ("paper method data labels seed scale overrides runs_root data_root device").split()
)
QUICK = """
import sys, types
as_it_is = types.SimpleNamespace(disable=lambda function, *a, **k: function, graph_break=lambda: None)
sys.modules["torch._dynamo"] = as_it_is  # SGD imports the compiler, which takes seconds
import torch
from repro import runs
from repro.data import catalogue
catalogue._load = lambda source, split, root: torch.load({copy!r}, weights_only=False)[split]
from repro.experiment import Experiment
experiment = Experiment(paper, method, data, labels, seed, scale, overrides)
"""
TRAIN = "runs.execute(experiment, runs_root, data_root=data_root, device=device)['run']"
TINY = Experiment("commatch", "supervised", "fashion", 100, 0, "tiny", {"steps": 4, "batch": 2, "eval_every": 4})


def plain(folder: Path, *cells: str) -> Path:
    """`run.ipynb` with its parameters and any cells, in a folder; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(metadata=kernel)
    book.cells = [nbformat.v4.new_code_cell(cell) for cell in (PARAMETERS, *cells)]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / "run.ipynb")
    return folder / "run.ipynb"


def training(folder: Path, *cells: str, before: Sequence[str] = ()) -> Path:
    """`plain` with the imports and the run between `before` and `cells`."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "fashion.pt"
    if not copy.exists():
        torch.save({split: catalogue.load("fashion", split) for split in ("train", "test")}, copy)
    return plain(folder, *before, QUICK.strip().format(copy=str(copy)), TRAIN, *cells)


def asked(experiment: Experiment) -> dict:
    """The record of an experiment as `once.execute` takes it."""
    return json.loads(json.dumps(record(experiment)["experiment"]))


def weights_of(folder: Path) -> bytes:
    """The weights of a finished run, bit by bit: its file without the header, whose order of names is not fixed."""
    raw = (folder / "weights.safetensors").read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]
