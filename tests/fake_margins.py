"""A fake CalibrateMix run with the margins that its figures and its explorer read."""

import torch

from repro.experiment import Experiment
from repro.files import save_state
from repro.runs import folder_of
from tests import fake_outputs

BASE = Experiment("calibratemix", "fixmatch", scale="tiny")
MIXED = Experiment("calibratemix", "calibratemix", scale="tiny", overrides={"base": "fixmatch"})
IMAGES, LABELLED = 300, 20


def write_pair(root, seed=0, accuracy=(0.2, 0.5)):
    """Runs of BASE and MIXED under a seed; returns what MIXED keeps."""
    write_run(root, BASE.with_(seed=seed), accuracy)
    return write_run(root, MIXED.with_(seed=seed), accuracy)


def write_run(root, experiment, accuracy=(0.2, 0.5)):
    """A run with held-out images and, of CalibrateMix, with margins of 300 images of which 20 are labelled."""
    kept = fake_outputs.write_run(root, experiment, accuracy, passes=False)
    generator = torch.Generator().manual_seed(7 + experiment.seed)
    kept["holdout_labels"] = torch.arange(10).repeat(3)
    kept["holdout_logits"] = torch.randn(30, 10, generator=generator) + torch.eye(10)[kept["holdout_labels"]]
    if experiment.method == "calibratemix":
        truth = torch.randint(10, (IMAGES,), generator=generator)
        places = torch.arange(IMAGES)
        aum = torch.where(places < LABELLED, torch.randn(IMAGES, generator=generator), torch.nan)
        apm = torch.where(places < 250, 3 * torch.randn(IMAGES, generator=generator), torch.nan)
        label = torch.where(torch.rand(IMAGES, generator=generator) < 0.7, truth, (truth + 1) % 10)
        kept |= {"aum": aum, "apm": apm, "pseudo_label": label.where(places < 250, -1)}
        kept |= {"labels": truth.where(places < LABELLED, -1), "truth": truth}
    save_state(folder_of(experiment, root) / "outputs.safetensors", kept)
    return kept
