"""DP-FPL (arXiv:2501.13904): p_L = u·v + r moves in the tangent space of its low-rank part; and its reductions."""

from dataclasses import dataclass, replace
from typing import ClassVar

from fl_dualpriv.methods.base import Method, PromptState, Rates, Released


@dataclass(frozen=True, kw_only=True)
class DPFPL(Method):
    """DP-FPL: p_L ← p_L − η · Π(G̃), with Π the projection of Eq. 4; the residual r = p_L − u·v is kept.

    Attributes:
        residual: True if r is kept; otherwise p_L is cut to rank k after every step.
    """

    name: ClassVar[str] = "dpfpl"
    residual: ClassVar[bool] = True

    def move_personal(self, state: PromptState, released: Released, rates: Rates) -> PromptState:
        """Move p_L in the tangent space, see the class.

        The projection spreads a row over other rows, so the move is masked again where coordinates must not move.
        Cutting to rank k also spreads rows, and there no coordinate can be held still.
        """
        import torch  # imported late, as in the next line: the facts of a method need no torch

        from fl_dualpriv.methods.lowrank import cut_to_rank, personal_bases, subspace_bases, tangent_projection

        u, v = personal_bases(state.personal, state.row_basis, released.direction)
        move = tangent_projection(released.direction, u, v)
        if released.closed is not None:
            move = torch.where(released.closed, 0.0, move)
        personal = state.personal - rates.personal * move
        if not self.residual:
            u, v = subspace_bases(personal, v)
            personal = cut_to_rank(personal, u)
        return replace(state, personal=personal, row_basis=v)


@dataclass(frozen=True, kw_only=True)
class LowRank(DPFPL):
    """DP-FPL without the residual: p_L keeps rank k."""

    name: ClassVar[str] = "lowrank"
    residual: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class LocalOnly(DPFPL):
    """Local training only: nothing is shared."""

    name: ClassVar[str] = "local-only"
    shared: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class DPFPLPaper(DPFPL):
    """The DP-FPL paper's own formulas, whose ε is nominal; `client.published_step` runs them."""

    name: ClassVar[str] = "dpfpl-paper"
    published_procedure: ClassVar[bool] = True
