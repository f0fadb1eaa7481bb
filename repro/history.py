"""The history of a run: one JSON object a line, appended while training, cut back when a run resumes."""

import json
from collections.abc import Iterator
from pathlib import Path

from repro.files import CorruptFile, write_text

FILE = "history.jsonl"


class History:
    """Rows of `history.jsonl` in a run folder.

    `kind` is `train` (means of loss terms, learning rate, pseudo-label quality, rate since the last row) or
    `evaluation` (metrics of the live and the EMA weights). Each row carries `step`, the steps done when it was made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / FILE
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
