"""Time of CSL's split of a batch by 2 x 2 Gram matrices over the singular value decomposition of each N x 2.

    python tests/benchmarks/bench_split.py [--repeats 30] [--device cpu]

Features are made beforehand. Every way gets confidence, residual and valid, and returns the clusters; all alternate in
one process, and their clusters must be equal. "as written" is an SVD an image and an argmax over |Y|; "compared" takes
|Y_1| > |Y_0| instead, as the argmax over two columns is slow on a CPU; "only" is the time of the SVD calls alone.
Goal: 20 times faster than the SVD as written, same clusters. The least times tell most on a machine that others use.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from repro.methods.few_masks.csl import confidence_features, separate

BATCH, CLASSES, SIZE = 8, 21, 321


def direct(confidence: Tensor, residual: Tensor, valid: Tensor, dtype: torch.dtype, compared: bool) -> Tensor:
    """Clusters (B, H, W) int64, an image at a time."""
    clusters = torch.zeros_like(valid, dtype=torch.int64)
    for c, r, inside, cluster in zip(confidence, residual, valid, clusters, strict=True):
        plane = torch.stack([c[inside], r[inside]], 1).to(dtype)
        size = torch.linalg.svd(plane, full_matrices=False).U.abs()
        cluster[inside] = (size[:, 1] > size[:, 0]).long() if compared else size.argmax(1)
    return clusters


def only(planes: list[Tensor]) -> None:
    """The decompositions without what is around them."""
    for plane in planes:
        torch.linalg.svd(plane, full_matrices=False)


def milliseconds(call: Callable, device: torch.device) -> float:
    """Of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    wait()
    started = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Check, measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--device", default="cpu")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    logits = 4 * torch.randn(BATCH, CLASSES, SIZE, SIZE, device=device)
    found = confidence_features(logits.softmax(1))
    valid = torch.ones_like(found.label, dtype=torch.bool)
    valid[:, SIZE - 40 :] = False  # padding, as a random crop of a scaled image has
    given = found.confidence, found.residual, valid
    ways = {"gram": partial(separate, *given)}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        planes = [torch.stack([c[v], r[v]], 1).to(dtype) for c, r, v in zip(*given, strict=True)]
        ways[f"svd {name}, as written"] = partial(direct, *given, dtype, compared=False)
        ways[f"svd {name}, compared"] = partial(direct, *given, dtype, compared=True)
        ways[f"svd {name}, only"] = partial(only, planes)
    expected = ways["gram"]()
    for name, way in ways.items():
        if name != "gram" and "only" not in name:
            differing = int((way() != expected).sum())
            if differing and "float64" in name:
                raise SystemExit(f"{name}: {differing} of {expected.numel()} clusters differ")
            print(f"{name}: {differing} of {expected.numel()} clusters differ")
    rounds = [{name: milliseconds(way, device) for name, way in ways.items()} for _ in range(chosen.repeats + 1)][1:]
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, 1 thread"
    )
    print(f"{BATCH} x {SIZE} x {SIZE}, K = {CLASSES}, n = {len(rounds)}, {hardware}, torch {torch.__version__}")
    least = min(row["gram"] for row in rounds)
    for name in ways:
        times = [row[name] for row in rounds]
        low, ratio, high = statistics.quantiles([row[name] / row["gram"] for row in rounds], n=4)
        print(
            f"{name:23s} median {statistics.median(times):6.2f} ms, least {min(times):6.2f} ms; over gram:"
            f" median {ratio:5.2f}, quartiles {low:.2f} and {high:.2f}, least over least {min(times) / least:.2f}"
        )


if __name__ == "__main__":
    main()
