"""LLaVA models: run in two parts equal to the model's own forward pass and decoding, and refused if they do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.pruning.published import pruned_hidden
from fl_dualpriv.models.pruning.tokens import TokenPruner, VisualTokenPruner
from fl_dualpriv.models.transformers import transformers
from tests.tiny_llava import IMAGE_ID, QUESTIONS

KINDS: dict[str, dict[str, Any]] = {
    "clip and llama": {},
    "siglip and mistral": {"vision": "siglip", "language": "mistral", "text": {"sliding_window": 7}},
    "clip and qwen2": {"language": "qwen2", "text": {"tie_word_embeddings": True}, "layers": [-2, -1]},
    "no template": {"template": None},
}
PRUNER = VisualTokenPruner(layer=-2, keep_ratio=0.5)  # 8 of 16 patches, and a fused one


def load(folder: Path, pruner: TokenPruner | None = None, precision: Any = "fp32") -> LlavaBackbone:
    backbone = load_answering_model(f"hf:{folder}", "cpu", pruner, precision)
    assert isinstance(backbone, LlavaBackbone)
    return backbone


def picture(seed: int = 0, size: tuple[int, int] = (40, 56)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, make_llava_dir) -> Path:
    return make_llava_dir(**KINDS[request.param])


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Any:
    """What the model's own processor makes of two pictures with a question each."""
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    texts = []
    for question in QUESTIONS[:2]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        rendered = f"<image>\n{question}\n"
        if processor.chat_template:
            rendered = processor.apply_chat_template(message, add_generation_prompt=True)
        texts.append(rendered)
    rows = [processor(images=picture(seed), text=text, return_tensors="pt") for seed, text in enumerate(texts, start=1)]
    return rows


def ours(backbone: LlavaBackbone, seed: int, question: str) -> torch.Tensor:
    """Scores behind each token that stands behind the image, from the two parts."""
    visual = backbone.image_features(backbone.preprocess(picture(seed))[None])
    tokens = torch.tensor([backbone.question_tokens(question)])
    return backbone.logits(backbone.prefix(visual), backbone.embed_tokens(tokens), 0)


@torch.no_grad()
def test_the_two_parts_equal_the_models_own_forward(folder: Path, inputs: Any):
    backbone = load(folder)
    assert backbone.n_visual == 16
    for seed, (row, question) in enumerate(zip(inputs, QUESTIONS, strict=False), start=1):
        expected = backbone._model(**row).logits
        behind = int((row["input_ids"][0] == IMAGE_ID).nonzero().max()) + 1
        assert row["input_ids"][0, behind:].tolist() == backbone.question_tokens(question)
        actual = ours(backbone, seed, question)
        # float32 through two blocks; the scores themselves are of order 1.
        torch.testing.assert_close(actual, expected[:, behind:], rtol=0, atol=2e-5)
        assert actual.std() > 0.1


@torch.no_grad()
def test_greedy_decoding_equals_teacher_forcing(folder: Path, inputs: Any):
    backbone = load(folder)
    for seed, (row, question) in enumerate(zip(inputs, QUESTIONS, strict=False), start=1):
        generated = backbone._model.generate(**row, max_new_tokens=6, do_sample=False)
        answer = generated[0, row["input_ids"].shape[1] :].tolist()
        tokens = torch.tensor([backbone.question_tokens(question) + answer])
        visual = backbone.image_features(backbone.preprocess(picture(seed))[None])
        first = tokens.shape[1] - len(answer) - 1
        scores = backbone.logits(backbone.prefix(visual), backbone.embed_tokens(tokens), first)
        assert scores.argmax(dim=-1)[0, :-1].tolist() == answer


def test_checkpointing_gives_equal_gradients(folder: Path):
    backbone = load(folder)
    visual = backbone.image_features(torch.stack([backbone.preprocess(picture(seed)) for seed in range(3)]))
    prefix = backbone.prefix(visual)
    start = 0.3 * torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        leaf = start.clone().requires_grad_(True)
        scores = backbone.logits(prefix, leaf, 2, checkpointing=checkpointing)
        assert scores.shape == (3, 5, 26)
        found += torch.autograd.grad(scores.logsumexp(dim=-1).sum(), leaf)
    assert found[0].abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert not any("forward" in vars(layer) for layer in backbone._language.layers)


