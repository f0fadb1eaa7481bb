"""Builds the embedded part of Fashion-MNIST from a folder of the official files:

    python -m repro.data.embed --source FOLDER

FOLDER holds the four `*-ubyte.gz` files, as the Debian package `dataset-fashion-mnist` installs them. The
choice is stratified and fixed; each row keeps its position in the official file, so the disjoint rest is
known. Pixels and labels do not depend on library versions; the bytes of the files may (zlib, zstd).
"""

import argparse
import gzip
import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repro.data.catalogue import EMBEDDED, SOURCES, DataError, digest_of
from repro.data.splits import FOR_EMBEDDING, balanced

SEED = 0
SHARD_ROWS = 2_400  # about 1.1 MB a file
PREFIX = {"train": "train", "test": "t10k"}
# Of the decompressed files: a repacked archive is as good.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def main(arguments: list[str] | None = None) -> None:
    """Build, and print what the catalogue entry must say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the official *-ubyte.gz files")
    parser.add_argument("--target", type=Path, default=EMBEDDED, help="folder for the parquet files")
    options = parser.parse_args(arguments)
    for split in PREFIX:
        images, labels = build(options.source, options.target, split)
        pixels = images.double() / 255
        mean, std = pixels.mean(), pixels.std(correction=0)
        print(f"{split}: digest {digest_of(images, labels)} mean {mean:.4f} std {std:.4f}")


def build(source: Path, target: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the shards of one split.

    source: folder of the official files
    target: folder for `<split>-*.parquet`; shards of that split already there are replaced
    split: "train" or "test"
    Returns the images (N, 1, 28, 28) uint8 and labels (N,) int64 that were written. Raises DataError.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    entry = SOURCES["fashion"]
    images, labels = read_official(source, split)
    index = balanced(labels, entry.rows(split) // len(entry.classes), len(entry.classes), SEED, FOR_EMBEDDING)
    images, labels = images[index], labels[index]
    encoded = [{"bytes": _png(image), "path": None} for image in images[:, 0].numpy()]
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(entry.classes)),
        index=datasets.Value("int32"),
    )
    columns = {"image": encoded, "label": labels.tolist(), "index": index.tolist()}
    table = pyarrow.Table.from_pydict(columns, schema=features.arrow_schema)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob(f"{split}-*.parquet"):
        old.unlink()
    shards = -(-len(table) // SHARD_ROWS)
    for shard in range(shards):
        # zstd folds away the header that all PNGs share.
        pyarrow.parquet.write_table(
            table.slice(shard * SHARD_ROWS, SHARD_ROWS),
            target / f"{split}-{shard:05d}-of-{shards:05d}.parquet",
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            write_statistics=False,
        )
    return images, labels


def read_official(source: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The official images (N, 1, 28, 28) uint8 and labels (N,) int64 of "train" or "test", checked."""
    contents = []
    for kind in ("images-idx3", "labels-idx1"):
        path = Path(source) / f"{PREFIX[split]}-{kind}-ubyte.gz"
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {path} ({error}): --source must hold the official files") from error
        if hashlib.sha256(content).hexdigest() != SHA256[path.stem]:
            raise DataError(f"{path} is not the official file: its content has another sha256")
        contents.append(content)
    count, height, width = struct.unpack(">III", contents[0][4:16])
    images = np.frombuffer(contents[0], np.uint8, offset=16).reshape(count, 1, height, width)
    labels = np.frombuffer(contents[1], np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def official_index(split: str) -> torch.Tensor:
    """Positions (N,) int64 of the embedded rows in the official file; all others are free for pretraining."""
    import pyarrow.parquet

    files = sorted(EMBEDDED.glob(f"{split}-*.parquet"))
    columns = [pyarrow.parquet.read_table(path, columns=["index"])["index"].to_numpy() for path in files]
    return torch.from_numpy(np.concatenate(columns).astype(np.int64))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Strategy 1 (zlib's Z_FILTERED) was the smallest of Pillow's settings on these images.
    Image.fromarray(image).save(buffer, "PNG", compress_level=9, compress_type=1)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
