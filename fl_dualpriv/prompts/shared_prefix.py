"""A causal text tower for prompts that all classes share: the prefix runs once, each class adds its few name tokens.

Under a causal mask no token sees what follows, so SOS and context have the same activations for every class: they run
once per prompt, and the suffix of each class (name, what the template says after it, end of text) attends to the
prefix's keys and values. Nothing is padded, SOS and the first block's suffix products do not depend on the prompt and
are computed once, and the last block is run for the end-of-text tokens alone. Exact: the plain tower with less work.
The passes are written out by hand, forward here and backward in `shared_prefix_vjp`, so that many prompts and many
cotangents are single matrix products and nothing falls back to a slow path.
"""

import functools
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.prompts.folded import FoldedStack, activate, affine, fold, normalise, slope
from fl_dualpriv.prompts.text_stack import TextStack


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

    def narrow(self, here: slice) -> Self:
        """The same for some prompts; views."""
        return type(self)(*(getattr(self, f.name)[here] for f in fields(self)))


@dataclass(frozen=True)
class Tape:
    """A forward pass: its blocks, and features before they get unit norm (prompt, row of the last block, embed_dim)."""

    blocks: list[BlockTape]
    x_final: Tensor
    rstd_final: Tensor
    units: Tensor
    norms: Tensor

    def narrow(self, here: slice) -> Self:
        """The same for some prompts; views."""
        rest = (t[here] for t in (self.x_final, self.rstd_final, self.units, self.norms))
        return type(self)([block.narrow(here) for block in self.blocks], *rest)


@dataclass(frozen=True)
class _Constants:
    """What depends on n_ctx but on no prompt: SOS keys and values per block, suffix inputs, their first q, k, v."""

    layout: Layout
    sos: list[tuple[Tensor, Tensor]]
    suffix: Tensor
    suffix_qkv: Tensor


class SharedPrefixTower:
    """`PromptTower` on a causal stack.

    Args:
        stack: The frozen tower.
        sos: Embedding of the start token, (1, ctx_dim).
        suffix: Embeddings of name tokens and end of text, padded at the end, (n_cls, n_suffix, ctx_dim).
        lengths: Tokens up to and including the end of text, (n_cls,).
    """

    def __init__(self, stack: TextStack, sos: Tensor, suffix: Tensor, lengths: Tensor) -> None:
        self.stack: FoldedStack = fold(stack)
        self._sos, self._suffix = sos, suffix
        # Stable, so that classes of one length keep their order; with one length the order is the identity.
        self.order = torch.argsort(lengths, stable=True)
        self._lengths = lengths[self.order].tolist()
        self.groups = [(self._lengths.count(length), length) for length in sorted(set(self._lengths))]
        self._constants = functools.lru_cache(maxsize=4)(self._make_constants)

    @property
    def bytes_per_prompt(self) -> int:
        """A forward pass keeps about 12 numbers per channel and token in each block, and needs 12 more to work in."""
        tokens = sum(classes * length for classes, length in self.groups) + 8
        return 4 * tokens * self.stack.positions.shape[1] * 12 * (len(self.stack.blocks) + 1)

    def __call__(self, prompts: Tensor) -> "SharedPrefixFeatures":
        """Run (prompt, n_ctx, ctx_dim), float32, through the tower."""
        from fl_dualpriv.prompts.shared_prefix_vjp import SharedPrefixFeatures

        tape: list[BlockTape] = []
        constants, final = self._run(prompts.detach(), tape)
        x, rstd = normalise(final, self.stack.eps)
        features = affine(x, self.stack.projection)
        norms = features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return SharedPrefixFeatures(self, constants.layout, Tape(tape, x, rstd, features / norms, norms))

    def values(self, prompts: Tensor) -> Tensor:
        """Unit-norm class features (prompt, n_cls, embed_dim), with nothing kept for a backward pass."""
        _, final = self._run(prompts.detach(), None)
        features = affine(normalise(final, self.stack.eps)[0], self.stack.projection)
        return self.by_class(torch.nn.functional.normalize(features, dim=-1), dim=1)

    def by_class(self, rows: Tensor, dim: int) -> Tensor:
        """Rows of the last block → class order."""
        return rows if len(self.groups) == 1 else rows.index_select(dim, torch.argsort(self.order))

    @torch.no_grad()
    def _make_constants(self, n_ctx: int) -> _Constants:
        stack = self.stack
        place = layout(n_ctx, self.groups, self._suffix.device)
        sos = []
        x = self._sos[None] + stack.positions[:1]  # it attends to itself alone, so its share is 1
        for block in stack.blocks:
            qkv = affine(normalise(x, block.eps_1)[0], block.qkv)
            k, v = (_heads(t, stack.heads) for t in qkv.chunk(3, dim=-1)[1:])
            sos.append((k, v))
            x = x + affine(qkv.chunk(3, dim=-1)[2], block.out)
            x = x + affine(activate(affine(normalise(x, block.eps_2)[0], block.up), stack.activation), block.down)
        rows = [
            self._suffix[c, :length] + stack.positions[1 + n_ctx : 1 + n_ctx + length]
            for c, length in zip(self.order.tolist(), self._lengths, strict=True)
        ]
        suffix = torch.cat(rows)
        first = stack.blocks[0]
        return _Constants(place, sos, suffix, affine(normalise(suffix, first.eps_1)[0], first.qkv))

    @torch.no_grad()
    def _run(self, prompts: Tensor, tape: list[BlockTape] | None) -> tuple[_Constants, Tensor]:
        """All blocks; returns the end-of-text tokens before the final norm, (prompt, class row, ctx_dim)."""
        constants = self._constants(prompts.shape[1])
        context = prompts + self.stack.positions[1 : 1 + prompts.shape[1]]
        x = torch.cat([context, constants.suffix.expand(len(prompts), -1, -1)], dim=1)
        for depth in range(len(self.stack.blocks)):
            x = self._block(depth, x, constants, tape)
        return constants, x

    def _block(self, depth: int, x: Tensor, constants: _Constants, tape: list[BlockTape] | None) -> Tensor:
        block, place, heads = self.stack.blocks[depth], constants.layout, self.stack.heads
        last = depth == len(self.stack.blocks) - 1
        n_ctx, width = place.n_ctx, x.shape[-1]
        x_1, rstd_1 = normalise(x[:, :n_ctx] if depth == 0 else x, block.eps_1)
        if depth == 0:
            context = affine(x_1, block.qkv)
            qkv = torch.cat([context, constants.suffix_qkv.expand(len(x), -1, -1)], dim=1)
            q, k, v = (_heads(t, heads) for t in qkv.chunk(3, dim=-1))
            if last:
                q = q[:, :, place.ends]
        elif last:
            weight, bias = block.qkv.weight, block.qkv.bias
            q = _heads(affine(x_1[:, place.ends], type(block.qkv)(weight=weight[:width], bias=bias[:width])), heads)
            kv = affine(x_1, type(block.qkv)(weight=weight[width:], bias=bias[width:]))
            k, v = (_heads(t, heads) for t in kv.chunk(2, dim=-1))
        else:
            q, k, v = (_heads(t, heads) for t in affine(x_1, block.qkv).chunk(3, dim=-1))
        sos_k, sos_v = (t.expand(len(x), -1, -1, -1) for t in constants.sos[depth])
        k_prefix = torch.cat([sos_k, k[:, :, :n_ctx]], dim=2)
        v_prefix = torch.cat([sos_v, v[:, :, :n_ctx]], dim=2)
        shares, attended = _attend(q, k, v, k_prefix, v_prefix, place, last=last)
        x = (x[:, place.ends] if last else x) + affine(_merge(attended), block.out)
        x_2, rstd_2 = normalise(x, block.eps_2)
        hidden = affine(x_2, block.up)
        x = x + affine(activate(hidden, self.stack.activation), block.down)
        if tape is not None:
            slopes = slope(hidden, self.stack.activation)
            tape.append(BlockTape(x_1, rstd_1, q, k, v, k_prefix, v_prefix, shares, x_2, rstd_2, slopes))
        return x


