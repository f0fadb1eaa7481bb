import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
import torch

import figures
from figures import calibration, common, labels, masks, plane, scribble_panels, scribbles, style, tags
from figures.tables import NOT_RUN
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS, Column
from repro.measure import calibration as measure
from repro.measure.metrics import METRICS
from repro.methods.few_labels import commatch
from repro.settings import SettingError
from tests.fake_margins import BASE, MIXED
from tests.fake_outputs import texts, write_run
from tests.figures.conftest import CSL, PCRE, ROBUST
from tests.figures.drawn import band, bars, lines, spreads

COMMATCH = Experiment(scale="tiny")
FIXMATCH = Experiment(method="fixmatch", scale="tiny")
NO_MASKS, NO_TAGS, NO_SCRIBBLES = (item.with_(seed=7) for item in (CSL, PCRE, ROBUST))
MASKS, TAGS, MARGINS = PAPERS["csl"].tables["main"], PAPERS["pcre"].tables, PAPERS["calibratemix"].tables["main"]


# On axes


def test_a_curve_is_the_mean_of_what_is_defined_with_the_range_as_band():
    axes = style.Drawing().subplots()
    common.curve(axes, [1, 2, 3], [[0.2, None, None], [0.4, 0.5, None]], "a")
    assert lines(axes)["a"] == pytest.approx([0.3, 0.5, np.nan], nan_ok=True)
    assert band(axes, 1) == pytest.approx((0.2, 0.4)) and band(axes, 2) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_are_means_with_deviation_a_cross_for_the_undefined_and_a_cut(horizontal):
    axes = style.Drawing().subplots()
    values = {"a": [[0.1, 0.3], [np.nan, 0.2]], "b": [[7.0], []]}
    common.bars(axes, values, ["x", "y"], horizontal=horizontal, most=5.0)
    assert bars(axes, horizontal)["a"] == pytest.approx([0.2, 0.2]) and bars(axes, horizontal)["b"] == [5.0, 0]
    assert spreads(axes, 0 if horizontal else 1) == pytest.approx([np.std([0.1, 0.3], ddof=1)])
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert (cross.get_ydata if horizontal else cross.get_xdata)()[0] == pytest.approx(0.8)
    assert [text.get_text() for text in axes.texts] == ["7.0"]


@pytest.mark.parametrize(("metric", "values", "least"), [
    ("error", (0.6146, 0.614601), 0.005), ("nll", (2.0, 2.001), 0.1), ("error", (0.2, 0.4), 0.2),
])  # fmt: skip
def test_values_that_hardly_differ_do_not_fill_an_axis(metric, values, least):
    axes = style.Drawing().subplots()
    axes.plot(values, (0, 1))
    common.keep_apart(axes, "x", METRICS[metric])
    low, high = axes.get_xlim()
    assert high - low >= 0.999 * least and low < values[0] < values[1] < high


# Over training


def test_loss_curves_are_the_history_and_its_sum(tmp_path):
    write_run(tmp_path, COMMATCH)
    axes = common.loss_curves(COMMATCH, tmp_path).axes[0]
    assert set(lines(axes)) == {"sum", "supervised", "positive"} and list(axes.lines[0].get_xdata()) == [10, 20]
    assert list(lines(axes)["sum"]) == [2.5, 2.0] and list(lines(axes)["positive"]) == [0.5, 1.0]


def test_accuracy_is_the_mean_and_the_range_over_seeds_and_the_legend_counts_runs(tmp_path):
    other = COMMATCH.with_(seed=1)
    write_run(tmp_path, COMMATCH, accuracy=(0.2, 0.5))
    write_run(tmp_path, other, accuracy=(0.4, 0.9))
    write_run(tmp_path, FIXMATCH)
    figure = labels.accuracy_curves([COMMATCH, other, FIXMATCH, FIXMATCH.with_(seed=1)], tmp_path)
    accuracy, ece = figure.axes[:2]
    assert lines(accuracy)["ComMatch"] == pytest.approx([0.3, 0.7])
    assert lines(ece)["ComMatch"] == pytest.approx([0.1, 0.2])
    assert band(accuracy, 20) == pytest.approx((0.5, 0.9))
    said = texts(figure)
    assert "seeds 0, 1 (n = 2)" in said and "band: range" in said and "FixMatch (n = 1)" in said
    assert "UDA (not run)" in texts(labels.accuracy_curves([COMMATCH, COMMATCH.with_(method="uda")], tmp_path))


