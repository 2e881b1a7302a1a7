"""Bugs in the books, in what a client refuses and in what is stated, each planted in the running code."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.stats import norm
from torch import Tensor

import fl_dualpriv.client.node
import fl_dualpriv.client.round
import fl_dualpriv.privacy.filters.pay
import fl_dualpriv.privacy.plan
import fl_dualpriv.privacy.step
import fl_dualpriv.server.results
from fl_dualpriv.client.round import TrainRound
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy import accounting, ledger, plan
from fl_dualpriv.privacy.accounting import SampledGaussians
from fl_dualpriv.privacy.filters import base, reserve, worst_terms
from fl_dualpriv.privacy.filters.budget import Budget
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent, ReservedPlan
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.run.tables import SEEDED_NOTE
from fl_dualpriv.server.accounting import BudgetExhausted, RoundAccountant, ServerPrivacy
from fl_dualpriv.server.strategy import RoundStrategy
from tests.guarantees import accounting_checks, run_checks, server_checks
from tests.guarantees.mutation import Mutation, Patch

# --- books ------------------------------------------------------------------------------------------------------------


def a_client_writes_its_ledger_afterwards(patch: Patch) -> None:
    waiting: list[tuple[Ledger, LedgerEvent]] = []
    record, step = Ledger.record, TrainRound._step
    patch.setattr(Ledger, "record", lambda self, event: waiting.append((self, event)))

    def then_written(self: TrainRound, ready: list[Any]) -> None:
        step(self, ready)
        while waiting:
            record(*waiting.pop())

    patch.setattr(TrainRound, "_step", then_written)


def the_server_writes_its_ledger_afterwards(patch: Patch) -> None:
    waiting: list[tuple[RoundAccountant, int]] = []
    write, noised = RoundAccountant.write, RoundStrategy._noised
    patch.setattr(RoundAccountant, "write", lambda self, server_round: waiting.append((self, server_round)))

    def then_written(
        self: RoundStrategy, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy, source: RandomSource
    ) -> Tensor:
        # The stream of the noise is made before this is called: the check looks when it is.
        found = noised(self, partitions, diffs, privacy, source)
        while waiting:
            write(*waiting.pop())
        return found

    patch.setattr(RoundStrategy, "_noised", then_written)


def an_event_counts_one_release(patch: Patch) -> None:
    """With the count of a payment in place such a round ends after one step; see test_step.py."""

    def short(**fields: Any) -> LedgerEvent:
        return replace(LedgerEvent(**fields), releases=1)

    patch.setattr(fl_dualpriv.privacy.plan, "LedgerEvent", short)
    patch.setattr(fl_dualpriv.privacy.step.Payment, "take", lambda self: None)


def the_server_checks_its_budget_afterwards(patch: Patch) -> None:
    """What was spent is looked at, and not what the round would add: too late by one."""

    def too_late(self: RoundAccountant, server_round: int) -> None:
        privacy = self._privacy
        assert privacy.ledger is not None
        assert privacy.max_epsilon is not None
        if privacy.ledger.read().epsilon(privacy.delta) > privacy.max_epsilon:
            raise BudgetExhausted("the budget is spent")

    patch.setattr(RoundAccountant, "check", too_late)


def a_client_checks_its_budget_afterwards(patch: Patch) -> None:
    def too_late(self: WorstTermsFilter, made: LedgerContent, plan: ReservedPlan, event: LedgerEvent) -> None:
        if not self.fits(made.releases()):
            raise PrivacyError("the budget is spent")

    patch.setattr(WorstTermsFilter, "check", too_late)


def a_new_token_is_a_new_budget(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.privacy.filters.pay, "check_single_run", lambda plan, made, event: None)


# --- what is refused --------------------------------------------------------------------------------------------------


def terms_are_not_checked(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.round, "check_terms", lambda own, offered: None)


def an_owners_demand_for_integers_is_forgotten(patch: Patch) -> None:
    check = Budget.check_plan

    def lenient(self: Budget, plan: RecordLevelPlan | None, *, reproducible: bool) -> None:
        check(replace(self, integer_arithmetic=False), plan, reproducible=reproducible)

    patch.setattr(Budget, "check_plan", lenient)


def terms_say_nothing_of_the_arithmetic(patch: Patch) -> None:
    make = fl_dualpriv.client.node.round_terms
    patch.setattr(fl_dualpriv.client.node, "round_terms", lambda *given: replace(make(*given), arithmetic="float"))


def a_repetition_is_answered(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.round, "check_round", lambda plan, made, state, event: None)


def a_crashed_round_is_made_again_for_its_event(patch: Patch) -> None:
    """As is right with a seed, whatever the randomness."""

    def any_randomness(made: Any, state: Any, event: Any, *, reproducible: bool) -> bool:
        return event in made.events

    patch.setattr(fl_dualpriv.client.round, "is_same_release", any_randomness)


def private_images_are_scored(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.node, "may_score", lambda config: True)


# --- what is stated ---------------------------------------------------------------------------------------------------


def the_accountant_is_a_central_limit(patch: Patch) -> None:
    """Opacus' "gdp": Gaussian DP by a central limit theorem (Bu et al. 2020, arXiv:1911.11607, Corollary 5.4)."""

    def approximate(charges: tuple[SampledGaussians, ...], delta: float, grid: float = 1.0) -> float:
        squared = sum(c.sampling_rate**2 * c.releases * math.expm1(c.noise_multiplier**-2) for c in charges)
        mu = math.sqrt(squared)
        low, high = 0.0, 100.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            spent = norm.cdf(mu / 2 - middle / mu) - math.exp(middle) * norm.cdf(-mu / 2 - middle / mu)
            low, high = (middle, high) if spent > delta else (low, middle)
        return high

    for module in (accounting, ledger, plan, reserve, base, worst_terms):  # all that look the name up
        patch.setattr(module, "composed_epsilon", approximate)


