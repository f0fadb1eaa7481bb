"""ADM: its energy by loops against exhaustive search, what the cut may use, the terms, and worker processes."""

import gc
import itertools
import math

import pytest
import torch

from repro.methods.scribbles.trust_region import ADM, ADMSettings
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import SECOND, build


def edges(image, roi, neighbours=8):
    """(p, q, w_pq) inside the region of interest, by loops."""
    height, width = roi.shape
    pairs = [
        ((i, j), (i + down, j + right), math.hypot(down, right))
        for down, right in [(0, 1), (1, 0), (1, 1), (-1, 1)][: neighbours // 2]
        for i in range(height) for j in range(width)
        if 0 <= i + down < height and j + right < width and roi[i, j] and roi[i + down, j + right]
    ]  # fmt: skip
    gaps = [((image[:, *p] - image[:, *q]) ** 2).sum().item() for p, q, _ in pairs]
    variance = sum(gaps) / len(gaps)
    return [(p, q, math.exp(-gap / 2 / variance) / far) for gap, (p, q, far) in zip(gaps, pairs, strict=True)]


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
    pairs, log_probs = edges(x[0], roi), logits[0].log_softmax(0)
    every = [dict(zip(pixels, labels, strict=True)) for labels in itertools.product((0, 1), repeat=len(pixels))]
    best = min(every, key=lambda labels: energy(labels, log_probs, pairs, weight))
    assert {p: int(found[p]) for p in pixels} == best and found[1, 3] == 255


def test_a_step_is_that_of_loops():
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
        pairs = edges(x[n], ~crop.padding[n])
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


def test_proposals_carry_no_gradient():
    built, view = build(ADM), build(ADM).view(fakes.items())
    logits = torch.randn(3, 3, fakes.SIDE, fakes.SIDE, requires_grad=True)
    assert not built.solved(view, logits).requires_grad and built.solved(view, logits).dtype == torch.uint8


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
