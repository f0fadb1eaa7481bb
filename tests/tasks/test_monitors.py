"""Evaluation: predictions, pseudo-label quality against loops, reporting rules."""

import json
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repro.data.augment import Views
from repro.data.mask_views import MaskViews
from repro.files import load_state, save_state
from repro.tasks.monitors import RANGES, REPORTING, PixelMonitor, PseudoLabelMonitor, measure, predict, report
from repro.train import PixelLabels, PseudoLabels

VIEWS = Views((0.5,), (0.25,), flip=True, generator=torch.Generator())


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_predictions_are_those_of_evaluation_mode_whatever_the_batch():
    net, images = network().train(), torch.randint(256, (23, 1, 4, 4), dtype=torch.uint8)
    net(torch.randn(50, 16))  # running statistics away from their start
    expected = net.eval()((images.float() / 255 - 0.5) / 0.25).detach()
    net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    generator = VIEWS.generator.get_state()
    for batch in (1000, 23, 7, 1):
        torch.testing.assert_close(predict(net, images, VIEWS, batch), expected)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(VIEWS.generator.get_state(), generator)


def test_predict_gives_back_each_modules_mode_also_after_an_error():
    net = network().train()
    net[2].eval()  # a frozen batch norm
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert not predict(net, images, VIEWS).requires_grad
    assert [module.training for module in net] == [True, True, False, True, True]
    with pytest.raises(RuntimeError):
        predict(net, torch.zeros(2, 1, 5, 5, dtype=torch.uint8), VIEWS)
    assert [module.training for module in net] == [True, True, False, True, True] and net.training


def test_predictions_of_a_half_precision_network_are_float32():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).bfloat16()
    views = Views((0.5,), (0.25,), flip=True, dtype=torch.bfloat16)
    assert predict(net, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), views).dtype == torch.float32


def test_measure_takes_the_softmax():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 1])
    probs = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    measured = measure(logits, labels)
    assert measured["accuracy"] == pytest.approx(1 / 3) and measured["error"] == pytest.approx(2 / 3)
    assert measured["nll"] == pytest.approx(-np.log(probs[range(3), labels]).mean(), rel=1e-6)
    assert measured["per_class_accuracy"] == [0.5, 0.0]


# Pseudo-labels


def quality(confidence, correct, mask, known, bins=15):
    """Loops over samples: coverage of all, the rest of the selected whose truth is known."""
    chosen = [(c, r) for c, r, m, k in zip(confidence, correct, mask, known, strict=True) if m and k]
    result = {"coverage": sum(mask) / len(mask), "accuracy": None, "confidence": None, "ece": None}
    if chosen:
        members = [[] for _ in range(bins)]
        for c, r in chosen:
            members[min(max(int(np.ceil(c * bins)) - 1, 0), bins - 1)].append((c, r))
        gaps = [abs(sum(c - r for c, r in bin)) for bin in members]
        result |= {
            "accuracy": sum(r for _, r in chosen) / len(chosen),
            "confidence": sum(c for c, _ in chosen) / len(chosen),
            "ece": sum(gaps) / len(chosen),
        }
    return result


def draw(rng, n=40, classes=4, batch=12):
    """One step's positives and negatives over n samples, a fifth of them of unknown truth."""
    index = torch.tensor(rng.permutation(n)[:batch])
    label = torch.tensor(rng.integers(classes, size=batch))
    mask = torch.tensor(rng.random(batch) < 0.6)
    confidence = torch.tensor(rng.random(batch) * 0.98 + 0.01)
    each = torch.arange(classes).expand(batch, classes)
    negatives = torch.tensor(rng.random((batch, classes)) < 0.3)
    return {
        "positive": PseudoLabels(index, label, mask, confidence),
        "negative": PseudoLabels(index, each, negatives, torch.tensor(rng.random((batch, classes)) * 0.98 + 0.01)),
    }


