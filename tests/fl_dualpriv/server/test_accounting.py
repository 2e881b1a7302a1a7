"""A round that would exceed the server's budget does not start; one that starts is in the books before its noise."""

from dataclasses import replace
from pathlib import Path

import pytest

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import SampledGaussians, composed_epsilon, epsilon
from fl_dualpriv.privacy.correlated import BandedNoise, RoundRobin
from fl_dualpriv.privacy.filters import worst_terms as worst_terms_filter
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.server.accounting import BudgetExhausted, RoundAccountant, ServerPrivacy


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


def accountant(ledger: Ledger, most: float | None, *, rounds: int = 20, run: str = "a") -> RoundAccountant:
    return RoundAccountant(privacy(ledger, most), run, rounds=rounds)


def fitting(most: float) -> int:
    """How many rounds dp-accounting lets through."""
    return next(n for n in range(1, 100) if epsilon(0.1, 1.0, n + 1, 1e-5) > most)


def test_exactly_the_rounds_that_fit_are_started(tmp_path: Path) -> None:
    ledger, allowed = Ledger(tmp_path / "ledger.jsonl"), fitting(2.2)
    own = accountant(ledger, 2.2)
    for server_round in range(1, allowed + 1):
        own.check(server_round)
        own.write(server_round)
    with pytest.raises(BudgetExhausted, match=f"round {allowed + 1} would bring client-level ε to"):
        own.check(allowed + 1)
    assert ledger.read().releases() == allowed
    assert ledger.read().epsilon(1e-5) <= 2.2


def test_rounds_of_earlier_runs_in_the_same_ledger_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    first, second = accountant(ledger, 2.2), accountant(ledger, 2.2, run="b")
    for server_round in range(1, fitting(2.2) + 1):
        first.write(server_round)
    with pytest.raises(BudgetExhausted):
        second.check(1)


def test_another_program_that_writes_to_the_ledger_is_noticed(tmp_path: Path) -> None:
    """The look ahead must not hide what is added behind our back."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    own, other = accountant(ledger, epsilon(0.1, 1.0, 20, 1e-5)), accountant(ledger, None, run="b")
    own.check(1)  # all twenty fit
    for server_round in range(1, 21):
        other.write(server_round)
    with pytest.raises(BudgetExhausted):
        own.check(2)


def test_a_run_that_fits_asks_the_accountant_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, composed = [], worst_terms_filter.composed_epsilon
    monkeypatch.setattr(
        worst_terms_filter, "composed_epsilon", lambda *arguments: asked.append(arguments) or composed(*arguments)
    )
    own = accountant(Ledger(tmp_path / "ledger.jsonl"), epsilon(0.1, 1.0, 20, 1e-5))
    for server_round in range(1, 21):
        own.check(server_round)
        own.write(server_round)
    assert len(asked) == 1


def test_a_ledger_of_other_terms_is_refused(tmp_path: Path) -> None:
    """The filter of a server's ledger charges every round at one run's terms; a run on others has another ledger."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    own = accountant(ledger, 2.2)
    own.check(1)
    own.write(1)
    other = RoundAccountant(privacy(ledger, 2.2, z=2.0), "b", rounds=20)
    with pytest.raises(PrivacyError, match=r"min-noise-multiplier was 1\.0 and is now 2\.0"):
        other.check(1)
    with pytest.raises(PrivacyError, match=r"epsilon was 2\.2 and is now 3\.0"):
        accountant(ledger, 3.0, run="c").check(1)


def test_rounds_on_weaker_terms_close_a_server_ledger(tmp_path: Path) -> None:
    """A ledger older than its filter: what lies within the run's terms is charged at them, anything else closes it."""
    for z, starts in ((1.5, True), (0.9, False)):
        ledger = Ledger(tmp_path / f"{z}.jsonl")
        RoundAccountant(privacy(ledger, None, z=z), "old", rounds=20).write(1)
        own = accountant(ledger, 5.0)
        if starts:
            own.check(1)
        else:
            with pytest.raises(BudgetExhausted, match="ε to inf"):
                own.check(1)


def test_correlated_rounds_are_admitted_by_the_sum_of_their_inverse_squares(tmp_path: Path) -> None:
    """Two rounds in turn cost z each; the second try of a round costs another z: √2 and √3 z⁻¹ in all."""
    noise = BandedNoise(schedule=RoundRobin(rounds=2, separation=1), bands=1)
    most = composed_epsilon((SampledGaussians(1.0, 2.0 / 2**0.5, 1),), 1e-5) + 1e-6
    ledger = Ledger(tmp_path / "ledger.jsonl")
    terms = replace(privacy(ledger, most, z=2.0 / 2**0.5), sampling_rate=1.0, correlated=noise)
    for server_round in (1, 2):
        own = RoundAccountant(terms, "a", rounds=2)
        own.check(server_round)
        own.write(server_round)
    again = composed_epsilon((SampledGaussians(1.0, 2.0 / 3**0.5, 1),), 1e-5)
    with pytest.raises(BudgetExhausted, match=f"to {again:.4g}"):
        RoundAccountant(terms, "a", rounds=2).check(2)
    assert ledger.read().headers == ({"filter": "gaussian-sum", "epsilon": most, "delta": 1e-5},)
