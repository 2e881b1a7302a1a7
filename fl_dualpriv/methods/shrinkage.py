"""Shrinkage of a noisy matrix whose noise variance is known: by its norm, or by its singular values.

The noise is public, and the matrix is a sum of releases, so both functions are post-processing and cost no ε. Leading
dimensions, where there are any, are clients: each client is treated separately.
"""

import torch
from torch import Tensor


def shrink_by_norm(matrix: Tensor, variance: Tensor) -> Tensor:
    """Scale a matrix by the positive part of its share of signal, max(0, 1 − d·ν/‖D‖²)·D.

    The entries are D = X + noise, with d independent noise values of variance ν. Then E‖D‖² = ‖X‖² + d·ν, so the factor
    estimates ‖X‖²/(‖X‖² + d·ν), the best factor of all. James and Stein write d − 2 for d; the difference is 2/d.

    Args:
        matrix: D, (n_ctx, ctx_dim).
        variance: Noise variance ν >= 0 of each entry. Where it is 0, the result is D, bit by bit.

    Returns:
        The shrunk matrix. It is zero where ‖D‖² <= d·ν and ν > 0. A matrix of pure noise is zeroed about half the time,
        and is small otherwise.

    Reference:
        James and Stein 1961, "Estimation with quadratic loss"; the positive part is due to Baranchik 1964.
    """
    size = matrix.shape[-2] * matrix.shape[-1]
    energy = matrix.to(torch.float64).square().sum(dim=(-2, -1))
    signal = (energy - size * variance).clamp_min(0)
    factor = torch.where(variance > 0, signal / torch.where(energy > 0, energy, 1.0), 1.0)
    return matrix * factor[..., None, None].to(matrix.dtype)


def shrink_singular_values(matrix: Tensor, variance: Tensor) -> Tensor:
    """Shrink each singular value by the best shrinker for white noise of known variance, so that the rank follows.

    Let D = U diag(σ) Vᵀ be m × n, β = min(m, n)/max(m, n), s = √(ν·max(m, n)) and y = σ/s. The result is
    U diag(s·η(y)) Vᵀ with η(y) = √((y² − β − 1)² − 4β)/y if y >= 1 + √β, else 0. White noise has its largest singular
    value near y = 1 + √β, so a direction that noise hides is dropped. η is continuous there, and η(y)/y → 1 for large
    y.

    η minimises the squared Frobenius error in the limit of large matrices of fixed low rank. A prompt has few rows, so
    that this is an approximation: single noise values pass the threshold now and then, and are then small.

    Args:
        matrix: D, (n_ctx, ctx_dim).
        variance: Noise variance ν >= 0 of each entry. Where it is 0, the result is D, bit by bit.

    Returns:
        The shrunk matrix.

    Reference:
        Gavish and Donoho 2017, "Optimal Shrinkage of Singular Values", arXiv:1405.7511, Frobenius loss.
    """
    if not bool((variance > 0).any()):
        return matrix
    short, long = sorted(matrix.shape[-2:])
    beta = short / long
    scale = torch.where(variance > 0, (variance * long).sqrt(), 1.0)[..., None]
    u, values, vt = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    y = (values / scale).clamp_min(1.0)  # below 1 + √β the result is zero, so this only avoids 0/0
    shrunk = ((y.square() - beta - 1).square() - 4 * beta).clamp_min(0).sqrt() / y
    shrunk = torch.where(y >= 1 + beta**0.5, shrunk, 0.0) * scale
    result = (u * shrunk[..., None, :] @ vt).to(matrix.dtype)
    return torch.where(variance[..., None, None] > 0, result, matrix)
