"""What each filter admits, charges and says; that it holds is shown in tests/guarantees/test_budget_filter.py."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import (
    COARSE_GRID,
    SampledGaussians,
    composed_epsilon,
    epsilon,
    renyi_bound,
    renyi_divergence,
)
from fl_dualpriv.privacy.filters.budget import Budget, FilterChoice
from fl_dualpriv.privacy.filters.choose import check_header, filter_of, spend_budget
from fl_dualpriv.privacy.filters.renyi import RenyiFilter
from fl_dualpriv.privacy.filters.reserve import ReserveFilter
from fl_dualpriv.privacy.filters.worst_terms import WorstTermsFilter
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent, ReservedPlan
from tests.guarantees.filter_checks import BUDGET, NOTHING

RUN = (0.15, 4.211)
"""q and z of a run of 50 steps with ε = 1 at δ = 1e-5."""


def event(releases: int, q: float = 0.1, z: float = 1.0, run: str = "a", server_round: int = 1) -> LedgerEvent:
    return LedgerEvent(
        run=run, unit="record", server_round=server_round, releases=releases, sampling_rate=q, noise_multiplier=z
    )


def plan(releases: int, q: float = 0.1, z: float = 1.0, run: str = "a") -> ReservedPlan:
    return ReservedPlan(run=run, releases=releases, sampling_rate=q, noise_multiplier=z)


def budget(name: str, **numbers: object) -> Budget:
    return replace(BUDGET, filter=FilterChoice(name=name, **numbers))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("q", "z", "order"), [(0.15, 4.211, 3.75), (0.2, 0.8, 2.0), (0.01, 0.6, 12.0), (1.0, 3.0, 5.0)]
)
def test_the_divergence_is_the_integral(q: float, z: float, order: float) -> None:
    """Of (mixture / Gaussian)^α under the Gaussian, by quadrature, in both directions: never below the larger one.

    The series of a fractional order adds up the absolute values of its terms, which alternate: up to 1 % above.
    """

    def ratio(x: float) -> float:
        return math.log1p(q * math.expm1((2 * x - 1) / (2 * z * z)))

    def against(sign: float) -> float:
        # E over the denominator of ratio^(±α); for the reverse direction the denominator is the mixture.
        def integrand(x: float) -> float:
            log_density = norm.logpdf(x, 0, z) + (0.0 if sign > 0 else ratio(x))
            return math.exp(sign * order * ratio(x) + log_density)

        value = quad(integrand, -40 * z, 40 * z + order, limit=2000, points=[0.0, 1.0, order])[0]
        return math.log(value) / (order - 1)

    found = renyi_divergence(q, z, order)
    exact = max(against(1.0), against(-1.0))
    assert exact * (1 - 1e-6) <= found <= exact * (1.01 if order % 1 else 1 + 1e-6)


def test_the_bound_of_an_order_gives_epsilon_back() -> None:
    """ε = ρ + log((α − 1)/α) − (log δ + log α)/(α − 1), by hand: α = 2, δ = 1e-5, ρ = 1 gives 11.1266."""
    by_hand = 1 + math.log(0.5) - math.log(2e-5)
    assert by_hand == pytest.approx(11.1266, abs=1e-4)
    assert renyi_bound(by_hand, 1e-5, 2.0) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="at least 2"):
        renyi_divergence(0.1, 1.0, 1.5)


def test_runs_of_one_that_a_budget_of_eight_buys() -> None:
    """Runs of ε = 1, one after the other: 42 by the PLD of the path (invalid), 37 and 6 by filters that are proved."""
    q, z = RUN
    assert epsilon(q, z, 50, 1e-5) == pytest.approx(1.0, abs=1e-3)
    assert composed_epsilon((SampledGaussians(q, z, 50 * 42),), 1e-5, COARSE_GRID) <= 8
    assert composed_epsilon((SampledGaussians(q, z, 50 * 43),), 1e-5, COARSE_GRID) > 8
    reserve = ReserveFilter(budget("reserve"))
    assert math.floor(8 / reserve.cost(50, q, z)) == 6
    renyi = RenyiFilter(budget("renyi", expected_sampling_rate=q, expected_noise_multiplier=z))
    assert renyi.order == 3.75
    assert renyi.affordable(NOTHING, q, z) // 50 == 37


def test_a_plan_is_reserved_once_and_its_rounds_are_free(tmp_path: Path) -> None:
    own, ledger = budget("reserve"), Ledger(tmp_path / "ledger.jsonl")
    spend_budget(ledger, own, plan(6), event(2))
    after_one = ReserveFilter(own).charges(ledger.read())
    spend_budget(ledger, own, plan(6), event(2, server_round=2))
    spend_budget(ledger, own, plan(6), event(2, server_round=3))
    assert ReserveFilter(own).charges(ledger.read()) == after_one == [epsilon(0.1, 1.0, 6, 1e-6, COARSE_GRID)]
    with pytest.raises(PrivacyError, match="6 of the 6 reserved releases of this run are made"):
        spend_budget(ledger, own, plan(6), event(1, server_round=4))
    with pytest.raises(PrivacyError, match="another plan of this run: 6 releases"):
        spend_budget(ledger, own, plan(8), event(1, server_round=4))


def test_the_most_runs_are_those_among_which_delta_is_divided(tmp_path: Path) -> None:
    own, ledger = budget("reserve", expected_runs=2), Ledger(tmp_path / "ledger.jsonl")
    for run in "ab":
        spend_budget(ledger, own, plan(1, 0.01, 8.0, run), event(1, 0.01, 8.0, run))
    with pytest.raises(PrivacyError, match="0 runs are left"):
        spend_budget(ledger, own, plan(1, 0.01, 8.0, "c"), event(1, 0.01, 8.0, "c"))


def test_a_run_takes_no_more_than_the_owner_gives_to_one(tmp_path: Path) -> None:
    own, ledger = budget("reserve", max_run_epsilon=1.0), Ledger(tmp_path / "ledger.jsonl")
    most = filter_of(own).affordable(NOTHING, 0.1, 3.0)
    assert epsilon(0.1, 3.0, most, 1e-6, COARSE_GRID) <= 1.0 < epsilon(0.1, 3.0, most + 1, 1e-6, COARSE_GRID)
    with pytest.raises(PrivacyError, match=rf"at most ε = 1 a run.*The rest buys {most} releases"):
        spend_budget(ledger, own, plan(most + 1, z=3.0), event(1, z=3.0))
    spend_budget(ledger, own, plan(most, z=3.0), event(1, z=3.0))


def test_advanced_composition_is_the_formula_and_buys_more_of_many_small_runs() -> None:
    """√(2 log(1/δ′) Σ ε²) + ½ Σ ε²: for 100 runs of 0.1 and δ′ = 1e-6 5.756, where the sum is 10."""
    advanced = ReserveFilter(budget("reserve", expected_runs=200, composition="advanced", delta_prime=1e-6))
    by_hand = math.sqrt(2 * math.log(1e6) * 100 * 0.01) + 0.5
    assert by_hand == pytest.approx(5.7566, abs=1e-4)
    assert advanced.total([0.1] * 100) == pytest.approx(by_hand)
    assert ReserveFilter(budget("reserve", expected_runs=200)).total([0.1] * 100) == pytest.approx(10.0)
    assert advanced.run_delta == pytest.approx(9e-6 / 200)
    assert advanced.total([0.0] * 201) == math.inf


def test_worst_terms_charges_quiet_releases_as_loud_ones(tmp_path: Path) -> None:
    own, ledger = budget("worst-terms"), Ledger(tmp_path / "ledger.jsonl")
    chosen = WorstTermsFilter(own)
    assert chosen.most == chosen.affordable(NOTHING, 0.01, 5.0)
    spend_budget(ledger, own, plan(100, 0.01, 5.0), event(chosen.most, 0.01, 5.0))
    with pytest.raises(PrivacyError, match=r"The rest buys no release at q = 0\.01 and z = 5"):
        spend_budget(ledger, own, plan(100, 0.01, 5.0), event(1, 0.01, 5.0, server_round=2))
    with pytest.raises(PrivacyError, match=r"q = 0\.3, at most 0\.2"):
        spend_budget(ledger, own, plan(1, 0.3, 5.0, "b"), event(1, 0.3, 5.0, "b"))


def test_releases_of_another_kind_are_refused_unless_they_are_charged_beforehand() -> None:
    """Three rounds of correlated noise at z ≥ 2 cost what three Gaussian releases do, whenever they come."""
    turn = replace(event(1, q=1.0, z=7.0), kind="correlated")
    with pytest.raises(PrivacyError, match="not among the releases that the owner's file admits"):
        WorstTermsFilter(budget("worst-terms")).check(NOTHING, plan(1), turn)
    with pytest.raises(PrivacyError, match="kind correlated"):
        ReserveFilter(budget("reserve")).check(NOTHING, plan(1, 1.0, 7.0), turn)
    stated = budget("worst-terms", max_correlated_releases=3, min_correlated_noise_multiplier=2.0)
    chosen = WorstTermsFilter(stated)
    assert chosen.most < WorstTermsFilter(budget("worst-terms")).most
    chosen.check(replace(NOTHING, events=(turn, turn)), plan(1), turn)
    with pytest.raises(PrivacyError, match="asks for 1 more"):
        chosen.check(replace(NOTHING, events=(turn, turn, turn)), plan(1), turn)
    with pytest.raises(PrivacyError, match=r"z = 1\.5, at least 2"):
        chosen.check(NOTHING, plan(1), replace(turn, noise_multiplier=1.5))


@pytest.mark.parametrize("name", ["reserve", "renyi", "worst-terms"])
def test_an_old_ledger_is_charged_and_goes_on_or_is_closed(tmp_path: Path, name: str) -> None:
    """Events from before there were filters: a run that fits beside them starts, and a ledger of too many is closed."""
    own = budget(name)
    ledger, full = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "full.jsonl")
    for server_round in (1, 2):
        ledger.record(event(2, run="old", server_round=server_round))
    fresh = filter_of(own).affordable(NOTHING, 0.1, 1.0)
    left = filter_of(own).affordable(ledger.read(), 0.1, 1.0)
    assert 0 < left < fresh
    spend_budget(ledger, own, plan(1, run="new"), event(1, run="new"))
    assert ledger.read().headers == (filter_of(own).header,)
    full.record(event(2000, 0.2, 0.8, run="old"))
    assert filter_of(own).affordable(full.read(), 0.1, 1.0) == 0
    with pytest.raises(PrivacyError, match=r"closed|nothing is left|0 are left"):
        spend_budget(full, own, plan(1, run="new"), event(1, run="new"))
    assert full.read().headers == ()


def test_an_old_run_that_goes_on_is_charged_once(tmp_path: Path) -> None:
    """Its earlier rounds lie within the plan that is reserved for it now."""
    own, ledger = budget("reserve"), Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event(2))
    spend_budget(ledger, own, plan(6), event(2, server_round=2))
    assert ReserveFilter(own).charges(ledger.read()) == [epsilon(0.1, 1.0, 6, 1e-6, COARSE_GRID)]


def test_a_round_is_no_longer_than_the_owner_admits(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match=r"at most 100 \(budget\.max-round-releases\)"):
        spend_budget(Ledger(tmp_path / "ledger.jsonl"), budget("reserve"), plan(101, 0.01, 9.0), event(101, 0.01, 9.0))


def test_what_differs_in_a_header_is_named() -> None:
    made = replace(NOTHING, headers=(ReserveFilter(budget("reserve")).header,))
    check_header(made, ReserveFilter(budget("reserve")).header)
    with pytest.raises(PrivacyError, match="expected-runs was 10 and is now 5") as error:
        check_header(made, ReserveFilter(budget("reserve", expected_runs=5)).header)
    assert "epsilon" not in str(error.value)


def test_an_order_needs_terms_to_expect_and_a_budget_that_one_release_fits() -> None:
    with pytest.raises(PrivacyError, match="expected-noise-multiplier"):
        RenyiFilter(replace(budget("renyi"), min_noise_multiplier=0.0)).header  # noqa: B018
    with pytest.raises(PrivacyError, match="admits no release"):
        RenyiFilter(replace(budget("renyi"), epsilon=0.01)).header  # noqa: B018
