"""The explorer of runs from image tags: a class activation map, the labels cut from it, PCRE's region grown from seeds.

Masks and confidences are those that a run saves: at scale 1, from one pass, without a gate.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from torch import Tensor

from figures.common import class_colours, classes_of
from figures.explore import panel
from figures.explore.panel import Explorer, Missing, Numbers, Seen
from figures.style import label_of, style_of, where
from repro.cam import at_least_float32, cam_labels, min_max, over_activation
from repro.data.masks import IGNORE
from repro.experiment import Experiment, resolve
from repro.measure.segmentation import confusion, iou
from repro.methods.image_tags import pcre
from repro.methods.image_tags.pcre import by_class, candidates, gate, grow, region_masks, shown_classes
from repro.recipe import scales_of
from repro.runs import folder_of, load_outputs

SOURCES = {"main": "CAM", "auxiliary": "auxiliary CAM", "gradcam": "Grad-CAM", "rollout": "attention rollout"}
LAYERS = ("main", "auxiliary")
RADII = (0, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)  # patches
TRUE, CUT = "#00dcdc", "white"  # outlines: of the true class, of values above beta


class Maps(Explorer):
    """Maps of the first E test images of a run at any scale and threshold, and PCRE's regions as they grow.

    images: (E, 3, H, W) uint8. truth: (E, H, W) uint8, for the report alone. tags: (E, C), C classes without the
    background. cam: (E, 2, S, C, H, W), main and auxiliary at `scales`, rectified, not normalised. gradcam:
    (E, C, H, W) and rollout: (E, H, W), in [0, 1]. confidence: S (E, N, C) and masks: M (E, N, h, w), None for a method
    that has none. classes: names, background first.
    """

    about = "What a map lights up, and how a region grows"
    words = "Maps over the image, label maps and truth."

    def __init__(self, experiment: Experiment, root: Path | None = None) -> None:
        outputs = load_outputs(folder_of(experiment, root))
        count = len(outputs.get("explore_cam", ()))
        if not count or not outputs["test_tags"][:count].any():
            raise Missing("maps of single scales")
        self.images, self.truth, self.tags = (outputs[f"test_{name}"][:count] for name in ("images", "truth", "tags"))
        self.cam, self.gradcam, self.rollout = (outputs[f"explore_{name}"] for name in ("cam", "gradcam", "rollout"))
        self.confidence, self.masks = (outputs.get(f"explore_{name}") for name in ("confidence", "masks"))
        self.scales, self.classes = tuple(outputs["explore_scales"].tolist()), classes_of(experiment.data)
        self.recipe, self.method = resolve(experiment), experiment.method
        self.title = f"{label_of(experiment)}, {where([experiment])}"
        self.size = (9.0, 5.0 if self.has_regions else 2.9)

    @property
    def has_regions(self) -> bool:
        """Whether the run keeps what regions are grown from."""
        return self.masks is not None and self.confidence is not None

    def controls(self) -> dict[str, widgets.Widget]:
        """At the first tag of the first image, as the run itself evaluates it, without a gate."""
        hundredths = [step / 100 for step in range(101)]
        pairs = [(f"{image}: {self.classes[1 + channel]}", (image, channel))
                 for image, channel in self.tags.nonzero().tolist()]  # fmt: skip
        subsets = [part for count in range(len(self.scales)) for part in itertools.combinations(self.scales, count + 1)]
        sums = [(" + ".join(f"{scale:g}" for scale in part), part) for part in subsets]
        own = tuple(scale for scale in self.scales if scale in self.recipe.scales) or self.scales
        beta = self.recipe.beta
        source = panel.buttons("map", SOURCES, "main")
        scales = widgets.Dropdown(options=sums, value=own, **panel.looks("scales, summed"))
        source.observe(lambda change: setattr(scales, "disabled", change.new not in LAYERS), "value")
        controls = {
            "pair": panel.slider("test image: class", pairs, pairs[0][1]),
            "source": source,
            "scales": scales,
            "beta": panel.slider("beta, background", panel.levels(hundredths, beta), beta),
        }
        if self.has_regions:
            own = self.recipe.method
            controls |= {
                "threshold": panel.slider("tau_bin, of masks", panel.levels(hundredths, own.tau), own.tau),
                "radius": panel.slider("radius of the gate", self.radii(), math.inf),
                "rounds": panel.whole("T, rounds of growth", own.rounds, 1, max(10, own.rounds)),
                "share": panel.slider("alpha, of the region", panel.levels(hundredths, own.fusion), own.fusion),
            }
        return controls

    def radii(self) -> list[tuple[str, float]]:
        """Radii within the grid of patches, the one that the run's training ends with, and none."""
        high, wide = self.masks.shape[2:]
        last = self.recipe.method.radius(1.0, (high, wide))
        inside = {radius: f"{radius:.3g}" for radius in RADII if radius < math.hypot(high - 1, wide - 1)}
        if last is not None:
            inside |= {last: f"{last:.3g}, training's last"}
        return [*((words, radius) for radius, words in sorted(inside.items())), ("whole grid", math.inf)]

    def compute(self, pair: tuple[int, int], source: str, scales: tuple[float, ...], beta: float, **growth) -> Seen:
        """pair: image and class, from 0. source: of SOURCES. scales: those summed, for the two CAMs. growth: threshold
        tau_bin, radius of the gate in patches, rounds T, share alpha of the region in the fused map.

        cam: (C, H, W) in [0, 1], zeros for classes without a tag. label: (H, W), cut from it at beta. grown: of
        `grown`, None for a run that keeps no masks.
        """
        at = {"pair": pair, "source": source, "scales": scales, "beta": beta} | growth
        cam, tags = self.activation(pair, source, scales)
        grown = self.grown(cam, tags, at) if self.has_regions else None
        return Seen(cam=cam[0], label=cam_labels(cam, tags, beta)[0], grown=grown, at=at)

    def activation(self, pair: tuple[int, int], source: str, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The chosen map (1, C, H, W) in [0, 1] and the tags (1, C) of the classes that it has, zeros for the others.

        A CAM is the sum over the scales, normalised for each class. The rollout has no classes: it stands for the
        chosen one, alone.
        """
        image, channel = pair
        tags = self.tags[image : image + 1]
        if source == "rollout":
            tags = torch.zeros_like(tags)
            tags[0, channel] = 1
        shown = tags[0].nonzero()[:, 0]
        if source == "rollout":
            found = at_least_float32(self.rollout[image])[None]
        elif source == "gradcam":
            found = at_least_float32(self.gradcam[image][shown])
        else:
            layer = self.cam[image, LAYERS.index(source)]
            found = min_max(sum(at_least_float32(layer[self.scales.index(scale)][shown]) for scale in scales))
        maps = found.new_zeros(1, tags.shape[1], *found.shape[1:])
        maps[0, shown] = found
        return maps, tags

    def grown(self, cam: Tensor, tags: Tensor, at: dict[str, Any]) -> Seen:
        """Regions of the image by the run's rules, with the position's tau_bin, T and gate.

        region: m_r (H, W) of the class. region_label: (H, W), labels of all regions, normalised as maps are. fused:
        (C, H, W) in [0, 1], cam and regions mixed; label: (H, W), of it. listed: (N,) bool, the candidates. seeds: (T,)
        patches, -1 where a round found none. joins: (T, N) bool, the group of each round, its seed included.
        """
        (image, channel), own = at["pair"], self.recipe.method.expansion
        one, size = slice(image, image + 1), tuple(self.truth.shape[1:])
        rules = dataclasses.replace(own, threshold=at["threshold"], rounds=at["rounds"])
        masks = gate(at_least_float32(self.masks[one]), None if math.isinf(at["radius"]) else at["radius"])
        pairs = shown_classes(self.tags[one], int(self.tags[one].sum()))
        rank = candidates(self.confidence[one], pairs, rules.limit, rules.ranking)
        growth = grow(masks, rank, rules)
        joined = growth.joins.any(2)
        read = joined[0].any(0)  # other masks change nothing, and resizing all of them takes longest on large images
        read[0] = True  # one at least
        regions = region_masks(masks[:, read], joined[:, :, read], size, rules.resize)
        normal = min_max(by_class(regions, pairs, cam.shape[1]))
        fused = pcre.fused(cam, normal, at["share"])
        own_label, label = (cam_labels(maps, tags, at["beta"])[0] for maps in (normal, fused))
        place = pairs.classes[0].tolist().index(channel)
        return Seen(region=regions[0, place], region_label=own_label, fused=fused[0], label=label,
                    listed=rank[0, place] < rank.shape[2], seeds=growth.seeds[0, place],
                    joins=growth.joins[0, place])  # fmt: skip

    def numbers(self, seen: Seen) -> Numbers:
        image, channel = seen.at["pair"]
        labels = {self.name_of(seen): seen.label}
        if seen.grown is not None:
            labels |= {"region m_r, normalised": seen.grown.region_label, fused_name(seen.at): seen.grown.label}
        rows = []
        for name, label in labels.items():
            *shares, ratio = measure(label, self.truth[image], channel, len(self.classes))
            rows.append((name, *map(panel.percent, shares), f"{ratio:.2f}" if math.isfinite(ratio) else "-"))
        columns = ("labels of", "IoU", "found, of the class", "right, of labelled", "over-activation, FP / TP")
        return Numbers(self.heading(seen), columns, rows)

    def heading(self, seen: Seen) -> str:
        """Which image and class, what grew or why nothing did, and what to know of the map and of the run."""
        (image, channel), own = seen.at["pair"], self.recipe.method
        others = [self.classes[1 + other] for other in self.tags[image].nonzero()[:, 0].tolist() if other != channel]
        said = f"Test image {image}, {self.classes[1 + channel]}" + f" (beside {', '.join(others)})" * bool(others)
        if seen.at["source"] == "rollout":
            said += "; the rollout has no classes and is read as this one"
        if seen.grown is None:
            why = "they need PCRE's confidences and masks, and this run of"
            return f"{said}. No seeds, region or fused map: {why} {style_of(self.method).title} keeps none."
        seeds, listed, patches = (seen.grown.seeds >= 0).sum(), seen.grown.listed.sum(), len(seen.grown.listed)
        if seeds:
            joined = f"{int(seen.grown.joins.any(0).sum())} of {listed} candidates"
            said += f". {panel.counted(int(seeds), 'seed')}; {joined} are in the region, of {patches} patches."
        else:
            said += f". No candidate among {patches} patches: the region is empty, and the fused map is the map itself."
        if not own.expand:
            said += " The run's expansion is off: T does nothing."
        scales = ", ".join(f"{scale:g}" for scale in scales_of(own.mask_scales or self.recipe.cam_scales))
        return f"{said} Masks are of scale 1; the run mixes in those of scales {scales} and mirror images, ungated."

    def name_of(self, seen: Seen) -> str:
        """`CAM, scales 0.5 + 1`."""
        source, scales = seen.at["source"], seen.at["scales"]
        summed = f", scale{'s'[: len(scales) > 1]} {' + '.join(f'{scale:g}' for scale in scales)}"
        return SOURCES[source] + (summed if source in LAYERS else "")

    def layout(self, figure: FigureBase) -> list[Axes]:
        return panel.tiles(figure, 2 if self.has_regions else 1, 4, foot=0.1 if self.has_regions else 0.2)

    def draw(self, axes: Sequence[Axes], seen: Seen) -> None:
        *grid, below = axes
        (image, channel), at, colours = seen.at["pair"], seen.at, class_colours(len(self.classes))
        truth, pixels = self.truth[image], self.images[image].permute(1, 2, 0).numpy()
        own, pale = truth == channel + 1, pixels.mean(2)

        def heat(axes: Axes, values: Tensor, title: str, cut: bool = True) -> None:
            panel.picture(axes, pale, title, cmap="gray", vmin=0, vmax=255)
            axes.imshow(values.numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.65, interpolation="nearest")
            if cut:
                panel.outline(axes, values > at["beta"], CUT)
            panel.outline(axes, own, TRUE)

        def flat(axes: Axes, label: Tensor, title: str) -> None:
            panel.picture(axes, colours[label.numpy()], title)
            panel.outline(axes, own, TRUE)

        def fit(label: Tensor) -> str:
            share = measure(label, truth, channel, len(self.classes))[0]
            return f"Its labels, beta = {at['beta']:g}: IoU {panel.percent(share)}"

        panel.picture(grid[0], pixels, f"Test image {image}")
        heat(grid[1], seen.cam[channel], self.name_of(seen))
        flat(grid[2], seen.label, fit(seen.label))
        flat(grid[3], truth, f"Truth (report only): {self.classes[channel + 1]}")
        entries = [("true class, outline", TRUE), ("map above beta, outline", CUT)]
        shown = [0, *(1 + self.tags[image].nonzero()[:, 0]).tolist(), *[IGNORE] * bool((truth == IGNORE).any())]
        names = {**dict(enumerate(self.classes)), IGNORE: "unknown"}
        entries += [(names[label], colours[label]) for label in shown]
        if seen.grown is not None:
            gated = "no gate" if math.isinf(at["radius"]) else f"r = {at['radius']:.3g}"
            entries += self.draw_growth(grid[4], pale, seen.grown, at)
            panel.outline(grid[4], own, TRUE)
            heat(grid[5], seen.grown.region, f"Region m_r; tau_bin = {at['threshold']:g}, {gated}", cut=False)
            heat(grid[6], seen.grown.fused[channel], fused_name(at))
            flat(grid[7], seen.grown.label, fit(seen.grown.label))
        panel.key(below, entries, 10)

    def draw_growth(self, axes: Axes, pale: np.ndarray, grown: Seen, at: dict[str, Any]) -> list[tuple[str, Any]]:
        """Patches in the colour of the round that they first joined in, other candidates grey; seeds with the number of
        their round and, where there is a gate, its disc. Returns entries of the key."""
        (high, wide), (rows, columns) = pale.shape, self.masks.shape[2:]
        title = f"Seeds, and what joined; T = {at['rounds']}"
        panel.picture(axes, 0.35 * pale + 0.65 * 255, title, cmap="gray", vmin=0, vmax=255)
        palette = mpl.colormaps["viridis"](np.linspace(0.1, 0.95, len(grown.seeds)))
        cells = np.zeros((rows * columns, 4))
        cells[grown.listed.numpy()] = 0.2, 0.2, 0.2, 0.28
        for colour, group in reversed(list(zip(palette, grown.joins.numpy(), strict=True))):
            cells[group] = (*colour[:3], 0.75)
        extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
        axes.imshow(cells.reshape(rows, columns, 4), extent=extent, interpolation="nearest")
        for number, (seed, colour) in enumerate(zip(grown.seeds.tolist(), palette, strict=True), 1):
            if seed < 0:
                break  # no later round has a seed either
            x, y = (seed % columns + 0.5) * wide / columns - 0.5, (seed // columns + 0.5) * high / rows - 0.5
            if not math.isinf(at["radius"]):
                across, down = ((at["radius"] + 0.5) * side for side in (wide / columns, high / rows))
                axes.add_patch(Ellipse((x, y), 2 * across, 2 * down, facecolor="none", edgecolor=colour, linewidth=1.5))
            words = axes.text(x, y, str(number), color="white", fontsize=8, ha="center", va="center")
            words.set_path_effects([withStroke(linewidth=2, foreground="black")])
        rounds = [("round " * (number == 1) + str(number), colour) for number, colour in enumerate(palette, 1)]
        return [("candidate that did not join", "0.65"), *rounds]


def fused_name(at: dict[str, Any]) -> str:
    """`fused: 0.7 CAM + 0.3 region`."""
    return f"fused: {1 - at['share']:.2g} {SOURCES[at['source']]} + {at['share']:.2g} region"


def measure(label: Tensor, truth: Tensor, channel: int, classes: int) -> tuple[float, ...]:
    """How well labels (H, W) fit one class: IoU, recall, precision, and over-activation FP / TP; NaN where not defined.

    truth: (H, W); its pixels of unknown class count for nothing. channel: the class, from 0. classes: K.
    """
    counts = confusion(truth[None], label[None], classes)[0]
    spilled, own = over_activation(counts), channel + 1
    recall = counts[own, own].double() / counts[own].sum()
    return tuple(map(float, (iou(counts)[own], recall, 1 - spilled.share[own], spilled.ratio[own])))
