"""Contrasts of tokens (ToCo's patches and crops, PCRE's classes and patches), and PCRE's class prototypes.

C foreground classes, N patches, D features. Label maps hold 0 for the background, c + 1 for class c and 255 for
ignored patches, as `repro.cam` makes them, at the size of the patch grid. Losses are scalars in float32 at least, also
under autocast, whose cosines would be too coarse.
"""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from repro.cam import widened
from repro.data.masks import IGNORE

EPS = 1e-4  # beside the negatives of `crop_contrast`


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """cos (..., n, m) of each pair of vectors (..., n, D) and (..., m, D); 0 for vectors of length 0."""
    with torch.autocast(first.device.type, enabled=False):
        first, second = (F.normalize(widened(vectors), dim=-1, eps=1e-8) for vectors in (first, second))
        return first @ second.mT


def balanced_contrast(similarity: Tensor, alike: Tensor, apart: Tensor) -> Tensor:
    """.5 (1 - sum_alike a / (#alike + 1)) + .5 sum_apart a / (#apart + 1), a scalar over all entries.

    similarity: a, in [0, 1]; alike, apart: bool; shapes alike. .5 where there is no pair at all.
    Source: released codes (ToCo, DuPL, PCRE).
    """
    pull, push = (torch.where(mask, similarity, 0).sum() / (mask.sum() + 1) for mask in (alike, apart))
    return 0.5 * (1 - pull) + 0.5 * push


def patch_contrast(patches: Tensor, labels: Tensor) -> Tensor:
    """L_ptc on |cos(F_i, F_j)|: patches of one label, the background's included, are alike, others apart.

    patches: F (B, N, D). labels: (B, h, w) or (B, N) integers; a patch of 255, or with itself, makes no pair.
    Source: ToCo (released code).
    """
    labels = labels.flatten(1)
    seen = labels != IGNORE
    pairs = seen[:, :, None] & seen[:, None] & ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    same = labels[:, :, None] == labels[:, None]
    return balanced_contrast(cosines(patches, patches).abs(), pairs & same, pairs & ~same)


def class_contrast(class_tokens: Tensor, patches: Tensor, labels: Tensor, tags: Tensor) -> Tensor:
    """L_CPE on A = |cos(Z_c, sg(F_n))|: a class that is shown is like its own patches, and unlike all others.

    class_tokens: Z (B, C, D). patches: F (B, N, D), without gradient here. labels: (B, h, w) or (B, N), of the
        auxiliary CAM in the released code (of the main CAM in the overview figure); 255 makes no pair.
    tags: (B, C); classes that are not shown make no pair.
    Source: PCRE (released code).
    """
    labels = labels.flatten(1).long()[:, None]
    own = labels == torch.arange(1, tags.shape[1] + 1, device=labels.device)[:, None]
    pairs = (labels != IGNORE) & (tags > 0)[:, :, None]
    return balanced_contrast(cosines(class_tokens, patches.detach()).abs(), pairs & own, pairs & ~own)


@torch.no_grad()
def updated_prototypes(prototypes: Tensor, class_tokens: Tensor, tags: Tensor, momentum: float = 0.99) -> Tensor:
    """Prototypes (C, D) after a batch (Eq. 12), in the dtype of the old ones.

    For one image after another, P_c <- lambda_p P_c + (1 - lambda_p) Z_c if it shows c; then all rows are divided by
    their lengths. Unrolled: the token of an image that a further m images with c follow weighs
    (1 - lambda_p) lambda_p^m, the old prototype lambda_p to the number of images with c.
    class_tokens: Z (B, C, D), in the order of the batch. tags: (B, C). momentum: lambda_p in [0, 1].
    Source: released code, from 10 % of the training on; .99 in the supplementary, .9 for COCO in the code.
    """
    shown = (tags > 0).to(widened(prototypes).dtype)
    after = shown.flip(0).cumsum(0).flip(0) - shown
    weight = (1 - momentum) * momentum**after * shown
    kept = momentum ** shown.sum(0)
    mixed = kept[:, None] * prototypes + (weight[:, :, None] * class_tokens).sum(0)
    return F.normalize(mixed, dim=1).to(prototypes.dtype)


def prototype_cam(patches: Tensor, prototypes: Tensor, grid: tuple[int, int], absolute: bool = True) -> Tensor:
    """|cos(F_n, P_c)| (B, C, h, w), for `repro.cam.multi_scale_cam`.

    patches: F (B, N, D). prototypes: P (C, D), or class tokens (B, C, D) in their place (an ablation). grid: (h, w).
    absolute: as released, where a patch that points away from its prototype counts as active; without it (ours) the
        cosine itself, in [-1, 1], which `multi_scale_cam` cuts at 0.
    """
    found = cosines(prototypes, patches).unflatten(2, grid)
    return found.abs() if absolute else found


def crop_contrast(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float = 0.5) -> Tensor:
    """L_ctc, InfoNCE of crops against the teacher's two views of their image, mean over images.

    With e_gv = exp(<t_g, s_v> / T) and n_g = sum of e_gv over the negative crops v + 1e-4, the loss of an image is
    sum_g [ sum_positive -log(e_gv / (e_gv + n_g)) + log(1 + n_g) ] / (2 (#positive + 1e-4)).
    student: s (B, V, E), projected class tokens of the views, the two global ones first, and of the crops.
    teacher: t (B, G, E), G = 2, of the global views by the teacher's head; without gradient here.
    positive: (B, V) bool, True for the global views and for crops that are not negative. temperature: T, above 0.
    Source: ToCo (released code), here in logarithms, so that no exponential overflows.
    """
    with torch.autocast(student.device.type, enabled=False):
        logits = widened(teacher).detach() @ widened(student).mT / temperature
        rest = logits.masked_fill(positive[:, None], -torch.inf)
        negatives = torch.cat([rest, torch.full_like(rest[:, :, :1], log(EPS))], 2).logsumexp(2, keepdim=True)
        pulled = F.softplus(negatives - logits).masked_fill(~positive[:, None], 0).sum((1, 2))
        pushed = F.softplus(negatives).sum((1, 2))
        return ((pulled + pushed) / (teacher.shape[1] * (positive.sum(1, dtype=logits.dtype) + EPS))).mean()
