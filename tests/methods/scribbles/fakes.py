"""Small stand-ins for the scribble methods: a network of single pixels, smooth images and short scribbles."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from repro.data.mask_views import MaskViews
from repro.methods.scribbles.common import BLUR
from repro.train import Items, Now
from tests.methods.few_masks.fakes import CLASSES, TinyNetwork

COUNT, SIDE, START = 5, 10, 4
FIRST, SECOND = (Now(0, 10, 0, stage, None) for stage in (0, 1))
__all__ = ["CLASSES", "TinyNetwork"]


def options(**changes):
    return SimpleNamespace(**{"start_steps": START, "head_factor": 10.0, "blur": False, "workers": 0} | changes)


def views(seed=0, scale=(0.6, 1.6)):
    return MaskViews(SIDE, scale, strong=BLUR, generator=torch.Generator().manual_seed(seed))


def pool(seed=0, count=COUNT, padded=True):
    """Images with a few scribbled pixels of two classes each; the last one is padded below."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator)
    images = (F.interpolate(coarse, (SIDE, SIDE), mode="bilinear") * 255).byte()
    labels = torch.full((count, SIDE, SIDE), 255, dtype=torch.uint8)
    for number in range(count):
        for place, label in ((2, number % CLASSES), (6, (number + 1) % CLASSES)):
            labels[number, place, 2:7] = label
    if padded:
        labels[-1, 8:], images[-1, :, 8:] = 254, 0
    everything = torch.arange(count)
    return SimpleNamespace(images=images, labels=labels, labelled=everything, unlabelled=everything)


def items(index=(0, 2, 4), **changes):
    shown, index = pool(**changes), torch.tensor(index)
    return Items(index, shown.images[index], shown.labels[index])


def build(method, network=None, recipe=None, seed=0, **changes):
    """A method with its default settings but for `changes`, on the stand-ins, in training mode."""
    settings = method.Settings(**{"epsilon": 0.6} | changes if method.__name__ == "RobustTrustRegion" else changes)
    network = network or TinyNetwork(seed)
    recipe = recipe or options()
    return method(settings, network, views(), CLASSES, recipe, (COUNT, SIDE, SIDE)).train()


def again(sample):
    """The crop that a method's first step makes, by a second copy of its generator."""
    return views().crop(sample.images, sample.labels)


def surprise(logits, labels):
    """-log softmax of labels below C, pixel by pixel in float64, else nothing: {(b, i, j): value}."""
    found = {}
    for b, i, j in torch.nonzero(labels < logits.shape[1]).tolist():
        scores = logits[b, :, i, j].double()
        found[b, i, j] = scores.exp().sum().log() - scores[int(labels[b, i, j])]
    return found


def edges(image, roi, neighbours=8):
    """(p, q, w_pq) inside the region of interest, by loops."""
    height, width = roi.shape
    pairs = [
        ((i, j), (i + down, j + right), math.hypot(down, right))
        for down, right in [(0, 1), (1, 0), (1, 1), (-1, 1)][: neighbours // 2]
        for i in range(height) for j in range(width)
        if 0 <= i + down < height and j + right < width and roi[i, j] and roi[i + down, j + right]
    ]  # fmt: skip
    gaps = [((image[:, *p] - image[:, *q]) ** 2).sum().item() for p, q, _ in pairs]
    variance = sum(gaps) / len(gaps)
    return [(p, q, math.exp(-gap / 2 / variance) / far) for gap, (p, q, far) in zip(gaps, pairs, strict=True)]
