"""Soft prompts of a LLaVA: losses and scores are those of the model's own forward pass, bad records are nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.answers import BLOCK, AnswerRecords, answer_records
from fl_dualpriv.learners.soft_prompt import SoftPromptObjective
from fl_dualpriv.models.llava import LlavaBackbone
from fl_dualpriv.models.load import load_answering_model
from fl_dualpriv.models.pruning.tokens import VisualTokenPruner
from fl_dualpriv.privacy.step import client_rows, clipped_sums
from tests.tiny_llava import ANSWERS, END_ID, QUESTIONS

N_CTX, MAX_TOKENS = 3, 14


def load(folder: Path, **options: Any) -> LlavaBackbone:
    backbone = load_answering_model(f"hf:{folder}", "cpu", options.get("pruner"), options.get("precision", "fp32"))
    assert isinstance(backbone, LlavaBackbone)
    return backbone


def visual_of(model: LlavaBackbone, images: int) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return model.image_features(torch.stack([model.preprocess(PIL.Image.fromarray(p)) for p in pixels]))


def make_records(model: LlavaBackbone, count: int = 11, images: int = 5) -> AnswerRecords:
    """Records of all lengths; several ask about one image."""
    return answer_records(
        model,
        [QUESTIONS[i % 5] for i in range(count)],
        [ANSWERS[i * 3 % 5] for i in range(count)],
        np.arange(count) * 2 % images,
        np.arange(count) % 5,
        visual_of(model, images),
        MAX_TOKENS,
        "raise",
    )


def prompt_of(seed: int) -> Tensor:
    return 0.5 * torch.randn(N_CTX, 32, generator=torch.Generator().manual_seed(seed))


def own_loss(model: LlavaBackbone, records: AnswerRecords, row: int, prompt: Tensor) -> Tensor:
    """The obvious form: one sequence, nothing kept, no padding, through the model's own forward pass."""
    image, start, length = int(records.image_of[row]), int(records.answer_start[row]), int(records.length[row])
    visual = records.visual[image].unflatten(0, (-1, 32))
    tokens = records.tokens[row, :length]
    before = model.embed_tokens(torch.tensor(model._layout.before))
    sequence = torch.cat([before, visual, prompt, model.embed_tokens(tokens)])
    logits = model._model(inputs_embeds=sequence[None]).logits[0]
    answer = tokens[start:]
    return torch.nn.functional.cross_entropy(logits[-len(answer) - 1 : -1], answer)


def rows_of(objective: SoftPromptObjective, records: AnswerRecords, prompt: Tensor, picked: Any = None) -> Tensor:
    picked = np.arange(records.num_examples) if picked is None else np.asarray(picked)
    step = objective.bind([records]).gradients(prompt[None], [picked])
    return torch.cat([torch.zeros(0, N_CTX, 32), *client_rows(step, 0)])[: len(picked)]


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "siglip, mistral": {"vision": "siglip", "language": "mistral", "text": {"sliding_window": 9}},
    "qwen2": {"language": "qwen2"},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("how", ["plain", "one block", "checkpointing", "kept", "pruned"])
def test_rows_equal_a_loop_through_the_models_own_forward(make_llava_dir, kind: str, how: str):
    pruner = VisualTokenPruner(layer=-2, keep_ratio=0.25) if how == "pruned" else None
    model = load(make_llava_dir(**KINDS[kind]), pruner=pruner)
    records, prompt = make_records(model), prompt_of(0)
    kept = 2**20 if how == "kept" else 0
    block = 16 if how == "one block" else BLOCK
    objective = SoftPromptObjective(model, block=block, checkpointing=how == "checkpointing", kept_bytes=kept)
    expected, losses = [], []
    for row in range(records.num_examples):
        leaf = prompt.clone().requires_grad_(True)
        losses.append(own_loss(model, records, row, leaf))
        expected += torch.autograd.grad(losses[-1], leaf)
    rows = rows_of(objective, records, prompt)
    # float32 through two blocks, relative to the largest entry.
    assert (rows - torch.stack(expected)).abs().max() <= 2e-5 * torch.stack(expected).abs().max()
    step = objective.bind([records]).gradients(prompt[None], [np.arange(11)])
    torch.testing.assert_close(step.sums()[0], torch.stack(expected).sum(0), rtol=1e-4, atol=1e-5)
    (some, count), *_ = objective.blocks(records, np.arange(11))
    with torch.no_grad():
        found = objective.losses(prompt.expand(objective.block, -1, -1), some)
    torch.testing.assert_close(found[:count], torch.stack(losses)[:count].detach(), rtol=1e-5, atol=1e-5)


