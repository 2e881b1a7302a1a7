"""The text tower of an open_clip model: its plain forward pass, and its weights if classes can share a prefix.

This module recognises open_clip's classes by their names, so that it need not import open_clip. Before the weights are
used, `learners.context` compares their features with those of the tower itself.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fl_dualpriv.models.text.text_stack import Activation, Linear, TextBlock, TextStack, read_linear, read_norm

_READ_AT_END = ("argmax", "eos")


class OpenClipText:
    """A frozen text tower that takes token embeddings.

    Attributes:
        token_embedding: Table of token embeddings.
        context_length: Length of the longest text, in tokens.
        pool_type: Token at which the feature is read: ``argmax`` or ``eos`` (end of text), ``first``, ``last``.
        causal: True if a token attends only to itself and the tokens before it.
        reads_end: True if the feature is read at the end of text.
        fills_rows: True if rows must have their full length, because the tower reads tokens after the end of text.
        plain_reason: Reason why classes cannot share the prefix of a prompt; empty if they can.
        stack: The weights, or None if ``plain_reason`` is not empty.
    """

    def __init__(self, model: nn.Module) -> None:
        tower: Any = getattr(model, "text", model)  # CustomTextCLIP has a separate module, CLIP holds the parts itself
        self.token_embedding: nn.Embedding = tower.token_embedding
        self.context_length: int = tower.context_length
        self.pool_type: str = getattr(tower, "pool_type", None) or tower.text_pool_type
        self.eos_id: int = tower.eos_id if hasattr(tower, "eos_id") else tower.text_eos_id
        self._tower, self._mask = tower, tower.attn_mask
        self.causal = _is_causal(tower.attn_mask)
        self.reads_end = self.pool_type in _READ_AT_END
        self.fills_rows = not (self.causal and self.reads_end)
        self.plain_reason = self._why_plain()
        self.stack = None if self.plain_reason else _read_stack(tower)

    @property
    def ctx_dim(self) -> int:
        """Width of a token embedding."""
        return self.token_embedding.embedding_dim

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        projection = self._tower.text_projection
        if projection is None:
            return self.ctx_dim
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    def encode(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Compute text features: (n, token, ctx_dim) → (n, embed_dim); see `Backbone.encode_embeddings`."""
        tower, length = self._tower, embeddings.shape[1]
        mask = None if self._mask is None else self._mask[:length, :length]
        x = tower.transformer(embeddings + tower.positional_embedding[:length], attn_mask=mask)
        x = tower.ln_final(x)
        if self.reads_end:
            x = x[torch.arange(x.shape[0], device=x.device), end.to(x.device)]
        else:
            x = x[:, 0 if self.pool_type == "first" else -1]
        if tower.text_projection is None:
            return x
        return tower.text_projection(x) if isinstance(tower.text_projection, nn.Module) else x @ tower.text_projection

    def _why_plain(self) -> str:
        if not self.causal:
            return "its text tower is not causal"
        if not self.reads_end:
            return f"its text feature is read at the {self.pool_type} token, not at the end of text"
        blocks = list(self._tower.transformer.resblocks)
        if not blocks or not all(_is_default(block) for block in blocks):
            return "its text tower has custom blocks"
        if len({block.attn.num_heads for block in blocks} | {None}) != 2:
            return "its text blocks differ in their number of heads"
        activations = {_activation(block.mlp.gelu) for block in blocks}
        if None in activations or len(activations) != 1:
            return f"its text blocks have another activation, {type(blocks[0].mlp.gelu).__name__}"
        if not _is_norm(self._tower.ln_final):
            return "its final norm is not a plain layer norm"
        return ""


def _is_causal(mask: Tensor | None) -> bool:
    if mask is None:
        return False
    return torch.equal(mask, torch.full_like(mask, float("-inf")).triu(1))


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None


def _is_default(block: Any) -> bool:
    """True if ``block`` is a plain pre-norm block, with or without layer scales."""
    if type(block).__name__ != "ResidualAttentionBlock" or type(block.attn) is not nn.MultiheadAttention:
        return False
    attention: nn.MultiheadAttention = block.attn
    return (
        attention.in_proj_weight is not None
        and attention.in_proj_bias is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and list(block.mlp._modules) == ["c_fc", "gelu", "c_proj"]
        and _is_norm(block.ln_1)
        and _is_norm(block.ln_2)
        and all(
            type(scale) is nn.Identity or type(scale).__name__ == "LayerScale" for scale in (block.ls_1, block.ls_2)
        )
    )


def _activation(module: nn.Module) -> Activation | None:
    if type(module).__name__ == "QuickGELU":
        return "quick_gelu"
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return None


@torch.no_grad()
def _read_stack(tower: Any) -> TextStack:
    blocks = tuple(_read_block(block) for block in tower.transformer.resblocks)
    first = tower.transformer.resblocks[0]
    activation = _activation(first.mlp.gelu)
    assert activation is not None  # `_why_plain` has checked it
    return TextStack(
        blocks=blocks,
        heads=first.attn.num_heads,
        activation=activation,
        positions=tower.positional_embedding.detach(),
        final=read_norm(tower.ln_final),
        projection=_read_projection(tower.text_projection),
    )


def _read_block(block: Any) -> TextBlock:
    attention = block.attn
    return TextBlock(
        ln_1=read_norm(block.ln_1),
        qkv=Linear(weight=attention.in_proj_weight.detach(), bias=attention.in_proj_bias.detach()),
        out=_scaled(read_linear(attention.out_proj), block.ls_1),
        ln_2=read_norm(block.ln_2),
        up=read_linear(block.mlp.c_fc),
        down=_scaled(read_linear(block.mlp.c_proj), block.ls_2),
    )


def _scaled(linear: Linear, scale: Any) -> Linear:
    """Return γ (x Wᵀ + b) as one linear map."""
    if type(scale) is nn.Identity:
        return linear
    gamma = scale.gamma.detach()
    return Linear(weight=gamma[:, None] * linear.weight, bias=gamma * linear.bias)


def _read_projection(projection: Tensor | nn.Linear | None) -> Linear | None:
    if projection is None:
        return None
    if isinstance(projection, nn.Linear):
        return read_linear(projection)
    weight = projection.detach().T.contiguous()  # once here, not in every product
    return Linear(weight=weight, bias=weight.new_zeros(len(weight)))
