"""Pretrained weights: names, checks, where they are looked for, what ships, and how the shipped ones are made."""

import math

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from repro.data.catalogue import load
from repro.data.embed import official_index
from repro.data.pretrain import ADAMW, BATCH, Pooled, accuracy, classifier, pictures, pretrain, save
from repro.experiment import Experiment, resolve
from repro.models.deeplab import deeplab
from repro.models.pretrained import DEFAULTS, SHIPPED, WeightsError, fill, initialise, timm_names, translated
from repro.models.resnet import Layout, ResNet, resnet
from repro.models.vit import Layout as VitLayout
from repro.models.vit import ViT, vit

LAYOUT = Layout((1, 2, 1, 1), (4, 4, 8, 8), (4,))


@pytest.fixture
def backbone():
    return ResNet(LAYOUT, 32, None, 3).eval()


@pytest.fixture
def weights():
    """Tensors of such a network with a classifier, float16, as a file on the hub could be."""
    torch.manual_seed(1)
    state = ResNet(LAYOUT, 32, 10, 3).state_dict()
    return {key: torch.randn_like(value).half() if value.is_floating_point() else value for key, value in state.items()}


def equal(backbone, weights):
    return all(torch.equal(value, weights[key].to(value.dtype)) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("theirs, ours", [
    ("resnet.embedder.embedder.convolution.weight", "conv1.weight"),
    ("resnet.embedder.embedder.normalization.running_var", "bn1.running_var"),
    ("resnet.encoder.stages.0.layers.0.shortcut.convolution.weight", "layer1.0.downsample.0.weight"),
    ("resnet.encoder.stages.3.layers.0.shortcut.normalization.bias", "layer4.0.downsample.1.bias"),
    ("resnet.encoder.stages.2.layers.22.layer.1.convolution.weight", "layer3.22.conv2.weight"),
    ("encoder.stages.2.layers.5.layer.2.normalization.weight", "layer3.5.bn3.weight"),
    ("layer3.0.conv2.weight", "layer3.0.conv2.weight"),
    ("conv1.6.weight", "conv1.6.weight"),
])  # fmt: skip
def test_names(theirs, ours):
    assert translated(theirs) == ours


def test_every_name_of_transformers_resnet50_is_translated():
    with torch.device("meta"):
        theirs, ours = ResNetForImageClassification(ResNetConfig()).state_dict(), resnet("resnet50").state_dict()
    found = {key: value.shape for key, value in timm_names(theirs).items() if not key.startswith("classifier.")}
    assert found == {key: value.shape for key, value in ours.items()}


def test_a_saved_transformers_model_gives_its_features(tmp_path, backbone):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[16, 16, 32, 32], depths=[1, 2, 1, 1])
    theirs = ResNetForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    provenance = initialise(backbone, "small", tmp_path)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(backbone.stages(x)[-1], theirs.resnet(x).last_hidden_state)
    assert provenance["source"] == str(tmp_path) and len(provenance["sha256"]) == 64


def test_a_file_with_classifier_in_half_precision_fills_a_backbone(tmp_path, backbone, weights):
    save_file(weights, tmp_path / "any.safetensors", metadata={"data": "noise"})
    assert initialise(backbone, "small", tmp_path / "any.safetensors")["data"] == "noise"
    assert equal(backbone, weights) and backbone.conv1.weight.dtype == torch.float32
    del weights["bn1.num_batches_tracked"]  # a counter may be missing
    fill(backbone, weights, "here")


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("layer2.0.conv2.weight"), r"Missing: 1 \(layer2.0.conv2.weight\); left over: none"),
    (lambda w: w.update({"layer5.0.weight": torch.zeros(1)}), r"Missing: none; left over: 1 \(layer5.0.weight\)"),
    (lambda w: w.update({"bn1.bias": torch.zeros(5)}), r"bn1.bias is \(5,\), the network has \(4,\)"),
])  # fmt: skip
def test_weights_of_another_network_are_refused_and_leave_the_backbone_alone(backbone, weights, change, message):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    change(weights)
    with pytest.raises(WeightsError, match=f"here: .*{message}"):
        fill(backbone, weights, "here")
    assert equal(backbone, before)


