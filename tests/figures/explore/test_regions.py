"""The region explorer against loops, sums and counts by hand; every control, and the figure that stands in for them."""

import base64
import dataclasses
import functools
import io
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image

from figures.explore import growth
from figures.explore import regions as explore
from figures.explore.growth import Position, Saved, activation, measure, view
from figures.explore.regions import Canvas, Explorer
from figures.plane import classes_of
from repro import cam
from repro.data.masks import tags_of
from repro.data.scenes import scenes
from repro.experiment import Experiment
from repro.files import save_state, write_json
from repro.methods.image_tags import METHODS
from repro.methods.image_tags import pcre as losses
from repro.methods.image_tags.pcre import PCRESettings, refined_regions, shown_classes
from repro.recipe import TagRecipe
from repro.runs import folder_of
from tests.fake_outputs import texts
from tests.methods.image_tags.test_pcre import reference

SCALES = (0.5, 1.0, 1.5)
SIDE, GRID, CLASSES, EXAMPLES = 48, 12, 5, 3
PCRE = Experiment("pcre", "pcre", "scenes", 500)


@functools.cache
def run_outputs(regions=True):
    """What a run on scenes keeps: blurred objects with noise for maps, masks of alike patches, S that prefers objects.

    Images 0 and 2 show two classes, image 1 one.
    """
    dice = torch.Generator().manual_seed(0)
    test = scenes("test", 40, SIDE)
    tags = tags_of(test.masks, CLASSES + 1)[:, 1:].byte()
    twice, once = ((tags.sum(1) == count).nonzero()[:, 0].tolist() for count in (2, 1))
    kept = torch.tensor([twice[0], once[0], *twice[1:8]])
    images, truth, tags = test.images[kept], test.masks[kept].clone(), tags[kept]
    objects = F.one_hot(truth[:EXAMPLES].long(), CLASSES + 1).movedim(3, 1).float()
    truth[:, :, -1] = 255

    def soft(scale, noise):
        maps = F.avg_pool2d(F.adaptive_avg_pool2d(objects[:, 1:], int(scale * GRID)), 3, 1, 1)
        return cam.bilinear((maps + noise * torch.randn(maps.shape, generator=dice)).relu(), (SIDE, SIDE))

    layers = [torch.stack([soft(scale, noise) for scale in SCALES], 1) for noise in (0.06, 0.15)]
    found = {
        "test_images": images, "test_truth": truth, "test_tags": tags, "explore_scales": torch.tensor(SCALES),
        "explore_cam": torch.stack(layers, 1).half(), "explore_gradcam": soft(1, 0.1).clamp(0, 1).half(),
        "explore_rollout": soft(1, 0.1).amax(1).clamp(0, 1).half(),
    }  # fmt: skip
    if regions:
        patches = F.adaptive_avg_pool2d(objects, GRID).flatten(2).mT
        at = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).float()
        near = torch.exp(-torch.cdist(at, at).square() / (0.08 * GRID**2))
        masks = 9 * (patches @ patches.mT) * near - 3 + 0.4 * torch.randn(len(patches), GRID**2, 1, generator=dice)
        first, second = (4 * patches[..., 1:] + torch.randn(patches[..., 1:].shape, generator=dice) for _ in range(2))
        found["explore_masks"] = masks.sigmoid().unflatten(2, (GRID, GRID)).half()
        found["explore_confidence"] = first.softmax(2) * second.softmax(1)
    return found


def saved_run(regions=True, **settings):
    """Three images of a run, without a folder."""
    found = run_outputs(regions)
    method = PCRESettings(**settings) if regions else METHODS["toco"].Settings()
    recipe = TagRecipe(method=method, network="vit-mini", crop=SIDE, cam_scales="1,0.5,1.5")
    seen = (found[f"test_{name}"][:EXAMPLES] for name in ("images", "truth", "tags"))
    maps = (found[f"explore_{name}"] for name in ("cam", "gradcam", "rollout"))
    more = (found.get("explore_confidence"), found.get("explore_masks"))
    return Saved(*seen, SCALES, *maps, classes_of("scenes"), recipe, "a run", "pcre" if regions else "toco", *more)


