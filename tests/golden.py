"""What a refactoring must not change: run ids of every planned run, and the bits that every method trains.

    python tests/golden.py ids                  compare run ids with tests/golden/run_ids.txt (also in `make test`)
    python tests/golden.py train OUT.json       train every method at `tiny`, resume one of each task; write digests
    python tests/golden.py same A.json B.json   compare two such files
    python tests/golden.py runs FOLDER OUT.json digests of the finished runs in a folder

Digests of trained weights hold for one kind of processor and one torch: compare two checkouts on one machine.
`tests/golden/tiny.json` names the processor that it was made on.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from repro import runs
from repro.batch import plan
from repro.experiment import Experiment, run_id
from repro.grid import PAPERS
from repro.recipe import SCALES

FOLDER = Path(__file__).parent / "golden"
SEEDS = range(5)
TIMES = ("seconds", "samples_per_second")


def planned_ids() -> str:
    """Run ids of all that tables, ablations, claims and the main job need, in the order of the plan."""
    return "".join(f"{run_id(item)}\n" for scale in SCALES for item in plan.select(scale=scale, seeds=SEEDS))


def methods() -> list[Experiment]:
    """Every method once, at `tiny`, by the first paper that has it."""
    found = {}
    for name, paper in PAPERS.items():
        labels = paper.main_experiments("tiny", (0,))[0]
        for method in paper.spec.methods:
            key = (paper.spec.supervision.budget, method)
            found.setdefault(key, Experiment(name, method, labels.data, labels.labels, 0, "tiny"))
    return list(found.values())


def digest(folder: Path) -> dict[str, str]:
    """Digests of a finished run's weights, outputs, moments, history and metrics, times and provenance left out."""
    arrays = sorted(folder.rglob("*.safetensors"))
    found = {str(path.relative_to(folder)): _arrays(load_file(path)) for path in arrays}
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    found["history"] = _text([{k: v for k, v in row.items() if k not in TIMES} for row in rows])
    metrics = json.loads((folder / "metrics.json").read_text())
    found["metrics"] = _text({k: v for k, v in metrics.items() if k not in ("cost", "provenance")})
    return found


def _arrays(state: dict[str, torch.Tensor]) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def _text(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def train() -> dict:
    """Digests of every method at `tiny`, and of one interrupted and resumed run of each task."""
    torch.set_num_threads(1)
    found = {"processor": runs._processor(), "torch": torch.__version__, "python": platform.python_version()}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        resumed = {PAPERS[item.paper].spec.supervision.budget: item for item in methods()}
        for item in methods():
            runs.execute(item, root, device="cpu")
            found[f"{item.paper} {item.method}"] = digest(runs.folder_of(item, root))
        for item in resumed.values():
            again = root / "resumed"
            try:
                runs.execute(item, again, device="cpu", on_step=_stop_after(item))
            except InterruptedError:
                runs.execute(item, again, device="cpu")
            if digest(runs.folder_of(item, again)) != found[f"{item.paper} {item.method}"]:
                raise SystemExit(f"{item}: a resumed run ends with other bits than an uninterrupted one")
    return found


def _stop_after(item: Experiment):
    def on_step(done: int, total: int, row: dict) -> None:
        if done > total // 2:
            raise InterruptedError

    return on_step


def main(arguments: list[str]) -> int:
    """Do what the module's text lists."""
    match arguments:
        case ["ids"]:
            return int(planned_ids() != (FOLDER / "run_ids.txt").read_text())
        case ["ids", "--write"]:
            (FOLDER / "run_ids.txt").write_text(planned_ids())
        case ["train", path]:
            Path(path).write_text(json.dumps(train(), indent=1) + "\n")
        case ["runs", folder, path]:
            folders = sorted(done.parent for done in Path(folder).glob("*/metrics.json"))
            Path(path).write_text(json.dumps({done.name: digest(done) for done in folders}, indent=1) + "\n")
        case ["same", one, other]:
            left, right = (json.loads(Path(path).read_text()) for path in (one, other))
            different = [key for key in left | right if left.get(key) != right.get(key)]
            print("\n".join(f"{key}: {left.get(key)} {right.get(key)}" for key in different) or "the same")
            return int(bool(different))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
