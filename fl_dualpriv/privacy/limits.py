"""Limits on public numbers: outside of them float64 breaks the assumptions of the proofs. Standard library only.

The configuration, the owner's file and the clipping code check the same numbers.
"""

SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-30, 1e30
"""Range of a clip norm, fixed or moving.

Lower limit: the norm of a row is the root of a sum of squares, and squares under 2.2e-308 lose their digits. So a clip
norm under about 1e-154 lets rows pass that are longer than the clip norm. Upper limit: the bound holds above it, but
the prompt learns nothing. The largest float32 is 3.4e38, and noise at such a clip norm makes prompts infinite. Squares
overflow at norms of 1.3e154: the clip turns a row of that norm into zero.
"""

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 1e-3, 1e6
"""Range of a release's noise over its sensitivity.

Lower limit: a sum of nearly 2**32 rows of norm C is a float64 whose last digit is worth 2**-21 C, and the noise must be
far above that. Upper limit: see `LARGEST_DRAWN_MULTIPLIER`; with trusts-server a draw has √2 times the multiplier.
"""

LARGEST_DRAWN_MULTIPLIER = 2.0**26
"""Largest noise of one draw over its sensitivity: in integers 2**46 grid units, which keeps sums exact in float64."""

SMALLEST_SAMPLING_RATE = 1e-9
"""Smallest sampling rate of records or clients.

A coin is a uniform of 52 bits. Below 1e-16 its true rate differs from the stated one.
"""

SMALLEST_DELTA = 1e-12
"""Smallest δ. Below it the accountant's own rounding and the cut tails of float noise are as large as δ."""

SMALLEST_EPSILON, LARGEST_EPSILON = 1e-3, 1e3
"""Range of an ε that noise is calibrated to. Above it e^ε leaves the range of float64, and ε promises nothing."""

SMALLEST_BUDGET, LARGEST_BUDGET = 1e-6, 1e6
"""Range of the ε in an owner's lifetime budget."""

MOST_RELEASES = 1_000_000
"""Largest number of releases of one unit's data in a run.

The accountant computes ε for this number within seconds. Its rounding error grows with the number of releases.
"""


def is_clip_norm(value: float) -> bool:
    """Return True if a row can be clipped to this norm; False for nan."""
    return SMALLEST_CLIP_NORM <= value <= LARGEST_CLIP_NORM


def check_clip_norm(value: float) -> None:
    """Refuse a clip norm that float64 arithmetic cannot enforce.

    Guarantee:
        After this check a float64 row of finite entries that is clipped to ``value`` has norm at most ``value`` up to
        rounding, however small or large its entries are. Where squares lose their digits, the row is shorter than
        1e-150 times the root of its length, and passes unchanged.

    Raises:
        ValueError: If ``value`` is not between 1e-30 and 1e30.
    """
    if not is_clip_norm(value):
        raise ValueError(f"clip_norm = {value}; it must be from {SMALLEST_CLIP_NORM:g} to {LARGEST_CLIP_NORM:g}")


def clamped_clip_norm(value: float) -> float:
    """Return the nearest allowed clip norm. The result is a function of ``value``, which must be public."""
    return min(max(value, SMALLEST_CLIP_NORM), LARGEST_CLIP_NORM)


SHARED_CALIBRATIONS = "FL_DUALPRIV_CALIBRATIONS"
"""Name of an environment variable: a folder through which the processes of one run share calibrated multipliers.

A calibration takes seconds, and every process of a run needs the same ones. Checking one takes a fraction of that.
"""