def test_pseudo_labels_leave_a_gap_where_nothing_was_selected(tmp_path):
    write_run(tmp_path, COMMATCH, coverage=(0.0, 0.25))
    drawn = [axes.lines[0].get_ydata() for axes in labels.pseudo_label_quality([COMMATCH], tmp_path).axes[:3]]
    assert drawn == [pytest.approx(values, nan_ok=True) for values in ([0, 0.25], [np.nan, 0.75], [np.nan, 0.15])]


# Of classifiers


def test_reliability_bars_are_accuracy_and_gap_of_each_bin(tmp_path):
    outputs = write_run(tmp_path, COMMATCH)
    figure = labels.reliability_diagrams([COMMATCH], tmp_path, bins=5)
    diagram, shares = figure.axes
    confidence, predicted = outputs["test_logits"].double().softmax(dim=1).max(dim=1)
    correct, ece = predicted == outputs["test_labels"], 0.0
    accuracy, gap = diagram.containers[:2]
    for b in range(5):
        inside = (confidence > b / 5) & (confidence <= (b + 1) / 5)
        assert shares.patches[b].get_height() == pytest.approx(float(inside.double().mean()))
        if inside.any():
            right, sure = float(correct[inside].double().mean()), float(confidence[inside].mean())
            drawn = accuracy[b].get_height(), gap[b].get_height()
            assert drawn == pytest.approx((right, sure - right))
            ece += float(inside.double().mean()) * abs(sure - right)
    assert f"ECE {100 * ece:.1f} %" in diagram.get_title() and "60 images" in diagram.get_title()
    assert "5 bins (lo, hi]" in texts(figure)


def test_instability_points_are_tenths_of_the_images_of_known_truth(tmp_path):
    outputs = write_run(tmp_path, COMMATCH)
    figure = labels.ece_against_instability([COMMATCH, FIXMATCH], tmp_path, resamples=10)
    passes, truth = outputs["pool_passes"].double().numpy(), outputs["pool_truth"].numpy()
    known, best = np.flatnonzero(truth >= 0), passes.mean(axis=0).argmax(axis=1)
    spread = np.array([np.std(passes[:, i, best[i]], ddof=1) for i in known])
    tenths = np.array_split(np.argsort(spread, kind="stable"), 10)
    line, part = figure.axes[0].lines[0], known[tenths[0]]
    assert line.get_xdata() == pytest.approx([spread[tenth].mean() for tenth in tenths])
    confidence = torch.from_numpy(passes.mean(axis=0).max(axis=1)[part])
    ece = float(measure.ece(confidence, torch.from_numpy(best[part] == truth[part])))
    assert line.get_ydata()[0] == pytest.approx(ece) and f"{len(known)} images" in texts(figure)


def test_thresholds_follow_the_published_words():
    left, right = labels.threshold_schedules(COMMATCH).axes
    for epoch, positive, negative in ((0, 0.90, 0.3), (3, 0.91, 0.03), (15, 0.95, 3e-4)):
        drawn = left.lines[0].get_ydata()[epoch], right.lines[0].get_ydata()[epoch]
        assert drawn == pytest.approx((positive, negative))
        assert commatch.thresholds(resolve(COMMATCH).method, epoch) == pytest.approx(drawn)
    assert "none of ComMatch's kind" in texts(labels.threshold_schedules(FIXMATCH))


# Of tables


def test_table_points_show_means_and_what_is_not_run_or_not_available(tmp_path):
    table = PAPERS["commatch"].ablations["3"]
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        write_run(tmp_path, COMMATCH.with_(seed=seed), accuracy=(0.2, accuracy))
    figure = common.table_points(table, "tiny", (0, 1), tmp_path, column=Column("fashion", 100))
    (bar,) = figure.axes[0].containers
    assert bar[0].get_xdata()[0] == pytest.approx(0.4) and spreads(figure.axes[0], 0) == pytest.approx([0.02**0.5])
    assert texts(figure).count(NOT_RUN) == 2 * (len(table.rows) - 1)
    (published,) = figure.axes[-1].child_axes
    assert [label.get_text() for label in published.get_yticklabels()] == ["not available"] * len(table.rows)


