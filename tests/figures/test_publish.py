"""The published files: `results.md` is what the committed runs give."""

import json
from pathlib import Path

import pandas as pd

from repro.batch import local, records
from repro.experiment import Experiment, run_id
from tests.fake_runs import write_run


def write_committed(root: Path):
    """Finished runs with the committed numbers of every rule and kind of weights."""
    numbers = pd.read_csv(records.numbers_of(local.COMMITTED), dtype=str, keep_default_na=False)
    by_run = {run: part.to_dict("records") for run, part in numbers.groupby("run")}
    for row in records.load_runs(local.COMMITTED).to_dict("records"):
        item = Experiment(row["paper"], row["method"], row["data"], int(row["labels"]), int(row["seed"]), row["scale"],
                          tuple(json.loads(row["overrides"]).items()))
        assert run_id(item) == row["run"]
        reported = {}
        for cells in by_run[row["run"]]:
            found = {k: float(v) for k, v in cells.items() if v and k not in records.KEY}
            reported.setdefault(cells["rule"], {})[cells["weights"]] = found
        write_run(item, root)
        path = root / row["run"] / "metrics.json"
        saved = json.loads(path.read_text())
        saved |= {"reported": reported, "pseudo_labels": {}}
        path.write_text(json.dumps(saved))
