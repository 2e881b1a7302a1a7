"""Adaptive clipping: the clip norm of client updates follows a quantile of their norms that is released with noise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.privacy.clipping import GRID_STEPS, Arithmetic, ClippedSum
from fl_dualpriv.privacy.limits import check_clip_norm, clamped_clip_norm
from fl_dualpriv.privacy.noise import RandomSource
from fl_dualpriv.privacy.release import release

_HALF = 0.5  # a bit b in {0, 1} counts as b - 1/2, which is half as sensitive
_MOST_STEPS = 2.0**20  # largest factor between the bound and its start, either way: it stays a usable float


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """Rule by which the clip norm S of a round's updates follows a quantile of their norms.

    Attributes:
        start: S of round 1, public, 1e-30 to 1e30.
        target_quantile: γ in (0, 1), the share of updates that S should leave unclipped.
        learning_rate: η_C > 0 of the geometric step.
        bit_noise: σ_b > 0, std of the noise on the sum of bits, in clients.
        expected_cohort: Public divisor of that sum, independent of the clients that took part; > 0.

    Reference:
        Andrew et al. 2021, arXiv:1905.03871, Algorithm 1 and Theorem 1; their C is our S, their z is our total.
    """

    start: float
    target_quantile: float
    learning_rate: float
    bit_noise: float
    expected_cohort: float

    def __post_init__(self) -> None:
        check_clip_norm(self.start)

    @property
    def bit_noise_multiplier(self) -> float:
        """Noise of the bits over their sensitivity 1/2, which is 2 σ_b."""
        return self.bit_noise / _HALF

    def update_noise_multiplier(self, total: float) -> float:
        """Return the multiplier z_Δ of the noise on the updates, with which both views leak like one with ``total``.

        Guarantee:
            A client moves (updates / (z_Δ S), bits / σ_b) by a vector of squared norm at most z_Δ⁻² + (2 σ_b)⁻² =
            total⁻², on one and the same cohort. The pair is one Gaussian release of multiplier ``total``, also under
            Poisson sampling, and for any S that earlier rounds led to.

        Raises:
            ValueError: If the bits by themselves would leak as much as ``total`` allows.
        """
        left = total**-2 - self.bit_noise_multiplier**-2
        if not left > 0:
            raise ValueError(
                f"noise of {self.bit_noise:g} clients on the count of clipped updates leaks more than the noise "
                f"multiplier {total:g} of the whole round allows; it must exceed {total / 2:.3g} clients"
            )
        return left**-0.5

    def bits(self, updates: Tensor, bound: float, arithmetic: Arithmetic) -> ClippedSum:
        """Return Σ (b_i - 1/2) with b_i = 1 where ‖update i‖ <= S.

        The term is zero for an update of zeros or with non-finite entries.

        Guarantee:
            A client adds one term of absolute value at most 1/2, which depends only on its own update and the public
            ``bound``. A client that failed or sent nothing usable adds nothing, as if it were absent.

        Args:
            updates: Updates (client, …) before the clip.
            bound: S of this round.
            arithmetic: With ``integer`` a half is GRID_STEPS units, and the sum is exact.

        Returns:
            A sum of shape (1,).
        """
        norms = torch.linalg.vector_norm(updates.flatten(1).to(torch.float64), dim=1)
        signs = 2 * (norms <= bound).to(torch.float64) - 1
        total = torch.where(torch.isfinite(norms) & (norms > 0), signs, 0.0).sum().reshape(1)
        if arithmetic == "float":
            return ClippedSum(value=total * _HALF, sensitivity=_HALF)
        return ClippedSum(value=total * GRID_STEPS, sensitivity=float(GRID_STEPS), grid=_HALF / GRID_STEPS)

    def released_share(self, updates: Tensor, bound: float, arithmetic: Arithmetic, source: RandomSource) -> float:
        """Return b̃, the noised share of updates within the bound: about 1/2 + Σ (b_i - 1/2) / expected cohort.

        The result may be any real number.

        Guarantee:
            This is the Gaussian mechanism with `bit_noise_multiplier`, also without updates; the divisor is public.
        """
        noised = release(self.bits(updates, bound, arithmetic), self.bit_noise_multiplier, source)
        return _HALF + float(noised) / self.expected_cohort

    def moved(self, bound: float, share: float) -> float:
        """Return the next bound S exp(-η_C (b̃ - γ)), which is smaller if too many updates are within S.

        This is post-processing. The result stays within a factor of 2**20 of the start, and within the range of a clip
        norm (`limits`). So no sequence of noise makes the bound useless. Both limits are public.
        """
        # The exponent is limited before exp(), which overflows.
        step = max(-20.0, min(20.0, -self.learning_rate * (share - self.target_quantile)))
        moved = min(max(bound * math.exp(step), self.start / _MOST_STEPS), self.start * _MOST_STEPS)
        return clamped_clip_norm(moved)
