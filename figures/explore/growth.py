"""What the region explorer computes: maps of a saved run, labels cut from them, regions grown from seeds; no widget."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from figures.plane import classes_of
from figures.style import label_of, where
from repro.cam import at_least_float32, cam_labels, min_max, over_activation
from repro.experiment import Experiment, resolve
from repro.measure.segmentation import confusion, iou
from repro.methods.image_tags import pcre as losses
from repro.methods.image_tags.pcre import Pairs, Regions, by_class, candidates, gate, grow, region_masks, shown_classes
from repro.recipe import TagRecipe
from repro.runs import folder_of, load_outputs

SOURCES = {"main": "CAM", "auxiliary": "auxiliary CAM", "gradcam": "Grad-CAM", "rollout": "attention rollout"}
LAYERS = ("main", "auxiliary")


@dataclass(frozen=True, eq=False)
class Saved:
    """What the explorer reads of a run: its first E test images, C classes without the background.

    images: (E, 3, H, W) uint8. truth: (E, H, W) uint8, for the report alone. tags: (E, C) uint8.
    scales: of the maps in cam (E, 2, Sc, C, H, W): main and auxiliary, rectified, of each scale, not normalised.
    gradcam: (E, C, H, W) and rollout: (E, H, W), both in [0, 1].
    classes: K names, background first. recipe, method: of the run. title: its name.
    confidence: S (E, N, C), masks: M (E, N, h, w), no gate; None for a method that has none.
    """

    images: Tensor
    truth: Tensor
    tags: Tensor
    scales: tuple[float, ...]
    cam: Tensor
    gradcam: Tensor
    rollout: Tensor
    classes: tuple[str, ...]
    recipe: TagRecipe
    title: str
    method: str = "pcre"
    confidence: Tensor | None = None
    masks: Tensor | None = None

    @property
    def has_regions(self) -> bool:
        """Whether the run keeps what regions are grown from."""
        return self.masks is not None and self.confidence is not None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), of the patches that the masks belong to."""
        return tuple(self.masks.shape[2:])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Image and class, both from 0, of every tag."""
        return [tuple(pair) for pair in self.tags.nonzero().tolist()]


@dataclass(frozen=True)
class Position:
    """Where the controls stand.

    pair: image and class, of `Saved.pairs`. source: of SOURCES. scales: those summed, for the two CAMs; at least one.
    beta: background threshold. threshold: tau_bin. radius: of the gate in patches, inf for the whole grid. rounds: T.
    share: alpha, of the region in the fused map.
    """

    pair: tuple[int, int]
    source: str = "main"
    scales: tuple[float, ...] = (1.0,)
    beta: float = 0.5
    threshold: float = 0.7
    radius: float = math.inf
    rounds: int = 5
    share: float = 0.3


@dataclass(frozen=True, eq=False)
class Grown:
    """The region of the position's class, and the map it is mixed into.

    region: m_r (H, W). region_label: (H, W), labels at beta of all regions, normalised as maps are.
    fused: (C, H, W) in [0, 1]; label: (H, W), of it at beta. listed: (N,) bool, the candidates.
    seeds: (T,) patches, -1 where a round found none. joins: (T, N) bool, each round's group, its seed included.
    """

    region: Tensor
    region_label: Tensor
    fused: Tensor
    label: Tensor
    listed: Tensor
    seeds: Tensor
    joins: Tensor


@dataclass(frozen=True, eq=False)
class View:
    """What is seen at a position: the map (C, H, W) in [0, 1], zeros for classes without a tag; its labels (H, W) at
    beta; the region, None for a run that keeps no masks."""

    cam: Tensor
    label: Tensor
    grown: Grown | None


def load_saved(experiment: Experiment, root: Path | None = None) -> Saved | None:
    """Read a finished run; None for one that kept no maps of single scales, or no tag. Raises CorruptFile."""
    outputs = load_outputs(folder_of(experiment, root))
    count = len(outputs.get("explore_cam", ()))
    if not count or not outputs["test_tags"][:count].any():
        return None
    images, truth, tags = (outputs[f"test_{name}"][:count] for name in ("images", "truth", "tags"))
    maps = (outputs[f"explore_{name}"] for name in ("cam", "gradcam", "rollout"))
    regions = (outputs.get(f"explore_{name}") for name in ("confidence", "masks"))
    scales, title = tuple(outputs["explore_scales"].tolist()), f"{label_of(experiment)}, {where([experiment])}"
    names = classes_of(experiment.data), resolve(experiment), title, experiment.method
    return Saved(images, truth, tags, scales, *maps, *names, *regions)


def starting(saved: Saved) -> Position:
    """The first tag of the first image, as the run itself evaluates it: its scales, beta and rules, without a gate."""
    scales = tuple(scale for scale in saved.scales if scale in saved.recipe.scales) or saved.scales
    start = Position(saved.pairs[0], scales=scales, beta=saved.recipe.beta)
    if not saved.has_regions:
        return start
    own = saved.recipe.method
    return dataclasses.replace(start, threshold=own.tau, rounds=own.rounds, share=own.fusion)


# What is computed


def activation(saved: Saved, at: Position) -> tuple[Tensor, Tensor]:
    """The chosen map (1, C, H, W) in [0, 1] of every class in the tags (1, C), which come with it; zeros elsewhere.

    A CAM is the sum over the chosen scales, normalised for each class. The rollout knows no class: it stands for the
    chosen one, alone.
    """
    image, channel = at.pair
    tags = saved.tags[image : image + 1]
    shown = tags[0].nonzero()[:, 0]
    if at.source == "rollout":
        tags = torch.zeros_like(tags)
        tags[0, channel], shown = 1, [channel]
        found = at_least_float32(saved.rollout[image])[None]
    elif at.source == "gradcam":
        found = at_least_float32(saved.gradcam[image][shown])
    else:
        layer = saved.cam[image, LAYERS.index(at.source)]
        found = min_max(sum(at_least_float32(layer[saved.scales.index(scale)][shown]) for scale in at.scales))
    maps = found.new_zeros(1, tags.shape[1], *found.shape[1:])
    maps[0, shown] = found
    return maps, tags


def regions_at(saved: Saved, at: Position) -> tuple[Pairs, Regions]:
    """`regions.refined_regions` of the position's image: the run's rules with the position's tau_bin, T and gate."""
    image = slice(at.pair[0], at.pair[0] + 1)
    rules = dataclasses.replace(saved.recipe.method.expansion, threshold=at.threshold, rounds=at.rounds)
    masks = gate(at_least_float32(saved.masks[image]), None if math.isinf(at.radius) else at.radius)
    pairs = shown_classes(saved.tags[image], int(saved.tags[image].sum()))
    rank = candidates(saved.confidence[image], pairs, rules.limit, rules.ranking)
    growth = grow(masks, rank, rules)
    joined = growth.joins.any(2)
    # other masks change nothing, but resizing all of them is most of the work on large images
    read = joined[0].any(0)
    read[0] = True  # one at least
    grown = region_masks(masks[:, read], joined[:, :, read], tuple(saved.truth.shape[1:]), rules.resize)
    return pairs, Regions(grown, growth.seeds[:, :, 0] >= 0, rank, growth)


