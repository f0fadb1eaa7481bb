import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat

from repro.data import folders
from repro.data.catalogue import DataError
from repro.data.folders import CITYSCAPES_IDS, MASK_SOURCES, open_masks, open_tags
from repro.data.masks import FOR_MASKS, MaskSet, choose, draw_masks, mask_digest, palette, show_tags, tags_of
from repro.data.pools import draw_folder, draw_tags, read_ahead
from repro.data.scenes import scenes
from tests.data.mask_fixtures import (
    image_of,
    mask_of,
    name_of,
    size_of,
    small_cityscapes,
    small_coco,
    small_voc,
    tag_coco,
    tag_voc,
    tags_of_number,
    write_annotation,
    write_image,
    write_mask,
)


def toy(count: int = 30) -> MaskSet:
    """Mask of image i: class i modulo 3 in a corner."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    masks = torch.zeros(count, 4, 4, dtype=torch.uint8)
    masks[:, 0, 0], masks[:, 3] = torch.arange(count, dtype=torch.uint8) % 3, 255
    return MaskSet("toy", "train", images, masks, ("background", "b", "c"), mask_digest(images, masks))


# Pools in memory


def test_hidden_masks_are_absent():
    data = toy()
    pool, truth = draw_masks(data, 5, seed=1)
    assert len(pool.labelled) == 5 and len(pool.unlabelled) == 25 and pool.tags is None
    assert torch.equal(pool.labels[pool.labelled], data.masks[pool.labelled])
    assert (pool.labels[pool.unlabelled] == 255).all()
    assert torch.equal(torch.cat([pool.labelled, pool.unlabelled]).sort().values, torch.arange(30))
    assert torch.equal(truth, data.masks) and pool.labels.data_ptr() != data.masks.data_ptr()
    assert pool.name == "toy.1@5" and pool.classes == data.classes


def test_draws_are_nested_and_follow_philox():
    """The order is that of the raw words, which numpy guarantees."""
    words = np.random.Philox(key=7 + (FOR_MASKS << 64)).random_raw(30)
    order = np.argsort(words)
    for chosen in (0, 1, 4, 11, 30):
        shown, rest = choose(30, chosen, 7)
        assert shown.tolist() == sorted(order[:chosen].tolist()) and rest.tolist() == sorted(order[chosen:].tolist())
    assert choose(30, 5, 7)[0].tolist() != choose(30, 5, 8)[0].tolist()


def test_digests_tell_pools_apart():
    data = toy()
    pools = [draw_masks(data, 5, 1), draw_masks(data, 5, 2), draw_masks(data, 6, 1), draw_masks(toy(29), 5, 1),
             draw_masks(data, 5, 1, include_labelled=True), draw_masks(data, 5, 1, tags=True)]
    assert len({pool.digest for pool, _ in pools}) == len(pools)
    assert draw_masks(data, 5, 1)[0].digest == pools[0][0].digest
    assert pools[4][0].unlabelled.tolist() == draw_masks(data, 30, 1)[0].unlabelled.tolist() == list(range(30))


def test_known_scenes_pool():
    """Guards published numbers."""
    pool, _ = draw_masks(scenes("train", 50), 5, seed=0)
    assert pool.name == "scenes.0@5" and pool.labelled.tolist() == [0, 27, 28, 44, 48]


def test_tags_are_the_classes_of_each_image():
    pool, _ = draw_masks(toy(), 0, 0, tags=True)
    assert len(pool.labelled) == 0 and (pool.labels == 255).all()
    assert pool.tags.tolist() == [[True, number % 3 == 1, number % 3 == 2] for number in range(30)]
    nothing = torch.full((2, 3, 3), 255, dtype=torch.uint8)
    assert not tags_of(nothing, 4).any()


def test_pools_move_and_are_frozen():
    pool, _ = draw_masks(toy(), 5, 0, tags=True)
    moved = pool.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.name == pool.name
    with pytest.raises(FrozenInstanceError):
        pool.name = "other"


@pytest.mark.parametrize(
    ("labelled", "seed", "message"), [(-1, 0, "-1 masks"), (31, 0, "it has 30"), (3, -1, "seed -1")]
)
def test_impossible_draws_are_named(labelled, seed, message):
    with pytest.raises(ValueError, match=message):
        draw_masks(toy(), labelled, seed)


def test_palette_is_vocs():
    """Colours from the devkit's documentation."""
    colours = palette(21)
    assert colours[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert colours[15].tolist() == [192, 128, 128] and colours[20].tolist() == [0, 64, 128]
    assert colours[255].tolist() == [224, 224, 192] and not colours[21:255].any()


# Layouts


def check_pair(folder, index: int, number: int, mask: np.ndarray) -> None:
    image, found = folder.read(index)
    assert image.dtype == found.dtype == torch.uint8 and image.shape[1:] == found.shape
    assert np.array_equal(found.numpy(), mask)
    difference = image.permute(1, 2, 0).numpy().astype(int) - image_of(number)
    assert np.abs(difference).mean() < 4  # jpeg


def test_voc_own_masks(monkeypatch, tmp_path):
    small_voc(monkeypatch, tmp_path, train=4, extra=3, val=2)
    for split, numbers in (("train", range(4)), ("val", range(7, 9))):
        folder = open_masks("voc", split, tmp_path)
        assert len(folder) == len(numbers) and len(folder.classes) == 21
        for index, number in enumerate(numbers):
            check_pair(folder, index, number, mask_of(number, 21))
        folder.verify()


@pytest.mark.parametrize("sbd", [False, True])
def test_train_aug_prefers_vocs_own_masks(monkeypatch, tmp_path, sbd):
    small_voc(monkeypatch, tmp_path, train=4, extra=3, val=2, sbd=sbd)
    folder = open_masks("voc", "train_aug", tmp_path)
    assert [image.stem for image, _ in folder.pairs] == [name_of(number) for number in range(7)]
    for number in range(7):
        mask = mask_of(number, 21)
        check_pair(folder, number, number, np.where(mask == 255, 0, mask) if number >= 4 and not sbd else mask)
    assert folder.pairs[5][1].suffix == (".mat" if sbd else ".png")


def test_train_aug_by_list(monkeypatch, tmp_path):
    base = small_voc(monkeypatch, tmp_path, train=4, extra=3, val=2)
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n".join(map(name_of, range(6))))
    with pytest.raises(DataError, match="has 6 pairs, expected 7"):
        open_masks("voc", "train_aug", tmp_path)


def test_mat_files_hold_no_code(monkeypatch, tmp_path):
    """The reader knows MATLAB's arrays only: a pickle in the place of a mask is an error, and is not run."""
    base = small_voc(monkeypatch, tmp_path, train=1, extra=1, val=1, sbd=True)
    path = base / "benchmark_RELEASE" / "dataset" / "cls" / f"{name_of(1)}.mat"
    assert loadmat(path)["GTcls"]["Segmentation"][0, 0].shape == mask_of(1, 21).shape
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(DataError, match="item 1: cannot read mask .*mat"):
        open_masks("voc", "train_aug", tmp_path).read(1)
    assert not (tmp_path / "ran").exists()


def test_cityscapes_ids(monkeypatch, tmp_path):
    """Official ids by name: road 7, sidewalk 8, ..., bicycle 33; the others are void."""
    small_cityscapes(monkeypatch, tmp_path)
    folder = open_masks("cityscapes", "train", tmp_path)
    image, mask = folder.read(1)
    ids = (torch.arange(mask.numel()) % 36).view(mask.shape)
    expected = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
                20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
                27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}  # fmt: skip
    assert set(CITYSCAPES_IDS) == set(expected)
    for number in range(36):
        found = mask[ids == number].unique().tolist()
        assert found == [folder.classes.index(expected[number]) if number in expected else 255]
    assert len(open_masks("cityscapes", "val", tmp_path)) == 1


