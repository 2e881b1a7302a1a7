"""Clip rows, sum them, and say how much one row can change the sum; in floats, or in integers on a grid.

With integer arithmetic one grid unit is ``clip_norm / GRID_STEPS``: the clipped rows are cut down to whole units, their
sums are exact, and with integer noise (`rounded_gaussian`) what is released is an integer whatever the data are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_dualpriv.privacy.limits import check_clip_norm

Arithmetic = Literal["float", "integer"]

GRID_STEPS = 2**20  # units in a clip norm: an entry loses less than a millionth of it
MOST_ROWS = 2**32  # rows of norm 2**20 add up to less than 2**52: exact in float64, with as much room for noise
_ROUNDING = (
    2.0**-20
)  # relative, of the norms in `trusting_sum`, with room to spare: what respects its bound is not touched
_SHRINK = 1 - 2.0**-20  # a row over the bound by rounding is under it after this


def clip_rows(rows: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Scale each row to an L2 norm of at most ``clip_norm``.

    Guarantee:
        Rows do not mix: row i of the result depends on row i alone. Its norm is at most ``clip_norm`` up to float64
        rounding (the work is done in float64, where the squares of float32 numbers cannot overflow; see
        `check_clip_norm` for float64 rows of any size). A row with a non-finite entry, or with a norm beyond 1.3e154,
        becomes zero, which keeps the bound and drops nobody else.

    Args:
        rows: (batch, …); each row is one example's gradient or one client's update.
        clip_norm: Bound C in the units of ``rows``, 1e-30 to 1e30.

    Returns:
        The clipped rows, float64, and the norms before clipping, (batch,): per example, so not private.

    Raises:
        ValueError: If ``clip_norm`` is not between 1e-30 and 1e30.

    Reference:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    check_clip_norm(clip_norm)
    flat = rows.flatten(1).to(torch.float64)  # not reshape(.., -1): a batch may be empty
    finite = torch.isfinite(flat).all(dim=1)
    # NaN times zero is NaN: bad rows are replaced, not multiplied away.
    flat = torch.where(finite[:, None], flat, torch.zeros_like(flat))
    norms = torch.linalg.vector_norm(flat, dim=1)
    scale = torch.clamp(clip_norm / torch.clamp(norms, min=torch.finfo(torch.float64).tiny), max=1.0)
    return (flat * scale[:, None]).reshape(rows.shape), norms


def integer_rows(rows: Tensor, clip_norm: float) -> Tensor:
    """Clip each row and cut its entries down, towards zero, to whole grid units of ``clip_norm / GRID_STEPS``.

    Guarantee:
        As `clip_rows`, and exact: entries are integers (in float64) and each row's Σ q² is at most GRID_STEPS², checked
        in integers, since sums of squares up to 2**53 are exact in any order. A row that float error has left above
        the bound is shrunk and cut again; were that not enough, it would be zero.

    Args:
        rows: (batch, …).
        clip_norm: Bound C in the units of ``rows``, 1e-30 to 1e30.

    Returns:
        Integers in float64, in grid units.

    Raises:
        ValueError: If ``clip_norm`` is not between 1e-30 and 1e30.
    """
    clipped, _ = clip_rows(rows, clip_norm)
    return cut_rows(clipped.flatten(1) / clip_norm * GRID_STEPS).reshape(rows.shape)


def cut_rows(scaled: Tensor) -> Tensor:
    """Cut rows (batch, entry), in grid units, down to integers of norm GRID_STEPS at most, whatever their norm is."""
    whole = torch.trunc(scaled)
    over = _is_over(whole)
    if bool(over.any()):
        whole = torch.where(over[:, None], torch.trunc(scaled * _SHRINK), whole)
        whole = torch.where(_is_over(whole)[:, None], 0.0, whole)
    return whole


def _is_over(whole: Tensor) -> Tensor:
    # Exact in any order while it is below 2**53; rounded above that, and still above the bound.
    return torch.linalg.vecdot(whole, whole) > GRID_STEPS**2


def check_exact(rows: int) -> None:
    """Refuse to add up so many rows that integer sums could leave the exact range of float64.

    Args:
        rows: A public bound on the number of rows in one sum.

    Raises:
        ValueError: If there are 2**32 or more.
    """
    if rows >= MOST_ROWS:
        raise ValueError(f"{rows} rows in a sum; fewer than 2**32 add up without rounding one of them away")


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped rows.

    Attributes:
        value: Shape of one row, float64. Not private until noise is added.
        sensitivity: How far ``value`` can move in L2 norm when one row is added or removed, in the units of ``value``.
        grid: Integer arithmetic: ``value`` and ``sensitivity`` are whole numbers of units of this size; None: floats.
    """

    value: Tensor
    sensitivity: float
    grid: float | None = None


