"""CSL's step: terms and gradients against a second implementation, batch norm held back, masks on trusted pixels."""


import pytest
import torch

from repro.data.mask_views import MaskViews
from repro.methods.few_masks.common import cross_entropy, threshold_targets
from repro.methods.few_masks.csl import CSL, CSLSettings, csl_targets, image_weights
from repro.train import Items
from tests.methods.few_masks import fakes
from tests.methods.few_masks.fakes import (
    NOW,
    Twin,
    blocks,
    box,
    build,
    compare,
    crops,
    csl_oracle,
    labelled_loss,
    pasted,
    pseudo_loss,
    threshold_oracle,
    view,
)


def twin_step(twin, samples, settings):
    """L = (L_x + L_s / 4 + L_m / 4 + L_fp / 2) / 2; only [x_l; x_w] moves the averages."""

    def weigh(logits, padding):
        if settings.selection == "threshold":
            return threshold_oracle(logits, padding, settings.threshold)
        return csl_oracle(logits, padding, settings.alpha, settings.selection == "gaussian")

    x, u, mix = crops(samples)
    count = len(x.images)
    mix_targets = weigh(twin.trained(view(mix), move=False), mix.padding)
    weak = torch.cat([view(x), view(u)])
    logits = twin.trained(weak)
    targets = weigh(logits[count:], u.padding)
    where = box(0, len(u.images))
    candidates = blocks(len(u.images))
    hidden = {"none": candidates & False, "random": candidates, "reliable": candidates & (targets.weight == 1)}
    masked = view(u, 0.5) * ~hidden[settings.masking][:, None]
    strong = pasted(view(u, 1.5), view(mix, 2.0), where)
    strong_logits, masked_logits = twin.trained(torch.cat([strong, masked]), move=False).chunk(2)
    terms = {
        "supervised": labelled_loss(logits[:count], x.masks) / 2,
        "consistency": pseudo_loss(strong_logits, pasted(targets, mix_targets, where)) / 8,
        "masked": pseudo_loss(masked_logits, targets) / 8,
    }
    if settings.feature_perturbation:
        terms["features"] = pseudo_loss(twin.trained(weak, move=False, factor=2.0)[count:], targets) / 4
    return terms, targets, masked


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"masking": "random"},
        {"masking": "none"},
        {"feature_perturbation": False},
        {"alpha": 2.0},
        {"selection": "hard"},
        {"selection": "threshold", "threshold": 0.6},
    ],
    ids=str,
)
def test_a_step_is_that_of_a_second_implementation(changes):
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(CSL, network, **changes)
    losses = method.losses(samples, NOW)
    expected, targets, masked = twin_step(twin, samples, method.settings)
    compare(losses.terms, expected, network, twin)
    torch.testing.assert_close(network.passes[2][0][3:], masked.float())
    pixels = losses.pseudo["pixels"]
    assert torch.equal(pixels.index, samples["unlabelled"].index) and pixels.window == "window 1"
    assert torch.equal(pixels.label, targets.label) and torch.equal(pixels.valid, targets.valid)
    torch.testing.assert_close(pixels.weight.double(), targets.weight, rtol=1e-3, atol=1e-4)
    sure = (targets.weight == 1).sum()
    assert 0 < sure < targets.valid.sum() < targets.valid.numel()


def test_the_running_averages_move_once_and_by_the_labelled_and_weak_views():
    network, samples = fakes.TinyNetwork(), fakes.batch()
    twin, method = Twin(network), build(CSL, network)
    x, u, _ = crops(samples)
    twin.trained(torch.cat([view(x), view(u)]))
    method.losses(samples, NOW)
    assert twin.count == 1 and twin.same_averages(network)
    assert all(module.training for module in network.modules()) and network.backbone[1].track_running_stats


