import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.context import PromptedText
from fl_dualpriv.models.open_clip import OpenClipBackbone, load_backbone, open_clip
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.models.text.open_clip_text import OpenClipText

TEXTS = ["a photo of a cat", "a very small red sketch of an old house", ""]
ROUNDING = 1e-6  # float32 sums in another order, relative to the largest value (at least 1)

TEXT_TOWERS = {
    "CLIP": {},
    "CustomTextCLIP": {"custom_text": True},
    "linear projection": {"text_cfg": {"proj_bias": True}},
    "no projection": {"text_cfg": {"proj_type": "none"}},
    "custom block": {"text_cfg": {"qk_norm": True}},
    "eos pooling": {"text_cfg": {"pool_type": "eos", "eos_id": 49407}},
    "quick gelu, layer scale": {"quick_gelu": True, "text_cfg": {"ls_init_value": 0.3}},
    "read at the last token": {"text_cfg": {"pool_type": "last"}},
    "not causal": {"text_cfg": {"no_causal_mask": True}},
    "SigLIP style": {"custom_text": True, "text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
    "not causal, read at the first token": {"text_cfg": {"no_causal_mask": True, "pool_type": "first"}},
}


def load(folder: Path, keep_ratio: float = 1.0, layer: int = 1) -> OpenClipBackbone:
    pruner = None if keep_ratio == 1 else VisualTokenPruner(keep_ratio=keep_ratio, layer=layer)
    return load_backbone(f"local-dir:{folder}", "", "cpu", pruner)


def plain(folder: Path):
    """The same model, straight from open_clip."""
    return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()


def assert_equal_up_to_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    atol = ROUNDING * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=TEXT_TOWERS.values(), ids=TEXT_TOWERS.keys())
def any_clip_dir(request: pytest.FixtureRequest, make_clip_dir) -> Path:
    return make_clip_dir(request.param)


def test_frozen_and_described(tiny_clip_dir):
    backbone = load(tiny_clip_dir)
    parameters = list(backbone._model.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not any(module.training for module in backbone._model.modules())
    assert (backbone.ctx_dim, backbone.embed_dim, backbone.context_length) == (32, 32, 32)
    assert backbone.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)  # open_clip's initial value
    assert isinstance(backbone.logit_scale, float)
    assert backbone.device == torch.device("cpu")
    assert backbone.text_stack is not None
    assert (backbone.plain_reason, backbone.fills_rows, backbone.visual_prompts) == ("", False, False)
    rows = backbone.rows
    assert (rows.start, rows.end, rows.pad) == ((49406,), 49407, 0)
    # Every weight once: the stack's are the model's own.
    weights = sum(p.numel() for p in parameters)
    assert 4 * weights <= backbone.weight_bytes <= 4 * weights + 4 * 32 * 32 * 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_cfg": {"qk_norm": True}}, "custom blocks"),
        ({"text_cfg": {"no_causal_mask": True}}, "not causal"),
        ({"text_cfg": {"pool_type": "last"}}, "read at the last token"),
    ],
)
def test_why_a_prefix_cannot_be_shared(make_clip_dir, changes: dict, reason: str):
    backbone = load(make_clip_dir(changes))
    assert backbone.text_stack is None
    assert reason in backbone.plain_reason
    assert backbone.fills_rows == (reason != "custom blocks")


def test_an_activation_that_the_stack_does_not_know(make_clip_dir):
    model = plain(make_clip_dir())
    for block in model.transformer.resblocks:
        block.mlp.gelu = torch.nn.ReLU()
    text = OpenClipText(model)
    assert text.stack is None
    assert "another activation, ReLU" in text.plain_reason


