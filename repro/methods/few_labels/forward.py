"""The forward pass that FixMatch and its descendants share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.train import Items


def probabilities(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from normalised images (n, C, H, W) to softmax probabilities (n, K) in float32."""
    return lambda images: network(images).float().softmax(dim=1)


def three_views(
    network: nn.Module, views: Views, labelled: Items, unlabelled: Items, teacher: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in float32 of labelled weak (B, K), unlabelled weak (U, K; detached) and strong (U, K) views, and the
    unlabelled weak images (U, C, H, W).

    teacher: the averaged network, in evaluation mode; where CTAugment makes the strong view, it first learns from the
        teacher's prediction of a labelled probe (released code).
    One forward of the concatenation, so batch statistics mix all three (USB, TorchSSL).
    """
    views.learn(probabilities(teacher), labelled.images, labelled.labels)
    weak = views.weak(unlabelled.images)
    images = torch.cat([views.weak(labelled.images), weak, views.strong(unlabelled.images)])
    sizes = [len(labelled.images), len(unlabelled.images), len(unlabelled.images)]
    labelled_logits, weak_logits, strong_logits = network(images).float().split(sizes)
    return labelled_logits, weak_logits.detach(), strong_logits, weak
