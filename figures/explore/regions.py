"""The region explorer: a class activation map, the labels cut from it, and PCRE's region grown from its seeds.

What is computed stands in `growth`; here are numbers as text, pictures and widgets. Seeds, expansion sets and regions
come from `methods.image_tags.regions`, labels from `cam`. `explore` puts controls around them; where nobody watches it
returns a figure. Of the arrays that a run saves, masks and confidences are read at scale 1, from one pass.
"""

import itertools
import math
import textwrap
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.explore.growth import LAYERS, SOURCES, Grown, Position, Saved, View, load_saved, measure, starting, view
from figures.explore.parts import (  # fmt: skip
    Panel,
    buttons,
    embedded,
    html_table,
    look,
    nearest,
    opened,
    outline,
    sheet,
    slider,
    smooth,
)
from figures.plane import class_colours
from figures.style import INK, style_of
from repro.data.masks import IGNORE
from repro.experiment import Experiment
from repro.recipe import scales_of

RADII = (0, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)  # patches
MOST_ROUNDS = 10
TITLE = "What a map lights up, and how a region grows"


# What is shown

COLUMNS = ("labels of", "IoU", "found, of the class", "right, of labelled", "over-activation, FP / TP")


def name_of(at: Position) -> str:
    """`CAM, scales 0.5 + 1`."""
    scales = ", scale" + "s"[: len(at.scales) > 1] + " " + " + ".join(f"{scale:g}" for scale in at.scales)
    return SOURCES[at.source] + (scales if at.source in LAYERS else "")


def table_rows(saved: Saved, at: Position, seen: View | None = None) -> list[tuple[str, ...]]:
    """Fit of the labels at beta to the position's class, as text under COLUMNS: of the map, the region, both fused."""
    seen, (image, channel) = seen or view(saved, at), at.pair
    labels = {name_of(at): seen.label}
    if seen.grown is not None:
        labels |= {"region m_r, normalised": seen.grown.region_label, fused_name(at): seen.grown.label}
    rows = []
    for name, label in labels.items():
        values = measure(label, saved.truth[image], channel, len(saved.classes))
        ratio = values.pop("over")
        shares = (percent(value) for value in values.values())
        rows.append((name, *shares, f"{ratio:.2f}" if math.isfinite(ratio) else "-"))
    return rows


