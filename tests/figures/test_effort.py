"""Across papers: effort counted on scenes, points over seeds, what is not run, and the two figures."""

import dataclasses
import math

import pytest
from matplotlib.colors import to_rgba

from figures import across, effort, style
from figures.effort import FULL, PIXELS, TAGGED, Effort, Point
from figures.tables import Summary
from repro.data.masks import IGNORE
from repro.data.scenes import scenes
from repro.data.scribbles import scribbles_of
from repro.experiment import Experiment, run_id
from repro.grid import PAPERS
from repro.runs import folder_of
from repro.settings import SettingError
from tests.fake_mask_runs import write_mask_run
from tests.fake_outputs import texts
from tests.fake_runs import write_run
from tests.fake_scribble_runs import write_scribble_run
from tests.fake_tag_runs import write_tag_run

IMAGES, SIDE = 40, 64  # of scenes at tiny


@pytest.fixture(scope="module")
def train():
    return scenes("train", IMAGES, SIDE)


# Effort


def test_masks_count_every_pixel_of_the_shown_images():
    found = effort.count("few masks", 10, 3, IMAGES, SIDE, 1)
    assert found == Effort(PIXELS, 10 * SIDE**2 / IMAGES, 10, IMAGES) and found.say() == "1,024.0 labelled pixels"
    assert effort.count(FULL, 0, 0, IMAGES, SIDE, 1) == Effort(PIXELS, SIDE**2, IMAGES, IMAGES)


def test_scribbles_count_marked_pixels(train):
    for length, width in ((0, 1), (30, 1), (100, 3)):
        drawn = [scribbles_of(mask.numpy(), length / 100, width) for mask in train.masks]
        marked = [int((scribbles != IGNORE).sum()) for scribbles in drawn]
        found = effort.count("scribbles", length, 0, IMAGES, SIDE, width)
        assert found.per_image * IMAGES == pytest.approx(sum(marked), abs=1e-9) and found.unit == PIXELS
        assert found.marked == sum(map(bool, marked)) == IMAGES


def test_tags_count_classes_of_the_shown_images(train):
    tags = [len(set(mask.unique().tolist()) - {0}) for mask in train.masks]
    everything = effort.count("image tags", IMAGES, 0, IMAGES, SIDE, 1)
    assert (everything.unit, everything.marked) == (TAGGED, IMAGES)
    assert everything.per_image == pytest.approx(sum(tags) / IMAGES, rel=1e-6)
    few = [effort.count("image tags", 8, seed, IMAGES, SIDE, 1) for seed in (0, 1)]
    assert [one.marked for one in few] == [8, 8] and 8 / IMAGES <= few[0].per_image < everything.per_image


def test_effort_follows_the_recipe_of_an_experiment():
    assert effort.effort_of(Experiment("csl", "unimatch", "scenes", 20, 0, "tiny")).per_image == 20 * SIDE**2 / IMAGES
    scribbled, full = (
        effort.effort_of(Experiment("trust_region", method, "scenes", 30, 0, "tiny")) for method in ("adm", "full")
    )
    assert 0 < scribbled.per_image < SIDE**2 / 10 and full.per_image == SIDE**2
    with pytest.raises(ValueError, match="cifar10"):
        effort.effort_of(Experiment("commatch", "fixmatch", "cifar10", 40, 0, "paper"))


# Points


@pytest.fixture
def root(tmp_path):
    """Runs at tiny: two seeds of CSL with 20 masks, one of PCRE, one of Grid-GD at 100, two of full supervision, and
    one of it at another recorded length, which no table has."""
    for seed, miou in ((0, 0.5), (1, 0.6)):
        item = Experiment("csl", "csl", "scenes", 20, seed, "tiny")
        write_mask_run(item, tmp_path, figures=False, miou=miou, ece_15=0.1 * seed)
    item = Experiment("pcre", "pcre", "scenes", 500, 0, "tiny")
    write_tag_run(item, tmp_path, figures=False, evaluations=1, miou=0.4, ece_15=None)
    for method, length, seed, miou in (("grid_gd", 100, 0, 0.45), ("full", 100, 0, 0.75), ("full", 30, 0, 0.9),
                                       ("full", 100, 1, 0.65)):  # fmt: skip
        item = Experiment("trust_region", method, "scenes", length, seed, "tiny")
        write_scribble_run(item, tmp_path, figures=False, miou=miou, ece_15=0.05)
    return tmp_path