def test_cityscapes_train_ids(monkeypatch, tmp_path):
    small_cityscapes(monkeypatch, tmp_path, "labelTrainIds")
    mask = open_masks("cityscapes", "train", tmp_path).read(0)[1]
    assert mask.unique().tolist() == [*range(19), 255]


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_masks_as_png(monkeypatch, tmp_path, year):
    small_coco(monkeypatch, tmp_path, year, masks=True)
    folder = open_masks(f"coco{year}", "train", tmp_path)
    for number in range(2):
        check_pair(folder, number, number, mask_of(number, 81))


@pytest.mark.parametrize("year", ["2014", "2017"])
def test_coco_annotations(monkeypatch, tmp_path, year):
    """Ids 1, 44, 90 are classes 1, 2, 3; the small object lies on the large one, a crowd is void."""
    small_coco(monkeypatch, tmp_path, year, masks=False)
    folder = open_masks(f"coco{year}", "train", tmp_path)
    mask = folder.read(0)[1].numpy()
    expected = np.zeros_like(mask)
    expected[:, 15:17] = 255
    expected[2:9, 2:13] = 1  # Pillow fills the outline too
    expected[4:7, 4:7] = 3
    assert np.array_equal(mask, expected)
    assert not folder.read(1)[1].any()  # an image without objects


