"""Protocols of what a local method differentiates: the loss of each record under a prompt, as sums over records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fl_dualpriv.privacy.step import Rows

Picked = Sequence[np.ndarray]
"""One batch per client: indices into that client's records, counted from zero."""


class Records(Protocol):
    """A client's data, in the form that its objective reads."""

    @property
    def num_examples(self) -> int:
        """Number of records n_i; public metadata."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's records, ready for prompt learning.

    Attributes:
        features: Image features, (record, embed_dim), unit norm. The row of an unreadable record is NaN, so that the
            record stays counted.
        labels: Class ids, (record,).
        patches: Patch features, (record, patch, embed_dim), each of unit norm. None if the method reads no patches.
        log_prior: Logarithm of the client's class prior, (n_cls,) float32, finite; added to the logits of the loss. A
            public constant of the client: no function of the records here. None for a uniform prior, which adds
            nothing.
    """

    features: Tensor
    labels: Tensor
    patches: Tensor | None = None
    log_prior: Tensor | None = None

    @property
    def num_examples(self) -> int:
        """Number of records n_i; public metadata."""
        return len(self.labels)


def log_priors(data: Sequence[ClientData]) -> Tensor | None:
    """Stack the log priors of clients, (client, n_cls), in their order; None if all of them are uniform.

    A uniform prior beside others is a row of zeros, which changes no bit of that client's logits.
    """
    own = next((d.log_prior for d in data if d.log_prior is not None), None)
    if own is None:
        return None
    return torch.stack([torch.zeros_like(own) if d.log_prior is None else d.log_prior for d in data])


Data = TypeVar("Data", bound=Records, contravariant=True)


class StepGradients(Rows, Protocol):
    """Gradients of one batch per client, each taken at the prompt of its client; see `Rows` for what an author owes."""

    def to_prompts(self, noised: Tensor) -> Tensor:
        """Convert noised sums to gradients of the prompts, (client, …) → (client, rows, cols): post-processing."""
        ...

    def sums(self) -> Tensor:
        """Return each client's sum of unclipped gradients, (client, rows, cols): no clipping, no privacy."""
        ...


class PooledObjective(Protocol):
    """An objective bound to the data of the clients that step together."""

    def gradients(self, prompts: Tensor, picked: Picked) -> StepGradients:
        """Differentiate one batch per client at one prompt per client, (client, rows, cols)."""
        ...


Gradients = TypeVar("Gradients", bound=StepGradients, covariant=True)


class Pooled(Generic[Gradients]):
    """`PooledObjective` whose gradients need nothing but prompts and batches: (prompts, picked) → gradients."""

    def __init__(self, make: Callable[[Tensor, Picked], Gradients]) -> None:
        self._make = make

    def gradients(self, prompts: Tensor, picked: Picked) -> Gradients:
        """See `PooledObjective`."""
        return self._make(prompts.detach(), picked)


class InPromptSpace:
    """The part of `StepGradients` whose rows are gradients of the learned tensor itself."""

    def to_prompts(self, noised: Tensor) -> Tensor:
        """Return the input, which needs no conversion; see `StepGradients`."""
        return noised


class Regulariser(Protocol):
    """A term of the loss that reads only prompts. Its gradient is added after the noise and costs no ε.

    Guarantee that every implementation must give:
        The result is a function of the arguments and of public numbers. Clients do not mix.
    """

    def gradients(self, shared: Tensor, effective: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients at each client's p_G and at its effective prompt, both (client, rows, cols)."""
        ...


class Objective(Protocol[Data]):
    """Loss of records under prompts."""

    @property
    def bytes_per_prompt(self) -> int:
        """Approximate memory of one more client in a step, without the rows of its gradients."""
        ...

    def bind(self, data: Sequence[Data]) -> PooledObjective:
        """Bind the objective to the data of these clients, in their order."""
        ...

    def apart(self) -> Self:
        """Return the same objective with separate matrix products for each record: slower; see `row_check`."""
        ...
