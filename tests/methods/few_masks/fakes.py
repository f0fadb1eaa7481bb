"""Stand-ins for the steps of the few-mask methods: views without chance, a network of single pixels, and a twin of it
in float64 whose batch norm is written down, so that every term and gradient can be computed a second time."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from repro.data.mask_views import Crop
from repro.methods.few_masks.common import cross_entropy
from repro.train import Items, Now

CLASSES, SIZE, MOMENTUM = 3, 6, 0.3
NOW = Now(0, 10, 0, 0, None)


def view(crop, exponent=1.0):
    """Pixels / 255 to a power, 0 where padded."""
    return ((crop.images.float() / 255) ** exponent).masked_fill(crop.padding[:, None], 0)


def box(draw, count):
    """The `draw`-th set of CutMix boxes: none for the first image, others larger from image to image."""
    boxes = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for b in range(1, count):
        boxes[b, draw : draw + 2 + b, 1 : 3 + b] = True
    return boxes


def blocks(count):
    """Block masks: none for the first image (tails), then columns."""
    masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    masks[1:, :, ::2] = True
    return masks


class FakeViews:
    """The n-th strong view is `view` to 1.5 + n / 2, the masked one to 1/2; `drawn` lists kinds and arguments."""

    def __init__(self):
        self.drawn = []

    def draw(self, kind, *arguments):
        self.drawn.append((kind, *arguments))
        return sum(entry[0] == kind for entry in self.drawn) - 1

    def crop(self, images, masks):
        padding = masks == 254
        window = f"window {self.draw('crop')}"
        return Crop(images * ~padding[:, None], masks.masked_fill(padding, 255), padding, window)

    def weak(self, crop):
        return view(crop)

    def strong(self, crop):
        return view(crop, 1.5 + self.draw("strong") / 2)

    def boxes(self, crop):
        return box(self.draw("boxes"), len(crop.images))

    def masked(self, crop, block, keep):
        self.draw("masked", block, keep)
        return view(crop, 0.5), blocks(len(crop.images))


class TinyNetwork(nn.Module):
    """1x1 convolution, batch norm, 1x1 convolution; the perturbed output is that of doubled features.

    `passes` lists every forward: input, perturb, whether batch norm trains and tracks, whether gradients are on.
    """

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, momentum=MOMENTUM))
        self.head = nn.Conv2d(4, CLASSES, 1)
        nn.init.normal_(self.head.weight, std=1.5)
        nn.init.uniform_(self.backbone[1].weight, 0.5, 1.5)
        nn.init.uniform_(self.backbone[1].bias, -0.5, 0.5)
        self.backbone[1].running_mean.uniform_(-0.5, 0.5)
        self.backbone[1].running_var.uniform_(0.05, 0.2)
        self.passes = []

    def head_parameters(self):
        return list(self.head.parameters())

    def forward(self, x, perturb=False):
        norm = self.backbone[1]
        seen = x.detach().clone()
        self.passes.append((seen, perturb, norm.training, norm.track_running_stats, torch.is_grad_enabled()))
        features = self.backbone(x)
        logits = self.head(features)
        return (logits, self.head(2 * features)) if perturb else logits


class Twin:
    """A second implementation of `TinyNetwork` in float64, with the running averages moved by hand."""

    def __init__(self, network):
        self.values = {name: p.detach().double().requires_grad_() for name, p in network.named_parameters()}
        norm = network.backbone[1]
        self.mean, self.var = norm.running_mean.double().clone(), norm.running_var.double().clone()
        self.count, self.eps = norm.num_batches_tracked.item(), norm.eps

    def features(self, x, mean, var):
        values = self.values
        z = torch.einsum("kc,bchw->bkhw", values["backbone.0.weight"][:, :, 0, 0], x.double())
        if mean is None:
            mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        z = (z - mean[:, None, None]) / (var + self.eps).sqrt()[:, None, None]
        return z * values["backbone.1.weight"][:, None, None] + values["backbone.1.bias"][:, None, None]

    def head(self, features):
        weight, bias = self.values["head.weight"][:, :, 0, 0], self.values["head.bias"]
        return torch.einsum("kc,bchw->bkhw", weight, features) + bias[:, None, None]

    def evaluated(self, x):
        """Logits in eval mode."""
        return self.head(self.features(x, self.mean, self.var))

    def trained(self, x, move=True, factor=1.0):
        """Logits from the statistics of the batch, of features times `factor`; `move` the running averages."""
        if move:
            with torch.no_grad():
                z = torch.einsum("kc,bchw->bkhw", self.values["backbone.0.weight"][:, :, 0, 0], x.double())
                self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * z.mean((0, 2, 3))
                self.var = (1 - MOMENTUM) * self.var + MOMENTUM * z.var((0, 2, 3), correction=1)
                self.count += 1
        return self.head(factor * self.features(x, None, None))

    def same_averages(self, network):
        """Whether the network's batch norm stands where the twin's does."""
        norm = network.backbone[1]
        return (
            norm.num_batches_tracked.item() == self.count
            and torch.allclose(norm.running_mean.double(), self.mean, rtol=1e-5, atol=1e-6)
            and torch.allclose(norm.running_var.double(), self.var, rtol=1e-5, atol=1e-6)
        )


def items(count, seed, known=0.0):
    """Images, and labels of which a part is known and the rest 255; two images are padded, 254."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) >= known] = 255
    labels[-1, 6 - seed :], labels[-2, :, 5:] = 254, 254
    return Items(torch.arange(count) + 10 * seed, images, labels)


