"""A client's round through the app: its ledger comes first, and what owner or plan do not allow is refused."""

from pathlib import Path

import pytest

from tests.guarantees import run_checks
from tests.guarantees.run_checks import Federation


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_checks.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def federation(tmp_path: Path, image_folder: Path, tiny_clip_dir: Path) -> Federation:
    return Federation(folder=tmp_path, images=image_folder, clip=tiny_clip_dir)


def test_a_client_writes_its_ledger_before_its_noise(federation: Federation) -> None:
    run_checks.a_client_writes_its_ledger_before_its_noise(federation)


def test_the_ledger_covers_every_release(federation: Federation) -> None:
    run_checks.the_ledger_covers_every_release(federation)


def test_weaker_terms_are_refused(federation: Federation) -> None:
    run_checks.weaker_terms_are_refused(federation)


def test_floats_are_refused_from_an_integer_run(federation: Federation) -> None:
    run_checks.floats_are_refused_from_an_integer_run(federation)


def test_floats_are_refused_where_the_owner_demands_integers(federation: Federation) -> None:
    run_checks.floats_are_refused_where_the_owner_demands_integers(federation)


def test_private_scores_stay(federation: Federation) -> None:
    run_checks.private_scores_stay(federation)


def test_a_round_is_done_once(federation: Federation) -> None:
    run_checks.a_round_is_done_once(federation)


def test_no_run_starts_on_what_another_spent(federation: Federation) -> None:
    run_checks.no_run_starts_on_what_another_spent(federation)


def test_no_round_exceeds_the_owners_budget(federation: Federation) -> None:
    run_checks.no_round_exceeds_the_owners_budget(federation)


def test_randomness_of_the_kernel_does_not_repeat(federation: Federation) -> None:
    run_checks.randomness_of_the_kernel_does_not_repeat(federation)


def test_seeded_noise_is_marked(federation: Federation) -> None:
    run_checks.seeded_noise_is_marked(federation)
