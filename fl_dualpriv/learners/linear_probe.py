"""Linear probe: softmax regression on cached, frozen image features (Radford et al. 2021, arXiv:2103.00020, sec. 3.2).

Learned is W, (n_cls, embed_dim + 1), its last column a bias: logits s·W [x, 1], with CLIP's inverse temperature s, so
that W is in the units of class features and can start from the zero-shot ones. An example's gradient is
s·(softmax − one-hot) [x, 1]ᵀ; clipped, summed and noised as everything else it is DP-SGD on frozen features (Tramèr and
Boneh 2021, arXiv:2011.11660), and the server averages what clients make of W.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification, PooledClassification


def with_bias(data: ClientData) -> ClientData:
    """A last feature of one for each record; a row that is not finite stays so."""
    return replace(data, features=torch.nn.functional.pad(data.features, (0, 1), value=1.0))


class LinearProbe:
    """`PromptTower` whose class features are what is learned, as they are: no norm is taken."""

    def __init__(self, n_cls: int, embed_dim: int) -> None:
        self.shape = n_cls, embed_dim + 1

    @property
    def bytes_per_prompt(self) -> int:
        """W, and as much again to work in."""
        return 2 * 4 * self.shape[0] * self.shape[1]

    def __call__(self, prompts: Tensor) -> "LinearFeatures":
        """Take (prompt, n_cls, embed_dim + 1) as it is."""
        return LinearFeatures(prompts)

    def values(self, prompts: Tensor) -> Tensor:
        """The same."""
        return prompts


class LinearFeatures:
    """`ClassFeatures` of the identity."""

    def __init__(self, prompts: Tensor) -> None:
        self.values = prompts.detach()

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Of one prompt."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def bytes_per_row(self) -> int:
        """A gradient, and as much again to clip it in float64."""
        return 3 * 4 * self.values[0].numel()

    def narrow(self, start: int, stop: int) -> Self:
        """The same for some prompts; a view."""
        return type(self)(self.values[start:stop])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """The identity's: cotangents as they are."""
        return cotangents

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """The identity's."""
        return cotangents

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Cotangents of some classes per row, with zeros for the others."""
        whole = cotangents.new_zeros(*classes.shape[:2], *self.prompt_shape)
        return whole.scatter_(2, classes[..., None].expand_as(cotangents), cotangents)


class ProbeObjective(Classification):
    """`Objective`: softmax cross-entropy on features with a bias; ``tower`` is a `LinearProbe`."""

    def bind(self, data: Sequence[ClientData]) -> PooledClassification:
        """See `Objective`."""
        return super().bind([with_bias(own) for own in data])