def a_refined_pld_rounds_losses_down(patch: Patch) -> None:
    make = accounting.one_release_pld

    def shifted(charge: SampledGaussians, grid: float, tail: float) -> Any:
        made: Any = make(charge, grid, tail)
        for masses in (made._pmf_remove, made._pmf_add):
            masses._lower_loss -= 1
        return made

    patch.setattr(accounting, "one_release_pld", shifted)


def the_addition_is_not_turned_round(patch: Patch) -> None:
    make = accounting.one_release_pld

    def plain(charge: SampledGaussians, grid: float, tail: float) -> Any:
        made: Any = make(charge, grid, tail)
        made._pmf_remove = made._pmf_add
        return made

    patch.setattr(accounting, "one_release_pld", plain)


def shown_coins_are_the_mean_number(patch: Patch) -> None:
    patch.setattr(accounting.binom, "isf", lambda mass, releases, rate: releases * rate)


def seeded_noise_for_the_kernels(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.node, "random_sources", lambda randomness: KeyedRandom)


def seeded_noise_without_its_mark(patch: Patch) -> None:
    make = fl_dualpriv.server.results.notes

    def silent(*plans: Any, scored: bool) -> list[str]:
        return [note for note in make(*plans, scored=scored) if not note.startswith(SEEDED_NOTE)]

    patch.setattr(fl_dualpriv.server.results, "notes", silent)


