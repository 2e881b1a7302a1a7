"""Public numbers at the ends of their ranges: the sensitivity holds there, and beyond them nothing starts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_dualpriv.config.plans import client_level_plan
from fl_dualpriv.config.schema import RunConfig, app_defaults, merge
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.privacy.clipping import GRID_STEPS, clip_rows, clipped_sum, integer_rows
from fl_dualpriv.privacy.integer import LARGEST_STD
from fl_dualpriv.privacy.limits import (
    LARGEST_CLIP_NORM,
    LARGEST_DRAWN_MULTIPLIER,
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_CLIP_NORM,
    SMALLEST_DELTA,
    SMALLEST_NOISE_MULTIPLIER,
    SMALLEST_SAMPLING_RATE,
)
from fl_dualpriv.privacy.noise import KeyedRandom, StreamKey, poisson_sample
from fl_dualpriv.privacy.plan import RecordLevelPlan
from fl_dualpriv.privacy.release import release
from fl_dualpriv.server.strategy import ServerPrivacy
from strategies.fedavg import FedAvg
from tests.guarantees import limit_checks
from tests.guarantees.limit_checks import HUGE, TINY, length, slack
from tests.guarantees.objective_checks import clipped_feature_sum
from tests.made_strategy import made_strategy

DEFAULTS = app_defaults(Path(__file__).parents[2])
ENDS = (SMALLEST_CLIP_NORM, 3e-30, 1.0, LARGEST_CLIP_NORM)
# Every exponent of float64, subnormal numbers included, and what is no number.
entries = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.builds(lambda sign, e: sign * 10.0**e, st.sampled_from([-1.0, 1.0]), st.floats(-323, 308)),
)


@settings(max_examples=400, deadline=None)
@given(
    table=st.lists(st.lists(entries, min_size=3, max_size=3), min_size=1, max_size=5), clip_norm=st.sampled_from(ENDS)
)
def test_removing_a_row_moves_the_sum_by_at_most_the_sensitivity_at_the_ends(
    table: list[list[float]], clip_norm: float
) -> None:
    rows = torch.tensor(table, dtype=torch.float64)
    clipped, _ = clip_rows(rows, clip_norm)
    assert all(length(row, clip_norm) <= slack(3) for row in clipped)
    whole = clipped_sum(rows, clip_norm)
    assert whole.sensitivity == clip_norm
    integers = integer_rows(rows, clip_norm)
    assert all(sum(int(q) ** 2 for q in row) <= GRID_STEPS**2 for row in integers)
    for i in range(len(table)):
        rest = clipped_sum(torch.cat([rows[:i], rows[i + 1 :]]), clip_norm)
        # Besides the row itself: two sums of at most five rows of norm C, each off by 4 roundings of at most 5 C.
        assert length(whole.value - rest.value, clip_norm) <= slack(3) + 2 * 4 * 5 * 2.0**-53 * math.sqrt(3)


def test_rows_are_bounded_or_their_clip_norm_is_refused() -> None:
    limit_checks.no_row_is_longer_than_its_clip_norm()
    limit_checks.no_record_moves_a_feature_sum_further_than_the_clip_norm()


def test_a_moving_clip_norm_stays_one() -> None:
    limit_checks.a_moving_clip_norm_stays_one()


@pytest.mark.parametrize("clip_norm", [*TINY, *HUGE, 0.0, -1.0, math.inf, math.nan], ids=str)
def test_a_clip_norm_that_floats_do_not_keep_is_refused_everywhere(tmp_path: Path, clip_norm: float) -> None:
    rows, labels = torch.ones(1, 2), torch.tensor([0])
    with pytest.raises(ValueError, match=r"clip_norm = .*from 1e-30 to 1e\+30"):
        clip_rows(rows, clip_norm)
    with pytest.raises(ValueError, match="clip_norm"):
        integer_rows(rows, clip_norm)
    with pytest.raises(ValueError, match="clip_norm"):
        clipped_feature_sum(rows, rows, labels, 1.0, clip_norm)
    with pytest.raises(ValueError, match="clip_norm"):
        RecordLevelPlan(
            clip_norm=clip_norm,
            noise_multiplier=1.0,
            sampling_rate=0.1,
            releases=1,
            delta=1e-5,
            trusts_server=False,
            personal=True,
        )
    with pytest.raises(PrivacyError, match="may move the sum of uploads by"):
        made_strategy(FedAvg, server(bound=clip_norm))
    file = tmp_path / "node.toml"
    file.write_text(
        "[budget]\nepsilon = 1.0\ndelta = 1e-5\nmax-sampling-rate = 0.2\nmin-noise-multiplier = 1.0\n"
        f"max-clip-norm = {clip_norm}\n"
    )
    with pytest.raises(ConfigError, match=r"budget.max-clip-norm = .*from 1e-30 to 1e\+30"):
        read_node_file(file)


def server(bound: float, unit: Any = "client") -> ServerPrivacy:
    return ServerPrivacy(
        unit=unit, bound=bound, noise_multiplier=1.0, sampling_rate=1.0, ledger_multiplier=1.0, ledger=None
    )


def test_a_learning_rate_of_zero_is_no_bound_out_of_range() -> None:
    """With trusts-server the bound is the learning rate times the clip norm."""
    assert made_strategy(FedAvg, server(bound=0.0, unit="record")).sensitivity() == 0
    with pytest.raises(PrivacyError, match=r"or train.global-learning-rate"):
        made_strategy(FedAvg, server(bound=1e-300, unit="record"))


def problems(changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_run_config(merge(DEFAULTS, changes))
    (line,) = str(error.value).splitlines()[1:]
    return line.strip()


@pytest.mark.parametrize(
    ("key", "least", "most"),
    [
        ("privacy.record.clip-norm", SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM),
        ("privacy.client.clip-norm", SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM),
        ("privacy.record.noise-multiplier", SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER),
        ("privacy.client.noise-multiplier", SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER),
        ("train.sampling-rate", SMALLEST_SAMPLING_RATE, 1.0),
        ("privacy.record.delta", SMALLEST_DELTA, math.nextafter(1, 0)),
        ("privacy.client.delta", SMALLEST_DELTA, math.nextafter(1, 0)),
        ("privacy.client.bit-noise-share", 1e-6, 1e3),
    ],
)
def test_a_configuration_keeps_within_what_is_proved(key: str, least: float, most: float) -> None:
    for good in (least, most):
        assert RunConfig.from_run_config(merge(DEFAULTS, {key: good})).to_run_config()[key] == good
    for bad in (math.nextafter(least, 0), math.nextafter(most, math.inf), 5e-324, 1.7e308):
        assert problems({key: bad}).startswith(f"{key} = {bad!r}: must be ")


@pytest.mark.parametrize(("rate", "clip_norm"), [(1e-300, 1.0), (1e6, 1e25)])
def test_a_learning_rate_that_takes_a_trusted_servers_bound_out_of_range_is_refused(
    rate: float, clip_norm: float
) -> None:
    trusts = {
        "privacy.record.trusts-server": True,
        "privacy.record.clip-norm": clip_norm,
        "train.local-steps": 1,
    }
    line = problems({**trusts, "train.global-learning-rate": rate})
    assert "times the clip norm must be 0 or from 1e-30 to 1e+30" in line
    RunConfig.from_run_config(merge(DEFAULTS, {**trusts, "train.global-learning-rate": 0.0}))
    RunConfig.from_run_config(merge(DEFAULTS, {"train.global-learning-rate": rate}))  # nobody clips to it


def test_a_cohort_below_the_finest_coin_is_refused() -> None:
    changes = {"population": 100, "privacy.client.mechanism": "gaussian", "privacy.client.expected-cohort": 9e-8}
    assert "must be at least 1e-09 of population" in problems(changes)
    RunConfig.from_run_config(merge(DEFAULTS, changes | {"privacy.client.expected-cohort": 2e-7}))


def test_the_least_rate_is_one_that_coins_of_52_bits_have() -> None:
    """Uniforms are (k + 1/2) / 2**52, so a rate q has round(q 2**52) of them: q within 2**-53, here 1.2e-7 of it."""
    rate = SMALLEST_SAMPLING_RATE
    assert abs(round(rate * 2**52) / 2**52 - rate) <= 2.0**-53 < 2e-7 * rate
    # The rate that is refused by the most: the smallest uniform, 2**-53, is below it, and it has twice the chance.
    assert 2.0**-52 > 1.9 * 1.1102230246251568e-16 > 1.9 * 2.0**-53
    source = KeyedRandom(StreamKey(seed=0, purpose="coins"))
    assert len(poisson_sample(source, 10_000, rate)) == 0  # 1e-5 expected


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("multiplier", [SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER * 2**0.5])
@pytest.mark.parametrize("clip_norm", [SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM])
def test_noise_has_its_scale_at_the_ends(clip_norm: float, multiplier: float, arithmetic: Any) -> None:
    """Relative to z C the same keyed noise is the same everywhere; in integers up to half a unit of 2**-20 C."""
    nothing = torch.zeros(0, 50)
    found, usual = (
        release(clipped_sum(nothing, c, arithmetic), z, KeyedRandom(StreamKey(seed=0, purpose="noise"))) / (z * c)
        for c, z in ((clip_norm, multiplier), (1.0, 1.0))
    )
    # Floats: five roundings on both sides of numbers below 9. Integers: half a unit of each.
    most = 9 * 10 * 2.0**-53 + (0.5 * 2.0**-20 * (1 / multiplier + 1) if arithmetic == "integer" else 0.0)
    assert float((found - usual).abs().max()) <= most
    assert float(usual.std()) > 0.5  # 1, and its standard error is 0.1


def test_the_largest_draw_is_what_integers_can_hold() -> None:
    assert LARGEST_DRAWN_MULTIPLIER * GRID_STEPS == LARGEST_STD
    assert 2**0.5 * LARGEST_NOISE_MULTIPLIER < LARGEST_DRAWN_MULTIPLIER


@pytest.mark.parametrize("share", [0.05000000000000001, 1e3])
def test_noise_of_counts_that_leaves_none_to_draw_for_the_sum_is_refused(share: float) -> None:
    """2 σ_b a hair above z leaves the sum a multiplier of 7e7; 1000 cohorts of 1e5 clients are noise of 2e8."""
    changes: dict[str, Any] = {
        "population": 20 if share < 1 else 10**5,
        "privacy.client.mechanism": "gaussian",
        "privacy.client.clipping": "adaptive",
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.noise-multiplier": 2.0,
        "privacy.client.expected-cohort": 20.0 if share < 1 else 1e5,
        "privacy.client.bit-noise-share": share,
    }
    with pytest.raises(PrivacyError, match=r"bit-noise-share = .* can be drawn exactly"):
        client_level_plan(RunConfig.from_run_config(merge(DEFAULTS, changes)))