def map_by_hand(saved, at):
    """The chosen map (C, H, W) float64, for every class, in numpy."""
    image = at.pair[0]
    if at.source == "gradcam":
        return saved.gradcam[image].double().numpy()
    if at.source == "rollout":
        return np.stack([saved.rollout[image].double().numpy()] * CLASSES)
    layer = ["main", "auxiliary"].index(at.source)
    total = sum(saved.cam[image, layer, SCALES.index(scale)].double().numpy() for scale in at.scales)
    total = total - total.min((1, 2), keepdims=True)
    return total / (total.max((1, 2), keepdims=True) + 1e-5)


def labels_by_hand(maps, channels, beta):
    """A label map from maps (C, H, W) by loops over pixels: the largest of the channels, if it is above beta."""
    out = np.zeros(maps.shape[1:], int)
    for row, column in np.ndindex(out.shape):
        value, channel = max((maps[channel, row, column], -channel) for channel in channels)
        out[row, column] = 1 - channel if value > np.float32(beta) else 0
    return out


def shown(saved, image):
    return saved.tags[image].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("source", list(growth.SOURCES))
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 1.5), SCALES])
def test_maps_are_normalised_sums_and_labels_the_largest_above_beta(source, scales):
    saved = saved_run(regions=False)
    for pair in saved.pairs:
        at = Position(pair, source, scales, beta=0.35)
        expected, seen = map_by_hand(saved, at), view(saved, at)
        channels = [pair[1]] if source == "rollout" else shown(saved, pair[0])
        np.testing.assert_allclose(seen.cam[channels].numpy(), expected[channels], atol=1e-6)
        others = [channel for channel in range(CLASSES) if channel not in channels]
        assert not seen.cam[others].any()
        tags = torch.tensor([[float(channel in channels) for channel in range(CLASSES)]])
        assert torch.equal(seen.label, cam.cam_labels(seen.cam[None], tags, 0.35)[0])
        by_hand = labels_by_hand(seen.cam.numpy(), channels, 0.35)
        assert np.array_equal(seen.label.numpy(), by_hand) and 0 < (by_hand > 0).mean() < 1
        assert seen.grown is None


def test_a_map_that_is_zero_or_constant_labels_nothing():
    saved = saved_run(regions=False)
    flat = dataclasses.replace(saved, cam=torch.full_like(saved.cam, 0.5))
    for pair in flat.pairs:
        seen = view(flat, Position(pair, scales=SCALES, beta=0.0))
        assert not seen.cam.any() and not seen.label.any()


POSITIONS = [
    {}, {"threshold": 0.4}, {"radius": 2.5}, {"radius": 0.0, "rounds": 3}, {"rounds": 1}, {"rounds": 9, "share": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("moved", POSITIONS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"resize": "group"}, {"expand": False}], ids=str)
def test_seeds_regions_and_fused_maps_are_those_of_loops(moved, settings):
    saved = saved_run(**settings)
    for image in range(EXAMPLES):
        default = Position((image, 0), **moved)
        rules = PCRESettings(**settings).expansion
        rules = dataclasses.replace(rules, threshold=default.threshold, rounds=default.rounds)
        expected = regions_by_loops(saved, image, default.radius, rules)
        for channel in shown(saved, image):
            at = dataclasses.replace(default, pair=(image, channel), scales=(0.5, 1.0), beta=0.4)
            grown = view(saved, at).grown
            region, _, seeds, groups = expected[channel]
            torch.testing.assert_close(grown.region, region, atol=1e-6, rtol=1e-5)
            assert [seed for seed in grown.seeds.tolist() if seed >= 0] == seeds
            assert [set(row.nonzero()[:, 0].tolist()) for row in grown.joins][: len(groups)] == groups
            assert not grown.joins[len(groups) :].any()
            assert set(seeds) <= set(grown.listed.nonzero()[:, 0].tolist())
            maps, mixed = map_by_hand(saved, at), np.zeros((CLASSES, SIDE, SIDE))
            for other, (part, *_) in expected.items():
                part = part.double().numpy() - float(part.min())
                mixed[other] = (1 - at.share) * maps[other] + at.share * part / (part.max() + 1e-5)
            np.testing.assert_allclose(grown.fused.numpy(), mixed, atol=2e-6)
            by_hand = labels_by_hand(grown.fused.numpy(), shown(saved, image), at.beta)
            assert np.array_equal(grown.label.numpy(), by_hand)


