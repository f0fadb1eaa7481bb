"""Maps, labels and regions against loops over pixels, counts by hand and the method's own regions."""

import functools
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from figures.explore import panel, tags
from figures.explore.tags import Maps, measure
from repro import cam
from repro.files import save_state
from repro.methods.image_tags import pcre
from repro.methods.image_tags.pcre import PCRESettings, refined_regions, shown_classes
from repro.recipe import TagRecipe
from repro.runs import folder_of, load_outputs
from tests.fake_outputs import texts
from tests.fake_tag_runs import EXPLORED, GRID, SCALES, write_tag_run
from tests.figures.explore.runs import PCRE, made

CLASSES = 5
START = {"source": "main", "scales": SCALES, "beta": 0.35}
GROWTH = {"threshold": 0.7, "radius": math.inf, "rounds": 5, "share": 0.3}


@functools.cache
def written(root):
    return Maps(PCRE, root)


@pytest.fixture
def maps(root):
    """A run of PCRE, whose attributes a test may replace."""
    return made(Maps, **vars(written(root)))


def pairs_of(explorer):
    return [tuple(pair) for pair in explorer.tags.nonzero().tolist()]


def with_settings(explorer, **settings):
    method = PCRESettings(**settings)
    explorer.recipe = TagRecipe(method=method, network="vit-mini", crop=explorer.recipe.crop, cam_scales="1,0.5,1.5")
    return explorer


def without_regions(explorer):
    explorer.masks = explorer.confidence = None
    explorer.method = "toco"
    return explorer


def test_saved_are_the_arrays_of_the_run(maps, root, tmp_path):
    found = load_outputs(folder_of(PCRE, root))
    for name in ("images", "truth", "tags"):
        assert torch.equal(getattr(maps, name), found[f"test_{name}"][:EXPLORED])
    for name in ("cam", "gradcam", "rollout", "confidence", "masks"):
        assert torch.equal(getattr(maps, name), found[f"explore_{name}"])
    assert maps.scales == SCALES and maps.classes[1] == "Trouser" and tuple(maps.masks.shape[2:]) == GRID
    toco = PCRE.with_(method="toco")
    write_tag_run(toco, tmp_path, evaluations=1)
    plain = Maps(toco, tmp_path)
    assert not plain.has_regions and set(plain.controls()) == {"pair", "source", "scales", "beta"}
    figure = panel.still(plain)
    assert "No seeds, region or fused map" in texts(figure) and "region m_r" not in texts(figure)
    save_state(folder_of(toco, tmp_path) / "outputs.safetensors", {"test_tags": torch.ones(2, CLASSES)})
    with pytest.raises(panel.Missing, match="maps of single scales"):
        Maps(toco, tmp_path)


def map_by_hand(explorer, pair, source, scales):
    """The chosen map (C, H, W) float64, for every class, in numpy."""
    image = pair[0]
    if source == "gradcam":
        return explorer.gradcam[image].double().numpy()
    if source == "rollout":
        return np.stack([explorer.rollout[image].double().numpy()] * CLASSES)
    layer = ["main", "auxiliary"].index(source)
    total = sum(explorer.cam[image, layer, SCALES.index(scale)].double().numpy() for scale in scales)
    total = total - total.min((1, 2), keepdims=True)
    return total / (total.max((1, 2), keepdims=True) + 1e-5)


def labels_by_hand(maps, channels, beta):
    """A label map from maps (C, H, W) by loops over pixels: the largest of the channels, if it is above beta."""
    out = np.zeros(maps.shape[1:], int)
    for row, column in np.ndindex(out.shape):
        value, channel = max((maps[channel, row, column], -channel) for channel in channels)
        out[row, column] = 1 - channel if value > np.float32(beta) else 0
    return out


