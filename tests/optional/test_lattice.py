"""The CRF of large images against the exact one; needs pydensecrf2, which is no dependency:

    pip install -e ".[crf]" && python -m pytest tests/optional
"""

import torch
from torch.nn import functional as F

from repro.data.mask_views import MaskViews
from repro.solvers.crf import CRF, lattice_crf, mean_field
from repro.tasks.tags import protocol_counts
from tests.solvers.test_crf import C
from tests.tasks.test_crf_scores import PROTOCOLS, K, Network, batches


def test_the_lattice_infers_nearly_the_same():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, C, 4, 4, generator=generator)
    probs = F.interpolate(coarse, (32, 40), mode="bilinear").mul(2).softmax(1)
    images = F.interpolate(torch.rand(1, 3, 5, 5, generator=generator), (32, 40)).mul(255).byte()
    for crf in (CRF(1.0, 1.0, 4.0, 12.0, 5.0), CRF(3.0, 3.0, 4.0, 64.0, 5.0)):
        exact = mean_field(probs, images, crf)[0]
        found = torch.from_numpy(lattice_crf(probs[0].numpy(), images[0].permute(1, 2, 0).numpy(), crf))
        assert (found - exact).abs().mean() < 0.01
        assert (found.argmax(0) == exact.argmax(0)).float().mean() > 0.98
        assert (exact.argmax(0) != probs[0].argmax(0)).any()


def test_processes_find_what_one_call_finds():
    network, views, sizes = Network(), MaskViews(16), [(2, 24, 20), (1, 21, 26), (1, 20, 20)]
    found = protocol_counts(network, batches(sizes), K, PROTOCOLS["toco"], views, "lattice")
    exact = protocol_counts(network, batches(sizes), K, PROTOCOLS["toco"], views, "exact")
    assert torch.equal(found["ms_confusion"], exact["ms_confusion"])
    assert found["crf_confusion"].sum() == exact["crf_confusion"].sum()
    assert (found["crf_confusion"] - exact["crf_confusion"]).abs().sum() < 0.05 * exact["crf_confusion"].sum()
