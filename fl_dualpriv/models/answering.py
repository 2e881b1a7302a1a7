"""Protocol of a frozen multimodal language model, which reads an image and a question and writes words.

A sequence is ``[before][visual tokens][prompt][after: the question …][answer, end]``. The language model is causal, so
the keys and values of what stands before the prompt do not depend on it: a `Prefix` is computed without gradients and
can be kept for as long as the image is the same. No heavy library is imported here.
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
        layers: Of each block of the language model: keys, values, both (image, head, token, dim).
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Memory."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def __len__(self) -> int:
        return len(self.layers[0][0])

    def take(self, rows: Tensor) -> "Prefix":
        """Of some of the images."""
        return Prefix(tuple((keys[rows], values[rows]) for keys, values in self.layers))

    def room(self, images: int) -> "Prefix":
        """Zeros for so many images, of the same shape and kind."""
        return Prefix(
            tuple((k.new_zeros(images, *k.shape[1:]), v.new_zeros(images, *v.shape[1:])) for k, v in self.layers)
        )

    def put(self, rows: Tensor, other: "Prefix") -> None:
        """Write the first of another's images to these rows, as many as there are rows."""
        for (keys, values), (new_keys, new_values) in zip(self.layers, other.layers, strict=True):
            keys[rows], values[rows] = new_keys[: len(rows)], new_values[: len(rows)]


class AnsweringModel(ImageEncoder, Protocol):
    """A frozen vision tower, projector and language model; evaluation mode, no parameter has a gradient.

    The features of an image are its projected visual tokens, through the pruner if there is one: ``embed_dim`` is
    ``n_visual * ctx_dim``. An image with a number that is not finite has a row of NaN.

    Attributes:
        ctx_dim: Width of a token embedding.
        n_visual: Visual tokens of an image that the language model reads, after pruning.
        context_length: Longest sequence, in tokens.
        pruner: Visual token pruner, or None.
        end: Id that ends an answer.
    """

    ctx_dim: int
    n_visual: int
    context_length: int
    pruner: TokenPruner | None
    end: int

    def words(self, text: str) -> list[int]:
        """Token ids of a text alone.

        Raises:
            ConfigError: If the text has words that the model does not know, or its special tokens.
        """
        ...

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Ids (..., token) → embeddings float32 (..., token, ctx_dim), without positions."""
        ...

    def question_tokens(self, question: str) -> list[int]:
        """Ids of everything between the prompt and the answer.

        Raises:
            ConfigError: As `words`.
        """
        ...

    def answer_tokens(self, answer: str) -> list[int]:
        """Ids of an answer, with the end.

        Raises:
            ConfigError: As `words`, or if the answer is empty.
        """
        ...

    def text(self, ids: list[int]) -> str:
        """What ids of words say: the other way round of `words`."""
        ...

    def check_length(self, n_ctx: int, max_tokens: int) -> None:
        """Raise ConfigError if an image, a prompt and ``max_tokens`` of question and answer exceed the context."""
        ...

    def prefix(self, visual: Tensor) -> Prefix:
        """Keys and values in front of a prompt, without gradients: visual tokens (image, embed_dim) → `Prefix`.

        Guarantee:
            Per image, as `image_features`.
        """
        ...

    def logits(self, prefix: Prefix, embeddings: Tensor, first: int, *, checkpointing: bool = False) -> Tensor:
        """Scores of the token behind each position; differentiable in the embeddings.

        Guarantee:
            Row i is a function of row i of the prefix and of the embeddings alone, and position t of those up to t.

        Args:
            prefix: Of n images.
            embeddings: What stands behind it, (n, token, ctx_dim), without positions.
            first: Position in ``embeddings`` of the first score wanted.
            checkpointing: Keep each block's input only, and run the block again in the backward pass: same gradients.

        Returns:
            float32 (n, token - first, vocabulary).
        """
        ...

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of a SHA-256 over names, types, shapes and bytes of the weights."""
        ...
