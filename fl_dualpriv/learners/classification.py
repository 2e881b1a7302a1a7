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
from fl_dualpriv.learners.rows import Batches, clipped_sums, gradient_blocks, summed_gradient
from fl_dualpriv.privacy.clipping import Arithmetic, ClippedSum
from fl_dualpriv.privacy.feature_rows import clipped_feature_sum, feature_blocks
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
        prior = None if self._log_prior is None else self._log_prior[order]
        batches = Batches.gather(self._features, self._labels, [picked[i] + self._starts[i] for i in order], prior)
        as_they_are = order == list(range(len(order)))
        return batches, None if as_they_are else torch.tensor(order, device=self._features.device)


class ClassificationGradients:
    """`StepGradients` from one forward pass; internally clients are ordered by their batch sizes."""

    def __init__(
        self, objective: Classification, features: ClassFeatures, batches: Batches, order: Tensor | None
    ) -> None:
        self._objective, self._features, self._batches, self._order = objective, features, batches, order
        self._inverse = None if order is None else torch.argsort(order)

    def clipped_sums(self, clip_norm: float, arithmetic: Arithmetic, masks: Tensor | None = None) -> list[ClippedSum]:
        """See `StepGradients`; sums are of prompt gradients, or of class-feature gradients, which have no mask.

        Raises:
            ValueError: If there are masks and ``noise_space`` is ``feature``.
        """
        objective, batches = self._objective, self._batches
        if objective.noise_space == "feature":
            if masks is not None:
                raise ValueError("masks apply to prompt gradients; class-feature gradients cannot be masked")
            client_sums = [
                clipped_feature_sum(
                    classes,
                    batches.features[indices],
                    batches.labels[indices],
                    objective.logit_scale,
                    clip_norm,
                    arithmetic,
                    self._log_prior(place),
                )
                for place, (classes, indices) in enumerate(zip(self._features.values, batches.rows(), strict=True))
            ]
        else:
            client_sums = clipped_sums(
                self._features,
                batches,
                objective.logit_scale,
                clip_norm,
                workspace_bytes=objective.workspace_bytes,
                top_m=objective.top_m,
                arithmetic=arithmetic,
                masks=None if masks is None else _reordered(masks, self._order),
                apart=objective.rows_apart,
            )
        return client_sums if self._inverse is None else [client_sums[i] for i in self._inverse.tolist()]

    def rows(self, client: int) -> Iterator[Tensor]:
        """See `StepGradients`; all clients run, as in a step, and only the rows of one client are returned."""
        objective, batches = self._objective, self._batches
        place = client if self._inverse is None else int(self._inverse[client])
        if objective.noise_space == "feature":
            indices, classes = batches.rows()[place], self._features.values[place]
            for left, x in feature_blocks(
                classes,
                batches.features[indices],
                batches.labels[indices],
                objective.logit_scale,
                self._log_prior(place),
            ):
                yield left[:, :, None] * x[:, None, :]
            return
        for prompts, _, rows in gradient_blocks(
            self._features,
            batches,
            objective.logit_scale,
            workspace_bytes=objective.workspace_bytes,
            top_m=objective.top_m,
            apart=objective.rows_apart,
        ):
            if prompts.start <= place < prompts.stop:
                yield rows[place - prompts.start]

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