def view(saved: Saved, at: Position) -> View:
    """All that is shown at a position."""
    cam, tags = activation(saved, at)
    label = cam_labels(cam, tags, at.beta)[0]
    if not saved.has_regions:
        return View(cam[0], label, None)
    pairs, regions = regions_at(saved, at)
    normal = min_max(by_class(regions.masks, pairs, cam.shape[1]))
    fused = losses.fused(cam, normal, at.share)
    own, both = (cam_labels(maps, tags, at.beta)[0] for maps in (normal, fused))
    place = pairs.classes[0].tolist().index(at.pair[1])
    rank, growth = regions.rank[0, place], regions.growth
    grown = (rank < len(rank), growth.seeds[0, place], growth.joins[0, place])
    return View(cam[0], label, Grown(regions.masks[0, place], own, fused[0], both, *grown))


def measure(label: Tensor, truth: Tensor, channel: int, classes: int) -> dict[str, float]:
    """How well labels fit one class: iou, recall, precision, and over-activation FP / TP; NaN where not defined.

    label, truth: (H, W); pixels of unknown truth count for nothing. channel: the class, from 0. classes: K.
    """
    counts = confusion(truth[None], label[None], classes)[0]
    spilled, own = over_activation(counts), channel + 1
    recall = counts[own, own].double() / counts[own].sum()
    values = {"iou": iou(counts)[own], "recall": recall, "precision": 1 - spilled.share[own]}
    return {name: float(value) for name, value in (values | {"over": spilled.ratio[own]}).items()}
