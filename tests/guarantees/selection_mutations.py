"""Bugs in the selection of a start, each planted in the running code."""

from typing import Any

from torch import Tensor

import fl_dualpriv.client.selection
import fl_dualpriv.config.plans
import fl_dualpriv.tasks.candidates
from fl_dualpriv.client.selection import SelectionRound
from fl_dualpriv.privacy import selection
from fl_dualpriv.privacy.accounting import SampledGaussians
from fl_dualpriv.privacy.calibration import calibrate_noise_multiplier
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent, ReservedPlan
from fl_dualpriv.privacy.noise import RandomSource
from tests.guarantees import selection_checks
from tests.guarantees.mutation import Mutation, Patch


def votes_have_sensitivity_1(patch: Patch) -> None:
    patch.setattr(selection, "vote_sensitivity", lambda candidates: 1.0)


def votes_of_unreadable_records_count(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.tasks.candidates, "is_readable", lambda features: True)


def a_choice_has_twice_its_epsilon(patch: Patch) -> None:
    """The exponent of a mechanism whose scores have sensitivity 1/2."""
    choose = selection.choose

    def twice(counts: Tensor, pure_epsilon: float, source: RandomSource) -> int:
        return choose(counts, 2 * pure_epsilon, source)

    patch.setattr(selection, "choose", twice)


def a_selection_is_written_after_its_draw(patch: Patch) -> None:
    waiting: list[tuple[Ledger, LedgerEvent]] = []
    record, draw = Ledger.record, SelectionRound._release
    patch.setattr(Ledger, "record", lambda self, event: waiting.append((self, event)))

    def then_written(self: SelectionRound, partition: int, terms: Any) -> Tensor:
        found = draw(self, partition, terms)
        while waiting:
            record(*waiting.pop())
        return found

    patch.setattr(SelectionRound, "_release", then_written)


def a_selection_that_is_asked_twice_is_drawn_twice(patch: Patch) -> None:
    patch.setattr(SelectionRound, "_saved", lambda self, partition, terms: None)
    patch.setattr(
        fl_dualpriv.client.selection, "is_same_selection", lambda made, state, event, reproducible: event in made.events
    )


def a_selection_is_left_out_of_epsilon(patch: Patch) -> None:
    def steps_only(self: ReservedPlan) -> tuple[SampledGaussians, ...]:
        return (SampledGaussians(self.sampling_rate, self.noise_multiplier, self.releases),)

    patch.setattr(ReservedPlan, "charges", steps_only)
    patch.setattr(ReservedPlan, "pure", property(lambda self: ()))


def steps_get_all_of_epsilon(patch: Patch) -> None:
    def whole(epsilon: float, delta: float, rate: float, releases: int, *others: Any) -> float:
        return calibrate_noise_multiplier(epsilon, delta, rate, releases)

    patch.setattr(fl_dualpriv.config.plans, "calibrate_beside", whole)


def a_reserved_plan_leaves_out_the_selection(patch: Patch) -> None:
    def steps_only(self: ReserveFilter, plan: ReservedPlan) -> float:
        return self.cost(plan.releases, plan.sampling_rate, plan.noise_multiplier)

    patch.setattr(ReserveFilter, "plan_cost", steps_only)


def terms_of_a_selection_are_not_checked(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.selection, "check_selection_terms", lambda own, offered: None)


def a_start_is_selected_at_any_time(patch: Patch) -> None:
    patch.setattr(fl_dualpriv.client.selection, "check_selection", lambda made, state, event: None)


SELECTION_MUTATIONS = (
    Mutation(
        name="votes on a start have sensitivity 1 and not √K/2",
        where="fl_dualpriv.privacy.selection.vote_sensitivity",
        plant=votes_have_sensitivity_1,
        caught_by=(
            selection_checks.no_vote_exceeds_the_sensitivity,
            selection_checks.the_noise_of_votes_has_the_stated_scale,
        ),
    ),
    Mutation(
        name="a record that cannot be read votes on the start",
        where="fl_dualpriv.tasks.candidates.is_readable",
        plant=votes_of_unreadable_records_count,
        caught_by=(selection_checks.an_unreadable_record_is_a_zero_row,),
    ),
    Mutation(
        name="a client's choice of its start has twice its ε",
        where="fl_dualpriv.privacy.selection.choose",
        plant=a_choice_has_twice_its_epsilon,
        caught_by=(
            selection_checks.the_choice_has_the_law_of_the_exponential_mechanism,
            selection_checks.one_record_changes_a_choice_by_at_most_e_to_the_epsilon,
        ),
    ),
    Mutation(
        name="the selection of a start is written after its draw",
        where="fl_dualpriv.client.selection.SelectionRound._release",
        plant=a_selection_is_written_after_its_draw,
        caught_by=(
            selection_checks.a_selection_is_in_the_ledger_before_its_draw,
            selection_checks.a_selection_that_a_crash_ended_is_the_same_release_or_none,
        ),
    ),
    Mutation(
        name="a selection that is asked for twice is drawn twice for one event",
        where="fl_dualpriv.client.selection.SelectionRound._saved",
        plant=a_selection_that_is_asked_twice_is_drawn_twice,
        caught_by=(selection_checks.a_selection_is_made_once,),
    ),
    Mutation(
        name="the selection of a start is left out of ε",
        where="ReservedPlan.charges",
        plant=a_selection_is_left_out_of_epsilon,
        caught_by=(
            selection_checks.the_selection_is_composed_with_the_steps,
            selection_checks.a_given_multiplier_is_composed_with_the_selection,
        ),
    ),
    Mutation(
        name="the steps get all of ε beside the selection of a start",
        where="fl_dualpriv.config.plans.calibrate_beside",
        plant=steps_get_all_of_epsilon,
        caught_by=(selection_checks.the_selection_is_composed_with_the_steps,),
    ),
    Mutation(
        name="a reserved plan leaves out the selection of its start",
        where="ReserveFilter.plan_cost",
        plant=a_reserved_plan_leaves_out_the_selection,
        caught_by=(selection_checks.a_reserved_plan_charges_the_selection,),
    ),
    Mutation(
        name="a client selects a start on weaker terms than its own",
        where="fl_dualpriv.client.selection.check_selection_terms",
        plant=terms_of_a_selection_are_not_checked,
        caught_by=(selection_checks.weaker_selections_are_refused,),
    ),
    Mutation(
        name="a start is selected after round 1",
        where="fl_dualpriv.client.selection.check_selection",
        plant=a_start_is_selected_at_any_time,
        caught_by=(selection_checks.a_start_is_selected_before_round_1,),
    ),
)