def test_a_point_for_each_row_and_budget_and_one_for_full_supervision(root):
    points = effort.supervised("tiny", (0, 1), root)
    rows = {paper: len(PAPERS[paper].tables["main"].rows) for paper in ("csl", "pcre", "trust_region")}
    assert len(points) == 3 * rows["csl"] + rows["pcre"] + 5 * (rows["trust_region"] - 1) + 1
    by_name = {(point.kind, f"{point.label}, {point.budget}"): point for point in points}
    half = pytest.approx(0.1 / math.sqrt(2))
    assert by_name["few masks", "CSL, 20 masks"].metrics["miou"] == Summary(pytest.approx(0.55), half, 2)
    tags = by_name["image tags", "PCRE, 500 tagged images"]
    assert tags.metrics["miou"] == Summary(0.4, None, 1) and tags.metrics["ece_15"].n == 0 and tags.planned == 2
    assert by_name["scribbles", "Grid-GD, scribble length 100 %"].metrics["miou"].mean == 0.45
    full = points[-1]
    assert (full.kind, full.budget, full.planned, len(full.finished)) == (FULL, "all masks", 2, 2)
    assert full.metrics["miou"] == Summary(pytest.approx(0.7), half, 2)
    assert sum(bool(point.finished) for point in points) == 4
    frame = effort.supervision_frame(points).set_index(["method", "budget"])
    assert frame.loc[("CSL", "20 masks")].tolist() == [
        "few masks", "2,048.0 labelled pixels", "20 of 40", "55.00 ± 7.07 (n = 2)", "5.00 ± 7.07 (n = 2)",
    ]  # fmt: skip
    assert frame.loc[("CSL", "10 masks"), "mIoU (%)"] == "not run"
    assert frame.loc[("PCRE", "500 tagged images")].tolist()[-2:] == ["40.00 (n = 1 of 2)", "undefined"]
    (folder_of(Experiment("csl", "csl", "scenes", 20, 1, "tiny"), root) / "metrics.json").unlink()
    masks = next(
        point for point in effort.supervised("tiny", (0, 1), root) if (point.label, point.budget) == ("CSL", "20 masks")
    )
    assert masks.metrics["miou"].n == len(masks.finished) == 1, "points read saved runs only"
    assert effort.supervised("paper", (0,)) == []
    with pytest.raises(SettingError, match="scale"):
        effort.supervised("huge", (0,))


def test_classifiers_are_counted_once_and_at_one_budget(tmp_path):
    items = [
        *PAPERS["commatch"].main_experiments("mini", (0, 1)),
        *PAPERS["calibratemix"].main_experiments("mini", (0,)),
    ]
    for number, item in enumerate(items):
        write_run(item, tmp_path, error=0.3 - 0.01 * number, accuracy=0.7 + 0.01 * number, ece_15=0.1)
    points = effort.classified("mini", (0, 1), tmp_path)
    labels = [point.label for point in points]
    assert len(set(labels)) == len(labels) and {"FixMatch", "ComMatch", "FlexMatch + CalibrateMix"} <= set(labels)
    runs = [run_id(item) for point in points for item in point.experiments]
    assert len(set(runs)) == len(runs)
    assert {(item.data, item.labels) for point in points for item in point.experiments} == {("fashion", 100)}
    frame = effort.calibration_frame(points).set_index("method")
    assert frame.loc["ComMatch"].tolist() == ["75.00 ± 2.83 (n = 2)", "25.00 ± 2.83 (n = 2)", "10.00 ± 0.00 (n = 2)"]
    assert set(frame.loc["UPS"]) == {"not run"}
    labels = [point.label for point in effort.classified("paper", (0,))]  # FixMatch has another ratio in each paper
    assert {"FixMatch (ComMatch's recipe)", "FixMatch (CalibrateMix's recipe)", "ComMatch"} <= set(labels)


# Figures


