"""What must hold of every ε that is stated, checked on the accountant, the plans and the ledger that state it."""

import functools
import math
from pathlib import Path

import dp_accounting
from dp_accounting import pld
from scipy.stats import norm

from fl_dualpriv.privacy import accounting
from fl_dualpriv.privacy.accounting import SampledGaussians
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.plan import ClientLevelPlan, RecordLevelPlan


@functools.cache
def by_dp_accounting(rate: float, multiplier: float, releases: int, delta: float) -> float:
    accountant = pld.PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
    return float(accountant.compose(dp_accounting.SelfComposedDpEvent(event, releases)).get_epsilon(delta))


def record_plan(*, trusts_server: bool, personal: bool) -> RecordLevelPlan:
    return RecordLevelPlan(
        clip_norm=1.0,
        noise_multiplier=1.3,
        sampling_rate=0.15,
        releases=20,
        delta=1e-4,
        trusts_server=trusts_server,
        personal=personal,
    )


def epsilon_is_dp_accountings_and_the_reference_table_s() -> None:
    ours = accounting.epsilon(0.01, 1.0, 1000, 1e-5)
    assert abs(ours - by_dp_accounting(0.01, 1.0, 1000, 1e-5)) < 1e-6, f"ε = {ours:.4f}: not what dp-accounting says"
    # Two other accountants: PRV's error interval holds 1.8284, RDP's looser bound is 2.1014.
    assert 1.8282 <= ours <= 1.8293, f"ε = {ours:.4f}: outside of what other accountants allow"


def plans_and_ledgers_state_dp_accountings_epsilon(folder: Path) -> None:
    """One plan of each level, and the ledger of the same releases."""
    stated = by_dp_accounting(0.15, 1.3, 20, 1e-4)
    assert abs(record_plan(trusts_server=False, personal=True).epsilon() - stated) < 1e-6, "a plan states another ε"
    client = ClientLevelPlan(
        clip_norm=0.5, noise_multiplier=0.9, population=100, expected_cohort=10.0, rounds=15, delta=1e-3
    )
    assert abs(client.epsilon() - by_dp_accounting(0.1, 0.9, 15, 1e-3)) < 1e-6, "a plan states another ε"
    ledger = Ledger(folder / "ledger.jsonl")
    for server_round in range(1, 5):
        ledger.record(
            LedgerEvent(
                run="a",
                unit="record",
                server_round=server_round,
                releases=5,
                sampling_rate=0.15,
                noise_multiplier=1.3,
            )
        )
    assert abs(ledger.read().epsilon(1e-4) - stated) < 1e-6, "a ledger states another ε"


def two_views_of_a_trusting_plan_compose_to_what_it_claims() -> None:
    plan = record_plan(trusts_server=True, personal=True)
    joint = accounting.joint_noise_multiplier(plan.local_noise_multiplier, plan.server_noise_multiplier)
    assert abs(joint - plan.noise_multiplier) < 1e-12, f"the two views leak like z = {joint:.3f}, the claim is for 1.3"
    # One view alone needs no more than the claim.
    alone = record_plan(trusts_server=True, personal=False)
    assert alone.server_noise_multiplier == alone.noise_multiplier
    honest = record_plan(trusts_server=False, personal=True)
    assert (honest.local_noise_multiplier, honest.server_noise_multiplier) == (1.3, 0.0)


def exact_delta(rate: float, noise: float, epsilon: float) -> float:
    """Of one Gaussian release on a Poisson sample, both directions, by its closed form."""
    from_loss = noise * noise * math.log1p(math.expm1(epsilon) / rate) + 0.5  # where the removal's loss is epsilon
    upper, lower = norm.sf((from_loss - 1) / noise), norm.sf(from_loss / noise)
    removal = rate * upper + (1 - rate) * lower - math.exp(epsilon) * lower
    inner = (math.exp(-epsilon) - (1 - rate)) / rate
    if inner <= 0:
        return float(removal)
    to_loss = noise * noise * math.log(inner) + 0.5
    under = rate * norm.cdf((to_loss - 1) / noise) + (1 - rate) * norm.cdf(to_loss / noise)
    return float(max(removal, norm.cdf(to_loss / noise) - math.exp(epsilon) * under))


def a_pld_on_any_grid_is_an_upper_bound() -> None:
    for rate, noise, grid in (
        (1e-4, 0.4, 1e-3),
        (0.15, 1.0, 0.05),
        (0.15, 1.0, 1e-4),
        (0.9, 0.3, 0.5),
        (0.01, 3, 1e-3),
    ):
        found = accounting.grid_epsilon((SampledGaussians(rate, noise, 1),), 1e-5, grid)
        # What is stated must hold for the exact curve; 1e-9 of δ is more than its own rounding.
        assert exact_delta(rate, noise, found) <= 1e-5 * (1 + 1e-9), (
            f"q = {rate}, z = {noise}: ε = {found} is too small"
        )
    # With q near 1 a product of T mixtures is at least q^T times the product of the shifted Gaussians.
    rate = 1 - 1e-9
    for releases, noise, grid in ((50, 5.0, 1e-3), (10_000, 100.0, 1e-3), (10_000, 2000.0, 1e-5)):
        found = accounting.grid_epsilon((SampledGaussians(rate, noise, releases),), 1e-5, grid)
        scale = rate**releases
        mu = releases**0.5 / noise
        shifted = found - math.log(scale)
        least = scale * (norm.sf(shifted / mu - mu / 2) - math.exp(shifted) * norm.sf(shifted / mu + mu / 2))
        assert least <= 1e-5 * (1 + 1e-9), f"{releases} releases at z = {noise}: ε = {found} is too small"


def bounds_without_a_grid_are_upper_bounds() -> None:
    """Against a PLD on a finer grid, which is off by less than the slack of these bounds."""
    for rate, noise, releases in ((0.15, 0.05, 3), (0.01, 0.1, 100), (0.5, 1.0, 1), (0.9, 5.0, 30)):
        charges = (SampledGaussians(rate, noise, releases),)
        exact = accounting.grid_epsilon(charges, 1e-5, 4e-3)
        for bound in (accounting.coins_shown_epsilon, accounting.renyi_epsilon):
            assert bound(charges, 1e-5) >= exact * 0.999, f"{bound.__name__} of {charges[0]} is below the truth"
    # One release at rate 1e-5 and δ = 1e-5 in half: the unit is in no sample but with probability 1e-5 > δ/2.
    assert accounting.coins_shown_epsilon((SampledGaussians(1e-5, 1e-3, 1),), 1e-5) > 1e5
