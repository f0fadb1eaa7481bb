"""Published segmentation data sets in their official folder layouts, read as they are needed.

    train = open_masks("voc", "train_aug", root="~/data")      # or $REPRO_DATA
    image, mask = open_masks("voc", "val").read(0)      # at its original size
    train, tags = open_tags("voc", "train_aug")      # image tags; no mask belongs to it

| name | folder | images | masks |
| --- | --- | --- | --- |
| voc | voc/ or VOCdevkit/VOC2012/ | JPEGImages/ | SegmentationClass/, SegmentationClassAug/ or SBD's cls/*.mat |
| cityscapes | cityscapes/ | leftImg8bit/ | gtFine/, *_labelIds.png or *_labelTrainIds.png |
| coco2014, coco2017 | coco/ | train2017/ ... | masks/*.png (0 background, 1..80) or annotations/instances_*.json |

Tags come from VOC's Annotations/*.xml, from COCO's instances_*.json, or, where it exists, from <root>/tags/<name>.csv
with lines "name,class,class". `mask_pools` shows methods a part of a folder. All that can be wrong is one `DataError`.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repro.data.catalogue import DataError
from repro.data.folders import (
    CITYSCAPES_CLASSES,
    COCO_CLASSES,
    VOC_CLASSES,
    Pair,
    cityscapes_mask,
    cityscapes_pairs,
    coco_mask,
    coco_pairs,
    coco_tag_pairs,
    coco_tags,
    file_of,
    listed_tags,
    voc_mask,
    voc_pairs,
    voc_tag_pairs,
    voc_tags,
)
from repro.data.masks import IGNORE


@dataclass(frozen=True)
class MaskSource:
    """A catalogue entry.

    folders: where below the root it may lie, first match wins
    pairs: (folder, split) -> image and mask files in a fixed order
    decode: mask file -> (H, W) classes and 255
    counts: split -> number of images
    lists: folder of the published lists below splits/; budgets: name of a list -> masks it shows
    tag_pairs: (folder, split) -> images, as `pairs` has them, and the files that tell their tags; tags: those files ->
        (N, C) bool without the background. None where no method uses tags
    """

    name: str
    folders: tuple[str, ...]
    pairs: Callable[[Path, str], list[Pair]]
    decode: Callable[[Path], np.ndarray]
    classes: tuple[str, ...]
    counts: Mapping[str, int] = field(hash=False)
    lists: str = ""
    budgets: Mapping[str, int] = field(default_factory=dict, hash=False)
    get: str = ""
    tag_pairs: Callable[[Path, str], list[Pair]] | None = None
    tags: Callable[[Sequence[Path]], np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class MaskFolder:
    """One split of a data set in files.

    pairs: image and mask file of each item; a mask "file.json#7" is image 7 of a COCO annotation file. Of `open_tags`
        the file that tells the tags, which is no mask
    digest: sha256 of the file names and sizes (not of the contents, which would take minutes)
    """

    source: MaskSource
    split: str
    root: Path
    pairs: tuple[Pair, ...]
    digest: str

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.pairs)

    def image(self, index: int) -> Image.Image:
        """RGB image at its original size. Raises DataError."""
        path = self.pairs[index][0]
        try:
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say that a file is damaged
            raise DataError(f"{self._where(index)}: cannot read image {path} ({error}); fetch it again") from error

    def mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Classes and 255, (H, W) uint8. size: (W, H) of the image. Raises DataError."""
        image, path = self.pairs[index]
        try:
            mask = self.source.decode(path)
        except DataError:
            raise
        except Exception as error:  # Pillow's, scipy's and json's ways to say that a file is damaged
            raise DataError(f"{self._where(index)}: cannot read mask {path} ({error}); fetch it again") from error
        if mask.shape != size[::-1]:
            found = f"image {image} is {size[0]} x {size[1]}, mask {path} {mask.shape[1]} x {mask.shape[0]}"
            raise DataError(f"{self._where(index)}: {found}; both must belong to one picture")
        bad = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
        if len(bad):
            raise DataError(
                f"{self._where(index)}: mask {path} holds {bad[0]}; classes are 0..{len(self.classes) - 1} and 255"
            )
        return mask

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (3, H, W) and mask (H, W), uint8, at their original size. Raises DataError."""
        image = self.image(index)
        mask = self.mask(index, image.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), torch.from_numpy(np.array(mask))

    def verify(self, workers: int = 8) -> None:
        """Read every pair. Raises one DataError that names up to five bad ones."""

        def fault(index: int) -> str | None:
            try:
                self.read(index)
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor(workers) as threads:
            faults = [found for found in threads.map(fault, range(len(self))) if found]
        if faults:
            raise DataError(f"{len(faults)} of {len(self)} pairs are unusable:\n" + "\n".join(faults[:5]))

    def _where(self, index: int) -> str:
        return f"{self.name}/{self.split}, item {index}"


def open_masks(name: str, split: str, root: str | os.PathLike | None = None) -> MaskFolder:
    """Find a data set, list its pairs and check that every file is there.

    name: key of `MASK_SOURCES`; split: voc "train", "train_aug", "val"; cityscapes and coco "train", "val"
    root: folder that holds the data sets, default $REPRO_DATA
    Raises DataError, which says where it looked and how to get the data.
    """
    source, root, folder = _located(name, split, root)
    return _listing(source, split, root, folder, source.pairs(folder, split))


def open_tags(name: str, split: str, root: str | os.PathLike | None = None) -> tuple[MaskFolder, Tensor]:
    """The images of `open_masks`, in the same order, and their tags (N, C) bool; masks need not be there.

    C: classes without the background. Images without any object have no tag. name, split, root: as for `open_masks`.
    Tags are those of <root>/tags/<name>.csv if there is such a file (`mask_layouts.listed_tags`), else the data set's.
    Raises DataError.
    """
    source, root, folder = _located(name, split, root)
    if source.tag_pairs is None or source.tags is None:
        known = ", ".join(other.name for other in MASK_SOURCES.values() if other.tags)
        raise DataError(f"{name} has no image tags; data sets with tags: {known}")
    own = root / "tags" / f"{name}.csv"
    pairs = source.tag_pairs(folder, split)
    pairs = [(image, own) for image, _ in pairs] if own.is_file() else pairs
    found = _listing(source, split, root, folder, pairs, f" Tags may also be listed in {own}, as name,class,class")
    if own.is_file():
        tags = listed_tags(own, [image.stem for image, _ in pairs], source.classes[1:])
    else:
        tags = source.tags([path for _, path in pairs])
    return found, torch.from_numpy(tags)


def _located(name: str, split: str, root: str | os.PathLike | None) -> tuple[MaskSource, Path, Path]:
    """Catalogue entry, root, and the data set's folder below it."""
    if name not in MASK_SOURCES:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(MASK_SOURCES)}")
    source = MASK_SOURCES[name]
    if split not in source.counts:
        raise DataError(f"{name} has no split {split!r}; it has: {', '.join(source.counts)}")
    root = root or os.environ.get("REPRO_DATA")
    if not root:
        raise DataError(f"{name}: say where the data is, in root or $REPRO_DATA. {source.get}")
    root = Path(root).expanduser().resolve()
    folder = next((root / place for place in source.folders if (root / place).is_dir()), None)
    if folder is None:
        raise DataError(f"{name}: none of {', '.join(source.folders)} in {root}. {source.get}")
    return source, root, folder


