"""Finished runs from scribbles that no training made: folders in the schema of `repro.runs`, alike on every machine.

Scenes of `fake_mask_runs`, and predictions that get better and smoother with the second stage and with the method
(partial_ce < dense_gd < grid_gd < adm < trust_region < robust_trust_region < full), so that curves part and figures
have something to show. Metrics are measured on them.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from repro.data.scribbles import reaches_of
from repro.experiment import Experiment, record
from repro.files import save_state, write_json
from repro.measure.segmentation import confusion, mean_iou, pixel_accuracy
from repro.runs import folder_of, load_metrics
from repro.solvers.potts import contrast_grid, potts_energy, relaxed_potts
from repro.tasks.monitors import REPORTING
from repro.train import MOMENTS
from tests.fake_mask_runs import CLASSES, measured, scenes, write_mask_folder
from tests.fake_tag_runs import noise

TEST, POOL = 12, 8
STEPS = tuple(range(100, 1001, 100))
START = 500  # steps of partial cross-entropy
LENGTHS = (0, 30, 50, 80, 100)
QUALITY = {"partial_ce": 1.4, "dense_gd": 1.6, "grid_gd": 1.7, "adm": 1.8, "trust_region": 1.9,
           "robust_trust_region": 2.1, "full": 2.6}  # fmt: skip
ROUGH = {"partial_ce": 1.0, "dense_gd": 0.8, "grid_gd": 0.7, "adm": 0.65, "trust_region": 0.5,
         "robust_trust_region": 0.45, "full": 0.5}  # fmt: skip
TERMS = {"dense_gd": ("seeds", "dense"), "grid_gd": ("seeds", "potts"), "full": ("masks",), "partial_ce": ("seeds",)}
WITH_PROPOSALS = ("trust_region", "robust_trust_region")


def write_scribble_run(experiment: Experiment, root: Path, figures: bool = True, **ema) -> Path:
    """A finished run in the folder that `runs` looks in; returns that folder.

    figures: False leaves arrays out. ema: metrics that are changed, in every evaluation (`miou=0.7`).
    """
    folder, (method, seed) = folder_of(experiment, root), (experiment.method, experiment.seed)
    write_mask_folder(folder, "supervised", seed, steps=(1,), saved=record(experiment), figures=False)
    test, pool = scenes(TEST, 0), scenes(POOL, 1000)
    reach = torch.from_numpy(reaches_of(pool[1].numpy()))
    scribbles = torch.where(reach <= experiment.labels / 100, pool[1], 255)
    rows, proposal = [], None
    for step in STEPS:
        stage = int(step > START)
        own = method if stage or method == "full" else "partial_ce"
        on_test, on_pool = (probabilities(truth, own, experiment.labels, seed, step) for _, truth in (test, pool))
        if stage and method in WITH_PROPOSALS and (step - START) % 200 == 100:
            sharper = probabilities(pool[1], own, 100, seed, step + 1).argmax(1).byte()
            proposal = torch.where(scribbles == 255, sharper, scribbles)
        names = TERMS.get(method, ("seeds", "proposals")) if stage or method == "full" else ("seeds",)
        terms = {name: round((1 + i) * (1.5 - step / STEPS[-1]) / 4, 4) for i, name in enumerate(names)}
        rate = {"lr": 0.01, "seconds": 3.0, "samples_per_second": 50.0}
        rows.append({"kind": "train", "step": step, "stage": stage, "terms": terms, "pseudo": {}} | rate)
        metrics = measured(on_test, test[1]) | energies(test[0], on_test) | quality(proposal, pool[1])
        rows.append({"kind": "evaluation", "step": step, "live": metrics, "ema": metrics | ema})
        if figures:
            moment = {"prediction": on_pool.argmax(1).byte()} | ({} if proposal is None else {"proposal": proposal})
            save_state(folder / MOMENTS / f"{step}.safetensors", moment)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures:
        confidence, prediction = on_test.max(1)
        outputs = {
            "test_images": test[0],
            "test_truth": test[1],
            "test_prediction": prediction.byte(),
            "test_confidence": confidence,
            "pool_index": torch.arange(POOL) * 3,
            "pool_images": pool[0],
            "pool_truth": pool[1],
            "pool_scribbles": scribbles,
            "pool_reach": reach.half(),
            "pool_log_probs": on_pool.log().half(),
            "pool_prediction": on_pool.argmax(1).byte(),
        }
        save_state(folder / "outputs.safetensors", outputs | ({} if proposal is None else {"pool_proposal": proposal}))
    last = {weights: rows[-1][weights] for weights in ("ema", "live")}
    best = {weights: last[weights] | {"selected_on_test": True} for weights in last}
    reported = {rule: best if rule == "best" else last for rule in REPORTING}
    write_json(folder / "metrics.json", load_metrics(folder) | {"reported": reported, "pseudo_labels": {}})
    return folder


def probabilities(truth: Tensor, method: str, length: int, seed: int, step: int) -> Tensor:
    """Softmax (n, K, H, W) of a network after `step` steps, worst at borders and with short scribbles."""
    labels = torch.where(truth == 255, 0, truth).long()
    blurred = F.avg_pool2d(F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float(), 5, 1, 2)
    rough = 3 * ROUGH[method] * noise(blurred.shape, method, seed, length, step, len(truth))
    known = (1.0 if method == "full" else 0.6 + 0.4 * length / 100) * (1 + 0.06 * seed)
    return (2.5 * (QUALITY[method] * known * (0.5 + step / STEPS[-1]) * blurred + rough)).softmax(1)


def energies(images: Tensor, probs: Tensor) -> dict[str, float]:
    """Mean Potts energy of the argmax and of its bilinear relaxation."""
    grid = contrast_grid(images.float())
    hard, soft = potts_energy(probs.argmax(1), grid), relaxed_potts(probs, grid)
    return {"potts_energy": float(hard.mean()), "potts_energy_soft": float(soft.mean())}


def quality(proposal: Tensor | None, truth: Tensor) -> dict[str, float | None]:
    """Accuracy and mIoU of proposals (P, H, W); None of a method that has none yet."""
    if proposal is None:
        return {"proposal_accuracy": None, "proposal_miou": None}
    counts = confusion(truth, proposal, CLASSES).sum(0)
    return {"proposal_accuracy": float(pixel_accuracy(counts)), "proposal_miou": float(mean_iou(counts))}


__all__ = ["LENGTHS", "POOL", "START", "STEPS", "TEST", "write_scribble_run"]
