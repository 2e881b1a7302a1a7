"""Clip rows, sum them, and say how much one row can change the sum."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def clip_rows(rows: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Scale each row to an L2 norm of at most ``clip_norm``.

    Guarantee:
        Rows do not mix: row i of the result depends on row i alone. Its norm is at most ``clip_norm`` up to float64
        rounding (the work is done in float64, where the squares of float32 numbers cannot overflow). A row with a
        non-finite entry becomes zero, which keeps the bound and drops nobody else.

    Args:
        rows: (batch, …); each row is one example's gradient or one client's update.
        clip_norm: Bound C in the units of ``rows``; finite, > 0.

    Returns:
        The clipped rows, float64, and the norms before clipping, (batch,): per example, so not private.

    Raises:
        ValueError: If ``clip_norm`` is not finite and positive.

    Reference:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm = {clip_norm}; it must be finite and > 0")
    flat = rows.flatten(1).to(torch.float64)  # not reshape(.., -1): a batch may be empty
    finite = torch.isfinite(flat).all(dim=1)
    # NaN times zero is NaN: bad rows are replaced, not multiplied away.
    flat = torch.where(finite[:, None], flat, torch.zeros_like(flat))
    norms = torch.linalg.vector_norm(flat, dim=1)
    scale = torch.clamp(clip_norm / torch.clamp(norms, min=torch.finfo(torch.float64).tiny), max=1.0)
    return (flat * scale[:, None]).reshape(rows.shape), norms


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped rows.

    Attributes:
        value: Shape of one row, float64. Not private until noise is added.
        sensitivity: How far ``value`` can move in L2 norm when one row is added or removed.
    """

    value: Tensor
    sensitivity: float


def clipped_sum(rows: Tensor, clip_norm: float) -> ClippedSum:
    """Clip each row and add the rows up. A *sum*: nothing here is divided by how many rows there are.

    Guarantee:
        Adding or removing one row moves the value by at most ``clip_norm``: it is the sum of independent per-row
        terms, each of norm at most ``clip_norm``. No rows give zero.
    """
    clipped, _ = clip_rows(rows, clip_norm)
    return ClippedSum(value=clipped.sum(dim=0), sensitivity=clip_norm)


def clipped_feature_sum(classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, clip_norm: float) -> ClippedSum:
    """Clip and sum the gradients with respect to the *class features*, in closed form: noise space ``feature``.

    Example i's gradient is the outer product s·(softmax_i − y_i) x_iᵀ, of Frobenius norm s·‖softmax_i − y_i‖·‖x_i‖.

    Guarantee:
        As `clipped_sum`: the value is a sum of per-example terms of norm at most ``clip_norm`` each (float64), so one
        example moves it by at most that. An example with a non-finite value contributes zero.

    Args:
        classes: Unit-norm class features (n_cls, embed_dim), released before.
        x: Image features (batch, embed_dim); batch may be 0.
        y: Class ids (batch,).
        logit_scale: s.
        clip_norm: C, in units of this gradient; finite, > 0.

    Returns:
        (n_cls, embed_dim), float64.

    Raises:
        ValueError: If ``clip_norm`` is not finite and positive.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm = {clip_norm}; it must be finite and > 0")
    x = x.to(torch.float64)
    residual = torch.softmax(logit_scale * x @ classes.to(torch.float64).T, dim=1)
    residual = residual.scatter_add(1, y[:, None], torch.full_like(residual[:, :1], -1.0))
    norms = logit_scale * torch.linalg.vector_norm(residual, dim=1) * torch.linalg.vector_norm(x, dim=1)
    finite = torch.isfinite(norms)
    # NaN times zero is NaN: bad rows are replaced, not multiplied away.
    x, residual = (torch.where(finite[:, None], t, torch.zeros_like(t)) for t in (x, residual))
    scale = torch.clamp(clip_norm / torch.clamp(norms, min=torch.finfo(torch.float64).tiny), max=1.0)
    scale = torch.where(finite, scale, torch.zeros_like(scale))
    return ClippedSum(value=(logit_scale * scale[:, None] * residual).T @ x, sensitivity=clip_norm)
