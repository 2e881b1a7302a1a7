"""Clients at their worst, as the server meets them: a bad one is exactly a zero, and the release happens all the same.

The server's noise comes from a keyed source, so that it can be drawn again here and taken off: what is left is the sum
over the clients that count. Prompts are float64, so that nothing is lost on the way.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

import fl_dualpriv.client.round
import fl_dualpriv.server.strategy
from fl_dualpriv import messages
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.flower.local import LocalGrid, run_local
from fl_dualpriv.privacy import release
from fl_dualpriv.privacy.clipping import GRID_STEPS
from fl_dualpriv.privacy.integer import rounded_gaussian
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.noise import KeyedRandom, RandomSource, StreamKey, gaussian_noise
from fl_dualpriv.server.accounting import ServerPrivacy
from fl_dualpriv.server.strategy import ClientFailure, RoundStrategy
from strategies.dpfpl import DPFPL
from tests.made_strategy import made_strategy

ROOT = Path(__file__).parents[2]
SHAPE, ONE, SIZES = (2, 3), (1, 2, 3), (10, 20, 30, 40)
BOUND, MULTIPLIER = 0.5, 1.5

Unit = Literal["client", "record"]
Arithmetic = Literal["float", "integer"]
pytestmark = pytest.mark.usefixtures("flower_task")
LEVELS = pytest.mark.parametrize(
    ("unit", "arithmetic"),
    [("client", "float"), ("client", "integer"), ("record", "float"), ("record", "integer")],
    ids=["clients, float", "clients, integer", "records, float", "records, integer"],
)


def server(
    unit: Unit,
    arithmetic: Arithmetic,
    ledger: Path | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    rate: float = 1.0,
    seed: int = 0,
    rounds: int = 3,
) -> RoundStrategy:
    """The client level, or the record level with a trusted server."""
    privacy = ServerPrivacy(
        unit=unit,
        bound=BOUND,
        noise_multiplier=MULTIPLIER,
        sampling_rate=rate,
        ledger_multiplier=MULTIPLIER,
        ledger=None if ledger is None else Ledger(ledger),
        arithmetic=arithmetic,
    )
    return made_strategy(
        DPFPL,
        privacy,
        sizes=sizes,
        nodes=[p + 1 for p in range(len(sizes))],  # as a LocalGrid numbers them
        masses={p: 1.0 if unit == "client" else 0.1 * n for p, n in enumerate(sizes)},
        rounds=rounds,
        seed=seed,
    )


def noise_of(strategy: RoundStrategy, server_round: int = 1) -> Tensor:
    """What must be on the sum of a round, in its units: std z·S."""
    key = StreamKey(seed=strategy.seed, purpose="server-noise", server_round=server_round)
    source: RandomSource = KeyedRandom(key)
    assert strategy.privacy is not None
    if strategy.privacy.arithmetic == "float":
        # Drawn for the quotient: N(0, (zS/divisor)²), the same digits.
        return gaussian_noise(source, SHAPE, MULTIPLIER * BOUND)
    return rounded_gaussian(source, SHAPE, MULTIPLIER * GRID_STEPS) * (BOUND / GRID_STEPS)


def ask(strategy: RoundStrategy, server_round: int = 1, start: Tensor | None = None) -> list[Message]:
    prompt = torch.zeros(SHAPE, dtype=torch.float64) if start is None else start
    return list(strategy.configure_train(server_round, messages.to_arrays(prompt), ConfigRecord(), grid=None))  # type: ignore[arg-type]


def clean_sum(strategy: RoundStrategy, replies: Iterable[Message], server_round: int = 1) -> Tensor:
    """The step of the real round, times the public divisor, less the noise: the sum over the clients that count."""
    arrays, metrics = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    assert metrics is None
    return messages.from_arrays(arrays) * strategy.divisor() - noise_of(strategy, server_round)


def good(strategy: RoundStrategy, partition: int) -> Tensor:
    """An honest upload, within every bound; in integers at the record level it is made of grid units."""
    value = torch.zeros(6, dtype=torch.float64)
    value[partition] = 0.25
    assert strategy.privacy is not None
    in_units = strategy.privacy.arithmetic == "integer" and strategy.privacy.unit == "record"
    return value.reshape(SHAPE) * (GRID_STEPS / BOUND if in_units else 1.0)


def expected(partitions: Iterable[int]) -> Tensor:
    """The sum of honest uploads in real units: 0.25 in an entry of each client's own."""
    total = torch.zeros(6, dtype=torch.float64)
    total[list(partitions)] = 0.25
    return total.reshape(SHAPE)


