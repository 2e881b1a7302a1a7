"""FedAdam (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2): Adam on the server, the mean move as its gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class FedAdam(RoundStrategy):
    """m ← β₁ m + (1 − β₁) Δ, v ← β₂ v + (1 − β₂) Δ², p ← p + η m / (√v + τ), entry by entry; m = 0 and v = τ² at first.

    As published, there is no bias correction, and clients have equal weights in Δ. All of it runs after the noise
    (post-processing). v then also holds the variance of the noise, which shortens the steps of all entries alike.
    """

    server_learning_rate: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def check_options(self) -> None:
        """Refuse options unless both β are in [0, 1) and τ > 0."""
        if not (0 <= self.beta_1 < 1 and 0 <= self.beta_2 < 1 and self.tau > 0):
            raise ConfigError(
                f"plugin.fedadam: beta-1 = {self.beta_1}, beta-2 = {self.beta_2}, tau = {self.tau}; "
                "both betas must be in [0, 1) and tau > 0: 0.9, 0.99 and 0.001 are usual"
            )

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Make one step of Adam."""
        first = self.state.get("first", torch.zeros_like(diff))
        second = self.state.get("second", torch.full_like(diff, self.tau**2))
        self.state["first"] = self.beta_1 * first + (1 - self.beta_1) * diff
        self.state["second"] = self.beta_2 * second + (1 - self.beta_2) * diff**2
        return prompt + self.server_learning_rate * self.state["first"] / (self.state["second"].sqrt() + self.tau)
