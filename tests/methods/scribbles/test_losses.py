"""Losses against closed forms, torch's cross-entropy, loops, and at the ends of epsilon."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from repro.methods.scribbles.common import (
    outlier_model,
    partial_cross_entropy,
    pixel_loss,
    proposal_losses,
    rescaled_epsilon,
    robust_surprise,
)


def sample(seed=0, batch=2, classes=4, side=5, scale=3.0, dtype=torch.float64):
    """Logits, scribbles with 254 and 255, proposals with 255."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, side, side, generator=generator, dtype=torch.float64)
    scribbles = torch.full((batch, side, side), 255, dtype=torch.uint8)
    scribbles[:, 1, 1:4] = torch.arange(3, dtype=torch.uint8)
    scribbles[0, 0, 0] = classes - 1
    scribbles[-1, -1] = 254
    proposals = torch.randint(classes, scribbles.shape, generator=generator, dtype=torch.uint8)
    proposals = torch.where(scribbles < classes, scribbles, proposals)
    proposals[-1, -1], proposals[0, 3, 3] = 255, 255
    return logits.to(dtype), scribbles, proposals


def closed_form(logits, labels, epsilon):
    """-log(a + b s_x) of every pixel, from the probabilities themselves."""
    classes = logits.shape[1]
    a, b = epsilon / (classes - 1), 1 - classes * epsilon / (classes - 1)
    probs = logits.double().softmax(1)
    shown = torch.zeros(labels.shape, dtype=torch.float64)
    for at in torch.nonzero(labels < classes).tolist():
        n, i, j = at
        shown[n, i, j] = -torch.log(a + b * probs[n, int(labels[n, i, j]), i, j])
    return shown


# The outlier model


@pytest.mark.parametrize(
    ("epsilon", "a", "b", "slope", "span"),
    [
        (0.9440, 0.047200, 0.008800, 0.1864, 0.1710),
        (0.9460, 0.047300, 0.006700, 0.1416, 0.1325),
        (0.9514, 0.047570, 0.001030, 0.0217, 0.0214),
        (0.9516, 0.047580, 0.000820, 0.0172, 0.0171),
        (0.9522, 0.047610, 0.000190, 0.0040, 0.0040),
    ],
)
def test_the_model_of_published_values(epsilon, a, b, slope, span):
    found = outlier_model(epsilon, 21)
    assert found == pytest.approx((a, b), abs=5e-7)
    assert found[1] / found[0] == pytest.approx(slope, abs=5e-5)
    ends = robust_surprise(torch.tensor([-200.0, 0.0], dtype=torch.float64), epsilon, 21)
    assert (ends[0] - ends[1]).item() == pytest.approx(span, abs=5e-5)