def test_a_wrong_kept_prefix_would_show(llava_dir: Path):
    """Kept prefixes change nothing, bit by bit, over rounds that ask for other records; too many are not kept."""
    model = load(llava_dir)
    records, prompt = make_records(model), prompt_of(0)
    one = model.prefix(torch.zeros(1, model.embed_dim)).nbytes
    # 2 blocks, keys and values, 1 head of 16, 3 + 16 tokens, 4 bytes
    assert one == 2 * 2 * 16 * 19 * 4
    for budget, keeps in ((5 * one, True), (5 * one - 1, False)):
        plain, keeping = SoftPromptObjective(model), SoftPromptObjective(model, kept_bytes=budget)
        for picked in ([3, 0], [], [10, 9, 8, 7, 6, 5, 4, 3, 2], [0, 1]):
            expected = rows_of(plain, records, prompt, picked)
            assert torch.equal(rows_of(keeping, records, prompt, picked), expected)
        assert torch.equal(keeping.correct(prompt, records), plain.correct(prompt, records))
        (table,) = keeping._prefixes._kept.values()
        assert (table is not None) is keeps
    # They go with their records.
    del records
    assert len(keeping._prefixes._kept) == 0


@torch.no_grad()
def test_exact_match_is_greedy_decoding(llava_dir: Path):
    model = load(llava_dir)
    records, prompt = make_records(model), prompt_of(1)
    objective = SoftPromptObjective(model)
    before = model.embed_tokens(torch.tensor(model._layout.before))
    decoded = []
    for row in range(records.num_examples):
        question = records.tokens[row, : int(records.answer_start[row])]
        visual = records.visual[int(records.image_of[row])].unflatten(0, (-1, 32))
        sequence = torch.cat([before, visual, prompt, model.embed_tokens(question)])
        answer = model._model.generate(inputs_embeds=sequence[None], max_new_tokens=4, do_sample=False)[0]
        decoded.append(answer[: int((answer == END_ID).nonzero()[0]) + 1] if (answer == END_ID).any() else answer)
    right = with_answers(records, decoded)
    assert objective.correct(prompt, right).tolist() == [True] * 11
    for place in (0, -1):  # one wrong token is wrong, wherever it stands
        wrong = []
        for tokens in decoded:
            changed = tokens.clone()
            changed[place] = (changed[place] + 1) % 26
            wrong.append(changed)
        assert not objective.correct(prompt, with_answers(records, wrong)).any()
    # What other records are asked beside them says nothing about one.
    mixed = with_answers(records, [d if i % 3 else (d + 1) % 26 for i, d in enumerate(decoded)])
    assert objective.correct(prompt, mixed).tolist() == [bool(i % 3) for i in range(11)]
    assert not objective.correct(torch.full_like(prompt, float("nan")), right).any()
    empty = answer_records(model, [], [], np.zeros(0), np.zeros(0), records.visual, MAX_TOKENS, "keep")
    assert objective.correct(prompt, empty).shape == (0,)


def with_answers(records: AnswerRecords, answers: list[Tensor]) -> AnswerRecords:
    tokens, length = torch.full_like(records.tokens, END_ID), records.answer_start.clone()
    for row, answer in enumerate(answers):
        start = int(records.answer_start[row])
        tokens[row, :start] = records.tokens[row, :start]
        tokens[row, start : start + len(answer)] = answer
        length[row] += len(answer)
    return AnswerRecords(
        visual=records.visual,
        image_of=records.image_of,
        tokens=tokens,
        answer_start=records.answer_start,
        length=length,
        labels=records.labels,
    )


