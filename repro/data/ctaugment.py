"""CTAugment: strong augmentation whose magnitudes are learned from the network's own predictions.

Source: google-research/fixmatch, libml/ctaugment.py and fixmatch.py (introduced by ReMixMatch). The range of
each parameter of each operation is cut into bins with a rate, the smoothed match between prediction and label
of labelled images ("probes") distorted with magnitudes from that bin. Unlabelled images only meet bins whose
rate is near the best.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.data import pil_ops
from repro.data.pil_ops import CODE, RESAMPLERS
from repro.data.randaugment import Range, Ranges

_ENHANCE = (0.1, 2.0)
_BLEND = (0.0, 1.0)
_RANGES = (
    Range("AutoContrast", *_BLEND),
    Range("Blur", *_BLEND),
    *(Range(name, *_ENHANCE) for name in ("Brightness", "Color", "Contrast")),
    Range("Cutout", 1, 1.499, "trunc", side="xy"),  # side 1 + trunc(.499 level * side of the image)
    Range("Equalize", *_BLEND),
    Range("Invert", *_BLEND),
    Range("Identity"),
    Range("Posterize", 1, 8.999, "trunc"),
    Range("Rescale", 0, 0.25),
    Range("Rotate", -45, 45, "round"),
    Range("Sharpness", *_ENHANCE),
    Range("ShearX", -0.3, 0.3),
    Range("ShearY", -0.3, 0.3),
    Range("Smooth", *_BLEND),
    Range("Solarize", 0, 255.999, "trunc"),
    # Pixels, as in the released code, which therefore never moves an image: less than half a pixel, nearest neighbour.
    Range("TranslateX", -0.3, 0.3),
    Range("TranslateY", -0.3, 0.3),
)


@dataclass(frozen=True)
class CTPolicy:
    """What decides CTAugment.

    depth: operations an image. decay: of the rates, for each probe that meets a bin.
    threshold: bins whose weight relative to the best is below are not used. The released class defaults to
        .85, but the command-line flag of the released training code hands it .80.
    bins: of each parameter; Posterize has 8 and Rescale's choice of resampler 6, Identity has no parameter.
    """

    depth: int = 2
    threshold: float = 0.85
    decay: float = 0.99
    bins: int = 17


FLAVOURS = {"ctaugment": CTPolicy()}


class CTAugment(nn.Module):
    """The learned policy. State: `rates` (operation, parameter, bin), ones at first.

    policy: a `CTPolicy` or a name of FLAVOURS. dense: see `operations.apply`.
    Raises ValueError for an unknown name.
    """

    def __init__(self, policy: CTPolicy | str = "ctaugment", dense: bool | None = None):
        super().__init__()
        if isinstance(policy, str) and policy not in FLAVOURS:
            raise ValueError(f"no CTAugment flavour named {policy!r}; choose one of {sorted(FLAVOURS)}")
        self.policy = policy = FLAVOURS[policy] if isinstance(policy, str) else policy
        self.dense = dense
        self.ranges = Ranges(_RANGES)
        sizes = [[policy.bins, 0] for _ in self.ranges.names]
        for name, size in {
            "Identity": [0, 0],
            "Posterize": [8, 0],
            "Rescale": [policy.bins, len(RESAMPLERS)],
        }.items():
            sizes[self.ranges.names.index(name)] = size
        sizes = torch.tensor(sizes)
        exists = torch.arange(policy.bins) < sizes[..., None]
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("rates", exists.double())

    def weights(self) -> Tensor:
        """Weight of each bin, (operation, parameter, bin): its rate over the best, 0 below the threshold."""
        exists = torch.arange(self.policy.bins, device=self.rates.device) < self.sizes[..., None]
        rates = (self.rates + (1 - self.policy.decay)) * exists  # the offset: never all zero
        relative = rates / rates.amax(2, keepdim=True).clamp(min=1e-12)
        return torch.where(relative < self.policy.threshold, 0.0, relative)

    def draw(
        self, batch: int, probe: bool, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the table int64 (depth, batch) and levels float64 (depth, batch, 2) in [0, 1).

        probe: bins are equally likely; otherwise as likely as their weight. Uniform within a bin.
        """
        shape = (self.policy.depth, 5, batch)
        uniform = torch.rand(shape, generator=generator, device=self.rates.device).double()
        row = (uniform[:, 0] * len(self.ranges.names)).long()
        within, choice = uniform[:, 1:3].mT, uniform[:, 3:5].mT
        if probe:
            return row, within
        reach = self.weights().cumsum(2)
        target = choice * reach[row][..., -1]
        chosen = (reach[row] <= target[..., None]).sum(-1)  # the first bin that reaches beyond the target
        bins = self.sizes[row]
        return row, torch.where(bins > 0, (chosen + within) / bins, within)

    def distort(
        self, images: Tensor, row: Tensor, level: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Apply drawn operations one after the other.

        images: uint8 (B, C, H, W); row, level: as `draw` returns them.
        """
        b, _, height, width = images.shape
        codes, magnitudes = self.ranges(row, level[..., 0], height, width)
        point = torch.rand(len(row), b, 2, generator=generator, device=images.device)
        rescaled = codes == CODE["Rescale"]
        method = level[..., 1] * 5.99 / len(RESAMPLERS)  # released code: int(5.99 * level)
        point[..., 0] = torch.where(rescaled, method.float(), point[..., 0])
        return pil_ops.apply(images, codes, magnitudes, point, dense=self.dense, among=self.ranges.names)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The strong view: the learned policy, then Cutout at its largest size (16 for 32 x 32), as FixMatch.

        images: uint8 (B, C, H, W). Returns the same shape.
        """
        b, _, height, width = images.shape
        images = self.distort(images, *self.draw(b, probe=False, generator=generator), generator)
        side = self.rates.new_full((b,), 1 + int(0.499 * min(height, width)))
        everywhere = torch.full((b,), CODE["Cutout"], device=images.device)
        point = torch.rand(b, 2, generator=generator, device=images.device)
        return pil_ops.apply(images, everywhere, side, point, dense=True, among=("Cutout",))

    def probe(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Distorted labelled images and the draw that `update` needs. images: uint8 (B, C, H, W)."""
        drawn = self.draw(len(images), probe=True, generator=generator)
        return self.distort(images, *drawn, generator), drawn

    @torch.no_grad()
    def update(self, drawn: tuple[Tensor, Tensor], probs: Tensor, labels: Tensor) -> None:
        """Move the rate of each bin that a probe met towards its match, 1 - |probs - onehot(label)|_1 / 2.

        drawn: from `probe`; probs: (B, K), rows sum to 1; labels: int64 (B,).
        Released code: rate <- decay * rate + (1 - decay) * match, one image after the other, so a bin met n
        times moves n times. Here in one go with the same result: each probe counts with
        decay^(number of later probes of its bin).
        """
        row, level = drawn
        decay = self.policy.decay
        match = probs.double().gather(1, labels[:, None])[:, 0]
        match = 1 - 0.5 * (1 - match + (probs.double().sum(1) - match))
        bins = self.sizes[row]
        index = (level * bins * 0.999).long()  # the code's guard against level 1
        index = (row[..., None] * 2 + torch.arange(2, device=row.device)) * self.policy.bins + index
        # In the order of the released loops: images, then operations, then parameters.
        index, exists = index.transpose(0, 1).reshape(-1), (bins > 0).transpose(0, 1).reshape(-1)
        met = index[:, None] == torch.arange(self.rates.numel(), device=index.device)
        met = (met & exists[:, None]).double()
        count = met.sum(0)
        later = count - met.cumsum(0)
        match = match.repeat_interleave(row.shape[0] * 2, output_size=index.numel())
        gained = (met * decay**later * match[:, None]).sum(0) * (1 - decay)
        moved = self.rates.view(-1) * decay**count + gained
        self.rates.copy_(moved.view_as(self.rates))
