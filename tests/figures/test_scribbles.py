import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer

from figures import scribble_panels as panels
from figures import scribbles as figures
from figures.common import class_colours
from figures.tables import NOT_RUN
from repro.data.scribbles import reaches_of
from repro.experiment import Experiment
from repro.files import save_state
from repro.grid import PAPERS
from repro.runs import folder_of, load_history, load_outputs
from repro.settings import SettingError
from tests.fake_outputs import texts
from tests.fake_scribble_runs import START, STEPS, write_scribble_run
from tests.figures.drawn import band, change_final, final, lines, stored

TABLE = PAPERS["trust_region"].tables["main"]
NUMBERS = figures.published_by_method(TABLE)


def run(method, length=30, seed=0):
    return Experiment("trust_region", method, "scenes", length, seed, "tiny")


def robust(length=30):
    return [run("robust_trust_region", length, seed) for seed in (0, 1)]


def by_length(runs, experiments, **more):
    """The figure's main axes, and its error bars by label."""
    figure = figures.by_length(experiments, runs, **more)
    found = {item.get_label(): item for item in figure.axes[0].containers if isinstance(item, ErrorbarContainer)}
    return figure, found


# By scribble length


def test_a_line_has_the_mean_and_deviation_of_each_length(runs):
    _, found = by_length(runs, [*robust(30), *robust(100)])
    points, _, (bars,) = found["Robust Grid-TR"]
    values = np.array([[final(runs, item)["miou"] for item in robust(length)] for length in (30, 100)])
    assert points.get_xdata() == pytest.approx([30, 100]) and points.get_ydata() == pytest.approx(values.mean(1))
    ends = np.array(bars.get_segments())[:, :, 1]
    assert (ends[:, 1] - ends[:, 0]) / 2 == pytest.approx(values.std(1, ddof=1))


def test_methods_stand_side_by_side_round_their_length(runs):
    _, found = by_length(runs, [run("partial_ce"), run("trust_region"), run("robust_trust_region")])
    at = [float(found[name][0].get_xdata()[0]) for name in ("Partial CE", "Grid-TR", "Robust Grid-TR")]
    assert at == pytest.approx([30 - figures.APART, 30, 30 + figures.APART])


def test_full_supervision_is_a_level_with_the_deviation_over_seeds(runs):
    full = [run("full", 100, seed) for seed in (0, 1)]
    figure, found = by_length(runs, [run("robust_trust_region"), *full])
    axes, values = figure.axes[0], np.array([final(runs, item)["miou"] for item in full])
    label = f"Full supervision: {100 * values.mean():.1f} % (n = 2)"
    assert lines(axes)[label] == pytest.approx([values.mean()] * 2)
    (area,) = axes.patches
    assert (area.get_y(), area.get_height()) == pytest.approx(
        (values.mean() - values.std(ddof=1), 2 * values.std(ddof=1))
    )
    assert "Full supervision" not in found and [label.get_text() for label in axes.get_xticklabels()] == ["30"]


def test_a_seed_of_full_supervision_counts_once_however_many_lengths_it_ran_at(copied):
    write_scribble_run(run("full", 0), copied, figures=False)
    for experiment, value in ((run("full", 0), 0.8), (run("full", 100), 0.9), (run("full", 100, 1), 0.95)):
        change_final(copied, experiment, lambda found, value=value: found.update(miou=value))
    full = [run("full", 0), run("full", 100), run("full", 100, 1)]
    figure, _ = by_length(copied, [run("partial_ce"), *full])
    assert "Full supervision: 90.0 % (n = 2)" in texts(figure)


def test_what_was_not_run_is_said_by_method_and_by_length(runs):
    asked = [run(method, length) for method in ("partial_ce", "adm", "robust_trust_region", "full")
             for length in (0, 30, 100)]  # fmt: skip
    figure, _ = by_length(runs, asked)
    assert "not run: ADM, length 0 %" in texts(figure)
    assert "scribble length 30 / 100 %, tiny scale, seed 0 (n = 1)" in texts(figure)
    assert NOT_RUN not in texts(by_length(runs, robust())[0])


def test_n_is_said_where_seeds_are_missing(runs):
    asked = [*robust(30), run("robust_trust_region", 100), run("partial_ce"), run("partial_ce", 30, 1)]
    _, found = by_length(runs, asked)
    assert set(found) == {"Robust Grid-TR (n = 1 to 2)", "Partial CE (n = 1)"}


