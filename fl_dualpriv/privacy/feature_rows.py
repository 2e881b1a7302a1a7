"""Clip and sum gradients with respect to the *class features*, in closed form, for noise space ``feature``.

Example i's gradient is the outer product s·(softmax_i − y_i) x_iᵀ, of Frobenius norm s·‖softmax_i − y_i‖·‖x_i‖. A
public class prior of the client adds its logarithm to the logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fl_dualpriv.privacy.clipping import GRID_STEPS, Arithmetic, ClippedSum, as_clipped_sum, cut_rows
from fl_dualpriv.privacy.limits import check_clip_norm

_MOST_ROWS = 256
_BLOCK_ENTRIES = 2**16  # entries of outer products at a time: half a MiB stays in a cache


def feature_blocks(
    classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both factors of each example's gradient, in blocks of one size for every batch; padding is zero.

    Guarantee:
        Row i is a function of ``classes``, the public ``log_prior`` and example i only, bit by bit: each cosine is a
        separate sum. No matrix kernel is used, because its rounding of a row may depend on the row's place or on the
        number of rows. The memory does not grow with a batch, whose size is private.

    Args:
        classes: Unit-norm class features (n_cls, embed_dim).
        x: Image features (batch, embed_dim); batch may be 0.
        y: Class ids (batch,).
        logit_scale: s.
        log_prior: Logarithm of the client's class prior, (n_cls,), a public constant; None adds nothing.

    Yields:
        s·(softmax_i − y_i), (row, n_cls), and x_i, (row, embed_dim), float64.
    """
    wide = classes.to(torch.float64)
    wide_prior = None if log_prior is None else log_prior.to(torch.float64)
    size = max(1, min(_MOST_ROWS, _BLOCK_ENTRIES // wide.numel()))
    for start in range(0, len(x), size):
        features, labels = x[start : start + size].to(torch.float64), y[start : start + size]
        lacking = size - len(features)
        if lacking:
            features = torch.cat([features, features.new_zeros(lacking, features.shape[1])])
            labels = torch.cat([labels, labels.new_zeros(lacking)])
        logits = logit_scale * (features[:, None] * wide).sum(dim=-1)
        if wide_prior is not None:
            logits.add_(wide_prior)
        residual = torch.softmax(logits, dim=1)
        residual = residual.scatter_add_(1, labels[:, None], torch.full_like(residual[:, :1], -1.0))
        if lacking:
            residual[-lacking:] = 0.0
        yield logit_scale * residual, features


def clipped_feature_sum(
    classes: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: float,
    clip_norm: float,
    arithmetic: Arithmetic = "float",
    log_prior: Tensor | None = None,
) -> ClippedSum:
    """Clip and sum the gradients with respect to the class features; arguments as `feature_blocks`.

    Guarantee:
        As in `clipped_sum`: the value is a sum of per-example terms of norm at most ``clip_norm`` each (float64), so
        one example moves it by at most that. An example with a non-finite value contributes zero. In integers the outer
        products are formed, some at a time, and each is cut down to the grid. One example then moves the value by
        exactly its own integer row, because all other rows are the same bit by bit without it. Integers are slower.

    Args:
        classes: Class features, which were released before.
        x: Image features, see `feature_blocks`.
        y: Class ids, see `feature_blocks`.
        logit_scale: s.
        clip_norm: C, in units of this gradient, 1e-30 to 1e30.
        arithmetic: Floats, or integers in units of ``clip_norm / GRID_STEPS``.
        log_prior: Log prior, see `feature_blocks`.

    Returns:
        The sum (n_cls, embed_dim), float64.

    Raises:
        ValueError: If ``clip_norm`` is not between 1e-30 and 1e30.
    """
    check_clip_norm(clip_norm)
    total = torch.zeros(classes.shape, dtype=torch.float64, device=classes.device)
    for residual, features in feature_blocks(classes, x, y, logit_scale, log_prior):
        left, right = clipped_factors(residual, features, clip_norm)
        if arithmetic == "float":
            total += left.T @ right
        else:
            total += integer_feature_rows(left, right, clip_norm).sum(dim=0)
    return as_clipped_sum(total, clip_norm, arithmetic)


def clipped_factors(residual: Tensor, x: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Return factors (row, n_cls) and (row, embed_dim) of the clipped gradients, zeros for a row that is not finite."""
    norms = torch.linalg.vector_norm(residual, dim=1) * torch.linalg.vector_norm(x, dim=1)
    finite = torch.isfinite(norms)
    # NaN times zero is NaN, so bad rows are replaced by zeros and not multiplied by zero.
    x, residual = (torch.where(finite[:, None], t, torch.zeros_like(t)) for t in (x, residual))
    scale = torch.clamp(clip_norm / torch.clamp(norms, min=torch.finfo(torch.float64).tiny), max=1.0)
    return torch.where(finite, scale, torch.zeros_like(scale))[:, None] * residual, x


def integer_feature_rows(left: Tensor, right: Tensor, clip_norm: float) -> Tensor:
    """Return clipped gradients in whole grid units, (row, n_cls, embed_dim) float64, of norm GRID_STEPS at most."""
    scaled = (left / clip_norm * GRID_STEPS)[:, :, None] * right[:, None, :]
    return cut_rows(scaled.flatten(1)).unflatten(1, (left.shape[1], right.shape[1]))