# Faults


def test_data_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.delenv("REPRO_DATA", raising=False)
    with pytest.raises(DataError, match=r"voc: say where the data is, in root or \$REPRO_DATA. To get it: VOCtrainval"):
        open_masks("voc", "val")
    monkeypatch.setenv("REPRO_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"cityscapes: none of cityscapes, Cityscapes in .*cityscapes-dataset.com"):
        open_masks("cityscapes", "val")
    with pytest.raises(DataError, match="unknown data set 'ade20k'; known: voc, cityscapes"):
        open_masks("ade20k", "val")
    with pytest.raises(DataError, match="voc has no split 'test'; it has: train, train_aug, val"):
        open_masks("voc", "test")
    (tmp_path / "voc").mkdir()
    with pytest.raises(DataError, match="cannot read the list .*val.txt"):
        open_masks("voc", "val")


def test_missing_files_are_named(monkeypatch, tmp_path):
    base = small_voc(monkeypatch, tmp_path, train=3, extra=0, val=1)
    (base / "JPEGImages" / f"{name_of(1)}.jpg").unlink()
    (base / "SegmentationClass" / f"{name_of(2)}.png").unlink()
    with pytest.raises(DataError, match="voc/train: 2 files are missing.*2007_000001.jpg.*2007_000002.png"):
        open_masks("voc", "train", tmp_path)


def test_incomplete_data_are_refused(monkeypatch, tmp_path):
    folder = small_cityscapes(monkeypatch, tmp_path)
    next((folder / "leftImg8bit" / "train" / "ulm").iterdir()).unlink()
    with pytest.raises(DataError, match="has 1 pairs, expected 2"):
        open_masks("cityscapes", "train", tmp_path)


def test_damaged_and_mismatched_pairs_are_all_named(monkeypatch, tmp_path):
    base = small_voc(monkeypatch, tmp_path, train=6, extra=0, val=1)
    image = base / "JPEGImages" / f"{name_of(0)}.jpg"
    image.write_bytes(image.read_bytes()[:200])
    mask = base / "SegmentationClass" / f"{name_of(1)}.png"
    mask.write_bytes(mask.read_bytes()[:60])
    write_mask(base / "SegmentationClass" / f"{name_of(2)}.png", mask_of(3, 21))
    write_mask(base / "SegmentationClass" / f"{name_of(3)}.png", np.full(size_of(3)[::-1], 77, np.uint8))
    write_image(base / "SegmentationClass" / f"{name_of(4)}.png", 4)
    with pytest.raises(DataError) as caught:
        open_masks("voc", "train", tmp_path).verify()
    message = str(caught.value)
    assert "5 of 6 pairs are unusable" in message
    for part in (
        "item 0: cannot read image", "item 1: cannot read mask", "2007_000002.jpg is 26 x 22, mask",
        "29 x 24; both must belong to one picture", "holds 77; classes are 0..20 and 255", "has mode RGB, not P or L",
    ):
        assert part in message, part


def test_damaged_annotations_are_named(monkeypatch, tmp_path):
    folder = small_coco(monkeypatch, tmp_path, "2017", masks=False)
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:50])
    folders._coco_annotations.cache_clear()
    with pytest.raises(DataError, match="instances_train2017.json is not a COCO instance file"):
        open_masks("coco2017", "train", tmp_path)
    crowd = {"image_id": 9, "iscrowd": 1, "area": 1, "segmentation": {"counts": "ab1", "size": [18, 20]}}
    image = {"id": 9, "width": 20, "height": 18}
    content = {"images": [image, image | {"id": 25}], "categories": [{"id": 1}], "annotations": [crowd]}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="compressed run lengths are not supported"):
        open_masks("coco2017", "train", tmp_path).read(0)


