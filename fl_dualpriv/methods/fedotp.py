"""FedOTP (Li et al. 2024, arXiv:2403.00041): the loss reads p_G and p_L as two prompts; see ``learners/fedotp.py``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fl_dualpriv.methods.base import Learns, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FedOTP(Method):
    """FedOTP; both prompts take plain gradient steps."""

    name: ClassVar[str] = "fedotp"
    learns: ClassVar[Learns] = "fedotp"

    def effective(self, shared: "Tensor", personal: "Tensor") -> "Tensor":
        """Stack p_G and p_L, (…, 2 n_ctx, ctx_dim)."""
        import torch  # imported late: the facts of a method need no torch

        return torch.cat([shared, personal], dim=-2)
