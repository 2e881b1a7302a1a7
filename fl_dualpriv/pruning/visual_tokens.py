"""Prune patch tokens inside a CLIP image tower and fuse the rest into one.

Dual-Priv Pruning (arXiv:2506.07077, Mechanism 1) prunes behind the encoder, for a language model that reads the patch
tokens. A CLIP classifier reads only the final CLS token, so pruning must sit between two blocks to have an effect. This
is the form of EViT (Liang et al. 2022, arXiv:2202.07800), not the paper's own.

Which tokens survive is decided inside one image from public frozen weights. It is a map applied to each example by
itself, so it costs no privacy; it must therefore never look across the batch.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError

_OFF = "set pruning.visual-keep-ratio = 1"


class TokenPruner(Protocol):
    """Shortens the patch sequence of each image by itself.

    Guarantee owed by an implementation: row i of the result depends on row i of the arguments alone, and CLS stays
    first and unchanged.
    """

    @property
    def layer(self) -> int:
        """Number of blocks that see every patch; the attention comes from the last of them."""
        ...

    def keeps_all(self, n_patches: int) -> bool:
        """Whether the pruner would leave ``n_patches`` patches as they are."""
        ...

    def __call__(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """(n, 1 + patch, dim) and CLS attention (n, patch) → (n, 1 + fewer, dim)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClsAttentionPruner:
    """Keep the patches that CLS attends to most, fuse the others into one token.

    Args:
        keep_ratio: Share of patch tokens kept, in (0, 1]; ``ceil(keep_ratio * n_patches)`` stay. 1 switches it off.
        layer: Prune after this many blocks, >= 1 and below the tower's depth.

    Raises:
        ConfigError: If an argument is out of range.
    """

    keep_ratio: float
    layer: int

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"pruning.visual-keep-ratio = {self.keep_ratio}: must be in (0, 1]; 1 keeps every patch")
        if self.layer < 1:
            raise ConfigError(
                f"pruning.visual-layer = {self.layer}: must be at least 1, the number of blocks before pruning"
            )

    def n_kept(self, n_patches: int) -> int:
        """``ceil(keep_ratio * n_patches)``, at least 1."""
        # 0.07 * 100 is 7.000000000000001 in floating point and must stay 7.
        return max(1, math.ceil(round(self.keep_ratio * n_patches, 9)))

    def keeps_all(self, n_patches: int) -> bool:
        """See `TokenPruner`."""
        return self.n_kept(n_patches) >= n_patches

    def __call__(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """See `TokenPruner`: CLS, the kept patches in their original order, then the fused token.

        The fused token is the mean of the dropped ones weighted by their attention. Equal attention keeps the earlier
        patch. The choice and the weights carry no gradient.
        """
        patches, dim = tokens[:, 1:], tokens.shape[-1]
        attention = attention.detach()
        n_kept = self.n_kept(patches.shape[1])
        ranking = attention.argsort(dim=1, descending=True, stable=True)
        kept, dropped = ranking[:, :n_kept].sort(dim=1).values, ranking[:, n_kept:].sort(dim=1).values
        weights = attention.gather(1, dropped)
        total = weights.sum(dim=1, keepdim=True)
        # Attention can underflow to zero for every dropped patch; a plain mean is then the limit.
        weights = torch.where(total == 0, torch.full_like(weights, 1 / max(1, weights.shape[1])), weights / total)

        def take(index: Tensor) -> Tensor:
            return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, dim))

        fused = (weights.unsqueeze(-1) * take(dropped)).sum(dim=1, keepdim=True)
        return torch.cat([tokens[:, :1], take(kept), fused], dim=1)


def check_prunable(visual: nn.Module, pruner: TokenPruner) -> None:
    """Raise ConfigError unless the tower is open_clip's default ViT, deep enough for ``pruner``."""
    tower = type(visual).__name__
    if not (hasattr(visual, "_embeds") and hasattr(visual, "_pool")):
        raise ConfigError(f"visual token pruning needs open_clip's default ViT; this image tower is a {tower}; {_OFF}")
    vit: Any = visual
    if vit.attn_pool is not None or vit.pool_type != "tok":
        raise ConfigError(
            f"visual token pruning needs an image tower that reads its CLS token; this one pools otherwise; {_OFF}"
        )
    blocks = vit.transformer.resblocks
    if not all(isinstance(block.attn, nn.MultiheadAttention) and block.attn.batch_first for block in blocks):
        raise ConfigError(f"visual token pruning cannot read the custom attention blocks of this image tower; {_OFF}")
    if pruner.layer >= len(blocks):
        raise ConfigError(
            f"pruning.visual-layer = {pruner.layer}: this image tower has {len(blocks)} blocks, and at least one "
            f"must follow; choose 1 to {len(blocks) - 1}, or {_OFF}"
        )


@torch.no_grad()
def cls_attention(block: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of CLS to each patch in ``block``, mean over heads.

    The fused attention kernels return no weights; only the CLS row is computed here, from the block's own projections.

    Args:
        block: A residual block with ``ln_1`` and an `nn.MultiheadAttention` ``attn``.
        tokens: What the block reads, (n, 1 + patch, dim).

    Returns:
        (n, patch). A row sums to 1 minus the attention that CLS pays to itself.
    """
    layer: Any = block
    attn: nn.MultiheadAttention = layer.attn
    x = layer.ln_1(tokens)
    dim, heads = x.shape[-1], attn.num_heads
    assert attn.in_proj_weight is not None
    weight_q, weight_k, _ = attn.in_proj_weight.split(dim)
    bias_q, bias_k = (None, None) if attn.in_proj_bias is None else attn.in_proj_bias.split(dim)[:2]
    query = nn.functional.linear(x[:, 0], weight_q, bias_q).unflatten(-1, (heads, -1))
    keys = nn.functional.linear(x, weight_k, bias_k).unflatten(-1, (heads, -1))
    scores = torch.einsum("nhd,nthd->nht", query, keys) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1).mean(dim=1)[:, 1:]


def encode_pruned(visual: nn.Module, images: Tensor, pruner: TokenPruner) -> Tensor:
    """Image features of an open_clip ViT with ``pruner`` between two of its blocks.

    Guarantee:
        Per image: the values of one image never enter the result of another. A pruner that keeps every patch gives
        exactly ``visual(images)``.

    Args:
        visual: open_clip's default ViT.
        images: (n, 3, height, width).
        pruner: Where and what to prune.

    Returns:
        Features (n, embed_dim), not normalised.

    Raises:
        ConfigError: If the tower is of another kind, or not deep enough.
    """
    check_prunable(visual, pruner)
    vit: Any = visual
    if pruner.keeps_all(math.prod(vit.grid_size)):
        features = vit(images)
        return features[0] if vit.output_tokens else features
    tokens = vit._embeds(images)
    for depth, block in enumerate(vit.transformer.resblocks, start=1):
        if depth == pruner.layer:
            attention = cls_attention(block, tokens)
            tokens = pruner(block(tokens), attention)
        else:
            tokens = block(tokens)
    pooled, _ = vit._pool(tokens)
    return pooled if vit.proj is None else pooled @ vit.proj
