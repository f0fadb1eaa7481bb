import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from figures import common, desk, labels, style
from figures.tables import NOT_RUN
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS, Column
from repro.measure import calibration
from repro.measure.metrics import METRICS
from repro.methods.few_labels import commatch
from tests.fake_outputs import texts, write_run

COMMATCH = Experiment(scale="tiny")
FIXMATCH = Experiment(method="fixmatch", scale="tiny")


def test_equal_results_give_equal_bytes_without_metadata(tmp_path):
    write_run(tmp_path, COMMATCH)
    first = style.save(common.loss_curves(COMMATCH, tmp_path), tmp_path / "a.png").read_bytes()
    second = style.save(common.loss_curves(COMMATCH, tmp_path), tmp_path / "b.png").read_bytes()
    assert first == second and first.startswith(b"\x89PNG")
    assert b"tEXt" not in first and b"tIME" not in first and b"Matplotlib" not in first
    assert common.loss_curves(COMMATCH, tmp_path)._repr_png_() == first


def test_a_figure_leaves_the_callers_settings_alone(tmp_path):
    before = dict(mpl.rcParams)
    style.save(labels.threshold_schedules(COMMATCH), tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


def test_loss_curves_are_the_history_and_its_sum(tmp_path):
    write_run(tmp_path, COMMATCH)
    axes = common.loss_curves(COMMATCH, tmp_path).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"sum", "supervised", "positive"}
    assert list(lines["sum"].get_xdata()) == [10, 20]
    assert list(lines["sum"].get_ydata()) == [2.5, 2.0]
    assert list(lines["positive"].get_ydata()) == [0.5, 1.0]


def test_accuracy_line_is_the_mean_and_the_band_the_range_over_seeds(tmp_path):
    other = COMMATCH.with_(seed=1)
    write_run(tmp_path, COMMATCH, accuracy=(0.2, 0.5))
    write_run(tmp_path, other, accuracy=(0.4, 0.9))
    figure = labels.accuracy_curves([COMMATCH, other], tmp_path)
    accuracy, ece = figure.axes[:2]
    assert accuracy.lines[0].get_ydata() == pytest.approx([0.3, 0.7])
    assert ece.lines[0].get_ydata() == pytest.approx([0.1, 0.2])
    (band,) = accuracy.findobj(PolyCollection)
    corners = band.get_paths()[0].vertices
    assert corners[corners[:, 0] == 20][:, 1].min() == pytest.approx(0.5)
    assert corners[corners[:, 0] == 20][:, 1].max() == pytest.approx(0.9)
    assert "seeds 0, 1 (n = 2)" in texts(figure) and "band: range" in texts(figure)


def test_the_legend_says_which_runs_are_missing_and_how_many_there_are(tmp_path):
    write_run(tmp_path, COMMATCH)
    said = texts(labels.accuracy_curves([COMMATCH, COMMATCH.with_(seed=1), FIXMATCH], tmp_path))
    assert "ComMatch (n = 1)" in said and "FixMatch (not run)" in said


def test_pseudo_labels_leave_a_gap_where_nothing_was_selected(tmp_path):
    write_run(tmp_path, COMMATCH, coverage=(0.0, 0.25))
    coverage, accuracy, ece = labels.pseudo_label_quality([COMMATCH], tmp_path).axes[:3]
    assert coverage.lines[0].get_ydata() == pytest.approx([0, 0.25])
    assert accuracy.lines[0].get_ydata() == pytest.approx([np.nan, 0.75], nan_ok=True)
    assert ece.lines[0].get_ydata() == pytest.approx([np.nan, 0.15], nan_ok=True)


