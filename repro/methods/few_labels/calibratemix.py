"""CalibrateMix (arXiv 2511.12964): mixup across the divides of easy and hard, and of labelled and unlabelled images.

How hard an image is follows from its margins over training: AUM where it is labelled, APM where it is not. Follows the
code released for SoftMatch; on FixMatch, FlexMatch and FreeMatch it is a **reconstruction**: their loss and mask in its
place. The paper's own text could not be had.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repro.data.augment import Views
from repro.methods.few_labels.common import (
    Checked,
    WeakToStrong,
    add_margins,
    area_under_margin,
    average_margins,
    draw_weight,
    last_of_each,
    margins,
    probabilities,
)
from repro.methods.few_labels.fixmatch import (
    FixMatch,
    FixMatchSettings,
    FlexMatch,
    FlexMatchSettings,
    FreeMatch,
    FreeMatchSettings,
    SoftMatch,
    SoftMatchSettings,
    remember,
)
from repro.models.modes import held_statistics
from repro.settings import hyper
from repro.train import Items, Losses, Method, Now

# Each mixup: which labelled half meets which unlabelled half.
PAIRINGS = {
    "easy-hard": (("easy", "hard"), ("hard", "easy")),
    "M1": (("easy", "hard"),),
    "M2": (("hard", "easy"),),
    "easy-easy": (("easy", "easy"),),
    "hard-hard": (("hard", "hard"),),
    "random": (("easy", "hard"), ("hard", "easy")),  # of halves drawn at random
}


def halves(score: Tensor) -> dict[str, Tensor]:
    """Positions of the `hard` floor(n / 2) samples with the lowest score (n,), and of the `easy` rest; ties in order.

    Source: released code.
    """
    hard, easy = score.argsort(stable=True).tensor_split([len(score) // 2])
    return {"hard": hard, "easy": easy}


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the angle between flattened samples of x (n, ...) and y (m, ...): (n, m) in [-1, 1], 0 for zeros."""
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would shuffle close candidates
        return F.normalize(x.flatten(1).float()) @ F.normalize(y.flatten(1).float()).T


def draw_partner(similarity: Tensor, pool: int, rule: str) -> Tensor:
    """A partner for each row of similarity (n, m): a column number, (n,) int64, uniform among its candidates.

    rule: the min(pool, m) least (`dissimilar`) or most (`similar`) alike columns, or all (`random`).
    Ties go to the lower column. The pool is cut at m; released code needs 15 columns. Draws from torch's generator.
    """
    n, m = similarity.shape
    k = m if rule == "random" else min(pool, m)
    order = (-similarity if rule == "similar" else similarity).argsort(dim=1, stable=True)
    return order.gather(1, torch.randint(k, (n, 1), device=similarity.device))[:, 0]


def draw_pairs(
    aum: Tensor, apm: Tensor, similarity: Tensor, pairing: str, pool: int, partner: str
) -> list[tuple[Tensor, Tensor]]:
    """For each mixup, positions (n,) of labelled samples in their batch and of their partners in the unlabelled one.

    aum: (B,), apm: (U,), large is easy; similarity: (B, U), labelled with unlabelled samples.
    pairing: a key of PAIRINGS; pool, partner: see `draw_partner`.
    Raises ValueError when a batch is too small to halve. Source: released code, steps 5 and 6.
    """
    if len(aum) < 2 or len(apm) < 2:
        raise ValueError(f"batches of {len(aum)} and {len(apm)} cannot be split into easy and hard: 2 is the least")
    if pairing == "random":
        aum, apm = torch.rand_like(aum), torch.rand_like(apm)
    labelled, unlabelled = halves(aum), halves(apm)
    pairs = []
    for own, other in PAIRINGS[pairing]:
        row, column = labelled[own], unlabelled[other]
        pairs.append((row, column[draw_partner(similarity[row][:, column], pool, partner)]))
    return pairs