def regions_by_loops(saved, image, radius, rules):
    """{class: (m_r, found, seeds, groups)} of one image."""
    places = list(np.ndindex(GRID, GRID))
    near = torch.tensor([[math.dist(own, place) <= radius for place in places] for own in places])
    masks = saved.masks[image : image + 1].float() * near.view(1, GRID**2, GRID, GRID)
    found = reference(masks, saved.confidence[image : image + 1], saved.tags[image : image + 1], (SIDE, SIDE), rules)
    return {channel: values for (_, channel), values in found.items()}


def test_the_region_and_the_fused_map_are_the_methods_own():
    saved = saved_run(tau=0.6, rounds=4, fusion=0.45)
    at = growth.starting(saved)
    pairs = shown_classes(saved.tags[:1])
    own = PCRESettings(tau=0.6, rounds=4).expansion
    found = refined_regions(saved.masks[:1].float(), saved.confidence[:1], pairs, (SIDE, SIDE), own)
    place = pairs.classes[0].tolist().index(at.pair[1])
    grown = view(saved, at).grown
    torch.testing.assert_close(grown.region, found.masks[0, place])
    assert torch.equal(grown.seeds, found.growth.seeds[0, place])
    maps = torch.zeros(1, CLASSES, SIDE, SIDE)
    for channel, mask, filled in zip(pairs.classes[0].tolist(), found.masks[0], pairs.shown[0], strict=True):
        maps[0, channel] = cam.min_max(mask) * filled
    expected = losses.fused(activation(saved, at)[0], maps, 0.45)
    torch.testing.assert_close(grown.fused, expected[0])
    assert torch.equal(grown.region_label, cam.cam_labels(maps, saved.tags[:1], at.beta)[0])
    assert torch.equal(grown.label, cam.cam_labels(expected, saved.tags[:1], at.beta)[0])


def test_rounds_start_from_one_seed_and_only_add():
    saved = saved_run()
    for pair in saved.pairs:
        grown = [view(saved, Position(pair, rounds=rounds)).grown for rounds in range(1, 7)]
        assert (grown[0].seeds >= 0).sum() == 1
        best = saved.confidence[pair[0], :, pair[1]].argmax()
        assert grown[0].seeds[0] == best, "the first seed is the surest patch, where that is its class"
        for fewer, more in zip(grown, grown[1:], strict=False):
            assert torch.equal(more.seeds[:-1], fewer.seeds) and (more.region >= fewer.region).all()
    assert any((view(saved, Position(pair)).grown.seeds >= 0).sum() > 1 for pair in saved.pairs)


def test_the_gate_keeps_masks_near_their_patch():
    saved = saved_run()
    for pair in saved.pairs:
        wide, none = (view(saved, Position(pair, radius=radius)).grown for radius in (2.0 * GRID, math.inf))
        assert torch.equal(wide.region, none.region)
        near = view(saved, Position(pair, radius=0.0, rounds=1)).grown
        row, column = divmod(int(near.seeds[0]), GRID)
        lit = near.region.nonzero()
        assert ((lit // 4 - torch.tensor([row, column])).abs() <= 1).all(), "a patch, as wide as resizing spreads it"


def test_a_class_without_a_candidate_has_no_region_and_keeps_its_map():
    saved = saved_run()
    pair = saved.pairs[0]
    confidence = saved.confidence.clone()
    confidence[pair[0], :, pair[1]] = 0
    blind = dataclasses.replace(saved, confidence=confidence)
    at = Position(pair, scales=SCALES)
    seen = view(blind, at)
    assert not seen.grown.region.any() and not seen.grown.listed.any() and (seen.grown.seeds == -1).all()
    assert torch.equal(seen.grown.fused[pair[1]], seen.cam[pair[1]])
    assert "No candidate among 144 patches" in explore.heading(blind, at)
    assert Canvas(blind).draw(at).size[0] == explore.WIDTH
    nothing = dataclasses.replace(saved, confidence=torch.zeros_like(saved.confidence))
    assert not view(nothing, at).grown.region.any()


def test_numbers_by_hand():
    truth = torch.tensor([[1, 1, 2, 0], [1, 0, 255, 255]])
    label = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 0]])
    # class 1: right at 2, missed at 1, wrongly at 2; one more lies where nothing is known
    found = measure(label, truth, 0, 3)
    assert found == pytest.approx({"iou": 2 / 5, "recall": 2 / 3, "precision": 2 / 4, "over": 2 / 2})
    missed = measure(label, truth, 1, 3)
    assert missed["iou"] == missed["recall"] == 0 and math.isnan(missed["precision"]) and math.isnan(missed["over"])
    assert math.isnan(measure(torch.zeros_like(truth), truth.masked_fill(truth == 2, 0), 1, 3)["iou"])
    assert math.isinf(measure(truth * 0 + 2, truth * 0, 1, 3)["over"])


