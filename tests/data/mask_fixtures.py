"""Small segmentation data sets in their official folder layouts, for tests.

    small_voc(monkeypatch, tmp_path, train=6, extra=5, val=3)
    open_masks("voc", "train_aug", tmp_path)

Image i of a set has a size of its own, and a mask whose classes depend on i (see `mask_of`).
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from repro.data.folders import MASK_SOURCES, VOC_CLASSES
from repro.data.masks import palette


def size_of(number: int) -> tuple[int, int]:
    """(width, height)."""
    return 20 + 3 * number, 18 + 2 * (number % 4)


def mask_of(number: int, classes: int) -> np.ndarray:
    """(H, W): class 0 with a rectangle of another class and, below it, a void line."""
    width, height = size_of(number)
    mask = np.zeros((height, width), np.uint8)
    mask[4:10, 3:12] = number % (classes - 1) + 1
    mask[10, 3:12] = 255
    return mask


def image_of(number: int) -> np.ndarray:
    """(H, W, 3): coordinates in the first channels."""
    width, height = size_of(number)
    row, column = np.mgrid[:height, :width]
    return np.stack([column * 3, row * 3, np.full_like(row, 7 * number)], -1).astype(np.uint8)


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_of(number)).save(path, quality=95)


def write_mask(path: Path, mask: np.ndarray, colours: bool = False) -> None:
    """A grey png, or one with VOC's palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    if colours:
        image = image.convert("P")
        image.putdata(mask.ravel().tolist())
        image.putpalette(palette(256).ravel().tolist())
    image.save(path)


def counts(monkeypatch: pytest.MonkeyPatch, name: str, budgets: dict[str, int] | None = None, **split: int) -> None:
    """Adapt the catalogue's numbers."""
    source = MASK_SOURCES[name]
    monkeypatch.setitem(
        MASK_SOURCES, name, replace(source, counts=dict(source.counts) | split, budgets=budgets or source.budgets)
    )


def small_voc(monkeypatch, root: Path, train: int, extra: int, val: int, sbd: bool = False) -> Path:
    """VOC with `train` masks of its own, `extra` from SegmentationClassAug or SBD's mat files; returns its folder.

    Numbers: train 0 .., extra after them, val after those. SegmentationClassAug also covers train and val.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    numbers = range(train + extra + val)
    names = {"train": numbers[:train], "val": numbers[train + extra :]}
    for number in numbers:
        write_image(folder / "JPEGImages" / f"{name_of(number)}.jpg", number)
        own = number < train or number >= train + extra
        if own:
            write_mask(folder / "SegmentationClass" / f"{name_of(number)}.png", mask_of(number, 21), colours=True)
        if sbd and number < train + extra:
            path = folder / "benchmark_RELEASE" / "dataset" / "cls" / f"{name_of(number)}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            boundaries = np.empty((20, 1), object)  # cells, as in the release, beside the mask
            boundaries[:, 0] = [np.zeros((2, 2))] * 20
            savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": mask_of(number, 21)}})
        elif not sbd:
            # Their void is lost, as in the copies that go round.
            mask = mask_of(number, 21)
            write_mask(folder / "SegmentationClassAug" / f"{name_of(number)}.png", np.where(mask == 255, 0, mask))
    for split, members in names.items():
        path = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name_of(number)}\n" for number in members))
    counts(monkeypatch, "voc", {"92": 2, "1_16": 3}, train=train, train_aug=train + extra, val=val)
    return folder


def name_of(number: int) -> str:
    return f"2007_{number:06d}"


def write_annotation(path: Path, names: Sequence[str]) -> None:
    """VOC's annotation for detection: its objects, every second one difficult, and a person's parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(
        f"<object><name>{name}</name><difficult>{number % 2}</difficult>"
        + ("<part><name>head</name></part>" if name == "person" else "")
        + "</object>"
        for number, name in enumerate(names)
    )
    owner = "<owner><name>cat</name></owner>"
    path.write_text(f"<annotation><filename>{path.stem}.jpg</filename>{owner}{objects}</annotation>")


def tags_of_number(number: int) -> list[str]:
    """Classes that an annotation of `tag_voc` names: that of `mask_of`, and of even numbers a person."""
    own = VOC_CLASSES[number % 20 + 1]
    return [own, own, "person"] if number % 2 == 0 else [own]


