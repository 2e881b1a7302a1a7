"""Models of transformers: equal to the model itself in text, image and gradient, and refused if they do not fit."""

import json
import logging
import shutil
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.transformers import TransformersBackbone, transformers

TEXTS = ["a photo of a cat", "the great wall of china", "dog"]
NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")


def load(folder: Path, precision: str = "fp32") -> TransformersBackbone:
    backbone = load_backbone(f"hf:{folder}", "", "cpu", None, precision)  # type: ignore[arg-type]
    assert isinstance(backbone, TransformersBackbone)
    return backbone


def image() -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"hf_{request.param}_dir")


def test_frozen_and_described(folder: Path):
    backbone = load(folder)
    assert not any(parameter.requires_grad for parameter in backbone._model.parameters())
    assert not any(module.training for module in backbone._model.modules())
    assert all(parameter.dtype == torch.float32 for parameter in backbone._model.parameters())
    clip = isinstance(backbone._model, transformers.CLIPModel)
    sizes = (backbone.ctx_dim, backbone.embed_dim, backbone.context_length)
    assert sizes == ((32, 24, 48) if clip else (32, 32, 16))
    # exp of CLIP's initial value; of the fixture's 2.0, whatever the bias of the logits is.
    assert backbone.logit_scale == pytest.approx(np.exp(backbone._model.logit_scale.item()))
    assert backbone.rows.start == ((512,) if clip else ())
    assert (backbone.rows.end, backbone.rows.pad) == ((513, 513) if clip else (1, 1))
    weights = sum(value.numel() for value in load_file(folder / "model.safetensors").values())
    assert backbone.weight_bytes >= 4 * weights


@torch.no_grad()
def test_text_features_are_the_models_own(folder: Path):
    backbone = load(folder)
    tokens = backbone.tokenize(TEXTS)
    end = torch.tensor([len(backbone.rows.start) + len(backbone.words(text)) for text in TEXTS])
    assert all(tokens[i, position] == backbone.rows.end for i, position in enumerate(end.tolist()))
    expected = backbone._model.get_text_features(tokens).pooler_output
    actual = backbone.encode_embeddings(backbone.embed_tokens(tokens), end)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    if not backbone.fills_rows:
        cut = backbone.encode_embeddings(backbone.embed_tokens(tokens[:, : int(end.max()) + 1]), end)
        torch.testing.assert_close(cut, expected, rtol=0, atol=1e-6)
    lengths = [15, 17] if backbone.fills_rows else [49]
    for length in lengths:
        with pytest.raises(ValueError, match=rf"{length} tokens: the text tower of .* reads"):
            backbone.encode_embeddings(torch.zeros(1, length, 32), torch.zeros(1, dtype=torch.long))


@torch.no_grad()
def test_image_features_are_the_models_own(folder: Path):
    backbone = load(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=image(), return_tensors="pt")["pixel_values"]
    assert torch.equal(backbone.preprocess(image())[None], pixels)
    expected = torch.nn.functional.normalize(backbone._model.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(backbone.image_features(pixels), expected)
    assert backbone.preprocess(image().convert("L")).shape == (3, 32, 32)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "text",
    [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"eos_token_id": 2}, {"layer_norm_eps": 1e-3}],
    ids=["quick gelu", "gelu", "tanh", "legacy end", "eps"],
)
def test_shared_prefix_equals_plain_tower(make_hf_clip, text: dict):
    backbone = load(make_hf_clip(text))
    prompted = PromptedText(backbone, NAMES, "a photo of a {}")
    assert prompted.shares_prefix  # the check at start-up: values and gradients
    context = prompted.template_context(len(backbone.words("a photo of a")))
    torch.testing.assert_close(prompted.class_features(context), prompted.zero_shot_features(), rtol=0, atol=1e-5)


def test_another_activation_takes_the_plain_path(make_hf_clip):
    backbone = load(make_hf_clip({"hidden_act": "relu"}))
    assert backbone.text_stack is None
    assert "another activation, relu" in backbone.plain_reason
    assert not PromptedText(backbone, NAMES, "a photo of a {}").shares_prefix


@pytest.mark.filterwarnings("error::UserWarning")
def test_siglip_takes_the_plain_path_with_full_rows(hf_siglip_dir: Path, caplog: pytest.LogCaptureFixture):
    backbone = load(hf_siglip_dir)
    with caplog.at_level(logging.INFO, "fl_dualpriv"):
        for _ in range(2):
            prompted = PromptedText(backbone, NAMES, "a photo of a {}")
            assert not prompted.shares_prefix
    said = [record.message for record in caplog.records if record.name == "fl_dualpriv"]
    assert len(said) == 1
    assert "its text tower is not causal, so every class runs its whole row" in said[0]
    features = prompted.tower(prompted.template_context(4)[None])
    torch.testing.assert_close(features.values[0], prompted.zero_shot_features(), rtol=0, atol=1e-6)
    # Rows of the batched backward pass are those of one backward pass each.
    cotangents = torch.randn(1, 3, len(NAMES), 32, generator=torch.Generator().manual_seed(0))
    rows = features.vjp(cotangents)[0]
    for row, cotangent in zip(rows, cotangents[0], strict=True):
        leaf = prompted.template_context(4).requires_grad_(True)
        (prompted.plain_tower.features(leaf) * cotangent).sum().backward()
        assert leaf.grad is not None
        assert (row - leaf.grad).abs().max() <= 1e-5 * leaf.grad.abs().max()
    prompted.check_length(10)  # 10 + 5 name tokens + end = 16
    with pytest.raises(ConfigError, match="17 tokens"):
        prompted.check_length(11)


