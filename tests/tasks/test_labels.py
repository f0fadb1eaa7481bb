"""The task: recipes with the published numbers, real schemas, every method for some steps, no waiting on the host."""


import pytest
import torch

from repro.data import catalogue
from repro.data.augment import Views
from repro.experiment import Experiment, resolve
from repro.grid import PAPERS
from repro.methods.few_labels import METHODS
from repro.settings import SettingError
from repro.tasks import labels as task
from repro.tasks.monitors import predict
from repro.train import seed_everything, train
from tests.data.fixtures import small

ROWS = {"cifar10": (40, 20), "cifar100": (200, 100), "svhn": (40, 20)}
# Every method that a paper offers, with the first such paper; methods added later are covered by themselves.
OFFERED = {m: name for name, paper in reversed(PAPERS.items()) for m in paper.spec.methods if m in METHODS}
FAST = {"network": "wrn-10-1", "steps": 2, "batch": 4, "precision": "fp32"}


def settings_of(method, **changes):
    """Changes as overrides, with UPS's rounds cut to two."""
    rounds = {"rounds": 2} if hasattr(METHODS[method].Settings(), "rounds") else {}
    return tuple((changes | rounds).items())


def prepared(method, data="fashion", labels=100, scale="tiny", **changes):
    experiment = Experiment(OFFERED[method], method, data, labels, 0, scale, settings_of(method, **changes))
    recipe = resolve(experiment)
    seed_everything(0)
    return task.prepare(experiment, recipe, torch.device("cpu")), recipe


def views_of(run):
    """The views of a method, or of the method that it wraps."""
    return next(module for module in run.method.modules() if isinstance(module, Views))


# Recipes


# Running


CASES = [(method, data) for method in OFFERED for data in ROWS if data in PAPERS[OFFERED[method]].spec.data]


@pytest.mark.parametrize(("method", "data"), CASES)
def test_paper_recipes_train_on_data_in_the_hubs_schema(method, data, tmp_path, monkeypatch):
    rows, tests = ROWS[data]
    small(monkeypatch, tmp_path, data, train=rows, test=tests)
    run, recipe = prepared(method, data, rows // 2, "paper", **FAST)
    before = {name: p.detach().clone() for name, p in run.method.network.named_parameters()}
    network, history = train(
        run.method, run.pool, recipe, tmp_path / "run", seed=0, evaluate=run.evaluate, monitor=run.monitor,
        generators=run.generators,
    )  # fmt: skip
    moved = [name for name, p in run.method.network.named_parameters() if not torch.equal(p, before[name])]
    assert {"head.weight", "stem.weight"} <= {".".join(name.split(".")[-2:]) for name in moved}
    last = history.of("evaluation")[-1]
    assert last["step"] == sum(run.method.stages(2)) and 0 <= last["ema"]["error"] <= 1
    assert len(last["live"]["per_class_accuracy"]) == len(catalogue.SOURCES[data].classes)
    averaged, live = (predict(net, run.pool.images, views_of(run)) for net in (network, run.method.network))
    assert torch.equal(averaged, live) == (recipe.ema == 0)
    assert torch.equal(run.pool.labels >= 0, torch.zeros(rows, dtype=torch.bool).index_fill(0, run.pool.labelled, True))
    assert len(run.pool.labelled) == rows // 2 and len(run.pool.unlabelled) == rows
    quality = history.of("train")[-1]["pseudo"]
    assert all(0 <= kind["coverage"] <= 1 for kind in quality.values())


def test_the_published_network_trains_too(tmp_path, monkeypatch):
    small(monkeypatch, tmp_path, "cifar10", train=20, test=10)
    run, recipe = prepared(
        "commatch", "cifar10", 10, "paper", **FAST | {"network": "wrn-28-2", "batch": 2, "passes": 2}
    )
    assert sum(p.numel() for p in run.method.network.parameters()) == 1_467_610 + 16  # USB's stem has a bias
    _, history = train(
        run.method, run.pool, recipe, tmp_path / "run", seed=0, evaluate=run.evaluate, monitor=run.monitor
    )
    assert set(history.of("train")[-1]["terms"]) == {"supervised", "positive", "negative"}


def test_stl10_has_usbs_own_four_stage_network(tmp_path, monkeypatch):
    """Its blocks share the activated input, where the recipe's default would discard it."""
    small(monkeypatch, tmp_path, "stl10", train=20, test=10, unlabeled=5)
    run, _ = prepared("supervised", "stl10", 10, "paper")
    assert {block.transition for block in run.method.network.blocks} == {"separate", "shared"}
    assert (run.pool.labels >= 0).sum() == 10 and len(run.pool.unlabelled) == 25


@pytest.mark.parametrize("discard", [True, False])
def test_discard_bn_follows_the_variant_or_not(discard):
    run, _ = prepared("supervised", discard_bn=discard)
    assert ("discard" in {block.transition for block in run.method.network.blocks}) == discard


def test_preparing_twice_gives_the_same_weights_pool_and_draws():
    first, second = (prepared("fixmatch")[0] for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.method.state_dict().values(), second.method.state_dict().values(), strict=True)
    )
    assert torch.equal(first.pool.labelled, second.pool.labelled) and first.data_digest == second.data_digest
    views = [run.method.views.strong(run.pool.images[:4]) for run in (first, second)]
    assert torch.equal(*views)


