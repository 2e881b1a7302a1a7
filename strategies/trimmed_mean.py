"""Trimmed mean (Yin et al. 2018, arXiv:1803.01498, Definition 2): in each entry the extremes do not count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.plan import ServerUnit
from fl_dualpriv.server.strategy import RoundStrategy, Update


@dataclass(kw_only=True)
class TrimmedMean(RoundStrategy):
    """Mean of each entry without its k smallest and k largest values. A minority of clients cannot move it far.

    Without noise of the server, k = ⌊trim_ratio · n⌋ for the n clients that answered, as published. With noise of the
    server, k and the divisor are public: k = ⌊trim_ratio · E⌋ and E − 2k, where E is the expected cohort.
    """

    proved_for: ClassVar[tuple[ServerUnit, ...]] = ("client",)
    unproved_because: ClassVar[str] = "uploads that are sums over records are longer the more records a client has"

    trim_ratio: float = 0.1

    def check_options(self) -> None:
        """Refuse a trim_ratio outside [0, 1/2), because some values must be left."""
        if not 0 <= self.trim_ratio < 0.5:
            raise ConfigError(f"plugin.trimmedmean.trim-ratio = {self.trim_ratio}; it must be in [0, 0.5)")

    def _cut(self, cohort: float) -> int:
        return math.floor(self.trim_ratio * cohort)

    def combine(self, updates: Sequence[Update]) -> Tensor:
        """Return in each entry the sum of the values left over their number, (n_ctx, ctx_dim); 0 if none is left."""
        cohort = self.divisor() if self.privacy is not None else len(updates)
        cut = self._cut(cohort)
        if len(updates) <= 2 * cut:
            return torch.zeros(self.prompt.shape, dtype=torch.float64)
        ordered = torch.stack([update.diff for update in updates]).sort(dim=0).values
        return ordered[cut : len(updates) - cut].sum(dim=0) / (cohort - 2 * cut)

    def sensitivity(self) -> float:
        """Return S · √(1 + 2k / (k + 1)) / (E − 2k), which is at most √3 S / (E − 2k), in any dimension.

        Theorem. Let n ≥ 2k vectors y_i and one more, a, have norm at most S. Adding a moves the trimmed sum by Δ with
        ‖Δ‖² ≤ S² (1 + n / (n − k + 1)) ≤ S² (1 + 2k / (k + 1)).

        Proof. Let k ≥ 1 (k = 0 is the plain sum), and in entry j let l be the k-th smallest and h the k-th largest of
        the n values, l ≤ h. If a_j ≤ l, the ranks that are kept move down by one and the sum gains l; if a_j ≥ h it
        gains h; else a_j. So Δ_j = min(max(a_j, l), h). Where |Δ_j| > |a_j|, either Δ_j = l > 0, and all values but
        k − 1 are at least l, or Δ_j = h < 0, and all but k − 1 are at most h: then (n − k + 1) Δ_j² ≤ Σ_i y_ij².
        Hence Δ_j² ≤ a_j² + Σ_i y_ij² / (n − k + 1) in every entry. Sum over j; ‖a‖², ‖y_i‖² ≤ S². The fraction falls
        with n, so n = 2k is the worst. With n < 2k both sums are 0. ∎
        """
        cut = self._cut(self.divisor())
        return self.bound() * math.sqrt(1 + 2 * cut / (cut + 1)) / (self.divisor() - 2 * cut)
