"""What an owner's budget refuses."""

from dataclasses import replace
from typing import Any

import pytest

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.budget import Budget
from fl_dualpriv.privacy.ledger import LedgerContent, LedgerEvent
from fl_dualpriv.privacy.plan import RecordLevelPlan

BUDGET = Budget(
    epsilon=2.0,
    delta=1e-5,
    max_sampling_rate=0.1,
    min_noise_multiplier=1.0,
    max_clip_norm=1.0,
    trusts_server=False,
    scores=False,
    seeded_noise=False,
)
PLAN = RecordLevelPlan(
    clip_norm=1.0, noise_multiplier=1.0, sampling_rate=0.1, releases=10, delta=1e-5, trusts_server=False, personal=True
)
NOTHING = LedgerContent(events=(), damaged=0)


def event(releases: int, q: float = 0.1, z: float = 1.0, run: str = "a") -> LedgerEvent:
    return LedgerEvent(run=run, unit="record", server_round=1, releases=releases, sampling_rate=q, noise_multiplier=z)


def test_a_plan_on_the_owners_terms_passes() -> None:
    BUDGET.check_plan(PLAN, reproducible=False)
    BUDGET.check_plan(replace(PLAN, noise_multiplier=5.0, clip_norm=0.1, sampling_rate=0.01), reproducible=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling_rate": 0.11}, "sampling rate 0.11, at most 0.1"),
        ({"noise_multiplier": 0.99}, "noise multiplier 0.99, at least 1"),
        ({"noise_multiplier": float("nan")}, "noise multiplier nan"),
        ({"clip_norm": 2.0}, "clip norm 2, at most 1"),
        ({"trusts_server": True}, "without noise"),
    ],
)
def test_a_plan_on_other_terms_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        BUDGET.check_plan(replace(PLAN, **changes), reproducible=False)


def test_noise_that_others_can_repeat_is_refused_unless_allowed() -> None:
    with pytest.raises(PrivacyError, match="seed"):
        BUDGET.check_plan(PLAN, reproducible=True)
    replace(BUDGET, seeded_noise=True).check_plan(PLAN, reproducible=True)
    replace(BUDGET, trusts_server=True).check_plan(replace(PLAN, trusts_server=True), reproducible=False)


def test_floats_are_refused_where_the_owner_demands_integers() -> None:
    strict = replace(BUDGET, integer_arithmetic=True)
    with pytest.raises(PrivacyError, match=r'privacy.arithmetic = "float", only "integer"'):
        strict.check_plan(PLAN, reproducible=False)
    for budget in (strict, BUDGET):
        budget.check_plan(replace(PLAN, arithmetic="integer"), reproducible=False)


def test_a_run_without_record_level_privacy_is_refused() -> None:
    with pytest.raises(PrivacyError, match="without record-level"):
        BUDGET.check_plan(None, reproducible=False)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(PrivacyError, match=r"sampling rate.*noise multiplier.*clip norm"):
        BUDGET.check_plan(replace(PLAN, sampling_rate=1.0, noise_multiplier=0.1, clip_norm=9.0), reproducible=False)


def test_the_last_release_within_the_budget_and_the_first_beyond() -> None:
    """The count at which dp-accounting's ε passes 2.0, found by asking it."""
    most = next(n for n in range(1, 200) if epsilon(0.1, 1.0, n + 1, 1e-5) > 2.0)
    BUDGET.check_events(NOTHING, [event(most)])
    BUDGET.check_events(LedgerContent(events=(event(most - 1),), damaged=0), [event(1)])
    for made in (LedgerContent(events=(event(most),), damaged=0), LedgerContent(events=(event(most - 1),), damaged=1)):
        with pytest.raises(PrivacyError, match="budget of this node's data is ε = 2 at δ = 1e-05"):
            BUDGET.check_events(made, [event(1)])


def test_runs_of_other_servers_and_other_terms_count_together() -> None:
    other = event(300, q=0.02, z=1.5, run="elsewhere")
    BUDGET.check_events(NOTHING, [other])  # ε = 1.06
    BUDGET.check_events(NOTHING, [event(2)])  # 1.92
    with pytest.raises(PrivacyError, match=r"would be 2\.104"):
        BUDGET.check_events(LedgerContent(events=(other,), damaged=0), [event(2)])


def test_damage_without_any_event_is_refused() -> None:
    with pytest.raises(PrivacyError, match="would be"):
        BUDGET.check_events(LedgerContent(events=(), damaged=500), [event(1)])