def expected(truth, steps):
    rows = {kind: ([], [], [], []) for kind in ("positive", "negative")}
    for step in steps:
        for kind, selected in step.items():
            for b, i in enumerate(selected.index.tolist()):
                for k in [None] if kind == "positive" else range(selected.label.shape[1]):
                    at = b if k is None else (b, k)
                    label, real = selected.label[at].item(), truth[i].item()
                    right = label == real if kind == "positive" else label != real
                    values = (selected.confidence[at].item(), right, selected.mask[at].item(), real >= 0)
                    for column, value in zip(rows[kind], values, strict=True):
                        column.append(value)
    return {kind: quality(*columns) for kind, columns in rows.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[kind] == pytest.approx(b[kind], rel=1e-9) for kind in a)


@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_monitor_agrees_with_loops_and_starts_afresh(seed, count):
    rng = np.random.default_rng(seed)
    truth = torch.tensor(np.where(rng.random(40) < 0.2, -1, rng.integers(4, size=40)))
    monitor = PseudoLabelMonitor(truth)
    for _ in range(2):
        steps = [draw(rng) for _ in range(count)]
        for step in steps:
            monitor.observe(step)
        assert same(monitor.read(), expected(truth, steps))
    nothing = {"accuracy": None, "confidence": None, "ece": None, "coverage": None}
    assert monitor.read() == {"positive": nothing, "negative": nothing}


def test_unknown_truth_counts_for_coverage_only():
    monitor = PseudoLabelMonitor(torch.tensor([-1, -1, 2]))
    on = torch.tensor([True, True, False])
    monitor.observe({"positive": PseudoLabels(torch.arange(3), torch.tensor([0, 1, 2]), on, torch.full((3,), 0.9))})
    monitor.observe(
        {"negative": PseudoLabels(torch.tensor([0]), torch.arange(3)[None], on[None], torch.full((1, 3), 0.9))}
    )
    read = monitor.read()
    for kind in ("positive", "negative"):
        coverage = read[kind].pop("coverage")
        assert coverage == pytest.approx(2 / 3) and set(read[kind].values()) == {None}
    json.dumps(read, allow_nan=False)


def test_a_monitor_continues_from_a_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    truth = torch.tensor(rng.integers(4, size=40))
    steps = [draw(rng) for _ in range(4)]
    first = PseudoLabelMonitor(truth)
    for step in steps[:2]:
        first.observe(step)
    save_state(tmp_path / "state", {"monitor": first.state_dict()})
    second = PseudoLabelMonitor(truth)
    second.load_state_dict(load_state(tmp_path / "state")["monitor"])
    for step in steps[2:]:
        second.observe(step)
    assert same(second.read(), expected(truth, steps))


# Pseudo-labels of pixels


