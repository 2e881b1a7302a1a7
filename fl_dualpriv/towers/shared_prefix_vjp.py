"""Backward passes of `shared_prefix`: many cotangents of many prompts at once, as plain matrix products.

Gradients have the layout (prompt, token, row, ctx_dim), where a row is one cotangent. The tensors that the forward pass
kept are then broadcast over rows, never copied, and the products of attention run over all rows of a prompt together.
"""

import functools
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.towers.folded import FoldedBlock, FoldedStack, pull
from fl_dualpriv.towers.shared_prefix_tape import BlockTape, Layout, Span, Tape, by_class, layout


class SharedPrefixFeatures:
    """`ClassFeatures` of a `SharedPrefixTower`.

    Args:
        stack: The folded tower.
        place: Token layout of the tower.
        order: Class id of each row of the last block.
        tape: Tensors that the forward pass kept.
    """

    def __init__(self, stack: FoldedStack, place: Layout, order: Tensor, tape: Tape) -> None:
        self._stack, self._layout, self._order, self._tape = stack, place, order, tape

    @property
    def values(self) -> Tensor:
        """Unit-norm class features, (prompt, n_cls, embed_dim)."""
        return self._values

    @functools.cached_property
    def _values(self) -> Tensor:
        return by_class_id(self._tape.units, self._order)

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of one prompt, (n_ctx, ctx_dim)."""
        return self._layout.n_ctx, self._stack.positions.shape[1]

    @property
    def bytes_per_row(self) -> int:
        """Approximate memory of one row of `vjp`, in bytes.

        About 14 numbers per channel and token live at once. `vjp_apart` also needs a copy of the tape.
        """
        return 4 * 14 * self._layout.tokens * self._stack.positions.shape[1]

    def narrow(self, start: int, stop: int) -> Self:
        """Return a view of the pass with only the prompts from ``start`` up to and excluding ``stop``."""
        return type(self)(self._stack, self._layout, self._order, self._tape.take(slice(start, stop)))

    @torch.no_grad()
    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back: (prompt, row, n_ctx, ctx_dim)."""
        rows = cotangents.index_select(2, self._order).transpose(1, 2)
        return _backward(self._stack, self._layout, self._tape, rows).transpose(1, 2)

    @torch.no_grad()
    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """As `vjp`, but each row becomes a separate prompt, so that `prompt_products` makes products of one size."""
        prompts, rows = cotangents.shape[:2]
        owner = torch.arange(prompts, device=cotangents.device).repeat_interleave(rows)
        flat = cotangents.index_select(2, self._order).flatten(0, 1)[:, :, None]
        gradients = _backward(self._stack, self._layout, self._tape.take(owner), flat)
        return gradients[:, :, 0].unflatten(0, (prompts, rows))

    @torch.no_grad()
    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Pull back cotangents of some classes per row; only the suffixes of these classes run backward.

        Each row becomes a separate prompt that has the chosen classes, padded to the longest suffix. Padding has no
        gradient and no token attends to it, so it adds exact zeros.
        """
        prompts, rows, some = classes.shape
        picked = torch.argsort(self._order)[classes].flatten(0, 1)  # class → row of the last block
        owner = torch.arange(prompts, device=classes.device).repeat_interleave(rows)
        n_ctx, widest = self._layout.n_ctx, self._layout.widest
        context = torch.arange(n_ctx, device=classes.device).expand(len(picked), -1)
        tokens = torch.cat([context, self._layout.padded[picked].flatten(1)], dim=1)
        place = layout(n_ctx, [(some, widest)], classes.device)
        starts = n_ctx + widest * torch.arange(some, device=classes.device)
        place = replace(place, ends=starts + self._layout.lasts[picked])
        flat = cotangents.flatten(0, 1)[:, :, None]
        gradients = _backward(self._stack, place, _gather(self._tape, owner, tokens, picked), flat)
        return gradients[:, :, 0].unflatten(0, (prompts, rows))


def by_class_id(rows: Tensor, order: Tensor) -> Tensor:
    """Reorder rows of the last block by class id: (prompt, row, …) → (prompt, n_cls, …)."""
    return rows.index_select(1, torch.argsort(order))


def _gather(tape: Tape, owner: Tensor, tokens: Tensor, rows: Tensor) -> Tape:
    """Gather a tape of ``len(owner)`` prompts: prompt i has the tokens ``tokens[i]`` (last block: rows ``rows[i]``)."""

    def take(x: Tensor, index: Tensor) -> Tensor:
        if x.ndim == 3:
            return x[owner[:, None], index]
        heads = torch.arange(x.shape[1], device=x.device)
        return x[owner[:, None, None], heads[None, :, None], index[:, None]]

    blocks = []
    for depth, block in enumerate(tape.blocks):
        attending = rows if depth == len(tape.blocks) - 1 else tokens
        blocks.append(
            BlockTape(
                x_1=block.x_1[owner] if depth == 0 else take(block.x_1, tokens),
                rstd_1=block.rstd_1[owner] if depth == 0 else take(block.rstd_1, tokens),
                q=take(block.q, attending),
                k=take(block.k, tokens),
                v=take(block.v, tokens),
                k_prefix=block.k_prefix[owner],
                v_prefix=block.v_prefix[owner],
                shares=take(block.shares, attending),
                x_2=take(block.x_2, attending),
                rstd_2=take(block.rstd_2, attending),
                slope=take(block.slope, attending),
            )
        )
    final = (take(x, rows) for x in (tape.x_final, tape.rstd_final, tape.units, tape.norms))
    return Tape(blocks, *final)


def _backward(stack: FoldedStack, place: Layout, tape: Tape, cotangents: Tensor) -> Tensor:
    """Run the backward pass: (prompt, class, row, embed_dim) → (prompt, n_ctx, row, ctx_dim).

    Classes are in the order of the last block.
    """
    units = tape.units[:, :, None]
    radial = (cotangents * units).sum(dim=-1, keepdim=True)
    g = (cotangents - units * radial) / tape.norms[:, :, None]
    g = _through_norm(pull(g, stack.projection.weight), tape.x_final, tape.rstd_final)
    for depth in reversed(range(len(stack.blocks))):
        block, block_tape = stack.blocks[depth], tape.blocks[depth]
        first, last = depth == 0, depth == len(stack.blocks) - 1
        hidden = pull(g, block.down.weight).mul_(block_tape.slope[:, :, None])
        g = g.add_(_through_norm(pull(hidden, block.up.weight), block_tape.x_2, block_tape.rstd_2))
        attended = _split(pull(g, block.out.weight), stack.heads)
        scores = _scores_vjp(block_tape, attended, place, last=last)
        if first:  # suffix embeddings are constants, so only the context needs a gradient from here on
            h = _context_input_vjp(block_tape, attended, scores, block, place, last=last)
            return h if last else h.add_(g[:, : place.n_ctx])
        h = _through_norm(
            _input_vjp(block_tape, attended, scores, block, place, last=last), block_tape.x_1, block_tape.rstd_1
        )
        g = _add_at(h, place.ends, g) if last else h.add_(g)
    raise AssertionError("a tower has blocks")


def _through_norm(h: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Pull back through x̂ = (x − mean)/σ, in place; the folded product that made ``h`` has already centred it."""
    x = x[:, :, None]
    along = (h * x).sum(dim=-1, keepdim=True).div_(-h.shape[-1])
    return h.addcmul_(x, along).mul_(rstd[:, :, None])


