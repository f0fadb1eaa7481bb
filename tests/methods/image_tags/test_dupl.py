"""DuPL: who teaches whom, what is cleaned by whom, and when; terms recomputed by loops."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from repro.cam import refined_labels
from repro.methods.image_tags import dupl as dupl_labels
from repro.methods.image_tags.common import Trunk
from repro.methods.image_tags.dupl import DuPL, DuPLSettings, Pair
from repro.settings import SettingError
from tests.methods.image_tags.fakes import (
    CLASSES,
    SCALES,
    SIDE,
    Head,
    aux_cam,
    balanced_oracle,
    bilinear,
    cam_oracle,
    encoder,
    gradients,
    items,
    main_cam,
    now,
    patch_label_oracle,
    patch_oracle,
    recipe,
    replayed,
    same_gradients,
    views,
)


def built(classes=CLASSES, **changes):
    settings = DuPLSettings(**{"least": 20, "gap": 0.1} | changes)
    torch.manual_seed(7)
    pair = Pair(Trunk(encoder(0), classes, Head()), Trunk(encoder(1), classes, Head()))
    return DuPL(settings, pair, views(), recipe(settings)).train()


def apart_oracle(first, second):
    """Two times one plus the mean cosine along patches, each with the other side held (spec 6.8)."""
    total = 0.0
    for held, moving in ((first.detach(), second), (second.detach(), first)):
        cosines = [
            F.cosine_similarity(held[b, :, d], moving[b, :, d], dim=0)
            for b in range(len(first))
            for d in range(first.shape[2])
        ]
        total = total + 1 + torch.stack(cosines).mean()
    return total


def high_oracle(step, tags, final=0.55):
    """Half a cosine wave from .7 at step 10 to .55 at step 99; every image shows a class."""
    done = min(max((step - 10) / 89, 0), 1)
    return torch.full((len(tags),), 0.7 + (final - 0.7) * (1 - math.cos(math.pi * done)) / 2)


def consistency_oracle(strong_logits, logits, labels, threshold):
    """Spec 6.8 (4) by loops over ignored pixels of sure class."""
    seen, sure = strong_logits.log_softmax(1), logits.detach().softmax(1).max(1)
    where = [at for at in (labels == 255).nonzero().tolist() if sure.values[tuple(at)] > threshold]
    assert len(where) > 1
    return sum(-seen[b, sure.indices[b, i, j], i, j] for b, i, j in where) / len(where)


WEIGHTS = {"ptc_weight": 0.4, "seg_weight": 0.3, "apart_weight": 0.5, "consistency_weight": 0.6}


@pytest.mark.parametrize("step", [0, 9, 10, 39, 40, 99])
def test_terms_and_gradients_are_those_of_the_equations(step):
    method, samples = built(confidence=0.4, **WEIGHTS), items(3)
    trunks, generator = (method.network.first, method.network.second), method.views.generator
    start = generator.get_state()
    view = method.view(samples)
    strong = method.views.strong(view.crop)
    generator.set_state(start)

    tokens = [trunk.encoder(view.x) for trunk in trunks]
    high = high_oracle(step, samples.labels)
    expected = {"patches": 0.0, "tags": 0.0, "tags_aux": 0.0}
    for trunk, part in zip(trunks, tokens, strict=True):
        aux = cam_oracle(aux_cam(trunk), view.x).detach()
        labels = patch_label_oracle(aux, samples.labels, view.crop.padding, high=high)
        expected["patches"] = expected["patches"] + 0.4 * patch_oracle(part.patches, labels)
        logits, logits_aux = trunk.classifier(part.patches.amax(1)), trunk.classifier_aux(part.auxiliary.amax(1))
        expected["tags"] = expected["tags"] + F.multilabel_soft_margin_loss(logits, samples.labels)
        expected["tags_aux"] = expected["tags_aux"] + F.multilabel_soft_margin_loss(logits_aux, samples.labels)
    expected["apart"] = 0.5 * apart_oracle(*(part.patches for part in tokens))
    if step >= 10:
        pixels, valid = view.crop.images.float() / 255, ~view.crop.padding
        cams = [cam_oracle(main_cam(trunk), view.x).detach() for trunk in trunks]
        labels = [refined_labels(pixels, cam, samples.labels, 0.25, high, valid) for cam in cams]
        maps = [part.patches.mT.reshape(3, -1, 4, 4) for part in tokens]
        logits = [bilinear(trunk.head(part), (SIDE, SIDE)) for trunk, part in zip(trunks, maps, strict=True)]
        if step >= 40:
            for own, scores in zip(labels, logits, strict=True):
                surprise = F.cross_entropy(scores.detach(), own, ignore_index=255, reduction="none")
                own[dupl_labels.noisy_labels(surprise, own, least=20, gap=0.1).noisy] = 255
            agreed = [consistency_oracle(trunks[k](strong), logits[k], labels[1 - k], 0.4) for k in (0, 1)]
            expected["consistency"] = 0.6 * sum(agreed)
        expected["segmentation"] = 0.3 * sum(balanced_oracle(logits[k], labels[1 - k]) for k in (0, 1))
    found = method.losses({"tagged": samples}, now(step)).terms
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        same_gradients(found[name], term, method)


def test_each_head_learns_the_other_s_labels_and_its_own_trunk_alone_is_moved(monkeypatch):
    """Labels that tell the trunks apart: the first one's CAM says class 1 everywhere, the second one's class 2."""
    method, samples = built(seg_weight=1.0), items(2)
    made = iter((1, 2))
    monkeypatch.setattr(method, "labels", lambda view, cam, high: torch.full((2, SIDE, SIDE), next(made)))
    view, trunks = replayed(method, samples), (method.network.first, method.network.second)
    term = method.losses({"tagged": samples}, now(20)).terms["segmentation"]
    logs = [trunk(view.x).log_softmax(1) for trunk in trunks]
    torch.testing.assert_close(term, -0.5 * (logs[0][:, 2].mean() + logs[1][:, 1].mean()), rtol=1e-4, atol=1e-5)
    # the label of one trunk is a constant for the other
    first = torch.autograd.grad(-0.5 * logs[0][:, 2].mean(), trunks[0].head.layer.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(term, trunks[0].head.layer.weight)[0], first, rtol=1e-4, atol=1e-6)


def test_labels_are_judged_by_the_trunk_that_made_them(monkeypatch):
    method, samples = built(seg_weight=1.0, least=33, gap=0.7, certainty=0.8), items(2)
    made, asked = iter((1, 2)), []
    monkeypatch.setattr(method, "labels", lambda view, cam, high: torch.full((2, SIDE, SIDE), next(made)))

    def noisy(loss, labels, **rules):
        asked.append((loss, labels, rules))
        where = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
        where[:, : 4 * len(asked)] = True  # four rows of the first trunk's labels, eight of the second one's
        return SimpleNamespace(noisy=where)

    monkeypatch.setattr(dupl_labels, "noisy_labels", noisy)
    view, trunks = replayed(method, samples), (method.network.first, method.network.second)
    logs = [trunk(view.x).log_softmax(1) for trunk in trunks]
    terms = method.losses({"tagged": samples}, now(40)).terms
    for (loss, labels, rules), label, log in zip(asked, (1, 2), logs, strict=True):
        assert (labels == label).all() and not loss.requires_grad
        torch.testing.assert_close(loss, -log[:, label].detach(), rtol=1e-4, atol=1e-5)
        assert rules == {"least": 33, "gap": 0.7, "certainty": 0.8}
    taught = -0.5 * (logs[0][:, 2, 8:].mean() + logs[1][:, 1, 4:].mean())
    torch.testing.assert_close(terms["segmentation"], taught, rtol=1e-4, atol=1e-5)


def test_before_forty_percent_nothing_is_cleaned(monkeypatch):
    method, samples = built(), items(2)
    monkeypatch.setattr(dupl_labels, "noisy_labels", lambda *_, **__: pytest.fail("cleaned too early"))
    assert "consistency" not in method.losses({"tagged": samples}, now(39)).terms
    with pytest.raises(pytest.fail.Exception):
        method.losses({"tagged": samples}, now(40))


def test_the_consistency_reaches_heads_and_encoders_but_no_classifier(monkeypatch):
    method, samples = built(confidence=0.0), items(2)
    monkeypatch.setattr(method, "labels", lambda view, cam, high: torch.full((2, SIDE, SIDE), 255))
    reached = gradients(method.losses({"tagged": samples}, now(60)).terms["consistency"], method.network)
    assert {".".join(name.split(".")[:2]) for name in reached} == {
        f"{trunk}.{part}" for trunk in ("first", "second") for part in ("head", "encoder")
    }


def test_thresholds_of_the_warm_up_the_end_and_an_image_s_classes():
    method, samples = built(), items()
    view = replayed(method, samples)
    for step in (0, 10, 55, 99):
        torch.testing.assert_close(method.thresholds(view, now(step)), high_oracle(step, samples.labels))
    method.final = torch.tensor([0.7, 0.55, 0.6])
    tags = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 1, 1]])
    high = method.thresholds(SimpleNamespace(tags=tags), now(99))
    assert high.tolist() == pytest.approx([0.7, 0.55, 0.6])


def test_six_classes_of_pascal_keep_their_threshold():
    method = built(classes=20)
    assert [index for index, value in enumerate(method.final.tolist()) if value > 0.6] == [0, 1, 2, 3, 8, 18]
    assert method.final.min() == pytest.approx(0.55)
    assert built(classes=20, final_high=0.6).final.min() == pytest.approx(0.6)
    assert built().final.tolist() == pytest.approx([0.55] * CLASSES)


def test_the_first_trunk_is_evaluated():
    method, x = built(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tags = torch.ones(2, CLASSES)
    assert torch.equal(method.network(x), method.network.first(x))
    expected = cam_oracle(main_cam(method.network.first), x)
    torch.testing.assert_close(method.network.activation(x, SCALES, tags), expected, rtol=1e-4, atol=1e-5)


def test_settings_are_checked():
    with pytest.raises(SettingError, match="clean_from is 1.5"):
        DuPLSettings(clean_from=1.5)
