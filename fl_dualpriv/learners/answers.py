"""Questions with answers as records, and what every way to tune a model on them shares: blocks, losses, clipped sums.

Loss of a record: the mean, over the tokens of its answer and the end, of the cross-entropy of each given those before.
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
from fl_dualpriv.learners.base import Picked
from fl_dualpriv.models.answering import AnsweringModel
from fl_dualpriv.privacy.clipping import Arithmetic, ClippedSum, as_clipped_sum, bounded_rows

BLOCK = 8
"""Records that run together, padded, unless told otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerRecords:
    """A client's questions with their answers, or a held-out split; on the CPU, ``visual`` on any device.

    Attributes:
        visual: Visual tokens of each image, (image, embed_dim) float32; a row that is not finite cannot be used.
        image_of: Each record's image, (record,) int64.
        tokens: What follows the prompt, (record, max_tokens) int64: question, answer, end, then padding.
        answer_start: Where the answer starts, (record,) int64.
        length: Tokens that count, (record,) int64. 0: the record cannot be used; it has no gradient and stays counted.
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
        """n_i, public metadata: counts records that cannot be used, too."""
        return len(self.length)

    @functools.cached_property
    def usable(self) -> Tensor:
        """Which records can be used, bool (record,)."""
        finite = torch.isfinite(self.visual).all(dim=1).cpu()
        return finite[self.image_of] & (self.length > 0)

    def clean_visual(self, images: Tensor, device: torch.device) -> Tensor:
        """Visual tokens of some images; zeros for one that cannot be used, else it would be NaN times zero."""
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
    """Write questions and answers in a model's tokens.

    Guarantee:
        Per record: a row depends on its own question, answer and image alone, its length on ``max_tokens``.

    Args:
        model: Whose tokens.
        questions: One per record.
        answers: One per record.
        image_of: Row of ``visual`` of each record, (record,).
        labels: Question type of each record, (record,).
        visual: As `AnswerRecords`.
        max_tokens: Of question and answer together with what the model's chat puts around them; public.
        on_bad: What to do with a record that is too long or cannot be written in the model's tokens: ``raise``, or
            ``keep`` it as one that cannot be used. Under DP it must be kept, or its presence would show.

    Raises:
        ConfigError: If a record cannot be used and ``on_bad`` says so.
    """
    tokens = torch.full((len(questions), max_tokens), model.end, dtype=torch.long)
    start, length = torch.zeros(2, len(questions), dtype=torch.long)
    ask = functools.lru_cache(maxsize=4096)(model.question_tokens)  # questions repeat, rendering costs
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
    """Some records of one client; what cannot be used is an empty image with nothing to answer.

    Attributes:
        records: Whose.
        images: Rows of their ``visual``, (row,), on the CPU; the rest is on the model's device.
        tokens: (row, max_tokens).
        in_answer: Which of them count in a loss, bool (row, max_tokens).
        usable: Which rows are records that can be used, bool (row,).
    """

    records: AnswerRecords
    images: Tensor
    tokens: Tensor
    in_answer: Tensor
    usable: Tensor


class AnswerObjective(ABC):
    """`Objective` of answering questions, for what many clients learn; a subclass says how a model answers with it.

    Args:
        model: The frozen model.
        block: Records that run together, padded; must be public, such as a function of the expected batch. What is held
            does not grow with a batch, whose size is private, and a record's numbers do not depend on how many there
            are.
    """

    def __init__(self, model: AnsweringModel, block: int) -> None:
        self._model, self.block = model, block

    @property
    @abstractmethod
    def bytes_per_prompt(self) -> int:
        """See `Objective`."""

    @abstractmethod
    def logits(self, prompt: Tensor, block: Block) -> Tensor:
        """Scores of each token of ``block.tokens`` with what is learnt, (row, token, vocabulary); differentiable.

        Guarantee owed by an implementation:
            Row i is a function of the prompt and of row i of the block alone.
        """

    @abstractmethod
    def rows(self, prompt: Tensor, block: Block) -> Tensor:
        """Gradient of each row's own loss at a prompt (rows, cols) that all share, (row, rows, cols).

        Guarantee owed by an implementation:
            Row i is a function of the prompt and of row i of the block alone.
        """

    @abstractmethod
    def apart(self) -> Self:
        """See `Objective`: blocks of one record."""

    def bind(self, data: Sequence[AnswerRecords]) -> "PooledAnswers":
        """See `Objective`."""
        return PooledAnswers(self, data)

    @torch.no_grad()
    def correct(self, prompt: Tensor, records: AnswerRecords) -> Tensor:
        """Exact match: whether each token of the answer and the end is the likeliest one given those before.

        That is whether greedy decoding gives this answer. A record that cannot be used is wrong.

        Args:
            prompt: (rows, cols).
            records: What is asked.

        Returns:
            bool (record,), on the CPU.
        """
        prompt = prompt.to(self._model.device)
        right = []
        for block, count in self.blocks(records, np.arange(records.num_examples)):
            top = self.logits(prompt, block).max(dim=-1)
            same = (top.indices == block.tokens) & torch.isfinite(top.values)
            right.append(((same | ~block.in_answer).all(dim=1) & block.usable)[:count].cpu())
        return torch.cat([torch.zeros(0, dtype=torch.bool), *right])

    def losses(self, prompt: Tensor, block: Block) -> Tensor:
        """Loss of each record of a block, (row,); 0 if it cannot be used."""
        logits = self.logits(prompt, block)
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), block.tokens, reduction="none")
        total = torch.where(block.in_answer, each, 0.0).sum(dim=1)
        return total / block.in_answer.sum(dim=1).clamp(min=1)

    def blocks(self, records: AnswerRecords, picked: np.ndarray) -> Iterator[tuple[Block, int]]:
        """The picked records in blocks of one size, and how many of each block are not padding."""
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


class PooledAnswers:
    """`PooledObjective` of the records of some clients."""

    def __init__(self, objective: AnswerObjective, data: Sequence[AnswerRecords]) -> None:
        self._objective, self._data = objective, data

    def gradients(self, prompts: Tensor, picked: Picked) -> "AnswerGradients":
        """See `PooledObjective`."""
        return AnswerGradients(self._objective, self._data, prompts.detach(), picked)


class AnswerGradients:
    """`StepGradients`; a pass through the model each time that one is asked for."""

    def __init__(
        self, objective: AnswerObjective, data: Sequence[AnswerRecords], prompts: Tensor, picked: Picked
    ) -> None:
        self._objective, self._data, self._prompts, self._picked = objective, data, prompts, picked

    def rows(self, client: int) -> Iterator[Tensor]:
        """Each record's own gradient, block by block, (block, rows, cols), padded with zeros.

        Guarantee:
            A row is a function of the prompt and of its own record alone, see `AnswerObjective.rows`, and it runs in a
            block of one size whatever the batch. A record that cannot be used is zero.
        """
        for block, _ in self._objective.blocks(self._data[client], self._picked[client]):
            rows = self._objective.rows(self._prompts[client].to(block.tokens.device), block)
            yield torch.where(block.usable[:, None, None], rows, 0.0)

    def clipped_sums(self, clip_norm: float, arithmetic: Arithmetic, masks: Tensor | None = None) -> list[ClippedSum]:
        """See `StepGradients`.

        Guarantee:
            Adding or removing one record moves its client's value by at most ``clip_norm`` and no other client's
            (tests/guarantees/test_soft_prompt_rows.py, test_lora_rows.py): each row is masked, then clipped, then
            added, in float64. In integers the move is exactly that record's own integer row, as far as the rows of the
            others are the same bit by bit without it. An empty batch gives zero.
        """
        found = []
        for client, prompt in enumerate(self._prompts):
            total = torch.zeros_like(prompt, dtype=torch.float64)
            for rows in self.rows(client):
                masked = rows if masks is None else rows * masks[client].to(rows)
                total += bounded_rows(masked, clip_norm, arithmetic).sum(dim=0).to(total.device)
            found.append(as_clipped_sum(total, clip_norm, arithmetic))
        return found

    def to_prompts(self, noised: Tensor) -> Tensor:
        """See `StepGradients`: noise is on gradients of the prompts, so nothing is to do."""
        return noised

    def sums(self) -> Tensor:
        """See `StepGradients`: one backward pass for all records of a block."""
        totals = torch.zeros_like(self._prompts)
        for client, prompt in enumerate(self._prompts):
            for block, _ in self._objective.blocks(self._data[client], self._picked[client]):
                shared = prompt.to(block.tokens.device).clone().requires_grad_(True)
                with torch.enable_grad():
                    total = self._objective.losses(shared, block).sum()
                totals[client] += torch.autograd.grad(total, shared)[0].to(totals.device)
        return totals
