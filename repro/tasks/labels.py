"""Semi-supervised classification as a task: data, network, views and method of an experiment, and what is measured."""

from pathlib import Path

import torch
from torch import Tensor, nn

from repro.data import catalogue, splits
from repro.data.augment import Views
from repro.measure.calibration import fit_temperature
from repro.methods.few_labels import METHODS
from repro.models.modes import stochastic_probs
from repro.models.wide_resnet import wide_resnet
from repro.recipe import Cell, LabelRecipe
from repro.tasks.monitors import PseudoLabelMonitor, measure, predict
from repro.train import Task

SHOWN = 1000  # unlabelled images whose predictions a run keeps for figures and the explorer
SHOWN_PASSES = 10


def prepare(experiment: Cell, recipe: LabelRecipe, device: torch.device, data_root: Path | None = None) -> Task:
    """Load the data, draw the labelled subset, build the seeded network and method. Raises DataError, SettingError."""
    source = catalogue.SOURCES[experiment.data]
    pool, truth = splits.open_pool(experiment.split, data_root)
    held = pool.labelled.new_empty(0)
    if recipe.holdout:
        pool, held = splits.holdout(pool, truth, recipe.holdout, experiment.seed)
    test = catalogue.load(experiment.data, "test", root=data_root)
    classes, channels = len(source.classes), source.shape[0]
    generator = torch.Generator(device).manual_seed(experiment.seed)
    views = Views(source.mean, source.std, recipe.flip, recipe.strong, recipe.padding, generator)
    torch.manual_seed(experiment.seed)
    discard_bn = None if recipe.discard_bn else False  # None: as the variant has it; USB's four stages do not discard
    network = wide_resnet(
        recipe.network, classes, channels, recipe.variant, recipe.dropout, discard_bn, recipe.bn_momentum
    )
    method = METHODS[experiment.method](recipe.method, network, views, classes, len(pool.labels)).to(device)
    pool, truth, test_images = pool.to(device), truth.to(device), test.images.to(device)
    hidden = pool.unlabelled[pool.labels[pool.unlabelled] < 0]
    shown = hidden[torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))[:SHOWN].to(device)]

    def evaluate(net: nn.Module) -> dict:
        return measure(predict(net, test_images, views), test.labels)

    def outputs(net: nn.Module) -> dict[str, Tensor]:
        """Arrays for figures: test logits, and predictions on `shown` pool images, with dropout passes if any."""
        kept = {
            "test_logits": predict(net, test_images, views),
            "test_labels": test.labels,
            "pool_index": shown,
            "pool_truth": truth[shown],
            "pool_logits": predict(net, pool.images[shown], views),
        }
        if records := method.keep():
            kept |= records | {"labels": pool.labels, "truth": truth}
        if len(held):
            kept |= {"holdout_logits": predict(net, pool.images[held.to(device)], views), "holdout_labels": truth[held]}
        if recipe.dropout > 0:
            kept["pool_passes"] = stochastic_probs(net, views.plain(pool.images[shown]), SHOWN_PASSES)
        return kept

    monitor, digest = PseudoLabelMonitor(truth), f"{pool.digest}+{test.digest}"
    return Task(method, pool, monitor, {"views": generator}, evaluate, outputs, temperature_scaled, digest)


def temperature_scaled(outputs: dict[str, Tensor]) -> dict:
    """Test metrics at the temperature fitted on the held-out labelled images, named `scaled_...`; {} without holdout.

    The held-out labels serve nothing else, but they are labels: scaled numbers use more supervision than unscaled ones.
    """
    if "holdout_logits" not in outputs:
        return {}
    temperature = fit_temperature(outputs["holdout_logits"].cpu(), outputs["holdout_labels"].cpu())
    scaled = measure(outputs["test_logits"] / temperature, outputs["test_labels"])
    return {"temperature": temperature} | {f"scaled_{name}": v for name, v in scaled.items() if isinstance(v, float)}
