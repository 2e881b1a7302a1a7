"""A second witness of ε: Opacus' PRV accountant on the releases of a ledger. No release is admitted by it."""

from collections.abc import Sequence

import numpy as np
from opacus.accountants import PRVAccountant

_ERROR = 1e-3


def prv_epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float | None:
    """Return Opacus' ε of Poisson-sampled Gaussian releases.

    Args:
        history: Noise multiplier, sampling rate and number of releases, as `LedgerContent.opacus_history` gives them.
        delta: δ.

    Returns:
        ε, or None if the accountant cannot answer for these releases.

    Reference:
        Gopi et al. 2021, arXiv:2106.02848.

    Example:
        >>> epsilon = prv_epsilon([(1.0, 0.1, 100)], 1e-5)
        >>> epsilon is not None and 6.9 < epsilon < 7.1
        True
    """
    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for noise, rate, steps in history]
    try:
        with np.errstate(all="ignore"):  # its formula divides by zero at q = 1, and is right there
            return float(accountant.get_epsilon(delta, eps_error=_ERROR))
    except (ValueError, RuntimeError, ArithmeticError, MemoryError):
        return None
