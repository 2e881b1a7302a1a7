"""Bugs in what the server clips, weighs, noises, samples and divides by, each planted in the running code."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

import strategies.dpfpl
import strategies.fedavg
from fl_dualpriv import messages
from fl_dualpriv.privacy.noise import RandomSource, gaussian_noise
from fl_dualpriv.server import strategy as server
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.cohort import Asked, Collected
from fl_dualpriv.server.strategy import RoundStrategy, Update
from tests.guarantees import audit_checks, server_checks
from tests.guarantees.mutation import Mutation, Patch


def weights_above_one(patch: Patch) -> None:
    patch.setattr(strategies.fedavg.FedAvg, "weight", lambda self, num_examples: 5.0)
    patch.setattr(RoundStrategy, "_clamped_weight", lambda self, partition: self.weight(self.num_examples[partition]))


def failed_clients_leave_the_divisor(patch: Patch) -> None:
    read = RoundStrategy._read_uploads

    def shrinking(self: RoundStrategy, server_round: int, replies: Iterable[Message]) -> tuple[list[int], Tensor]:
        partitions, diffs = read(self, server_round, replies)
        self._divisor = self._cohort_rate() * sum(self.masses[p] for p in partitions) or None
        return partitions, diffs

    patch.setattr(RoundStrategy, "_read_uploads", shrinking)


def duplicates_count(patch: Patch) -> None:
    """Replies are taken as they come: a second copy is a second client."""
    collect = server.collect

    def careless(
        asked: Asked, replies: Iterable[Message], read: Callable[[Message], messages.Uploads], what: str, group: str
    ) -> Collected[messages.Uploads]:
        one_by_one = [collect(asked, [reply], read, what, group) for reply in replies]
        return Collected(answers=[answer for found in one_by_one for answer in found.answers], failed={})

    patch.setattr(server, "collect", careless)


def server_noise_scaled_by_nine_tenths(patch: Patch) -> None:
    patch.setattr(server, "gaussian_noise", lambda source, shape, std: gaussian_noise(source, shape, 0.9 * std))


def no_noise_for_an_empty_cohort(patch: Patch) -> None:
    noised = RoundStrategy._noised

    def careless(
        self: RoundStrategy, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy, source: RandomSource
    ) -> Tensor:
        return noised(self, partitions, diffs, privacy, source) if partitions else torch.zeros_like(self.prompt)

    patch.setattr(RoundStrategy, "_noised", careless)


def one_noise_for_all_rounds(patch: Patch) -> None:
    """A strategy that keeps its generator's first draw."""
    kept: dict[tuple[int, ...], Tensor] = {}

    def once(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
        return kept.setdefault(shape, gaussian_noise(source, shape, 1.0)) * std

    patch.setattr(server, "gaussian_noise", once)


def cohorts_of_fixed_size(patch: Patch) -> None:
    def without_replacement(source: RandomSource, population: int, rate: float) -> np.ndarray:
        return np.sort(np.argsort(source.uniforms(population))[: round(rate * population)])

    patch.setattr(server, "poisson_sample", without_replacement)


def combine_without_its_sensitivity(patch: Patch) -> None:
    @dataclass(kw_only=True)
    class Sum(RoundStrategy):
        def combine(self, updates: Sequence[Update]) -> Tensor:
            return sum((update.diff for update in updates), torch.zeros(self.prompt.shape, dtype=torch.float64))

    patch.setattr(strategies.dpfpl, "DPFPL", Sum)


def a_strategy_that_skips_the_clip(patch: Patch) -> None:
    @dataclass(kw_only=True)
    class Unclipped(RoundStrategy):
        def _clip(self, partitions: Sequence[int], diffs: Tensor, privacy: ServerPrivacy) -> Tensor:
            return diffs

    patch.setattr(strategies.dpfpl, "DPFPL", Unclipped)


def the_server_does_not_clip(patch: Patch) -> None:
    patch.setattr(RoundStrategy, "_clip", lambda self, partitions, diffs, privacy: diffs)


SERVER_MUTATIONS = (
    Mutation(
        name="weights above one",
        where="RoundStrategy._clamped_weight",
        plant=weights_above_one,
        caught_by=(server_checks.one_client_moves_a_round_by_at_most_its_sensitivity,),
        audited_by=audit_checks.the_claim_about_clients_stands,
    ),
    Mutation(
        name="a failed client is dropped from the divisor",
        where="RoundStrategy._read_uploads",
        plant=failed_clients_leave_the_divisor,
        caught_by=(server_checks.a_failed_client_is_zero_and_the_divisor_is_public,),
    ),
    Mutation(
        name="a reply that comes twice counts twice",
        where="fl_dualpriv.server.strategy.collect",
        plant=duplicates_count,
        caught_by=(server_checks.a_reply_counts_once,),
    ),
    Mutation(
        name="the server's noise is a tenth too small",
        where="fl_dualpriv.server.strategy.gaussian_noise",
        plant=server_noise_scaled_by_nine_tenths,
        caught_by=(server_checks.server_noise_has_std_z_times_s,),
    ),
    Mutation(
        name="an empty cohort skips its noise",
        where="RoundStrategy._noised",
        plant=no_noise_for_an_empty_cohort,
        caught_by=(server_checks.server_noise_has_std_z_times_s,),
    ),
    Mutation(
        name="the server reuses its noise in every round",
        where="fl_dualpriv.server.strategy.gaussian_noise",
        plant=one_noise_for_all_rounds,
        caught_by=(server_checks.server_noise_is_fresh_each_round,),
        audited_by=audit_checks.the_claim_about_clients_stands,
    ),
    Mutation(
        name="cohorts of fixed size are accounted as Poisson's",
        where="fl_dualpriv.server.strategy.poisson_sample",
        plant=cohorts_of_fixed_size,
        caught_by=(server_checks.cohorts_are_independent_coins,),
    ),
    Mutation(
        name="a strategy combines updates in its own way, with the mean's sensitivity",
        where="strategies.dpfpl.DPFPL",
        plant=combine_without_its_sensitivity,
        caught_by=(server_checks.one_client_moves_a_round_by_at_most_its_sensitivity,),
        refused=True,
    ),
    Mutation(
        name="a strategy overrides the clip",
        where="strategies.dpfpl.DPFPL",
        plant=a_strategy_that_skips_the_clip,
        caught_by=(server_checks.one_client_moves_a_round_by_at_most_its_sensitivity,),
        refused=True,
    ),
    Mutation(
        name="the server trusts clients to clip",
        where="RoundStrategy._clip",
        plant=the_server_does_not_clip,
        caught_by=(server_checks.one_client_moves_a_round_by_at_most_its_sensitivity,),
        audited_by=audit_checks.the_claim_about_clients_stands,
    ),
)
