"""Segmentation metrics against torchmetrics, brute force and cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from repro.measure.segmentation import (  # fmt: skip
    SegmentationSums,
    boundary_f,
    boundary_iou,
    boundary_matches,
    boundary_overlap,
    combined,
    confusion,
    evaluate,
    iou,
    mean_iou,
    pixel_accuracy,
    pixels_of,
    scale_logits,
    sliding_window,
    whole_image,
)

K = 4


def maps(seed, batch=3, size=(21, 17), classes=K, ignored=0.1):
    """Blocky truth with ignored pixels and a prediction that is mostly the truth."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (batch, -(-size[0] // 4), -(-size[1] // 4)))
    truth = coarse.repeat(4, 1).repeat(4, 2)[:, : size[0], : size[1]]
    predicted = np.where(rng.random(truth.shape) < 0.2, rng.integers(0, classes, truth.shape), truth)
    truth = np.where(rng.random(truth.shape) < ignored, 255, truth)
    return torch.from_numpy(truth.astype(np.uint8)), torch.from_numpy(predicted)


def scores_of(predicted, classes=K, seed=0, dtype=torch.float32):
    """Probabilities (B, K, H, W) whose argmax is `predicted`."""
    noise = torch.rand(len(predicted), classes, *predicted.shape[1:], generator=torch.Generator().manual_seed(seed))
    noise.scatter_(1, predicted.long()[:, None], 1.0 + noise.gather(1, predicted.long()[:, None]))
    return noise.softmax(1).to(dtype)


