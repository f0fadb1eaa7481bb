"""Full supervision: all pixels of the masks, void ones and padding left out."""

import pytest
import torch
import torch.nn.functional as F

from repro.methods.scribbles import METHODS
from repro.methods.scribbles.baselines import Full
from repro.train import Items
from tests.methods.scribbles import fakes
from tests.methods.scribbles.fakes import FIRST, SECOND, build


@pytest.mark.parametrize("now", [FIRST, SECOND], ids=["first", "second"])
def test_the_loss_is_cross_entropy_over_known_pixels(now):
    sample = fakes.items()
    masks = torch.randint(fakes.CLASSES, sample.labels.shape, generator=torch.Generator().manual_seed(3)).byte()
    masks[0, :3], masks[-1, 8:] = 255, 254
    sample = Items(sample.index, sample.images, masks)
    built = build(Full)
    losses = built.losses({"masks": sample}, now)
    crop = fakes.again(sample)
    logits = fakes.TinyNetwork()(built.network.passes[0][0])
    expected = F.cross_entropy(logits, crop.masks.long(), ignore_index=255) / 3
    assert losses.terms.keys() == {"masks"} and losses.terms["masks"].item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(KeyError):  # it does not take a stream of scribbles for masks
        built.losses({"scribbles": sample}, now)


def test_no_other_method_asks_for_masks():
    assert [name for name, method in METHODS.items() if method.supervision == "masks"] == ["full"]
