"""The frozen weights of a causal text transformer, in a form that is the same for every library. torch only."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A layer norm over the last dimension: weight and bias (d,)."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map x → x Wᵀ + b; weight (out, in) in the precision of the product, bias (out,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    """A pre-norm residual block: x + out(attention(qkv(ln_1 x))), then x + down(act(up(ln_2 x))).

    Layer scales, where a model has them, are folded into ``out`` and ``down``.
    """

    ln_1: Norm
    qkv: Linear
    """Queries, keys and values stacked, (3 d, d)."""
    out: Linear
    ln_2: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True)
class TextStack:
    """A text tower whose mask is causal and whose feature is read at the end of text.

    Attributes:
        blocks: Transformer blocks in the order in which they run.
        heads: Number of attention heads of every block.
        activation: Activation of the MLP.
        positions: Position embeddings, (context_length, ctx_dim).
        final: Norm before the projection.
        projection: Projection to the features, weight (embed_dim, ctx_dim); None if the model has none.
    """

    blocks: tuple[TextBlock, ...]
    heads: int
    activation: Activation
    positions: Tensor
    final: Norm
    projection: Linear | None

    def to_precision(self, dtype: torch.dtype) -> "TextStack":
        """Return the stack with its product weights in ``dtype``; norms, biases and positions keep their precision."""

        def cast(linear: Linear) -> Linear:
            return replace(linear, weight=linear.weight.to(dtype))

        blocks = tuple(
            replace(b, qkv=cast(b.qkv), out=cast(b.out), up=cast(b.up), down=cast(b.down)) for b in self.blocks
        )
        projection = None if self.projection is None else cast(self.projection)
        return replace(self, blocks=blocks, projection=projection)


def read_norm(module: nn.LayerNorm) -> Norm:
    """Return the weights of a layer norm."""
    return Norm(weight=module.weight.detach(), bias=module.bias.detach(), eps=module.eps)


def read_linear(module: nn.Linear) -> Linear:
    """Return the weights of a linear layer; a missing bias becomes zero."""
    weight = module.weight.detach()
    return Linear(weight=weight, bias=weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach())
