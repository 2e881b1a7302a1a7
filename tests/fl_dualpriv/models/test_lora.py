"""LoRA on a LLaVA: rows and answers are those of peft's own model, the un-tuned model is the base model, untouched."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.answers import AnswerRecords, answer_records
from fl_dualpriv.learners.lora import LoraObjective
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models import torchvision_shim
from fl_dualpriv.models.frozen import fingerprint
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.lora import LoraModel
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.privacy.step import client_rows, clipped_sums
from tests.tiny_llava import ANSWERS, END_ID, QUESTIONS

torchvision_shim.install()
import peft  # noqa: E402  (needs the shim)

RANK, MAX_TOKENS, WORDS = 3, 14, "look at this"
PREFIX = "base_model.model."
"""What peft puts before the names of the model that it wraps."""


def load(folder: Path, **options: Any) -> LlavaBackbone:
    backbone = load_answering_model(f"hf:{folder}", "cpu", options.get("pruner"), options.get("precision", "fp32"))
    assert isinstance(backbone, LlavaBackbone)
    return backbone


def make_records(model: LlavaBackbone, count: int = 11) -> AnswerRecords:
    """Records of all lengths about five images."""
    return answer_records(
        model,
        [QUESTIONS[i % 5] for i in range(count)],
        [ANSWERS[i * 3 % 5] for i in range(count)],
        np.arange(count) * 2 % 5,
        np.zeros(count),
        torch.randn(5, model.embed_dim, generator=torch.Generator().manual_seed(0)),
        MAX_TOKENS,
        "raise",
    )


def words(model: LlavaBackbone) -> Tensor:
    return model.embed_tokens(torch.tensor(model.words(WORDS)))


def factors(lora: LoraModel, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(lora.shape, generator=torch.Generator().manual_seed(seed))


def peft_model(model: LlavaBackbone, lora: LoraModel, matrix: Tensor) -> Any:
    """A LLaVA of its own, no tensor shared, whose language model peft wraps in its own way, with these factors."""
    llava = copy.deepcopy(model._model)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(llava.model.language_model, config)
    loaded = wrapped.load_state_dict({PREFIX + n: w for n, w in lora.weights(matrix).items()}, strict=False)
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "lora" in name]
    llava.model.language_model = wrapped
    return llava


def sequence(model: LlavaBackbone, records: AnswerRecords, row: int, tokens: Tensor) -> Tensor:
    """Before, image, words and these tokens, (1, token, ctx_dim)."""
    before = model.embed_tokens(torch.tensor(model._layout.before))
    visual = records.visual[int(records.image_of[row])].unflatten(0, (-1, 32))
    return torch.cat([before, visual, words(model), model.embed_tokens(tokens)])[None]


def rows_of(objective: LoraObjective, records: AnswerRecords, matrix: Tensor) -> Tensor:
    step = objective.bind([records]).gradients(matrix[None], [np.arange(records.num_examples)])
    return torch.cat(list(client_rows(step, 0)))[: records.num_examples]


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "siglip, mistral": {"vision": "siglip", "language": "mistral", "text": {"sliding_window": 9}},
    "qwen2": {"language": "qwen2"},
}


@pytest.mark.parametrize(("kind", "keep_ratio"), [*((kind, 1.0) for kind in KINDS), ("llama", 0.25)])
def test_rows_equal_a_loop_through_pefts_own_model(make_llava_dir, kind: str, keep_ratio: float):
    pruner = VisualTokenPruner(layer=-2, keep_ratio=keep_ratio) if keep_ratio < 1 else None
    model = load(make_llava_dir(**KINDS[kind]), pruner=pruner)
    lora, records = LoraModel(model, RANK), make_records(model)
    matrix = factors(lora)
    theirs = peft_model(model, lora, matrix)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in parameters] == [tuple(w.shape) for w in lora.weights(matrix).values()]
    expected = []
    for row in range(records.num_examples):
        tokens, start = records.tokens[row, : int(records.length[row])], int(records.answer_start[row])
        logits = theirs(inputs_embeds=sequence(model, records, row, tokens)).logits[0]
        answer = tokens[start:]
        loss = torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1], answer)
        grads = torch.autograd.grad(loss, parameters)
        # A is (rank, in) and B (out, rank), in turn.
        expected.append(torch.cat([g if i % 2 == 0 else g.T for i, g in enumerate(grads)], dim=1))
    rows = rows_of(LoraObjective(lora, words(model)), records, matrix)
    # float32 through two blocks, relative to the largest entry.
    assert (rows - torch.stack(expected)).abs().max() <= 2e-5 * torch.stack(expected).abs().max()


def test_the_start_is_the_untuned_model_bit_by_bit(llava_dir: Path):
    model = load(llava_dir)
    lora, records = LoraModel(model, RANK), make_records(model, 8)
    objective = LoraObjective(lora, words(model))
    ((block, _),) = objective.blocks(records, np.arange(8))
    for seed in (0, 1):
        found = objective.logits(lora.initial(seed), block)
        text = torch.cat([words(model).expand(8, -1, -1), model.embed_tokens(block.tokens[:, :-1])], dim=1)
        visual = records.visual[records.image_of]
        assert torch.equal(found, model.whole_logits(model.language_model, visual, text, 2))
    # The same as with the words as a soft prompt, behind a prefix that is computed first.
    soft = SoftPromptObjective(model).logits(words(model), block)
    torch.testing.assert_close(found, soft, rtol=1e-4, atol=1e-5)


def test_the_start_is_drawn_as_peft_draws_it(llava_dir: Path):
    lora = LoraModel(load(llava_dir), 64)
    # q and v of two layers: A of 32 inputs, B of 32 and 16 outputs.
    assert lora.segments == (32, 32, 32, 16) * 2
    start = lora.initial(0)
    assert start.shape == lora.shape == (64, 224)
    a, b = (torch.cat(start.split(lora.segments, dim=1)[i::2], dim=1) for i in (0, 1))
    assert not b.any()
    # Kaiming with a = √5: uniform within 1/√in, of std 1/√(3·in). 8192 draws: 1 % is more than two of their std.
    assert 0.99 * 32**-0.5 < a.abs().max() <= 32**-0.5
    assert a.std() == pytest.approx((3 * 32) ** -0.5, rel=0.02)
    layer = LoraModel(load(llava_dir), 64)._linears["layers.0.self_attn.q_proj.lora_A.default"].weight.detach()
    assert layer.abs().max() <= 32**-0.5
    assert layer.std() == pytest.approx(float(a.std()), rel=0.05)
    assert torch.equal(lora.initial(0), start)
    assert not torch.equal(lora.initial(1), start)


def test_the_base_model_stays_as_it_is(llava_dir: Path):
    model = load(llava_dir)
    records = make_records(model)
    soft, prompt = SoftPromptObjective(model), words(model)
    ((block, _), *_) = soft.blocks(records, np.arange(11))
    before, modules = soft.logits(prompt, block), [type(m) for m in model._model.modules()]
    keys, random = fingerprint(model._model), torch.get_rng_state()
    lora = LoraModel(model, RANK)
    objective, matrix = LoraObjective(lora, prompt), factors(lora)
    step = objective.bind([records]).gradients(matrix[None], [np.arange(11)])
    assert step.sums().any()
    assert clipped_sums(step, 0.1, "float")[0].value.any()
    objective.correct(matrix, records)
    assert torch.equal(soft.logits(prompt, block), before)
    assert [type(m) for m in model._model.modules()] == modules
    assert fingerprint(model._model) == keys
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(p.requires_grad for p in model._model.parameters())
    # The copy holds no weights of its own but the factors.
    ours = {p.data_ptr() for p in model._model.parameters()}
    assert all("lora" in n for n, p in lora._language.named_parameters() if p.data_ptr() not in ours)
    # Nothing is kept from one matrix to the next.
    assert not torch.allclose(objective.logits(matrix, block), before)
    assert torch.equal(objective.logits(lora.initial(0), block), objective.logits(torch.zeros(lora.shape), block))


@torch.no_grad()
def test_merged_weights_answer_as_the_matrix_does(llava_dir: Path):
    """Factors that peft adds to the weights: greedy decoding gives the answers that we call right."""
    model = load(llava_dir)
    lora, records = LoraModel(model, RANK), make_records(model)
    objective, matrix = LoraObjective(lora, words(model)), factors(lora, 3)
    merged = peft_model(model, lora, matrix)
    merged.model.language_model = merged.model.language_model.merge_and_unload()
    tokens, length = records.tokens.clone(), records.answer_start.clone()
    for row in range(11):
        start = int(records.answer_start[row])
        sequence_ = sequence(model, records, row, records.tokens[row, :start])
        (answer,) = merged.generate(inputs_embeds=sequence_, max_new_tokens=4, do_sample=False)
        ends = (answer == END_ID).nonzero()
        answer = answer[: int(ends[0]) + 1] if len(ends) else answer
        tokens[row, start : start + len(answer)] = answer
        length[row] += len(answer)

    def answered(tokens: Tensor) -> AnswerRecords:
        own = {"image_of": records.image_of, "answer_start": records.answer_start, "labels": records.labels}
        return AnswerRecords(visual=records.visual, tokens=tokens, length=length, **own)

    assert objective.correct(matrix, answered(tokens)).tolist() == [True] * 11
    assert not objective.correct(lora.initial(0), answered(tokens)).all()  # the base model says something else
    wrong = tokens.clone()
    for row in range(0, 11, 2):
        wrong[row, int(length[row]) - 1] = (wrong[row, int(length[row]) - 1] + 1) % 26
    assert objective.correct(matrix, answered(wrong)).tolist() == [row % 2 == 1 for row in range(11)]


def test_bf16(llava_dir: Path):
    found = []
    for precision in ("fp32", "bf16"):
        model = load(llava_dir, precision=precision)
        lora = LoraModel(model, RANK)
        found.append(rows_of(LoraObjective(lora, words(model)), make_records(model), factors(lora)))
    exact, rough = found
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.15  # 8 bits through two blocks and back


def test_clients_step_side_by_side(llava_dir: Path):
    """Each at its own factors and its own records, also when their blocks are asked for in turn."""
    model = load(llava_dir)
    lora = LoraModel(model, RANK)
    objective = LoraObjective(lora, words(model))
    data, both = [make_records(model), make_records(model, 4)], torch.stack([factors(lora), factors(lora, 1)])
    step = objective.bind(data).gradients(both, [np.arange(11), np.arange(4)])
    first, second = client_rows(step, 0), client_rows(step, 1)
    mixed = [next(first), next(second), next(first)]
    alone = rows_of(objective, data[0], both[0])
    assert torch.equal(torch.cat([mixed[0], mixed[2]])[:11], alone)
    assert torch.equal(mixed[1][:4], rows_of(objective, data[1], both[1]))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "fl_dualpriv.models.lora")
    with pytest.raises(ConfigError, match=r"needs the package peft; install fl-dualpriv\[lora\]"):
        __import__("fl_dualpriv.models.lora")
