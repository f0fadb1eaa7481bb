import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer

from figures import masks as figures
from figures import style
from figures.plane import class_colours
from figures.tables import NOT_RUN
from repro.experiment import Experiment
from repro.files import save_state, write_json
from repro.grid import PAPERS, Column
from repro.papers.published import MASKS
from repro.runs import folder_of, load_history, load_metrics, load_outputs
from repro.settings import SettingError
from tests.fake_mask_runs import EDGES, STEPS, write_mask_run
from tests.fake_outputs import texts

CSL = Experiment(paper="csl", method="csl", data="scenes", labels=20, scale="tiny")
SUPERVISED, FIXMATCH, UNIMATCH = (CSL.with_(method=name) for name in ("supervised", "fixmatch", "unimatch"))
OTHER = CSL.with_(seed=1)
FEW = [CSL.with_(labels=10), FIXMATCH.with_(labels=10)]
TABLE = PAPERS["csl"].TABLES["main"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of runs that no test changes: two seeds of CSL, one of FixMatch and supervised; none of UniMatch."""
    root = tmp_path_factory.mktemp("runs")
    for item in (CSL, OTHER, FIXMATCH, SUPERVISED):
        write_mask_run(item, root)
    write_mask_run(FEW[0], root, figures=False, miou=0.25)
    return root


@pytest.fixture
def copied(root, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(root, tmp_path / "copied"))


def final(root, experiment):
    return load_metrics(folder_of(experiment, root))["reported"]["last"]["ema"]


def pixels(root, experiment):
    return [row["pseudo"]["pixels"] for row in load_history(folder_of(experiment, root)).of("train")]


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_masks_are_truth_and_predictions_under_the_miou_of_the_run(root):
    figure = figures.qualitative_masks([SUPERVISED, CSL, UNIMATCH], root, images=2)
    tiles, colours = np.array(figure.axes).reshape(2, 4), class_colours(6)
    kept = [load_outputs(folder_of(item, root)) for item in (SUPERVISED, CSL)]
    for index, row in enumerate(tiles):
        image, *maps = (axes.images[0].get_array() for axes in row)
        assert (image == kept[0]["test_images"][index].permute(1, 2, 0).numpy()).all()
        labels = [kept[0]["test_truth"], kept[0]["test_prediction"], kept[1]["test_prediction"]]
        for shown, expected in zip(maps, labels, strict=True):
            assert (shown == colours[expected[index].numpy()]).all()
    for axes, item, name in zip(tiles[0, 2:], (SUPERVISED, CSL), ("Supervised", "CSL"), strict=True):
        assert axes.get_title() == f"{name}\n{100 * final(root, item)['miou']:.1f} %"
    said = texts(figure)
    assert "not run: UniMatch" in said and "background" in said and "2 test images" in said and "unknown" in said


def test_seeds_of_a_method_are_told_apart(copied):
    folder = folder_of(OTHER, copied)
    outputs = load_outputs(folder) | {"test_images": load_outputs(folder_of(CSL, copied))["test_images"]}
    save_state(folder / "outputs.safetensors", outputs)
    said = texts(figures.qualitative_masks([CSL, OTHER], copied, images=1))
    assert "CSL, seed 0" in said and "CSL, seed 1" in said


def test_runs_on_different_images_are_not_shown_together(root):
    with pytest.raises(SettingError, match="different images"):
        figures.qualitative_masks([CSL, OTHER], root)


def test_curves_are_means_over_seeds_with_their_range(root):
    miou, ece = figures.training_curves([CSL, OTHER, UNIMATCH], root).axes
    rows = [load_history(folder_of(item, root)).of("evaluation") for item in (CSL, OTHER)]
    for axes, name in ((miou, "miou"), (ece, "ece_15")):
        values = np.array([[row["ema"][name] for row in run] for run in rows])
        assert lines(axes)["CSL"] == pytest.approx(values.mean(0))
        (band,) = axes.findobj(PolyCollection)
        corners = band.get_paths()[0].vertices
        at = corners[corners[:, 0] == STEPS[-1]][:, 1]
        assert (at.min(), at.max()) == pytest.approx((values[:, -1].min(), values[:, -1].max()))
    assert "UniMatch (not run)" in lines(miou) and ece.get_ylabel() == "pixel ECE (%), 15 bins (lo, hi]"
    assert miou.get_ylabel() == "mIoU (%)"


def test_selection_counts_the_wrong_pixels_that_are_kept(root):
    coverage, accuracy, wrong = figures.selection_over_training([SUPERVISED, FIXMATCH, CSL, OTHER], root).axes
    seeds = [pixels(root, item) for item in (CSL, OTHER)]
    for axes, value in (
        (coverage, lambda row: row["coverage"]),
        (accuracy, lambda row: row["accuracy"]),
        (wrong, lambda row: row["coverage"] - row["coverage"] * row["accuracy"]),
    ):
        assert lines(axes)["CSL"] == pytest.approx(np.mean([[value(row) for row in rows] for rows in seeds], axis=0))
        assert np.isnan(lines(axes)["Supervised (none)"]).all()


def test_nothing_kept_is_nothing_wrong(copied):
    edit_rows(copied, FIXMATCH, lambda found: found.update(coverage=0.0, accuracy=None))
    _, accuracy, wrong = figures.selection_over_training([FIXMATCH], copied).axes
    assert np.isnan(lines(accuracy)["FixMatch (none)"]).all() and (lines(wrong)["FixMatch"] == 0).all()


def edit_rows(root, experiment, change):
    """Change what each training row of a run says of its pixels."""
    history = load_history(folder_of(experiment, root))
    for row in history.of("train"):
        change(row["pseudo"]["pixels"])
    history.path.write_text("".join(json.dumps(row) + "\n" for row in history.rows))


def test_ranges_are_means_over_seeds_at_the_end_and_over_training(root):
    figure = figures.selection_by_confidence([SUPERVISED, FIXMATCH, CSL, OTHER, UNIMATCH], root)
    _, end, _, covered, _, right = figure.axes[:6]
    seeds = [[row["ranges"] for row in pixels(root, item)] for item in (CSL, OTHER)]
    mean = {name: np.mean(np.array([[row[name] for row in rows] for rows in seeds], dtype=float), axis=0)
            for name in ("share", "coverage", "accuracy", "all_accuracy")}  # fmt: skip
    shown = lines(end)
    labels = {"mean weight": "coverage", "weighted accuracy": "accuracy", "accuracy of all": "all_accuracy"}
    for label, name in labels.items():
        assert shown[label] == pytest.approx(mean[name][-1], nan_ok=True)
    assert [bar.get_height() for bar in end.patches] == pytest.approx(mean["share"][-1])
    for axes, name in ((covered, "coverage"), (right, "accuracy")):
        (mesh,) = [item for item in axes.collections if isinstance(item, QuadMesh)]
        assert mesh.get_array().filled(np.nan) == pytest.approx(mean[name], nan_ok=True)
    assert [label.get_text() for label in right.get_xticklabels()] == [f"{100 * edge:g}" for edge in EDGES]
    said = texts(figure)
    assert "without pseudo-labels: Supervised" in said and "not run: UniMatch" in said
    assert end.get_title() == "CSL (n = 2)" and figure.axes[0].get_title() == "FixMatch (n = 1)"


def test_an_accuracy_needs_some_weight(copied):
    def change(found):
        found["ranges"]["coverage"][4] = 1e-5  # a pixel or two at the threshold
        found["ranges"]["accuracy"][4] = 1.0

    edit_rows(copied, FIXMATCH, change)
    end, covered, right, *_ = figures.selection_by_confidence([FIXMATCH], copied).axes
    assert np.isnan(lines(end)["weighted accuracy"][4]) and lines(end)["mean weight"][4] == 1e-5
    hidden, seen = (np.ma.getmaskarray(axes.collections[0].get_array())[:, 4] for axes in (right, covered))
    assert hidden.all() and not seen.any()


def test_reliability_bars_put_the_pixels_of_all_seeds_together(root):
    figure = figures.pixel_reliability([CSL, OTHER, UNIMATCH], root)
    diagram, missing, shares, _ = figure.axes
    runs = [final(root, item) for item in (CSL, OTHER)]
    accuracy, gap = diagram.containers
    total = sum(sum(run["reliability"]["count"]) for run in runs)
    for b in range(15):
        parts = [[run["reliability"][name][b] or 0 for name in ("count", "accuracy", "confidence")] for run in runs]
        count = sum(part[0] for part in parts)
        right, sure = (sum(part[0] * part[i] for part in parts) / max(count, 1) for i in (1, 2))
        assert accuracy[b].get_height() == pytest.approx(right)
        assert gap[b].get_height() == pytest.approx(sure - right)
        assert shares.patches[b].get_height() == pytest.approx(count / total)
    ece = [100 * run["ece_15"] for run in runs]
    assert f"ECE {np.mean(ece):.1f} ± {np.std(ece, ddof=1):.1f} %, 15 bins" in diagram.get_title()
    assert f"{total:,.0f} pixels, n = 2" in diagram.get_title()
    assert NOT_RUN in texts(missing) and "no bootstrap" in texts(figure)


def test_classes_have_the_mean_and_deviation_of_their_iou(root):
    figure = figures.per_class_iou([CSL, OTHER, FIXMATCH, FIXMATCH.with_(seed=1), UNIMATCH], root)
    (axes,) = figure.axes
    values = 100 * np.array([[*final(root, item)["iou"], final(root, item)["miou"]] for item in (CSL, OTHER)])
    marks = {item.get_label(): item for item in axes.containers if isinstance(item, ErrorbarContainer)}
    assert set(marks) == {"CSL", "FixMatch (n = 1)", "UniMatch (not run)"}
    points, _, (bars,) = marks["CSL"]
    assert points.get_xdata() == pytest.approx(values.mean(0))
    ends = np.array(bars.get_segments())[:, :, 0]
    assert (ends[:, 1] - ends[:, 0]) / 2 == pytest.approx(values.std(0, ddof=1))
    names = ["background", "Trouser", "Pullover", "Dress", "Sneaker", "Bag", "mean"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert np.abs(points.get_ydata() - np.arange(7)).max() < 0.5


def test_a_class_that_never_occurred_has_no_point(copied):
    path = folder_of(CSL, copied) / "metrics.json"
    saved = json.loads(path.read_text())
    saved["reported"]["last"]["ema"]["iou"][3] = None
    write_json(path, saved)
    (axes,) = figures.per_class_iou([CSL], copied).axes
    assert np.isnan(axes.containers[0][0].get_xdata(orig=False)).tolist() == [False] * 3 + [True] + [False] * 3


def test_bars_by_budget_are_ours_with_deviation_and_n(root):
    table = TABLE.only(["FixMatch", "UniMatch", "CSL"])
    figure = figures.miou_by_budget(table, "tiny", (0, 1), root)
    miou, ece = figure.axes
    values = 100 * np.array([final(root, item)["miou"] for item in (CSL, OTHER)])
    bars = {round(bar.get_x() + bar.get_width() / 2, 3): bar.get_height() for group in miou.containers
            if isinstance(group, BarContainer) for bar in group}  # fmt: skip
    assert bars == pytest.approx({-0.2: 0, 0.2: 25, 0.8: 100 * final(root, FIXMATCH)["miou"], 1.2: values.mean()})
    (line,) = [item for item in miou.containers if isinstance(item, ErrorbarContainer)]
    low, high = line[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(values.std(ddof=1))
    assert [text.get_text() for text in miou.texts] == [NOT_RUN, "1", "1", "2"]
    assert [label.get_text() for label in ece.get_xticklabels()] == [Column("scenes", n, MASKS).title for n in (10, 20)]
    assert "not run: UniMatch" in texts(figure)


def test_a_second_row_of_a_method_is_hatched(copied):
    table = TABLE.only(["UniMatch", "UniMatch, output stride 8"])
    column = Column("scenes", 20, MASKS)
    for row in table.rows:
        write_mask_run(table.cell(row, column, "tiny", (0,))[0], copied, figures=False)
    miou, _ = figures.miou_by_budget(table, "tiny", (0,), copied).axes
    assert [bar.get_hatch() for bar in miou.patches] == ["", "///"]


@pytest.mark.parametrize(
    "draw",
    [
        lambda root: figures.qualitative_masks([UNIMATCH], root),
        lambda root: figures.training_curves([UNIMATCH], root),
        lambda root: figures.selection_over_training([UNIMATCH], root),
        lambda root: figures.selection_by_confidence([UNIMATCH], root),
        lambda root: figures.pixel_reliability([UNIMATCH], root),
        lambda root: figures.per_class_iou([UNIMATCH], root),
        lambda root: figures.miou_by_budget(TABLE.only(["UniMatch"]), "tiny", (0,), root),
    ],
)
def test_missing_runs_are_named_in_the_figure(draw, root):
    said = texts(draw(root))
    assert NOT_RUN in said and "UniMatch" in said


def test_a_method_without_pseudo_labels_is_not_called_missing(root):
    for draw in (figures.selection_over_training, figures.selection_by_confidence):
        said = texts(draw([SUPERVISED], root))
        assert "nothing of this was kept: Supervised" in said and NOT_RUN not in said


def test_captions_say_data_budget_scale_and_seeds(root):
    for draw in (figures.training_curves, figures.selection_over_training, figures.selection_by_confidence,
                 figures.pixel_reliability, figures.per_class_iou):  # fmt: skip
        assert "Fashion scenes, 20 masks, tiny scale, seeds 0, 1 (n = 2)" in texts(draw([CSL, OTHER], root))
    assert "Fashion scenes, 20 masks, tiny scale, seed 0 (n = 1)" in texts(figures.qualitative_masks([CSL], root))


def test_the_papers_figures_have_names_of_their_own(root):
    assert [name for name, *_ in figures.csl_figures("tiny", (9,), root)] == ["main"]
    names = [name for name, *_ in figures.csl_figures("tiny", (0,), root)]
    assert len(set(names)) == len(names)
    assert {"plane", "plane_all", "weights", "loss", "masks", "curves", "selection", "ranges", "reliability", "classes",
            "budgets", "main"} <= set(names)  # fmt: skip


@pytest.mark.parametrize(
    "draw",
    [
        lambda root: figures.qualitative_masks([CSL], root, images=1),
        lambda root: figures.selection_by_confidence([CSL], root),
        lambda root: figures.per_class_iou([CSL, OTHER], root),
    ],
)
def test_equal_results_give_equal_bytes(draw, root):
    first = style.to_png(draw(root))
    assert first == style.to_png(draw(root)) and first.startswith(b"\x89PNG")
