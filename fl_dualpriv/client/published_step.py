"""The formulas of the DP-FPL paper (arXiv:2501.13904, Algorithm 1), for comparison, and those of the authors' code.

No line here is the authors'. ``dpfpl-paper.published`` chooses between the two.

Its ε is nominal, because clipping a batch mean bounds no record. Each step uses one shuffled minibatch of the expected
size. Gradients with respect to p_G, u and v are each clipped *as a batch mean* to C = 10. The gradients of u and v get
noise of std σ·C/B, σ = √(T ln 1/δ)/ε. Eq. 4 turns them into a step of p_L. The clean clipped gradient of p_G goes to
the server, which adds its noise. Two numbers come from the authors' code and not from the paper: the constant 1 in σ,
and a step of p_L divided by 10.

The official code (github.com/linhhtran/DP-FPL, commit 5191961) differs from the paper's formulas. With a ``start`` this
file does as the code does:

* It adds u uᵀ ∇u v in Eq. 4, where the paper subtracts it. On one common step the full gradients differ by 0.284 of
  their norm.
* T in σ is the number of epochs; for the paper it is rounds × local steps, because each step draws noise.
* The server averages and adds noise to the gradient of p_G after each batch, so there is one local step a round.
* The power iteration starts afresh at each step, from a normal matrix; for the paper it starts from the last v.
* p_L starts at N(0, 0.02²), the same for all clients; for the paper it starts at zero, and the first gradient gives u
  and v.
* Without noise nothing is clipped.

Their optimizer adds a momentum of 0.9 and a weight decay of 5e-4, defaults of a library that the paper does not name.
They are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.client.state import PersonalState
from fl_dualpriv.client.step import Participant
from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.rows import Batches, summed_gradient
from fl_dualpriv.methods.lowrank import subspace_bases
from fl_dualpriv.methods.published import CLIP, LOCAL_DIVISOR
from fl_dualpriv.privacy.noise import gaussian_noise
from fl_dualpriv.towers.base import PromptTower


@dataclass(frozen=True, kw_only=True)
class PublishedTraining:
    """Numbers of the paper's formulas; ``sigma`` = 0 gives their non-private form.

    Attributes:
        start: First p_L, (n_ctx, ctx_dim), for the formulas of the authors' code; None for those of the paper.
    """

    local_steps: int
    batch_size: int
    global_learning_rate: float
    local_learning_rate: float
    sigma: float
    start: Tensor | None = None


def published_updates(
    *,
    global_prompt: Tensor,
    participants: Sequence[Participant],
    tower: PromptTower,
    logit_scale: float,
    training: Callable[[Participant], PublishedTraining],
) -> list[tuple[Tensor, PersonalState]]:
    """Run one round by the paper's formulas; the clients step together.

    There is no guarantee: the noise is scaled as if every record was clipped.

    Args:
        global_prompt: Prompt p_G of this round, (n_ctx, ctx_dim).
        participants: The clients.
        tower: Tower that maps prompts to class features.
        logit_scale: CLIP's inverse temperature.
        training: Function that returns the numbers of a client, whose batch size depends on its number of records. All
            clients take the same number of steps.

    Returns:
        For each client −learning rate × the sum of the clean clipped gradients of p_G, and the new personal state.
    """
    clients = [_client(participant, training(participant), global_prompt) for participant in participants]
    for step in range(clients[0].training.local_steps):
        prompts = torch.stack([global_prompt + client.upload + client.state.personal for client in clients])
        batches = Batches.of(*(client.batch(step) for client in clients))
        summed = summed_gradient(tower(prompts), batches, logit_scale)
        for client, gradient, count in zip(clients, summed, batches.counts, strict=True):
            client.move(step, gradient / count)
    return [(client.upload, client.state) for client in clients]


class _Client:
    """State of one client during a round."""

    def __init__(self, participant: Participant, training: PublishedTraining, global_prompt: Tensor) -> None:
        self.training, self.state, self.upload = training, participant.state, torch.zeros_like(global_prompt)
        assert isinstance(participant.data, ClientData)  # the paper is about image classification only
        self._data, self._random = participant.data, participant.random
        self._order = np.argsort(self._random("shuffle", 0).uniforms(self._data.num_examples))
        self._size = min(training.batch_size, self._data.num_examples)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the next records of the shuffled order, starting again at its end."""
        picked = np.take(self._order, range(step * self._size, (step + 1) * self._size), mode="wrap")
        index = torch.from_numpy(picked).to(self._data.features.device)
        return self._data.features[index], self._data.labels[index]

    def move(self, step: int, gradient: Tensor) -> None:
        """Apply Eq. 4 to the noised gradients of u and v; add the clean clipped gradient to the upload."""
        start = self.state.personal if bool(self.state.personal.any()) else gradient
        u, v = subspace_bases(start, self.state.row_basis)
        grad_u = self._noised(_clip_batch(gradient @ v.T), "noise-u", step)
        grad_v = self._noised(_clip_batch(u.T @ gradient), "noise-v", step)
        eq4 = grad_u @ v + u @ grad_v - u @ (u.T @ grad_u) @ v
        personal = self.state.personal - self.training.local_learning_rate * eq4 / LOCAL_DIVISOR
        self.state = replace(self.state, personal=personal, row_basis=v)
        self.upload = self.upload - self.training.global_learning_rate * _clip_batch(gradient)

    def _noised(self, matrix: Tensor, name: str, step: int) -> Tensor:
        std = self.training.sigma * CLIP / self._size
        return (matrix + gaussian_noise(self._random(name, step), tuple(matrix.shape), std).to(matrix.device)).float()


