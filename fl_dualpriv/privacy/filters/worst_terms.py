"""The filter ``worst-terms``, and the rule for correlated noise at the server.

In ``worst-terms`` one fixed sequence of releases dominates all others.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import COARSE_GRID, FINE_GRID, SampledGaussians, composed_epsilon, gathered
from fl_dualpriv.privacy.filters.base import budget_words, header_of, largest, most_releases, rest_buys
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, ReservedPlan


@dataclass(frozen=True)
class WorstTermsFilter:
    """``worst-terms``: every release is charged at the owner's largest q and smallest z, by PLD.

    Guarantee:
        As in `PrivacyFilter`. A release at q ≤ q_max and z ≥ z_min is dominated by one at (q_max, z_min): a smaller
        sampling rate is a mixture with the neighbour, and more noise is post-processing. So everything is dominated by
        one fixed sequence that a stopping time ends, and its PLD at the largest number of releases bounds it. Releases
        of another kind are refused, except for those whose worst terms and number are charged beforehand.

    Args:
        budget: The owner's limits.
        grid: Grid step of the PLD.
    """

    budget: Budget
    grid: float = COARSE_GRID

    @property
    def header(self) -> dict[str, object]:
        """See `PrivacyFilter.header`."""
        budget, choice = self.budget, self.budget.filter
        return header_of(
            budget,
            {
                "max-sampling-rate": budget.max_sampling_rate,
                "min-noise-multiplier": budget.min_noise_multiplier,
                "max-correlated-releases": choice.max_correlated_releases,
                "min-correlated-noise-multiplier": choice.min_correlated_noise_multiplier,
            },
        )

    def epsilon(self, releases: int) -> float:
        """Return ε of ``releases`` releases at the worst terms, together with those that are charged beforehand."""
        return composed_epsilon(self._charges(releases), self.budget.delta, self.grid)

    def _charges(self, releases: int) -> tuple[SampledGaussians, ...]:
        choice = self.budget.filter
        charges = [SampledGaussians(self.budget.max_sampling_rate, self.budget.min_noise_multiplier, releases)]
        if choice.max_correlated_releases:
            other = choice.min_correlated_noise_multiplier
            charges.append(SampledGaussians(1.0, other, choice.max_correlated_releases))
        return tuple(charges)

    def fits(self, releases: int) -> bool:
        """Return True if ε of ``releases`` releases at the worst terms stays within the budget."""
        return self.epsilon(releases) <= self.budget.epsilon

    def epsilon_with(self, made: LedgerContent, further: Sequence[LedgerEvent]) -> float:
        """Return ε of a ledger and of further events by this rule; infinite if one lies outside the worst terms."""
        spent = self.spent(replace(made, events=(*made.events, *further)))
        return self.epsilon(int(spent)) if math.isfinite(spent) else math.inf

    def spent(self, made: LedgerContent) -> float:
        """Count the releases in the ledger, a damaged line as the largest round.

        The result is infinite if an event lies outside the worst terms.
        """
        if any(self._outside(event) for event in made.events) or self._correlated(made) > self._most_correlated:
            return math.inf
        plain = sum(event.releases for event in made.events if event.kind == "gaussian")
        return plain + made.damaged * self.budget.filter.max_round_releases

    @property
    def _most_correlated(self) -> int:
        return self.budget.filter.max_correlated_releases

    def _correlated(self, made: LedgerContent) -> int:
        return sum(event.releases for event in made.events if event.kind == "correlated")

    def _outside(self, event: LedgerEvent) -> str:
        """Return the reason why the worst terms do not dominate an event; empty if they do."""
        budget = self.budget
        if event.kind == "correlated":
            least = budget.filter.min_correlated_noise_multiplier
            if not self._most_correlated:
                return "rounds of correlated noise are not among the releases that the owner's file admits"
            return "" if event.noise_multiplier >= least else f"z = {event.noise_multiplier:g}, at least {least:g}"
        if event.sampling_rate > budget.max_sampling_rate:
            return f"q = {event.sampling_rate:g}, at most {budget.max_sampling_rate:g}"
        if event.noise_multiplier < budget.min_noise_multiplier:
            return f"z = {event.noise_multiplier:g}, at least {budget.min_noise_multiplier:g}"
        return ""

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """See `PrivacyFilter.check`."""
        if outside := self._outside(event):
            raise PrivacyError(f"outside the worst terms of the owner's file: {outside}; the round is refused")
        if event.kind == "correlated":
            fits = self._correlated(made) + event.releases <= self._most_correlated and self._open(made)
        else:
            fits = self._open(made) and self.fits(int(self.spent(made)) + event.releases)
        if not fits:
            raise PrivacyError(
                f"{budget_words(self.budget)}; {self.balance(made)}. The round asks for {event.releases} more. "
                f"{rest_buys(self, made, plan)}: the round is refused"
            )

    def _open(self, made: LedgerContent) -> bool:
        return math.isfinite(self.spent(made))

    @functools.cached_property
    def most(self) -> int:
        """Largest number of releases that fits."""
        if self.grid != COARSE_GRID:
            return largest(self.fits)
        return most_releases(self._charges, self.budget.delta, self.budget.epsilon, lambda x: x <= self.budget.epsilon)

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """See `PrivacyFilter.affordable`; the result is the same for all terms within the worst terms."""
        within = sampling_rate <= self.budget.max_sampling_rate and noise_multiplier >= self.budget.min_noise_multiplier
        return max(0, self.most - int(self.spent(made))) if within and self._open(made) else 0

    def share(self, made: LedgerContent) -> float:
        """See `PrivacyFilter.share`."""
        return self.spent(made) / self.most if self.most else math.inf

    def balance(self, made: LedgerContent) -> str:
        """See `PrivacyFilter.balance`."""
        if not self._open(made):
            return "the ledger holds releases outside the worst terms: it is closed"
        spent = int(self.spent(made))
        return f"{spent} of {self.most} releases at the worst terms are spent, {max(0, self.most - spent)} are left"

    def claim(self) -> str:
        """See `PrivacyFilter.claim`."""
        budget = self.budget
        return (
            f"worst-terms: at most {self.most} releases, each charged at q = {budget.max_sampling_rate:g} and z = "
            f"{budget.min_noise_multiplier:g}"
        )


@dataclass(frozen=True)
class GaussianSumFilter:
    """Rule for a server's ledger of correlated noise: inverse squares of unsampled Gaussian releases add up.

    Guarantee:
        Unsampled Gaussian releases whose multipliers are chosen adaptively, with Σ z⁻² never above μ², are together
        one Gaussian release of multiplier 1/μ (Smith and Thakurta 2022, arXiv:2210.17520). So their composed ε admits
        them. A ledger that holds a sampled release is closed.

    Args:
        budget: ε and δ.
        worst: Charge of a damaged line, which is the charge of the dearest round of the run.
    """

    budget: Budget
    worst: SampledGaussians

    @property
    def header(self) -> dict[str, object]:
        """See `PrivacyFilter.header`."""
        return {"filter": "gaussian-sum", "epsilon": self.budget.epsilon, "delta": self.budget.delta}

    def epsilon_with(self, made: LedgerContent, further: Sequence[LedgerEvent]) -> float:
        """Return ε of a ledger and of further events by this rule; infinite if one of them is sampled."""
        events = [*made.events, *further]
        if any(event.sampling_rate != 1 for event in events):
            return math.inf
        charges = [SampledGaussians(e.sampling_rate, e.noise_multiplier, e.releases) for e in events]
        return composed_epsilon(gathered([*charges, *[self.worst] * made.damaged]), self.budget.delta, FINE_GRID)
