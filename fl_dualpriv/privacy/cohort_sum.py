"""Integer sums over the clients of a round, for the server's noise: of their updates, or of their clipped sums."""

import torch
from torch import Tensor

from fl_dualpriv.privacy.clipping import GRID_STEPS, ClippedSum, as_clipped_sum, clip_rows, clipped_sum

_ROUNDING = 2.0**-20  # of the norms below, with room to spare: what respects its bound is not touched


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
