"""The panel of every explorer: controls over a finished run, and below them the numbers and the picture of a position.

An explorer is a subclass of `Explorer`. It computes what a position shows, without any widget; `Panel` shows it again
at each move of a control, and `still` draws it once, for an exported page or a notebook that nobody watches.
"""

import base64
import html
import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from figures.common import image_panel
from figures.style import THEME, Drawing, label_of, message, themed, to_png
from repro.batch.progress import is_watched
from repro.experiment import Experiment
from repro.runs import is_finished

RIGHT, WRONG, UNKNOWN = (1, 115, 178), (213, 94, 0), (130, 130, 130)  # uint8 colours of labels

Seen = SimpleNamespace  # what `compute` of an explorer returns; its docstring lists the names


class Missing(Exception):
    """A finished run lacks what an explorer reads; the message names it and completes "keeps no ..."."""


class Numbers(NamedTuple):
    """The numbers of a position: a heading, and rows of cells under columns; a row that starts with "> " is bold."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """The heading and a table."""
        look = 'style="text-align:right;padding:2px 14px"'
        lines = ["".join(f'<th scope="col" {look}>{name}</th>' for name in self.columns)]
        for row in self.rows:
            tag = "b" if row[0].startswith("> ") else "span"
            lines.append("".join(f"<td {look}><{tag}>{cell.removeprefix('> ')}</{tag}></td>" for cell in row))
        return f"{self.heading}<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

    def text(self) -> str:
        """The same as lines of a fixed font."""
        table = [self.columns, *self.rows] if self.columns else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
        return "\n".join([*textwrap.wrap(self.heading, 130), *("   ".join(row) for row in cells)])


class Explorer:
    """A finished run, and how its positions are computed, written and drawn. A subclass reads the run in `__init__`,
    where it raises Missing for one that lacks something, and has

    title: names the run. words: describe the picture for those who do not see it.
    controls(): new widgets at the starting position by name; the names are the arguments of `compute`.
    compute(**position): all that a position shows. It depends only on the run and on its arguments.
    numbers(seen): what `compute` returned, as Numbers. draw(axes, seen): draws it into the axes of the layout.
    layout(figure): axes, with what is the same at every position.
    """

    about = ""  # title of the figure that explains why there is nothing to explore
    size = (9.0, 4.8)  # inches of the picture, 100 pixels each

    @classmethod
    def explore(
        cls, experiments: Experiment | Sequence[Experiment], root: Path | None = None, *more: Any
    ) -> "Panel | Figure":
        """The panel of a finished run, or a figure where nobody can move a control (papermill, an exported page).

        Without a finished run, or with one that lacks what the explorer reads, the figure says so. more: of `__init__`.
        """
        given = [experiments] if isinstance(experiments, Experiment) else list(experiments)
        names = ", ".join(label_of(item) for item in given)
        done = [item for item in given if is_finished(item, root)]
        if not done:
            return message(cls.about, f"not run: {names}")
        try:
            explorer = cls(experiments if isinstance(experiments, Experiment) else done, root, *more)
        except Missing as lack:
            return message(cls.about, f"{names} keeps no {lack}")
        return Panel(explorer) if is_watched() else still(explorer)

    def stills(self) -> list[dict]:
        """What differs from the starting position in each of the pictures of a still figure."""
        return [{}]


class Panel(widgets.VBox):
    """Controls of an explorer above its numbers and its picture, both HTML; without a kernel, a figure instead."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self.controls = explorer, explorer.controls()
        self.numbers, self.picture = widgets.HTML(), widgets.HTML()
        with mpl.rc_context(THEME):
            self._figure = Figure(figsize=explorer.size, dpi=100)
            self._canvas, self._axes = FigureCanvasAgg(self._figure), explorer.layout(self._figure)
        self._fixed = {part for axes in self._axes for part in axes.get_children()}
        for control in self.controls.values():
            control.observe(lambda _: self.update(), "value")
        boxes = [control for control in self.controls.values() if isinstance(control, widgets.Box)]
        single = [control for control in self.controls.values() if control not in boxes]
        title = widgets.HTML(f"<b>{html.escape(explorer.title)}</b>")
        super().__init__([title, in_columns(single), *boxes, self.numbers, self.picture])
        self.update()

    def update(self) -> None:
        """Compute, write and draw the position of the controls."""
        seen = self.explorer.compute(**position(self.controls))
        for axes in self._axes:
            for part in axes.get_children():
                if part not in self._fixed:
                    part.remove()
        with mpl.rc_context(THEME):
            self.explorer.draw(self._axes, seen)
            file = io.BytesIO()
            self._canvas.print_png(file, pil_kwargs={"compress_level": 1})
        numbers = self.explorer.numbers(seen)
        words = html.escape(f"{numbers.heading} {self.explorer.words} The table has the numbers.".strip())
        look = 'style="max-width: 100%; height: auto"'
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        self.numbers.value, self.picture.value = numbers.html(), f'<img {look} alt="{words}" src="{source}">'

    def _repr_mimebundle_(self, **options) -> dict:
        bundle = super()._repr_mimebundle_(**options)
        return bundle | {"image/png": base64.b64encode(to_png(still(self.explorer))).decode()}


