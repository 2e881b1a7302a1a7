"""The local method: DP-FPL's low-rank personal prompt with one clip and one Gaussian release per step.

With P = p_G + p_L every gradient that DP-FPL needs is a linear image of one matrix, the gradient of the effective
prompt. A step therefore releases that matrix once, noised, and the global step, the tangent projection (Eq. 4), update
pruning and the residual are all post-processing. Clients of a cohort step together through one frozen tower, but their
batches, clipped sums, noise and prompts never mix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.client.optimizers import SGD, Optimizer
from fl_dualpriv.client.personalisation import NAMES, Deviations, Personalisation, rounds_since
from fl_dualpriv.client.pruning import KEEP_ALL, UpdatePruning
from fl_dualpriv.client.release_memory import ReleaseMemoryShapes, empty_release_memory
from fl_dualpriv.client.state import PersonalState
from fl_dualpriv.client.updates import UpdateRule
from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.learners.base import Objective, Records, Regulariser
from fl_dualpriv.methods.base import Method, PromptState, Rates, Released
from fl_dualpriv.methods.lowrank import personal_bases
from fl_dualpriv.privacy.clipping import check_exact
from fl_dualpriv.privacy.ledger import LedgerEvent
from fl_dualpriv.privacy.noise import RandomSource, poisson_sample
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.step import Payment, private_step


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Numbers of a local step; none of them can change the guarantee.

    Attributes:
        local_steps: Number of Poisson batches in a round.
        sampling_rate: Sampling rate q.
        global_learning_rate: Learning rate of p_G.
        local_learning_rate: Learning rate of p_L.
        pruning: Rule that selects the blocks of an update that are followed.
        optimizer: Optimizer that turns noised gradients into directions.
        prompts: Number of prompts in a gradient, one above the other: 2 (p_G and p_L) if the loss reads both, else 1.
        method_memory: What the method keeps of each client from round to round, see `Method.memory_shapes`.
        personalisation: Noise-aware personal prompts, or None for p_L by gradient steps.
        personal_is_given: True if the server made the p_L of this round, which then stays as it is in all steps.
    """

    local_steps: int
    sampling_rate: float
    global_learning_rate: float
    local_learning_rate: float
    pruning: UpdatePruning = KEEP_ALL
    optimizer: Optimizer = SGD
    method_memory: ReleaseMemoryShapes = field(default_factory=dict)
    prompts: int = 1
    personalisation: Personalisation | None = None
    personal_is_given: bool = False

    def release_memory_shapes(self, n_ctx: int, ctx_dim: int) -> ReleaseMemoryShapes:
        """Return the shapes of the tensors that a client remembers of its releases across steps and rounds."""
        rows = self.prompts * n_ctx
        shapes = {
            **self.pruning.release_memory_shapes(rows, ctx_dim),
            **self.optimizer.release_memory_shapes(rows, ctx_dim),
        }
        if self.personalisation is not None:
            shapes |= self.personalisation.release_memory_shapes(n_ctx, ctx_dim)
        return {**shapes, **self.method_memory}


@dataclass(frozen=True, kw_only=True)
class Participant:
    """One client of a cohort.

    Attributes:
        partition: Partition of the client.
        state: Personal state of the client.
        data: Records of the client.
        random: (purpose, step) → the client's own random source.
        event: Event that was written to the client's ledger for the steps of this round; None without a plan.
    """

    partition: int
    state: PersonalState
    data: Records
    random: Callable[[str, int], RandomSource]
    event: LedgerEvent | None = None