def _listing(source: MaskSource, split: str, root: Path, folder: Path, pairs: list[Pair], hint: str = "") -> MaskFolder:
    """Pairs whose files are all there, and as many as the catalogue says."""
    name = source.name
    files = dict.fromkeys(file_of(path) for pair in pairs for path in pair)
    sizes = {path: path.stat().st_size if path.is_file() else None for path in files}
    missing = [str(path) for path, size in sizes.items() if size is None]
    if missing:
        raise DataError(
            f"{name}/{split}: {len(missing)} files are missing, first {', '.join(missing[:5])}. {source.get}{hint}"
        )
    if len(pairs) != source.counts[split]:
        raise DataError(
            f"{name}/{split} in {folder} has {len(pairs):,} pairs, expected {source.counts[split]:,}: "
            f"is the download complete? {source.get}"
        )
    digest = hashlib.sha256(f"{name} {split}".encode())
    for pair in pairs:
        for path in pair:
            digest.update(f"\n{os.path.relpath(path, folder)} {sizes[file_of(path)]}".encode())
    return MaskFolder(source, split, root, tuple(pairs), digest.hexdigest())


# fmt: off
# Budgets: VOC classic (VOC's own 1,464), blended (own and U2PL's lists); Cityscapes; COCO.
CLASSIC = {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464}
BLENDED = {f"{prefix}1_{part}": count for part, count in ((16, 662), (8, 1323), (4, 2646)) for prefix in ("", "u2pl_")}
_COCO = MaskSource(
    "coco2017", ("coco", "COCO"), coco_pairs("2017"), coco_mask, COCO_CLASSES, {"train": 118_287, "val": 5_000},
    "coco", {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697},
    "To get it: cocodataset.org, images of the year and annotations_trainval (or semantic masks as coco/masks/*.png)",
)
MASK_SOURCES = {
    source.name: source
    for source in (
        MaskSource(
            "voc", ("voc", "VOCdevkit/VOC2012", "VOC2012"), voc_pairs, voc_mask, VOC_CLASSES,
            {"train": 1464, "train_aug": 10_582, "val": 1449}, "pascal", CLASSIC | BLENDED,
            "To get it: VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk) unpacked below root, and for train_aug "
            "either SegmentationClassAug/ or SBD's benchmark_RELEASE/ beside its folders",
            voc_tag_pairs, voc_tags,
        ),
        MaskSource(
            "cityscapes", ("cityscapes", "Cityscapes"), cityscapes_pairs, cityscapes_mask, CITYSCAPES_CLASSES,
            {"train": 2975, "val": 500}, "cityscapes",
            {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488},
            "To get it: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com (account)",
        ),
        _COCO,
        replace(
            _COCO, name="coco2014", pairs=coco_pairs("2014"), counts={"train": 82_783, "val": 40_504}, lists="coco2014",
            budgets={}, tag_pairs=coco_tag_pairs("2014"), tags=coco_tags,
        ),
    )
}
# fmt: on