def test_a_click_is_named_and_a_variation_has_a_line_of_its_own(copied):
    other = run("partial_ce", 0).with_(rate=0.5)
    for item in (run("partial_ce", 0), other):
        write_scribble_run(item, copied, figures=False)
    figure, found = by_length(copied, [run("partial_ce", 0), other])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0\n(click)"]
    first, second = (found[name][0].get_linestyle() for name in ("Partial CE", "Partial CE, rate = 0.5"))
    assert first != second


def test_published_numbers_have_a_panel_and_a_scale_of_their_own(runs):
    missing = dataclasses.replace(NUMBERS["partial_ce"], value=None)
    numbers = {"partial_ce": NUMBERS["partial_ce"], "grid_gd": missing, "full": NUMBERS["full"]}
    figure, _ = by_length(runs, robust(), published=numbers)
    measured, panel = figure.axes
    assert [text.get_text() for text in panel.texts] == ["65.8", "72.1"]
    assert [float(item[0].get_ydata()[0]) for item in panel.containers] == [65.8, 72.1]
    assert panel.get_title() == "published: VOC2012 ScribbleSup / VOC2012\nDeepLabV3+ MobileNetV2"
    assert panel.get_xlabel() == "val, scribble length 1 (about 3% px)"
    assert not panel.get_shared_y_axes().joined(panel, measured)
    for none in (None, {}, {"grid_gd": missing}):
        assert len(by_length(runs, robust(), published=none)[0].axes) == 1


def test_published_numbers_are_found_by_the_tables_reference():
    found = figures.published_by_method(TABLE)
    assert {method: one.value for method, one in found.items()} == {"partial_ce": 65.8, "dense_gd": 69.4, "full": 72.1}
    assert {one.paper.split()[0] for one in found.values()} == {"rloss"}  # the first reference of the table has none
    assert figures.published_by_method(dataclasses.replace(TABLE, references=())) == {}


def test_another_percentage_can_stand_on_the_axis_and_nothing_else(runs):
    figure, found = by_length(runs, [run("partial_ce")], metric="boundary_f")
    value = final(runs, run("partial_ce"))["boundary_f"]
    assert found["Partial CE"][0].get_ydata() == pytest.approx([value])
    assert figure.axes[0].get_ylabel() == "boundary F-score (%)"
    for name in ("nll", "potts"):
        with pytest.raises(SettingError, match=name):
            figures.by_length([run("partial_ce")], runs, metric=name)


# The robust loss