def test_the_published_cells_are_of_the_first_reference_that_has_a_number(tmp_path):
    """Trust region's first reference has no number at all; its second, rloss, has 65.8 for partial cross-entropy."""
    table = PAPERS["trust_region"].tables["main"].only(["Partial CE", "Robust Grid-TR"])
    for references, stated in ((table.references, "65.80"), (table.references[:1], "not available")):
        drawn = dataclasses.replace(table, references=references)
        axes = common.table_points(drawn, "tiny", (0,), tmp_path, metrics=("miou", "potts_energy", "ece_15")).axes[-1]
        (published,) = axes.child_axes
        assert [label.get_text() for label in published.get_yticklabels()] == [stated, "not available"]
        assert f"mIoU, {references[-1].title}" in texts(axes).replace("\n", " ")


def test_an_ablation_draws_the_seeds_that_its_rows_share(tmp_path):
    table, ran = PAPERS["commatch"].ablations["passes"], {"T = 10 (default)": (0, 1), "T = 2": (1,)}
    for row in table.rows:
        for seed in ran.get(row.label, ()):
            write_run(tmp_path, table.cell(row, table.small[0], "tiny", (seed,))[0], accuracy=(0.2, 0.5 + seed / 10))
    figure = common.table_points(table, "tiny", range(3), tmp_path)
    dots = [line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_marker() == "."]
    assert dots == [[pytest.approx(0.4)], [pytest.approx(0.4)]] and "small: seeds 1; large" in texts(figure)
    write_run(tmp_path, table.cell(table.rows[-1], table.small[0], "tiny", (2,))[0], accuracy=(0.2, 0.5))
    said = texts(common.table_points(table, "tiny", range(3), tmp_path))
    assert "small: seeds 0, 1, 2, but ROWS SHARE NONE" in said


# Of all figures

OF_RUNS = [  # a figure of several experiments, and ones that did not run
    (labels.accuracy_curves, [COMMATCH]), (labels.pseudo_label_quality, [COMMATCH]),
    (labels.reliability_diagrams, [COMMATCH]), (labels.ece_against_instability, [COMMATCH]),
    (calibration.calibration_curves, [BASE.with_(seed=7)]),
    (masks.qualitative_masks, [NO_MASKS]), (masks.training_curves, [NO_MASKS]),
    (masks.selection_over_training, [NO_MASKS]), (masks.selection_by_confidence, [NO_MASKS]),
    (masks.pixel_reliability, [NO_MASKS]), (masks.per_class_iou, [NO_MASKS]), (tags.cam_panels, [NO_TAGS]),
    (tags.miou_curves, [NO_TAGS]), (tags.threshold_curves, [NO_TAGS]), (tags.iou_by_class, [NO_TAGS]),
    (tags.over_activation_bars, [NO_TAGS]), (scribbles.by_length, [NO_SCRIBBLES]),
    (scribbles.energy_curves, [NO_SCRIBBLES]), (scribbles.proposal_curves, [NO_SCRIBBLES]),
    (scribble_panels.method_panels, [NO_SCRIBBLES]),
]  # fmt: skip
OF_ONE = [
    (common.loss_curves, COMMATCH), (calibration.margin_histograms, MIXED.with_(seed=7)),
    (plane.confidence_plane, NO_MASKS), (plane.weight_maps, NO_MASKS), (tags.region_growth, NO_TAGS),
    (scribble_panels.length_panels, NO_SCRIBBLES), (scribble_panels.proposal_panels, NO_SCRIBBLES),
]  # fmt: skip
OF_TABLES = [(common.table_points, TAGS["main"]), (calibration.ece_bars, MARGINS.only(["FlexMatch"])),
             (calibration.accuracy_against_ece, MARGINS.only(["FlexMatch"])),
             (masks.miou_by_budget, MASKS.only(["UniMatch"]))]  # fmt: skip


