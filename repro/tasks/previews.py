"""Arrays that a run keeps for figures and the explorer: pictures, maps of one scale, comparisons, PCRE's masks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.cam import attention_rollout, bilinear, grad_cam, min_max, widened
from repro.methods.image_tags.dupl import Pair
from repro.methods.image_tags.pcre_network import PCRENetwork
from repro.methods.image_tags.trunk import Trunk
from repro.models.modes import evaluating

EXPLORED_SCALES = (0.5, 1.0, 1.5)
LARGEST = 224  # side of kept pictures and maps at most: of COCO, 80 maps of 448 pixels an image would fill a disk


def trunk_of(network: nn.Module) -> Trunk:
    """The trunk that is evaluated."""
    return network.first if isinstance(network, Pair) else network


@torch.no_grad()
def explored(network: nn.Module, x: Tensor, side: int) -> dict[str, Tensor]:
    """What the explorer reads of normalised images x (E, 3, S, S); maps are resized to `side` x `side`.

    explore_scales (Sc,); explore_cam (E, 2, Sc, C, H, W): main and auxiliary, `one_scale` at each of them;
    explore_gradcam (E, C, H, W), explore_rollout (E, H, W): at scale 1, in [0, 1]; of PCRE also explore_confidence
    (E, N, C), S, and explore_masks (E, N, h, w), M, at scale 1 without a gate. Maps in half precision, S in single.
    """
    trunk, size = trunk_of(network), (side, side)
    with evaluating(network):
        cam = torch.stack([one_scale(trunk, x, scale, size) for scale in EXPLORED_SCALES], 2)
        gradcam = torch.cat([block_grad_cam(trunk, image) for image in x.split(1)])
        rollout = torch.cat([rolled_out(trunk, image) for image in x.split(1)])
        found = {
            "explore_scales": torch.tensor(EXPLORED_SCALES),
            "explore_cam": cam.half(),
            "explore_gradcam": min_max(bilinear(gradcam, size)).half(),
            "explore_rollout": min_max(bilinear(rollout, size))[:, 0].half(),
        }
        if isinstance(trunk, PCRENetwork):
            tokens = trunk.encoder(x)
            confidence, masks = trunk.decoder(x, tokens.patches, tokens.grid)
            found |= {"explore_confidence": confidence.float(), "explore_masks": masks.half()}
    return {name: values.cpu() for name, values in found.items()}


def one_scale(trunk: Trunk, x: Tensor, scale: float, size: tuple[int, int]) -> Tensor:
    """Main and auxiliary CAM (B, 2, C, H, W) of one scale: the larger of an image's and its mirror image's, rectified.

    Over scales their sum, made `cam.min_max`, is `cam.multi_scale_cam`, if maps have the size of x (B, 3, H, W).
    """
    seen = bilinear(x, (int(scale * x.shape[2]), int(scale * x.shape[3])))
    tokens = trunk.encoder(torch.cat([seen, seen.flip(3)]))
    maps = bilinear(widened(torch.cat([trunk.raw(tokens), trunk.raw_aux(tokens)], 1)), size)
    own, mirrored = maps.chunk(2)
    return torch.maximum(own, mirrored.flip(3)).relu().unflatten(1, (2, -1))


def block_grad_cam(trunk: Trunk, x: Tensor) -> Tensor:
    """Grad-CAM (B, C, h, w) of the patches behind the auxiliary block, for the main classifier's scores.

    x: (B, 3, H, W). Class tokens stay as they are there. At the last layer Grad-CAM would be the CAM itself.
    """
    encoder = trunk.encoder
    tokens, grid = encoder.embed(x)
    for index in range(encoder.auxiliary + 1):
        tokens, _ = encoder.block(index, tokens)
    first, patches = tokens.split([encoder.class_tokens, tokens.shape[1] - encoder.class_tokens], 1)

    def score(patches: Tensor) -> Tensor:
        tokens = torch.cat([first, patches], 1)
        for index in range(encoder.auxiliary + 1, encoder.depth):
            tokens, _ = encoder.block(index, tokens)
        return trunk.classifier(encoder.norm(tokens)[:, encoder.class_tokens :].amax(1))

    return grad_cam(patches, score, grid)


def rolled_out(trunk: Trunk, x: Tensor) -> Tensor:
    """Attention rollout (B, 1, h, w) over all blocks, of the class token, or of the mean of several."""
    encoder = trunk.encoder
    tokens = encoder(x, range(encoder.depth))
    flow = attention_rollout(tokens.attention[index] for index in range(encoder.depth))
    return flow[:, : encoder.class_tokens, encoder.class_tokens :].mean(1, keepdim=True).unflatten(2, tokens.grid)


def small_images(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) uint8 of at most `side` pixels, antialiased."""
    if images.shape[2] <= side:
        return images
    seen = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return seen.round().clamp(0, 255).byte()


def small_labels(labels: Tensor, side: int) -> Tensor:
    """Label maps (B, S, S) uint8 of at most `side` pixels, nearest neighbour."""
    if labels.shape[1] <= side:
        return labels
    return F.interpolate(labels[:, None].float(), size=(side, side), mode="nearest")[:, 0].byte()
