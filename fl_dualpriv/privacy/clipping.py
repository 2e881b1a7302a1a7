"""Clip rows, sum them, and state how much one row can change the sum, in floats or in integers on a grid.

With integer arithmetic one grid unit is ``clip_norm / GRID_STEPS``. The clipped rows are cut down to whole units, their
sums are exact, and with integer noise (`rounded_gaussian`) the released value is an integer for all data.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_dualpriv.privacy.limits import check_clip_norm

Arithmetic = Literal["float", "integer"]
ClipRule = Literal["flat", "normalised"]

GRID_STEPS = 2**20  # units in a clip norm: an entry loses less than a millionth of the clip norm
MOST_ROWS = 2**32  # rows of norm 2**20 add up to less than 2**52: exact in float64, with as much room for noise
# Relative tolerance of the norms in `trusting_sum`, far above their rounding error: an upload within its bound stays.
_ROUNDING = 2.0**-20
_SHRINK = 1 - 2.0**-20  # a row that rounding left above the bound is below it after this factor
NORMALISED_GAMMA = 0.01
"""γ of the rule ``normalised``, a public constant in the units of a row; the default of Bu et al."""


@dataclass(frozen=True)
class Clip:
    """Clip norm and clipping rule of rows.

    Guarantee:
        A row that is multiplied by its factor has a norm of at most C, for every norm N >= 0 (see `factors`). The
        factor of a row depends on only that row. So both rules have the sensitivity C.

    Attributes:
        norm: C, in the units of a row, 1e-30 to 1e30.
        rule: ``flat``: min(1, C/N), which leaves rows up to C unchanged. ``normalised``: C/(N + γ), so that nearly all
            rows get a norm just below C, small ones too.

    Raises:
        ValueError: If ``norm`` is out of range.

    Example:
        >>> Clip(1.0).factors(torch.tensor([0.5, 2.0], dtype=torch.float64))
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Reference:
        Abadi et al. 2016, arXiv:1607.00133 (flat); Bu et al. 2023, arXiv:2206.07136, AUTO-S (normalised).
    """

    norm: float
    rule: ClipRule = "flat"

    def __post_init__(self) -> None:
        check_clip_norm(self.norm)

    def factors(self, norms: Tensor) -> Tensor:
        """Return the factor of each row from its finite norm, float64.

        With ``normalised`` N·C/(N + γ) < C because γ > 0. In float64 that holds up to rounding, as for ``flat``.
        """
        if self.rule == "normalised":
            return self.norm / (norms + NORMALISED_GAMMA)
        return torch.clamp(self.norm / torch.clamp(norms, min=torch.finfo(torch.float64).tiny), max=1.0)


def clip_rows(rows: Tensor, clip: Clip | float) -> tuple[Tensor, Tensor]:
    """Scale each row to an L2 norm of at most the clip norm.

    Guarantee:
        Rows do not mix: row i of the result depends only on row i. Its norm is at most C up to float64
        rounding. The computation is in float64, where the squares of float32 numbers cannot overflow; see
        `check_clip_norm` for float64 rows of any size. A row with a non-finite entry, or with a norm beyond 1.3e154,
        becomes zero, which keeps the bound and drops no other row.

    Args:
        rows: Rows (batch, …), each the gradient of one example or the update of one client.
        clip: Clip norm C and rule; a number is the norm of the flat rule.

    Returns:
        The clipped rows, float64, and the norms before clipping, (batch,). The norms are per example, so not private.

    Raises:
        ValueError: If the clip norm is not between 1e-30 and 1e30.

    Reference:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.
    """
    clip = as_clip(clip)
    flat = rows.flatten(1).to(torch.float64)  # not reshape(.., -1): a batch may be empty
    finite = torch.isfinite(flat).all(dim=1)
    # NaN times zero is NaN, so bad rows are replaced by zeros and not multiplied by zero.
    flat = torch.where(finite[:, None], flat, torch.zeros_like(flat))
    norms = torch.linalg.vector_norm(flat, dim=1)
    return (flat * clip.factors(norms)[:, None]).reshape(rows.shape), norms


def as_clip(clip: Clip | float) -> Clip:
    """Return a clip, of the flat rule if only its norm is given."""
    return clip if isinstance(clip, Clip) else Clip(clip)


def integer_rows(rows: Tensor, clip: Clip | float) -> Tensor:
    """Clip each row and cut its entries down, towards zero, to whole grid units of ``clip_norm / GRID_STEPS``.

    Guarantee:
        As in `clip_rows`, and exact: entries are integers (in float64), and each row's Σ q² is at most GRID_STEPS².
        That is checked in integers, because sums of squares up to 2**53 are exact in any order. A row that rounding
        left above the bound is shrunk and cut again. If that were not enough, the row would become zero.

    Args:
        rows: Rows (batch, …).
        clip: As in `clip_rows`. The rule scales a row before it is cut.

    Returns:
        Integers in float64, in grid units.

    Raises:
        ValueError: If the clip norm is not between 1e-30 and 1e30.
    """
    clip = as_clip(clip)
    clipped, _ = clip_rows(rows, clip)
    return cut_rows(clipped.flatten(1) / clip.norm * GRID_STEPS).reshape(rows.shape)


def cut_rows(scaled: Tensor) -> Tensor:
    """Cut rows (batch, entry) of any norm, in grid units, down to integers of norm GRID_STEPS at most."""
    whole = torch.trunc(scaled)
    over = _is_over(whole)
    if bool(over.any()):
        whole = torch.where(over[:, None], torch.trunc(scaled * _SHRINK), whole)
        whole = torch.where(_is_over(whole)[:, None], 0.0, whole)
    return whole


def _is_over(whole: Tensor) -> Tensor:
    # The sum is exact in any order below 2**53. Above that it is rounded, and still above the bound.
    return torch.linalg.vecdot(whole, whole) > GRID_STEPS**2


def check_exact(rows: int) -> None:
    """Refuse to add up so many rows that integer sums could leave the exact range of float64.

    Args:
        rows: A public bound on the number of rows in one sum.

    Raises:
        ValueError: If there are 2**32 or more.
    """
    if rows >= MOST_ROWS:
        raise ValueError(f"{rows} rows in a sum; only fewer than 2**32 rows add up exactly in float64")


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped rows.

    Attributes:
        value: Sum in the shape of one row, float64. It is not private until noise is added.
        sensitivity: Largest change of ``value`` in L2 norm when one row is added or removed, in the units of ``value``.
        grid: Size of a grid unit in integer arithmetic: ``value`` and ``sensitivity`` are whole numbers of such units.
            None with floats.
    """

    value: Tensor
    sensitivity: float
    grid: float | None = None


