"""Small data sets in the schemas of the hub, for tests that must not reach the network.

    small(monkeypatch, tmp_path, "cifar10", train=40, test=20)
    load("cifar10", "train")

writes 40 and 20 rows in CIFAR-10's schema below tmp_path, points REPRO_DATA there and adapts the catalogue.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from repro.data.catalogue import SOURCES, Part, Source


def features(source: Source) -> datasets.Features:
    """The columns that the hub has, in its order."""
    classes = list(source.classes)
    if source.name == "cifar100":
        classes[classes.index("crab")] = "cra"  # as on the hub
    columns = {source.image: datasets.Image(), source.label: datasets.ClassLabel(names=classes)}
    if source.name == "cifar100":
        columns["coarse_label"] = datasets.ClassLabel(num_classes=20)
    return datasets.Features(columns)


def png(pixels: np.ndarray) -> bytes:
    """pixels: (H, W) or (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(source: Source, count: int, seed: int = 0) -> np.ndarray:
    """(count, C, H, W) uint8 noise around a grey level that depends on the label (row modulo classes)."""
    level = np.arange(count) % len(source.classes) * 150 // len(source.classes)
    noise = np.random.default_rng(seed).integers(0, 100, (count, *source.shape))
    return (level[:, None, None, None] + noise).astype(np.uint8)


def columns(source: Source, count: int, seed: int = 0) -> dict[str, list]:
    """Column name -> values; change some to make a faulty data set."""
    images = pixels(source, count, seed).transpose(0, 2, 3, 1)
    images = images[..., 0] if source.shape[0] == 1 else images
    labels = [row % len(source.classes) for row in range(count)]
    content = {source.image: [{"bytes": png(image), "path": None} for image in images], source.label: labels}
    return content | ({"coarse_label": [0] * count} if source.name == "cifar100" else {})


def write_parquet(
    root: Path, source: Source, split: str, content: dict[str, list], schema=None, shards: int = 1
) -> list[Path]:
    """Write `content` as the hub's files of one of its splits below root/<folder>/, in its subfolder."""
    schema = schema or features(source).arrow_schema
    table = pyarrow.Table.from_pydict(content, schema=schema)
    folder = root / source.folder / source.include.removesuffix("*")
    folder.mkdir(parents=True, exist_ok=True)
    rows = -(-len(table) // shards)
    paths = [folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet" for shard in range(shards)]
    for shard, path in enumerate(paths):
        pyarrow.parquet.write_table(table.slice(shard * rows, rows), path)
    return paths


def write_hub_cache(cache: Path, source: Source, split: str, content: dict[str, list]) -> None:
    """What `load_dataset` leaves in $HF_DATASETS_CACHE, for a data set with this single split."""
    folder = cache / source.hub.replace("/", "___") / (source.config or "default") / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pydict(content, schema=features(source).arrow_schema)
    name = source.hub.split("/")[1]
    with pyarrow.ipc.new_stream(str(folder / f"{name}-{split}.arrow"), table.schema) as stream:
        stream.write_table(table)
    info = datasets.DatasetInfo(
        features=features(source), config_name=source.config or "default", dataset_name=name, version="0.0.0"
    )
    info.splits = {split: datasets.SplitInfo(split, num_examples=len(table), dataset_name=name)}
    info.write_to_directory(str(folder))
    assert json.loads((folder / "dataset_info.json").read_text())["config_name"] == (
        source.config or "default"
    )


def shrink(source: Source, **rows: int) -> Source:
    """The catalogue entry with other row counts (by the hub's split names), without known digests."""
    parts = {
        split: tuple(Part(part.hub, rows.get(part.hub, part.rows), part.labelled) for part in parts)
        for split, parts in source.parts.items()
    }
    return replace(source, parts=parts, digests={})


def small(monkeypatch: pytest.MonkeyPatch, root: Path, name: str, **rows: int) -> Source:
    """Write a small copy of a hub data set; catalogue and REPRO_DATA fit it until monkeypatch undoes them.

    rows: hub split -> number of rows: train=40, test=20; svhn_extra also has extra, stl10 unlabeled
    """
    source = shrink(SOURCES[name], **rows)
    for seed, (split, count) in enumerate(rows.items()):
        write_parquet(root, source, split, columns(source, count, seed))
    monkeypatch.setitem(SOURCES, name, source)
    monkeypatch.setenv("REPRO_DATA", str(root))
    return source


def python(code: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
