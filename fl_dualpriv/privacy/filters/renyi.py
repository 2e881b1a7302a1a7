"""The filter ``renyi``, which adds up Rényi divergences at one fixed order."""

import functools
import math
from dataclasses import dataclass

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import pure_renyi_divergence, renyi_bound, renyi_divergence
from fl_dualpriv.privacy.filters.base import budget_words, header_of, largest, rest_buys
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, ReservedPlan

RENYI_ORDERS = (*(2 + i / 4 for i in range(33)), *range(11, 65), 80, 96, 128, 192, 256)
"""Candidate orders: `best_order` chooses one of them before the first release."""


@dataclass(frozen=True)
class RenyiFilter:
    """``renyi``: the Rényi divergences of all releases, at one order, stay within that order's bound for (ε, δ).

    Guarantee:
        As in `PrivacyFilter`. If the sum of adaptively chosen Rényi divergences at a *fixed* order never exceeds ρ,
        then everything together has divergence at most ρ (Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 3.1). This
        holds for interleaved runs too (Haney et al. 2023, arXiv:2309.05901). ρ is the largest divergence that implies
        (ε, δ) (`renyi_bound`). The order is a function of the owner's file only: the best order for the releases that
        occurred would depend on these releases.

    Args:
        budget: The owner's limits.
    """

    budget: Budget

    @functools.cached_property
    def order(self) -> float:
        """α, the best for runs on the terms that the owner expects."""
        return best_order(self.budget)

    @property
    def bound(self) -> float:
        """ρ, the largest divergence at `order` that all releases together may have."""
        return renyi_bound(self.budget.epsilon, self.budget.delta, self.order)

    @property
    def header(self) -> dict[str, object]:
        """See `PrivacyFilter.header`."""
        return header_of(self.budget, {"order": self.order})

    def spent(self, made: LedgerContent) -> float:
        """Return the divergence of everything in the ledger.

        A damaged line is charged as the largest round at the worst terms.
        """
        total = math.fsum(self._cost_of(event) for event in made.events)
        budget = self.budget
        if not made.damaged:
            return total
        if not budget.min_noise_multiplier > 0:
            return math.inf
        line = (budget.filter.max_round_releases, budget.max_sampling_rate, budget.min_noise_multiplier)
        return total + made.damaged * self._cost(*line)

    def _cost(self, releases: int, sampling_rate: float, noise_multiplier: float) -> float:
        return releases * renyi_divergence(sampling_rate, noise_multiplier, self.order)

    def _cost_of(self, event: LedgerEvent) -> float:
        if event.pure_epsilon:
            return pure_renyi_divergence(event.pure_epsilon, self.order)
        return self._cost(event.releases, event.sampling_rate, event.noise_multiplier)

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """See `PrivacyFilter.check`."""
        cost = self._cost_of(event)
        if not self.spent(made) + cost <= self.bound:
            raise PrivacyError(
                f"{budget_words(self.budget)}; {self.balance(made)}. The round, {event.releases} releases at "
                f"q = {event.sampling_rate:g} and z = {event.noise_multiplier:g}, has divergence {cost:.4g}. "
                f"{rest_buys(self, made, plan)}: the round is refused"
            )

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """See `PrivacyFilter.affordable`."""
        spent = self.spent(made)
        return largest(lambda releases: spent + self._cost(releases, sampling_rate, noise_multiplier) <= self.bound)

    def share(self, made: LedgerContent) -> float:
        """See `PrivacyFilter.share`."""
        return self.spent(made) / self.bound

    def balance(self, made: LedgerContent) -> str:
        """See `PrivacyFilter.balance`."""
        spent = self.spent(made)
        if not spent <= self.bound:
            return f"Rényi divergence {spent:.4g} of {self.bound:.4g} at order {self.order:g}: the ledger is closed"
        return (
            f"Rényi divergence {spent:.4g} of {self.bound:.4g} at order {self.order:g} is spent, "
            f"{self.bound - spent:.4g} is left"
        )

    def claim(self) -> str:
        """See `PrivacyFilter.claim`."""
        return f"renyi: divergences at the fixed order {self.order:g} add up to at most {self.bound:.4g}"


def best_order(budget: Budget) -> float:
    """Return the Rényi order that admits the most releases on the terms that the owner expects.

    The order is a function of the owner's file only. It does not depend on the number of releases, because divergences
    add up.

    Raises:
        PrivacyError: If the owner's file states no terms to expect, or no order admits one release on them.
    """
    choice = budget.filter
    rate = choice.expected_sampling_rate or budget.max_sampling_rate
    noise = choice.expected_noise_multiplier or budget.min_noise_multiplier
    if not noise > 0:
        raise PrivacyError(
            'filter = "renyi" takes its order from the expected terms: set budget.expected-noise-multiplier, or '
            "budget.min-noise-multiplier above 0"
        )

    def releases(order: float) -> float:
        return renyi_bound(budget.epsilon, budget.delta, order) / renyi_divergence(rate, noise, order)

    best = max(RENYI_ORDERS, key=releases)
    if releases(best) < 1:
        raise PrivacyError(
            f'filter = "renyi" admits no release at q = {rate:g} and z = {noise:g} within ε = {budget.epsilon:g} at '
            f"δ = {budget.delta:g}: expect more noise or a lower rate, or raise ε"
        )
    return float(best)
