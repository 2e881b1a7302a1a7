"""Records of questions with answers, and the blocks, losses and clipped sums that all learners on them share.

The loss of a record is the mean cross-entropy over the tokens of its answer and the end token, each given the tokens
before it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.learners.base import InPromptSpace, Picked, Pooled
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.privacy.step import RowBlock

BLOCK = 8
"""Default number of records that run together, padded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerRecords:
    """Questions with their answers, of a client or of a held-out split; on the CPU, with ``visual`` on any device.

    Attributes:
        visual: Visual tokens of each image, (image, embed_dim) float32. A row that is not finite cannot be used.
        image_of: Image index of each record, (record,) int64.
        tokens: Tokens that follow the prompt, (record, max_tokens) int64: question, answer, end, then padding.
        answer_start: Position of the first answer token, (record,) int64.
        length: Number of tokens without padding, (record,) int64. 0 marks a record that cannot be used: it has no
            gradient and stays counted.
        labels: Question type, (record,) int64.
    """

    visual: Tensor
    image_of: Tensor
    tokens: Tensor
    answer_start: Tensor
    length: Tensor
    labels: Tensor

    @property
    def num_examples(self) -> int:
        """Number of records n_i, public metadata; includes records that cannot be used."""
        return len(self.length)

    @functools.cached_property
    def usable(self) -> Tensor:
        """True for each record that can be used, bool (record,)."""
        finite = torch.isfinite(self.visual).all(dim=1).cpu()
        return finite[self.image_of] & (self.length > 0)

    def clean_visual(self, images: Tensor, device: torch.device) -> Tensor:
        """Return visual tokens of some images, with zeros for an image that cannot be used: NaN times zero is NaN."""
        visual = self.visual[images.to(self.visual.device)].to(device)
        return torch.where(torch.isfinite(visual).all(dim=1, keepdim=True), visual, 0.0)