def as_clipped_sum(value: Tensor, clip_norm: float, arithmetic: Arithmetic) -> ClippedSum:
    """Say what a sum of clipped rows is: of `clip_rows` in floats, of `integer_rows` in integers."""
    if arithmetic == "float":
        return ClippedSum(value=value, sensitivity=clip_norm)
    return ClippedSum(value=value, sensitivity=float(GRID_STEPS), grid=clip_norm / GRID_STEPS)


def bounded_rows(rows: Tensor, clip_norm: float, arithmetic: Arithmetic) -> Tensor:
    """`clip_rows` or `integer_rows`: the terms of a clipped sum."""
    return clip_rows(rows, clip_norm)[0] if arithmetic == "float" else integer_rows(rows, clip_norm)


def clipped_sum(rows: Tensor, clip_norm: float, arithmetic: Arithmetic = "float") -> ClippedSum:
    """Clip each row and add the rows up. A *sum*: nothing here is divided by how many rows there are.

    Guarantee:
        Adding or removing one row moves the value by at most ``clip_norm``: it is the sum of independent per-row
        terms, each of norm at most ``clip_norm``. No rows give zero. In integers this holds exactly, and the sum is
        the same number in whatever order fewer than MOST_ROWS rows are added.
    """
    return as_clipped_sum(bounded_rows(rows, clip_norm, arithmetic).sum(dim=0), clip_norm, arithmetic)


def client_sum(updates: Tensor, weights: Tensor, clip_norm: float) -> ClippedSum:
    """Clip each client's update, weigh it, cut it down to the grid and add up.

    Guarantee:
        Adding or removing a client moves the value by an integer vector of norm at most GRID_STEPS, exactly, for any
        weights in [0, 1]: the weight comes before the cut.

    Args:
        updates: (client, …).
        weights: (client,), each in [0, 1].
        clip_norm: S, in the units of ``updates``, 1e-30 to 1e30.
    """
    clipped, _ = clip_rows(updates, clip_norm)
    shape = (-1, *[1] * (updates.dim() - 1))
    return clipped_sum(clipped * weights.to(torch.float64).reshape(shape), clip_norm, "integer")


def trusting_sum(uploads: Tensor, counts: Tensor, unit_bound: float) -> ClippedSum:
    """Add up clients' own integer sums of clipped records, each bounded by what its (public) records can reach.

    Guarantee:
        An upload of integers of norm at most ``counts`` · GRID_STEPS goes in as it is, so one record moves the value
        by exactly its own integer row. What a client sends against the rules is cut down to integers within that
        bound: it can move no other client's numbers, nor leave the exact range.

    Args:
        uploads: (client, …), finite, in grid units.
        counts: (client,), number of records, >= 0.
        unit_bound: What GRID_STEPS grid units are in the units of the result: the bound on one record's influence.
    """
    flat = uploads.flatten(1).to(torch.float64)
    limits = counts.to(torch.float64) * GRID_STEPS
    norms = torch.linalg.vector_norm(flat, dim=1)
    scale = torch.where(norms > limits * (1 + _ROUNDING), limits / norms, 1.0)
    whole = torch.trunc(flat * scale[:, None]).reshape(uploads.shape)
    return as_clipped_sum(whole.sum(dim=0), unit_bound, "integer")
