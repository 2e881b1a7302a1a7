"""Every number has two bounds, within which nothing hangs before the first round."""

from pathlib import Path

import pytest

from fl_dualpriv.config.schema import RunConfig, app_defaults, merge
from fl_dualpriv.errors import ConfigError

DEFAULTS = app_defaults(Path(__file__).parents[3])
TREE = {"privacy.client.mechanism": "tree"}


def problem_lines(overrides: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_run_config(merge(DEFAULTS, overrides))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    "key",
    sorted(key for key, value in DEFAULTS.items() if type(value) in (int, float) and not key.startswith("plugin.")),
)
def test_every_number_has_two_bounds(key: str) -> None:
    huge = 2**70 if isinstance(DEFAULTS[key], int) else 1e300
    for value in (huge, -huge):
        (line,) = [line for line in problem_lines({key: value}) if line.startswith(f"{key} = {value}: must be")]
        assert "; " in line


def test_a_million_releases_are_the_most() -> None:
    RunConfig.from_run_config(merge(DEFAULTS, {"rounds": 1000, "train.local-steps": 1000}))
    (line,) = problem_lines({"rounds": 1000, "train.local-steps": 1001})
    assert line.startswith("train.local-steps = 1001: times rounds must be at most 1000000")
    without = {"rounds": 1000, "train.local-steps": 1001, "privacy.record.mechanism": "none"}
    RunConfig.from_run_config(merge(DEFAULTS, without))


def test_correlated_noise_has_rounds_that_a_table_holds() -> None:
    (line,) = problem_lines({**TREE, "rounds": 20_000, "population": 20_000, "privacy.client.expected-cohort": 1.0})
    assert line.startswith("rounds = 20000: must be at most 100000 with correlated noise")
