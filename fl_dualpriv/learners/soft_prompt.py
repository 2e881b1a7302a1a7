"""Private tuning of a soft prompt in front of the question of a multimodal language model.

Each example gets its own copy of the prompt. One backward pass of the summed losses then gives the exact gradient of
every example, at the cost of a backward pass with a shared prompt.
"""

import functools
import weakref
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.learners.answers import BLOCK, AnswerObjective, AnswerRecords, Block
from fl_dualpriv.models.answering import AnsweringModel, Prefix


class SoftPromptObjective(AnswerObjective):
    """`AnswerObjective` of prompts (n_ctx, ctx_dim) of many clients.

    Args:
        model: The frozen model.
        block: See `AnswerObjective`.
        checkpointing: Keep only the input of each transformer block and run it twice: less memory, more time, same
            gradients.
        kept_bytes: Memory for cached prefixes of images (see `Prefix`). The prefixes of a client are cached as long as
            its records live, if all of them fit together with those in the cache. Prefixes do not depend on a prompt,
            so the cache changes only the time.
    """

    def __init__(
        self, model: AnsweringModel, *, block: int = BLOCK, checkpointing: bool = False, kept_bytes: int = 0
    ) -> None:
        super().__init__(model, block)
        self._checkpointing, self._kept_bytes = checkpointing, kept_bytes
        self._prefixes = _Prefixes(model, kept_bytes)

    def apart(self) -> Self:
        """See `Objective`; each block holds one record, and prefixes are also computed one by one."""
        checkpointing, kept_bytes = self._checkpointing, self._kept_bytes
        return type(self)(self._model, block=1, checkpointing=checkpointing, kept_bytes=kept_bytes)

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of the prefixes of one block; see `Objective`."""
        return self.block * self._prefixes.bytes_per_image

    def logits(self, prompt: Tensor, block: Block) -> Tensor:
        """See `AnswerObjective`; ``prompt`` is one prompt for all rows, or one for each row, (row, n_ctx, ctx_dim)."""
        prefix = self._prefixes.of(block.records, block.images)
        text = self._model.embed_tokens(block.tokens[:, :-1])  # no token follows the last one
        prompts = prompt.to(text.dtype).expand(self.block, -1, -1)
        embeddings = torch.cat([prompts, text], dim=1)
        return self._model.logits(prefix, embeddings, prompts.shape[1] - 1, checkpointing=self._checkpointing)

    def rows(self, prompt: Tensor, block: Block) -> Tensor:
        """See `AnswerObjective`; a record's copy of the prompt does not enter the loss of another record."""
        copies = prompt.expand(self.block, -1, -1).clone().requires_grad_(True)
        with torch.enable_grad():
            total = self.losses(copies, block).sum()
        return torch.autograd.grad(total, copies)[0]


class _Prefixes:
    """Prefixes of images, cached within a budget of bytes; a budget of 0 caches none."""

    def __init__(self, model: AnsweringModel, budget: int) -> None:
        self._model, self._budget = model, budget
        self._kept: weakref.WeakKeyDictionary[AnswerRecords, tuple[Prefix, Tensor] | None]
        self._kept = weakref.WeakKeyDictionary()

    @property
    def bytes_per_image(self) -> int:
        """Memory of the prefix of one image."""
        return self._one.nbytes

    def of(self, records: AnswerRecords, images: Tensor) -> Prefix:
        """Return prefixes of a block of images of some records."""
        table = self._table(records)
        if table is None:
            return self._compute(records, images)
        prefixes, known = table
        missing = images[~known[images]].unique()
        if len(missing):
            padded = torch.nn.functional.pad(missing, (0, len(images) - len(missing)), value=int(missing[0]))
            prefixes.put(missing.to(self._model.device), self._compute(records, padded))
            known[missing] = True
        return prefixes.take(images.to(self._model.device))

    def _compute(self, records: AnswerRecords, images: Tensor) -> Prefix:
        return self._model.prefix(records.clean_visual(images, self._model.device))

    def _table(self, records: AnswerRecords) -> tuple[Prefix, Tensor] | None:
        if records not in self._kept:
            images = len(records.visual)
            used = sum(table[0].nbytes for table in self._kept.values() if table is not None)
            table = None
            if self._budget > used and images * self._one.nbytes <= self._budget - used:
                table = (self._one.room(images), torch.zeros(images, dtype=torch.bool))
            self._kept[records] = table
        return self._kept[records]

    @functools.cached_property
    def _one(self) -> Prefix:
        """Prefix of a blank image, used only for its shapes."""
        return self._model.prefix(torch.zeros(1, self._model.embed_dim, device=self._model.device))