@pytest.mark.parametrize("features", [True, False])
def test_passes_and_draws(features):
    """Input sizes, the perturbed pass, training mode, whether averages move, gradients."""
    network = fakes.TinyNetwork()
    method = build(CSL, network, feature_perturbation=features, block=3, ratio=0.4)
    method.losses(fakes.batch(), NOW)
    modes = [(len(x), *rest) for x, *rest in network.passes]
    assert modes == [
        (3, False, True, False, False), (5, features, True, True, True), (6, False, True, False, True),
    ]  # fmt: skip
    drawn = [entry[0] for entry in method.views.drawn]
    assert drawn == ["crop"] * 3 + ["boxes", "strong", "strong", "masked"]
    assert method.views.drawn[-1] == ("masked", 3, 0.4)


# Masking through real views: a coin for each image


def real_step(masking, count=12, seed=3):
    """A step on real views; returns its method, the input of the last pass and a second copy of all its draws."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.full((count, 16, 16), 255, dtype=torch.uint8)
    items = Items(torch.arange(count), images, labels)
    samples = {"labelled": items, "unlabelled": items, "mix": items}
    network = fakes.TinyNetwork()
    views, again = (MaskViews(16, (0.5, 2.0), generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    method = CSL(CSLSettings(masking=masking, block=4), network, views, fakes.CLASSES, cross_entropy).train()
    losses = method.losses(samples, NOW)
    _, u, _ = (again.crop(images, labels) for _ in range(3))
    again.boxes(u), again.strong(u), again.strong(u)
    # The coin is the first draw of the masked view.
    state = again.generator.get_state()
    heads = again._uniform(count, 1, 1) < 0.5
    again.generator.set_state(state)
    plain, candidates = again.masked(u, 4, 0.7)
    return losses.pseudo["pixels"], network.passes[2][0][count:], plain, candidates, heads[:, 0, 0]


@pytest.mark.parametrize("masking", ["reliable", "random", "none"])
def test_heads_hide_trusted_pixels_and_tails_none(masking):
    pixels, seen, plain, candidates, heads = real_step(masking)
    where = {"reliable": candidates & (pixels.weight == 1), "random": candidates, "none": candidates & False}[masking]
    expected = torch.where(where[:, None], 0.0, plain)
    assert torch.equal(seen, expected)
    assert 0 < heads.sum() < len(heads) and not candidates[~heads].any()
    assert torch.equal(seen[~heads], plain[~heads])
    if masking == "reliable":
        assert where.any() and (candidates & ~where).any() and not (where & ~pixels.valid).any()
        share = candidates[heads].float().mean().item()
        assert share == pytest.approx(0.7, abs=0.1)
    hidden = (seen == 0).all(1) & ~(plain == 0).all(1)
    assert torch.equal(hidden, where & ~(plain == 0).all(1))


# Pseudo-labels


def logits_and_padding(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, 5, 9, 8, generator=generator), torch.rand(2, 9, 8, generator=generator) < 0.3


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"alpha": 3.0}, {"features": "confidence"}, {"features": "dispersion"}, {"rule": "and"}, {"scope": "class"},
        {"scope": "batch"}, {"form": "paper"}, {"selection": "hard"},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_reaches_the_weights(changes):
    logits, padding = logits_and_padding()
    settings = CSLSettings(**changes)
    targets = csl_targets(logits.requires_grad_(), padding, settings)
    options = {"soft": settings.selection == "gaussian"} | {k: v for k, v in changes.items() if k != "selection"}
    weight, features = image_weights(logits.detach().softmax(1), ~padding, **options)
    assert torch.equal(targets.weight, weight) and torch.equal(targets.label, logits.argmax(1))
    assert torch.equal(targets.confidence, features.confidence) and torch.equal(targets.valid, ~padding)
    assert not any(part.requires_grad for part in vars(targets).values())
    default = csl_targets(logits, padding, CSLSettings()).weight
    assert torch.equal(weight, default) == (not changes)


def test_the_threshold_ablation_is_fixmatchs_rule():
    logits, padding = logits_and_padding()
    ours = csl_targets(logits, padding, CSLSettings(selection="threshold", threshold=0.8, alpha=1.0, rule="and"))
    theirs = threshold_targets(logits, padding, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))
