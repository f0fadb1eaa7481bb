"""Mean Teacher (Tarvainen & Valpola, NeurIPS 2017): agree with an average of one's own past weights.

Follows TorchSSL. USB reads the student's logits from the teacher's output: its consistency term is exactly 0,
its published Mean Teacher supervised training (76.93 % against 77.58 % error, CIFAR-10 with 40 labels).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.pseudo_label import linear_ramp
from repro.models.modes import held_statistics
from repro.settings import check, hyper
from repro.train import Items, Losses, Method, Now, PseudoLabels


@dataclass(frozen=True)
class MeanTeacherSettings:
    unlabelled_weight: float = hyper(50.0, "lambda_u", "released code (USB, TorchSSL)", low=0)
    ramp: float = hyper(0.4, "", "released code (USB, TorchSSL), fraction of training", low=0, high=1)

    def __post_init__(self):
        check(self)


def squared_error(logits: Tensor, target: Tensor) -> Tensor:
    """mean over samples and classes of (softmax(logits) - target)^2; the target gets no gradient.

    logits: (n, K); target: (n, K), probabilities. Source: released code (TorchSSL); MixMatch, Eq. 4.
    """
    return F.mse_loss(logits.softmax(dim=1), target.detach())


class MeanTeacher(Method):
    """L = CE(labelled) + ramp * weight * MSE(student on one weak view, EMA teacher on another).

    Both passes over unlabelled images normalise by their own batch and leave the running averages alone: what
    TorchSSL calls freezing BN. The teacher is the network that the loop averages and evaluates.
    """

    Settings = MeanTeacherSettings

    def __init__(
        self, settings: MeanTeacherSettings, network: nn.Module, views: Views, classes: int, pool_size: int
    ):
        super().__init__()
        self.settings, self.network, self.views = settings, network, views

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        logits = self.network(self.views.weak(labelled.images)).float()
        with torch.no_grad(), held_statistics(now.teacher):
            target = now.teacher(self.views.weak(unlabelled.images)).float().softmax(dim=1)
        with held_statistics(self.network):
            student_logits = self.network(self.views.weak(unlabelled.images)).float()
        confidence, label = target.max(dim=1)
        every = torch.ones_like(label, dtype=torch.bool)
        weight = settings.unlabelled_weight * linear_ramp(now.progress, settings.ramp)
        return Losses(
            {
                "supervised": F.cross_entropy(logits, labelled.labels),
                "consistency": weight * squared_error(student_logits, target),
            },
            {"positive": PseudoLabels(unlabelled.index, label, every, confidence)},
        )
