"""Rules of a round: cohorts, order, what a strategy may override, sensitivity by construction, and scoring."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.metrics import Accuracy, ScoreTable
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSources
from fl_dualpriv.privacy.plan import RoundTerms
from fl_dualpriv.server.strategy import ClientFailure, RoundReport, RoundStrategy, ServerPrivacy, Update
from strategies.dpfpl import DPFPL
from strategies.fedavg import FedAvg
from tests.made_strategy import made_strategy, quiet, training_messages

SHAPE = (2, 3)
NODES = (71, 12, 55, 30)
"""Node ids of partitions 0, 1, 2, 3: in no order, as Flower hands them out."""


def client_level(noise: float = 1.0, rate: float = 1.0, bound: float = 1.0) -> ServerPrivacy:
    return ServerPrivacy(
        unit="client", bound=bound, noise_multiplier=noise, sampling_rate=rate, ledger_multiplier=noise, ledger=None
    )


TERMS = RoundTerms(
    mechanism="gaussian", trusts_server=False, clip_norm=0.5, noise_multiplier=1.25, sampling_rate=0.1, releases=2
)


def make(
    cls: type[RoundStrategy] = DPFPL,
    privacy: ServerPrivacy | None = None,
    sources: RandomSources = quiet,
    **options: Any,
) -> Any:
    ours = {"nodes": NODES, "rounds": 5, "evaluate_every": 2, "prompt_kind": "personal", "terms": TERMS}
    return made_strategy(cls, privacy, sources, **ours | options)


def ask(strategy: RoundStrategy, server_round: int = 1) -> list[Message]:
    return training_messages(strategy, server_round, torch.zeros(SHAPE))


def step(strategy: RoundStrategy, asked: list[Message], updates: dict[int, Tensor]) -> Tensor:
    answers = []
    for m in asked:
        value = updates[m.metadata.dst_node_id][None]
        content = messages.uploads_content(messages.Uploads(partitions=messages.read_train(m).partitions, values=value))
        answers.append(Message(content, reply_to=m))
    arrays, _ = strategy.aggregate_train(1, answers)
    assert arrays is not None
    return messages.from_arrays(arrays)


# --- cohorts ----------------------------------------------------------------------------------------------------------


def test_without_client_level_everybody_is_asked_with_the_whole_task():
    strategy = make()
    asked = ask(strategy, 4)
    assert [m.metadata.dst_node_id for m in asked] == list(NODES)  # by partition
    task = messages.read_train(asked[2])
    assert [messages.read_train(m).partitions for m in asked] == [(0,), (1,), (2,), (3,)]
    assert (task.server_round, task.run_token, task.terms) == (4, "token", TERMS)
    assert torch.equal(task.global_prompt, torch.zeros(SHAPE))
    assert {m.metadata.message_type for m in asked} == {MessageType.TRAIN}


def test_cohorts_are_poisson_and_do_not_follow_node_ids():
    rate, rounds = 0.3, 2000
    plain = make(privacy=client_level(rate=rate), sources=KeyedRandom)
    renamed = make(privacy=client_level(rate=rate), sources=KeyedRandom, nodes=(1, 99, 3, 7))
    partition = {node: i for i, node in enumerate(NODES)} | {1: 0, 99: 1, 3: 2, 7: 3}
    joined = np.zeros((rounds, 4))
    for r in range(rounds):
        one, two = ([partition[m.metadata.dst_node_id] for m in ask(s, r + 1)] for s in (plain, renamed))
        assert one == two
        joined[r, one] = 1
    # standard error sqrt(0.3 * 0.7 / 2000) = 0.010; 5 of them
    assert np.abs(joined.mean(axis=0) - rate).max() < 0.05
    # sizes are binomial: variance 4 * 0.3 * 0.7 = 0.84, standard error of it about 3 %; a fixed size would give 0
    assert joined.sum(axis=1).var() == pytest.approx(0.84, rel=0.15)
    # coins of different clients are independent: correlation 0, standard error 1/sqrt(2000) = 0.022
    assert np.abs(np.corrcoef(joined.T) - np.eye(4)).max() < 0.11


def test_the_seed_decides_the_cohorts():
    draws = [
        [len(ask(make(privacy=client_level(rate=0.5), sources=KeyedRandom, seed=seed), r)) for r in range(1, 30)]
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


# --- order and sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [DPFPL, FedAvg])
@pytest.mark.parametrize("private", [False, True])
def test_replies_in_any_order_give_bitwise_the_same_prompt(cls: type[RoundStrategy], private: bool):
    # In float64 4e16 + 1 is 4e16, so what is left of these ones depends on the order of the sum.
    updates = {
        n: torch.full(SHAPE, x, dtype=torch.float64) for n, x in zip(NODES, (1.0, 4e16, 1.0, -4e16), strict=True)
    }
    results = []
    for order in itertools.permutations(range(4)):
        strategy = make(cls, client_level(noise=0.0, bound=1e18) if private else None, sources=KeyedRandom)
        asked = ask(strategy)
        results.append(step(strategy, [asked[i] for i in order], updates))
    assert all(torch.equal(results[0], other) for other in results)


cells = st.floats(-1e6, 1e6, width=32)
tables = st.lists(st.lists(cells, min_size=6, max_size=6), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(table=tables, gone=st.integers(0, 3), fed=st.booleans(), bound=st.sampled_from([1e-3, 1.0, 50.0]))
def test_one_client_moves_the_combined_update_by_at_most_the_sensitivity(
    table: list[list[float]], gone: int, fed: bool, bound: float
):
    strategy = make(FedAvg if fed else DPFPL, client_level(noise=0.0, bound=bound))
    updates = {n: torch.tensor(row, dtype=torch.float64).reshape(SHAPE) for n, row in zip(NODES, table, strict=True)}
    seen: list[Tensor] = []
    strategy.server_update = lambda prompt, diff: seen.append(diff) or prompt + diff  # before any float32 rounding
    step(strategy, ask(strategy), updates)
    asked = [m for m in ask(strategy) if m.metadata.dst_node_id != NODES[gone]]
    step(strategy, asked, updates)
    # what server_update sees is float32 here: 6 entries, each within 2^-24 of its size, which is at most 4 * bound / 3
    rounding = math.sqrt(6) * 2**-23 * 4 * bound
    assert (
        float(torch.linalg.vector_norm((seen[0] - seen[1]).double())) <= strategy.sensitivity() * (1 + 1e-9) + rounding
    )


# --- what an author may override --------------------------------------------------------------------------------------


class Median(DPFPL):
    """A combine without a proof."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return torch.stack([u.diff for u in updates]).median(dim=0).values


