"""Fashion scenes: pictures with exact masks, composed from the embedded garments while you wait.

    train = scenes("train", 1000)            # 64 x 64, five garment classes and background
    test = scenes("test", 200, size=96)      # from test garments only

A scene is a procedural texture with one to four garments of several sizes, tints and poses that hide one another.
Everything follows from Philox words: scene `index` of (split, seed, size, classes) is the same alone or among
thousands. After the words all arithmetic is on integers (where floating point is used, for speed, every number is
an integer that its type holds exactly), so pixels and masks are equal on every platform and library version.
"""

import functools

import numpy as np
import torch
from scipy import ndimage

from repro.data.catalogue import SOURCES, load
from repro.data.masks import MaskSet, mask_digest

GARMENTS = SOURCES["fashion"].classes
# Five garments that a small network tells apart by shape; the other five are near twins of these (coat, shirt and
# T-shirt of the pullover, ankle boot and sandal of the sneaker), so that all ten make a much harder task.
DEFAULT = ("Trouser", "Pullover", "Dress", "Sneaker", "Bag")
SIZES = range(48, 129)
LEVEL = 20  # of 255: brighter pixels of an enlarged garment belong to it
OPENING = 0.025  # black holes above this fraction of a garment stay open, every other hole is part of it
SPECK = 0.04  # parts below this fraction of a garment are dropped

# Streams of Philox words, apart from those of `splits`.
COMPOSITION, GRAIN = {"train": 16, "test": 17}, {"train": 18, "test": 19}
LAYERS = 4
WORDS = 256  # 64-bit words of composition a scene
CHUNK = 32  # scenes at a time: their pixels stay in the cache
ZOOM = 2  # enlargement of the stored garments
SIDE = 28 * ZOOM + 2  # of an enlarged garment with its empty border
TURN = np.arange(-20, 21)  # degrees
COS, SIN = (np.rint(f(np.radians(TURN)) * 2**14).astype(np.int32) for f in (np.cos, np.sin))
# Side of a garment as a fraction of the scene's, in 1/256, by number of garments: smallest, range.
EXTENT = np.array([[0, 0], [125, 95], [105, 75], [95, 55], [90, 45]])


def scenes(
    split: str, count: int, size: int = 64, seed: int = 0, classes: tuple[str, ...] = DEFAULT
) -> MaskSet:
    """The first `count` scenes of a split. A second call returns the same object: do not write into its tensors.

    split: "train" or "test", also the part of the embedded garments that is used
    count: > 0; scene i does not depend on it
    size: side in pixels, 48..128
    seed: 0 <= seed < 2**64
    classes: names out of `GARMENTS`; class k of the masks is classes[k - 1], 0 is the background
    Raises ValueError.
    """
    if split not in COMPOSITION:
        raise ValueError(f"scenes have no split {split!r}; they have: {', '.join(COMPOSITION)}")
    if count < 1 or size not in SIZES or not 0 <= seed < 2**64:
        raise ValueError(
            f"count {count} must be positive, size {size} in {SIZES[0]}..{SIZES[-1]}, seed {seed} in 0..2**64 - 1"
        )
    unknown = [name for name in classes if name not in GARMENTS]
    if unknown or not classes or len(set(classes)) < len(classes):
        raise ValueError(f"classes {classes} must be one or more different names out of {', '.join(GARMENTS)}")
    return _scenes(split, count, size, seed, tuple(classes))


