"""Small stand-ins for the image-tag methods: a ViT of 4 x 4 patches, random images, and oracles written as loops."""

import torch
import torch.nn.functional as F

from repro.arrays import Items
from repro.data.mask_views import TAGS, MaskViews
from repro.models.vit import Layout, ViT
from repro.recipe import TagRecipe
from repro.train import Now

SIDE, CLASSES, STEPS = 16, 3, 100
LAYOUT = Layout(width=16, depth=3, heads=2, patch=4, grid=4, ratio=2)
SCALES = (1.0, 0.5)


def encoder(seed=0, class_tokens=1, masked=False, value_only=False):
    """A ViT whose weights are large enough for outputs to differ."""
    torch.manual_seed(seed)
    made = ViT(LAYOUT, class_tokens, masked, value_only, -2, 3)
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(5 if value.ndim > 1 else 1)
    return made


class Head(torch.nn.Module):
    """A convolution in place of the published heads."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(LAYOUT.width, CLASSES + 1, 3, padding=1)

    def forward(self, x):
        return self.layer(x)


def views(seed=0):
    return MaskViews(SIDE, (0.5, 2.0), strong=TAGS, generator=torch.Generator().manual_seed(seed))


def recipe(settings=None, **changes):
    fields = {"network": "vit-mini", "crop": SIDE, "cam_scales": "1,0.5", "batch": 4, "colour": False}
    return TagRecipe(method=settings, **fields | changes)


def items(count=4, seed=0):
    """Smooth random images, half of them with a class alone; the first shows every class."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = (F.interpolate(coarse, (20, 20), mode="bilinear") * 255).byte()
    tags = (torch.rand(count, CLASSES, generator=generator) < 0.4).float()
    tags[torch.arange(count), torch.arange(count) % CLASSES] = 1
    tags[0] = 1
    return Items(torch.arange(count), images, tags)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def now(step, steps=STEPS):
    return Now(step, steps, 0, 0, None)


def replayed(method, samples):
    """The view that the method's next step will see; its generator is put back."""
    state = method.views.generator.get_state()
    view = method.view(samples)
    method.views.generator.set_state(state)
    return view


