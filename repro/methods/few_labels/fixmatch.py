"""FixMatch (Sohn et al., NeurIPS 2020): a confident weak view labels the strong view of the same image."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.forward import three_views
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class FixMatchSettings:
    threshold: float = hyper(0.95, "tau", "FixMatch, section 2.2", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "lambda_u", "FixMatch, section 2.2", low=0)

    def __post_init__(self):
        check(self)


def pseudo_label(weak_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class and confidence of the weak view.

    weak_logits: (U, K). Returns argmax (U,) int64 and max softmax (U,), both without gradient.
    """
    confidence, label = weak_logits.detach().softmax(dim=1).max(dim=1)
    return label, confidence


def consistency_loss(strong_logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """mean_b weight_b CE(label_b, softmax(strong_logits_b)): the mean runs over all U samples, unselected ones too.

    strong_logits: (U, K); label: (U,) int64; weight: (U,) in [0, 1] or bool. Source: FixMatch, Eq. 4.
    """
    return (F.cross_entropy(strong_logits, label, reduction="none") * weight).mean()


def weak_to_strong(method: Method, batch: dict[str, Items], now: Now) -> Losses:
    """One step of FixMatch and its descendants: cross-entropy of the labelled views, and `method.unlabelled`.

    method: has `network`, `views` and `unlabelled(weak_logits (U, K) without gradient, strong_logits (U, K), index
        (U,)) -> Losses`, which weights its terms, reports hard labels as "positive" and moves state by assigning
        buffers.
    """
    labelled, unlabelled = batch["labelled"], batch["unlabelled"]
    logits, weak_logits, strong_logits, _ = three_views(method.network, method.views, labelled, unlabelled, now.teacher)
    losses = method.unlabelled(weak_logits, strong_logits, unlabelled.index)
    return Losses({"supervised": F.cross_entropy(logits, labelled.labels)} | losses.terms, losses.pseudo)


class FixMatch(Method):
    Settings = FixMatchSettings

    def __init__(self, settings: FixMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.network, self.views = settings, network, views

    def unlabelled(self, weak_logits: Tensor, strong_logits: Tensor, index: Tensor) -> Losses:
        label, confidence = pseudo_label(weak_logits)
        mask = confidence >= self.settings.threshold
        loss = self.settings.unlabelled_weight * consistency_loss(strong_logits, label, mask)
        return Losses({"consistency": loss}, {"positive": PseudoLabels(index, label, mask, confidence)})

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        return weak_to_strong(self, batch, now)
