"""Finished runs from few masks that no training made: folders in the schema of `repro.runs`, alike on every machine.

Scenes of rectangles and discs, and probabilities that sharpen with the steps and with the method (supervised <
fixmatch < unimatch < csl), so that curves rise and figures have something to show. Metrics are measured on them.
"""

import json
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from repro.experiment import Experiment, record
from repro.files import save_state, write_json
from repro.measure.segmentation import SegmentationSums
from repro.runs import folder_of
from repro.tasks.monitors import REPORTING
from repro.train import MOMENTS
from tests.fake_runs import finished

CLASSES = 6
SIZE = (32, 40)
TEST, POOL = 12, 8
STEPS = (100, 200, 300, 400)
EDGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
QUALITY = {"supervised": 1.0, "fixmatch": 1.3, "unimatch": 1.6, "csl": 1.9}
TERMS = {
    "supervised": ("supervised",),
    "fixmatch": ("supervised", "consistency"),
    "unimatch": ("supervised", "consistency", "consistency_2", "features"),
    "csl": ("supervised", "consistency", "masked", "features"),
}


def write_mask_run(experiment: Experiment, root: Path, live: dict | None = None, **changes) -> Path:
    """`write_mask_folder` in the folder that `runs` looks in."""
    fields = {"seed": experiment.seed, "labels": experiment.labels, "data": experiment.data}
    saved = record(experiment)
    folder = folder_of(experiment, root)
    return write_mask_folder(folder, experiment.method, **fields, saved=saved, live=live, **changes)


