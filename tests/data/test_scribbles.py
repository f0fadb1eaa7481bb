"""Scribbles drawn into masks, and ScribbleSup in files."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from scipy.sparse.csgraph import floyd_warshall

from repro.data.catalogue import DataError
from repro.data.folders import VOC_CLASSES
from repro.data.mask_views import PADDING, MaskViews, draw_window
from repro.data.masks import draw_masks
from repro.data.pools import draw_folder
from repro.data.scenes import scenes
from repro.data.scribbles import (
    LEAST,
    LENGTHS,
    PaddedViews,
    draw_scribbles,
    frame_window,
    framed,
    open_scribbles,
    reach_of,
    reaches_of,
    scene_scribbles,
    scribbles_of,
    trace,
    xml_scribbles,
)
from tests.data.mask_fixtures import name_of, size_of, small_voc, write_mask
from tests.data.test_mask_views import NoHostReads

SMALL = scenes("train", 40, seed=5)
EIGHT = np.ones((3, 3))


def blobs(seed: int, classes: int = 4) -> np.ndarray:
    """Smooth random regions with patches of 255."""
    words = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(words.standard_normal((33, 29)), words.uniform(0.7, 3)) for _ in range(classes)]
    mask = np.argmax(fields, 0).astype(np.uint8)
    mask[ndimage.gaussian_filter(words.standard_normal(mask.shape), 2) > 0.15] = 255
    return mask


def regions_of(mask: np.ndarray) -> list[np.ndarray]:
    """(H, W) bool of every connected region of every class."""
    found = []
    for label in set(mask.ravel().tolist()) - {255}:
        parts, count = ndimage.label(mask == label, EIGHT)
        found += [parts == number for number in range(1, count + 1)]
    return found


def diameter(pixels: np.ndarray) -> float:
    """Longest of all shortest paths between pixels (H, W) bool, steps of 1 and sqrt(2): by brute force."""
    place = np.argwhere(pixels)
    gap = np.abs(place[:, None] - place[None])
    steps = np.where(gap.max(2) == 1, np.hypot(gap[..., 0], gap[..., 1]), np.inf)
    return floyd_warshall(steps).max() if len(place) > 1 else 0.0


# Strokes


def test_a_bar_by_hand():
    """21 pixels: the middle is the eleventh, half of the length reaches five to each side."""
    mask = np.full((7, 25), 255, np.uint8)
    mask[3, 2:23] = 4
    for length, first, last in ((1, 2, 22), (0.5, 7, 17), (0.3, 9, 15), (0, 12, 12)):
        expected = np.full_like(mask, 255)
        expected[3, first : last + 1] = 4
        assert np.array_equal(scribbles_of(mask, length, width=1), expected)
        expected[3, max(2, first - 1) : min(22, last + 1) + 1] = 4
        assert np.array_equal(scribbles_of(mask, length, width=3), expected)  # clipped: 255 on all sides
    reach = reach_of(mask, width=1)
    assert np.allclose(reach[3, 2:23], np.abs(np.arange(21) - 10) / 10) and np.isinf(np.delete(reach, 3, 0)).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_a_click_is_a_square_dot(width):
    mask = np.zeros((21, 41), np.uint8)
    marked = np.argwhere(scribbles_of(mask, 0, width) == 0)
    assert len(marked) == width**2 and (np.ptp(marked, 0) == width - 1).all()
    assert np.abs(marked.mean(0) - [10, 20]).max() <= 1


def test_the_longest_branch_is_taken():
    """A cross with arms of 9, 9, 5 and 2 pixels: the two long ones, diagonal steps count sqrt(2)."""
    mask = np.full((30, 30), 255, np.uint8)
    mask[15, 6:25] = 1  # nine pixels to each side of column 15
    mask[13:15, 15] = 1
    for step in range(1, 8):
        mask[15 + step, 15 + step] = 1  # 7 sqrt(2) > 9
    reach = reach_of(mask, width=1)
    path = np.isfinite(reach)
    assert path[15, 6:15].all() and path[range(16, 23), range(16, 23)].all()
    assert not path[13, 15] and not path[15, 18:].any()
    whole = diameter(mask == 1)
    assert diameter(path) == pytest.approx(whole) and reach[15, 6] == reach[22, 22] == 1


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_strokes_are_diameters_of_skeletons(seed):
    """Against all pairs of pixels of an independently made skeleton; with holes at least half of it (two sweeps)."""
    from skimage.morphology import skeletonize

    mask = blobs(seed)
    path = np.isfinite(reach_of(mask, width=1))
    for region in regions_of(mask):
        if region.sum() < LEAST:
            assert not path[region].any()
            continue
        skeleton = skeletonize(region)
        stroke = path & region
        assert not (stroke & ~skeleton).any()
        found, longest = diameter(stroke), diameter(skeleton)
        holes = ndimage.label(~skeleton)[1] - 1  # four neighbours: diagonal lines part the outside
        tree = holes == 0
        assert found == pytest.approx(longest) if tree else longest / 2 - 1e-6 <= found <= longest + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    width=st.integers(1, 4),
    least=st.integers(1, 60),
)
def test_scribbles_are_nested_and_stay_in_their_region(seed, lengths, width, least):
    mask = blobs(seed)
    short, long = (scribbles_of(mask, length, width, least) for length in sorted(lengths))
    marked = short != 255
    assert np.array_equal(long[marked], short[marked])
    assert np.array_equal(long[long != 255], mask[long != 255])
    for region in regions_of(mask):
        assert short[region].min(initial=255) < 255 if region.sum() >= least else (long[region] == 255).all()
    click = scribbles_of(mask, 0, width, least)
    for region in regions_of(mask):
        assert (click[region] != 255).sum() <= width**2


def test_the_brush_stays_in_its_own_region():
    """A speck of the same class beside the stroke is left alone."""
    mask = np.zeros((9, 30), np.uint8)
    mask[2, 2:28], mask[4, 10:12] = 1, 1
    scribbles = scribbles_of(mask, 1, width=5, least=3)
    assert (scribbles[2, 2:28] == 1).all() and (scribbles[4, 10:12] == 255).all()


def test_nothing_to_mark():
    for mask in (np.full((8, 9), 255, np.uint8), np.zeros((0, 5), np.uint8), np.zeros((3, 3), np.uint8)):
        assert (scribbles_of(mask, 1) == 255).all() and scribbles_of(mask, 1).shape == mask.shape
    assert scribbles_of(np.zeros((1, 1), np.uint8), 0, least=1).tolist() == [[0]]
    assert reaches_of(np.zeros((0, 5, 5), np.uint8)).shape == (0, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((30,), "length 30 must be a fraction"), ((-0.1,), "-0.1"), ((float("nan"),), "nan"),
     ((0.5, 0), "width 0"), ((0.5, 3, 0), "least area 0")],
)  # fmt: skip
def test_impossible_scribbles_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        scribbles_of(SMALL.masks[0].numpy(), *arguments)
    with pytest.raises(ValueError, match=message):
        draw_scribbles(SMALL, *arguments)


# Scenes


@pytest.mark.parametrize("length", LENGTHS)
def test_many_at_once_are_as_one_by_one(length, monkeypatch):
    monkeypatch.setattr("repro.data.scribbles.CHUNK", 17)
    together = scene_scribbles(SMALL.masks, length, width=2)
    alone = [scribbles_of(mask, length, width=2) for mask in SMALL.masks.numpy()]
    assert together.dtype == torch.uint8 and np.array_equal(together.numpy(), np.stack(alone))


def test_share_of_labelled_pixels():
    """One pixel wide at 64 px: somewhat above VOC's published 3 % and 1 %, for strokes of 3 in 375 to 500 px."""
    share = [(scene_scribbles(SMALL.masks, length, width=1) != 255).float().mean().item() for length in LENGTHS]
    assert share == sorted(share)
    assert 0.03 < share[-1] < 0.06 and 0.01 < share[1] < 0.02
    for mask, click in zip(SMALL.masks, scene_scribbles(SMALL.masks, 0), strict=True):
        for label in mask.unique().tolist():
            large = any(region.sum() >= LEAST for region in regions_of(np.where(mask == label, label, 255)))
            assert bool((click == label).any()) == large