@pytest.mark.parametrize("classes", [6, 21])
def test_the_loss_and_its_gradient_are_those_of_the_outlier_model(classes):
    left, right, *_ = figures.robust_loss_curves(classes, others=(0.3,)).axes
    published = [0.9440, 0.9460, 0.9514, 0.9516, 0.9522]
    slopes = [(1 - 21 * epsilon / 20) / (epsilon / 20) for epsilon in published]
    epsilons = [0, 0.3, *((classes - 1) / (classes + slope) for slope in slopes), (classes - 1) / classes]
    curves, shares = left.lines, right.lines
    assert len(curves) == len(epsilons) == len(shares) + 1  # nothing is left of the gradient of a constant
    logits = torch.stack([torch.linspace(-4, 6, 50), *[torch.zeros(50)] * (classes - 1)], 1).double().requires_grad_()
    s = logits.softmax(1)[:, 0]
    (plain,) = torch.autograd.grad(-s.log().sum(), logits, retain_graph=True)
    for curve, share, epsilon in zip(curves, [*shares, None], epsilons, strict=True):
        loss = -((1 - epsilon) * s + epsilon / (classes - 1) * (1 - s)).log()
        at, drawn = np.array(curve.get_xdata()), np.array(curve.get_ydata())
        expected = -np.log((1 - epsilon) * at + epsilon / (classes - 1) * (1 - at), where=at > 0, out=at * 0 + math.inf)
        assert drawn[1:] == pytest.approx(expected[1:], abs=1e-12)
        if share is not None:
            (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
            ratio = (gradient[:, 0] / plain[:, 0]).numpy()
            shown = np.interp(s.detach().numpy(), share.get_xdata(), share.get_ydata())
            assert shown == pytest.approx(ratio, rel=2e-3)


def test_the_extremes_are_cross_entropy_and_a_constant():
    left, right, *_ = figures.robust_loss_curves(6).axes
    shown = lines(left)
    assert shown["ε = 0: cross-entropy"][-1] == pytest.approx(0)
    assert shown["ε = (C - 1) / C = 0.8333 (range 0 nats)"] == pytest.approx(math.log(6))
    assert np.array(right.lines[0].get_ydata()) == pytest.approx(1)
    assert "ε = 0.8082 for 0.944 at C = 21, length 100 % (range 0.17 nats)" in shown
    assert "ε = 0.9440, length 100 % (range 0.17 nats)" in lines(figures.robust_loss_curves(21).axes[0])


def test_an_epsilon_that_is_too_large_for_the_classes_is_refused():
    with pytest.raises(ValueError, match="with 3 classes"):
        figures.robust_loss_curves(3, others=(0.7,))


# Over training


def test_energy_and_miou_are_means_over_seeds_with_their_range(runs):
    figure = figures.energy_curves([*robust(), run("adm")], runs)
    for axes, name in zip(figure.axes, ("potts_energy", "miou"), strict=True):
        values = stored(runs, robust(), name)
        assert lines(axes)["Robust Grid-TR"] == pytest.approx(values.mean(0))
        assert band(axes, STEPS[-1]) == pytest.approx((values[:, -1].min(), values[:, -1].max()))
        assert "ADM (not run)" in lines(axes)
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [START]
        assert "stage 2" in texts(axes)


def test_the_first_stage_ends_where_the_history_says(copied):
    assert figures.stage_ends([run("partial_ce"), run("adm")], copied) == [START]
    history = load_history(folder_of(run("partial_ce"), copied))
    rows = [row | {"stage": int(row["step"] > 300)} if row["kind"] == "train" else row for row in history.rows]
    history.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures.stage_ends([run("partial_ce"), run("trust_region")], copied) == [300, START]
    history.path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= 300))
    assert figures.stage_ends([run("partial_ce")], copied) == []


def test_proposals_begin_with_the_second_stage(runs):
    figure = figures.proposal_curves([run("partial_ce"), run("trust_region"), *robust(), run("adm")], runs)
    for axes, name in zip(figure.axes, ("proposal_accuracy", "proposal_miou"), strict=True):
        shown, values = lines(axes)["Robust Grid-TR"], stored(runs, robust(), name)
        late = np.array(STEPS) > START
        assert np.isnan(shown[~late]).all() and shown[late] == pytest.approx(values.mean(0)[late])
        assert not any("Partial" in label or "ADM" in label for label in lines(axes))
    assert "without proposals: Partial CE\nnot run: ADM" in texts(figure)


# Images


def test_scribbles_of_every_length_are_truth_where_a_pixel_is_reached(runs):
    item, lengths = run("partial_ce"), (0, 30, 50, 80, 100)
    kept, colours = load_outputs(folder_of(item, runs)), class_colours(6)
    figure = panels.length_panels(item, runs, images=2)
    for index, row in enumerate(np.array(figure.axes).reshape(2, 6)):
        truth = kept["pool_truth"][index].numpy()
        reach = reaches_of(truth[None])[0]
        for axes, length in zip(row, lengths, strict=False):
            is_marked = reach <= np.float32(length / 100)
            shown = axes.images[0].get_array()
            assert (shown[is_marked] == colours[truth[is_marked]]).all()
            assert (shown[~is_marked] == shown[~is_marked][:, :1]).all(), "grey where nothing is marked"
            assert axes.get_xlabel() == f"{100 * is_marked.mean():.2f} %"
        assert (row[5].images[0].get_array() == colours[truth]).all()
    heads = [axes.get_title() for axes in figure.axes[:6]]
    assert heads == ["0 % (click)", "30 %", "50 %", "80 %", "100 %", "hidden truth"]


def test_of_scribbles_in_files_other_lengths_are_not_known(tmp_path):
    item = Experiment("trust_region", "partial_ce", "voc", 80, 0, "tiny")
    write_scribble_run(item, tmp_path)
    said = texts(panels.length_panels(item, tmp_path))
    assert "Pascal VOC 2012, scribble length 80 %" in said and "other lengths of these scribbles are not known" in said