def marks(axes):
    """Label -> (x, y) of each line's points."""
    return {box.get_label(): box[0].get_xydata().tolist() for box in axes.containers}


def test_effort_figure_puts_tags_and_pixels_apart(root):
    figure = across.effort(effort.supervised("tiny", (0, 1), root))
    tags, pixels = figure.axes
    ((x, y),) = marks(tags)["image tags: PCRE (n = 1)"]
    assert y == pytest.approx(40) and 1 <= x <= 4
    assert marks(pixels)["few masks: CSL (n = 2)"] == [[pytest.approx(2048), pytest.approx(55)]]
    assert marks(pixels)["full supervision (n = 2)"] == [[pytest.approx(4096), pytest.approx(70)]]
    assert pixels.get_xscale() == "log" and tags.get_xscale() == "linear"
    levels = [line for axes in figure.axes for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert [line.get_ydata()[0] for line in levels] == [pytest.approx(70)] * 2
    words = texts(figure)
    assert "tiny scale, seeds 0, 1, last evaluation, EMA weights" in words and "not run: 4 of few masks" in words
    assert "tags per training image" in words and "labelled pixels per training image" in words


def test_methods_look_as_elsewhere_and_variants_are_hollow(root):
    item = Experiment("csl", "unimatch", "scenes", 20, 0, "tiny")
    for one in (item, item.with_(output_stride=8)):
        write_mask_run(one, root, figures=False, miou=0.5)
    axes = across.effort(effort.supervised("tiny", (0,), root)).axes[1]
    found = {box.get_label(): box[0] for box in axes.containers}
    plain, stride = (found[f"few masks: {name} (n = 1)"] for name in ("UniMatch", "UniMatch, output stride 8"))
    look = style.style_of("unimatch")
    assert to_rgba(plain.get_color()) == to_rgba(stride.get_color()) == to_rgba(look.colour)
    assert plain.get_marker() == look.marker and stride.get_markerfacecolor() == "white"


def test_budgets_of_a_method_are_joined_in_order_of_effort():
    item = Experiment("csl", "csl", "scenes", 10, 0, "tiny")
    points = [
        Point("few masks", "CSL", "csl", f"{n} masks", (item,), (item,),
              {"miou": Summary(n / 100, 0.01, n // 10), "ece_15": Summary(0.1, None, 2)}, 2, Effort(PIXELS, n, n, 40))
        for n in (40, 10, 20)
    ]  # fmt: skip
    figure = across.effort(points)
    assert marks(figure.axes[1]) == {"few masks: CSL (n = 1 to 4)": [[n, pytest.approx(n)] for n in (10, 20, 40)]}
    assert "not run" in texts(figure)  # the panel of tags


def test_calibration_figure_has_a_point_a_method(tmp_path):
    runs = tuple(Experiment("commatch", "fixmatch", seed=seed) for seed in (0, 1))

    def point(label, method, ece, accuracy, n=2):
        metrics = {"ece_15": Summary(ece, 0.01 if n > 1 else None, n), "accuracy": Summary(accuracy, 0.02, n)}
        return Point("X", label, method, "Fashion-MNIST part, 100 labels", runs, runs[:n], metrics, 2)

    points = [point("FixMatch", "fixmatch", 0.1, 0.7), point("UPS", "ups", 0.2, 0.6, n=1)]
    nothing = dict.fromkeys(points[0].metrics, Summary(None, None, 0))
    none = dataclasses.replace(points[0], label="UDA", finished=(), metrics=nothing)
    figure = across.calibration([*points, none])
    assert marks(figure.axes[0]) == {
        "FixMatch (n = 2)": [[pytest.approx(10), pytest.approx(70)]],
        "UPS (n = 1)": [[pytest.approx(20), pytest.approx(60)]],
    }
    words = texts(figure)
    assert "not run: UDA" in words and "Fashion-MNIST part, 100 labels, mini scale, seeds 0, 1" in words
    assert "ECE (%), 15 bins (lo, hi]" in words and "accuracy (%)" in words
    for empty in (across.calibration([none]), across.effort(effort.supervised("tiny", (0,), tmp_path))):
        assert "not run" in texts(empty)
    assert not list(tmp_path.iterdir()), "nothing was trained or written"
