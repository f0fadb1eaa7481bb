import gzip
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from repro.data import catalogue, embed
from repro.data.catalogue import SOURCES, DataError, load
from tests.data.fixtures import python, shrink


@pytest.mark.parametrize(("split", "per_class"), [("train", 1200), ("test", 200)])
def test_embedded_is_stratified_and_equals_the_recorded_source_pixels(split, per_class):
    fashion = load("fashion", split)
    assert fashion.images.shape == (10 * per_class, 1, 28, 28) and fashion.images.dtype == torch.uint8
    assert fashion.labels.bincount().tolist() == [per_class] * 10
    # The catalogue's digest was taken from the official arrays, before any PNG was written.
    content = f"({10 * per_class}, 1, 28, 28)".encode() + bytes(fashion.images.numpy())
    content += fashion.labels.numpy().astype("<i8").tobytes()
    assert SOURCES["fashion"].digests[split] == fashion.digest == hashlib.sha256(content).hexdigest()
    index = embed.official_index(split)
    assert len(index) == len(fashion) and (index.diff() > 0).all()


def test_embedded_splits_are_disjoint_and_the_catalogue_has_their_statistics():
    train, test = load("fashion", "train"), load("fashion", "test")
    rows = {bytes(image) for image in train.images.numpy()}
    assert not any(bytes(image) in rows for image in test.images.numpy())
    scaled = train.images.double() / 255
    assert scaled.mean().item() == pytest.approx(SOURCES["fashion"].mean[0], abs=5e-5)
    assert scaled.std(correction=0).item() == pytest.approx(SOURCES["fashion"].std[0], abs=5e-5)


def test_embedded_files_are_small_and_carry_their_licence():
    sizes = [path.stat().st_size for path in catalogue.EMBEDDED.glob("*.parquet")]
    assert sum(sizes) < 8e6 and max(sizes) < 1.5e6
    notice = (catalogue.EMBEDDED / "LICENSE").read_text()
    assert "2017, Zalando SE" in notice and "Permission is hereby granted, free of charge" in notice


def test_embedded_needs_no_writable_home_and_imports_late():
    code = (
        "import sys; from repro.data.catalogue import load;"
        "assert not {'datasets', 'pyarrow'} & set(sys.modules);"
        "print(len(load('fashion', 'test')))"
    )
    assert python(code, HOME="/proc/none", HF_HOME="/proc/none", HF_HUB_OFFLINE="1") == "2000"


def test_altered_embedded_pixels_are_refused(monkeypatch):
    wrong = replace(SOURCES["fashion"], digests={"test": "0" * 64})
    monkeypatch.setitem(SOURCES, "fashion", wrong)
    with pytest.raises(DataError, match="not 0000.* the files were altered"):
        load("fashion", "test")


def official(folder: Path, monkeypatch, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """A small folder in the official format, with its checksums."""
    random = np.random.default_rng(1)
    labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
    content = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    raw = {
        "train-images-idx3-ubyte": struct.pack(">IIII", 2051, count, 28, 28) + content.tobytes(),
        "train-labels-idx1-ubyte": struct.pack(">II", 2049, count) + labels.tobytes(),
    }
    for name, data in raw.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        monkeypatch.setitem(embed.SHA256, name, hashlib.sha256(data).hexdigest())
    return content, labels


def test_embedding_is_reproducible_and_loads_as_the_official_rows(monkeypatch, tmp_path):
    content, labels = official(tmp_path, monkeypatch)
    source = shrink(SOURCES["fashion"], train=100)
    monkeypatch.setitem(SOURCES, "fashion", source)
    monkeypatch.setattr(embed, "SHARD_ROWS", 30)
    for target in ("one", "two"):
        embed.build(tmp_path, tmp_path / target, "train")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [f"train-0000{shard}-of-00004.parquet" for shard in range(4)]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    for module in (catalogue, embed):
        monkeypatch.setattr(module, "EMBEDDED", tmp_path / "one")
    index = embed.official_index("train").numpy()
    built = load("fashion", "train")
    assert (built.images[:, 0].numpy() == content[index]).all() and (
        built.labels.numpy() == labels[index]
    ).all()
    assert built.labels.bincount().tolist() == [10] * 10 and len(set(index)) == 100


def test_embedding_refuses_files_that_are_not_official(monkeypatch, tmp_path):
    official(tmp_path, monkeypatch)
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"something else")
    with pytest.raises(DataError, match="labels-idx1-ubyte.gz is not the official file"):
        embed.read_official(tmp_path, "train")
    with pytest.raises(DataError, match="cannot read .*t10k-images.* --source"):
        embed.read_official(tmp_path, "test")
