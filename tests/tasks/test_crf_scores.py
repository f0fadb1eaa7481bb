"""Final scores recounted image by image, the methods' protocols, and both ways of inferring the CRF."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from repro.data.mask_views import MaskViews
from repro.measure.segmentation import confusion
from repro.solvers.crf import CRF, mean_field
from repro.tasks import tags as crf_scores
from repro.tasks.tags import Protocol, inference_of, protocol_counts, protocol_of, protocol_scores

K = 4
CRFS = CRF(1.0, 1.0, 4.0, 6.0, 30.0, 3)


class Network(nn.Module):
    """A head at half the size, in whose logits dropout would be seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop = nn.Conv2d(3, K, 3, 2, 1), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(F.interpolate(3 * self.layer(x), x.shape[2:], mode="bilinear"))


def batches(sizes):
    """Images and masks of these sizes (H, W), one batch each; masks hold ignored pixels."""
    generator = torch.Generator().manual_seed(1)
    for count, *size in sizes:
        images = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), size, mode="bilinear").mul(255).byte()
        masks = torch.randint(0, K, (count, *size), generator=generator, dtype=torch.uint8)
        yield images, masks.masked_fill(torch.rand(count, *size, generator=generator) < 0.1, 255)


def resized(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def recounted(network, items, protocol, views, chosen=None):
    """Counts by loops over images, scales and directions."""
    smooth, refined, position = torch.zeros(K, K, dtype=torch.long), torch.zeros(K, K, dtype=torch.long), 0
    network.eval()
    for images, masks in items:
        for image, mask in zip(images, masks, strict=True):
            x, (height, width) = views.plain(image[None]), mask.shape
            if protocol.frame:
                x = resized(x, (protocol.frame, protocol.frame))
            if protocol.long:
                share = protocol.long / max(height, width)
                x = resized(x, (int(height * share), int(width * share)))
            over_scales = []
            for scale in protocol.scales:
                seen = resized(x, (int(x.shape[2] * scale), int(x.shape[3] * scale)))
                with torch.no_grad():
                    total = resized(network(seen), mask.shape) + resized(network(seen.flip(3)), mask.shape).flip(3)
                over_scales.append(total / 2 if protocol.halved else total)
            logits = over_scales[0]
            if protocol.form == "max":
                for other in over_scales[1:]:
                    logits = torch.maximum(logits, other)
            else:
                logits = torch.maximum(logits, sum(over_scales) / len(over_scales))
            smooth += confusion(mask[None], logits.argmax(1), K)[0]
            if chosen is None or position in chosen:
                labels = mean_field(logits.softmax(1), image[None], protocol.crf).argmax(1)
                refined += confusion(mask[None], labels, K)[0]
            position += 1
    return smooth, refined


PROTOCOLS = {
    "toco": Protocol(CRFS),
    "pcre": Protocol(CRFS, form="mean-or-first", frame=20),
    "afa": Protocol(CRFS, (1.0, 0.5, 0.75), long=24, halved=True),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_counts_are_those_of_each_image_alone(name):
    network, views, sizes = Network(), MaskViews(20), [(2, 16, 16), (1, 13, 22), (3, 18, 11)]
    network.train()
    found = protocol_counts(network, batches(sizes), K, PROTOCOLS[name], views, "exact", torch.tensor([0, 2, 4]))
    assert network.drop.training
    smooth, refined = recounted(network, batches(sizes), PROTOCOLS[name], views, (0, 2, 4))
    # sums over a batch may round another way at a tie
    assert (found["ms_confusion"] - smooth).abs().sum() <= 4 and found["ms_confusion"].sum() == smooth.sum()
    assert (found["crf_confusion"] - refined).abs().sum() <= 4 and found["crf_confusion"].sum() == refined.sum()
    assert not torch.equal(found["ms_confusion"], found["crf_confusion"])


def test_all_images_meet_the_crf_unless_some_are_chosen():
    network, views, sizes = Network(), MaskViews(16), [(2, 8, 8), (1, 8, 8)]
    every = protocol_counts(network, batches(sizes), K, PROTOCOLS["toco"], views)
    assert every["crf_confusion"].sum() == every["ms_confusion"].sum()
    none = protocol_counts(network, batches(sizes), K, PROTOCOLS["toco"], views, "none")
    assert set(none) == {"ms_confusion"} and torch.equal(none["ms_confusion"], every["ms_confusion"])


def test_published_protocols():
    toco = protocol_of("toco", "voc", 448)
    assert toco == protocol_of("dupl", "coco2014", 448) == protocol_of("plain", "voc", 448) == Protocol(CRF())
    assert toco.scales == (1.0, 1.25, 1.5) and toco.form == "max" and toco.crf == CRF(1.0, 1.0, 4.0, 121.0, 5.0, 10)
    assert protocol_of("pcre", "voc", 448) == Protocol(CRF(1.0, 2.0, 7.0, 140.0, 1.0), form="mean-or-first", frame=448)
    assert protocol_of("pcre", "coco2014", 448) == Protocol(CRF(1.0, 1.0, 7.0, 140.0, 1.0))
    afa = Protocol(CRF(3.0, 3.0, 4.0, 64.0, 5.0), (1.0, 0.5, 0.75), long=512, halved=True)
    assert protocol_of("afa", "voc", 320) == afa


def test_other_sizes_are_brought_to_the_crop():
    """Of files, a square; of scenes nothing is resized but the CRF's widths."""
    assert protocol_of("toco", "voc", 64) == Protocol(CRF(), frame=64)
    assert protocol_of("afa", "voc", 448).frame == 448 and protocol_of("afa", "voc", 448).long == 0
    scenes = protocol_of("pcre", "scenes", 64)
    assert scenes.frame == scenes.long == 0 and scenes.form == "mean-or-first"
    assert (scenes.crf.position_xy, scenes.crf.xy, scenes.crf.rgb) == pytest.approx((2 / 7, 20.0, 1.0))
    assert protocol_of("toco", "scenes", 448).crf == CRF()


def test_large_images_without_the_package_leave_the_crf_out(monkeypatch):
    monkeypatch.setattr(crf_scores, "has_lattice", lambda: True)
    assert inference_of("scenes", 96) == "exact"
    assert inference_of("scenes", 128) == inference_of("voc", 64) == "lattice"
    monkeypatch.setattr(crf_scores, "has_lattice", lambda: False)
    assert inference_of("scenes", 64) == "exact"
    with pytest.warns(UserWarning, match="miou_crf is left out: above 9,216 pixels it needs pydensecrf2: pip install"):
        assert inference_of("voc", 448) == "none"


def test_scores_are_mean_iou():
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    scores = protocol_scores({"ms_confusion": counts})
    assert scores["iou_ms"] == [6 / 9, 3 / 6, None] and scores["miou_ms"] == pytest.approx((6 / 9 + 3 / 6) / 3)
    assert scores["miou_crf"] is None and scores["iou_crf"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in scores.values())
