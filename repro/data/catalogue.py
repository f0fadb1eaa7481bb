"""Small labelled image sets: the catalogue, loading through `datasets`, and digests.

    load("fashion", "train")                    # embedded in the package, no network
    load("cifar10", "test", root="~/data")      # ~/data/cifar10/: the hub's parquet files or `save_to_disk`
    load("svhn", "train")                       # $REPRO_DATA/svhn/ if it exists, else the hub or its cache

Everything that can go wrong (hub out of reach, wrong schema or row count, corrupt image, changed digest) is
one `DataError` that names the data set, the place and the fix. Embedded data have their digests in the
catalogue. For hub data none was known when it was written, so the first read is trusted and recorded in
`digests.json` (beside local data, else in $REPRO_CACHE, default ~/.cache/repro), and a change is refused.
"""

import functools
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Published data sets


@dataclass(frozen=True)
class Part:
    """One split on the hub: its name there, its row count, and whether its labels mean anything."""

    hub: str
    rows: int
    labelled: bool = True


@dataclass(frozen=True)
class Source:
    """A catalogue entry.

    hub, config: dataset id and configuration on the hub; hub None means embedded in this package
    folder: subfolder of `root` that holds a local copy
    image, label: column names
    parts: our split -> the hub splits it is made of, in order
    shape: (C, H, W)
    mean, std: per channel, of pixels in [0, 1]
    flip: whether a mirrored image keeps its label
    budgets: labelled set sizes that the papers use
    digests: split -> digest, where it is known beforehand
    include: what `hf download` has to fetch
    """

    name: str
    hub: str | None
    config: str | None
    folder: str
    image: str
    label: str
    parts: Mapping[str, tuple[Part, ...]] = field(hash=False)
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    budgets: tuple[int, ...]
    digests: Mapping[str, str] = field(default_factory=dict, hash=False)
    include: str = "*"

    def rows(self, split: str) -> int:
        """Number of images in one of our splits."""
        return sum(part.rows for part in self.parts[split])


def _of_255(*values: float) -> tuple[float, ...]:
    return tuple(value / 255 for value in values)


# fmt: off
_HUNDRED = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
    can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
    dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
    pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
    seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
    tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm""".split()
)

_FASHION = Source(
    name="fashion", hub=None, config=None, folder="fashion", image="image", label="label",
    parts={"train": (Part("train", 12_000),), "test": (Part("test", 2_000),)},
    classes=(
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
        "Ankle boot",
    ),
    shape=(1, 28, 28), mean=(0.2860,), std=(0.3528,),  # of the embedded train part
    flip=True, budgets=(40, 100, 250, 1000),
    digests={
        "train": "bc2e0b21f6dde6f9f12a1345ce7250fd301efe28caa6fc39cb2261a33bc77fc2",
        "test": "4560bbc91164fe565f09e70ea74817fcfcbee166930eb2601151e5420d48df14",
    },
)
# TorchSSL's mean and std. Others: USB takes ImageNet's (.485 .456 .406, .229 .224 .225), kekmodel
# .4914 .4822 .4465, .2471 .2435 .2616.
_CIFAR10 = Source(
    name="cifar10", hub="uoft-cs/cifar10", config="plain_text", folder="cifar10", image="img", label="label",
    parts={"train": (Part("train", 50_000),), "test": (Part("test", 10_000),)},
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    shape=(3, 32, 32), mean=_of_255(125.3, 123.0, 113.9), std=_of_255(63.0, 62.1, 66.7),
    flip=True, budgets=(40, 250, 4000), include="plain_text/*",
)
_CIFAR100 = replace(
    _CIFAR10, name="cifar100", hub="uoft-cs/cifar100", config="cifar100", folder="cifar100",
    label="fine_label", classes=_HUNDRED, mean=_of_255(129.3, 124.1, 112.4), std=_of_255(68.2, 65.4, 70.4),
    budgets=(400, 2500, 10_000), include="cifar100/*",
)
# TorchSSL's and USB's mean and std. Both also mirror digits; the FixMatch paper does not, and neither do we.
_SVHN = Source(
    name="svhn", hub="ufldl-stanford/svhn", config="cropped_digits", folder="svhn",
    image="image", label="label",
    parts={"train": (Part("train", 73_257),), "test": (Part("test", 26_032),)},
    classes=tuple("0123456789"),
    shape=(3, 32, 32), mean=(0.4380, 0.4440, 0.4730), std=(0.1751, 0.1771, 0.1744),
    flip=False, budgets=(40, 250, 1000), include="cropped_digits/*",
)
# What both toolboxes train on.
_SVHN_EXTRA = replace(
    _SVHN, name="svhn_extra", parts=_SVHN.parts | {"train": (Part("train", 73_257), Part("extra", 531_131))}
)
# Public code shows that this id has data/{train,test,unlabeled}-*.parquet and the columns image and label.
# Not verified: the order of the classes (names come from the data if they carry any) and what `label`
# holds for unlabeled (it is never read). Counts are those of the original release, mean and std TorchSSL's.
_STL10 = Source(
    name="stl10", hub="jxie/stl10", config=None, folder="stl10", image="image", label="label",
    parts={
        "train": (Part("train", 5_000),),
        "test": (Part("test", 8_000),),
        "unlabelled": (Part("unlabeled", 100_000, labelled=False),),
    },
    classes=("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
    shape=(3, 96, 96), mean=_of_255(112.4, 109.1, 98.6), std=_of_255(68.4, 66.6, 68.5),
    flip=True, budgets=(40, 250, 1000), include="data/*",
)
# fmt: on

SOURCES = {entry.name: entry for entry in (_FASHION, _CIFAR10, _CIFAR100, _SVHN, _SVHN_EXTRA, _STL10)}


# Loading


EMBEDDED = Path(__file__).parent / "embedded"
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels


class DataError(ValueError):
    """Data missing, unreadable or not what the catalogue says; the message names the place and the fix."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split in memory. Loaded sets are shared within the process: do not write into their tensors.

    name, split: str, as given to `load`
    images: (N, C, H, W) uint8 on the CPU
    labels: (N,) int64, -1 where the source has none
    classes: names, index = label
    digest: sha256 of shape, pixels and labels
    """

    name: str
    split: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str, split: str, root: str | os.PathLike | None = None) -> ImageSet:
    """One split of a catalogued data set as uint8 images, checked; a second call returns the same object.

    name: key of `SOURCES`
    split: "train", "test", and for stl10 "unlabelled"
    root: folder that may hold `<name>/`, default $REPRO_DATA; without it: the hub, offline its cache
    Raises DataError.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    if split not in source.parts:
        raise DataError(f"{name} has no split {split!r}; it has: {', '.join(source.parts)}")
    root = root or os.environ.get("REPRO_DATA")
    return _load(source, split, Path(root).expanduser().resolve() if root else None)