# Split lists and pools in files


def write_list(root, name: str, labelled, unlabelled=None) -> None:
    place = root / "splits" / "pascal" / name
    place.mkdir(parents=True)
    for file, numbers in (("labeled", labelled), ("unlabeled", unlabelled)):
        if numbers is not None:
            lines = [f"JPEGImages/{name_of(number)}.jpg SegmentationClass/{name_of(number)}.png" for number in numbers]
            (place / f"{file}.txt").write_text("\n".join(lines) + "\n")


def test_published_sizes():
    sizes = {name: dict(source.budgets) for name, source in MASK_SOURCES.items()}
    assert sizes["voc"] == {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464, "1_16": 662, "u2pl_1_16": 662,
                            "1_8": 1323, "u2pl_1_8": 1323, "1_4": 2646, "u2pl_1_4": 2646}  # fmt: skip
    assert sizes["cityscapes"] == {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488}
    assert sizes["coco2017"] == {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697}
    counts = {name: dict(source.counts) for name, source in MASK_SOURCES.items()}
    assert counts["voc"] == {"train": 1464, "train_aug": 10_582, "val": 1449}
    assert counts["cityscapes"] == {"train": 2975, "val": 500}
    assert [len(source.classes) for source in MASK_SOURCES.values()] == [21, 19, 81, 81]


def test_published_list(monkeypatch, tmp_path):
    small_voc(monkeypatch, tmp_path, train=4, extra=3, val=1)
    folder = open_masks("voc", "train_aug", tmp_path)
    write_list(tmp_path, "92", [3, 0], [1, 2, 4, 5])
    pool = draw_folder(folder, "92", seed=5, crop=16)
    assert pool.labelled.tolist() == [0, 3] and pool.unlabelled.tolist() == [1, 2, 4, 5]
    assert pool.name == "voc.92@2"
    write_list(tmp_path, "1_16", [6, 5, 1])
    pool = draw_folder(folder, "1_16", seed=5, crop=16, include_labelled=True)
    assert pool.labelled.tolist() == [1, 5, 6] and pool.unlabelled.tolist() == list(range(7))