@functools.lru_cache(maxsize=8)
def _scenes(split, count, size, seed, classes) -> MaskSet:
    words = np.random.Philox(key=seed + (COMPOSITION[split] << 64)).random_raw(count * WORDS)
    octets = words.astype("<u8").view(np.uint8).reshape(count, -1).astype(np.int32)
    grain = np.random.Philox(key=seed + (GRAIN[split] << 64)).random_raw(-(-count * size * size // 8))
    grain = grain.astype("<u8").view(np.uint8)[: count * size * size].reshape(count, size, size)
    plan = _compose(octets[:, :256], size, split, classes)
    used, place = np.unique(plan["garment"], return_inverse=True)
    parts = np.array_split(used, -(-len(used) // 1024))  # bounds the memory
    garments = np.concatenate([cut_out(load("fashion", split), part) for part in parts])
    plan["garment"] = place.reshape(plan["garment"].shape).astype(np.int32)
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.empty((count, size, size), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        canvas = texture(octets[part, 256:], size)
        masks[part] = 0
        for layer in range(LAYERS):
            lay(canvas, masks[part], {key: value[part, layer] for key, value in plan.items()}, garments, size)
        amplitude = 2 + octets[part, 255] % 9
        noise = (grain[part].astype(np.int32) - 128) * amplitude[:, None, None] >> 7
        images[part] = (canvas + noise[:, None]).clip(0, 255)
    images, masks = torch.from_numpy(images), torch.from_numpy(masks)
    return MaskSet("scenes", split, images, masks, ("background", *classes), mask_digest(images, masks))


def _compose(octets: np.ndarray, size: int, split: str, classes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """What each scene shows, each value (count, LAYERS, ...) from back to front; `present` is False past the last.

    octets: (count, 256) bytes as int32
    """
    count = len(octets)
    number = np.array([1, 2, 2, 2, 3, 3, 3, 4])[octets[:, 0] % 8]
    draw = octets[:, 4 : 4 + LAYERS * 40].reshape(count, LAYERS, 40)
    pair = draw[..., 0::2] | draw[..., 1::2] << 8  # sixteen bits each, (count, LAYERS, 20)
    label = pair[..., 0] * len(classes) >> 16
    labels = load("fashion", split).labels.numpy()
    members = [np.flatnonzero(labels == GARMENTS.index(name)) for name in classes]
    amount = np.array([len(rows) for rows in members])[label]
    first = np.cumsum([0] + [len(rows) for rows in members])[label]
    garment = np.concatenate(members)[first + (pair[..., 1] * amount >> 16)]
    low, span = EXTENT[number].T[..., None]
    side = (low + (pair[..., 2] * span >> 16)) * size >> 4  # in 1/16 pixel
    # Of six places the farthest from the garments behind it, so that few are hidden: squared distance in 1/16 pixel.
    centre = np.empty((count, LAYERS, 2), np.int64)
    for layer in range(LAYERS):
        margin = side[:, layer, None, None] * 3 >> 3  # up to an eighth of a garment's box lies outside
        place = margin + (pair[:, layer, 3:15].reshape(count, 6, 2) * (16 * size - 2 * margin) >> 16)
        gap = np.full((count, 6), 16 * size, np.int64) ** 2
        for other in range(layer):
            reach = (side[:, layer] + side[:, other])[:, None] ** 2  # large garments keep a larger distance
            away = ((place - centre[:, None, other]) ** 2).sum(2)
            gap = np.minimum(gap, away * 2**20 // reach)
        centre[:, layer] = place[np.arange(count), gap.argmax(1)]
    return {
        "present": np.arange(LAYERS) < number[:, None],
        "label": (label + 1).astype(np.uint8),
        "garment": garment,
        "side": side.astype(np.int32),
        "centre": centre.astype(np.int32),
        "turn": pair[..., 15] * len(TURN) >> 16,
        "flip": pair[..., 16] & 1,
        "light": colour(pair[..., 17] * 1536 >> 16, 60 + draw[..., 36] * 170 // 256, 150 + draw[..., 37] * 105 // 256),
        "depth": 40 + draw[..., 38] * 70 // 256,  # of 256: brightness of black cloth relative to white
    }


def colour(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV to RGB in integers, (..., 3). hue: 0..1535; saturation, value: 0..255."""
    phase = (hue[..., None] + np.array([5, 3, 1]) * 256) % 1536
    wedge = np.minimum(phase, 1024 - phase).clip(0, 256)
    return value[..., None] - (value * saturation)[..., None] * wedge // (255 * 256)


def cut_out(source, rows: np.ndarray) -> np.ndarray:
    """The garments of these rows, enlarged: (len(rows) * SIDE * SIDE,) uint32, coverage << 16 | shade, each 0..255."""
    # Cubic interpolation at quarters: the weights are integers over 128, and every sum stays below 2**24.
    taps = np.zeros((28 * ZOOM, 32), np.float32)
    for row in range(28 * ZOOM):
        weights = (-9, 111, 29, -3) if row % 2 else (-3, 29, 111, -9)
        first = row // 2 + (1 if row % 2 else 0)
        taps[row, first : first + 4] = weights
    grey = np.pad(source.images[rows, 0].numpy(), ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    enlarged = (taps @ grey @ taps.T).astype(np.int32)
    shade = np.zeros((len(rows), SIDE, SIDE), np.uint8)
    shade[:, 1:-1, 1:-1] = (enlarged + 2**13 >> 14).clip(0, 255)
    solid = _closed(shade > LEVEL)
    parts, area, owner = _parts(solid, np.ones((3, 3)))
    whole = solid.sum((1, 2))
    solid &= (area > SPECK * whole[owner])[parts]
    # Whatever background cannot reach the border is a hole: filled, unless it is large and black as background is
    # (black cloth seldom is exactly 0): the openings of handles and between legs.
    parts, area, owner = _parts(~solid, ndimage.generate_binary_structure(2, 1))
    black = np.bincount(parts.ravel(), shade.ravel() == 0, len(area))
    opening = (area > OPENING * whole[owner]) & (2 * black > area)
    opening[parts[:, 0, 0]] = True
    coverage = np.where(solid | ~opening[parts], np.uint32(255 << 16), 0)
    return (coverage | shade).ravel()


def _closed(solid: np.ndarray) -> np.ndarray:
    """Gaps of at most two pixels closed: dilation by 3 x 3, then erosion. solid: (n, SIDE, SIDE) bool, empty border."""
    for combine in (np.logical_or, np.logical_and):
        for axis in (1, 2):
            padded = np.pad(solid, [(0, 0)] * axis + [(1, 1)] + [(0, 0)] * (2 - axis))
            shifted = [np.take(padded, range(start, start + SIDE), axis) for start in range(3)]
            solid = combine.reduce(shifted)
    return solid


def _parts(solid: np.ndarray, structure: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Connected parts of each image: numbers (n, SIDE, SIDE), 0 elsewhere; area and image of each number."""
    flat = np.zeros((3, 3, 3))
    flat[1] = structure  # images are not connected with one another
    parts, number = ndimage.label(solid, flat)
    owner = np.zeros(number + 1, int)
    owner[parts.reshape(len(solid), -1)] = np.arange(len(solid))[:, None]
    return parts, np.bincount(parts.ravel(), minlength=number + 1), owner


def texture(octets: np.ndarray, size: int) -> np.ndarray:
    """Backgrounds (n, 3, size, size) int32, 0..255: two or three tints mixed by gradients, stripes, checks or blobs."""
    n = len(octets)
    axis = (np.arange(size) * 2 + 1) * 2**15 // size  # 0..2**16 across the scene, whatever its size
    x, y = axis[None, None, :], axis[None, :, None]
    kind = octets[:, 0] % 5

    def waves(first: int) -> np.ndarray:
        """Triangle waves 0..255 of a random direction and period."""
        angle = octets[:, first, None, None] % 16
        cos = np.array([256, 237, 181, 98, 0, -98, -181, -237] * 2)[angle]
        sin = np.array([0, 98, 181, 237, 256, 237, 181, 98] * 2)[angle]
        cycles = 3 + octets[:, first + 1, None, None] % 7
        phase = ((x * cos + y * sin) * cycles >> 16) + octets[:, first + 2, None, None] & 511
        return np.abs(255 - phase)

    smooth = _blobs(octets[:, 64 : 64 + 25].reshape(n, 5, 5), size)
    cloudy = _blobs(octets[:, 96 : 96 + 81].reshape(n, 9, 9), size)
    rough = _blobs(octets[:, 192 : 192 + 289].reshape(n, 17, 17), size)
    fractal = (4 * smooth + 2 * cloudy + rough) // 7
    slope_x, slope_y = (octets[:, at, None, None] - 128 for at in (1, 2))
    gradient = np.abs((x * slope_x + y * slope_y) >> 15).clip(0, 255)
    first, second = waves(4), waves(8)
    # Steep, but not hard edges.
    stripes = ((first - 128) * 5 + 128 + (rough >> 3)).clip(0, 255)
    checks = (np.where((first > 127) ^ (second > 127), 200, 50) * 3 + first) >> 2
    blobs = ((cloudy - 128) * 7 + 128).clip(0, 255)
    clouds = ((fractal - 128) * 2 + 128).clip(0, 255)
    field = np.choose(kind[:, None, None], [gradient, stripes, checks, blobs, clouds])
    ends = []
    for at in (16, 20, 24):
        hue, fine, saturation, value = octets[:, at : at + 4].T
        ends.append(colour(hue * 6 + (fine >> 6), saturation * 150 // 256, 60 + value * 180 // 256))
    low, high, far = (end[:, :, None, None] for end in ends)
    mixed = (low * (255 - field[:, None]) + high * field[:, None]) // 255
    # A slow change towards a third tint: no background is a plain repetition.
    veil = (smooth[:, None] * (octets[:, 3, None, None, None] % 128)) >> 8
    return ((mixed * (255 - veil) + far * veil) // 255).astype(np.int32)


def _blobs(lattice: np.ndarray, size: int) -> np.ndarray:
    """Values (n, g, g), 0..255, interpolated with flat spots at the lattice points: (n, size, size) int32."""
    g = lattice.shape[1]
    position = (np.arange(size) * 2 + 1) * (g - 1) * 128 // size  # in 1/256 of a cell
    cell, t = position >> 8, position & 255
    t = (t * t * (768 - 2 * t)) >> 16  # 3 t^2 - 2 t^3
    weights = np.zeros((size, g), np.float32)  # of 256: sums stay below 2**24
    weights[np.arange(size), cell] = 256 - t
    weights[np.arange(size), cell + 1] = t
    return (weights @ lattice.astype(np.float32) @ weights.T).astype(np.int32) >> 16


def lay(canvas: np.ndarray, masks: np.ndarray, item: dict[str, np.ndarray], garments: np.ndarray, size: int) -> None:
    """Lay one garment on each scene that has one in this layer; writes into canvas and masks."""
    rows = np.flatnonzero(item["present"])
    item = {key: value[rows] for key, value in item.items()}
    # Pixel centres relative to the garment's, turned and divided by its scale, in 1/2**14 of an enlarged pixel.
    axis = np.arange(size, dtype=np.int32) * 16 + 8
    dx = (axis - item["centre"][:, :1])[:, None, :]
    dy = (axis - item["centre"][:, 1:])[:, :, None]
    step = 2**14 * 28 * ZOOM // item["side"]
    cos, sin = ((table[item["turn"]] * step >> 14)[:, None, None] for table in (COS, SIN))
    mirror = (1 - 2 * item["flip"])[:, None, None]
    middle = (SIDE << 13) - 2**13
    column, row = (dx * cos + dy * sin) * mirror + middle, dy * cos - dx * sin + middle
    limit = (SIDE - 1 << 14) - 1  # what lies outside reads only the empty border: its first line, or wholly its last
    beyond_column, beyond_row = column > limit, row > limit
    column, row = column.clip(0, limit), row.clip(0, limit)
    base = (row >> 14) * SIDE + (column >> 14) + item["garment"][:, None, None] * (SIDE * SIDE)
    right = np.where(beyond_column, 16, column >> 10 & 15).astype(np.uint32)
    down = np.where(beyond_row, 16, row >> 10 & 15).astype(np.uint32)
    # Sixteenths squared: the weights sum to 256, so shade and coverage never run into one another.
    packed = (garments[base] * (16 - right) + garments[base + 1] * right) * (16 - down)
    packed += (garments[base + SIDE] * (16 - right) + garments[base + SIDE + 1] * right) * down
    coverage, shade = (packed >> 24).astype(np.int32), (packed >> 8 & 255).astype(np.int32)
    depth = item["depth"][:, None, None]
    shade = (depth * 255 + (256 - depth) * shade) >> 8
    cloth = item["light"].astype(np.int32)[:, :, None, None] * shade[:, None] // 255
    under = canvas[rows]
    canvas[rows] = under + (cloth - under) * coverage[:, None] // 255
    masks[rows] = np.where(coverage > 127, item["label"][:, None, None], masks[rows])