def cohort_update(
    *,
    global_prompt: Tensor,
    participants: Sequence[Participant],
    objective: Objective[Any],
    method: Method,
    training: LocalTraining,
    plan: RecordLevelPlan | None,
    regulariser: Regulariser | None = None,
    server_round: int = 0,
) -> list[tuple[Tensor, PersonalState]]:
    """Run one round of local steps of some clients, together.

    Guarantee:
        With a plan, a client's data enter each step only through one clipped sum of the client's Poisson batch plus
        N(0, z²C²) from the client's own source. The noise is also added for an empty batch, and the divisor q·n_i is
        public. With a trusted server the upload is the clipped sum itself, which the server noises, and the personal
        prompt still moves by a noised copy. With integer arithmetic that sum is uploaded as the integers it is made of,
        so that it stays exact until the server has added its noise. Masks before the clip come from earlier releases
        and coins. Pruning, averaging and projecting after the noise are post-processing (see `UpdatePruning`): the
        noise is the same as without them. The gradient of a regulariser, which reads only prompts, is post-processing
        too, and so are noise-aware personal prompts (see `Deviations`), which read the release before it is pruned.
        No client's numbers depend on the other clients of the step, except for float rounding: the size of a matrix
        product can change the order of its sums. The caller has written the ledger events of these releases.

    Args:
        global_prompt: Global prompt p_G of this round, (n_ctx, ctx_dim).
        participants: The clients; their numbers of records may differ.
        objective: Loss of the clients' records under prompts.
        method: Prompts that exist, and the moves that a release makes.
        training: Step sizes and counts.
        plan: Plan of record-level DP, or None for the non-private method.
        regulariser: Term of the loss that reads no record, or None.
        server_round: Number of this round. Only noise-aware personal prompts read it, to count rounds that a client
            missed; at 0 it missed none.

    Returns:
        For each participant the upload (the move of p_G, local − global; with a trusted server −learning rate × the
        clipped sum, or −1 × the clipped sum in grid units, float64) and its new personal state.

    Raises:
        PrivacyError: With a plan, if a client has no ledger event, or more steps than its event pays for.
        ValueError: With integer arithmetic, if a client has 2**32 records or more.
    """
    n_ctx, ctx_dim = global_prompt.shape
    kept_shapes = method.memory_shapes(n_ctx, ctx_dim, len(participants[0].state.row_basis))
    # Set-up. All clients step together: every tensor has one entry per client in front.
    prompts = PromptState(
        own_global=global_prompt.expand(len(participants), -1, -1),
        personal=torch.stack([p.state.personal for p in participants]),
        row_basis=torch.stack([p.state.row_basis for p in participants]),
        memory=_method_memory(participants, kept_shapes, global_prompt.device),
    )
    rates = Rates(shared=training.global_learning_rate, personal=training.local_learning_rate)
    pooled = objective.bind([p.data for p in participants])
    sizes = torch.tensor([p.data.num_examples for p in participants], device=global_prompt.device)
    expected = (training.sampling_rate * sizes.to(torch.float64))[:, None, None]
    trusts_server = plan is not None and plan.trusts_server
    # Under trust in the server the upload is the clipped sum without local noise; the server adds the noise.
    clean_upload = torch.zeros_like(prompts.own_global, dtype=torch.float64) if trusts_server else None
    exact = plan is not None and plan.arithmetic == "integer"
    if exact:
        check_exact(max(p.data.num_examples for p in participants))
    # The events stand in the ledgers already. A payment counts their releases down.
    payments = [_payment(plan, p) for p in participants] if plan is not None else []
    noise_std = _noise_of_a_mean(plan, expected[:, 0, 0])
    others = (*kept_shapes, *NAMES)
    update_rule = UpdateRule(
        pruning=training.pruning,
        optimizer=training.optimizer,
        release_memories=[{k: v for k, v in p.state.release_memory.items() if k not in others} for p in participants],
        streams=[p.random for p in participants],
        noise_std=noise_std,
        like=method.effective(global_prompt, global_prompt),
    )
    # Personal prompts that are shrunk follow all earlier releases, which a client remembers.
    deviations = None
    if training.personalisation is not None:
        deviations = Deviations(
            training.personalisation,
            release_memories=[p.state.release_memory for p in participants],
            global_prompt=global_prompt,
            rounds_since=[rounds_since(p.state, server_round) for p in participants],
            noise_std=noise_std,
        )
        prompts = replace(prompts, personal=deviations.personal)
    picked: list[np.ndarray] = []
    for step in range(training.local_steps):
        # Which blocks move in this step depends on earlier releases only, so it is known before any record is read.
        masks = update_rule.masks(step)
        if not picked or training.sampling_rate < 1:
            picked = _batches(participants, step, training.sampling_rate)
        # The only lines that read records: rows, then one release of their clipped and noised sum.
        effective = method.effective(prompts.own_global, prompts.personal)
        gradients = pooled.gradients(effective, picked)
        if plan is None:
            summed = gradients.sums() if masks is None else gradients.sums() * masks
        else:
            made = private_step(plan, payments, gradients, (p.random("noise", step) for p in participants), masks)
            if clean_upload is not None and made.for_server is not None:
                factor = 1.0 if exact else training.global_learning_rate  # in integers the server applies it
                # Of a pair only p_G's half is uploaded; its norm is at most that of the whole, which C bounds.
                clean_upload -= factor * made.for_server[:, : len(global_prompt)]
            if made.noised is None:
                continue  # nothing local is released or moved
            summed = gradients.to_prompts(made.noised)
        # Everything below is post-processing of the release. The divisor is the expected batch, which is public.
        mean = summed.div_(expected.to(summed.dtype)).to(global_prompt.dtype)
        factors = personal_bases(prompts.personal, prompts.row_basis, mean) if update_rule.cuts_components else None
        direction = of_global = update_rule.direction(mean, factors)
        if regulariser is not None:
            of_shared, of_effective = regulariser.gradients(prompts.own_global, effective)
            direction = direction + of_effective
            of_global = direction + of_shared
        if method.pairs:
            of_global, direction = direction.chunk(2, dim=1)
        released = Released(
            direction=direction,
            of_global=of_global,
            closed=update_rule.closed,
            moves_global=not trusts_server,
            moves_personal=deviations is None and not training.personal_is_given,
        )
        prompts = method.move(prompts, released, rates)
        if deviations is not None:
            deviations.follow(mean)
            prompts = replace(prompts, personal=deviations.personal)
    # What leaves the client, and what stays in its state for the next round.
    uploads = prompts.own_global - global_prompt if clean_upload is None else clean_upload
    release_memories = update_rule.release_memories()
    if kept_shapes:
        release_memories = [
            {**release_memory, **{name: prompts.memory[name][place] for name in kept_shapes}}
            for place, release_memory in enumerate(release_memories)
        ]
    if deviations is not None:
        release_memories = [
            {**release_memory, **own}
            for release_memory, own in zip(release_memories, deviations.release_memories(), strict=True)
        ]
    state_parts = zip(participants, prompts.personal, prompts.row_basis, release_memories, strict=True)
    states = [
        replace(p.state, personal=personal, row_basis=v, release_memory=release_memory)
        for p, personal, v, release_memory in state_parts
    ]
    return list(zip(uploads, states, strict=True))


