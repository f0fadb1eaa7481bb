"""One finished fake run for each explorer, and explorers of given arrays, without a run."""

from figures import explore
from repro.experiment import Experiment
from tests import fake_margins, fake_outputs
from tests.fake_mask_runs import write_mask_run
from tests.fake_scribble_runs import write_scribble_run
from tests.fake_tag_runs import write_tag_run

COMMATCH = Experiment(scale="tiny")
CSL = Experiment("csl", "csl", "scenes", 20)
PCRE = Experiment("pcre", "pcre", "scenes", 500)
TRUST = Experiment("trust_region", "robust_trust_region", "scenes", 30)

# explorer: experiments, part of the numbers, moves of controls
EXPLORERS = {
    explore.thresholds: (COMMATCH, "positives", {
        "positive_threshold": 0.3, "positive_stability": 0.001, "negative_threshold": 0.2, "negative_stability": 0.2}),
    explore.reliability: ([fake_margins.BASE, fake_margins.MIXED], "fitted, T = ", {
        "run": None, "temperature": 2.0, "bins": 40, "spacing": "mass"}),
    explore.margins: (fake_margins.MIXED, "percentile 5 of 230 images", {
        "kind": "labelled", "percentile": 90, "weight": 0.9, "batch": 4, "partner": "similar", "pool": 1}),
    explore.weights: (CSL, "CSL, Gaussian, alpha = 8", {
        "image": 2, "step": 100, "selection": "hard", "features": "dispersion", "threshold": 0.7, "alpha": 0.5,
        "rule": "and"}),
    explore.regions: (PCRE, "region m_r, normalised", {
        "pair": None, "source": "auxiliary", "scales": (0.5,), "beta": 0.1, "threshold": 0.1, "radius": 1, "rounds": 1,
        "share": 0.8}),
    explore.proposals: (TRUST, "network's argmax, seeds clamped", {
        "image": 2, "length": -1.0, "potts_weight": 1, "gamma": 10, "neighbours": 4, "restricted": False,
        "start": "argmax"}),
}  # fmt: skip


def write_all(root):
    """Write the runs of EXPLORERS."""
    fake_outputs.write_run(root, COMMATCH)
    fake_margins.write_pair(root)
    write_mask_run(CSL, root)
    write_tag_run(PCRE, root, evaluations=1)
    write_scribble_run(TRUST, root)
    return root


def made(kind, **fields):
    """An explorer of given attributes."""
    explorer = kind.__new__(kind)
    vars(explorer).update(fields)
    return explorer
