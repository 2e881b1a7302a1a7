"""DP-FPL's server (arXiv:2501.13904, Algorithm 1): the plain mean over clients, then a step on the global prompt."""

from dataclasses import dataclass

from torch import Tensor

from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class DPFPL(RoundStrategy):
    """p_G ← p_G + server_learning_rate · (mean of the clients' moves, noised if the server adds noise).

    Clients weigh the same, as in the paper: 1/N each, whatever their number of examples.
    """

    server_learning_rate: float = 1.0

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Post-processing of the (noised) mean."""
        return prompt + self.server_learning_rate * diff
