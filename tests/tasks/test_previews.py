"""Arrays for figures and the explorer, against the maps that evaluation makes, captum, and loops."""

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from repro.cam import min_max, multi_scale_cam
from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.dupl import Pair
from repro.methods.image_tags.pcre import PCRENetwork, PCRESettings, RegionDecoder
from repro.tasks.common import square, stacked
from repro.tasks.tags import (
    EXPLORED_SCALES,
    block_grad_cam,
    explored,
    one_scale,
    rolled_out,
    small_images,
    small_labels,
    trunk_of,
)
from tests.methods.image_tags.fakes import CLASSES, LAYOUT, SIDE, Head, encoder


def trunk(seed=0, **tokens):
    torch.manual_seed(seed)
    return Trunk(encoder(seed, **tokens), CLASSES, Head()).eval()


def pcre(seed=0):
    made = encoder(seed, class_tokens=CLASSES, masked=True, value_only=True)
    decoder = RegionDecoder(made, LAYOUT, CLASSES, heads=2, hidden=32, groups=4)
    return PCRENetwork(made, CLASSES, Head(), decoder, PCRESettings()).eval()


def images(count=2, seed=0):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_scales_add_up_to_the_cam():
    """Any choice of scales, of both layers: their sum from zero to one is what evaluation makes."""
    net, x, size = trunk(), images(), (SIDE, SIDE)
    maps = {scale: one_scale(net, x, scale, size) for scale in (0.5, 1.0, 1.5)}
    assert all(part.shape == (2, 2, CLASSES, SIDE, SIDE) and part.min() >= 0 for part in maps.values())
    for scales in ((1.0,), (1.0, 0.5), (0.5, 1.0, 1.5)):
        for layer, raw in enumerate((net.raw, net.raw_aux)):
            expected = multi_scale_cam(lambda seen, raw=raw: raw(net.encoder(seen)), x, scales)
            found = min_max(sum(maps[scale][:, layer] for scale in scales))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class FromPatches(nn.Module):
    """The trunk behind its auxiliary block as a module whose input captum can watch."""

    def __init__(self, net):
        super().__init__()
        self.net, self.watched = net, nn.Identity()

    def forward(self, x):
        made = self.net.encoder
        tokens, _ = made.embed(x)
        for index in range(made.depth):
            tokens, _ = made.block(index, tokens)
            if index == made.auxiliary:
                patches = self.watched(tokens[:, made.class_tokens :].mT.unflatten(2, (4, 4)))
                tokens = torch.cat([tokens[:, : made.class_tokens].detach(), patches.flatten(2).mT], 1)
        return self.net.classifier(made.norm(tokens)[:, made.class_tokens :].amax(1))


@pytest.mark.parametrize("net", [trunk(), pcre()], ids=["class token", "tokens of classes"])
def test_grad_cam_is_captums(net):
    x = images()
    assert net.encoder.auxiliary < net.encoder.depth - 1
    with torch.no_grad():
        found = block_grad_cam(net, x)
    module = FromPatches(net)
    assert torch.equal(module(x), net.predict(x).logits)
    watch = LayerGradCam(module, module.watched)
    for channel in range(CLASSES):
        expected = watch.attribute(x, target=channel, relu_attributions=True)[:, 0]
        torch.testing.assert_close(found[:, channel], expected, rtol=1e-4, atol=1e-6)
    assert found.any() and all(value.grad is None for value in net.parameters())


@pytest.mark.parametrize("net", [trunk(), pcre()], ids=["class token", "tokens of classes"])
@torch.no_grad()
def test_rollout_is_a_walk_through_all_blocks(net):
    """Half stays, half follows the attention: the share of each patch in the class tokens, token by token."""
    made, x = net.encoder, images(1)
    maps = made(x, range(made.depth)).attention
    count = made.class_tokens + 16
    flow = torch.eye(count)
    for index in range(made.depth):
        attention = maps[index][0].mean(0)
        rows = []
        for token in range(count):
            rows.append(0.5 * flow[token] + 0.5 * sum(attention[token, other] * flow[other] for other in range(count)))
        flow = torch.stack(rows)
    expected = flow[: made.class_tokens, made.class_tokens :].mean(0).view(4, 4)
    torch.testing.assert_close(rolled_out(net, x)[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_what_the_explorer_reads():
    net, x = trunk(), images(3)
    net.train()
    found = explored(net, x, SIDE)
    assert all(module.training for module in net.modules())
    assert set(found) == {"explore_scales", "explore_cam", "explore_gradcam", "explore_rollout"}
    assert found["explore_scales"].tolist() == list(EXPLORED_SCALES) == [0.5, 1.0, 1.5]
    net.eval()
    with torch.no_grad():
        for at, scale in enumerate(EXPLORED_SCALES):
            torch.testing.assert_close(found["explore_cam"][:, :, at], one_scale(net, x, scale, (SIDE, SIDE)).half())
        grown = nn.functional.interpolate(block_grad_cam(net, x), (SIDE, SIDE), mode="bilinear")
    torch.testing.assert_close(found["explore_gradcam"].float(), min_max(grown), rtol=1e-2, atol=1e-3)
    for name in ("explore_gradcam", "explore_rollout"):
        assert found[name].min() == 0 and found[name].max() <= 1 and found[name].dtype == torch.float16
    assert found["explore_rollout"].flatten(1).amax(1).min() > 0.99
    assert explored(net, x, 8)["explore_cam"].shape == (3, 2, 3, CLASSES, 8, 8)


@torch.no_grad()
def test_pcre_adds_its_confidence_and_masks():
    net, x = pcre(), images()
    found = explored(net, x, SIDE)
    tokens = net.encoder(x)
    confidence, masks = net.decoder(x, tokens.patches, tokens.grid)
    assert torch.equal(found["explore_confidence"], confidence) and confidence.shape == (2, 16, CLASSES)
    assert torch.equal(found["explore_masks"], masks.half()) and found["explore_masks"].shape == (2, 16, 4, 4)


def test_of_two_trunks_the_first_is_explored():
    first, second = trunk(), trunk(1)
    assert trunk_of(Pair(first, second)) is first and trunk_of(first) is first
    one, pair = explored(first, images(), SIDE), explored(Pair(first, second), images(), SIDE)
    assert all(torch.equal(one[name], pair[name]) for name in one)


def test_pictures_become_squares():
    """Cut at the centre where too long, padded at the right and below where too short."""
    image, mask = torch.arange(2 * 7, dtype=torch.uint8).view(1, 2, 7).expand(3, -1, -1), torch.zeros(2, 7)
    mask[0, 3] = 9
    found, labels = square(image, mask.byte(), 4)
    assert found[0, :2].tolist() == [[1, 2, 3, 4], [8, 9, 10, 11]] and not found[:, 2:].any()
    assert labels[0].tolist() == [0, 0, 9, 0] and (labels[2:] == 255).all()
    images, masks = stacked([(image, mask.byte())] * 2, 4)
    assert images.shape == (2, 3, 4, 4) and torch.equal(images[1], found) and torch.equal(masks[1], labels)


def test_pictures_are_made_smaller_never_larger():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = images[:, 0] % 5
    assert small_images(images, 8) is images and small_labels(labels, 20) is labels
    assert torch.equal(small_labels(labels, 4), labels[:, ::2, ::2])
    found = small_images(images, 4).float()
    # away from the border, a triangle over four pixels a side: weights 1, 3, 3, 1
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    middle = (images[:, :, 1:5, 1:5].float() * weights[:, None] * weights).sum((2, 3))
    assert (found[:, :, 1, 1] - middle).abs().max() <= 0.51
