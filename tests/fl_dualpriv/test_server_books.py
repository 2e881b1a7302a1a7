"""A round that would exceed the server's budget does not start; one that starts is in the books before its noise."""

from dataclasses import replace
from pathlib import Path

import pytest
from flwr.supercore.privacy_accounting import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    SamplingMethod,
)
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy import ledger as ledger_module
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.matrix_mechanism import BandedNoise
from fl_dualpriv.privacy.schedule import RoundRobin
from fl_dualpriv.server_books import BudgetExhausted, ServerBooks, ServerPrivacy


def privacy(ledger: Ledger | None, most: float | None, z: float = 1.0) -> ServerPrivacy:
    return ServerPrivacy(
        unit="client",
        bound=1.0,
        noise_multiplier=z,
        sampling_rate=0.1,
        ledger_multiplier=z,
        ledger=ledger,
        max_epsilon=most,
        delta=1e-5,
    )


def books(ledger: Ledger, most: float | None, *, rounds: int = 20, run: str = "a") -> ServerBooks:
    return ServerBooks(privacy(ledger, most), None, run, rounds=rounds, population=100)


def fitting(most: float) -> int:
    """How many rounds dp-accounting lets through."""
    return next(n for n in range(1, 100) if epsilon(0.1, 1.0, n + 1, 1e-5) > most)


def test_exactly_the_rounds_that_fit_are_started(tmp_path: Path) -> None:
    ledger, allowed = Ledger(tmp_path / "ledger.jsonl"), fitting(2.2)
    own = books(ledger, 2.2)
    for server_round in range(1, allowed + 1):
        own.check(server_round)
        own.write(server_round)
    with pytest.raises(BudgetExhausted, match=f"round {allowed + 1} would bring client-level ε to"):
        own.check(allowed + 1)
    assert ledger.read().releases() == allowed
    assert ledger.read().epsilon(1e-5) <= 2.2


def test_rounds_of_earlier_runs_in_the_same_ledger_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = books(ledger, 2.2), books(ledger, 2.2, run="b")
    for server_round in range(1, fitting(2.2) + 1):
        first.write(server_round)
    with pytest.raises(BudgetExhausted):
        second.check(1)


def test_another_program_that_writes_to_the_ledger_is_noticed(tmp_path: Path) -> None:
    """The look ahead must not hide what is added behind our back."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    own, other = books(ledger, epsilon(0.1, 1.0, 20, 1e-5)), books(ledger, None, run="b")
    own.check(1)  # all twenty fit
    for server_round in range(1, 21):
        other.write(server_round)
    with pytest.raises(BudgetExhausted):
        own.check(2)


def test_a_run_that_fits_asks_the_accountant_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, composed = [], ledger_module.composed_epsilon
    monkeypatch.setattr(
        ledger_module, "composed_epsilon", lambda *arguments: asked.append(arguments) or composed(*arguments)
    )
    own = books(Ledger(tmp_path / "ledger.jsonl"), epsilon(0.1, 1.0, 20, 1e-5))
    for server_round in range(1, 21):
        own.check(server_round)
        own.write(server_round)
    assert len(asked) == 1


def flower_config(most: float) -> PrivacyConfig:
    return PrivacyConfig(
        target_delta=1e-5,
        population_size=100,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.POISSON,
        max_epsilon=most,
    )


def test_flowers_own_accountant_keeps_books_beside_ours(tmp_path: Path) -> None:
    accountant = RdpAccountant(flower_config(3.0))
    own = ServerBooks(privacy(Ledger(tmp_path / "l.jsonl"), None), accountant, "a", rounds=20, population=100)
    event = GaussianPrivacyEvent(noise_multiplier=1.0, sample_size=10, population_size=100)  # q = 10 / 100
    while not accountant.would_exceed(event):
        own.check(accountant.num_releases + 1)
        own.write(accountant.num_releases + 1)
    assert accountant.num_releases >= 1
    with pytest.raises(BudgetExhausted, match="accountant's budget"):
        own.check(accountant.num_releases + 1)


def test_flowers_accountant_is_told_that_a_round_of_correlated_noise_is_made_again(tmp_path: Path) -> None:
    """Where clients come once round 2 adds nothing to what round 1 cost; a second try of it costs a round."""
    noise = BandedNoise(schedule=RoundRobin(rounds=2, separation=2), bands=1)
    terms = replace(privacy(Ledger(tmp_path / "l.jsonl"), None), sampling_rate=1.0, correlated=noise)
    told: list[float] = []

    class Told(RdpAccountant):
        def compose(self, event: GaussianPrivacyEvent, count: int = 1) -> None:
            told.append(event.noise_multiplier)
            super().compose(event, count)

    own = ServerBooks(terms, Told(flower_config(100.0)), "a", rounds=2, population=100)
    for server_round in (1, 2, 2):
        own.write(server_round)
    ours = [event.noise_multiplier for event in Ledger(tmp_path / "l.jsonl").read().events]
    assert told == ours
    assert told[1] > 1e5
    assert told[2] == pytest.approx(1.0)  # z: whoever comes in round 2 is in one further row, with weight 1


def test_an_accountant_of_clients_in_a_run_of_records_is_refused(tmp_path: Path) -> None:
    record = ServerPrivacy(
        unit="record", bound=1.0, noise_multiplier=1.0, sampling_rate=0.1, ledger_multiplier=1.0, ledger=None
    )
    with pytest.raises(PrivacyError, match="leave it out"):
        ServerBooks(record, RdpAccountant(flower_config(1.0)), "a", rounds=1, population=100)
