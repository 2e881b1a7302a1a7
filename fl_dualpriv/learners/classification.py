"""`Objective` of a CLIP classifier: cross-entropy of cached image features against the class features of a prompt.

A client's public class prior, if it has one, enters as balanced softmax; see ``rows.py``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.learners.base import ClientData, Picked, log_priors
from fl_dualpriv.learners.rows import Batches, feature_blocks, gradient_blocks, summed_gradient
from fl_dualpriv.privacy.step import Block, OuterBlock, RowBlock
from fl_dualpriv.towers.base import ClassFeatures, PromptTower


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Softmax cross-entropy over all classes, for the prompts of many clients at once.

    Attributes:
        tower: Tower that maps prompts to class features.
        logit_scale: CLIP's inverse temperature.
        top_m: Residuals that each example back-propagates; 0 = all, exact.
        noise_space: Space of clip and noise: gradients of the prompt, or of the class features.
        workspace_bytes: Bound on the activations of one backward pass.
        rows_apart: Give each record separate matrix products.
    """

    tower: PromptTower
    logit_scale: float
    top_m: int
    noise_space: Literal["prompt", "feature"]
    workspace_bytes: int
    rows_apart: bool = False

    def apart(self) -> Self:
        """See `Objective`."""
        return replace(self, rows_apart=True)

    @property
    def bytes_per_prompt(self) -> int:
        """Memory that the forward pass of one prompt keeps; see `Objective`."""
        return self.tower.bytes_per_prompt

    def bind(self, data: Sequence[ClientData]) -> "PooledClassification":
        """See `Objective`."""
        return PooledClassification(self, data)


class PooledClassification:
    """`PooledObjective` with the records of all clients in one table, so that the batches of a step are one look-up."""

    def __init__(self, objective: Classification, data: Sequence[ClientData]) -> None:
        self._objective = objective
        self._features = torch.cat([d.features for d in data])
        self._labels = torch.cat([d.labels for d in data])
        self._log_prior = log_priors(data)
        self._starts = [0, *np.cumsum([d.num_examples for d in data])[:-1].tolist()]
        self._last: tuple[Picked, Batches, Tensor | None] | None = None

    def gradients(self, prompts: Tensor, picked: Picked) -> "ClassificationGradients":
        """See `PooledObjective`; clients go through the tower in the order of their batch sizes, largest first."""
        if self._last is None or self._last[0] is not picked:  # at sampling rate 1 the batches never change
            self._last = (picked, *self._gather(picked))
        _, batches, order = self._last
        features = self._objective.tower(prompts if order is None else prompts[order])
        return ClassificationGradients(self._objective, features, batches, order)

    def _gather(self, picked: Picked) -> tuple[Batches, Tensor | None]:
        """Return the batches, largest first, and the order of the clients (None if it did not change)."""
        order = sorted(range(len(picked)), key=lambda i: -len(picked[i]))
        as_they_are = order == list(range(len(order)))
        prior = self._log_prior if self._log_prior is None or as_they_are else self._log_prior[order]
        batches = Batches.gather(self._features, self._labels, [picked[i] + self._starts[i] for i in order], prior)
        return batches, None if as_they_are else torch.tensor(order, device=self._features.device)


class ClassificationGradients:
    """`StepGradients` from one forward pass; internally clients are ordered by their batch sizes."""

    def __init__(
        self, objective: Classification, features: ClassFeatures, batches: Batches, order: Tensor | None
    ) -> None:
        self._objective, self._features, self._batches, self._order = objective, features, batches, order
        self._inverse = None if order is None else torch.argsort(order)

    def blocks(self) -> Iterator[Block]:
        """See `Rows`; rows are prompt gradients, or class-feature gradients as outer products.

        Guarantee:
            As for `gradient_blocks` and `feature_blocks`.
        """
        objective, batches = self._objective, self._batches
        count, device = len(batches.counts), self._features.values.device
        clients = torch.arange(count, device=device) if self._order is None else self._order
        if objective.noise_space == "feature":
            passes = zip(clients.tolist(), self._features.values, batches.rows(), strict=True)
            for place, (client, classes, indices) in enumerate(passes):
                x, y = batches.features[indices], batches.labels[indices]
                for left, right in feature_blocks(classes, x, y, objective.logit_scale, self._log_prior(place)):
                    yield OuterBlock(client=client, left=left, right=right)
            return
        for prompts, _, rows in gradient_blocks(
            self._features,
            batches,
            objective.logit_scale,
            workspace_bytes=objective.workspace_bytes,
            top_m=objective.top_m,
            apart=objective.rows_apart,
        ):
            yield RowBlock(clients=clients[prompts], rows=rows)

    def zeros(self) -> Tensor:
        """See `Rows`."""
        values = self._features.values
        shape = values.shape[1:] if self._objective.noise_space == "feature" else self._features.prompt_shape
        return values.new_zeros(len(self._batches.counts), *shape, dtype=torch.float64)

    def _log_prior(self, place: int) -> Tensor | None:
        """Return the log prior of the client at a place of the batches, (n_cls,), or None."""
        return None if self._batches.log_prior is None else self._batches.log_prior[place]

    def to_prompts(self, noised: Tensor) -> Tensor:
        """Back-propagate noised class-feature gradients, or return noised prompt gradients; see `StepGradients`."""
        if self._objective.noise_space == "prompt":
            return noised
        cotangents = _reordered(noised.to(self._features.values.dtype), self._order)
        return _reordered(self._features.vjp(cotangents[:, None])[:, 0], self._inverse)

    def sums(self) -> Tensor:
        """See `StepGradients`."""
        return _reordered(summed_gradient(self._features, self._batches, self._objective.logit_scale), self._inverse)


def _reordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows[order]