def test_hidden_labels_reach_the_monitor_only():
    """No tensor that a method or its pool holds tells a hidden label."""
    run, _ = prepared("flexmatch")
    hidden = run.pool.labels < 0
    assert hidden.sum() == len(run.pool.labels) - 100 and (run.monitor.truth[hidden] >= 0).all()
    assert torch.equal(run.pool.labels[~hidden], run.monitor.truth[~hidden])
    for value in run.method.state_dict().values():
        if value.shape == run.pool.labels.shape:
            assert value.unique().numel() == 1


def test_outputs_are_what_figures_need(monkeypatch):
    monkeypatch.setattr(task, "SHOWN", 70)
    run, recipe = prepared("commatch")
    network = run.method.network.eval()
    kept = run.outputs(network)
    assert kept["test_logits"].shape == (2000, 10) and kept["pool_logits"].shape == (task.SHOWN, 10)
    assert kept["pool_passes"].shape == (task.SHOWN_PASSES, task.SHOWN, 10)
    assert torch.equal(kept["pool_truth"], run.monitor.truth[kept["pool_index"]])
    assert kept["pool_index"].unique().numel() == task.SHOWN
    assert run.evaluate(network)["error"] == pytest.approx(
        (kept["test_logits"].argmax(1) != kept["test_labels"]).double().mean().item()
    )
    assert "pool_passes" not in prepared("supervised")[0].outputs(network)


def test_labels_for_everything_leave_nothing_to_show(tmp_path, monkeypatch):
    small(monkeypatch, tmp_path, "cifar10", train=20, test=10)
    run, _ = prepared("commatch", "cifar10", 20, "tiny", holdout=0)
    kept = run.outputs(run.method.network)
    assert kept["pool_logits"].shape == (0, 10) and kept["pool_passes"].shape == (task.SHOWN_PASSES, 0, 10)
    assert kept["test_logits"].shape == (10, 10)


def test_held_out_labels_fit_the_temperature_and_nothing_else():
    run, recipe = prepared("fixmatch", holdout=2)
    kept = run.outputs(run.method.network)
    assert kept["holdout_labels"].bincount().tolist() == [2] * 10
    assert len(run.pool.unlabelled) == len(run.pool.labels) - 20 and len(run.pool.labelled) == 100
    assert set(kept["pool_index"].tolist()) <= set(run.pool.unlabelled.tolist())
    assert set(run.after(kept)) >= {"temperature", "scaled_nll", "scaled_ece_15"}
    assert prepared("fixmatch", holdout=0)[0].after({"test_logits": kept["test_logits"]}) == {}


def test_scaled_metrics_are_those_at_the_temperature_of_least_held_out_nll():
    torch.manual_seed(0)
    labels = torch.randint(4, (200,))
    logits = 6 * (torch.nn.functional.one_hot(labels, 4) + torch.randn(200, 4))
    names = ("holdout_logits", "test_logits"), ("holdout_labels", "test_labels")
    outputs = {
        name: part
        for key, x in zip(names, (logits, labels), strict=True)
        for name, part in zip(key, x.split(100), strict=True)
    }
    scaled = task.temperature_scaled(outputs)

    def nll(part, temperature):
        return torch.nn.functional.cross_entropy(
            outputs[f"{part}_logits"].double() / temperature, outputs[f"{part}_labels"]
        ).item()

    grid = [0.5 + 0.01 * i for i in range(1500)]
    best = min(grid, key=lambda temperature: nll("holdout", temperature))
    assert scaled["temperature"] == pytest.approx(best, abs=0.02) and 1 < best < 15
    assert scaled["scaled_nll"] == pytest.approx(nll("test", scaled["temperature"]), rel=1e-6)
    accuracy = (outputs["test_logits"].argmax(1) == outputs["test_labels"]).double().mean().item()
    assert scaled["scaled_accuracy"] == pytest.approx(accuracy)


def test_commatch_without_dropout_is_refused_before_training():
    with pytest.raises(SettingError, match="set dropout > 0"):
        prepared("commatch", dropout=0.0)


