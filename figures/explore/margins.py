"""The margins explorer: training pictures by how hard they are, and the mixtures that CalibrateMix makes of them.

`around`, `measure` and `mixups` are pure functions, with no widget in them; `mixups` runs the method's own halving and
drawing on a batch of the saved pool. `explore` puts controls around them; where nobody watches it returns a figure.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from figures.calibration import Margins, read_margins, short_label
from figures.explore.parts import Panel, buttons, embedded, look, opened
from figures.style import INK, Drawing, themed, where
from repro.data import splits
from repro.data.augment import Views
from repro.data.catalogue import SOURCES
from repro.experiment import Experiment, resolve
from repro.methods.few_labels.calibratemix import PAIRINGS, CalibrateMixSettings, cosine_similarity, draw_pairs

KINDS = ("labelled", "unlabelled")
SHOWN = 24  # images around a percentile
TRIOS = 4  # mixtures shown of each mixup


@dataclass(frozen=True)
class Saved:
    """What the explorer reads of a run.

    margins: of labelled and unlabelled images, by KINDS. images: (N, C, H, W) uint8, the pool. plain: normalises them.
    settings: of the method. sizes: of a labelled and an unlabelled batch. title: of the run.
    """

    margins: dict[str, Margins]
    images: Tensor
    plain: Views
    classes: tuple[str, ...]
    settings: CalibrateMixSettings
    sizes: tuple[int, int]
    title: str


@dataclass(frozen=True)
class Position:
    """Where the controls stand.

    kind: of KINDS. percentile: 0 hardest, 100 easiest. weight: lam, the labelled image's share. batch: seed of the
    batch and of the partners. partner, pool: as in `draw_partner`.
    """

    kind: str = "unlabelled"
    percentile: int = 5
    weight: float = 0.5
    batch: int = 0
    partner: str = "dissimilar"
    pool: int = 15


@dataclass(frozen=True)
class Numbers:
    """score: at the percentile; the shares of right labels (None of none): among the images shown, those with a smaller
    margin than the first of them, and those with a larger one than the last."""

    score: float
    shown: float | None
    harder: float | None
    easier: float | None


@dataclass(frozen=True)
class Mixup:
    """One mixup of a batch: which halves meet, the pairs (n,) as places in the pool's margins, and how alike.

    similarity: mean cosine of the pairs; candidates: of every labelled image with all that it could have met.
    """

    halves: tuple[str, str]
    labelled: Margins
    unlabelled: Margins
    similarity: float
    candidates: float


def load_saved(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Saved | None:
    """Read a finished run and its images; None for a run without margins. Raises CorruptFile, DataError."""
    both = read_margins(experiment, root)
    if both is None:
        return None
    recipe, source = resolve(experiment), SOURCES[experiment.data]
    pool, _ = splits.open_pool(experiment.split, data_root)
    plain = Views(source.mean, source.std, flip=False)
    sizes = recipe.batch, recipe.batch * recipe.unlabelled_ratio
    title = f"{short_label(experiment)}, {where([experiment])}"
    return Saved(dict(zip(KINDS, both, strict=True)), pool.images, plain, pool.classes, recipe.method, sizes, title)


def around(margins: Margins, percentile: int, shown: int = SHOWN) -> Tensor:
    """Places in `margins` of the `shown` images (fewer if there are not as many) around a percentile, hardest first."""
    order = margins.score.argsort(stable=True)
    middle = round(percentile / 100 * (len(order) - 1)) if len(order) else 0
    first = max(0, min(middle - shown // 2, len(order) - shown))
    return order[first : first + shown]


def measure(margins: Margins, percentile: int, shown: int = SHOWN) -> Numbers:
    """The score at a percentile, and how often labels are right about it."""
    places = around(margins, percentile, shown)
    if not len(places):
        return Numbers(float("nan"), None, None, None)
    low, high = margins.score[places[0]], margins.score[places[-1]]
    inside = torch.zeros(len(margins.score), dtype=torch.bool).index_fill(0, places, True)
    parts = (inside, margins.score < low, margins.score > high)
    middle = round(percentile / 100 * (len(margins.score) - 1))
    score = float(margins.score.sort().values[middle])
    return Numbers(score, *(_share(margins.only((part & (margins.truth >= 0)).nonzero()[:, 0])) for part in parts))


def _share(margins: Margins) -> float | None:
    return float(margins.right.double().mean()) if len(margins.index) else None


def mixups(saved: Saved, at: Position) -> list[Mixup]:
    """The mixups of one batch, by the method's own functions; [] where there are too few margins for a batch.

    A batch is drawn without repeats by the seed `at.batch`; likeness is that of the plain pixels, not of weak views.
    """
    generator = torch.Generator().manual_seed(at.batch)
    batch = []
    for kind, size in zip(KINDS, saved.sizes, strict=True):
        margins = saved.margins[kind]
        batch.append(margins.only(torch.randperm(len(margins.index), generator=generator)[:size]))
    if min(len(part.index) for part in batch) < 2:
        return []
    labelled, unlabelled = batch
    alike = cosine_similarity(*(saved.plain.plain(saved.images[part.index]) for part in batch))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(at.batch)
        pairs = draw_pairs(labelled.score, unlabelled.score, alike, saved.settings.pairing, at.pool, at.partner)
    found = []
    for names, (row, column) in zip(PAIRINGS[saved.settings.pairing], pairs, strict=True):
        similarity, candidates = float(alike[row, column].mean()), float(alike[row].mean())
        found.append(Mixup(names, labelled.only(row), unlabelled.only(column), similarity, candidates))
    return found


def blend(own: Tensor, other: Tensor, weight: float) -> Tensor:
    """weight * own + (1 - weight) * other of uint8 images, rounded to uint8."""
    return (weight * own.float() + (1 - weight) * other.float()).round().to(torch.uint8)


# What is shown


def text(saved: Saved, at: Position) -> str:
    """The numbers as a sentence."""
    margins = saved.margins[at.kind]
    if not len(margins.index):
        return f"no {at.kind} image has a margin: the warm-up was not over"
    found = measure(margins, at.percentile)
    shares = {"shown": found.shown, "harder": found.harder, "easier": found.easier}
    said = ", ".join(f"{100 * share:.1f} % of those {name}" for name, share in shares.items() if share is not None)
    what = "labels" if at.kind == "labelled" else "pseudo-labels"
    score = f"{margins.name}: {found.score:+.2f} at percentile {at.percentile} of {len(margins.index):,} images"
    return f"{score}.\nRight {what}: {said}"


WIDTH, TILE, STEP, ROW = 900, 56, 74, 100  # pixels: of the picture, a tile, tile to tile, row to row
RIGHT, WRONG = "#0173b2", "#d55e00"


class Canvas:
    """Draws the images around a percentile and some mixtures of a batch."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.font, self.small = ImageFont.load_default(12), ImageFont.load_default(10)

    def draw(self, at: Position) -> Image.Image:
        """The picture, RGB."""
        saved, margins = self.saved, self.saved.margins[at.kind]
        mixed = mixups(saved, at)
        across = WIDTH // STEP
        rows = -(-SHOWN // across)
        picture = Image.new("RGB", (WIDTH, 24 + rows * ROW + max(1, len(mixed)) * (ROW + 30)), "white")
        pen = ImageDraw.Draw(picture)
        heading = f"{at.kind} images around percentile {at.percentile} of their margins, hardest first"
        pen.text((8, 2), heading, INK, self.font)
        for number, place in enumerate(around(margins, at.percentile).tolist()):
            corner = 8 + number % across * STEP, 22 + number // across * ROW
            self._known(picture, pen, corner, margins, place)
        top = 24 + rows * ROW
        if not mixed:
            pen.text((8, top), "no mixtures: too few images have margins yet", INK, self.font)
        for number, mixup in enumerate(mixed):
            self._mixtures(picture, pen, top + number * (ROW + 30), mixup, at, f"M{number + 1}")
        return picture

    def _mixtures(self, picture, pen, y: int, mixup: Mixup, at: Position, name: str) -> None:
        own, other = mixup.halves
        heading = (
            f"{name}: {at.weight:.2f} of {own} labelled + {1 - at.weight:.2f} of {other} unlabelled; "
            f"mean cosine {mixup.similarity:+.2f}, of all in the batch {mixup.candidates:+.2f}"
        )
        pen.text((8, y), heading, INK, self.font)
        saved = self.saved
        for place in range(min(TRIOS, len(mixup.labelled.index))):
            x, top = 8 + place * 3 * STEP, y + 20
            self._known(picture, pen, (x, top), mixup.labelled, place)
            self._known(picture, pen, (x + 68, top), mixup.unlabelled, place)
            pair = saved.images[mixup.labelled.index[place]], saved.images[mixup.unlabelled.index[place]]
            sides = (at.weight, mixup.labelled), (1 - at.weight, mixup.unlabelled)
            target = [f"{share:.2f} {saved.classes[int(side.label[place])][:9]}" for share, side in sides]
            self._tile(picture, pen, (x + 136, top), blend(*pair, at.weight), INK, target)

    def _known(self, picture, pen, corner: tuple[int, int], margins: Margins, place: int) -> None:
        """An image in its colour, with its label, the truth where that is another, and its margin."""
        right, label, truth = bool(margins.right[place]), int(margins.label[place]), int(margins.truth[place])
        lines = [self.saved.classes[label][:11]] + [f"is {self.saved.classes[truth][:9]}"] * (not right)
        lines.append(f"{float(margins.score[place]):+.2f}")
        self._tile(picture, pen, corner, self.saved.images[margins.index[place]], RIGHT if right else WRONG, lines)

    def _tile(self, picture, pen, corner: tuple[int, int], image: Tensor, colour: str, lines: list[str]) -> None:
        x, y = corner
        pen.rectangle((x, y, x + TILE + 5, y + TILE + 5), colour)
        pixels = image.permute(1, 2, 0).squeeze(2).numpy()
        picture.paste(Image.fromarray(pixels).convert("RGB").resize((TILE, TILE)), (x + 3, y + 3))
        for number, line in enumerate(lines):
            pen.text((x, y + TILE + 6 + 11 * number), line, colour, self.small)


# Widgets


class Explorer(Panel):
    """Controls over a saved run; every move draws again. See `explore`."""

    def __init__(self, saved: Saved) -> None:
        self.saved, self.canvas, self.start = saved, Canvas(saved), starting(saved)
        start, partners = self.start, ("dissimilar", "random", "similar")
        controls = {
            "kind": buttons("images", {name: name for name in KINDS}, start.kind),
            "percentile": widgets.IntSlider(start.percentile, min=0, max=100, **look("percentile of the margin")),
            "weight": widgets.FloatSlider(start.weight, min=0, max=1, step=0.05, **look("lambda, labelled share")),
            "batch": widgets.IntSlider(start.batch, min=0, max=99, **look("batch")),
            "partner": widgets.Dropdown(options=partners, value=start.partner, **look("partner")),
            "pool": widgets.IntSlider(start.pool, min=1, max=max(45, start.pool), **look("k, candidates")),
        }
        super().__init__(saved.title, controls, self.show, lambda: still(saved, start))

    @property
    def position(self) -> Position:
        """Where the controls stand."""
        return self.at(Position)

    def show(self) -> tuple[str, str]:
        """Measure and draw at the controls' position."""
        said = text(self.saved, self.position)
        return f"<div>{said}</div>", embedded(self.canvas.draw(self.position), f"Images by margin, mixtures. {said}")


def starting(saved: Saved) -> Position:
    """The position that a run's own settings give."""
    return Position(partner=saved.settings.partner, pool=saved.settings.pool)


@themed
def still(saved: Saved, at: Position) -> Figure:
    """The explorer at one position as a figure."""
    picture = Canvas(saved).draw(at)
    figure = Drawing(figsize=(WIDTH / 100, picture.height / 100 + 0.8), layout="constrained")
    figure.suptitle(f"{saved.title}\n{text(saved, at)}", fontsize=9)
    axes = figure.subplots()
    axes.imshow(picture, interpolation="bilinear")
    axes.set_axis_off()
    return figure


def explore(experiment: Experiment, root: Path | None = None, data_root: Path | None = None) -> Explorer | Figure:
    """The explorer of a finished run, or a figure where nobody can move a slider (papermill, export, not run)."""

    def drawn(saved: Saved) -> Figure:
        return still(saved, starting(saved))

    load = functools.partial(load_saved, experiment, root, data_root)
    return opened("Training pictures by margin", experiment, root, load, Explorer, drawn, "margins")