def answer(message: Message, value: Tensor | RecordDict) -> Message:
    if isinstance(value, Tensor):
        value = messages.uploads_content(
            messages.Uploads(partitions=messages.read_train(message).partitions, values=value[None])
        )
    return Message(value, reply_to=message)


def assert_sum(found: Tensor, total: Tensor) -> None:
    torch.testing.assert_close(found, total, atol=1e-12, rtol=0)


# --- uploads that count for nothing -----------------------------------------------------------------------------------


def content(arrays: ArrayRecord | MetricRecord | None, partitions: Sequence[int] = (0,)) -> RecordDict:
    who = ConfigRecord({"partitions": list(partitions), "failed": [], "reasons": []})
    return RecordDict({"clients": who} if arrays is None else {"arrays": arrays, "clients": who})


def arrays_of(**arrays: np.ndarray) -> RecordDict:
    return content(ArrayRecord({name: Array(value) for name, value in arrays.items()}))


def entry(value: float, dtype: Any = np.float64) -> RecordDict:
    upload = np.zeros(ONE, dtype)
    upload[0, 1, 2] = value
    return arrays_of(upload=upload)


with np.errstate(over="ignore"):
    OVERFLOWED = np.full(ONE, 7e4).astype(np.float16)  # above 65,504: infinite

SILENT = {
    "zero": arrays_of(upload=np.zeros(ONE, np.float32)),
    "zero, float16": arrays_of(upload=np.zeros(ONE, np.float16)),
    "minus zero": arrays_of(upload=np.full(ONE, -0.0)),
    "subnormal": arrays_of(upload=np.full(ONE, 5e-324)),
    "float32 subnormal": arrays_of(upload=np.full(ONE, 1e-45, np.float32)),
    "float16 subnormal, cut": arrays_of(upload=np.full(ONE, 1e-20, np.float16)),  # zero when converted
    "nan": entry(math.nan),
    "all nan": arrays_of(upload=np.full(ONE, math.nan, np.float32)),
    "inf": entry(math.inf),
    "minus inf": entry(-math.inf, np.float32),
    "float16 overflow": arrays_of(upload=OVERFLOWED),
}
"""A client may have computed them from its data: they are zeros and no counted failure."""

FAILED = {
    "integers": arrays_of(upload=np.ones(ONE, np.int64)),
    "small integers": arrays_of(upload=np.ones(ONE, np.int8)),
    "booleans": arrays_of(upload=np.ones(ONE, np.bool_)),
    "complex": arrays_of(upload=np.ones(ONE, np.complex64)),
    "text": arrays_of(upload=np.full(ONE, "text")),
    "turned": arrays_of(upload=np.ones((1, 3, 2), np.float32)),
    "no stack": arrays_of(upload=np.ones(SHAPE, np.float32)),
    "flat": arrays_of(upload=np.ones(6, np.float32)),
    "a number": arrays_of(upload=np.array(1.0)),
    "no entries": arrays_of(upload=np.ones((1, 0, 3), np.float32)),
    "two for one": arrays_of(upload=np.ones((2, *SHAPE), np.float32)),
    "missing tensor": arrays_of(),
    "another name": arrays_of(diff=np.ones(ONE, np.float32)),
    "extra tensor": arrays_of(upload=np.ones(ONE, np.float32), personal=np.ones(ONE, np.float32)),
    "no record": content(None),
    "metrics": content(MetricRecord({"upload": 1.0})),
    "nothing": RecordDict(),
    "another's": content(ArrayRecord({"upload": Array(np.ones(ONE, np.float32))}), (1,)),
    "twice": content(ArrayRecord({"upload": Array(np.ones((2, *SHAPE), np.float32))}), (0, 0)),
}
"""Not the form of an upload, which is public: counted."""


@LEVELS
@pytest.mark.parametrize("name", [*SILENT, *FAILED, "error reply", "no reply"])
def test_a_bad_client_is_exactly_a_zero_and_the_noise_stays(
    tmp_path: Path, name: str, unit: Unit, arithmetic: Arithmetic
) -> None:
    strategy = server(unit, arithmetic, tmp_path / "ledger.jsonl")
    first, *others = ask(strategy)
    replies = [answer(m, good(strategy, p)) for p, m in enumerate(others, 1)]
    if name == "error reply":
        replies.insert(0, Message(Error(2, "boom"), reply_to=first))
    elif name != "no reply":
        replies.insert(0, answer(first, (SILENT | FAILED)[name]))
    assert_sum(clean_sum(strategy, replies), expected((1, 2, 3)))
    assert strategy.divisor() == pytest.approx(4.0 if unit == "client" else 10.0)  # everybody's, public
    assert (strategy.failures, strategy.deliveries) == ((0, 4) if name in SILENT else (1, 3))
    (event,) = Ledger(tmp_path / "ledger.jsonl").read().events
    assert (event.unit, event.releases, event.noise_multiplier) == (unit, 1, MULTIPLIER)


