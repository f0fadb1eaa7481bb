"""What all explorers share: controls, numbers, pictures, words, the figure without a kernel, and refusals."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from ipywidgets import VBox
from matplotlib.figure import Figure
from PIL import Image

from figures import explore
from figures.explore import panel
from figures.explore.panel import RIGHT, WRONG, Numbers, Panel, Thumb
from tests.fake_mask_runs import write_mask_run
from tests.fake_outputs import texts
from tests.figures.explore.runs import CSL, EXPLORERS

EVERY = pytest.mark.parametrize("kind", EXPLORERS, ids=lambda kind: kind.__name__)


def decoded(widget):
    """Words and picture of the HTML of a panel's picture."""
    words, source = re.fullmatch(r'<img .* alt="(.*)" src="data:image/png;base64,(.*)">', widget.value).groups()
    return words, Image.open(io.BytesIO(base64.b64decode(source)))


@EVERY
def test_every_control_changes_numbers_or_picture_and_back(kind, root):
    experiments, _, moves = EXPLORERS[kind]
    found = Panel(kind(experiments, root))
    before, drawn = found.numbers.value, found.picture.value
    assert set(moves) >= set(found.controls) - {"drawn", "closing"}
    for name, value in moves.items():
        control = found.controls[name]
        start = control.value
        control.value = value if value is not None else control.options[1][1]
        assert found.picture.value != drawn, name
        seen = found.explorer.compute(**panel.position(found.controls))
        assert found.numbers.value == found.explorer.numbers(seen).html()
        control.value = start
        assert (found.numbers.value, found.picture.value) == (before, drawn), name
    assert all(control.description for name, control in found.controls.items() if name != "drawn")
    words, picture = decoded(found.picture)
    assert words.endswith(f"{found.explorer.words} The table has the numbers.")
    assert picture.size == pytest.approx([100 * side for side in found.explorer.size], abs=1)


@EVERY
def test_controls_only_where_somebody_can_move_them(kind, root, monkeypatch):
    experiments, words, moves = EXPLORERS[kind]
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    still = kind.explore(experiments, root)
    assert isinstance(still, Figure) and words in texts(still)
    other = [item.with_(seed=5) for item in (experiments if isinstance(experiments, list) else [experiments])]
    assert "not run: " in texts(kind.explore(other, root))
    monkeypatch.setenv("REPRO_PROGRESS", "1")
    found = kind.explore(experiments, root)
    assert isinstance(found, VBox) and words in found.numbers.value
    name, value = next((name, value) for name, value in moves.items() if value is not None)
    found.controls[name].value = value
    bundle = found._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == still._repr_png_(), "at the starting position"


def test_a_run_that_lacks_arrays_is_refused_with_their_names(tmp_path):
    write_mask_run(CSL, tmp_path, figures=False)
    assert "CSL keeps no moment of its training" in texts(explore.weights.explore(CSL, tmp_path))


def test_a_panel_of_several_runs_shows_each_and_skips_those_that_are_not_finished(root, monkeypatch):
    monkeypatch.setenv("REPRO_PROGRESS", "0")
    (base, mixed), _, _ = EXPLORERS[explore.reliability]
    both = texts(explore.reliability.explore([base, mixed.with_(seed=5), mixed], root))
    assert "FixMatch + CalibrateMix, " in both and "FixMatch, " in both and both.count("here, T = 1") == 2
    found = Panel(explore.reliability([base, mixed], root))
    assert "FixMatch, " in found.numbers.value
    found.controls["run"].value = found.controls["run"].options[1][1]
    assert "FixMatch + CalibrateMix, " in found.numbers.value


def test_numbers_as_a_table_and_as_lines():
    numbers = Numbers("What.", ("", "share"), [("> chosen", "1 %"), ("other", "22 %")])
    assert numbers.text() == "What.\n           share\n> chosen     1 %\n   other    22 %"
    page = numbers.html()
    assert page.startswith("What.<table><tr><th") and "<b>chosen</b>" in page and "<span>other</span>" in page
    assert Numbers("Only words.", (), ()).text() == "Only words."


def test_percentages_counts_and_levels():
    assert [panel.percent(value) for value in (0.613, float("nan"), float("inf"))] == ["61.3 %", "-", "-"]
    assert [panel.counted(number, "cut") for number in (0, 1, 2)] == ["0 cuts", "1 cut", "2 cuts"]
    assert panel.levels((5, 0, 0.5), 0.25) == [("0", 0), ("0.25", 0.25), ("0.5", 0.5), ("5", 5)]


def test_colours_pale_with_their_weight():
    pixels = np.full((1, 3, 3), 100)
    assert panel.fade(pixels, np.array([[1, 0.5, 0]]))[0, :, 0].tolist() == [100, int(0.56 * 100 + 0.44 * 255), 236]


def test_an_outline_lies_between_pixels():
    axes = Figure().subplots()
    inside = torch.zeros(3, 3, dtype=torch.bool)
    inside[1, 1:] = True
    panel.outline(axes, inside, "red")
    (lines,) = axes.collections
    edges = {tuple(map(tuple, segment)) for segment in np.array(lines.get_segments())}
    across = {((x, y), (x + 1, y)) for x in (0.5, 1.5) for y in (0.5, 1.5)}
    assert edges == across | {((0.5, 0.5), (0.5, 1.5)), ((2.5, 0.5), (2.5, 1.5))}


@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_are_framed_by_right_and_wrong(channels):
    axes = Figure().subplots()
    image = torch.full((channels, 8, 8), 7, dtype=torch.uint8)
    panel.thumbnails(axes, "two", [Thumb(image, True, "a"), Thumb(image, False, "b")], columns=2)
    sheet = axes.images[0].get_array()
    assert (sheet[0, 0].tolist(), sheet[0, 15].tolist()) == (list(RIGHT), list(WRONG))
    assert (sheet[2:10, 2:10] == 7).all() and (sheet[12:] == 255).all()
    assert "a" in texts(axes.figure) and "b" in texts(axes.figure)
