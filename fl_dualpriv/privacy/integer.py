"""The rounded Gaussian: integer noise that leaks nothing through low-order bits. Only this file imports mpmath.

A draw uses only the binary digits of a uniform that it needs. 52 digits with `scipy.special.ndtri` are enough where
both ends of the uniform's interval round to the same integer. Otherwise mpmath uses more digits.
"""

import math

import mpmath
import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fl_dualpriv.privacy.noise import RandomSource

LARGEST_STD = 2.0**46  # |draw| stays below 64 std (see _MOST_BITS), and so below 2**52: exact in float64

# Bound on ndtri's relative error below one half, tested against mpmath. The interval is widened by twice as much, which
# leaves room for the few roundings (2**-53 each) of the products and sums around it.
NDTRI_ERROR = 2.0**-46
_WIDER = 2 * NDTRI_ERROR

_FAST_BITS = 52  # (m + 1) / 2**53 is then exact
_WORD_BITS = 64
_MOST_BITS = _WORD_BITS * 16 - 1  # erfc(64 / sqrt 2) < 2**-2900: at 2**-1023 a draw has at most 38 std


def rounded_gaussian(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
    """Draw independent integers round(N(0, std²)), held in float64.

    Guarantee:
        Each coordinate's law is within 2**-900 (total variation) of the exactly rounded normal distribution, tails
        included, given NDTRI_ERROR and mpmath's precision. Every coordinate has its own uniform, and digits that are
        drawn later belong to only one coordinate. For an integer vector S, S + round(N) = round(S + N) almost surely.
        So the released value is a function of the real-valued Gaussian mechanism's output, and that mechanism's (ε, δ),
        also under Poisson sampling and composition, bounds it with no loss, in any dimension. The support is all
        integer vectors for every S, and integers are added exactly: low-order bits tell nothing (Mironov 2012). The
        duration of a draw depends on the noise, never on data.

    Args:
        source: Source of the random bits.
        shape: Shape of the result.
        std: Standard deviation before rounding, in grid units; 0 (no noise) to 2**46.

    Returns:
        Float64, whole numbers of absolute value below 2**52.

    Raises:
        ValueError: If ``std`` is negative, not finite or above 2**46.

    Reference:
        Mironov 2012, "On significance of the least significant bits for differential privacy"; Jin et al. 2021,
        arXiv:2112.05307. The discrete Gaussian (Canonne et al. 2020, arXiv:2004.00010) is not rotation invariant: its
        one-dimensional privacy loss does not bound the loss of a vector. Rounding keeps the proof of the Gaussian.
    """
    if not (math.isfinite(std) and 0 <= std <= LARGEST_STD):
        raise ValueError(f"std = {std}; it must be 0 to 2**46 grid units: lower the noise multiplier")
    count = math.prod(shape)
    if std == 0:
        return torch.zeros(shape, dtype=torch.float64)
    words = source.words(count)
    # A word holds the first digits of a uniform U, and N is its normal quantile, as in `gaussian_noise`. By symmetry
    # the upper half is folded down: then 2 U = V, with |N| >= t exactly where V <= erfc(t / (std sqrt 2)).
    negative = (words >> np.uint64(_WORD_BITS - 1)) == 0
    folded = np.where(negative, words, ~words)
    cell = (folded >> np.uint64(_WORD_BITS - 1 - _FAST_BITS)).astype(np.float64)
    half_cell = 2.0 ** -(_FAST_BITS + 1)
    nearest = np.floor(-std * (1 - _WIDER) * ndtri((cell + 1) * half_cell) + 0.5)
    farthest = np.floor(-std * (1 + _WIDER) * ndtri(cell * half_cell) + 0.5)
    size = nearest.copy()
    for at in np.flatnonzero(nearest != farthest):
        most = farthest[at] if np.isfinite(farthest[at]) else np.ceil(64 * std)
        size[at] = _resolve(source, int(folded[at]), int(nearest[at]), int(most), std)
    return torch.from_numpy(np.where(negative, -size, size) + 0.0).reshape(shape)  # + 0.0: no negative zero


def _resolve(source: RandomSource, digits: int, low: int, high: int, std: float) -> int:
    """Round |N|, known to lie in low … high, from the first 63 binary digits of V and as many more as needed.

    A draw that 1023 digits do not decide is rounded towards zero: for std <= 2**46 at most 2**53 borders between
    integers lie within 64 std, each in one interval of length 2**-1023, and the mass beyond 64 std is below 2**-2900.
    """
    bits = _WORD_BITS - 1
    while low < high:
        middle = (low + high + 1) // 2  # is |N| >= middle - 1/2?
        with mpmath.workprec(bits + 2 * _WORD_BITS):
            border = mpmath.erfc((2 * middle - 1) / (2 * mpmath.mpf(std) * mpmath.sqrt(2)))
            scaled, slack = mpmath.ldexp(border, bits), mpmath.ldexp(1, -_WORD_BITS)
            below, above = digits + 1 <= scaled - slack, digits >= scaled + slack
        if below:
            low = middle
        elif above or bits >= _MOST_BITS:
            high = middle - 1
        else:
            digits = digits << _WORD_BITS | int(source.words(1)[0])
            bits += _WORD_BITS
    return low
