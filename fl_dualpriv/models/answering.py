"""Protocol of a frozen multimodal language model, which reads an image and a question and writes words.

A sequence is ``[before][visual tokens][prompt][after: the question …][answer, end]``. The language model is causal, so
the keys and values of the tokens before the prompt do not depend on the prompt. They form a `Prefix`, which is computed
without gradients and can be kept as long as the image does not change. This module imports no heavy library.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fl_dualpriv.models.base import ImageEncoder
from fl_dualpriv.models.pruning.tokens import TokenPruner


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of ``[before][visual tokens]`` of some images.

    Attributes:
        layers: Keys and values of each block of the language model, both (image, head, token, dim).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def take(self, rows: Tensor) -> "Prefix":
        """Return the prefix of some of the images."""
        return Prefix(tuple((keys[rows], values[rows]) for keys, values in self.layers))

    def room(self, images: int) -> "Prefix":
        """Return a prefix of zeros for ``images`` images, with the same shape per image, type and device."""
        return Prefix(
            tuple((k.new_zeros(images, *k.shape[1:]), v.new_zeros(images, *v.shape[1:])) for k, v in self.layers)
        )

    def put(self, rows: Tensor, other: "Prefix") -> None:
        """Write the first ``len(rows)`` images of ``other`` to these rows."""
        for (keys, values), (new_keys, new_values) in zip(self.layers, other.layers, strict=True):
            keys[rows], values[rows] = new_keys[: len(rows)], new_values[: len(rows)]


class AnsweringModel(ImageEncoder, Protocol):
    """A frozen vision tower, projector and language model.

    The model is in evaluation mode, and no parameter has a gradient. The features of an image are its projected visual
    tokens, pruned if there is a pruner. Thus ``embed_dim`` is ``n_visual * ctx_dim``. An image with a number that is
    not finite has a row of NaN.

    Attributes:
        ctx_dim: Width of a token embedding.
        n_visual: Number of visual tokens of an image that the language model reads, after pruning.
        context_length: Length of the longest sequence, in tokens.
        pruner: Visual token pruner, or None.
        end: Id of the token that ends an answer.
    """

    ctx_dim: int
    n_visual: int
    context_length: int
    pruner: TokenPruner | None
    end: int

    def words(self, text: str) -> list[int]:
        """Return the token ids of a text, without added special tokens.

        Raises:
            ConfigError: If the text has words that the model does not know, or special tokens of the model.
        """
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Look up token embeddings without positions: ids (..., token) → float32 (..., token, ctx_dim)."""
        ...

    def question_tokens(self, question: str) -> list[int]:
        """Return the ids of all tokens between the prompt and the answer.

        Raises:
            ConfigError: If `words` raises it for the question.
        """
        ...

    def answer_tokens(self, answer: str) -> list[int]:
        """Return the ids of an answer, with the end token.

        Raises:
            ConfigError: If `words` raises it for the answer, or if the answer is empty.
        """
        ...

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids: the inverse of `words`."""
        ...

    def check_length(self, n_ctx: int, max_tokens: int) -> None:
        """Raise ConfigError if an image, a prompt and ``max_tokens`` of question and answer exceed the context."""
        ...

    def prefix(self, visual: Tensor) -> Prefix:
        """Compute keys and values of the tokens before a prompt, without gradients.

        The argument holds the visual tokens, (image, embed_dim).

        Guarantee:
            Per image, as `image_features`.
        """
        ...

    def logits(self, prefix: Prefix, embeddings: Tensor, first: int, *, checkpointing: bool = False) -> Tensor:
        """Compute the scores of the next token after each position; differentiable in the embeddings.

        Guarantee:
            Row i is a function of only row i of the prefix and row i of the embeddings. In it, position t depends on
            the embeddings only at positions up to t.

        Args:
            prefix: Prefix of n images.
            embeddings: Embeddings that follow the prefix, (n, token, ctx_dim), without positions.
            first: Position in ``embeddings`` of the first score that is returned.
            checkpointing: Keep only each block's input, and run the block again in the backward pass. The gradients
                are the same.

        Returns:
            float32 (n, token - first, vocabulary).
        """
        ...

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
        ...
