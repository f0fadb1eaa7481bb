"""UPS (Rizve et al., ICLR 2021): train in rounds, each from scratch on what the last was sure and steady of.

After each round, dropout passes over the pool give every image a mean prediction and its spread. Confident,
steady classes become labels; classes steadily held to be improbable, negative labels.

Deviations from the released code: it draws new weights each round, here every round starts from those the
network came with, so a resumed run needs no copy of them in its checkpoint. It augments every image by
RandAugment (3 operations at magnitude 4), crop, flip, colour jitter and Cutout; here by the strong flavour of
`views`. It evaluates the live weights, without EMA: a recipe with `ema=0` does so.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.commatch import instability, negative_loss, select_negative, select_positive
from repro.methods.few_labels.common import Checked, FewLabels
from repro.models.modes import stochastic_logits
from repro.settings import SettingError, hyper
from repro.train import Items, Losses, Now, PseudoLabels

IMAGES_PER_PASS = 512  # memory only; batch norm is in evaluation mode, so results do not depend on it


@dataclass(frozen=True)
class UPSSettings(Checked):
    rounds: int = hyper(20, "", "released code; each has the recipe's steps", low=1)
    passes: int = hyper(10, "T", "UPS, released code", low=2)
    positive_threshold: float = hyper(0.7, "tau_p", "UPS, released code", low=0, high=1)
    negative_threshold: float = hyper(0.05, "tau_n", "UPS, released code", low=0, high=1)
    positive_stability: float = hyper(0.05, "kappa_p", "released code; 1 switches it off", low=0)
    negative_stability: float = hyper(0.005, "kappa_n", "released code; 1 switches it off", low=0)
    negative_temperature: float = hyper(2.0, "", "released code", low=1e-2)
    balanced_rounds: int = hyper(10, "", "released code: earlier rounds train on balanced labels", low=0)
    class_minimum: int = hyper(25, "", "released code: balancing leaves a class at least so many", low=1)
    view: str = hyper("strong", "", "released code augments every image strongly", choices=("strong", "weak"))


def balance(label: Tensor, deviation: Tensor, selected: Tensor, classes: int, minimum: int) -> Tensor:
    """The mask `selected` (n,) with each class cut to its steadiest samples, as many as the rarest class has.

    label: (n,) int64; deviation: (n,), of the probability of `label`; minimum: a class keeps at least so many, where it
    has them. Ties go to the lower index. Reads counts on the host. Source: released code, which leaves ties open.
    """
    quota = max(minimum, int(torch.bincount(label[selected], minlength=classes).min()))
    kept = torch.zeros_like(selected)
    for k in range(classes):
        members = (selected & (label == k)).nonzero()[:, 0]
        kept[members[deviation[members].argsort(stable=True)[:quota]]] = True
    return kept


def batch_shares(batch: int, positives: int, negatives: int) -> tuple[int, int]:
    """How many samples of a batch carry a label and how many only negative ones.

    In proportion to their numbers, at most half of them negative. Source: released code.
    """
    share = batch * negatives // (max(positives, negatives) + negatives) if negatives else 0
    return batch - share, share


class UPS(FewLabels):
    """L = CE(given and positive labels) - mean_b sum_c g_bc log(1 - p_bc) / sum_c g_bc, g negative labels.

    network: needs dropout; UPS uses .3. The mean over b runs over the batch's samples with negative labels.
    """

    Settings = UPSSettings

    def __init__(self, settings: UPSSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, network, views, classes, pool_size)
        if not any(module.p > 0 for module in network.modules() if isinstance(module, nn.Dropout)):
            raise SettingError(
                "UPS measures uncertainty by dropout: build the network with dropout > 0 (published: .3)"
            )
        self.start = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
        self.register_buffer("positive", torch.full((pool_size,), -1, dtype=torch.int64))
        self.register_buffer("confidence", torch.zeros(pool_size))
        self.register_buffer("negative", torch.zeros(pool_size, classes, dtype=torch.bool))
        self.register_buffer("negative_confidence", torch.zeros(pool_size, classes))

    def stages(self, steps):
        return [steps] * self.settings.rounds

    def begin_stage(self, stage, pool):
        if stage > 0:
            self.relabel(pool, balanced=stage < self.settings.balanced_rounds)
            self.network.load_state_dict(self.start)

    @torch.no_grad()
    def relabel(self, pool, balanced: bool) -> None:
        """Replace all pseudo-labels of images without a given label by those of the network as it is now."""
        settings = self.settings
        hidden = pool.unlabelled[pool.labels[pool.unlabelled] < 0]
        if len(hidden) == 0:
            return
        parts = [self.judge(self.views.plain(pool.images[index])) for index in hidden.split(IMAGES_PER_PASS)]
        mean, deviation, soft_mean, soft_deviation = (torch.cat(part) for part in zip(*parts, strict=True))
        label, selected, confidence = select_positive(
            mean, deviation, settings.positive_threshold, settings.positive_stability
        )
        if balanced:
            spread = deviation.gather(1, label[:, None])[:, 0]
            selected = balance(label, spread, selected, self.classes, settings.class_minimum)
        negative = select_negative(
            soft_mean, soft_deviation, settings.negative_threshold, settings.negative_stability, spared=label
        )
        self.positive[hidden] = torch.where(selected, label, -1)
        self.confidence[hidden] = confidence
        self.negative[hidden] = negative & ~selected[:, None]
        self.negative_confidence[hidden] = 1 - soft_mean

    def judge(self, images: Tensor) -> tuple[Tensor, ...]:
        """Mean and deviation (n, K) over dropout passes, at temperature 1 and at the negatives'."""
        logits = stochastic_logits(self.network, images, self.settings.passes).float()
        soft = (logits / self.settings.negative_temperature).softmax(dim=-1)
        return *instability(logits.softmax(dim=-1)), *instability(soft)

    def streams(self, pool, recipe):
        positives = torch.cat([pool.labelled, (self.positive >= 0).nonzero()[:, 0]])
        negatives = self.negative.any(dim=1).nonzero()[:, 0]
        with_label, without = batch_shares(recipe.batch, len(positives), len(negatives))
        streams = {"positive": (positives, with_label)}
        return streams | {"negative": (negatives, without)} if without else streams

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        given = batch["positive"]
        images = torch.cat([batch[name].images for name in ("positive", "negative") if name in batch])
        view = self.views.strong if self.settings.view == "strong" else self.views.weak
        logits, negative_logits = self.network(view(images)).float().tensor_split([len(given.labels)])
        labels = torch.where(given.labels >= 0, given.labels, self.positive[given.index])
        terms = {"positive": F.cross_entropy(logits, labels)}
        if "negative" in batch:
            mask = self.negative[batch["negative"].index]
            terms["negative"] = negative_loss(negative_logits, mask, mean_over="selected")
        return Losses(terms, self.report() if now.stage > 0 and now.step == 0 else {})

    def report(self) -> dict[str, PseudoLabels]:
        """The pseudo-labels of the whole pool: they change once a round, so they are reported once."""
        index = torch.arange(len(self.positive), device=self.positive.device)
        classes = torch.arange(self.classes, device=index.device).expand_as(self.negative)
        selected = self.positive >= 0
        return {
            "positive": PseudoLabels(index, self.positive.clamp(min=0), selected, self.confidence),
            "negative": PseudoLabels(index, classes, self.negative, self.negative_confidence),
        }