@pytest.mark.parametrize("classes", [2, 3, 6, 21])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99, 1.0])
def test_the_model_is_a_distribution_over_labels(classes, share):
    a, b = outlier_model(share * ((classes - 1) / classes), classes)
    probs = torch.randn(classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(0)
    assert (a + b * probs).sum().item() == pytest.approx(1) and a >= 0 and b >= 0
    assert b == (1 if share == 0 else 0) if share in (0.0, 1.0) else 0 < b < 1


def test_epsilon_of_other_numbers_of_classes_keeps_the_slope():
    assert rescaled_epsilon(0.9440, 21, 4) == pytest.approx(0.7166, abs=5e-5)  # of the specification
    for classes in (2, 3, 6, 30):
        for epsilon in (0.1, 0.9440, 0.9522):
            (a, b), (a2, b2) = (
                outlier_model(epsilon, 21), outlier_model(rescaled_epsilon(epsilon, 21, classes), classes),
            )  # fmt: skip
            assert b2 / a2 == pytest.approx(b / a, rel=1e-9)
        back = rescaled_epsilon(rescaled_epsilon(0.9460, 21, classes), classes, 21)
        assert back == pytest.approx(0.9460, rel=1e-12)
        assert rescaled_epsilon(0.0, 21, classes) == 0
        at_end = rescaled_epsilon(20 / 21, 21, classes)
        assert at_end == pytest.approx((classes - 1) / classes) and outlier_model(at_end, classes)[1] < 1e-12
    assert rescaled_epsilon(0.9440) == 0.9440


def test_what_is_not_an_outlier_probability_is_refused():
    for epsilon, classes in ((-0.1, 3), (0.67, 3), (0.9440, 6), (1.0, 21), (float("nan"), 3)):
        with pytest.raises(ValueError, match=r"epsilon is .* must lie in \[0, .*rescaled_epsilon"):
            outlier_model(epsilon, classes)
    with pytest.raises(ValueError, match="classes is 1"):
        outlier_model(0.0, 1)
    with pytest.raises(ValueError, match="to_classes is 1"):
        rescaled_epsilon(0.5, 21, 1)


# One pixel


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 0.2, 0.6, 0.749, 0.75])
def test_the_robust_loss_and_its_gradient_are_the_closed_forms(epsilon):
    logits, _, labels = sample()
    logits.requires_grad_()
    loss = pixel_loss(logits.log_softmax(1), labels, epsilon)
    torch.testing.assert_close(loss, closed_form(logits, labels, epsilon))
    (found,) = torch.autograd.grad(loss.sum(), logits)
    a, b = epsilon / 3, 1 - 4 * epsilon / 3
    probs = logits.detach().softmax(1)
    expected = torch.zeros_like(found)
    for n, i, j in torch.nonzero(labels < 4).tolist():
        s = probs[n, :, i, j]
        x = int(labels[n, i, j])
        one = F.one_hot(torch.tensor(x), 4)
        expected[n, :, i, j] = -(b * s[x] / (a + b * s[x])) * (one - s)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_those_of_differences():
    logits, scribbles, proposals = sample()
    logits.requires_grad_()
    for epsilon, soften in ((0.0, 0.0), (0.6, 0.0), (0.6, 0.3)):
        assert gradcheck(lambda z: torch.stack(proposal_losses(z, scribbles, proposals, epsilon, soften)), logits)  # noqa: B023
    assert gradcheck(lambda z: partial_cross_entropy(z, scribbles), logits)


def test_epsilon_zero_is_cross_entropy_exactly():
    logits, _, labels = sample(dtype=torch.float32, scale=30.0)
    logits.requires_grad_()
    whole = torch.where(labels < 4, labels.long(), -1)
    expected = F.cross_entropy(logits, whole, ignore_index=-1, reduction="none")
    loss = pixel_loss(logits.log_softmax(1), labels)
    assert torch.equal(loss, expected)
    (found,), (wanted,) = (torch.autograd.grad(part.sum(), logits) for part in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_largest_epsilon_is_a_constant_without_gradient():
    for classes in (2, 3, 4, 7, 21):
        logits, _, labels = sample(classes=classes, dtype=torch.float32)
        logits.requires_grad_()
        loss = pixel_loss(logits.log_softmax(1), labels, (classes - 1) / classes)
        known = labels < classes
        torch.testing.assert_close(loss[known], torch.full_like(loss[known], math.log(classes)))
        assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.749, 0.75])
def test_half_precision_and_confident_errors_stay_finite(dtype, epsilon):
    logits, scribbles, proposals = sample(dtype=dtype, scale=100.0)
    logits.requires_grad_()
    seeds, others = proposal_losses(logits, scribbles, proposals, epsilon)
    assert seeds.dtype == others.dtype == torch.float32
    exact = [part.item() for part in proposal_losses(logits.detach().double(), scribbles, proposals, epsilon)]
    assert [seeds.item(), others.item()] == pytest.approx(exact, rel=1e-5)
    (gradient,) = torch.autograd.grad(seeds + others, logits)
    assert gradient.isfinite().all() and gradient.dtype == dtype


