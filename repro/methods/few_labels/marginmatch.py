"""MarginMatch (Sosea & Caragea, CVPR 2023): FlexMatch that also asks how a pseudo-label's margin has fared so far.

The bar is learnt: a few unlabelled images are trained as an extra class K that none of them belongs to, and gamma is a
high percentile of their average pseudo-margins (APM) at that class, so a sample below it looks like a mislabelled one.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.common import (
    Checked,
    FewLabels,
    average_margins,
    consistency_loss,
    last_of_each,
    margins,
    pseudo_label,
    three_views,
    zeroed_margins,
)
from repro.methods.few_labels.fixmatch import flexible_threshold, learning_status, remember
from repro.settings import hyper
from repro.train import Items, Losses, Now, PseudoLabels


@dataclass(frozen=True)
class MarginMatchSettings(Checked):
    threshold: float = hyper(0.95, "tau", "FlexMatch; released code", low=0, high=1)
    unlabelled_weight: float = hyper(1.0, "lambda_u", "released code", low=0)
    threshold_warmup: bool = hyper(True, "", "FlexMatch, Eq. 11; released code")
    delta: float = hyper(0.997, "delta", "MarginMatch; released code", low=0, high=1)
    warmup: int = hyper(80_000, "", "released code: iterations without extra class and gamma", low=0)
    refresh_every: int = hyper(200, "", "released code: iterations between two values of gamma", low=1)
    redraw_every: int = hyper(50_000, "", "released CIFAR-10 config: iterations that a mislabelled subset lasts", low=1)
    delay: int = hyper(1_000, "", "released CIFAR-10 config: iterations of a new subset before it moves gamma", low=0)
    subset_share: float = hyper(0.01, "", "released code; at most 1/K of the pool either way", low=0, high=1)
    subset_until: float = hyper(0.9, "", "released code: fraction of training after which none is", low=0, high=1)
    percentile: float = hyper(0.95, "", "released configs: 95; share of the subset's APM below gamma", low=0, high=1)
    percentile_rule: str = hyper(
        "quantile",
        "",
        "quantile: ours, as the text has it; released divides by 100 twice and reads a descending list near its top",
        choices=("quantile", "released"),
    )
    runner_up: str = hyper(
        "true", "", "zeroed: released code seeks the second logit after zeroing the first", choices=("true", "zeroed")
    )
    apm_class: str = hyper(
        "pseudo_label", "", "argmax: released code's, over K + 1 logits", choices=("pseudo_label", "argmax")
    )


def margin_threshold(apm: Tensor, percentile: float, rule: str = "quantile") -> Tensor:
    """gamma, 0-dim, from the mislabelled subset's APM at the extra class.

    apm: (n,), n at least 1; percentile: in [0, 1]; rule: see `MarginMatchSettings.percentile_rule`.
    """
    if rule == "quantile":
        return apm.quantile(percentile)
    return apm.sort(descending=True).values[int(len(apm) * percentile // 100)]


class ExtraClassNetwork(nn.Module):
    """A classifier with one more linear output on its features, for the mislabelled class K.

    network: has `features(images) -> (n, D)` and `head`, linear with D inputs and K outputs. `forward` is its own, so
    evaluation, the averaged weights and calibration see K classes; training uses `all_logits`.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        inputs, classes = network.head.in_features, network.head.out_features
        self.extra = nn.Linear(inputs, 1)
        nn.init.normal_(self.extra.weight, std=(2 / (inputs + classes + 1)) ** 0.5)  # Xavier of a head with K + 1
        nn.init.zeros_(self.extra.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits (n, K) of normalised images (n, C, H, W)."""
        return self.network(images)

    def all_logits(self, images: Tensor) -> Tensor:
        """Logits (n, K + 1), the extra class last."""
        features = self.network.features(images)
        return torch.cat([self.network.head(features), self.extra(features)], dim=1)


class MarginMatch(FewLabels):
    """L = CE(labelled) + lambda_u mean_b w_b CE(c_b, strong_b), over K + 1 classes.

    w_b = 1[m_b >= tau_c] 1[APM_bc >= gamma], or, for a mislabelled image, c_b = K and w_b = the share of the batch that
    is selected (released code).
    """

    Settings = MarginMatchSettings

    def __init__(self, settings: MarginMatchSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__(settings, ExtraClassNetwork(network), views, classes, pool_size)
        subset = max(1, min(int(pool_size * settings.subset_share), pool_size // classes))
        self.register_buffer("selected", torch.full((pool_size,), -1, dtype=torch.int64))
        self.register_buffer("apm", torch.zeros(pool_size, classes + 1))
        self.register_buffer("apm_visits", torch.zeros(pool_size, dtype=torch.int64))
        self.register_buffer("gamma", torch.tensor(0.0))
        self.register_buffer("drawable", torch.ones(pool_size, dtype=torch.bool))
        self.register_buffer("subset", torch.zeros(subset, dtype=torch.int64))  # pool indices, read while it lasts
        self.register_buffer("mislabelled", torch.zeros(pool_size, dtype=torch.bool))
        # A subset's margins start from nothing; meanwhile its images' own records rest.
        self.register_buffer("subset_apm", torch.zeros(pool_size, classes + 1))
        self.register_buffer("subset_visits", torch.zeros(pool_size, dtype=torch.int64))

    def begin_stage(self, stage, pool):
        self.drawable = torch.zeros_like(self.drawable).scatter(0, pool.unlabelled, True)  # without any held-out image

    def renew(self, now: Now) -> None:
        """Draw, end or read the mislabelled subset, as the step asks; draws from torch's global generator."""
        settings, age = self.settings, now.step - self.settings.warmup
        if now.progress >= settings.subset_until:
            self.mislabelled = torch.zeros_like(self.mislabelled)
        elif age >= 0 and age % settings.redraw_every == 0:
            chance = torch.rand(len(self.drawable), device=self.drawable.device).where(self.drawable, -1)
            self.subset = chance.topk(len(self.subset)).indices
            self.mislabelled = torch.zeros_like(self.mislabelled).scatter(0, self.subset, True)
            self.subset_apm = torch.zeros_like(self.subset_apm)
            self.subset_visits = torch.zeros_like(self.subset_visits)
        elif age > 0 and now.step % settings.refresh_every == 0 and age % settings.redraw_every > settings.delay:
            at_extra = self.subset_apm[self.subset, self.classes]
            self.gamma = margin_threshold(at_extra, settings.percentile, settings.percentile_rule)

    def record(self, index: Tensor, logits: Tensor) -> Tensor:
        """APM (U, K + 1) of the batch, after it has taken in the weak logits (U, K + 1)."""
        margin = (zeroed_margins if self.settings.runner_up == "zeroed" else margins)(logits)
        mislabelled, counted = self.mislabelled[index], last_of_each(index)
        self.apm, self.apm_visits = average_margins(
            self.apm, self.apm_visits, index, margin, self.settings.delta, counted & ~mislabelled
        )
        self.subset_apm, self.subset_visits = average_margins(
            self.subset_apm, self.subset_visits, index, margin, self.settings.delta, counted & mislabelled
        )
        return torch.where(mislabelled[:, None], self.subset_apm[index], self.apm[index])

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        self.renew(now)
        logits, weak_logits, strong_logits, _ = three_views(
            self.network.all_logits, self.views, labelled, unlabelled, now.teacher
        )
        index, mislabelled = unlabelled.index, self.mislabelled[unlabelled.index]
        apm = self.record(index, weak_logits)
        label, confidence = pseudo_label(weak_logits[:, : self.classes])
        beta = learning_status(self.selected, self.classes, settings.threshold_warmup)
        mask = confidence >= flexible_threshold(beta, settings.threshold)[label]
        if now.step >= settings.warmup:
            column = label if settings.apm_class == "pseudo_label" else weak_logits.argmax(dim=1)
            mask = mask & (apm.gather(1, column[:, None])[:, 0] >= self.gamma)
        confident = (confidence >= settings.threshold) & ~mislabelled
        self.selected = remember(self.selected, index, label, confident)
        target = torch.where(mislabelled, self.classes, label)
        weight = torch.where(mislabelled, mask.float().mean(), mask.float())
        return Losses(
            {
                "supervised": F.cross_entropy(logits, labelled.labels),
                "consistency": settings.unlabelled_weight * consistency_loss(strong_logits, target, weight),
            },
            {"positive": PseudoLabels(index, label, mask & ~mislabelled, confidence)},
        )
