"""Plain CAM training, term by term."""

import pytest
import torch
import torch.nn.functional as F

from repro.cam import refined_labels
from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.toco import Plain, PlainSettings
from repro.settings import SettingError
from tests.methods.image_tags.fakes import (
    CLASSES,
    SIDE,
    Head,
    balanced_oracle,
    bilinear,
    cam_oracle,
    encoder,
    gradients,
    items,
    main_cam,
    now,
    recipe,
    replayed,
    same_gradients,
    views,
)


def built(**changes):
    settings = PlainSettings(**changes)
    return Plain(settings, Trunk(encoder(), CLASSES, Head()), views(), recipe(settings)).train()


@pytest.mark.parametrize("step", [0, 9, 10, 99])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(seg_weight=0.3), items()
    view, trunk = replayed(method, samples), method.network
    tokens = trunk.encoder(view.x)
    pooled = torch.stack([patches.max(0).values for patches in tokens.patches])
    pooled_aux = torch.stack([patches.max(0).values for patches in tokens.auxiliary])
    expected = {
        "tags": F.multilabel_soft_margin_loss(pooled @ trunk.classifier.weight.T, samples.labels),
        "tags_aux": F.multilabel_soft_margin_loss(pooled_aux @ trunk.classifier_aux.weight.T, samples.labels),
    }
    if step >= 10:
        cam = cam_oracle(main_cam(trunk), view.x).detach()
        pixels = view.crop.images.float() / 255
        labels = refined_labels(pixels, cam, samples.labels, 0.25, 0.7, ~view.crop.padding)
        maps = tokens.patches.mT.reshape(len(view.x), -1, 4, 4)
        expected["segmentation"] = 0.3 * balanced_oracle(bilinear(trunk.head(maps), (SIDE, SIDE)), labels)
    found = method.losses({"tagged": samples}, now(step))
    assert found.terms.keys() == expected.keys() and found.pseudo == {}
    for name, term in found.terms.items():
        same_gradients(term, expected[name], trunk)


def test_the_head_s_loss_reaches_head_and_encoder_but_no_classifier():
    method = built()
    reached = gradients(method.losses({"tagged": items()}, now(50)).terms["segmentation"], method.network)
    assert {name.split(".")[0] for name in reached} == {"encoder", "head"}


def test_settings_are_checked():
    with pytest.raises(SettingError, match="seg_weight is -1"):
        PlainSettings(seg_weight=-1)