def test_the_table_measures_what_is_shown():
    saved = saved_run()
    at = dataclasses.replace(growth.starting(saved), share=0.4)
    image, channel = at.pair
    seen, known = view(saved, at), saved.truth[image] != 255
    rows = {name: cells for name, *cells in explore.table_rows(saved, at)}
    names = ["CAM, scales 0.5 + 1 + 1.5", "region m_r, normalised", "fused: 0.6 CAM + 0.4 region"]
    assert list(rows) == names
    for name, label in zip(names, (seen.label, seen.grown.region_label, seen.grown.label), strict=True):
        ours, theirs = (label == channel + 1)[known], (saved.truth[image] == channel + 1)[known]
        both, right = int((ours & theirs).sum()), [int(part.sum()) for part in (ours | theirs, theirs, ours)]
        ratio = f"{int((ours & ~theirs).sum()) / both:.2f}"
        assert rows[name] == [*(f"{100 * both / total:.1f} %" for total in right), ratio]
    said, shown_text = explore.html(saved, at), explore.text(saved, at)
    assert all(cell in said and cell in shown_text for name in names for cell in (name, *rows[name]))
    seeds, listed = int((seen.grown.seeds >= 0).sum()), int(seen.grown.listed.sum())
    joined = len(set(seen.grown.joins.nonzero()[:, 1].tolist()))
    counted = f"{seeds} seeds; {joined} of {listed} candidates are in the region, of 144 patches"
    assert seeds > 1 and counted in explore.heading(saved, at)


def test_the_heading_says_where_the_run_differs_or_lacks_masks():
    saved, plain = saved_run(expand=False, mask_scales="1"), saved_run(regions=False)
    assert "T does nothing" in explore.heading(saved, growth.starting(saved))
    assert "mixes in those of scales 1 and" in explore.heading(saved, growth.starting(saved))
    at = growth.starting(plain)
    assert at.scales == SCALES and "they need PCRE's confidences" in explore.heading(plain, at)
    assert "knows no class" in explore.heading(plain, dataclasses.replace(at, source="rollout"))
    assert len(explore.table_rows(plain, at)) == 1 and len(Canvas(plain).tiles(at, view(plain, at))) == 4


@pytest.fixture
def quarters():
    """An image of four patches of 26 x 26 pixels, each a colour, as large as a tile; class 0 fills the left half.

    Mask 0 is itself and half of mask 1; patch 3 starts the second round, patch 2 never joins.
    """
    truth = torch.zeros(1, 208, 208, dtype=torch.uint8)
    truth[:, :, :104] = 1
    images = torch.full((1, 3, 208, 208), 100, dtype=torch.uint8)
    values = torch.zeros(1, 2, 1, 2, 208, 208)
    values[0, 0, 0, 0, :, :104], values[0, 0, 0, 0, :104, 104:] = 1.0, 0.6
    masks = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]], [[1, 1], [1, 0]], [[0, 0], [0, 1]]])[None].half()
    confidence = torch.tensor([[[0.9, 0.0], [0.5, 0.0], [0.4, 0.0], [0.3, 0.0]]])
    recipe = TagRecipe(method=PCRESettings(), network="vit-mini", crop=208, cam_scales="1")
    tags = torch.tensor([[1, 0]], dtype=torch.uint8)
    maps = (values, values[:, 0, 0], values[:, 0, 0, 0])
    return Saved(images, truth, tags, (1.0,), *maps, ("background", "a", "b"), recipe, "quarters", "pcre", confidence,
                 masks)  # fmt: skip