def position(controls: dict[str, widgets.Widget]) -> dict[str, Any]:
    """Where the controls stand."""
    return {name: control.value for name, control in controls.items()}


@themed
def still(explorer: Explorer) -> Figure:
    """The explorer at its starting position as a figure, its numbers below the picture."""
    controls = {name: one for name, one in explorer.controls().items() if not isinstance(one, widgets.Box)}
    start = position(controls)  # without the stroke that a pencil would add
    seen = [explorer.compute(**start | change) for change in explorer.stills()]
    texts = [explorer.numbers(one).text() for one in seen]
    (wide, high), head = explorer.size, 0.35
    heights = [height for text in texts for height in (high, 0.14 * (text.count("\n") + 1) + 0.15)]
    figure = Drawing(figsize=(wide, head + sum(heights)))
    title, *parts = figure.subfigures(1 + len(heights), 1, height_ratios=[head, *heights])
    title.text(0.5, 0.5, explorer.title, ha="center", va="center", fontsize=10)
    for above, below, one, text in zip(parts[::2], parts[1::2], seen, texts, strict=True):
        explorer.draw(explorer.layout(above), one)
        below.text(0.5, 0.98, text, family="DejaVu Sans Mono", fontsize=6.5, ha="center", va="top")
    return figure


# Controls


def looks(description: str) -> dict:
    """Width and label of a slider."""
    return {"description": description, "layout": {"width": "440px"}, "style": {"description_width": "160px"}}


def whole(description: str, value: int, low: int, high: int) -> widgets.IntSlider:
    """A slider over whole numbers."""
    return widgets.IntSlider(value, min=low, max=high, **looks(description))


def slider(description: str, options: Iterable[tuple[str, Any]], value: Any, live: bool = True):
    """A slider over named values. live: whether it reports every value that it is dragged over."""
    return widgets.SelectionSlider(options=list(options), value=value, continuous_update=live, **looks(description))


def levels(values: Iterable[float], own: float) -> list[tuple[str, float]]:
    """Values of a slider, ascending, the run's own among them."""
    return [(f"{level:g}", level) for level in sorted({*values, own})]


def buttons(description: str, options: dict[Any, str], value: Any) -> widgets.ToggleButtons:
    """A button for each value, under its words."""
    named = [(words, option) for option, words in options.items()]
    narrow = {"button_width": "auto", "description_width": "160px"}
    return widgets.ToggleButtons(options=named, value=value, description=description, style=narrow)


def in_columns(controls: Iterable[widgets.Widget]) -> widgets.GridBox:
    """Controls in two columns, row by row."""
    return widgets.GridBox(list(controls), layout={"grid_template_columns": "repeat(2, 450px)"})


# Words and pictures


def percent(value: float, digits: int = 1, undefined: str = "-") -> str:
    """`61.3 %`, a dash for NaN or infinity."""
    return f"{100 * value:.{digits}f} %" if math.isfinite(value) else undefined