def answer_records(
    model: AnsweringModel,
    questions: Sequence[str],
    answers: Sequence[str],
    image_of: np.ndarray | Tensor,
    labels: np.ndarray | Tensor,
    visual: Tensor,
    max_tokens: int,
    on_bad: Literal["raise", "keep"],
) -> AnswerRecords:
    """Tokenize questions and answers with the tokenizer of a model.

    Guarantee:
        Per record: a row depends only on its own question, answer and image, and its length on ``max_tokens``.

    Args:
        model: Model whose tokenizer is used.
        questions: One per record.
        answers: One per record.
        image_of: Row of ``visual`` of each record, (record,).
        labels: Question type of each record, (record,).
        visual: See `AnswerRecords`.
        max_tokens: Most tokens of a question and its answer, including the tokens of the model's chat format; public.
        on_bad: Treatment of a record that is too long or cannot be tokenized: ``raise``, or ``keep`` it as a record
            that cannot be used. Under DP it must be kept, because its presence would show otherwise.

    Raises:
        ConfigError: If a record cannot be used and ``on_bad`` is ``raise``.
    """
    tokens = torch.full((len(questions), max_tokens), model.end, dtype=torch.long)
    start, length = torch.zeros(2, len(questions), dtype=torch.long)
    ask = functools.lru_cache(maxsize=4096)(model.question_tokens)  # questions repeat, and rendering one is slow
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            before, behind = ask(question), model.answer_tokens(answer)
            needed = len(before) + len(behind)
            if needed > max_tokens:
                raise ConfigError(
                    f"its question and answer are {needed} tokens long, data.max-tokens = {max_tokens}; raise it or "
                    "shorten them"
                )
        except ConfigError as error:
            if on_bad == "raise":
                raise ConfigError(f"record {row} ({question!r}, {answer!r}): {error}") from error
            continue
        tokens[row, :needed] = torch.tensor([*before, *behind])
        start[row], length[row] = len(before), needed
    return AnswerRecords(
        visual=visual,
        image_of=torch.as_tensor(image_of, dtype=torch.long),
        tokens=tokens,
        answer_start=start,
        length=length,
        labels=torch.as_tensor(labels, dtype=torch.long),
    )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some records of one client. A record that cannot be used becomes a blank image with no answer tokens.

    Attributes:
        records: Records of the client.
        images: Rows of ``records.visual``, (row,), on the CPU. The other tensors are on the model's device.
        tokens: Tokens, (row, max_tokens).
        in_answer: True for each token that counts in a loss, bool (row, max_tokens).
        usable: True for each row that is a record that can be used, bool (row,).
    """

    records: AnswerRecords
    images: Tensor
    tokens: Tensor
    in_answer: Tensor
    usable: Tensor


class AnswerObjective(ABC):
    """`Objective` of answering questions, for many clients at once; a subclass defines how the model uses a prompt.

    Args:
        model: The frozen model.
        block: Number of records that run together, padded. It must be public, such as a function of the expected batch.
            The memory in use does not grow with a batch, whose size is private, and the numbers of a record do not
            depend on how many records there are.
    """

    def __init__(self, model: AnsweringModel, block: int) -> None:
        self._model, self.block = model, block

    @property
    @abstractmethod
    def bytes_per_prompt(self) -> int:
        """See `Objective`."""

    @abstractmethod
    def logits(self, prompt: Tensor, block: Block) -> Tensor:
        """Compute the logits of each token of ``block.tokens``, (row, token, vocabulary); differentiable.

        Guarantee that every implementation must give:
            Row i is a function of only the prompt and row i of the block.
        """

    @abstractmethod
    def rows(self, prompt: Tensor, block: Block) -> Tensor:
        """Compute the gradient of each row's own loss at a prompt (rows, cols) that all rows share, (row, rows, cols).

        Guarantee that every implementation must give:
            Row i is a function of only the prompt and row i of the block.
        """

    @abstractmethod
    def apart(self) -> Self:
        """See `Objective`; each block holds one record."""

    def bind(self, data: Sequence[AnswerRecords]) -> Pooled["AnswerGradients"]:
        """See `Objective`."""
        return Pooled(functools.partial(AnswerGradients, self, data))

    @torch.no_grad()
    def correct(self, prompt: Tensor, records: AnswerRecords) -> Tensor:
        """Check for exact match: each token of the answer and the end token is the likeliest given the tokens before.

        This is equivalent to greedy decoding giving this answer. A record that cannot be used is wrong.

        Args:
            prompt: Prompt, (rows, cols).
            records: Questions with their answers.

        Returns:
            True for each exact match, bool (record,), on the CPU.
        """
        prompt = prompt.to(self._model.device)
        right = []
        for block, count in self.blocks(records, np.arange(records.num_examples)):
            top = self.logits(prompt, block).max(dim=-1)
            same = (top.indices == block.tokens) & torch.isfinite(top.values)
            right.append(((same | ~block.in_answer).all(dim=1) & block.usable)[:count].cpu())
        return torch.cat([torch.zeros(0, dtype=torch.bool), *right])

    def losses(self, prompt: Tensor, block: Block) -> Tensor:
        """Compute the loss of each record of a block, (row,); 0 for a record that cannot be used."""
        logits = self.logits(prompt, block)
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), block.tokens, reduction="none")
        total = torch.where(block.in_answer, each, 0.0).sum(dim=1)
        return total / block.in_answer.sum(dim=1).clamp(min=1)

    def blocks(self, records: AnswerRecords, picked: np.ndarray) -> Iterator[tuple[Block, int]]:
        """Yield the picked records in blocks of one size, each with its number of rows that are not padding."""
        device, size = self._model.device, self.block
        for start in range(0, len(picked), size):
            here = torch.from_numpy(picked[start : start + size].astype(np.int64))
            count = len(here)
            here = torch.nn.functional.pad(here, (0, size - count), value=int(here[0]))
            usable = records.usable[here] & (torch.arange(size) < count)
            position = torch.arange(records.tokens.shape[1])
            in_answer = (position >= records.answer_start[here, None]) & (position < records.length[here, None])
            block = Block(
                records=records,
                images=records.image_of[here],
                tokens=records.tokens[here].to(device),
                in_answer=(in_answer & usable[:, None]).to(device),
                usable=usable.to(device),
            )
            yield block, count


class AnswerGradients(InPromptSpace):
    """`StepGradients` of answers; each call of a method runs the model again."""

    def __init__(
        self, objective: AnswerObjective, data: Sequence[AnswerRecords], prompts: Tensor, picked: Picked
    ) -> None:
        self._objective, self._data, self._prompts, self._picked = objective, data, prompts, picked

    def blocks(self) -> Iterator[RowBlock]:
        """Yield the gradient of each record, block by block, padded with zeros.

        Guarantee:
            A row is a function of only the prompt and its own record, see `AnswerObjective.rows`
            (tests/guarantees/test_soft_prompt_rows.py, test_lora_rows.py). It runs in a block of one fixed size for
            every batch. A record that cannot be used is zero.
        """
        for client, prompt in enumerate(self._prompts):
            for block, _ in self._objective.blocks(self._data[client], self._picked[client]):
                rows = self._objective.rows(prompt.to(block.tokens.device), block)
                rows = torch.where(block.usable[:, None, None], rows, 0.0)
                yield RowBlock(clients=torch.tensor([client]), rows=rows[None])

    def zeros(self) -> Tensor:
        """See `Rows`."""
        return torch.zeros_like(self._prompts, dtype=torch.float64)

    def sums(self) -> Tensor:
        """See `StepGradients`; one backward pass covers all records of a block."""
        totals = torch.zeros_like(self._prompts)
        for client, prompt in enumerate(self._prompts):
            for block, _ in self._objective.blocks(self._data[client], self._picked[client]):
                shared = prompt.to(block.tokens.device).clone().requires_grad_(True)
                with torch.enable_grad():
                    total = self._objective.losses(shared, block).sum()
                totals[client] += torch.autograd.grad(total, shared)[0].to(totals.device)
        return totals
