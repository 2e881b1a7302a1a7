"""Adaptive clipping and correlated noise at the server, on the strategy that runs them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_dualpriv.privacy.accounting import gathered
from fl_dualpriv.privacy.filters import worst_terms as worst_terms_filter
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.server.accounting import RoundAccountant
from tests.guarantees import central_checks
from tests.guarantees.central_checks import (
    BIT_NOISE,
    CLIENTS,
    MULTIPLIER,
    ROUNDS,
    adaptive_privacy,
    answer_those_asked,
    correlated_privacy,
    correlations,
    make,
    one_round,
)


def test_a_client_moves_sum_and_count_by_no_more_than_planned() -> None:
    central_checks.a_client_moves_sum_and_count_by_no_more_than_planned()


def test_the_count_of_small_updates_has_its_noise() -> None:
    central_checks.the_count_of_small_updates_has_its_noise()


def test_noise_follows_the_clip_norm() -> None:
    central_checks.noise_follows_the_clip_norm()


def test_the_clip_norm_reaches_the_quantile_from_both_sides() -> None:
    central_checks.the_clip_norm_reaches_the_quantile_from_both_sides()


def test_a_whole_run_moves_by_no_more_than_planned() -> None:
    central_checks.a_whole_run_moves_by_no_more_than_planned()


def test_noise_of_a_run_has_the_covariance_of_the_inverse_factor() -> None:
    central_checks.noise_of_a_run_has_the_covariance_of_the_inverse_factor()


def test_clients_are_asked_in_their_turns_alone() -> None:
    central_checks.clients_are_asked_in_their_turns_alone()


def test_a_run_is_in_the_ledger_before_its_noise(tmp_path: Path) -> None:
    central_checks.a_run_is_in_the_ledger_before_its_noise(tmp_path)


def test_a_round_of_correlated_noise_is_made_once() -> None:
    central_checks.a_round_of_correlated_noise_is_made_once()


def test_a_strategys_code_does_not_see_the_noise() -> None:
    central_checks.a_strategys_code_does_not_see_the_noise()


def test_failed_and_broken_clients_add_neither_update_nor_count() -> None:
    """Two of four fail, or send nan: the others' move, and the clip norm, are the same to the last bit."""
    uploads = {p: torch.full((2, 2), 0.1 + p) for p in range(CLIENTS)}
    without = {p: uploads[p] for p in (0, 3)}
    broken = uploads | {1: torch.full((2, 2), torch.nan), 2: torch.zeros(2, 2)}
    found = []
    for sent in (without, broken):
        strategy = make(adaptive_privacy())
        found.append((one_round(strategy, sent), strategy.bound()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_integers_have_the_same_clip_norm_to_their_grid() -> None:
    uploads = {p: torch.full((2, 2), 0.1 + p) for p in range(CLIENTS)}
    bounds = []
    for arithmetic in ("float", "integer"):
        strategy = make(replace(adaptive_privacy(), arithmetic=arithmetic))
        for server_round in (1, 2, 3):
            one_round(strategy, uploads, server_round)
        bounds.append(strategy.bound())
    # One stream gives both their noise, rounded to 2**-20 of half a client in one of them.
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-5)
    assert bounds[0] != bounds[1]


def test_the_ledger_is_charged_for_sum_and_count_together(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    accountant = RoundAccountant(replace(adaptive_privacy(), ledger=ledger), "run", rounds=3)
    accountant.write(1)
    assert [event.noise_multiplier for event in ledger.read().events] == [MULTIPLIER]
    assert adaptive_privacy().noise_multiplier > MULTIPLIER < 2 * BIT_NOISE


def test_every_check_of_a_run_is_on_the_plans_own_charges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ε of what is written and what is left is the plan's to the last digit: a run fits its own budget, to its end."""
    checked: list[object] = []
    monkeypatch.setattr(
        worst_terms_filter, "composed_epsilon", lambda charges, delta, grid: checked.append(charges) or 1.0
    )
    for correlated in correlations():
        plan = gathered(correlated.charges(MULTIPLIER, ROUNDS))
        ledger = Ledger(tmp_path / f"{type(correlated).__name__}.jsonl")
        privacy = replace(correlated_privacy(correlated, ledger), max_epsilon=1.0)
        for server_round in range(1, ROUNDS + 1):
            # New books each round: they remember what they have found affordable.
            accountant = RoundAccountant(privacy, "run", rounds=ROUNDS)
            accountant.check(server_round)
            assert checked.pop() == plan
            accountant.write(server_round)
        # A crash, and a round that is made again with new noise: another release beside all of them.
        RoundAccountant(privacy, "run", rounds=ROUNDS).write(ROUNDS)
        again = correlated.charge(MULTIPLIER, ROUNDS, again=True)
        assert ledger.read().charges() == gathered([*correlated.charges(MULTIPLIER, ROUNDS), again])


def test_memory_of_noise_is_all_in_the_state() -> None:
    """A second strategy with the first one's state goes on as the first would."""
    zeros = dict.fromkeys(range(CLIENTS), torch.zeros(2, 2))
    for correlated in correlations():
        first = make(correlated_privacy(correlated), rounds=ROUNDS)
        for server_round in (1, 2, 3):
            answer_those_asked(first, zeros, server_round)
        second = make(correlated_privacy(correlated), rounds=ROUNDS)
        second.state, second.rounds_done = {k: v.clone() for k, v in first.state.items()}, 3
        for server_round in range(4, ROUNDS + 1):
            assert torch.equal(
                answer_those_asked(first, zeros, server_round), answer_those_asked(second, zeros, server_round)
            )


def test_what_has_no_proof_is_refused() -> None:
    correlated = correlations()[0]
    for changes in (
        {"adaptive": adaptive_privacy().adaptive, "correlated": correlated},
        {"correlated": correlated, "arithmetic": "integer"},
        {"correlated": correlated, "unit": "record"},
    ):
        with pytest.raises(ValueError, match="are proved for client level"):
            replace(correlated_privacy(correlated), **changes)