def write_mask_folder(
    folder: Path,
    method: str = "csl",
    seed: int = 0,
    labels: int = 20,
    data: str = "scenes",
    steps: tuple[int, ...] = STEPS,
    saved: dict | None = None,
    live: dict | None = None,
    figures: bool = True,
    **ema,
) -> Path:
    """Write `metrics.json`, `history.jsonl`, `outputs.safetensors` and the moments of a run; return its folder.

    saved: `record` of the experiment; by default one that names method, data, labels and seed with an empty recipe.
    live, ema: metrics that are changed, in every evaluation (`miou=0.7`). figures: False leaves arrays out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    test, pool = scenes(TEST, seed), scenes(POOL, seed + 1000)
    rows = []
    for step in steps:
        share = step / steps[-1]
        on_test, on_pool = (probabilities(truth, method, seed, share) for _, truth in (test, pool))
        pseudo = {} if method == "supervised" else {"pixels": pseudo_labels(on_pool, pool[1], method)}
        terms = {name: round((1 + i) * (1.5 - share) / 4, 4) for i, name in enumerate(TERMS[method])}
        rate = {"lr": 0.01 * (1 - 0.9 * share), "seconds": 3.0, "samples_per_second": 50.0}
        rows.append({"kind": "train", "step": step, "stage": 0, "terms": terms, "pseudo": pseudo} | rate)
        metrics = measured(on_test, test[1])
        by_weights = {"live": metrics | (live or {}), "ema": metrics | ema}
        rows.append({"kind": "evaluation", "step": step} | by_weights)
        if figures:
            save_state(folder / MOMENTS / f"{step}.safetensors", features(on_pool))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures:
        confidence, prediction = on_test.max(1)
        save_state(
            folder / "outputs.safetensors",
            {
                "test_images": test[0],
                "test_truth": test[1],
                "test_prediction": prediction.byte(),
                "test_confidence": confidence,
                "pool_index": torch.arange(POOL) * 3,
                "pool_images": pool[0],
                "pool_truth": pool[1],
            },
        )
    fields = {"paper": "csl", "method": method, "data": data, "labels": labels, "seed": seed, "scale": "mini"}
    last = {weights: rows[-1][weights] for weights in ("ema", "live")}
    best = {weights: last[weights] | {"selected_on_test": True} for weights in last}
    asked = saved or {"experiment": fields | {"overrides": {}}, "recipe": {"steps": steps[-1]}}
    metrics = asked | finished(folder) | {
        "reported": {rule: best if rule == "best" else last for rule in REPORTING},
        "pseudo_labels": rows[-2]["pseudo"],
    }
    write_json(folder / "metrics.json", metrics)
    return folder


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, H, W) uint8 and truth (n, H, W) uint8: a rectangle and a disc on noise, 255 on a column at the
    right edge."""
    dice = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in SIZE), indexing="ij")
    truth = torch.zeros(count, *SIZE, dtype=torch.uint8)
    for index in range(count):
        top, left = (int(torch.randint(2, side // 2, (), generator=dice)) for side in SIZE)
        kinds = 1 + torch.randperm(CLASSES - 1, generator=dice)[:2]
        truth[index, top : top + SIZE[0] // 3, left : left + SIZE[1] // 3] = kinds[0].byte()
        row, column = (int(torch.randint(side // 4, 3 * side // 4, (), generator=dice)) for side in SIZE)
        truth[index][(rows - row) ** 2 + (columns - column) ** 2 < 36] = kinds[1].byte()
    palette = torch.randint(40, 215, (CLASSES, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-30, 30, (count, 3, *SIZE), generator=dice)
    images = (palette[truth.long()].permute(0, 3, 1, 2) + noise).byte()
    truth[..., -1] = 255
    return images, truth


def probabilities(truth: Tensor, method: str, seed: int, share: float) -> Tensor:
    """Softmax (n, K, H, W) of a network that has done `share` of its steps: overconfident, and worst at borders."""
    dice = torch.Generator().manual_seed(zlib.crc32(f"{method}.{seed}.{share}.{len(truth)}".encode()))
    labels = torch.where(truth == 255, 0, truth).long()
    blurred = F.avg_pool2d(F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float(), 5, 1, 2)
    noise = F.avg_pool2d(torch.randn(blurred.shape, generator=dice), 3, 1, 1) * 3
    return (2.5 * (QUALITY[method] * (0.5 + share) * blurred + noise)).softmax(1)


def features(probs: Tensor) -> dict[str, Tensor]:
    """Confidence, residual variance (released form) and label of probabilities (n, K, H, W)."""
    confidence, label = probs.max(1)
    rest = (1 - confidence) / (CLASSES - 1)
    others = probs.scatter(1, label[:, None], 0.0)
    residual = (others - rest[:, None]).square().sum(1) / (CLASSES - 1)
    return {"confidence": confidence, "residual": residual, "label": label.byte()}


def pseudo_labels(probs: Tensor, truth: Tensor, method: str) -> dict:
    """What a history keeps of pseudo-labels of pixels, threshold .95 but for CSL, whose soft weight is faked."""
    confidence, label = probs.max(1)
    weight = (confidence > 0.95).float()
    if method == "csl":
        below = (confidence.mean((1, 2), keepdim=True) - confidence).clamp(min=0) / confidence.std()
        weight = torch.exp(-below.square() / 8)
    seen = truth != 255
    confidence, weight, right = confidence[seen], weight[seen], (label == truth)[seen].float()
    edges = torch.tensor(EDGES)
    of = torch.bucketize(confidence, edges[1:-1])  # right-closed
    parts = [of == index for index in range(len(edges) - 1)]

    def mean(values: Tensor, weights: Tensor) -> float | None:
        return float((values * weights).sum() / weights.sum()) if weights.sum() > 0 else None

    accuracy, stated = mean(right, weight), mean(confidence, weight)
    return {
        "coverage": float(weight.mean()),
        "accuracy": accuracy,
        "confidence": stated,
        "ece": None if accuracy is None else abs(accuracy - stated),
        "ranges": {
            "edges": list(EDGES),
            "share": [float(part.float().mean()) for part in parts],
            "coverage": [mean(weight[part], torch.ones_like(weight[part])) for part in parts],
            "accuracy": [mean(right[part], weight[part]) for part in parts],
            "all_accuracy": [mean(right[part], torch.ones_like(right[part])) for part in parts],
        },
    }


def measured(probs: Tensor, truth: Tensor) -> dict:
    """All metrics of an evaluation."""
    sums = SegmentationSums(CLASSES)
    sums.add(probs, truth)
    metrics = sums.read()
    return {"ece_15" if name == "ece" else name: value for name, value in metrics.items()}


__all__ = ["CLASSES", "EDGES", "POOL", "SIZE", "STEPS", "TEST", "write_mask_folder", "write_mask_run"]
