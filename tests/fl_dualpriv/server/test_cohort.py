"""Few nodes that host many clients: what is asked of them, and which of their answers count."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.metrics import Accuracy, ScoreTable
from fl_dualpriv.privacy.noise import KeyedRandom
from fl_dualpriv.privacy.plan import round_terms
from fl_dualpriv.server.cohort import by_node, collect
from fl_dualpriv.server.strategy import ClientFailure, RoundReport, RoundStrategy, ServerPrivacy
from strategies.dpfpl import DPFPL
from strategies.fedavg import FedAvg

SHAPE = (2, 3)
CLIENTS = 7
NODE_IDS = (71, 12, 55, 30, 99, 4, 18)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0  # messages cannot be made outside a task


def hosts(nodes: int) -> dict[int, int]:
    return {i: NODE_IDS[i % nodes] for i in range(CLIENTS)}


def server_privacy(unit: Any, noise: float = 1.0, rate: float = 0.5) -> ServerPrivacy:
    return ServerPrivacy(
        unit=unit, bound=0.7, noise_multiplier=noise, sampling_rate=rate, ledger_multiplier=noise, ledger=None
    )


def make(nodes: int, privacy: ServerPrivacy | None, cls: type[RoundStrategy] = DPFPL, **changes: Any) -> RoundStrategy:
    arguments: dict[str, Any] = {
        "cards": {i: messages.ClientCard(partition=i, num_examples=10 * (i + 1)) for i in range(CLIENTS)},
        "hosts": hosts(nodes),
        "masses": {i: 1.0 + i for i in range(CLIENTS)},
        "num_rounds": 5,
        "evaluate_every": 1,
        "prompt_kind": "personal",
        "run_token": "token",
        "terms": round_terms(None, 0.1, 1),
        "tolerates_failures": True,
        "privacy": privacy,
        "sources": KeyedRandom,
        "seed": 0,
        "report": lambda report: None,
    }
    return cls(**arguments | changes)


def ask(strategy: RoundStrategy, server_round: int = 1, prompt: Tensor | None = None) -> list[Message]:
    arrays = messages.to_arrays(torch.zeros(SHAPE) if prompt is None else prompt)
    return list(strategy.configure_train(server_round, arrays, ConfigRecord(), grid=None))  # type: ignore[arg-type]


def upload_of(partition: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(partition))


def reply(message: Message, answered: Sequence[int] | None = None, failed: dict[int, str] | None = None) -> Message:
    """What an honest node answers; ``answered``: about these clients only."""
    partitions = messages.read_train(message).partitions if answered is None else tuple(answered)
    values = torch.stack([upload_of(p) for p in partitions]) if partitions else torch.zeros(0, *SHAPE)
    content = messages.uploads_content(messages.Uploads(partitions=partitions, values=values, failed=failed or {}))
    return Message(content, reply_to=message)


def step(strategy: RoundStrategy, replies: Sequence[Message], server_round: int = 1) -> Tensor:
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return messages.from_arrays(arrays)


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_clients_are_grouped_by_host_in_order():
    assert by_node([0, 2, 3, 5, 6], hosts(3)) == {71: (0, 3, 6), 55: (2, 5)}
    assert by_node([], hosts(3)) == {}


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("cls", [DPFPL, FedAvg])
@pytest.mark.parametrize(
    "privacy",
    [None, server_privacy("client"), server_privacy("record"), server_privacy("nominal")],
    ids=["none", "client", "record", "nominal"],
)
def test_fewer_nodes_give_bitwise_the_same_prompts(nodes: int, cls: type[RoundStrategy], privacy: ServerPrivacy | None):
    few, many = make(nodes, privacy, cls), make(CLIENTS, privacy, cls)
    prompt = torch.zeros(SHAPE)
    for server_round in range(1, 6):
        asked, one_each = ask(few, server_round, prompt), ask(many, server_round, prompt)
        members = sorted(p for m in asked for p in messages.read_train(m).partitions)
        assert members == [p for m in one_each for p in messages.read_train(m).partitions]
        assert len(asked) <= nodes
        # Replies arrive in any order.
        moved = step(few, [reply(m) for m in reversed(asked)], server_round)
        prompt = step(many, [reply(m) for m in one_each], server_round)
        assert torch.equal(moved, prompt)
    assert few.deliveries == many.deliveries > 0
    assert bool(prompt.any())


def test_the_cohort_is_drawn_over_clients_and_only_their_nodes_are_asked():
    strategy = make(3, server_privacy("client", rate=0.2))
    sizes = []
    for server_round in range(1, 301):
        asked = ask(strategy, server_round)
        groups = [messages.read_train(m).partitions for m in asked]
        assert all(group for group in groups)
        assert all(hosts(3)[p] == m.metadata.dst_node_id for m, g in zip(asked, groups, strict=True) for p in g)
        sizes.append(sum(map(len, groups)))
    # Binomial(7, 0.2): mean 1.4, standard error sqrt(1.12/300) = 0.061; 5 of them
    assert sum(sizes) / 300 == pytest.approx(1.4, abs=0.31)


def test_a_round_asks_for_a_weight_once_per_number_of_examples():
    asked_about = []

    class Counting(DPFPL):
        def weight(self, num_examples: int) -> float:
            asked_about.append(num_examples)
            return 1.0

    strategy = make(2, server_privacy("client", rate=1.0), Counting)
    for server_round in (1, 2):
        step(strategy, [reply(m) for m in ask(strategy, server_round)], server_round)
    assert sorted(asked_about) == [10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("wrong", [{0: 71}, dict.fromkeys(range(1, CLIENTS + 1), 71)], ids=["few", "shifted"])
def test_a_client_without_a_host_is_refused(wrong: dict[int, int]):
    with pytest.raises(ValueError, match="each with a host"):
        make(2, None, hosts=wrong)


# --- failures ---------------------------------------------------------------------------------------------------------


def without(*lost: int) -> Tensor:
    """The step that is due when these clients count as zero (every client in the cohort, no noise, no clipping)."""
    left = [upload_of(p).double() for p in range(CLIENTS) if p not in lost]
    return (sum(left, torch.zeros(SHAPE, dtype=torch.float64)) / 28).float()  # masses 1 + ... + 7


def everyone() -> tuple[RoundStrategy, dict[int, Message]]:
    """Two nodes: the first hosts 0, 2, 4, 6; the second 1, 3, 5."""
    strategy = make(2, None)
    return strategy, {m.metadata.dst_node_id: m for m in ask(strategy)}


def test_a_failed_client_in_a_message_takes_nobody_down():
    strategy, asked = everyone()
    replies = [reply(asked[71], (0, 4, 6), {2: "RuntimeError: boom"}), reply(asked[12])]
    assert torch.equal(step(strategy, replies), without(2))
    assert (strategy.failures, strategy.deliveries, strategy.last_failure) == (1, 6, "RuntimeError: boom")


def test_a_client_that_its_nodes_reply_leaves_out_is_a_failure():
    strategy, asked = everyone()
    assert torch.equal(step(strategy, [reply(asked[71], (0, 4)), reply(asked[12])]), without(2, 6))
    assert (strategy.failures, strategy.last_failure) == (2, "no upload in the reply of its node")


@pytest.mark.parametrize("how", ["error", "silence"])
def test_a_failed_message_fails_all_it_was_sent_for(how: str):
    strategy, asked = everyone()
    replies = [reply(asked[12])]
    if how == "error":
        replies.append(Message(Error(2, "RuntimeError: out of memory"), reply_to=asked[71]))
    assert torch.equal(step(strategy, replies), without(0, 2, 4, 6))
    assert strategy.failures == 4
    assert strategy.last_failure == ("RuntimeError: out of memory" if how == "error" else "no reply in time")


@pytest.mark.parametrize(
    "forged",
    [
        pytest.param(lambda m: reply(m, (0, 2, 4, 6, 1)), id="another node's client"),
        pytest.param(lambda m: reply(m, (0, 2, 4, 99)), id="nobody"),
        pytest.param(lambda m: reply(m, (0, 2, 4, -1)), id="counted from the end"),
        pytest.param(lambda m: reply(m, (0, 2, 4, 4)), id="twice"),
        pytest.param(lambda m: reply(m, (0, 2, 4, 6), {6: "boom"}), id="good and failed"),
        pytest.param(lambda m: reply(m, (0, 2), {1: "boom"}), id="another's failure"),
    ],
)
def test_a_forged_reply_counts_for_nobody_and_nothing_twice(forged: Callable[[Message], Message]):
    strategy, asked = everyone()
    # The honest node answers last, so a forger cannot take its clients' place.
    moved = step(strategy, [forged(asked[71]), reply(asked[71]), reply(asked[12])])
    assert torch.equal(moved, without(0, 2, 4, 6))
    assert (strategy.failures, strategy.deliveries) == (4, 3)


def test_a_reply_counts_only_from_the_node_that_was_asked():
    strategy, asked = everyone()
    stranger = reply(Message(asked[71].content, 99, MessageType.TRAIN))
    assert torch.equal(step(strategy, [stranger, reply(asked[12])]), without(0, 2, 4, 6))
    assert strategy.failures == 4


def test_a_second_copy_of_a_reply_does_not_count():
    strategy, asked = everyone()
    values = 9 * torch.ones(4, *SHAPE)
    other = messages.uploads_content(messages.Uploads(partitions=(0, 2, 4, 6), values=values))
    moved = step(strategy, [reply(asked[71]), Message(other, reply_to=asked[71]), reply(asked[12]), reply(asked[12])])
    assert torch.equal(moved, without())
    assert (strategy.deliveries, strategy.failures) == (7, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_upload_in_a_stack_is_zero_for_its_client_alone(value: float):
    strategy, asked = everyone()
    values = torch.stack([upload_of(p) for p in (0, 2, 4, 6)])
    values[1, 0, 2] = value
    bad = Message(
        messages.uploads_content(messages.Uploads(partitions=(0, 2, 4, 6), values=values)), reply_to=asked[71]
    )
    assert torch.equal(step(strategy, [bad, reply(asked[12])]), without(2))
    assert (strategy.failures, strategy.deliveries) == (0, 7)  # silent: it may have been learned from the data


@pytest.mark.parametrize("how", ["failed", "not finite", "left out"])
def test_without_dp_the_client_is_named(how: str):
    strategy = make(2, None, tolerates_failures=False)
    one, two = ask(strategy, 3)
    values = torch.stack([upload_of(p) for p in (1, 3, 5)])
    values[1] = math.nan
    bad = {
        "failed": reply(two, (1, 5), {3: "RuntimeError: boom"}),
        "not finite": Message(
            messages.uploads_content(messages.Uploads(partitions=(1, 3, 5), values=values)), reply_to=two
        ),
        "left out": reply(two, (1, 5)),
    }[how]
    reason = {"failed": "RuntimeError: boom", "not finite": "the upload is not finite", "left out": "no upload"}[how]
    with pytest.raises(ClientFailure, match=f"client 3 failed in round 3: {reason}"):
        strategy.aggregate_train(3, [reply(one), bad])


def test_a_late_reply_of_an_earlier_round_never_counts_even_if_it_comes_first():
    strategy, asked = everyone()
    late = reply(asked[71], (2, 4, 6), {0: "RuntimeError: boom"})
    again = {m.metadata.dst_node_id: m for m in ask(strategy, 2)}
    step(strategy, [late, reply(again[71]), reply(again[12])], 2)
    assert (strategy.deliveries, strategy.failures) == (CLIENTS, 0)


def test_every_client_ends_up_in_one_place():
    _, asked = everyone()
    replies = [reply(asked[12], (5,), {3: "boom"})]
    group = asked[12].metadata.group_id
    found = collect(
        {71: (0, 2, 4, 6), 12: (1, 3, 5)}, replies, lambda m: messages.read_uploads(m, SHAPE), "upload", group
    )
    answered = [p for answer in found.answers for p in answer.partitions]
    assert sorted([*answered, *found.failed]) == list(range(CLIENTS))
    assert list(found.failed) == [0, 1, 2, 3, 4, 6]
    assert (found.failed[3], found.failed[1]) == ("boom", "no upload in the reply of its node")


# --- scores -----------------------------------------------------------------------------------------------------------


def answer(message: Message, failed: Sequence[int] = ()) -> Message:
    good = tuple(p for p in messages.read_evaluate(message).partitions if p not in failed)
    counts, held = torch.tensor([[p, 1] for p in good]), torch.tensor([[True, False] for _ in good])
    table = ScoreTable.of(counts, torch.tensor([7, 4]), held)
    content = messages.scores_content(
        messages.Scores(partitions=good, values=table, failed=dict.fromkeys(failed, "boom"))
    )
    return Message(content, reply_to=message)


def test_scores_of_all_clients_come_in_one_message_per_node():
    reports: list[RoundReport] = []
    few, many = (make(n, None, report=reports.append) for n in (2, CLIENTS))
    for strategy in (few, many):
        asked = list(strategy.configure_evaluate(2, messages.to_arrays(torch.ones(SHAPE)), ConfigRecord(), grid=None))  # type: ignore[arg-type]
        strategy.aggregate_evaluate(2, [answer(m) for m in reversed(asked)])
    assert reports[0] == reports[1]
    assert reports[0].accuracy == Accuracy(local=pytest.approx(3 / 7), neighbour=0.25)  # mean of 0 ... 6 is 3


def test_a_failed_score_is_one_clients_failure():
    reports: list[RoundReport] = []
    strategy = make(2, None, report=reports.append)
    one, two = strategy.evaluation_messages(2, torch.ones(SHAPE), "personal")
    strategy.aggregate_evaluate(2, [answer(one, (4,)), answer(two)])
    assert reports[0].failures == 1
    assert reports[0].accuracy == Accuracy(local=pytest.approx((21 - 4) / 6 / 7), neighbour=0.25)


def test_an_empty_reply_to_an_evaluation_fails_its_clients():
    strategy = make(2, None)
    one, two = strategy.evaluation_messages(2, torch.ones(SHAPE), "personal")
    strategy.aggregate_evaluate(2, [Message(RecordDict(), reply_to=one), answer(two)])
    assert strategy.failures == 4
