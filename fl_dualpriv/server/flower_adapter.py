"""Any strategy of Flower's under our rounds: it aggregates what clients uploaded; who is asked and how stays ours.

It sees what it would see under Flower: each client's prompt as an ArrayRecord, and its number of examples.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.plan import ServerUnit
from fl_dualpriv.server.plugins import FLOWER_TABLE, Value, read_table
from fl_dualpriv.server.strategy import RoundStrategy

_ARRAY = "global-prompt"
_OURS = {
    **{f"fraction_{what}": 1.0 for what in ("train", "evaluate")},
    # One is enough: fewer than Flower's two would make it wait for ever.
    **{f"min_{what}_nodes": 1 for what in ("train", "evaluate", "available")},
    **{"weighted_by_key": "num-examples", "arrayrecord_key": "arrays", "configrecord_key": "config"},
}
"""Arguments that say who is asked, and names in messages: of rounds, and so ours."""
_UNFIT = {
    "FedProx": "its proximal term is in the loss of the clients, and ours have none; its aggregate is that of FedAvg",
    "QFedAvg": "it weighs clients by their training losses, which are functions of private data and never uploaded",
    "FedXgbBagging": "it merges trees, not prompts",
    "FedXgbCyclic": "it passes trees from client to client, and does not merge prompts",
    **dict.fromkeys(
        [name for name in strategy.__all__ if name.startswith("DifferentialPrivacy")],
        "it noises in a way that no ledger here counts; set privacy.client.mechanism instead",
    ),
}


class _Nodes(Grid):
    """As many nodes as clients; no message passes through it."""

    def __init__(self, count: int) -> None:
        self._count = count

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self._count + 1)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise ConfigError("a strategy that sends messages of its own cannot run here: rounds are fl-dualpriv's")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.push_messages(messages)
        return []


@dataclass(kw_only=True)
class FlowerStrategy(RoundStrategy):
    """A Flower strategy as aggregation rule; without noise of the server, which it knows nothing of.

    Guarantee:
        None of its own: it may weigh by counts that are private and keep what it likes. What clients noised stays
        private under it (post-processing). Its memory lies in ``state`` after each round and is read from there before
        the next, so that a resumed run goes on as if it had not stopped.

    A client that failed is not among the replies, as under Flower.

    Args:
        inner_class: The strategy.
        arguments: Its own.
    """

    proved_for: ClassVar[tuple[ServerUnit, ...]] = ()
    unproved_because: ClassVar[str] = (
        "strategies of Flower's bound nobody's influence, so no noise can be scaled to them; take one of strategies/"
    )

    inner_class: type[Strategy]
    arguments: dict[str, Value]
    _inner: Any = field(default=None, init=False)

    def check_options(self) -> None:
        """Build the strategy: it refuses bad options itself."""
        try:
            self._inner = self.inner_class(**self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.inner_class.__name__} refuses its options: {error}") from error

    def _step(self, server_round: int, partitions: Sequence[int], diffs: Tensor) -> Tensor:
        """Give it the clients' prompts, take its aggregate."""
        if not partitions:
            return self._prompt
        start = self._prompt.to(torch.float64)
        _restore(self._inner, self.state)
        # Many keep the round's start when they write its messages; the messages themselves are ours.
        list(self._inner.configure_train(server_round, _record(start), ConfigRecord(), _Nodes(len(self.cards))))
        replies = []
        for partition, diff in zip(partitions, diffs.unbind(), strict=True):
            metrics = MetricRecord({"num-examples": self.num_examples[partition]})
            content = RecordDict({"arrays": _record(start + diff), "metrics": metrics})
            asked = Message(RecordDict(), partition + 1, MessageType.TRAIN, group_id=str(server_round))
            replies.append(Message(content, reply_to=asked))
        arrays, _ = self._inner.aggregate_train(server_round, replies)
        name = self.inner_class.__name__
        if arrays is None:
            raise ConfigError(f"{name} makes no aggregate of {len(partitions)} uploads: its options want more clients")
        if list(arrays) != [_ARRAY]:
            raise ValueError(f"{name} returned arrays {sorted(arrays)}; expected {_ARRAY!r} alone")
        self.state = _memory(self._inner, self.inner_class(**self.arguments))
        return torch.from_numpy(np.array(arrays[_ARRAY].numpy()))


