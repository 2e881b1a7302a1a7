"""DP-FPL as published (arXiv:2501.13904, Algorithm 1), for comparison. Its ε is nominal: a batch clip bounds no record.

Per step: one shuffled minibatch of the expected size; gradients with respect to p_G, u and v, each clipped *as a batch
mean* to C = 10; noise of std σ·C/B on the gradients of u and v, σ = √(T ln 1/δ)/ε; Eq. 4; everything on the local side
divided by 10 as the authors' code does. The clean clipped gradient of p_G goes to the server, which adds its noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.client import ClientData, PersonalState
from fl_dualpriv.privacy.noise import RandomSource, gaussian_noise
from fl_dualpriv.privacy.per_example import Batches, summed_gradient
from fl_dualpriv.prompts.lowrank import carriers
from fl_dualpriv.prompts.tower import PromptTower

CLIP = 10.0  # C_th of the paper
LOCAL_DIVISOR = 10.0  # hard-coded in the authors' code, not in the paper


def nominal_sigma(epsilon: float, delta: float, steps: int) -> float:
    """σ = √(T ln 1/δ)/ε, Theorem 3.3 with the constant 1, as coded."""
    return math.sqrt(steps * math.log(1 / delta)) / epsilon


@dataclass(frozen=True, kw_only=True)
class PublishedTraining:
    """Numbers of the published procedure; ``sigma`` = 0 gives its non-private form."""

    local_steps: int
    batch_size: int
    global_learning_rate: float
    local_learning_rate: float
    sigma: float


def published_update(
    *,
    global_prompt: Tensor,
    state: PersonalState,
    data: ClientData,
    tower: PromptTower,
    logit_scale: float,
    training: PublishedTraining,
    random: Callable[[str, int], RandomSource],
) -> tuple[Tensor, PersonalState]:
    """Run one round as published. No guarantee: the noise is scaled as if every record had been clipped.

    Returns:
        −learning rate × the sum of the clean clipped gradients of p_G, and the new personal state.
    """
    order = np.argsort(random("shuffle", 0).uniforms(data.num_examples))
    upload = torch.zeros_like(global_prompt)
    size = min(training.batch_size, data.num_examples)
    std = training.sigma * CLIP / size
    for step in range(training.local_steps):
        picked = np.take(order, range(step * size, (step + 1) * size), mode="wrap")
        batch = torch.from_numpy(picked).to(data.features.device)
        prompt = global_prompt + upload + state.personal
        rows = Batches.of((data.features[batch], data.labels[batch]))
        gradient = summed_gradient(tower(prompt[None]), rows, logit_scale)[0] / size
        start = state.personal if bool(state.personal.any()) else gradient
        u, v = carriers(start, state.carrier)

        def noised(matrix: Tensor, name: str, step: int = step) -> Tensor:
            return (matrix + gaussian_noise(random(name, step), tuple(matrix.shape), std).to(matrix.device)).float()

        grad_u = noised(_clip_batch(gradient @ v.T), "noise-u")
        grad_v = noised(_clip_batch(u.T @ gradient), "noise-v")
        eq4 = grad_u @ v + u @ grad_v - u @ (u.T @ grad_u) @ v
        personal = state.personal - training.local_learning_rate * eq4 / LOCAL_DIVISOR
        state = replace(state, personal=personal, carrier=v)
        upload = upload - training.global_learning_rate * _clip_batch(gradient)
    return upload, state


def _clip_batch(matrix: Tensor) -> Tensor:
    """The published clip: of the batch mean, so one record can move the result by up to 2C."""
    return matrix * min(1.0, CLIP / max(float(torch.linalg.vector_norm(matrix)), 1e-12))
