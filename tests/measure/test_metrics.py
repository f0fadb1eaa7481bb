import pytest

from repro.grid import CALIBRATED, MASKED, PAPERS
from repro.measure.metrics import METRICS, Metric, sentence
from tests.fake_mask_runs import measured, probabilities, scenes


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("error", 0.12345, "error 12.35 %"),
        ("ece_15", 0.0321, "ECE 3.21 % (15 right-closed bins)"),
        ("ece_10_left", 0.0321, "ECE 3.21 % (10 left-closed bins)"),
        ("nll", 1.5, "NLL 1.500"),
        ("brier", 0.25, "Brier 0.250"),
        ("miou", 0.615, "mIoU 61.50 %"),
        ("boundary_f", None, "boundary F-score undefined"),
    ],
)
def test_a_value_in_words(name, value, words):
    assert METRICS[name].say(value) == words


def test_a_difference_has_its_sign_and_unit():
    percent, plain = Metric("a (%)"), Metric("b", percent=False)
    assert (percent.show(0.005, signed=True), percent.unit) == ("+0.50", " points")
    assert (plain.show(-0.005, signed=True), plain.unit) == ("-0.005", "")


def test_a_sentence_names_what_was_stored_in_order_and_once():
    stored = {"error": 0.2, "ece_15": 0.05, "nll": 0.5, "iou": [0.1]}
    names = ("ece_15", "error", "ece_15", "miou", "nll")
    assert sentence(stored, names) == "ECE 5.00 % (15 right-closed bins), error 20.00 %, NLL 0.500"
    with pytest.raises(KeyError):
        sentence(stored | {"iou_": 1.0}, ["iou_"])


def test_the_better_way_of_every_metric():
    higher = {name for name, metric in METRICS.items() if not metric.lower}
    assert higher == {
        "accuracy", "miou", "miou_present", "pixel_accuracy", "mean_class_accuracy", "boundary_iou", "boundary_f",
        "pixel_confidence", "miou_ms", "miou_crf", "cam_miou", "cam_miou_train", "cam_miou_best",
        "cam_above_chance", "proposal_accuracy", "proposal_miou",
    }  # fmt: skip


def test_what_is_measured_on_masks_has_a_title():
    _, truth = scenes(2, 0)
    stored = measured(probabilities(truth, "csl", 0, 1.0), truth)
    scalars = {name for name, value in stored.items() if isinstance(value, float)}
    assert scalars <= set(METRICS) and set(MASKED) <= scalars


def test_every_papers_headlines_are_metrics_with_calibration():
    for paper in PAPERS.values():
        assert set(paper.spec.headlines) <= set(METRICS) and "ece_15" in paper.spec.headlines[1:]
        assert set(paper.spec.headlines) <= {metric for table in paper.tables.values() for metric in table.metrics}
    assert set(CALIBRATED) <= set(METRICS)