def test_frozen_and_described(folder: Path):
    backbone = load(folder)
    assert not any(parameter.requires_grad for parameter in backbone._model.parameters())
    assert not any(module.training for module in backbone._model.modules())
    assert (backbone.ctx_dim, backbone.embed_dim, backbone.context_length) == (32, 16 * 32, 64)
    weights = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert backbone.weight_bytes >= weights
    assert backbone.embed_tokens(torch.tensor([[4, 5]])).shape == (1, 2, 32)
    assert backbone.image_features(torch.zeros(0, 3, 32, 32)).shape == (0, 16 * 32)
    # <s> USER : <image> what ... ASSISTANT :, or without a template <s> <image> what ...
    template = (folder / "chat_template.jinja").exists()
    before, words = (3 if template else 1), len(["what", "color", "is", "the", "circle", "?"])
    assert len(backbone._layout.before) == before
    assert len(backbone.question_tokens(QUESTIONS[0])) == words + (2 if template else 0)
    assert backbone.answer_tokens(" red circle ") == [*backbone.words("red circle"), backbone.end]
    # before, 16 visual tokens, 4 of a prompt: the rest of 64
    backbone.check_length(4, 64 - 20 - before)
    with pytest.raises(ConfigError, match=rf"sequences of 65 tokens .*data.max-tokens <= {44 - before}, or"):
        backbone.check_length(4, 64 - 19 - before)


@pytest.mark.parametrize("pruner", [None, PRUNER], ids=["whole", "pruned"])
def test_visual_tokens_of_an_image_are_its_own(llava_dir: Path, pruner: TokenPruner | None):
    backbone = load(llava_dir, pruner)
    pixels = torch.stack([backbone.preprocess(picture(seed)) for seed in range(4)])
    before = backbone.image_features(pixels)
    assert before.shape == (4, backbone.embed_dim)
    changed = pixels.clone()
    changed[1] = -changed[1]
    changed[2, 0, 3, 3] = float("nan")
    after = backbone.image_features(changed)
    assert torch.equal(after[[0, 3]], before[[0, 3]])
    assert not torch.allclose(after[1], before[1])
    assert torch.isnan(after[2]).all()
    alone = torch.cat([backbone.image_features(row[None]) for row in pixels])
    torch.testing.assert_close(alone, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_pruned_tokens_are_projected(make_llava_dir, vision: str):
    folder = make_llava_dir(vision=vision)
    backbone, whole = load(folder, PRUNER), load(folder)
    assert backbone._model is whole._model
    assert (backbone.n_visual, backbone.embed_dim) == (9, 9 * 32)
    pixels = torch.stack([backbone.preprocess(picture(seed)) for seed in range(2)])
    hidden = pruned_hidden(backbone._model.model.vision_tower, pixels, PRUNER)
    expected = backbone._model.model.multi_modal_projector(hidden).flatten(1)
    torch.testing.assert_close(backbone.image_features(pixels), expected)
    assert backbone.feature_key != whole.feature_key
    assert backbone.fingerprint == whole.fingerprint
    all_kept = load(folder, VisualTokenPruner(layer=-2, keep_ratio=1.0))
    torch.testing.assert_close(all_kept.image_features(pixels), whole.image_features(pixels), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "pruner", "message"),
    [
        ({"layers": [-2, -1]}, PRUNER, r"hidden state \[-2, -1\].*only a single hidden state"),
        ({}, VisualTokenPruner(layer=-1, keep_ratio=0.5), "visual-layer = -1: .* reads hidden state -2"),
        ({}, VisualTokenPruner(layer=7, keep_ratio=0.5), "visual-layer = 7"),
        ({}, VisualTokenPruner(layer=-2, dominant=16, contextual=0), ""),
        ({"vision_changes": {"image_size": 16}}, PRUNER, "cannot read the output of its image processor: .*32"),
    ],
)
def test_pruners_that_do_not_fit(make_llava_dir, changes: dict, pruner: TokenPruner, message: str):
    folder = make_llava_dir(**changes)
    if not message:  # all are kept
        assert load(folder, pruner).n_visual == 16
        return
    with pytest.raises(ConfigError, match=message):
        load(folder, pruner)


def test_a_layer_counted_from_the_front_is_the_same(llava_dir: Path):
    # 2 blocks make hidden states 0, 1, 2: -2 is 1.
    pruner = VisualTokenPruner(layer=1, keep_ratio=0.5)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(llava_dir, pruner).image_features(pixels), load(llava_dir, PRUNER).image_features(pixels))


