"""Pretrains the `mini` backbones, which stand in for ImageNet weights, on pictures of single garments:

    python -m repro.data.pretrain --source FOLDER

FOLDER holds the official Fashion-MNIST files, as for `repro.data.embed`. Only garments that are not embedded in the
package are used, train for training and test for the accuracy, and only their class: one garment in a picture, turned,
tinted and laid on a texture as in the scenes, but no mask. One command gives one file on one machine and library
version, since it runs on one thread; elsewhere rounding differs. The weights' metadata say what they were made of.
"""

import argparse
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from repro.data import scenes
from repro.data.augment import Views
from repro.data.catalogue import SOURCES
from repro.data.embed import official_index, read_official
from repro.files import atomic_path
from repro.models.pretrained import MEAN, SHIPPED, STD
from repro.models.resnet import resnet
from repro.models.vit import LAYOUTS as VITS
from repro.models.vit import ViT, vit

SIDE = 48  # of the pictures; the garments are as large as in scenes of 64
EXTENT = (22, 46)  # side of a garment in pixels
PICTURES = {"train": 1, "test": 2}  # Philox keys
CHUNK = 256
BATCH = 128
SGD, ADAMW = {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}, {"lr": 2e-3, "weight_decay": 0.05}


def main(arguments: list[str] | None = None) -> None:
    """Pretrain, save, and print the accuracy on the held-out garments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the official *-ubyte.gz files")
    parser.add_argument("--target", type=Path, default=SHIPPED, help="folder for the weights")
    parser.add_argument("--backbone", default="resnet-mini", help="a ResNet or a ViT by name")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, help="use only that many garments of each split (for tests)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images, labels, digest = free_pictures(options.source, "train", options.limit)
    network = pretrain(options.backbone, images, labels, options.epochs)
    held_out = free_pictures(options.source, "test", options.limit)
    right = accuracy(network, *held_out[:2])
    metadata = {
        "task": "class of the single garment in a picture, 10 classes",
        "data": f"Fashion-MNIST (MIT licence): {len(labels)} train garments that are not embedded in the package",
        "digest": digest,
        "held_out": f"{len(held_out[1])} test garments that are not embedded, digest {held_out[2]}",
        "accuracy": f"{right:.4f}",
        "command": f"python -m repro.data.pretrain --backbone {options.backbone} --epochs {options.epochs}",
        "steps": str(options.epochs * (len(labels) // BATCH)),
        "normalisation": f"mean {MEAN}, std {STD} of pixels in [0, 1]",
        "torch": torch.__version__.partition("+")[0],
    }
    save(network, options.target / f"{options.backbone}.safetensors", metadata)
    print(f"{options.backbone}: accuracy {right:.4f} on {len(held_out[1])} held-out garments")


def free_pictures(source: Path, split: str, limit: int | None = None) -> tuple[Tensor, Tensor, str]:
    """Pictures (N, 3, SIDE, SIDE) uint8 and labels (N,) of the garments that are not embedded, and a digest of both.

    source: folder of the official files; split: "train" or "test"; limit: only the first so many.
    """
    garments, labels = read_official(source, split)
    free = torch.ones(len(labels), dtype=torch.bool)
    free[official_index(split)] = False
    rows = free.nonzero()[:limit, 0]
    images, labels = pictures(garments[rows], PICTURES[split]), labels[rows]
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy().astype("<i8"))
    return images, labels, digest.hexdigest()


def pictures(garments: Tensor, seed: int) -> Tensor:
    """One picture (N, 3, SIDE, SIDE) uint8 of each grey garment (N, 1, 28, 28), all words from Philox key `seed`."""
    images = torch.empty(len(garments), 3, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, len(garments), CHUNK):
        part = garments[start : start + CHUNK]
        n = len(part)
        words = np.random.Philox(key=seed, counter=start << 64).random_raw(256 * n)
        octets = words.astype("<u8").view(np.uint8).reshape(n, -1).astype(np.int32)
        draw = octets[:, -16:]
        side = 16 * EXTENT[0] + draw[:, 0] * 16 * (EXTENT[1] - EXTENT[0]) // 255  # in 1/16 pixel
        room = 16 * SIDE - side[:, None]
        item = {
            "present": np.ones(n, bool),
            "label": np.ones(n, np.uint8),
            "garment": np.arange(n, dtype=np.int32),
            "side": side,
            "centre": (side[:, None] >> 1) + draw[:, 1:3] * room // 255,
            "turn": draw[:, 3] * len(scenes.TURN) >> 8,
            "flip": draw[:, 4] & 1,
            "light": scenes.colour(draw[:, 5] * 6, 60 + draw[:, 6] * 170 // 256, 150 + draw[:, 7] * 105 // 256),
            "depth": 40 + draw[:, 8] * 70 // 256,
        }
        canvas = scenes.texture(octets, SIDE)
        cut = scenes.cut_out(SimpleNamespace(images=part), np.arange(n))
        scenes.lay(canvas, np.zeros((n, SIDE, SIDE), np.uint8), item, cut, SIDE)
        images[start : start + n] = torch.from_numpy(canvas.clip(0, 255).astype(np.uint8))
    return images


class Pooled(nn.Module):
    """A ViT whose blocks mix nothing yet, under classifiers of the maxima over its last and its auxiliary patches.

    Mixing, or the mean in place of a maximum, carries the class to every patch: the activation maps of training that
    starts there light up the background. Queries, keys and the class token get no gradient; weight decay alone moves
    them.
    """

    def __init__(self, encoder: ViT, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)
        self.head_aux = nn.Linear(encoder.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, 2), of the last patches and of the auxiliary ones."""
        encoder, auxiliary = self.encoder, None
        tokens = encoder.embed(x)[0][:, encoder.class_tokens :]
        for index, block in enumerate(encoder.blocks):
            tokens, _ = block(tokens, hidden=0, mixes=False, wanted=False)
            if index == encoder.auxiliary:
                auxiliary = tokens
        return torch.stack([self.head(encoder.norm(tokens).amax(1)), self.head_aux(auxiliary.amax(1))], 2)


