"""Attention weights of a block of an image tower, computed from the block's own projections.

The fused attention kernels return no weights, and those of transformers do not report that. This module does not depend
on them: it projects queries and keys again, and computes only the rows that it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.tokens import OFF

_QUERIES_AT_ONCE = 64
"""Number of queries that `mean_attention` handles at once. It bounds the scores, (n, head, query, token), in memory."""


@dataclass(frozen=True, kw_only=True)
class AttentionParts:
    """A block's self-attention up to its weights: ``softmax(scale · query(norm(x)) · key(norm(x))ᵀ)``.

    Attributes:
        norm: Function that the block applies to tokens before it projects them.
        query: Projection to queries, (…, dim) → (…, head, head_dim).
        key: Projection to keys, (…, dim) → (…, head, head_dim).
        scale: Factor on the scores.
    """

    norm: Callable[[Tensor], Tensor]
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    scale: float


def read_attention(block: nn.Module) -> AttentionParts:
    """Read the attention parts of a block.

    The block belongs to open_clip's or timm's default ViT, or to a CLIP or SigLIP of transformers.

    Raises:
        ConfigError: If the block is of another kind.
    """
    readers = {"ResidualAttentionBlock": _open_clip, "Block": _timm} | dict.fromkeys(
        (
            "CLIPEncoderLayer",
            "SiglipEncoderLayer",
            "MetaClip2EncoderLayer",
            "AltCLIPEncoderLayer",
            "ChineseCLIPVisionLayer",
        ),
        _transformers,
    )
    kind = type(block).__name__
    parts = readers[kind](block) if kind in readers else None
    if parts is None:
        raise ConfigError(
            f"visual token pruning cannot read the attention of this image tower: its blocks are custom ({kind}); {OFF}"
        )
    return parts


def _open_clip(block: Any) -> AttentionParts | None:
    attn = block.attn
    if not (isinstance(attn, nn.MultiheadAttention) and attn.batch_first and attn.in_proj_weight is not None):
        return None
    weights = attn.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    heads, width = attn.num_heads, attn.head_dim
    return AttentionParts(
        norm=block.ln_1,
        query=lambda x: nn.functional.linear(x, weights[0], biases[0]).unflatten(-1, (heads, width)),
        key=lambda x: nn.functional.linear(x, weights[1], biases[1]).unflatten(-1, (heads, width)),
        scale=width**-0.5,
    )


def _timm(block: Any) -> AttentionParts | None:
    attn = block.attn
    if type(attn).__name__ != "Attention":  # other classes rotate, mask or mix
        return None
    weights = attn.qkv.weight.chunk(3)
    biases = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    split = (attn.num_heads, attn.head_dim)
    return AttentionParts(
        norm=block.norm1,
        query=lambda x: attn.q_norm(nn.functional.linear(x, weights[0], biases[0]).unflatten(-1, split)),
        key=lambda x: attn.k_norm(nn.functional.linear(x, weights[1], biases[1]).unflatten(-1, split)),
        scale=attn.scale,
    )


def _transformers(layer: Any) -> AttentionParts:
    attn = layer.self_attn
    split = (attn.num_heads, attn.head_dim)
    return AttentionParts(
        norm=layer.layer_norm1,
        query=lambda x: attn.q_proj(x).unflatten(-1, split),
        key=lambda x: attn.k_proj(x).unflatten(-1, split),
        scale=attn.scale,
    )


@torch.no_grad()
def importance(parts: AttentionParts, tokens: Tensor, n_prefix: int, *, reads_cls: bool) -> tuple[Tensor, Tensor]:
    """Compute the attention that each patch receives in a block, and the patches' keys; both averaged over heads.

    Guarantee:
        Per image: row i depends only on row i of ``tokens``.

    Args:
        parts: Attention parts of the block.
        tokens: Tokens that the block reads, (n, prefix + patch, dim).
        n_prefix: Number of tokens before the patches: CLS, registers and others. They are attended to but not scored.
        reads_cls: True if the model reads CLS, the first token. A patch's score is then the attention from CLS.
            Otherwise (average or attention pooling, SigLIP) it is the mean attention from all tokens. The query of a
            pooling head is not used, because it is made for the last hidden state and says nothing about an earlier
            one.

    Returns:
        Attention float32 (n, patch), and keys (n, patch, head_dim).
    """
    x = parts.norm(tokens)
    keys = parts.key(x)
    query = parts.query(x[:, 0] if reads_cls else x)
    with torch.autocast(tokens.device.type, enabled=False):  # with bfloat16, scores would be equal more often
        attend = cls_attention if reads_cls else mean_attention
        attention = attend(query.float(), keys.float(), parts.scale)
        return attention[:, n_prefix:], keys[:, n_prefix:].float().mean(dim=2)


def cls_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Compute one query's attention, (n, head, head_dim) and (n, token, head, head_dim) → (n, token)."""
    scores = torch.einsum("nhd,nthd->nht", query, keys) * scale
    return scores.softmax(dim=-1).mean(dim=1)


def mean_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Compute the mean of all tokens' attention to each token: twice (n, token, head, head_dim) → (n, token).

    The mean is exact. It is summed over blocks of queries.
    """
    total = keys.new_zeros(keys.shape[:2])
    for some in queries.split(_QUERIES_AT_ONCE, dim=1):
        scores = torch.einsum("nqhd,nthd->nhqt", some, keys) * scale
        total += scores.softmax(dim=-1).sum(dim=(1, 2))
    return total / (queries.shape[1] * queries.shape[2])
