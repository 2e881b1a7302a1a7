"""What must hold of every ε that is stated, checked on the accountant, the plans and the ledger that state it."""

import functools
from pathlib import Path

import dp_accounting
from dp_accounting import pld

from fl_dualpriv.privacy import accounting
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