def test_what_records_hold(llava_dir: Path):
    model = load(llava_dir)
    records = make_records(model, 2)
    # 6 words, "ASSISTANT" and ":", then "red" and the end.
    assert (records.answer_start[0], records.length[0]) == (8, 10)
    assert records.tokens.shape == (2, MAX_TOKENS)
    expected = [*model.question_tokens(QUESTIONS[0]), *model.words("red"), END_ID]
    assert records.tokens[0].tolist() == expected + [END_ID] * (MAX_TOKENS - 10)
    assert records.usable.tolist() == [True, True]
    assert records.num_examples == 2


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("what color is the circle ? " * 3, "red", r"record 1 .* are 22 tokens long, data.max-tokens = 14"),
        ("what is purple ?", "red", "record 1 .*not in its vocabulary"),
        ("what is this ?", "purple", r"record 1 .*'purple' has words that are not in its vocabulary"),
        ("what is this ?", "", "record 1 .*an answer must have words"),
        ("<image> ?", "red", "record 1 .*its special tokens"),
    ],
)
def test_records_that_cannot_be_used(llava_dir: Path, question: str, answer: str, message: str):
    """Refused by name, or kept: counted, without a gradient, wrong."""
    model = load(llava_dir)
    asked = [QUESTIONS[0], question, QUESTIONS[1]], ["red", answer, "yes"]
    rest = np.array([0, 1, 2]), np.array([0, 0, 0]), visual_of(model, 3), MAX_TOKENS
    with pytest.raises(ConfigError, match=message):
        answer_records(model, *asked, *rest, "raise")
    records = answer_records(model, *asked, *rest, "keep")
    assert records.num_examples == 3
    assert records.usable.tolist() == [True, False, True]
    objective = SoftPromptObjective(model)
    rows = rows_of(objective, records, prompt_of(0))
    assert not rows[1].any()
    assert rows[0].any()
    assert rows[2].any()
    good = answer_records(model, QUESTIONS[:2], ["red", "yes"], np.array([0, 2]), *rest[1:], "raise")
    sums = [
        objective.bind([data]).gradients(prompt_of(0)[None], [np.arange(data.num_examples)]).sums()
        for data in (records, good)
    ]
    torch.testing.assert_close(*sums)


def test_bf16(llava_dir: Path):
    exact, rough = load(llava_dir), load(llava_dir, precision="bf16")
    prompt = prompt_of(0)
    rows = [rows_of(SoftPromptObjective(model), make_records(model), prompt) for model in (exact, rough)]
    assert rows[1].dtype == torch.float32
    difference = torch.linalg.vector_norm(rows[1] - rows[0]) / torch.linalg.vector_norm(rows[0])
    assert 1e-4 < difference < 0.15  # 8 bits through two blocks and back


def test_clients_step_side_by_side(llava_dir: Path):
    """Each at its own prompt and its own records, as alone; an empty batch and a client without records are zeros."""
    model = load(llava_dir)
    objective = SoftPromptObjective(model)
    data = [make_records(model), make_records(model, 4, 2), make_records(model, 0), make_records(model, 3)]
    prompts = torch.stack([prompt_of(seed) for seed in range(4)])
    picked = [np.array([1, 10, 2]), np.array([0, 3]), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)]
    step = objective.bind(data).gradients(prompts, picked)
    found, plain = clipped_sums(step, 0.5, "float"), step.sums()
    for i in range(4):
        rows = rows_of(objective, data[i], prompts[i], picked[i])
        torch.testing.assert_close(plain[i], rows.sum(0), rtol=1e-4, atol=1e-5)
        alone = clipped_sums(objective.bind([data[i]]).gradients(prompts[i : i + 1], [picked[i]]), 0.5, "float")[0]
        assert torch.equal(found[i].value, alone.value)
        assert bool(found[i].value.any()) is (i < 2)
    noised = torch.ones(4, N_CTX, 32)
    assert step.to_prompts(noised) is noised
