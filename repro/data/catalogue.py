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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repro.data.sources import SOURCES, Part, Source

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
