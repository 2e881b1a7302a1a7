"""open_clip's models with encoders of transformers and CoCa; weights in archives, in .bin files and on the hub."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models import archives
from fl_dualpriv.models.load import load_backbone
from fl_dualpriv.models.open_clip import OpenClipBackbone, open_clip
from fl_dualpriv.models.transformers import transformers
from tests.fl_dualpriv.models.conftest import TEXT, WORDS

TEXTS = ["a photo of a cat", "the great wall of china", "dog"]
NAMES = ("cat", "red fire truck", "dog", "the great wall of china", "tree")


def bert(folder: Path) -> None:
    """What BiomedCLIP has: a BERT, lower case, read at CLS."""
    config = transformers.BertConfig(**TEXT, vocab_size=30, max_position_embeddings=24, pad_token_id=0)
    transformers.BertModel(config).save_pretrained(folder)
    file = folder / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), "utf-8")
    transformers.BertTokenizer(vocab=str(file)).save_pretrained(folder)


def roberta(folder: Path) -> None:
    """A RoBERTa: byte-level words that carry the space before them, positions behind the padding index."""
    settings = TEXT | {"vocab_size": 300, "max_position_embeddings": 122, "pad_token_id": 1}
    transformers.RobertaModel(transformers.RobertaConfig(**settings, bos_token_id=0, eos_token_id=2)).save_pretrained(
        folder
    )
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    transformers.RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)


ENCODERS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "BERT, CLS": (
        bert,
        {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp", "context_length": 20},
    ),
    "BERT, pooler": (bert, {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear", "context_length": 24}),
    "RoBERTa, mean": (roberta, {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", "context_length": 120}),
}
COCA = {
    "custom_text": True,
    "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {"embed_cls": True, "output_tokens": True, "context_length": 76},
    "multimodal_cfg": {"context_length": 76, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
}


@pytest.fixture(scope="module", params=[*ENCODERS, "CoCa"])
def folder(request: pytest.FixtureRequest, make_clip_dir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "CoCa":
        return make_clip_dir(COCA)
    write, settings = ENCODERS[request.param]
    parts = tmp_path_factory.mktemp("encoder")
    write(parts)
    text = settings | {"hf_model_name": str(parts), "hf_tokenizer_name": str(parts), "hf_model_pretrained": False}
    made = make_clip_dir({"custom_text": True, "text_cfg": text})
    for file in parts.iterdir():
        if not (made / file.name).exists():
            shutil.copy(file, made / file.name)
    return made


def load(folder: Path) -> OpenClipBackbone:
    backbone = load_backbone(f"local-dir:{folder}", "", "cpu")
    assert isinstance(backbone, OpenClipBackbone)
    return backbone


def plain(folder: Path) -> Any:
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


@torch.no_grad()
def test_features_are_the_models_own(folder: Path):
    backbone, model = load(folder), plain(folder)
    tokens = backbone.tokenize(TEXTS)
    end = torch.tensor([len(backbone.rows.start) + len(backbone.words(text)) for text in TEXTS])
    assert all(tokens[i, position] == backbone.rows.end for i, position in enumerate(end.tolist()))
    is_coca = "multimodal_cfg" in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    expected = model.encode_text(tokens, normalize=False)
    actual = backbone.encode_embeddings(backbone.embed_tokens(tokens), end)
    atol = 1e-6 * max(1.0, float(expected.abs().max()))  # float32 sums in another order
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    if not backbone.fills_rows:
        cut = backbone.encode_embeddings(backbone.embed_tokens(tokens[:, : int(end.max()) + 1]), end)
        torch.testing.assert_close(cut, expected, rtol=0, atol=atol)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    own = torch.nn.functional.normalize(model.encode_image(images, normalize=False), dim=-1)
    torch.testing.assert_close(backbone.image_features(images), own, rtol=0, atol=1e-6)
    assert backbone.fills_rows == is_coca


def test_a_prompt_moves_every_class(folder: Path):
    backbone = load(folder)
    text = PromptedText(backbone, NAMES, "a photo of a {}")
    start = text.template_context(n_ctx := text.count("a photo of a"))
    features = text.tower(torch.stack([start, start + 0.1]))
    torch.testing.assert_close(features.values[0], text.zero_shot_features(), rtol=0, atol=1e-5)
    gradient = features.vjp(torch.ones(2, 1, len(NAMES), backbone.embed_dim))
    assert gradient.shape == (2, 1, n_ctx, backbone.ctx_dim)
    assert bool((gradient.abs().amax(dim=(-1, -2)) > 0).all())


def test_words_that_a_tower_cannot_read_are_named(folder: Path):
    backbone = load(folder)
    if "multimodal_cfg" in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]:
        text = next(t for t in ("!~", "!|", "!^", "!§") if 0 in backbone._tokenizer.encode(t))
        with pytest.raises(ConfigError, match=r"class '.*': .* for padding, as it does with '!'"):
            PromptedText(backbone, ("cat", text), "a photo of a {}")
    elif (folder / "vocab.txt").exists():
        with pytest.raises(ConfigError, match=r"class 'zebra': .*does not know 'zebra'"):
            PromptedText(backbone, ("cat", "zebra"), "a photo of a {}")


def test_no_code_of_a_text_encoder_runs(make_clip_dir, tmp_path: Path):
    parts = tmp_path / "encoder"
    parts.mkdir()
    bert(parts)
    config = json.loads((parts / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (parts / "config.json").write_text(json.dumps(config))
    (parts / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass Mine: pass\n")
    folder = shutil.copytree(make_clip_dir(), tmp_path / "model")
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"] |= {"custom_text": True}
    document["model_cfg"]["text_cfg"] = {"hf_model_name": str(parts), "hf_tokenizer_name": str(parts)}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="cannot be built"):
        load(folder)
    assert not (tmp_path / "ran").exists()


# --- weights in other files -------------------------------------------------------------------------------------------


class Part(torch.nn.Module):
    """A module of the archive; the root has a method, as OpenAI's has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def archive_of(weights: dict[str, torch.Tensor], path: Path) -> Path:
    """A TorchScript archive in OpenAI's form: half precision, sizes beside the weights."""
    root = Part()
    for name, value in weights.items():
        *parents, last = name.split(".")
        node: torch.nn.Module = root
        for parent in parents:
            if parent not in dict(node.named_children()):
                node.add_module(parent, Part())
            node = dict(node.named_children())[parent]
        node.register_parameter(last, torch.nn.Parameter(value.half(), requires_grad=False))
    for name in archives.SIZES:
        root.register_buffer(name, torch.tensor(7))
    torch.jit.script(root).save(str(path))
    return path


