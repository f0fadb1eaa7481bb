"""CAMs against loops over pixels, direct composition, captum's Grad-CAM and closed forms."""

import itertools
import math

import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from repro.cam import (
    DILATIONS,
    THRESHOLDS,
    attention_rollout,
    cam_labels,
    curve_miou,
    curve_report,
    grad_cam,
    min_max,
    multi_scale_cam,
    over_activation,
    raw_cam,
    refine,
    refined_labels,
    threshold_counts,
)  # fmt: skip
from repro.measure.segmentation import confusion
from repro.models.vit import Layout, ViT

C = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cams(seed=0, batch=3, size=(9, 7), classes=C, dtype=torch.float32, steps=20):
    """Coarsely rounded, so that values meet each other and the thresholds."""
    cam = torch.rand(batch, classes, *size, generator=generator(seed), dtype=torch.float64)
    return ((cam * steps).round() / steps).to(dtype)


def tags_of(seed=0, batch=3, classes=C):
    """The first image shows nothing, the second everything."""
    tags = (torch.rand(batch, classes, generator=generator(seed + 1)) < 0.6).float()
    tags[0], tags[1] = 0, 1
    return tags


def test_raw_cam_is_the_classifier_at_every_patch():
    patches = torch.randn(2, 12, 5, generator=generator())
    weight = torch.randn(C, 5, generator=generator(1))
    cam = raw_cam(patches, weight, (3, 4))
    rows, columns, found = patches.tolist(), weight.tolist(), cam.tolist()
    for b, c, i, j in itertools.product(range(2), range(C), range(3), range(4)):
        expected = sum(columns[c][d] * rows[b][4 * i + j][d] for d in range(5))
        assert found[b][c][i][j] == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(cam, F.conv2d(patches.mT.reshape(2, 5, 3, 4), weight[:, :, None, None]))


def test_min_max_by_hand_and_for_constants():
    cam = torch.tensor([[[[1.0, 3.0], [5.0, 2.0]], [[4.0, 4.0], [4.0, 4.0]], [[-1.0, -2.0], [-1.0, -1.0]]]])
    scaled = min_max(cam)
    torch.testing.assert_close(scaled[0, 0], torch.tensor([[0.0, 2.0], [4.0, 1.0]]) / (4 + 1e-5))
    assert (scaled[0, 1] == 0).all()
    torch.testing.assert_close(scaled[0, 2], torch.tensor([[1.0, 0.0], [1.0, 1.0]]) / (1 + 1e-5))
    assert torch.equal(min_max(cam.half()), scaled) and min_max(torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)) == 0
    assert min_max(cam.double()).dtype == torch.float64


