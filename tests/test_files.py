"""Checkpoints: what comes back, what is refused, and what a failing write leaves behind."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from repro import files
from repro.files import CorruptFile, atomic_path, load_state, read_json, save_state, write_json, write_text


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


STATE = {
    "zero dimensions": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bool": torch.tensor([True, False]),
    "bf16": torch.tensor([[1.5, -0.0], [float("inf"), 2.0**-120]]).bfloat16(),
    "half": torch.tensor([6e-8]).half(),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "transposed": torch.arange(6).view(2, 3).T,
    "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "state": {0: {"step": torch.tensor(4.0), "lr": 0.1}, 1: {}},
    "text": "π",
    "plain": [None, True, 1, 2.5, 2**63, 1e-300, [], {}],
    "": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "1": torch.zeros(2), 1: torch.ones(2)},
}


def test_nested_state_comes_back_exactly(tmp_path):
    save_state(tmp_path / "state", STATE)
    assert same(load_state(tmp_path / "state"), STATE)


def test_nan_tensors_keep_their_bits(tmp_path):
    save_state(tmp_path / "state", {"x": torch.tensor([float("nan"), 1.0])})
    loaded = load_state(tmp_path / "state")["x"]
    assert torch.equal(loaded.view(torch.int32), torch.tensor([float("nan"), 1.0]).view(torch.int32))


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), trees, max_size=4))
def test_any_nesting_of_plain_values_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("plain") / "state"
    save_state(path, tree)
    assert same(load_state(path), tree)


def test_saving_copies_so_later_steps_cannot_reach_the_file(tmp_path):
    shared = torch.zeros(3)
    save_state(tmp_path / "state", {"a": shared, "b": shared, "part": shared[1:]})
    shared += 1
    assert same(load_state(tmp_path / "state"), {"a": torch.zeros(3), "b": torch.zeros(3), "part": torch.zeros(2)})


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimiser_continues_from_its_file(tmp_path, name):
    from repro.train import make_optimiser, parameter_groups

    def stepped(network, optimiser, steps):
        for _ in range(steps):
            optimiser.zero_grad()
            network(torch.ones(2, 4)).square().sum().backward()
            optimiser.step()

    first, second = (nn.Linear(4, 3) for _ in range(2))
    optimiser = make_optimiser(name, parameter_groups(first, 0.1), 0.05)
    stepped(first, optimiser, 3)
    save_state(tmp_path / "state", {"network": first.state_dict(), "optimiser": optimiser.state_dict()})
    saved = load_state(tmp_path / "state")
    second.load_state_dict(saved["network"])
    other = make_optimiser(name, parameter_groups(second, 0.1), 0.05)
    other.load_state_dict(saved["optimiser"])
    stepped(first, optimiser, 3)
    stepped(second, other, 3)
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure, call):
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    before = path.read_bytes()

    def fail(*_):
        raise failure

    monkeypatch.setattr(files.os, call, fail)
    message = (
        rf"cannot write {path} \(.*No space left on device\); free space" if isinstance(failure, OSError) else None
    )
    with pytest.raises(type(failure), match=message):
        write_json(path, {"new": 2})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["metrics.json"]


def test_a_body_that_fails_leaves_the_old_file_and_its_own_error(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"cannot write .*/file/run/metrics.json \(.*Not a directory.*name another folder"
    ):
        write_json(tmp_path / "file" / "run" / "metrics.json", {})


def test_a_disk_that_fills_while_tensors_are_written_is_named(tmp_path):
    """The real thing, in a process whose files may not grow: safetensors reports it in a class of its own."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = (
        "import sys, torch; from pathlib import Path; from repro.files import save_state\n"
        "path = Path(sys.argv[1]) / 'state'; save_state(path, {'x': torch.zeros(9)})\n"
        "try: save_state(path, {'x': torch.zeros(9_999)})\n"
        "except OSError as error: print(error, len(list(path.parent.iterdir())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], preexec_fn=limit, capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.stdout.startswith(f"cannot write {tmp_path}/state (") and done.stdout.rstrip().endswith(" 1"), done
    assert load_state(tmp_path / "state")["x"].shape == (9,)


def test_files_can_be_read_by_others(tmp_path):
    """safetensors and temporary files are private; a result on a shared disk must not be."""
    save_state(tmp_path / "a", {"x": torch.zeros(1)})
    write_text(tmp_path / "b", "")
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o644, 0o644]


@pytest.mark.parametrize("what", ["tensor", "plain value", "key", "dtype", "digest"])
def test_tampering_is_detected(tmp_path, what):
    path = tmp_path / "state"
    save_state(path, {"at": {"done": 4}, "x": torch.arange(4), "y": torch.zeros(2)})
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert same(load_state(path)["x"], torch.arange(4))
    key = next(key for key in tensors if key.endswith("/x"))
    if what == "tensor":
        tensors[key][2] = 7
    elif what == "plain value":
        metadata["skeleton"] = metadata["skeleton"].replace('{"value": 4}', '{"value": 5}')
        assert '{"value": 5}' in metadata["skeleton"]
    elif what == "key":
        tensors["other"] = tensors.pop(key)
    elif what == "dtype":
        tensors[key] = tensors[key].view(torch.float64)
    else:
        del metadata["digest"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CorruptFile, match=r"state does not match its own digest; delete it to start again"):
        load_state(path)


def test_any_cut_is_detected(tmp_path):
    path = tmp_path / "state"
    save_state(path, {"x": torch.arange(40)})
    data = path.read_bytes()
    for length in (0, 1, 8, 60, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=r"state cannot be read \(.*delete it"):
            load_state(path)


def test_safetensors_from_elsewhere_are_not_a_checkpoint(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "state")
    with pytest.raises(CorruptFile, match="digest"):
        load_state(tmp_path / "state")


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "deep" / "a.json"
    value = {"a": [1, 2.5, None, "é"], "b": {}}
    write_json(path, value)
    assert read_json(path) == value == json.loads(path.read_text("utf-8"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == value
    for bad in (b'{"a": 1', b"\xff\xfe"):
        path.write_bytes(bad)
        with pytest.raises(CorruptFile, match=r"a.json is not valid JSON .*delete its folder"):
            read_json(path)
