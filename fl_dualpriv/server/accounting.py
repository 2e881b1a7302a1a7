"""The server's accountant: it checks each noised round against the budget, and writes it before the noise is drawn.

The terms of all rounds of a run are the same and fixed before it starts. Only the number of rounds is open, because a
round that a crash ended is made again. The server's filter therefore charges every round at the run's own terms
(`WorstTermsFilter`), and rounds of correlated noise by the sum of their inverse squares (`GaussianSumFilter`).
"""

import functools
from dataclasses import dataclass
from typing import Literal

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import FINE_GRID
from fl_dualpriv.privacy.adaptive import AdaptiveClip
from fl_dualpriv.privacy.clipping import Arithmetic
from fl_dualpriv.privacy.correlated import CorrelatedNoise
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import check_header
from fl_dualpriv.privacy.filters.worst_terms import GaussianSumFilter, WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent


class BudgetExhausted(PrivacyError):
    """One more round would exceed the budget; no part of it has started."""


@dataclass(frozen=True, kw_only=True)
class ServerPrivacy:
    """Noise that the server adds to a round, and its accounting.

    Attributes:
        unit: Protected unit. ``client``: uploads are updates, clipped here to ``bound``, on a Poisson cohort;
            ``record``: uploads are sums of clipped per-record terms, each of norm at most ``bound``, from every client
            (``trusts-server``); ``nominal``: the DP-FPL paper's formulas, whose bound is only claimed.
        bound: L2 norm that one unit can add to the sum of uploads.
        noise_multiplier: Noise std / sensitivity.
        sampling_rate: Sampling rate of the unit: cohort rate for clients, batch rate for records (for the ledger); 1
            if a fixed schedule determines the cohorts.
        ledger_multiplier: Effective noise multiplier of all releases of the round about one unit (for the ledger).
        ledger: Ledger in which each round is written before it happens; None for the nominal procedure.
        max_epsilon: Limit on ε: a round that would bring the ledger above it does not start. None if there is no
            ledger and no limit.
        delta: δ at which ``max_epsilon`` is stated.
        reproducible: True if cohorts and noise come from a seed, so that a repeated round is the same release.
        arithmetic: Arithmetic of the sum over clients and its noise. With ``integer`` and ``record`` uploads are whole
            numbers, minus the clipped sums in units of ``bound / GRID_STEPS``.
        adaptive: Adaptive clipping: the clip norm of clients begins at ``bound`` and follows a quantile.
            ``noise_multiplier`` is then that of only the sum, ``ledger_multiplier`` that of the sum and the noised
            share together.
        correlated: Correlated noise of clients' sums over the whole run, on its own schedule; both multipliers are then
            those of the whole run.
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
                "correlated noise only in floats"
            )

    @property
    def cohort_rate(self) -> float:
        """Share of the clients in a round: sampled at random, from the schedule (average over rounds), or 1."""
        if self.unit != "client":
            return 1.0
        return 1 / self.correlated.schedule.separation if self.correlated else self.sampling_rate


class RoundAccountant:
    """Check rounds against the budget and write them into the ledger.

    Args:
        privacy: The release of a round, and the ledger.
        run_token: Token of the run in the ledger.
        rounds: Number of rounds of the run.
    """

    def __init__(self, privacy: ServerPrivacy, run_token: str, *, rounds: int) -> None:
        self._privacy, self._run_token, self._rounds = privacy, run_token, rounds
        self._affordable = 0

    def check(self, server_round: int) -> None:
        """Refuse a round that the filter of the server's ledger does not admit.

        Guarantee:
            If this returns, the ledger with the round is (``max_epsilon``, δ)-DP for one unit, for any number of rounds
            that were repeated after crashes. No client was sampled or asked yet. A round that is already in the ledger,
            see `_is_written`, adds nothing.
            Computing the ε of a whole run takes as much CPU time as many rounds of a small prompt. It is computed once
            for all rounds that are left, and round by round only if those do not fit together.

        Raises:
            BudgetExhausted: If the round would exceed the limit.
            PrivacyError: If the ledger was started for other terms or another limit.
        """
        privacy, limit = self._privacy, self._privacy.max_epsilon
        if privacy.ledger is None or limit is None or self._is_written(server_round):
            return
        made, left = privacy.ledger.read(), max(1, self._rounds - server_round + 1)
        check_header(made, self._filter.header)
        if made.releases() < self._affordable:
            return
        event = self._event(server_round, again=made.last_round(self._run_token) >= server_round)
        later = [self._event(server_round + i) for i in range(1, left)]
        if self._filter.epsilon_with(made, [event, *later]) <= limit:
            self._affordable = made.releases() + left
        elif not (after := self._filter.epsilon_with(made, [event])) <= limit:
            raise BudgetExhausted(
                f"round {server_round} would bring {privacy.unit}-level ε to {after:.4g} at δ = {privacy.delta:g}; the "
                f"budget is {limit:.4g}: it was not started"
            )

    def write(self, server_round: int) -> None:
        """Write the round, synced to disk, before its noise is drawn; see `Ledger.record`. The header comes first."""
        privacy = self._privacy
        if privacy.ledger is None or self._is_written(server_round):
            return
        if privacy.max_epsilon is not None and not privacy.ledger.read().headers:
            privacy.ledger.begin(self._filter.header)
        privacy.ledger.record(self._event(server_round, again=self._is_again(server_round)))

    @functools.cached_property
    def _filter(self) -> WorstTermsFilter | GaussianSumFilter:
        """Filter of a ledger with a limit: a function of only the run's plan."""
        privacy = self._privacy
        assert privacy.max_epsilon is not None
        budget = Budget(
            epsilon=privacy.max_epsilon,
            delta=privacy.delta,
            max_sampling_rate=privacy.sampling_rate,
            min_noise_multiplier=privacy.ledger_multiplier,
            max_clip_norm=privacy.bound,
            trusts_server=True,
            scores=False,
            seeded_noise=privacy.reproducible,
            filter=FilterChoice(name="worst-terms", max_round_releases=1),
        )
        if privacy.correlated is None:
            return WorstTermsFilter(budget, FINE_GRID)
        return GaussianSumFilter(budget, worst=privacy.correlated.dearest(privacy.ledger_multiplier))

    def _is_again(self, server_round: int) -> bool:
        """Return True if the round, or a later one, already stands in the ledger."""
        ledger = self._privacy.ledger
        return ledger is not None and ledger.read().last_round(self._run_token) >= server_round

    def _is_written(self, server_round: int) -> bool:
        """Return True if the round repeats a round that a crash ended, bit by bit, and is already paid for.

        Guarantee:
            Cohort, uploads and noise are functions of the seed, the round, the run and the rounds before it, so the
            result is the same, bit by bit: one release, one event. Randomness of the operating system repeats nothing:
            there a repeated round is a further release, and a further event.
        """
        ledger = self._privacy.ledger
        if ledger is None or not self._privacy.reproducible:
            return False
        return self._event(server_round) in ledger.read().events

    def _event(self, server_round: int, *, again: bool = False) -> LedgerEvent:
        """Return the event of a round.

        With correlated noise its multiplier charges what the round adds to the rounds before it, or to all rounds if it
        is repeated.
        """
        rate, multiplier = self._privacy.sampling_rate, self._privacy.ledger_multiplier
        correlated = self._privacy.correlated
        if correlated is not None:
            rate, multiplier, _ = correlated.charge(multiplier, server_round, again=again)
        return LedgerEvent(
            run=self._run_token,
            unit=self._privacy.unit,
            server_round=server_round,
            releases=1,
            sampling_rate=rate,
            noise_multiplier=multiplier,
            kind="gaussian" if correlated is None else "correlated",
        )
