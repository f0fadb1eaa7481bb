"""What is measured: a trained classifier on test images, and pseudo-labels against hidden labels during training."""

import statistics

import torch
from torch import Tensor, nn

from repro.data.augment import Views
from repro.data.masks import IGNORE
from repro.measure.calibration import all_metrics
from repro.measure.metrics import METRICS
from repro.measure.reliability import ReliabilitySums, group_sums
from repro.models.modes import evaluating
from repro.train import PixelLabels, PseudoLabels

REPORTING = ("last", "median20", "best")


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, views: Views, batch: int = 1000) -> Tensor:
    """Logits (n, K) in float32 on the host of images (n, C, H, W) uint8, in eval mode; all modes are restored."""
    with evaluating(network):
        logits = [network(views.plain(images[i : i + batch])).float() for i in range(0, max(1, len(images)), batch)]
    return torch.cat(logits).cpu()


def measure(logits: Tensor, labels: Tensor) -> dict:
    """All metrics of `calibration.all_metrics` from logits (n, K) and labels (n,)."""
    return all_metrics(logits.double().softmax(dim=1), labels)


class PseudoLabelMonitor:
    """Coverage, accuracy, confidence and ECE of pseudo-labels, by kind, against labels that no method ever sees.

    truth: (N,) true classes by pool index; -1 where even the report does not know them: those samples count for
    coverage only. Sums stay on the device; `read` copies them to the host and starts afresh.
    """

    def __init__(self, truth: Tensor, bins: int = 15) -> None:
        self.truth, self.bins = truth, bins
        self.sums: dict[str, nn.ModuleDict] = {}

    def of(self, kind: str) -> nn.ModuleDict:
        """The sums of one kind of pseudo-label: over all samples, and over those whose truth is known."""
        if kind not in self.sums:
            sums = {name: ReliabilitySums(self.bins) for name in ("all", "known")}
            self.sums[kind] = nn.ModuleDict(sums).to(self.truth.device)
        return self.sums[kind]

    def observe(self, pseudo: dict[str, PseudoLabels]) -> None:
        """Add one step's pseudo-labels: positives are right when they equal the truth, negatives when they do not."""
        for kind, selected in pseudo.items():
            truth = self.truth[selected.index]
            if selected.label.ndim == 2:
                truth = truth[:, None].expand_as(selected.label)
                correct = selected.label != truth
            else:
                correct = selected.label == truth
            mask = selected.mask.float()
            rows = [part.flatten() for part in (selected.confidence, correct, mask)]
            sums = self.of(kind)
            sums["all"].add(*rows)
            sums["known"].add(rows[0], rows[1], rows[2] * (truth >= 0).flatten())

    def read(self) -> dict[str, dict[str, float]]:
        """By kind: coverage, accuracy, confidence, ece (None where nothing was selected) since the last call."""
        return {
            kind: sums["known"].read() | {"coverage": sums["all"].read()["coverage"]}
            for kind, sums in self.sums.items()
        }

    def state_dict(self) -> dict:
        """The sums so far, for a checkpoint."""
        return {kind: dict(sums.state_dict()) for kind, sums in self.sums.items()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        for kind, saved in state.items():
            self.of(kind).load_state_dict(saved)


RANGES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)  # of confidence, (lo, hi]