def digest_of(images: torch.Tensor, labels: torch.Tensor) -> str:
    """sha256 over the shape, the uint8 pixels and the labels as little-endian int64 (ours)."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.contiguous().numpy())
    digest.update(labels.numpy().astype("<i8"))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _load(source: Source, split: str, root: Path | None) -> ImageSet:
    folder = EMBEDDED if source.hub is None else _local_folder(source, root)
    rows = [_open(source, part, folder, root) for part in source.parts[split]]
    images = np.empty((sum(map(len, rows)), *source.shape), np.uint8)
    labels = np.full(len(images), -1, np.int64)
    classes, start = source.classes, 0
    for part, table in zip(source.parts[split], rows, strict=True):
        where = f"{source.name}, split {part.hub!r} ({folder or source.hub})"
        end = start + len(table)
        _decode(table, source, where, images[start:end])
        if part.labelled:
            classes = _read_labels(table, source, where, labels[start:end])
        start = end
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    digest = digest_of(images, labels)
    if split in source.digests:
        if digest != source.digests[split]:
            raise DataError(
                f"{source.name}/{split} in {folder} has digest {digest}, not {source.digests[split]} as "
                "in the catalogue: the files were altered; restore them from the repository"
            )
    else:
        _trust_first(f"{source.name}/{split}", digest, folder)
    return ImageSet(source.name, split, images, labels, classes, digest)


def _local_folder(source: Source, root: Path | None) -> Path | None:
    if root is None or not (root / source.folder).is_dir():
        return None
    folder = root / source.folder
    # A full copy of a hub repository may hold several configurations (svhn: also full_numbers).
    return folder / source.config if source.config and (folder / source.config).is_dir() else folder


def _open(source: Source, part: Part, folder: Path | None, root: Path | None):
    """The `datasets.Dataset` of one hub split, with the number of rows that the catalogue says."""
    if folder is None:
        rows = _from_hub(source, part, root)
    elif (folder / part.hub / "dataset_info.json").is_file():
        rows = _from_disk(folder / part.hub)
    else:
        rows = _from_parquet(source, part, folder, root)
    if len(rows) != part.rows:
        raise DataError(
            f"{source.name}, split {part.hub!r} ({folder or source.hub}) has {len(rows):,} rows, expected "
            f"{part.rows:,}: is a file missing or from another data set?"
        )
    return rows


def _from_parquet(source: Source, part: Part, folder: Path, root: Path | None):
    import datasets
    import pyarrow
    import pyarrow.parquet

    files = sorted(path for path in folder.rglob("*.parquet") if re.match(rf"{part.hub}[-.]", path.name))
    if not files:
        raise DataError(
            f"{source.name}: neither {part.hub}-*.parquet nor a saved data set {part.hub}/ in {folder}. "
            + _how_to_get(source, root)
        )
    tables = []
    for path in files:
        try:
            tables.append(pyarrow.parquet.read_table(path, partitioning=None))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{source.name}: cannot read {path} ({error}); fetch this file again") from error
    try:
        # Wrapping the table keeps it out of the arrow cache that `Dataset.from_parquet` would write.
        return datasets.Dataset(pyarrow.concat_tables(tables))
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{source.name}: the {part.hub} files below {folder} have different columns"
        ) from error


def _from_disk(folder: Path):
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # arrow, json and file errors alike mean that the copy is damaged
        raise DataError(f"cannot read the saved data set {folder} ({error}); save it again") from error


def _from_hub(source: Source, part: Part, root: Path | None):
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.config, split=part.hub)
    except Exception as error:  # the hub client raises the errors of several libraries
        looked = f"{root / source.folder}" if root else "no local folder (REPRO_DATA is not set)"
        raise DataError(
            f"{source.name}, split {part.hub!r} is not available. Looked in: {looked}; the cache "
            f"{datasets.config.HF_DATASETS_CACHE}; the hub, {source.hub} ({type(error).__name__}: {error}). "
            + _how_to_get(source, root)
        ) from error


def _how_to_get(source: Source, root: Path | None) -> str:
    if source.hub is None:
        return "It comes with the package: restore the files from the repository"
    root = root or Path("data")
    return (
        f"To get it: hf download {source.hub} --repo-type dataset --include '{source.include}' --local-dir "
        f"{root / source.folder}, then set REPRO_DATA={root}"
    )


def _decode(rows, source: Source, where: str, images: np.ndarray) -> None:
    """Fill `images` (n, C, H, W) from the encoded images of `rows`; a bad one is named by its row."""
    import pyarrow

    column = rows.data.schema.field(source.image).type if source.image in rows.column_names else None
    if column is None or not pyarrow.types.is_struct(column) or column.get_field_index("bytes") < 0:
        raise DataError(
            f"{where}: column {source.image!r} must hold encoded images, but the columns are "
            f"{dict(zip(rows.column_names, map(str, rows.data.schema.types), strict=True))}"
        )
    channels, height, width = source.shape
    row = 0
    for batch in rows.select_columns([source.image]).with_format("arrow").iter(1024):
        for encoded in batch[source.image].combine_chunks().field("bytes").to_pylist():
            try:
                pixels, found = _pixels(encoded)
            except Exception as error:  # Pillow raises many types for broken bytes; all of them mean this
                raise DataError(
                    f"{where}, row {row}: corrupt image ({error}); fetch the data again"
                ) from error
            if found != (MODES[channels], (width, height)):
                raise DataError(
                    f"{where}, row {row}: image is {found[0]} {found[1][0]} x {found[1][1]}, expected "
                    f"{MODES[channels]} {width} x {height}"
                )
            images[row] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
            row += 1


def _pixels(encoded: bytes) -> tuple[np.ndarray, tuple[str, tuple[int, int]]]:
    """Pixels (H, W) or (H, W, 3), and (mode, (width, height))."""
    # Decoding does not look at the checksums of a PNG, and a verified image cannot be decoded: open twice.
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        image.verify()
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        return np.asarray(image), (image.mode, image.size)


def _read_labels(rows, source: Source, where: str, labels: np.ndarray) -> tuple[str, ...]:
    """Fill `labels` (n,); returns the class names, the data's own if they have any."""
    import pyarrow

    classes = len(source.classes)
    if source.label not in rows.column_names:
        raise DataError(f"{where}: no label column {source.label!r} among {rows.column_names}")
    kind = rows.data.schema.field(source.label).type
    if not pyarrow.types.is_integer(kind):
        raise DataError(f"{where}: label column {source.label!r} must be integer, it is {kind}")
    column = rows.select_columns([source.label]).with_format("arrow")[:][source.label]
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} rows of {source.label!r} have no label")
    labels[:] = column.to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        row = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(f"{where}, row {row}: label {labels[row]} is outside 0..{classes - 1}")
    names = getattr(rows.features[source.label], "names", None)
    if names and len(names) != classes:
        raise DataError(f"{where}: {len(names)} class names, expected {classes}")
    return tuple(names or source.classes)