@torch.no_grad()
def test_encode_embeddings_is_encode_text(any_clip_dir):
    backbone, model = load(any_clip_dir), plain(any_clip_dir)
    tokens = backbone.tokenize(TEXTS)
    assert torch.equal(tokens, open_clip.get_tokenizer(f"local-dir:{any_clip_dir}")(TEXTS))
    eot, expected = tokens.argmax(dim=-1), model.encode_text(tokens)
    embeddings = backbone.embed_tokens(tokens)
    assert embeddings.shape == (3, 32, backbone.ctx_dim)
    whole = backbone.encode_embeddings(embeddings, eot)
    assert whole.shape == (3, backbone.embed_dim)
    assert_equal_up_to_rounding(whole, expected)
    if not backbone.fills_rows:
        assert_equal_up_to_rounding(backbone.encode_embeddings(embeddings[:, : int(eot.max()) + 1], eot), expected)


def test_gradient_of_the_embeddings_is_the_models_own(any_clip_dir):
    backbone, model = load(any_clip_dir), plain(any_clip_dir)
    tokens = backbone.tokenize(TEXTS)
    eot = tokens.argmax(dim=-1)
    weights = torch.randn(3, backbone.embed_dim, generator=torch.Generator().manual_seed(2))

    table = getattr(model, "text", model).token_embedding.weight
    (model.encode_text(tokens) * weights).sum().backward()

    length = backbone.context_length if backbone.fills_rows else int(eot.max()) + 1
    embeddings = backbone.embed_tokens(tokens)[:, :length].clone().requires_grad_()
    (backbone.encode_embeddings(embeddings, eot) * weights).sum().backward()
    assert embeddings.grad is not None
    # A row of the table enters at every place of its token, so its gradient is the sum over these places.
    summed = torch.zeros_like(table).index_add_(
        0, tokens[:, : embeddings.shape[1]].flatten(), embeddings.grad.flatten(end_dim=1)
    )
    assert_equal_up_to_rounding(summed, table.grad)


def test_rows_of_a_length_that_cannot_be_read(tiny_clip_dir, make_clip_dir):
    with pytest.raises(ValueError, match=r"33 tokens: the text tower of .* reads at most 32"):
        load(tiny_clip_dir).encode_embeddings(torch.zeros(1, 33, 32), torch.zeros(1, dtype=torch.long))
    full = load(make_clip_dir({"text_cfg": {"pool_type": "last"}}))
    with pytest.raises(ValueError, match=r"31 tokens: the text tower of .* reads rows of 32"):
        full.encode_embeddings(torch.zeros(1, 31, 32), torch.zeros(1, dtype=torch.long))


def test_words_are_those_of_the_rows(tiny_clip_dir):
    backbone = load(tiny_clip_dir)
    for text, row in zip(TEXTS, backbone.tokenize(TEXTS).tolist(), strict=True):
        assert row[: row.index(49407) + 1] == [49406, *backbone.words(text), 49407]
    with pytest.raises(ConfigError, match="'a <end_of_text>' holds a token that ends a text"):
        backbone.words("a <end_of_text>")


