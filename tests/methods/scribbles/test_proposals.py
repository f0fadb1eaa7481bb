"""Stage A over a pool: each image as if solved alone, seeds and labels, starts, workers, and what is left alone."""

import numpy as np
import pytest
import torch

from repro.methods.scribbles import trust_region as module
from repro.methods.scribbles.trust_region import refresh, report
from repro.solvers.cuts import SolverSettings, solve
from repro.solvers.potts import contrast_grid, problems, proposal_energy
from repro.train import Items
from tests.methods.scribbles import fakes

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


def test_seeds_stay_labels_are_the_scribbles_and_padding_has_none():
    pool, stored = fakes.pool(), empty()
    refresh(fakes.TinyNetwork(), fakes.views(), pool, stored, SETTINGS)
    seeded = pool.labels < fakes.CLASSES
    assert torch.equal(stored[seeded], pool.labels[seeded])
    for labels, proposal in zip(pool.labels, stored, strict=True):
        assert set(proposal[labels != 254].tolist()) == set(labels[labels < fakes.CLASSES].tolist())
        assert (proposal[labels == 254] == 255).all()
    free = empty()
    refresh(fakes.TinyNetwork(), fakes.views(), pool, free, SolverSettings(potts_weight=0.01, restricted=False))
    assert torch.equal(free[seeded], pool.labels[seeded])
    assert any(len(proposal[proposal < 255].unique()) == 3 for proposal in free)


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


def test_worker_processes_give_the_same_proposals():
    found, expected = empty(), empty()
    refresh(fakes.TinyNetwork(), fakes.views(), fakes.pool(), found, SETTINGS, workers=1)
    refresh(fakes.TinyNetwork(), fakes.views(), fakes.pool(), expected, SETTINGS)
    assert torch.equal(found, expected)


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
