"""The trunk that the image-tag methods share: a ViT, two classifiers whose weights make CAMs, a segmentation head."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repro.cam import bilinear, multi_scale_cam, raw_cam
from repro.models.vit import Tokens, ViT, to_map


class Prediction(NamedTuple):
    """What a trunk makes of B images.

    logits, logits_aux: (B, C), of the tags, from the final and from the auxiliary patches
    segmentation: (B, C + 1, h, w) logits. tokens: of the encoder
    """

    logits: Tensor
    logits_aux: Tensor
    segmentation: Tensor
    tokens: Tokens


class Trunk(nn.Module):
    """Encoder, classifiers without bias behind a global maximum over patches, and the head that is evaluated.

    encoder: a ViT. classes: C, without the background. head: (B, D, h, w) -> (B, C + 1, h, w).
    Source: released codes of ToCo, DuPL, SeCo and PCRE.
    """

    def __init__(self, encoder: ViT, classes: int, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.classifier = nn.Linear(encoder.width, classes, bias=False)
        self.classifier_aux = nn.Linear(encoder.width, classes, bias=False)

    def predict(self, x: Tensor) -> Prediction:
        """Tags, segmentation and tokens of normalised images x (B, 3, H, W)."""
        tokens = self.encoder(x)
        logits, logits_aux = self.classifier(tokens.patches.amax(1)), self.classifier_aux(tokens.auxiliary.amax(1))
        return Prediction(logits, logits_aux, self.head(to_map(tokens.patches, tokens.grid)), tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Segmentation logits (B, C + 1, H, W) at the size of normalised images x (B, 3, H, W)."""
        tokens = self.encoder(x)
        return bilinear(self.head(to_map(tokens.patches, tokens.grid)), (x.shape[2], x.shape[3]))

    def raw(self, tokens: Tokens) -> Tensor:
        """Main CAM (B, C, h, w), not rectified."""
        return raw_cam(tokens.patches, self.classifier.weight, tokens.grid, rectify=False)

    def raw_aux(self, tokens: Tokens) -> Tensor:
        """Auxiliary CAM (B, C, h, w), not rectified."""
        return raw_cam(tokens.auxiliary, self.classifier_aux.weight, tokens.grid, rectify=False)

    def both_cams(self, x: Tensor, scales: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Main and auxiliary CAM over scales and flips, (B, C, H, W) each, in [0, 1], from one pass a scale."""

        def raw(seen: Tensor) -> Tensor:
            tokens = self.encoder(seen)
            return torch.cat([self.raw(tokens), self.raw_aux(tokens)], 1)

        cam, aux = multi_scale_cam(raw, x, scales).chunk(2, 1)
        return cam, aux

    def activation(self, x: Tensor, scales: Sequence[float], tags: Tensor) -> Tensor:
        """What is evaluated as the CAM, (B, C, H, W) in [0, 1], of normalised images x (B, 3, H, W).

        tags: (B, C), for methods whose maps depend on them; those of this CAM do not.
        """
        return multi_scale_cam(lambda seen: self.raw(self.encoder(seen)), x, scales)