def tag_voc(folder: Path) -> None:
    """Add an annotation to every image of `small_voc`."""
    for image in (folder / "JPEGImages").glob("*.jpg"):
        number = int(image.stem.partition("_")[2])
        write_annotation(folder / "Annotations" / f"{image.stem}.xml", tags_of_number(number))


def tag_coco(monkeypatch, root: Path) -> Path:
    """COCO 2014 as released: three images of train and four of val, no masks; the last but one of each shows nothing.

    Categories have the ids 3, 5, 90. Every annotation has a polygon; image 0 of val holds a crowd too.
    """
    folder = root / "coco"
    shown = {"train": [(3, 90), (), (5,)], "val": [(3,), (90, 5), (), (90,)]}
    for split, rows in shown.items():
        images, annotations = [], []
        for position, categories in enumerate(rows):
            number, (width, height) = 10 * position + 7, size_of(position)
            write_image(folder / f"{split}2014" / f"COCO_{split}2014_{number:012d}.jpg", position)
            images.append({"id": number, "width": width, "height": height})
            for place, category in enumerate(categories):
                left = 2 + 6 * place
                polygon = [left, 2, left + 4, 2, left + 4, 8, left, 8]
                item = {"image_id": number, "iscrowd": 0, "category_id": category, "area": 24}
                annotations.append(item | {"segmentation": [polygon], "id": len(annotations)})
        if split == "val":
            width, height = size_of(0)
            runs = {"counts": [height * 15, height * 2, height * (width - 17)], "size": [height, width]}
            crowd = {"image_id": 7, "iscrowd": 1, "category_id": 5, "area": 9}
            annotations.append(crowd | {"segmentation": runs, "id": 99})
        content = {"images": images, "annotations": annotations,
                   "categories": [{"id": identifier} for identifier in (90, 3, 5)]}  # fmt: skip
        path = folder / "annotations" / f"instances_{split}2014.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    counts(monkeypatch, "coco2014", train=3, val=4)
    return folder


def small_cityscapes(monkeypatch, root: Path, kind: str = "labelIds") -> Path:
    """Two images in two cities of train, one of val; masks hold the official ids 0..33 and -1 as 255, or train ids."""
    folder = root / "cityscapes"
    for number, (split, city) in enumerate([("train", "aachen"), ("train", "ulm"), ("val", "munster")]):
        stem = f"{city}_000000_{number:06d}"
        write_image(folder / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", number)
        width, height = size_of(number)
        ids = (np.arange(width * height) % 36).astype(np.uint8).reshape(height, width)
        mask = np.where(ids > 33, 255, ids) if kind == "labelIds" else np.where(ids > 18, 255, ids)
        write_mask(folder / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", mask.astype(np.uint8))
    counts(monkeypatch, "cityscapes", train=2, val=1)
    return folder


def small_coco(monkeypatch, root: Path, year: str, masks: bool) -> Path:
    """Two images of train; masks as png, or an annotation file with a polygon, a smaller one on it and a crowd."""
    folder = root / "coco"
    numbers = [9, 25]
    prefix = "COCO_train2014_" if year == "2014" else ""
    for position, number in enumerate(numbers):
        write_image(folder / f"train{year}" / f"{prefix}{number:012d}.jpg", position)
        if masks:
            write_mask(folder / "masks" / f"{prefix}{number:012d}.png", mask_of(position, 81))
    if not masks:
        width, height = size_of(0)
        runs = [height * 15, height * 2, height * (width - 17)]  # columns 15 and 16
        item = {"image_id": 9, "iscrowd": 0, "category_id": 1, "area": 60, "segmentation": [[2, 2, 12, 2, 12, 8, 2, 8]]}
        small = item | {"category_id": 90, "area": 9, "segmentation": [[4, 4, 6, 4, 6, 6, 4, 6]]}
        crowd = item | {"iscrowd": 1, "area": 99, "segmentation": {"counts": runs, "size": [height, width]}}
        content = {
            "images": [
                {"id": number, "width": size_of(position)[0], "height": size_of(position)[1]}
                for position, number in enumerate(numbers)
            ],
            "annotations": [small, crowd, item],
            "categories": [{"id": identifier} for identifier in (90, 1, 44)],
        }
        path = folder / "annotations" / f"instances_train{year}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    counts(monkeypatch, f"coco{year}", train=2)
    return folder