def test_pools_show_scribbles_and_nothing_else():
    pool, truth = draw_scribbles(SMALL, 0.3)
    assert torch.equal(pool.labels, scene_scribbles(SMALL.masks, 0.3)) and torch.equal(truth, SMALL.masks)
    assert pool.labelled.tolist() == pool.unlabelled.tolist() == list(range(40))
    assert pool.images is SMALL.images and pool.classes == SMALL.classes and pool.tags is None
    assert pool.name == "scenes.scribbles.30.3px@40"
    marked = pool.labels != 255
    assert torch.equal(pool.labels[marked], truth[marked]) and marked.float().mean() < 0.1


def test_digests_tell_pools_apart():
    pools = [draw_scribbles(SMALL, length)[0] for length in LENGTHS]
    pools += [draw_scribbles(SMALL, 1, width=1)[0], draw_scribbles(SMALL, 1, least=400)[0], draw_masks(SMALL, 40, 0)[0]]
    assert len({pool.digest for pool in pools}) == len(pools)
    assert draw_scribbles(SMALL, 0.3)[0].digest == pools[1].digest


def test_known_scribbles():
    """Guards published numbers, and equality across versions of scikit-image: these were made with 0.26."""
    assert draw_scribbles(SMALL, 0.5)[0].digest == "305e190c2339e5b62350dad169af425afe5889239063c80b6070ee1ef172101d"


