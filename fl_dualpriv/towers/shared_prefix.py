"""A causal text tower for prompts that all classes share: the prefix runs once, each class adds its few name tokens.

Under a causal mask no token sees later tokens, so SOS and context have the same activations for every class. They run
once per prompt. The suffix of each class (name, the template's text after it, end of text) attends to the keys and
values of this prefix. Nothing is padded. SOS and the first block's suffix products do not depend on the prompt and are
computed once. The last block runs only for the end-of-text tokens. The result is exact: that of the plain tower with
less work. Both passes are written by hand, forward here and backward in `shared_prefix_vjp`, so that many prompts and
many cotangents form single matrix products and no operation falls back to a slow path.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.models.text.text_stack import TextStack
from fl_dualpriv.towers.folded import FoldedStack, activate, affine, fold, normalise, slope
from fl_dualpriv.towers.shared_prefix_tape import BlockTape, Layout, Tape, by_class, layout
from fl_dualpriv.towers.shared_prefix_vjp import SharedPrefixFeatures, by_class_id


@dataclass(frozen=True)
class _Constants:
    """Values that depend on n_ctx but not on a prompt: SOS keys and values per block, suffix inputs, first q, k, v."""

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
        lengths: Number of suffix tokens up to and including the end of text, (n_cls,).
    """

    def __init__(self, stack: TextStack, sos: Tensor, suffix: Tensor, lengths: Tensor) -> None:
        self.stack: FoldedStack = fold(stack)
        self._sos, self._suffix = sos, suffix
        # A stable sort keeps the order of classes with equal lengths. If all lengths are equal, it is the identity.
        self._order = torch.argsort(lengths, stable=True)
        self._lengths = lengths[self._order].tolist()
        self._groups = [(self._lengths.count(length), length) for length in sorted(set(self._lengths))]
        self._constants = functools.lru_cache(maxsize=4)(self._make_constants)

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory of a forward pass, in bytes.

        The pass keeps about 12 numbers per channel and token in each block. Working memory takes as much as one block.
        """
        tokens = sum(classes * length for classes, length in self._groups) + 8
        return 4 * tokens * self.stack.positions.shape[1] * 12 * (len(self.stack.blocks) + 1)

    def __call__(self, prompts: Tensor) -> SharedPrefixFeatures:
        """Run (prompt, n_ctx, ctx_dim), float32, through the tower."""
        blocks: list[BlockTape] = []
        constants, final = self._run(prompts.detach(), blocks)
        x, rstd = normalise(final, self.stack.eps)
        features = affine(x, self.stack.projection)
        norms = features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        tape = Tape(blocks, x, rstd, features / norms, norms)
        return SharedPrefixFeatures(self.stack, constants.layout, self._order, tape)

    def values(self, prompts: Tensor) -> Tensor:
        """Compute unit-norm class features (prompt, n_cls, embed_dim) and keep nothing for a backward pass."""
        _, final = self._run(prompts.detach(), None)
        features = affine(normalise(final, self.stack.eps)[0], self.stack.projection)
        return by_class_id(torch.nn.functional.normalize(features, dim=-1), self._order)

    @torch.no_grad()
    def _make_constants(self, n_ctx: int) -> _Constants:
        stack = self.stack
        place = layout(n_ctx, self._groups, self._suffix.device)
        sos = []
        x = self._sos[None] + stack.positions[:1]  # SOS attends only to itself, so its attention weight is 1
        for block in stack.blocks:
            qkv = affine(normalise(x, block.eps_1)[0], block.qkv)
            k, v = (_heads(t, stack.heads) for t in qkv.chunk(3, dim=-1)[1:])
            sos.append((k, v))
            x = x + affine(qkv.chunk(3, dim=-1)[2], block.out)
            x = x + affine(activate(affine(normalise(x, block.eps_2)[0], block.up), stack.activation), block.down)
        rows = [
            self._suffix[c, :length] + stack.positions[1 + n_ctx : 1 + n_ctx + length]
            for c, length in zip(self._order.tolist(), self._lengths, strict=True)
        ]
        suffix = torch.cat(rows)
        first = stack.blocks[0]
        return _Constants(place, sos, suffix, affine(normalise(suffix[None], first.eps_1)[0], first.qkv)[0])

    @torch.no_grad()
    def _run(self, prompts: Tensor, tape: list[BlockTape] | None) -> tuple[_Constants, Tensor]:
        """Run all blocks; return the end-of-text tokens before the final norm, (prompt, class row, ctx_dim)."""
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
    """Split into heads: (prompt, token, ctx_dim) → (prompt, head, token, head_dim)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2).contiguous()


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, place: Layout, *, last: bool
) -> tuple[Tensor, Tensor]:
    """Apply causal attention of every row to the prefix and its own suffix.

    Returns:
        Attention weights, and attended values (prompt, head, row, dim).
    """
    prefix = k_prefix.shape[2]
    scores = q.new_full((*q.shape[:3], prefix + place.widest), float("-inf"))
    scores[..., :prefix] = q @ k_prefix.transpose(-1, -2)
    if not last:
        # Context token i is at position 1 + i: it sees SOS and context tokens 0 … i.
        scores[:, :, : place.n_ctx, :prefix] += _after(place.n_ctx, prefix, 1, q.device)
    spans = place.last_spans if last else place.spans
    for span in spans:
        suffix_scores = by_class(q, span.queries, span) @ by_class(k, span.keys, span).transpose(-1, -2)
        if not last:
            suffix_scores += _after(span.length, span.length, 0, q.device)
        scores[:, :, span.queries, prefix : prefix + span.length] = suffix_scores.flatten(2, 3)
    shares = torch.softmax(scores, dim=-1)
    attended = shares[..., :prefix] @ v_prefix
    for span in spans:
        suffix_shares = by_class(shares[..., prefix : prefix + span.length], span.queries, span)
        attended[:, :, span.queries] += (suffix_shares @ by_class(v, span.keys, span)).flatten(2, 3)
    return shares, attended


@functools.lru_cache(maxsize=64)
def _after(rows: int, columns: int, diagonal: int, device: torch.device) -> Tensor:
    """Return the causal mask, with −∞ above the given diagonal."""
    return torch.full((rows, columns), float("-inf"), device=device).triu(diagonal + 1)
