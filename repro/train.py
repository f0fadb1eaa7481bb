"""The one training loop.

`train` knows nothing of any method. A method is an `nn.Module` that owns its network(s) as `.network`, its state as
buffers (per-sample state is indexed by pool index) and turns a batch into named loss terms. Stages, dropout passes,
teachers and held-back batch-norm updates are the method's business; time, optimisation, measurement, checkpoints
and interruption are the loop's.
"""

import contextlib
import copy
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from repro.arrays import Items, PixelLabels, PseudoLabels
from repro.files import History, load_state, save_state

SCHEDULES = ("constant", "cosine-7/16", "poly-0.9", "warmup-poly-0.9")
OPTIMISERS = ("sgd", "adamw")
CHECKPOINT, MOMENTS = "checkpoint.safetensors", "moments"
MOMENTS_KEPT = 10


class NonFiniteLoss(FloatingPointError):
    """A loss term became NaN or infinite; names the step and the terms."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint."""


@dataclass(frozen=True)
class Now:
    """Where training stands, as plain numbers: step within the stage, its length, epoch, stage; and the EMA teacher."""

    step: int
    steps: int
    epoch: int
    stage: int
    teacher: nn.Module

    @property
    def progress(self) -> float:
        """Fraction of the stage done, in [0, 1)."""
        return self.step / self.steps


@dataclass(frozen=True)
class Losses:
    """Named loss terms, already weighted (the total is their sum), and the pseudo-labels behind them by kind."""

    terms: dict[str, Tensor]
    pseudo: dict[str, PseudoLabels] | dict[str, PixelLabels] = field(default_factory=dict)


