"""Step time of the training loop over the bare forward, backward and update of the same tensors.

    python tests/benchmarks/bench_step.py [--method fixmatch] [--steps 30] [--repeats 5]

The loop's step includes sampling, augmentation, selection, EMA, history and monitors; the bare one gets the finished
float images. Blocks of both alternate in one process; the median ratio is what counts. Goal at `mini`: at most 1.25.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from repro import train as optimisation
from repro.experiment import Experiment, resolve
from repro.tasks import labels as tasks
from repro.train import seed_everything, train


def loop_seconds(experiment: Experiment, steps: int) -> float:
    """Seconds a step of `train`, with history but without evaluation or checkpoints."""
    recipe = resolve(experiment)
    seed_everything(0)
    task = tasks.prepare(experiment, recipe, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(
            task.method,
            task.pool,
            recipe,
            Path(folder),
            seed=0,
            evaluate=lambda net: {},
            monitor=task.monitor,
            generators=task.generators,
        )
        return (time.perf_counter() - started) / steps


def bare_seconds(experiment: Experiment, steps: int) -> float:
    """Seconds of forward, cross-entropy, backward and fused update on one fixed batch of the same size."""
    recipe = resolve(experiment)
    seed_everything(0)
    task = tasks.prepare(experiment, recipe, torch.device("cpu"))
    network, views, pool = task.method.network.train(), task.method.views, task.pool
    size = recipe.batch * recipe.unlabelled_ratio
    u, x = pool.images[:size], pool.images[: recipe.batch]
    images = torch.cat([views.weak(x), views.weak(u), views.strong(u)])
    target = torch.randint(0, 10, (len(images),))
    network.to(memory_format=torch.channels_last)
    groups = optimisation.parameter_groups(network, recipe.weight_decay)
    optimiser = optimisation.make_optimiser(recipe.optimiser, groups, recipe.lr, recipe.momentum, recipe.nesterov)
    started = time.perf_counter()
    for _ in range(steps):
        F.cross_entropy(network(images), target).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) / steps


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--method", default="fixmatch")
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    base = Experiment(method=chosen.method).with_(
        steps=chosen.steps, eval_every=10**6, checkpoint_every=10**6, log_every=20
    )
    pairs = []
    for repeat in range(chosen.repeats + 1):
        pair = loop_seconds(base, chosen.steps), bare_seconds(base, chosen.steps)
        if repeat:  # the first pair warms up
            pairs.append(pair)
    ratios = [loop / bare for loop, bare in pairs]
    loop, bare = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    blocks = f"n = {len(pairs)} pairs of {chosen.steps} steps"
    print(f"{chosen.method} at mini, {blocks}, 1 thread, torch {torch.__version__}")
    print(f"loop {loop:.1f} ms, bare {bare:.1f} ms a step")
    print(f"ratio loop / bare: median {statistics.median(ratios):.3f}, range {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
