"""A ladder of speed for FixMatch with WRN-28-2, B = 64, mu = 7 (960 images a step), one change a rung.

    python tests/benchmarks/bench_gpu.py [--device cuda] [--steps 100] [--repeats 3] [--network wrn-28-2]

Rungs: fp32 eager with PIL-free host batches, channels_last, bf16, data and augmentation on the device, fused optimiser
and averaging EMA, compiled network, CUDA graph of the whole step. Each prints images per second (median of repeats) and
the loss after `steps` steps, whose curves must agree within the tolerance of the precision. Runs on a CPU too, slowly.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repro import train as optimisation
from repro.data.augment import Views
from repro.models.wide_resnet import wide_resnet

BATCH, RATIO, CLASSES = 64, 7, 10


@dataclass(frozen=True)
class Rung:
    """What is switched on; each rung of LADDER adds one thing to the one above."""

    name: str
    channels_last: bool = False
    bf16: bool = False
    on_device: bool = False
    fused: bool = False
    compiled: bool = False
    graph: bool = False


LADDER = (
    Rung("fp32 eager, batches augmented on the host"),
    Rung("+ channels_last", True),
    Rung("+ bf16 autocast", True, True),
    Rung("+ data and augmentation on the device", True, True, True),
    Rung("+ fused optimiser and foreach EMA", True, True, True, True),
    Rung("+ compiled network", True, True, True, True, True),
    Rung("+ CUDA graph of the whole step", True, True, True, True, False, True),
)


class Step:
    """One FixMatch step at a rung; `run` returns the loss as a device tensor."""

    def __init__(self, rung: Rung, device: torch.device, network: str, images: Tensor, labels: Tensor) -> None:
        self.rung, self.device = rung, device
        torch.manual_seed(0)
        self.network = wide_resnet(network, CLASSES, 3).to(device)
        if rung.channels_last:
            self.network.to(memory_format=torch.channels_last)
        home = device if rung.on_device else torch.device("cpu")
        self.images, self.labels = images.to(home), labels.to(home)
        self.generator = torch.Generator(home).manual_seed(0)
        self.views = Views((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), True, "randaugment-usb", 4, self.generator).to(home)
        groups = optimisation.parameter_groups(self.network, 5e-4)
        if rung.fused:
            self.optimiser = optimisation.make_optimiser("sgd", groups, 0.03)
        else:
            self.optimiser = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True, foreach=False)
        self.ema = optimisation.Ema(self.network, 0.999)
        if rung.compiled:
            self.network.compile(dynamic=False)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Normalised images of the three views and the labels of the first, on the compute device."""
        index = torch.randint(
            len(self.images), (BATCH * (1 + RATIO),), generator=self.generator, device=self.images.device
        )
        raw = self.images[index]
        x, u = raw[:BATCH], raw[BATCH:]
        views = torch.cat([self.views.weak(x), self.views.weak(u), self.views.strong(u)])
        labels = self.labels[index[:BATCH]]
        return views.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def update(self, views: Tensor, labels: Tensor) -> Tensor:
        """Forward, losses, backward, optimiser and EMA."""
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.rung.bf16 else contextlib.nullcontext()
        with autocast:
            logits = self.network(views)
        z_l, z_w, z_s = logits.float().split([BATCH, BATCH * RATIO, BATCH * RATIO])
        confidence, pseudo = z_w.detach().softmax(1).max(1)
        unlabelled = (F.cross_entropy(z_s, pseudo, reduction="none") * (confidence >= 0.95)).mean()
        loss = F.cross_entropy(z_l, labels) + unlabelled
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=not self.rung.graph)
        if self.rung.fused:
            self.ema.update()
        else:
            with torch.no_grad():
                for shadow, live in zip(self.ema.network.parameters(), self.network.parameters(), strict=True):
                    shadow.mul_(0.999).add_(live, alpha=0.001)
        return loss.detach()

    def run(self) -> Tensor:
        """One whole step."""
        return self.update(*self.batch())


def captured(step: Step) -> Callable[[], Tensor]:
    """The step as a CUDA graph replay: warmed up on a side stream, generator registered, one capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(step.generator)
    with torch.cuda.graph(graph):
        loss = step.run()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def measure(
    rung: Rung, device: torch.device, network: str, steps: int, repeats: int, data: tuple
) -> tuple[float, float]:
    """Images per second (median of `repeats` blocks of `steps`) and the mean loss of the last block."""
    step = Step(rung, device, network, *data)
    run = captured(step) if rung.graph else step.run
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for _ in range(5):
        run()
    rates = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for _ in range(steps):
            total += run()
        wait()
        rates.append(steps * BATCH * (1 + 2 * RATIO) / (time.perf_counter() - started))
    return statistics.median(rates), total.item() / steps


def main() -> None:
    """Climb and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--network", default="wrn-28-2")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    draws = torch.Generator().manual_seed(0)
    prototypes = torch.rand(CLASSES, 3, 8, 8, generator=draws)
    labels = torch.randint(CLASSES, (50000,), generator=draws)
    images = (
        F.interpolate(prototypes, 32, mode="bilinear")[labels] * 200
        + torch.rand(50000, 3, 32, 32, generator=draws) * 55
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{chosen.network}, 960 images a step, {name}, torch {torch.__version__}, "
        f"median of n = {chosen.repeats} blocks of {chosen.steps} steps"
    )
    first: float | None = None
    for rung in LADDER:
        if rung.graph and device.type != "cuda":
            print(f"{rung.name:45s} needs CUDA")
            continue
        rate, loss = measure(rung, device, chosen.network, chosen.steps, chosen.repeats, (images.byte(), labels))
        first = first or rate
        print(f"{rung.name:45s} {rate:10,.0f} images/s  x{rate / first:6.2f}  loss {loss:.4f}", flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