class Half(DPFPL):
    """A combine with a proof."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return super().combine(updates) / 2

    def sensitivity(self) -> float:
        return super().sensitivity() / 2


class DoubleOfHalf(Half):
    """Overrides combine again, and inherits a sensitivity that no longer fits."""

    def combine(self, updates: Sequence[Update]) -> Tensor:
        return 8 * super().combine(updates)


def test_counts_that_round_sums_away_are_refused():
    """Two clients of 2**53 - 1 declared records could add and take away what rounds the sum of one between them."""
    trusting = ServerPrivacy(
        unit="record", bound=1.0, noise_multiplier=2.0, sampling_rate=0.1, ledger_multiplier=2.0, ledger=None
    )
    with pytest.raises(ValueError, match="add up exactly in float64"):
        make(privacy=trusting, sizes=(2**53 - 1, 20, 30, 2**53 - 1))
    make(privacy=trusting, sizes=(10**9, 20, 30, 10**9))


def test_combine_without_sensitivity_is_refused_under_dp_alone():
    with pytest.raises(PrivacyError, match=r"Median overrides combine\(\) but not sensitivity\(\)"):
        make(Median, client_level())
    assert make(Median).sensitivity.__func__ is RoundStrategy.sensitivity  # without DP it may start


def test_combine_with_sensitivity_scales_the_noise():
    whole, half = (make(cls, client_level(), sources=KeyedRandom) for cls in (DPFPL, Half))
    one, two = (step(s, [], {}) for s in (whole, half) if ask(s) is not None)
    torch.testing.assert_close(two, one / 2)


def test_a_newer_combine_than_sensitivity_is_refused():
    with pytest.raises(PrivacyError):
        make(DoubleOfHalf, client_level())


class RealisedDivisor(DPFPL):
    def divisor(self) -> float:
        return 1.0


class OwnRound(DPFPL):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return None, None


@pytest.mark.parametrize(("cls", "name"), [(RealisedDivisor, "divisor"), (OwnRound, "aggregate_train")])
def test_what_clips_noises_or_accounts_cannot_be_overridden_under_dp(cls: type[DPFPL], name: str):
    with pytest.raises(PrivacyError, match=f"{cls.__name__} overrides {name}"):
        make(cls, client_level())
    make(cls)  # without server-side privacy a strategy may do what it likes


def test_a_weight_that_changes_cannot_split_bound_and_divisor():
    class Moody(DPFPL):
        calls = 0

        def weight(self, num_examples: int) -> float:
            Moody.calls += 1
            return 1.0 if Moody.calls <= len(NODES) else 0.01

    strategy = make(Moody, client_level())
    assert strategy.divisor() == strategy.divisor()


def test_sensitivity_without_privacy_is_an_error():
    with pytest.raises(PrivacyError, match="nothing bounds the uploads"):
        make().sensitivity()


@pytest.mark.parametrize("weight", [math.nan, 0.0], ids=["nan", "zero"])
def test_a_useless_weight_never_gives_a_prompt(weight: float):
    class Useless(DPFPL):
        def weight(self, num_examples: int) -> float:
            return weight

    with pytest.raises(ConfigError, match="at least one client must have a weight"):  # before any client is asked
        make(Useless, client_level())


# --- scores -----------------------------------------------------------------------------------------------------------


def evaluate(strategy: RoundStrategy, server_round: int) -> list[Message]:
    arrays = messages.to_arrays(torch.ones(SHAPE))
    return list(strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid=None))  # type: ignore[arg-type]


def answer(message: Message, correct: int) -> Message:
    partitions = messages.read_evaluate(message).partitions
    counts, held = (torch.full((len(partitions), 1), value) for value in (correct, True))
    scores = messages.Scores(partitions=partitions, values=ScoreTable.of(counts, torch.tensor([4]), held))
    return Message(messages.scores_content(scores), reply_to=message)


@pytest.mark.parametrize(("server_round", "scored"), [(1, False), (2, True), (3, False), (4, True), (5, True)])
def test_every_second_round_and_the_last_are_scored(server_round: int, scored: bool):
    asked = evaluate(make(), server_round)
    assert len(asked) == (4 if scored else 0)
    assert all(messages.read_evaluate(m).prompt == "personal" for m in asked)


def test_scores_average_the_clients_that_answer_and_count_the_others():
    reports: list[RoundReport] = []
    strategy = make(report=reports.append)
    asked = evaluate(strategy, 2)
    replies = [answer(asked[0], 1), answer(asked[1], 2), Message(Error(2, "boom"), reply_to=asked[2])]
    strategy.aggregate_evaluate(2, replies)
    # (1/4 + 2/4) / 2; one error and one silent client
    assert reports == [RoundReport(server_round=2, accuracy=Accuracy(local=0.375, neighbour=None), failures=2)]


def test_without_dp_a_missing_score_ends_the_run():
    strategy = make(tolerates=False)
    asked = evaluate(strategy, 2)
    with pytest.raises(ClientFailure, match="client 3 failed in round 2: evaluation: no reply"):
        strategy.aggregate_evaluate(2, [answer(m, 1) for m in asked[:3]])


def test_an_unscored_round_is_reported_without_accuracy():
    reports: list[RoundReport] = []
    strategy = make(report=reports.append)
    evaluate(strategy, 1)
    strategy.aggregate_evaluate(1, [])
    assert reports == [RoundReport(server_round=1, accuracy=None, failures=0)]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"score": MetricRecord({"correct": 1})}),
        RecordDict({"score": MetricRecord({"correct": 1, "accuracy": 0.5})}),
    ],
    ids=["empty", "incomplete", "unknown key"],
)
def test_a_malformed_score_is_a_failure_not_the_end(content: RecordDict):
    reports: list[RoundReport] = []
    strategy = make(privacy=client_level(), report=reports.append)
    asked = evaluate(strategy, 2)
    strategy.aggregate_evaluate(2, [Message(content, reply_to=asked[0]), *(answer(m, 1) for m in asked[1:])])
    assert reports[0].failures == 1


def test_an_impossible_score_is_a_failure():
    reports: list[RoundReport] = []
    strategy = make(privacy=client_level(), report=reports.append)
    strategy.aggregate_evaluate(2, [answer(m, 9) for m in evaluate(strategy, 2)])
    assert reports[0].failures == 4
