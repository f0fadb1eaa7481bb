"""Plain CAM training: a ViT learns the tags, and its refined CAM teaches a segmentation head."""

from dataclasses import dataclass

from repro.methods.image_tags.steps import TagMethod, tag_terms
from repro.settings import check, hyper
from repro.train import Items, Losses, Now


@dataclass(frozen=True)
class PlainSettings:
    seg_weight: float = hyper(0.1, source="ToCo: weight of L_seg", low=0)
    energy_weight: float = hyper(0.0, source="ToCo: .05 of L_reg; ours: off, exact and quadratic in the pixels", low=0)

    def __post_init__(self):
        check(self)


class Plain(TagMethod):
    """L = L_cls + L_cls_aux, after the warm-up + .1 L_seg."""

    Settings = PlainSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        view = self.view(batch["tagged"])
        predicted = self.network.predict(view.x)
        terms = tag_terms(predicted, view.tags)
        if self.learning(now):
            cam = self.network.activation(view.x, self.recipe.scales, view.tags)
            terms |= self.head_terms(predicted.segmentation, self.labels(view, cam), view)
        return Losses(terms)