def _split(x: Tensor, heads: int) -> Tensor:
    """Split into heads: (prompt, token, row, ctx_dim) → (prompt, head, token, row, head_dim)."""
    return x.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4).contiguous()


def _join(parts: list[Tensor]) -> Tensor:
    """Undo `_split` for queries, keys and values, one after the other: (prompt, token, row, parts · ctx_dim)."""
    prompts, heads, tokens, rows, width = parts[0].shape
    joined = parts[0].new_empty(prompts, tokens, rows, len(parts), heads, width)
    for i, part in enumerate(parts):
        joined[:, :, :, i] = part.permute(0, 2, 3, 1, 4)
    return joined.flatten(3)


def _add_at(h: Tensor, ends: Tensor, rows: Tensor) -> Tensor:
    """Add one row per class to its end-of-text token, in place."""
    if ends.ndim == 1:
        return h.index_add_(1, ends, rows)
    return h.scatter_add_(1, ends[:, :, None, None].expand_as(rows), rows)


def _spans(place: Layout, *, last: bool) -> tuple[Span, ...]:
    return place.last_spans if last else place.spans


def _scores_vjp(tape: BlockTape, attended: Tensor, place: Layout, *, last: bool) -> Tensor:
    """Pull back through attention's weighted sum and softmax: (prompt, head, query, row, 1 + n_ctx + widest)."""
    prefix, rows = tape.k_prefix.shape[2], attended.shape[3]
    scores = attended.new_zeros(*attended.shape[:4], tape.shares.shape[-1])
    scores[..., :prefix] = (attended.flatten(2, 3) @ tape.v_prefix.transpose(-1, -2)).unflatten(2, (-1, rows))
    for span in _spans(place, last=last):
        suffix_scores = by_class(attended, span.queries, span).flatten(3, 4) @ by_class(
            tape.v, span.keys, span
        ).transpose(-1, -2)
        suffix_scores = suffix_scores.unflatten(3, (-1, rows)).flatten(2, 3)
        scores[:, :, span.queries, :, prefix : prefix + span.length] = suffix_scores
    shares = tape.shares[:, :, :, None]
    scores -= (scores * shares).sum(dim=-1, keepdim=True)
    return scores.mul_(shares)


