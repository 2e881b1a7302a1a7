"""The filter ``reserve``, which charges the whole plan of each run beforehand."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import COARSE_GRID, SampledGaussians, composed_epsilon, mixed_epsilon
from fl_dualpriv.privacy.filters.base import budget_words, header_of, most_releases, plan_words, rest_buys
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent, ReservedPlan


@dataclass(frozen=True)
class ReserveFilter:
    """``reserve``: the whole plan of a run is charged at its PLD before the run's first release, and never refunded.

    Guarantee:
        As in `PrivacyFilter`. A plan's terms are fixed before its first release, so the run is an interactive mechanism
        that is (ε_i, δ_i)-DP by PLD, with δ_i = (δ − δ′) / ``expected_runs``. With ``sum`` the plans that are admitted
        have Σ ε_i ≤ ε and Σ δ_i ≤ δ (Rogers et al. 2016, arXiv:1605.08294). With ``advanced`` they have
        √(2 log(1/δ′) Σ ε_i²) + ½ Σ ε_i² ≤ ε (Whitehouse et al. 2023, arXiv:2203.05481, Theorem 1). Both hold for ε_i
        that depend on earlier releases, and for runs that interleave (Haney et al. 2023, arXiv:2309.05901).
        Releases that are made again after a crash count against the plan.

    Args:
        budget: The owner's limits.
    """

    budget: Budget

    @property
    def run_delta(self) -> float:
        """δ_i, the δ at which the ε of each plan is computed."""
        choice = self.budget.filter
        return (self.budget.delta - choice.delta_prime) / choice.expected_runs

    @property
    def header(self) -> dict[str, object]:
        """See `PrivacyFilter.header`."""
        choice = self.budget.filter
        return header_of(
            self.budget,
            {
                "expected-runs": choice.expected_runs,
                "composition": choice.composition,
                "delta-prime": choice.delta_prime,
            },
        )

    def cost(self, releases: int, sampling_rate: float, noise_multiplier: float) -> float:
        """Return ε_i of a plan."""
        charge = SampledGaussians(sampling_rate, noise_multiplier, releases)
        return composed_epsilon((charge,), self.run_delta, COARSE_GRID)

    def plan_cost(self, plan: ReservedPlan) -> float:
        """Return ε_i of a plan with the selection of its start."""
        if not plan.selection_multiplier:
            return self.cost(plan.releases, plan.sampling_rate, plan.noise_multiplier)
        return mixed_epsilon(plan.charges(), plan.pure, self.run_delta, COARSE_GRID)

    def charges(self, made: LedgerContent) -> list[float]:
        """Return ε_i of each plan in the ledger, of each run that has events without a plan, and of each damaged line.

        Events without a plan occur in a ledger that is older than its filter. They are charged as one plan per run, at
        the run's largest q and smallest z. A damaged line may have been a plan, so it is charged as the largest plan
        that the owner admits.
        """
        charges = [self.plan_cost(plan) for plan in made.plans]
        charges += [self.cost(*terms) for terms in _unplanned(made).values()]
        largest = self.budget.filter.max_run_epsilon
        return charges + [self.budget.epsilon if largest is None else largest] * made.damaged

    def total(self, charges: Sequence[float]) -> float:
        """Return ε of some plans together; infinite if there are more plans than parts of δ."""
        choice = self.budget.filter
        if len(charges) > choice.expected_runs:
            return math.inf
        if choice.composition == "sum":
            return math.fsum(charges)
        squares = math.fsum(charge**2 for charge in charges)
        return math.sqrt(2 * math.log(1 / choice.delta_prime) * squares) + squares / 2

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """Refuse as `PrivacyFilter.check`: a new run's plan must fit, and an event must lie within its run's plan."""
        _check_plan_covers(plan, event)
        known = [reserved for reserved in made.plans if reserved.run == plan.run]
        if known and known != [plan]:
            raise PrivacyError(
                f"the ledger holds another plan of this run: {plan_words(known[0])}; requested is {plan_words(plan)}: "
                "a plan is fixed before its first release; the round is refused"
            )
        after = made if known else _with_plan(made, plan)
        self._check_total(made, after, plan)
        if event.is_selection:
            if made.selections(plan.run):
                raise PrivacyError("the start of this run is selected already; a second selection is refused")
        elif made.steps(plan.run) + event.releases > plan.releases:
            raise PrivacyError(
                f"{made.steps(plan.run)} of the {plan.releases} reserved releases of this run are made and the "
                f"round asks for {event.releases} more: the round is refused"
            )

    def _check_total(self, made: LedgerContent, after: LedgerContent, plan: ReservedPlan) -> None:
        choice, spent = self.budget.filter, self.charges(after)
        if self.total(spent) <= self.budget.epsilon and (
            after is made or choice.max_run_epsilon is None or self.plan_cost(plan) <= choice.max_run_epsilon
        ):
            return
        cost = self.plan_cost(plan)
        limit = "" if choice.max_run_epsilon is None else f", at most ε = {choice.max_run_epsilon:g} a run"
        raise PrivacyError(
            f"{budget_words(self.budget)}{limit}; {self.balance(made)}. The whole plan of this run, "
            f"{plan_words(plan)}, costs ε = {cost:.4g} at δ = {self.run_delta:.3g} and does not fit. "
            f"{rest_buys(self, made, plan)}: the round is refused"
        )

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """See `PrivacyFilter.affordable`."""
        spent, most = self.charges(made), self.budget.filter.max_run_epsilon

        def fits(cost: float) -> bool:
            return self.total([*spent, cost]) <= self.budget.epsilon and (most is None or cost <= most)

        return most_releases(
            lambda releases: (SampledGaussians(sampling_rate, noise_multiplier, releases),),
            self.run_delta,
            self.budget.epsilon if most is None else most,
            fits,
        )

    def share(self, made: LedgerContent) -> float:
        """Return the larger one of the spent shares of ε and of the runs; see `PrivacyFilter.share`."""
        spent = self.charges(made)
        return max(self.total(spent) / self.budget.epsilon, len(spent) / self.budget.filter.expected_runs)

    def balance(self, made: LedgerContent) -> str:
        """See `PrivacyFilter.balance`."""
        spent, runs = self.charges(made), self.budget.filter.expected_runs
        if not self.total(spent) < self.budget.epsilon:
            return f"{len(spent)} plans of at most {runs} are charged and nothing is left: the ledger is closed"
        left = self.budget.epsilon - self.total(spent)
        return (
            f"ε = {self.total(spent):.4g} is reserved for {len(spent)} of {runs} runs, ε = {left:.4g} and "
            f"{runs - len(spent)} runs are left"
        )

    def claim(self) -> str:
        """See `PrivacyFilter.claim`."""
        choice = self.budget.filter
        how = "added up" if choice.composition == "sum" else f"by advanced composition, δ′ = {choice.delta_prime:g}"
        return (
            f"reserve: whole plans of at most {choice.expected_runs} runs, each charged before its first release at "
            f"δ = {self.run_delta:.3g}, {how}" + ("; no second run will fit" if choice.expected_runs == 1 else "")
        )


def _check_plan_covers(plan: ReservedPlan, event: LedgerEvent) -> None:
    if event.is_selection:
        if not plan.covers_selection(event):
            raise PrivacyError(
                f"a selection of the start at z = {event.noise_multiplier:g} is not in the run's plan, "
                f"{plan_words(plan)}; it is refused"
            )
        return
    if event.kind != "gaussian" or (event.sampling_rate, event.noise_multiplier) != (
        plan.sampling_rate,
        plan.noise_multiplier,
    ):
        raise PrivacyError(
            f"a release of kind {event.kind} at q = {event.sampling_rate:g} and z = {event.noise_multiplier:g} is not "
            f"in the run's plan, {plan_words(plan)}; the round is refused"
        )


def _with_plan(made: LedgerContent, plan: ReservedPlan) -> LedgerContent:
    return replace(made, plans=(*made.plans, plan))


def _unplanned(made: LedgerContent) -> dict[str, tuple[int, float, float]]:
    """Return releases, largest q and smallest z of each run's events that no plan in the ledger covers."""
    room = Counter[tuple[str, float, float]]()
    for plan in made.plans:
        room[plan.run, plan.sampling_rate, plan.noise_multiplier] += plan.releases
    selected = {plan.run: plan for plan in made.plans}
    run_terms: dict[str, tuple[int, float, float]] = {}
    for event in made.events:
        plan = selected.get(event.run)
        if plan is not None and plan.covers_selection(event):
            del selected[event.run]  # a plan covers one selection
            continue
        terms = (event.run, event.sampling_rate, event.noise_multiplier)
        if room[terms] >= event.releases:
            room[terms] -= event.releases
            continue
        releases, rate, noise = run_terms.get(event.run, (0, 0.0, math.inf))
        run_terms[event.run] = (
            releases + event.releases,
            max(rate, event.sampling_rate),
            min(noise, event.noise_multiplier),
        )
    return run_terms
