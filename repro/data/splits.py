"""Hiding labels: `cifar10.3@40` is data set cifar10, seed 3, 40 labels.

The draw gives every image a raw 64-bit Philox word and keeps the images with the smallest words of each
class. numpy guarantees the stream of a bit generator (not its shuffles), so a name means the same images on
every platform and version, and budgets are nested: the 40 labels of a seed are among its 100.
"""

import hashlib
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from repro.data.catalogue import SOURCES, ImageSet, load

# Words of different purposes must not coincide for equal seeds.
FOR_LABELS, FOR_HOLDOUT, FOR_EMBEDDING = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Pool:
    """What a method may see of the training data.

    images: (N, C, H, W) uint8
    labels: (N,) int64, -1 wherever the label is hidden
    labelled: (L,) int64, indices into the pool, ascending
    unlabelled: (U,) int64, indices into the pool, ascending; contains `labelled` unless drawn without it
    classes: names, index = label
    name: "cifar10.3@40"
    digest: sha256 of the image digests and the index sets
    """

    images: torch.Tensor
    labels: torch.Tensor
    labelled: torch.Tensor
    unlabelled: torch.Tensor
    classes: tuple[str, ...]
    name: str
    digest: str

    def to(self, device: torch.device | str) -> "Pool":
        """The same pool with its tensors on `device`."""
        tensors = ("images", "labels", "labelled", "unlabelled")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def parse(name: str) -> tuple[str, int, int]:
    """Split "cifar10.3@40" into (data set, seed, labels); ValueError says what is wrong with it.

    The number of labels is a multiple of the number of classes (equally many of each) or all there are.
    """
    match = re.fullmatch(r"(\w+)\.(\d+)@(\d+)", name, re.ASCII)
    if not match:
        raise ValueError(f"{name!r} does not read <data set>.<seed>@<labels>, for example 'cifar10.3@40'")
    data, seed, labels = match[1], int(match[2]), int(match[3])
    if data not in SOURCES:
        raise ValueError(f"{name!r}: unknown data set {data!r}; known: {', '.join(SOURCES)}")
    _check_budget(labels, len(SOURCES[data].classes), SOURCES[data].rows("train"))
    return data, seed, labels


def open_pool(name: str, root=None) -> tuple[Pool, torch.Tensor]:
    """`draw` for a name such as "stl10.0@40": loads what the data set has for training.

    root: as for `images.load`
    """
    data, seed, labels = parse(name)
    unlabelled = load(data, "unlabelled", root) if "unlabelled" in SOURCES[data].parts else None
    return draw(load(data, "train", root), labels, seed, unlabelled)


def draw(
    train: ImageSet, labels: int, seed: int, unlabelled: ImageSet | None = None, include_labelled: bool = True
) -> tuple[Pool, torch.Tensor]:
    """A pool with a class-balanced labelled subset, and the truth (ours: the papers publish no draw).

    train: images of known label; the labelled subset comes from here
    labels: number of labels shown, a multiple of the classes or len(train)
    seed: >= 0; equal seeds give nested subsets
    unlabelled: further images for the pool (STL-10), after those of train
    include_labelled: whether labelled images are also in `unlabelled`, as USB has it by default
    Returns (pool, truth): truth (N,) int64, -1 where unknown, is for reporting, never given to a method.
    Raises ValueError for a budget that the data cannot give.
    """
    classes = len(train.classes)
    _check_budget(labels, classes, len(train))
    truth = train.labels.clone()
    if labels == len(train):
        labelled = torch.arange(len(train))
    else:
        labelled = balanced(truth, labels // classes, classes, seed, FOR_LABELS)
    images = train.images
    if unlabelled is not None:
        images = torch.cat([images, unlabelled.images])
        truth = torch.cat([truth, torch.full_like(unlabelled.labels, -1)])
    shown = torch.full_like(truth, -1)
    shown[labelled] = truth[labelled]
    everything = torch.arange(len(truth))
    rest = everything if include_labelled else everything[shown < 0]
    if len(rest) == 0:
        raise ValueError(
            f"{labels} labels of {train.name} leave nothing unlabelled: use include_labelled=True"
        )
    source = [train.digest] + ([unlabelled.digest] if unlabelled is not None else [])
    name = f"{train.name}.{seed}@{labels}"
    pool = Pool(images, shown, labelled, rest, train.classes, name, _digest(source, labelled, rest))
    return pool, truth


def holdout(pool: Pool, truth: torch.Tensor, per_class: int, seed: int) -> tuple[Pool, torch.Tensor]:
    """Reserve a class-balanced set with known labels, for example to fit a temperature (ours).

    per_class: images reserved of each class
    seed: >= 0
    Returns (pool, held): `held` (per_class * K,) indexes `pool.images` and `truth`; it is disjoint from
    `pool.labelled` and removed from `unlabelled`. No index changes its meaning, so `truth` still fits.
    Raises ValueError if a class has too few hidden images.
    """
    hidden = torch.full_like(truth, -1)
    candidates = pool.unlabelled[pool.labels[pool.unlabelled] < 0]
    hidden[candidates] = truth[candidates]
    held = balanced(hidden, per_class, len(pool.classes), seed, FOR_HOLDOUT)
    rest = pool.unlabelled[~torch.isin(pool.unlabelled, held)]
    return replace(pool, unlabelled=rest, digest=_digest([pool.digest], pool.labelled, rest)), held


def balanced(labels: torch.Tensor, per_class: int, classes: int, seed: int, purpose: int) -> torch.Tensor:
    """Ascending indices of `per_class` images of every class.

    labels: (N,) int64; images of other labels (-1) are never chosen
    seed: 0 <= seed < 2**64
    purpose: FOR_LABELS, FOR_HOLDOUT or FOR_EMBEDDING; selects an independent stream
    Raises ValueError if a class has fewer images.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must be in 0..2**64 - 1")
    words = np.random.Philox(key=seed + (purpose << 64)).random_raw(len(labels))
    truth = labels.cpu().numpy()
    chosen = []
    for label in range(classes):
        members = np.flatnonzero(truth == label)
        if len(members) < per_class:
            raise ValueError(f"class {label} has {len(members)} images, {per_class} are asked for")
        chosen.append(members[np.argsort(words[members], kind="stable")[:per_class]])
    return torch.from_numpy(np.sort(np.concatenate(chosen))).to(labels.device)


def _check_budget(labels: int, classes: int, available: int) -> None:
    if labels == available:
        return
    if not 0 < labels < available or labels % classes:
        raise ValueError(
            f"{labels} labels: must be a positive multiple of the number of classes ({classes}), "
            f"or all {available:,}"
        )


def _digest(sources: list[str], labelled: torch.Tensor, unlabelled: torch.Tensor) -> str:
    digest = hashlib.sha256(" ".join(sources).encode())
    for indices in (labelled, unlabelled):
        digest.update(str(len(indices)).encode())
        digest.update(indices.cpu().numpy().astype("<i8"))
    return digest.hexdigest()
