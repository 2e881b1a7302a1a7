"""The parts of DP-FPL that each method has: every baseline is the same code with parts switched off.

Light on import.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Learns = Literal["prompt", "linear-probe", "prototypes", "dp-lora", "ffa-lora", "fedotp"]


@dataclass(frozen=True, kw_only=True)
class MethodParts:
    """Switches of the effective prompt P = p_G + p_L, with p_L = u·v + r.

    Attributes:
        shared: True if p_G is trained and aggregated by the server.
        personal: True if p_L is trained and stays with the client.
        factorised: True if p_L moves in the tangent space of its rank-k part (DP-FPL Eq. 4); otherwise it moves freely.
        residual: True if r = p_L − u·v is kept; otherwise p_L is cut to rank k after every step.
        published_procedure: True if the clients run the DP-FPL paper's formulas, whose ε is nominal.
        factor_steps: True if p_L = u·v, and u and v take separate gradient steps (FedPGP).
        contrast: True if FedPGP's contrastive term is part of the loss.
        learns: Kind of p_G: ``prompt`` for the learner in ``prompt.learner``, or the name of a baseline that replaces
            it.
    """

    shared: bool
    personal: bool
    factorised: bool = False
    residual: bool = True
    published_procedure: bool = False
    factor_steps: bool = False
    contrast: bool = False
    learns: Learns = "prompt"

    @property
    def reads_patches(self) -> bool:
        """True if the loss reads the patches of an image, beside the features of the whole image."""
        return self.learns == "fedotp"

    @property
    def pairs(self) -> bool:
        """True if the loss reads p_G and p_L as two prompts, one above the other, and not their sum."""
        return self.learns == "fedotp"

    def effective(self, shared: "Tensor", personal: "Tensor") -> "Tensor":
        """Return the prompt that the loss reads, from p_G and p_L, (…, n_ctx, ctx_dim)."""
        if self.pairs:
            import torch  # imported late, because the check of a run's data reads this file and needs no torch

            return torch.cat([shared, personal], dim=-2)
        return shared + personal if self.personal else shared

    @property
    def trains(self) -> bool:
        """True if the method learns any prompt."""
        return self.shared or self.personal


METHODS = {
    "zero-shot": MethodParts(shared=False, personal=False),
    "promptfl": MethodParts(shared=True, personal=False),
    "local-only": MethodParts(shared=False, personal=True, factorised=True),
    "lowrank": MethodParts(shared=True, personal=True, factorised=True, residual=False),
    "full": MethodParts(shared=True, personal=True),
    "dpfpl": MethodParts(shared=True, personal=True, factorised=True),
    "dpfpl-paper": MethodParts(shared=True, personal=True, factorised=True, published_procedure=True),
    "linear-probe": MethodParts(shared=True, personal=False, learns="linear-probe"),
    "prototypes": MethodParts(shared=True, personal=False, learns="prototypes"),
    "fedpgp": MethodParts(shared=True, personal=True, residual=False, factor_steps=True, contrast=True),
    "dp-lora": MethodParts(shared=True, personal=False, learns="dp-lora"),
    "ffa-lora": MethodParts(shared=True, personal=False, learns="ffa-lora"),
    "fedotp": MethodParts(shared=True, personal=True, learns="fedotp"),
}