def test_patches_alone_are_pruned(llava_dir: Path, tmp_path: Path):
    folder = shutil.copytree(llava_dir, tmp_path / "full")
    change(folder / "config.json", vision_feature_select_strategy="full")
    assert load(folder).n_visual == 17
    with pytest.raises(ConfigError, match=r"reads only patches .*default.*it is 'full'"):
        load(folder, PRUNER)


@torch.no_grad()
def test_bf16(llava_dir: Path):
    exact, rough = load(llava_dir), load(llava_dir, precision="bf16")
    assert rough._model.lm_head.weight.dtype == torch.bfloat16
    assert rough.feature_key != exact.feature_key
    pixels = exact.preprocess(picture())[None]
    features = rough.image_features(pixels)
    assert features.dtype == rough.embed_tokens(torch.tensor([4])).dtype == torch.float32
    tokens = exact.embed_tokens(torch.tensor([exact.question_tokens(QUESTIONS[0])]))
    scores = [model.logits(model.prefix(model.image_features(pixels)), tokens, 0) for model in (exact, rough)]
    assert scores[1].dtype == torch.float32
    # bfloat16 keeps 8 bits: 2 + 2 blocks leave a few percent of the spread of the scores.
    assert 0 < (scores[0] - scores[1]).std() < 0.1 * scores[0].std()


def test_keys_follow_weights_and_processor(llava_dir: Path, tmp_path: Path):
    backbone = load(llava_dir)
    same = load(shutil.copytree(llava_dir, tmp_path / "same"))
    assert (same.fingerprint, same.feature_key) == (backbone.fingerprint, backbone.feature_key)
    other = shutil.copytree(llava_dir, tmp_path / "other")
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (other / "processor_config.json").write_text(json.dumps(settings))
    assert load(other).feature_key != backbone.feature_key
    assert load(other).fingerprint == backbone.fingerprint


# What is refused


@pytest.mark.parametrize("text", ["what purple ?", "is <image> red ?", "is it </s> red ?"])
def test_words_that_are_none(llava_dir: Path, text: str):
    backbone = load(llava_dir)
    for write in (backbone.words, backbone.question_tokens, backbone.answer_tokens):
        with pytest.raises(ConfigError, match="words that are not in its vocabulary, or its special tokens"):
            write(text)
    with pytest.raises(ConfigError, match="an answer must have words"):
        backbone.answer_tokens("  ")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", "its model cannot be loaded"),
        ("missing", r"weights are never random: .*layers.1.mlp.up_proj.weight is missing"),
        ("nan", "not finite numbers"),
        ("type", "is a model of type 'clip'; supported for questions is llava"),
        ("language", "part of type 'gpt2'; supported are llama, mistral, qwen2"),
        ("no processor", "its processor has no image_processor|its processor cannot be loaded"),
        ("image size", "cannot read the output of its image processor: ValueError.*64"),
        ("image token", "its tokenizer has no image token, which is id 29"),
        ("template without image", r"must put one image token '<image>' and then the question"),
        ("template that raises", "its chat template cannot be rendered"),
        ("no end", "its tokenizer has no end token"),
    ],
)
def test_damaged_folders(make_llava_dir, llava_dir: Path, tmp_path: Path, damage: str, message: str):
    folder = shutil.copytree(llava_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    if damage == "missing":
        del weights[key]
    if damage == "nan":
        weights[key][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "type":
        (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    if damage == "language":
        change(folder / "config.json", text_config={"model_type": "gpt2"})
    if damage == "no processor":
        (folder / "processor_config.json").unlink()
    if damage == "image size":
        settings = json.loads((folder / "processor_config.json").read_text())
        settings["image_processor"]["crop_size"] = {"height": 64, "width": 64}
        (folder / "processor_config.json").write_text(json.dumps(settings))
    if damage == "image token":
        change(folder / "config.json", image_token_index=29)
    if damage == "template without image":
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    if damage == "template that raises":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    if damage == "no end":
        change(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:/no/such/folder", "its configuration cannot be loaded; name a folder"),
        ("hf: ", "name a folder or a model on the hub after"),
        ("demo", "'demo' cannot answer questions; name demo-vqa or hf:NAME"),
    ],
)
def test_names_of_nothing(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_answering_model(name, "cpu", None)
