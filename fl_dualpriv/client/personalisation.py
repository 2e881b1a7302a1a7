"""Noise-aware personal prompts: what the shared prompt lacks for a client, shrunk by its known share of noise.

A client adds up its own releases, less what the global prompt did meanwhile. That sum, the deviation D, has noise of
known variance ν on each entry. The personal prompt is p_L = S(D, ν), where S is a shrinkage of `methods.shrinkage`. So
p_L vanishes by itself where noise hides it, and P = p_G + p_L is then the shared prompt.

With β = ``memory`` and the learning rates η_L and η_G:

* A release G̃, (n_ctx, ctx_dim), is a clipped sum with noise over the public expected batch. Its entries have noise of
  variance τ² = (z·C/(q·n_i))². It moves D ← β·D − η_L·G̃ and ν ← β²·ν + η_L²·τ².
* A client learns the mean over clients one round later, from the global prompt. Let its last round have had s releases,
  and let p_G have moved by Δ in a round since then (on average, if the client missed rounds). Then
  D ← D − w·(η_L/η_G)·Δ with w = (1 + β + … + β^(s−1))/s, because only the sum of the mean's steps is known. ν stays.
* A method without a global prompt, or η_G = 0, has no second step: the deviation is the whole sum.

The second step is exact if p_G is the plain mean over clients with the server's rate 1 and nothing but −η_G·G̃ moves a
client's copy. Otherwise (client-level noise and clipping, server optimizers, pruned updates, failed clients) it is an
estimate. It is post-processing in every case, because p_G is public.

ν is the variance of the noise that a client added itself. For N clients of equal size and β = 1 the noise in D has
variance ν·(1 − 1/N), because a client's own noise is in the mean with weight 1/N. A client does not know the others'
sizes, so ν stands without that factor, as an upper bound. It is *not* a bound for a client whose noise is far below
that of the others: the mean brings Σ_j τ_j²/N² of theirs. With a trusted server the mean has the server's noise
instead, whose std is smaller than the client's by about the number of clients. Later gradients answer to earlier
noise, so D is not exactly signal plus independent noise; only the quality of the shrinkage rests on that, and no
guarantee.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fl_dualpriv.client.release_memory import (
    ReleaseMemory,
    ReleaseMemoryShapes,
    empty_release_memory,
    stack_release_memories,
)
from fl_dualpriv.client.state import PersonalState
from fl_dualpriv.methods.shrinkage import shrink_by_norm, shrink_singular_values

Shrinkage = Literal["scalar", "singular"]

_DEVIATION, _NOISE, _GLOBAL, _STEPS = "personal.deviation", "personal.noise", "personal.global", "personal.steps"
NAMES = (_DEVIATION, _NOISE, _GLOBAL, _STEPS)
"""Names in a client's release memory: D, ν, the p_G that its last round began with, and the releases since."""


@dataclass(frozen=True, kw_only=True)
class Personalisation:
    """Numbers of a noise-aware personal prompt; all are public.

    Attributes:
        shrinkage: ``scalar``: one factor for D, see `shrink_by_norm`. ``singular``: each singular value by itself, see
            `shrink_singular_values`.
        memory: β, the decay of D at each release, in [0, 1]; 1 forgets nothing.
        local_learning_rate: η_L.
        global_learning_rate: η_G, the rate at which the same releases move p_G; 0 if they do not.

    Raises:
        ValueError: If ``memory`` is out of range.
    """

    shrinkage: Shrinkage
    memory: float
    local_learning_rate: float
    global_learning_rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory = {self.memory}; it must be in [0, 1]")

    def release_memory_shapes(self, n_ctx: int, ctx_dim: int) -> ReleaseMemoryShapes:
        """Return the shapes of the tensors that a client remembers; see `NAMES`."""
        shape = (n_ctx, ctx_dim)
        return {
            _DEVIATION: (shape, torch.float32),
            _NOISE: ((), torch.float64),
            _GLOBAL: (shape, torch.float32),
            _STEPS: ((), torch.int64),
        }

    def shrink(self, deviation: Tensor, variance: Tensor) -> Tensor:
        """Return p_L = S(D, ν) of each client, (client, n_ctx, ctx_dim)."""
        return (shrink_by_norm if self.shrinkage == "scalar" else shrink_singular_values)(deviation, variance)

    def centred(self, release_memory: ReleaseMemory, global_prompt: Tensor, rounds_since: Tensor) -> Tensor:
        """Subtract from D what the global prompt did in each client's last round, and return the result.

        Args:
            release_memory: Stacked release memory, see `NAMES`.
            global_prompt: The present p_G, (n_ctx, ctx_dim).
            rounds_since: Rounds that moved p_G since the client's last round began, at least 1, (client,).
        """
        deviation = release_memory[_DEVIATION]
        if self.global_learning_rate == 0:
            return deviation
        steps = release_memory[_STEPS].to(torch.float64)
        weights = torch.where(steps > 0, self._mean_weight(steps.clamp_min(1)), 0.0)
        weights = weights * (self.local_learning_rate / self.global_learning_rate) / rounds_since
        moved = global_prompt - release_memory[_GLOBAL]
        return deviation - weights[:, None, None].to(moved.dtype) * moved

    def _mean_weight(self, steps: Tensor) -> Tensor:
        """Return w, the mean weight in D of the steps of a round that has just ended."""
        if self.memory == 1:
            return torch.ones_like(steps)
        return (1 - self.memory**steps) / ((1 - self.memory) * steps)


