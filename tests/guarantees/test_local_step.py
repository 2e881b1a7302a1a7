"""A client's local step: its sensitivity, its noise, its sampling and its divisor, through the code of a round."""

from tests.guarantees import step_checks


def test_one_record_moves_a_release_by_at_most_c() -> None:
    step_checks.one_record_moves_a_release_by_at_most_c()


def test_one_record_moves_a_feature_release_by_at_most_c() -> None:
    step_checks.one_record_moves_a_feature_release_by_at_most_c()


def test_a_bad_record_is_a_zero() -> None:
    step_checks.a_bad_record_is_a_zero()


def test_noise_has_std_z_times_c() -> None:
    step_checks.noise_has_std_z_times_c()


def test_feature_noise_has_std_z_times_c() -> None:
    step_checks.feature_noise_has_std_z_times_c()


def test_integer_noise_has_std_z_times_c() -> None:
    step_checks.integer_noise_has_std_z_times_c()


def test_an_empty_batch_has_the_same_noise() -> None:
    step_checks.an_empty_batch_has_the_same_noise()


def test_a_trusting_client_has_sqrt_2_times_the_noise() -> None:
    step_checks.a_trusting_client_has_sqrt_2_times_the_noise()


def test_noise_is_fresh_for_each_client_and_round() -> None:
    step_checks.noise_is_fresh_for_each_client_and_round()


def test_an_integer_release_is_whole() -> None:
    step_checks.an_integer_release_is_whole()


def test_batches_are_independent_coins() -> None:
    step_checks.batches_are_independent_coins()


def test_the_divisor_is_the_public_expected_batch() -> None:
    step_checks.the_divisor_is_the_public_expected_batch()
