"""Cost of a PCRE step over a plain CAM step at `mini`, and of masks and regions on the published grid.

    python tests/benchmarks/bench_pcre.py [--batch 16] [--scales 1,0.5,0.75,1.5] [--repeats 5] [--skip-grid]

A step is losses, backward and update on one batch of scenes, in each stage of training: warm-up, masks that learn,
masks that are also mixed into the CAM. All cases alternate in one process; the ratio to the plain step after the
warm-up, of the same batch and scales, is what counts. Goal at `mini`: at most 2 with masks. Processor seconds of one
thread, so that a busy machine disturbs less. The grid: 28 x 28 patches of width 768, 448 pixels, a batch of 4 with 3
classes an image.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from repro.methods.image_tags import METHODS
from repro.methods.image_tags import pcre as regions
from repro.methods.image_tags.pcre import RegionDecoder, refine_loss
from repro.models.vit import LAYOUTS
from repro.recipe import TagRecipe
from repro.tasks import tags as task
from repro.train import Items, Now, make_optimiser, seed_everything

STEPS, STAGES = 100, {"warm-up": 5, "masks learn": 25, "masks are mixed in": 60}
CASES = {
    "pcre, mini's choice (group, masks at scale 1)": {"resize": "group", "mask_scales": "1"},
    "pcre, group, masks at all scales": {"resize": "group"},
    "pcre, each, masks at all scales (as released)": {"resize": "each"},
}


def stepper(name: str, batch: int, scales: str, **changes) -> Callable[[int], None]:
    """A training step of a method at `mini`, as a function of the number of steps done out of `STEPS`."""
    recipe = TagRecipe(
        method=METHODS[name].Settings(**changes), network="vit-mini", weights="scratch", crop=64, images=48, tests=1,
        cam_scales=scales, precision="fp32",
    )  # fmt: skip
    seed_everything(0)
    experiment = SimpleNamespace(method=name, seed=0, data="scenes", labels=recipe.images)
    method = task.prepare(experiment, recipe, torch.device("cpu"))
    pool, method = method.pool, method.method.train()
    optimiser = make_optimiser("adamw", method.parameter_groups(0.01), 1e-4)
    index = torch.arange(batch)
    samples = {"tagged": Items(index, pool.images[index], pool.labels[index])}

    def step(done: int) -> None:
        torch.stack(list(method.losses(samples, Now(done, STEPS, 0, 0, None)).terms.values())).sum().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def seconds(call: Callable, *arguments: int) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


def steps(batch: int, scales: str, repeats: int) -> None:
    """Print the ratios by case and stage."""
    plain = stepper("plain", batch, scales)
    cases = {title: stepper("pcre", batch, scales, **changes) for title, changes in CASES.items()}
    print(f"mini, batch {batch}, scales {scales}, n = {repeats}, 1 thread, torch {torch.__version__}")
    for stage, done in STAGES.items():
        rows = []
        for repeat in range(repeats + 1):
            row = [seconds(plain, STEPS - 1), *(seconds(case, done) for case in cases.values())]
            if repeat:  # the first one warms up
                rows.append(row)
        print(f"{stage}: plain step {1000 * statistics.median(row[0] for row in rows):.0f} ms")
        for place, title in enumerate(cases, 1):
            ratios = [row[place] / row[0] for row in rows]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            taken = 1000 * statistics.median(row[place] for row in rows)
            print(f"  {title}: {taken:.0f} ms, ratio {statistics.median(ratios):.2f} ({spread})", flush=True)


def grid(repeats: int, batch: int = 4, classes: int = 20) -> None:
    """Print the time of each part on the published grid."""
    generator = torch.Generator().manual_seed(0)
    side, size = 28, (448, 448)
    encoder = SimpleNamespace(width=768, grid=side)
    decoder = RegionDecoder(encoder, LAYOUTS["vit_base_patch16_224"], classes)
    x = torch.randn(batch, 3, *size, generator=generator)
    patches = torch.randn(batch, side**2, 768, generator=generator)
    tags = torch.zeros(batch, classes)
    tags[:, :3] = 1
    labels = torch.randint(0, 4, (batch, *size), generator=generator)
    pairs = regions.shown_classes(tags, 3)
    # smooth discs round each patch in place of trained masks, so that masks overlap as masks of one object do
    near = regions.squared_distances((side, side), torch.device("cpu")).float()
    shift = torch.randn(batch, side**2, 1, 1, generator=generator)
    masks = (2 - near / 8 + shift).sigmoid()
    confidence = regions.joint_confidence(*torch.randn(2, batch, side**2, classes, generator=generator))
    masks.requires_grad_()

    def learn(resize: str) -> None:
        rules = regions.Expansion(resize=resize)
        found = regions.refined_regions(regions.gate(masks, 3.0), confidence, pairs, size, rules)
        refine_loss(found.masks, found.found, pairs, labels).backward()

    rank = regions.candidates(confidence, pairs)
    parts = {
        "decoder, forward": lambda: decoder(x, patches, (side, side)),
        "gate": lambda: regions.gate(masks, 3.0),
        "candidates": lambda: regions.candidates(confidence, pairs),
        "growth, 5 rounds": lambda: regions.grow(masks, rank),
        "regions and L_refine with backward, group": lambda: learn("group"),
        "regions and L_refine with backward, each": lambda: learn("each"),
    }
    print(f"grid {side} x {side}, D = 768, batch {batch}, 3 classes an image, {size[0]} px")
    for title, call in parts.items():
        with torch.set_grad_enabled(title.startswith("regions")):
            call()
            taken = [seconds(call) for _ in range(repeats)]
        middle, least, most = (1000 * f(taken) for f in (statistics.median, min, max))
        print(f"  {title}: {middle:.0f} ms ({least:.0f} to {most:.0f})", flush=True)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--scales", default="1,0.5,0.75,1.5")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--skip-grid", action="store_true")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    steps(chosen.batch, chosen.scales, chosen.repeats)
    if not chosen.skip_grid:
        grid(min(chosen.repeats, 3))


if __name__ == "__main__":
    main()