def adapt(found: type[Strategy], flat: Mapping[str, Value]) -> tuple[type[RoundStrategy], dict[str, object]]:
    """The adapter of one of Flower's strategies, and its arguments; options have keys ``plugin.flower.<argument>``.

    Raises:
        ConfigError: For one that cannot run here, with the reason, or an option that does not fit.
    """
    for base in found.__mro__:
        if base.__module__.startswith("flwr.") and base.__name__ in _UNFIT:
            raise ConfigError(f"strategy.ref names {found.__name__}, which cannot run here: {_UNFIT[base.__name__]}")
    takes = {
        name: parameter.default
        for name, parameter in inspect.signature(found).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    empty = inspect.Parameter.empty
    own = {n: d for n, d in takes.items() if n not in _OURS and (d is empty or isinstance(d, bool | int | float | str))}
    options = read_table(FLOWER_TABLE, found.__name__, own, flat, none=empty)
    if missing := [name for name, default in own.items() if default is empty and name not in options]:
        keys = ", ".join(FLOWER_TABLE + name.replace("_", "-") for name in missing)
        raise ConfigError(f"strategy.ref names {found.__name__}, which has no default for {keys}: give it")
    ours = {name: value for name, value in _OURS.items() if name in takes}
    # A class of its name: messages speak of it.
    return type(found.__name__, (FlowerStrategy,), {}), {"inner_class": found, "arguments": {**ours, **options}}


def _record(prompt: Tensor) -> ArrayRecord:
    return ArrayRecord({_ARRAY: Array(prompt.numpy())})


# --- its memory, as tensors -------------------------------------------------------------------------------------------


def _memory(inner: object, fresh: object) -> dict[str, Tensor]:
    """Attributes that are not as in a fresh instance: ``attribute/kind/name`` → a copy.

    Raises:
        ConfigError: For one that is neither number nor array nor a flat container of arrays: no run could be resumed.
    """
    found: dict[str, Tensor] = {}
    for name, value in vars(inner).items():
        before = vars(fresh).get(name)
        if value is before or callable(value) or (isinstance(value, bool | int | float | str) and value == before):
            continue
        kind, parts = _parts(value)
        if kind is None:
            raise ConfigError(
                f"{type(inner).__name__} remembers {name}, a {type(value).__name__}, which a checkpoint cannot hold; "
                "numbers, numpy arrays, lists and dicts of them, and ArrayRecords can be"
            )
        found |= {f"{name}/{kind}/{part}": torch.from_numpy(np.array(array)) for part, array in parts.items()}
    return found


def _parts(value: object) -> tuple[str | None, dict[str, np.ndarray]]:
    if isinstance(value, ArrayRecord):
        return "record", {part: array.numpy() for part, array in value.items()}
    if isinstance(value, bool | int | float | np.number):
        return "number", {"": np.asarray(value)}
    if isinstance(value, np.ndarray):
        return "array", {"": value}
    if isinstance(value, list) and all(isinstance(part, np.ndarray) for part in value):
        return "list", {f"{i:06d}": part for i, part in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(part, np.ndarray) for part in value.values()):
        return "dict", {str(part): array for part, array in value.items()}
    return None, {}


def _restore(inner: object, state: Mapping[str, Tensor]) -> None:
    """Undo `_memory`."""
    kept: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, tensor in sorted(state.items()):
        name, kind, part = key.split("/", 2)
        kept.setdefault((name, kind), {})[part] = tensor.numpy().copy()
    for (name, kind), parts in kept.items():
        match kind:
            case "record":
                value: object = ArrayRecord({part: Array(array) for part, array in parts.items()})
            case "list":
                value = list(parts.values())
            case "dict":
                value = parts
            case _:
                value = parts[""].item() if kind == "number" else parts[""]
        setattr(inner, name, value)
