"""Token layout of the shared-prefix tower, and the tape: tensors that a forward pass keeps for the backward pass."""

import functools
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Classes whose suffixes have the same length.

    Attributes:
        classes: Number of these classes.
        length: Number of suffix tokens of each class.
        keys: Range of their tokens among all tokens of a prompt.
        queries: Range of their rows among the rows that attend: ``keys``, or in the last block one row per class.
    """

    classes: int
    length: int
    keys: slice
    queries: slice


@dataclass(frozen=True)
class Layout:
    """Order of the tokens: the context, then the suffixes, span by span, class by class.

    Attributes:
        n_ctx: Number of context tokens. The prefix is SOS and the context.
        spans: Spans of every block except the last.
        last_spans: Spans of the last block, whose rows are the end-of-text tokens.
        ends: Token index of each row of the last block: (row,), or (prompt, row) if prompts differ.
    """

    n_ctx: int
    spans: tuple[Span, ...]
    last_spans: tuple[Span, ...]
    ends: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of a prompt with all suffixes, without SOS."""
        return self.spans[-1].keys.stop

    @property
    def widest(self) -> int:
        """Number of tokens of the longest suffix."""
        return max(span.length for span in self.spans)

    @functools.cached_property
    def lasts(self) -> Tensor:
        """Index of the end of text within the suffix, for each row of the last block."""
        lengths = [span.length for span in self.spans for _ in range(span.classes)]
        return torch.tensor(lengths, device=self.ends.device) - 1

    @functools.cached_property
    def padded(self) -> Tensor:
        """Token indices of the suffix of each row of the last block, padded by repeating the last, (row, widest)."""
        steps = torch.arange(self.widest, device=self.ends.device)
        return (self.ends - self.lasts)[:, None] + torch.minimum(steps, self.lasts[:, None])


def layout(n_ctx: int, groups: list[tuple[int, int]], device: torch.device) -> Layout:
    """Lay out ``(classes, suffix length)`` groups after the context."""
    spans, last, ends, token, row = [], [], [], n_ctx, 0
    for classes, length in groups:
        keys = slice(token, token + classes * length)
        spans.append(Span(classes, length, keys, keys))
        last.append(Span(classes, length, keys, slice(row, row + classes)))
        ends += range(token + length - 1, keys.stop, length)
        token, row = keys.stop, row + classes
    return Layout(n_ctx, tuple(spans), tuple(last), torch.tensor(ends, device=device))


@dataclass(frozen=True)
class BlockTape:
    """Tensors that a block's backward pass needs.

    All have the prompt as leading dimension, which the shapes below omit. ``rows`` are the rows that attend.

    Attributes:
        x_1: Normalised inputs (token, ctx_dim); in the first block only those of the context.
        rstd_1: 1/σ of the norm of these inputs.
        q: Queries, (head, rows, head_dim).
        k: Keys, (head, token, head_dim).
        v: Values, (head, token, head_dim).
        k_prefix: Keys of SOS and context, (head, 1 + n_ctx, head_dim).
        v_prefix: Values of SOS and context, (head, 1 + n_ctx, head_dim).
        shares: Attention weights of each row to the prefix, then to its own suffix, (head, rows, 1 + n_ctx + widest).
        x_2: Normalised inputs of the MLP (rows, ctx_dim).
        rstd_2: 1/σ of the norm of the MLP's inputs.
        slope: The activation's derivative at the MLP's hidden values, (rows, hidden).
    """

    x_1: Tensor
    rstd_1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    k_prefix: Tensor
    v_prefix: Tensor
    shares: Tensor
    x_2: Tensor
    rstd_2: Tensor
    slope: Tensor

    def take(self, here: slice | Tensor) -> Self:
        """Return the tape of some prompts: views for a slice, copies for an index, which may repeat a prompt."""
        return type(self)(*(getattr(self, f.name)[here] for f in fields(self)))


@dataclass(frozen=True)
class Tape:
    """Tape of a whole forward pass: its blocks, the final norm, and the features as unit vectors and norms.

    Features have the shape (prompt, row of the last block, embed_dim).
    """

    blocks: list[BlockTape]
    x_final: Tensor
    rstd_final: Tensor
    units: Tensor
    norms: Tensor

    def take(self, here: slice | Tensor) -> Self:
        """Return the tape of some prompts; see `BlockTape.take`."""
        rest = (t[here] for t in (self.x_final, self.rstd_final, self.units, self.norms))
        return type(self)([block.take(here) for block in self.blocks], *rest)


def by_class(x: Tensor, rows: slice, span: Span) -> Tensor:
    """Split rows by class: (prompt, head, row, …) → (prompt, head, class, row of the class, …)."""
    return x[:, :, rows].unflatten(2, (span.classes, -1))
