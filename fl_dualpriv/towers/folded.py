"""A text stack with its norms' affine parts folded into the products that follow: fewer passes, the same function.

A product after a norm, W (γ ∘ x̂ + β) + b, equals W′ x̂ + b′ with W′ = W diag(γ) (I − 11ᵀ/d) and b′ = b + W β. In the
forward pass the centring factor changes nothing, because x̂ is centred. In the backward pass it saves the norm's mean
subtraction, because g W′ is centred.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_dualpriv.models.text.text_stack import Activation, Linear, Norm, TextStack
from fl_dualpriv.towers.products import prompt_products


@dataclass(frozen=True, kw_only=True)
class FoldedBlock:
    """A block on normalised inputs x̂; its query weights include the factor head_dim^-1/2."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear
    eps_1: float
    eps_2: float


@dataclass(frozen=True, kw_only=True)
class FoldedStack:
    """A whole folded tower; ``projection`` (embed_dim, ctx_dim) starts from the identity if the model has none."""

    blocks: tuple[FoldedBlock, ...]
    heads: int
    activation: Activation
    positions: Tensor
    projection: Linear
    eps: float


def _fold(norm: Norm, linear: Linear) -> Linear:
    weight = linear.weight.double()
    scaled = weight * norm.weight.double()
    centred = scaled - scaled.mean(dim=1, keepdim=True)
    bias = linear.bias.double() + weight @ norm.bias.double()
    return Linear(weight=centred.to(linear.weight.dtype).contiguous(), bias=bias.to(norm.weight.dtype))


def fold(stack: TextStack) -> FoldedStack:
    """Fold norms and the attention's scale; the arithmetic is float64, the result has the stack's precision."""
    width = stack.positions.shape[1]
    scale = torch.ones(3 * width, 1, dtype=torch.float64, device=stack.positions.device)
    scale[:width] = (width // stack.heads) ** -0.5
    blocks = []
    for block in stack.blocks:
        scaled = replace(
            block.qkv,
            weight=(block.qkv.weight.double() * scale).to(block.qkv.weight.dtype),
            bias=(block.qkv.bias.double() * scale[:, 0]).to(block.qkv.bias.dtype),
        )
        blocks.append(
            FoldedBlock(
                qkv=_fold(block.ln_1, scaled),
                out=block.out,
                up=_fold(block.ln_2, block.up),
                down=block.down,
                eps_1=block.ln_1.eps,
                eps_2=block.ln_2.eps,
            )
        )
    projection = stack.projection
    if projection is None:
        eye = torch.eye(width, device=stack.positions.device, dtype=stack.positions.dtype)
        projection = Linear(weight=eye, bias=torch.zeros_like(stack.final.bias))
    return FoldedStack(
        blocks=tuple(blocks),
        heads=stack.heads,
        activation=stack.activation,
        positions=stack.positions,
        projection=_fold(stack.final, projection),
        eps=stack.final.eps,
    )


def affine(x: Tensor, linear: Linear) -> Tensor:
    """Compute x wᵀ + b of each prompt, (prompt, …, ctx_dim); see `prompt_products`."""
    if linear.weight.dtype == x.dtype:
        return prompt_products(x, linear.weight.T, linear.bias)
    return prompt_products(x.to(linear.weight.dtype), linear.weight.T).to(x.dtype).add_(linear.bias)


def pull(gradient: Tensor, weight: Tensor) -> Tensor:
    """Compute g w, the product of the backward pass, of each prompt.

    The product is in the precision of ``weight``. The result has the type of ``gradient``, which is float32.
    """
    return prompt_products(gradient.to(weight.dtype), weight).to(gradient.dtype)


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x̂ and 1/σ over the last dimension."""
    centred, _, rstd = torch.native_layer_norm(x, [x.shape[-1]], None, None, eps)
    return centred, rstd


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Apply the MLP's activation."""
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return torch.nn.functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def slope(x: Tensor, kind: Activation) -> Tensor:
    """Compute the activation's derivative."""
    if kind == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return s * (1 + 1.702 * x * (1 - s))
    ones = torch.ones_like(x)
    return torch.ops.aten.gelu_backward(ones, x, approximate="tanh" if kind == "gelu_tanh" else "none")
