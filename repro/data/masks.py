"""Images with masks, and what is shown of the masks: few-mask pools and image tags.

    train = scenes("train", 1000)
    pool, truth = draw_masks(train, labelled=20, seed=0)      # "scenes.0@20"
    pool, truth = draw_masks(train, labelled=0, seed=0, tags=True)      # image tags and no mask

Masks are uint8 with the class of each pixel; 255 is ignored by losses and scores. A hidden mask is not in the pool:
every pixel of it is 255. `folders` reads data sets too large for memory; pools of `pools` look the same.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from repro.arrays import IGNORE

FOR_MASKS = 20  # the stream of Philox words, apart from those of `splits` and `scenes`


@dataclass(frozen=True, eq=False)
class MaskSet:
    """One split in memory.

    images: (N, 3, H, W) uint8 on the CPU
    masks: (N, H, W) uint8, index into `classes` or 255
    classes: names, index = class; "background" is class 0 where there is one
    digest: sha256 of shape, pixels and masks
    """

    name: str
    split: str
    images: Tensor
    masks: Tensor
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True, eq=False)
class MaskPool:
    """What a method may see of the training data.

    images: (N, 3, H, W) uint8
    labels: (N, H, W) uint8, 255 wherever the class is hidden or void
    labelled: (L,) int64, images whose mask is shown, ascending
    unlabelled: (U,) int64, ascending; contains `labelled` unless drawn without it
    classes: names, index = class
    name: "scenes.0@20": data set, seed, masks shown
    digest: sha256 of the set's digest, the index sets and whether tags are shown
    tags: (N, K) bool, the classes in each image, background included; None unless the supervision is image tags
    """

    images: Tensor
    labels: Tensor
    labelled: Tensor
    unlabelled: Tensor
    classes: tuple[str, ...]
    name: str
    digest: str
    tags: Tensor | None = None

    def to(self, device: torch.device | str) -> "MaskPool":
        """The same pool with its tensors on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})


def draw_masks(
    masks: MaskSet, labelled: int, seed: int, include_labelled: bool = False, tags: bool = False
) -> tuple[MaskPool, Tensor]:
    """A pool that shows few masks, and the truth (ours; published lists exist for published data sets only).

    labelled: number of masks shown, 0..N; equal seeds give nested subsets
    seed: 0 <= seed < 2**64
    include_labelled: whether labelled images are also in `unlabelled`; UniMatch and CSL keep them apart. With all
        masks shown they always are
    tags: whether the pool tells which classes each image shows
    Returns (pool, truth): truth (N, H, W) uint8 is for reporting, never given to a method.
    Raises ValueError.
    """
    if not 0 <= labelled <= len(masks):
        raise ValueError(f"{labelled} masks of {masks.name}/{masks.split}: it has {len(masks)}, ask for 0 to that many")
    shown, rest = choose(len(masks), labelled, seed)
    if include_labelled or len(rest) == 0:
        rest = torch.arange(len(masks))
    labels = torch.full_like(masks.masks, IGNORE)
    labels[shown] = masks.masks[shown]
    digest = hashlib.sha256(f"{masks.digest} {tags}".encode())
    for indices in (shown, rest):
        digest.update(str(len(indices)).encode())
        digest.update(indices.numpy().astype("<i8"))
    pool = MaskPool(
        masks.images, labels, shown, rest, masks.classes, f"{masks.name}.{seed}@{labelled}", digest.hexdigest(),
        tags_of(masks.masks, len(masks.classes)) if tags else None,
    )
    return pool, masks.masks


def choose(count: int, chosen: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ascending indices (chosen,) of a seeded subset of `count`, and the others. Nested in `chosen`, as in `splits`."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} must be in 0..2**64 - 1")
    words = np.random.Philox(key=seed + (FOR_MASKS << 64)).random_raw(count)
    order = torch.from_numpy(np.argsort(words, kind="stable"))
    return order[:chosen].sort().values, order[chosen:].sort().values


def show_tags(tags: Tensor, shown: int, seed: int, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What a method may see of tags: (N, C) float32, zeros where they are hidden, and the images (shown,) int64.

    tags: (N, C) bool. shown: 1 to the number of candidates; equal seeds give nested subsets, ascending.
    candidates: (M,) int64 images that may be shown, ascending; None for all. Raises ValueError.
    """
    candidates = torch.arange(len(tags)) if candidates is None else candidates
    if not 1 <= shown <= len(candidates):
        raise ValueError(f"tags of {shown} images: ask for 1 to {len(candidates)}")
    index = candidates[choose(len(candidates), shown, seed)[0]]
    seen = torch.zeros(tags.shape)
    seen[index] = tags[index].float()
    return seen, index


def tags_of(masks: Tensor, classes: int) -> Tensor:
    """(N, K) bool: whether a class has a pixel.

    masks: (N, H, W) uint8; 255 counts for no class
    """
    flat = masks.flatten(1).long()
    found = torch.zeros(len(masks), 256, dtype=torch.bool, device=masks.device)
    return found.scatter_(1, flat, True)[:, :classes]


def mask_digest(images: Tensor, masks: Tensor) -> str:
    """sha256 over the shapes, the pixels and the masks (ours)."""
    digest = hashlib.sha256(f"{tuple(images.shape)} {tuple(masks.shape)}".encode())
    digest.update(images.contiguous().numpy())
    digest.update(masks.contiguous().numpy())
    return digest.hexdigest()


def palette(classes: int) -> np.ndarray:
    """VOC's colours, (256, 3) uint8: index -> RGB; 255 (ignore) is cream, rows from `classes` on are black."""
    index = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    colours[classes:IGNORE] = 0
    return colours