@LEVELS
@pytest.mark.parametrize("value", [1e308, -1.7e308, 1e200, 3.4e38, 65504.0], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["one entry", "all"])
def test_a_huge_client_moves_the_sum_by_at_most_its_bound(
    unit: Unit, arithmetic: Arithmetic, value: float, whole: bool
) -> None:
    strategy = server(unit, arithmetic)
    upload = torch.full(SHAPE, value, dtype=torch.float64)
    if not whole:
        upload[:, :2] = 0
    upload = upload.half() if value == 65504.0 else upload  # the largest float16
    first, *others = ask(strategy)
    replies = [answer(first, upload)] + [answer(m, good(strategy, p)) for p, m in enumerate(others, 1)]
    moved = clean_sum(strategy, replies) - expected((1, 2, 3))
    limit = BOUND * (1 if unit == "client" else SIZES[0])  # one update, or ten records
    assert float(moved.norm()) <= limit * (1 + 1e-9)
    assert (strategy.failures, strategy.deliveries) == (0, 4)


# --- who is there -----------------------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("case", ["one client", "one client, failed", "empty cohort", "all failed", "all silent"])
def test_the_release_happens_whoever_is_there(tmp_path: Path, unit: Unit, arithmetic: Arithmetic, case: str) -> None:
    sizes = SIZES[:1] if "one client" in case else SIZES
    rate = 1e-12 if case == "empty cohort" and unit == "client" else 1.0
    strategy = server(unit, arithmetic, tmp_path / "ledger.jsonl", sizes=sizes, rate=rate)
    for server_round in (1, 2, 3):
        asked = ask(strategy, server_round)
        assert bool(asked) == (rate == 1.0)
        if case == "one client":
            replies = [answer(asked[0], good(strategy, 0))]
        elif case == "all failed":
            replies = [Message(Error(2, "boom"), reply_to=m) for m in asked[:2]]  # the others do not answer
        elif case == "all silent":
            replies = [
                answer(m, torch.full(SHAPE, value))
                for m, value in zip(asked, (math.nan, math.inf, -math.inf, 0.0), strict=True)
            ]
        else:
            replies = []
        found = clean_sum(strategy, replies, server_round)
        assert_sum(found, expected([0] if case == "one client" else []))
        assert len(Ledger(tmp_path / "ledger.jsonl").read().events) == server_round
    failed = {"one client, failed": 3, "all failed": 12, "empty cohort": 0 if unit == "client" else 12}
    assert strategy.failures == failed.get(case, 0)


@LEVELS
def test_noise_has_full_scale_over_many_draws_of_broken_rounds(unit: Unit, arithmetic: Arithmetic) -> None:
    """As above, but from what is drawn and not from what should be."""
    broken = [SILENT["nan"], FAILED["integers"], FAILED["extra tensor"], SILENT["float16 overflow"]]
    draws = []
    for seed in range(100):
        strategy = server(unit, arithmetic, seed=seed)
        arrays, _ = strategy.aggregate_train(1, [answer(m, b) for m, b in zip(ask(strategy), broken, strict=True)])
        assert arrays is not None
        draws.append(messages.from_arrays(arrays) * strategy.divisor())
    # 100 · 6 draws: the standard error of the deviation is 1/sqrt(1200) = 2.9 %, 5 of them
    assert float(torch.stack(draws).std()) == pytest.approx(MULTIPLIER * BOUND, rel=0.145)


# --- replies that come twice, or late ---------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("second", ["same", "other", "broken"])
def test_a_duplicated_reply_counts_once(unit: Unit, arithmetic: Arithmetic, second: str) -> None:
    strategy = server(unit, arithmetic)
    asked = ask(strategy)
    replies = [answer(m, good(strategy, p)) for p, m in enumerate(asked)]
    again: Tensor | RecordDict = {"same": good(strategy, 0), "other": good(strategy, 4), "broken": FAILED["flat"]}[
        second
    ]
    replies += [answer(asked[0], again)] * 2
    assert_sum(clean_sum(strategy, replies), expected(range(4)))
    assert (strategy.failures, strategy.deliveries) == (0, 4)


