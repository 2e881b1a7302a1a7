"""FedOTP (Li et al. 2024, arXiv:2403.00041, sec. 3): a global and a local prompt share the patches of an image.

G denotes the unit-norm features of an image's M patches, and H_c those of class c under the global and the local prompt
(N = 2). With the plan T_c of `transport_plan` between them and the cost 1 − G H_cᵀ, the distance is
d_c = ⟨T_c, 1 − G H_cᵀ⟩, the logit is s·(1 − d_c), and the loss is softmax cross-entropy. 1 − d_c equals
⟨T_c, G H_cᵀ⟩ + 1 − γ, and the constant 1 − γ is the same for all classes. As published, the gradient treats the plan as
a constant. The server averages global prompts; local ones stay on the clients.

An example's gradient at H_c is s·(softmax_c − one-hot_c) T_cᵀ G. Pulled back through the tower to *both* prompts, which
are stacked one above the other, it is one row, with one clip and one noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.learners.base import ClientData, InPromptSpace, Picked
from fl_dualpriv.learners.rows import rows_at_once
from fl_dualpriv.privacy.step import RowBlock
from fl_dualpriv.towers.base import ClassFeatures, PromptTower

_IMAGES = 64
"""Most images that are scored together; fewer if their plans need more than the workspace."""
_NUMBERS_PER_ENTRY = 8
"""Float64 matrices of the size of a plan that exist while it is computed, counted in `transport_plan`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TransportObjective:
    """`Objective` of prompts [p_G; p_L], (2 n_ctx, ctx_dim), on patches.

    Attributes:
        tower: Tower that maps prompts to class features.
        local_start: Start of the local prompt of every client, (n_ctx, ctx_dim), which is added to p_L; public.
        logit_scale: Scale s of the logits.
        mass: Mass γ of a plan.
        regularisation: Entropy weight λ of a plan.
        iterations: Iterations of `transport_plan`.
        workspace_bytes: Memory for the plans of images that are scored together.
        rows_apart: Give each record separate matrix products.
    """

    tower: PromptTower
    local_start: Tensor
    logit_scale: float
    mass: float
    regularisation: float
    iterations: int
    workspace_bytes: int
    rows_apart: bool = False

    def apart(self) -> Self:
        """See `Objective`."""
        return replace(self, rows_apart=True)

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of a pair of prompts in the tower; see `Objective`."""
        return 2 * self.tower.bytes_per_prompt

    def bind(self, data: Sequence[ClientData]) -> "PooledTransport":
        """See `Objective`."""
        return PooledTransport(self, data)

    def class_features(self, prompts: Tensor) -> ClassFeatures:
        """Run the pairs (client, 2 n_ctx, ctx_dim) through the tower; the two prompts of a client are neighbours."""
        both = prompts.unflatten(1, (2, -1)).clone()
        both[:, 1] += self.local_start
        return self.tower(both.flatten(0, 1))

    def match(self, patches: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits of images, s⟨T_c, G H_cᵀ⟩, (image, n_cls), and their plans T, (image, n_cls, patch, prompt).

        Args:
            patches: Patch features G, (image, patch, embed_dim).
            classes: Class features H, (prompt, n_cls, embed_dim).
        """
        similarity = torch.einsum("ime,pce->icmp", patches, classes)
        plan = transport_plan(similarity, self.mass, self.regularisation, self.iterations)
        return self.logit_scale * (plan * similarity).sum(dim=(-2, -1)), plan

    def cotangents(self, patches: Tensor, labels: Tensor, classes: Tensor, log_prior: Tensor | None = None) -> Tensor:
        """Compute ∂loss/∂H of each image, (image, prompt, n_cls, embed_dim).

        ``log_prior``, (n_cls,), is added to the logits of every image: balanced softmax, see ``rows.py``.
        """
        logits, plan = self.match(patches, classes)
        residual = torch.softmax(logits if log_prior is None else logits + log_prior, dim=-1)
        residual = residual.scatter_add(-1, labels[:, None], torch.full_like(residual[:, :1], -1.0))
        seen = torch.einsum("icmp,ime->ipce", plan, patches)  # TᵀG
        return self.logit_scale * residual[:, None, :, None] * seen

    @torch.no_grad()
    def logits(self, prompts: Tensor, images: ClientData) -> Iterator[Tensor]:
        """Yield logits (image, n_cls) of each pair of prompts, or of each global prompt.

        Args:
            prompts: Pairs, (prompt, 2 n_ctx, ctx_dim), or only global prompts, (prompt, n_ctx, ctx_dim).
            images: Images to score.
        """
        pairs = prompts.shape[1] == 2 * len(self.local_start)
        features = self.class_features(prompts).values.unflatten(0, (-1, 2)) if pairs else self.tower(prompts).values
        patches = _patches(images)
        together = self._images_at_once(patches.shape[1], features.shape[-2])
        for classes in features if pairs else features[:, None]:
            yield torch.cat([self.match(some, classes)[0] for some in patches.split(together)])

    def _images_at_once(self, n_patches: int, n_cls: int) -> int:
        plan = _NUMBERS_PER_ENTRY * 8 * n_cls * n_patches * 2
        return max(1, min(_IMAGES, self.workspace_bytes // plan))


def _patches(data: ClientData) -> Tensor:
    assert data.patches is not None  # the task provides patches if the method reads them
    return data.patches


class PooledTransport:
    """`PooledObjective` of a `TransportObjective`."""

    def __init__(self, objective: TransportObjective, data: Sequence[ClientData]) -> None:
        self._objective, self._data = objective, data

    def gradients(self, prompts: Tensor, picked: Picked) -> "TransportGradients":
        """See `PooledObjective`."""
        return TransportGradients(self._objective, self._data, picked, prompts)


class TransportGradients(InPromptSpace):
    """`StepGradients` from one forward pass of both prompts of every client."""

    def __init__(
        self, objective: TransportObjective, data: Sequence[ClientData], picked: Picked, prompts: Tensor
    ) -> None:
        self._objective, self._data, self._picked = objective, data, picked
        self._features, self._shape = objective.class_features(prompts), prompts.shape[1:]
        self._classes = self._features.values.unflatten(0, (-1, 2))

    @torch.no_grad()
    @torch.no_grad()
    def blocks(self) -> Iterator[RowBlock]:
        """See `Rows`.

        Guarantee:
            The row of an image is a function of that image, because the plan is one and the prior is a public constant.
            The gradients of both prompts are one row under one clip. A patch that is not finite makes the row of its
            record non-finite. All blocks have one size, the last one padded, so that no number depends on how many
            records there are.
        """
        for client in range(len(self._data)):
            for patches, labels, count in self._blocks(client):
                cotangents = self._cotangents(client, patches, labels)
                rows = self._pull(client, cotangents.transpose(0, 1)).transpose(0, 1).flatten(1, 2)
                yield RowBlock(clients=torch.tensor([client], device=rows.device), rows=rows[None], count=count)

    def zeros(self) -> Tensor:
        """See `Rows`."""
        return torch.zeros(len(self._data), *self._shape, dtype=torch.float64, device=self._classes.device)

    @torch.no_grad()
    def sums(self) -> Tensor:
        """See `StepGradients`; an image with a patch that is not finite is left out."""
        client_sums = []
        for client in range(len(self._data)):
            total = torch.zeros_like(self._classes[client])
            for patches, labels, count in self._blocks(client):
                usable = torch.isfinite(patches).all(dim=(1, 2))
                usable[count:] = False
                clean = torch.where(usable[:, None, None], patches, 0.0)
                cotangents = self._cotangents(client, clean, labels)
                total += (cotangents * usable[:, None, None, None]).sum(dim=0)
            client_sums.append(self._pull(client, total[:, None])[:, 0].flatten(0, 1))
        return torch.stack(client_sums)

    def _cotangents(self, client: int, patches: Tensor, labels: Tensor) -> Tensor:
        return self._objective.cotangents(patches, labels, self._classes[client], self._data[client].log_prior)

    def _pull(self, client: int, cotangents: Tensor) -> Tensor:
        """Pull cotangents back, (prompt, row, n_cls, embed_dim) → (prompt, row, n_ctx, ctx_dim)."""
        return self._features.narrow(2 * client, 2 * client + 2).vjp(cotangents)

    def _blocks(self, client: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield patches and classes of some records, and how many of them are not padding."""
        data, picked = self._data[client], self._picked[client]
        size = 1 if self._objective.rows_apart else rows_at_once(data.labels.device)
        for start in range(0, len(picked), size):
            here = picked[start : start + size]
            padded = np.pad(here, (0, size - len(here)), mode="edge")
            index = torch.from_numpy(padded).to(data.labels.device)
            yield _patches(data)[index], data.labels[index], len(here)


@torch.no_grad()
def transport_plan(similarity: Tensor, mass: float, regularisation: float, iterations: int) -> Tensor:
    """Compute the plan T >= 0 that maximises ⟨T, S⟩ + λ·entropy(T) with T 1 <= 1/M and Tᵀ1 = γ/N.

    Every prompt places its share of the mass γ, and no patch takes more than 1/M. With γ < 1, patches that match no
    prompt stay empty. The iteration is Dykstra's: it scales columns to their sums, then rows that exceed their bounds
    down to them. The mass that columns lack after the last iteration goes to rows with room, so that both constraints
    hold exactly.

    Guarantee:
        A problem's plan depends only on that problem: the number of iterations is fixed, and no convergence test
        looks at all problems. Columns have their sums and rows keep their bounds, up to rounding, after any number of
        iterations (tests/fl_dualpriv/learners/test_transport.py). The plan is a constant to the gradient, as
        published.

    Args:
        similarity: Cosines S, (…, M patches, N prompts). The cost is 1 − S, whose constant changes nothing.
        mass: Mass γ in (0, 1].
        regularisation: Entropy weight λ, in units of a cosine. From 0.01 on, no exponential leaves the range of
            float64, in which the plan is computed.
        iterations: Number of iterations, at least 1.

    Reference:
        Li et al. 2024 (FedOTP), arXiv:2403.00041, sec. 3; Benamou et al. 2015, arXiv:1412.5154 (partial transport by
        alternating projections); Altschuler et al. 2017, arXiv:1705.09634, Algorithm 2 (the last step).
    """
    patches, prompts = similarity.shape[-2:]
    bound, share = 1 / patches, mass / prompts
    # Problems are the last dimension in memory: sums over few prompts and patches are then additions of long rows.
    exact = similarity.reshape(-1, patches, prompts).permute(1, 2, 0).double().contiguous()
    kernel = torch.exp((exact - exact.amax(dim=0, keepdim=True)) / regularisation)  # column scaling undoes the shift
    rows = torch.ones_like(kernel[:, :1])
    columns = torch.ones_like(kernel[:1])
    for _ in range(iterations):
        columns = share / (kernel * rows).sum(dim=0, keepdim=True)
        rows = (bound / (kernel * columns).sum(dim=1, keepdim=True)).clamp_(max=1.0)
    plan = rows * kernel * columns
    plan = plan * (share / plan.sum(dim=0, keepdim=True)).clamp(max=1.0)
    room = (bound - plan.sum(dim=1, keepdim=True)).clamp(min=0.0)
    lacking = share - plan.sum(dim=0, keepdim=True)
    plan = plan + room * lacking / room.sum(dim=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return plan.permute(2, 0, 1).reshape(similarity.shape).to(similarity.dtype)
