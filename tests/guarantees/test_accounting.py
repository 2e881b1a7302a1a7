"""ε equals dp-accounting's, against closed forms and published values; calibration never overshoots."""

from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy.optimize import brentq
from scipy.stats import norm

from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    epsilon,
    joint_noise_multiplier,
)
from fl_dualpriv.privacy.calibration import calibrate_noise_multiplier
from fl_dualpriv.privacy.plan import ClientLevelPlan
from tests.guarantees import accounting_checks
from tests.guarantees.accounting_checks import record_plan


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact ε of one Gaussian release (Balle and Wang 2018, Theorem 8), by root finding."""

    def excess(eps: float) -> float:
        a = 1 / (2 * noise_multiplier)
        b = eps * noise_multiplier
        return norm.cdf(a - b) - np.exp(eps) * norm.cdf(-a - b) - delta

    return brentq(excess, 0, 100)


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 5.0])
def test_one_release_without_sampling_is_the_closed_form(noise_multiplier: float) -> None:
    exact = gaussian_epsilon(noise_multiplier, 1e-5)
    assert exact <= epsilon(1.0, noise_multiplier, 1, 1e-5) <= exact + 1e-3


def test_many_releases_without_sampling_are_one_with_less_noise() -> None:
    # T Gaussian releases with multiplier z compose to one with z / sqrt(T).
    assert epsilon(1.0, 10.0, 25, 1e-5) == pytest.approx(gaussian_epsilon(2.0, 1e-5), abs=2e-2)


def test_sampled_value_is_dp_accountings_and_the_reference_table_s() -> None:
    accounting_checks.epsilon_is_dp_accountings_and_the_reference_table_s()


def test_the_coarse_grid_only_ever_overstates() -> None:
    for q, z, t in [(0.15, 1.2, 50), (0.01, 1.0, 200), (1.0, 5.0, 10)]:
        fine = epsilon(q, z, t, 1e-5)
        assert fine - 1e-6 <= epsilon(q, z, t, 1e-5, COARSE_GRID) <= fine + 0.05


def test_nothing_released_costs_nothing() -> None:
    assert epsilon(0.1, 1.0, 0, 1e-5) == 0.0


_SLOW_TERMS = [(4.0, 0.15, 50), (8.0, 0.1, 30)]


@pytest.mark.parametrize(
    ("target", "rate", "releases"),
    [(1.0, 0.15, 20), (0.4, 1.0, 3), *(pytest.param(*terms, marks=pytest.mark.slow) for terms in _SLOW_TERMS)],
)
def test_calibration_meets_the_target_and_wastes_little(target: float, rate: float, releases: int) -> None:
    z = calibrate_noise_multiplier(target, 1e-4, rate, releases)
    assert epsilon(rate, z, releases, 1e-4) <= target
    assert epsilon(rate, z * 0.98, releases, 1e-4) > target


def test_an_impossible_target_is_refused() -> None:
    with pytest.raises(ValueError, match="noise multiplier above"):
        calibrate_noise_multiplier(1e-4, 1e-9, 1.0, 100_000)


def test_a_pld_on_any_grid_is_an_upper_bound() -> None:
    accounting_checks.a_pld_on_any_grid_is_an_upper_bound()


def test_bounds_without_a_grid_are_upper_bounds() -> None:
    accounting_checks.bounds_without_a_grid_are_upper_bounds()


def test_two_views_of_one_sum_leak_like_one_with_the_joint_multiplier() -> None:
    assert joint_noise_multiplier(2**0.5, 2**0.5) == pytest.approx(1.0)
    # Exact for q = 1: composing the two views is composing their Gaussians.
    accountant = pld.PLDAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(1.5))
    accountant.compose(dp_accounting.GaussianDpEvent(3.0))
    assert accountant.get_epsilon(1e-5) == pytest.approx(
        gaussian_epsilon(joint_noise_multiplier(1.5, 3.0), 1e-5), abs=1e-2
    )


def test_what_a_trusting_plan_adds_in_both_places_composes_to_what_it_claims() -> None:
    accounting_checks.two_views_of_a_trusting_plan_compose_to_what_it_claims()


def test_plans_and_ledgers_state_dp_accountings_epsilon(tmp_path: Path) -> None:
    accounting_checks.plans_and_ledgers_state_dp_accountings_epsilon(tmp_path)


def test_plans_state_what_the_accountant_says() -> None:
    assert record_plan(trusts_server=False, personal=True).epsilon() == epsilon(0.15, 1.3, 20, 1e-4)
    client = ClientLevelPlan(
        clip_norm=0.5, noise_multiplier=0.9, population=100, expected_cohort=10.0, rounds=15, delta=1e-3
    )
    assert client.sampling_rate == 0.1
    assert client.epsilon() == epsilon(0.1, 0.9, 15, 1e-3)
    assert client.spent(0) == 0.0 < client.spent(7) < client.spent(15)