def test_openais_archive_loads_with_its_activation(tiny_clip_dir: Path, tiny_clip_name: str, tmp_path: Path):
    weights = load_file(tiny_clip_dir / "open_clip_model.safetensors")
    path = archive_of(weights, tmp_path / "ViT-Tiny.pt")
    assert archives.is_archive(path)
    assert not archives.is_archive(tiny_clip_dir / "open_clip_model.safetensors")
    official = torch.jit.load(str(path)).state_dict()
    ours = archives.read_archive(path)
    assert {name: value.shape for name, value in official.items() if name not in archives.SIZES} == {
        name: value.shape for name, value in ours.items()
    }
    assert all(torch.equal(value.float(), ours[name]) for name, value in official.items() if name in ours)
    backbone = load_backbone(tiny_clip_name, str(path), "cpu")
    assert isinstance(backbone, OpenClipBackbone)
    model = open_clip.create_model(tiny_clip_name, load_weights=False, force_quick_gelu=True).eval()
    model.load_state_dict({name: value.half().float() for name, value in weights.items()})
    tokens = backbone.tokenize(TEXTS)
    with torch.no_grad():
        expected = model.encode_text(tokens)
        end = torch.tensor([len(backbone.words(text)) + 1 for text in TEXTS])
        actual = backbone.encode_embeddings(backbone.embed_tokens(tokens), end)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_nothing_of_an_archive_runs(tiny_clip_name: str, tmp_path: Path):
    import pickle
    import zipfile

    path = tmp_path / "evil.pt"

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("ran",))

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/code/x.py", "")
        file.writestr("evil/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(
        ConfigError, match=r"cannot be read as a TorchScript archive: the archive asks for builtins.print"
    ):
        load_backbone(tiny_clip_name, str(path), "cpu")
    for content in (b"\x80\x02cos\nsystem\n(S'x'\ntR.", b"garbage", b"\x80\x02]."):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("evil/code/x.py", "")
            file.writestr("evil/data.pkl", content)
        with pytest.raises(ConfigError, match=r"as a TorchScript archive|another architecture|no tensors"):
            load_backbone(tiny_clip_name, str(path), "cpu")


