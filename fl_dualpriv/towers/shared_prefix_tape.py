"""What a pass through the shared-prefix tower lays out and keeps: token layout, and the tape of its backward pass."""

import functools
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Classes whose suffixes have the same length.

    Attributes:
        classes: How many.
        length: Suffix tokens of each.
        keys: Their tokens among all tokens of a prompt.
        queries: Their rows among the rows that attend: ``keys``, or in the last block one row per class.
    """

    classes: int
    length: int
    keys: slice
    queries: slice


@dataclass(frozen=True)
class Layout:
    """Where what stands: tokens are the context, then the suffixes, span by span, class by class.

    Attributes:
        n_ctx: Context tokens; the prefix is SOS and these.
        spans: Every block but the last.
        last_spans: The last block, whose rows are the end-of-text tokens.
        ends: Token index of each row of the last block: (row,), or (prompt, row) where prompts differ.
    """

    n_ctx: int
    spans: tuple[Span, ...]
    last_spans: tuple[Span, ...]
    ends: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of a prompt, without SOS."""
        return self.spans[-1].keys.stop

    @property
    def widest(self) -> int:
        """Tokens of the longest suffix."""
        return max(span.length for span in self.spans)

    @functools.cached_property
    def lasts(self) -> Tensor:
        """Place of its end of text in the suffix of each row of the last block."""
        lengths = [span.length for span in self.spans for _ in range(span.classes)]
        return torch.tensor(lengths, device=self.ends.device) - 1

    @functools.cached_property
    def padded(self) -> Tensor:
        """Suffix tokens of each row of the last block, padded by repeating the last, (row, widest)."""
        steps = torch.arange(self.widest, device=self.ends.device)
        return (self.ends - self.lasts)[:, None] + torch.minimum(steps, self.lasts[:, None])


def layout(n_ctx: int, groups: list[tuple[int, int]], device: torch.device) -> Layout:
    """Lay out ``(classes, suffix length)`` groups behind the context."""
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
    """What a block's backward pass needs; leading dimension: prompt. ``rows`` are those that attend.

    Attributes:
        x_1: Normalised inputs (token, ctx_dim), of the context alone in the first block.
        rstd_1: Their 1/σ.
        q: (head, rows, head_dim).
        k: (head, token, head_dim).
        v: As ``k``.
        k_prefix: SOS and context, (head, 1 + n_ctx, head_dim).
        v_prefix: As ``k_prefix``.
        shares: Attention of each row to the prefix, then to its own suffix, (head, rows, 1 + n_ctx + widest).
        x_2: Normalised inputs of the MLP (rows, ctx_dim).
        rstd_2: Their 1/σ.
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
        """The same for some prompts: views of a slice, copies of prompts that an index names, several times or not."""
        return type(self)(*(getattr(self, f.name)[here] for f in fields(self)))


@dataclass(frozen=True)
class Tape:
    """A forward pass: its blocks, and features before they get unit norm (prompt, row of the last block, embed_dim)."""

    blocks: list[BlockTape]
    x_final: Tensor
    rstd_final: Tensor
    units: Tensor
    norms: Tensor

    def take(self, here: slice | Tensor) -> Self:
        """See `BlockTape.take`."""
        rest = (t[here] for t in (self.x_final, self.rstd_final, self.units, self.norms))
        return type(self)([block.take(here) for block in self.blocks], *rest)


def by_class(x: Tensor, rows: slice, span: Span) -> Tensor:
    """(prompt, head, row, …) → (prompt, head, class, row of the class, …)."""
    return x[:, :, rows].unflatten(2, (span.classes, -1))