def percent(value: float) -> str:
    """`61.3 %`, a dash where it is not defined."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def fused_name(at: Position) -> str:
    """`fused: 0.7 CAM + 0.3 region`."""
    return f"fused: {1 - at.share:.2g} {SOURCES[at.source]} + {at.share:.2g} region"


def heading(saved: Saved, at: Position, seen: View | None = None) -> str:
    """Which image and class, what grew or why nothing did, and what a reader has to know of the map and of the run."""
    (image, channel), own = at.pair, saved.recipe.method
    others = [saved.classes[1 + other] for other in saved.tags[image].nonzero()[:, 0].tolist() if other != channel]
    said = f"Test image {image}, {saved.classes[1 + channel]}" + f" (beside {', '.join(others)})" * bool(others)
    if at.source == "rollout":
        said += "; the rollout knows no class and is read as this one"
    if not saved.has_regions:
        why = "they need PCRE's confidences and masks, and this run of"
        return f"{said}. No seeds, region or fused map: {why} {style_of(saved.method).title} keeps none."
    said = f"{said}. {growth_of((seen or view(saved, at)).grown)}"
    if not own.expand:
        said += " The run's expansion is off: T does nothing."
    scales = ", ".join(f"{scale:g}" for scale in scales_of(own.mask_scales or saved.recipe.cam_scales))
    return f"{said} Masks are of scale 1; the run mixes in those of scales {scales} and mirror images, without a gate."


def growth_of(grown: Grown) -> str:
    """`2 seeds; 7 of 31 candidates are in the region, of 256 patches.`"""
    seeds, listed, patches = int((grown.seeds >= 0).sum()), int(grown.listed.sum()), len(grown.listed)
    if not seeds:
        return f"No candidate among {patches} patches: the region is empty, and the fused map is the map itself."
    joined = int(grown.joins.any(0).sum())
    return f"{seeds} seed{'s'[: seeds > 1]}; {joined} of {listed} candidates are in the region, of {patches} patches."


def text(saved: Saved, at: Position) -> str:
    """The numbers as plain text."""
    seen = view(saved, at)
    rows = (COLUMNS, *table_rows(saved, at, seen))
    lines = ["".join((f"{row[0]:<42}", *(f"{cell:>21}" for cell in row[1:4]), f"{row[4]:>27}")) for row in rows]
    return "\n".join((*textwrap.wrap(heading(saved, at, seen), 130), "", *lines))


def html(saved: Saved, at: Position, seen: View | None = None) -> str:
    """The numbers as an HTML table."""
    seen = seen or view(saved, at)
    return heading(saved, at, seen) + html_table(COLUMNS, table_rows(saved, at, seen))


WIDTH, LEFT, TOP, TILE, STEP, ROW, FOOT, KEY = 900, 10, 24, 208, 224, 236, 44, 447  # of picture, tiles and key, pixels
SIZE = (TILE, TILE)
HEAT, ROUNDS = (mpl.colormaps[name] for name in ("inferno", "viridis"))
HEATS = (255 * HEAT(np.arange(256))[:, :3]).round().astype(np.uint8)
TRUE, CUT, PALE = (0, 220, 220), (255, 255, 255), (48, 48, 48, 70)  # outlines: truth, values above beta; candidates
STRONG, FADED = 0.65, 0.35  # of a map's colour over the image; of the image under patches


class Canvas:
    """Draws one run at a position. Tiles: image, map, labels, truth; growth, region, fused map, its labels."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.font, self.small = ImageFont.load_default(12), ImageFont.load_default(11)
        self.colours = (255 * class_colours(len(saved.classes))).round().astype(np.uint8)
        self.height = TOP + (2 if saved.has_regions else 1) * ROW + FOOT - 20

    def draw(self, at: Position, seen: View | None = None) -> Image.Image:
        """The picture, RGB. seen: what `view` returns, if it is at hand."""
        seen = seen or view(self.saved, at)
        picture = Image.new("RGB", (WIDTH, self.height), "white")
        pen = ImageDraw.Draw(picture)
        for number, (words, tile) in enumerate(self.tiles(at, seen)):
            x, y = LEFT + number % 4 * STEP, TOP + number // 4 * ROW
            pen.text((x, y - 17), words, INK, self.small)
            picture.paste(tile, (x, y))
        self._key(picture, pen, at)
        return picture

    def tiles(self, at: Position, seen: View) -> list[tuple[str, Image.Image]]:
        """Title and picture of every tile, row by row."""
        (image, channel), names = at.pair, self.saved.classes
        truth = self.saved.truth[image]
        pixels, own = self.saved.images[image].permute(1, 2, 0).numpy(), nearest((truth == channel + 1).numpy(), SIZE)

        def fit(label: Tensor) -> str:
            return percent(measure(label, truth, channel, len(names))["iou"])

        tiles = [
            (f"Test image {image}", Image.fromarray(smooth(pixels, SIZE))),
            (capital(name_of(at)), heat(pixels, seen.cam[channel], own, at.beta)),
            (f"Its labels, beta = {at.beta:g}: IoU {fit(seen.label)}", self.flat(seen.label, own)),
            (f"Truth (report only): {names[channel + 1]}", self.flat(truth, own)),
        ]
        if seen.grown is not None:
            grown, gated = seen.grown, "no gate" if math.isinf(at.radius) else f"r = {at.radius:.3g}"
            tiles += [
                (f"Seeds, and what joined; T = {at.rounds}", self.patches(pixels, grown, own, at)),
                (f"Region m_r; tau_bin = {at.threshold:g}, {gated}", heat(pixels, grown.region, own)),
                (capital(fused_name(at)), heat(pixels, grown.fused[channel], own, at.beta)),
                (f"Its labels, beta = {at.beta:g}: IoU {fit(grown.label)}", self.flat(grown.label, own)),
            ]
        return tiles

    def flat(self, label: Tensor, own: np.ndarray) -> Image.Image:
        """A label map (H, W) in the colours of its classes, and the outline of the true class."""
        tile = self.colours[nearest(label.numpy(), SIZE)]
        tile[thick(own)] = TRUE
        return Image.fromarray(tile)

    def patches(self, pixels: np.ndarray, grown: Grown, own: np.ndarray, at: Position) -> Image.Image:
        """Patches in the colour of the round that they first joined in, other candidates pale; seeds with the number of
        their round and, where there is a gate, its disc."""
        grid, colours = self.saved.grid, round_colours(len(grown.seeds))
        cells = np.zeros((len(grown.listed), 4), np.uint8)
        cells[grown.listed.numpy()] = PALE
        for colour, group in reversed(list(zip(colours, grown.joins.numpy(), strict=True))):
            cells[group] = (*colour, 190)
        picture = Image.fromarray(smooth(FADED * grey(pixels) + (1 - FADED) * 255, SIZE)).convert("RGBA")
        layer = Image.fromarray(cells.reshape(*grid, 4)).resize((TILE, TILE), Image.Resampling.NEAREST)
        picture.alpha_composite(layer)
        tile = np.array(picture.convert("RGB"))
        tile[thick(own)] = TRUE
        picture = Image.fromarray(tile)
        pen, (down, across) = ImageDraw.Draw(picture), (TILE / side for side in grid)
        for number, (seed, colour) in enumerate(zip(grown.seeds.tolist(), colours, strict=True), 1):
            if seed < 0:
                break  # rounds that follow one without a seed have none
            x, y = (seed % grid[1] + 0.5) * across, (seed // grid[1] + 0.5) * down
            if not math.isinf(at.radius):
                wide, high = (at.radius + 0.5) * across, (at.radius + 0.5) * down
                pen.ellipse((x - wide, y - high, x + wide, y + high), None, colour, 2)
            inside = tuple(min(max(place, 8), TILE - 8) for place in (x, y))
            pen.text(inside, str(number), "white", self.font, anchor="mm", stroke_width=2, stroke_fill="black")
        return picture

    def _key(self, picture: Image.Image, pen: ImageDraw.ImageDraw, at: Position) -> None:
        """What colours and lines mean, below the tiles."""
        x, y = LEFT, self.height - FOOT

        def entry(words: str, colour: tuple[int, ...], line: bool = False) -> None:
            nonlocal x
            pen.rectangle((x, y + (5 if line else 1), x + 14, y + (8 if line else 12)), colour, "#808080")
            pen.text((x + 19, y), words, INK, self.small)
            x += int(pen.textlength(words, self.small)) + 34

        pen.text((x, y), "0", INK, self.small)
        picture.paste(Image.fromarray(np.broadcast_to(HEATS[None, ::2], (12, 128, 3)).copy()), (x + 10, y + 1))
        pen.text((x + 142, y), "1", INK, self.small)
        x += 164
        entry("outline of the true class", TRUE, line=True)
        entry("map above beta", CUT, line=True)
        if self.saved.has_regions:
            entry("candidate that did not join", (165,) * 3)
        x, y = LEFT, y + 20
        known = self.saved.truth[at.pair[0]] != IGNORE
        shown = [0, *(1 + self.saved.tags[at.pair[0]].nonzero()[:, 0]).tolist()] + [IGNORE] * (not bool(known.all()))
        for label in shown:
            entry("unknown" if label == IGNORE else self.saved.classes[label], tuple(self.colours[label].tolist()))
        x = max(x, KEY)
        for number, colour in enumerate(round_colours(at.rounds) if self.saved.has_regions else (), 1):
            entry(f"round {number}" if number == 1 else str(number), colour)


def heat(pixels: np.ndarray, values: Tensor, own: np.ndarray, beta: float | None = None) -> Image.Image:
    """A map (H, W) in [0, 1] over the grey image, the outline of the true class, and that of values above beta."""
    colours = HEATS[(255 * values.clamp(0, 1)).round().byte().numpy()]
    tile = smooth(STRONG * colours + (1 - STRONG) * grey(pixels), SIZE)
    if beta is not None:
        tile[outline(nearest((values > beta).numpy(), SIZE))] = CUT
    tile[thick(own)] = TRUE
    return Image.fromarray(tile)


def round_colours(rounds: int) -> list[tuple[int, ...]]:
    """A colour for each round, the first dark."""
    return [tuple((255 * np.array(ROUNDS(at)[:3])).astype(int).tolist()) for at in np.linspace(0.1, 0.95, rounds)]


def grey(pixels: np.ndarray) -> np.ndarray:
    """The mean of the colours (H, W, 3), as (H, W, 1)."""
    return pixels.mean(2, keepdims=True)


def thick(inside: np.ndarray) -> np.ndarray:
    """The outline of a region (H, W), two pixels wide."""
    edge = outline(inside)
    edge[1:] |= edge[:-1]
    edge[:, 1:] |= edge[:, :-1]
    return edge


def capital(words: str) -> str:
    """The first letter a capital, the others as they are."""
    return words[:1].upper() + words[1:]


# Widgets


class Explorer(Panel):
    """Controls over a saved run; every move computes, measures and draws again. See `explore`."""

    def __init__(self, saved: Saved) -> None:
        self.saved, self.canvas, self.start = saved, Canvas(saved), starting(saved)
        start, names = self.start, saved.classes
        pairs = [(f"{image}: {names[1 + channel]}", (image, channel)) for image, channel in saved.pairs]
        counts = range(1, len(saved.scales) + 1)
        subsets = list(itertools.chain(*(itertools.combinations(saved.scales, count) for count in counts)))
        sums = [(" + ".join(f"{scale:g}" for scale in part), part) for part in subsets]
        controls = {
            "pair": slider("test image: class", pairs, start.pair),
            "source": buttons("map", {name: key for key, name in SOURCES.items()}, start.source),
            "scales": widgets.Dropdown(options=sums, value=start.scales, **look("scales, summed")),
            "beta": slider("beta, background", levels(start.beta), start.beta),
        }
        if saved.has_regions:
            most = max(MOST_ROUNDS, start.rounds)
            controls |= {
                "threshold": slider("tau_bin, of masks", levels(start.threshold), start.threshold),
                "radius": slider("radius of the gate", radii(saved), start.radius),
                "rounds": widgets.IntSlider(start.rounds, min=1, max=most, **look("T, rounds of growth")),
                "share": slider("alpha, of the region", levels(start.share), start.share),
            }
        super().__init__(saved.title, controls, self.show, lambda: still(saved, start))

    @property
    def position(self) -> Position:
        """Where the controls stand."""
        return self.at(Position)

    def show(self) -> tuple[str, str]:
        """Compute, measure and draw at the controls' position."""
        at = self.position
        self.controls["scales"].disabled = at.source not in LAYERS
        seen = view(self.saved, at)
        words = f"{heading(self.saved, at, seen)} Maps over the image, label maps and truth. The table has the numbers."
        return html(self.saved, at, seen), embedded(self.canvas.draw(at, seen), words)


def levels(own: float) -> list[tuple[str, float]]:
    """Hundredths from 0 to 1, and the run's own value."""
    return [(f"{level:g}", level) for level in sorted({*(step / 100 for step in range(101)), own})]


def radii(saved: Saved) -> list[tuple[str, float]]:
    """Radii within the grid, the one that the run's training ends with, and none."""
    own = saved.recipe.method.radius(1.0, saved.grid)
    inside = {radius for radius in RADII if radius < math.hypot(saved.grid[0] - 1, saved.grid[1] - 1)}
    options = [(f"{radius:.3g}", radius) for radius in sorted(inside - {own})]
    if own is not None:
        options = sorted([*options, (f"{own:.3g}, training's last", own)], key=lambda option: option[1])
    return [*options, ("whole grid", math.inf)]


def still(saved: Saved, at: Position | None = None) -> Figure:
    """The explorer at one position (by default the starting one) as a figure: the picture, the numbers below."""
    at = at or starting(saved)
    return sheet(f"{TITLE}\n{saved.title}", Canvas(saved).draw(at), text(saved, at))


def explore(experiment: Experiment, root: Path | None = None) -> Explorer | Figure:
    """The explorer of a finished run, or a figure where nobody can move a slider (papermill, export, not run)."""
    lacking = "maps of single scales"
    return opened(TITLE, experiment, root, lambda: load_saved(experiment, root), Explorer, still, lacking)
