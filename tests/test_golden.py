"""Run ids are those of the golden file. The trained bits are compared by hand: see `tests/golden.py`."""

import json

from repro.grid import PAPERS
from tests import golden


def test_every_planned_run_keeps_its_id():
    assert golden.planned_ids() == (golden.FOLDER / "run_ids.txt").read_text()


def test_the_recorded_bits_cover_every_method_of_every_paper():
    recorded = set(json.loads((golden.FOLDER / "tiny.json").read_text())) - {"processor", "torch", "python"}
    assert recorded == {f"{item.paper} {item.method}" for item in golden.methods()}
    kinds = {(paper.spec.supervision.budget, method) for paper in PAPERS.values() for method in paper.spec.methods}
    assert len(recorded) == len(kinds) == 30
