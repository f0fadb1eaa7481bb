"""The loop: resume, kill, stages, streams, interruption, non-finite losses, history."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repro.files import CorruptFile, History, load_state
from repro.train import (
    CHECKPOINT,
    MOMENTS,
    MOMENTS_KEPT,
    IndexStream,
    Interrupted,
    Losses,
    Method,
    NonFiniteLoss,
    hash_seed,
    seed_everything,
    train,
)


@dataclass(frozen=True)
class ToyRecipe:
    batch: int = 4
    unlabelled_ratio: int = 2
    steps: int = 12
    epoch_steps: int = 4
    optimiser: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-3
    schedule: str = "cosine-7/16"
    warmup_steps: int = 0
    ema: float = 0.9
    eval_every: int = 6
    log_every: int = 5
    checkpoint_every: int = 4
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False


class Toy(Method):
    """Dropout, batch norm, per-sample state, a private generator, epochs and stages: everything a resume can lose."""

    def __init__(self, pool_size: int, generator: torch.Generator, rounds: int = 1, bad_step: int = -1):
        super().__init__()
        self.network = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.generator, self.rounds, self.bad_step = generator, rounds, bad_step
        self.register_buffer("visits", torch.zeros(pool_size))
        self.register_buffer("epochs", torch.zeros(1))
        self.register_buffer("starts", torch.zeros(1))

    def stages(self, steps):
        return [steps] * self.rounds

    def begin_stage(self, stage, pool):
        self.starts += 1
        if stage:
            for parameter in self.network.parameters():
                nn.init.uniform_(parameter, -0.3, 0.3)

    def begin_epoch(self, epoch, pool):
        self.epochs += 1

    def losses(self, batch, now):
        x, u = batch["labelled"], batch["unlabelled"]
        noise = torch.randn(u.images.shape, generator=self.generator)
        self.visits.index_add_(0, u.index, torch.ones(len(u.index)))
        logits = self.network(x.images.float() / 255)
        consistency = F.mse_loss(self.network(u.images / 255 + noise), now.teacher(u.images / 255))
        terms = {"supervised": F.cross_entropy(logits, x.labels), "consistency": consistency}
        if now.step == self.bad_step:
            terms["consistency"] = terms["consistency"] * float("nan")
        return Losses(terms)


def make(tmp_path, name="run", rounds=1, bad_step=-1, **changes):
    seed_everything(3)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 2, 2), generator=draws, dtype=torch.uint8)
    labels = torch.full((30,), -1)
    labels[:6] = torch.tensor([0, 1, 2, 0, 1, 2])
    pool = SimpleNamespace(images=images, labels=labels, labelled=torch.arange(6), unlabelled=torch.arange(30))
    generator = torch.Generator().manual_seed(1)
    method = Toy(30, generator, rounds, bad_step)
    folder = tmp_path / name
    settings = {"seed": 3, "evaluate": lambda net: {"error": next(net.parameters()).sum().item()}}
    return method, pool, ToyRecipe(**changes), folder, settings | {"generators": {"views": generator}}


def run(tmp_path, name="run", stop_after=None, **options):
    """Train; `stop_after` sends this process SIGTERM when that many steps are done, as a scheduler would."""
    method, pool, recipe, folder, settings = make(tmp_path, name, **options)
    if stop_after is not None:
        original = method.losses

        def losses(batch, now):
            if now.stage * recipe.steps + now.step == stop_after - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(batch, now)

        method.losses = losses
    network, history = train(method, pool, recipe, folder, **settings)
    return method, network, history


def strip(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in rows]


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("stop_after", [1, 4, 7, 12])
def test_a_stopped_run_ends_bit_identical(tmp_path, stop_after, rounds):
    whole_method, whole, history = run(tmp_path, "whole", rounds=rounds)
    with pytest.raises(Interrupted, match=f"step {stop_after} of"):
        run(tmp_path, "cut", stop_after=stop_after, rounds=rounds)
    method, network, resumed = run(tmp_path, "cut", rounds=rounds)
    for key, value in whole_method.state_dict().items():
        assert torch.equal(value, method.state_dict()[key]), key
    for key, value in whole.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key
    assert strip(history.rows) == strip(resumed.rows)
    assert strip(History(tmp_path / "cut").rows) == strip(history.rows)


def test_stages_and_epochs_are_announced(tmp_path):
    method, _, history = run(tmp_path, rounds=3)
    assert method.starts.item() == 3 and method.epochs.item() == 9
    assert method.visits.sum().item() == 36 * 8
    assert [row["step"] for row in history.of("evaluation")] == [6, 12, 18, 24, 30, 36]


# Moments


def total(network):
    """What the test's moments hold: the sum of all parameters."""
    return {"sum": sum(p.detach().double().sum() for p in network.parameters())}


