import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch

from repro.data import catalogue
from repro.data.catalogue import SOURCES, DataError, digest_of, load
from tests.data.fixtures import (
    columns,
    features,
    pixels,
    png,
    python,
    shrink,
    small,
    write_hub_cache,
    write_parquet,
)

ROWS = {
    "cifar10": {"train": 20, "test": 10},
    "cifar100": {"train": 200, "test": 100},
    "svhn": {"train": 20, "test": 10},
    "svhn_extra": {"train": 20, "test": 10, "extra": 30},
    "stl10": {"train": 10, "test": 10, "unlabeled": 15},
}


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No environment, cache or earlier load of the machine decides a test."""
    monkeypatch.delenv("REPRO_DATA", raising=False)
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "ledger"))
    catalogue._load.cache_clear()
    yield
    catalogue._load.cache_clear()


def unreachable(*arguments, **options):
    raise ConnectionError("no route to host")


# Real schemas


@pytest.mark.parametrize("name", ROWS)
def test_local_parquet_in_the_hub_schema(name, monkeypatch, tmp_path):
    source = small(monkeypatch, tmp_path, name, **ROWS[name])
    order = {split: seed for seed, split in enumerate(ROWS[name])}
    for split, parts in source.parts.items():
        loaded = load(name, split)
        expected = np.concatenate([pixels(source, part.rows, order[part.hub]) for part in parts])
        assert (loaded.images.numpy() == expected).all() and loaded.images.is_contiguous()
        labels = [
            row % len(source.classes) if part.labelled else -1 for part in parts for row in range(part.rows)
        ]
        assert loaded.labels.tolist() == labels and loaded.labels.dtype == torch.int64
        assert (loaded.name, loaded.split, loaded.digest) == (
            name,
            split,
            digest_of(loaded.images, loaded.labels),
        )
        assert len(loaded.classes) == len(source.classes)
        assert load(name, split) is loaded


def test_the_data_name_their_classes(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "cifar100", test=100)
    assert "cra" in load("cifar100", "test").classes and "crab" in SOURCES["cifar100"].classes


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_saved_to_disk(name, monkeypatch, tmp_path):
    source = shrink(SOURCES[name], train=20, test=10)
    monkeypatch.setitem(SOURCES, name, source)
    parts = {
        split: datasets.Dataset.from_dict(columns(source, count), features=features(source))
        for split, count in (("train", 20), ("test", 10))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / source.folder)
    assert (load(name, "train", root=tmp_path).images.numpy() == pixels(source, 20)).all()
    assert len(load(name, "test", root=tmp_path)) == 10
    (tmp_path / source.folder / "test" / "data-00000-of-00001.arrow").write_bytes(b"torn")
    catalogue._load.cache_clear()
    with pytest.raises(DataError, match="cannot read the saved data set .*test"):
        load(name, "test", root=tmp_path)


def test_shards_are_joined_in_order_and_other_configurations_ignored(monkeypatch, tmp_path):
    source = shrink(SOURCES["svhn"], train=25)
    monkeypatch.setitem(SOURCES, "svhn", source)
    write_parquet(tmp_path, source, "train", columns(source, 25), shards=3)
    write_parquet(tmp_path, replace(source, include="full_numbers/*"), "train", columns(source, 10))
    assert (load("svhn", "train", root=tmp_path).images.numpy() == pixels(source, 25)).all()


def test_svhn_extra_reads_the_folder_of_svhn(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "svhn", train=20, test=10)
    small(monkeypatch, tmp_path, "svhn_extra", train=20, test=10, extra=30)
    assert [len(load(name, "train")) for name in ("svhn", "svhn_extra")] == [20, 50]
    assert torch.equal(load("svhn", "test").images, load("svhn_extra", "test").images)


def test_root_argument_goes_before_the_environment(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path / "environment", "cifar10", train=20)
    write_parquet(tmp_path / "argument", SOURCES["cifar10"], "train", columns(SOURCES["cifar10"], 20, seed=9))
    by_environment, by_argument = (
        load("cifar10", "train"),
        load("cifar10", "train", root=tmp_path / "argument"),
    )
    assert by_environment.digest != by_argument.digest


def test_hub_cache_offline(tmp_path):
    """A prepared cache is enough, in a process that must not use the network."""
    source = SOURCES["svhn"]
    write_hub_cache(tmp_path / "cache", source, "train", columns(source, 20))
    code = (
        "from tests.data.fixtures import shrink; from repro.data.catalogue import SOURCES, load;"
        "SOURCES['svhn'] = shrink(SOURCES['svhn'], train=20); print(load('svhn', 'train').digest)"
    )
    cache, home = str(tmp_path / "cache"), str(tmp_path / "home")
    digest = python(code, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=cache, HF_HOME=home)
    assert digest == digest_of(torch.from_numpy(pixels(source, 20)), torch.arange(20) % 10)
    assert "svhn/train" in json.loads((tmp_path / "ledger" / "digests.json").read_text())


# Failures: one clear error each


def test_unreachable_hub_says_where_it_looked_and_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as error:
        load("svhn", "train", root=tmp_path)
    command = "hf download ufldl-stanford/svhn --repo-type dataset --include 'cropped_digits/*' --local-dir "
    for part in ("svhn", f"{tmp_path}/svhn", "no route to host", f"{command}{tmp_path}/svhn", "REPRO_DATA="):
        assert part in str(error.value)
    with pytest.raises(DataError, match="REPRO_DATA is not set"):
        load("svhn", "train")


def test_local_folder_without_the_split_does_not_fall_back_to_the_hub(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "stl10", train=10)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"neither unlabeled-\*.parquet .* hf download jxie/stl10"):
        load("stl10", "unlabelled")


def test_missing_files_name_the_command_for_the_same_root(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "cifar100", test=100)
    with pytest.raises(DataError, match=f"--local-dir {tmp_path}/cifar100, then set REPRO_DATA={tmp_path}$"):
        load("cifar100", "train")
    monkeypatch.setattr(catalogue, "EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"neither train-\*.parquet .* comes with the package: restore"):
        load("fashion", "train")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(DataError, match="unknown data set 'cifar'; known: fashion, cifar10"):
        load("cifar", "train")
    with pytest.raises(DataError, match="cifar10 has no split 'extra'; it has: train, test"):
        load("cifar10", "extra")


def faulty(monkeypatch, tmp_path, change, schema=None):
    """Load 20 CIFAR-10 rows after `change(columns)`."""
    source = shrink(SOURCES["cifar10"], train=20)
    monkeypatch.setitem(SOURCES, "cifar10", source)
    content = columns(source, 20)
    change(content)
    write_parquet(tmp_path, source, "train", content, schema)
    return load("cifar10", "train", root=tmp_path)


def image_bytes(row: int, new):
    """A change that replaces the encoded image of one row; `new` may be a function of the old bytes."""

    def change(content):
        old = content["img"][row]["bytes"]
        content["img"][row] = {"bytes": new(old) if callable(new) else new, "path": None}

    return change


@pytest.mark.parametrize(
    "new",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:40],
        lambda data: data[:-20],
        lambda data: data[:60] + bytes(40) + data[100:],
        lambda data: data[:80] + bytes([data[80] ^ 4]) + data[81:],
        b"not an image",
        b"",
        None,
    ],
    ids=["half", "header", "tail", "zeroed", "bit", "text", "empty", "null"],
)
def test_corrupt_image_names_split_and_row(new, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="cifar10, split 'train' .*, row 13: corrupt image"):
        faulty(monkeypatch, tmp_path, image_bytes(13, new))


@pytest.mark.parametrize(
    ("shape", "found"), [((32, 32), "L 32 x 32"), ((32, 32, 4), "RGBA 32 x 32"), ((32, 28, 3), "RGB 28 x 32")]
)
def test_wrong_size_or_mode(shape, found, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=f"row 19: image is {found}, expected RGB 32 x 32"):
        faulty(monkeypatch, tmp_path, image_bytes(19, png(np.zeros(shape, np.uint8))))


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range(label, monkeypatch, tmp_path):
    schema = features(SOURCES["cifar10"]).arrow_schema
    with pytest.raises(DataError, match=f"row 7: label {label} is outside 0..9"):
        faulty(monkeypatch, tmp_path, lambda content: content["label"].__setitem__(7, label), schema)


def test_missing_label(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="1 rows of 'label' have no label"):
        faulty(monkeypatch, tmp_path, lambda content: content["label"].__setitem__(7, None))


def schema_of(**kinds):
    encoded = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.schema({"img": encoded, "label": pyarrow.int64()} | kinds)


def test_integer_labels_without_metadata_are_accepted(monkeypatch, tmp_path):
    loaded = faulty(monkeypatch, tmp_path, lambda content: None, schema_of(label=pyarrow.int8()))
    assert loaded.labels.dtype == torch.int64 and loaded.classes == SOURCES["cifar10"].classes


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        ("label", "label", pyarrow.string(), "label column 'label' must be integer, it is string"),
        ("label", "target", pyarrow.int64(), r"no label column 'label' among \['img', 'target'\]"),
        ("img", "image", schema_of().field("img").type, "column 'img' must hold encoded images.*'image'"),
        ("img", "img", pyarrow.binary(), "column 'img' must hold encoded images, .*'img': 'binary'"),
    ],
)
def test_wrong_schema(old, new, kind, message, monkeypatch, tmp_path):
    def change(content):
        values = content.pop(old)
        if kind == pyarrow.string():
            values = [str(value) for value in values]
        if kind == pyarrow.binary():
            values = [value["bytes"] for value in values]
        content[new] = values

    kinds = {"img": schema_of().field("img").type, "label": pyarrow.int64()}
    kinds.pop(old)
    with pytest.raises(DataError, match=message):
        faulty(monkeypatch, tmp_path, change, pyarrow.schema(kinds | {new: kind}))


def test_wrong_number_of_classes(monkeypatch, tmp_path):
    schema = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(num_classes=11)).arrow_schema
    with pytest.raises(DataError, match="11 class names, expected 10"):
        faulty(monkeypatch, tmp_path, lambda content: None, schema)


def test_row_count_and_damaged_file(monkeypatch, tmp_path):
    source = shrink(SOURCES["cifar10"], train=20)
    monkeypatch.setitem(SOURCES, "cifar10", source)
    first, second = write_parquet(tmp_path, source, "train", columns(source, 20), shards=2)
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"cannot read {second}"):
        load("cifar10", "train", root=tmp_path)
    second.unlink()
    with pytest.raises(DataError, match="'train' .* has 10 rows, expected 20"):
        load("cifar10", "train", root=tmp_path)


# Digests of data that were not known beforehand


def reload(name="cifar10", split="train"):
    catalogue._load.cache_clear()
    return load(name, split)


def test_first_digest_is_recorded_and_a_change_refused_until_accepted(monkeypatch, tmp_path):
    source = small(monkeypatch, tmp_path, "cifar10", train=20, test=10)
    ledger = tmp_path / "cifar10" / "plain_text" / "digests.json"
    before = load("cifar10", "train")
    load("cifar10", "test")
    recorded = json.loads(ledger.read_text())
    assert recorded["cifar10/train"] == before.digest and len(recorded) == 2
    assert reload().digest == before.digest
    write_parquet(tmp_path, source, "train", columns(source, 20, seed=5))
    with pytest.raises(DataError, match=f"cifar10/train differs.*{ledger}.*delete 'cifar10/train'"):
        reload()
    del recorded["cifar10/train"]
    ledger.write_text(json.dumps(recorded))
    assert reload().digest != before.digest
    assert list(ledger.parent.glob("digests.json.*")) == []


def test_digest_of_read_only_data_goes_to_the_cache_folder(monkeypatch, tmp_path):
    small(monkeypatch, tmp_path / "data", "cifar10", train=20)
    write = Path.write_text

    def guarded(path, *arguments, **options):
        if tmp_path / "data" in path.parents:
            raise PermissionError("read-only")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", guarded)
    digest = load("cifar10", "train").digest
    assert json.loads((tmp_path / "ledger" / "digests.json").read_text()) == {"cifar10/train": digest}
    monkeypatch.setattr(
        Path, "write_text", lambda *arguments, **options: (_ for _ in ()).throw(OSError("full"))
    )
    (tmp_path / "ledger" / "digests.json").unlink()
    with pytest.warns(UserWarning, match="could not be recorded: set REPRO_CACHE"):
        reload()


@pytest.mark.parametrize("content", ["{torn", "[]"])
def test_unreadable_ledger(content, monkeypatch, tmp_path):
    small(monkeypatch, tmp_path, "cifar10", train=20)
    (tmp_path / "cifar10" / "plain_text" / "digests.json").write_text(content)
    with pytest.raises(DataError, match="digests.json .*delete it"):
        load("cifar10", "train")


def test_digest_depends_on_shape_pixels_and_labels():
    images_, labels = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4), torch.tensor([0, 1])
    others = [(images_.view(2, 1, 4, 3), labels), (images_ + 1, labels), (images_, labels.flip(0))]
    digests = [digest_of(*pair) for pair in [(images_, labels), *others]]
    assert len(set(digests)) == 4
    strided = images_.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert digest_of(strided, labels) == digests[0]
