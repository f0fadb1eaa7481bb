"""Contrasts and prototypes against loops written from the equations, sequences and finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro.methods.image_tags.common import cosines, patch_contrast
from repro.methods.image_tags.pcre import class_contrast, prototype_cam, updated_prototypes
from repro.methods.image_tags.toco import crop_contrast

B, N, C, D = 3, 6, 4, 5


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels_of(seed, shown=0.6):
    """Label maps of a grid of 2 x 3 with background, classes and ignored patches, and tags."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C + 1, (B, 2, 3), generator=generator)
    labels[torch.rand(B, 2, 3, generator=generator) < 0.25] = 255
    return labels, (torch.rand(B, C, generator=generator) < shown).float()


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def contrast(alike, apart):
    """The loss from the lists of similarities of both kinds of pairs."""
    return 0.5 * (1 - sum(alike) / (len(alike) + 1)) + 0.5 * sum(apart) / (len(apart) + 1)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_patch_contrast_is_the_loop(seed):
    patches, (labels, _) = normal(seed, B, N, D), labels_of(seed)
    alike, apart = [], []
    for vectors, marks in zip(patches.tolist(), labels.flatten(1).tolist(), strict=True):
        for i in range(N):
            for j in range(N):
                if i != j and 255 not in (marks[i], marks[j]):
                    (alike if marks[i] == marks[j] else apart).append(abs(cosine(vectors[i], vectors[j])))
    assert patch_contrast(patches, labels).item() == pytest.approx(contrast(alike, apart), rel=1e-12)


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_class_contrast_is_the_loop(seed):
    patches, tokens, (labels, tags) = normal(seed, B, N, D), normal(seed + 1, B, C, D), labels_of(seed)
    alike, apart = [], []
    for image, marks in enumerate(labels.flatten(1).tolist()):
        for c in range(C):
            for n in range(N):
                if tags[image, c] and marks[n] != 255:
                    value = abs(cosine(tokens[image, c].tolist(), patches[image, n].tolist()))
                    (alike if marks[n] == c + 1 else apart).append(value)
    expected = pytest.approx(contrast(alike, apart), rel=1e-12)
    assert class_contrast(tokens, patches, labels, tags).item() == expected
    assert class_contrast(tokens, patches, labels.to(torch.uint8), tags).item() == expected


def test_contrasts_by_hand():
    # two patches of class 1 at 60 degrees, one of the background at 90 degrees to the first
    patches = torch.tensor([[[2.0, 0.0], [1.0, math.sqrt(3)], [0.0, -1.0]]])
    labels = torch.tensor([[1, 1, 0]])
    high = math.sqrt(3) / 2
    assert patch_contrast(patches, labels).item() == pytest.approx(0.5 * (1 - 2 * 0.5 / 3) + 0.5 * 2 * high / 5)
    tokens = torch.tensor([[[1.0, 0.0], [7.0, 7.0]]])
    value = class_contrast(tokens, patches, labels, torch.tensor([[1, 0]])).item()
    assert value == pytest.approx(0.5 * (1 - 1.5 / 3))


@pytest.mark.parametrize("ignored", [False, True])
def test_contrasts_without_pairs_are_a_half(ignored):
    patches, tokens = normal(0, B, N, D).requires_grad_(), normal(1, B, C, D).requires_grad_()
    labels, tags = labels_of(0)
    if ignored:
        labels = torch.full_like(labels, 255)
        losses = [patch_contrast(patches, labels), class_contrast(tokens, patches, labels, tags)]
    else:
        losses = [patch_contrast(patches[:, :1], labels[:, 0, :1])]
        losses += [class_contrast(tokens, patches, labels, torch.zeros_like(tags))]
    assert [loss.item() for loss in losses] == [0.5, 0.5]
    sum(losses).backward()
    assert not patches.grad.any() and not tokens.grad.any()


def test_gradients_of_the_contrasts():
    patches, tokens = normal(2, B, N, D).requires_grad_(), normal(3, B, C, D).requires_grad_()
    labels, tags = labels_of(4)
    assert torch.autograd.gradcheck(lambda x: patch_contrast(x, labels), patches)
    assert torch.autograd.gradcheck(lambda z: class_contrast(z, patches, labels, tags), tokens)
    class_contrast(tokens, patches, labels, tags).backward()
    assert patches.grad is None and tokens.grad[tags > 0].any() and not tokens.grad[tags == 0].any()


