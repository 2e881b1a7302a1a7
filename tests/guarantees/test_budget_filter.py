"""A lifetime budget holds against servers that choose terms after seeing releases: by game, by play and by rule."""

from pathlib import Path

import pytest

from tests.guarantees import filter_checks, filter_mutations


def test_no_adaptive_server_passes_delta() -> None:
    filter_checks.no_adaptive_server_passes_delta()


def test_two_servers_that_alternate_do_not_pass_delta() -> None:
    filter_checks.two_servers_that_alternate_do_not_pass_delta()


def test_rare_disasters_do_not_pass_delta() -> None:
    filter_checks.rare_disasters_do_not_pass_delta()


def test_played_games_stay_within_delta() -> None:
    filter_checks.played_games_stay_within_delta()


def test_a_reserved_plan_is_never_refunded(tmp_path: Path) -> None:
    filter_checks.a_reserved_plan_is_never_refunded(tmp_path)


def test_what_runs_may_show_and_the_composition_stay_within_delta() -> None:
    filter_checks.what_runs_may_show_and_the_composition_stay_within_delta()


def test_all_divergences_are_bounded_at_the_order_of_the_owners_file(tmp_path: Path) -> None:
    filter_checks.all_divergences_are_bounded_at_the_order_of_the_owners_file(tmp_path)


def test_all_releases_fit_at_the_worst_terms(tmp_path: Path) -> None:
    filter_checks.all_releases_fit_at_the_worst_terms(tmp_path)


def test_a_damaged_line_is_charged_at_the_worst(tmp_path: Path) -> None:
    filter_checks.a_damaged_line_is_charged_at_the_worst(tmp_path)


def test_the_numbers_of_a_filter_come_from_the_owners_file(tmp_path: Path) -> None:
    filter_checks.the_numbers_of_a_filter_come_from_the_owners_file(tmp_path)


def test_the_header_is_on_disk_before_the_first_event(tmp_path: Path) -> None:
    filter_checks.the_header_is_on_disk_before_the_first_event(tmp_path)


@pytest.mark.slow  # an ε for each of a hundred states
def test_the_pld_of_the_path_is_no_filter() -> None:
    """On the budget and the terms of docs/deploy.md a server gets δ(8) of at least 1.4e-5 past it: 1e-5 is claimed."""
    against = next(g for g in filter_checks.games() if g.terms == filter_checks.DEPLOYED)
    with pytest.MonkeyPatch.context() as patch:
        filter_mutations.plans_are_admitted_by_the_pld_of_the_path(patch)
        assert filter_checks.attack(against).value() > 1.4e-5