def bilinear(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def cam_oracle(raw, x, scales=SCALES):
    """Spec 6.2 by loops over images: raw(one image (1, 3, H, W), its number) -> (C, h, w)."""
    maps = []
    for number, image in enumerate(x):
        total = 0
        for scale in scales:
            side = int(scale * x.shape[2])
            seen = bilinear(image[None], (side, side))
            plain = bilinear(raw(seen, number)[None], x.shape[2:])[0]
            mirrored = bilinear(raw(seen.flip(3), number)[None], x.shape[2:])[0].flip(2)
            total = total + torch.maximum(plain, mirrored).clamp(min=0)
        low = total.amin((1, 2), keepdim=True)
        maps.append((total - low) / ((total - low).amax((1, 2), keepdim=True) + 1e-5))
    return torch.stack(maps)


def main_cam(trunk):
    """raw(...) for `cam_oracle`: W_c . F_n patch by patch."""

    def raw(seen, number):
        tokens = trunk.encoder(seen)
        return torch.einsum("nd,cd->cn", tokens.patches[0], trunk.classifier.weight).view(CLASSES, *tokens.grid)

    return raw


def aux_cam(trunk):
    def raw(seen, number):
        tokens = trunk.encoder(seen)
        return torch.einsum("nd,cd->cn", tokens.auxiliary[0], trunk.classifier_aux.weight).view(CLASSES, *tokens.grid)

    return raw


def patch_label_oracle(cam, tags, padding, low=0.25, high=0.7, grid=(4, 4)):
    """Labels on the patch grid by loops; high: a number or one for each image."""
    maps = bilinear(cam, grid)
    cell = (cam.shape[2] // grid[0], cam.shape[3] // grid[1])
    labels = torch.zeros(len(cam), *grid, dtype=torch.long)
    for b in range(len(cam)):
        top = high[b].item() if isinstance(high, torch.Tensor) else high
        for i in range(grid[0]):
            for j in range(grid[1]):
                values = [(maps[b, c, i, j] * tags[b, c]).item() for c in range(CLASSES)]
                best = max(values)
                labels[b, i, j] = values.index(best) + 1 if best > top else 255 if best > low else 0
                if padding[b, i * cell[0] : (i + 1) * cell[0], j * cell[1] : (j + 1) * cell[1]].any():
                    labels[b, i, j] = 255
    return labels


def balanced_oracle(logits, labels):
    """L_seg pixel by pixel."""
    sums, counts = [0.0, 0.0], [0, 0]
    logs = logits.log_softmax(1)
    for b, i, j in torch.ones_like(labels).nonzero().tolist():
        label = labels[b, i, j].item()
        if label != 255:
            sums[label > 0] = sums[label > 0] - logs[b, label, i, j]
            counts[label > 0] += 1
    return sum(0.5 * total / (count + 1e-6) for total, count in zip(sums, counts, strict=True))


def head_oracle(trunk, tokens, labels):
    """L_seg of the head of the patches, resized to the labels."""
    maps = tokens.patches.mT.reshape(len(labels), -1, *tokens.grid)
    return balanced_oracle(bilinear(trunk.head(maps), labels.shape[1:]), labels)


def tag_oracles(trunk, tokens, tags):
    """L_cls of the final and of the auxiliary patches, by torch."""
    logits, logits_aux = trunk.classifier(tokens.patches.amax(1)), trunk.classifier_aux(tokens.auxiliary.amax(1))
    losses = (F.multilabel_soft_margin_loss(scores, tags) for scores in (logits, logits_aux))
    return dict(zip(("tags", "tags_aux"), losses, strict=True))


def contrast_oracle(first, second, kinds):
    """.5 (1 - mean of alike) + .5 mean of apart of |cos| over pairs; kinds(b, i, j): True alike, False apart, None."""
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for b in range(len(first)):
        for i in range(first.shape[1]):
            for j in range(second.shape[1]):
                kind = kinds(b, i, j)
                if kind is not None:
                    sums[kind] = sums[kind] + F.cosine_similarity(first[b, i], second[b, j], dim=0).abs()
                    counts[kind] += 1
    return 0.5 * (1 - sums[True] / (counts[True] + 1)) + 0.5 * sums[False] / (counts[False] + 1)


def patch_oracle(patches, labels):
    """L_ptc by loops."""
    labels = labels.flatten(1)

    def kind(b, i, j):
        if i == j or 255 in (labels[b, i].item(), labels[b, j].item()):
            return None
        return bool(labels[b, i] == labels[b, j])

    return contrast_oracle(patches, patches, kind)


def gradients(term, module):
    """Names of the parameters of a module that a term's gradient reaches."""
    names, values = zip(*[pair for pair in module.named_parameters() if pair[1].requires_grad], strict=True)
    found = torch.autograd.grad(term, values, retain_graph=True, allow_unused=True)
    return {name for name, slope in zip(names, found, strict=True) if slope is not None and slope.any()}


def same_gradients(found, expected, module):
    """Two scalars have one value and one gradient in every parameter of a module.

    Both are sums in float32, in different orders, whose summands are as large as the largest gradient g of the module
    and partly cancel. Along a path of n operations errors reach about n eps g, and here n is below 1000.
    """
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=1e-4, atol=1e-6)
    values = [value for value in module.parameters() if value.requires_grad]
    pairs = [
        torch.autograd.grad(term, values, retain_graph=True, allow_unused=True, materialize_grads=True)
        for term in (found, expected)
    ]
    largest = max(slope.abs().max().item() for slope in pairs[1])
    atol = 1000 * torch.finfo(torch.float32).eps * largest
    for first, second in zip(*pairs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=atol)