@pytest.mark.parametrize(("draw", "what"), OF_RUNS + OF_ONE)
def test_missing_runs_are_named_in_the_figure(draw, what, runs):
    items = what if isinstance(what, list) else [what]
    said = texts(draw(what, runs))
    assert NOT_RUN in said and style.label_of(items[0]) in said.replace(" + CalibrateMix", ", base = fixmatch") or (
        "FixMatch + CalibrateMix" in said
    )
    assert style.setting(items) in said


@pytest.mark.parametrize(("draw", "table"), OF_TABLES)
def test_a_table_without_runs_is_not_an_empty_figure(draw, table, runs):
    assert NOT_RUN in texts(draw(table, "tiny", (7,), runs))


@pytest.mark.parametrize("draw", [masks.training_curves, masks.selection_over_training, masks.selection_by_confidence,
                                  masks.pixel_reliability, masks.per_class_iou, tags.miou_curves, tags.threshold_curves,
                                  tags.iou_by_class, tags.over_activation_bars, scribbles.by_length,
                                  scribbles.energy_curves, scribbles.proposal_curves])  # fmt: skip
def test_captions_have_data_budget_scale_and_n_and_equal_results_give_equal_bytes(draw, runs):
    item = {"masks": CSL, "tags": PCRE, "scribbles": ROBUST}[draw.__module__.split(".")[-1]]
    both = [item, item.with_(seed=1)]
    figure = draw(both, runs)
    assert f"{style.setting([item])}, seeds 0, 1 (n = 2)" in texts(figure)
    assert style.to_png(figure) == style.to_png(draw(both, runs))


@pytest.mark.parametrize(("draw", "what"), [
    (masks.selection_over_training, [CSL.with_(method="supervised")]), (tags.region_growth, PCRE.with_(method="dupl")),
    (masks.selection_by_confidence, [CSL.with_(method="supervised")]),
    (scribble_panels.proposal_panels, ROBUST.with_(method="partial_ce")),
    (scribbles.proposal_curves, [ROBUST.with_(method="partial_ce")]),
])  # fmt: skip
def test_a_method_that_keeps_nothing_to_draw_is_not_called_missing(draw, what, runs):
    said = texts(draw(what, runs))
    assert "nothing of this was kept: " in said and NOT_RUN not in said


@pytest.mark.parametrize("draw", [tags.threshold_curves, tags.iou_by_class, masks.pixel_reliability])
def test_unknown_reporting_is_refused(draw, runs):
    with pytest.raises(SettingError, match="first"):
        draw([PCRE], runs, rule="first")


def test_a_saved_figure_has_no_metadata_and_leaves_the_callers_settings_alone(tmp_path):
    before = dict(mpl.rcParams)
    write_run(tmp_path, COMMATCH)
    saved = style.save(common.loss_curves(COMMATCH, tmp_path), tmp_path / "a.png").read_bytes()
    assert saved.startswith(b"\x89PNG") and not any(word in saved for word in (b"tEXt", b"tIME", b"Matplotlib"))
    assert common.loss_curves(COMMATCH, tmp_path)._repr_png_() == saved and dict(mpl.rcParams) == before


PAPERS_FIGURES = {
    "commatch": (labels.commatch_figures, "thresholds", set()),
    "calibratemix": (calibration.calibratemix_figures, "",
                     {"before_after", "margins", "curves", "ece_bars", "scatter", "pseudo_labels"}),
    "csl": (masks.csl_figures, "", {"plane", "plane_all", "weights", "loss", "masks", "curves", "selection", "ranges",
                                    "reliability", "classes", "budgets"}),
    "trust_region": (scribbles.trust_region_figures, "robust_loss",
                     {"lengths", "boundaries", "energy", "proposals", "methods", "scribbles", "panels", "loss"}),
}  # fmt: skip


@pytest.mark.parametrize("paper", PAPERS_FIGURES)
def test_each_paper_has_its_figures_once_and_a_table_without_any_run(paper, runs):
    draw, always, expected = PAPERS_FIGURES[paper]
    assert [name for name, *_ in draw("tiny", (9,), runs)] == [*filter(None, [always]), "main"]
    names = [name for name, *_ in draw("tiny", (0, 1), runs)]
    assert len(set(names)) == len(names) and expected | {"main"} <= set(names)


def test_modules_are_found_by_name_and_others_are_no_attributes():
    assert figures.labels is labels and not hasattr(figures, "nothing")