def classifier(name: str, classes: int) -> nn.Module:
    """A freshly initialised ResNet or ViT that classifies whole pictures."""
    if name in VITS:
        return Pooled(vit(name), classes)
    return resnet(name, classes=classes).to(memory_format=torch.channels_last)


def pretrain(name: str, images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> nn.Module:
    """A ResNet or ViT with classifier trained on pictures: one cycle, flips and shifts.

    ResNets learn by SGD with Nesterov momentum, ViTs by AdamW.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = classifier(name, len(SOURCES["fashion"].classes))
    views = Views(MEAN, STD, flip=True, padding=4, generator=generator)
    settings, kind = (ADAMW, torch.optim.AdamW) if name in VITS else (SGD, torch.optim.SGD)
    optimiser = kind(network.parameters(), **settings)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings["lr"], total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        begun, total = time.perf_counter(), 0.0
        order = torch.randperm(len(labels), generator=generator)
        for index in order[: len(order) // BATCH * BATCH].split(BATCH):
            batch = views.weak(images[index]).contiguous(memory_format=torch.channels_last)
            logits = network(batch)
            truth = labels[index]
            loss = F.cross_entropy(logits, truth[:, None].expand(-1, logits.shape[2]) if logits.ndim == 3 else truth)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * BATCH / len(order)
        print(f"epoch {epoch + 1}: loss {total:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    return network


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right classes, in eval mode; of a ViT by the mean of its two classifiers, of which `save` keeps one."""
    network.eval()
    views = Views(MEAN, STD, flip=False)
    logits = torch.cat([network(views.plain(part)) for part in images.split(500)])
    predicted = (logits.mean(2) if logits.ndim == 3 else logits).argmax(1)
    return (predicted == labels).double().mean().item()


def save(network: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write weights without the auxiliary classifier: matrices and kernels as float16, the rest as float32."""
    tensors = {
        key.removeprefix("encoder."): (value.half() if value.ndim > 1 else value).contiguous()
        for key, value in network.state_dict().items()
        if not key.startswith("head_aux")
    }
    with atomic_path(path) as part:
        save_file(tensors, part, metadata=metadata)


if __name__ == "__main__":
    main()
