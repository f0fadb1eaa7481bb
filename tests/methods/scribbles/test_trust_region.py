"""Stage A over a pool, the trust region's steps by loops, and ADM against exhaustive search."""

import gc
import itertools
import math

import numpy as np
import pytest
import torch

from repro.methods.scribbles import trust_region as module
from repro.methods.scribbles.trust_region import ADM, ADMSettings, RobustTrustRegion, TrustRegion, refresh, report
from repro.solvers.cuts import SolverSettings, solve
from repro.solvers.potts import contrast_grid, problems, proposal_energy
from repro.train import Items
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import SECOND, build

# Stage A over a pool


SETTINGS = SolverSettings(potts_weight=2.0, gamma=1.0)


def empty():
    return torch.full((fakes.COUNT, fakes.SIDE, fakes.SIDE), 255, dtype=torch.uint8)


def alone(network, pool, number, settings=SETTINGS, start=None, neighbours=8):
    """Stage A of one image, which is cut to its unpadded part: its padding must not matter."""
    inside = pool.labels[number] != 254
    height = int(inside.any(1).sum())
    x = fakes.views().plain(pool.images[number : number + 1, :, :height])
    scribbles = pool.labels[number : number + 1, :height]
    with torch.no_grad():
        log_probs = network.eval()(x).log_softmax(1)
    grid = contrast_grid(x, neighbours=neighbours)
    starts = None if start is None else start[None, :height]
    found = solve(problems(log_probs, grid, scribbles, starts)[0], settings)
    labels = np.full((fakes.SIDE, fakes.SIDE), 255, np.uint8)
    labels[:height] = found.labels
    return torch.from_numpy(labels), found


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize(("restricted", "neighbours"), [(True, 8), (False, 4)])
def test_the_pass_solves_each_image_alone(monkeypatch, batch, restricted, neighbours):
    monkeypatch.setattr(module, "IMAGES_PER_PASS", batch)
    settings = SolverSettings(potts_weight=2.0, gamma=1.0, restricted=restricted)
    network, pool, stored = fakes.TinyNetwork(), fakes.pool(), empty()
    solutions = refresh(network, fakes.views(), pool, stored, settings, neighbours)
    for number in range(fakes.COUNT):
        labels, found = alone(network, pool, number, settings, neighbours=neighbours)
        assert torch.equal(stored[number], labels)
        assert solutions[number].energy == pytest.approx(found.energy, rel=1e-5)
    background = solutions[0].start_energy
    assert solutions[0].energy < background


def test_energy_falls_from_the_stored_proposal_and_is_the_papers():
    network, pool, stored = fakes.TinyNetwork(), fakes.pool(), empty()
    refresh(network, fakes.views(), pool, stored, SETTINGS)
    first = stored.clone()
    with torch.no_grad():
        network.head.weight.mul_(-1)
    solutions = refresh(network, fakes.views(), pool, stored, SETTINGS)
    roi = pool.labels != 254
    x = fakes.views().plain(pool.images).masked_fill(~roi[:, None], 0)
    with torch.no_grad():
        log_probs = network.eval()(x).log_softmax(1)
    grid = contrast_grid(x, roi)
    before, after = (proposal_energy(labels, log_probs, grid, 1.0, 2.0) for labels in (first, stored))
    assert before.tolist() == pytest.approx([solution.start_energy for solution in solutions], rel=1e-5)
    assert after.tolist() == pytest.approx([solution.energy for solution in solutions], rel=1e-5)
    assert (after <= before * (1 + 1e-6)).all() and (after < before - 1e-4).any()
    once_more = refresh(network, fakes.views(), pool, stored, SETTINGS)
    assert [s.start_energy for s in once_more] == pytest.approx([s.energy for s in solutions])


def test_the_network_and_the_random_state_are_left_as_they_were():
    network, views = fakes.TinyNetwork().train(), fakes.views()
    network.backbone[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    states = torch.get_rng_state(), views.generator.get_state()
    refresh(network, views, fakes.pool(), empty(), SETTINGS)
    assert network.training and network.head.training and not network.backbone[1].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], views.generator.get_state())
    assert all((training, gradient) == (False, False) for _, _, training, _, gradient in network.passes)


