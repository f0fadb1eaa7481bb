import base64
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image

from figures.explore import thresholds
from repro.data import splits
from repro.experiment import Experiment
from tests.fake_outputs import texts, write_run

EXPERIMENT = Experiment(scale="tiny")


def saved_run(n=60, classes=4, passes=5, seed=0, sharpness=4.0):
    """Dropout passes that agree on some images and not on others; some truths unknown."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(1, n, classes, generator=generator)
    noise = torch.rand(1, n, 1, generator=generator) * torch.randn(passes, n, classes, generator=generator)
    truth = torch.randint(-1, classes, (n,), generator=generator)
    images = torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=generator)
    names = tuple(f"class {k}" for k in range(classes))
    return thresholds.Saved((logits + noise).softmax(dim=-1), truth, images, names, "a run")


def brute_force(saved, limits):
    """Positives as (image, label, p) and negatives as (image, class, p), one at a time with plain numbers."""
    positives, negatives = [], []
    passes = saved.passes.double()
    for i in range(passes.shape[1]):
        mean = [float(passes[:, i, c].mean()) for c in range(passes.shape[2])]
        spread = [float(passes[:, i, c].std()) for c in range(passes.shape[2])]
        best = max(range(len(mean)), key=mean.__getitem__)
        if mean[best] >= limits.positive_threshold and spread[best] < limits.positive_stability:
            positives.append((i, best, mean[best]))
        for c in range(len(mean)):
            if c != best and mean[c] < limits.negative_threshold and spread[c] < limits.negative_stability:
                negatives.append((i, c, mean[c]))
    return positives, negatives


def binned_error(pairs):
    """ECE over 15 right-closed bins of (confidence, correct) pairs."""
    bins = {}
    for confidence, correct in pairs:
        bins.setdefault(math.ceil(confidence * 15) - 1, []).append((confidence, correct))
    gaps = (abs(sum(c for c, _ in part) - sum(y for _, y in part)) for part in bins.values())
    return sum(gaps) / len(pairs)


@settings(max_examples=25)
@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 1), st.floats(0, 0.5), st.integers(0, 3))
def test_numbers_equal_brute_force(t_p, s_p, t_n, s_n, seed):
    saved, limits = saved_run(n=30, seed=seed), thresholds.Limits(t_p, s_p, t_n, s_n)
    chosen = thresholds.choose(saved, limits)
    positives, negatives = brute_force(saved, limits)
    assert chosen.mask.nonzero()[:, 0].tolist() == [i for i, _, _ in positives]
    assert chosen.negative_mask.nonzero().tolist() == [[i, c] for i, c, _ in negatives]
    truth = saved.truth.tolist()
    judged = (
        [(p, label == truth[i]) for i, label, p in positives if truth[i] >= 0],
        [(1 - p, c != truth[i]) for i, c, p in negatives if truth[i] >= 0],
    )
    for quality, found, pairs, total in zip(
        thresholds.measure(saved, chosen), (positives, negatives), judged, (30, 120), strict=True
    ):
        assert (quality.selected, quality.total) == (len(found), total)
        assert quality.coverage == pytest.approx(len(found) / total)
        if pairs:
            assert quality.accuracy == pytest.approx(sum(y for _, y in pairs) / len(pairs))
            assert quality.confidence == pytest.approx(sum(c for c, _ in pairs) / len(pairs), abs=1e-6)
            assert quality.ece == pytest.approx(binned_error(pairs), abs=1e-5)
        else:
            assert (quality.accuracy, quality.confidence, quality.ece) == (None, None, None)


def test_a_temperature_of_negatives_flattens_them_but_spares_the_same_class():
    saved = saved_run()
    plain = thresholds.choose(saved, thresholds.Limits(negative_threshold=0.1, negative_stability=0.5))
    limits = thresholds.Limits(negative_threshold=0.1, negative_stability=0.5, negative_temperature=2)
    flat = thresholds.choose(saved, limits)
    tempered = saved.passes.sqrt()
    expected = (tempered / tempered.sum(dim=-1, keepdim=True)).mean(dim=0)
    torch.testing.assert_close(flat.negative_mean, expected)
    assert flat.negative_mask.sum() < plain.negative_mask.sum()
    assert not flat.negative_mask.gather(1, flat.label[:, None]).any()
    assert torch.equal(flat.label, plain.label)


def test_without_passes_the_plain_prediction_is_perfectly_stable():
    saved = saved_run(passes=1)
    chosen = thresholds.choose(saved, thresholds.Limits(positive_threshold=0.9, positive_stability=1e-9))
    assert not saved.stochastic and (chosen.deviation == 0).all()
    assert torch.equal(chosen.mask, saved.passes[0].max(dim=1).values >= 0.9)


def test_affected_images_are_the_surest_the_least_sure_and_the_mistaken():
    saved = saved_run()
    chosen = thresholds.choose(saved, thresholds.Limits(0.5, 0.5, 0.4, 0.5))
    (_, surest), (_, least), (heading, mistaken) = thresholds.affected(saved, chosen, shown=3)
    selected = sorted((float(chosen.confidence[i]), i) for i in chosen.mask.nonzero()[:, 0].tolist())
    assert surest == [i for _, i in selected[::-1][:3]]
    assert least == [i for _, i in selected[:3]]
    wrong = [i for i, c in chosen.negative_mask.nonzero().tolist() if c == saved.truth[i]]
    assert set(mistaken) <= set(wrong) and len(mistaken) == min(3, len(wrong)) and f"({len(wrong)} in all)" in heading


def test_starting_limits_are_those_of_the_last_epoch():
    late = EXPERIMENT.with_(steps=60, epoch_steps=2)
    assert thresholds.starting_limits(late) == thresholds.Limits(0.95, 0.05, 3e-4, 0.005, 1.0)
    early = thresholds.starting_limits(EXPERIMENT.with_(steps=8, epoch_steps=2, positive_stability=0.1))
    assert (early.positive_threshold, early.negative_threshold) == pytest.approx((0.91, 0.03))
    assert early.positive_stability == 0.1
    free = thresholds.starting_limits(EXPERIMENT.with_(stability="none"))
    assert (free.positive_stability, free.negative_stability) == (0.53, 0.53) > (math.sqrt(10 / 9) / 2,) * 2
    assert thresholds.starting_limits(EXPERIMENT.with_(method="fixmatch")).positive_threshold in (0.9, 0.95)


def test_moving_a_slider_changes_numbers_and_picture():
    explorer = thresholds.Explorer(saved_run(), thresholds.Limits(0.9, 0.05, 0.05, 0.05))
    before, drawn = explorer.numbers.value, explorer.picture.value
    explorer.controls["positive_threshold"].value = 0.3
    assert explorer.limits.positive_threshold == 0.3
    assert explorer.numbers.value != before and explorer.picture.value != drawn
    numbers = thresholds.html(*thresholds.measure(explorer.saved, thresholds.choose(explorer.saved, explorer.limits)))
    assert explorer.numbers.value == numbers
    explorer.controls["positive_threshold"].value = 0.9
    assert explorer.numbers.value == before and explorer.picture.value == drawn


def test_sliders_reach_limits_that_select_everything_and_nothing():
    explorer = thresholds.Explorer(saved_run(), thresholds.Limits())
    loose = {
        "positive_threshold": 0,
        "positive_stability": 0.53,
        "negative_threshold": 1,
        "negative_stability": 0.53,
    }
    for name, value in loose.items():
        explorer.controls[name].value = value
    assert "60 of 60" in explorer.numbers.value and "180 of 240" in explorer.numbers.value
    explorer.controls["positive_stability"].value = 0
    assert "0 of 60" in explorer.numbers.value and "none" in explorer.numbers.value


def test_accepted_dots_lie_in_the_region_that_is_drawn():
    saved, limits = saved_run(), thresholds.Limits(0.6, 0.05, 0.1, 0.01)
    chosen = thresholds.choose(saved, limits)
    positive, negative = thresholds.Canvas(saved, limits).planes
    left, top = positive.clipped(limits.positive_threshold, limits.positive_stability)
    for i in range(60):
        x, y = positive.clipped(float(chosen.confidence[i]), float(chosen.deviation[i]))
        assert bool(chosen.mask[i]) == (x >= left and y > top)
    assert negative.box[0] < negative.clipped(limits.negative_threshold, limits.negative_stability)[0] < negative.box[2]


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_frames_wrong_images_in_another_colour(channels):
    saved = saved_run(n=2, passes=2)
    probs = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.97, 0.01, 0.01, 0.01]])
    images = torch.zeros(2, channels, 28, 28, dtype=torch.uint8)
    saved = thresholds.Saved(probs.expand(2, 2, 4), torch.tensor([0, 3]), images, saved.classes, "two images")
    limits = thresholds.Limits(0.9, 0.05, 0.05, 0.005)
    canvas = thresholds.Canvas(saved, limits)
    picture = canvas.draw(limits, thresholds.choose(saved, limits))
    corner = canvas.background.height + 19
    colours = [picture.getpixel((9 + k * thresholds.STEP, corner)) for k in range(2)]
    hexes = [f"#{bytes(colour).hex()}" for colour in colours]
    assert hexes == [thresholds.RIGHT, thresholds.WRONG]
    assert isinstance(picture, Image.Image) and picture.width == thresholds.WIDTH


@pytest.fixture
def root(tmp_path):
    """A saved tiny run whose pool positions are real."""
    write_run(tmp_path, EXPERIMENT)
    return tmp_path


def test_saved_images_are_those_of_the_pool(root):
    saved = thresholds.load_saved(EXPERIMENT, root)
    pool, _ = splits.open_pool(EXPERIMENT.split)
    assert torch.equal(saved.images, pool.images[:40])
    assert saved.stochastic and saved.classes == pool.classes


def test_sliders_only_where_somebody_can_move_them(root, monkeypatch):
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = thresholds.explore(EXPERIMENT, root)
    assert isinstance(still, Figure) and "positives" in texts(still) and "t_p = 0.9" in texts(still)
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = thresholds.explore(EXPERIMENT, root)
    assert isinstance(explorer, VBox)
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "not run" in texts(thresholds.explore(EXPERIMENT.with_(seed=5), root))