def test_a_truncated_file_is_named(tmp_path, backbone, weights):
    path = tmp_path / "cut.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"cannot read .*cut\.safetensors .*fetch it again"):
        initialise(backbone, "small", path)


@pytest.mark.parametrize("source", ["nowhere/file.safetensors", "just-a-word", "/no/such/folder"])
def test_a_missing_path_lists_the_choices(backbone, source):
    with pytest.raises(WeightsError, match=f"there is no file {source}.*hub id owner/name, 'pretrained' or 'scratch'"):
        initialise(backbone, "small", source)


def test_scratch_leaves_the_backbone_and_unknown_defaults_are_named(backbone):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert initialise(backbone, "small", "scratch") == {"source": "scratch"} and equal(backbone, before)
    with pytest.raises(WeightsError, match="no pretrained weights are known for 'small', only for resnet50"):
        initialise(backbone, "small")


def test_a_hub_id_is_fetched_with_its_revision(tmp_path, backbone, weights, monkeypatch):
    monkeypatch.delenv("REPRO_WEIGHTS", raising=False)
    save_file(weights, tmp_path / "cached")
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert initialise(backbone, "small", "owner/small.v1@abc")["source"] == "owner/small.v1@abc"
    initialise(backbone, "small", "owner/small.v1")
    assert asked == [("owner/small.v1", "model.safetensors", revision) for revision in ("abc", None)]
    assert equal(backbone, weights)