class Filter(nn.Module):
    """Stands for a network: strided, not symmetric, with negative values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, C, 4, stride=4).double()
        nn.init.normal_(self.layer.weight, generator=generator(4))
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.layer(x)


def test_multi_scale_cam_is_its_composition():
    raw = Filter()
    images = torch.randn(2, 3, 23, 31, dtype=torch.float64, generator=generator())
    cam = multi_scale_cam(raw, images, (1, 0.5, 1.5))
    assert raw.seen == [(4, 3, 23, 31), (4, 3, 11, 15), (4, 3, 34, 46)]
    total = torch.zeros(2, C, 23, 31, dtype=torch.float64)
    for size in ((23, 31), (11, 15), (34, 46)):
        x = F.interpolate(images, size, mode="bilinear", align_corners=False)
        plain = F.interpolate(raw.layer(x), (23, 31), mode="bilinear", align_corners=False)
        mirrored = F.interpolate(raw.layer(x.flip(-1)), (23, 31), mode="bilinear", align_corners=False).flip(-1)
        total += torch.maximum(torch.maximum(plain, mirrored), torch.zeros(()))
    for b, c in itertools.product(range(2), range(C)):
        part = total[b, c] - total[b, c].min()
        torch.testing.assert_close(cam[b, c], part / (part.max() + 1e-5))
    assert not cam.requires_grad


def test_mirrored_images_have_mirrored_cams():
    raw, scales = Filter(), (1, 0.5, 1.5)
    images = torch.randn(2, 3, 24, 20, dtype=torch.float64, generator=generator())
    mirrored = multi_scale_cam(raw, images.flip(3), scales)
    torch.testing.assert_close(mirrored, multi_scale_cam(raw, images, scales).flip(3))
    rough = multi_scale_cam(lambda x: raw(x).half(), images, (1, 0.5))
    assert rough.dtype == torch.float32 and (rough - multi_scale_cam(raw, images, (1, 0.5))).abs().max() < 0.01
    for scales in ((), (1, 0)):
        with pytest.raises(ValueError, match="scales are"):
            multi_scale_cam(raw, images, scales)


def label_by_hand(values, tags, low, high):
    """One pixel: values and tags of C classes."""
    best, label = 0.0, 0
    for c, (value, tag) in enumerate(zip(values, tags, strict=True)):
        if tag and value > best:
            best, label = value, c + 1
    if best <= low:
        return 0
    return 255 if high is not None and best <= high else label


@pytest.mark.parametrize("low, high", [(0.5, None), (0.25, 0.7), (0.0, None), ([0.1, 0.5, 0.9], [0.4, 0.5, 1.0])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_labels_are_those_of_a_loop(low, high, dtype):
    cam, tags = cams(3, dtype=dtype), tags_of(3)
    tensors = [torch.tensor(value, dtype=dtype) if isinstance(value, list) else value for value in (low, high)]
    labels = cam_labels(cam, tags, *tensors)
    assert labels.dtype == torch.int64
    for b, i, j in itertools.product(range(3), range(9), range(7)):
        at = [value[b].item() if isinstance(value, torch.Tensor) else value for value in tensors]
        if dtype == torch.float32:
            at = [None if value is None else torch.tensor(value).item() for value in at]
        assert labels[b, i, j] == label_by_hand(cam[b, :, i, j].tolist(), tags[b].tolist(), *at)
    assert (labels[0] == 0).all()  # no tag
    for same in (tags.bool(), tags.long(), tags.double()):
        assert torch.equal(cam_labels(cam, same, *tensors), labels)


def test_pixels_outside_the_image_are_ignored():
    cam, tags = cams(1), tags_of(1)
    valid = torch.rand(3, 9, 7, generator=generator(2)) < 0.6
    valid[2] = False
    labels, plain = cam_labels(cam, tags, 0.25, 0.7, valid), cam_labels(cam, tags, 0.25, 0.7)
    assert torch.equal(labels, torch.where(valid, plain, 255)) and (labels[2] == 255).all()


def refined_by_hand(image, masks, dilations, iterations):
    """Pixel-adaptive refinement of one image (3, H, W) and its masks (P, H, W) in nested loops."""
    _, height, width = image.shape
    steps = [(i, j, d) for d in dilations for i, j in itertools.product((-1, 0, 1), repeat=2) if (i, j) != (0, 0)]
    distance = torch.tensor([d * (math.sqrt(2) if i and j else 1.0) for i, j, d in steps], dtype=image.dtype)
    position = torch.softmax(-((distance / (torch.std(distance) + 1e-8) / 0.3) ** 2), 0)
    weights, places = {}, {}
    for y, x in itertools.product(range(height), range(width)):
        at = [(min(max(y + i * d, 0), height - 1), min(max(x + j * d, 0), width - 1)) for i, j, d in steps]
        colour = torch.zeros(len(steps), dtype=image.dtype)
        for channel in image:
            values = torch.stack([channel[place] for place in at])
            colour -= ((values - channel[y, x]).abs() / (torch.std(values) + 1e-8) / 0.3) ** 2 / len(image)
        weights[y, x], places[y, x] = torch.softmax(colour, 0) + 0.01 * position, at
    for _ in range(iterations):
        new = torch.empty_like(masks)
        for (y, x), at in places.items():
            new[:, y, x] = sum(w * masks[:, i, j] for w, (i, j) in zip(weights[y, x], at, strict=True))
        masks = new
    return masks


@pytest.mark.parametrize("dilations, iterations", [((1,), 1), ((1, 2, 4), 2), (DILATIONS, 1), ((3, 1), 3), ((2,), 0)])
def test_refinement_is_that_of_nested_loops(dilations, iterations):
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, generator=generator())
    images[1, :, :, 2:] = 0.25  # flat regions: no spread among neighbours
    images[1, 0, 1, 4] = 0.75  # and a pixel that differs from neighbours that are all equal
    masks = torch.rand(2, 4, 6, 5, dtype=torch.float64, generator=generator(1))
    refined = refine(images, masks, dilations, iterations)
    for image, mask, found in zip(images, masks, refined, strict=True):
        torch.testing.assert_close(found, refined_by_hand(image, mask, dilations, iterations))


def test_refinement_keeps_constants_and_commutes_with_what_it_should():
    images = torch.rand(3, 3, 12, 10, generator=generator(), dtype=torch.float64)
    masks = torch.rand(3, 2, 12, 10, generator=generator(1), dtype=torch.float64)
    constant = refine(images, torch.full_like(masks, 0.4))
    torch.testing.assert_close(constant, torch.full_like(masks, 0.4 * 1.01**10))
    refined = refine(images, masks)
    torch.testing.assert_close(refine(images, 2 * masks - masks.flip(1)), 2 * refined - refined.flip(1))  # linear
    torch.testing.assert_close(refine(images.mT, masks.mT).mT, refined)
    torch.testing.assert_close(refine(images.flip(2), masks.flip(2)).flip(2), refined)
    torch.testing.assert_close(refine(0.5 * images + 0.1, masks), refined, rtol=1e-5, atol=1e-6)  # contrast
    assert (refined > 0).all() and refined.max() <= 1.01**10


def test_refinement_of_other_sizes_types_and_a_single_pixel():
    images = torch.rand(2, 3, 8, 6, generator=generator())
    masks = torch.rand(2, 2, 4, 3, generator=generator(1))
    grown = F.interpolate(masks, (8, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(refine(images, masks), refine(images, grown))
    rough = refine(images.half(), masks.half())
    assert rough.dtype == torch.float32 and (rough - refine(images, masks)).abs().max() < 0.05
    one = refine(torch.rand(1, 3, 1, 1), torch.full((1, 2, 1, 1), 0.5))
    torch.testing.assert_close(one, torch.full((1, 2, 1, 1), 0.5 * 1.01**10))
    for dilations in ((), (0, 1)):
        with pytest.raises(ValueError, match="dilations are"):
            refine(images, masks, dilations)


def refined_labels_by_hand(images, cam, tags, low, high, dilations, iterations):
    """The released order: image by image, the classes it shows beside each background."""
    size = images.shape[2:]
    small = [side // 2 for side in size]
    labels = []
    for b in range(len(images)):
        keys = [0] + [c + 1 for c in range(cam.shape[1]) if tags[b, c]]
        image = F.interpolate(images[b : b + 1], small, mode="bilinear", align_corners=False)
        found = []
        for floor in (high, low):
            floor = floor[b].item() if isinstance(floor, torch.Tensor) else floor
            planes = torch.cat([torch.full_like(cam[b : b + 1, :1], floor), cam[b : b + 1]], 1)
            planes = F.interpolate(planes, small, mode="bilinear", align_corners=False)[:, keys].softmax(1)
            planes = refined_by_hand(image[0], planes[0], dilations, iterations)[None]
            winners = F.interpolate(planes, size, mode="bilinear", align_corners=False).argmax(1)
            found.append(torch.tensor(keys)[winners[0]])
        label = found[0].clone()
        label[found[0] == 0] = 255
        label[(found[0] == 0) & (found[1] == 0)] = 0
        labels.append(label)
    return torch.stack(labels)


def smooth_cams(size, seed=0):
    coarse = torch.rand(3, C, 3, 4, dtype=torch.float64, generator=generator(seed))
    return min_max(F.interpolate(coarse, size, mode="bilinear", align_corners=False))


@pytest.mark.parametrize("low, high", [(0.25, 0.7), ([0.2, 0.3, 0.1], [0.9, 0.6, 0.7])])
def test_refined_labels_are_those_of_the_released_order(low, high):
    images = torch.rand(3, 3, 8, 9, dtype=torch.float64, generator=generator(2))
    cam, tags = smooth_cams((8, 9)), tags_of()
    tags[2] = torch.tensor([0, 1, 0])
    if isinstance(low, list):
        low, high = torch.tensor([low, high], dtype=torch.float64)
    settings = {"dilations": (1, 2), "iterations": 2}
    labels = refined_labels(images, cam, tags, low, high, **settings)
    expected = refined_labels_by_hand(images, cam, tags, low, high, **settings)
    assert torch.equal(labels, expected)
    assert (labels[0] == 0).all() and set(labels[2].unique().tolist()) <= {0, 2, 255}
    assert {0, 255} < set(labels.unique().tolist())  # so that all three rules were at work
    assert torch.equal(refined_labels(images, cam, tags, low, high, most=3, **settings), labels)
    part = [0, 2]
    ends = [value[part] if isinstance(value, torch.Tensor) else value for value in (low, high)]
    few = refined_labels(images[part], cam[part], tags[part], *ends, most=1, **settings)
    assert torch.equal(few, labels[part])
    valid = torch.arange(9).expand(3, 8, -1) > 2
    assert torch.equal(refined_labels(images, cam, tags, low, high, valid, **settings), torch.where(valid, labels, 255))


def test_refined_labels_take_half_precision_and_leave_their_input():
    images = torch.rand(3, 3, 10, 12, generator=generator(2)).half()
    cam, tags = smooth_cams((10, 12)).half(), tags_of().half()
    before = cam.clone(), tags.clone(), images.clone()
    labels = refined_labels(images, cam, tags, 0.25, 0.7, dilations=(1, 2), iterations=2)
    exact = refined_labels(images.double(), cam.double(), tags, 0.25, 0.7, dilations=(1, 2), iterations=2)
    assert (labels == exact).double().mean() > 0.99 and labels.dtype == torch.int64
    for now, old in zip((cam, tags, images), before, strict=True):
        assert torch.equal(now, old)


def truth_of(seed, batch=3, size=(9, 7), classes=C, dtype=torch.uint8):
    truth = torch.randint(0, classes + 1, (batch, *size), generator=generator(seed))
    truth[torch.rand(truth.shape, generator=generator(seed + 1)) < 0.2] = 255
    return truth.to(dtype)


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64, torch.float16]))
@settings(max_examples=15)
def test_counts_at_every_threshold_are_those_of_labels_made_one_by_one(seed, dtype):
    cam, tags, truth = cams(seed, dtype=dtype), tags_of(seed), truth_of(seed, dtype=torch.int64)
    truth[0, 0, 0] = C + 1  # not a class
    thresholds = (0.0, 0.05, 0.25, 0.5, 0.55, 0.999, 1.0)
    counts = threshold_counts(cam, tags, truth, thresholds)
    assert counts.dtype == torch.int64
    for found, threshold in zip(counts, thresholds, strict=True):
        expected = confusion(truth, cam_labels(cam, tags, threshold), C + 1).sum(0)
        assert torch.equal(found, expected)
    halves = [threshold_counts(cam[part], tags[part], truth[part], thresholds) for part in (slice(0, 1), slice(1, 3))]
    assert torch.equal(sum(halves), counts)


def test_counts_without_tags_or_truth():
    cam, truth = cams(0), truth_of(0)
    counts = threshold_counts(cam, torch.zeros(3, C), truth, (0.0, 0.5))
    assert counts[:, :, 1:].sum() == 0 and counts[:, :, 0].sum(1).tolist() == [(truth != 255).sum()] * 2
    nothing = threshold_counts(cam, tags_of(0), torch.full_like(truth, 255), (0.5,))
    assert nothing.sum() == 0 and curve_miou(nothing).isnan().all()
    report = curve_report(nothing, (0.5,))
    assert report["miou"] == [None] and report["best"] == report["fixed"] == {"threshold": 0.5, "miou": None}
    for thresholds in ((), (0.5, 0.5), (0.5, 0.2)):
        with pytest.raises(ValueError, match="thresholds are"):
            threshold_counts(cam, tags_of(0), truth, thresholds)


def test_the_curve_by_hand():
    """A CAM that is right above .4 and spills below; class 2 is not in the truth but is predicted."""
    cam = torch.tensor([[[[0.9, 0.8, 0.4, 0.1]], [[0.0, 0.0, 0.0, 0.3]]]])
    truth = torch.tensor([[[1, 1, 0, 0]]])
    thresholds = (0.0, 0.2, 0.3, 0.4, 0.8, 0.9)
    counts = threshold_counts(cam, torch.tensor([[1, 1]]), truth, thresholds)
    # of background and class 1: IoU 0 and 2/3; the same; 1/2 and 2/3; 1 and 1; 2/3 and 1/2; 1/2 and 0
    expected = [1 / 3, 1 / 3, 7 / 12, 1.0, 7 / 12, 1 / 4]
    torch.testing.assert_close(curve_miou(counts), torch.tensor(expected, dtype=torch.float64))
    report = curve_report(counts, thresholds, fixed=0.3)
    assert report["thresholds"] == list(thresholds) and report["miou"] == pytest.approx(expected)
    assert report["best"] == {"threshold": 0.4, "miou": 1.0}
    assert report["fixed"] == {"threshold": 0.3, "miou": pytest.approx(7 / 12)}
    tied = curve_report(counts[[0, 1]], thresholds[:2], fixed=0.2)
    assert tied["best"]["threshold"] == 0.0  # the lowest of equals
    with pytest.raises(ValueError, match=r"the fixed threshold 0\.5 is not among the 6"):
        curve_report(counts, thresholds)
    assert len(THRESHOLDS) == 100 and THRESHOLDS[0] == 0 and 0.5 in THRESHOLDS and THRESHOLDS[-1] < 1


def test_over_activation_by_hand():
    counts = torch.tensor([[50, 6, 4, 0, 1], [5, 20, 2, 0, 0], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0], [3, 0, 0, 0, 0]])
    rates = over_activation(counts)
    nan = math.nan
    expected = {
        "ratio": [8 / 50, 8 / 20, math.inf, nan, math.inf],
        "share": [8 / 58, 8 / 28, 1.0, nan, 1.0],
        "spill": [nan, 6 / 27, 4 / 2, nan, 1 / 3],
    }
    for name, values in expected.items():
        found = getattr(rates, name)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), equal_nan=True)
    invented = over_activation(torch.tensor([[5, 2], [0, 0]]))  # predicted, but nowhere true
    assert invented.ratio[1] == math.inf and invented.share[1] == 1 and invented.spill.isnan().all()
    many = over_activation(torch.stack([counts, 2 * counts]))
    assert torch.equal(many.share[0].nan_to_num(), many.share[1].nan_to_num()) and many.ratio.shape == (2, 5)


def small_vit(class_tokens=2, **options):
    torch.manual_seed(0)
    arguments = {"masked": False, "value_only": False, "auxiliary": -2, "channels": 3} | options
    return ViT(Layout(width=12, depth=3, heads=2, patch=4, grid=3, ratio=2), class_tokens, **arguments).double()


def test_rollout_is_a_product_of_matrices():
    net = small_vit(masked=True)
    maps = net(torch.randn(2, 3, 12, 12, dtype=torch.float64), attention=range(3)).attention
    before = {index: value.clone() for index, value in maps.items()}
    rolled = attention_rollout(maps.values())
    for b in range(2):
        expected = torch.eye(11, dtype=torch.float64)
        for index in range(3):
            expected = (0.5 * maps[index][b].sum(0) / 2 + 0.5 * torch.eye(11)) @ expected
        torch.testing.assert_close(rolled[b], expected)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 11, dtype=torch.float64))
    assert (rolled[:, 2:, :2] == 0).all()  # patches draw nothing on class tokens that nobody sees
    assert all(torch.equal(maps[index], value) for index, value in before.items())
    torch.testing.assert_close(attention_rollout([maps[1]], residual=0), maps[1].mean(1))
    identity = torch.eye(4).expand(1, 2, 4, 4)
    assert torch.equal(attention_rollout([identity] * 5), torch.eye(4)[None])
    with pytest.raises(ValueError, match="no attention map"):
        attention_rollout([])


class Classifier(nn.Module):
    """Features as a map, then a head that mixes patches, so that gradients differ from patch to patch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Conv2d(3, 6, 3, stride=2, padding=1).double()
        self.head = nn.Sequential(nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1), nn.Softplus()).double()
        self.linear = nn.Linear(5, C).double()

    def score(self, maps):
        return self.linear(self.head(maps).square().mean((2, 3)))

    def forward(self, x):
        return self.score(self.features(x))


