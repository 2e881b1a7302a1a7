"""What a local method differentiates: the loss of each record under a prompt, seen only through sums over records."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from fl_dualpriv.privacy.clipping import Arithmetic, ClippedSum

Picked = Sequence[np.ndarray]
"""A batch per client, as numbers of its own records, counted from zero."""


class Records(Protocol):
    """A client's data, in whatever form its objective reads."""

    @property
    def num_examples(self) -> int:
        """n_i, public metadata."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """A client's records, ready for prompt learning.

    Attributes:
        features: (record, embed_dim), unit norm; the row of an unreadable record is NaN, so that it stays counted.
        labels: (record,).
        patches: (record, patch, embed_dim), each of unit norm, where a method reads them; else None.
    """

    features: Tensor
    labels: Tensor
    patches: Tensor | None = None

    @property
    def num_examples(self) -> int:
        """n_i, public metadata."""
        return len(self.labels)


Data = TypeVar("Data", bound=Records, contravariant=True)


class StepGradients(Protocol):
    """Gradients of one batch per client, each at its client's prompt."""

    def clipped_sums(self, clip_norm: float, arithmetic: Arithmetic, masks: Tensor | None = None) -> list[ClippedSum]:
        """Each client's sum of clipped per-example gradients.

        Guarantee owed by an implementation:
            A client's value is a sum of one term per record of its batch, of norm at most ``clip_norm``; a term is a
            function of that record, the prompt and the mask alone. A record that cannot be used gives a zero term, an
            empty batch zeros.

        Args:
            clip_norm: C.
            arithmetic: Of the sums, see `ClippedSum`.
            masks: Multiplies each gradient before it is clipped, (client, rows, cols) of 0 and 1; None: nothing. It
                must come from public numbers, such as earlier releases.
        """
        ...

    def rows(self, client: int) -> Iterator[Tensor]:
        """A client's gradients before they are clipped, block by block, (row, …); what is behind the batch is padding.

        `clipped_sums` adds up these very rows, by the same code on the same shapes: what holds for them, see
        `row_check`, holds for its terms.
        """
        ...

    def to_prompts(self, noised: Tensor) -> Tensor:
        """Gradients of the prompts from noised sums, (client, …) → (client, rows, cols): post-processing."""
        ...

    def sums(self) -> Tensor:
        """Each client's sum of gradients as they are, (client, rows, cols): no clipping, no privacy."""
        ...


class PooledObjective(Protocol):
    """The objective over the data of some clients that step together."""

    def gradients(self, prompts: Tensor, picked: Picked) -> StepGradients:
        """Look at one batch per client, at one prompt per client, (client, rows, cols)."""
        ...


class Regulariser(Protocol):
    """A term of the loss that reads prompts alone: what it pulls is added after the noise and costs no ε.

    Guarantee owed by an implementation:
        It is a function of its arguments and of public numbers. Clients do not mix.
    """

    def gradients(self, shared: Tensor, effective: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradients at each client's p_G and at its effective prompt, both (client, rows, cols)."""
        ...


class Objective(Protocol[Data]):
    """Loss of records under prompts."""

    @property
    def bytes_per_prompt(self) -> int:
        """Memory that a client that steps along takes, roughly, beside the rows of its gradients."""
        ...

    def bind(self, data: Sequence[Data]) -> PooledObjective:
        """The same over the data of these clients, in their order."""
        ...

    def apart(self) -> Self:
        """The same with each record in products of its own: slower; see `row_check`."""
        ...
