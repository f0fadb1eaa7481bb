"""Fake runs with the history and the outputs that figures and explorers read, and the text of figures."""

import json

import matplotlib as mpl
import torch

from repro.files import save_state
from tests import fake_runs


def write_run(root, experiment, accuracy=(0.2, 0.5), coverage=(0.0, 0.25), passes=True):
    """A finished run with two training rows and two evaluations; returns its outputs."""
    final = {"error": 1 - accuracy[-1], "accuracy": accuracy[-1], "ece_15": 0.2, "nll": 0.2}
    folder = fake_runs.write_run(experiment, root, **final)
    rows = []
    for step, (right, covered) in enumerate(zip(accuracy, coverage, strict=True), start=1):
        quality = {"coverage": covered, "accuracy": 0.75, "confidence": 0.9, "ece": 0.15}
        if covered == 0:
            quality |= {"accuracy": None, "confidence": None, "ece": None}
        metrics = dict.fromkeys(("ece_15", "ece_10_left", "nll", "brier"), 0.1 * step)
        metrics |= {"accuracy": right, "error": 1 - right}
        terms = {"supervised": 2.0 / step, "positive": 0.5 * step}
        rows.append({"kind": "train", "step": 10 * step, "terms": terms, "pseudo": {"positive": quality}})
        rows.append({"kind": "evaluation", "step": 10 * step, "live": metrics, "ema": metrics})
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    generator = torch.Generator().manual_seed(experiment.seed)
    outputs = {
        "test_logits": 2 * torch.randn(60, 10, generator=generator),
        "test_labels": torch.randint(10, (60,), generator=generator),
        "pool_index": torch.arange(40),
        "pool_truth": torch.randint(-1, 10, (40,), generator=generator),
        "pool_logits": torch.randn(40, 10, generator=generator),
    }
    if passes:
        outputs["pool_passes"] = (2 * torch.randn(4, 40, 10, generator=generator)).softmax(dim=-1)
    save_state(folder / "outputs.safetensors", outputs)
    return outputs


def texts(figure):
    """Every text of a figure, axes and legends included."""
    return "\n".join(text.get_text() for text in figure.findobj(mpl.text.Text))
