import json

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from figures import masks as figures
from figures.common import class_colours
from figures.tables import NOT_RUN
from repro.files import save_state
from repro.grid import PAPERS, Column
from repro.papers.published import MASKS
from repro.runs import folder_of, load_history, load_outputs
from repro.settings import SettingError
from tests.fake_mask_runs import EDGES, STEPS
from tests.fake_outputs import texts
from tests.figures.conftest import CSL
from tests.figures.drawn import band, bars, change_final, final, image, lines, spreads, stored

SUPERVISED, FIXMATCH, UNIMATCH = (CSL.with_(method=name) for name in ("supervised", "fixmatch", "unimatch"))
OTHER = CSL.with_(seed=1)
TABLE = PAPERS["csl"].tables["main"]


def pixels(root, experiment):
    return [row["pseudo"]["pixels"] for row in load_history(folder_of(experiment, root)).of("train")]


def edit_rows(root, experiment, change):
    """Change the numbers of pixels in each training row of a run."""
    history = load_history(folder_of(experiment, root))
    for row in history.of("train"):
        change(row["pseudo"]["pixels"])
    history.path.write_text("".join(json.dumps(row) + "\n" for row in history.rows))


def test_masks_are_truth_and_predictions_under_the_miou_of_the_run(runs):
    figure = figures.qualitative_masks([SUPERVISED, CSL, UNIMATCH], runs, images=2)
    tiles, colours = np.array(figure.axes).reshape(2, 4), class_colours(6)
    kept = [load_outputs(folder_of(item, runs)) for item in (SUPERVISED, CSL)]
    labels = [kept[0]["test_truth"], kept[0]["test_prediction"], kept[1]["test_prediction"]]
    for index, row in enumerate(tiles):
        assert (image(row[0]) == kept[0]["test_images"][index].permute(1, 2, 0).numpy()).all()
        for axes, expected in zip(row[1:], labels, strict=True):
            assert (image(axes) == colours[expected[index].numpy()]).all()
    for axes, item, name in zip(tiles[0, 2:], (SUPERVISED, CSL), ("Supervised", "CSL"), strict=True):
        assert axes.get_title() == f"{name}\n{100 * final(runs, item)['miou']:.1f} %"
    said = texts(figure)
    assert "not run: UniMatch" in said and "background" in said and "2 test images" in said and "unknown" in said


def test_seeds_are_told_apart_and_runs_on_different_images_are_not_shown_together(copied):
    with pytest.raises(SettingError, match="different images"):
        figures.qualitative_masks([CSL, OTHER], copied)
    outputs = load_outputs(folder_of(OTHER, copied))
    outputs["test_images"] = load_outputs(folder_of(CSL, copied))["test_images"]
    save_state(folder_of(OTHER, copied) / "outputs.safetensors", outputs)
    said = texts(figures.qualitative_masks([CSL, OTHER], copied, images=1))
    assert "CSL, seed 0" in said and "CSL, seed 1" in said


def test_curves_are_means_over_seeds_with_their_range(runs):
    miou, ece = figures.training_curves([CSL, OTHER, UNIMATCH], runs).axes
    for axes, name in ((miou, "miou"), (ece, "ece_15")):
        values = stored(runs, [CSL, OTHER], name)
        assert lines(axes)["CSL"] == pytest.approx(values.mean(0))
        assert band(axes, STEPS[-1]) == pytest.approx((values[:, -1].min(), values[:, -1].max()))
    assert "UniMatch (not run)" in lines(miou)
    assert (miou.get_ylabel(), ece.get_ylabel()) == ("mIoU (%)", "pixel ECE (%), 15 bins (lo, hi]")


def test_selection_counts_the_wrong_pixels_that_are_kept(runs):
    seeds = [pixels(runs, item) for item in (CSL, OTHER)]
    values = (lambda row: row["coverage"], lambda row: row["accuracy"],
              lambda row: row["coverage"] - row["coverage"] * row["accuracy"])  # fmt: skip
    panels = figures.selection_over_training([SUPERVISED, FIXMATCH, CSL, OTHER], runs).axes
    for axes, value in zip(panels, values, strict=True):
        assert lines(axes)["CSL"] == pytest.approx(np.mean([[value(row) for row in rows] for rows in seeds], axis=0))
        assert np.isnan(lines(axes)["Supervised (none)"]).all()


