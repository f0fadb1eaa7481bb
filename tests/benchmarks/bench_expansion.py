"""Seconds for stage A of the trust region: alpha-expansion of made-up images, and of Fashion scenes, by back end.

    python tests/benchmarks/bench_expansion.py [--back-end scipy] [--workers 2] [--scenes 1000] [--quick]
    python tests/benchmarks/bench_expansion.py --only-scenes      # the goal below

Sizes: 64 x 64 with 11 labels, 128 x 128 with 21, 375 x 500 with 4 and with 21; 8 neighbours, every label allowed, at
most 5 sweeps from all background, released lambda and gamma. Scenes: 64 x 64, 6 classes, labels of the scribbles only.
The network's output is made up: the mask, blurred, with smooth noise; a scribble is a lattice of pixels inside each
region, about 1 % of all. Goal: 1,000 scenes under a minute on 2 cores.
"""

import argparse
import platform
import statistics
import time

import numpy as np
import scipy
import torch
from scipy import ndimage

from repro.data.scenes import scenes
from repro.solvers.cuts import UNLABELLED, Problem, SolverSettings, solve_all, start_workers
from repro.solvers.potts import contrast_grid, problems

# height, width, labels, images in one process, images by all workers
SIZES = {
    "64x64x11": (64, 64, 11, 10, 20),
    "128x128x21": (128, 128, 21, 4, 8),
    "375x500x4": (375, 500, 4, 2, 4),
    "375x500x21": (375, 500, 21, 1, 2),
}


def regions(height: int, width: int, classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (3, H, W) of coloured, noisy regions of every class, and its mask."""
    fields = ndimage.gaussian_filter(rng.normal(size=(classes, height, width)), (0, height / 16, height / 16))
    mask = fields.argmax(0)
    colours = rng.uniform(0, 255, (classes, 3))[mask].transpose(2, 0, 1)
    return colours + rng.normal(0, 12, colours.shape), mask


def problem_of(name: str, image: np.ndarray, mask: np.ndarray, classes: int, rng: np.random.Generator) -> Problem:
    """Stage A of an image as an imperfect network would pose it."""
    logits = 4.0 * (mask == np.arange(classes)[:, None, None])
    logits += 12 * ndimage.gaussian_filter(rng.normal(size=logits.shape), (0, 3, 3))
    log_probs = torch.from_numpy(ndimage.gaussian_filter(logits, (0, 1.5, 1.5))).float().log_softmax(0)
    inside = ndimage.maximum_filter(mask, 7) == ndimage.minimum_filter(mask, 7)
    rows, columns = np.indices(mask.shape)
    drawn = inside & (rows % 8 == 4) & (columns % 8 < 2)
    scribbles = torch.from_numpy(np.where(drawn, mask, UNLABELLED).astype(np.uint8))
    pixels = torch.from_numpy(image).float()
    pixels = (pixels - pixels.mean((1, 2), keepdim=True)) / pixels.std((1, 2), keepdim=True)
    return problems(log_probs[None], contrast_grid(pixels[None]), scribbles[None], names=[name])[0]


def measure(made: list[Problem], settings: SolverSettings, pool) -> tuple[float, float, list]:
    """Wall seconds and processor seconds of this process for `solve_all`, and its solutions."""
    wall, busy = time.perf_counter(), time.process_time()
    solutions = solve_all(made, settings, pool)
    return time.perf_counter() - wall, time.process_time() - busy, solutions


def report(title: str, made: list[Problem], single: int, settings: SolverSettings, pool, workers: int) -> None:
    """Print the time of the first `single` problems here, one by one, and of all by the workers."""
    alone = [measure([problem], settings, None) for problem in made[:single]]
    walls, busy = [row[0] for row in alone], [row[1] for row in alone]
    together, _, solutions = measure(made, settings, pool)
    cuts = statistics.mean(solution.cuts for solution in solutions)
    print(
        f"{title}: one process {statistics.mean(walls):.3f} s an image (n = {single}, range {min(walls):.3f} to "
        f"{max(walls):.3f}; processor {statistics.mean(busy):.3f} s); {workers} workers {together:.1f} s for "
        f"{len(made)} images, {together / len(made):.3f} s an image; {cuts:.1f} cuts an image",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--back-end", default="scipy")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="small images and 100 scenes only")
    parser.add_argument("--only-scenes", action="store_true", help="no images of other sizes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{chosen.back_end}, numpy {np.__version__}, scipy {scipy.__version__}, {platform.machine()}, {cpu()}")
    with start_workers(chosen.workers) as pool:
        list(pool.map(abs, range(chosen.workers)))  # the workers have started
        count = 100 if chosen.quick else chosen.scenes
        data, rng = scenes("train", count), np.random.default_rng(0)
        rows = zip(data.images.numpy(), data.masks.numpy(), strict=True)
        made = [problem_of(f"scene {number}", image, mask, 6, rng) for number, (image, mask) in enumerate(rows)]
        settings = SolverSettings(back_end=chosen.back_end)
        report("scenes", made, min(100, count), settings, pool, chosen.workers)
        settings = SolverSettings(restricted=False, back_end=chosen.back_end)
        for title, (height, width, classes, single, count) in SIZES.items():
            if chosen.only_scenes or (chosen.quick and height > 200):
                continue
            rng = np.random.default_rng(0)
            made = [problem_of(title, *regions(height, width, classes, rng), classes, rng) for _ in range(count)]
            report(title, made, single, settings, pool, chosen.workers)


def cpu() -> str:
    """The processor's name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
