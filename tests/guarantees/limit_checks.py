"""What must hold at the ends of the ranges of public numbers, and beyond them: a bound, or a refusal."""

import itertools
import math

import torch
from torch import Tensor

from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import GRID_STEPS, clip_rows, integer_rows
from fl_dualpriv.privacy.limits import LARGEST_CLIP_NORM, SMALLEST_CLIP_NORM
from tests.guarantees.objective_checks import clipped_feature_sum

TINY = (1.33e-322, 1e-310, 1e-200, 1e-160, math.nextafter(SMALLEST_CLIP_NORM, 0))
HUGE = (math.nextafter(LARGEST_CLIP_NORM, math.inf), 1e300, 1.7e308)
SIZES = (0.0, 5e-324, 1e-310, 1e-200, 1e-162, 1e-155, 1e-45, 1e-38, 1e-30, 1.0, 1e30, 3e38, 1e150, 1e160, 1e308)
"""Of entries: subnormal numbers, numbers whose squares are none, float32's ends, and squares that overflow."""
_UNIT = 2.0**-53


def length(row: Tensor, clip_norm: float) -> float:
    """Norm of a row over the clip norm; no square of it can lose its digits where that matters."""
    return math.sqrt(math.fsum((float(x) / clip_norm) ** 2 for x in row.flatten()))


def slack(entries: int) -> float:
    """How far rounding may take a clipped row, and `length` of it, above 1.

    The squares and their sum: entries / 2 + 1 roundings in the norm, since a root halves relative errors. The quotient
    and the product: 2. `length` again: 4. One more for second-order terms.
    """
    return 1 + (entries / 2 + 8) * _UNIT


def no_row_is_longer_than_its_clip_norm() -> None:
    """Whatever the clip norm is: it is kept, or refused."""
    rows = torch.tensor(list(itertools.product(SIZES, repeat=2)), dtype=torch.float64)
    for clip_norm in (*TINY, SMALLEST_CLIP_NORM, 1.0, LARGEST_CLIP_NORM, *HUGE):
        try:
            clipped, _ = clip_rows(rows, clip_norm)
            whole = integer_rows(rows, clip_norm)
        except ValueError:
            assert clip_norm in TINY + HUGE, f"a clip norm of {clip_norm} was refused"
            continue
        longest = max(length(row, clip_norm) for row in clipped)
        assert longest <= slack(2), f"a row is {longest:.4g} times as long as the clip norm {clip_norm}"
        assert max(sum(int(q) ** 2 for q in row) for row in whole) <= GRID_STEPS**2


def no_record_moves_a_feature_sum_further_than_the_clip_norm() -> None:
    """In noise space ``feature`` likewise; a temperature can be any number of a model."""
    generator = torch.Generator().manual_seed(0)
    classes, x = (torch.nn.functional.normalize(torch.randn(4, 6, generator=generator), dim=1) for _ in range(2))
    for clip_norm in (*TINY, SMALLEST_CLIP_NORM, 1.0, LARGEST_CLIP_NORM, *HUGE):
        for scale in (1e-200, 1e-30, 1.0, 100.0, 1e200):
            try:
                value = clipped_feature_sum(classes, x[:1], torch.tensor([0]), scale, clip_norm).value
            except ValueError:
                assert clip_norm in TINY + HUGE, f"a clip norm of {clip_norm} was refused"
                continue
            assert clip_norm not in TINY + HUGE, f"a clip norm of {clip_norm} was taken"
            # The norm is a product of two roots, of sums over 4 classes and over 6 entries: 24 are more than both.
            assert length(value, clip_norm) <= slack(24)


def a_moving_clip_norm_stays_one() -> None:
    """From the smallest and the largest start, whatever is released."""
    for start in (SMALLEST_CLIP_NORM, 1e-26, 1.0, 1e26, LARGEST_CLIP_NORM):
        for rate, share in itertools.product((1e-300, 0.2, 1e300), (-1e9, -0.5, 1.5, 1e9)):
            moving = AdaptiveClip(
                start=start, target_quantile=0.5, learning_rate=rate, bit_noise=1.0, expected_cohort=10.0
            )
            bound = start
            for _ in range(5):
                bound = moving.moved(bound, share)
                assert SMALLEST_CLIP_NORM <= bound <= LARGEST_CLIP_NORM, f"a clip norm moved to {bound}"