def test_a_local_copy_comes_before_the_hub(tmp_path, backbone, weights, monkeypatch):
    monkeypatch.setenv("REPRO_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(DEFAULTS, "small", "timm/small.v1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # calling it would raise
    (tmp_path / "small.v1").mkdir()
    save_file(weights, tmp_path / "small.v1" / "model.safetensors")
    assert initialise(backbone, "small")["source"] == "timm/small.v1" and equal(backbone, weights)


def test_offline_the_message_gives_the_choices(tmp_path, backbone, monkeypatch):
    monkeypatch.setenv("REPRO_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WeightsError) as caught:
        initialise(backbone, "resnet101s")
    message = str(caught.value)
    for part in (
        "timm/resnet101s.gluon_in1k are not available",
        f"{tmp_path / 'resnet101s.gluon_in1k' / 'model.safetensors'}",
        "hf download timm/resnet101s.gluon_in1k model.safetensors --local-dir",
        f"REPRO_WEIGHTS={tmp_path}",
        "weights=PATH",
        "weights='scratch'",
    ):
        assert part in message, part


def test_shipped_weights_are_small_and_say_where_they_come_from():
    files = sorted(SHIPPED.glob("*.safetensors"))
    shipped = sorted(name for name, source in DEFAULTS.items() if source == "shipped")
    assert [path.stem for path in files] == shipped
    assert sum(path.stat().st_size for path in files) <= 2 * 2**20
    for path in files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        for key in ("task", "data", "digest", "held_out", "accuracy", "command", "steps", "normalisation", "torch"):
            assert metadata[key], key
        assert "48000 train garments that are not embedded" in metadata["data"]


def test_shipped_weights_fill_the_mini_vit_with_a_token_a_class():
    network = vit("vit-mini", class_tokens=5, masked=True, value_only=True)
    provenance = initialise(network, "vit-mini")
    assert provenance["source"] == "shipped" and 0.7 < float(provenance["accuracy"]) < 1
    assert torch.equal(network.cls_token, network.cls_token[:, :1].expand(-1, 5, -1)) and network.cls_token.any()


@pytest.mark.parametrize("stride", [4, 8])
def test_shipped_weights_fill_the_mini_network(stride):
    network = deeplab("resnet-mini", 6, stride)
    provenance = initialise(network.backbone, "resnet-mini")
    assert provenance["source"] == "shipped" and 0.8 < float(provenance["accuracy"]) < 1


@pytest.mark.parametrize("name", ["resnet-mini", "vit-mini"])
def test_shipped_weights_reach_their_accuracy_on_garments_they_have_not_seen(name):
    """Embedded test garments: neither trained on nor among those that the stated accuracy is of.

    The ViT's is of the mean of two classifiers, of which the file has one; the other is silenced here.
    """
    network = classifier(name, 10)
    with safe_open(SHIPPED / f"{name}.safetensors", "pt") as file:
        stated, found = float(file.metadata()["accuracy"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    found |= {f"head_aux.{part}": torch.zeros_like(found[f"head.{part}"]) for part in ("weight", "bias")
              if name == "vit-mini"}  # fmt: skip
    fill(network, {key: found[key.removeprefix("encoder.")] for key in network.state_dict()}, name)
    garments = load("fashion", "test")
    found = accuracy(network, pictures(garments.images[:600], 9), garments.labels[:600])
    assert abs(found - stated) < 4 * (stated * (1 - stated) / 600) ** 0.5


def test_pictures_follow_from_the_seed_and_show_the_garment():
    garments = load("fashion", "test").images[:300]
    images = pictures(garments, 5)
    assert images.shape == (300, 3, 48, 48) and images.dtype == torch.uint8
    assert torch.equal(pictures(garments, 5), images)
    assert torch.equal(pictures(garments[:256], 5), images[:256])  # the chunks draw apart
    assert not torch.equal(pictures(garments, 6), images)
    blank = pictures(torch.zeros_like(garments), 5)  # the same words without a garment: the texture alone
    shown = (images != blank).any(1).flatten(1).double().mean(1)
    assert 0.01 < shown.min() and 0.15 < shown.mean() < 0.5


def test_the_free_garments_are_disjoint_from_the_embedded_ones():
    for split, total in (("train", 60_000), ("test", 10_000)):
        index = official_index(split)
        assert len(index.unique()) == len(load("fashion", split)) and index.min() >= 0 and index.max() < total


@pytest.fixture(scope="module")
def few():
    """Pictures and labels for two steps."""
    part = load("fashion", "train")
    return pictures(part.images[: 2 * BATCH], 1), part.labels[: 2 * BATCH]


def test_pretraining_is_deterministic_and_its_file_fills_a_backbone(tmp_path, few):
    images, labels = few
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for path in paths:
        save(pretrain("resnet-mini", images, labels, epochs=1), path, {"data": "256 garments"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    network = resnet("resnet-mini", 4)
    assert initialise(network, "resnet-mini", paths[0])["data"] == "256 garments"
    with safe_open(paths[0], "pt") as file:
        assert file.get_tensor("layer4.0.conv2.weight").dtype == torch.float16
        assert file.get_tensor("layer4.0.bn2.running_var").dtype == torch.float32
        torch.testing.assert_close(network.bn1.running_var, file.get_tensor("bn1.running_var"), rtol=0, atol=0)


@pytest.fixture
def pooled():
    """In float64, with every parameter away from 0 and 1, so that nothing left out can hide."""
    torch.manual_seed(0)
    network = Pooled(ViT(VitLayout(16, 3, 2, 4, 4, 2, ((8, 2), (8, 2))), 1, False, False, -2, 3), 5).double()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return network


def test_a_pooled_vit_takes_maxima_over_patches_that_are_each_on_their_own(pooled):
    state, x = pooled.state_dict(), torch.randn(3, 3, 16, 24, dtype=torch.float64)

    def linear(name, values):
        return torch.einsum("bi,oi->bo", values, state[f"{name}.weight"]) + state[f"{name}.bias"]

    def norm(name, values):
        centred = values - values.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    last, auxiliary = [], []
    for patch in pooled.encoder.embed(x)[0][:, 1:].unbind(1):  # without the class token
        for index in range(3):
            block = f"encoder.blocks.{index}"
            value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", patch))[:, 32:]
            patch = patch + linear(f"{block}.attn.proj", value)
            hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", patch))
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            patch = patch + linear(f"{block}.mlp.fc2", hidden)
            if index == 1:
                auxiliary.append(patch)
        last.append(norm("encoder.norm", patch))
    assert len(last) == 4 * 6
    expected = [linear("head", torch.stack(last).amax(0)), linear("head_aux", torch.stack(auxiliary).amax(0))]
    torch.testing.assert_close(pooled(x), torch.stack(expected, 2))


def test_in_pretraining_queries_keys_and_the_class_token_have_no_gradient(pooled):
    logits = pooled(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    F.cross_entropy(logits, torch.tensor([[0, 0], [1, 1], [2, 2], [4, 4]])).backward()
    for name, parameter in pooled.named_parameters():
        slope = parameter.grad
        if "attn.qkv" in name:
            assert slope[:32].abs().max() == 0 and slope[32:].abs().max() > 0, name
        elif name.endswith("cls_token"):
            assert slope is None or slope.abs().max() == 0
        else:
            assert slope.abs().max() > 0, name
    assert (pooled.encoder.pos_embed.grad[0].abs().amax(1) > 0).tolist() == [False] + [True] * 16


def test_the_pretrained_vit_is_that_of_the_mini_recipe():
    recipe, network = resolve(Experiment("pcre", "pcre", "scenes", 500)), classifier("vit-mini", 10)
    expected = vit(recipe.network, value_only=recipe.value_only, auxiliary=recipe.auxiliary)
    assert network.encoder.auxiliary == expected.auxiliary
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    assert {key: value.shape for key, value in network.encoder.state_dict().items()} == shapes


def test_a_pretrained_vit_keeps_its_queries_and_its_file_has_no_auxiliary_classifier(tmp_path, few):
    made, path = pretrain("vit-mini", *few, epochs=1), tmp_path / "few.safetensors"
    torch.manual_seed(0)
    fresh = classifier("vit-mini", 10)
    clock = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], **ADAMW)
    cycle, rates = torch.optim.lr_scheduler.OneCycleLR(clock, ADAMW["lr"], total_steps=2, pct_start=0.2), []
    for _ in range(2):
        rates.append(cycle.get_last_lr()[0])
        clock.step()
        cycle.step()
    decayed = math.prod(1 - rate * ADAMW["weight_decay"] for rate in rates)  # all that happens to them
    for before, after in zip(fresh.encoder.blocks, made.encoder.blocks, strict=True):
        before, after = before.attn.qkv.weight, after.attn.qkv.weight
        torch.testing.assert_close(after[:96], decayed * before[:96])
        assert (after[96:] - decayed * before[96:]).abs().max() > 1e-4
    assert (made.head_aux.weight - decayed * fresh.head_aux.weight).abs().max() > 1e-4
    save(made, path, {"data": "few"})
    network = vit("vit-mini", class_tokens=5)
    assert initialise(network, "vit-mini", path)["data"] == "few"
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert set(found) == set(network.state_dict()) | {"head.weight", "head.bias"}
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], made.encoder.blocks[1].mlp.fc1.weight.half())
    assert torch.equal(found["head.weight"], made.head.weight.half()) and found["norm.bias"].dtype == torch.float32


def test_accuracy_is_of_the_mean_of_both_classifiers():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            """Of every image the last patches say class 0 by 1, the auxiliary ones class 1 by 1.5."""
            return torch.tensor([[1.0, 0.0], [0.0, 1.5], [0.9, 0.0]]).expand(len(x), 3, 2)

    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert accuracy(Fixed(), images, torch.tensor([1, 0, 1, 2])) == 0.5
