"""Finished runs of every kind of supervision, which no test changes, and a copy that a test may change."""

import shutil
from pathlib import Path

import pytest

from repro.experiment import Experiment
from tests import fake_margins
from tests.fake_mask_runs import write_mask_run
from tests.fake_scribble_runs import write_scribble_run
from tests.fake_tag_runs import write_tag_run

CSL = Experiment("csl", "csl", "scenes", 20, scale="tiny")
PCRE = Experiment("pcre", "pcre", "scenes", 500, scale="mini")
ROBUST = Experiment("trust_region", "robust_trust_region", "scenes", 30, scale="tiny")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two seeds of CSL, PCRE, robust trust region and full supervision; one of some others; no UniMatch, ToCo, ADM."""
    root = tmp_path_factory.mktemp("runs")
    for item in (CSL, CSL.with_(seed=1), CSL.with_(method="fixmatch"), CSL.with_(method="supervised")):
        write_mask_run(item, root)
    write_mask_run(CSL.with_(labels=10), root, figures=False, miou=0.25)
    for item in (PCRE, PCRE.with_(seed=1), PCRE.with_(method="dupl"), PCRE.with_(method="plain")):
        write_tag_run(item, root)
    for seed in (0, 1):
        write_scribble_run(ROBUST.with_(seed=seed), root)
        write_scribble_run(ROBUST.with_(seed=seed, labels=100), root, figures=False)
        write_scribble_run(ROBUST.with_(seed=seed, labels=100, method="full"), root)
    for method in ("partial_ce", "trust_region"):
        write_scribble_run(ROBUST.with_(method=method), root)
    fake_margins.write_pair(root)
    return root


@pytest.fixture
def copied(runs, tmp_path):
    """The same runs, to be changed."""
    return Path(shutil.copytree(runs, tmp_path / "copied"))
