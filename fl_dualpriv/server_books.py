"""The server's books: a noised round is checked against the budget before it starts, and written before its noise.

Flower has a protocol for accountants (`PrivacyAccountant`); one of those can keep books beside ours.
"""

import math
from dataclasses import dataclass
from typing import Literal

from flwr.supercore.privacy_accounting import GaussianPrivacyEvent, PrivacyAccountant

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.matrix_mechanism import CorrelatedNoise
from fl_dualpriv.privacy.quantile import AdaptiveClip


class BudgetExhausted(PrivacyError):
    """One more round would spend more than may be spent; nothing of it has started."""


@dataclass(frozen=True, kw_only=True)
class ServerPrivacy:
    """What the server adds to a round.

    Attributes:
        unit: ``client``: uploads are updates, clipped here to ``bound``, on a Poisson cohort; ``record``: uploads are
            sums of clipped per-record terms, each of norm at most ``bound``, from every client (``trusts-server``);
            ``nominal``: the DP-FPL paper's formulas, whose bound is only claimed.
        bound: L2 norm that one unit can add to the sum of uploads.
        noise_multiplier: Noise std / sensitivity.
        sampling_rate: Of the unit: cohort rate for clients, batch rate for records (for the ledger); 1 where a fixed
            schedule says who takes part.
        ledger_multiplier: Effective multiplier of everything the round releases about one unit (for the ledger).
        ledger: Where each round is written before it happens; None for the nominal procedure.
        max_epsilon: A round that would bring the ledger above it does not start; None: no ledger, no limit.
        delta: δ at which that is stated.
        reproducible: Whether cohorts and noise come from a seed: a round that is made again is the same release.
        arithmetic: Of the sum over clients and its noise. With ``integer`` and ``record`` uploads are whole numbers,
            minus the clipped sums in units of ``bound / GRID_STEPS``.
        adaptive: Clients' clip norm begins at ``bound`` and follows a quantile; ``noise_multiplier`` is then that of
            the sum alone, ``ledger_multiplier`` that of the sum and the noised share together.
        correlated: Noise of clients' sums over the whole run, on its own schedule; both multipliers are the run's.
    """

    unit: Literal["client", "record", "nominal"]
    bound: float
    noise_multiplier: float
    sampling_rate: float
    ledger_multiplier: float
    ledger: Ledger | None
    max_epsilon: float | None = None
    delta: float = 0.0
    arithmetic: Arithmetic = "float"
    reproducible: bool = False
    adaptive: AdaptiveClip | None = None
    correlated: CorrelatedNoise | None = None

    def __post_init__(self) -> None:
        special = (self.adaptive is not None) + (self.correlated is not None)
        if special > (self.unit == "client") or (self.correlated is not None and self.arithmetic == "integer"):
            raise ValueError(
                "adaptive clipping and correlated noise are proved for client level, one of them at a time, and "
                "correlated noise in floats alone"
            )

    @property
    def cohort_rate(self) -> float:
        """Share of the clients in a round: by chance, by the schedule (on average over rounds), or all."""
        if self.unit != "client":
            return 1.0
        return 1 / self.correlated.schedule.separation if self.correlated else self.sampling_rate


def check_accountant(privacy: ServerPrivacy | None, accountant: PrivacyAccountant | None) -> None:
    """Refuse an accountant, whose protocol knows clients alone, in a run that releases nothing at their level.

    Raises:
        PrivacyError: If there is such a one.
    """
    if accountant is not None and (privacy is None or privacy.unit != "client"):
        raise PrivacyError("an accountant of client-level releases, and the run makes none: leave it out")