# Polylines


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(-5, 40), st.integers(-5, 40)), min_size=1, max_size=6),
    lengths=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_polylines_are_connected_nested_and_near_the_line(points, lengths):
    row, column, reach = trace(np.array(points, float))
    pixels = np.stack([row, column], 1)
    assert pixels[0].tolist() == list(points[0]) and pixels[-1].tolist() == list(points[-1])
    assert np.abs(np.diff(pixels, axis=0)).max(initial=0) <= 1
    assert reach.min() == 0 and reach.max() <= 1
    short, long = (np.flatnonzero(reach <= length) for length in sorted(lengths))
    assert set(short) <= set(long) and (np.diff(short) == 1).all()  # one stretch
    nearest = np.full(len(pixels), np.hypot(*(pixels - points[0]).T))
    for start, end in zip(np.array(points[:-1]), np.array(points[1:]), strict=True):
        along = end - start
        t = ((pixels - start) @ along / max(1, along @ along)).clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(*(pixels - start - t[:, None] * along).T))
    assert nearest.max() <= 0.5 + 1e-9


def write_xml(path, size: tuple[int, int], strokes) -> None:
    """ScribbleSup's XML. size: (W, H); strokes: (tag, [(x, y), ...])."""
    polygons = "".join(
        f"<polygon><tag>{tag}</tag>{''.join(f'<point><X>{x}</X><Y>{y}</Y></point>' for x, y in line)}</polygon>"
        for tag, line in strokes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><filename>{path.stem}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
        f"<depth>3</depth></size><segmented>1</segmented>{polygons}</annotation>"
    )


def test_xml_strokes(tmp_path):
    """Straight lines of 3 px as Pillow draws them; short names of classes; a later stroke lies on top; cut at edges."""
    path = tmp_path / "2007_000001.xml"
    write_xml(path, (40, 30), [("background", [(5, 4), (15, 4), (25, 4)]), ("plane", [(30, 5), (30, 25)])])
    expected = Image.new("L", (40, 30), 255)
    ImageDraw.Draw(expected).rectangle((4, 3, 26, 5), fill=0)
    ImageDraw.Draw(expected).rectangle((29, 4, 31, 26), fill=1)
    assert np.array_equal(xml_scribbles(path, 1), np.asarray(expected))
    half = xml_scribbles(path, 0.5)
    assert np.argwhere(half == 0).min(0).tolist() == [3, 9] and np.argwhere(half == 0).max(0).tolist() == [5, 21]
    assert np.argwhere(half == 1).min(0).tolist() == [9, 29] and np.argwhere(half == 1).max(0).tolist() == [21, 31]
    click = xml_scribbles(path, 0)
    assert np.array_equal(np.argwhere(click == 0).mean(0), [4, 15]) and (click != 255).sum() == 18

    names = dict(zip(("plane", "bike", "table", "plant", "monitor"), (1, 2, 11, 16, 20), strict=True))
    assert [VOC_CLASSES[label] for label in names.values()] == [
        "aeroplane", "bicycle", "diningtable", "pottedplant", "tvmonitor",
    ]  # fmt: skip
    for tag, label in names.items():
        write_xml(path, (40, 30), [("dog", [(0, 10), (39, 10)]), (tag, [(20, -8), (20, 50)]), ("cat", [])])
        found = xml_scribbles(path, 1)
        assert set(found.ravel()) == {12, label, 255} and (found[:, 19:22] == label).all()


def test_xml_diagonals_are_pillows(tmp_path):
    path = tmp_path / "a.xml"
    write_xml(path, (30, 30), [("cat", [(2, 3), (14, 15), (26, 3)])])
    expected = Image.new("L", (30, 30), 255)
    ImageDraw.Draw(expected).line([(2, 3), (14, 15), (26, 3)], fill=8)
    assert np.array_equal(xml_scribbles(path, 1, width=1), np.asarray(expected))