def counted(number: int, name: str) -> str:
    """`1 sweep`, `2 sweeps`."""
    return f"{number} {name}{'s'[: number != 1]}"


def tiles(figure: FigureBase, rows: int, columns: int, right: float = 0.995, left: float = 0.005, foot: float = 0.1):
    """A grid of axes for images from `left` to `right`, and below it one more for a key, the last."""
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=left, right=right, top=0.95, bottom=foot, wspace=0.06, hspace=0.14)
    key = figure.add_axes((left, 0, right - left, foot))
    return [bare(axes) for axes in (*grid.flat, key)]


def bare(axes: Axes) -> Axes:
    """Without ticks, grid and frame."""
    axes.set(xticks=[], yticks=[], frame_on=False)
    axes.grid(False)
    return axes


def plain_ticks(axes: Axes) -> None:
    """Small numbers at major ticks alone: minor ticks and mathematical text take longer than all the rest."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)


def picture(axes: Axes, pixels: np.ndarray, title: str, **look: Any) -> None:
    """An image under its title, small and to the left. look: of `Axes.imshow`."""
    image_panel(axes, pixels, **look)
    axes.set_title(title, fontsize=8, loc="left", pad=3)


def key(axes: Axes, entries: Iterable[tuple[str, Any]], columns: int = 9) -> None:
    """What colours mean."""
    patches = [Patch(facecolor=colour, edgecolor="0.5", label=words) for words, colour in entries]
    axes.legend(handles=patches, loc="upper left", ncols=columns, fontsize=7, frameon=False, handlelength=1.2,
                borderaxespad=0.2, columnspacing=1, labelspacing=0.3)  # fmt: skip


def outline(axes: Axes, inside: np.ndarray | Tensor, colour: Any, width: float = 1.2) -> None:
    """The edge of a region (H, W) bool of an image, between its pixels."""
    inside = np.pad(np.asarray(inside), 1)
    across, down = (np.argwhere(np.diff(inside, axis=axis)) for axis in (1, 0))
    lines = [[(x - 0.5, y - 1.5), (x - 0.5, y - 0.5)] for y, x in across]
    lines += [[(x - 1.5, y - 0.5), (x - 0.5, y - 0.5)] for y, x in down]
    axes.add_collection(mpl.collections.LineCollection(lines, colors=[colour], linewidths=width))


def fade(pixels: np.ndarray, weight: np.ndarray, least: float = 0.12) -> np.ndarray:
    """Colours (H, W, 3) in 0..255 that pale towards white as their weight (H, W) falls, to `least` of them at 0."""
    share = least + (1 - least) * np.asarray(weight, float)[..., None]
    return (share * pixels + (1 - share) * 255).astype(np.uint8)


class Thumb(NamedTuple):
    """A small image (C, H, W) uint8, whether its label is right (None: no matter), and words below it."""

    image: Tensor
    right: bool | None
    words: str


def thumbnails(axes: Axes, title: str, thumbs: Sequence[Thumb], rows: int = 1, columns: int = 12) -> None:
    """Images in rows, framed in the colour of right or wrong labels. One large image is drawn, since many take long."""
    axes.set_title(title, fontsize=9, loc="left", pad=2)
    if not thumbs:
        return
    high, wide = (side + 4 for side in thumbs[0].image.shape[1:])
    row, column = round(1.6 * high), round(1.25 * wide)
    sheet = np.full((rows * row, columns * column, 3), 255, np.uint8)
    for number, (image, right, words) in enumerate(thumbs):
        y, x = number // columns * row, number % columns * column
        colour = (48, 48, 48) if right is None else RIGHT if right else WRONG
        sheet[y : y + high, x : x + wide] = colour
        sheet[y + 2 : y + high - 2, x + 2 : x + wide - 2] = image.permute(1, 2, 0).numpy()
        axes.text(x, y + 1.04 * high, words, color=np.array(colour) / 255, fontsize=6.5, va="top", linespacing=1.1)
    axes.imshow(sheet, interpolation="nearest", aspect="auto")
