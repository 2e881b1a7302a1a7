"""FedAvgM (Hsu et al. 2019, arXiv:1909.06335, Section 4.3): FedAvg with heavy-ball momentum on the server."""

from dataclasses import dataclass

from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class FedAvgM(RoundStrategy):
    """v ← momentum · v + Δ and p ← p + server_learning_rate · v, with Δ the weighted mean of the clients' moves.

    Momentum starts at v = 0 and runs after the noise, so it costs no privacy (post-processing). The weights are those
    of `FedAvg`.
    """

    momentum: float = 0.9
    server_learning_rate: float = 1.0

    def check_options(self) -> None:
        """Refuse a momentum outside [0, 1), because from 1 on the velocity never fades."""
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"plugin.fedavgm.momentum = {self.momentum}; it must be in [0, 1): 0.9 is usual")

    def weight(self, num_examples: int) -> float:
        """Return n_i relative to the largest client. n_i is public metadata."""
        return num_examples / max(self.num_examples.values())

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Step along the velocity."""
        self.state["velocity"] = self.momentum * self.state.get("velocity", 0 * diff) + diff
        return prompt + self.server_learning_rate * self.state["velocity"]
