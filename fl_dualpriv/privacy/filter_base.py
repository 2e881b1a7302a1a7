"""The protocol of privacy filters, and the parts that all of them share. Each filter has a file of its own."""

from collections.abc import Callable
from typing import Protocol

from fl_dualpriv.privacy.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, ReservedPlan

_MOST_RELEASES = 2**24  # the end of searches for a number of releases


class PrivacyFilter(Protocol):
    """One rule. Numbers are of one unit's data: one record of a client, or one client.

    Guarantee:
        If `check` admitted every event of a ledger before its releases, everything in the ledger together is (ε, δ)-DP
        for one unit under add-or-remove-one, whatever terms anybody chose after whatever releases, in interleaved runs
        and on several servers too.
    """

    @property
    def header(self) -> dict[str, object]:
        """The rule and its public numbers, for the ledger's header. It is a function of the owner's file only."""
        ...

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """Refuse the event if the rule does not admit it; nothing is written.

        Args:
            made: The ledger's content.
            plan: The whole plan of the event's run.
            event: The releases that are asked for.

        Raises:
            PrivacyError: With what is left, and what it buys.
        """
        ...

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """The number of releases on these terms, in one further run, that the rule would still admit."""
        ...

    def share(self, made: LedgerContent) -> float:
        """The part of the budget that is spent: 1 and more if nothing is left, infinite if the ledger is closed."""
        ...

    def balance(self, made: LedgerContent) -> str:
        """What is spent and what is left, in words."""
        ...

    def claim(self) -> str:
        """The guarantee, in words."""
        ...


def header_of(budget: Budget, numbers: dict[str, object]) -> dict[str, object]:
    """The header of a filter: its name, ε, δ, and its own numbers."""
    return {"filter": budget.filter.name, "epsilon": budget.epsilon, "delta": budget.delta, **numbers}


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where every smaller one does; 0 if 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_RELEASES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def rest_buys(chosen: PrivacyFilter, made: LedgerContent, plan: ReservedPlan) -> str:
    """What is left, as a number of releases on the terms of a plan, for a refusal."""
    most = chosen.affordable(made, plan.sampling_rate, plan.noise_multiplier)
    terms = f"q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"
    return f"The rest buys {most} releases at {terms}" if most else f"The rest buys no release at {terms}"


def plan_words(plan: ReservedPlan) -> str:
    """A plan in words."""
    return f"{plan.releases} releases at q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"


def budget_words(budget: Budget) -> str:
    """A budget in words, for a refusal."""
    return f"the budget of this node's data is ε = {budget.epsilon:g} at δ = {budget.delta:g}"
