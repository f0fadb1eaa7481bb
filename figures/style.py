"""How figures look: one theme, a fixed style for each method, captions; equal figures are saved as equal bytes."""

import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.experiment import Experiment
from repro.files import atomic_path
from repro.grid import PAPERS, TITLES
from repro.papers.published import LABELS

Runs, Root = Sequence[Experiment], Path | None  # what figures are of, and the folder of runs (None: the usual one)
DPI = 120
PALETTE = [tuple(round(part, 4) for part in colour) for colour in sns.color_palette("colorblind")]
BLUE, ORANGE, GREEN, RED, PURPLE, BROWN, PINK, GREY, YELLOW, SKY = PALETTE
INK = "#303030"
DARK = (0.1882, 0.1882, 0.1882)  # INK, of what others are measured against
# The font comes with matplotlib, so that the same results look the same on every machine.
THEME = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook", font_scale=0.85),
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "0.6",
    "axes.titlesize": 11,
    "figure.titlesize": 11.5,
    "grid.color": "0.9",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.dpi": DPI,
}


@dataclass(frozen=True)
class Style:
    """How a method looks in every figure."""

    title: str
    colour: tuple[float, float, float] = GREY
    marker: str = "o"


STYLES = {
    "supervised": Style("Supervised", GREY, "s"),
    "pseudo_label": Style("Pseudo-label", BROWN, "v"),
    "mean_teacher": Style("Mean Teacher", YELLOW, "^"),
    "mixmatch": Style("MixMatch", PINK, "<"),
    "remixmatch": Style("ReMixMatch", PURPLE, ">"),
    "uda": Style("UDA", SKY, "P"),
    "fixmatch": Style("FixMatch", ORANGE, "D"),
    "flexmatch": Style("FlexMatch", GREEN, "X"),
    "ups": Style("UPS", RED, "p"),
    "commatch": Style("ComMatch", BLUE, "o"),
    "freematch": Style("FreeMatch", SKY, "*"),
    "softmatch": Style("SoftMatch", PURPLE, "h"),
    "marginmatch": Style("MarginMatch", BROWN, "d"),
    "calibratemix": Style("CalibrateMix", RED, "o"),
    "unimatch": Style("UniMatch", GREEN, "^"),
    "csl": Style("CSL", BLUE, "H"),
    "plain": Style("Plain CAM", GREY, "D"),
    "toco": Style("ToCo", ORANGE, "v"),
    "dupl": Style("DuPL", GREEN, "s"),
    "afa": Style("AFA", PURPLE, "p"),
    "pcre": Style("PCRE", BLUE, "P"),
    "partial_ce": Style("Partial CE", GREY, "v"),
    "dense_gd": Style("Dense-GD", ORANGE, "p"),
    "grid_gd": Style("Grid-GD", GREEN, "o"),
    "adm": Style("ADM", PURPLE, "s"),
    "trust_region": Style("Grid-TR", SKY, "X"),
    "robust_trust_region": Style("Robust Grid-TR", BLUE, "^"),
    "full": Style("Full supervision", DARK, "*"),
}


def style_of(method: str) -> Style:
    """The style of a method; grey, under its own name, for one that has no entry."""
    return STYLES.get(method, Style(method))


def themed(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under THEME, and leave the caller's settings alone."""

    @functools.wraps(draw)
    def inside(*arguments, **options) -> Figure:
        with mpl.rc_context(THEME):
            return draw(*arguments, **options)

    return inside


class Drawing(Figure):
    """A figure that a notebook shows as the very bytes that `save` writes, whatever its backend."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def to_png(figure: Figure) -> bytes:
    """A figure as PNG, without time stamps or versions: equal figures give equal bytes."""
    file = io.BytesIO()
    with mpl.rc_context(THEME):
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically."""
    with atomic_path(path) as part:
        part.write_bytes(to_png(figure))
    return Path(path)


# Captions


def label_of(experiment: Experiment) -> str:
    """A line's name: the method, and what was changed."""
    changed = "".join(f", {name} = {value}" for name, value in experiment.overrides)
    return style_of(experiment.method).title + changed


def setting(experiments: Iterable[Experiment]) -> str:
    """`Fashion-MNIST part, 100 labels, mini scale`."""
    experiments = list(experiments)
    data = " / ".join(TITLES.get(name, name) for name in dict.fromkeys(item.data for item in experiments))
    words = next((PAPERS[item.paper].spec.supervision.budget for item in experiments), LABELS)
    budget = words.format(" / ".join(map(str, sorted({item.labels for item in experiments}))))
    return f"{data}, {budget}, {' / '.join(dict.fromkeys(item.scale for item in experiments))} scale"


def where(experiments: Iterable[Experiment]) -> str:
    """`Fashion-MNIST part, 100 labels, mini scale, seeds 0, 1 (n = 2)`: the data, scale and n of a caption."""
    experiments = list(experiments)
    seeds = sorted({item.seed for item in experiments})
    return f"{setting(experiments)}, seed{'s'[: len(seeds) > 1]} {', '.join(map(str, seeds))} (n = {len(seeds)})"


def by_seed(experiments: Iterable[Experiment]) -> list[list[Experiment]]:
    """Experiments that differ in their seed only, together, in order of first appearance."""
    groups: dict[Experiment, list[Experiment]] = {}
    for item in dict.fromkeys(experiments):
        groups.setdefault(item.with_(seed=0), []).append(item)
    return list(groups.values())


# The start of a figure


def start(
    title: str, captions: Sequence[str], size: tuple[float, float], rows: int = 1, columns: int = 1, **grid
) -> tuple[Drawing, np.ndarray]:
    """A figure under its title and the captions that are not empty, and its axes (rows, columns).

    size: width and height in inches. grid: further options of `Figure.subplots`.
    """
    figure = Drawing(figsize=size, layout="constrained")
    figure.suptitle("\n".join([title, *filter(None, captions)]))
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


@themed
def message(title: str, text: str) -> Drawing:
    """A figure that tells why there is nothing to draw."""
    figure, axes = start(title, (), (8, 1.6))
    say(axes[0, 0], text)
    return figure


def say(axes: Axes, text: str) -> None:
    """Write text in place of a plot."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=INK, wrap=True)