def _prefix_vjp(tape: BlockTape, attended: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Compute gradients of the context's keys and values, from all rows that attend to them; SOS is a constant."""
    prefix, rows = tape.k_prefix.shape[2], attended.shape[3]
    to_context = scores[..., 1:prefix].transpose(-1, -2).flatten(3)  # (prompt, head, query, n_ctx · row)
    d_k = (to_context.transpose(-1, -2) @ tape.q).unflatten(2, (-1, rows))
    d_v = (tape.shares[..., 1:prefix].transpose(-1, -2) @ attended.flatten(3)).unflatten(3, (rows, -1))
    return d_k, d_v


def _context_input_vjp(
    tape: BlockTape, attended: Tensor, scores: Tensor, block: FoldedBlock, place: Layout, *, last: bool
) -> Tensor:
    """Compute the gradient of the context tokens that enter the first block."""
    prefix, n_ctx, rows = tape.k_prefix.shape[2], place.n_ctx, attended.shape[3]
    parts = list(_prefix_vjp(tape, attended, scores))
    weight = block.qkv.weight
    if last:  # with a single block, no context token is a query
        weight = weight[weight.shape[1] :]
    else:
        d_q = scores[:, :, :n_ctx, :, :prefix].flatten(2, 3) @ tape.k_prefix
        parts = [d_q.unflatten(2, (-1, rows)), *parts]
    return _through_norm(pull(_join(parts), weight), tape.x_1, tape.rstd_1)


def _input_vjp(
    tape: BlockTape, attended: Tensor, scores: Tensor, block: FoldedBlock, place: Layout, *, last: bool
) -> Tensor:
    """Compute the gradient of a block's normalised inputs, for all tokens: (prompt, token, row, ctx_dim)."""
    prefix, rows = tape.k_prefix.shape[2], attended.shape[3]
    d_q = (scores[..., :prefix].flatten(2, 3) @ tape.k_prefix).unflatten(2, (-1, rows))
    d_k, d_v = (tape.k.new_empty(*tape.k.shape[:3], rows, tape.k.shape[3]) for _ in range(2))
    d_k[:, :, : place.n_ctx], d_v[:, :, : place.n_ctx] = _prefix_vjp(tape, attended, scores)
    for span in _spans(place, last=last):
        suffix_scores = by_class(scores[..., prefix : prefix + span.length], span.queries, span)  # …, query, row, key
        q, shares = (by_class(x, span.queries, span) for x in (tape.q, tape.shares[..., prefix : prefix + span.length]))
        keys = suffix_scores.flatten(3, 4) @ by_class(tape.k, span.keys, span)
        d_q[:, :, span.queries] += keys.unflatten(3, (-1, rows)).flatten(2, 3)
        d_keys = suffix_scores.transpose(-1, -2).flatten(4).transpose(-1, -2) @ q
        d_k[:, :, span.keys] = d_keys.unflatten(3, (-1, rows)).flatten(2, 3)
        d_values = shares.transpose(-1, -2) @ by_class(attended, span.queries, span).flatten(4)
        d_v[:, :, span.keys] = d_values.unflatten(4, (rows, -1)).flatten(2, 3)
    if not last:
        return pull(_join([d_q, d_k, d_v]), block.qkv.weight)
    width = block.qkv.weight.shape[1]
    h = pull(_join([d_k, d_v]), block.qkv.weight[width:])
    return _add_at(h, place.ends, pull(_join([d_q]), block.qkv.weight[:width]))
