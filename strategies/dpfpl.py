"""Server of DP-FPL (arXiv:2501.13904, Algorithm 1): the plain mean over clients, then a step on the global prompt."""

from dataclasses import dataclass

from torch import Tensor

from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class DPFPL(RoundStrategy):
    """p_G ← p_G + server_learning_rate · (mean of the clients' moves, noised if the server adds noise).

    All clients have the same weight 1/N, as in the paper. The number of examples of a client does not matter.
    """

    server_learning_rate: float = 1.0

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        """Step along the (noised) mean, which is post-processing."""
        return prompt + self.server_learning_rate * diff
