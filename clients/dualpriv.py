"""The local method: DP-FPL's low-rank personal prompt with one clip and one Gaussian release per step.

With P = p_G + p_L every gradient DP-FPL needs is a linear image of one matrix, the gradient of the effective prompt.
So a step releases that matrix once, noised, and the global step, the tangent projection (Eq. 4), update pruning and the
residual are all post-processing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fl_dualpriv.client import ClientData, PersonalState
from fl_dualpriv.methods import MethodParts
from fl_dualpriv.privacy.clipping import ClippedSum, clipped_sum
from fl_dualpriv.privacy.noise import RandomSource, gaussian_noise, poisson_sample
from fl_dualpriv.privacy.per_example import per_example_gradients, summed_gradient
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.prompts.lowrank import carriers, cut_to_rank, tangent_projection
from fl_dualpriv.pruning.updates import prune_update


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Numbers of a local step; none of them can change the guarantee."""

    local_steps: int
    sampling_rate: float
    global_learning_rate: float
    local_learning_rate: float
    update_keep_ratio: float
    microbatch: int


def local_update(
    *,
    global_prompt: Tensor,
    state: PersonalState,
    data: ClientData,
    class_features: Callable[[Tensor], Tensor],
    logit_scale: float,
    parts: MethodParts,
    training: LocalTraining,
    plan: RecordLevelPlan | None,
    random: Callable[[str, int], RandomSource],
    before_release: Callable[[int], None],
) -> tuple[Tensor, PersonalState]:
    """Run one round of local steps.

    Guarantee:
        With a plan, the data enter each step only through one clipped sum of the Poisson batch plus N(0, z²C²); the
        noise is there for an empty batch too, and the divisor q·n_i is public. With a trusted server the upload is
        the clipped sum itself, for the server to noise, and the personal prompt still moves by a noised copy.

    Args:
        global_prompt: p_G of this round, (n_ctx, ctx_dim).
        state: The client's personal prompt.
        data: The client's records.
        class_features: Prompt → unit-norm class features.
        logit_scale: CLIP's inverse temperature.
        parts: Which prompts exist and move.
        training: Step sizes and counts.
        plan: Record-level DP, or None for the non-private method.
        random: (purpose, step) → source.
        before_release: Called with the step before its release is made: writes the ledger.

    Returns:
        The upload (the move of p_G, local − global; with a trusted server −learning rate × the clipped sum, float64),
        and the new personal state.
    """
    own_global = global_prompt
    expected_batch = training.sampling_rate * data.num_examples
    upload = torch.zeros_like(global_prompt, dtype=torch.float64)
    for step in range(training.local_steps):
        batch = torch.from_numpy(poisson_sample(random("batch", step), data.num_examples, training.sampling_rate))
        batch = batch.to(data.features.device)
        prompt = own_global + state.personal if parts.personal else own_global
        x, y = data.features[batch], data.labels[batch]
        if plan is None:
            summed = summed_gradient(class_features, prompt, x, y, logit_scale)
        else:
            rows = per_example_gradients(class_features, prompt, x, y, logit_scale, training.microbatch)
            clean = clipped_sum(rows, plan.clip_norm)
            before_release(step)
            if plan.trusts_server:
                upload = upload - training.global_learning_rate * clean.value
            if plan.trusts_server and not parts.personal:
                continue  # nothing local is released or moved
            summed = _release(clean, plan, random("noise", step))
        gradient = prune_update((summed / expected_batch).to(prompt.dtype), training.update_keep_ratio)
        if parts.shared and not (plan is not None and plan.trusts_server):
            own_global = own_global - training.global_learning_rate * gradient
        if parts.personal:
            state = _move_personal(state, gradient, parts, training.local_learning_rate)
    if plan is None or not plan.trusts_server:
        upload = own_global - global_prompt
    return upload, state


def _release(clean: ClippedSum, plan: RecordLevelPlan, source: RandomSource) -> Tensor:
    """The clipped sum plus the client's noise: the one place where a record's influence leaves the private side."""
    std = plan.local_noise_multiplier * clean.sensitivity
    return clean.value + gaussian_noise(source, tuple(clean.value.shape), std).to(clean.value.device)


def _move_personal(state: PersonalState, gradient: Tensor, parts: MethodParts, learning_rate: float) -> PersonalState:
    """p_L ← p_L − η · Π(G̃), then cut to rank k if there is no residual. Post-processing of G̃."""
    if not parts.factorised:
        return replace(state, personal=state.personal - learning_rate * gradient)
    # While p_L is zero it has no subspaces: the first noised gradient lends its own.
    source = state.personal if bool(state.personal.any()) else gradient
    u, v = carriers(source, state.carrier)
    personal = state.personal - learning_rate * tangent_projection(gradient, u, v)
    if not parts.residual:
        u, v = carriers(personal, v)
        personal = cut_to_rank(personal, u)
    return replace(state, personal=personal, carrier=v)
