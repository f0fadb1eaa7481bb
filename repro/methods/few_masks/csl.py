"""CSL, confidence separable learning (Liu & Liu, ICCV 2025): pixels weighted by a per-image split, trusted ones masked.

The paper's equations were not available. This follows parts of the code that is held to be the authors'; what was
chosen here instead is marked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from repro.arrays import at_least_float32
from repro.data.mask_views import hide, paste
from repro.measure.reliability import float64
from repro.methods.few_masks.common import MaskMethod, PixelTargets, detached, threshold_targets, weighted_cross_entropy
from repro.models.modes import held_statistics
from repro.settings import check, hyper
from repro.train import Items, Losses, Now

# Features, split and weights

FORMS = ("released", "paper")
RULES = ("or", "and")
FEATURES = ("both", "confidence", "dispersion")
SCOPES = ("image", "class", "batch")
BLOCK = 2**17  # pixels split at a time: on a CPU larger arrays cost more in page faults than in arithmetic
ROWS = 2**22  # pixels, over all its classes, that scope "class" lays out together


@dataclass(frozen=True)
class Features:
    """The plane of a prediction: confidence c and residual r, floating, and label q int64, each (B, H, W)."""

    confidence: Tensor
    residual: Tensor
    label: Tensor


@dataclass(frozen=True)
class Reliable:
    """Means and variances (n - 1) of both features over each image's reliable cluster, each (B,) float64."""

    mean_c: Tensor
    mean_r: Tensor
    var_c: Tensor
    var_r: Tensor


def confidence_features(probs: Tensor, form: str = "released") -> Features:
    """c = max_k p_k, q = argmax_k p_k (ties: the first), and the residual over k != q around m = (1 - c) / (K - 1).

    probs: (B, K, H, W), softmax of the weak view, K at least 2; half precision is widened to float32.
    form: `released`, r = [sum (p_k - m)^2 + m^2] / (K - 1), in [0, c): the code sets the top probability to 0 where it
        should leave it out, hence m^2; `paper`, -sum (p_k - m)^2 / (K - 1), in (-c, 0].
    Results have no gradient. Summing squares of gaps, not p and p^2, keeps full relative precision as c nears 1.
    Raises ValueError for fewer classes, another shape or another form.
    """
    known("form", form, FORMS)
    if probs.ndim != 4 or probs.shape[1] < 2 or not probs.is_floating_point():
        raise ValueError(
            f"probs are {probs.dtype} {tuple(probs.shape)}; they must be floating (B, K, H, W) with K of at least 2"
        )
    probs = at_least_float32(probs.detach())
    others = probs.shape[1] - 1
    confidence, label = probs.max(1)
    mean = (1 - confidence) / others
    spread = (probs - mean[:, None]).scatter_(1, label[:, None], 0).square_().sum(1)
    if others == 1:
        spread.zero_()  # one class has no spread, and in the paper's form its rounding would be all there is to split
    residual = (spread + mean.square()) / others if form == "released" else -spread / others
    return Features(confidence, residual, label)


