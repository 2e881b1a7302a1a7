"""Bugs in the filters of a lifetime budget, each planted in the running code."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import renyi_bound, renyi_divergence
from fl_dualpriv.privacy.filters import choose as filters
from fl_dualpriv.privacy.filters.budget import FilterChoice
from fl_dualpriv.privacy.filters.renyi import RENYI_ORDERS, RenyiFilter
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent, ReservedPlan
from tests.guarantees import filter_checks
from tests.guarantees.mutation import Mutation, Patch

_PATHS: dict[tuple[object, ...], float] = {}
"""δ and releases of a path by their terms → its ε: many paths of a game hold the same releases in another order."""


def _along_the_path(self: Any, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
    budget, releases = self.budget, Counter[tuple[float, float]]()
    for e in (*made.events, event):
        releases[e.sampling_rate, e.noise_multiplier] += e.releases
    key = (budget.delta, made.damaged, *sorted(releases.items()))
    if key not in _PATHS:
        _PATHS[key] = made.epsilon(budget.delta, [event], 1e-2)  # a grid as wide as the games': a second is enough
    if not _PATHS[key] <= budget.epsilon:
        raise PrivacyError("the budget is spent")


def plans_are_admitted_by_the_pld_of_the_path(patch: Patch) -> None:
    """Before a run starts, the ε of everything that happened and of the run, as if it had been fixed beforehand."""

    def check(self: ReserveFilter, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        _along_the_path(self, made, plan, replace(event, releases=plan.releases))

    patch.setattr(ReserveFilter, "check", check)


def releases_are_charged_at_their_own_terms(patch: Patch) -> None:
    patch.setattr(WorstTermsFilter, "check", _along_the_path)


def the_best_order_is_chosen_along_the_path(patch: Patch) -> None:
    def check(self: RenyiFilter, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        events, budget = [*made.events, event], self.budget
        for order in RENYI_ORDERS:
            spent = [e.releases * renyi_divergence(e.sampling_rate, e.noise_multiplier, order) for e in events]
            if math.fsum(spent) <= renyi_bound(budget.epsilon, budget.delta, order):
                return
        raise PrivacyError("the budget is spent")

    patch.setattr(RenyiFilter, "check", check)


def a_plan_is_refunded(patch: Patch) -> None:
    """A run that stopped early is charged for the releases that it made."""
    charges = ReserveFilter.charges

    def refunded(self: ReserveFilter, made: LedgerContent) -> list[float]:
        plans = [replace(plan, releases=max(1, made.releases(plan.run))) for plan in made.plans]
        return charges(self, replace(made, plans=tuple(plans)))

    patch.setattr(ReserveFilter, "charges", refunded)


def delta_is_not_divided_among_runs(patch: Patch) -> None:
    patch.setattr(ReserveFilter, "run_delta", property(lambda self: self.budget.delta))


def delta_prime_is_not_set_aside(patch: Patch) -> None:
    patch.setattr(
        ReserveFilter, "run_delta", property(lambda self: self.budget.delta / self.budget.filter.expected_runs)
    )


def the_order_is_read_from_the_ledger(patch: Patch) -> None:
    find = filters.filter_of

    def check(made: LedgerContent, now: Mapping[str, object]) -> None:
        for header in made.headers:
            for own in (filter_checks.BUDGET, replace(filter_checks.BUDGET, filter=FilterChoice(name="renyi"))):
                patch.setitem(find(own).__dict__, "order", header.get("order"))
            if header != now | {"order": header.get("order")}:
                raise PrivacyError("another filter")

    patch.setattr(filters, "check_header", check)


def a_changed_header_is_ignored(patch: Patch) -> None:
    patch.setattr(filters, "check_header", lambda made, now: None)


def the_header_is_not_synced(patch: Patch) -> None:
    def begin(self: Ledger, header: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"header": dict(header)}) + "\n")

    patch.setattr(Ledger, "begin", begin)


def a_damaged_line_is_free(patch: Patch) -> None:
    read = Ledger.read
    patch.setattr(Ledger, "read", lambda self: replace(read(self), damaged=0))


FILTER_MUTATIONS = (
    Mutation(
        name="plans are admitted by the PLD of the path that happened",
        where="ReserveFilter.check",
        plant=plans_are_admitted_by_the_pld_of_the_path,
        caught_by=(filter_checks.small_games_stay_within_delta,),
    ),
    Mutation(
        name="a filter of worst terms charges a release at its own terms",
        where="WorstTermsFilter.check",
        plant=releases_are_charged_at_their_own_terms,
        caught_by=(filter_checks.all_releases_fit_at_the_worst_terms,),
    ),
    Mutation(
        name="the best Rényi order is chosen along the path that happened",
        where="RenyiFilter.check",
        plant=the_best_order_is_chosen_along_the_path,
        caught_by=(filter_checks.all_divergences_are_bounded_at_the_order_of_the_owners_file,),
    ),
    Mutation(
        name="a reserved plan is refunded where a run stops early",
        where="ReserveFilter.charges",
        plant=a_plan_is_refunded,
        caught_by=(filter_checks.a_reserved_plan_is_never_refunded,),
    ),
    Mutation(
        name="δ is not divided among the expected runs",
        where="ReserveFilter.run_delta",
        plant=delta_is_not_divided_among_runs,
        caught_by=(filter_checks.rare_disasters_do_not_pass_delta,),
    ),
    Mutation(
        name="δ′ of advanced composition is not set aside",
        where="ReserveFilter.run_delta",
        plant=delta_prime_is_not_set_aside,
        caught_by=(filter_checks.what_runs_may_show_and_the_composition_stay_within_delta,),
    ),
    Mutation(
        name="the Rényi order is read from the ledger",
        where="fl_dualpriv.privacy.filters.choose.check_header",
        plant=the_order_is_read_from_the_ledger,
        caught_by=(filter_checks.the_numbers_of_a_filter_come_from_the_owners_file,),
    ),
    Mutation(
        name="a ledger goes on under another filter",
        where="fl_dualpriv.privacy.filters.choose.check_header",
        plant=a_changed_header_is_ignored,
        caught_by=(filter_checks.the_numbers_of_a_filter_come_from_the_owners_file,),
    ),
    Mutation(
        name="the header of a ledger is not synced before the first event",
        where="Ledger.begin",
        plant=the_header_is_not_synced,
        caught_by=(filter_checks.the_header_is_on_disk_before_the_first_event,),
    ),
    Mutation(
        name="a damaged line of a ledger costs nothing",
        where="Ledger.read",
        plant=a_damaged_line_is_free,
        caught_by=(filter_checks.a_damaged_line_is_charged_at_the_worst,),
    ),
)