@torch.no_grad()
def test_a_model_with_a_tokenizer_of_transformers(make_clip_dir, hf_siglip_dir):
    text = {"hf_tokenizer_name": str(hf_siglip_dir), "tokenizer_kwargs": {"clean": "canonicalize"}, "vocab_size": 20}
    siglip = {"context_length": 16, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    folder = make_clip_dir({"custom_text": True, "init_logit_bias": -10, "text_cfg": text | siglip})
    for name in ("tokenizer.json", "tokenizer_config.json"):  # open_clip looks beside the weights
        shutil.copy(hf_siglip_dir / name, folder)
    backbone = load(folder)
    assert (backbone.rows.start, backbone.rows.end, backbone.rows.pad) == ((), 1, 1)
    prompted = PromptedText(backbone, ("cat", "dog", "Fire truck"), "a photo of a {}.")
    assert not prompted.shares_prefix
    expected = plain(folder).encode_text(backbone.tokenize(prompted._texts), normalize=True)
    assert_equal_up_to_rounding(prompted.zero_shot_features(), expected)
    assert_equal_up_to_rounding(prompted.class_features(prompted.template_context(4)), expected)


def test_bf16(tiny_clip_dir):
    exact, rough = load(tiny_clip_dir), load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", None, "bf16")
    pruned = load_backbone(f"local-dir:{tiny_clip_dir}", "", "cpu", VisualTokenPruner(keep_ratio=0.5, layer=1), "bf16")
    assert rough._model is exact._model
    for one, other in ((rough, exact), (pruned, load(tiny_clip_dir, 0.5, 1))):
        features = one.image_features(images())
        assert features.dtype == torch.float32
        assert 1e-6 < (features - other.image_features(images())).abs().max() < 0.05
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
        assert one.feature_key != other.feature_key
        assert one.logit_scale == other.logit_scale
    assert rough.text_stack.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert rough.weight_bytes > exact.weight_bytes
    # The plain tower keeps float32: it is what the rough one is measured against.
    tokens = exact.embed_tokens(exact.tokenize(TEXTS))
    end = torch.tensor([6, 8, 1])
    assert torch.equal(rough.encode_embeddings(tokens, end), exact.encode_embeddings(tokens, end))


def test_image_features(tiny_clip_dir):
    features = load(tiny_clip_dir).image_features(images())
    with torch.no_grad():
        expected = plain(tiny_clip_dir).encode_image(images(), normalize=True)
    assert torch.equal(features, expected)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    # Cached features meet a trainable prompt later on, which an inference tensor may not.
    prompt = torch.ones(32, requires_grad=True)
    (features * prompt).sum().backward()
    assert not features.is_inference()
    assert load(tiny_clip_dir).image_features(images(0)).shape == (0, 32)


def test_pruner_is_applied(tiny_clip_dir):
    pruned, full = load(tiny_clip_dir, 0.25, 2), load(tiny_clip_dir)
    assert (pruned.image_features(images()) - full.image_features(images())).abs().max() > 1e-3
    assert pruned._model is full._model  # one copy of the weights per process
    assert load(tiny_clip_dir, 0.25, 2) is pruned


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_preprocess_is_open_clips(tiny_clip_dir, mode: str):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)).convert(mode)
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip_dir}")
    actual = load(tiny_clip_dir).preprocess(image)
    assert (actual.shape, actual.dtype) == ((3, 32, 32), torch.float32)
    assert torch.equal(actual, transform(image))  # type: ignore[operator]


def test_fingerprints(tiny_clip_dir, tmp_path):
    backbone, same, other = load(tiny_clip_dir), tmp_path / "same", tmp_path / "other"
    shutil.copytree(tiny_clip_dir, same)
    shutil.copytree(tiny_clip_dir, other)
    weights = load_file(other / "open_clip_model.safetensors")
    weights["visual.proj"][3, 4] += 1e-3
    save_file(weights, other / "open_clip_model.safetensors")
    assert len(backbone.fingerprint) == 16
    assert load(same).fingerprint == backbone.fingerprint
    assert load(other).fingerprint != backbone.fingerprint
    assert load(same).feature_key == backbone.feature_key
    # Pruning, head count, activation, pooling and transform change features but no weight.
    keys = {backbone.feature_key, load(tiny_clip_dir, 0.5, 1).feature_key, load(tiny_clip_dir, 0.5, 2).feature_key}
    for number, (section, key, value) in enumerate(
        [
            ("model_cfg", "vision_cfg", {"head_width": 8}),
            ("model_cfg", "quick_gelu", True),
            ("model_cfg", "vision_cfg", {"pool_type": "avg"}),
            ("model_cfg", "vision_cfg", {"pool_type": "avg", "final_ln_after_pool": True}),
            ("preprocess_cfg", "mean", 3 * [0.5]),
        ]
    ):
        folder = shutil.copytree(same, tmp_path / str(number))
        config = json.loads((folder / "open_clip_config.json").read_text())
        config[section][key] = {**config[section][key], **value} if isinstance(value, dict) else value
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        assert load(folder).fingerprint == backbone.fingerprint
        keys.add(load(folder).feature_key)
    assert len(keys) == 8


