"""FlexMatch (Zhang et al., NeurIPS 2021): FixMatch whose threshold follows each class's learning status."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.fixmatch import consistency_loss, pseudo_label, weak_to_strong
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class FlexMatchSettings:
    threshold: float = hyper(0.95, "tau", "FlexMatch, section 4.1", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "lambda", "FlexMatch, section 4.1", low=0)
    threshold_warmup: bool = hyper(True, "", "FlexMatch, Eq. 11: unused samples count as a class")

    def __post_init__(self):
        check(self)


def learning_status(selected: Tensor, classes: int, threshold_warmup: bool = True) -> Tensor:
    """beta (K,) in [0, 1]: how many samples each class last took confidently, relative to the best class.

    selected: (N,) int64, the class each unlabelled sample last had confidently, -1 for never.
    threshold_warmup: the denominator is also at least the number of samples still unset.
    All zero while nothing is selected. Source: FlexMatch, Eq. 5, 6 and 11.
    """
    counts = torch.zeros(classes + 1, dtype=torch.float32, device=selected.device)
    counts.scatter_add_(0, selected + 1, torch.ones_like(selected, dtype=torch.float32))
    unset, sigma = counts[0], counts[1:]
    best = torch.maximum(sigma.max(), unset) if threshold_warmup else sigma.max()
    return sigma / best.clamp(min=1)


def flexible_threshold(beta: Tensor, threshold: float) -> Tensor:
    """tau_c = tau * beta_c / (2 - beta_c), the convex mapping. Shapes as beta.

    Source: FlexMatch, Eq. 7 and section 4.3.
    """
    return threshold * beta / (2 - beta)


def remember(selected: Tensor, index: Tensor, label: Tensor, confident: Tensor) -> Tensor:
    """`selected` (N,) after a step: the class of each confident sample of the batch, others unchanged.

    index, label, confident: (U,). An index twice in the batch takes its last confident occurrence, by a maximum over
    positions rather than an indexed write, so the result is deterministic on every device (ours; toolboxes leave it
    open).
    """
    position = torch.arange(1, len(index) + 1, device=index.device) * confident
    last = torch.zeros_like(selected).scatter_reduce(0, index, position, "amax")
    chosen = label[(last - 1).clamp(min=0)]
    return torch.where(last > 0, chosen, selected)


class FlexMatch(Method):
    Settings = FlexMatchSettings

    def __init__(self, settings: FlexMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views, self.classes = settings, network, views, classes
        self.register_buffer("selected", torch.full((pool_size,), -1, dtype=torch.int64))

    def select(self, index: Tensor, label: Tensor, confidence: Tensor) -> Tensor:
        """The mask (U,) of this step, from the state before it; then the state moves (USB's order)."""
        beta = learning_status(self.selected, self.classes, self.settings.threshold_warmup)
        mask = confidence >= flexible_threshold(beta, self.settings.threshold)[label]
        confident = confidence >= self.settings.threshold
        self.selected = remember(self.selected, index, label, confident)
        return mask

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        mask = self.select(index, label, confidence)
        loss = self.settings.unlabelled_weight * consistency_loss(strong_logits, label, mask)
        return Losses({"consistency": loss}, {"positive": PseudoLabels(index, label, mask, confidence)})

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        return weak_to_strong(self, batch, now)
