"""FedAvg (McMahan et al. 2017, arXiv:1602.05629): the weight of a client is its number of examples."""

from dataclasses import dataclass

from fl_dualpriv.server.strategy import RoundStrategy


@dataclass(kw_only=True)
class FedAvg(RoundStrategy):
    """Mean with weights n_i / max n. No weight exceeds 1, so the sensitivity of the equal-weight sum still holds.

    The divisor is the sum of the same public weights (McMahan et al. 2018, arXiv:1710.06963, f_f estimator).
    """

    def weight(self, num_examples: int) -> float:
        """Return n_i relative to the largest client. n_i is public metadata."""
        return num_examples / max(self.num_examples.values())
