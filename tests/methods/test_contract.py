"""What every method of every paper owes the training loop: resume, gradients, precision, no host waits, settings."""

import dataclasses
import math
import os
import re
import signal

import pytest
import torch

from repro.data.augment import Views
from repro.experiment import Experiment
from repro.grid import PAPERS
from repro.settings import SettingError
from repro.train import CHECKPOINT, Ema, Interrupted, Items, Now, seed_everything, train
from tests.host_waits import NoWaiting

METHODS = {}
for name, paper in PAPERS.items():
    for method in paper.spec.methods:
        METHODS.setdefault((paper.spec.supervision.budget, method), (name, method))
METHODS = list(METHODS.values())
DISCARDED = re.compile(r"blocks\.[12]\.bn1\.")  # batch norms whose output the toolboxes' code throws away
TIMES = {"seconds", "samples_per_second"}
# Without these a term is off throughout a `tiny` run, or ends before parameters that only it reaches get a gradient.
EARLY = {"warm_up": 0.2}


def experiment(paper: str, method: str, **changes) -> Experiment:
    main = PAPERS[paper].main_experiments("tiny", (0,))[0]
    early = EARLY if paper == "pcre" else {}
    return Experiment(paper, method, main.data, main.labels, 0, "tiny", early | changes)


def prepared(item: Experiment):
    seed_everything(item.seed)
    task = PAPERS[item.paper].spec.supervision.task.prepare(item, item.recipe, torch.device("cpu"))
    if item.data == "fashion":  # UPS predicts all unlabelled images ten times a stage: 300 do here
        task = dataclasses.replace(task, pool=dataclasses.replace(task.pool, unlabelled=task.pool.unlabelled[:300]))
    return task


def trained(item: Experiment, folder, watch=lambda task: None, on_step=None):
    """A task, its averaged network, and its history without times."""
    task = prepared(item)
    watch(task)
    network, history = train(
        task.method, task.pool, item.recipe, folder, seed=0, evaluate=lambda net: {}, monitor=task.monitor,
        generators=task.generators, on_step=on_step,
    )  # fmt: skip
    return task, network, [{k: v for k, v in row.items() if k not in TIMES} for row in history.rows]


def step(task, item: Experiment, precision: str = "fp32"):
    """One late step, when all terms act, in training mode; the losses."""
    steps = task.method.stages(item.recipe.steps)
    pool, streams, batch = task.pool, task.method.streams(task.pool, item.recipe), {}
    generator = torch.Generator().manual_seed(0)
    for name, (indices, size) in streams.items():
        index = indices[torch.randint(len(indices), (size,), generator=generator)]
        take = getattr(pool, "take", None)
        batch[name] = take(index) if take else Items(index, pool.images[index], pool.labels[index])
    now = Now(steps[-1] - 1, steps[-1], 0, len(steps) - 1, Ema(task.method.network, 0.9).network)

    def losses():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            found = task.method.losses(batch, now)
        torch.stack([term.float() for term in found.terms.values()]).sum().backward()
        return found

    return losses


def opened(paper: str, method: str):
    """A method at the start of its last stage."""
    item = experiment(paper, method)
    task = prepared(item)
    task.method.begin_stage(len(task.method.stages(item.recipe.steps)) - 1, task.pool)
    task.method.begin_epoch(0, task.pool)
    task.method.train()
    return task, item


@pytest.mark.parametrize(("paper", "method"), METHODS)
def test_a_run_ends_with_the_same_bits_whether_or_not_it_was_stopped(paper, method, tmp_path):
    item, reached, names = experiment(paper, method), set(), set()

    def watch(task):
        for name, parameter in task.method.network.named_parameters():
            if not parameter.requires_grad or (DISCARDED.search(name) and getattr(item.recipe, "discard_bn", False)):
                continue
            names.add(name)
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: reached.add(name) if p.grad.any() else None
            )

    def stop(done: int, total: int, row: dict) -> None:
        if total // 2 < done < total and not stopped:
            stopped.append(done)
            os.kill(os.getpid(), signal.SIGTERM)

    stopped: list[int] = []
    task, network, rows = trained(item, tmp_path / "whole", watch)
    with pytest.raises(Interrupted):
        trained(item, tmp_path / "parts", on_step=stop)
    assert stopped and (tmp_path / "parts" / CHECKPOINT).exists()
    again, resumed, continued = trained(item, tmp_path / "parts")
    for left, right in ((network, resumed), (task.method, again.method)):
        one, other = left.state_dict(), right.state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert rows[-2] == continued[-2], "the last means of loss terms, and what was selected"
    assert all(math.isfinite(value) for row in rows if row["kind"] == "train" for value in row["terms"].values())
    assert names == reached, f"no gradient reached {sorted(names - reached)}"


# ADM solves the labels of each batch on the host, by its definition.
@pytest.mark.parametrize(("paper", "method"), [case for case in METHODS if case[1] != "adm"])
def test_no_step_waits_for_the_device(paper, method):
    task, item = opened(paper, method)
    for views in (module for module in task.method.modules() if isinstance(module, Views)):
        views.policy.dense = views.single.dense = True  # as on CUDA
    losses = step(task, item)
    with NoWaiting():
        found = losses()
        if task.monitor is not None:
            task.monitor.observe(found.pseudo)


@pytest.mark.parametrize(("paper", "method"), METHODS)
def test_bf16_reaches_every_parameter_that_fp32_reaches(paper, method):
    """Autocast keeps casts of weights: one kept by a pass without gradients must not serve a pass with them."""
    reached, terms = {}, {}
    for precision in ("fp32", "bf16"):
        task, item = opened(paper, method)
        terms[precision] = step(task, item, precision)().terms
        reached[precision] = {name for name, p in task.method.network.named_parameters()
                              if p.grad is not None and p.grad.any()}  # fmt: skip
        assert all(value.isfinite() for value in terms[precision].values())
    assert reached["bf16"] == reached["fp32"] and reached["fp32"] and list(terms["bf16"]) == list(terms["fp32"])


@pytest.mark.parametrize(("paper", "method"), METHODS)
def test_settings_outside_their_range_are_refused_by_name(paper, method):
    item = experiment(paper, method)
    fields = [*dataclasses.fields(item.recipe), *dataclasses.fields(item.recipe.method)]
    refused = 0
    for field in (field for field in fields if field.metadata):
        kind, rule = type(field.default), field.metadata
        wrong = {"no such choice"} if rule["choices"] and kind is str else set()
        wrong |= {kind(rule["low"] - 1)} if rule["low"] is not None else set()
        wrong |= {kind(rule["high"] + 1)} if rule["high"] is not None else set()
        for value in wrong:
            refused += 1
            with pytest.raises(SettingError, match=f"{field.name} is "):
                item.with_(**{field.name: value})
    assert refused > 10
    with pytest.raises(SettingError, match=f"unknown setting of {method} 'no_such_setting'"):
        item.with_(no_such_setting=1)


def test_the_check_of_waiting_notices():
    x = torch.arange(3.0)
    waits = (
        lambda: x.sum().item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x[0] > 1), lambda: x.tolist(),
        lambda: x.cpu(), lambda: x.numpy(), lambda: x.unique(), lambda: torch.bincount(x.long()),
    )  # fmt: skip
    for wait in waits:
        with pytest.raises(AssertionError, match="wait"), NoWaiting():
            wait()
    assert x.cpu().tolist() == [0, 1, 2]