def test_reliability_bars_are_accuracy_and_gap_of_each_bin(tmp_path):
    outputs = write_run(tmp_path, COMMATCH)
    figure = labels.reliability_diagrams([COMMATCH], tmp_path, bins=5)
    diagram, counts = figure.axes
    probs = outputs["test_logits"].double().softmax(dim=1)
    confidence, predicted = probs.max(dim=1)
    correct = predicted == outputs["test_labels"]
    bars, gaps = diagram.containers[:2]
    ece = 0.0
    for b in range(5):
        inside = (confidence > b / 5) & (confidence <= (b + 1) / 5)
        assert counts.patches[b].get_height() == inside.sum()
        if inside.any():
            right, sure = correct[inside].double().mean(), confidence[inside].mean()
            assert bars[b].get_height() == pytest.approx(float(right))
            assert gaps[b].get_height() == pytest.approx(float(sure - right))
            ece += float(inside.double().mean() * abs(sure - right))
    assert f"ECE {100 * ece:.1f} %" in diagram.get_title()
    assert "5 bins (lo, hi]" in texts(figure) and "60 images" in diagram.get_title()


def test_instability_points_are_tenths_of_the_images_of_known_truth(tmp_path):
    outputs = write_run(tmp_path, COMMATCH)
    figure = labels.ece_against_instability([COMMATCH, FIXMATCH], tmp_path, resamples=10)
    passes, truth = outputs["pool_passes"].double().numpy(), outputs["pool_truth"].numpy()
    known = np.flatnonzero(truth >= 0)
    best = passes.mean(axis=0).argmax(axis=1)
    spread = np.array([np.std(passes[:, i, best[i]], ddof=1) for i in known])
    order = np.argsort(spread, kind="stable")
    line = figure.axes[0].lines[0]
    tenths = [spread[part].mean() for part in np.array_split(order, 10)]
    assert line.get_xdata() == pytest.approx(tenths)
    part = known[np.array_split(order, 10)[0]]
    confidence = torch.from_numpy(passes.mean(axis=0).max(axis=1)[part])
    correct = torch.from_numpy(best[part] == truth[part])
    assert line.get_ydata()[0] == pytest.approx(float(calibration.ece(confidence, correct)))
    assert f"{len(known)} images" in texts(figure)


def test_thresholds_follow_the_published_words():
    settings = resolve(COMMATCH).method
    left, right = labels.threshold_schedules(COMMATCH).axes
    for epoch, positive, negative in ((0, 0.90, 0.3), (3, 0.91, 0.03), (15, 0.95, 3e-4)):
        assert left.lines[0].get_ydata()[epoch] == pytest.approx(positive)
        assert right.lines[0].get_ydata()[epoch] == pytest.approx(negative)
        assert commatch.thresholds(settings, epoch) == pytest.approx((positive, negative))
    assert "none of ComMatch's kind" in texts(labels.threshold_schedules(FIXMATCH))


def test_table_points_show_means_and_say_what_is_not_run_or_not_available(tmp_path):
    table = PAPERS["commatch"].ABLATIONS["3"]
    for seed, accuracy in ((0, 0.5), (1, 0.7)):
        write_run(tmp_path, COMMATCH.with_(seed=seed), accuracy=(0.2, accuracy))
    figure = common.table_points(table, "tiny", (0, 1), tmp_path, column=Column("fashion", 100))
    error = figure.axes[0]
    (bar,) = error.containers
    assert bar[0].get_xdata()[0] == pytest.approx(40)
    assert bar[2][0].get_segments()[0][:, 0] == pytest.approx([40 - 200**0.5, 40 + 200**0.5])
    others = (len(table.rows) - 1) * 2
    assert texts(figure).count(NOT_RUN) == others
    (published,) = figure.axes[-1].child_axes
    assert [label.get_text() for label in published.get_yticklabels()] == ["not available"] * len(table.rows)


