"""A round at the server: its sensitivity, its noise, its cohort, its divisor and its books."""

from pathlib import Path

from tests.guarantees import server_checks


def test_one_client_moves_a_round_by_at_most_its_sensitivity() -> None:
    server_checks.one_client_moves_a_round_by_at_most_its_sensitivity()


def test_a_failed_client_is_zero_and_the_divisor_is_public() -> None:
    server_checks.a_failed_client_is_zero_and_the_divisor_is_public()


def test_a_reply_counts_once() -> None:
    server_checks.a_reply_counts_once()


def test_cohorts_are_independent_coins() -> None:
    server_checks.cohorts_are_independent_coins()


def test_server_noise_has_std_z_times_s() -> None:
    server_checks.server_noise_has_std_z_times_s()


def test_server_noise_is_fresh_each_round() -> None:
    server_checks.server_noise_is_fresh_each_round()


def test_an_integer_round_is_whole() -> None:
    server_checks.an_integer_round_is_whole()


def test_a_round_is_in_the_ledger_before_its_noise(tmp_path: Path) -> None:
    server_checks.a_round_is_in_the_ledger_before_its_noise(tmp_path)


def test_no_round_starts_above_the_servers_budget(tmp_path: Path) -> None:
    server_checks.no_round_starts_above_the_servers_budget(tmp_path)
