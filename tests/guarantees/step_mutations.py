"""Bugs in what a client clips, samples, divides by and lets see its data, each planted in the running code."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import fl_dualpriv.client.step
from fl_dualpriv.client.step import Participant
from fl_dualpriv.client.updates import UpdateRule
from fl_dualpriv.learners import rows as per_example
from fl_dualpriv.methods.base import PromptState, Rates, Released
from fl_dualpriv.methods.dpfpl import DPFPL
from fl_dualpriv.methods.lowrank import subspace_bases
from fl_dualpriv.privacy import clipping
from fl_dualpriv.privacy import release as release_module
from fl_dualpriv.privacy import step as private
from fl_dualpriv.privacy.clipping import Arithmetic, Clip, ClippedSum, as_clip, clip_rows
from fl_dualpriv.privacy.noise import (
    KeyedRandom,
    RandomSource,
    StreamKey,
)
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.step import OuterBlock, Rows, client_rows
from tests.guarantees import audit_checks, limit_checks, run_checks, step_checks
from tests.guarantees.mutation import Mutation, Patch

# --- clipping ---------------------------------------------------------------------------------------------------------


def any_clip_norm_is_taken(patch: Patch) -> None:
    """One whose square is no number lets rows pass that are longer than it."""
    patch.setattr(clipping, "check_clip_norm", lambda value: None)


def clip_the_batch_mean(patch: Patch) -> None:
    def batch_clipped(
        rows: Rows, clip: Clip | float, arithmetic: Arithmetic = "float", masks: Tensor | None = None
    ) -> list[ClippedSum]:
        clip, found = as_clip(clip), []
        for client, total in enumerate(rows.zeros()):
            own = torch.cat(
                [total.new_zeros(0, *total.shape), *(block.double() for block in client_rows(rows, client))]
            )
            own = own[own.flatten(1).any(dim=1)]  # padding is zero
            mean = own.sum(dim=0) / max(1, len(own))
            found.append(ClippedSum(value=clip_rows(mean[None], clip)[0][0] * len(own), sensitivity=clip.norm))
        return found

    patch.setattr(private, "clipped_sums", batch_clipped)


def clip_per_class(patch: Patch) -> None:
    def class_clipped(
        self: OuterBlock, totals: Tensor, clip: Clip, arithmetic: Arithmetic, masks: Tensor | None
    ) -> None:
        outer = self.left[:, :, None] * self.right[:, None, :]
        totals[self.client] += clip_rows(outer.flatten(0, 1), clip)[0].unflatten(0, outer.shape[:2]).sum(dim=0)

    patch.setattr(OuterBlock, "add_to", class_clipped)


def clip_without_looking_for_nan(patch: Patch) -> None:
    """C / norm is NaN for a NaN, and so is everything that is added to it."""

    def careless(rows: Tensor, clip: Clip, arithmetic: Arithmetic) -> Tensor:
        flat = rows.flatten(1).double()
        norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        return (flat * torch.clamp(clip.norm / (norms + 1e-12), max=1.0)).reshape(rows.shape)

    patch.setattr(private, "bounded_rows", careless)


@dataclass
class Kept:
    """What a careless author would keep at hand: each client's clean sum of the step, and the public divisor."""

    sums: Tensor
    expected: float
    counts: list[int]


