"""Files of a run, whole or absent: atomic writes, training state in one safetensors file, the history.

A checkpoint holds every tensor of a nested state plus a JSON skeleton with the plain values, and a digest of both,
so that a truncated or altered file is named instead of loaded. No pickle is ever read.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CorruptFile(RuntimeError):
    """A file of a run that cannot be read as what it should be."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    Raises OSError naming the file when it cannot be written (full or read-only disk); `path` is then unchanged.
    """
    path, part = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        yield Path(part)
        with open(part, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors
        raise OSError(f"cannot write {path} ({error}); free space there, or name another folder") from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically (UTF-8)."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; raises CorruptFile with the path when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{path} is not valid JSON ({error}); delete its folder to run it again") from error


def save_state(path: Path, state: dict) -> None:
    """Save nested dicts and lists of tensors and plain JSON values as one safetensors file, atomically."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_flatten(state, "", tensors))
    metadata = {"skeleton": skeleton, "digest": _digest(tensors, skeleton)}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata=metadata)


def load_state(path: Path, device: torch.device | str = "cpu") -> dict:
    """Load what `save_state` wrote; raises CorruptFile with the path when it is truncated or altered."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{path} cannot be read ({error}); delete it to start again without it") from error
    if metadata.get("digest") != _digest(tensors, metadata.get("skeleton", "")):
        raise CorruptFile(f"{path} does not match its own digest; delete it to start again without it")
    return _restore(json.loads(metadata["skeleton"]), tensors, torch.device(device))


def _flatten(value: Any, key: str, tensors: dict) -> Any:
    if isinstance(value, torch.Tensor):
        key = f"{len(tensors)}{key}"  # keys 1 and "1", or "a/b" and a nested b, must not meet
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[k, _flatten(v, f"{key}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_flatten(v, f"{key}/{i}", tensors) for i, v in enumerate(value)]}
    return {"value": value}


def _restore(node: dict, tensors: dict, device: torch.device) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]].to(device)
    if "dict" in node:
        return {k: _restore(v, tensors, device) for k, v in node["dict"]}
    if "list" in node:
        return [_restore(v, tensors, device) for v in node["list"]]
    return node["value"]


def _digest(tensors: dict[str, torch.Tensor], skeleton: str) -> str:
    digest = hashlib.blake2b(skeleton.encode(), digest_size=16)
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


HISTORY = "history.jsonl"


class History:
    """Rows of `history.jsonl` in a run folder.

    `kind` is `train` (means of loss terms, learning rate, pseudo-label quality, rate since the last row) or
    `evaluation` (metrics of the live and the EMA weights). Each row carries `step`, the steps done when it was made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / HISTORY
        self.rows: list[dict] = list(_read(self.path)) if self.path.exists() else []

    def append(self, row: dict) -> None:
        """Append one row and flush it."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def truncate(self, step: int) -> None:
        """Drop rows made after `step`: those of the steps that a resumed run repeats."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def of(self, kind: str) -> list[dict]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]


def _read(path: Path) -> Iterator[dict]:
    """Rows of a history file. A last line cut short by a kill is dropped; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                return
            raise CorruptFile(f"{path}, line {number + 1}, is not JSON ({error})") from error