def draw_pixels(seed, truth, scale=(0.5, 2.0), crop=9, batch=5):
    """One step's crops over hidden masks (N, H, W), and the hidden labels of the crops, from images that show them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(truth), generator=generator)[:batch]
    views = MaskViews(crop, scale, generator=generator)
    moved = views.crop(truth[index][:, None].expand(-1, 3, -1, -1).contiguous(), truth[index])
    shape = (batch, crop, crop)
    edges = torch.tensor(RANGES)[torch.randint(1, len(RANGES), shape, generator=generator)]
    confidence, weight, on_edge, chosen, right, padded = torch.rand(6, *shape, generator=generator)
    confidence = torch.where(on_edge < 0.2, edges, confidence)
    weight = weight * (chosen < 0.7)
    label = torch.where(right < 0.6, moved.masks.long(), 1)
    valid = ~moved.padding & (padded < 0.9)  # a loader may have padded, too
    pixels = PixelLabels(index, label, weight, confidence, valid, moved.window)
    return pixels, moved


def pixel_quality(steps, unknown=False):
    """Loops over pixels: in all, and by range (lo, hi] of confidence."""
    rows = []
    for pixels, crop in steps:
        for at in np.ndindex(pixels.label.shape):
            if pixels.valid[at]:
                truth = 255 if unknown else crop.masks[at].item()
                right = pixels.label[at].item() == truth if truth != 255 else None
                rows.append((pixels.confidence[at].item(), float(pixels.weight[at]), right))

    def mean(values, weights=None):
        weights = [1.0] * len(values) if weights is None else weights
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights) if sum(weights) else None

    known = [(c, w, r) for c, w, r in rows if r is not None]
    bins = [[(c, w, r) for c, w, r in known if np.float32(k / 15) < np.float32(c) <= np.float32((k + 1) / 15)]
            for k in range(15)]  # fmt: skip
    total = sum(w for _, w, _ in known)
    ranges = {name: [] for name in ("share", "coverage", "accuracy", "all_accuracy")}
    for low, high in zip(RANGES, RANGES[1:], strict=False):
        part = [row for row in rows if np.float32(low) < np.float32(row[0]) <= np.float32(high)]
        told = [row for row in part if row[2] is not None]
        ranges["share"].append(len(part) / len(rows) if rows else None)
        ranges["coverage"].append(mean([w for _, w, _ in part]))
        ranges["accuracy"].append(mean([r for _, _, r in told], [w for _, w, _ in told]))
        ranges["all_accuracy"].append(mean([r for _, _, r in told]))
    return {
        "coverage": mean([w for _, w, _ in rows]),
        "accuracy": mean([r for _, _, r in known], [w for _, w, _ in known]),
        "confidence": mean([c for c, _, _ in known], [w for _, w, _ in known]),
        "ece": sum(abs(sum(w * (c - r) for c, w, r in part)) for part in bins) / total if total else None,
        "ranges": {"edges": list(RANGES), **ranges},
    }


def agree(a, b):
    """Nested dicts and lists of numbers and None, to nine digits (a weight of float32 is one of float64)."""
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(agree(a[name], b[name]) for name in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(agree(x, y) for x, y in zip(a, b, strict=True))
    return a is b is None or (a is not None and b is not None and a == pytest.approx(b, rel=1e-9, abs=1e-12))


@pytest.fixture(scope="module")
def masks():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(4, (8, 12, 10), generator=generator, dtype=torch.uint8)
    return drawn.masked_fill(torch.rand(drawn.shape, generator=generator) < 0.2, 255)


@pytest.mark.parametrize("seed", range(4))
def test_the_pixel_monitor_agrees_with_loops_and_starts_afresh(masks, seed):
    monitor = PixelMonitor(masks)
    for count in (1, 2):
        steps = [draw_pixels(10 * seed + i, masks) for i in range(count)]
        for pixels, _ in steps:
            monitor.observe({"pixels": pixels})
        (told,) = monitor.read().values()
        assert agree(told, pixel_quality(steps))
        assert sum(told["ranges"]["share"]) == pytest.approx(1)
    empty = monitor.read()["pixels"]
    assert {v for name, v in empty.items() if name != "ranges"} == {None}
    assert all(set(values) == {None} for name, values in empty["ranges"].items() if name != "edges")
    json.dumps(empty, allow_nan=False)


def test_hidden_masks_move_with_the_crops(masks):
    """Cut out and mirrored, not resized: the crop's own pixels, which are the masks, tell the truth exactly."""
    pixels, crop = draw_pixels(3, masks, scale=(1, 1), crop=7)
    truth = crop.images[:, 0].long()
    told = PixelLabels(pixels.index, truth, crop.masks != 255, pixels.confidence, ~crop.padding, pixels.window)
    monitor = PixelMonitor(masks)
    monitor.observe({"pixels": told})
    read = monitor.read()["pixels"]
    assert read["accuracy"] == 1 and read["coverage"] == pytest.approx((truth != 255).double().mean().item())
    assert {value for value in read["ranges"]["all_accuracy"] if value is not None} == {1.0}


def test_a_confidence_on_an_edge_belongs_below_it_and_padding_nowhere(masks):
    confidence = torch.tensor([*RANGES[1:], 0.0, 0.98]).view(1, 3, 3)
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[0, 2, 2] = False  # the last one is padding
    crop = MaskViews(3, (1, 1), generator=torch.Generator()).crop(
        torch.zeros(1, 3, 3, 3, dtype=torch.uint8), torch.zeros(1, 3, 3, dtype=torch.uint8)
    )
    monitor = PixelMonitor(torch.zeros(1, 3, 3, dtype=torch.uint8))
    zeros = torch.zeros(1, 3, 3, dtype=torch.int64)
    monitor.observe({"pixels": PixelLabels(torch.tensor([0]), zeros, valid, confidence, valid, crop.window)})
    ranges = monitor.read()["pixels"]["ranges"]
    assert ranges["share"] == [2 / 8] + [1 / 8] * 6 and ranges["coverage"] == [1.0] * 7


