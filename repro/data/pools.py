"""Pools of data sets in files: what a method may see of a folder, read in worker threads as it is needed.

    pool = draw_folder(train, "366", seed=0, crop=321)      # published list if there is one, else a seeded draw
    items = pool.take(index)      # scaled, padded and cropped in worker threads
    train, tags = open_tags("voc", "train_aug")      # image tags; no mask belongs to it
    pool = draw_tags(train, tags, len(train), seed=0, crop=448)

`folders` opens the folders. Masks that a pool hides are never opened.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repro.arrays import Items
from repro.data.catalogue import DataError
from repro.data.folders import CLASSIC, MaskFolder, names_in
from repro.data.mask_views import PADDING, placement
from repro.data.masks import IGNORE, choose, show_tags


@dataclass(frozen=True, eq=False)
class FolderPool:
    """What a method may see of a data set in files; the counterpart of `masks.MaskPool`.

    labelled, unlabelled: positions in `folder.pairs`, int64 on the CPU, so that reading files never waits for the
    device; labels: empty, it only tells the device
    name: "voc.366@366" with the published list, "voc.366.seeded.0@366" with a draw of ours
    crop, scale: as for `MaskViews`, whose own scale is then (1, 1)
    generator: on the CPU; its state belongs to the caller's checkpoint
    """

    folder: MaskFolder
    labelled: Tensor
    unlabelled: Tensor
    name: str
    digest: str
    crop: int
    scale: tuple[float, float]
    generator: torch.Generator
    threads: ThreadPoolExecutor
    labels: Tensor

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folder.classes

    def to(self, device: torch.device | str) -> "FolderPool":
        """The same pool whose items are delivered to `device`."""
        return replace(self, labels=self.labels.to(device))

    def take(self, index: Tensor) -> Items:
        """Crops of these images: (B, 3, S, S) uint8, and labels (B, S, S) uint8.

        index: (B,) int64 on the CPU
        Labels are 254 where padded, 255 where void or hidden. The draws depend on the generator alone, not on threads.
        """
        draws = torch.rand(3, len(index), generator=self.generator, dtype=torch.float64)
        shown = torch.isin(index, self.labelled).tolist()
        crops = list(self.threads.map(self._crop, index.tolist(), shown, draws.T))
        device = self.labels.device
        images, labels = (torch.stack(parts).to(device, non_blocking=True) for parts in zip(*crops, strict=True))
        return Items(index.to(device, non_blocking=True), images, labels)

    def _crop(self, index: int, shown: bool, draws: Tensor) -> tuple[Tensor, Tensor]:
        picture = self.folder.image(index)
        width, height = picture.size
        placed = placement(draws[:, None], height, width, self.crop, self.scale)
        new_height, new_width, top, left = (value.item() for value in placed)
        down, across = min(self.crop, new_height), min(self.crop, new_width)
        # Only the crop is resampled, by the filter that would have resized the whole image.
        x, y = width / new_width, height / new_height
        box = (left * x, top * y, min((left + across) * x, width), min((top + down) * y, height))
        image = np.zeros((self.crop, self.crop, 3), np.uint8)
        image[:down, :across] = picture.resize((across, down), Image.Resampling.BILINEAR, box)
        label = np.full((self.crop, self.crop), PADDING, np.uint8)
        label[:down, :across] = IGNORE
        if shown:
            row = (2 * (top + np.arange(down)) + 1) * height // (2 * new_height)
            column = (2 * (left + np.arange(across)) + 1) * width // (2 * new_width)
            label[:down, :across] = self.folder.mask(index, picture.size)[row[:, None], column]
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)


@dataclass(frozen=True, eq=False)
class TagPool:
    """What a method may see of a data set in files whose supervision is image tags.

    crops: its images, all of whose masks are hidden. labelled: positions of the images whose tags are shown, int64 on
    the CPU; unlabelled: of the others. labels: (N, C) float32 tags, zeros where hidden. name, digest: with the images
    shown, and the tags.
    """

    crops: FolderPool
    labelled: Tensor
    unlabelled: Tensor
    labels: Tensor
    name: str
    digest: str

    @property
    def folder(self) -> MaskFolder:
        return self.crops.folder

    @property
    def classes(self) -> tuple[str, ...]:
        return self.folder.classes

    @property
    def generator(self) -> torch.Generator:
        """Of the crops; its state belongs to the caller's checkpoint."""
        return self.crops.generator

    def to(self, device: torch.device | str) -> "TagPool":
        """The same pool whose items are delivered to `device`."""
        return replace(self, crops=self.crops.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor) -> Items:
        """Crops of these images and their tags: (B, 4, S, S) uint8, and labels (B, C).

        index: (B,) int64 on the CPU. The fourth channel is 255 inside an image and 0 where padded.
        """
        items = self.crops.take(index)
        inside = torch.where(items.labels == PADDING, 0, 255).to(torch.uint8)
        return Items(items.index, torch.cat([items.images, inside[:, None]], 1), self.labels[items.index])


