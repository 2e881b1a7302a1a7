"""The selection of a start: what one record can change, that its event comes first, and what it costs together."""

import inspect
from pathlib import Path

import pytest

from tests.guarantees import run_checks, selection_checks
from tests.guarantees.mutation import Check
from tests.guarantees.run_checks import Federation
from tests.guarantees.selection_mutations import SELECTION_MUTATIONS


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def federation(tmp_path: Path, image_folder: Path, tiny_clip_dir: Path) -> Federation:
    return Federation(folder=tmp_path, images=image_folder, clip=tiny_clip_dir)


def test_no_vote_exceeds_the_sensitivity() -> None:
    selection_checks.no_vote_exceeds_the_sensitivity()


def test_one_record_moves_the_votes_by_at_most_the_sensitivity() -> None:
    selection_checks.one_record_moves_the_votes_by_at_most_the_sensitivity()


def test_the_noise_of_votes_has_the_stated_scale() -> None:
    selection_checks.the_noise_of_votes_has_the_stated_scale()


def test_an_unreadable_record_is_a_zero_row() -> None:
    selection_checks.an_unreadable_record_is_a_zero_row()


def test_a_row_of_votes_depends_on_its_record_only() -> None:
    selection_checks.a_row_of_votes_depends_on_its_record_only()


def test_the_choice_has_the_law_of_the_exponential_mechanism() -> None:
    selection_checks.the_choice_has_the_law_of_the_exponential_mechanism()


def test_one_record_changes_a_choice_by_at_most_e_to_the_epsilon() -> None:
    selection_checks.one_record_changes_a_choice_by_at_most_e_to_the_epsilon()


def test_the_selection_is_composed_with_the_steps(tmp_path: Path) -> None:
    selection_checks.the_selection_is_composed_with_the_steps(tmp_path)


def test_a_given_multiplier_is_composed_with_the_selection() -> None:
    selection_checks.a_given_multiplier_is_composed_with_the_selection()


def test_a_reserved_plan_charges_the_selection(tmp_path: Path) -> None:
    selection_checks.a_reserved_plan_charges_the_selection(tmp_path)


def test_a_selection_is_in_the_ledger_before_its_draw(federation: Federation) -> None:
    selection_checks.a_selection_is_in_the_ledger_before_its_draw(federation)


def test_a_selection_is_made_once(federation: Federation) -> None:
    selection_checks.a_selection_is_made_once(federation)


def test_a_selection_that_a_crash_ended_is_the_same_release_or_none(federation: Federation) -> None:
    selection_checks.a_selection_that_a_crash_ended_is_the_same_release_or_none(federation)


def test_weaker_selections_are_refused(federation: Federation) -> None:
    selection_checks.weaker_selections_are_refused(federation)


def test_a_start_is_selected_before_round_1(federation: Federation) -> None:
    selection_checks.a_start_is_selected_before_round_1(federation)


def test_an_owner_s_budget_is_charged_for_the_selection(federation: Federation) -> None:
    selection_checks.an_owner_s_budget_is_charged_for_the_selection(federation)


def test_each_planted_bug_has_a_check_of_this_file() -> None:
    named = {check.__name__ for mutation in SELECTION_MUTATIONS for check in mutation.caught_by}
    checks: dict[str, Check] = dict(inspect.getmembers(selection_checks, inspect.isfunction))
    assert named <= checks.keys()
    assert all(f"test_{name}" in globals() for name in named)