def test_grad_cam_equals_captum():
    model = Classifier()
    x = torch.randn(4, 3, 10, 12, dtype=torch.float64, generator=generator())
    maps = model.features(x)
    with torch.no_grad():  # it switches gradients on by itself
        cam = grad_cam(maps.flatten(2).mT, lambda patches: model.score(patches.mT.unflatten(2, (5, 6))), (5, 6))
    captum = LayerGradCam(model, model.features)
    for c in range(C):
        expected = captum.attribute(x, target=c, relu_attributions=True)
        torch.testing.assert_close(cam[:, c : c + 1], expected.detach())
    assert (cam > 0).any() and (cam == 0).any() and not cam.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("pool", [lambda x: x.mean(1), lambda x: x.amax(1)])
def test_grad_cam_behind_a_pooled_linear_classifier_is_the_cam(pool):
    patches = torch.randn(2, 12, 5, dtype=torch.float64, generator=generator())
    weight = torch.randn(C, 5, dtype=torch.float64, generator=generator(1))
    expected = raw_cam(patches, weight, (3, 4)).relu() / 12
    torch.testing.assert_close(grad_cam(patches, lambda x: pool(x @ weight.T), (3, 4)), expected)
    one = grad_cam(patches[:, :1], lambda x: pool(x @ weight.T), (1, 1))
    torch.testing.assert_close(one, raw_cam(patches[:, :1], weight, (1, 1)).relu())
    assert not patches.requires_grad