CORNERS = ((40, 40), (150, 40), (40, 150), (150, 150))


def test_tiles_show_map_labels_truth_and_growth(quarters):
    canvas, at = Canvas(quarters), Position((0, 0), beta=0.5, rounds=2)
    seen = view(quarters, at)
    assert seen.grown.seeds.tolist() == [0, 3] and seen.grown.listed.all()
    assert [row.nonzero()[:, 0].tolist() for row in seen.grown.joins] == [[0, 1], [3]]
    tiles = [tile for _, tile in canvas.tiles(at, seen)]
    colours = [tuple(colour) for colour in canvas.colours.tolist()]

    def corners(tile):
        return [tile.getpixel(place) for place in CORNERS]

    assert corners(tiles[0]) == [(100,) * 3] * 4
    heats = [explore.HEATS[level].astype(int) for level in (255, 153, 255, 0)]
    expected = [tuple((0.65 * heat + 35).astype(int)) for heat in heats]
    np.testing.assert_allclose(corners(tiles[1]), expected, atol=1)
    assert corners(tiles[2]) == [colours[label] for label in (1, 1, 1, 0)]
    assert corners(tiles[3]) == [colours[label] for label in (1, 0, 1, 0)]
    assert tiles[3].getpixel((103, 60)) == explore.TRUE, "the outline of the true class"
    faded, (first, second) = 0.35 * 100 + 0.65 * 255, explore.round_colours(2)
    over = [(*first, 190), (*first, 190), explore.PALE, (*second, 190)]
    mixed = [[faded + (part - faded) * alpha / 255 for part in colour] for *colour, alpha in over]
    np.testing.assert_allclose(corners(tiles[4]), mixed, atol=1.5)
    assert tiles[4].getpixel((52, 52)) != tiles[4].getpixel((40, 40)), "the seed's number"
    gated = canvas.tiles(dataclasses.replace(at, radius=0.5), seen)[4][1]
    assert gated.getpixel((156, 52)) == second != tiles[4].getpixel((156, 52)), "the disc around the second seed"
    around = {gated.getpixel((place, place)) for place in range(120, 130)}  # 52 + 104 / sqrt 2 is about 125.5
    assert first in around and first not in {tiles[4].getpixel((place, place)) for place in range(120, 130)}
    titles = [words for words, _ in canvas.tiles(at, seen)]
    counts = (104 * 208, 104 * 104)
    assert titles[2] == f"Its labels, beta = 0.5: IoU {100 * counts[0] / sum(counts):.1f} %"
    assert titles[5] == "Region m_r; tau_bin = 0.7, no gate" and titles[6] == "Fused: 0.7 CAM + 0.3 region"


@pytest.mark.parametrize("regions", [True, False])
def test_every_control_changes_the_picture_and_back(regions):
    saved = saved_run(regions)
    explorer = Explorer(saved)
    before, drawn = explorer.numbers.value, explorer.picture.value
    moves = {"pair": saved.pairs[1], "source": "auxiliary", "scales": (0.5,), "beta": 0.3}
    if regions:
        moves |= {"threshold": 0.1, "radius": 1, "rounds": 1, "share": 0.8}
    assert set(moves) == set(explorer.controls)
    for name, value in moves.items():
        start = getattr(explorer.position, name)
        explorer.controls[name].value = value
        assert getattr(explorer.position, name) == value
        assert explorer.numbers.value != before and explorer.picture.value != drawn, name
        assert explorer.numbers.value == explore.html(saved, explorer.position)
        explorer.controls[name].value = start
        assert explorer.numbers.value == before and explorer.picture.value == drawn, name
    assert all(control.description for control in explorer.controls.values())
    words, source = re.fullmatch(r'<img .* alt="(.*)" src="data:image/jpeg;base64,(.*)">', drawn).groups()
    assert words.startswith("Test image 0") and ("No seeds" in words) != regions
    size = Image.open(io.BytesIO(base64.b64decode(source))).size
    assert size == (explore.WIDTH, explorer.canvas.height)