def test_bf16(hf_clip_dir):
    folder = hf_clip_dir
    exact, rough = load(folder), load(folder, "bf16")
    assert rough._model is exact._model
    assert rough.text_stack is not None
    assert rough.text_stack.blocks[0].up.weight.dtype == torch.bfloat16
    assert rough.text_stack.blocks[0].ln_1.weight.dtype == rough.text_stack.positions.dtype == torch.float32
    prompted = PromptedText(rough, NAMES, "a photo of a {}")
    assert prompted.shares_prefix
    assert 1e-5 < prompted._difference() <= 5e-2
    pixels = exact.preprocess(image())[None]
    difference = (rough.image_features(pixels) - exact.image_features(pixels)).abs().max()
    assert 0 < difference < 0.05
    assert rough.image_features(pixels).dtype == torch.float32
    assert rough.feature_key != exact.feature_key
    assert rough.fingerprint == exact.fingerprint


def test_keys_follow_weights_and_transform(hf_clip_dir, tmp_path: Path):
    folder = hf_clip_dir
    backbone = load(folder)
    same = load(shutil.copytree(folder, tmp_path / "same"))
    assert (same.fingerprint, same.feature_key) == (backbone.fingerprint, backbone.feature_key)
    other = shutil.copytree(folder, tmp_path / "other")
    processor = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.5, 0.5, 0.5]}))
    assert load(other).fingerprint == backbone.fingerprint
    assert load(other).feature_key != backbone.feature_key
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] += 1e-3
    changed = shutil.copytree(folder, tmp_path / "changed")
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    assert load(changed).fingerprint != backbone.fingerprint


def test_a_half_precision_checkpoint_runs_in_float32(hf_clip_dir, tmp_path: Path):
    folder = shutil.copytree(hf_clip_dir, tmp_path / "half")
    model = transformers.CLIPModel.from_pretrained(folder).half()
    model.save_pretrained(folder)
    assert all(parameter.dtype == torch.float32 for parameter in load(folder)._model.parameters())


# What is refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", "its model cannot be loaded"),
        ("missing", r"weights are never random: text_model.*layers.1.mlp.fc1.weight is missing"),
        ("shape", "its model cannot be loaded|has another shape"),
        ("nan", "not finite numbers"),
        ("config", "its configuration cannot be loaded"),
        ("type", "is a model of type 'bert'; supported are clip, metaclip_2, siglip"),
        ("no tokenizer", "its tokenizer has no vocabulary"),
        ("no processor", "its image processor cannot be loaded"),
        ("image size", "cannot read the output of its image processor: ValueError.*64"),
        ("end", r"reads token 5 \(eos_token_id\), but its tokenizer ends a text with 513"),
    ],
)
def test_damaged_folders(hf_clip_dir, tmp_path: Path, damage: str, message: str):
    folder = shutil.copytree(hf_clip_dir, tmp_path / "model")
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    key = next(key for key in weights if key.startswith("text") and key.endswith("layers.1.mlp.fc1.weight"))
    if damage == "missing":
        del weights[key]
    if damage == "shape":
        weights[key] = weights[key][:5].clone()
    if damage == "nan":
        weights[key][0, 0] = float("nan")
    if damage == "type":
        config = {"model_type": "bert"}
    if damage == "end":
        config["text_config"]["eos_token_id"] = 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{" if damage == "config" else json.dumps(config))
    if damage == "image size":
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        processor["crop_size"] = {"height": 64, "width": 64}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    gone = {"no weights": ("model.safetensors",), "no processor": ("preprocessor_config.json",)}
    gone["no tokenizer"] = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    for name in gone.get(damage, ()):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_options_that_do_not_apply(hf_clip_dir):
    name = f"hf:{hf_clip_dir}"
    with pytest.raises(ConfigError, match="pretrained = 'openai' has no effect"):
        load_backbone(name, "openai", "cpu")
    with pytest.raises(ConfigError, match="'hf:': name a folder or a model on the hub"):
        load_backbone("hf:", "", "cpu")


def test_a_hub_name_offline_ends_in_one_error_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses at once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'hf:nobody/nothing': its configuration cannot be loaded"):
        load_backbone("hf:nobody/nothing", "", "cpu")
    assert waits == []


def test_a_name_that_ends_a_text(hf_clip_dir):
    with pytest.raises(ConfigError, match=r"holds a token that ends a text"):
        load(hf_clip_dir).words("a <|endoftext|> b")
