"""Our ledger and accountant behind Flower's `PrivacyAccountant` protocol, for Flower's own DP wrappers."""

import time
from pathlib import Path

from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    PrivacySpent,
    SamplingMethod,
)

from fl_dualpriv.privacy.accounting import composed_delta
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent


class LedgerAccountant:
    """Flower's accountant of client-level releases, with privacy loss distributions and a file that survives.

    Guarantee:
        ε and δ are upper bounds of dp-accounting's PLD accountant for add-or-remove-one client, for everything in the
        ledger, whichever run wrote it. `compose` returns after the event is synced to disk.

    Args:
        config: Flower's description. Without amplification every client is charged in every round, which is what
            Flower's wrappers with a fixed cohort size can claim; with Poisson sampling the rate is sample_size /
            population_size of each event.
        path: The ledger.

    Raises:
        ValueError: For sampling without replacement, which this accountant has no bound for.
    """

    def __init__(self, config: PrivacyConfig, path: Path) -> None:
        if config.neighboring_relation != NeighboringRelation.ADD_OR_REMOVE_ONE:
            raise ValueError(
                f"neighboring_relation = {config.neighboring_relation.value!r} with sampling_method = "
                f"{config.sampling_method.value!r}: this accountant proves add-or-remove-one; sample by Poisson, or "
                "account without amplification"
            )
        self._config, self._ledger = config, Ledger(path)
        self._run = f"flower-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"

    @property
    def config(self) -> PrivacyConfig:
        """The description given at the start."""
        return self._config

    @property
    def num_releases(self) -> int:
        """Releases in the ledger."""
        return self._ledger.read().releases()

    def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
        """Write ``count`` identical releases, before they are made."""
        with self._ledger.exclusive():
            self._ledger.record(self._event(event, count, self._ledger.read().last_round(self._run) + 1))

    def get_epsilon(self, delta: float) -> float:
        """ε at δ of everything in the ledger."""
        return self._ledger.read().epsilon(delta)

    def get_delta(self, epsilon: float) -> float:
        """δ at ε of everything in the ledger."""
        return composed_delta(self._ledger.read().charges(), epsilon)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """ε, δ and the count, in Flower's class."""
        delta = self._config.target_delta if delta is None else delta
        return PrivacySpent(
            epsilon=self.get_epsilon(delta), delta=delta, num_releases=self.num_releases, accounting_method="pld"
        )

    def would_exceed(self, event: GaussianPrivacyEvent, max_epsilon: float | None = None, count: int = 1) -> bool:
        """Whether ``count`` such releases more would bring ε at the target δ above the limit.

        Raises:
            ValueError: If there is no limit, neither here nor in the configuration.
        """
        limit = self._config.max_epsilon if max_epsilon is None else max_epsilon
        if limit is None:
            raise ValueError("max_epsilon is None here and in the PrivacyConfig: there is nothing to exceed")
        further = [self._event(event, count, 1)]
        return not self._ledger.read().epsilon(self._config.target_delta, further) <= limit

    def state_dict(self) -> dict[str, object]:
        """Where the ledger stands; the releases themselves are in its file."""
        return {"ledger": str(self._ledger.path), "num-releases": self.num_releases}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Check that the ledger has not lost what it held when the state was taken.

        Raises:
            ValueError: If it holds fewer releases: then ε would be too small.
        """
        then = state.get("num-releases")
        if not isinstance(then, int) or self.num_releases < then:
            raise ValueError(f"the ledger holds {self.num_releases} releases, the state says {then}: it was replaced")

    def _event(self, event: GaussianPrivacyEvent, count: int, number: int) -> LedgerEvent:
        if event.population_size != self._config.population_size:
            raise ValueError(
                f"an event of a population of {event.population_size}; this accountant is for "
                f"{self._config.population_size}"
            )
        poisson = self._config.sampling_method == SamplingMethod.POISSON
        return LedgerEvent(
            run=self._run,
            unit="client",
            server_round=number,
            releases=count,
            sampling_rate=event.sample_size / event.population_size if poisson else 1.0,
            noise_multiplier=event.noise_multiplier,
        )
