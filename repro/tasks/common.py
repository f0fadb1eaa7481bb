"""What the tasks of segmentation share: networks, evenly spread examples, pictures of one size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repro.arrays import IGNORE
from repro.data.folders import MaskFolder
from repro.data.scenes import SIZES
from repro.models.deeplab import deeplab
from repro.models.pretrained import initialise
from repro.recipe import MaskRecipe, ScribbleRecipe, TagRecipe
from repro.settings import SettingError

DROPOUT = (0.5, 0.1)  # of the published decoder for scribbles


def build_deeplab(recipe: MaskRecipe | ScribbleRecipe, classes: int) -> tuple[nn.Module, dict[str, str]]:
    """The recipe's DeepLabV3+, its backbone pretrained unless `weights` is `scratch`, and where the weights come from.

    The small network has half the strides, and no dropout (chosen here).
    """
    mini = recipe.network == "resnet-mini"
    dropout = {"dropout": DROPOUT} if isinstance(recipe, ScribbleRecipe) and not mini else {}
    network = deeplab(recipe.network, classes, recipe.output_stride // (2 if mini else 1), **dropout)
    return network, initialise(network.backbone, recipe.network, recipe.weights)


def check_scenes(recipe: MaskRecipe | TagRecipe | ScribbleRecipe) -> None:
    """Raise SettingError unless the recipe has scenes to train and test on, at a size that they are made at."""
    if not (recipe.images and recipe.tests):
        raise SettingError(f"images is {recipe.images}, tests {recipe.tests}: scenes need at least one of both")
    if recipe.crop not in SIZES:
        raise SettingError(f"crop is {recipe.crop}; scenes are made at the crop's size, {SIZES[0]} to {SIZES[-1]}")


def spread(count: int, chosen: int) -> Tensor:
    """Up to `chosen` of the numbers below `count`, evenly spread, int64."""
    return torch.linspace(0, count - 1, min(chosen, count)).long()


def unmasked(folder: MaskFolder, index: int) -> tuple[Tensor, Tensor]:
    """A training image with a mask of 255: hidden masks are not opened, not even for figures."""
    picture = folder.image(index)
    image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = image.view(picture.height, picture.width, 3).permute(2, 0, 1)
    return image, torch.full((picture.height, picture.width), IGNORE, dtype=torch.uint8)


def square(image: Tensor, mask: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The centre of an image (3, H, W) and its mask, cut or padded (0 and 255) to a square of `side`."""
    for axis in (-2, -1):
        extra = max(image.shape[axis] - side, 0)
        image = image.narrow(axis, extra // 2, min(image.shape[axis], side))
        mask = mask.narrow(axis, extra // 2, min(mask.shape[axis], side))
    rest = (0, side - image.shape[2], 0, side - image.shape[1])
    return F.pad(image, rest), F.pad(mask, rest, value=IGNORE)


def stacked(pairs: Sequence[tuple[Tensor, Tensor]], side: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, side, side) and masks (n, side, side), each `square`."""
    images, masks = zip(*(square(*pair, side) for pair in pairs), strict=True)
    return torch.stack(images), torch.stack(masks)
