"""The trunk against its equations, written as loops over images and scales."""

import pytest
import torch
from torch.autograd import grad

from repro.methods.image_tags.common import Trunk
from tests.methods.image_tags.fakes import (
    CLASSES,
    LAYOUT,
    SCALES,
    Head,
    aux_cam,
    bilinear,
    cam_oracle,
    encoder,
    main_cam,
)


@pytest.fixture
def trunk():
    return Trunk(encoder(), CLASSES, Head())


def images(count=2, side=16, seed=1):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_tags_come_from_the_largest_value_over_patches(trunk):
    x = images()
    predicted, tokens = trunk.predict(x), trunk.encoder(x)
    for logits, patches, classify in (
        (predicted.logits, tokens.patches, trunk.classifier),
        (predicted.logits_aux, tokens.auxiliary, trunk.classifier_aux),
    ):
        for b in range(len(x)):
            pooled = [max(patches[b, n, d].item() for n in range(16)) for d in range(LAYOUT.width)]
            expected = [sum(w * p for w, p in zip(row, pooled, strict=True)) for row in classify.weight.tolist()]
            assert logits[b].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert trunk.classifier.bias is None and trunk.classifier_aux.bias is None
    # each classifier reads its own patches: the auxiliary one does not reach the last block
    last = trunk.encoder.blocks[-1].mlp.fc2.weight
    assert grad(predicted.logits_aux.sum(), last, allow_unused=True, retain_graph=True)[0] is None
    assert grad(predicted.logits.sum(), last, retain_graph=True)[0].any()


def test_segmentation_is_the_head_of_the_patches(trunk):
    x = images()
    tokens = trunk.encoder(x)
    maps = torch.stack([patches.T.reshape(LAYOUT.width, 4, 4) for patches in tokens.patches])
    torch.testing.assert_close(trunk.predict(x).segmentation, trunk.head(maps))
    torch.testing.assert_close(trunk(x), bilinear(trunk.head(maps), (16, 16)))
    assert trunk(images(side=24)).shape == (2, CLASSES + 1, 24, 24)


def test_cams_are_those_of_loops_over_scales_and_mirror_images(trunk):
    x = images()
    cam, aux = trunk.both_cams(x, SCALES)
    torch.testing.assert_close(cam, cam_oracle(main_cam(trunk), x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aux, cam_oracle(aux_cam(trunk), x), rtol=1e-4, atol=1e-5)
    assert not cam.requires_grad and not aux.requires_grad
    torch.testing.assert_close(trunk.activation(x, SCALES, torch.zeros(2, CLASSES)), cam, rtol=1e-4, atol=1e-5)
    assert cam.amin() == 0 and cam.amax() <= 1 and cam.shape == (2, CLASSES, 16, 16)


def test_a_mirrored_image_has_the_mirrored_cam(trunk):
    x = images()
    cam = trunk.activation(x, SCALES, torch.zeros(2, CLASSES))
    mirrored = trunk.activation(x.flip(3), SCALES, torch.zeros(2, CLASSES))
    torch.testing.assert_close(mirrored, cam.flip(3), rtol=1e-4, atol=1e-5)
