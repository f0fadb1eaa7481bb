"""Pretrained weights: names, checks, where they are looked for, what ships, and how the shipped ones are made."""

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

from repro.data.embed import official_index
from repro.data.images import load
from repro.models.deeplab import deeplab
from repro.models.pretrain import accuracy, classifier, pictures, pretrain, save
from repro.models.pretrained import DEFAULTS, SHIPPED, WeightsError, fill, initialise, timm_names, translated
from repro.models.resnet import Layout, ResNet, resnet
from repro.models.vit import vit

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
    """Embedded test garments: neither trained on nor among those that the stated accuracy is of."""
    network = classifier(name, 10)
    with safe_open(SHIPPED / f"{name}.safetensors", "pt") as file:
        stated, found = float(file.metadata()["accuracy"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
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


def test_pretraining_is_deterministic_and_its_file_fills_a_backbone(tmp_path):
    part = load("fashion", "train")
    images, labels = pictures(part.images[:256], 1), part.labels[:256]
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
