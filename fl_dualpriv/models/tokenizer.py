"""CLIP's own byte-pair tokenizer, reduced to the words that the embedded demo CLIP was trained on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

PADDING_ID = 0
"""Id 0 only fills up a row after its end-of-text token, and a causal text tower cannot see it there."""


class TrimmedTokenizer:
    """A tokenizer with a small vocabulary, callable on texts like open_clip's tokenizers.

    open_clip's `SimpleTokenizer` splits the words. The ids that the demo never uses are left out, so that the demo's
    token embedding has some hundred rows instead of 49,408. End of text has the largest id, because open_clip's
    pooling by ``argmax`` needs that.

    Args:
        bpe_ids: `SimpleTokenizer`'s id for each trimmed id, end of text last. Entry 0 is padding and not a word.
        context_length: Length of every row.

    Raises:
        ValueError: If the last id is not end of text.
    """

    def __init__(self, bpe_ids: Sequence[int], context_length: int) -> None:
        from fl_dualpriv.models import torchvision_shim

        torchvision_shim.install()
        from open_clip.tokenizer import SimpleTokenizer  # here, because it is heavy and needs the shim first

        self._bpe = SimpleTokenizer()
        self.context_length = context_length
        self.vocab_size = len(bpe_ids)
        self._trimmed = {bpe_id: index for index, bpe_id in enumerate(bpe_ids) if index != PADDING_ID}
        self.sot_token_id = self._trimmed[self._bpe.sot_token_id]
        self.eot_token_id = self._trimmed[self._bpe.eot_token_id]
        if self.eot_token_id != self.vocab_size - 1:
            raise ValueError(f"end of text must have the largest id, {self.vocab_size - 1}, not {self.eot_token_id}")

    @classmethod
    def from_json(cls, path: Path) -> Self:
        """Read ``bpe_ids`` and ``context_length`` from a JSON file."""
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(content["bpe_ids"], content["context_length"])

    def encode(self, text: str) -> list[int]:
        """Return the trimmed ids of a text, without start and end of text.

        Raises:
            ValueError: If a word is not in the demo CLIP's vocabulary.
        """
        bpe_ids = self._bpe.encode(text)
        if not all(bpe_id in self._trimmed for bpe_id in bpe_ids):
            unknown = [word for word in text.split() if not self._knows(word)] or [text]
            raise ValueError(
                f"unknown to the demo CLIP: {', '.join(map(repr, unknown))} (in {text!r}). It was trained on sketches "
                "and knows only a small vocabulary (class, colour, style and category words); the sentence around a "
                'class name is the template of data.classes, for example {"template": "a sketch of a {}"}'
            )
        return [self._trimmed[bpe_id] for bpe_id in bpe_ids]

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Tokenize one text or several. Each row is start of text, the words, end of text, then padding.

        Returns:
            int64 tensor (number of texts, context_length).

        Raises:
            ValueError: If a word is unknown, or a text is longer than the context.
        """
        rows = torch.full((1 if isinstance(texts, str) else len(texts), self.context_length), PADDING_ID)
        for row, text in zip(rows, [texts] if isinstance(texts, str) else texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > self.context_length:
                raise ValueError(f"{text!r} takes {len(ids)} tokens; the demo CLIP reads {self.context_length}")
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _knows(self, word: str) -> bool:
        return all(bpe_id in self._trimmed for bpe_id in self._bpe.encode(word))