def run_with_moments(tmp_path, name="run", fail_at=None, moments=total, **options):
    """Train, keeping moments; `fail_at` raises in the middle of that step, without a checkpoint."""
    method, pool, recipe, folder, settings = make(tmp_path, name, **options)
    original = method.losses

    def losses(batch, now):
        if now.stage * recipe.steps + now.step == fail_at:
            raise RuntimeError("power cut")
        return original(batch, now)

    method.losses = losses
    train(method, pool, recipe, folder, moments=moments, **settings)
    return method, folder


def steps_kept(folder):
    return sorted(int(path.stem) for path in (folder / MOMENTS).iterdir())


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"steps": 12, "eval_every": 6}, [6, 12]),
        ({"steps": 12, "eval_every": 5}, [5, 10, 12]),  # and the end
        ({"steps": 12, "eval_every": 50}, [12]),
        ({"steps": 9, "eval_every": 1}, [*range(1, 10)]),  # fewer evaluations than are kept: all
        ({"steps": 12, "eval_every": 6, "rounds": 2}, [6, 12, 18, 24]),
        # more evaluations: the first at or after each tenth, 3.6, 7.2, 10.8, ...
        ({"steps": 36, "eval_every": 1}, [4, 8, 11, 15, 18, 22, 26, 29, 33, 36]),
        ({"steps": 18, "eval_every": 1, "rounds": 2}, [4, 8, 11, 15, 18, 22, 26, 29, 33, 36]),
        ({"steps": 35, "eval_every": 3}, [6, 9, 12, 15, 18, 21, 27, 30, 33, 35]),
    ],
    ids=str,
)
def test_moments_are_kept_at_evaluations_ten_at_most(tmp_path, options, kept):
    _, folder = run_with_moments(tmp_path, **options)
    assert steps_kept(folder) == kept and len(kept) <= MOMENTS_KEPT
    every, end = options["eval_every"], options["steps"] * options.get("rounds", 1)
    evaluations = [step for step in range(1, end + 1) if step % every == 0 or step == end]
    tenths = {next(step for step in evaluations if 10 * step >= k * end) for k in range(1, 11)}
    assert set(kept) == tenths


def test_a_moment_is_of_the_live_network_at_its_step(tmp_path):
    """The last moment sees the method's own network, neither the average nor another step's."""
    seen = []

    def moments(network):
        seen.append(network)
        return total(network)

    method, folder = run_with_moments(tmp_path, moments=moments, steps=6, eval_every=3)
    assert all(network is method.network for network in seen) and len(seen) == 2
    first, last = (load_state(folder / MOMENTS / f"{step}.safetensors") for step in (3, 6))
    assert torch.equal(last["sum"], total(method.network)["sum"]) and not torch.equal(first["sum"], last["sum"])


def test_without_moments_no_folder_is_made(tmp_path):
    run(tmp_path)
    assert not (tmp_path / "run" / MOMENTS).exists()


@pytest.mark.parametrize("fail_at", [2, 6, 7, 11])
def test_a_resumed_run_writes_the_same_moments_again(tmp_path, fail_at):
    """After 6 and 7 the moment of step 6 is newer than the checkpoint of step 4."""
    _, whole = run_with_moments(tmp_path, "whole", eval_every=2)
    with pytest.raises(RuntimeError, match="power cut"):
        run_with_moments(tmp_path, "cut", fail_at, eval_every=2)
    before = steps_kept(tmp_path / "cut")
    assert before == [step for step in (2, 4, 6, 8, 10, 12) if step <= fail_at]
    _, cut = run_with_moments(tmp_path, "cut", eval_every=2)
    names = [path.name for path in sorted((whole / MOMENTS).iterdir())]
    assert names == [path.name for path in sorted((cut / MOMENTS).iterdir())] and len(names) == 6
    for name in names:  # contents: the order of a file's metadata is not the same twice
        first, second = (load_state(folder / MOMENTS / name) for folder in (whole, cut))
        assert torch.equal(first["sum"], second["sum"]), name


def test_killed_between_checkpoints_repeats_only_the_steps_since(tmp_path):
    """SIGKILL leaves rows newer than the checkpoint; the resumed history holds each step once."""
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from tests.test_train import make
        from repro.train import train
        method, pool, recipe, folder, settings = make(Path(sys.argv[1]), "cut")
        original = method.losses
        def losses(batch, now):
            if now.step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(batch, now)
        method.losses = losses
        train(method, pool, recipe, folder, **settings)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert History(tmp_path / "cut").rows[-1]["step"] == 10
    _, whole, history = run(tmp_path, "whole")
    _, network, resumed = run(tmp_path, "cut")
    assert strip(history.rows) == strip(resumed.rows)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, network.state_dict()[key]), key