@pytest.mark.parametrize("source", list(tags.SOURCES))
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.5)])
def test_maps_are_normalised_sums_and_labels_the_largest_above_beta(maps, source, scales):
    maps = without_regions(maps)
    for pair in pairs_of(maps)[:3]:
        expected, seen = map_by_hand(maps, pair, source, scales), maps.compute(pair, source, scales, 0.35)
        channels = [pair[1]] if source == "rollout" else maps.tags[pair[0]].nonzero()[:, 0].tolist()
        np.testing.assert_allclose(seen.cam[channels].numpy(), expected[channels], atol=1e-6)
        assert not seen.cam[[channel for channel in range(CLASSES) if channel not in channels]].any()
        by_hand = labels_by_hand(seen.cam.numpy(), channels, 0.35)
        assert np.array_equal(seen.label.numpy(), by_hand) and 0 < (by_hand > 0).mean() < 1
        assert seen.grown is None


@pytest.mark.parametrize("settings", [{}, {"resize": "group"}, {"expand": False}], ids=str)
def test_the_region_and_the_fused_map_are_the_methods_own(maps, settings):
    maps = with_settings(maps, tau=0.6, rounds=4, fusion=0.45, **settings)
    start = panel.position(maps.controls())
    size, one = tuple(maps.truth.shape[1:]), slice(0, 1)
    pairs = shown_classes(maps.tags[one])
    found = refined_regions(maps.masks[one].float(), maps.confidence[one], pairs, size, maps.recipe.method.expansion)
    normal = torch.zeros(1, CLASSES, *size)
    for channel, mask, filled in zip(pairs.classes[0].tolist(), found.masks[0], pairs.shown[0], strict=True):
        normal[0, channel] = cam.min_max(mask) * filled
    for channel in maps.tags[0].nonzero()[:, 0].tolist():
        seen, place = maps.compute(**start | {"pair": (0, channel)}), pairs.classes[0].tolist().index(channel)
        torch.testing.assert_close(seen.grown.region, found.masks[0, place])
        assert torch.equal(seen.grown.seeds, found.growth.seeds[0, place])
        fused = pcre.fused(seen.cam[None], normal, 0.45)
        torch.testing.assert_close(seen.grown.fused, fused[0])
        assert torch.equal(seen.grown.region_label, cam.cam_labels(normal, maps.tags[one], start["beta"])[0])
        assert torch.equal(seen.grown.label, cam.cam_labels(fused, maps.tags[one], start["beta"])[0])


def test_the_gate_keeps_masks_near_their_patch(maps):
    for pair in pairs_of(maps)[:4]:
        wide, none = (maps.compute(pair, **START, **GROWTH | {"radius": r}).grown for r in (2.0 * GRID[1], math.inf))
        assert torch.equal(wide.region, none.region)
        near = maps.compute(pair, **START, **GROWTH | {"radius": 0.0, "rounds": 1}).grown
        lit = near.region.nonzero() // (maps.truth.shape[1] // GRID[0])
        seed = torch.tensor(divmod(int(near.seeds[0]), GRID[1]))
        assert len(lit) and ((lit - seed).abs() <= 1).all(), "a patch, as wide as resizing spreads it"


def test_a_class_without_a_candidate_has_no_region_and_keeps_its_map(maps):
    pair = pairs_of(maps)[0]
    maps.confidence = maps.confidence.clone()
    maps.confidence[pair[0], :, pair[1]] = 0
    seen = maps.compute(pair, **START, **GROWTH)
    assert not seen.grown.region.any() and not seen.grown.listed.any() and (seen.grown.seeds == -1).all()
    assert torch.equal(seen.grown.fused[pair[1]], seen.cam[pair[1]])
    assert f"No candidate among {GRID[0] * GRID[1]} patches" in maps.numbers(seen).heading
    maps.draw(maps.layout(Figure()), seen)
    maps.confidence = torch.zeros_like(maps.confidence)
    assert not maps.compute(pair, **START, **GROWTH).grown.region.any()


