"""timm's Eva image towers (EVA, EVA-02, PE), whose attention rotates queries and keys by the position of their patch.

A tower is taken apart so that each token carries its rotation behind its channels, sine and cosine, (2 · head_dim).
Pruned patches then keep their positions. A fused token gets the mean direction of the rotations that it is made of.
The tokens before the patches are not rotated: their sine is 0 and their cosine 1.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.models.pruning.attention import AttentionParts
from fl_dualpriv.models.pruning.tokens import OFF
from fl_dualpriv.models.pruning.towers import ImageTower


def eva_tower(visual: Any) -> ImageTower:
    """Take the image tower of an open_clip model with timm's ``Eva`` apart.

    Raises:
        ConfigError: If its positions differ from block to block.
    """
    trunk = visual.trunk
    if getattr(trunk, "rope_mixed", False):
        raise ConfigError(f"visual token pruning cannot read positions that differ from block to block; {OFF}")
    prefix, width = trunk.num_prefix_tokens, trunk.embed_dim

    def embed(images: Tensor) -> Tensor:
        tokens, rotation = trunk._pos_embed(trunk.patch_embed(images))
        tokens = trunk.norm_pre(tokens)
        return tokens if rotation is None else torch.cat([tokens, _for_all(rotation, prefix, tokens)], dim=-1)

    def step(block: nn.Module, x: Tensor) -> Tensor:
        tokens, rotation = x[..., :width], x[..., width:]
        after = block(tokens, rope=rotation[:, None, prefix:] if rotation.shape[-1] else None)
        return torch.cat([after, rotation], dim=-1)

    return ImageTower(
        embed=embed,
        blocks=tuple(trunk.blocks),
        step=step,
        finish=lambda x: visual.head(trunk.forward_head(trunk.norm(x[..., :width]))),
        n_prefix=prefix,
        image_size=visual.image_size,
        n_patches=trunk.patch_embed.num_patches,
        reads_cls=trunk.global_pool == "token",
        read=_read,
        settle=lambda x: torch.cat([x[..., :width], _unit(x[..., width:])], dim=-1),
    )


def _for_all(rotation: Tensor, prefix: int, tokens: Tensor) -> Tensor:
    """Return the rotation of every token, (n, prefix + patch, 2 · head_dim), of those of the patches."""
    sine, cosine = rotation.to(tokens).chunk(2, dim=-1)
    sine = torch.cat([sine.new_zeros(prefix, sine.shape[-1]), sine])
    cosine = torch.cat([cosine.new_ones(prefix, cosine.shape[-1]), cosine])
    return torch.cat([sine, cosine], dim=-1).expand(len(tokens), -1, -1)


def _unit(rotation: Tensor) -> Tensor:
    """Return rotations of length 1; of opposite rotations that cancel, none."""
    sine, cosine = rotation.chunk(2, dim=-1)
    length = torch.sqrt(sine**2 + cosine**2)
    cancels = length < 1e-6
    length = torch.where(cancels, 1.0, length)
    return torch.cat([torch.where(cancels, 0.0, sine / length), torch.where(cancels, 1.0, cosine / length)], dim=-1)


def _read(block: Any) -> AttentionParts:
    """Read the attention of a block whose tokens carry their rotations.

    Raises:
        ConfigError: If the block is of another kind.
    """
    attn, kind = block.attn, type(block.attn).__name__
    if kind not in ("EvaAttention", "AttentionRope") or getattr(attn, "num_kv_groups", 1) != 1:
        raise ConfigError(f"visual token pruning cannot read the attention of this image tower, a {kind}; {OFF}")
    norm = nn.Identity() if type(block).__name__ == "EvaBlockPostNorm" else block.norm1
    width = (attn.qkv or attn.q_proj).in_features
    heads, head_dim, half = attn.num_heads, attn.head_dim, bool(getattr(attn, "rotate_half", False))

    def project(x: Tensor, place: int) -> Tensor:
        if attn.qkv is None:
            return (attn.q_proj, attn.k_proj)[place](x)
        rows = slice(place * heads * head_dim, (place + 1) * heads * head_dim)
        if kind == "AttentionRope":
            bias = attn.qkv.bias
            return nn.functional.linear(x, attn.qkv.weight[rows], None if bias is None else bias[rows])
        return nn.functional.linear(x, attn.qkv.weight[rows], (attn.q_bias, attn.k_bias)[place])

    def of(x: Tensor, place: int, after: nn.Module) -> Tensor:
        projected = after(project(x[..., :width], place).unflatten(-1, (heads, head_dim)))
        return _rotated(projected, x[..., width:], half=half)

    return AttentionParts(
        norm=lambda x: torch.cat([norm(x[..., :width]), x[..., width:]], dim=-1),
        query=lambda x: of(x, 0, attn.q_norm),
        key=lambda x: of(x, 1, attn.k_norm),
        scale=attn.scale,
    )


def _rotated(x: Tensor, rotation: Tensor, *, half: bool) -> Tensor:
    """Rotate (…, token, head, head_dim) by each token's rotation; unchanged if the tower has none."""
    if not rotation.shape[-1]:
        return x
    sine, cosine = rotation[..., None, :].chunk(2, dim=-1)
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cosine + turned * sine