def test_the_published_cells_are_of_the_first_reference_that_has_a_number(tmp_path):
    """Trust region's first reference has no number at all; its second, rloss, has 65.8 for partial cross-entropy."""
    table = PAPERS["trust_region"].TABLES["main"].only(["Partial CE", "Robust Grid-TR"])
    for references, stated in ((table.references, "65.80"), (table.references[:1], "not available")):
        shown = dataclasses.replace(table, references=references)
        how = {"root": tmp_path, "metrics": ("miou", "potts_energy", "ece_15")}
        axes = common.table_points(shown, "tiny", (0,), **how).axes[-1]
        (published,) = axes.child_axes
        assert [label.get_text() for label in published.get_yticklabels()] == [stated, "not available"]
        assert f"mIoU, {references[-1].title}" in texts(axes).replace("\n", " ")


@pytest.mark.parametrize(("metric", "values", "least"), [("error", (61.4600, 61.4601), 0.5), ("nll", (2.0, 2.001), 0.1),
                                                         ("error", (20.0, 40.0), 20.0)])  # fmt: skip
def test_values_that_hardly_differ_do_not_fill_an_axis(metric, values, least):
    axes = style.Drawing().subplots()
    axes.plot(values, (0, 1))
    common.keep_apart(axes, "x", METRICS[metric])
    low, high = axes.get_xlim()
    assert high - low >= 0.999 * least and low < values[0] < values[1] < high
    assert axes.xaxis.get_major_formatter().get_useOffset() is False


def test_an_ablation_draws_the_seeds_that_its_rows_share(tmp_path):
    table, ran = PAPERS["commatch"].ABLATIONS["passes"], {"T = 10 (default)": (0, 1), "T = 2": (1,)}
    for row in table.rows:
        for seed in ran.get(row.label, ()):
            experiment = table.cell(row, table.small[0], "tiny", (seed,))[0]
            write_run(tmp_path, experiment, accuracy=(0.2, 0.5 + seed / 10))
    figure = common.table_points(table, "tiny", range(3), tmp_path)
    dots = [line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_marker() == "."]
    assert dots == [[pytest.approx(40)], [pytest.approx(40)]]
    assert "small: seeds 1; large" in texts(figure)
    write_run(tmp_path, table.cell(table.rows[-1], table.small[0], "tiny", (2,))[0], accuracy=(0.2, 0.5))
    said = texts(common.table_points(table, "tiny", range(3), tmp_path))
    assert "small: seeds 0, 1, 2, but ROWS SHARE NONE" in said


@pytest.mark.parametrize(
    "draw",
    [
        lambda root: common.loss_curves(COMMATCH, root),
        lambda root: labels.accuracy_curves([COMMATCH], root),
        lambda root: labels.pseudo_label_quality([COMMATCH], root),
        lambda root: labels.reliability_diagrams([COMMATCH], root),
        lambda root: labels.ece_against_instability([COMMATCH], root),
        lambda root: common.table_points(PAPERS["commatch"].ABLATIONS["3"], "tiny", (0,), root),
    ],
)
def test_missing_runs_are_named_in_the_figure(draw, tmp_path):
    figure = draw(tmp_path)
    assert NOT_RUN in texts(figure)
    assert style.save(figure, tmp_path / "a.png").stat().st_size > 1000


def test_figures_that_need_dropout_passes_say_so(tmp_path):
    write_run(tmp_path, FIXMATCH, passes=False)
    assert "no dropout passes" in texts(labels.ece_against_instability([FIXMATCH], tmp_path))


def test_every_method_of_every_paper_has_a_style_of_its_own():
    methods = {method for paper in PAPERS.values() for method in paper.METHODS}
    assert methods <= set(style.STYLES)
    looks = [dataclasses.astuple(look)[1:] for look in style.STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_every_paper_has_figures_and_their_names_are_unique(tmp_path):
    assert set(desk.FIGURES) == set(PAPERS)
    write_run(tmp_path, COMMATCH)
    for draw in desk.FIGURES.values():
        names = [name for name, _, _ in draw("tiny", (0,), tmp_path)]
        assert len(set(names)) == len(names)
    assert "instability" in [name for name, _, _ in desk.FIGURES["commatch"]("tiny", (0,), tmp_path)]
