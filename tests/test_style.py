"""Captions: what a figure says about the runs that it shows."""

from repro import style
from repro.experiment import Experiment

LABELS = Experiment("commatch", "fixmatch", "fashion", 100)
MASKS = Experiment("csl", "csl", "scenes", 20)


def test_a_caption_counts_labels_or_masks():
    assert style.setting([LABELS, LABELS.with_(labels=40)]) == "Fashion-MNIST part, 40 / 100 labels, mini scale"
    assert style.setting([MASKS, MASKS.with_(labels=40)]) == "Fashion scenes, 20 / 40 masks, mini scale"
    assert style.where([MASKS, MASKS.with_(seed=1)]) == "Fashion scenes, 20 masks, mini scale, seeds 0, 1 (n = 2)"
    assert style.where([MASKS.with_(seed=3)]) == "Fashion scenes, 20 masks, mini scale, seed 3 (n = 1)"


def test_a_label_names_the_method_and_what_was_changed():
    assert style.label_of(LABELS.with_(threshold=0.9)) == "FixMatch, threshold = 0.9"
    assert style.label_of(MASKS.with_(masking="none")).endswith(", masking = none")


def test_a_caption_of_no_runs_is_no_error():
    assert style.where([]).endswith("(n = 0)")