def test_numbers_by_hand():
    truth = torch.tensor([[1, 1, 2, 0], [1, 0, 255, 255]])
    label = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0]])
    # class 1: right at 2, missed at 1, wrongly at 2; one more lies where nothing is known
    assert measure(label, truth, 0, 3) == pytest.approx((2 / 5, 2 / 3, 2 / 4, 2 / 2))
    assert measure(label, truth, 1, 3) == pytest.approx((0, 0, math.nan, math.nan), nan_ok=True)
    assert math.isnan(measure(torch.zeros_like(truth), truth.masked_fill(truth == 2, 0), 1, 3)[0])
    assert math.isinf(measure(truth * 0 + 2, truth * 0, 1, 3)[3])


def test_the_table_measures_what_is_shown(maps):
    image, channel = pair = pairs_of(maps)[0]
    seen, known = maps.compute(pair, **START, **GROWTH | {"share": 0.4}), maps.truth[pair[0]] != 255
    numbers = maps.numbers(seen)
    rows = {name: cells for name, *cells in numbers.rows}
    assert list(rows) == ["CAM, scales 0.5 + 1 + 1.5", "region m_r, normalised", "fused: 0.6 CAM + 0.4 region"]
    for cells, label in zip(rows.values(), (seen.label, seen.grown.region_label, seen.grown.label), strict=True):
        own, true = (label == channel + 1)[known], (maps.truth[image] == channel + 1)[known]
        both, totals = int((own & true).sum()), [int(part.sum()) for part in (own | true, true, own)]
        assert cells == [*(f"{100 * both / total:.1f} %" for total in totals), f"{int((own & ~true).sum()) / both:.2f}"]
    seeds, listed = int((seen.grown.seeds >= 0).sum()), int(seen.grown.listed.sum())
    joined = f"{len(set(seen.grown.joins.nonzero()[:, 1].tolist()))} of {listed} candidates"
    counted = f"{seeds} seed{'s'[: seeds > 1]}; {joined} are in the region, of {GRID[0] * GRID[1]} patches"
    assert counted in numbers.heading


def test_the_heading_explains_where_the_run_differs_or_lacks_masks(maps):
    pair = pairs_of(maps)[0]
    fixed = with_settings(maps, expand=False, mask_scales="1")
    heading = fixed.numbers(fixed.compute(pair, **START, **GROWTH)).heading
    assert "T does nothing" in heading and "mixes in those of scales 1 and" in heading
    plain = without_regions(maps)
    seen = plain.compute(pair, **START | {"source": "rollout"})
    numbers = plain.numbers(seen)
    assert "they need PCRE's confidences" in numbers.heading and "has no classes" in numbers.heading
    assert len(numbers.rows) == 1


def test_scales_are_for_class_activation_maps_alone(maps):
    controls = maps.controls()
    for source, off in (("gradcam", True), ("auxiliary", False), ("rollout", True), ("main", False)):
        controls["source"].value = source
        assert controls["scales"].disabled == off
    assert len(controls["scales"].options) == 7
    assert [pair for _, pair in controls["pair"].options] == pairs_of(maps)


def test_controls_start_at_the_runs_own_values(maps):
    method = PCRESettings(tau=0.655, rounds=12, fusion=0.333, r_max=8.0)
    maps.recipe = TagRecipe(method=method, network="vit-mini", crop=32, beta=0.4321, cam_scales="1,0.5,0.75")
    controls = maps.controls()
    expected = (pairs_of(maps)[0], "main", (0.5, 1.0), 0.4321, 0.655, math.inf, 12, 0.333)
    assert tuple(panel.position(controls).values()) == expected
    radii = [radius for _, radius in controls["radius"].options]
    assert radii == sorted(radii) and radii[0] == 0 and radii[-1] == math.inf
    assert radii[-2] < math.hypot(GRID[0] - 1, GRID[1] - 1)
    own = method.radius(1.0, GRID)
    assert (f"{own:.3g}, training's last", own) in controls["radius"].options
    maps = with_settings(maps, gating="none")
    assert not any("training" in name for name, _ in maps.controls()["radius"].options)