def test_the_network_sees_whole_normalised_images_and_nothing_in_their_padding():
    network, pool = fakes.TinyNetwork(), fakes.pool()
    refresh(network, fakes.views(), pool, empty(), SETTINGS)
    ((seen, *_),) = network.passes
    padding = (pool.labels == 254)[:, None].expand_as(seen)
    assert padding.any() and (seen[padding] == 0).all()
    assert torch.equal(seen[~padding], fakes.views().plain(pool.images)[~padding])


def test_only_the_pools_images_are_solved():
    pool, stored = fakes.pool(), empty()
    pool.labelled = torch.tensor([1, 3])
    refresh(fakes.TinyNetwork(), fakes.views(), pool, stored, SETTINGS)
    assert (stored[[0, 2, 4]] == 255).all() and (stored[[1, 3]] != 255).all()


def test_a_failure_names_the_image_and_changes_nothing():
    pool, stored = fakes.pool(), empty()
    pool.labels[3, 0, 0] = 9
    with pytest.raises(RuntimeError, match="image '3 of the pool'.*scribbles hold 9"):
        refresh(fakes.TinyNetwork(), fakes.views(), pool, stored, SETTINGS)
    assert (stored == 255).all()


def test_pools_that_read_files_are_asked_for_images():
    pool = fakes.pool()
    asked = []

    class Reader:
        labelled = pool.labelled

        def take(self, index):
            asked.append(index.tolist())
            return Items(index, pool.images[index], pool.labels[index])

    found, expected = empty(), empty()
    refresh(fakes.TinyNetwork(), fakes.views(), Reader(), found, SETTINGS)
    refresh(fakes.TinyNetwork(), fakes.views(), pool, expected, SETTINGS)
    assert torch.equal(found, expected) and asked == [[0, 1, 2, 3, 4]]


def test_the_report_is_of_proposals_outside_seeds():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    proposals = torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8)
    seeds = torch.tensor([[[True, False], [False, False]]])
    told = report(torch.tensor([7]), logits, proposals, seeds, "window")["proposals"]
    assert told.index.tolist() == [7] and told.window == "window"
    assert told.valid.tolist() == [[[True, True], [False, True]]]
    assert told.weight.tolist() == [[[False, True], [False, True]]]
    probs = logits.detach().softmax(1)[0]
    assert told.label[0, 0].tolist() == [0, 2] and told.label[0, 1, 1] == 1
    for label, i, j in ((0, 0, 0), (2, 0, 1), (1, 1, 1)):
        assert told.confidence[0, i, j].item() == pytest.approx(probs[label, i, j].item())
    assert not told.confidence.requires_grad


# Trust region


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


def test_robust_is_plain_without_outliers(tmp_path):
    plain, robust = solved(TrustRegion), solved(RobustTrustRegion, epsilon=0.0)
    terms = [built.losses({"scribbles": fakes.items()}, SECOND).terms for built in (plain, robust)]
    assert {k: v.item() for k, v in terms[0].items()} == {k: v.item() for k, v in terms[1].items()}


# ADM


def energy(labels, log_probs, pairs, weight):
    """sum -log S + 80 sum w, not over pixels or edges."""
    unary = -sum(log_probs[label, *p].item() for p, label in labels.items())
    return unary + weight * sum(w for p, q, w in pairs if labels[p] != labels[q])


