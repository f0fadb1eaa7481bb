import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from figures import sweeps
from figures import tags as figures
from figures.common import class_colours
from figures.tables import NOT_RUN, published_grid
from repro.cam import THRESHOLDS
from repro.experiment import resolve
from repro.files import load_state, save_state
from repro.grid import PAPERS, Row
from repro.papers.published import Reference
from repro.runs import folder_of, load_moments, load_outputs
from repro.settings import SettingError
from tests.fake_outputs import texts
from tests.fake_tag_runs import GRID, write_tag_run
from tests.figures.conftest import PCRE
from tests.figures.drawn import band, bars, change_final, final, image, lines, spreads, stored

PLAIN, TOCO, AFA, DUPL = (PCRE.with_(method=name) for name in ("plain", "toco", "afa", "dupl"))
OTHER = PCRE.with_(seed=1)
ABLATIONS = PAPERS["pcre"].ablations
FOREGROUND = ["Trouser", "Pullover", "Dress", "Sneaker", "Bag"]
RECIPE = resolve(PCRE)
KEPT = range(RECIPE.eval_every, RECIPE.steps + 1, RECIPE.eval_every)  # evaluations, all of them moments
WARM, GROWN = (share * RECIPE.steps for share in (0.1, 0.4))  # ends of the warm-up, and of the radius's growth


def change_outputs(root, experiment, **changes):
    path = folder_of(experiment, root) / "outputs.safetensors"
    save_state(path, load_state(path) | changes)


def steps_shown(figure):
    """Of a figure of growth: the steps above its first row."""
    return [int(axes.get_title().split()[1]) for axes in figure.axes if axes.get_title().startswith("step ")]


def blended(picture, value, colour):
    """What an overlay must be, pixel by pixel."""
    share = 0.85 * np.asarray(value, dtype=np.float64)[..., None]
    grey = np.asarray(picture, dtype=np.float64).mean(0)[..., None] / 255
    return grey * (1 - share) + share * colour


# Images


def test_a_cam_shows_the_largest_class_that_the_tags_name(runs):
    figure = figures.cam_panels([PLAIN, PCRE, TOCO], runs, images=2)
    tiles, colours = np.array(figure.axes).reshape(2, 5), class_colours(6)
    kept = [load_outputs(folder_of(item, runs)) for item in (PLAIN, PCRE)]
    chosen = [i for i, tags in enumerate(kept[0]["test_tags"].tolist()) if sum(tags) >= 2][:2]
    for index, row in zip(chosen, tiles, strict=True):
        shown = kept[0]["test_images"][index].numpy()
        assert (image(row[0]) == shown.transpose(1, 2, 0)).all()
        for axes, outputs in zip(row[1:3], kept, strict=True):
            maps = outputs["test_cam"][index].float().numpy() * outputs["test_tags"][index].numpy()[:, None, None]
            assert image(axes) == pytest.approx(blended(shown, maps.max(0), colours[1 + maps.argmax(0)]), abs=1e-6)
        labels = np.where(maps.max(0) > 0.3, 1 + maps.argmax(0), 0)  # of PCRE, at the recipe's beta
        assert (image(row[3]) == colours[labels]).all()
        assert (image(row[4]) == colours[kept[0]["test_truth"][index].numpy()]).all()
    for axes, item, name in zip(tiles[0, 1:3], (PLAIN, PCRE), ("Plain CAM", "PCRE"), strict=True):
        assert axes.get_title() == f"{name}\n{100 * final(runs, item)['cam_miou']:.1f} %"
    said = texts(figure)
    assert "not run: ToCo" in said and "cut at 0.3" in said and "2 test images" in said
    assert "Fashion scenes, 500 tagged images, mini scale, seed 0 (n = 1)" in said


def test_images_of_one_class_are_passed_over_unless_there_are_no_others(copied):
    outputs = load_outputs(folder_of(PCRE, copied))
    one = torch.zeros_like(outputs["test_tags"])
    one[:, 0] = 1
    two = one.clone()
    two[3, 1] = two[5, 1] = 1
    for tags, expected in ((two, [3, 5]), (one, [0, 1, 2])):
        change_outputs(copied, PCRE, test_tags=tags)
        tiles = np.array(figures.cam_panels([PCRE], copied, images=3).axes).reshape(-1, 4)
        assert len(tiles) == len(expected)
        for axes, index in zip(tiles[:, 0], expected, strict=True):
            assert (image(axes) == outputs["test_images"][index].permute(1, 2, 0).numpy()).all()


