"""From a configuration to the server's noise, its divisor and its statement of what leaves, by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv import messages
from fl_dualpriv.config.plans import client_level_plan, record_level_plan
from fl_dualpriv.config.releases import list_releases, notes, round_of_epsilon
from fl_dualpriv.config.schema import RunConfig, app_defaults
from fl_dualpriv.run.recorder import RunRecorder
from fl_dualpriv.server.build import build_strategy, server_privacy
from fl_dualpriv.server.strategy import RoundStrategy
from strategies.dpfpl import DPFPL
from strategies.fedavg import FedAvg

DEFAULTS = app_defaults(Path(__file__).parents[2])
BASE: dict[str, Any] = {
    "population": 2,
    "evaluation.held-out-data": "public",
    "rounds": 3,
    "train.local-steps": 1,
    "train.sampling-rate": 0.1,
    "train.global-learning-rate": 0.5,
    "privacy.record.calibrate-to": "noise-multiplier",
    "privacy.record.noise-multiplier": 2.0,
    "privacy.record.clip-norm": 0.8,
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.noise-multiplier": 3.0,
    "privacy.client.clip-norm": 0.4,
    "privacy.client.expected-cohort": 1.0,
}
CARDS = {
    0: messages.ClientCard(partition=0, num_examples=100),
    1: messages.ClientCard(partition=1, num_examples=300),
}
HOSTS = {0: 11, 1: 5}
TRUSTING = {"privacy.record.trusts-server": True}
CLIENT = {"privacy.record.mechanism": "none", "privacy.client.mechanism": "gaussian"}
BOTH = {"privacy.client.mechanism": "gaussian"}
NO_DP = {"privacy.record.mechanism": "none"}


def strategy_for(
    changes: dict[str, Any], tmp_path: Path, cls: type[RoundStrategy] = DPFPL
) -> tuple[RunConfig, RoundStrategy]:
    config = RunConfig.from_run_config(DEFAULTS | BASE | changes)
    plans = record_level_plan(config), client_level_plan(config)
    return config, build_strategy(cls, config, *plans, CARDS, HOSTS, RunRecorder(tmp_path), lambda report: None, {})


def noise_std(strategy: RoundStrategy) -> float:
    assert strategy.privacy is not None
    return strategy.privacy.noise_multiplier * strategy.sensitivity()


def test_record_level_without_trust_adds_nothing_at_the_server(tmp_path: Path):
    _, strategy = strategy_for({}, tmp_path)
    assert strategy.privacy is None
    assert (strategy.terms.noise_multiplier, strategy.divisor()) == (2.0, 2.0)
    assert strategy.tolerates_failures


@pytest.mark.parametrize(("method", "factor"), [("dpfpl", math.sqrt(2)), ("promptfl", 1.0)])
def test_the_trusted_servers_noise(tmp_path: Path, method: str, factor: float):
    _, strategy = strategy_for({"method": method} | TRUSTING, tmp_path)
    assert strategy.divisor() == pytest.approx(40)  # 0.1 * (100 + 300)
    # sum of -0.5 * (clipped sums): one record moves it by 0.5 * 0.8; with a personal prompt both views get sqrt(2) z
    assert noise_std(strategy) == pytest.approx(factor * 2.0 * 0.5 * 0.8 / 40)
    assert strategy.privacy is not None
    assert strategy.privacy.ledger_multiplier == pytest.approx(2.0)  # jointly z again
    assert (strategy.privacy.unit, strategy.privacy.sampling_rate) == ("record", 0.1)


def test_the_trusted_servers_noise_with_weights(tmp_path: Path):
    _, strategy = strategy_for({"method": "promptfl"} | TRUSTING, tmp_path, FedAvg)
    # weights 1/3 and 1: divisor 0.1 * (100/3 + 300); a record of the large client still moves the sum by 0.5 * 0.8
    assert strategy.divisor() == pytest.approx(100 / 3)
    assert noise_std(strategy) == pytest.approx(2.0 * 0.4 * 3 / 100)


def test_client_level_noise(tmp_path: Path):
    _, strategy = strategy_for(CLIENT, tmp_path)
    assert strategy.divisor() == pytest.approx(1.0)  # the expected cohort
    assert noise_std(strategy) == pytest.approx(3.0 * 0.4)
    assert (strategy.terms.mechanism, strategy.terms.noise_multiplier) == ("none", 0.0)
    assert strategy.privacy is not None
    assert (strategy.privacy.unit, strategy.privacy.sampling_rate) == ("client", 0.5)
    assert strategy.privacy.ledger is not None


def test_the_nominal_servers_noise(tmp_path: Path):
    changes = {"method": "dpfpl-paper", "privacy.record.epsilon": 2.0, "privacy.record.delta": math.exp(-10)}
    _, strategy = strategy_for(changes, tmp_path)
    # sigma = sqrt(3 * 10)/2; clip 10, smallest batch 10, learning rate 0.5, two clients
    assert noise_std(strategy) == pytest.approx(math.sqrt(30) / 2 * 0.5 * 10 / 10 / 2)
    assert strategy.privacy is not None
    assert strategy.privacy.ledger is None  # a nominal ε is no entry in a ledger


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "personal"),
        ({"method": "promptfl"}, "global"),
        (CLIENT, "global"),
        (BOTH, "personal"),
        (NO_DP, "personal"),
    ],
    ids=["record", "promptfl", "client", "both", "none"],
)
def test_personal_prompts_are_scored_where_they_are_paid_for(tmp_path: Path, changes: dict[str, Any], kind: str):
    _, strategy = strategy_for(changes, tmp_path)
    assert strategy.prompt_kind == kind


@pytest.mark.parametrize(
    ("changes", "every"), [({}, 0), (CLIENT, 0), (TRUSTING, 0), (NO_DP, 1)], ids=["record", "client", "trust", "none"]
)
def test_private_held_out_data_switch_scoring_off_under_dp(tmp_path: Path, changes: dict[str, Any], every: int):
    _, strategy = strategy_for(changes | {"evaluation.held-out-data": "private"}, tmp_path)
    assert strategy.evaluate_every == every


def test_private_held_out_data_switch_scoring_off_for_a_nominal_epsilon_too(tmp_path: Path):
    _, strategy = strategy_for({"method": "dpfpl-paper", "evaluation.held-out-data": "private"}, tmp_path)
    assert strategy.evaluate_every == 0


def releases_for(changes: dict[str, Any]) -> list[tuple[str, str, str]]:
    config = RunConfig.from_run_config(DEFAULTS | BASE | changes)
    found = list_releases(config, record_level_plan(config), client_level_plan(config), scored=True)
    assert len({r.epsilon for r in found if r.unit == "record"}) <= 1  # one joint ε, never a smaller one for a part
    return [(r.release, r.unit, r.trusts) for r in found]


def test_what_leaves():
    metrics, shared = "reported metrics", "global prompt"
    personal, upload = "published personal prompt", "client upload"
    assert releases_for({}) == [(name, "record", "nobody") for name in (upload, shared, personal, metrics)]
    assert releases_for({"method": "promptfl"}) == [(name, "record", "nobody") for name in (upload, shared, metrics)]
    assert releases_for({"method": "local-only"}) == [(name, "record", "nobody") for name in (personal, metrics)]
    assert releases_for(TRUSTING) == [(name, "record", "server") for name in (shared, personal, metrics)]
    assert releases_for(CLIENT) == [(name, "client", "server") for name in (shared, metrics)]
    assert releases_for(NO_DP) == []
    assert releases_for({"method": "zero-shot"}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (TRUSTING, "clean clipped sums"),
        (CLIENT, "the server sees each client's update"),
        (CLIENT, "scores are of the global prompt"),
        (BOTH, "not at client level"),
        (NO_DP, "no differential privacy"),
        ({"method": "dpfpl-paper"}, "nominal, not a guarantee"),
        (
            {"method": "dpfpl-paper", "dpfpl-paper.published": "code", "train.local-steps": 1},
            "formulas of the authors' code; ε is nominal",
        ),
        ({"privacy.randomness": "seeded"}, "do not publish"),
        (CLIENT | {"privacy.randomness": "seeded"}, "do not publish"),
    ],
)
def test_notes_say_what_the_table_does_not(changes: dict[str, Any], words: str):
    config = RunConfig.from_run_config(DEFAULTS | BASE | changes)
    found = notes(config, record_level_plan(config), client_level_plan(config), scored=True)
    assert any(words in note for note in found)


@pytest.mark.parametrize("rounds", [1, 10, 25, 26, 60, 1000])
def test_the_spent_epsilon_of_a_long_run_is_never_too_small(rounds: int):
    shown = [round_of_epsilon(r, rounds) for r in range(rounds + 1)]
    assert all(later >= r for r, later in enumerate(shown))
    assert (shown[0], shown[-1]) == (0, rounds)
    assert len(set(shown) - {0}) <= 25
    assert rounds > 25 or shown == list(range(rounds + 1))


def test_no_server_noise_for_nothing(tmp_path: Path):
    config = RunConfig.from_run_config(DEFAULTS | BASE | NO_DP)
    assert server_privacy(config, None, None, CARDS, ledger=None) is None  # type: ignore[arg-type]
