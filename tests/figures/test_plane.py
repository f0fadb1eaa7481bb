import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.collections import PathCollection
from matplotlib.contour import ContourSet

from figures import plane as figures
from figures import style
from repro.data.masks import palette
from repro.files import save_state
from repro.runs import folder_of, load_moments, load_outputs
from repro.settings import SettingError
from tests.fake_mask_runs import POOL, SIZE, STEPS
from tests.fake_outputs import texts
from tests.figures.conftest import CSL


def kept(runs, step=STEPS[-1]):
    """Truth, confidence, residual and label of the pool as NumPy arrays (P, H, W)."""
    folder = folder_of(CSL, runs)
    seen = load_moments(folder)[step]
    return (
        load_outputs(folder)["pool_truth"].numpy(),
        *(seen[key].numpy() for key in ("confidence", "residual", "label")),
    )


def by_svd(confidence, residual, alpha=8.0):
    """CSL's weight of an image, its reliable means of c and r: after the words of the method, with the SVD."""
    points = np.stack([confidence.ravel(), residual.ravel()], 1).astype(np.float64)
    left = np.abs(np.linalg.svd(points, full_matrices=False)[0])
    parts = [points[left.argmax(1) == index] for index in (0, 1)]
    part = max(parts, key=lambda pixels: pixels[:, 0].mean())
    mean, spread = part.mean(0), np.sqrt(part.var(0, ddof=1) + 1e-8)
    z = (points - mean) / spread * (1, -1)
    weight = np.where((z > 0).any(1), 1, np.exp(-(z**2).sum(1) / alpha))
    return weight.reshape(confidence.shape), mean


def share(weight, right):
    return f"keeps {100 * weight.mean():.1f} %, {100 * (weight * right).sum() / weight.sum():.1f} % right"


def scatter(axes):
    (found,) = [item for item in axes.collections if isinstance(item, PathCollection)]
    return found


def boundaries(axes):
    """Corners (low c side's c, high r side's r) of each black line."""
    lines = [item for item in axes.collections if isinstance(item, ContourSet) and list(item.levels) == [0.5]]
    return [item.get_paths()[0].vertices for item in lines if tuple(item.get_edgecolor()[0]) == (0, 0, 0, 1)]


def test_the_plane_shows_every_known_pixel_in_the_colour_of_its_correctness(runs):
    truth, confidence, residual, label = (part[2] for part in kept(runs))
    known = truth != 255
    plane = figures.confidence_plane(CSL, runs, image=2).axes[2]
    dots = scatter(plane)
    drawn = np.array([*dots.get_offsets().T, dots.get_facecolor()[:, 0] == style.BLUE[0]])
    expected = np.array([confidence[known], residual[known], (label == truth)[known]])
    order, other = np.lexsort(drawn), np.lexsort(expected)
    assert drawn[:, order] == pytest.approx(expected[:, other])
    image, verdict = (axes.images[0].get_array() for axes in plane.child_axes)
    assert (image == load_outputs(folder_of(CSL, runs))["pool_images"][2].permute(1, 2, 0).numpy()).all()
    assert (verdict[known & (label == truth)] == style.BLUE).all() and (
        verdict[known & (label != truth)] == style.RED
    ).all()


def test_histograms_count_every_pixel_once(runs):
    truth, confidence, residual, label = kept(runs)
    known, bins = truth != 255, 60
    top, _, _, side = figures.confidence_plane(CSL, runs, "all").axes
    for axes, values, flip in ((top, confidence.clip(0, figures.CERTAIN), 1), (side, residual, -1)):
        for patch, hit in zip(axes.patches, (label == truth, label != truth), strict=True):
            corners = patch.get_xy()[1 : 2 * bins : 2, ::flip]  # left end and height of each bar
            edges = [*corners[:, 0], patch.get_xy()[2 * bins, ::flip][0]]
            assert corners[:, 1] == pytest.approx(np.histogram(values[known & hit].astype(float), edges)[0])
            assert corners[:, 1].sum() == (known & hit).sum()