def batch():
    """Two labelled images with void pixels, three unlabelled ones and three to mix with, padded differently."""
    return {"labelled": items(2, 1, 0.8), "unlabelled": items(3, 2), "mix": items(3, 3)}


def crops(samples):
    """What `FakeViews` makes of a batch."""
    return [FakeViews().crop(part.images, part.labels) for part in samples.values()]


def build(method, network=None, **changes):
    """A method with its default settings but for `changes`, on the stand-ins, in training mode."""
    settings = method.Settings(**changes)
    return method(settings, network or TinyNetwork(), FakeViews(), CLASSES, cross_entropy, 10.0).train()


def surprise(logits, label):
    """-log softmax of the label's class, (B, H, W)."""
    return logits.logsumexp(1) - logits.gather(1, label[:, None])[:, 0]


def labelled_loss(logits, masks):
    """Mean over pixels that are not 255, one by one."""
    losses = surprise(logits, masks.long().clamp(max=CLASSES - 1))
    return torch.stack([losses[at] for at in np.ndindex(losses.shape) if masks[at] != 255]).mean()


def pseudo_loss(logits, targets):
    """sum(w CE) / number of valid pixels."""
    return (targets.weight * surprise(logits, targets.label)).sum() / targets.valid.sum().item()


def softmax(logits):
    """numpy, float64, without gradient."""
    powers = np.exp(logits.detach().numpy() - logits.detach().numpy().max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def targets_of(confidence, label, weight, padding):
    valid = ~padding
    label, weight, confidence = (torch.from_numpy(part) for part in (label, weight, confidence))
    return SimpleNamespace(label=label, weight=weight.double() * valid, confidence=confidence, valid=valid)


def threshold_oracle(logits, padding, threshold):
    """Pseudo-labels above a fixed threshold; none may be so close that float32 decides otherwise."""
    probs = softmax(logits)
    confidence = probs.max(1)
    assert np.abs(confidence - threshold).min() > 1e-5
    return targets_of(confidence, probs.argmax(1), confidence >= threshold, padding)


def pasted(mine, theirs, where):
    """CutMix of views or of targets, pixel by pixel."""
    if isinstance(mine, SimpleNamespace):
        return SimpleNamespace(**{name: pasted(vars(mine)[name], vars(theirs)[name], where) for name in vars(mine)})
    result = mine.clone()
    for b, i, j in zip(*np.nonzero(where.numpy()), strict=True):
        result[b, ..., i, j] = theirs[b, ..., i, j]
    return result


def compare(terms, expected, network, twin):
    """Every term, and its gradient in every parameter, equals the twin's."""
    assert terms.keys() == expected.keys()
    names = [name for name, _ in network.named_parameters()]
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name].item(), rel=1e-4), name
        found = torch.autograd.grad(term, list(network.parameters()), retain_graph=True)
        wanted = torch.autograd.grad(expected[name], list(twin.values.values()), retain_graph=True)
        for parameter, ours, theirs in zip(names, found, wanted, strict=True):
            torch.testing.assert_close(
                ours.double(), theirs, rtol=1e-3, atol=1e-5, msg=lambda text, at=(name, parameter): f"{at}: {text}"
            )