# ScribbleSup's folders


def write_scribbles(monkeypatch, root, xml: bool = False, suffixes=("",)):
    """VOC with four images in train_aug; image i has a stroke of background and one of class i + 1."""
    base = small_voc(monkeypatch, root, train=2, extra=2, val=1)
    for number in range(4):
        width, height = size_of(number)
        if xml:
            lines = [("background", [(2, 2), (width - 3, 2)]), ("person", [(3, 6), (11, 6)])]
            path = base / "scribble_annotation" / "pascal_2012" / f"{name_of(number)}.xml"
            write_xml(path, (width, height), lines)
        for position, suffix in enumerate(suffixes):
            scribble = np.full((height, width), 255, np.uint8)
            scribble[2, position + 2 : width - position - 2], scribble[6, 5] = 0, number + 1
            write_mask(base / f"pascal_2012_scribble{suffix}" / f"{name_of(number)}.png", scribble)
    return base


def test_folders_of_every_length(monkeypatch, tmp_path):
    base = write_scribbles(monkeypatch, tmp_path, suffixes=("", "0.8", "0.5", "0.3", "0"))
    digests = set()
    for position, length in enumerate(sorted(LENGTHS, reverse=True)):
        folder = open_scribbles(length, tmp_path)
        assert [image.stem for image, _ in folder.pairs] == [name_of(number) for number in range(4)]
        assert folder.name == f"scribblesup.{100 * length:g}" and folder.classes == VOC_CLASSES
        for number in range(4):
            image, scribble = folder.read(number)
            assert image.shape[1:] == scribble.shape == size_of(number)[::-1]
            assert (scribble == 0).sum() == size_of(number)[0] - 4 - 2 * position and scribble[6, 5] == number + 1
        folder.verify()
        digests.add(folder.digest)
    assert len(digests) == len(LENGTHS) and open_scribbles(0.3, tmp_path).digest in digests
    (base / "pascal_2012_scribble").rename(tmp_path / "pascal_2012_scribble")
    assert open_scribbles(1, tmp_path).read(2)[1][6, 5] == 3


def test_xml_serves_lengths_without_a_folder(monkeypatch, tmp_path):
    write_scribbles(monkeypatch, tmp_path, xml=True)
    assert open_scribbles(1.0, tmp_path).pairs[0][1].suffix == ".png"
    folder = open_scribbles(0.5, tmp_path)
    assert folder.pairs[0][1].suffix == ".xml"
    scribble = folder.read(1)[1]
    assert torch.equal(scribble, torch.from_numpy(xml_scribbles(folder.pairs[1][1], 0.5)))
    assert (scribble[5:8] == 15).sum() == 3 * 7 and scribble.unique().tolist() == [0, 15, 255]
    assert folder.digest != open_scribbles(0.3, tmp_path).digest


def test_crops_carry_scribbles_and_masks_stay_closed(monkeypatch, tmp_path):
    base = write_scribbles(monkeypatch, tmp_path)
    folder = open_scribbles(1, tmp_path)
    for mask in (*(base / "SegmentationClass").glob("*.png"), *(base / "SegmentationClassAug").glob("*.png")):
        mask.write_bytes(b"not a mask")
    pool = draw_folder(folder, "all", seed=0, crop=40, scale=(1.0, 1.0))
    items = pool.take(torch.arange(4))
    assert len(pool.labelled) == len(pool.unlabelled) == 4 and pool.name.startswith("scribblesup.100.all")
    for number in range(4):
        width, height = size_of(number)
        assert torch.equal(items.labels[number, :height, :width], folder.read(number)[1])
    assert (items.labels[0, size_of(0)[1] :] == 254).all()


def test_missing_scribbles_are_named(monkeypatch, tmp_path):
    base = write_scribbles(monkeypatch, tmp_path)
    with pytest.raises(DataError, match=r"length 0.3: none of .*pascal_2012_scribble0.3.*To get it: .*need the latter"):
        open_scribbles(0.3, tmp_path)
    (base / "pascal_2012_scribble" / f"{name_of(2)}.png").unlink()
    with pytest.raises(DataError, match="1 files are missing, first .*2007_000002.png. To get it: pascal_2012_scribbl"):
        open_scribbles(1, tmp_path)
    with pytest.raises(ValueError, match="length 30 must be a fraction"):
        open_scribbles(30, tmp_path)


