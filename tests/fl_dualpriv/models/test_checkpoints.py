"""Bad names, folders, devices and checkpoints: each ends in one `ConfigError` that says what to do."""

import functools
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.checkpoints import resolve_device
from fl_dualpriv.models.open_clip import OpenClipBackbone, load_backbone


def load(folder: Path) -> OpenClipBackbone:
    return load_backbone(f"local-dir:{folder}", "", "cpu")


def test_offline_tag_ends_in_one_error_without_waiting(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # refuses at once
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(ConfigError, match=r"'openai': the weights of ViT-B-32 are not on this machine.*local file"):
        load_backbone("ViT-B-32", "openai", "cpu")
    assert waits == []  # the hub's client retries for most of a minute, if it is let
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_unknown_and_incomplete_names(tiny_clip_name, tmp_path, monkeypatch):
    fails = functools.partial(pytest.raises, ConfigError)
    with fails(match=r"backbone.name = 'vit-b32' is not demo.*did you mean.*ViT-B-32"):
        load_backbone("vit-b32", "openai", "cpu")
    with fails(match=r"pretrained is empty.*tags of ViT-B-32: openai, .*or a .safetensors"):
        load_backbone("ViT-B-32", "", "cpu")
    with fails(match=r"'opnai' is neither a tag nor a checkpoint file; did you mean openai\? tags of ViT-B-32"):
        load_backbone("ViT-B-32", "opnai", "cpu")
    with fails(match=r"'weights/none.pt': there is no such file"):
        load_backbone(tiny_clip_name, "weights/none.pt", "cpu")
    with fails(match=r"pretrained = 'openai' has no effect for backbone.name = 'local-dir:x'"):
        load_backbone("local-dir:x", "openai", "cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda", "torch sees 1 CUDA"), ("cuda:1", "torch sees 1 CUDA"), ("gpu", "must be auto"), ("cpu:0", "must be auto"),
     ("cuda:", "must be auto"), ("cuda:-1", "must be auto")],
)  # fmt: skip
def test_bad_device(tiny_clip_dir, monkeypatch, device: str, message: str):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if device == "cuda" else 1)
    message = message.replace("1 CUDA", "0 CUDA") if device == "cuda" else message
    with pytest.raises(ConfigError, match=rf"resources.device = '{device}': {message}"):
        load_backbone(f"local-dir:{tiny_clip_dir}", "", device)


def test_convolutions_keep_all_bits_on_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert resolve_device("cuda").type == "cuda"
    assert not torch.backends.cudnn.allow_tf32


def test_auto_device(tiny_clip_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_backbone(f"local-dir:{tiny_clip_dir}", "", "auto").device.type == "cpu"


@pytest.mark.parametrize(
    ("missing", "message"),
    [("", "does not exist"), ("open_clip_config.json", "open_clip_config.json does not exist"),
     ("open_clip_model.safetensors", "open_clip_model.safetensors does not exist")],
    ids=["folder", "config", "weights"],
)  # fmt: skip
def test_incomplete_folder(tiny_clip_dir, tmp_path, missing: str, message: str):
    folder = tmp_path / "model"
    if missing:
        shutil.copytree(tiny_clip_dir, folder)
        (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"{message}; the folder must hold"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not an open_clip configuration: JSONDecodeError"), ("{}", "is not an open_clip configuration: KeyError"),
     ('{"model_cfg": {"embed_dim": 8}}', "model_cfg lacks vision_cfg, text_cfg"),
     ('{"model_cfg": {"embed_dim": 8, "vision_cfg": {"x": 3}, "text_cfg": {}}}', "cannot be built: TypeError.*'x'")],
    ids=["no JSON", "no model", "no towers", "unknown setting"],
)  # fmt: skip
def test_bad_folder_config(tiny_clip_dir, tmp_path, text: str, message: str):
    folder = shutil.copytree(tiny_clip_dir, tmp_path / "model")
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        pytest.param({"vision_cfg": {"width": 64}}, r"visual.*is \(64", id="width"),
        pytest.param(
            {"text_cfg": {"width": 64}}, r"positional_embedding is \(32, 64\), expected \(32, 32\)", id="text"
        ),
        pytest.param({"vision_cfg": {"layers": 4}}, "resblocks.3.* is unknown", id="deeper"),
        pytest.param({"vision_cfg": {"layers": 2}}, "resblocks.2.* is missing", id="shallower"),
        # open_clip would interpolate these two without a word.
        pytest.param({"vision_cfg": {"image_size": 48}}, r"is \(37, 32\), expected \(17, 32\)", id="image size"),
        pytest.param({"text_cfg": {"context_length": 20}}, r"is \(20, 32\), expected \(32, 32\)", id="context length"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoint_of_another_architecture(
    make_clip_dir, tiny_clip_name, tmp_path, changes: dict, quoted: str, suffix: str
):
    path = make_clip_dir(changes) / "open_clip_model.safetensors"
    if suffix == ".pt":
        torch.save(load_file(path), path := tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=rf"is a checkpoint of another architecture than 'Tiny-Test-8': .*{quoted}"):
        load_backbone(tiny_clip_name, str(path), "cpu")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "no tensors", "nan"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_corrupt_checkpoint(tiny_clip_dir, tiny_clip_name, tmp_path, damage: str, suffix: str):
    weights, path = load_file(tiny_clip_dir / "open_clip_model.safetensors"), tmp_path / f"weights{suffix}"
    if damage == "no tensors":
        weights = {}
    if damage == "nan":
        weights["visual.proj"][0, 0] = float("nan")
    if suffix == ".pt":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"x" * 999, "empty": b""}.get(damage, whole))
    message = {"nan": "not finite", "no tensors": "holds no tensors"}.get(damage, "cannot be read as a checkpoint")
    with pytest.raises(ConfigError, match=message):
        load_backbone(tiny_clip_name, str(path), "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_cfg": {"pool_type": "first"}}, "pool_type = 'first'"),  # a causal tower's first token sees no prompt
        ({"text_cfg": {"no_causal_mask": True, "pool_type": "none"}}, "pool_type = 'none'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_text_towers_are_refused(tiny_clip_dir, tmp_path, changes: dict, message: str):
    folder = shutil.copytree(tiny_clip_dir, tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    for key, value in changes.items():
        config["model_cfg"][key] = config["model_cfg"].get(key, {}) | value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"its text tower has .*{message}.*; supported are"):
        load(folder)


def test_an_end_token_that_the_tokenizer_never_writes(make_clip_dir):
    with pytest.raises(ConfigError, match=r"reads token 2 \(eos_id\), but its tokenizer ends a text with 49407"):
        load(make_clip_dir({"text_cfg": {"pool_type": "eos", "eos_id": 2}}))