def test_panels_are_picture_scribble_proposal_prediction_and_truth(runs):
    item = run("robust_trust_region")
    kept, colours = load_outputs(folder_of(item, runs)), class_colours(6)
    figure = panels.proposal_panels(item, runs, images=2)
    for index, row in enumerate(np.array(figure.axes).reshape(2, 5)):
        picture, scribble, *maps = (axes.images[0].get_array() for axes in row)
        assert (picture == kept["pool_images"][index].permute(1, 2, 0).numpy()).all()
        marked = kept["pool_scribbles"][index].numpy()
        assert (scribble[marked != 255] == colours[marked[marked != 255]]).all()
        pale = scribble[marked == 255]
        assert (pale.min() >= 0.5) and (pale == pale[:, :1]).all()
        truth = kept["pool_truth"][index]
        for axes, shown, name in zip(row[2:], maps, ("proposal", "prediction", "truth"), strict=True):
            labels = kept[f"pool_{name}"][index]
            assert (shown == colours[labels.numpy()]).all()
            right = 100 * float((labels == truth).sum()) / int((truth != 255).sum())
            assert axes.get_xlabel() == ("" if name == "truth" else f"{right:.1f} %")
    heads = [axes.get_title() for axes in figure.axes[:5]]
    assert heads == ["image", "scribble, 30 %", "last proposal", "prediction", "hidden truth"]
    said = texts(figure)
    assert "2 of 8 kept" in said and "Fashion scenes, scribble length 30 %, tiny scale, seed 0 (n = 1)" in said


def test_the_grey_of_a_picture_is_its_mean_over_colours():
    picture = torch.tensor([[0, 255, 30], [0, 255, 60], [0, 255, 90]], dtype=torch.uint8)[:, None]
    scribbles = torch.tensor([[255, 255, 2]], dtype=torch.uint8)
    drawn = panels.scribbled(picture, scribbles, class_colours(6))
    assert drawn[0] == pytest.approx(np.array([[0.5] * 3, [1.0] * 3, class_colours(6)[2]]))
    scribbles[0, 2] = 255
    assert panels.scribbled(picture, scribbles, class_colours(6))[0, 2] == pytest.approx([0.5 + 30 / 255] * 3)


def test_methods_stand_beside_one_another_under_their_test_miou(runs):
    shown = [run("partial_ce"), run("robust_trust_region"), run("full", 100)]
    figure = panels.method_panels([*shown, run("adm")], runs, images=1)
    first, colours = load_outputs(folder_of(shown[0], runs)), class_colours(6)
    assert len(figure.axes) == 6
    for axes, item, name in zip(
        figure.axes[2:], shown, ("Partial CE", "Robust Grid-TR", "Full\nsupervision"), strict=False
    ):
        labels = load_outputs(folder_of(item, runs))["pool_prediction"][0]
        assert (axes.images[0].get_array() == colours[labels.numpy()]).all()
        assert axes.get_title() == f"{name}\n{100 * final(runs, item)['miou']:.1f} %"
    assert (figure.axes[5].images[0].get_array() == colours[first["pool_truth"][0].numpy()]).all()
    said = texts(figure)
    assert "not run: ADM" in said and "scribble length 30 %, tiny scale, seed 0 (n = 1)" in said


def test_runs_with_other_images_or_scribbles_are_not_shown_together(copied):
    folder = folder_of(run("trust_region"), copied)
    kept = load_outputs(folder)
    for name, match in (("pool_images", "different training images"), ("pool_scribbles", "different scribbles")):
        save_state(folder / "outputs.safetensors", kept | {name: kept[name].flip(0)})
        with pytest.raises(SettingError, match=match):
            panels.method_panels([run("partial_ce"), run("trust_region")], copied)


def test_the_papers_curves_have_full_supervision_last_from_the_length_that_it_ran_at(runs):
    drawn = {name: figure for name, _, figure in figures.trust_region_figures("tiny", (0, 1), runs)}
    assert "ablation_epsilon" in drawn  # two of its rows have run
    assert list(lines(drawn["energy"].axes[0]))[-2] == "Full supervision"
    assert len(drawn["lengths"].axes) == 2 and "65.8" in texts(drawn["lengths"])
    assert "C = 6 classes" in texts(drawn["robust_loss"])
