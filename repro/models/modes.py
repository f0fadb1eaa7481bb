"""Temporary modes of a network: batch norm that leaves no trace, and dropout alone switched on.

Every mode is read and put back module by module, also when the body raises, so a partly frozen network
returns exactly as it came. A compiled network shares its modules with the original: a mode costs one
compilation, once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


@contextmanager
def held_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms use the statistics of their batch and leave running averages and batch counts untouched.

    network: any module, in train or eval mode; what is not a batch norm keeps its mode.
    Source: the unlabelled passes of MixMatch, Mean Teacher (released codes) and CSL.
    """
    before = [(module, module.training, module.track_running_stats) for module in batch_norms(network)]
    try:
        for module, _, _ in before:
            module.training, module.track_running_stats = True, False
        yield
    finally:
        for module, training, tracking in before:
            module.training, module.track_running_stats = training, tracking


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode everywhere; every module's own mode comes back afterwards."""
    before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def dropout_only(network: nn.Module) -> Iterator[None]:
    """Eval mode everywhere except in dropout modules, which draw (Gal & Ghahramani, 2016).

    network: any module; functional dropout inside a forward follows its owner's mode and so stays off.
    """
    before = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in before:
            module.training = isinstance(module, _DropoutNd)
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def stochastic_logits(network: nn.Module, x: Tensor, passes: int) -> Tensor:
    """Logits (T, B, K) of T dropout passes over x (B, ...); batch norm in eval mode, no gradients.

    passes: T, at least 2, since a spread is wanted.
    Raises ValueError when T is smaller, or when the network has no dropout module with p > 0: the spread
    would be 0 and every sample would look stable.
    Source: UPS (released code, T = 10). One forward a pass: a batch repeated T times has the same
    distribution, but T times the memory, and took 1.1 to 2.1 times as long (wrn-10-1 at B = 32, 224; wrn-28-2
    at 64; one core).
    """
    if passes < 2:
        raise ValueError(f"passes is {passes}; a spread over passes needs at least 2")
    if not any(module.p > 0 for module in network.modules() if isinstance(module, _DropoutNd)):
        raise ValueError(
            "no dropout module has p > 0, so passes would not differ; build the network with dropout"
        )
    with dropout_only(network):
        # a copy of each, since a network compiled to CUDA graphs reuses the memory of its last output
        return torch.stack([network(x).clone() for _ in range(passes)])


def stochastic_probs(network: nn.Module, x: Tensor, passes: int, temperature: float = 1.0) -> Tensor:
    """Class probabilities (T, B, K) of T dropout passes: softmax of the logits over `temperature`.

    x, passes: as in `stochastic_logits`, whose errors apply. Half precision is widened to float32.
    temperature: > 0. UPS takes its negatives at 2 from the passes of its positives: `stochastic_logits`
        serves both.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    logits = stochastic_logits(network, x, passes)
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).softmax(-1)


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a network, in the order of `network.modules()`."""
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]
