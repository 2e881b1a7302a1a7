"""Linear probe: softmax regression on cached, frozen image features (Radford et al. 2021, arXiv:2103.00020, sec. 3.2).

The learned tensor is W, (n_cls, embed_dim + 1), whose last column is a bias. The logits are s·W [x, 1], with CLIP's
inverse temperature s, so that W has the units of class features and can start from the zero-shot ones. An example's
gradient is s·(softmax − one-hot) [x, 1]ᵀ. It is clipped, summed and noised like every other gradient, which is DP-SGD
on frozen features (Tramèr and Boneh 2021, arXiv:2011.11660). The server averages the clients' updates of W.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.learners.base import ClientData
from fl_dualpriv.learners.classification import Classification, PooledClassification


def with_bias(data: ClientData) -> ClientData:
    """Append a feature of value one to each record; a row that is not finite stays non-finite."""
    return replace(data, features=torch.nn.functional.pad(data.features, (0, 1), value=1.0))


class LinearProbe:
    """`PromptTower` whose class features are the learned weights themselves, without normalisation."""

    def __init__(self, n_cls: int, embed_dim: int) -> None:
        self.shape = n_cls, embed_dim + 1

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of W and of a working copy."""
        return 2 * 4 * self.shape[0] * self.shape[1]

    def __call__(self, prompts: Tensor) -> "LinearFeatures":
        """Wrap weights (prompt, n_cls, embed_dim + 1) unchanged."""
        return LinearFeatures(prompts)

    def values(self, prompts: Tensor) -> Tensor:
        """Return the weights unchanged."""
        return prompts


class LinearFeatures:
    """`ClassFeatures` of the identity."""

    def __init__(self, prompts: Tensor) -> None:
        self.values = prompts.detach()

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of one learned tensor, (n_cls, embed_dim + 1)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def bytes_per_row(self) -> int:
        """Memory of one gradient, and of its float64 copy for the clip."""
        return 3 * 4 * self.values[0].numel()

    def narrow(self, start: int, stop: int) -> Self:
        """Return the same pass for some prompts; a view."""
        return type(self)(self.values[start:stop])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Return the cotangents: the map is the identity."""
        return cotangents

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """Return the cotangents: the map is the identity, without products."""
        return cotangents

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Return cotangents of some classes per row, with zeros for the other classes."""
        whole = cotangents.new_zeros(*classes.shape[:2], *self.prompt_shape)
        return whole.scatter_(2, classes[..., None].expand_as(cotangents), cotangents)


class ProbeObjective(Classification):
    """`Objective`: softmax cross-entropy on features with a bias; ``tower`` is a `LinearProbe`."""

    def bind(self, data: Sequence[ClientData]) -> PooledClassification:
        """See `Objective`."""
        return super().bind([with_bias(client_data) for client_data in data])
