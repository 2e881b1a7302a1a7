"""A prompt without a text tower: low-rank factors added to the zero-shot class features, on cached image features.

W = W₀ + UᵀV, and the "prompt" is the matrix [U | V] of shape (rank, n_cls + embed_dim). It is the cheapest form of
private learning on a frozen CLIP: a task residual (Yu et al. 2023, arXiv:2211.10277) in LoRA form (Hu et al. 2021,
arXiv:2106.09685).
"""

from typing import Self

import torch
from torch import Tensor

from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, gaussian_noise


class LowRankHead:
    """`PromptTower` on class features.

    Args:
        zero_shot: Zero-shot class features W₀, unit norm, (n_cls, embed_dim).
    """

    def __init__(self, zero_shot: Tensor) -> None:
        self.zero_shot = zero_shot

    @property
    def bytes_per_prompt(self) -> int:
        """Memory of the class features and of the intermediate tensors."""
        return 4 * 4 * self.zero_shot.numel()

    def shape(self, rank: int) -> tuple[int, int]:
        """Return the shape of a prompt, (rank, n_cls + embed_dim)."""
        return rank, sum(self.zero_shot.shape)

    def initial(self, rank: int, seed: int) -> Tensor:
        """Draw U ~ N(0, 1/rank), keyed by the seed, and set V = 0, so that the start is zero-shot."""
        start = torch.zeros(self.shape(rank))
        source = KeyedRandom(StreamKey(seed=seed, purpose="initial-prompt"))
        n_cls = len(self.zero_shot)
        start[:, :n_cls] = gaussian_noise(source, (rank, n_cls), rank**-0.5).float()
        return start

    @torch.no_grad()
    def __call__(self, prompts: Tensor) -> "HeadFeatures":
        """Compute class features of prompts (prompt, rank, n_cls + embed_dim)."""
        n_cls = len(self.zero_shot)
        u, v = prompts[..., :n_cls], prompts[..., n_cls:]
        features = self.zero_shot.expand(len(prompts), -1, -1)
        for k in range(u.shape[1]):
            features = torch.addcmul(features, u[:, k, :, None], v[:, k, None, :])
        norms = features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return HeadFeatures(u, v, features / norms, norms)

    def values(self, prompts: Tensor) -> Tensor:
        """Compute unit-norm class features, (prompt, n_cls, embed_dim)."""
        return self(prompts).values


class HeadFeatures:
    """`ClassFeatures` of a `LowRankHead`."""

    def __init__(self, u: Tensor, v: Tensor, units: Tensor, norms: Tensor) -> None:
        self._u, self._v, self._units, self._norms = u, v, units, norms

    @property
    def values(self) -> Tensor:
        """Unit-norm class features, (prompt, n_cls, embed_dim)."""
        return self._units

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Shape of one prompt, (rank, n_cls + embed_dim)."""
        return self._u.shape[1], self._u.shape[2] + self._v.shape[2]

    @property
    def bytes_per_row(self) -> int:
        """Memory of one row of `vjp`: a few matrices of the size of the class features."""
        return 4 * 4 * self._units[0].numel()

    def narrow(self, start: int, stop: int) -> Self:
        """Return the same pass for some prompts; a view."""
        return type(self)(*(t[start:stop] for t in (self._u, self._v, self._units, self._norms)))

    @torch.no_grad()
    def vjp(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents (prompt, row, n_cls, embed_dim) back: (prompt, row, rank, n_cls + embed_dim)."""
        g = _through_unit_norm(cotangents, self._units[:, None], self._norms[:, None])
        return torch.cat([_onto(self._v[:, None], g), _along(self._u[:, None], g)], dim=-1)

    def vjp_apart(self, cotangents: Tensor) -> Tensor:
        """Pull cotangents back as `vjp` does, whose products already hold one row each."""
        return self.vjp(cotangents)

    @torch.no_grad()
    def vjp_some(self, cotangents: Tensor, classes: Tensor) -> Tensor:
        """Pull back cotangents of some classes per row, (prompt, row, m, embed_dim)."""
        prompt = torch.arange(len(classes), device=classes.device)[:, None, None]
        g = _through_unit_norm(cotangents, self._units[prompt, classes], self._norms[prompt, classes])
        u = self._u.transpose(1, 2)[prompt, classes].transpose(-1, -2)  # (prompt, row, rank, m)
        d_u = g.new_zeros(*classes.shape[:2], *self._u.shape[1:])
        index = classes[:, :, None].expand(-1, -1, d_u.shape[2], -1)
        d_u.scatter_add_(-1, index, _onto(self._v[:, None], g))
        return torch.cat([d_u, _along(u, g)], dim=-1)


def _onto(v: Tensor, g: Tensor) -> Tensor:
    """Compute v gᵀ, (…, rank, m), from v (…, rank, embed_dim) and g (…, m, embed_dim), by sums of single products.

    No matrix kernel is used here and in `_along`, because some kernels round by the address of a matrix, and the
    address of a prompt's factors depends on its place among the prompts.
    """
    return torch.stack([(v[..., k, None, :] * g).sum(dim=-1) for k in range(v.shape[-2])], dim=-2)


def _along(u: Tensor, g: Tensor) -> Tensor:
    """Compute u g, (…, rank, embed_dim), from u (…, rank, m) and g (…, m, embed_dim), by sums of single products."""
    return torch.stack([(u[..., k, :, None] * g).sum(dim=-2) for k in range(u.shape[-2])], dim=-2)


def _through_unit_norm(cotangents: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    radial = (cotangents * units).sum(dim=-1, keepdim=True)
    return torch.addcmul(cotangents, units, radial, value=-1).div_(norms)