def test_the_caption_says_what_threshold_and_split_keep(runs):
    truth, confidence, residual, label = (part[0] for part in kept(runs))
    known = truth != 255
    right, (weight, _) = (label == truth)[known], by_svd(confidence, residual)
    said = texts(figures.confidence_plane(CSL, runs, threshold=0.8))
    assert f"threshold 0.8: {share((confidence >= 0.8)[known], right)}" in said
    assert f"CSL, w = 1 beyond the line: {share((weight == 1)[known], right)}" in said
    assert f"CSL, weighted by w: {share(weight[known], right)}" in said
    assert f"right label: {100 * right.mean():.1f} % of the pixels" in said
    assert f"image 0 of the pool at step {STEPS[-1]}" in said and f"{known.sum():,} pixels" in said
    assert "Fashion scenes, 20 masks, tiny scale, seed 0 (n = 1)" in said
    wide, (weight, _) = texts(figures.confidence_plane(CSL, runs, alpha=50.0)), by_svd(confidence, residual, 50.0)
    assert f"CSL, weighted by w: {share(weight[known], right)}" in wide


def test_the_black_line_turns_at_the_reliable_means(runs):
    _, confidence, residual, _ = kept(runs)
    plane = figures.confidence_plane(CSL, runs, image=1).axes[2]
    (corners,) = boundaries(plane)
    mean = by_svd(confidence[1], residual[1])[1]
    assert 1 - corners[:, 0].max() == pytest.approx(1 - mean[0], rel=0.03)
    assert corners[:, 1].min() == pytest.approx(mean[1], rel=0.03)
    strict = figures.confidence_plane(CSL, runs, image=1, rule="and").axes[2]
    (corners,) = boundaries(strict)
    assert 1 - corners[:, 0].min() == pytest.approx(1 - mean[0], rel=0.03)
    assert corners[:, 1].max() == pytest.approx(mean[1], rel=0.03)


def test_all_images_have_a_line_each_and_pooled_numbers(runs):
    truth, confidence, residual, label = kept(runs)
    figure = figures.confidence_plane(CSL, runs, "all")
    means = [by_svd(*pair)[1] for pair in zip(confidence, residual, strict=True)]
    turns = [corners[:, 1].min() for corners in boundaries(figure.axes[2])]
    assert turns == pytest.approx([mean[1] for mean in means], rel=0.03) and len(turns) == POOL
    weight, known = np.stack([by_svd(*pair)[0] for pair in zip(confidence, residual, strict=True)]), truth != 255
    assert f"CSL, weighted by w: {share(weight[known], (label == truth)[known])}" in texts(figure)
    assert not figure.axes[2].child_axes and f"{POOL} images of the pool" in texts(figure)


def test_a_large_set_of_pixels_is_thinned_and_says_so(runs, monkeypatch):
    monkeypatch.setattr(figures, "SHOWN", 500)
    figure = figures.confidence_plane(CSL, runs, "all")
    assert len(scatter(figure.axes[2]).get_offsets()) == 500 and "500 of them drawn" in texts(figure)


def test_moments_and_images_count_as_in_a_sequence(runs):
    assert f"at step {STEPS[0]}" in texts(figures.confidence_plane(CSL, runs, moment=0))
    assert figures.read_moment(CSL, runs, -2).step == STEPS[-2]
    found = figures.read_moment(CSL, runs)
    assert torch.equal(found.only(-1).label, found.label[-1:]) and found.only(-1).step == STEPS[-1]
    for moment in (len(STEPS), -len(STEPS) - 1):
        with pytest.raises(SettingError, match=f"keeps {len(STEPS)} evaluations"):
            figures.confidence_plane(CSL, runs, moment=moment)
    for image in (POOL, -POOL - 1, "some", 1.0):
        with pytest.raises(SettingError, match=f"keeps {POOL} images"):
            figures.confidence_plane(CSL, runs, image=image)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("right", [True, False])
