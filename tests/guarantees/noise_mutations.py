"""Bugs in the noise of clients: its scale, its place and its streams, each planted in the running code."""

from dataclasses import replace

import numpy as np
from torch import Tensor

import fl_dualpriv.client.round
import fl_dualpriv.client.step
import fl_dualpriv.privacy.step
from fl_dualpriv.privacy import release as release_module
from fl_dualpriv.privacy.clipping import ClippedSum
from fl_dualpriv.privacy.noise import (
    KeyedRandom,
    OsRandom,
    RandomSource,
    RandomSources,
    StreamKey,
    gaussian_noise,
)
from fl_dualpriv.privacy.plan import RecordLevelPlan
from tests.guarantees import accounting_checks, audit_checks, run_checks, step_checks
from tests.guarantees.mutation import Mutation, Patch

# --- noise ------------------------------------------------------------------------------------------------------------

_release = release_module.release


def noise_divided_twice(patch: Patch) -> None:
    """The sum's noise is scaled as if it were the mean's, over a batch of ten."""
    patch.setattr(fl_dualpriv.privacy.step, "release", lambda clean, z, source: _release(clean, z / 10, source))


def noise_scaled_by_nine_tenths(patch: Patch) -> None:
    patch.setattr(release_module, "gaussian_noise", lambda source, shape, std: gaussian_noise(source, shape, 0.9 * std))


def no_noise_for_an_empty_batch(patch: Patch) -> None:
    def careless(clean: ClippedSum, z: float, source: RandomSource) -> Tensor:
        return _release(clean, z, source) if bool(clean.value.any()) else clean.value

    patch.setattr(fl_dualpriv.privacy.step, "release", careless)


def float_noise_on_integers(patch: Patch) -> None:
    patch.setattr(release_module, "rounded_gaussian", gaussian_noise)


def a_trusted_servers_views_have_z_each(patch: Patch) -> None:
    z = property(lambda plan: plan.noise_multiplier)
    patch.setattr(RecordLevelPlan, "local_noise_multiplier", z)
    patch.setattr(RecordLevelPlan, "server_noise_multiplier", z)


# --- streams ----------------------------------------------------------------------------------------------------------


def forget_in_the_key(patch: Patch, forgotten: dict[str, int]) -> None:
    """Noise whose key leaves something out."""
    make = KeyedRandom.__init__

    def forgetful(self: KeyedRandom, key: StreamKey) -> None:
        make(self, replace(key, **forgotten) if key.purpose in ("noise", "server-noise") else key)

    patch.setattr(KeyedRandom, "__init__", forgetful)


def noise_reused_across_rounds(patch: Patch) -> None:
    forget_in_the_key(patch, {"server_round": 0})


def noise_reused_across_clients(patch: Patch) -> None:
    forget_in_the_key(patch, {"partition": 0})


def noise_reused_across_steps(patch: Patch) -> None:
    stream = fl_dualpriv.client.round._stream

    def first_step(
        sources: RandomSources, seed: int, partition: int, server_round: int, purpose: str, step: int
    ) -> RandomSource:
        return stream(sources, seed, partition, server_round, purpose, 0 if purpose == "noise" else step)

    patch.setattr(fl_dualpriv.client.round, "_stream", first_step)


def kernel_randomness_kept(patch: Patch) -> None:
    """A buffer that is filled once: the same words for everybody."""
    draw = OsRandom.words
    buffers: dict[int, np.ndarray] = {}

    def buffered(self: OsRandom, count: int) -> np.ndarray:
        if count not in buffers:
            buffers[count] = draw(self, count)
        return buffers[count]

    patch.setattr(OsRandom, "words", buffered)


NOISE_MUTATIONS = (
    Mutation(
        name="noise is divided by the batch twice",
        where="fl_dualpriv.privacy.step.release",
        plant=noise_divided_twice,
        caught_by=(step_checks.noise_has_std_z_times_c, step_checks.an_empty_batch_has_the_same_noise),
        audited_by=audit_checks.the_claim_about_records_stands,
    ),
    Mutation(
        name="noise is a tenth too small",
        where="fl_dualpriv.privacy.release.gaussian_noise",
        plant=noise_scaled_by_nine_tenths,
        caught_by=(
            step_checks.noise_has_std_z_times_c,
            step_checks.feature_noise_has_std_z_times_c,
            step_checks.a_trusting_client_has_sqrt_2_times_the_noise,
        ),
    ),
    Mutation(
        name="an empty batch skips its noise",
        where="fl_dualpriv.privacy.step.release",
        plant=no_noise_for_an_empty_batch,
        caught_by=(step_checks.an_empty_batch_has_the_same_noise,),
    ),
    Mutation(
        name="float noise is added to integer sums",
        where="fl_dualpriv.privacy.release.rounded_gaussian",
        plant=float_noise_on_integers,
        caught_by=(step_checks.an_integer_release_is_whole,),
    ),
    Mutation(
        name="with a trusted server both views have noise z, not sqrt(2) z",
        where="RecordLevelPlan.local_noise_multiplier, .server_noise_multiplier",
        plant=a_trusted_servers_views_have_z_each,
        caught_by=(
            step_checks.a_trusting_client_has_sqrt_2_times_the_noise,
            accounting_checks.two_views_of_a_trusting_plan_compose_to_what_it_claims,
        ),
    ),
    Mutation(
        name="noise is reused in every round",
        where="KeyedRandom",
        plant=noise_reused_across_rounds,
        caught_by=(step_checks.noise_is_fresh_for_each_client_and_round, run_checks.no_stream_is_asked_for_twice),
        audited_by=audit_checks.the_claim_about_records_stands,
    ),
    Mutation(
        name="noise is reused by every client",
        where="KeyedRandom",
        plant=noise_reused_across_clients,
        caught_by=(step_checks.noise_is_fresh_for_each_client_and_round, run_checks.no_stream_is_asked_for_twice),
        audited_by=audit_checks.the_claim_about_records_stands,
    ),
    Mutation(
        name="noise is reused in every step",
        where="fl_dualpriv.client.round._stream",
        plant=noise_reused_across_steps,
        caught_by=(run_checks.no_stream_is_asked_for_twice,),
    ),
    Mutation(
        name="the kernel's randomness is read once and kept",
        where="OsRandom.words",
        plant=kernel_randomness_kept,
        caught_by=(
            step_checks.noise_is_fresh_for_each_client_and_round,
            run_checks.randomness_of_the_kernel_does_not_repeat,
        ),
    ),
)
