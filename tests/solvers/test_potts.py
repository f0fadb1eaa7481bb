"""Grid Potts energies against loops over pixel pairs, and what the relaxations are at the corners."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from repro.solvers.potts import (
    RELAXATIONS,
    contrast_grid,
    potts_energy,
    problems,
    proposal_energy,
    relaxed_potts,
)

C = 3


def images_of(batch=2, height=4, width=5, seed=0, dtype=torch.float64):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probs_of(batch=2, classes=C, height=4, width=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64).softmax(1)


def roi_of(batch=2, height=4, width=5, seed=2):
    return torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed)) < 0.7


def pairs_of(roi, neighbours):
    """All unordered neighbours inside the region, by distance: 1, or at most sqrt 2."""
    inside = [tuple(pixel) for pixel in roi.nonzero().tolist()]
    reach = {4: 1.1, 8: 1.5}[neighbours]
    return [(p, q, math.dist(p, q)) for p, q in itertools.combinations(inside, 2) if math.dist(p, q) < reach]


def weights_of(image, roi, neighbours):
    """(p, q, w_pq) of one image by the definition."""
    found = pairs_of(roi, neighbours)
    square = [float(((image[:, *p] - image[:, *q]) ** 2).sum()) for p, q, _ in found]
    variance = (sum(square) / len(square) if square else 0) or 1
    return [(p, q, math.exp(-d / (2 * variance)) / far) for (p, q, far), d in zip(found, square, strict=True)]


def mean_cost(images, roi, neighbours, cost):
    """1 / |N| sum w_pq cost(b, p, q) of each image."""
    values = []
    for b, (image, region) in enumerate(zip(images, roi, strict=True)):
        found = weights_of(image, region, neighbours)
        values.append(sum(w * float(cost(b, p, q)) for p, q, w in found) / max(1, len(found)))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("size", [(4, 5), (1, 4), (5, 1), (1, 1), (2, 2)])
def test_weights_pairs_and_discrete_energy_by_loops(neighbours, size):
    images, roi = images_of(3, *size), roi_of(3, *size)
    grid = contrast_grid(images, roi, neighbours)
    assert len(grid.weights) == neighbours // 2 and grid.weights[0].dtype == torch.float64
    assert grid.pairs.tolist() == [len(pairs_of(region, neighbours)) for region in roi]
    assert grid.pixels.tolist() == roi.sum((1, 2)).tolist()
    for b in range(3):
        expected = sorted(w for *_, w in weights_of(images[b], roi[b], neighbours))
        measured = sorted(w for weight in grid.weights for w in weight[b].flatten().tolist() if w)
        assert measured == pytest.approx(expected, rel=1e-12)
    labels = torch.randint(0, C, (3, *size), generator=torch.Generator().manual_seed(4))
    outside = torch.where(roi, labels, 255).to(torch.uint8)
    expected = mean_cost(images, roi, neighbours, lambda b, p, q: labels[b, *p] != labels[b, *q])
    for given in (labels, outside):
        torch.testing.assert_close(potts_energy(given, grid), expected, rtol=1e-12, atol=0)


def test_a_flat_image_and_rescaling():
    flat = contrast_grid(torch.full((1, 3, 3, 3), 7.0))
    assert [set(weight.flatten().tolist()) for weight in flat.weights[:2]] == [{1.0}, {1.0}]
    assert flat.weights[2].flatten().tolist() == pytest.approx([0.5**0.5] * 4)
    images, other = images_of(), images_of(seed=5)
    scaled = contrast_grid(torch.cat([images * 255 + 3, other]))
    for weight, expected in zip(scaled.weights, contrast_grid(images).weights, strict=True):
        torch.testing.assert_close(weight[:2], expected)  # neither scale nor the rest of the batch matters
    channelwise = contrast_grid(images * torch.tensor([1.0, 2, 5]).view(1, 3, 1, 1))
    assert not torch.allclose(channelwise.weights[0], contrast_grid(images).weights[0])


COSTS = {
    "bilinear": lambda s, t: (s * (1 - t)).sum(),
    "quadratic": lambda s, t: ((s - t) ** 2).sum(),
    "tv": lambda s, t: (s - t).abs().sum(),
}


@pytest.mark.parametrize("form", RELAXATIONS)
@pytest.mark.parametrize("neighbours", [4, 8])
def test_relaxations_by_loops(form, neighbours):
    images, roi, probs = images_of(), roi_of(), probs_of()
    grid = contrast_grid(images, roi, neighbours)
    values = mean_cost(images, roi, neighbours, lambda b, p, q: COSTS[form](probs[b, :, *p], probs[b, :, *q]))
    if form == "bilinear":  # loops start a pair at its upper end; by the symmetry that does not matter
        assert (probs.sum(1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(relaxed_potts(probs, grid, form), values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", RELAXATIONS)
def test_gradients_are_those_of_finite_differences(form):
    grid = contrast_grid(images_of(1, 3, 2), roi_of(1, 3, 2))
    assert grid.pairs.item() > 2
    probs = probs_of(1, C, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: relaxed_potts(values, grid, form), probs)
    assert torch.autograd.gradcheck(lambda values: relaxed_potts(values.softmax(1), grid, form), probs)


@pytest.mark.parametrize(("form", "factor"), [("bilinear", 1), ("quadratic", 2), ("tv", 2)])
def test_one_hot_values(form, factor):
    grid = contrast_grid(images_of(), roi_of())
    labels = torch.randint(0, C, (2, 4, 5), generator=torch.Generator().manual_seed(6))
    hard = F.one_hot(labels, C).permute(0, 3, 1, 2).double()
    torch.testing.assert_close(relaxed_potts(hard, grid, form), factor * potts_energy(labels, grid))
    constant = F.one_hot(torch.ones_like(labels), C).permute(0, 3, 1, 2).double()
    assert relaxed_potts(constant, grid, form).tolist() == [0, 0]


def test_the_one_sided_bilinear_form_is_symmetric_on_the_simplex():
    images, logits = images_of(), torch.randn(2, C, 4, 5, dtype=torch.float64, requires_grad=True)
    grid, probs = contrast_grid(images), logits.softmax(1)
    mirrored = contrast_grid(images.flip(2, 3))  # every pair starts at its other end
    everywhere = torch.ones(2, 4, 5, dtype=torch.bool)
    symmetric = mean_cost(
        images, everywhere, 8, lambda b, p, q: 1 - probs[b, :, *p].detach() @ probs[b, :, *q].detach()
    )
    one, other = relaxed_potts(probs, grid), relaxed_potts(probs.flip(2, 3), mirrored)
    torch.testing.assert_close(one, symmetric)
    torch.testing.assert_close(one, other)
    gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (one, other)]
    torch.testing.assert_close(*gradients)
    # as functions of S alone, off the simplex, the two sides differ
    off = torch.rand(2, C, 4, 5, dtype=torch.float64)
    assert not torch.allclose(relaxed_potts(off, grid), relaxed_potts(off.flip(2, 3), mirrored))


def test_stage_a_energy_by_loops():
    images, roi, probs = images_of(), roi_of(), probs_of()
    grid = contrast_grid(images, roi)
    labels = torch.randint(0, C, (2, 4, 5), generator=torch.Generator().manual_seed(7))
    edges = mean_cost(images, roi, 8, lambda b, p, q: labels[b, *p] != labels[b, *q])
    unary = [
        np.mean([-math.log(probs[b, labels[b, r, c], r, c]) for r, c in roi[b].nonzero().tolist()]) for b in range(2)
    ]
    expected = 0.3 * torch.tensor(unary) + 20 * edges
    given = torch.where(roi, labels, 255).to(torch.uint8)
    torch.testing.assert_close(proposal_energy(given, probs.log(), grid, 0.3, 20.0), expected)


def test_an_empty_region():
    roi = torch.zeros(2, 4, 5, dtype=torch.bool)
    roi[1, 2, 3] = True  # a single pixel has no pair
    grid, probs = contrast_grid(images_of(), roi), probs_of().requires_grad_()
    assert grid.pairs.tolist() == [0, 0]
    for form in RELAXATIONS:
        loss = relaxed_potts(probs, grid, form).mean()
        assert loss.item() == 0
        assert torch.autograd.grad(loss, probs)[0].abs().max() == 0
    log_probs = probs.detach().log()
    energy = proposal_energy(torch.ones(2, 4, 5, dtype=torch.int64), log_probs, grid)
    assert energy.tolist() == [0, pytest.approx(-0.1 * log_probs[1, 1, 2, 3].item())]


def test_bad_names_and_numbers():
    with pytest.raises(ValueError, match="neighbours is 6; it must be 4 or 8"):
        contrast_grid(images_of(), neighbours=6)
    with pytest.raises(ValueError, match="form is 'squared'; it must be one of bilinear, quadratic, tv"):
        relaxed_potts(probs_of(), contrast_grid(images_of()), "squared")


def test_problems_are_copies_of_each_image():
    images, roi, log_probs = images_of(), roi_of(), probs_of().log()
    scribbles = torch.full((2, 4, 5), 255, dtype=torch.uint8)
    scribbles[1, 2] = 1
    grid = contrast_grid(images, roi, 4)
    first, second = problems(log_probs.bfloat16(), grid, scribbles, starts=scribbles // 2, names=["one", "two"])
    assert (first.name, second.name) == ("one", "two")
    assert second.log_probs.dtype == np.float32 and second.log_probs.shape == (C, 4, 5)
    assert [weight.shape for weight in second.weights] == [(4, 4), (3, 5)]
    np.testing.assert_array_equal(second.weights[1], grid.weights[1][1].numpy())
    np.testing.assert_array_equal(second.roi, roi[1].numpy())
    np.testing.assert_array_equal(second.start, scribbles[1].numpy() // 2)
    scribbles.zero_()
    assert second.scribbles[2, 0] == 1
    assert [problem.name for problem in problems(log_probs, grid, scribbles)] == ["0", "1"]
    assert problems(log_probs, grid, scribbles)[0].start is None