class _CodeClient(_Client):
    """A client by the formulas of the authors' code."""

    def __init__(self, participant: Participant, training: PublishedTraining, global_prompt: Tensor) -> None:
        super().__init__(participant, training, global_prompt)
        assert training.start is not None
        if not bool(self.state.personal.any()):
            self.state = replace(self.state, personal=training.start.to(global_prompt))

    def move(self, step: int, gradient: Tensor) -> None:
        """Factorise p_L afresh, and move it and the upload."""
        rows, cols = self.state.row_basis.shape
        fresh = gaussian_noise(self._random("factorise", step), (rows, cols), 1.0).to(gradient)
        u = _orthonormal(self.state.personal @ fresh.mT)
        v = _orthonormal(self.state.personal.mT @ u).mT
        grad_u = self._noised(self._clipped(gradient @ v.T), "noise-u", step)
        grad_v = self._noised(self._clipped(u.T @ gradient), "noise-v", step)
        full = grad_u @ v + u @ grad_v + u @ (u.T @ grad_u) @ v
        personal = self.state.personal - self.training.local_learning_rate * full / LOCAL_DIVISOR
        self.state = replace(self.state, personal=personal, row_basis=v)
        self.upload = self.upload - self.training.global_learning_rate * self._clipped(gradient)

    def _clipped(self, matrix: Tensor) -> Tensor:
        return _clip_batch(matrix) if self.training.sigma > 0 else matrix


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormalise columns with the signs of the Gram-Schmidt process, on which the place of the noise depends."""
    basis, triangle = torch.linalg.qr(matrix)
    return basis * torch.where(torch.diagonal(triangle) < 0, -1.0, 1.0)


def _client(participant: Participant, training: PublishedTraining, global_prompt: Tensor) -> _Client:
    kind = _Client if training.start is None else _CodeClient
    return kind(participant, training, global_prompt)


def _clip_batch(matrix: Tensor) -> Tensor:
    """Clip the batch mean, as the authors' code does: one record can move the result by up to 2C."""
    return matrix * min(1.0, CLIP / max(float(torch.linalg.vector_norm(matrix)), 1e-12))
