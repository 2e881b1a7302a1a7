"""The protocol of privacy filters, and the helpers that all of them share. Each filter has its own file."""

from collections.abc import Callable
from typing import Protocol

from fl_dualpriv.privacy.accounting import COARSE_GRID, SampledGaussians, composed_epsilon, rough_epsilon
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, ReservedPlan

_MOST_RELEASES = 2**24  # the end of searches for a number of releases
_EXACT_RELEASES = 10_000


class PrivacyFilter(Protocol):
    """One rule. All numbers concern the data of one unit: one record of a client, or one client.

    Guarantee:
        If `check` admitted every event of a ledger before its releases, everything in the ledger together is (ε, δ)-DP
        for one unit under add-or-remove-one. The terms of each run may be chosen after any earlier releases, and runs
        of several servers may interleave.
    """

    @property
    def header(self) -> dict[str, object]:
        """The rule and its public numbers, for the ledger's header. It is a function of the owner's file only."""
        ...

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """Refuse the event if the rule does not admit it; nothing is written.

        Args:
            made: Content of the ledger.
            plan: Whole plan of the event's run.
            event: Requested releases.

        Raises:
            PrivacyError: If the rule does not admit the event. The message states the rest and what it buys.
        """
        ...

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """Return the number of releases on these terms, in one further run, that the rule would still admit."""
        ...

    def share(self, made: LedgerContent) -> float:
        """Return the spent part of the budget: 1 or more if nothing is left, infinite if the ledger is closed."""
        ...

    def balance(self, made: LedgerContent) -> str:
        """Describe in words how much is spent and how much is left."""
        ...

    def claim(self) -> str:
        """Describe the guarantee in words."""
        ...


def header_of(budget: Budget, numbers: dict[str, object]) -> dict[str, object]:
    """Return the header of a filter: its name, ε, δ, and its own numbers."""
    return {"filter": budget.filter.name, "epsilon": budget.epsilon, "delta": budget.delta, **numbers}


def largest(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits, if every smaller one fits; 0 if 1 does not fit.

    From `_EXACT_RELEASES` on the result may be too small by a thousandth, because each trial of a large number is slow.
    """
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_RELEASES and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000 if low >= _EXACT_RELEASES else 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def most_releases(
    charges: Callable[[int], tuple[SampledGaussians, ...]], delta: float, about: float, fits: Callable[[float], bool]
) -> int:
    """Return the `largest` number of releases whose ε fits; a quick bound on ε is tried before the exact one.

    Args:
        charges: Function from a number of releases to the charged releases.
        delta: δ.
        about: Largest ε that may fit, or a guess of it.
        fits: Function that returns True if an ε fits.
    """

    def is_within(releases: int) -> bool:
        charged = charges(releases)
        return fits(rough_epsilon(charged, delta, about)) or fits(composed_epsilon(charged, delta, COARSE_GRID))

    return largest(is_within)


def rest_buys(chosen: PrivacyFilter, made: LedgerContent, plan: ReservedPlan) -> str:
    """Describe the rest of the budget as a number of releases on the terms of a plan, for a refusal."""
    most = chosen.affordable(made, plan.sampling_rate, plan.noise_multiplier)
    terms = f"q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"
    return f"The rest buys {most} releases at {terms}" if most else f"The rest buys no release at {terms}"


def plan_words(plan: ReservedPlan) -> str:
    """Describe a plan in words."""
    words = f"{plan.releases} releases at q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"
    return f"{words}, {selection_words(plan)}" if plan.selection_multiplier else words


def selection_words(plan: ReservedPlan) -> str:
    """Describe the selection of a plan's start in words."""
    if plan.selection_epsilon:
        return f"after a choice of the start at ε = {plan.selection_epsilon:g}"
    return f"after a vote on the start at z = {plan.selection_multiplier:g}"


def budget_words(budget: Budget) -> str:
    """Describe a budget in words, for a refusal."""
    return f"the budget of this node's data is ε = {budget.epsilon:g} at δ = {budget.delta:g}"