class Method(nn.Module):
    """What the loop asks of a method; only `network` and `losses` must be supplied."""

    network: nn.Module

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        """Loss terms of one batch; called with autocast on, no host synchronisation inside."""
        raise TypeError(f"{type(self).__name__} does not define losses()")

    def stages(self, steps: int) -> list[int]:
        """Number of steps of each stage; optimiser, schedule and EMA start afresh with each. Default: one."""
        return [steps]

    def begin_stage(self, stage: int, pool: Any) -> None:
        """Called before a stage's first step (not when resuming inside it), e.g. to relabel the pool."""

    def begin_epoch(self, epoch: int, pool: Any) -> None:
        """Called at the start of every epoch of `epoch_steps` steps, e.g. to refresh proposals."""

    def streams(self, pool: Any, recipe: Any) -> dict[str, tuple[Tensor, int]]:
        """Pool indices and batch size of each stream of samples; must follow from the method's state alone."""
        return {
            "labelled": (pool.labelled, recipe.batch),
            "unlabelled": (pool.unlabelled, recipe.batch * recipe.unlabelled_ratio),
        }

    def keep(self) -> dict[str, Tensor]:
        """Records by pool index that figures draw from, saved with a finished run. Default: none."""
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups with `params`, `weight_decay`, `lr_factor`. Default: no decay on normalisation and biases."""
        return parameter_groups(self.network, weight_decay)


class Monitor(Protocol):
    """Measures pseudo-labels against hidden labels on the device; `read` copies to the host once and resets."""

    def observe(self, pseudo: dict) -> None: ...
    def read(self) -> dict[str, dict[str, float]]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> object: ...


@dataclass(frozen=True)
class Task:
    """Everything that one run needs, on its device.

    The loop's arguments, the arrays to keep at its end (`outputs` of the EMA network), and further metrics that follow
    from those arrays (`after`). weights: where pretrained weights come from, empty without them.
    """

    method: Method
    pool: Any
    monitor: Monitor
    generators: dict[str, torch.Generator]
    evaluate: Callable[[nn.Module], dict]
    outputs: Callable[[nn.Module], dict[str, Tensor]]
    after: Callable[[dict[str, Tensor]], dict]
    data_digest: str
    moments: Callable[[nn.Module], dict[str, Tensor]] | None = None
    weights: dict[str, str] = field(default_factory=dict)


class IndexStream:
    """An endless stream of indices: concatenated random permutations of `indices`, so a batch larger than the set
    holds duplicates (as in the public toolboxes). Lives on the device of `indices`; its state can be saved."""

    def __init__(self, indices: Tensor, batch: int, seed: int) -> None:
        if len(indices) == 0:
            raise ValueError("a stream needs at least one sample; the method selected none")
        self.indices, self.batch = indices, batch
        self.generator = torch.Generator(indices.device).manual_seed(seed)
        self.order = indices.new_empty(0)
        self.position = 0

    def next(self) -> Tensor:
        """The next batch of indices, (batch,)."""
        if self.position + self.batch > len(self.order):
            rest = self.order[self.position :]
            repeats = max(1, -(-32 * self.batch // len(self.indices)))
            permutations = [
                torch.randperm(len(self.indices), generator=self.generator, device=self.indices.device)
                for _ in range(repeats)
            ]
            self.order = torch.cat([rest, self.indices[torch.cat(permutations)]])
            self.position = 0
        self.position += self.batch
        return self.order[self.position - self.batch : self.position]

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.position = state["order"].to(self.indices.device), state["position"]
        self.generator.set_state(state["generator"].cpu())


def train(
    method: Method,
    pool: Any,
    recipe: Any,
    folder: Path,
    *,
    seed: int,
    evaluate: Callable[[nn.Module], dict],
    monitor: Monitor | None = None,
    generators: dict[str, torch.Generator] | None = None,
    moments: Callable[[nn.Module], dict[str, Tensor]] | None = None,
    on_step: Callable[[int, int, dict], None] | None = None,
) -> tuple[nn.Module, History]:
    """Train `method` on `pool` and return the EMA network and the history.

    method: moved to the pool's device by the caller; its buffers and `generators` are part of the checkpoint.
    pool: has `images` (or `take(index) -> Items`), `labels`, `labelled`, `unlabelled`.
    recipe: the fields of `experiment.Recipe` read here: steps, optimisation, measurement and execution.
    folder: the run folder; a checkpoint in it is continued, bit-identically on the CPU.
    evaluate: network -> metrics, called for live and EMA weights every `eval_every` steps and at the end.
    moments: network -> arrays that show how training went, of the live network, ten times at most; written to
        `moments/<step>.safetensors` at an evaluation.
    on_step: called as (steps done, steps in all, last row) whenever history is flushed.
    Raises NonFiniteLoss, Interrupted (after saving), CorruptFile (checkpoint).
    """
    loop = _Loop(method, pool, recipe, Path(folder), seed, evaluate, monitor, generators or {}, moments, on_step)
    with _stop_requests() as stop:
        loop.run(stop)
    return loop.ema.network, loop.history


class _Loop:
    """State of one call of `train`; methods below are its phases, in order."""

    def __init__(self, method, pool, recipe, folder, seed, evaluate, monitor, generators, moments, on_step) -> None:
        self.method, self.pool, self.recipe, self.folder = method, pool, recipe, folder
        self.seed, self.evaluate, self.monitor, self.on_step = seed, evaluate, monitor, on_step
        self.generators, self.moments = generators, moments
        self.stage_steps = method.stages(recipe.steps)
        self.total = sum(self.stage_steps)
        self.history = History(folder)
        self.done, self.stage, self.step = 0, 0, 0
        self.rows: list[tuple[int, tuple[str, ...], Tensor]] = []
        device = pool.labels.device
        # Without its cache of cast weights: one filled in a no-grad pass would cut the gradient of a later pass.
        self.autocast = torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False
        )
        if recipe.channels_last:
            method.network.to(memory_format=torch.channels_last)
        self.clock, self.clock_step = time.monotonic(), 0

    def run(self, stop: threading.Event) -> None:
        if (self.folder / CHECKPOINT).exists():
            self.resume()
        else:
            self.history.truncate(0)
            self.open_stage(fresh=True)
        while self.done < self.total:
            if self.step == self.stage_steps[self.stage]:
                self.stage, self.step = self.stage + 1, 0
                self.open_stage(fresh=True)
            self.one_step()
            stopping = stop.is_set()  # read once: a request during `after_step` is met after the next step
            self.after_step(stopping)
            if stopping:
                raise Interrupted(f"stopped at step {self.done} of {self.total}; run it again to continue")

    def open_stage(self, fresh: bool) -> None:
        recipe, method = self.recipe, self.method
        if fresh:
            method.begin_stage(self.stage, self.pool)
        method.train()
        groups = method.parameter_groups(recipe.weight_decay)
        self.optimiser = make_optimiser(recipe.optimiser, groups, recipe.lr, recipe.momentum, recipe.nesterov)
        self.ema = Ema(method.network, recipe.ema)
        if recipe.compile and method.network._compiled_call_impl is None:
            method.network.compile(dynamic=False)
        self.streams = {
            name: IndexStream(indices, batch, seed=hash_seed(self.seed, self.stage, name))
            for name, (indices, batch) in method.streams(self.pool, recipe).items()
        }

    def one_step(self) -> None:
        recipe, steps = self.recipe, self.stage_steps[self.stage]
        epoch, offset = divmod(self.step, recipe.epoch_steps)
        if offset == 0:
            self.method.begin_epoch(epoch, self.pool)
        batch = {name: self.take(stream.next()) for name, stream in self.streams.items()}
        now = Now(self.step, steps, epoch, self.stage, self.ema.network)
        with self.autocast:
            losses = self.method.losses(batch, now)
        values = list(losses.terms.values())
        loss = torch.stack([value.float() for value in values]).sum()
        loss.backward()
        factor = schedule_factor(recipe.schedule, self.step, steps, recipe.warmup_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.lr * factor * group["lr_factor"]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update()
        self.rows.append((self.done, tuple(losses.terms), torch.stack([v.detach().float() for v in values])))
        if self.monitor is not None and losses.pseudo:
            self.monitor.observe(losses.pseudo)
        self.step += 1
        self.done += 1

    def take(self, index: Tensor) -> Items:
        if hasattr(self.pool, "take"):
            return self.pool.take(index)
        return Items(index, self.pool.images[index], self.pool.labels[index])

    def after_step(self, stopping: bool) -> None:
        """Flush history, evaluate and save when due. Loss terms are checked first, so a checkpoint is finite."""
        recipe, last = self.recipe, self.done == self.total
        evaluating = last or self.done % recipe.eval_every == 0
        saving = last or self.done % recipe.checkpoint_every == 0
        if evaluating or saving or self.done % recipe.log_every == 0:
            self.flush()
        if evaluating:
            live = self.evaluate(self.method.network)
            if self.moments is not None and self.is_moment():
                save_state(self.folder / MOMENTS / f"{self.done}.safetensors", self.moments(self.method.network))
            self.method.train()
            ema = self.evaluate(self.ema.network) if recipe.ema else live
            self.history.append({"kind": "evaluation", "step": self.done, "live": live, "ema": ema})
            self.clock, self.clock_step = time.monotonic(), self.done
        if saving or stopping:
            self.save()

    def is_moment(self) -> bool:
        """Whether this evaluation is the first after a tenth of the steps, so that a run keeps ten moments at most."""
        before = max(0, self.done - self.recipe.eval_every)
        return self.done * MOMENTS_KEPT // self.total > before * MOMENTS_KEPT // self.total

    def terms_on_host(self) -> list[tuple[int, dict[str, float]]]:
        """The loss terms since the last flush, (step, terms) each, in one copy; raises NonFiniteLoss."""
        values = iter(torch.cat([row for _, _, row in self.rows]).tolist())
        rows = [(step, {name: next(values) for name in names}) for step, names, _ in self.rows]
        for step, terms in rows:
            bad = [name for name, value in terms.items() if not np.isfinite(value)]
            if bad:
                shown = ", ".join(f"{name} = {value}" for name, value in terms.items())
                raise NonFiniteLoss(
                    f"step {step}: non-finite {', '.join(bad)} ({shown}); lower lr ({self.recipe.lr}) or use "
                    f"precision=fp32. The last checkpoint is from before this step."
                )
        return rows

    def flush(self) -> None:
        """Append the means of the loss terms and the pseudo-label quality since the last flush to the history."""
        if not self.rows:
            return
        rows = [terms for _, terms in self.terms_on_host()]
        names = sorted({name for terms in rows for name in terms})
        elapsed = max(time.monotonic() - self.clock, 1e-9)
        images = sum(stream.batch for stream in self.streams.values())
        row = {
            "kind": "train",
            "step": self.done,
            "stage": self.stage,
            "lr": self.optimiser.param_groups[0]["lr"],
            "terms": {name: float(np.mean([t[name] for t in rows if name in t])) for name in names},
            "pseudo": self.monitor.read() if self.monitor is not None else {},
            "seconds": elapsed,
            "samples_per_second": (self.done - self.clock_step) * images / elapsed,
        }
        self.rows.clear()
        self.history.append(row)
        self.clock, self.clock_step = time.monotonic(), self.done
        if self.on_step is not None:
            self.on_step(self.done, self.total, row)

    def save(self) -> None:
        pending = self.terms_on_host() if self.rows else []
        save_state(
            self.folder / CHECKPOINT,
            {
                "at": {"done": self.done, "stage": self.stage, "step": self.step},
                "method": self.method.state_dict(),
                "ema": self.ema.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
                "random": random_states(self.generators),
                "pending": pending,
                "monitor": self.monitor.state_dict() if self.monitor is not None else {},
            },
        )
        self.clock, self.clock_step = time.monotonic(), self.done

    def resume(self) -> None:
        state = load_state(self.folder / CHECKPOINT)
        self.done, self.stage, self.step = (state["at"][key] for key in ("done", "stage", "step"))
        self.method.load_state_dict(state["method"])
        self.open_stage(fresh=False)
        self.ema.network.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
        restore_random_states(state["random"], self.generators)
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        for step, terms in state["pending"]:
            values = torch.tensor(list(terms.values()), device=self.pool.labels.device)
            self.rows.append((step, tuple(terms), values))
        self.history.truncate(self.done)
        self.clock_step = self.done


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn Ctrl-C and SIGTERM into an event while training; the former handlers come back afterwards."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in former:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# Optimisation


def schedule_factor(name: str, step: int, steps: int, warmup: int = 0) -> float:
    """Factor on the learning rate at `step` (0-based) of `steps`.

    name: `cosine-7/16` = max(0, cos(7 pi s / 16 S)) (FixMatch; .19509 at the end), `poly-0.9` = (1 - s/S)^.9
    (DeepLab), `warmup-poly-0.9` = linear from 0 over `warmup` steps, then poly (ViT segmentation), `constant`.
    """
    if name == "cosine-7/16":
        return max(0.0, math.cos(7 * math.pi * step / (16 * steps)))
    if name == "warmup-poly-0.9" and step < warmup:
        return (step + 1) / warmup
    if name in ("poly-0.9", "warmup-poly-0.9"):
        return (1 - step / steps) ** 0.9
    if name == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights decayed; biases and normalisation parameters (all of one dimension) not decayed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_factor": 1.0},
    ]


def make_optimiser(
    name: str, groups: list[dict], lr: float, momentum: float = 0.9, nesterov: bool = True
) -> torch.optim.Optimizer:
    """SGD (momentum, Nesterov) or AdamW over `groups`, each with its `lr_factor`; fused on CUDA, foreach elsewhere."""
    groups = [group for group in groups if group["params"]]
    on_cuda = groups[0]["params"][0].is_cuda
    speed = {"fused": True} if on_cuda else {"foreach": True}
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, **speed)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **speed)
    raise ValueError(f"unknown optimiser {name!r}; known: {', '.join(OPTIMISERS)}")


class Ema:
    """Exponential moving average of a network: parameters averaged, buffers (BN statistics) copied.

    theta' <- decay * theta' + (1 - decay) * theta after each step, without bias correction (FixMatch, TorchSSL, USB).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._pair(network)

    def _pair(self, network: nn.Module) -> None:
        self._shadow: list[Tensor] = list(self.network.parameters())
        self._live: list[Tensor] = list(network.parameters())
        self._shadow_buffers = list(self.network.buffers())
        self._live_buffers = list(network.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """One averaging step; no host synchronisation."""
        torch._foreach_lerp_(self._shadow, self._live, 1 - self.decay)
        if self._live_buffers:
            torch._foreach_copy_(self._shadow_buffers, self._live_buffers)


# Randomness: seeds of streams, and every random state that training draws from, for checkpoints


def hash_seed(seed: int, stage: int, name: str) -> int:
    """A seed for one stream, the same on every platform."""
    entropy = [seed, stage, *name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (third-party code may draw from it)
    random.seed(seed)


def random_states(generators: dict[str, torch.Generator]) -> dict:
    """Every random state that training can draw from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "name": name,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "generators": {key: generator.get_state() for key, generator in generators.items()},
    }


def restore_random_states(state: dict, generators: dict[str, torch.Generator]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    saved = state["numpy"]
    keys = saved["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((saved["name"], keys, saved["position"], saved["has_gauss"], saved["cached"]))  # noqa: NPY002
    saved = state["python"]
    random.setstate((saved["version"], tuple(saved["words"].tolist()), saved["gauss"]))
    for key, generator in generators.items():
        generator.set_state(state["generators"][key].cpu())
