"""Captions: what a figure says about the runs that it shows; and looks of methods that all can tell apart."""

import itertools

import numpy as np
import pytest

from figures import style
from repro.experiment import Experiment

LABELS = Experiment("commatch", "fixmatch", "fashion", 100)
MASKS = Experiment("csl", "csl", "scenes", 20)
TAGS = Experiment("pcre", "pcre", "scenes", 500)
SHOWN_TOGETHER = {
    "masks": ("supervised", "fixmatch", "unimatch", "csl"),
    "tags": ("plain", "toco", "dupl", "afa", "pcre"),
    "scribbles": ("partial_ce", "dense_gd", "grid_gd", "adm", "trust_region", "robust_trust_region", "full"),
}
# Linear RGB as it is seen without one kind of cone, at full severity (Machado, Oliveira & Fernandes, 2009).
SIGHTS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def test_a_caption_counts_labels_or_masks():
    assert style.setting([LABELS, LABELS.with_(labels=40)]) == "Fashion-MNIST part, 40 / 100 labels, mini scale"
    assert style.setting([MASKS, MASKS.with_(labels=40)]) == "Fashion scenes, 20 / 40 masks, mini scale"
    assert style.where([MASKS, MASKS.with_(seed=1)]) == "Fashion scenes, 20 masks, mini scale, seeds 0, 1 (n = 2)"
    assert style.where([MASKS.with_(seed=3)]) == "Fashion scenes, 20 masks, mini scale, seed 3 (n = 1)"
    assert style.setting([TAGS]) == "Fashion scenes, 500 tagged images, mini scale"


def test_a_label_names_the_method_and_what_was_changed():
    assert style.label_of(LABELS.with_(threshold=0.9)) == "FixMatch, threshold = 0.9"
    assert style.label_of(MASKS.with_(masking="none")).endswith(", masking = none")


def test_a_caption_of_no_runs_is_no_error():
    assert style.where([]).endswith("(n = 0)")


def lab(colour, sight):
    """CIE L*a*b* of an sRGB colour as it is seen, by the standard's formulas (D65)."""
    value = np.array(colour)
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(sight) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (
        np.cbrt(part) if part > (6 / 29) ** 3 else part / 3 * (29 / 6) ** 2 + 4 / 29
        for part in to_xyz @ linear / [0.9505, 1, 1.089]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("together", SHOWN_TOGETHER)
def test_methods_of_one_figure_differ_in_colour_to_every_eye_and_in_marker(together, sight):
    """A distance of 10 is several times what is just noticeable."""
    for one, other in itertools.combinations(SHOWN_TOGETHER[together], 2):
        first, second = style.STYLES[one], style.STYLES[other]
        distance = np.linalg.norm(lab(first.colour, SIGHTS[sight]) - lab(second.colour, SIGHTS[sight]))
        assert distance > 10 and first.marker != second.marker, (one, other, distance)


def test_no_two_methods_look_alike():
    looks = [(look.colour, look.marker) for look in style.STYLES.values()]
    assert len(set(looks)) == len(looks) and (style.GREY, "o") not in looks  # that of an unknown method
    assert len({look.title for look in style.STYLES.values()}) == len(looks)
    assert style.style_of("nobody").title == "nobody"
    assert [style.style_of(name).title for name in ("plain", "adm", "full")] == ["Plain CAM", "ADM", "Full supervision"]
