"""Stand-ins small enough to compute by hand: views that one can predict, a network of twelve pixels."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from repro.train import Items, Now

CLASSES = 3


def view(images, draw=0):
    """The `draw`-th view: pixels / 255 to a power of its own (batch norm would undo a shift or a scale)."""
    return (images.float() / 255) ** (1 + draw / 2)


class FakeViews(nn.Module):
    """Weak and plain views are `view`, strong ones its negative; `calls` lists kind and size of each draw."""

    def __init__(self):
        super().__init__()
        self.calls, self.learnt = [], []

    def draw(self, kind, images):
        earlier = sum(name == kind for name, _ in self.calls)
        self.calls.append((kind, len(images)))
        return view(images, earlier)

    def weak(self, images):
        return self.draw("weak", images)

    def strong(self, images):
        return -self.draw("strong", images)

    def plain(self, images):
        self.calls.append(("plain", len(images)))
        return view(images)

    def learn(self, predict, images, labels):
        self.learnt.append((predict, images, labels))


class TinyNetwork(nn.Module):
    """Flatten, linear, batch norm, (dropout), linear head; the interface of the wide ResNets."""

    def __init__(self, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Dropout(dropout))
        self.head = nn.Linear(6, CLASSES)

    def features(self, images):
        return self.body(images)

    def forward(self, images):
        return self.head(self.features(images))


def items(n, seed=0, labels=None, index=None):
    """n images 3 x 2 x 2 and their labels (random unless given)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 2, 2), generator=generator, dtype=torch.uint8)
    drawn = torch.randint(CLASSES, (n,), generator=generator)
    index = torch.arange(n) if index is None else index
    return Items(index, images, drawn if labels is None else labels)


def batch(labelled=4, unlabelled=8):
    return {"labelled": items(labelled, 1), "unlabelled": items(unlabelled, 2, torch.full((unlabelled,), -1))}


def now(step=500, steps=1000, stage=0, teacher=None):
    return Now(step, steps, 0, stage, teacher)


def pool(n, labelled, seed=0):
    """A pool of n images; `labelled` maps pool index to label, all others are hidden."""
    labels = torch.full((n,), -1)
    labels[list(labelled)] = torch.tensor(list(labelled.values()))
    return SimpleNamespace(
        images=items(n, seed).images,
        labels=labels,
        labelled=torch.tensor(list(labelled)),
        unlabelled=torch.arange(n),
    )


def bn_state(network):
    """Running averages of the batch norms, to compare before and after."""
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k or "tracked" in k}


def three_view_logits(samples):
    """Logits (B + 2U, K) of `TinyNetwork` for labelled weak, unlabelled weak and strong views, drawn in USB's order."""
    labelled, unlabelled = samples["labelled"].images, samples["unlabelled"].images
    return TinyNetwork()(torch.cat([view(labelled, 1), view(unlabelled), -view(unlabelled)])).detach().numpy()


def softmax(logits):
    """numpy, float64, row by row."""
    rows = np.asarray(logits, dtype=np.float64)
    exponents = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def cross_entropy(logits, target):
    """numpy: target is a class number or a distribution; per sample."""
    logs = np.log(softmax(logits))
    target = np.asarray(target)
    if target.ndim == 1:
        return np.array([-row[k] for row, k in zip(logs, target, strict=True)])
    return np.array([-sum(p * log for p, log in zip(t, row, strict=True)) for t, row in zip(target, logs, strict=True)])


def gradient_reaches(loss, parameters):
    """True when the loss moves at least one of the parameters."""
    gradients = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
    return any(g is not None and bool(g.abs().sum() > 0) for g in gradients)