def test_rows_of_a_run_killed_before_its_first_checkpoint_are_dropped(tmp_path):
    (tmp_path / "run").mkdir()
    History(tmp_path / "run").append({"kind": "train", "step": 2})
    _, _, history = run(tmp_path)
    assert [row["step"] for row in history.of("train")] == [4, 5, 6, 8, 10, 12]


def test_non_finite_loss_names_step_and_terms_and_saves_nothing_after_it(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 6: non-finite consistency \(supervised = .*lower lr \(0.05\)"):
        run(tmp_path, bad_step=6)
    method, pool, recipe, folder, settings = make(tmp_path)
    train(method, pool, recipe, folder, **settings)
    assert all(torch.isfinite(p).all() for p in method.network.parameters())


def test_terms_are_means_over_the_interval(tmp_path):
    """log_every=1 rows average to the log_every=4 rows of an equal run."""
    _, _, fine = run(tmp_path, "fine", log_every=1)
    _, _, coarse = run(tmp_path, "coarse", log_every=4, eval_every=12)
    each = [row["terms"]["supervised"] for row in fine.of("train")]
    means = [sum(each[i : i + 4]) / 4 for i in (0, 4, 8)]
    assert [row["terms"]["supervised"] for row in coarse.of("train")] == pytest.approx(means, rel=1e-6)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after=5)
    path = tmp_path / "run" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[-9] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"checkpoint.safetensors does not match its own digest; delete it"):
        run(tmp_path)
    path.write_bytes(data[:100])
    with pytest.raises(CorruptFile, match=r"checkpoint.safetensors cannot be read"):
        run(tmp_path)


def test_sgd_cosine_and_ema_match_a_hand_written_loop(tmp_path):
    """A deterministic method against plain PyTorch: SGD with Nesterov, decay only on matrices, cosine, EMA."""
    method, pool, recipe, folder, settings = make(tmp_path)
    method.network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    method.losses = lambda batch, now: Losses(
        {"supervised": F.cross_entropy(method.network(batch["labelled"].images.float()), batch["labelled"].labels)}
    )
    weight, bias = (p.detach().clone().requires_grad_() for p in method.network[1].parameters())
    averages, velocity = [weight.detach().clone(), bias.detach().clone()], [0, 0]
    stream = IndexStream(pool.labelled, 4, seed=hash_seed(3, 0, "labelled"))
    network, _ = train(method, pool, recipe, folder, **settings)
    for step in range(12):
        index = stream.next()
        loss = F.cross_entropy(pool.images[index].float().flatten(1) @ weight.T + bias, pool.labels[index])
        gradients = torch.autograd.grad(loss, [weight, bias])
        lr = 0.05 * torch.cos(torch.tensor(7 * torch.pi * step / (16 * 12), dtype=torch.float64)).item()
        with torch.no_grad():
            for i, (p, g, decay) in enumerate(zip([weight, bias], gradients, [1e-3, 0], strict=True)):
                g = g + decay * p
                velocity[i] = 0.9 * velocity[i] + g
                p -= lr * (g + 0.9 * velocity[i])
                averages[i] = 0.9 * averages[i] + 0.1 * p
    assert torch.allclose(network[1].weight, averages[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(network[1].bias, averages[1], rtol=1e-4, atol=1e-5)


def test_index_stream_is_made_of_whole_permutations():
    stream = IndexStream(torch.arange(10, 17), batch=3, seed=0)
    drawn = torch.cat([stream.next() for _ in range(70)])
    for i in range(0, 210, 7):
        assert sorted(drawn[i : i + 7].tolist()) == list(range(10, 17))


def test_index_stream_larger_than_its_set_repeats_and_resumes():
    stream = IndexStream(torch.tensor([4, 9]), batch=5, seed=0)
    counts = torch.bincount(torch.cat([stream.next() for _ in range(2)]))
    assert counts[4] == counts[9] == 5
    other = IndexStream(torch.tensor([4, 9]), batch=5, seed=7)
    other.load_state_dict(stream.state_dict())
    assert all(torch.equal(stream.next(), other.next()) for _ in range(100))


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        IndexStream(torch.empty(0, dtype=torch.int64), 2, 0)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"compile": True}])
def test_bf16_and_compile_only_change_rounding(tmp_path, change):
    _, _, exact = run(tmp_path, "exact", log_every=1, steps=4)
    _, _, changed = run(tmp_path, "changed", log_every=1, steps=4, **change)
    for a, b in zip(exact.of("train"), changed.of("train"), strict=True):
        assert a["terms"]["supervised"] == pytest.approx(b["terms"]["supervised"], rel=0.03)
