"""Prototypes: a class is the direction of the sum of its records' features (Snell et al. 2017, arXiv:1703.05175).

This is their Eq. 1, the class mean, up to a factor that a cosine ignores. Σ x e_yᵀ over records is minus the gradient
of Σ −⟨w_y, x⟩, which does not depend on W. One step at sampling rate 1 from W = 0 therefore gives the class sums, and
the release is that sum with one Gaussian noise. Features have unit norm, so with clip norm 1 nothing is clipped and a
record moves the sum by 1. The federation follows FedProto (Tan et al. 2022, arXiv:2105.00243): a client divides by its
public number of records, and the server takes the mean, weighted or not. Further steps only average more releases.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.learners.base import ClientData, InPromptSpace, Picked
from fl_dualpriv.privacy.step import PlacedBlock

_ROWS = 1024


def prototype_directions(prototypes: Tensor) -> Tensor:
    """Return class features for scoring, unit norm, (…, n_cls, embed_dim); a class that no client holds stays zero."""
    return torch.nn.functional.normalize(prototypes, dim=-1)


@dataclass(frozen=True, kw_only=True)
class PrototypeObjective:
    """`Objective` −⟨w_y, x⟩; ``shape`` is (n_cls, embed_dim)."""

    shape: tuple[int, int]

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of a sum in float64 and of a working copy."""
        return 2 * 8 * self.shape[0] * self.shape[1]

    def apart(self) -> Self:
        """Return this objective: a row is the record's feature, without a product. See `Objective`."""
        return self

    def bind(self, data: Sequence[ClientData]) -> "PooledPrototypes":
        """See `Objective`."""
        return PooledPrototypes(data)


class PooledPrototypes:
    """`PooledObjective` of a `PrototypeObjective`."""

    def __init__(self, data: Sequence[ClientData]) -> None:
        self._data = data

    def gradients(self, prompts: Tensor, picked: Picked) -> "PrototypeGradients":
        """See `PooledObjective`; the gradients do not depend on the prompts."""
        return PrototypeGradients(self._data, picked, (prompts.shape[1], prompts.shape[2]))


class PrototypeGradients(InPromptSpace):
    """`StepGradients`: minus the class sums."""

    def __init__(self, data: Sequence[ClientData], picked: Picked, shape: tuple[int, int]) -> None:
        self._data, self._picked, self._shape = data, picked, shape

    def blocks(self) -> Iterator[PlacedBlock]:
        """See `Rows`; a row is one record's feature in the line of its class.

        Guarantee:
            The only non-zero line of a row is clipped, which bounds the whole row
            (tests/fl_dualpriv/learners/test_prototypes.py).
        """
        for client in range(len(self._data)):
            for x, y in self._rows(client):
                yield PlacedBlock(client=client, lines=y, values=-x)

    def zeros(self) -> Tensor:
        """See `Rows`."""
        return torch.stack([self._empty(client, torch.float64) for client in range(len(self._data))])

    def sums(self) -> Tensor:
        """See `StepGradients`; a feature that is not finite is left out."""
        client_sums = []
        for client in range(len(self._data)):
            total = self._empty(client, torch.float32)
            for x, y in self._rows(client):
                usable = torch.isfinite(x).all(dim=1, keepdim=True)
                total.index_add_(0, y, torch.where(usable, x, 0.0), alpha=-1)
            client_sums.append(total)
        return torch.stack(client_sums)

    def _empty(self, client: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._shape, dtype=dtype, device=self._data[client].features.device)

    def _rows(self, client: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and classes of a batch in parts, so that memory does not grow with the batch."""
        data = self._data[client]
        for start in range(0, len(self._picked[client]), _ROWS):
            index = torch.from_numpy(self._picked[client][start : start + _ROWS]).to(data.features.device)
            yield data.features[index], data.labels[index]
