"""Privacy filters: the rules by which a lifetime budget admits releases, and the one way to spend it.

A server or a person may choose the terms (q, z, steps) of a run after seeing what earlier runs released. The ε of the
terms that happened, composed afterwards, is no bound then: a server that stops where its luck was good, and goes on
where it was not, leaks more than δ says (arXiv:2602.15815). Each rule here is proved for such choices. A ledger has one
rule for its whole life, which stands in its first line.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    SampledGaussians,
    composed_epsilon,
    gathered,
    renyi_bound,
    renyi_divergence,
)
from fl_dualpriv.privacy.budget import Budget
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent, ReservedPlan

RENYI_ORDERS = (*(2 + i / 4 for i in range(33)), *range(11, 65), 80, 96, 128, 192, 256)
"""The candidates from which `best_order` takes one, before the first release."""

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


@dataclass(frozen=True)
class ReserveFilter:
    """``reserve``: the whole plan of a run is charged at its PLD before the run's first release, and never refunded.

    Guarantee:
        As `PrivacyFilter`. A plan's terms are fixed before its first release, so the run is an interactive mechanism
        that is (ε_i, δ_i)-DP by PLD, with δ_i = (δ − δ′) / ``expected_runs``. With ``sum`` the plans that are admitted
        have Σ ε_i ≤ ε and Σ δ_i ≤ δ (Rogers et al. 2016, arXiv:1605.08294). With ``advanced`` they have
        √(2 log(1/δ′) Σ ε_i²) + ½ Σ ε_i² ≤ ε (Whitehouse et al. 2023, arXiv:2203.05481, Theorem 1). Both hold for ε_i
        chosen from earlier releases, and for runs that interleave (Haney et al. 2023, arXiv:2309.05901). Releases that
        are made again after a crash count against the plan.

    Args:
        budget: The owner's limits.
    """

    budget: Budget

    @property
    def run_delta(self) -> float:
        """δ_i, at which the ε of each plan is taken."""
        choice = self.budget.filter
        return (self.budget.delta - choice.delta_prime) / choice.expected_runs

    @property
    def header(self) -> dict[str, object]:
        """As `PrivacyFilter.header`."""
        choice = self.budget.filter
        return _header(
            self.budget,
            {
                "expected-runs": choice.expected_runs,
                "composition": choice.composition,
                "delta-prime": choice.delta_prime,
            },
        )

    def cost(self, releases: int, sampling_rate: float, noise_multiplier: float) -> float:
        """ε_i of a plan."""
        charge = SampledGaussians(sampling_rate, noise_multiplier, releases)
        return composed_epsilon((charge,), self.run_delta, COARSE_GRID)

    def charges(self, made: LedgerContent) -> list[float]:
        """ε_i of each plan in the ledger, of each run that has events without a plan, and of each damaged line.

        Events without a plan are those of a ledger that is older than its filter. They are charged as one plan a run,
        at the run's largest q and smallest z. A damaged line may have been a plan, so it is charged as the largest
        one that the owner admits.
        """
        charges = [self.cost(plan.releases, plan.sampling_rate, plan.noise_multiplier) for plan in made.plans]
        charges += [self.cost(*terms) for terms in _unplanned(made).values()]
        largest = self.budget.filter.max_run_epsilon
        return charges + [self.budget.epsilon if largest is None else largest] * made.damaged

    def total(self, charges: Sequence[float]) -> float:
        """ε of some plans together; infinite if there are more than δ was divided for."""
        choice = self.budget.filter
        if len(charges) > choice.expected_runs:
            return math.inf
        if choice.composition == "sum":
            return math.fsum(charges)
        squares = math.fsum(charge**2 for charge in charges)
        return math.sqrt(2 * math.log(1 / choice.delta_prime) * squares) + squares / 2

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """As `PrivacyFilter.check`: a new run's plan must fit, and an event must lie within its run's plan."""
        _check_plan_covers(plan, event)
        known = [reserved for reserved in made.plans if reserved.run == plan.run]
        if known and known != [plan]:
            raise PrivacyError(
                f"the ledger holds another plan of this run: {_words(known[0])}; asked is {_words(plan)}: a plan is "
                "fixed before its first release; the round is refused"
            )
        after = made if known else _with_plan(made, plan)
        self._check_total(made, after, plan)
        if made.releases(plan.run) + event.releases > plan.releases:
            raise PrivacyError(
                f"{made.releases(plan.run)} of the {plan.releases} reserved releases of this run are made and the "
                f"round asks for {event.releases} more: the round is refused"
            )

    def _check_total(self, made: LedgerContent, after: LedgerContent, plan: ReservedPlan) -> None:
        choice, spent = self.budget.filter, self.charges(after)
        if self.total(spent) <= self.budget.epsilon and (
            after is made
            or choice.max_run_epsilon is None
            or self.cost(plan.releases, plan.sampling_rate, plan.noise_multiplier) <= choice.max_run_epsilon
        ):
            return
        cost = self.cost(plan.releases, plan.sampling_rate, plan.noise_multiplier)
        limit = "" if choice.max_run_epsilon is None else f", at most ε = {choice.max_run_epsilon:g} a run"
        raise PrivacyError(
            f"{_budget_words(self.budget)}{limit}; {self.balance(made)}. The whole plan of this run, {_words(plan)}, "
            f"costs ε = {cost:.4g} at δ = {self.run_delta:.3g} and does not fit. "
            f"{_buys(self, made, plan)}: the round is refused"
        )

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """As `PrivacyFilter.affordable`."""
        spent, most = self.charges(made), self.budget.filter.max_run_epsilon

        def fits(releases: int) -> bool:
            cost = self.cost(releases, sampling_rate, noise_multiplier)
            return self.total([*spent, cost]) <= self.budget.epsilon and (most is None or cost <= most)

        return _largest(fits)

    def share(self, made: LedgerContent) -> float:
        """As `PrivacyFilter.share`: of ε or of the runs, whichever is larger."""
        spent = self.charges(made)
        return max(self.total(spent) / self.budget.epsilon, len(spent) / self.budget.filter.expected_runs)

    def balance(self, made: LedgerContent) -> str:
        """As `PrivacyFilter.balance`."""
        spent, runs = self.charges(made), self.budget.filter.expected_runs
        if not self.total(spent) < self.budget.epsilon:
            return f"{len(spent)} plans of at most {runs} are charged and nothing is left: the ledger is closed"
        left = self.budget.epsilon - self.total(spent)
        return (
            f"ε = {self.total(spent):.4g} is reserved for {len(spent)} of {runs} runs, ε = {left:.4g} and "
            f"{runs - len(spent)} runs are left"
        )

    def claim(self) -> str:
        """As `PrivacyFilter.claim`."""
        choice = self.budget.filter
        how = "added up" if choice.composition == "sum" else f"by advanced composition, δ′ = {choice.delta_prime:g}"
        return (
            f"reserve: whole plans of at most {choice.expected_runs} runs, each charged before its first release at "
            f"δ = {self.run_delta:.3g}, {how}"
        )


@dataclass(frozen=True)
class RenyiFilter:
    """``renyi``: the Rényi divergences of all releases, at one order, stay within that order's bound for (ε, δ).

    Guarantee:
        As `PrivacyFilter`. The sum of adaptively chosen Rényi divergences at a *fixed* order that never passes ρ gives
        divergence ρ of everything (Feldman and Zrnic 2021, arXiv:2008.11193, Theorem 3.1), interleaved runs too (Haney
        et al. 2023, arXiv:2309.05901), and ρ is the largest that implies (ε, δ) (`renyi_bound`). The order is a
        function of the owner's file only: the best order of the releases that happened would be chosen by them.

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
        """ρ, the largest divergence at `order` that everything together may have."""
        return renyi_bound(self.budget.epsilon, self.budget.delta, self.order)

    @property
    def header(self) -> dict[str, object]:
        """As `PrivacyFilter.header`."""
        return _header(self.budget, {"order": self.order})

    def spent(self, made: LedgerContent) -> float:
        """Divergence of everything in the ledger; a damaged line is charged as the largest round at worst terms."""
        total = math.fsum(self._cost(e.releases, e.sampling_rate, e.noise_multiplier) for e in made.events)
        budget = self.budget
        if not made.damaged:
            return total
        if not budget.min_noise_multiplier > 0:
            return math.inf
        line = (budget.filter.max_round_releases, budget.max_sampling_rate, budget.min_noise_multiplier)
        return total + made.damaged * self._cost(*line)

    def _cost(self, releases: int, sampling_rate: float, noise_multiplier: float) -> float:
        return releases * renyi_divergence(sampling_rate, noise_multiplier, self.order)

    def check(self, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        """As `PrivacyFilter.check`."""
        cost = self._cost(event.releases, event.sampling_rate, event.noise_multiplier)
        if not self.spent(made) + cost <= self.bound:
            raise PrivacyError(
                f"{_budget_words(self.budget)}; {self.balance(made)}. The round, {event.releases} releases at "
                f"q = {event.sampling_rate:g} and z = {event.noise_multiplier:g}, has divergence {cost:.4g}. "
                f"{_buys(self, made, plan)}: the round is refused"
            )

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """As `PrivacyFilter.affordable`."""
        spent = self.spent(made)
        return _largest(lambda releases: spent + self._cost(releases, sampling_rate, noise_multiplier) <= self.bound)

    def share(self, made: LedgerContent) -> float:
        """As `PrivacyFilter.share`."""
        return self.spent(made) / self.bound

    def balance(self, made: LedgerContent) -> str:
        """As `PrivacyFilter.balance`."""
        spent = self.spent(made)
        if not spent <= self.bound:
            return f"Rényi divergence {spent:.4g} of {self.bound:.4g} at order {self.order:g}: the ledger is closed"
        return (
            f"Rényi divergence {spent:.4g} of {self.bound:.4g} at order {self.order:g} is spent, "
            f"{self.bound - spent:.4g} is left"
        )

    def claim(self) -> str:
        """As `PrivacyFilter.claim`."""
        return f"renyi: divergences at the fixed order {self.order:g} add up to at most {self.bound:.4g}"


@dataclass(frozen=True)
class WorstTermsFilter:
    """``worst-terms``: every release is charged at the owner's largest q and smallest z, by PLD.

    Guarantee:
        As `PrivacyFilter`. A release at q ≤ q_max and z ≥ z_min is dominated by one at (q_max, z_min): smaller
        sampling is a mixture with the neighbour, and more noise is post-processing. So everything is dominated by one
        fixed sequence that a stopping time ends, and its PLD at the largest number of releases bounds it. Releases of
        another kind are refused, but for those whose worst terms and number are charged beforehand.

    Args:
        budget: The owner's limits.
        grid: Of the PLD.
    """

    budget: Budget
    grid: float = COARSE_GRID

    @property
    def header(self) -> dict[str, object]:
        """As `PrivacyFilter.header`."""
        budget, choice = self.budget, self.budget.filter
        return _header(
            budget,
            {
                "max-sampling-rate": budget.max_sampling_rate,
                "min-noise-multiplier": budget.min_noise_multiplier,
                "max-correlated-releases": choice.max_correlated_releases,
                "min-correlated-noise-multiplier": choice.min_correlated_noise_multiplier,
            },
        )

    def epsilon(self, releases: int) -> float:
        """ε of so many releases at the worst terms, with those that are charged beforehand."""
        choice = self.budget.filter
        charges = [SampledGaussians(self.budget.max_sampling_rate, self.budget.min_noise_multiplier, releases)]
        if choice.max_correlated_releases:
            other = choice.min_correlated_noise_multiplier
            charges.append(SampledGaussians(1.0, other, choice.max_correlated_releases))
        return composed_epsilon(tuple(charges), self.budget.delta, self.grid)

    def fits(self, releases: int) -> bool:
        """Whether ε of so many releases stays within the budget."""
        return self.epsilon(releases) <= self.budget.epsilon

    def epsilon_with(self, made: LedgerContent, further: Sequence[LedgerEvent]) -> float:
        """ε by this rule of a ledger and of further events; infinite if one lies outside the terms."""
        spent = self.spent(replace(made, events=(*made.events, *further)))
        return self.epsilon(int(spent)) if math.isfinite(spent) else math.inf

    def spent(self, made: LedgerContent) -> float:
        """Releases in the ledger, a damaged line as the largest round; infinite if one lies outside the terms."""
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
        """Why an event is not dominated by the worst terms; empty if it is."""
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
        """As `PrivacyFilter.check`."""
        if outside := self._outside(event):
            raise PrivacyError(f"outside the worst terms of the owner's file: {outside}; the round is refused")
        if event.kind == "correlated":
            fits = self._correlated(made) + event.releases <= self._most_correlated and self._open(made)
        else:
            fits = self._open(made) and self.fits(int(self.spent(made)) + event.releases)
        if not fits:
            raise PrivacyError(
                f"{_budget_words(self.budget)}; {self.balance(made)}. The round asks for {event.releases} more. "
                f"{_buys(self, made, plan)}: the round is refused"
            )

    def _open(self, made: LedgerContent) -> bool:
        return math.isfinite(self.spent(made))

    @functools.cached_property
    def most(self) -> int:
        """The largest number of releases that fits."""
        return _largest(self.fits)

    def affordable(self, made: LedgerContent, sampling_rate: float, noise_multiplier: float) -> int:
        """As `PrivacyFilter.affordable`; the same for all terms within the worst."""
        within = sampling_rate <= self.budget.max_sampling_rate and noise_multiplier >= self.budget.min_noise_multiplier
        return max(0, self.most - int(self.spent(made))) if within and self._open(made) else 0

    def share(self, made: LedgerContent) -> float:
        """As `PrivacyFilter.share`."""
        return self.spent(made) / self.most if self.most else math.inf

    def balance(self, made: LedgerContent) -> str:
        """As `PrivacyFilter.balance`."""
        if not self._open(made):
            return "the ledger holds releases outside the worst terms: it is closed"
        spent = int(self.spent(made))
        return f"{spent} of {self.most} releases at the worst terms are spent, {max(0, self.most - spent)} are left"

    def claim(self) -> str:
        """As `PrivacyFilter.claim`."""
        budget = self.budget
        return (
            f"worst-terms: at most {self.most} releases, each charged at q = {budget.max_sampling_rate:g} and z = "
            f"{budget.min_noise_multiplier:g}"
        )


@dataclass(frozen=True)
class GaussianSumFilter:
    """Rule of a server's ledger of correlated noise: inverse squares of unsampled Gaussian releases add up.

    Guarantee:
        Unsampled Gaussian releases whose multipliers are chosen adaptively, with Σ z⁻² never above μ², are together
        one Gaussian release of multiplier 1/μ (Smith and Thakurta 2022, arXiv:2210.17520). So their composed ε admits
        them. A ledger that holds a sampled release is closed.

    Args:
        budget: ε and δ.
        worst: The charge of a damaged line: the dearest round of the run.
    """

    budget: Budget
    worst: SampledGaussians

    @property
    def header(self) -> dict[str, object]:
        """As `PrivacyFilter.header`."""
        return {"filter": "gaussian-sum", "epsilon": self.budget.epsilon, "delta": self.budget.delta}

    def epsilon_with(self, made: LedgerContent, further: Sequence[LedgerEvent]) -> float:
        """ε by this rule of a ledger and of further events; infinite if one is sampled."""
        events = [*made.events, *further]
        if any(event.sampling_rate != 1 for event in events):
            return math.inf
        charges = [SampledGaussians(e.sampling_rate, e.noise_multiplier, e.releases) for e in events]
        return composed_epsilon(gathered([*charges, *[self.worst] * made.damaged]), self.budget.delta, FINE_GRID)


def filter_of(budget: Budget) -> PrivacyFilter:
    """The filter that the owner's file names."""
    return _filter(budget)


@functools.lru_cache(maxsize=64)
def _filter(budget: Budget) -> PrivacyFilter:
    match budget.filter.name:
        case "reserve":
            return ReserveFilter(budget)
        case "renyi":
            return RenyiFilter(budget)
        case "worst-terms":
            return WorstTermsFilter(budget)


def best_order(budget: Budget) -> float:
    """The Rényi order that admits the most releases on the terms that the owner expects.

    A function of the owner's file only. How many releases a run has does not matter: divergences add up.

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


def check_header(made: LedgerContent, chosen: PrivacyFilter) -> None:
    """Refuse a ledger that another filter, or the same one with other numbers, has begun.

    Guarantee:
        The rule that admits a release is the one that admitted all earlier releases. Its numbers come from the owner's
        file; the header only confirms them.

    Raises:
        PrivacyError: If a header differs, with what differs.
    """
    for header in made.headers:
        if differences := [
            f"{key} was {header.get(key)!r} and is now {chosen.header.get(key)!r}"
            for key in sorted(header.keys() | chosen.header.keys())
            if header.get(key) != chosen.header.get(key)
        ]:
            raise PrivacyError(
                "the ledger was begun with other numbers than the budget has now: "
                + "; ".join(differences)
                + ". A filter is fixed for the life of its ledger: put the old numbers back; the round is refused"
            )


def spend(ledger: Ledger, chosen: PrivacyFilter, plan: ReservedPlan, event: LedgerEvent) -> None:
    """Admit an event by a filter and write it: the one way to spend a lifetime budget.

    Guarantee:
        When this returns, the header, the run's plan where plans are reserved, and the event are on disk in this
        order, and the filter has admitted the event; the releases may be made. If it raises, nothing may be released.
        The caller holds the ledger (`Ledger.exclusive`).

    Args:
        ledger: Of one unit's data.
        chosen: The filter.
        plan: The whole plan of the event's run.
        event: Releases of one round, of this plan.

    Raises:
        PrivacyError: If the filter does not admit the event, or is not the ledger's.
        OSError: If a line cannot be written.
    """
    made = ledger.read()
    check_header(made, chosen)
    chosen.check(made, plan, event)
    if not made.headers:
        ledger.begin(chosen.header)
    if isinstance(chosen, ReserveFilter) and plan not in made.plans:
        ledger.reserve(plan)
    ledger.record(event)


def spend_budget(ledger: Ledger, budget: Budget, plan: ReservedPlan, event: LedgerEvent) -> None:
    """`spend` by the filter of an owner's budget.

    Raises:
        PrivacyError: As `spend`, and if a round has more releases than the owner admits in one line of the ledger.
        OSError: As `spend`.
    """
    most = budget.filter.max_round_releases
    if event.releases > most:
        raise PrivacyError(
            f"a round of {event.releases} releases; the owner of this node admits at most {most} "
            "(budget.max-round-releases): the round is refused"
        )
    spend(ledger, filter_of(budget), plan, event)


def _header(budget: Budget, numbers: dict[str, object]) -> dict[str, object]:
    return {"filter": budget.filter.name, "epsilon": budget.epsilon, "delta": budget.delta, **numbers}


def _check_plan_covers(plan: ReservedPlan, event: LedgerEvent) -> None:
    if event.kind != "gaussian" or (event.sampling_rate, event.noise_multiplier) != (
        plan.sampling_rate,
        plan.noise_multiplier,
    ):
        raise PrivacyError(
            f"a release of kind {event.kind} at q = {event.sampling_rate:g} and z = {event.noise_multiplier:g} is not "
            f"of the run's plan, {_words(plan)}; the round is refused"
        )


def _with_plan(made: LedgerContent, plan: ReservedPlan) -> LedgerContent:
    return replace(made, plans=(*made.plans, plan))


def _unplanned(made: LedgerContent) -> dict[str, tuple[int, float, float]]:
    """Releases, largest q and smallest z of each run's events that no plan in the ledger covers."""
    room = Counter[tuple[str, float, float]]()
    for plan in made.plans:
        room[plan.run, plan.sampling_rate, plan.noise_multiplier] += plan.releases
    found: dict[str, tuple[int, float, float]] = {}
    for event in made.events:
        terms = (event.run, event.sampling_rate, event.noise_multiplier)
        if room[terms] >= event.releases:
            room[terms] -= event.releases
            continue
        releases, rate, noise = found.get(event.run, (0, 0.0, math.inf))
        found[event.run] = (
            releases + event.releases,
            max(rate, event.sampling_rate),
            min(noise, event.noise_multiplier),
        )
    return found


def _largest(fits: Callable[[int], bool]) -> int:
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


def _buys(chosen: PrivacyFilter, made: LedgerContent, plan: ReservedPlan) -> str:
    most = chosen.affordable(made, plan.sampling_rate, plan.noise_multiplier)
    terms = f"q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"
    return f"The rest buys {most} releases at {terms}" if most else f"The rest buys no release at {terms}"


def _words(plan: ReservedPlan) -> str:
    return f"{plan.releases} releases at q = {plan.sampling_rate:g} and z = {plan.noise_multiplier:g}"


def _budget_words(budget: Budget) -> str:
    return f"the budget of this node's data is ε = {budget.epsilon:g} at δ = {budget.delta:g}"