def test_an_archive_changes_no_function_and_ends(tmp_path: Path):
    import zipfile

    def read(content: bytes, storage: bytes = b"") -> dict[str, torch.Tensor]:
        path = tmp_path / "evil.pt"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("evil/code/x.py", "")
            file.writestr("evil/data.pkl", content)
            file.writestr("evil/data/0", storage)
        return archives.read_archive(path)

    function = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    with pytest.raises(ValueError, match="the archive changes a function"):
        read(function + b"}(X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xub.")
    assert archives._tensor.__name__ == "_tensor"
    part = b"c__torch__\nPart\n)\x81"
    deep = b"\x80\x02" + part + b"q\x00}X\x01\x00\x00\x00ah\x00sb."  # a part that contains itself
    with pytest.raises(ValueError, match="contains itself"):
        read(deep)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    wide = function + b"(" + storage + b"K\x00(J\x00\xe1\xf5\x05t(K\x00t\x89}tR."  # 10^8 numbers of one
    with pytest.raises(ValueError, match="larger than its storage"):
        read(wide, b"\0\0\0\0")


def test_a_file_of_an_architecture_with_two_activations_is_told(
    tiny_clip_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for name, quick in (("Tiny-Two-8", False), ("Tiny-Two-8-quickgelu", True)):
        config = json.loads((tiny_clip_dir / "open_clip_config.json").read_text())["model_cfg"]
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(config | {"quick_gelu": quick}))
        open_clip.add_model_config(file)
    weights = tmp_path / "weights.bin"
    torch.save(load_file(tiny_clip_dir / "open_clip_model.safetensors"), weights)
    with caplog.at_level(logging.WARNING, "fl_dualpriv"):
        load_backbone("Tiny-Two-8", str(weights), "cpu")
    assert "Tiny-Two-8 uses GELU. For weights of OpenAI, MetaCLIP or DFN set backbone.name = Tiny-Two-8-quickgelu" in (
        caplog.text
    )
    caplog.clear()
    load_backbone("Tiny-Two-8-quickgelu", str(weights), "cpu")
    assert caplog.text == ""


def test_a_folder_with_the_older_file(tiny_clip_dir: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_clip_dir, tmp_path / "model")
    torch.save(load_file(folder / "open_clip_model.safetensors"), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_model.safetensors").unlink()
    assert load(folder).fingerprint == load(tiny_clip_dir).fingerprint


def test_a_model_of_the_hub_comes_from_its_cache(tiny_clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'hf-hub:us/tiny': not on this machine.*local-dir:PATH.*named hf:NAME"):
        load_backbone("hf-hub:us/tiny", "", "cpu")
    place = tmp_path / "models--us--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_clip_dir, place / "snapshots" / ("0" * 40))
    assert load_backbone("hf-hub:us/tiny", "", "cpu").fingerprint == load(tiny_clip_dir).fingerprint


def test_a_plain_path_is_told_its_spelling(tiny_clip_dir: Path, hf_clip_dir: Path):
    with pytest.raises(ConfigError, match=f"{tiny_clip_dir}' is a folder: write local-dir:{tiny_clip_dir}"):
        load_backbone(str(tiny_clip_dir), "", "cpu")
    with pytest.raises(ConfigError, match=f"{hf_clip_dir}' is a folder: write hf:{hf_clip_dir}"):
        load_backbone(str(hf_clip_dir), "", "cpu")
    with pytest.raises(ConfigError, match=r"hf:NAME \(transformers\) or one of open_clip's"):
        load_backbone("google/siglip-base-patch16-224", "", "cpu")