def keep_clean_sums(patch: Patch) -> Kept:
    kept = Kept(sums=torch.zeros(0), expected=1.0, counts=[])
    draw, make = fl_dualpriv.client.step._batches, private.clean_sums

    def drawing(participants: Sequence[Participant], step: int, rate: float) -> list[np.ndarray]:
        picked = draw(participants, step, rate)
        kept.counts = [len(own) for own in picked]
        kept.expected = rate * sum(p.data.num_examples for p in participants) / len(participants)
        return picked

    def keeping(rows: Rows, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
        found = make(rows, plan, masks)
        kept.sums = torch.stack([clean.value for clean in found]).float()
        return found

    patch.setattr(fl_dualpriv.client.step, "_batches", drawing)
    patch.setattr(private, "clean_sums", keeping)
    return kept


def clip_factors_apart_and_account_once(patch: Patch) -> None:
    """The global prompt moves by the release, u and v by releases of their own."""
    kept = keep_clean_sums(patch)

    def view(clean: Tensor, own: int) -> Tensor:
        # A stream of its own, the same whatever the data: a leak must not be mistaken for noise.
        source = KeyedRandom(StreamKey(seed=own, purpose="factor"))
        rows = clip_rows(clean, step_checks.CLIP)[0]
        noised = [
            release_module.release(ClippedSum(value=row, sensitivity=step_checks.CLIP), step_checks.MULTIPLIER, source)
            for row in rows
        ]
        return torch.stack(noised).float()

    def move(self: DPFPL, state: PromptState, released: Released, rates: Rates) -> PromptState:
        u, v = subspace_bases(released.direction, state.row_basis)
        of_u, of_v = view(kept.sums @ v.mT, 1), view(u.mT @ kept.sums, 2)
        return replace(state, personal=state.personal - rates.personal / kept.expected * (of_u @ v + u @ of_v))

    patch.setattr(DPFPL, "move_personal", move)


# --- sampling and divisor ---------------------------------------------------------------------------------------------


def batches_of_fixed_size(patch: Patch) -> None:
    def without_replacement(source: RandomSource, population: int, rate: float) -> np.ndarray:
        return np.sort(np.argsort(source.uniforms(population))[: round(rate * population)])

    patch.setattr(fl_dualpriv.client.step, "poisson_sample", without_replacement)


def divide_by_the_realised_batch(patch: Patch) -> None:
    kept = keep_clean_sums(patch)
    make = private.clean_sums

    def realised(rows: Rows, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
        found = make(rows, plan, masks)
        # The noise is scaled by the sensitivity: so the sum and its noise are both divided by another number.
        factors = [kept.expected / max(1, count) for count in kept.counts]
        return [
            replace(clean, value=clean.value * factor, sensitivity=clean.sensitivity * factor)
            for clean, factor in zip(found, factors, strict=True)
        ]

    patch.setattr(private, "clean_sums", realised)


# --- what sees the clean gradients, or other records ------------------------------------------------------------------


def clean_upload(patch: Patch) -> None:
    """p_G moves by the clean sum, and only what stays at the client by the release: as in the DP-FPL paper."""
    kept, noised = keep_clean_sums(patch), []
    direct, move = UpdateRule.direction, DPFPL.move_personal

    def for_the_upload(
        self: UpdateRule, release: Tensor, subspace_bases: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        noised[:] = [direct(self, release, subspace_bases)]
        return kept.sums / kept.expected

    def with_the_release(self: DPFPL, state: PromptState, released: Released, rates: Rates) -> PromptState:
        return move(self, state, replace(released, direction=noised[0]), rates)

    patch.setattr(UpdateRule, "direction", for_the_upload)
    patch.setattr(DPFPL, "move_personal", with_the_release)


def features_normalised_by_batch(patch: Patch) -> None:
    make = per_example.residuals

    def mixed(classes: Tensor, x: Tensor, y: Tensor, logit_scale: float, log_prior: Tensor | None = None) -> Tensor:
        normal = (x - x.mean(dim=-2, keepdim=True)) / (x.std(dim=-2, keepdim=True) + 1e-5)
        return make(classes, normal, y, logit_scale, log_prior)

    patch.setattr(per_example, "residuals", mixed)


def top_m_chosen_by_the_batch(patch: Patch) -> None:
    def together(residual: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
        by_batch = residual.abs().mean(dim=-2, keepdim=True).expand_as(residual)
        classes = by_batch.topk(top_m, dim=-1).indices
        return residual.gather(-1, classes), classes

    patch.setattr(per_example, "largest", together)


STEP_MUTATIONS = (
    Mutation(
        name="a clip norm has no lower bound",
        where="fl_dualpriv.privacy.clipping.check_clip_norm",
        plant=any_clip_norm_is_taken,
        caught_by=(
            limit_checks.no_row_is_longer_than_its_clip_norm,
            limit_checks.no_record_moves_a_feature_sum_further_than_the_clip_norm,
        ),
    ),
    Mutation(
        name="the batch mean is clipped",
        where="fl_dualpriv.privacy.step.clipped_sums",
        plant=clip_the_batch_mean,
        caught_by=(step_checks.one_record_moves_a_release_by_at_most_c,),
        audited_by=audit_checks.the_claim_about_records_stands,
    ),
    Mutation(
        name="each class of a record's gradient is clipped by itself",
        where="fl_dualpriv.privacy.step.OuterBlock.add_to",
        plant=clip_per_class,
        caught_by=(step_checks.one_record_moves_a_feature_release_by_at_most_c,),
    ),
    Mutation(
        name="a row that is not finite passes the clip",
        where="fl_dualpriv.privacy.step.bounded_rows",
        plant=clip_without_looking_for_nan,
        caught_by=(step_checks.a_bad_record_is_a_zero,),
    ),
    Mutation(
        name="u, v and p_G are clipped and noised apart, and accounted once",
        where="fl_dualpriv.methods.dpfpl.DPFPL.move_personal",
        plant=clip_factors_apart_and_account_once,
        caught_by=(step_checks.masks_and_factors_see_the_release_alone, run_checks.the_ledger_covers_every_release),
    ),
    Mutation(
        name="batches of fixed size, without replacement, are accounted as Poisson's",
        where="fl_dualpriv.client.step.poisson_sample",
        plant=batches_of_fixed_size,
        caught_by=(step_checks.batches_are_independent_coins,),
    ),
    Mutation(
        name="the sum is divided by the realised batch",
        where="fl_dualpriv.privacy.step.clean_sums",
        plant=divide_by_the_realised_batch,
        caught_by=(step_checks.the_divisor_is_the_public_expected_batch,),
    ),
    Mutation(
        name="the upload of p_G has no noise",
        where="fl_dualpriv.client.updates.UpdateRule.direction",
        plant=clean_upload,
        caught_by=(step_checks.noise_has_std_z_times_c, step_checks.masks_and_factors_see_the_release_alone),
        audited_by=audit_checks.the_claim_about_records_stands,
    ),
    Mutation(
        name="a batch's features are normalised together",
        where="fl_dualpriv.learners.rows.residuals",
        plant=features_normalised_by_batch,
        caught_by=(step_checks.exact_rows_do_not_mix, step_checks.top_m_rows_do_not_mix),
    ),
    Mutation(
        name="top-m classes are chosen by the batch",
        where="fl_dualpriv.learners.rows.largest",
        plant=top_m_chosen_by_the_batch,
        caught_by=(step_checks.top_m_rows_do_not_mix,),
    ),
)