def _trust_first(key: str, digest: str, folder: Path | None) -> None:
    """Refuse a digest that differs from the recorded one, or record it."""
    cache = Path(os.environ.get("REPRO_CACHE") or "~/.cache/repro").expanduser()
    ledgers = [place / "digests.json" for place in (folder, cache) if place]
    for ledger in ledgers:
        recorded = _read_ledger(ledger)
        if key in recorded and recorded[key] != digest:
            raise DataError(
                f"{key} differs from what was read first: digest {digest}, {recorded[key]} in {ledger}. "
                f"If the change is meant, delete {key!r} from that file"
            )
        if key in recorded:
            return
    for ledger in ledgers:
        fresh = ledger.with_name(f"{ledger.name}.{os.getpid()}")
        try:
            ledger.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(
                json.dumps(_read_ledger(ledger) | {key: digest}, indent=1, sort_keys=True) + "\n"
            )
            fresh.replace(ledger)
            return
        except OSError:
            continue  # read-only data: the cache folder is next
    warnings.warn(
        f"the digest of {key} could not be recorded: set REPRO_CACHE to a writable folder", stacklevel=2
    )


def _read_ledger(ledger: Path) -> dict[str, str]:
    try:
        recorded = json.loads(ledger.read_text())
    except OSError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{ledger} is not readable JSON ({error}): delete it to record digests anew"
        ) from error
    if not isinstance(recorded, dict):
        raise DataError(f"{ledger} must hold a JSON object: delete it to record digests anew")
    return recorded