def test_confusion_counts_by_hand_and_by_image():
    truth = torch.tensor([[[0, 0], [1, 255]], [[2, 2], [2, 2]]])
    predicted = torch.tensor([[[0, 1], [1, 1]], [[2, 0], [2, 1]]])
    counts = confusion(truth, predicted, 3)
    assert counts.tolist() == [[[1, 1, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [1, 1, 2]]]
    total = counts.sum(0)
    assert iou(total).tolist() == [1 / 3, 1 / 3, 2 / 4]
    assert mean_iou(total).item() == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert pixel_accuracy(total).item() == 4 / 7


@given(st.integers(0, 10**6), st.sampled_from([torch.uint8, torch.int64]))
@settings(max_examples=20, deadline=None)
def test_confusion_is_brute_force(seed, dtype):
    truth, predicted = maps(seed, ignored=0.3)
    counts = torch.zeros(len(truth), K, K, dtype=torch.int64)
    for image, (rows, columns) in enumerate(zip(truth.flatten(1).tolist(), predicted.flatten(1).tolist(), strict=True)):
        for t, p in zip(rows, columns, strict=True):
            if t != 255:
                counts[image, t, p] += 1
    assert torch.equal(confusion(truth.to(dtype), predicted.to(dtype), K), counts)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_iou_equals_torchmetrics(ignored):
    truth, predicted = maps(1, ignored=ignored)
    counts = confusion(truth, predicted, K).sum(0)
    expected = MulticlassJaccardIndex(K, average="none", ignore_index=255)(predicted, truth.long())
    torch.testing.assert_close(iou(counts), expected.double(), rtol=1e-6, atol=1e-7)
    mean = MulticlassJaccardIndex(K, average="macro", ignore_index=255)(predicted, truth.long())
    assert mean_iou(counts).item() == pytest.approx(mean.item(), rel=1e-6)


def test_absent_classes_count_as_zero_or_not_at_all():
    truth = torch.tensor([[[0, 0, 1, 1]]])
    counts = confusion(truth, truth, 4).sum(0)
    assert iou(counts)[:2].tolist() == [1, 1] and iou(counts)[2:].isnan().all()
    assert mean_iou(counts).item() == 0.5 and mean_iou(counts, "skip").item() == 1
    falsely = confusion(truth, torch.tensor([[[0, 0, 1, 2]]]), 4).sum(0)
    assert iou(falsely)[:3].tolist() == [1, 0.5, 0]  # predicted but never true: 0, not absent
    assert mean_iou(falsely, "skip").item() == 0.5
    with pytest.raises(ValueError, match="absent is 'none'"):
        mean_iou(counts, "none")


def band(mask, width):
    """The band of one mask in the way of Cheng et al.: the mask less its erosion, outside the image is background."""
    return mask & ~ndimage.binary_erosion(mask, np.ones((2 * width + 1,) * 2), border_value=0)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("ignored", [0.0, 0.05])
def test_boundary_iou_is_brute_force(width, ignored):
    truth, predicted = maps(2, size=(33, 26), ignored=ignored)
    expected = np.zeros((3, K), int)
    for t, p in zip(truth.numpy(), predicted.numpy(), strict=True):
        p = np.where(t == 255, 255, p)
        for k in range(K):
            bands = band(t == k, width), band(p == k, width)
            expected[:, k] += [(bands[0] & bands[1]).sum(), bands[0].sum(), bands[1].sum()]
    overlap = boundary_overlap(truth, predicted, K, width)
    assert overlap.tolist() == expected.tolist()
    both, one, other = expected
    np.testing.assert_allclose(boundary_iou(overlap), both / (one + other - both))


@pytest.mark.parametrize("tolerance", [1, 3])
@pytest.mark.parametrize("ignored", [0.0, 0.05])
def test_boundary_f_is_brute_force(tolerance, ignored):
    truth, predicted = maps(3, size=(33, 26), ignored=ignored)
    expected = np.zeros((4, K), int)
    for t, p in zip(truth.numpy(), predicted.numpy(), strict=True):
        p = np.where(t == 255, 255, p)
        edges = []
        for labels in (p, t):
            neighbours = np.stack([np.roll(np.pad(labels, 1, mode="edge"), shift, (0, 1))[1:-1, 1:-1]
                                   for shift in np.ndindex(3, 3) for shift in [np.subtract(shift, 1)]])  # fmt: skip
            edges.append((neighbours != labels).any(0))
        for k in range(K):
            contours = [edge & (labels == k) for edge, labels in zip(edges, (p, t), strict=True)]
            for row, (one, other) in enumerate([contours, contours[::-1]]):
                near = np.zeros_like(one)
                for y, x in zip(*np.nonzero(other), strict=True):
                    near[max(0, y - tolerance) : y + tolerance + 1, max(0, x - tolerance) : x + tolerance + 1] = True
                expected[2 * row : 2 * row + 2, k] += [(one & near).sum(), one.sum()]
    matches = boundary_matches(truth, predicted, K, tolerance)
    assert matches.tolist() == expected.tolist()
    precision, recall = expected[0] / expected[1], expected[2] / expected[3]
    np.testing.assert_allclose(boundary_f(matches), 2 * precision * recall / (precision + recall))


def test_boundaries_by_hand():
    """A 6 x 6 square of class 1 in the middle of 12 x 12, predicted one pixel to the right."""
    truth = torch.zeros(1, 12, 12, dtype=torch.int64)
    truth[:, 3:9, 3:9] = 1
    predicted = truth.roll(1, 2)
    overlap = boundary_overlap(truth, predicted, 2, width=1)
    assert overlap[:, 1].tolist() == [10, 20, 20]  # two rings of 20; they share 5 pixels above and 5 below
    assert boundary_iou(overlap)[1].item() == 10 / 30
    matches = boundary_matches(truth, predicted, 2, tolerance=1)
    assert boundary_f(matches)[1].item() == 1
    far = boundary_matches(truth, truth.roll(3, 2), 2, tolerance=1)
    # Of the prediction's rows 4 + 4 pixels are near the truth's, of its left side the first and the last; its right
    # side lies at the image's edge and is no contour. Of the truth the same numbers, at its right side.
    assert far[:, 1].tolist() == [10, 16, 10, 20]
    assert boundary_f(far)[1].item() == pytest.approx(2 * 10 / (16 + 20))


def test_perfect_predictions_and_classes_without_boundaries():
    truth, _ = maps(4)
    sums = SegmentationSums(K + 1)
    sums.add(scores_of(truth.long().clamp(max=K), K + 1), truth)
    report = sums.read()
    assert report["boundary_iou"] == report["boundary_f"] == report["miou_present"] == report["pixel_accuracy"] == 1
    assert report["miou"] == pytest.approx(K / (K + 1))
    assert report["iou"][K] is report["boundary_f_by_class"][K] is report["boundary_iou_by_class"][K] is None
    one = torch.zeros(1, 9, 9, dtype=torch.int64)  # one class: a band along the edge, and no contour
    assert boundary_overlap(one, one, 1, width=2)[:, 0].tolist() == [56, 56, 56]
    assert boundary_f(boundary_matches(one, one, 1)).isnan().all()


def test_widths_follow_the_diagonal():
    assert pixels_of(0.02, (64, 64)) == 2 and pixels_of(0.02, (375, 500)) == 12 and pixels_of(0.0075, (8, 8)) == 1
    truth, predicted = maps(5, size=(64, 64))
    assert torch.equal(boundary_overlap(truth, predicted, K), boundary_overlap(truth, predicted, K, 2))
    with pytest.raises(ValueError, match="boundary of 0 pixels"):
        boundary_matches(truth, predicted, K, 0)


def test_sums_over_batches_are_the_sums_of_the_set():
    truth, predicted = maps(6, batch=7)
    scores = scores_of(predicted)
    whole, parts = SegmentationSums(K), SegmentationSums(K)
    whole.add(scores, truth)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        parts.add(scores[part], truth[part])
    expected = whole.read()
    found = parts.read()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "reliability":
            assert found[name]["count"] == value["count"]
        else:
            assert found[name] == (pytest.approx(value) if isinstance(value, float) else value)
    torch.testing.assert_close(torch.tensor(found["confusion"]), confusion(truth, predicted, K).sum(0))
    assert found["pixels"] + found["ignored"] == truth.numel() and found["ignored"] == (truth == 255).sum()
    assert parts.read()["pixels"] == 0  # reading resets


def test_pixel_calibration_equals_torchmetrics():
    truth, predicted = maps(7, ignored=0.2)
    scores = scores_of(predicted)
    sums = SegmentationSums(K, bins=15)
    sums.add(scores, truth)
    report = sums.read()
    seen = truth != 255
    rows = scores.permute(0, 2, 3, 1)[seen]
    expected = MulticlassCalibrationError(K, n_bins=15, norm="l1")(rows, truth[seen].long())
    assert report["ece"] == pytest.approx(expected.item(), abs=1e-5)
    assert report["pixel_confidence"] == pytest.approx(rows.max(1).values.double().mean().item())
    bins = report["reliability"]
    columns = zip(*(bins[key] for key in ("count", "accuracy", "confidence")), strict=True)
    gaps = [count * abs(right - sure) for count, right, sure in columns if count]
    assert sum(gaps) / report["pixels"] == pytest.approx(report["ece"])


def test_confidence_is_a_share_of_summed_scores():
    truth, predicted = maps(8)
    once, thrice = SegmentationSums(K), SegmentationSums(K)
    once.add(scores_of(predicted), truth)
    thrice.add(3 * scores_of(predicted), truth)
    first, second = once.read(), thrice.read()
    assert second["ece"] == pytest.approx(first["ece"]) and second["confusion"] == first["confusion"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_lose_no_pixel(dtype):
    truth = torch.zeros(2, 300, 300, dtype=torch.uint8)  # 180 000 pixels: more than half precision can count
    scores = torch.full((2, 2, 300, 300), 0.25, dtype=dtype)
    scores[:, 0] = 0.75
    sums = SegmentationSums(2)
    sums.add(scores, truth)
    report = sums.read()
    assert report["confusion"] == [[180_000, 0], [0, 0]] and report["reliability"]["count"][11] == 180_000
    assert report["pixel_confidence"] == pytest.approx(0.75) and report["ece"] == pytest.approx(0.25)


def test_all_ignored_reports_nothing():
    sums = SegmentationSums(3)
    sums.add(torch.rand(2, 3, 8, 8), torch.full((2, 8, 8), 255))
    report = sums.read()
    assert report["pixels"] == 0 and report["ignored"] == 128
    names = ("miou", "miou_present", "pixel_accuracy", "mean_class_accuracy", "boundary_iou", "boundary_f", "ece")
    assert all(report[name] is None for name in names) and report["iou"] == [None] * 3


def test_labels_outside_the_classes_are_refused():
    sums = SegmentationSums(3)
    sums.add(torch.rand(1, 3, 2, 2), torch.tensor([[[0, 3], [254, 255]]]))
    with pytest.raises(ValueError, match=r"2 pixels have a label outside 0\.\.2 that is not 255"):
        sums.read()
    with pytest.raises(ValueError, match="classes is 0"):
        SegmentationSums(0)


def test_sums_travel_in_state_dicts():
    truth, predicted = maps(9)
    first, second = SegmentationSums(K), SegmentationSums(K)
    first.add(scores_of(predicted), truth)
    second.load_state_dict(first.state_dict())
    assert second.read() == first.read()


def test_adding_never_waits_for_the_device():
    """A meta tensor has no values: whatever would need one on the host (and synchronise on CUDA) raises."""
    truth, predicted = maps(10)
    sums = SegmentationSums(K).to("meta")
    sums.add(scores_of(predicted).to("meta"), truth.to("meta"))
    assert sums.pairs.device.type == "meta"


class Position(nn.Module):
    """Logits that depend on the pixel and on how large the window is, so that windows can be told apart."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(2)

    def forward(self, x):
        height, width = x.shape[2:]
        ramp = torch.arange(height, dtype=x.dtype)[:, None] / height + torch.arange(width, dtype=x.dtype) / width
        return torch.stack([x[:, 0], x[:, 1] + ramp, 0 * x[:, 0] + height - width], 1)


@pytest.mark.parametrize("size, window, stride", [
    ((20, 31), 9, None), ((18, 18), 9, 9), ((7, 12), 9, 4), ((9, 9), 9, 1),
])  # fmt: skip
def test_sliding_window_is_brute_force(size, window, stride):
    images = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = Position().double()
    found = sliding_window(network, images, window, stride)
    stride = stride or int(window * 2 / 3)
    expected, row = torch.zeros(2, 3, *size, dtype=torch.float64), 0
    while row < size[0]:
        column = 0
        while column < size[1]:
            bottom, right = min(size[0], row + window), min(size[1], column + window)
            seen = network(images[:, :, row:bottom, column:right]).softmax(1)
            expected[:, :, row:bottom, column:right] += seen
            column += stride
        row += stride
    torch.testing.assert_close(found, expected)
    covered = found.sum(1)
    assert covered.min() >= 1 - 1e-9 and (covered - covered.round()).abs().max() < 1e-9  # summed, not averaged


def test_cityscapes_windows():
    """Windows of 801 at multiples of 534: 2 x 4 of them on 1024 x 2048, the last ones cut."""
    sizes = []
    network = nn.Module()
    network.forward = lambda x: sizes.append(tuple(x.shape[2:])) or x
    with torch.device("meta"):
        sliding_window(network, torch.zeros(1, 2, 1024, 2048), 801)
    assert sizes == [(h, w) for h in (801, 490) for w in (801, 801, 801, 446)]


@pytest.mark.parametrize("window, stride", [(0, None), (1, None), (8, 9), (8, 0)])
def test_windows_that_leave_gaps_are_refused(window, stride):
    with pytest.raises(ValueError, match="1 <= stride <= window"):
        sliding_window(Position(), torch.zeros(1, 2, 8, 8), window, stride)


def test_whole_image_scores_are_float32_of_half_networks():
    scores = whole_image(nn.Conv2d(2, 3, 1).bfloat16(), torch.randn(1, 2, 4, 4, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32 and (scores.sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("window", [None, 6])
def test_evaluate_equals_its_parts_and_restores_modes(window):
    generator = torch.Generator().manual_seed(0)
    sizes = [(10, 12), (8, 9)]  # of whole images, they may differ
    batches = [(torch.randn(2, 2, *size, generator=generator), torch.randint(0, 3, (2, *size), generator=generator))
               for size in sizes]  # fmt: skip
    network = Position().train()
    network.batch_norm.eval()
    report = evaluate(network, iter(batches), 3, window=window)
    assert network.training and not network.batch_norm.training
    counts = sum(
        confusion(truth, (network(x) if window is None else sliding_window(network, x, 6)).argmax(1), 3).sum(0)
        for x, truth in batches
    )
    assert report["confusion"] == counts.tolist()
    assert report["miou"] == pytest.approx(mean_iou(counts).item()) and math.isfinite(report["ece"])
    assert "boundary_f" not in evaluate(network, batches, 3, boundaries=False)


def test_evaluate_names_an_empty_set_and_restores_modes_after_an_error():
    network = Position().train()
    with pytest.raises(ValueError, match="`batches` is empty"):
        evaluate(network, [], 3)
    with pytest.raises(RuntimeError):
        evaluate(network, [(torch.randn(1, 2, 4, 4), torch.zeros(1, 5, 5))], 3)
    assert network.training


# Scales and mirror images


class Halving(nn.Module):
    """Logits at half the size, of a convolution that sees left and right differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, K, 3, 2, 1)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("size", [None, (13, 9)])
def test_logits_over_scales_are_those_of_single_passes(size):
    """One image, one scale and one direction at a time, mirrored by a loop over columns."""
    network, images = Halving().eval(), torch.randn(2, 3, 11, 14, generator=torch.Generator().manual_seed(1))
    scales, (height, width) = (1.0, 1.25, 0.5), size or (11, 14)
    found = scale_logits(network, images, scales, size)
    assert found.shape == (3, 2, K, height, width)
    for at, scale in enumerate(scales):
        for b in range(2):
            small = (int(11 * scale), int(14 * scale))
            seen = F.interpolate(images[b : b + 1], small, mode="bilinear", align_corners=False)
            turned = torch.stack([seen[..., small[1] - 1 - column] for column in range(small[1])], -1)
            with torch.no_grad():
                plain, mirrored = (
                    F.interpolate(network(x), (height, width), mode="bilinear", align_corners=False)[0]
                    for x in (seen, turned)
                )
            back = torch.stack([mirrored[..., width - 1 - column] for column in range(width)], -1)
            torch.testing.assert_close(found[at, b], plain + back, rtol=1e-5, atol=1e-6)


def test_logits_of_half_networks_are_summed_in_single_precision():
    network = Halving().bfloat16().eval()
    assert scale_logits(network, torch.randn(1, 3, 8, 8).bfloat16(), (1.0,)).dtype == torch.float32


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_scales_must_be_positive(scales):
    with pytest.raises(ValueError, match="at least one is needed and all must be positive"):
        scale_logits(Halving(), torch.zeros(1, 3, 8, 8), scales)


def test_combining_scales_element_by_element():
    logits = torch.tensor([[1.0, 5.0, -2.0], [4.0, 2.0, -1.0], [4.0, 2.0, -6.0]]).view(3, 1, 3, 1, 1)
    assert combined(logits).flatten().tolist() == [4, 5, -1]
    # means 3, 3, -3 against the first scale's 1, 5, -2
    assert combined(logits, "mean-or-first").flatten().tolist() == [3, 5, -2]
    assert torch.equal(combined(logits[:1], "mean-or-first"), logits[0])
    with pytest.raises(ValueError, match="form is 'mean'; it must be one of 'max', 'mean-or-first'"):
        combined(logits, "mean")