def test_without_truth_only_coverage_and_shares_are_told(masks):
    steps = [draw_pixels(seed, masks) for seed in (1, 2)]
    monitor = PixelMonitor(None)
    for pixels, _ in steps:
        monitor.observe({"pixels": pixels})
    told = monitor.read()["pixels"]
    assert agree(told, pixel_quality(steps, unknown=True))
    assert told["coverage"] > 0 and told["accuracy"] is told["confidence"] is told["ece"] is None
    assert set(told["ranges"]["accuracy"]) == set(told["ranges"]["all_accuracy"]) == {None}


def test_a_pixel_monitor_continues_from_a_checkpoint(masks, tmp_path):
    steps = [draw_pixels(seed, masks) for seed in range(4)]
    first, second = PixelMonitor(masks), PixelMonitor(masks)
    for pixels, _ in steps[:2]:
        first.observe({"pixels": pixels})
    save_state(tmp_path / "state", {"monitor": first.state_dict()})
    second.load_state_dict(load_state(tmp_path / "state")["monitor"])
    for pixels, _ in steps[2:]:
        for monitor in (first, second):
            monitor.observe({"pixels": pixels})
    assert second.read() == first.read()


def test_kinds_of_pixels_are_kept_apart(masks):
    (one, crop), (two, other) = (draw_pixels(seed, masks) for seed in (5, 6))
    monitor = PixelMonitor(masks)
    monitor.observe({"weak": one, "mixed": two})
    told = monitor.read()
    assert agree(told, {"weak": pixel_quality([(one, crop)]), "mixed": pixel_quality([(two, other)])})


# Reporting rules


def evaluations(errors):
    return [
        {"kind": "evaluation", "step": i, "live": {"error": 1.0, "accuracy": 0.0, "per_class_accuracy": [0.0]},
         "ema": {"error": e, "accuracy": 1 - e, "per_class_accuracy": [e]}}
        for i, e in enumerate(errors)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 40])
def test_reporting_rules(count):
    errors = np.random.default_rng(count).random(count).tolist()
    rows = evaluations(errors)
    assert report(rows, "last") == rows[-1]["ema"]
    assert report(rows, "best") == min((row["ema"] for row in rows), key=lambda r: r["error"]) | {
        "selected_on_test": True
    }
    median = report(rows, "median20")
    assert median == {
        "error": statistics.median(errors[-20:]), "accuracy": statistics.median(1 - e for e in errors[-20:]),
    }  # fmt: skip
    assert np.median(errors[-20:]) == median["error"], "no rounding to float32 on the way"
    assert all(report(rows, rule, "live")["error"] == 1.0 for rule in REPORTING)


def mask_evaluations(mious):
    rows = [{"miou": value, "boundary_f": None if i % 2 else i / 10, "iou": [0.5], "pixels": 9, "at": float(i)}
            for i, value in enumerate(mious)]  # fmt: skip
    return [{"kind": "evaluation", "step": i, "live": row, "ema": row} for i, row in enumerate(rows)]


def test_the_best_miou_is_the_highest_and_of_equals_the_first():
    rows = mask_evaluations([0.2, None, 0.7, 0.5, 0.7])
    assert report(rows, "best", metric="miou") == rows[2]["ema"] | {"selected_on_test": True}
    assert report(rows, "last", metric="miou") == rows[4]["ema"]
    nothing = report(mask_evaluations([None, None]), "best", metric="miou")
    assert nothing["at"] == 1 and nothing["miou"] is None and nothing["selected_on_test"]


def test_medians_are_of_defined_values_and_counts_have_none():
    median = report(mask_evaluations([0.2, None, 0.7, 0.6]), "median20", metric="miou")
    assert median == {"miou": 0.6, "boundary_f": pytest.approx(0.1), "at": 1.5}
    assert "miou" not in report(mask_evaluations([None]), "median20", metric="miou")


def test_a_report_needs_an_evaluation_and_a_known_rule():
    with pytest.raises(ValueError, match="no evaluation yet"):
        report([])
    with pytest.raises(ValueError, match="unknown reporting rule 'mean'; known: last, median20, best"):
        report(evaluations([0.1]), "mean")