def test_seeded_lists_are_named_so(monkeypatch, tmp_path):
    small_voc(monkeypatch, tmp_path, train=4, extra=5, val=1)
    folder = open_masks("voc", "train_aug", tmp_path)
    pools = [draw_folder(folder, "92", seed, 16) for seed in range(8)]
    assert pools[3].name == "voc.92.seeded.3@2" and len({pool.digest for pool in pools}) > 2
    # Classic budgets show VOC's own masks only.
    assert {number for pool in pools for number in pool.labelled.tolist()} == {0, 1, 2, 3}
    blended = {number for seed in range(8) for number in draw_folder(folder, "1_16", seed, 16).labelled.tolist()}
    assert blended > {0, 1, 2, 3}
    everything = draw_folder(folder, "all", 0, 16)
    assert everything.labelled.tolist() == everything.unlabelled.tolist() == list(range(9))


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "message"),
    [
        ([0], None, "lists 1 images, expected 2"),
        ([0, 99], None, r"1 images are not in voc/train_aug \(first 2007_000099.jpg\)"),
        ([0, 0], None, "1 are named twice"),
        ([0, 1], [1, 2], "1 images are in both lists"),
    ],
)
def test_lists_that_do_not_fit(monkeypatch, tmp_path, labelled, unlabelled, message):
    small_voc(monkeypatch, tmp_path, train=4, extra=0, val=1)
    write_list(tmp_path, "92", labelled, unlabelled)
    with pytest.raises(DataError, match=message):
        draw_folder(open_masks("voc", "train_aug", tmp_path), "92", 0, 16)
    with pytest.raises(ValueError, match="voc has no list '93'; it has: 92, 1_16, all"):
        draw_folder(open_masks("voc", "train_aug", tmp_path), "93", 0, 16)


def test_crops_are_those_of_the_resized_image(monkeypatch, tmp_path):
    """Resampling only the crop gives what Pillow gives for the whole image, and the mask moves along."""
    small_voc(monkeypatch, tmp_path, train=9, extra=0, val=1)
    folder = open_masks("voc", "train_aug", tmp_path)
    pool = draw_folder(folder, "all", seed=3, crop=24)
    state = pool.generator.get_state()
    index = torch.tensor([8, 0, 5, 5, 2])
    items = pool.take(index)
    assert torch.equal(items.index, index)
    assert items.images.shape == (5, 3, 24, 24) and items.labels.shape == (5, 24, 24)
    pool.generator.set_state(state)
    draws = torch.rand(3, 5, generator=pool.generator, dtype=torch.float64)
    for position, number in enumerate(index.tolist()):
        picture, (width, height) = folder.image(number), size_of(number)
        long = max(width, height)
        side = int(long * 0.5) + int(draws[0, position] * (int(long * 2) - int(long * 0.5) + 1))
        new = (side, int(height * side / width + 0.5)) if width >= height else (int(width * side / height + 0.5), side)
        left = int(draws[2, position] * (max(0, new[0] - 24) + 1))
        top = int(draws[1, position] * (max(0, new[1] - 24) + 1))
        canvas = Image.new("RGB", (max(24, new[0]), max(24, new[1])))
        canvas.paste(picture.resize(new, Image.Resampling.BILINEAR), (0, 0))
        expected = np.asarray(canvas.crop((left, top, left + 24, top + 24))).astype(int)
        assert np.abs(items.images[position].permute(1, 2, 0).numpy() - expected).max() <= 1
        labels = np.full((canvas.height, canvas.width), 254, np.uint8)
        rows = ((np.arange(new[1]) + 0.5) * height / new[1] + 1e-9).astype(int)
        columns = ((np.arange(new[0]) + 0.5) * width / new[0] + 1e-9).astype(int)
        labels[: new[1], : new[0]] = mask_of(number, 21)[rows[:, None], columns]
        assert np.array_equal(items.labels[position].numpy(), labels[top : top + 24, left : left + 24])


def test_masks_of_unlabelled_images_are_never_opened(monkeypatch, tmp_path):
    base = small_voc(monkeypatch, tmp_path, train=4, extra=3, val=1)
    folder = open_masks("voc", "train_aug", tmp_path)
    write_list(tmp_path, "92", [3, 0])
    pool = draw_folder(folder, "92", 0, crop=30)
    for number in (1, 2, 4, 5, 6):
        for kind in ("SegmentationClass", "SegmentationClassAug"):
            (base / kind / f"{name_of(number)}.png").unlink(missing_ok=True)
    labels = pool.take(pool.unlabelled).labels
    assert labels.unique().tolist() == [254, 255]
    assert pool.take(pool.labelled).labels.unique().numel() > 2