def test_damaged_scribbles_are_named(monkeypatch, tmp_path):
    base = write_scribbles(monkeypatch, tmp_path, xml=True)
    png, xml = base / "pascal_2012_scribble", base / "scribble_annotation" / "pascal_2012"
    write_mask(png / f"{name_of(0)}.png", np.full(size_of(0)[::-1], 21, np.uint8))
    write_mask(png / f"{name_of(1)}.png", np.full((5, 5), 255, np.uint8))
    (png / f"{name_of(2)}.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        open_scribbles(1, tmp_path).verify()
    for part in ("3 of 4", "holds 21; classes are 0..20 and 255", "5 x 5; both must belong", "2: cannot read mask"):
        assert part in str(caught.value), part
    write_xml(xml / f"{name_of(0)}.xml", size_of(0), [("sky", [(1, 1)])])
    write_xml(xml / f"{name_of(1)}.xml", (9, 9), [("cat", [(1, 1)])])
    (xml / f"{name_of(2)}.xml").write_text("<annotation><size>")
    (xml / f"{name_of(3)}.xml").write_text("<annotation><size><width>7</width></size></annotation>")
    with pytest.raises(DataError) as caught:
        open_scribbles(0.5, tmp_path).verify()
    for part in ("4 of 4", "scribbles on 'sky'; known: background", "9 x 9; both must", "ParseError", "ValueError"):
        assert part in str(caught.value), part


# Whole images in frames, and their crops


def test_frames_hold_whole_images_and_leave_nothing_to_chance(monkeypatch, tmp_path):
    base = write_scribbles(monkeypatch, tmp_path)
    folder = open_scribbles(1, tmp_path)
    for mask in (*(base / "SegmentationClass").glob("*.png"), *(base / "SegmentationClassAug").glob("*.png")):
        mask.write_bytes(b"not a mask")
    pool = framed(folder, side=40)
    index = torch.tensor([3, 0, 2])
    items = pool.take(index)
    assert items.images.dtype == items.labels.dtype == torch.uint8 and torch.equal(items.index, index)
    assert items.images.shape == (3, 3, 40, 40) and items.labels.shape == (3, 40, 40)
    for number, image, label in zip(index.tolist(), items.images, items.labels, strict=True):
        width, height = size_of(number)
        own_image, own_label = folder.read(number)
        assert torch.equal(image[:, :height, :width], own_image) and torch.equal(label[:height, :width], own_label)
        outside = torch.ones(40, 40, dtype=torch.bool)
        outside[:height, :width] = False
        assert (label[outside] == 254).all() and not image[:, outside].any()
    again = pool.take(index)
    assert torch.equal(again.images, items.images) and torch.equal(again.labels, items.labels)
    assert pool.size == (4, 40, 40) and pool.labelled.tolist() == pool.unlabelled.tolist() == [0, 1, 2, 3]
    assert pool.name == "scribblesup.100@4" and pool.classes == VOC_CLASSES and framed(folder).side == 500
    digests = {framed(folder, 40).digest, framed(folder, 41).digest, pool.to("cpu").digest, folder.digest}
    assert len(digests) == 3 and len(pool.labels) == 0
    with pytest.raises(DataError, match="2007_000001.jpg is 23 x 20; frames have 22 x 22: ask for larger ones"):
        framed(folder, side=22).take(torch.tensor([0, 1]))


def frames(sizes, side):
    """Smooth images of (height, width) and random labels, in frames."""
    words = np.random.default_rng(0)
    images = torch.zeros(len(sizes), 3, side, side, dtype=torch.uint8)
    labels = torch.full((len(sizes), side, side), PADDING, dtype=torch.uint8)
    for number, (height, width) in enumerate(sizes):
        coarse = Image.fromarray(words.integers(0, 256, (5, 5, 3)).astype(np.uint8)).resize((width, height))
        images[number, :, :height, :width] = torch.from_numpy(np.array(coarse)).permute(2, 0, 1)
        labels[number, :height, :width] = torch.from_numpy(words.integers(0, 21, (height, width)).astype(np.uint8))
    return images, labels


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.3, 2.0])
def test_crops_of_frames_against_pillow(scale):
    """As the released loader: resize by the short side, pad right and below, crop. Pillow rounds between its passes."""
    size, side, sizes = 40, 60, [(36, 50), (60, 45), (30, 30), (60, 60)]
    images, masks = frames(sizes, side)
    draws = torch.tensor([[0.0] * 4, [0.999, 0.2, 0.5, 0.0], [0.5, 0.7, 0.0, 0.999], [0.9] * 4], dtype=torch.float64)
    height, width = torch.tensor(sizes).T
    window = frame_window(draws, height, width, side, size, (scale, scale), flip=True)
    crops, moved = window.images(images), window.maps(masks, PADDING)
    short = int(size * scale)
    for number, (high, wide) in enumerate(sizes):
        new = (short * wide // high, short) if wide > high else (short, short * high // wide)
        own = Image.fromarray(images[number, :, :high, :wide].permute(1, 2, 0).numpy())
        scaled = own.resize(new, Image.Resampling.BILINEAR)
        labels = Image.fromarray(masks[number, :high, :wide].numpy()).resize(new, Image.Resampling.NEAREST)
        missing = [max(0, size - extent) for extent in new]
        left, top = (
            int(draw * (max(0, extent - size) + 1)) for draw, extent in zip(draws[[2, 1], number], new, strict=True)
        )
        box = (left, top, left + size, top + size)
        expected = np.asarray(ImageOps.expand(scaled, (0, 0, *missing), 0).crop(box)).astype(int)
        assert np.abs(crops[number].permute(1, 2, 0).numpy() - expected).max() <= 1
        # a centre that falls exactly between two pixels may go to either
        rows, columns = (
            (2 * (np.arange(size) + first) + 1) * old % (2 * extent) != 0
            for first, old, extent in ((top, high, new[1]), (left, wide, new[0]))
        )
        labels = np.asarray(ImageOps.expand(labels, (0, 0, *missing), PADDING).crop(box))
        assert np.array_equal(moved[number].numpy()[rows][:, columns], labels[rows][:, columns])
        assert rows.mean() > 0.8 and columns.mean() > 0.8
        real = np.zeros((size, size), bool)
        real[: min(size, new[1]), : min(size, new[0])] = True
        assert np.array_equal(~window.outside[number].numpy(), real)


def test_an_image_that_fills_its_frame_is_cropped_as_any_other():
    """`draw_window` has the same rule for square images, with a scale over the image instead of the crop."""
    draws = torch.rand(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.full((50,), 32)
    for size in (16, 64):
        ours = frame_window(draws, full, full, 32, size, (0.5, 2.0), flip=True)
        theirs = draw_window(draws, 32, 32, size, (0.5 * size / 32, 2.0 * size / 32), flip=True)
        for name in ("row", "column", "outside"):
            inside = ~ours.outside if name != "outside" else slice(None)
            values = [getattr(window, name) for window in (ours, theirs)]
            if name != "outside":
                axis = 2 if name == "row" else 1
                values = [value.unsqueeze(axis).expand(-1, size, size) for value in values]
            assert torch.equal(*(value[inside] for value in values)), name
        image = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(ours.images(image), theirs.images(image))


def test_crops_lie_inside_their_images():
    """Padding is only where an image is smaller than the crop; labels and further maps move alike."""
    sizes = [(30, 48), (48, 20), (40, 40), (48, 48)] * 20
    images, masks = frames(sizes, 48)
    views = PaddedViews(24, (0.5, 2.0), generator=torch.Generator().manual_seed(3))
    crop = views.crop(images, masks)
    short = (~crop.padding).flatten(1).sum(1).double()
    assert (short <= 24 * 24).all() and (crop.masks[crop.padding] == 255).all()
    assert (crop.masks != PADDING).all() and not crop.images.amax(1)[crop.padding].any()
    again = torch.rand(4, 80, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    target = 12 + (again[0] * 37).long()
    for number, (high, wide) in enumerate(sizes):
        new = [extent * int(target[number]) // min(high, wide) for extent in (high, wide)]
        assert int((~crop.padding[number]).sum()) == min(24, new[0]) * min(24, new[1])
    stored = torch.where(masks == PADDING, 255, 20 - masks.int()).byte()
    assert torch.equal(crop.window.maps(stored, 255)[~crop.padding], 20 - crop.masks[~crop.padding])
    assert (target.min(), target.max()) == (12, 48) and crop.padding.any(2).any(1).float().mean() < 0.5
    for flags in (crop.padding.any(2).all(1), crop.padding.any(1).all(1)):
        assert not (flags & (target >= 24)).any()  # long enough: no padding


def test_views_of_frames_do_not_wait_for_the_device():
    images, masks = frames([(20, 30), (30, 22)], 32)
    views = PaddedViews(16, generator=torch.Generator().manual_seed(0))
    with NoHostReads():
        views.strong(views.crop(images, masks))
    assert isinstance(views, MaskViews)
