"""FedPGP (Cui et al. 2024, arXiv:2405.09771): p_L = u·v, whose factors take separate gradient steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fl_dualpriv.methods.base import Method, PromptState, Rates, Released

if TYPE_CHECKING:
    import torch

_LEFT = "left-factor"


@dataclass(frozen=True, kw_only=True)
class FedPGP(Method):
    """FedPGP; u starts at zero, so that each client starts at p_G, and v is the row basis."""

    name: ClassVar[str] = "fedpgp"
    contrast: ClassVar[bool] = True

    def memory_shapes(self, n_ctx: int, ctx_dim: int, rank: int) -> "Mapping[str, tuple[tuple[int, ...], torch.dtype]]":
        """Keep u, (n_ctx, rank)."""
        import torch  # imported late: the facts of a method need no torch

        return {_LEFT: ((n_ctx, rank), torch.float32)}

    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        """Take gradient steps of u and v, G̃ vᵀ and uᵀG̃ for P = p_G + u·v."""
        u, v = state.memory[_LEFT], state.row_basis
        left = u - rates.personal * released.direction @ v.mT
        basis = v - rates.personal * u.mT @ released.direction
        return replace(state, personal=left @ basis, row_basis=basis, memory={_LEFT: left})
