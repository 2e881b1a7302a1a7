"""Low-rank factors of the personal prompt p_L = u·v + r, and the moves they allow (DP-FPL, arXiv:2501.13904).

All functions take released prompts and *noised* gradients, so they are post-processing and cost no ε.

Symbols: the paper's u is (n_ctx, k) and v is (k, ctx_dim). Here u has orthonormal columns and v orthonormal rows, and
the factor that carries the scale is uᵀp_L. So u·v below stands for u uᵀ p_L, the projection of p_L on its leading
rank-k part. Leading dimensions, where there are any, are clients: each client is treated separately.
"""

import torch
from torch import Tensor


def subspace_bases(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Make one power iteration towards the leading rank-k subspaces of ``matrix``.

    Args:
        matrix: Matrix (n_ctx, ctx_dim).
        start: Previous v, (k, ctx_dim); with warm starts the iterations add up over steps.

    Returns:
        u with orthonormal columns, (n_ctx, k), and v with orthonormal rows, (k, ctx_dim).

    Reference:
        Yu et al. 2021 (RGP), arXiv:2106.09352, Algorithm 2; DP-FPL Algorithm 1, "Factorize".
    """
    u, _ = torch.linalg.qr(matrix @ start.mT)
    v, _ = torch.linalg.qr(matrix.mT @ u)
    return u, v.mT


def personal_bases(personal: Tensor, row_basis: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the subspace bases of p_L, (client, n_ctx, k) and (client, k, ctx_dim).

    While p_L is zero it has no subspace, and the bases of the first noised gradient are used.
    """
    moved = personal.flatten(1).any(dim=1)[:, None, None]
    return subspace_bases(torch.where(moved, personal, gradient), row_basis)


def tangent_projection(gradient: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Project a gradient on the tangent space of the rank-k matrices at u·v: G vᵀv + u uᵀG − u uᵀG vᵀv.

    This is an orthogonal projection of rank k(n_ctx + ctx_dim − k), so it keeps that share of isotropic noise (DP-FPL
    Eq. 4).

    Args:
        gradient: G, (n_ctx, ctx_dim).
        u: Basis with orthonormal columns, (n_ctx, k).
        v: Basis with orthonormal rows, (k, ctx_dim).
    """
    rows = gradient @ v.mT @ v
    return rows + u @ (u.mT @ (gradient - rows))


def cut_to_rank(matrix: Tensor, u: Tensor) -> Tensor:
    """Return u uᵀ ``matrix``, its part in the span of u, of rank at most k; the rest is the residual r."""
    return u @ (u.mT @ matrix)
