"""DP-LoRA of a prompt: P = P₀ + u·v without a residual, and the factors themselves are learned, clipped and averaged.

This is low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, Eq. 3) of the start P₀, federated and with DP as in
DP-LoRA (Liu et al. 2023, arXiv:2312.17493). An example's gradients g vᵀ of u and uᵀg of v are clipped *jointly*, as one
row, and one noise is added to their sum. The server averages factors. With ``fixed``, v is a public random matrix and
only u is learned: FFA-LoRA (Sun et al. 2024, arXiv:2403.12313).

The method ``lowrank`` differs. It clips and noises the gradient g of the whole prompt and then projects it, so that
noise lies in the n_ctx·ctx_dim entries of P and the projection is post-processing. There u·v is one matrix beside a
full p_G, and it is cut back to rank k after each step. Here noise lies in the k·(n_ctx + ctx_dim) entries of the
factors (FFA: k·n_ctx). Learning both factors has three drawbacks: a step of both multiplies two noises,
(u + a)(v + b) = u·v + u·b + a·v + a·b; the clipped norm depends on how u·v is split; and the mean of products is not
the product of the means. FFA has none of the three.
"""

from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise
from fl_dualpriv.towers.base import ClassFeatures, PromptTower


class FactoredTower:
    """`PromptTower` on factors: what is learned is [uᵀ | v], (rank, n_ctx + ctx_dim); with ``fixed`` uᵀ, (rank, n_ctx).

    Args:
        tower: Tower that maps prompts to class features.
        base: Start P₀, (n_ctx, ctx_dim).
        rank: Rank k.
        seed: Seed of the random start of v, whose rows have about unit norm; equal in all processes.
        fixed: Keep v at its start, so that it is not part of the learned tensor.
    """

    def __init__(self, tower: PromptTower, base: Tensor, rank: int, seed: int, *, fixed: bool) -> None:
        self._tower, self._base = tower, base
        n_ctx, ctx_dim = base.shape
        source = KeyedRandom(StreamKey(seed=seed, purpose="initial-factor"))
        self._start_v = gaussian_noise(source, (rank, ctx_dim), ctx_dim**-0.5).float().to(base.device)
        self.fixed, self.shape = fixed, (rank, n_ctx if fixed else n_ctx + ctx_dim)

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of the prompt P₀ + u·v in the inner tower."""
        return self._tower.bytes_per_prompt

    def initial(self) -> Tensor:
        """Return the start, with u = 0, so that the prompt is P₀."""
        zeros = self._base.new_zeros(len(self._start_v), len(self._base))
        return zeros if self.fixed else torch.cat([zeros, self._start_v], dim=1)

    def effective(self, prompts: Tensor) -> Tensor:
        """Compute P₀ + u·v, (prompt, n_ctx, ctx_dim)."""
        u, v = self._split(prompts)
        return self._base + u.mT @ v

    def _split(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        n_ctx = len(self._base)
        return prompts[..., :n_ctx], self._start_v.expand(len(prompts), -1, -1) if self.fixed else prompts[..., n_ctx:]

    def __call__(self, prompts: Tensor) -> "FactoredFeatures":
        """Run factors (prompt, rank, …) through the tower."""
        return FactoredFeatures(self._tower(self.effective(prompts)), *self._split(prompts), fixed=self.fixed)

    def values(self, prompts: Tensor) -> Tensor:
        """Compute unit-norm class features, (prompt, n_cls, embed_dim)."""
        return self._tower.values(self.effective(prompts))


class FactoredFeatures:
    """`ClassFeatures` of a `FactoredTower`: applies the chain rule from the prompt to the factors."""

    def __init__(self, inner: ClassFeatures, u: Tensor, v: Tensor, *, fixed: bool) -> None:
        self._inner, self._u, self._v, self._fixed = inner, u, v, fixed

    @property
    def values(self) -> Tensor:
        """Unit-norm class features, (prompt, n_cls, embed_dim)."""
        return self._inner.values

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of the factors of one prompt, (rank, n_ctx + ctx_dim), or (rank, n_ctx) with ``fixed``."""
        _, rank, n_ctx = self._u.shape
        return rank, n_ctx + (0 if self._fixed else self._v.shape[2])

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row of the prompt P₀ + u·v in the inner tower."""
        return self._inner.bytes_per_row

    def narrow(self, start: int, stop: int) -> Self:
        """Return the same pass for some prompts; a view."""
        return type(self)(self._inner.narrow(start, stop), self._u[start:stop], self._v[start:stop], fixed=self._fixed)

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back to the factors: (prompt, row, rank, …)."""
        return self._to_factors(self._inner.vjp(cotangents))

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents back as `vjp` does; the products with the factors already hold one row each."""
        return self._to_factors(self._inner.vjp_apart(cotangents))

    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Pull back cotangents of some classes per row, (prompt, row, m, embed_dim)."""
        return self._to_factors(self._inner.vjp_some(cotangents, classes))

    def _to_factors(self, g: Tensor) -> Tensor:
        """Compute (g vᵀ)ᵀ and uᵀg of each row's g, (prompt, row, n_ctx, ctx_dim)."""
        of_u = self._v[:, None] @ g.mT
        return of_u if self._fixed else torch.cat([of_u, self._u[:, None] @ g], dim=-1)