# Named models with a checkpoint file


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pt", "weights.pth", "training.pt"])
def test_named_model_with_a_local_checkpoint(tiny_clip_dir, tiny_clip_name, tmp_path, form: str):
    weights, path = load_file(tiny_clip_dir / "open_clip_model.safetensors"), tmp_path / form
    if form == "training.pt":  # as open_clip's own training loop writes it, under DistributedDataParallel
        torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    elif path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    backbone = load_backbone(tiny_clip_name, str(path), "cpu")
    assert backbone.fingerprint == load(tiny_clip_dir).fingerprint
    assert torch.equal(backbone.image_features(images()), load(tiny_clip_dir).image_features(images()))


def test_a_tag_brings_its_own_activation_and_transform(tiny_clip_dir, tiny_clip_name, monkeypatch):
    tag = {"hf_hub": "nobody/nothing/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    known = open_clip.get_pretrained_cfg
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda m, t: tag if t == "mytag" else known(m, t))
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: str(tiny_clip_dir / "open_clip_model.safetensors")
    )
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    backbone = load_backbone(tiny_clip_name, "mytag", "cpu")
    assert "QuickGELU" in str(backbone._model.visual)
    black = backbone.preprocess(PIL.Image.new("RGB", (32, 32)))[:, 0, 0]
    # open_clip's default standard deviation; (0 - mean) / std.
    expected = -torch.tensor([0.1, 0.2, 0.3]) / torch.tensor(open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(black, expected)


# The trimmed vocabulary, and the embedded demo


@pytest.fixture(scope="module")
def trimmed_dir(make_clip_dir) -> Path:
    words = open_clip.SimpleTokenizer()
    ids = [0, *words.encode("a photo of cat dog"), words.sot_token_id, words.eot_token_id]  # 0 is padding
    folder = make_clip_dir({"text_cfg": {"vocab_size": len(ids)}})
    (folder / "vocabulary.json").write_text(json.dumps({"bpe_ids": ids, "context_length": 32}))
    return folder


def test_trimmed_vocabulary(trimmed_dir):
    backbone = load(trimmed_dir)
    tokens = backbone.tokenize(["a photo of a dog", "cat"])
    # 0 padding, 1-5 the words in their order above, 6 start, 7 end.
    assert tokens[0, :8].tolist() == [6, 1, 2, 3, 1, 5, 7, 0]
    assert tokens[1, :4].tolist() == [6, 4, 7, 0]
    with torch.no_grad():
        assert (backbone.rows.start, backbone.rows.end, backbone.rows.pad) == ((6,), 7, 0)
        actual = backbone.encode_embeddings(backbone.embed_tokens(tokens), tokens.argmax(dim=-1))
        assert_equal_up_to_rounding(actual, plain(trimmed_dir).encode_text(tokens))
    for write in (backbone.words, lambda text: backbone.tokenize([text])):
        with pytest.raises(ConfigError, match="elephant"):
            write("a photo of an elephant")


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [(None, "ids up to 49407, the model embeds 8; .*vocabulary.json"), ("{}", "tokenizer cannot be loaded: KeyError"),
     ("context_length", "makes rows of 31, the text tower reads 32")],
    ids=["absent", "broken", "other length"],
)  # fmt: skip
def test_bad_vocabulary(trimmed_dir, tmp_path, vocabulary: str | None, message: str):
    folder = shutil.copytree(trimmed_dir, tmp_path / "model")
    path = folder / "vocabulary.json"
    content = json.loads(path.read_text())
    path.unlink()
    if vocabulary:
        path.write_text(vocabulary if vocabulary == "{}" else json.dumps({**content, "context_length": 31}))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_demo():
    backbone = load_backbone("demo", "", "cpu")
    assert backbone.text_stack is not None
    pruned = load_backbone("demo", "", "cpu", VisualTokenPruner(keep_ratio=0.5, layer=1))
    assert pruned.feature_key != backbone.feature_key
