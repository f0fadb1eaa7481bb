"""Finished runs that no training made: folders in the schema of `repro.runs`, with the numbers a test asks
for."""

import json
from pathlib import Path

from repro.experiment import Experiment, record
from repro.files import write_json
from repro.runs import PACKAGES, folder_of
from repro.tasks.monitors import REPORTING

METRICS = {"error": 0.3, "accuracy": 0.7, "ece_15": 0.1, "ece_10_left": 0.11, "nll": 1.5, "brier": 0.45}
PER_CLASS = {"per_class_accuracy": [0.5, None]}


def write_run(
    experiment: Experiment, root: Path, live: dict | None = None, best: dict | None = None, **ema
) -> Path:
    """Write `metrics.json` of a run whose EMA metrics are METRICS changed by `ema`; return its folder.

    live: changes for the live weights. best: changes for the rule `best`; other rules report the same
    numbers.
    """
    folder = folder_of(experiment, root)
    changes = {"ema": ema, "live": live or {}}
    reported = {
        rule: {weights: METRICS | PER_CLASS | changed for weights, changed in changes.items()}
        for rule in REPORTING
    }
    reported["best"] = {weights: metrics | (best or {}) for weights, metrics in reported["best"].items()}
    reported["best"]["ema"]["selected_on_test"] = True
    metrics = record(experiment) | finished(folder) | {
        "reported": reported,
        "pseudo_labels": {"positive": {"coverage": 0.25, "accuracy": 0.9, "confidence": 0.95, "ece": None}},
    }
    write_json(folder / "metrics.json", metrics)
    return folder


def finished(folder: Path) -> dict:
    """What `metrics.json` of a finished run says beside its experiment and its numbers."""
    return {
        "run": folder.name,
        "data_digest": "d",
        "cost": {"train_seconds": 12.0, "wall_seconds": 13.0, "samples_per_second": 50.0, "peak_memory_mib": 400.0},
        "provenance": {
            "commit": "c0ffee",
            "dirty": False,
            "source_digest": "s",
            "python": "3.12",
            "packages": dict.fromkeys(PACKAGES, "1.0"),
            "device": "cpu",
            "precision": "fp32",
            "threads": 1,
            "finished": "2026-01-01T00:00:00Z",
        },
    }


def write_evaluations(folder: Path, errors: dict[int, float]) -> None:
    """Write a history whose evaluations have these EMA errors by step; live errors are .01 higher."""
    rows = [
        {"kind": "evaluation", "step": step, "ema": {"error": error}, "live": {"error": error + 0.01}}
        for step, error in errors.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