BOOK_MUTATIONS = (
    Mutation(
        name="a client's ledger is written after the release",
        where="fl_dualpriv.client.round.TrainRound._step",
        plant=a_client_writes_its_ledger_afterwards,
        caught_by=(
            run_checks.a_client_writes_its_ledger_before_its_noise,
            run_checks.the_ledger_covers_every_release,
        ),
    ),
    Mutation(
        name="the server's ledger is written after the release",
        where="RoundAccountant.write",
        plant=the_server_writes_its_ledger_afterwards,
        caught_by=(server_checks.a_round_is_in_the_ledger_before_its_noise,),
    ),
    Mutation(
        name="the event of a round counts one release, the round makes two, and no payment is counted down",
        where="fl_dualpriv.privacy.plan.LedgerEvent, fl_dualpriv.privacy.step.Payment.take",
        plant=an_event_counts_one_release,
        caught_by=(run_checks.the_ledger_covers_every_release,),
    ),
    Mutation(
        name="the server checks its budget after the release",
        where="RoundAccountant.check",
        plant=the_server_checks_its_budget_afterwards,
        caught_by=(server_checks.no_round_starts_above_the_servers_budget,),
    ),
    Mutation(
        name="a client checks its owner's budget after the release",
        where="WorstTermsFilter.check",
        plant=a_client_checks_its_budget_afterwards,
        caught_by=(run_checks.no_round_exceeds_the_owners_budget,),
    ),
    Mutation(
        name="a new run token opens a new budget",
        where="fl_dualpriv.privacy.filters.pay.check_single_run",
        plant=a_new_token_is_a_new_budget,
        caught_by=(run_checks.no_run_starts_on_what_another_spent,),
    ),
    Mutation(
        name="a client accepts weaker terms than its own",
        where="fl_dualpriv.client.round.check_terms",
        plant=terms_are_not_checked,
        caught_by=(run_checks.weaker_terms_are_refused,),
    ),
    Mutation(
        name="an owner's demand for integer arithmetic is not checked",
        where="Budget.check_plan",
        plant=an_owners_demand_for_integers_is_forgotten,
        caught_by=(run_checks.floats_are_refused_where_the_owner_demands_integers,),
    ),
    Mutation(
        name="the terms of a round leave out the arithmetic",
        where="fl_dualpriv.client.node.round_terms",
        plant=terms_say_nothing_of_the_arithmetic,
        caught_by=(run_checks.floats_are_refused_from_an_integer_run,),
    ),
    Mutation(
        name="scores on private images leave",
        where="fl_dualpriv.client.node.may_score",
        plant=private_images_are_scored,
        caught_by=(run_checks.private_scores_stay,),
    ),
    Mutation(
        name="a repeated message is answered again",
        where="fl_dualpriv.client.round.check_round",
        plant=a_repetition_is_answered,
        caught_by=(run_checks.a_round_is_done_once,),
    ),
    Mutation(
        name="with randomness of the system a round that a crash ended is made again for its old event",
        where="fl_dualpriv.client.round.is_same_release",
        plant=a_crashed_round_is_made_again_for_its_event,
        caught_by=(run_checks.a_round_is_done_once,),
    ),
    Mutation(
        name="the accountant is a central limit (GDP)",
        where="fl_dualpriv.privacy.accounting.composed_epsilon",
        plant=the_accountant_is_a_central_limit,
        caught_by=(
            accounting_checks.epsilon_is_dp_accountings_and_the_reference_table_s,
            accounting_checks.plans_and_ledgers_state_dp_accountings_epsilon,
        ),
    ),
    Mutation(
        name="the PLD of a chosen grid rounds losses down",
        where="fl_dualpriv.privacy.accounting.one_release_pld",
        plant=a_refined_pld_rounds_losses_down,
        caught_by=(accounting_checks.a_pld_on_any_grid_is_an_upper_bound,),
    ),
    Mutation(
        name="the PLD of a chosen grid knows the addition of a record only",
        where="fl_dualpriv.privacy.accounting.one_release_pld",
        plant=the_addition_is_not_turned_round,
        caught_by=(accounting_checks.a_pld_on_any_grid_is_an_upper_bound,),
    ),
    Mutation(
        name="shown coins count the mean number of samples",
        where="fl_dualpriv.privacy.accounting.binom.isf",
        plant=shown_coins_are_the_mean_number,
        caught_by=(accounting_checks.bounds_without_a_grid_are_upper_bounds,),
    ),
    Mutation(
        name="noise from a seed is reported as the kernel's",
        where="fl_dualpriv.client.node.random_sources",
        plant=seeded_noise_for_the_kernels,
        caught_by=(run_checks.randomness_of_the_kernel_does_not_repeat,),
    ),
    Mutation(
        name="a seeded run is reported without its mark",
        where="fl_dualpriv.server.results.notes",
        plant=seeded_noise_without_its_mark,
        caught_by=(run_checks.seeded_noise_is_marked,),
    ),
)