def separate(confidence: Tensor, residual: Tensor, valid: Tensor) -> Tensor:
    """Cluster (B, H, W) int64 in {0, 1} of each pixel, by the top two left singular vectors of its image's [c, r].

    With X (N, 2) the valid pixels, neither centred nor scaled, Y = the left singular vectors maximises tr(Y^T X X^T Y)
    over orthonormal columns, and a pixel joins the column of larger |Y_ij|. As Y_j = X u_j / s_j with the eigenvectors
    u_j and eigenvalues s_j^2 of X^T X, cluster 1 holds what points away from u_1 by more than arctan(s_2 / s_1).
    confidence, residual: (B, H, W) floating, |residual| < confidence as `confidence_features` makes them, of either
        form: both give the same split where they differ in sign only.
    Ties and, where s_2 = 0 and Y is not unique (one pixel, equal pixels, K = 2 in the paper's form), all pixels get 0.
    Source: released code, which calls the SVD; here the Gram matrix takes its place.
    """
    size = max(1, BLOCK // max(1, len(valid)))
    columns = (x.flatten(1).split(size, 1) for x in (confidence, residual, valid))
    parts = list(zip(*columns, strict=True))
    low, high = cone(*sum(gram(*part) for part in parts))
    cluster = torch.empty(len(valid), valid[0].numel(), dtype=torch.int64, device=valid.device)
    for part, columns in zip(parts, cluster.split(size, 1), strict=True):
        columns.copy_(outside(*part, low, high))
    return cluster.view(valid.shape)


def gram(confidence: Tensor, residual: Tensor, valid: Tensor) -> Tensor:
    """Sums (3, B) of c^2, c r and r^2 over the valid pixels of (B, N)."""
    c, r = (masked(x, valid) for x in (confidence, residual))
    return torch.stack([torch.linalg.vecdot(*pair) for pair in ((c, c), (c, r), (r, r))])


def cone(cc: Tensor, cr: Tensor, rr: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes r / c (B,), low and high, between which cluster 0 of `separate` lies; -inf and inf where s_2 = 0.

    cc, cr, rr: (B,), the entries of X^T X, cc > rr.
    s_2^2 is det / s_1^2 and the tilt a half angle's tangent: nothing cancels though s_2 / s_1 is about 1e-3 at K = 21.
    s_2 counts as 0 where det is below 4096 roundings of its terms, in float64 an angle of 1e-6 between the columns.
    """
    half = (cc - rr) / 2
    root = torch.hypot(half, cr)
    determinant = cc * rr - cr * cr
    tilt = cr / (half + root)  # tangent of the angle of u_1
    opening = determinant.clamp(min=0).sqrt() / ((cc + rr) / 2 + root)  # s_2 / s_1
    full = determinant > 4096 * torch.finfo(cc.dtype).eps * cc * rr
    low = (tilt - opening) / (1 + tilt * opening)
    high = (tilt + opening) / (1 - tilt * opening)
    return torch.where(full, low, -torch.inf), torch.where(full, high, torch.inf)


def outside(confidence: Tensor, residual: Tensor, valid: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Which pixels (B, N) are valid and have r / c outside [low, high], both (B,)."""
    middle, half = ((low + high) / 2)[:, None], ((high - low) / 2)[:, None]  # NaN and inf where nothing is outside
    slope = float64(residual) / float64(confidence)
    return (slope.sub_(middle).abs_() > half).logical_and_(valid)


def reliable_statistics(confidence: Tensor, residual: Tensor, cluster: Tensor, valid: Tensor) -> Reliable:
    """Statistics of each image's reliable cluster: the one with the larger mean confidence, cluster 0 if equal.

    confidence, residual: (B, H, W), of either form; cluster: (B, H, W) in {0, 1}; valid: (B, H, W) bool.
    The variance of one pixel is 0, an empty cluster has mean 0 and loses, an image without valid pixels gets
    means (1, 0) and variances (1, 1). Source: released code; deviations are squared in a second pass.
    """
    c, r, inside, cluster = (x.flatten(1) for x in (confidence, residual, valid, cluster))
    first, second = (inside & (cluster == column) for column in (0, 1))
    member = torch.where((mean_over(second, c) > mean_over(first, c))[:, None], second, first)
    filled, freedom = inside.any(1), (member.sum(1) - 1).clamp(min=1)

    def moments(x: Tensor, nothing: float) -> tuple[Tensor, Tensor]:
        mean = mean_over(member, x)
        variance = masked(float64(x) - mean[:, None], member).square().sum(1) / freedom
        return torch.where(filled, mean, nothing), torch.where(filled, variance, 1.0)

    (mean_c, var_c), (mean_r, var_r) = moments(c, 1.0), moments(r, 0.0)
    return Reliable(mean_c, mean_r, var_c, var_r)


def pixel_weights(
    confidence: Tensor, residual: Tensor, valid: Tensor, reliable: Reliable, alpha: float = 8.0, rule: str = "or",
    features: str = "both", soft: bool = True, form: str = "released", eps: float = 1e-8,
) -> Tensor:  # fmt: skip
    """Loss weight (B, H, W) in [0, 1], in the dtype of confidence. A pixel is called reliable where it is exactly 1.

    z_c = (c - mu_c) / sqrt(var_c + eps) and z_r = (mu_r - r) / sqrt(var_r + eps), its sign turned for the paper's form,
    are above 0 on the reliable side of the cluster's means.
    confidence, residual, valid: (B, H, W), valid bool. reliable: of the same form.
    alpha: above 0; the Gaussian's width is sqrt(alpha / 2) standard deviations of the cluster, 2 at 8.
    rule: `or`, 1 where any z > 0, else exp(-(z_c^2 + z_r^2) / alpha); `and` (ablation chosen here), 1 where no z < 0,
        else the same of the z below 0 alone, so that a z on the good side never lowers a weight.
    features: which z are read, `both`, `confidence` or `dispersion` (the last two chosen here). The split always reads
        both, because one column has one singular vector.
    soft: False (an ablation chosen here) keeps a weight of 1 and sets others to 0, so z_c = z_r = 0 stays reliable, as
        in the soft weights of the released code. At alpha 8, |z| < 5e-4 rounds to 1 in float32 too.
    eps: not small: var_r is about 2e-8 at K = 21.
    Raises ValueError for unknown names. Source: released code.
    """
    known("form", form, FORMS), known("rule", rule, RULES), known("features", features, FEATURES)
    c, r = float64(confidence), float64(residual)
    mean_c, mean_r, var_c, var_r = (value[:, None, None] for value in vars(reliable).values())
    z_c = (c - mean_c) / (var_c + eps).sqrt()
    z_r = (mean_r - r if form == "released" else r - mean_r) / (var_r + eps).sqrt()
    z = torch.stack({"both": [z_c, z_r], "confidence": [z_c], "dispersion": [z_r]}[features])
    distance = z.clamp(max=0).square().sum(0)
    if rule == "or":
        distance = distance.masked_fill((z > 0).any(0), 0)
    weight = torch.exp(-distance / alpha).to(confidence.dtype).masked_fill(~valid, 0)
    return weight if soft else (weight == 1).to(weight.dtype)


def image_weights(
    probs: Tensor, valid: Tensor, *, form: str = "released", rule: str = "or", features: str = "both",
    soft: bool = True, alpha: float = 8.0, scope: str = "image", eps: float = 1e-8,
) -> tuple[Tensor, Features]:  # fmt: skip
    """Weights (B, H, W) of a prediction and its features: the whole chain; other arguments as in `pixel_weights`.

    probs: (B, K, H, W), as in `confidence_features`. valid: (B, H, W) bool, False at padding.
    scope: the pixels that share a split and its statistics: `image`, as released; ablations chosen here: `class`, those
        of one predicted class in one image; `batch`, all.
    Raises ValueError for unknown names and other shapes.
    """
    known("scope", scope, SCOPES)
    found = confidence_features(probs, form)
    c, r, label = found.confidence, found.residual, found.label
    if valid.dtype != torch.bool or valid.shape != c.shape:
        raise ValueError(f"valid is {valid.dtype} {tuple(valid.shape)}; it must be bool {tuple(c.shape)}")

    def weigh(c: Tensor, r: Tensor, valid: Tensor) -> Tensor:
        reliable = reliable_statistics(c, r, separate(c, r, valid), valid)
        return pixel_weights(c, r, valid, reliable, alpha, rule, features, soft, form, eps)

    if scope == "image":
        return weigh(c, r, valid), found
    if scope == "batch":
        return weigh(*(x.flatten(0, 1)[None] for x in (c, r, valid))).view(c.shape), found
    weights = torch.zeros_like(c)
    for classes in torch.arange(probs.shape[1], device=probs.device).split(max(1, ROWS // max(1, c.numel()))):
        members = valid & (label == classes[:, None, None, None])
        rows = [x.expand_as(members).flatten(0, 1) for x in (c, r, members)]
        weights += weigh(*rows).view(members.shape).sum(0)  # a pixel has one class and weight 0 in the others
    return weights, found


def masked(x: Tensor, valid: Tensor) -> Tensor:
    """x in the widest floating type of its device, 0 where not valid. Shapes alike."""
    return float64(torch.where(valid, x, 0))


def mean_over(member: Tensor, x: Tensor) -> Tensor:
    """Mean (B,) of x over the members of each row of (B, N), 0 where there are none."""
    return masked(x, member).sum(1) / member.sum(1).clamp(min=1)


def known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


# The method

SELECTIONS = ("gaussian", "hard", "threshold")


@dataclass(frozen=True)
class CSLSettings:
    selection: str = hyper("gaussian", source="released code; the others are ablations", choices=SELECTIONS)
    threshold: float = hyper(0.95, "tau", "ablation: of selection = threshold only", low=0, high=1)
    alpha: float = hyper(8.0, source="released code: squared width of the Gaussian", low=1e-6)
    features: str = hyper("both", source="released code; else: which z the weight reads", choices=FEATURES)
    rule: str = hyper("or", source="released code; and: ablation", choices=RULES)
    scope: str = hyper("image", source="released code: one split an image", choices=SCOPES)
    form: str = hyper("released", source="of the residual variance; paper: second-hand", choices=FORMS)
    masking: str = hyper("reliable", source="released code", choices=("reliable", "random", "none"))
    ratio: float = hyper(0.7, source="released code: probability that a block is masked", low=0, high=1)
    block: int = hyper(32, source="released code: side of a block, pixels; 8 at mini", low=1)
    feature_perturbation: bool = hyper(True, source="released code; off removes L_fp")

    def __post_init__(self):
        check(self)


def csl_targets(logits: Tensor, padding: Tensor, settings: CSLSettings) -> PixelTargets:
    """Pseudo-labels with their weights.

    logits: (B, K, H, W) of a weak view, whose gradient is cut here; padding: (B, H, W) bool.
    Source: released code.
    """
    if settings.selection == "threshold":
        return threshold_targets(logits, padding, settings.threshold)
    weight, features = image_weights(
        logits.detach().float().softmax(1), ~padding, form=settings.form, rule=settings.rule,
        features=settings.features, soft=settings.selection == "gaussian", alpha=settings.alpha, scope=settings.scope,
    )  # fmt: skip
    return PixelTargets(features.label, weight, features.confidence, ~padding)


class CSL(MaskMethod):
    """L = (L_x + L_s / 4 + L_m / 4 + L_fp / 2) / 2.

    In bf16 runs the mix batch is predicted in bf16 too; the released code appears to use float32 there.
    """

    Settings = CSLSettings

    def losses(self, batch: dict[str, Items], now: Now) -> Losses:
        x, u, mix = self.crops(batch)
        views, settings, sizes = self.views, self.settings, [len(crop.images) for crop in (x, u)]
        # Only the forward of [x_l; x_w] moves the running averages of the batch norms (released code).
        with held_statistics(self.network):
            mix_targets = csl_targets(detached(self.network, views.weak(mix)), mix.padding, settings)
        clean = self.network(torch.cat([views.weak(x), views.weak(u)]), perturb=settings.feature_perturbation)
        clean, perturbed = clean if settings.feature_perturbation else (clean, None)
        logits, weak_logits = clean.split(sizes)
        targets = csl_targets(weak_logits, u.padding, settings)
        box = views.boxes(u)
        strong = paste(views.strong(u), views.strong(mix), box)
        masked, blocks = views.masked(u, settings.block, settings.ratio)
        if settings.masking != "none":
            masked = hide(masked, blocks & (targets.weight == 1) if settings.masking == "reliable" else blocks)
        with held_statistics(self.network):
            strong_logits, masked_logits = self.network(torch.cat([strong, masked])).chunk(2)
        mixed = targets.pasted(mix_targets, box)
        terms = {
            "supervised": 0.5 * self.labelled_loss(logits, x.masks),
            "consistency": 0.125 * weighted_cross_entropy(strong_logits, mixed.label, mixed.weight, mixed.valid),
            "masked": 0.125 * weighted_cross_entropy(masked_logits, targets.label, targets.weight, targets.valid),
        }
        if perturbed is not None:
            logits_fp = perturbed[sizes[0] :]
            terms["features"] = 0.25 * weighted_cross_entropy(logits_fp, targets.label, targets.weight, targets.valid)
        return Losses(terms, targets.report(batch["unlabelled"].index, u))