def test_nothing_kept_is_nothing_wrong(copied):
    edit_rows(copied, FIXMATCH, lambda found: found.update(coverage=0.0, accuracy=None))
    _, accuracy, wrong = figures.selection_over_training([FIXMATCH], copied).axes
    assert np.isnan(lines(accuracy)["FixMatch (none)"]).all() and (lines(wrong)["FixMatch"] == 0).all()


def test_ranges_are_means_over_seeds_at_the_end_and_over_training(runs):
    figure = figures.selection_by_confidence([SUPERVISED, FIXMATCH, CSL, OTHER, UNIMATCH], runs)
    _, end, _, covered, _, right = figure.axes[:6]
    seeds = [[row["ranges"] for row in pixels(runs, item)] for item in (CSL, OTHER)]
    mean = {name: np.mean(np.array([[row[name] for row in rows] for rows in seeds], dtype=float), axis=0)
            for name in ("share", "coverage", "accuracy", "all_accuracy")}  # fmt: skip
    names = {"mean weight": "coverage", "weighted accuracy": "accuracy", "accuracy of all": "all_accuracy"}
    for label, name in names.items():
        assert lines(end)[label] == pytest.approx(mean[name][-1], nan_ok=True)
    assert bars(end)["share of all pixels"] == pytest.approx(mean["share"][-1])
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


def test_reliability_bars_put_the_pixels_of_all_seeds_together(runs):
    figure = figures.pixel_reliability([CSL, OTHER, UNIMATCH], runs)
    diagram, missing, shares, _ = figure.axes
    found = [final(runs, item) for item in (CSL, OTHER)]
    accuracy, gap = diagram.containers
    total = sum(sum(run["reliability"]["count"]) for run in found)
    for b in range(15):
        parts = [[run["reliability"][name][b] or 0 for name in ("count", "accuracy", "confidence")] for run in found]
        count = sum(part[0] for part in parts)
        right, sure = (sum(part[0] * part[i] for part in parts) / max(count, 1) for i in (1, 2))
        drawn = accuracy[b].get_height(), gap[b].get_height(), shares.patches[b].get_height()
        assert drawn == pytest.approx((right, sure - right, count / total))
    ece = [100 * run["ece_15"] for run in found]
    assert f"ECE {np.mean(ece):.1f} ± {np.std(ece, ddof=1):.1f} %, 15 bins" in diagram.get_title()
    assert f"{total:,.0f} pixels, n = 2" in diagram.get_title()
    assert NOT_RUN in texts(missing) and "no bootstrap" in texts(figure)


def test_classes_have_the_mean_and_deviation_of_their_iou(copied):
    change_final(copied, FIXMATCH, lambda found: found["iou"].__setitem__(3, None))
    figure = figures.per_class_iou([CSL, OTHER, FIXMATCH, FIXMATCH.with_(seed=1), UNIMATCH], copied)
    (axes,) = figure.axes
    values = np.array([[*final(copied, item)["iou"], final(copied, item)["miou"]] for item in (CSL, OTHER)])
    drawn = bars(axes, horizontal=True)
    assert set(drawn) == {"CSL", "FixMatch (n = 1)", "UniMatch (not run)"}
    assert drawn["CSL"] == pytest.approx(values.mean(0)) and drawn["FixMatch (n = 1)"][3] == 0
    assert spreads(axes, 0) == pytest.approx(values.std(0, ddof=1))
    names = ["background", "Trouser", "Pullover", "Dress", "Sneaker", "Bag", "mean"]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert "undefined in a run" in texts(figure)  # a class that never occurred is a cross


def test_bars_by_budget_have_deviation_and_n(runs):
    figure = figures.miou_by_budget(TABLE.only(["FixMatch", "UniMatch", "CSL"]), "tiny", (0, 1), runs)
    miou, ece = figure.axes
    values = np.array([final(runs, item)["miou"] for item in (CSL, OTHER)])
    assert bars(miou) == {"FixMatch": pytest.approx([0, final(runs, FIXMATCH)["miou"]]),
                          "CSL": pytest.approx([0.25, values.mean()])}  # fmt: skip
    assert spreads(miou) == pytest.approx([values.std(ddof=1)])
    assert [text.get_text() for text in miou.texts] == [NOT_RUN, "1", "1", "2"]
    assert [label.get_text() for label in ece.get_xticklabels()] == [Column("scenes", n, MASKS).title for n in (10, 20)]
    assert "not run: UniMatch" in texts(figure)