def test_a_confident_network_ignores_a_contradicting_proposal():
    """Redescending: the gradient rises and falls again with the margin, where cross-entropy's stays."""
    margin = torch.tensor([0.0, 4.0, 30.0, 300.0])
    logits = torch.zeros(1, 2, 1, 4)
    logits[0, 1, 0] = margin
    logits.requires_grad_()
    labels = torch.zeros(1, 1, 4, dtype=torch.uint8)
    robust, plain = (
        torch.autograd.grad(pixel_loss(logits.log_softmax(1), labels, e).sum(), logits)[0][0, 0, 0].abs()
        for e in (0.2, 0.0)
    )
    assert robust[0] > robust[1] > robust[2] and robust[2] < 1e-11 and robust[3] == 0
    assert (plain.diff() >= 0).all() and plain[3] == 1


def test_soft_proposals_are_label_smoothing():
    logits, _, labels = sample()
    log_probs = logits.log_softmax(1)
    whole = torch.where(labels < 4, labels.long(), -1)
    expected = F.cross_entropy(logits, whole, ignore_index=-1, reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(pixel_loss(log_probs, labels, 0.0, 0.3), expected)
    robust = torch.zeros_like(expected)
    for k in range(4):
        share = 0.7 * (labels == k) + 0.3 / 4
        robust += share * closed_form(logits, torch.full_like(labels, k), 0.6)
    robust[labels >= 4] = 0
    torch.testing.assert_close(pixel_loss(log_probs, labels, 0.6, 0.3), robust)


# Sums over a batch


def test_partial_cross_entropy_is_torchs_over_the_batch():
    logits, scribbles, _ = sample(batch=3)
    target = scribbles.long().masked_fill(scribbles == 254, 255)
    expected = F.cross_entropy(logits, target, ignore_index=255) / 3
    assert partial_cross_entropy(logits, scribbles).item() == pytest.approx(expected.item(), rel=1e-12)
    other = logits.clone().masked_fill((scribbles >= 4)[:, None], 7.0)
    assert partial_cross_entropy(other, scribbles).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.6])
def test_both_parts_are_sums_by_loops_over_the_seeds(epsilon):
    logits, scribbles, proposals = sample(batch=3)
    count = sum(1 for label in scribbles.flatten().tolist() if label < 4)
    on_seeds = on_others = 0.0
    seed_loss, robust = closed_form(logits, scribbles, 0.0), closed_form(logits, proposals, epsilon)
    for n in range(3):
        for i in range(5):
            for j in range(5):
                if scribbles[n, i, j] < 4:
                    on_seeds += seed_loss[n, i, j].item()
                elif proposals[n, i, j] != 255:
                    on_others += robust[n, i, j].item()
    seeds, others = proposal_losses(logits, scribbles, proposals, epsilon)
    assert seeds.item() == pytest.approx(on_seeds / count / 3) and others.item() == pytest.approx(on_others / count / 3)
    assert seeds.item() == pytest.approx(partial_cross_entropy(logits, scribbles).item())
    wrong = torch.where(scribbles < 4, 3 - scribbles, proposals)  # a proposal on a seed is not read
    assert proposal_losses(logits, scribbles, wrong, epsilon)[1].item() == others.item()


def test_without_a_seed_nothing_is_learnt_and_nothing_is_nan():
    logits, scribbles, proposals = sample()
    logits.requires_grad_()
    for value in (255, 254):
        none = torch.full_like(scribbles, value)
        seeds, others = proposal_losses(logits, none, proposals, 0.6)
        single = partial_cross_entropy(logits, none)
        assert seeds.item() == others.item() == single.item() == 0
        assert (torch.autograd.grad(seeds + others + single, logits)[0] == 0).all()
    ignored = torch.full_like(proposals, 255)
    seeds, others = proposal_losses(logits, scribbles, ignored, 0.6)
    assert others.item() == 0 and seeds.item() > 0
