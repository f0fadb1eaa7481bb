"""Pretrained backbones: where their weights come from, and how names and shapes are checked.

    initialise(network.backbone, "resnet101s", "pretrained")            # ImageNet, from the hub or $REPRO_WEIGHTS
    initialise(network.backbone, "resnet-mini", "pretrained")           # ships with the package, no network
    initialise(network.backbone, "resnet50", "~/weights/r50.safetensors")
    initialise(network.backbone, "resnet101", "microsoft/resnet-101")   # any hub id, also `owner/name@revision`

Only safetensors are read, never pickles. Names are timm's; those of transformers' ResNet are translated.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]; all weights here expect them
SHIPPED = Path(__file__).parent / "weights"
FILE = "model.safetensors"  # timm's and transformers' name for it on the hub
DEFAULTS = {
    "resnet50": "timm/resnet50.tv_in1k",
    "resnet101": "timm/resnet101.tv_in1k",
    "resnet50s": "timm/resnet50s.gluon_in1k",
    "resnet101s": "timm/resnet101s.gluon_in1k",  # assumption: the papers' file of this network is not on the hub
    "mobilenetv2_100": "timm/mobilenetv2_100.ra_in1k",  # assumption: likewise
    "vit_base_patch16_224": "timm/vit_base_patch16_224.orig_in21k_ft_in1k",  # the port that ToCo and PCRE name
    "deit_base_patch16_224": "timm/deit_base_patch16_224.fb_in1k",
    "resnet-mini": "shipped",
    "vit-mini": "shipped",
}
CLASSIFIER = ("fc.", "classifier.", "head.", "conv_head.", "bn2.")  # what a backbone leaves out
TRANSFORMERS = (
    (r"resnet\.", ""),
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda found: f"layer{int(found[1]) + 1}.{found[2]}."),
    (r"(layer\d+\.\d+\.)shortcut\.convolution\.", r"\1downsample.0."),
    (r"(layer\d+\.\d+\.)shortcut\.normalization\.", r"\1downsample.1."),
    (r"(layer\d+\.\d+\.)layer\.(\d+)\.convolution\.", lambda found: f"{found[1]}conv{int(found[2]) + 1}."),
    (r"(layer\d+\.\d+\.)layer\.(\d+)\.normalization\.", lambda found: f"{found[1]}bn{int(found[2]) + 1}."),
)


class WeightsError(ValueError):
    """Weights missing, unreadable or of another network; the message names the place and the fix."""


def initialise(backbone: nn.Module, name: str, weights: str | os.PathLike = "pretrained") -> dict[str, str]:
    """Fill a backbone with pretrained weights; returns their provenance: source, sha256 and the file's own metadata.

    backbone: a network whose parameters have timm's names, without classifier.
    name: of the network, a key of `DEFAULTS` where weights is "pretrained".
    weights: "scratch" leaves the backbone as it is; "pretrained" takes the default of that name; otherwise a
        safetensors file, a folder that holds `model.safetensors`, or a hub id. For hub ids the folder
        $REPRO_WEIGHTS/<name on the hub> is looked at first.
    Raises WeightsError.
    """
    if str(weights) == "scratch":
        return {"source": "scratch"}
    source = str(weights)
    if source == "pretrained":
        if name not in DEFAULTS:
            raise WeightsError(f"no pretrained weights are known for {name!r}, only for {', '.join(DEFAULTS)}")
        source = DEFAULTS[name]
    path = SHIPPED / f"{name}.safetensors" if source == "shipped" else locate(name, source)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"cannot read {path} ({error}): fetch it again, or name another file") from error
    fill(backbone, tensors, f"{name} from {path}")
    return metadata | {"source": source, "sha256": digest}


def locate(name: str, source: str) -> Path:
    """The safetensors file that `source` (a file, a folder or a hub id) names. Raises WeightsError."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    hub = re.fullmatch(r"([\w.-]+/([\w.-]+))(?:@([\w.-]+))?", source)
    if hub is None or source.endswith(".safetensors"):
        raise WeightsError(
            f"{name}: there is no file {path}; weights must be a safetensors file, a folder with {FILE}, a hub id "
            "owner/name, 'pretrained' or 'scratch'"
        )
    repository, folder, revision = hub.groups()
    root = os.environ.get("REPRO_WEIGHTS")
    local = Path(root).expanduser() / folder / FILE if root else None
    if local is not None and local.is_file():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, FILE, revision=revision))
    except Exception as error:  # the hub client raises the errors of several libraries
        place = Path(root) if root else Path("weights")
        raise WeightsError(
            f"{name}: the weights {source} are not available. Looked at: "
            f"{local or 'no local folder (REPRO_WEIGHTS is not set)'}; the hub and its cache ({type(error).__name__}: "
            f"{error}). Choose: hf download {repository} {FILE} --local-dir {place / folder}, then set "
            f"REPRO_WEIGHTS={place}; or weights=PATH of a safetensors file with timm's names; or weights='scratch', "
            "which is not the published protocol"
        ) from error


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under timm's names: transformers' ResNet names translated, all others kept."""
    return {translated(key): tensor for key, tensor in tensors.items()}


def translated(key: str) -> str:
    """timm's name of one tensor."""
    for pattern, replacement in TRANSFORMERS:
        key = re.sub(rf"^{pattern}", replacement, key)
    return key


@torch.no_grad()
def fill(backbone: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors (any floating type) into a backbone of the same names and shapes; all or nothing.

    where: for messages. Tensors of a classifier that the backbone lacks are left out, batch norms' counters may be
        missing. A backbone with a method `fitted` (ViT: class tokens and positions) adapts the tensors first.
        Raises WeightsError when another tensor is missing, left over or of another shape.
    """
    state, found = backbone.state_dict(), timm_names(tensors)
    if hasattr(backbone, "fitted"):
        found = backbone.fitted(found)
    missing = [key for key in state if key not in found and not key.endswith("num_batches_tracked")]
    surplus = [key for key in found if key not in state and not key.startswith(CLASSIFIER)]
    if missing or surplus:
        raise WeightsError(
            f"{where}: not the weights of this network. Missing: {_some(missing)}; left over: {_some(surplus)}"
        )
    for key, tensor in found.items():
        if key in state and tensor.shape != state[key].shape:
            raise WeightsError(f"{where}: {key} is {tuple(tensor.shape)}, the network has {tuple(state[key].shape)}")
    for key, tensor in found.items():
        if key in state:
            state[key].copy_(tensor)


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"