def test_crops_do_not_depend_on_threads(monkeypatch, tmp_path):
    small_voc(monkeypatch, tmp_path, train=6, extra=0, val=1)
    folder = open_masks("voc", "train_aug", tmp_path)
    index = torch.arange(6).repeat(4)
    one, many = (draw_folder(folder, "all", 2, 20, workers=workers) for workers in (1, 8))
    for _ in range(2):
        first, second = one.take(index), many.take(index)
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_folder_pools_move(monkeypatch, tmp_path):
    small_voc(monkeypatch, tmp_path, train=3, extra=0, val=1)
    pool = draw_folder(open_masks("voc", "train_aug", tmp_path), "92", 0, 16)
    moved = pool.to("meta")
    assert moved.labels.device.type == "meta" and moved.labelled.device.type == "cpu"
    items = moved.take(moved.labelled)
    assert items.index.device.type == items.images.device.type == items.labels.device.type == "meta"
    assert len(pool.classes) == 21


# Image tags


def tagged_voc(monkeypatch, root, **sizes):
    base = small_voc(monkeypatch, root, **sizes)
    tag_voc(base)
    return base


def classes_in(folder, row) -> set[str]:
    return {folder.classes[1:][channel] for channel in row.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("sbd", [False, True])
def test_voc_tags_are_the_objects_of_annotations(monkeypatch, tmp_path, sbd):
    """Difficult ones count; owners and parts have names that are no classes. Images and order are those of masks."""
    tagged_voc(monkeypatch, tmp_path, train=4, extra=3, val=2, sbd=sbd)
    for split, numbers in (("train_aug", range(7)), ("val", range(7, 9))):
        folder, tags = open_tags("voc", split, tmp_path)
        assert tags.dtype == torch.bool and tags.shape == (len(numbers), 20)
        assert [image for image, _ in folder.pairs] == [image for image, _ in open_masks("voc", split, tmp_path).pairs]
        assert [classes_in(folder, row) for row in tags] == [set(tags_of_number(number)) for number in numbers]


def test_tags_need_no_mask(monkeypatch, tmp_path):
    """With a list of names, the folders of masks may be absent; and no item leads to a mask."""
    base = tagged_voc(monkeypatch, tmp_path, train=4, extra=3, val=2)
    (base / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n".join(map(name_of, range(7))))
    for name in ("SegmentationClass", "SegmentationClassAug"):
        shutil.rmtree(base / name)
    folder, tags = open_tags("voc", "train_aug", tmp_path)
    assert len(folder) == 7 and tags.any(1).all()
    assert all(path.parent == base / "Annotations" for _, path in folder.pairs)
    with pytest.raises(DataError, match="cannot read mask .*xml"):
        folder.read(0)
    with pytest.raises(DataError, match="files are missing"):
        open_masks("voc", "train_aug", tmp_path)


def test_coco_tags_are_the_categories_of_images(monkeypatch, tmp_path):
    """Ids 3, 5, 90 are classes 1, 2, 3. A crowd gives its tag, and an image without objects none."""
    tag_coco(monkeypatch, tmp_path)
    folder, tags = open_tags("coco2014", "train", tmp_path)
    assert tags.shape == (3, 80) and [row.nonzero()[:, 0].tolist() for row in tags] == [[0, 2], [], [1]]
    folder, tags = open_tags("coco2014", "val", tmp_path)
    assert [row.nonzero()[:, 0].tolist() for row in tags] == [[0, 1], [1, 2], [], [2]]
    masks = open_masks("coco2014", "val", tmp_path)
    assert [image for image, _ in folder.pairs] == [image for image, _ in masks.pairs]
    seen = tags_of(masks.read(1)[1][None], 81)[0, 1:]
    assert torch.equal(seen, tags[1])


def test_polygons_are_not_kept(monkeypatch, tmp_path):
    """While the file is read, at most one annotation's polygons are held."""
    tag_coco(monkeypatch, tmp_path)
    kept = []
    load = json.load

    def watched(text, object_hook):
        content = load(text, object_hook=object_hook)
        kept.append(json.dumps(content))
        return content

    monkeypatch.setattr(folders.json, "load", watched)
    open_tags("coco2014", "train", tmp_path)
    assert len(kept) == 1 and "segmentation" not in kept[0] and "category_id" in kept[0]


def test_a_list_of_tags_comes_first(monkeypatch, tmp_path):
    base = small_voc(monkeypatch, tmp_path, train=2, extra=1, val=1)
    path = tmp_path / "tags" / "voc.csv"
    with pytest.raises(DataError, match=r"voc/train_aug: 3 files are missing, first .*2007_000000.xml.*tags/voc.csv"):
        open_tags("voc", "train_aug", tmp_path)
    tag_voc(base)
    from_annotations = open_tags("voc", "train_aug", tmp_path)[0].digest
    path.parent.mkdir()
    path.write_text(f"{name_of(0)},cat, dog\n{name_of(2)}\n{name_of(1)},person\nanother,car\n")
    folder, tags = open_tags("voc", "train_aug", tmp_path)
    assert [classes_in(folder, row) for row in tags] == [{"cat", "dog"}, {"person"}, set()]
    assert folder.digest != from_annotations
    path.write_text(f"{name_of(0)},cat\n{name_of(1)},house\n")
    with pytest.raises(DataError, match="voc.csv, line 2: 'house' is no class; classes are aeroplane, bicycle"):
        open_tags("voc", "train_aug", tmp_path)
    path.write_text(f"{name_of(0)},cat\n")
    with pytest.raises(DataError, match="voc.csv has no line for 2 of 3 images, first 2007_000001; add them"):
        open_tags("voc", "train_aug", tmp_path)


def test_faulty_sources_of_tags_are_named(monkeypatch, tmp_path):
    base = tagged_voc(monkeypatch, tmp_path, train=2, extra=0, val=1)
    path = base / "Annotations" / f"{name_of(1)}.xml"
    path.write_text("<annotation><object>")
    with pytest.raises(DataError, match="cannot read tags of .*2007_000001.xml .*fetch VOC 2012's Annotations again"):
        open_tags("voc", "train", tmp_path)
    write_annotation(path, ["unicorn"])
    with pytest.raises(DataError, match="cannot read tags of .*2007_000001.xml"):
        open_tags("voc", "train", tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="voc/train: 1 files are missing.*2007_000001.xml.*VOCtrainval.*tags/voc.csv"):
        open_tags("voc", "train", tmp_path)
    small_cityscapes(monkeypatch, tmp_path)
    with pytest.raises(DataError, match="cityscapes has no image tags; data sets with tags: voc, coco2014"):
        open_tags("cityscapes", "train", tmp_path)
    file = tag_coco(monkeypatch, tmp_path) / "annotations" / "instances_train2014.json"
    file.write_text(file.read_text()[:90])
    with pytest.raises(DataError, match="instances_train2014.json is not a COCO instance file"):
        open_tags("coco2014", "train", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="coco2014/train: 1 files are missing, first .*instances_train2014.json"):
        open_tags("coco2014", "train", tmp_path)


def test_hidden_tags_are_absent():
    tags = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    seen, index = show_tags(tags, 7, seed=3)
    assert index.tolist() == choose(30, 7, 3)[0].tolist() and seen.dtype == torch.float32
    assert torch.equal(seen[index], tags[index].float())
    rest = ~torch.isin(torch.arange(30), index)
    assert rest.sum() == 23 and not seen[rest].any()
    everything, order = show_tags(tags, 30, seed=3)
    assert order.tolist() == list(range(30)) and torch.equal(everything, tags.float())
    some = torch.tensor([2, 5, 11, 12])
    few, more = (set(show_tags(tags, count, 0, some)[1].tolist()) for count in (2, 3))
    assert few < more < set(some.tolist())
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=f"tags of {wrong} images: ask for 1 to 4"):
            show_tags(tags, wrong, 0, some)


def test_a_pool_of_tags(monkeypatch, tmp_path):
    """Crops are those of `draw_folder`; their fourth channel is the image's place, and masks are never opened."""
    base = tagged_voc(monkeypatch, tmp_path, train=4, extra=3, val=1)
    folder, tags = open_tags("voc", "train_aug", tmp_path)
    pool = draw_tags(folder, tags, 7, seed=5, crop=30)
    hidden = draw_folder(open_masks("voc", "train_aug", tmp_path), "92", 5, 30)
    hidden = replace(hidden, labelled=torch.empty(0, dtype=torch.int64))
    for name in ("SegmentationClass", "SegmentationClassAug"):
        shutil.rmtree(base / name)
    assert pool.labelled.tolist() == list(range(7)) and len(pool.unlabelled) == 0 and pool.name == "voc.5@7"
    assert pool.classes == folder.classes and torch.equal(pool.labels, tags.float())
    index = torch.tensor([6, 0, 0, 3])
    items = pool.take(index)
    expected = hidden.take(index)
    assert items.images.shape == (4, 4, 30, 30) and items.images.dtype == torch.uint8
    assert torch.equal(items.images[:, :3], expected.images) and torch.equal(items.index, index)
    assert torch.equal(items.images[:, 3], torch.where(expected.labels == 254, 0, 255).byte())
    assert (items.images[:, 3] == 0).any() and torch.equal(items.labels, tags[index].float())
    moved = pool.to("meta")
    assert moved.labels.device.type == "meta" and moved.labelled.device.type == "cpu"
    assert moved.generator is pool.generator


def test_images_without_tags_are_not_shown(monkeypatch, tmp_path):
    """Of COCO's images those without an object are left out, as in the papers' list."""
    tag_coco(monkeypatch, tmp_path)
    folder, tags = open_tags("coco2014", "train", tmp_path)
    pool = draw_tags(folder, tags, 2, seed=0, crop=16)
    assert pool.labelled.tolist() == [0, 2] and pool.unlabelled.tolist() == [1]
    one = [draw_tags(folder, tags, 1, seed, 16) for seed in range(6)]
    assert {tuple(pool.labelled.tolist()) for pool in one} == {(0,), (2,)}
    assert len({pool.digest for pool in (pool, *one)}) == 3
    for chosen in one:
        assert not chosen.labels[chosen.unlabelled].any()
    with pytest.raises(ValueError, match="tags of 3 images: ask for 1 to 2"):
        draw_tags(folder, tags, 3, 0, 16)
    other = tags.clone()
    other[0] = ~other[0]
    assert draw_tags(folder, other, 2, 0, 16).digest != pool.digest


def test_reading_ahead_keeps_the_order_and_a_distance():
    started, gate = [], threading.Event()

    def call(item):
        started.append(item)
        gate.wait(5)
        return 10 * item

    with ThreadPoolExecutor(8) as threads:
        found = read_ahead(threads, call, iter(range(9)), 4)
        threading.Timer(0.2, gate.set).start()
        assert next(found) == 0 and len(started) == 4
        assert list(found) == [10, 20, 30, 40, 50, 60, 70, 80]
        assert list(read_ahead(threads, call, [], 4)) == []
        failing = read_ahead(threads, lambda item: 1 / item, [1, 0, 2], 1)
        assert next(failing) == 1
        with pytest.raises(ZeroDivisionError):
            next(failing)