def mixed_loss(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Loss of mixed images, lam * l(labelled label) + (1 - lam) * l(pseudo-label): linear in the target, so one term.

    logits, target: (n, K), rows of target sum to 1.
    kind: `bce`, K sigmoids averaged over samples and classes, or `ce`, softmax averaged over samples.
    Source: released code (bce); ordinary mixup (ce).
    """
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target)
    return F.cross_entropy(logits, target)


BASES: dict[str, type[WeakToStrong]] = {
    "fixmatch": FixMatch,
    "flexmatch": FlexMatch,
    "softmatch": SoftMatch,
    "freematch": FreeMatch,
}


def of_base(settings: type, name: str) -> Any:
    """A field with the default, range and source that `name` has in a base's settings."""
    field = settings.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclass(frozen=True)
class CalibrateMixSettings(Checked):
    base: str = hyper("softmatch", "", "released code: softmatch; others are reconstructions", choices=tuple(BASES))
    warmup: int = hyper(150_000, "", "released code (one more): iterations of the base alone", low=0)
    delta: float = hyper(0.997, "delta", "released code", low=0, high=1)
    beta_alpha: float = hyper(0.4, "alpha", "released code: one weight a mixup, not folded", low=1e-2)
    pool: int = hyper(15, "k", "released code: candidates that a partner is drawn from, of 224", low=1)
    pairing: str = hyper(
        "easy-hard",
        "",
        "released code: M1 and M2. random: halves at random; with partner = random, ordinary mixup",
        choices=tuple(PAIRINGS),
    )
    partner: str = hyper(
        "dissimilar", "", "released code; random: any of the half", choices=("dissimilar", "similar", "random")
    )
    similarity: str = hyper(
        "pixels", "", "released code: pixels; summaries of the paper: features", choices=("pixels", "features")
    )
    mixed_loss: str = hyper("bce", "", "released code: sigmoids, mean over samples and classes", choices=("bce", "ce"))
    ssl_terms: str = hyper(
        "both",
        "",
        "released code: the base's loss from both forwards. first: the second holds mixed images alone; "
        "second: the first gets no gradient",
        choices=("both", "first", "second"),
    )
    second_updates: bool = hyper(True, "", "released code: BN averages and the base's state move in both forwards")
    apm_during_warmup: bool = hyper(False, "", "released code: APM starts after it; a summary of the paper: True")
    duplicates: str = hyper(
        "one", "", "an index twice in a batch: one (released code; the last) or count", choices=("one", "count")
    )
    # Of the base; each is read by the bases that have it.
    unlabelled_weight: float = of_base(FixMatchSettings, "unlabelled_weight")  # all
    threshold: float = of_base(FixMatchSettings, "threshold")  # FixMatch, FlexMatch
    threshold_warmup: bool = of_base(FlexMatchSettings, "threshold_warmup")
    n_sigma: float = of_base(SoftMatchSettings, "n_sigma")
    alignment: str = of_base(SoftMatchSettings, "alignment")
    ema_p: float = of_base(SoftMatchSettings, "ema_p")  # SoftMatch, FreeMatch
    fairness_weight: float = of_base(FreeMatchSettings, "fairness_weight")
    statistic: str = of_base(FreeMatchSettings, "statistic")
    clip: str = of_base(FreeMatchSettings, "clip")

    def base_settings(self) -> Any:
        """The settings of the base alone."""
        kind = BASES[self.base].Settings
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


@contextmanager
def held(method: Method) -> Iterator[None]:
    """The method's own buffers and its network's batch-norm averages leave as they came."""
    before = dict(method.named_buffers(recurse=False))
    try:
        with held_statistics(method.network):
            yield
    finally:
        for name, value in before.items():
            setattr(method, name, value)


class CalibrateMix(Method):
    """L = base + (base again and the mixups' loss, on a second forward) once warm-up is over."""

    Settings = CalibrateMixSettings

    def __init__(self, settings: CalibrateMixSettings, network: nn.Module, views: Views, classes: int, pool_size: int):
        super().__init__()
        self.settings, self.classes = settings, classes
        self.base = BASES[settings.base](settings.base_settings(), network, views, classes, pool_size)
        # Double: with 40 labels a sum takes in a million margins, beyond what single precision can add.
        self.register_buffer("margin_sum", torch.zeros(pool_size, dtype=torch.float64))
        self.register_buffer("visits", torch.zeros(pool_size, dtype=torch.int64))
        self.register_buffer("apm", torch.zeros(pool_size, classes))
        self.register_buffer("apm_visits", torch.zeros(pool_size, dtype=torch.int64))
        self.register_buffer("pseudo_label", torch.full((pool_size,), -1, dtype=torch.int64))

    @property
    def network(self) -> nn.Module:
        """The base's, registered once."""
        return self.base.network

    def counted(self, index: Tensor) -> Tensor:
        """Entries (n,) of a batch that the records take in."""
        return last_of_each(index) if self.settings.duplicates == "one" else torch.ones_like(index, dtype=torch.bool)

    def record_labelled(self, index: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """AUM (B,) of the batch, after recording the margins of its labels. Source: released code, step 2."""
        margin = margins(logits).gather(1, labels[:, None])[:, 0]
        self.margin_sum, self.visits = add_margins(self.margin_sum, self.visits, index, margin, self.counted(index))
        return area_under_margin(self.margin_sum, self.visits)[index]

    def record_unlabelled(self, index: Tensor, weak_logits: Tensor, label: Tensor) -> Tensor:
        """APM (U,) of the batch at its pseudo-labels, after recording its margins. Source: released code, step 4."""
        self.apm, self.apm_visits = average_margins(
            self.apm, self.apm_visits, index, margins(weak_logits), self.settings.delta, self.counted(index)
        )
        self.pseudo_label = remember(self.pseudo_label, index, label, torch.ones_like(label, dtype=torch.bool))
        return self.apm[index, label]

    def similarity(self, own: Tensor, weak: Tensor) -> Tensor:
        """(B, U), of the normalised weak views or of their features."""
        if self.settings.similarity == "features":
            with torch.no_grad(), held_statistics(self.network):
                own, weak = self.network.features(torch.cat([own, weak])).split([len(own), len(weak)])
        return cosine_similarity(own, weak)

    def base_step(
        self, batch: dict[str, Items], own: Tensor, weak: Tensor, strong: Tensor, mixed: list[Tensor]
    ) -> tuple[Losses, Tensor, Tensor, Tensor]:
        """The base's losses, and logits in float32 of labelled, mixed and weak images, from one forward of all.

        own, weak, strong: labelled weak (B, C, H, W), unlabelled weak and strong images (U, C, H, W); mixed: others.
        """
        sizes = [len(own), sum(map(len, mixed)), len(weak), len(strong)]
        logits, mixed_logits, weak_logits, strong_logits = (
            self.network(torch.cat([own, *mixed, weak, strong])).float().split(sizes)
        )
        weak_logits = weak_logits.detach()
        losses = self.base.unlabelled(weak_logits, strong_logits, batch["unlabelled"].index)
        terms = {"supervised": F.cross_entropy(logits, batch["labelled"].labels)} | losses.terms
        return Losses(terms, losses.pseudo), logits, mixed_logits, weak_logits

    def keep(self) -> dict[str, Tensor]:
        """What training has recorded of each image, by pool index: float32 (N,), and int64 (N,) for the pseudo-label.

        aum: mean margin of the label; apm: average pseudo-margin at the last pseudo-label, NaN for images never
        recorded; pseudo_label: the argmax when an image was last recorded, -1 for never.
        """
        label, aum = self.pseudo_label, area_under_margin(self.margin_sum, self.visits)
        apm = self.apm.gather(1, label.clamp(min=0)[:, None])[:, 0]
        return {
            "aum": aum.where(self.visits > 0, torch.nan).float(),
            "apm": apm.where(label >= 0, torch.nan).float(),
            "pseudo_label": label,
        }

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        settings, labelled, unlabelled = self.settings, batch["labelled"], batch["unlabelled"]
        views, mixing = self.base.views, now.step >= settings.warmup
        views.learn(probabilities(now.teacher), labelled.images, labelled.labels)
        weak = views.weak(unlabelled.images)  # in the order of `three_views`: a warm-up is the base's, bit by bit
        own, strong = views.weak(labelled.images), views.strong(unlabelled.images)
        with torch.no_grad() if mixing and settings.ssl_terms == "second" else nullcontext():
            first, logits, _, weak_logits = self.base_step(batch, own, weak, strong, [])
        label = first.pseudo["positive"].label
        aum = self.record_labelled(labelled.index, logits, labelled.labels)
        if mixing or settings.apm_during_warmup:
            apm = self.record_unlabelled(unlabelled.index, weak_logits, label)
        if not mixing:
            return first

        pairs = draw_pairs(aum, apm, self.similarity(own, weak), settings.pairing, settings.pool, settings.partner)
        one_hot = torch.eye(self.classes, device=label.device)
        images, targets = [], []
        for row, column in pairs:
            weight = draw_weight(settings.beta_alpha, label.device)
            images.append(weight * own[row] + (1 - weight) * weak[column])
            targets.append(weight * one_hot[labelled.labels[row]] + (1 - weight) * one_hot[label[column]])
        with nullcontext() if settings.second_updates else held(self.base):
            if settings.ssl_terms == "first":
                parts, mixed_logits = [first.terms], self.network(torch.cat(images)).float()
            else:
                second, _, mixed_logits, _ = self.base_step(batch, own, weak, strong, images)
                parts = [second.terms] if settings.ssl_terms == "second" else [first.terms, second.terms]
        terms = {name: sum(part[name] for part in parts) for name in first.terms}
        mixups = zip(mixed_logits.split([len(target) for target in targets]), targets, strict=True)
        terms["mixed"] = sum(mixed_loss(rows, target, settings.mixed_loss) for rows, target in mixups)
        return Losses(terms, first.pseudo)
