"""Low-rank factors of the personal prompt p_L = u·v + r, and the moves they allow (DP-FPL, arXiv:2501.13904).

Everything here is applied to released prompts and *noised* gradients, so it is post-processing and costs no ε.
Symbols: the paper's u is (n_ctx, k) and v is (k, ctx_dim); ours have orthonormal columns and rows, and the factor that
carries the scale is uᵀp_L, so that u·v below stands for u uᵀ p_L, the projection of p_L on its leading rank-k part.
Leading dimensions, where there are any, are clients: each is treated on its own.
"""

import torch
from torch import Tensor


def subspace_bases(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration towards the leading rank-k subspaces of ``matrix``.

    Args:
        matrix: (n_ctx, ctx_dim).
        start: (k, ctx_dim), the previous v; warm starts make the iterations add up over steps.

    Returns:
        u with orthonormal columns, (n_ctx, k), and v with orthonormal rows, (k, ctx_dim).

    Reference:
        Yu et al. 2021 (RGP), arXiv:2106.09352, Algorithm 2; DP-FPL Algorithm 1, "Factorize".
    """
    u, _ = torch.linalg.qr(matrix @ start.mT)
    v, _ = torch.linalg.qr(matrix.mT @ u)
    return u, v.mT


def tangent_projection(gradient: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Project a gradient on the tangent space of the rank-k matrices at u·v: G vᵀv + u uᵀG − u uᵀG vᵀv.

    An orthogonal projection of rank k(n_ctx + ctx_dim − k), so it keeps that share of isotropic noise (DP-FPL Eq. 4).

    Args:
        gradient: G, (n_ctx, ctx_dim).
        u: Orthonormal columns, (n_ctx, k).
        v: Orthonormal rows, (k, ctx_dim).
    """
    rows = gradient @ v.mT @ v
    return rows + u @ (u.mT @ (gradient - rows))


def cut_to_rank(matrix: Tensor, u: Tensor) -> Tensor:
    """U uᵀ matrix: the part of ``matrix`` in the span of u, of rank at most k; what is cut off is the residual r."""
    return u @ (u.mT @ matrix)
