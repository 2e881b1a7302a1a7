"""Run a prompt through a frozen text tower: SOS, context, class name, EOT → one feature per class.

With a causal mask the activations of SOS and the context are the same for every class, so `SharedPrefixTower` runs
them once and lets each class's few name tokens attend to the prefix's keys and values. Exact, and the default where the
tower allows it; `PlainTower` is the obvious form, for towers that do not and as the oracle in tests.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fl_dualpriv.backbones.open_clip import OpenClipBackbone, TextParts


class TextTower(Protocol):
    """Maps a context to class features."""

    def __call__(self, context: Tensor) -> Tensor:
        """(n_ctx, ctx_dim) → (n_cls, embed_dim), not normalised, differentiable in ``context``."""
        ...


class PlainTower:
    """Every class's whole sequence through the tower, cut after the longest one.

    Args:
        backbone: The frozen model.
        sos: Embedding of the start token, (1, ctx_dim).
        suffix: Embeddings of name tokens and EOT, padded, (n_cls, n_suffix, ctx_dim).
        suffix_lengths: Tokens up to and including EOT, (n_cls,).
    """

    def __init__(self, backbone: OpenClipBackbone, sos: Tensor, suffix: Tensor, suffix_lengths: Tensor) -> None:
        self._encode = backbone.encode_embeddings
        self._sos, self._suffix, self._lengths = sos, suffix, suffix_lengths

    def __call__(self, context: Tensor) -> Tensor:
        """See `TextTower`."""
        n_cls = self._suffix.shape[0]
        prefix = torch.cat([self._sos, context]).expand(n_cls, -1, -1)
        return self._encode(torch.cat([prefix, self._suffix], dim=1), prefix.shape[1] + self._lengths - 1)


class SharedPrefixTower:
    """The same function with the prefix computed once; arguments as `PlainTower`, with the tower's parts."""

    def __init__(self, parts: TextParts, sos: Tensor, suffix: Tensor, suffix_lengths: Tensor) -> None:
        self._parts, self._sos, self._suffix = parts, sos, suffix
        self._blocks: list[Any] = list(parts.transformer.get_submodule("resblocks").children())
        self._eot = suffix_lengths - 1
        self._rows = torch.arange(suffix.shape[0], device=suffix.device)

    def __call__(self, context: Tensor) -> Tensor:
        """See `TextTower`."""
        prefix = torch.cat([self._sos, context])
        n_prefix, n_suffix = prefix.shape[0], self._suffix.shape[1]
        positions = self._parts.positional_embedding
        p = prefix + positions[:n_prefix]
        s = self._suffix + positions[n_prefix : n_prefix + n_suffix]
        for block in self._blocks:
            p, s = _block(block, p, s)
        features = self._parts.ln_final(s[self._rows, self._eot])
        projection = self._parts.text_projection
        if projection is None:
            return features
        return projection(features) if isinstance(projection, nn.Module) else features @ projection


def _heads(x: Tensor, count: int) -> Tensor:
    """(..., token, dim) → (..., head, token, dim / head)."""
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def _block(block: Any, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """One pre-norm residual block on the prefix (token, dim) and the suffixes (class, token, dim).

    Attention is written out, not fused: its batched backward then has a rule on every device.
    """
    heads = block.attn.num_heads
    weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
    qp, kp, vp = (_heads(t, heads) for t in nn.functional.linear(block.ln_1(p), weight, bias).chunk(3, dim=-1))
    qs, ks, vs = (_heads(t, heads) for t in nn.functional.linear(block.ln_1(s), weight, bias).chunk(3, dim=-1))
    scale = qp.shape[-1] ** -0.5

    def causal(scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        return scores + torch.full((n, n), float("-inf"), device=scores.device).triu(1)

    attended_p = torch.softmax(causal(scale * qp @ kp.transpose(-1, -2)), dim=-1) @ vp
    to_prefix = scale * torch.einsum("chsd,hpd->chsp", qs, kp)
    to_suffix = causal(scale * qs @ ks.transpose(-1, -2))
    shares = torch.softmax(torch.cat([to_prefix, to_suffix], dim=-1), dim=-1)
    n_prefix = kp.shape[-2]
    attended_s = torch.einsum("chsp,hpd->chsd", shares[..., :n_prefix], vp) + shares[..., n_prefix:] @ vs
    p = p + block.ls_1(block.attn.out_proj(_merge(attended_p)))
    s = s + block.ls_1(block.attn.out_proj(_merge(attended_s)))
    return p + block.ls_2(block.mlp(block.ln_2(p))), s + block.ls_2(block.mlp(block.ln_2(s)))