class Deviations:
    """Deviations of some clients that step together, for one round.

    Call `follow` with the release of each step. `personal` is p_L before the next step.

    Guarantee:
        Each client's D, ν and p_L are functions of its own noised releases, of the global prompts that the server sent
        and of public numbers (β, the learning rates, z·C/(q·n_i), counts of steps and rounds). So they are
        post-processing. Proof: it holds for the empty memory, and each method maps such a memory, one more release or
        one more global prompt to such a memory; no method has another argument. ν in particular is not measured on
        data and does not depend on the size of a batch. No client's numbers depend on another's, except by p_G.

    Args:
        personalisation: Numbers of the personal prompts.
        release_memories: Release memory of each client; empty before its first step. Other names are ignored.
        global_prompt: p_G of this round, (n_ctx, ctx_dim).
        rounds_since: See `Personalisation.centred`.
        noise_std: Public std of the noise on each entry of a client's release, τ, (client,); zeros without noise.
    """

    def __init__(
        self,
        personalisation: Personalisation,
        *,
        release_memories: Sequence[ReleaseMemory],
        global_prompt: Tensor,
        rounds_since: Sequence[int],
        noise_std: Tensor,
    ) -> None:
        n_ctx, ctx_dim = global_prompt.shape
        shapes = personalisation.release_memory_shapes(n_ctx, ctx_dim)
        start = {name: tensor.to(global_prompt.device) for name, tensor in empty_release_memory(shapes).items()}
        memory = stack_release_memories(
            [{name: own.get(name, start[name]) for name in NAMES} for own in release_memories]
        )
        since = torch.tensor(rounds_since, dtype=torch.float64, device=global_prompt.device)
        self._personalisation, self._noise_std = personalisation, noise_std
        self._deviation, self._variance = personalisation.centred(memory, global_prompt, since), memory[_NOISE]
        self._global, self._steps = global_prompt, 0

    @property
    def personal(self) -> Tensor:
        """Personal prompt p_L of each client, (client, n_ctx, ctx_dim)."""
        return self._personalisation.shrink(self._deviation, self._variance)

    def follow(self, release: Tensor) -> None:
        """Add the noised mean gradients of a step, (client, n_ctx, ctx_dim), with the variance of their noise."""
        decay, rate = self._personalisation.memory, self._personalisation.local_learning_rate
        self._deviation = decay * self._deviation - rate * release
        self._variance = decay**2 * self._variance + (rate * self._noise_std).square()
        self._steps += 1

    def release_memories(self) -> list[ReleaseMemory]:
        """Return what each client remembers of the round."""
        steps = torch.tensor(self._steps, device=self._global.device)
        # Copies, because a file may not hold two names of one memory: p_G is saved itself, and D without noise is p_L.
        return [
            {_DEVIATION: deviation.clone(), _NOISE: variance, _GLOBAL: self._global.clone(), _STEPS: steps}
            for deviation, variance in zip(self._deviation, self._variance, strict=True)
        ]


def personal_prompt(
    state: PersonalState, personalisation: Personalisation | None, global_prompt: Tensor, server_round: int
) -> Tensor:
    """Return the p_L that belongs to a global prompt, (n_ctx, ctx_dim).

    The stored p_L belongs to the copy of p_G that the client moved in its last round. The next p_G holds the mean over
    clients of those moves, so that the deviation from it is another one.

    Args:
        state: State of a client after a round, with its release memory.
        personalisation: Numbers of a noise-aware personal prompt, or None for the p_L of the state.
        global_prompt: p_G after ``server_round``, (n_ctx, ctx_dim).
        server_round: Number of rounds that moved this p_G.
    """
    if personalisation is None or not state.release_memory:
        return state.personal
    return Deviations(
        personalisation,
        release_memories=[state.release_memory],
        global_prompt=global_prompt,
        rounds_since=[rounds_since(state, server_round + 1)],
        noise_std=torch.zeros(1),
    ).personal[0]


def rounds_since(state: PersonalState, server_round: int) -> int:
    """Return the rounds that moved p_G between a client's last round and ``server_round``, at least 1."""
    return max(1, server_round - state.server_round)
