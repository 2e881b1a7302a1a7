"""Who takes part when, without chance: clients in turn, each every b-th round."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """Client i takes part in the rounds t = 1 … ``rounds`` with t ≡ i (mod ``separation``), and in no other.

    Guarantee:
        The schedule depends on public numbers alone. A client takes part at most ``most_rounds`` times, in rounds that
        lie exactly ``separation`` apart; there are ``separation`` such patterns, or as many as rounds.

    Attributes:
        rounds: T of the whole run, >= 1.
        separation: b >= 1; 1: everybody in each round.
    """

    rounds: int
    separation: int

    @property
    def most_rounds(self) -> int:
        """k: in how many rounds one client takes part at most."""
        return -(-self.rounds // self.separation)

    @property
    def patterns(self) -> range:
        """First round, counted from 0, of each pattern: the others follow at the separation."""
        return range(min(self.separation, self.rounds))

    def cohort(self, server_round: int, population: int) -> np.ndarray:
        """Clients of a round, sorted, int64.

        Raises:
            ValueError: For a round that the run does not have: it would be one participation too many.
        """
        if not 1 <= server_round <= self.rounds:
            raise ValueError(f"round {server_round} of a schedule of {self.rounds} rounds")
        return np.arange(server_round % self.separation, population, self.separation)


def separation_for(population: int, expected_cohort: float) -> int:
    """The separation for cohorts of about that many clients: population / cohort, rounded."""
    return max(1, round(population / expected_cohort))
