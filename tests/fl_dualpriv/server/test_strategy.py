"""A round at the server, driven by hand-made replies: what counts, what is bounded, what a broken client can do."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, RandomSources, StreamKey
from fl_dualpriv.server.strategy import ClientFailure, RoundStrategy, ServerPrivacy
from strategies.dpfpl import DPFPL
from strategies.fedavg import FedAvg
from tests.made_strategy import Silent, made_strategy, quiet, training_messages

SHAPE = (2, 3)
NODES = (71, 12, 55, 30)
"""Node ids of partitions 0, 1, 2, 3: in no order, as Flower hands them out."""
SIZES = (10, 20, 30, 40)


def client_level(noise: float = 1.0, rate: float = 0.75, bound: float = 1.0, ledger: Ledger | None = None):
    return ServerPrivacy(
        unit="client",
        bound=bound,
        noise_multiplier=noise,
        sampling_rate=rate,
        ledger_multiplier=noise,
        ledger=ledger,
    )


def make(
    cls: type[RoundStrategy] = DPFPL,
    privacy: ServerPrivacy | None = None,
    sources: RandomSources = quiet,
    **options: Any,
) -> RoundStrategy:
    return made_strategy(cls, privacy, sources, **{"nodes": NODES, "sizes": SIZES, "evaluate_every": 2} | options)


def ask(strategy: RoundStrategy, server_round: int = 1, start: Tensor | None = None) -> list[Message]:
    return training_messages(strategy, server_round, torch.zeros(SHAPE) if start is None else start)


def upload_content(partition: int, value: Tensor) -> RecordDict:
    return messages.uploads_content(messages.Uploads(partitions=(partition,), values=value[None]))


def replies_to(asked: Iterable[Message], updates: dict[int, Tensor]) -> list[Message]:
    """Answers of nodes that host one client each."""
    return [
        Message(upload_content(*messages.read_train(m).partitions, updates[m.metadata.dst_node_id]), reply_to=m)
        for m in asked
        if m.metadata.dst_node_id in updates
    ]


def step(strategy: RoundStrategy, replies: Iterable[Message], server_round: int = 1) -> Tensor:
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    assert metrics is None  # nothing but the prompt leaves
    return messages.from_arrays(arrays)


def unit(index: int, length: float = 1.0) -> Tensor:
    """Length times a unit vector along entry ``index``."""
    vector = torch.zeros(6)
    vector[index] = length
    return vector.reshape(SHAPE)


GOOD = {node: unit(i, 0.5) for i, node in enumerate(NODES)}


# --- sums and divisors ------------------------------------------------------------------------------------------------


def test_without_privacy_the_step_is_the_mean():
    strategy = make()
    moved = step(strategy, replies_to(ask(strategy), {n: torch.full(SHAPE, float(i)) for i, n in enumerate(NODES)}))
    torch.testing.assert_close(moved, torch.full(SHAPE, 1.5))  # (0 + 1 + 2 + 3) / 4


def test_the_server_learning_rate_scales_the_step():
    strategy = make(server_learning_rate=2.0)
    start = torch.ones(SHAPE)
    moved = step(strategy, replies_to(ask(strategy, start=start), {n: torch.full(SHAPE, 3.0) for n in NODES}))
    torch.testing.assert_close(moved, torch.full(SHAPE, 7.0))  # 1 + 2 * 3


def test_fedavg_weighs_by_examples_and_divides_by_the_sum_of_weights():
    strategy = make(FedAvg)
    moved = step(strategy, replies_to(ask(strategy), {n: torch.full(SHAPE, float(i)) for i, n in enumerate(NODES)}))
    # weights n/40: 1/4, 1/2, 3/4, 1; sum of weighted updates 0/4 + 1/2 + 2*3/4 + 3 = 5, divisor 2.5
    torch.testing.assert_close(moved, torch.full(SHAPE, 2.0))
    assert strategy.divisor() == pytest.approx(2.5)


def test_client_level_clips_each_update_and_divides_by_the_expected_cohort():
    strategy = make(privacy=client_level(rate=0.75))
    assert strategy.divisor() == pytest.approx(3.0)  # 0.75 * 4
    # the cohort below is everybody (0.5 < 0.75): lengths 5 and 2 are cut to 1, 0.5 stays
    updates = {NODES[0]: unit(0, 5.0), NODES[1]: unit(1, 2.0), NODES[2]: unit(2, 0.5), NODES[3]: unit(3, 1.0)}
    moved = step(strategy, replies_to(ask(strategy), updates)).reshape(-1)
    torch.testing.assert_close(moved, torch.tensor([1, 1, 0.5, 1, 0, 0]) / 3)


def test_the_divisor_does_not_follow_who_took_part():
    whole, part = make(privacy=client_level()), make(privacy=client_level())
    everybody = step(whole, replies_to(ask(whole), GOOD))
    alone = step(part, replies_to(ask(part), {NODES[0]: GOOD[NODES[0]]}))
    assert part.failures == 3
    assert float(alone[0, 0]) == float(everybody[0, 0])


def test_sums_over_records_are_divided_by_the_expected_batches_and_reach_no_further_than_their_records():
    masses = {i: 0.1 * n for i, n in enumerate(SIZES)}  # q * n_i: 1, 2, 3, 4
    privacy = ServerPrivacy(
        unit="record", bound=0.5, noise_multiplier=1.0, sampling_rate=0.1, ledger_multiplier=1.0, ledger=None
    )
    strategy = make(privacy=privacy, masses=masses)
    moved = step(strategy, replies_to(ask(strategy), {n: unit(0, 4.0) for n in NODES}))
    assert float(moved[0, 0]) == pytest.approx(1.6)  # 4 * 4 / 10: none is above 0.5 * n_i
    strategy = make(privacy=privacy, masses=masses)
    moved = step(strategy, replies_to(ask(strategy), {n: unit(0, 1e30) for n in NODES}))
    assert float(moved[0, 0]) == pytest.approx(5.0)  # 0.5 * (10 + 20 + 30 + 40) / 10
    assert strategy.sensitivity() == pytest.approx(0.05)  # 0.5 / 10: everyone is asked, q is in the batch


class Heavy(DPFPL):
    """Weights far outside [0, 1]."""

    def weight(self, num_examples: int) -> float:
        return 5.0 if num_examples > 15 else -1.0


def test_weights_are_clamped():
    strategy = make(Heavy, client_level(rate=1.0))
    assert strategy.divisor() == pytest.approx(3.0)  # 0 + 1 + 1 + 1
    moved = step(strategy, replies_to(ask(strategy), GOOD)).reshape(-1)
    torch.testing.assert_close(moved, torch.tensor([0, 0.5, 0.5, 0.5, 0, 0]) / 3)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["good", "failing", "empty cohort"])
def test_noise_has_the_stated_scale_whoever_takes_part(who: str):
    z, bound, rate = 1.5, 0.4, 0.75
    strategy = make(privacy=client_level(z, 1e-12 if who == "empty cohort" else rate, bound), sources=KeyedRandom)
    strategy_sensitivity = strategy.sensitivity()
    draws = []
    for server_round in range(1, 401):
        asked = ask(strategy, server_round)
        answers = replies_to(asked, {n: torch.zeros(SHAPE) for n in NODES}) if who == "good" else []
        draws.append(step(strategy, answers, server_round).double() / strategy_sensitivity)
    noise = torch.stack(draws)
    # 2400 draws: the standard error of the deviation is 1/sqrt(4800) = 1.4 %; 5 of them.
    assert float(noise.std()) == pytest.approx(z, rel=0.07)
    assert abs(float(noise.mean())) < 5 * z / math.sqrt(2400)
    if who == "good":
        assert strategy_sensitivity == pytest.approx(bound / (rate * 4))


def test_rounds_do_not_share_noise():
    strategy = make(privacy=client_level(), sources=KeyedRandom)
    one, two = (step(strategy, [], r) for r in (1, 2) if ask(strategy, r) is not None)
    assert not torch.equal(one, two)


class Doubling(DPFPL):
    """Sees what `server_update` sees."""

    def server_update(self, prompt: Tensor, diff: Tensor) -> Tensor:
        self.state["seen"] = diff.clone()
        return prompt + 2 * diff


def test_server_update_runs_after_the_noise():
    strategy = make(Doubling, client_level(), sources=KeyedRandom)
    ask(strategy)
    moved = step(strategy, [])
    assert float(strategy.state["seen"].abs().min()) > 0  # nobody answered: what it saw is noise alone
    torch.testing.assert_close(moved, 2 * strategy.state["seen"])


def test_the_ledger_is_on_disk_before_the_noise_is_drawn(tmp_path: Path):
    ledger, seen = tmp_path / "ledger.jsonl", []

    class Looking(Silent):
        def uniforms(self, count: int) -> np.ndarray:
            seen.append(len(ledger.read_text().splitlines()) if ledger.exists() else 0)
            return super().uniforms(count)

    def sources(key: StreamKey) -> RandomSource:
        return Looking() if key.purpose == "server-noise" else Silent()

    strategy = make(privacy=client_level(2.0, ledger=Ledger(ledger)), sources=sources)
    for server_round in (1, 2):
        ask(strategy, server_round)
        step(strategy, [], server_round)
    assert seen == [1, 2]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(e["unit"], e["server_round"], e["sampling_rate"], e["noise_multiplier"]) for e in lines] == [
        ("client", 1, 0.75, 2.0),
        ("client", 2, 0.75, 2.0),
    ]


def test_a_full_disk_stops_the_round_before_the_noise(tmp_path: Path):
    (tmp_path / "file").write_text("")
    strategy = make(privacy=client_level(ledger=Ledger(tmp_path / "file" / "ledger.jsonl")))
    start = torch.ones(SHAPE)
    ask(strategy, start=start)
    with pytest.raises(OSError):  # noqa: PT011 - the system's own words
        strategy.aggregate_train(1, [])


# --- broken clients ---------------------------------------------------------------------------------------------------


ONE = (1, *SHAPE)
"""A stack of one upload."""


def reply_with(arrays: ArrayRecord | MetricRecord | None, partitions: Sequence[int] = (0,)) -> RecordDict:
    who = ConfigRecord({"partitions": list(partitions), "failed": [], "reasons": []})
    return RecordDict({"clients": who} if arrays is None else {"arrays": arrays, "clients": who})


def arrays_of(**arrays: np.ndarray) -> RecordDict:
    return reply_with(ArrayRecord({name: Array(value) for name, value in arrays.items()}))


def bytes_of(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
    return reply_with(ArrayRecord({"upload": Array(dtype="float32", shape=ONE, stype=stype, data=data)}))


def nan_at(value: float) -> np.ndarray:
    upload = np.zeros(ONE, np.float32)
    upload[0, 1, 2] = value
    return upload


with np.errstate(over="ignore"):
    OVERFLOWED = np.full(ONE, 7e4).astype(np.float16)  # above 65,504: infinite

BROKEN = {
    "nan": arrays_of(upload=nan_at(math.nan)),
    "inf": arrays_of(upload=nan_at(math.inf)),
    "minus inf": arrays_of(upload=nan_at(-math.inf)),
    "fp16 overflow": arrays_of(upload=OVERFLOWED),
    "wrong shape": arrays_of(upload=np.zeros((1, 3, 2), np.float32)),
    "no stack": arrays_of(upload=np.zeros(SHAPE, np.float32)),
    "flat": arrays_of(upload=np.zeros(6, np.float32)),
    "no entries": arrays_of(upload=np.zeros((1, 0, 3), np.float32)),
    "two for one": arrays_of(upload=np.zeros((2, *SHAPE), np.float32)),
    "integers": arrays_of(upload=np.ones(ONE, np.int64)),
    "booleans": arrays_of(upload=np.ones(ONE, np.bool_)),
    "complex": arrays_of(upload=np.ones(ONE, np.complex64)),
    "other name": arrays_of(diff=np.ones(ONE, np.float32)),
    "extra array": arrays_of(upload=np.ones(ONE, np.float32), personal=np.ones(ONE, np.float32)),
    "no array": arrays_of(),
    "no arrays": reply_with(None),
    "nothing": RecordDict(),
    "metrics for arrays": reply_with(MetricRecord({"upload": 1.0})),
    "damaged bytes": bytes_of(b"junk"),
}
OTHERS = {
    "empty bytes": bytes_of(b""),
    "other serialization": bytes_of(b"junk", "other"),
    "text": arrays_of(upload=np.full(ONE, "text")),
}
"""Uploads on which Flower, numpy or torch raise neither KeyError nor ValueError."""


@pytest.mark.parametrize(
    "name",
    [
        *BROKEN,
        "error reply",
        "no reply",
        *OTHERS,
    ],
)
def test_a_broken_client_is_a_zero_under_dp(name: str):
    strategy, without = make(privacy=client_level()), make(privacy=client_level())
    asked = ask(strategy)
    answers = replies_to(asked, {n: GOOD[n] for n in NODES[1:]})
    (bad,) = (m for m in asked if m.metadata.dst_node_id == NODES[0])
    if name == "error reply":
        answers.append(Message(Error(2, "boom"), reply_to=bad))
    elif name != "no reply":
        answers.insert(0, Message((BROKEN | OTHERS)[name], reply_to=bad))
    moved = step(strategy, answers)
    expected = step(without, replies_to(ask(without), {**GOOD, NODES[0]: torch.zeros(SHAPE)}))
    assert torch.equal(moved, expected)
    # What a client computed from its data must not move a published count: a non-finite upload is a silent zero.
    silent = name in ("nan", "inf", "minus inf", "fp16 overflow")
    assert (strategy.failures, strategy.deliveries) == ((0, 4) if silent else (1, 3))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nan", "not finite"),
        ("wrong shape", r"\(1, 3, 2\)"),
        ("integers", "int64"),
        ("extra array", "personal"),
        ("no arrays", "arrays"),
        ("error reply", "boom"),
        ("no reply", "no reply"),
    ],
)
def test_without_dp_a_broken_client_ends_the_run_with_its_name(name: str, reason: str):
    strategy = make(tolerates=False)
    asked = ask(strategy, 3)
    answers = replies_to(asked, {n: GOOD[n] for n in NODES if n != NODES[2]})
    (bad,) = (m for m in asked if m.metadata.dst_node_id == NODES[2])
    if name == "error reply":
        answers.append(Message(Error(2, "boom"), reply_to=bad))
    elif name != "no reply":
        who = ConfigRecord({"partitions": [2], "failed": [], "reasons": []})
        answers.append(Message(RecordDict({**BROKEN[name], "clients": who}), reply_to=bad))
    with pytest.raises(ClientFailure, match=f"client 2 failed in round 3: .*{reason}"):
        strategy.aggregate_train(3, answers)


def test_a_member_outside_the_cohort_does_not_count():
    strategy = make(privacy=client_level(rate=0.25))  # 0.5 >= 0.25: an empty cohort
    assert ask(strategy) == []
    uninvited = [Message(RecordDict(), node, MessageType.TRAIN, group_id="1") for node in NODES]
    moved = step(strategy, [Message(upload_content(0, unit(0)), reply_to=m) for m in uninvited])
    assert torch.equal(moved, torch.zeros(SHAPE))


@pytest.mark.parametrize("size", [1e30, 1e200, 1e308])
def test_finite_giants_are_bounded_too(size: float):
    strategy = make(privacy=client_level(rate=1.0))
    moved = step(strategy, replies_to(ask(strategy), {n: torch.full(SHAPE, size, dtype=torch.float64) for n in NODES}))
    assert float(torch.linalg.vector_norm(moved)) <= 1 + 1e-6  # 4 clients of norm <= 1, over 4
