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
with lines "name,class,class". `pools` shows methods a part of a folder. All that can be wrong is one `DataError`.

A `*_pairs` function lists (image, mask) files of a split in a fixed order without opening masks; a `*_mask` function
reads one mask as (H, W) uint8 classes and 255. A `*_tag_pairs` function names for each image the file that tells its
tags and no mask, and a `*_tags` function reads tags as (N, C) bool, C classes without the background. Missing files
are found by the caller.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from repro.data.catalogue import DataError
from repro.data.masks import IGNORE

# Layouts


Pair = tuple[Path, Path]

# fmt: off
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
COCO_CLASSES = ("background", *(name.strip() for name in """person, bicycle, car, motorcycle, airplane, bus, train,
    truck, boat, traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
    kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
    spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster,
    sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".split(",")))
# fmt: on


def file_of(path: Path) -> Path:
    """The file itself of "instances.json#7"."""
    return path.with_name(path.name.partition("#")[0])


def names_in(path: Path) -> list[str]:
    """The names that one of VOC's lists holds. Raises DataError."""
    try:
        return path.read_text().split()
    except OSError as error:
        raise DataError(f"cannot read the list {path} ({error.strerror}); it comes with VOC 2012's devkit") from error


def voc_pairs(folder: Path, split: str) -> list[Pair]:
    """VOC's own mask where there is one, else SegmentationClassAug's, else SBD's (ours)."""
    names, sbd, more = voc_names(folder, split), _sbd_folder(folder), folder / "SegmentationClassAug"
    own = {path.stem for path in (folder / "SegmentationClass").glob("*.png")}
    extra = {path.stem for path in more.glob("*.png")} if split == "train_aug" else set()

    def mask(name: str) -> Path:
        if name in own or split != "train_aug":
            return folder / "SegmentationClass" / f"{name}.png"
        return more / f"{name}.png" if name in extra else sbd / "cls" / f"{name}.mat"

    return [(folder / "JPEGImages" / f"{name}.jpg", mask(name)) for name in names]


def voc_names(folder: Path, split: str) -> list[str]:
    """Images of a split, sorted. train_aug: a list of that name, else what SegmentationClassAug or SBD has."""
    lists, more = folder / "ImageSets" / "Segmentation", folder / "SegmentationClassAug"
    names = set(names_in(lists / f"{split.removesuffix('_aug')}.txt"))
    if split == "train_aug":
        named = next((path for path in (lists / "train_aug.txt", lists / "trainaug.txt") if path.is_file()), None)
        if named:
            names |= set(names_in(named))
        elif more.is_dir():
            names |= {path.stem for path in more.glob("*.png")}
        else:
            names |= {path.stem for path in (_sbd_folder(folder) / "cls").glob("*.mat")}
        names -= set(names_in(lists / "val.txt"))
    return sorted(names)


def _sbd_folder(folder: Path) -> Path:
    places = [place / "benchmark_RELEASE" / "dataset" for place in (folder, folder.parent)]
    return next((place for place in places if place.is_dir()), places[0])


def voc_tag_pairs(folder: Path, split: str) -> list[Pair]:
    """Each image of `voc_names` and its annotation for detection, which images that only SBD has masks for have too."""
    return [
        (folder / "JPEGImages" / f"{name}.jpg", folder / "Annotations" / f"{name}.xml")
        for name in voc_names(folder, split)
    ]


def voc_tags(paths: Sequence[Path]) -> np.ndarray:
    """(N, 20) bool from annotations: classes of all their objects, difficult ones too. Parts of persons are no class.

    Source: released code (PSA, whose script made the tags that methods pass on). Raises DataError.
    """
    tags = np.zeros((len(paths), len(VOC_CLASSES)), bool)
    for row, path in zip(tags, paths, strict=True):
        try:
            names = [item.findtext("name", "").strip() for item in ElementTree.parse(path).iter("object")]
            row[[VOC_CLASSES.index(name) for name in names]] = True
        except (OSError, ElementTree.ParseError, ValueError) as error:
            raise DataError(f"cannot read tags of {path} ({error}); fetch VOC 2012's Annotations again") from error
    return tags[:, 1:]


def voc_mask(path: Path) -> np.ndarray:
    """VOC's or SegmentationClassAug's png, or SBD's mat."""
    return _sbd_mask(path) if path.suffix == ".mat" else _png_mask(path)


def _sbd_mask(path: Path) -> np.ndarray:
    from scipy.io import loadmat  # reads MATLAB 5 arrays; no code in a file is run

    return np.ascontiguousarray(loadmat(path, variable_names="GTcls")["GTcls"]["Segmentation"][0, 0], dtype=np.uint8)


def _png_mask(path: Path) -> np.ndarray:
    with Image.open(path, formats=("PNG",)) as image:
        if image.mode not in ("P", "L"):
            raise DataError(f"mask {path} has mode {image.mode}, not P or L: colours must be decoded to class indices")
        return np.asarray(image)


def cityscapes_pairs(folder: Path, split: str) -> list[Pair]:
    """All cities of a split; the official labelIds, else labelTrainIds (as UniMatch distributes them)."""
    pairs = []
    for image in sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        masks = [folder / "gtFine" / split / image.parent.name / f"{stem}_gtFine_{kind}.png"
                 for kind in ("labelIds", "labelTrainIds")]
        pairs.append((image, next((mask for mask in masks if mask.is_file()), masks[0])))
    return pairs


# Official id of each of the 19 classes that count.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_TRAIN_ID = np.full(256, IGNORE, np.uint8)
_TRAIN_ID[list(CITYSCAPES_IDS)] = np.arange(19)


def cityscapes_mask(path: Path) -> np.ndarray:
    """The 19 classes; ids that do not count become 255."""
    mask = _png_mask(path)
    return mask if path.name.endswith("labelTrainIds.png") else _TRAIN_ID[mask]


def coco_pairs(year: str) -> Callable[[Path, str], list[Pair]]:
    """The `pairs` of COCO's release of a year."""

    def pairs(folder: Path, split: str) -> list[Pair]:
        images = sorted((folder / f"{split}{year}").glob("*.jpg"))
        if (folder / "masks").is_dir():
            return [(image, folder / "masks" / f"{image.stem}.png") for image in images]
        annotations = folder / "annotations" / f"instances_{split}{year}.json"
        if annotations.is_file():
            _coco_annotations(str(annotations))  # once, before worker threads all want it
        number = {image: int(image.stem.rpartition("_")[2]) for image in images}  # COCO_train2014_000000000009
        return [(image, annotations.with_name(f"{annotations.name}#{number[image]}")) for image in images]

    return pairs


def coco_mask(path: Path) -> np.ndarray:
    """A PNG as it is; from annotations: larger objects first, so that smaller ones lie on top, crowds 255 (ours).

    Polygons are filled by Pillow, whose borders may differ by a pixel from pycocotools'.
    """
    if path.suffix == ".png":
        return _png_mask(path)
    file, _, number = str(path).rpartition("#")
    sizes, objects, classes = _coco_annotations(file)
    mask = Image.new("L", sizes[int(number)])
    for item in sorted(objects.get(int(number), []), key=lambda item: (not item["iscrowd"], -item["area"])):
        if item["iscrowd"]:
            mask = Image.fromarray(np.where(_runs(item["segmentation"]), np.uint8(IGNORE), np.asarray(mask)))
            continue
        for polygon in item["segmentation"]:
            ImageDraw.Draw(mask).polygon(polygon, fill=classes[item["category_id"]])
    return np.asarray(mask)


def coco_tag_pairs(year: str) -> Callable[[Path, str], list[Pair]]:
    """The `tag_pairs` of COCO's release of a year: each image and its number in the annotations."""

    def pairs(folder: Path, split: str) -> list[Pair]:
        file = folder / "annotations" / f"instances_{split}{year}.json"
        images = sorted((folder / f"{split}{year}").glob("*.jpg"))
        return [(image, file.with_name(f"{file.name}#{int(image.stem.rpartition('_')[2])}")) for image in images]

    return pairs


def coco_tags(paths: Sequence[Path]) -> np.ndarray:
    """(N, 80) bool from one annotation file: categories of all objects of an image, crowds too. Raises DataError.

    Polygons are dropped while the file is read. With crowds, 82,081 of the 82,783 images of train2014 and 40,137 of the
    40,504 of val2014 have a tag: the numbers of images that papers use.
    """
    tags = np.zeros((len(paths), len(COCO_CLASSES) - 1), bool)
    if not paths:
        return tags
    file = file_of(paths[0])

    def slim(item: dict) -> dict:
        return {key: item[key] for key in ("annotations", "categories", "image_id", "category_id", "id") if key in item}

    try:
        with file.open() as text:
            content = json.load(text, object_hook=slim)
        identifiers = sorted(category["id"] for category in content["categories"])
        channel = {identifier: position for position, identifier in enumerate(identifiers)}
        row = {int(path.name.partition("#")[2]): position for position, path in enumerate(paths)}
        for item in content["annotations"]:
            if item["image_id"] in row:
                tags[row[item["image_id"]], channel[item["category_id"]]] = True
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file} is not a COCO instance file ({error!r}); fetch it again") from error
    return tags


def listed_tags(path: Path, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """(N, C) bool from a list of our own: lines "name,class,class" with an image's name without suffix (ours).

    names: of the images. classes: C names, without the background. Raises DataError.
    """
    channel, found = {name: position for position, name in enumerate(classes)}, {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, *shown = (part.strip() for part in line.split(","))
        unknown = [part for part in shown if part not in channel]
        if unknown:
            raise DataError(f"{path}, line {number}: {unknown[0]!r} is no class; classes are {', '.join(classes)}")
        found[name] = [channel[part] for part in shown]
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path} has no line for {len(missing)} of {len(names)} images, first {missing[0]}; add them")
    tags = np.zeros((len(names), len(classes)), bool)
    for row, name in zip(tags, names, strict=True):
        row[found[name]] = True
    return tags


@lru_cache(maxsize=2)
def _coco_annotations(file: str) -> tuple[dict, dict, dict]:
    """Image -> (W, H), image -> objects, category -> class 1..80 in the order of the ids."""
    objects: dict[int, list] = {}
    try:
        content = json.loads(Path(file).read_text())
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for item in content["annotations"]:
            objects.setdefault(item["image_id"], []).append(item)
        identifiers = sorted(category["id"] for category in content["categories"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a COCO instance file ({error!r}); fetch it again") from error
    return sizes, objects, {identifier: label for label, identifier in enumerate(identifiers, 1)}


def _runs(encoded: dict) -> np.ndarray:
    """Uncompressed run lengths, column by column, beginning with background: (H, W) bool."""
    height, width = encoded["size"]
    if not isinstance(encoded["counts"], list):
        raise DataError("compressed run lengths are not supported: the official files hold lists")
    flat = np.repeat(np.arange(len(encoded["counts"])) % 2 == 1, encoded["counts"])
    return flat.reshape(width, height).T


# Sets


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
