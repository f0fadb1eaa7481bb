"""What explorers share: controls over numbers and a picture, the figure in their place, tables, tiles and keys."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from figures.style import INK, Drawing, label_of, message, themed, to_png
from repro.batch.progress import is_watched
from repro.experiment import Experiment
from repro.runs import is_finished

T = TypeVar("T")


class Panel(widgets.VBox):
    """Controls above numbers and a picture, both HTML; where nobody has a kernel, a figure in their place.

    title: HTML. controls: by name; each move of one calls `update`. show: the HTML of numbers and of the picture where
    the controls stand. still: the figure at the starting position. further: widgets between controls and numbers.
    """

    def __init__(
        self,
        title: str,
        controls: dict[str, widgets.Widget],
        show: Callable[[], tuple[str, str]],
        still: Callable[[], Figure],
        further: Iterable[widgets.Widget] = (),
    ) -> None:
        self.controls, self.numbers, self.picture = controls, widgets.HTML(), widgets.HTML()
        self._show, self._still = show, still
        for control in controls.values():
            control.observe(lambda _: self.update(), "value")
        parts = [widgets.HTML(f"<b>{title}</b>"), columns(controls.values()), *further, self.numbers, self.picture]
        super().__init__(parts)
        self.update()

    def at(self, kind: type[T]) -> T:
        """The position where the controls stand, a dataclass with a field of each control's name."""
        return kind(**{name: control.value for name, control in self.controls.items()})

    def update(self) -> None:
        """Numbers and picture for where the controls stand."""
        self.numbers.value, self.picture.value = self._show()

    def _repr_mimebundle_(self, **options) -> dict:
        """The widget, and for readers without a kernel (an exported page) the figure."""
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"image/png": base64.b64encode(to_png(self._still())).decode()}


def opened(
    title: str, experiment: Experiment, root: Path | None, load: Callable[[], T | None],
    explorer: Callable[[T], Panel], still: Callable[[T], Figure], lacking: str | Callable[[], str] = "",
) -> Panel | Figure:  # fmt: skip
    """What `explore` returns: the explorer of a finished run, or a figure where nobody can move a slider.

    load: what the run saved, None where it keeps too little. lacking: what that is, or a function that says it.
    """
    if not is_finished(experiment, root):
        return message(title, f"not run: {label_of(experiment)}")
    saved = load()
    if saved is None:
        return message(title, f"{label_of(experiment)} keeps no {lacking if isinstance(lacking, str) else lacking()}")
    return explorer(saved) if is_watched() else still(saved)


def look(description: str) -> dict:
    """Width and label of a slider."""
    return {"description": description, "layout": {"width": "440px"}, "style": {"description_width": "160px"}}


def embedded(picture: Image.Image, words: str) -> str:
    """A picture as HTML, described by `words`. JPEG, since PNG would take longer than all the rest of a move."""
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=95, subsampling=0)
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    looks = f'width="{picture.width}" height="{picture.height}" style="max-width: 100%; height: auto"'
    return f'<img {looks} alt="{html.escape(words)}" src="{source}">'


def columns(parts: Iterable[widgets.Widget]) -> widgets.GridBox:
    """Widgets in two columns, row by row."""
    return widgets.GridBox(list(parts), layout={"grid_template_columns": "repeat(2, 450px)"})


def slider(description: str, options: list, value: Any, continuous: bool = True) -> widgets.SelectionSlider:
    """A slider over given values. continuous: whether it tells of every value that it is dragged over."""
    return widgets.SelectionSlider(options=options, value=value, continuous_update=continuous, **look(description))


def buttons(description: str, options: dict[str, Any], value: Any) -> widgets.ToggleButtons:
    """One button for each option, by name, of which one is down."""
    narrow = {"button_width": "auto", "description_width": "160px"}
    return widgets.ToggleButtons(options=options, value=value, description=description, style=narrow)


def html_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells under their names, to the right; rows whose first cell begins with `> ` are bold, without it."""
    looks = 'style="text-align:right;padding:2px 14px"'
    lines = ["".join(f'<th scope="col" {looks}>{name}</th>' for name in names)]
    for row in rows:
        bold = ("<b>", "</b>") if row[0].startswith("> ") else ("", "")
        lines.append("".join(f"<td {looks}>{bold[0]}{cell.removeprefix('> ')}{bold[1]}</td>" for cell in row))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


@themed
def sheet(title: str, picture: Image.Image, words: str) -> Figure:
    """A picture with words in a fixed font below it, under a title: what an exported page shows."""
    head, wide, high = 0.62, picture.width / 100, picture.height / 100
    below = 0.13 * (words.count("\n") + 1) + 0.15
    total = head + high + below
    figure = Drawing(figsize=(wide, total))
    figure.suptitle(title, y=1 - 0.08 / total, va="top")
    axes = figure.add_axes((0, below / total, 1, high / total))
    axes.imshow(picture, interpolation="bilinear")
    axes.set_axis_off()
    looks = {"family": "DejaVu Sans Mono", "fontsize": 7, "ha": "center", "va": "top"}
    figure.text(0.5, (below - 0.08) / total, words, **looks)
    return figure


def fitted(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height in pixels of an image of (H, W) whose longer side becomes `side`."""
    high, wide = (max(1, round(side * length / max(shape))) for length in shape)
    return wide, high


def smooth(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, 3 or 1) in 0..255, blended to a size (width, height), as (height, width, 3) uint8."""
    values = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.uint8)
    return np.array(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))


def nearest(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels (H, W) uint8 or bool at the nearest pixels of a size (width, height), as (height, width) of their type."""
    picture = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.array(picture).astype(labels.dtype)


def write_key(
    pen: ImageDraw.ImageDraw, entries: Iterable[tuple[str, Any]], box: tuple[int, int, int], font: Any, row: int = 17
) -> int:
    """Words beside patches of their colours, line by line; returns the height that they took, pixels.

    box: left, top, right; a line that would pass the right end goes on below.
    """
    left, top, right = box
    x, y = left, top
    for words, colour in entries:
        wide = 19 + pen.textlength(words, font) + 14
        if x > left and x + wide > right:
            x, y = left, y + row
        pen.rectangle((x, y + 1, x + 14, y + 12), colour, "#808080")
        pen.text((x + 19, y), words, INK, font)
        x += wide
    return y + row - top


def outline(inside: np.ndarray) -> np.ndarray:
    """Cells (H, W) of a region that have a neighbour at the right or below on its other side."""
    edge = np.zeros_like(inside)
    edge[:, :-1] |= inside[:, :-1] != inside[:, 1:]
    edge[:-1] |= inside[:-1] != inside[1:]
    return edge
