"""Finished runs from image tags that no training made: folders in the schema of `repro.runs`, alike on every machine.

Scenes of `fake_mask_runs`, and CAMs that spill less with the steps and with the method (plain < toco < afa < dupl <
pcre), so that curves rise and figures have something to show. Metrics are measured on them.
"""

import dataclasses
import json
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from repro.cam import bilinear, min_max, threshold_counts
from repro.data.masks import tags_of
from repro.experiment import Experiment, record
from repro.files import save_state, write_json
from repro.methods.image_tags.pcre import PCRESettings, joint_confidence, squared_distances
from repro.recipe import TagRecipe
from repro.runs import folder_of
from repro.tasks.monitors import REPORTING
from repro.tasks.tags import cam_report, thresholds
from repro.train import MOMENTS
from tests.fake_mask_runs import CLASSES, SIZE, measured, scenes
from tests.fake_runs import finished

GRID = (SIZE[0] // 2, SIZE[1] // 2)  # patches
TEST, POOL, EXPLORED = 16, 8, 4
SCALES = (0.5, 1.0, 1.5)
STEPS = tuple(range(100, 1001, 100))
SPILL = {"plain": 4, "toco": 3, "afa": 2, "dupl": 2, "pcre": 1}  # how far a CAM goes beyond its class, pixels
QUALITY = {"plain": 1.5, "toco": 2.0, "afa": 2.2, "dupl": 2.5, "pcre": 3.0}
TERMS = {
    "plain": ("tags", "tags_aux", "segmentation"),
    "toco": ("tags", "tags_aux", "patches", "crops", "segmentation"),
    "afa": ("tags", "segmentation", "affinity"),
    "dupl": ("tags", "tags_aux", "patches", "segmentation", "apart", "consistency"),
    "pcre": ("tags", "tags_aux", "patches", "confidence", "prototypes", "refine", "segmentation"),
}
LATE = ("refine", "segmentation")  # 0 while the head warms up


def write_tag_run(
    experiment: Experiment, root: Path, live: dict | None = None, evaluations: int = 0, **changes
) -> Path:
    """`write_tag_folder` in the folder that `runs` looks in, evaluated as its recipe says.

    evaluations: so many of them instead, evenly spread over the steps.
    """
    fields = {"seed": experiment.seed, "labels": experiment.labels, "data": experiment.data}
    saved = record(experiment)
    total, every = saved["recipe"]["steps"], saved["recipe"]["eval_every"]
    steps = tuple(range(every, total, every)) + (total,)
    if evaluations:
        steps = tuple(sorted({max(1, total * part // evaluations) for part in range(1, evaluations + 1)}))
    folder = folder_of(experiment, root)
    return write_tag_folder(folder, experiment.method, **fields, steps=steps, saved=saved, live=live, **changes)


def write_tag_folder(
    folder: Path,
    method: str = "pcre",
    seed: int = 0,
    labels: int = 500,
    data: str = "scenes",
    steps: tuple[int, ...] = STEPS,
    saved: dict | None = None,
    live: dict | None = None,
    figures: bool = True,
    **ema,
) -> Path:
    """Write `metrics.json`, `history.jsonl`, `outputs.safetensors` and the moments of a run; return its folder.

    saved: `record` of the experiment; by default one that names method, data and labels, with PCRE's own recipe.
    live, ema: metrics that are changed, in every evaluation (`cam_miou=0.7`). figures: False leaves arrays out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"paper": "pcre", "method": method, "data": data, "labels": labels, "seed": seed, "scale": "mini"}
    recipe = dataclasses.asdict(TagRecipe(method=PCRESettings(), network="vit-mini", steps=steps[-1]))
    saved = saved or {"experiment": fields | {"overrides": {}}, "recipe": recipe}
    beta = saved["recipe"]["beta"]
    test, pool = scenes(TEST, 0), scenes(POOL, 1000)
    test_tags, pool_tags = (tags_of(truth, CLASSES)[:, 1:] for _, truth in (test, pool))
    rows = []
    for step in steps:
        share = step / steps[-1]
        terms = {name: round((1 + i) * (1.5 - share) / 4, 4) for i, name in enumerate(TERMS[method])}
        terms |= {name: 0.0 for name in LATE if name in terms and share <= 0.1}
        rate = {"lr": saved["recipe"]["lr"] * (1 - 0.9 * share), "seconds": 3.0, "samples_per_second": 50.0}
        rows.append({"kind": "train", "step": step, "stage": 0, "terms": terms, "pseudo": {}} | rate)
        seen, probs = cams(test[1], method, seed, share), probabilities(test[1], method, seed, share)
        on_pool = cams(pool[1], method, seed, share)
        counts, on_train = (
            threshold_counts(maps, tags.float(), truth, thresholds(beta))
            for maps, tags, truth in ((seen, test_tags, test[1]), (on_pool, pool_tags, pool[1]))
        )
        metrics = measured(probs, test[1]) | cam_report(counts, beta)
        metrics["cam_miou_train"] = cam_report(on_train, beta)["cam_miou"]
        rows.append({"kind": "evaluation", "step": step, "live": metrics | (live or {}), "ema": metrics | ema})
        if figures:
            moment = {"cam": on_pool.half()}
            if method == "pcre":
                settings = PCRESettings(**(saved["recipe"]["method"] or {}))
                radius = settings.radius(share, GRID)
                radius = float(max(GRID)) if radius is None else radius
                moment |= {"regions": regions(pool[1], radius).half(), "radius": torch.tensor(radius)}
            save_state(folder / MOMENTS / f"{step}.safetensors", moment)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures:
        outputs = {
            "test_images": test[0],
            "test_truth": test[1],
            "test_tags": test_tags.byte(),
            "test_prediction": probs.argmax(1).byte(),
            "test_cam": seen.half(),
            "pool_index": torch.arange(POOL) * 3,
            "pool_images": pool[0],
            "pool_truth": pool[1],
            "pool_tags": pool_tags.byte(),
            "pool_cam": on_pool.half(),
        }
        save_state(folder / "outputs.safetensors", outputs | explored(seen[:EXPLORED], test[1][:EXPLORED], method))
    last = {weights: rows[-1][weights] for weights in ("ema", "live")}
    best = {weights: last[weights] | {"selected_on_test": True} for weights in last}
    metrics = saved | finished(folder) | {
        "reported": {rule: best if rule == "best" else last for rule in REPORTING},
        "pseudo_labels": {},
    }
    write_json(folder / "metrics.json", metrics)
    return folder


def shown_planes(truth: Tensor) -> Tensor:
    """1 where a pixel is of a class without the background, (n, C, H, W)."""
    labels = torch.where(truth == 255, 0, truth).long()
    return F.one_hot(labels, CLASSES)[..., 1:].permute(0, 3, 1, 2).float()


def noise(shape: torch.Size, *words) -> Tensor:
    """Smooth noise that follows from the words alone."""
    dice = torch.Generator().manual_seed(zlib.crc32(".".join(map(str, words)).encode()))
    return F.avg_pool2d(torch.randn(shape, generator=dice), 3, 1, 1)


def cams(truth: Tensor, method: str, seed: int, share: float) -> Tensor:
    """CAMs (n, C, H, W) in [0, 1] at `share` of training: truth widened and blurred, with noise."""
    planes, beyond = shown_planes(truth), SPILL[method] + round(2 * (1 - share))
    blurred = F.avg_pool2d(F.max_pool2d(planes, 2 * beyond + 1, 1, beyond), 5, 1, 2)
    rough = 0.5 * (1.4 - share) * noise(planes.shape, method, seed, share, len(truth), "cam")
    return min_max((blurred + rough).relu())


def probabilities(truth: Tensor, method: str, seed: int, share: float) -> Tensor:
    """Softmax (n, K, H, W) of a segmentation head that has done `share` of its steps."""
    planes = shown_planes(truth)
    blurred = F.avg_pool2d(torch.cat([1 - planes.sum(1, keepdim=True), planes], 1), 5, 1, 2)
    rough = 3 * noise(blurred.shape, method, seed, share, len(truth), "head")
    return (2.5 * (QUALITY[method] * (0.4 + share) * blurred + rough)).softmax(1)


def regions(truth: Tensor, radius: float) -> Tensor:
    """m_r (n, C, h, w) that has grown round the middle of each class as far as the radius lets it."""
    planes = F.avg_pool2d(shown_planes(truth), 2)
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in GRID), indexing="ij")
    weight = planes.sum((2, 3)).clamp(min=1)
    at_row, at_column = ((planes * at).sum((2, 3)) / weight for at in (rows, columns))
    away = (rows - at_row[:, :, None, None]).square() + (columns - at_column[:, :, None, None]).square()
    near = torch.sigmoid(3 * (1.3 * radius - away.sqrt()))
    return near * (0.2 + 0.8 * F.avg_pool2d(planes, 3, 1, 1)) * (planes.amax((2, 3), keepdim=True) > 0)


def explored(cam: Tensor, truth: Tensor, method: str) -> dict[str, Tensor]:
    """What the explorer reads of the first test images."""
    planes = shown_planes(truth)
    layers = []
    for part in (cam, F.avg_pool2d(cam, 5, 1, 2)):
        sizes = [(int(scale * SIZE[0]) // 2, int(scale * SIZE[1]) // 2) for scale in SCALES]
        layers.append(torch.stack([3 * bilinear(bilinear(part, size), SIZE) for size in sizes], 1))
    found = {
        "explore_scales": torch.tensor(SCALES),
        "explore_cam": torch.stack(layers, 1).half(),
        "explore_gradcam": min_max(F.avg_pool2d(cam, 3, 1, 1)).half(),
        "explore_rollout": min_max(F.avg_pool2d(planes.sum(1, keepdim=True), 9, 1, 4))[:, 0].half(),
    }
    if method != "pcre":
        return found
    small = F.avg_pool2d(planes, 2).flatten(2).mT
    same = small @ small.mT
    near = torch.exp(-squared_distances(GRID, truth.device).flatten(1) / 12.0)
    confidence = joint_confidence(4 * small, 4 * small)
    masks = (same * near).unflatten(2, GRID)
    return found | {"explore_confidence": confidence, "explore_masks": masks.half()}


__all__ = ["EXPLORED", "GRID", "POOL", "SCALES", "STEPS", "TEST", "write_tag_folder", "write_tag_run"]
