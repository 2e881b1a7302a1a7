"""Bugs in adaptive clipping and in correlated noise, each planted in the running code."""

import contextlib
import math

import numpy as np
from torch import Tensor

from fl_dualpriv.privacy import adaptive as quantile
from fl_dualpriv.privacy.accounting import SampledGaussians
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.correlated import BandedNoise, CorrelatedNoise, TreeNoise
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, poisson_sample
from fl_dualpriv.server import noise_memory as round_memory
from fl_dualpriv.server import strategy as server
from fl_dualpriv.server.strategy import RoundStrategy
from tests.guarantees import central_checks, limit_checks
from tests.guarantees.book_mutations import the_server_writes_its_ledger_afterwards
from tests.guarantees.mutation import Mutation, Patch
from tests.guarantees.server_mutations import one_noise_for_all_rounds


def counts_cost_nothing(patch: Patch) -> None:
    patch.setattr(AdaptiveClip, "update_noise_multiplier", lambda self, total: total)


def counts_are_released_without_noise(patch: Patch) -> None:
    def clean(self: AdaptiveClip, updates: Tensor, bound: float, arithmetic: Arithmetic, source: RandomSource) -> float:
        bits = self.bits(updates, bound, arithmetic)
        return 0.5 + float(bits.value) * (bits.grid or 1.0) / self.expected_cohort

    patch.setattr(AdaptiveClip, "released_share", clean)


def a_clip_norm_moves_out_of_range(patch: Patch) -> None:
    patch.setattr(quantile, "clamped_clip_norm", lambda value: value)


def the_clip_norm_moves_the_wrong_way(patch: Patch) -> None:
    """As in Flower 1.41."""
    moved = AdaptiveClip.moved
    patch.setattr(AdaptiveClip, "moved", lambda self, bound, share: bound**2 / moved(self, bound, share))


def noise_stays_at_the_first_clip_norm(patch: Patch) -> None:
    def first(self: RoundStrategy) -> float:
        assert self.privacy is not None
        return self.privacy.bound / self.divisor()

    patch.setattr(RoundStrategy, "sensitivity", first)


def one_participation_is_accounted(patch: Patch) -> None:
    def once(noise: type[CorrelatedNoise]) -> None:
        influence = noise.influence

        def first_alone(self: CorrelatedNoise, first: int) -> np.ndarray:
            inverse_squares = influence(self, first)
            return inverse_squares / math.sqrt(self.schedule.most_rounds)

        patch.setattr(noise, "influence", first_alone)

    once(BandedNoise)
    once(TreeNoise)


def cohorts_are_drawn_and_not_in_turn(patch: Patch) -> None:
    def by_coins(self: RoundStrategy, server_round: int) -> list[int]:
        source = KeyedRandom(StreamKey(seed=self.seed, purpose="cohort", server_round=server_round))
        return poisson_sample(source, len(self.cards), self._cohort_rate()).tolist()

    patch.setattr(RoundStrategy, "_cohort", by_coins)


def rounds_are_charged_as_if_alone(patch: Patch) -> None:
    """Each as one Gaussian release of its own noise, whatever the noise of later rounds takes back."""

    def alone(self: CorrelatedNoise, noise_multiplier: float, server_round: int, *, again: bool = False) -> object:
        return SampledGaussians(1.0, self.sigma(noise_multiplier), 1)

    patch.setattr(CorrelatedNoise, "charge", alone)


def rounds_may_be_made_again(patch: Patch) -> None:
    for module in (server, round_memory):
        patch.setattr(module, "check_next", lambda state, server_round: None)


def hooks_see_the_noise(patch: Patch) -> None:
    patch.setattr(server, "without_noise_memory", lambda state: contextlib.nullcontext())


def the_ledger_of_a_run_is_written_afterwards(patch: Patch) -> None:
    the_server_writes_its_ledger_afterwards(patch)


def one_draw_for_all_rounds(patch: Patch) -> None:
    one_noise_for_all_rounds(patch)


CENTRAL_MUTATIONS = (
    Mutation(
        name="the noised counts of adaptive clipping are not accounted for",
        where="AdaptiveClip.update_noise_multiplier",
        plant=counts_cost_nothing,
        caught_by=(central_checks.a_client_moves_sum_and_count_by_no_more_than_planned,),
    ),
    Mutation(
        name="adaptive clipping releases its counts without noise",
        where="AdaptiveClip.released_share",
        plant=counts_are_released_without_noise,
        caught_by=(central_checks.the_count_of_small_updates_has_its_noise,),
    ),
    Mutation(
        name="the clip norm moves to where rounding breaks it",
        where="fl_dualpriv.privacy.adaptive.clamped_clip_norm",
        plant=a_clip_norm_moves_out_of_range,
        caught_by=(limit_checks.a_moving_clip_norm_stays_one,),
    ),
    Mutation(
        name="the clip norm moves away from its quantile",
        where="AdaptiveClip.moved",
        plant=the_clip_norm_moves_the_wrong_way,
        caught_by=(
            central_checks.the_clip_norm_reaches_the_quantile_from_both_sides,
            central_checks.noise_follows_the_clip_norm,
        ),
    ),
    Mutation(
        name="noise is scaled to the first clip norm",
        where="RoundStrategy.sensitivity",
        plant=noise_stays_at_the_first_clip_norm,
        caught_by=(central_checks.noise_follows_the_clip_norm,),
    ),
    Mutation(
        name="correlated noise is scaled for clients that take part once",
        where="CorrelatedNoise.influence",
        plant=one_participation_is_accounted,
        caught_by=(central_checks.a_whole_run_moves_by_no_more_than_planned,),
    ),
    Mutation(
        name="cohorts under correlated noise are drawn, and some clients come too often",
        where="RoundStrategy._cohort",
        plant=cohorts_are_drawn_and_not_in_turn,
        caught_by=(central_checks.clients_are_asked_in_their_turns_alone,),
    ),
    Mutation(
        name="the rounds of correlated noise share their draws",
        where="fl_dualpriv.server.strategy.gaussian_noise",
        plant=one_draw_for_all_rounds,
        caught_by=(central_checks.noise_of_a_run_has_the_covariance_of_the_inverse_factor,),
    ),
    Mutation(
        name="rounds of correlated noise are charged as if they were independent",
        where="CorrelatedNoise.charge",
        plant=rounds_are_charged_as_if_alone,
        caught_by=(central_checks.a_run_is_in_the_ledger_before_its_noise,),
    ),
    Mutation(
        name="the ledger of correlated noise is written after the noise",
        where="RoundAccountant.write",
        plant=the_ledger_of_a_run_is_written_afterwards,
        caught_by=(central_checks.a_run_is_in_the_ledger_before_its_noise,),
    ),
    Mutation(
        name="a round of correlated noise can be made again",
        where="fl_dualpriv.server.strategy.check_next",
        plant=rounds_may_be_made_again,
        caught_by=(central_checks.a_round_of_correlated_noise_is_made_once,),
    ),
    Mutation(
        name="a strategy can read the noise that is remembered",
        where="fl_dualpriv.server.strategy.without_noise_memory",
        plant=hooks_see_the_noise,
        caught_by=(central_checks.a_strategys_code_does_not_see_the_noise,),
    ),
)