def test_saturated_pixels_are_on_the_frame(copied, right, tmp_path):
    truth = load_outputs(folder_of(CSL, copied))["pool_truth"]
    seen = {
        "confidence": torch.ones(truth.shape),
        "residual": torch.zeros(truth.shape),
        "label": truth * right + (not right),
    }
    save_state(folder_of(CSL, copied) / "moments" / "900.safetensors", seen)
    figure = figures.confidence_plane(CSL, copied, image=3)
    dots = scatter(figure.axes[2]).get_offsets()
    assert (dots[:, 0] == figures.CERTAIN).all() and (dots[:, 1] == figures.SMALLEST).all()
    assert style.save(figure, tmp_path / "a.png").stat().st_size > 10_000


def test_pixels_of_unknown_truth_are_not_drawn(copied):
    folder = folder_of(CSL, copied)
    outputs = load_outputs(folder)
    outputs["pool_truth"][0] = 255
    save_state(folder / "outputs.safetensors", outputs)
    assert "nothing of this was kept" in texts(figures.confidence_plane(CSL, copied))
    rest = figures.confidence_plane(CSL, copied, "all")
    assert len(scatter(rest.axes[2]).get_offsets()) == (POOL - 1) * SIZE[0] * (SIZE[1] - 1)


def test_selection_is_the_weighted_mean_over_known_pixels():
    weight = torch.tensor([0.5, 1.0, 0.25, 1.0])
    right, known = torch.tensor([True, False, True, True]), torch.tensor([True, True, True, False])
    assert figures.selection(weight, right, known) == pytest.approx((1.75 / 3, 0.75 / 1.75))
    share, accuracy = figures.selection(weight * 0, right, known)
    assert share == 0 and np.isnan(accuracy)
    assert np.isnan(figures.selection(weight, right, known & False)).all()


def test_weight_maps_are_the_arrays_of_the_run(runs):
    truth, confidence, residual, label = kept(runs)
    figure = figures.weight_maps(CSL, runs, images=3, threshold=0.9)
    tiles = np.array(figure.axes[:18]).reshape(3, 6)
    colours = figures.class_colours(6)
    for index, row in enumerate(tiles):
        image, true, pseudo, verdict, cut, soft = (axes.images[0].get_array() for axes in row)
        assert (image == load_outputs(folder_of(CSL, runs))["pool_images"][index].permute(1, 2, 0).numpy()).all()
        assert (true == colours[truth[index]]).all() and (pseudo == colours[label[index]]).all()
        weight = by_svd(confidence[index], residual[index])[0]
        for drawn, expected in ((cut, 1.0 * (confidence[index] >= 0.9)), (soft, weight)):
            assert np.abs(drawn - colormaps["viridis"](expected)[..., :3]).max() < 0.03  # two of its 256 levels
        known, hit = truth[index] != 255, label[index] == truth[index]
        assert (verdict[known & hit] == style.BLUE).all() and (verdict[known & ~hit] == style.RED).all()
        assert row[3].get_xlabel() == f"{100 * hit[known].mean():.1f} % right"
        assert row[5].get_xlabel() == share(weight[known], hit[known])
    said = texts(figure)
    names = ("background", "Trouser", "Pullover", "Dress", "Sneaker", "Bag")
    assert all(names[k] in said for k in np.unique(label[:3])) and "unknown" in said
    assert f"3 of {POOL} kept images" in said and f"step {STEPS[-1]}" in said


def test_class_colours_are_different_and_those_of_voc_where_classes_are_many():
    few = figures.class_colours(6)
    assert len({tuple(colour) for colour in few[[0, 1, 2, 3, 4, 5, 255]]}) == 7
    assert not {tuple(few[k]) for k in range(6)} & {style.BLUE, style.RED}  # right and wrong
    assert (figures.class_colours(21) == palette(21) / 255).all()
    assert len(figures.classes_of("voc")) == 21 and len(figures.classes_of("cityscapes")) == 19