def as_clipped_sum(value: Tensor, clip_norm: float, arithmetic: Arithmetic) -> ClippedSum:
    """Attach sensitivity and grid to a sum of rows from `clip_rows` (floats) or `integer_rows` (integers)."""
    if arithmetic == "float":
        return ClippedSum(value=value, sensitivity=clip_norm)
    return ClippedSum(value=value, sensitivity=float(GRID_STEPS), grid=clip_norm / GRID_STEPS)


def bounded_rows(rows: Tensor, clip: Clip | float, arithmetic: Arithmetic) -> Tensor:
    """Return the terms of a clipped sum, by `clip_rows` or by `integer_rows`."""
    return clip_rows(rows, clip)[0] if arithmetic == "float" else integer_rows(rows, clip)


def clipped_factors(left: Tensor, right: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Clip rows that are outer products of two factors, without forming them.

    Guarantee:
        As in `clip_rows` for the outer products, because ‖left ⊗ right‖ = ‖left‖·‖right‖. Factors of a row that is not
        finite become zero.

    Args:
        left: Factors (row, a), float64.
        right: Factors (row, b), float64.
        clip: Clip norm and rule.

    Returns:
        Left factors that carry the scale, and right factors.
    """
    norms = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
    finite = torch.isfinite(norms)
    # NaN times zero is NaN, so bad rows are replaced by zeros and not multiplied by zero.
    right, left = (torch.where(finite[:, None], t, torch.zeros_like(t)) for t in (right, left))
    scale = clip.factors(norms)
    return torch.where(finite, scale, torch.zeros_like(scale))[:, None] * left, right


def integer_outer_rows(left: Tensor, right: Tensor, clip: Clip) -> Tensor:
    """Return the products of `clipped_factors` in whole grid units, (row, a, b) float64, of norm GRID_STEPS at most."""
    scaled = (left / clip.norm * GRID_STEPS)[:, :, None] * right[:, None, :]
    return cut_rows(scaled.flatten(1)).unflatten(1, (left.shape[1], right.shape[1]))


def clipped_sum(rows: Tensor, clip_norm: float, arithmetic: Arithmetic = "float") -> ClippedSum:
    """Clip each row and add the rows up. The result is a *sum*: it is not divided by the number of rows.

    Guarantee:
        Adding or removing one row moves the value by at most ``clip_norm``: the value is the sum of independent per-row
        terms, each of norm at most ``clip_norm``. A sum of no rows is zero. In integers this holds exactly, and the sum
        of fewer than MOST_ROWS rows is the same number in any order.
    """
    return as_clipped_sum(bounded_rows(rows, clip_norm, arithmetic).sum(dim=0), clip_norm, arithmetic)


def client_sum(updates: Tensor, weights: Tensor, clip_norm: float) -> ClippedSum:
    """Clip each client's update, weigh it, cut it down to the grid and add up.

    Guarantee:
        Adding or removing a client moves the value by an integer vector of norm at most GRID_STEPS, exactly, for any
        weights in [0, 1], because the weight is applied before the cut.

    Args:
        updates: Updates (client, …).
        weights: Weights (client,), each in [0, 1].
        clip_norm: S, in the units of ``updates``, 1e-30 to 1e30.
    """
    clipped, _ = clip_rows(updates, clip_norm)
    shape = (-1, *[1] * (updates.dim() - 1))
    return clipped_sum(clipped * weights.to(torch.float64).reshape(shape), clip_norm, "integer")


def trusting_sum(uploads: Tensor, counts: Tensor, unit_bound: float) -> ClippedSum:
    """Add up clients' own integer sums of clipped records, each bounded in norm by its public number of records.

    Guarantee:
        An upload of integers of norm at most ``counts`` · GRID_STEPS is added unchanged, so one record moves the value
        by exactly its own integer row. An upload that breaks this rule is cut down to integers within that bound: it
        can neither change another client's numbers nor leave the exact range.

    Args:
        uploads: Uploads (client, …), finite, in grid units.
        counts: Numbers of records (client,), >= 0.
        unit_bound: Value of GRID_STEPS grid units in the units of the result, which bounds one record's influence.
    """
    flat = uploads.flatten(1).to(torch.float64)
    limits = counts.to(torch.float64) * GRID_STEPS
    norms = torch.linalg.vector_norm(flat, dim=1)
    scale = torch.where(norms > limits * (1 + _ROUNDING), limits / norms, 1.0)
    whole = torch.trunc(flat * scale[:, None]).reshape(uploads.shape)
    return as_clipped_sum(whole.sum(dim=0), unit_bound, "integer")