def _heads(x: Tensor, count: int) -> Tensor:
    """(prompt, token, ctx_dim) → (prompt, head, token, head_dim)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2).contiguous()


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, place: Layout, *, last: bool
) -> tuple[Tensor, Tensor]:
    """Causal attention of every row to the prefix and its own suffix: shares, and values (prompt, head, row, dim)."""
    prefix = k_prefix.shape[2]
    scores = q.new_full((*q.shape[:3], prefix + place.widest), float("-inf"))
    scores[..., :prefix] = q @ k_prefix.transpose(-1, -2)
    if not last:
        # Context token i stands at position 1 + i: it sees SOS and context 0 … i.
        scores[:, :, : place.n_ctx, :prefix] += _after(place.n_ctx, prefix, 1, q.device)
    spans = place.last_spans if last else place.spans
    for span in spans:
        own = by_class(q, span.queries, span) @ by_class(k, span.keys, span).transpose(-1, -2)
        if not last:
            own += _after(span.length, span.length, 0, q.device)
        scores[:, :, span.queries, prefix : prefix + span.length] = own.flatten(2, 3)
    shares = torch.softmax(scores, dim=-1)
    attended = shares[..., :prefix] @ v_prefix
    for span in spans:
        own = by_class(shares[..., prefix : prefix + span.length], span.queries, span)
        attended[:, :, span.queries] += (own @ by_class(v, span.keys, span)).flatten(2, 3)
    return shares, attended


def by_class(x: Tensor, rows: slice, span: Span) -> Tensor:
    """(prompt, head, row, …) → (prompt, head, class, row of the class, …)."""
    return x[:, :, rows].unflatten(2, (span.classes, -1))


@functools.lru_cache(maxsize=64)
def _after(rows: int, columns: int, diagonal: int, device: torch.device) -> Tensor:
    """−∞ above the diagonal: the causal mask."""
    return torch.full((rows, columns), float("-inf"), device=device).triu(diagonal + 1)