def test_cosines_of_a_zero_vector_and_in_half_precision():
    vectors = normal(5, 2, 3, 4)
    vectors[0, 0] = 0
    found = cosines(vectors, vectors)
    assert not found[0, 0].any() and not found[0, :, 0].any()
    torch.testing.assert_close(found[1].diagonal(), torch.ones(3, dtype=torch.float64))
    half = cosines(vectors.half(), vectors.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), found, atol=2e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosines(vectors.float(), vectors.float()), cosines(*[vectors.float()] * 2).float())
        assert cosines(vectors.float(), vectors.float()).dtype == torch.float32


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
@settings(max_examples=25, deadline=None)
def test_prototypes_are_updated_image_by_image(seed, momentum):
    prototypes, tokens, tags = normal(seed, C, D), normal(seed + 1, 5, C, D), (normal(seed + 2, 5, C) > -0.3).float()
    tags[:, 0] = 0  # a class that nobody shows
    expected = prototypes.clone()
    for image in range(5):
        for c in range(C):
            if tags[image, c]:
                expected[c] = expected[c] * momentum + (1 - momentum) * tokens[image, c]
    expected = expected / expected.square().sum(1, keepdim=True).sqrt()
    updated = updated_prototypes(prototypes, tokens, tags, momentum)
    torch.testing.assert_close(updated, expected, rtol=1e-12, atol=1e-13)


def test_order_of_the_batch_matters_to_the_prototypes():
    prototypes, tokens, tags = normal(0, C, D), normal(1, 2, C, D), torch.ones(2, C)
    updated = [updated_prototypes(prototypes, part, tags, 0.5) for part in (tokens, tokens.flip(0))]
    expected = prototypes / 4 + tokens[0] / 4 + tokens[1] / 2
    torch.testing.assert_close(updated[0], expected / expected.norm(dim=1, keepdim=True))
    assert not torch.allclose(*updated)


def test_prototypes_keep_their_type_and_have_no_gradient():
    tokens = normal(1, 2, C, D).float().requires_grad_()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        updated = updated_prototypes(normal(0, C, D).to(dtype), tokens, torch.ones(2, C))
        assert updated.dtype == dtype and not updated.requires_grad
        torch.testing.assert_close(updated.float().norm(dim=1), torch.ones(C), atol=5e-3, rtol=0)


def test_prototype_cam_by_hand():
    patches = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]])
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    half = math.sqrt(0.5)
    cam = prototype_cam(patches, prototypes, (2, 2))
    torch.testing.assert_close(cam, torch.tensor([[[[1, 0], [1, half]], [[0, 1], [0, half]]]]))
    signed = prototype_cam(patches, prototypes, (2, 2), absolute=False)
    assert signed[0, 0, 1, 0] == -1
    torch.testing.assert_close(signed.abs(), cam)
    torch.testing.assert_close(prototype_cam(patches, prototypes.expand(1, 2, 2), (2, 2)), cam)


def slow_crop_contrast(student, teacher, positive, temperature):
    """The loss of released form, by loops and with exponentials."""
    total = 0.0
    for s, t, flags in zip(student.tolist(), teacher.tolist(), positive.tolist(), strict=True):
        loss = 0.0
        for view in t:
            values = [math.exp(sum(a * b for a, b in zip(view, crop, strict=True)) / temperature) for crop in s]
            negatives = sum(value for value, flag in zip(values, flags, strict=True) if not flag)
            for value, flag in zip(values, flags, strict=True):
                if flag:
                    loss -= math.log(value / (value + negatives + 1e-4))
            loss -= math.log(1 / (1 + negatives + 1e-4))
        total += loss / 2 / (sum(flags) + 1e-4)
    return total / len(student)


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0]))
@settings(max_examples=15, deadline=None)
def test_crop_contrast_is_the_loop(seed, temperature):
    student, teacher = normal(seed, B, 6, D), normal(seed + 1, B, 2, D)
    positive = normal(seed + 2, B, 6) > 0
    positive[:, :2] = True
    positive[0] = True  # no negative at all
    positive[1, 2:] = False  # no positive crop
    value = crop_contrast(student, teacher, positive, temperature).item()
    assert value == pytest.approx(slow_crop_contrast(student, teacher, positive, temperature), rel=1e-10)


def test_crop_contrast_does_not_overflow_and_leaves_the_teacher_alone():
    student, teacher = (30 * normal(seed, B, size, D) for seed, size in ((0, 5), (1, 2)))
    positive = torch.tensor([True, True, True, False, False]).expand(B, -1)
    student.requires_grad_(), teacher.requires_grad_()
    loss = crop_contrast(student.float(), teacher.float(), positive)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad is None
    small = normal(2, B, 5, D).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: crop_contrast(s, teacher / 30, positive), small)
    no_negative = torch.ones_like(positive)
    assert torch.autograd.gradcheck(lambda s: crop_contrast(s, teacher / 30, no_negative), small)