class SlowGrid(LocalGrid):
    """Node 1's reply to the first round is there only when the second is asked for."""

    def __init__(self, client_app: ClientApp, num_supernodes: int) -> None:
        super().__init__(client_app, num_supernodes, {})
        self.held: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        late = [m for m in replies if m.metadata.src_node_id == 1 and m.metadata.group_id == "1"]
        arrived, self.held = self.held, late
        return [m for m in replies if m not in late] + arrived


@LEVELS
def test_a_late_reply_is_a_zero_in_its_round_and_in_the_next(
    tmp_path: Path, unit: Unit, arithmetic: Arithmetic
) -> None:
    """Through Flower's own loop, with a grid that hands the late reply in with those of the next round."""
    app = ClientApp()
    strategy = server(unit, arithmetic, tmp_path / "ledger.jsonl", rounds=2)
    prompts: list[Tensor] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task = messages.read_train(message)
        (partition,) = task.partitions
        if partition == 0:
            prompts.append(task.global_prompt)
        # Something else in the first round, so that it can be told.
        return answer(message, good(strategy, 5 if task.server_round == 1 and partition == 0 else partition))

    start = torch.zeros(SHAPE, dtype=torch.float64)
    result = strategy.start(SlowGrid(app, len(SIZES)), messages.to_arrays(start), 2, 1.0)
    end = messages.from_arrays(result.arrays)
    first, second = (prompts[1] - prompts[0], end - prompts[1])
    assert_sum(first * strategy.divisor() - noise_of(strategy, 1), expected((1, 2, 3)))
    assert_sum(second * strategy.divisor() - noise_of(strategy, 2), expected((0, 1, 2, 3)))
    assert (strategy.failures, strategy.deliveries) == (1, 7)
    assert len(Ledger(tmp_path / "ledger.jsonl").read().events) == 2


# --- a whole run whose clients all fail -------------------------------------------------------------------------------

RUNS = {
    "client level": {"privacy.record.mechanism": "none", "privacy.client.mechanism": "gaussian"},
    "trusted server": {"privacy.record.trusts-server": True, "train.local-steps": 1, "method": "promptfl"},
    "record level": {},
}


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("level", RUNS)
def test_a_run_whose_clients_all_fail_makes_its_releases_and_ends_with_an_error(
    make_run_context: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, arithmetic: str
) -> None:
    changes = {
        "population": 2,
        "privacy.arithmetic": arithmetic,
        "privacy.client.calibrate-to": "noise-multiplier",
        "privacy.client.noise-multiplier": MULTIPLIER,
        "privacy.record.noise-multiplier": MULTIPLIER,
        "privacy.client.delta": 1e-3,
        "privacy.client.expected-cohort": 2.0,
        "output.dir": str(tmp_path / "out"),
    }
    config = make_run_context(changes | RUNS[level]).config

    def boom(**arguments: Any) -> None:
        raise RuntimeError("boom")

    drawn: list[float] = []

    def noting(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(source: RandomSource, shape: tuple[int, ...], std: float) -> Tensor:
            drawn.append(std)
            return draw(source, shape, std)

        return noted

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", boom)
    monkeypatch.setattr(fl_dualpriv.server.strategy, "gaussian_noise", noting(gaussian_noise))
    monkeypatch.setattr(release, "rounded_gaussian", noting(rounded_gaussian))
    # At the client level the server is trusted with what a client says.
    reason = "boom" if level == "client level" else "its message is in the log"
    with pytest.raises(ClientFailure, match=f"all 6 calls of clients failed.*RuntimeError[:;] {reason}"):
        run_local(ROOT, app_defaults(ROOT) | config.to_run_config())
    assert (tmp_path / "out" / "error.json").exists()
    events = Ledger(tmp_path / "out" / "ledger.jsonl").read().events
    if level == "record level":  # the clients' own ledgers: what they would have released is written, and nothing was
        assert (events, drawn) == ((), [])
        for p in (0, 1):
            own = Ledger(tmp_path / "out" / "clients" / f"client-{p:03d}" / "ledger.jsonl").read()
            assert own.last_round(own.events[0].run) == len(own.events) == 3
        return
    assert [event.server_round for event in events] == [1, 2, 3]
    # 22 training images in all, a batch of 0.15 of them; clip norms 1; in sums over records a step of 0.5 is in it
    scale = 0.5 if level == "trusted server" else 1.0
    divisor = 0.15 * 22 if level == "trusted server" else 2.0
    expected_std = MULTIPLIER * (scale / divisor if arithmetic == "float" else GRID_STEPS)
    assert drawn == [pytest.approx(expected_std)] * 3