def _batches(participants: Sequence[Participant], step: int, rate: float) -> list[np.ndarray]:
    """Draw a separate Poisson batch for each client; at rate 1 the batch is certain, and no coin is drawn."""
    if rate == 1:
        return [np.arange(p.data.num_examples) for p in participants]
    return [poisson_sample(p.random("batch", step), p.data.num_examples, rate) for p in participants]


def _payment(plan: RecordLevelPlan, participant: Participant) -> Payment:
    """Return what a client's ledger event of this round pays for."""
    if participant.event is None:
        raise PrivacyError(f"client {participant.partition} has no ledger event for this round; no step is made")
    return Payment(plan, participant.event)


def _noise_of_a_mean(plan: RecordLevelPlan | None, expected: Tensor) -> Tensor:
    """Compute the public std of the noise on each coordinate of a client's mean gradient, (client,): z·C over q·n_i."""
    std = 0.0 if plan is None else plan.local_noise_multiplier * plan.clip_norm
    return std / expected


def _method_memory(
    participants: Sequence[Participant], shapes: ReleaseMemoryShapes, device: torch.device
) -> dict[str, Tensor]:
    """Stack what a method keeps of each client; zeros before a client's first step."""
    start = empty_release_memory(shapes)
    return {
        name: torch.stack([p.state.release_memory.get(name, start[name]).to(device) for p in participants])
        for name in shapes
    }
