"""Mean Teacher: squared error against the teacher, ramp, no gradient to it, held batch-norm averages."""

import numpy as np
import pytest
import torch

from repro.methods.few_labels.baselines import MeanTeacher, MeanTeacherSettings
from repro.methods.few_labels.common import squared_error
from tests.methods.few_labels.fakes import (
    CLASSES,
    FakeViews,
    TinyNetwork,
    batch,
    bn_state,
    cross_entropy,
    gradient_reaches,
    now,
    softmax,
    view,
)


def test_squared_error_by_loops_and_gradcheck():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, dtype=torch.float64).softmax(dim=1)
    probs, total = softmax(logits.detach()), 0.0
    for row in range(4):
        for k in range(3):
            total += (probs[row, k] - target[row, k].item()) ** 2
    assert squared_error(logits, target).item() == pytest.approx(total / 12, rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: squared_error(z, target), (logits,))


def test_squared_error_bounds():
    opposite = squared_error(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert opposite.item() == pytest.approx(1.0)
    assert squared_error(torch.zeros(2, 4), torch.full((2, 4), 0.25)).item() == 0


def test_squared_error_leaves_the_target_alone():
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.randn(4, 3, requires_grad=True)
    gradients = torch.autograd.grad(squared_error(logits, target), (logits, target), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None


def build():
    method = MeanTeacher(MeanTeacherSettings(), TinyNetwork(), FakeViews(), CLASSES, 10)
    return method, TinyNetwork(seed=7).eval().requires_grad_(False)


@pytest.mark.parametrize(("step", "ramp"), [(0, 0.0), (200, 0.5), (400, 1.0), (800, 1.0)])
def test_losses_of_a_step(step, ramp):
    (method, teacher), samples = build(), batch()
    losses = method.losses(samples, now(step, 1000, teacher=teacher))
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    # Weak draws in order: labelled, teacher's, student's; teacher and student both use batch statistics.
    target = softmax(TinyNetwork(seed=7).train()(view(unlabelled, 1)).detach())
    student = softmax(TinyNetwork()(view(unlabelled, 2)).detach())
    expected = 50 * ramp * np.mean((student - target) ** 2)
    assert losses.terms["consistency"].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert (expected > 0) == (step > 0)
    assert losses.terms["supervised"].item() == pytest.approx(
        cross_entropy(TinyNetwork()(view(labelled)).detach(), samples["labelled"].labels).mean(), rel=1e-5
    )
    positive = losses.pseudo["positive"]
    assert positive.mask.all() and positive.label.tolist() == target.argmax(1).tolist()
    np.testing.assert_allclose(positive.confidence, target.max(1), rtol=1e-5)


def test_student_learns_teacher_does_not():
    (method, teacher), samples = build(), batch()
    teacher.requires_grad_(True)  # even then
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    term = method.losses(samples, now(teacher=teacher)).terms["consistency"]
    assert gradient_reaches(term, method.network.parameters())
    assert not gradient_reaches(term, teacher.parameters())
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before.items())
    assert not any(module.training for module in teacher.modules())


def test_only_labelled_images_move_the_batch_norm_averages():
    (method, teacher), samples = build(), batch()
    method.losses(samples, now(teacher=teacher))
    reference = TinyNetwork()
    reference(view(samples["labelled"].images))
    for key, value in bn_state(reference).items():
        assert torch.equal(value, bn_state(method.network)[key]), key


def test_consistency_is_not_identically_zero_as_in_usb():
    """USB's bug: student logits read from the teacher's output. Ours differ even for equal weights."""
    method, samples = MeanTeacher(MeanTeacherSettings(), TinyNetwork(), FakeViews(), CLASSES, 10), batch()
    losses = method.losses(samples, now(teacher=TinyNetwork().eval()))
    assert losses.terms["consistency"].item() > 1e-3


def test_published_defaults():
    assert MeanTeacherSettings() == MeanTeacherSettings(unlabelled_weight=50.0, ramp=0.4)