class PixelMonitor:
    """Coverage, accuracy, confidence and ECE of the pseudo-labels of pixels, in all and by range of confidence.

    truth: (N, H, W) uint8 hidden masks by pool index, 255 where unknown; None where even the report has none. Pixels of
    unknown truth count for coverage and shares only, padding for nothing. device: of the pseudo-labels, where there is
    no truth to tell it. bins: of the ECE. Sums stay on the device until `read`.
    """

    def __init__(self, truth: Tensor | None, device: torch.device | str = "cpu", bins: int = 15) -> None:
        self.truth, self.bins = truth, bins
        device = device if truth is None else truth.device
        self.device, self.sums = torch.device(device), {}
        self.inner = torch.tensor(RANGES[1:-1], device=self.device)

    def of(self, kind: str) -> nn.ModuleDict:
        """The sums of one kind of pseudo-label, made at its first use."""
        if kind not in self.sums:
            sums = nn.Module()
            # rows: pixels, weight; of known truth: pixels, right ones, weight, weight of right ones
            sums.register_buffer("ranges", torch.zeros(6, len(RANGES) - 1, dtype=torch.float64))
            parts = {"known": ReliabilitySums(self.bins), "sums": sums}
            self.sums[kind] = nn.ModuleDict(parts).to(self.device)
        return self.sums[kind]

    @torch.no_grad()
    def observe(self, pseudo: dict[str, PixelLabels]) -> None:
        """Add one step's pseudo-labels."""
        for kind, pixels in pseudo.items():
            if self.truth is None:
                truth = torch.full_like(pixels.label, IGNORE)
            else:
                truth = pixels.window.maps(self.truth[pixels.index], IGNORE).long()
            confidence, correct = pixels.confidence.flatten(), (pixels.label == truth).flatten()
            valid = pixels.valid.flatten()
            weight = pixels.weight.flatten().float() * valid
            known = (truth != IGNORE).flatten() & valid
            rows = (valid, weight, known, correct & known, weight * known, weight * (correct & known))
            place = torch.bucketize(confidence, self.inner)
            sums = self.of(kind)
            sums["sums"].ranges += group_sums(place, len(RANGES) - 1, *rows)
            sums["known"].add(confidence, correct, weight * known)

    def read(self) -> dict[str, dict]:
        """By kind: coverage, accuracy, confidence, ece since the last call, by weight; None for a mean over nothing.

        ranges: their `edges` (E + 1) and lists of E by (lo, hi]: `share` of the pixels, `coverage` (mean weight),
        `accuracy` by weight, `all_accuracy` regardless of weight.
        """
        told = {}
        for kind, sums in self.sums.items():
            rows = sums["sums"].ranges.to("cpu", copy=True)
            sums["sums"].ranges.zero_()
            pixels, weight, known, right, known_weight, right_weight = rows
            shares = {
                "share": pixels / pixels.sum(), "coverage": weight / pixels, "accuracy": right_weight / known_weight,
                "all_accuracy": right / known,
            }  # fmt: skip
            overall = sums["known"].read() | {"coverage": _number(weight.sum() / pixels.sum())}
            ranges = {name: [_number(value) for value in values] for name, values in shares.items()}
            told[kind] = overall | {"ranges": {"edges": list(RANGES)} | ranges}
        return told

    def state_dict(self) -> dict:
        """The sums so far, for a checkpoint."""
        return {kind: dict(sums.state_dict()) for kind, sums in self.sums.items()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        for kind, saved in state.items():
            self.of(kind).load_state_dict(saved)


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def report(evaluations: list[dict], rule: str = "last", weights: str = "ema", metric: str = "error") -> dict:
    """Metrics of a run under a reporting rule.

    evaluations: the history's rows of kind `evaluation`. rule: `last`; `median20` (median of the last 20 evaluations,
    FixMatch paper); `best` (the first best `metric` over training: USB and TorchSSL, the lowest error; UniMatch and
    CSL, the highest mIoU: selected on test, and marked so).
    weights: `ema` or `live`. metric: a key of `metrics.METRICS`, which says whether lower is better. Where it is
    undefined (None) an evaluation cannot be best; medians are of the defined values.
    """
    rows = [row[weights] for row in evaluations]
    if not rows:
        raise ValueError("this run has no evaluation yet")
    if rule == "last":
        return rows[-1]
    if rule == "best":
        sign = 1 if METRICS[metric].lower else -1
        defined = [row for row in rows if row[metric] is not None] or rows[-1:]
        return min(defined, key=lambda row: sign * (row[metric] or 0.0)) | {"selected_on_test": True}
    if rule == "median20":
        values = {name: [row[name] for row in rows[-20:] if isinstance(row[name], float)] for name in rows[-1]}
        return {name: statistics.median(defined) for name, defined in values.items() if defined}
    raise ValueError(f"unknown reporting rule {rule!r}; known: {', '.join(REPORTING)}")
