"""Bugs in what update pruning sees and scales, each planted in the running code."""

from dataclasses import replace

import torch
from torch import Tensor

import fl_dualpriv.privacy.step
from fl_dualpriv.client.blocks import Blocks, CoordinateBlocks
from fl_dualpriv.client.optimizers import Optimizer
from fl_dualpriv.client.pruning import Draw, Pruned, UpdatePruning
from fl_dualpriv.client.release_memory import ReleaseMemory
from fl_dualpriv.privacy.clipping import ClippedSum
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.step import Rows
from tests.guarantees import pruning_checks, step_checks
from tests.guarantees.mutation import Mutation, Patch
from tests.guarantees.step_mutations import keep_clean_sums


def mask_from_clean_gradients(patch: Patch) -> None:
    kept, prune = keep_clean_sums(patch), UpdatePruning.prune

    def by_clean(
        self: UpdatePruning, release: Tensor, opened: Tensor | None, noise_std: Tensor, draw: Draw, blocks: Blocks
    ) -> Pruned:
        weights = prune(self, kept.sums, opened, noise_std, draw, blocks).weights
        return Pruned(release if weights is None else release * weights, weights)

    patch.setattr(UpdatePruning, "prune", by_clean)


def past_scored_on_clean_gradients(patch: Patch) -> None:
    kept, remember = keep_clean_sums(patch), UpdatePruning.remember

    def clean(
        self: UpdatePruning, release_memory: ReleaseMemory, release: Tensor, opened: Tensor, blocks: CoordinateBlocks
    ) -> ReleaseMemory:
        return remember(self, release_memory, kept.sums / kept.expected, opened, blocks)

    patch.setattr(UpdatePruning, "remember", clean)


def moments_from_clean_gradients(patch: Patch) -> None:
    """Adam's second moment from what was not noised: the scale of each coordinate gives it away."""
    kept, advance = keep_clean_sums(patch), Optimizer._advance

    def clean(self: Optimizer, gradient: Tensor, release_memory: ReleaseMemory, noise_std: Tensor) -> dict[str, Tensor]:
        moved, second = advance(self, gradient, release_memory, noise_std), "optimizer.second"
        squares = (kept.sums / kept.expected).square()
        return {**moved, second: torch.lerp(squares, release_memory[second], 0.999)} if second in moved else moved

    patch.setattr(Optimizer, "_advance", clean)


def masked_rows_scaled_up_after_the_clip(patch: Patch) -> None:
    """1 / keep_ratio would make a random mask unbiased; after the clip it makes a record worth more than C."""
    make = fl_dualpriv.privacy.step.clean_sums

    def scaled(rows: Rows, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
        found = make(rows, plan, masks)
        if masks is None:
            return found
        return [replace(one, value=one.value / own.mean()) for one, own in zip(found, masks, strict=True)]

    patch.setattr(fl_dualpriv.privacy.step, "clean_sums", scaled)


def noise_scaled_to_the_share_that_is_open(patch: Patch) -> None:
    """Half of the coordinates do not need half of the noise: the bound of a record's norm is the same."""
    make = fl_dualpriv.privacy.step.clean_sums

    def shared_out(rows: Rows, plan: RecordLevelPlan, masks: Tensor | None) -> list[ClippedSum]:
        found = make(rows, plan, masks)
        if masks is None:
            return found
        shares = masks.mean(dim=(1, 2)).sqrt().tolist()
        return [replace(one, sensitivity=one.sensitivity * share) for one, share in zip(found, shares, strict=True)]

    patch.setattr(fl_dualpriv.privacy.step, "clean_sums", shared_out)


PRUNING_MUTATIONS = (
    Mutation(
        name="the mask of pruned updates is taken from clean gradients",
        where="fl_dualpriv.client.pruning.UpdatePruning.prune",
        plant=mask_from_clean_gradients,
        caught_by=(
            step_checks.masks_and_factors_see_the_release_alone,
            pruning_checks.pruned_updates_see_the_release_alone,
        ),
    ),
    Mutation(
        name="masks before the clip are scored on earlier clean gradients",
        where="fl_dualpriv.client.pruning.UpdatePruning.remember",
        plant=past_scored_on_clean_gradients,
        caught_by=(pruning_checks.masks_see_past_releases_alone, pruning_checks.pruned_updates_see_the_release_alone),
    ),
    Mutation(
        name="Adam's second moment is taken from clean gradients",
        where="fl_dualpriv.client.optimizers.Optimizer._advance",
        plant=moments_from_clean_gradients,
        caught_by=(pruning_checks.pruned_updates_see_the_release_alone,),
    ),
    Mutation(
        name="masked gradients are scaled up after the clip",
        where="fl_dualpriv.privacy.step.clean_sums",
        plant=masked_rows_scaled_up_after_the_clip,
        caught_by=(pruning_checks.one_record_moves_a_masked_release_by_at_most_c,),
    ),
    Mutation(
        name="noise is scaled down to the share of open coordinates",
        where="fl_dualpriv.privacy.step.clean_sums",
        plant=noise_scaled_to_the_share_that_is_open,
        caught_by=(pruning_checks.a_masked_release_has_the_noise_of_its_open_blocks,),
    ),
)
