"""Private tuning of LoRA factors of a multimodal language model, with the template's words before the question.

The keys and values of all tokens in front of an answer, image tokens included, depend on the factors. Whole sequences
therefore run with gradients, and no prefix can be cached.
"""

import math
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.learners.answers import BLOCK, AnswerObjective, Block
from fl_dualpriv.models.lora import LoraModel


class LoraObjective(AnswerObjective):
    """`AnswerObjective` of factor matrices (rank, cols) of many clients, see `LoraModel`.

    Args:
        lora: The frozen model with its adapted layers.
        words: Embeddings of the template's words, (token, ctx_dim), in the place of a soft prompt.
        block: See `AnswerObjective`.
    """

    def __init__(self, lora: LoraModel, words: Tensor, *, block: int = BLOCK) -> None:
        super().__init__(lora.backbone, block)
        self._lora, self._words = lora, words

    def apart(self) -> Self:
        """See `Objective`; each block holds one record."""
        return type(self)(self._lora, self._words, block=1)

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of the rows of one block, in float32 and float64; see `Objective`."""
        return 12 * self.block * math.prod(self._lora.shape)

    def logits(self, prompt: Tensor, block: Block) -> Tensor:
        """See `AnswerObjective`."""
        text = self._model.embed_tokens(block.tokens[:, :-1])  # no token follows the last one
        embeddings = torch.cat([self._words.expand(len(text), -1, -1), text], dim=1)
        visual = block.records.clean_visual(block.images, self._model.device)
        return self._lora.logits(prompt, visual, embeddings, len(self._words) - 1)

    def rows(self, prompt: Tensor, block: Block) -> Tensor:
        """See `AnswerObjective` and `LoraModel.rows`."""
        return self._lora.rows(prompt, lambda matrix: self.losses(matrix, block))