def draw_folder(
    folder: MaskFolder,
    budget: str,
    seed: int,
    crop: int,
    scale: tuple[float, float] = (0.5, 2.0),
    include_labelled: bool = False,
    workers: int = 8,
) -> FolderPool:
    """Show the masks of a published list, or without it those of a seeded draw of the same size.

    budget: name of a list, "366", "1_16", or "all"
    seed: of the draw where there is no list, and of the crops
    A list is <root>/splits/<data set>/<budget>/labeled.txt, with "image mask" lines; unlabeled.txt may lie beside it.
    Raises DataError for a list that does not fit the data, ValueError for an unknown budget.
    """
    source = folder.source
    budgets = source.budgets | {"all": len(folder)}
    if budget not in budgets:
        raise ValueError(f"{source.name} has no list {budget!r}; it has: {', '.join(budgets)}")
    place = folder.root / "splits" / source.lists / budget
    if budget != "all" and (place / "labeled.txt").is_file():
        labelled = _listed(folder, place / "labeled.txt")
        if len(labelled) != budgets[budget]:
            raise DataError(f"{place / 'labeled.txt'} lists {len(labelled)} images, expected {budgets[budget]}")
        rest = _listed(folder, place / "unlabeled.txt") if (place / "unlabeled.txt").is_file() else None
        name = f"{source.name}.{budget}@{len(labelled)}"
    else:
        candidates = _candidates(folder, budget)
        labelled = candidates[choose(len(candidates), budgets[budget], seed)[0]]
        rest, name = None, f"{source.name}.{budget}.seeded.{seed}@{len(labelled)}"
    everything = torch.arange(len(folder))
    others = everything[~torch.isin(everything, labelled)] if rest is None else rest
    if torch.isin(labelled, others).any():
        raise DataError(f"{place}: {int(torch.isin(labelled, others).sum())} images are in both lists")
    unlabelled = torch.cat([labelled, others]).sort().values if include_labelled or len(others) == 0 else others
    digest = hashlib.sha256(f"{folder.digest} {labelled.tolist()} {unlabelled.tolist()}".encode()).hexdigest()
    generator = torch.Generator().manual_seed(seed)
    threads = ThreadPoolExecutor(workers)
    return FolderPool(
        folder, labelled, unlabelled, name, digest, crop, scale, generator, threads, torch.empty(0, dtype=torch.uint8)
    )


def draw_tags(
    folder: MaskFolder, tags: Tensor, shown: int, seed: int, crop: int, scale: tuple[float, float] = (0.5, 2.0),
    workers: int = 8,
) -> TagPool:  # fmt: skip
    """A pool that shows the tags of `shown` images, in order, drawn by the seed where more have tags.

    folder, tags: of `open_tags`; images without a tag are never shown, as in the papers' lists. Their masks cannot be
    reached from here. crop, scale: as for `draw_folder`. Raises ValueError when fewer images than `shown` have tags.
    """
    labels, index = show_tags(tags, shown, seed, tags.any(1).nonzero()[:, 0])
    everything, none = torch.arange(len(folder)), torch.empty(0, dtype=torch.int64)
    digest = hashlib.sha256(f"{folder.digest} {index.tolist()}".encode())
    digest.update(tags.numpy().tobytes())
    name, digest = f"{folder.name}.{seed}@{shown}", digest.hexdigest()
    generator, threads = torch.Generator().manual_seed(seed), ThreadPoolExecutor(workers)
    nothing = torch.empty(0, dtype=torch.uint8)
    crops = FolderPool(folder, none, everything, name, digest, crop, scale, generator, threads, nothing)
    return TagPool(crops, index, everything[~torch.isin(everything, index)], labels, name, digest)


def read_ahead(workers: Executor, call: Callable, items: Iterable, depth: int) -> Iterator:
    """`call` of each item in order, at most `depth` of them ahead of the reader, in threads or processes."""
    waiting: deque = deque()
    for item in items:
        waiting.append(workers.submit(call, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _listed(folder: MaskFolder, path: Path) -> Tensor:
    """Ascending positions of the images that a list names; the mask named beside each is that of our own layout."""
    position = {image.name: index for index, (image, _) in enumerate(folder.pairs)}
    names = [Path(line.split()[0]).name for line in path.read_text().splitlines() if line.strip()]
    unknown = [name for name in names if name not in position]
    if unknown or len(set(names)) < len(names):
        raise DataError(
            f"{path}: {len(unknown)} images are not in {folder.name}/{folder.split}"
            f"{f' (first {unknown[0]})' if unknown else ''}, {len(names) - len(set(names))} are named twice"
        )
    return torch.tensor(sorted(position[name] for name in names), dtype=torch.int64)


def _candidates(folder: MaskFolder, budget: str) -> Tensor:
    """Images that a seeded draw chooses from: VOC's classic budgets have VOC's own masks only, not SBD's."""
    if folder.name == "voc" and budget in CLASSIC and folder.split == "train_aug":
        base = folder.pairs[0][0].parent.parent
        own = {f"{name}.jpg" for name in names_in(base / "ImageSets" / "Segmentation" / "train.txt")}
        return torch.tensor([index for index, (image, _) in enumerate(folder.pairs) if image.name in own])
    return torch.arange(len(folder))