@pytest.mark.parametrize("weight", [0.3, 1.0, 80.0])
def test_the_cut_finds_the_least_energy(weight):
    """Two classes, 2 x 4 pixels of which one is padding: one move is exact."""
    generator = torch.Generator().manual_seed(3)
    built = ADM(
        ADMSettings(potts_weight=weight), fakes.TinyNetwork(), fakes.views(), 2, fakes.options(), (1, 2, 4)
    ).train()
    logits = 2 * torch.randn(1, 2, 2, 4, generator=generator)
    view = built.view(fakes.items((0,)))
    x, padding = torch.randn(1, 3, 2, 4, generator=generator), torch.zeros(1, 2, 4, dtype=torch.bool)
    padding[0, 1, 3] = True
    view = type(view)(view.index, x, type(view.crop)(view.crop.images, padding.byte(), padding, None))
    found = built.solved(view, logits)[0]
    roi = ~padding[0]
    pixels = [tuple(p) for p in torch.nonzero(roi).tolist()]
    pairs, log_probs = fakes.edges(x[0], roi), logits[0].log_softmax(0)
    every = [dict(zip(pixels, labels, strict=True)) for labels in itertools.product((0, 1), repeat=len(pixels))]
    best = min(every, key=lambda labels: energy(labels, log_probs, pairs, weight))
    assert {p: int(found[p]) for p in pixels} == best and found[1, 3] == 255


def test_a_step_of_adm_is_that_of_loops():
    sample = fakes.items()
    built = build(ADM, potts_weight=0.2, proposal_weight=1.5)
    losses = built.losses({"scribbles": sample}, SECOND)
    crop = fakes.again(sample)
    (x, _, training, _, _), *rest = built.network.passes
    assert training and not rest  # one pass: the cut reads the predictions that are trained
    logits = fakes.TinyNetwork()(x).detach()
    told = losses.pseudo["proposals"]
    proposals = torch.where(told.valid, told.label, 255)
    assert torch.equal(told.valid, ~crop.padding) and torch.equal(told.weight, told.valid & (crop.masks == 255))
    on_seeds, on_all = fakes.surprise(logits, crop.masks), fakes.surprise(logits, proposals)
    assert len(on_all) == int((~crop.padding).sum())
    assert list(losses.terms) == ["seeds", "proposals"]
    expected = sum(on_seeds.values()).item() / len(on_seeds) / 3, 1.5 * sum(on_all.values()).item() / len(on_all) / 3
    assert [term.item() for term in losses.terms.values()] == pytest.approx(expected, rel=1e-4)
    log_probs = logits.log_softmax(1)
    for n in range(3):  # no label of its proposal can be changed at one pixel for less
        pairs = fakes.edges(x[n], ~crop.padding[n])
        labels = {tuple(p): int(proposals[n][tuple(p)]) for p in torch.nonzero(~crop.padding[n]).tolist()}
        least = energy(labels, log_probs[n], pairs, 0.2)
        for p, k in list(itertools.product(labels, range(3)))[::7]:
            assert energy(labels | {p: k}, log_probs[n], pairs, 0.2) >= least - 1e-4


def test_seeds_are_free_in_the_cut_and_all_labels_allowed():
    built, sample = build(ADM, potts_weight=0.0), fakes.items()
    view = built.view(sample)
    logits = torch.randn(3, 3, fakes.SIDE, fakes.SIDE, generator=torch.Generator().manual_seed(0))
    found = built.solved(view, logits)
    assert torch.equal(found, torch.where(view.roi, logits.argmax(1), 255).byte())
    assert (found != view.crop.masks)[view.crop.masks < 3].any() and len(found[0][view.roi[0]].unique()) == 3
    stiff = build(ADM, potts_weight=1e4)
    assert all(len(labels[roi].unique()) == 1 for labels, roi in zip(stiff.solved(view, logits), view.roi, strict=True))


def test_worker_processes_solve_the_same_and_live_from_step_to_step():
    here, there = build(ADM), build(ADM, recipe=fakes.options(workers=1))
    view = here.view(fakes.items())
    logits = torch.randn(3, 3, fakes.SIDE, fakes.SIDE, generator=torch.Generator().manual_seed(0))
    expected = here.solved(view, logits)
    assert here.executor is None
    assert torch.equal(there.solved(view, logits), expected)
    pool = there.executor
    assert torch.equal(there.solved(view, logits), expected) and there.executor is pool
    workers = list(pool._processes.values())
    assert len(workers) == 1 and workers[0].is_alive()
    del there
    gc.collect()
    workers[0].join(20)
    assert not workers[0].is_alive()
    assert "executor" not in here.state_dict()