def test_scales_are_for_class_activation_maps_alone():
    explorer = Explorer(saved_run())
    for source, off in (("gradcam", True), ("auxiliary", False), ("rollout", True), ("main", False)):
        explorer.controls["source"].value = source
        assert explorer.controls["scales"].disabled == off
    assert len(explorer.controls["scales"].options) == 7
    assert [pair for _, pair in explorer.controls["pair"].options] == explorer.saved.pairs
    assert len(explorer.saved.pairs) == int(explorer.saved.tags.sum()) == 5


def test_controls_start_at_the_runs_own_values():
    saved = saved_run(tau=0.655, rounds=12, fusion=0.333, r_max=8.0)
    saved = dataclasses.replace(saved, recipe=dataclasses.replace(saved.recipe, beta=0.4321, cam_scales="1,0.5,0.75"))
    explorer = Explorer(saved)
    assert explorer.position == explorer.start
    assert explorer.start == Position(saved.pairs[0], "main", (0.5, 1.0), 0.4321, 0.655, math.inf, 12, 0.333)
    own = next((name, radius) for name, radius in explorer.controls["radius"].options if "training" in name)
    assert own[1] == pytest.approx(8 * GRID / 28) and own[0].startswith("3.43")
    radii = [radius for _, radius in explorer.controls["radius"].options]
    assert radii == sorted(radii) and radii[0] == 0 and radii[-1] == math.inf
    assert radii[-2] < math.hypot(GRID - 1, GRID - 1)
    unscheduled = Explorer(saved_run(gating="none"))
    assert not any("training" in name for name, _ in unscheduled.controls["radius"].options)


def write_run(experiment, root, found):
    folder = folder_of(experiment, root)
    save_state(folder / "outputs.safetensors", found)
    write_json(folder / "metrics.json", {"run": folder.name})


def test_saved_are_the_arrays_of_the_run(tmp_path):
    found, pcre = run_outputs(), PCRE.with_(tau=0.8, beta=0.45)
    write_run(pcre, tmp_path, found)
    saved = growth.load_saved(pcre, tmp_path)
    for name in ("images", "truth", "tags"):
        assert torch.equal(getattr(saved, name), found[f"test_{name}"][:EXAMPLES])
    for name in ("cam", "gradcam", "rollout", "confidence", "masks"):
        assert torch.equal(getattr(saved, name), found[f"explore_{name}"])
    assert saved.scales == SCALES and saved.classes[1] == "Trouser" and saved.grid == (GRID, GRID)
    start = growth.starting(saved)
    assert (start.threshold, start.beta) == (0.8, 0.45)


def test_controls_only_where_somebody_can_move_them(tmp_path, monkeypatch):
    toco, bare = PCRE.with_(method="toco"), PCRE.with_(seed=6)
    write_run(PCRE, tmp_path, run_outputs())
    write_run(toco, tmp_path, run_outputs(regions=False))
    write_run(bare, tmp_path, {"test_tags": torch.ones(2, CLASSES)})
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still, without = (explore.explore(item, tmp_path) for item in (PCRE, toco))
    assert isinstance(still, Figure) and "region m_r, normalised" in texts(still) and "candidates" in texts(still)
    assert "No seeds, region or fused map" in texts(without) and "region m_r" not in texts(without)
    assert "not run" in texts(explore.explore(PCRE.with_(seed=5), tmp_path))
    assert "keeps no maps" in texts(explore.explore(bare, tmp_path))
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    explorer = explore.explore(PCRE, tmp_path)
    assert isinstance(explorer, VBox) and "rounds" in explorer.controls
    assert "rounds" not in explore.explore(toco, tmp_path).controls
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