class ServerBooks:
    """Checks and writes rounds.

    Args:
        privacy: What a round releases, and the ledger.
        accountant: Flower's, for client-level rounds; or None.
        run_token: Marks the run in the ledger.
        rounds: How many the run has.
        population: Number of clients.
    """

    def __init__(
        self,
        privacy: ServerPrivacy,
        accountant: PrivacyAccountant | None,
        run_token: str,
        *,
        rounds: int,
        population: int,
    ) -> None:
        check_accountant(privacy, accountant)
        self._privacy, self._accountant, self._run_token = privacy, accountant, run_token
        self._rounds, self._population = rounds, population
        self._affordable = 0

    def check(self, server_round: int) -> None:
        """Refuse a round whose event would bring the ledger, whatever is in it already, above the limit.

        Guarantee:
            If this returns, ε of the ledger with the round is at most ``max_epsilon``. Nobody was sampled or asked yet.
            A round that stands in the ledger already, see `_is_written`, brings nothing more.
            The ε of a whole run costs as much CPU as many rounds of a small prompt: it is computed once for all rounds
            that are left, and round by round only if those do not fit together.

        Raises:
            BudgetExhausted: If it would exceed it, by our ledger or by the accountant.
        """
        privacy = self._privacy
        if privacy.ledger is not None and privacy.max_epsilon is not None and not self._is_written(server_round):
            made, left = privacy.ledger.read(), max(1, self._rounds - server_round + 1)
            if made.releases() >= self._affordable:
                again = made.last_round(self._run_token) >= server_round
                event = self._event(server_round, again=again)
                later = [self._event(server_round + i) for i in range(1, left)]
                if made.epsilon(privacy.delta, [event, *later]) <= privacy.max_epsilon:
                    self._affordable = made.releases() + left
                elif not (after := made.epsilon(privacy.delta, [event])) <= privacy.max_epsilon:
                    raise BudgetExhausted(
                        f"round {server_round} would bring {privacy.unit}-level ε to {after:.4g} at δ = "
                        f"{privacy.delta:g}; the budget is {privacy.max_epsilon:.4g}: it was not started"
                    )
        if self._accountant is not None and self._accountant.would_exceed(self._flower_event(server_round)):
            raise BudgetExhausted(f"round {server_round} would exceed the accountant's budget: it was not started")

    def write(self, server_round: int) -> None:
        """Write the round, synced to disk, before its noise is drawn; see `Ledger.record`."""
        # Before our own line, which makes any round look like one that is made again.
        beside = None if self._accountant is None else self._flower_event(server_round)
        if self._privacy.ledger is not None and not self._is_written(server_round):
            self._privacy.ledger.record(self._event(server_round, again=self._is_again(server_round)))
        if self._accountant is not None and beside is not None:
            self._accountant.compose(beside)

    def _is_again(self, server_round: int) -> bool:
        """Whether the round, or a later one, stands in the ledger already."""
        ledger = self._privacy.ledger
        return ledger is not None and ledger.read().last_round(self._run_token) >= server_round

    def _is_written(self, server_round: int) -> bool:
        """Whether the round is made again as it was made before a crash, and is paid for.

        Guarantee:
            Cohort, uploads and noise are functions of the seed, the round, the run and what was before it, so the
            result is the same, bit by bit: one release, one event. Randomness of the operating system repeats nothing:
            there a round that is made again is a further release, and a further event.
        """
        ledger = self._privacy.ledger
        if ledger is None or not self._privacy.reproducible:
            return False
        return self._event(server_round) in ledger.read().events

    def _event(self, server_round: int, *, again: bool = False) -> LedgerEvent:
        """A round; of correlated noise what it adds to the rounds before it, or to all if it is made again."""
        rate, multiplier = self._privacy.sampling_rate, self._privacy.ledger_multiplier
        if self._privacy.correlated is not None:
            rate, multiplier, _ = self._privacy.correlated.charge(multiplier, server_round, again=again)
        return LedgerEvent(
            run=self._run_token,
            unit=self._privacy.unit,
            server_round=server_round,
            releases=1,
            sampling_rate=rate,
            noise_multiplier=multiplier,
        )

    def _flower_event(self, server_round: int) -> GaussianPrivacyEvent:
        """The round in Flower's words: counts of clients, rounded up, so that its sampling rate is not below ours."""
        event = self._event(server_round, again=self._is_again(server_round))
        return GaussianPrivacyEvent(
            noise_multiplier=event.noise_multiplier,
            sample_size=min(self._population, math.ceil(event.sampling_rate * self._population)),
            population_size=self._population,
        )
