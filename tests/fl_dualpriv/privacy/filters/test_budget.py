"""What an owner's budget refuses."""

from dataclasses import replace
from typing import Any

import pytest

from fl_dualpriv.errors import PrivacyError
from fl_dualpriv.privacy.filters.budget import Budget
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