def test_regions_are_those_of_the_first_class_shown_at_each_moment(runs):
    figure = figures.region_growth(PCRE, runs, images=2, columns=6)
    tiles = [axes for axes in figure.axes if axes.images]
    moments, outputs = load_moments(folder_of(PCRE, runs)), load_outputs(folder_of(PCRE, runs))
    steps, colours = list(KEPT), class_colours(6)
    assert len(steps) == 6 and len(tiles) == 18
    for place, axes in enumerate(tiles[:12]):
        index, step = place // 6, steps[place % 6]
        label = 1 + outputs["pool_tags"][index].tolist().index(1)
        shown = outputs["pool_images"][index].numpy()
        region = moments[step]["regions"][index, label - 1].float()
        large = torch.nn.functional.interpolate(region[None, None], shown.shape[1:], mode="bilinear")[0, 0]
        assert image(axes) == pytest.approx(blended(shown, large, colours[label]), abs=1e-6)
        assert len(axes.collections) == 2  # the truth's outline
        if index == 0:
            assert axes.get_title() == f"step {step}\nr = {float(moments[step]['radius']):.2f}"
    for axes, step in zip(tiles[12:], steps, strict=True):
        r = float(moments[step]["radius"])
        near = [[math.hypot(i - GRID[0] // 2, j - GRID[1] // 2) <= r for j in range(GRID[1])] for i in range(GRID[0])]
        assert (image(axes)[..., 0] < 1).tolist() == near


def test_the_schedule_is_half_a_cosine_wave_between_its_marks(runs):
    axes = figures.region_growth(PCRE, runs).axes[-1]
    schedule, kept, *marks = axes.lines
    largest = 5 * GRID[0] / 28
    for step, radius in zip(*schedule.get_data(), strict=True):
        wave = (1 - math.cos(math.pi * min(max((step / RECIPE.steps - 0.1) / 0.3, 0), 1))) / 2
        assert radius == pytest.approx(1 + (largest - 1) * wave)
    assert kept.get_ydata() == pytest.approx([float(m["radius"]) for m in load_moments(folder_of(PCRE, runs)).values()])
    assert [mark.get_xdata()[0] for mark in marks] == pytest.approx([WARM, GROWN])
    assert [text.get_text() for text in axes.texts] == ["10 %", "40 %"]


def test_without_a_gate_the_radius_is_the_grids_side(tmp_path):
    open_ = PCRE.with_(gating="none")
    write_tag_run(open_, tmp_path)
    axes = figures.region_growth(open_, tmp_path).axes
    assert axes[-1].lines[0].get_ydata() == pytest.approx(max(GRID))
    assert all((image(tile) < 1).all() for tile in axes[12:18])


def test_of_many_moments_evenly_spread_ones_are_shown(tmp_path):
    write_tag_run(PCRE, tmp_path, evaluations=10)
    for columns, tenths in ((4, (1, 4, 7, 10)), (20, range(1, 11))):
        figure = figures.region_growth(PCRE, tmp_path, images=1, columns=columns)
        assert steps_shown(figure) == [tenth * RECIPE.steps // 10 for tenth in tenths]


# Over training


def test_curves_are_means_over_seeds_with_the_stages_marked(runs):
    figure = figures.miou_curves([PCRE, OTHER, PLAIN, TOCO], runs)
    for axes, name in zip(figure.axes, ("cam_miou", "cam_miou_train", "miou"), strict=True):
        values = stored(runs, [PCRE, OTHER], name)
        assert lines(axes)["PCRE"] == pytest.approx(values.mean(0))
        assert band(axes, RECIPE.steps) == pytest.approx((values[:, -1].min(), values[:, -1].max()))
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
        assert marks == pytest.approx([WARM, GROWN])
        assert lines(axes)["PCRE"].shape == (len(KEPT),)
        assert "ToCo (not run)" in lines(axes)
    said = texts(figure)
    assert "10 %: warm-up of the head ends, 40 %: PCRE's regions join its CAM" in said and "band: range" in said


# Of the trained network


def test_thresholds_mark_beta_and_what_is_best_on_this_set(runs):
    figure = figures.threshold_curves([PCRE, OTHER, DUPL, DUPL.with_(seed=1), TOCO], runs)
    (axes,) = figure.axes
    values = np.array([final(runs, item)["cam_curve"] for item in (PCRE, OTHER)], dtype=float)
    mean = values.mean(0)
    best = max(range(100), key=lambda at: (mean[at], -at))
    label = f"PCRE: best {100 * mean[best]:.1f} % at {THRESHOLDS[best]:.2f}"
    assert lines(axes)[label] == pytest.approx(mean)
    mark = next(line for line in axes.lines if line.get_markersize() == 11)
    assert mark.get_xydata()[0] == pytest.approx([THRESHOLDS[best], mean[best]])
    assert band(axes, 0.3) == pytest.approx((values[:, 30].min(), values[:, 30].max()))
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.3]
    said = texts(figure)
    assert "DuPL (n = 1): best" in said and "ToCo (not run)" in said and "chosen on this very set" in said


def by_hand(runs, experiment, quantity):
    """Of each class, from the confusion of CAMs."""
    counts = np.array(final(runs, experiment)["cam_confusion"], dtype=float)
    true, predicted, real = np.diag(counts), counts.sum(0), counts.sum(1)
    return {"ratio": (predicted - true) / true, "share": 1 - true / predicted,
            "iou": true / (predicted + real - true)}[quantity]  # fmt: skip


def test_over_activation_is_false_over_true_positives_by_class(runs):
    figure = figures.over_activation_bars([PCRE, OTHER, DUPL, TOCO], runs)
    for axes, quantity in zip(figure.axes, ("ratio", "share"), strict=True):
        values = np.array([by_hand(runs, item, quantity)[1:] for item in (PCRE, OTHER)])
        drawn = bars(axes, True)
        assert drawn["PCRE"] == pytest.approx(values.mean(0))
        assert drawn["DuPL"] == pytest.approx(by_hand(runs, DUPL, quantity)[1:])
        assert spreads(axes, 0) == pytest.approx(values.std(0, ddof=1))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == FOREGROUND
    said = texts(figure)
    assert "FP / TP is a reconstruction" in said and "ToCo (not run)" in said and "cross" not in said


def test_infinite_over_activation_is_a_cross_and_a_cut_bar_says_its_value(copied):
    def change(found):
        found["over_activation"]["ratio"][1:4] = [None, 17.25, None]

    change_final(copied, PCRE, change)
    change_final(copied, OTHER, lambda found: found["over_activation"]["ratio"].__setitem__(1, None))
    figure = figures.over_activation_bars([PCRE, OTHER], copied)
    left, right = figure.axes
    others = by_hand(copied, OTHER, "ratio")
    drawn = bars(left, True)["PCRE"]
    assert drawn[0] == 0 and drawn[1] == figures.CUT and drawn[2] == pytest.approx(others[3])
    assert [text.get_text() for text in left.texts] == [f"{(17.25 + others[2]) / 2:.1f}"]
    crosses = [line.get_ydata()[0] for line in left.lines if line.get_marker() == "x"]
    assert crosses == pytest.approx([0, 2]) and not any(line.get_marker() == "x" for line in right.lines)
    assert "infinite or undefined" in texts(figure) and right.get_xlim() == (0, 1)
    assert left.get_xlim()[1] == figures.CUT


def test_iou_by_class_of_cams_and_of_segmentation(runs):
    cams, head = figures.iou_by_class([PCRE, OTHER, DUPL.with_(seed=1)], runs).axes
    found = [final(runs, item) for item in (PCRE, OTHER)]
    expected = [[*by_hand(runs, item, "iou"), run["cam_miou"]] for item, run in zip((PCRE, OTHER), found, strict=True)]
    assert bars(cams, True)["PCRE"] == pytest.approx(np.mean(expected, axis=0))
    assert bars(head, True)["PCRE"] == pytest.approx(np.mean([[*run["iou"], run["miou"]] for run in found], axis=0))
    assert [label.get_text() for label in cams.get_yticklabels()] == ["background", *FOREGROUND, "mean"]
    assert f"DuPL ({NOT_RUN})" in bars(cams, True)


# Ablations


def write_rows(root, table, values):
    """Runs of a table, two seeds: the value of a row for CAMs, .1 less for the head, .02 more with each seed."""
    for row in table.rows:
        for item in table.cell(row, table.small[0], "mini", (0, 1)):
            if (value := values.get(row.label)) is not None:
                better = value + 0.02 * item.seed
                write_tag_run(item, root, evaluations=1, cam_miou=better, miou=better - 0.1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Runs of two ablations, of some of their rows."""
    root = tmp_path_factory.mktemp("swept")
    labels = {"lambda_1 = 2.5": 0.5, "lambda_1 = 1.0 (default)": 0.7, "lambda_1 = 2.0 (text and code)": 0.6}
    write_rows(root, ABLATIONS["1e"].only(labels), labels)
    write_rows(root, ABLATIONS["1h"].only(["none"]), {"none": 0.4})  # its default is the other's
    return root


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_an_ablation_is_a_curve_over_its_parameter_with_published_ones_apart(swept):
    table = ABLATIONS["1e"]
    cam, head, *published = sweeps.ablation_curves(table, "mini", (0, 1), swept).axes
    for axes, less in ((cam, 0), (head, 10)):
        line = axes.lines[0]
        assert line.get_xdata().tolist() == [1, 3, 4] and line.get_linestyle() == "-"  # of .5, 1, 1.5, 2, 2.5
        assert line.get_ydata() == pytest.approx((np.array([71, 61, 51]) - less) / 100)
        assert [2 * spread for spread in spreads(axes)] == pytest.approx([0.02 * math.sqrt(2)] * 3)
        assert ticks(axes) == [f"0.5\n{NOT_RUN}", "1", f"1.5\n{NOT_RUN}", "2", "2.5"]
        assert "n = 2" in axes.get_title() and axes.get_xlabel() == "lambda_1"
    for axes, reference in zip(published, table.references, strict=True):
        grid = published_grid(table, reference)
        printed = [grid.loc[f"lambda_1 = {text}"].iloc[0] for text in ("0.5", "1.0 (default)", "1.5", "2.5")]
        assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 4]
        assert axes.lines[0].get_ydata() == pytest.approx([float(text) / 100 for text in printed])
        assert axes.get_title().startswith("published") and "Pascal VOC 2012 val, ViT-B/16" in axes.get_title()
        assert ticks(axes)[3] == "2\nnot given" and not axes.get_shared_y_axes().joined(axes, cam)
    for axes in (cam, *published):
        (shade,) = axes.patches
        assert shade.get_x() + shade.get_width() / 2 == pytest.approx(1)  # the default


def test_words_stay_in_the_tables_order_and_are_not_joined(swept):
    cam, _, published, _ = sweeps.ablation_curves(ABLATIONS["1h"], "mini", (0, 1), swept).axes
    assert ticks(cam) == ["none", f"fixed\n{NOT_RUN}", "cosine"] and ticks(published) == ["none", "fixed", "cosine"]
    for axes, expected in ((cam, [0.41, 0.71]), (published, [0.75, 0.753, 0.763])):
        assert axes.lines[0].get_ydata() == pytest.approx(expected)
        assert axes.lines[0].get_linestyle() == "None"


def test_what_a_table_does_not_print_is_not_given(swept):
    table = replace(ABLATIONS["1e"], references=(Reference("PCRE", "Tab. 1e", "cam_miou", part="val"),))
    *_, published, missing = sweeps.ablation_curves(table, "mini", (0,), swept).axes
    assert len(published.lines[0].get_xdata()) == 4 and len(missing.lines[0].get_xdata()) == 0
    assert all(tick.endswith("not given") for tick in ticks(missing))


def test_numbers_are_sorted_and_the_default_row_needs_no_override():
    table = ABLATIONS["1c"]
    rows = (Row("T = 10", "pcre", {"rounds": 10}), Row("default", "pcre"), Row("T = 1", "pcre", {"rounds": 1}))
    found = sweeps.sweep(replace(table, rows=rows), table.small[0], "mini")
    assert found.values == (1, 5, 10) and [row.label for row in found.rows] == ["T = 1", "default", "T = 10"]
    assert (found.symbol, found.default, found.numeric) == ("T", 5, True)


@pytest.mark.parametrize(
    "rows",
    [
        (Row("a", "pcre", {"tau": 0.6}), Row("b", "pcre", {"rounds": 3})),
        (Row("a", "pcre", {"beta": 0.6}), Row("b", "toco", {"beta": 0.5})),
    ],
)
def test_a_curve_has_one_setting_of_one_method(rows, runs):
    table = replace(ABLATIONS["1a"], rows=rows)
    assert sweeps.sweep(table, table.small[0], "mini") is None
    with pytest.raises(SettingError, match="more than one setting"):
        sweeps.ablation_curves(table, "mini", (0,), runs)


# All


def test_the_papers_figures_have_names_of_their_own(runs, swept):
    assert [name for name, *_ in figures.pcre_figures("mini", (9,), runs)] == ["main"]
    names = [name for name, *_ in figures.pcre_figures("mini", (0,), runs)]
    assert len(set(names)) == len(names)
    assert {"cams", "masks", "over_activation", "classes", "thresholds", "curves", "growth", "loss", "main"} <= set(
        names
    )
    drawn = [name for name, *_ in figures.pcre_figures("mini", (0,), swept) if "1e" in name or "1h" in name]
    assert drawn == ["curve_1e", "curve_1h", "ablation_1e", "ablation_1h"]
