"""Trust region: when stage A runs, how proposals move with the crop, the terms by loops, and a run that is cut."""

import math

import pytest
import torch

from repro.data.mask_views import PADDING
from repro.methods.scribbles import trust_region as module
from repro.methods.scribbles.trust_region import RobustTrustRegion, TrustRegion, refresh
from repro.tasks.monitors import PixelMonitor
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import SECOND, build

both = pytest.mark.parametrize("method", [TrustRegion, RobustTrustRegion])


def solved(method, **changes):
    """A method in its second stage, with the proposals of its network's first stage A."""
    built = build(method, **changes)
    built.begin_stage(1, None)
    built.begin_epoch(0, fakes.pool())
    return built


def test_stage_a_runs_every_few_epochs_of_the_second_stage(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "refresh", lambda *arguments: calls.append(arguments))
    built, pool = build(TrustRegion, refresh=3, gamma=0.3), fakes.pool()
    ran = []
    for stage in (0, 1):
        built.begin_stage(stage, pool)
        for epoch in range(8):
            before = len(calls)
            built.begin_epoch(epoch, pool)
            ran += [(stage, epoch)] * (len(calls) - before)
    assert ran == [(1, 0), (1, 3), (1, 6)]
    network, views, shown, stored, solver, neighbours, workers = calls[0]
    assert network is built.network and views is built.views and shown is pool and stored is built.proposals
    assert (solver, neighbours, workers) == (built.settings.solver, 8, 0) and solver.gamma == 0.3


@both
def test_stage_a_is_the_pass_from_the_stored_proposals(method):
    built = solved(method, gamma=1.0, potts_weight=2.0)
    expected = torch.full_like(built.proposals, 255)
    other = build(method, gamma=1.0, potts_weight=2.0)
    for _ in range(2):
        refresh(other.network, other.views, fakes.pool(), expected, other.settings.solver)
    built.begin_epoch(5, fakes.pool())
    assert torch.equal(built.proposals, expected) and built.proposals.dtype == torch.uint8


@both
@pytest.mark.parametrize("soften", [0.0, 0.2])
def test_a_step_is_that_of_loops(method, soften):
    built = solved(method, soften=soften, potts_weight=2.0, gamma=1.0)
    sample, count = fakes.items(), len(built.network.passes)
    losses = built.losses({"scribbles": sample}, SECOND)
    crop = fakes.again(sample)
    logits = fakes.TinyNetwork()(built.network.passes[count][0]).detach().double()
    probs = logits.softmax(1)
    epsilon = built.settings.epsilon
    assert epsilon == (0.6 if method is RobustTrustRegion else 0.0)
    a, b = epsilon / 2, 1 - 1.5 * epsilon
    seeds, others, known, right = 0.0, 0.0, 0, 0
    for n in range(3):
        for i in range(fakes.SIDE):
            for j in range(fakes.SIDE):
                label = int(crop.masks[n, i, j])
                row, column = int(crop.window.row[n, i]), int(crop.window.column[n, j])
                proposal = int(built.proposals[sample.index[n], row, column])
                if label < 3:
                    seeds -= math.log(probs[n, label, i, j])
                    known += 1
                    right += proposal == label
                elif not crop.padding[n, i, j]:
                    robust = [-math.log(a + b * probs[n, k, i, j]) for k in range(3)]
                    others += (1 - soften) * robust[proposal] + soften * sum(robust) / 3
    assert right == known > 0  # scribbles and proposals are cut alike
    assert list(losses.terms) == ["seeds", "proposals"]
    assert losses.terms["seeds"].item() == pytest.approx(seeds / known / 3, rel=1e-4)
    assert losses.terms["proposals"].item() == pytest.approx(others / known / 3, rel=1e-4)


def test_small_images_are_padded_and_padding_has_no_proposal():
    """Images cut to less than the crop: only pixels inside are fitted, by the label of the pixel they come from."""
    built, sample = solved(TrustRegion), fakes.items((0, 1))
    built.views, again = (fakes.views(scale=(0.5, 0.7)) for _ in range(2))
    told = built.losses({"scribbles": sample}, SECOND).pseudo["proposals"]
    crop = again.crop(sample.images, sample.labels)
    assert 0.3 < crop.padding.float().mean() < 0.8 and torch.equal(told.valid, ~crop.padding)
    for n, i, j in torch.nonzero(told.valid).tolist():
        row, column = int(crop.window.row[n, i]), int(crop.window.column[n, j])
        assert told.label[n, i, j] == built.proposals[sample.index[n], row, column]


def test_the_monitor_measures_proposals_against_the_hidden_masks():
    built, pool = solved(TrustRegion), fakes.pool()
    truth = torch.randint(3, pool.labels.shape, generator=torch.Generator().manual_seed(1)).byte()
    sample = fakes.items()
    told = built.losses({"scribbles": sample}, SECOND).pseudo
    monitor = PixelMonitor(truth)
    monitor.observe(told)
    crop = fakes.again(sample)
    moved = crop.window.maps(truth[sample.index], PADDING)
    proposals = crop.window.maps(built.proposals[sample.index], 255)
    # padding of the pool has no proposal, and what the window adds has no truth
    outside_seeds = (proposals < 3) & (crop.masks == 255)
    expected = (proposals == moved)[outside_seeds].double().mean().item()
    assert 0 < expected < 1 and monitor.read()["proposals"]["accuracy"] == pytest.approx(expected)


# Whole runs


def test_robust_is_plain_without_outliers(tmp_path):
    plain, robust = solved(TrustRegion), solved(RobustTrustRegion, epsilon=0.0)
    terms = [built.losses({"scribbles": fakes.items()}, SECOND).terms for built in (plain, robust)]
    assert {k: v.item() for k, v in terms[0].items()} == {k: v.item() for k, v in terms[1].items()}
