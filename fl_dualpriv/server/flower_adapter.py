"""Adapter of Flower's strategies to fl-dualpriv's rounds: a strategy only aggregates the clients' uploads.

The rounds decide which clients are asked, and how. The strategy sees the same inputs as under Flower: each client's
prompt as an ArrayRecord, and its number of examples.
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

from fl_dualpriv.config.plugins import FLOWER_TABLE, Value, read_table
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.privacy.plan import ServerUnit
from fl_dualpriv.server.strategy import RoundStrategy

_ARRAY = "global-prompt"
_OURS = {
    **{f"fraction_{what}": 1.0 for what in ("train", "evaluate")},
    # One node is enough: with Flower's default of two, a smaller run would wait forever.
    **{f"min_{what}_nodes": 1 for what in ("train", "evaluate", "available")},
    **{"weighted_by_key": "num-examples", "arrayrecord_key": "arrays", "configrecord_key": "config"},
}
"""Arguments that the rounds set themselves: the choice of clients, and names in messages."""
_UNFIT = {
    "FedProx": "its proximal term is part of the clients' loss, which has no such term here; its aggregate is FedAvg's",
    "QFedAvg": "it weighs clients by their training losses, which are functions of private data and never uploaded",
    "FedXgbBagging": "it merges trees, not prompts",
    "FedXgbCyclic": "it passes trees from client to client, and does not merge prompts",
    **dict.fromkeys(
        [name for name in strategy.__all__ if name.startswith("DifferentialPrivacy")],
        "it noises in a way that no ledger here counts; set privacy.client.mechanism instead",
    ),
}


class _Nodes(Grid):
    """A grid with one node per client, through which no message passes."""

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
        raise ConfigError("a strategy that sends messages itself cannot run here: fl-dualpriv sends those of a round")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self.push_messages(messages)
        return []


@dataclass(kw_only=True)
class FlowerStrategy(RoundStrategy):
    """A Flower strategy as aggregation rule, without noise of the server.

    Guarantee:
        The strategy itself has none: it may weigh by private counts and keep any values. What clients noised stays
        private under it (post-processing). Its memory is written to ``state`` after each round and read from there
        before the next, so that a resumed run continues as if it had not stopped.

    A client that failed is not among the replies, as under Flower.

    Args:
        inner_class: Class of the Flower strategy.
        arguments: Arguments of the Flower strategy.
    """

    proved_for: ClassVar[tuple[ServerUnit, ...]] = ()
    unproved_because: ClassVar[str] = (
        "Flower's strategies do not bound the influence of a client, so no noise can be scaled to them; use a strategy "
        "of strategies/"
    )

    inner_class: type[Strategy]
    arguments: dict[str, Value]
    _inner: Any = field(default=None, init=False)

    def check_options(self) -> None:
        """Build the strategy, which refuses bad options itself."""
        try:
            self._inner = self.inner_class(**self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.inner_class.__name__} refuses its options: {error}") from error

    def _step(self, server_round: int, partitions: Sequence[int], diffs: Tensor) -> Tensor:
        """Pass the clients' prompts to the strategy, and return its aggregate."""
        if not partitions:
            return self._prompt
        start = self._prompt.to(torch.float64)
        _restore(self._inner, self.state)
        # Many strategies store the start of the round when they write its messages; these messages are discarded.
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
            raise ConfigError(f"{name} makes no aggregate of {len(partitions)} uploads: its options need more clients")
        if list(arrays) != [_ARRAY]:
            raise ValueError(f"{name} returned arrays {sorted(arrays)}; expected only {_ARRAY!r}")
        self.state = _memory(self._inner, self.inner_class(**self.arguments))
        return torch.from_numpy(np.array(arrays[_ARRAY].numpy()))


def adapt(strategy_class: type[Strategy], flat: Mapping[str, Value]) -> tuple[type[RoundStrategy], dict[str, object]]:
    """Return the adapter of a Flower strategy, and its arguments; options have keys ``plugin.flower.<argument>``.

    Raises:
        ConfigError: If the strategy cannot run here, with the reason, or if an option does not fit.
    """
    for base in strategy_class.__mro__:
        if base.__module__.startswith("flwr.") and base.__name__ in _UNFIT:
            raise ConfigError(
                f"strategy.ref names {strategy_class.__name__}, which cannot run here: {_UNFIT[base.__name__]}"
            )
    takes = {
        name: parameter.default
        for name, parameter in inspect.signature(strategy_class).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    empty = inspect.Parameter.empty
    defaults = {
        n: d for n, d in takes.items() if n not in _OURS and (d is empty or isinstance(d, bool | int | float | str))
    }
    options = read_table(FLOWER_TABLE, strategy_class.__name__, defaults, flat, none=empty)
    if missing := [name for name, default in defaults.items() if default is empty and name not in options]:
        keys = ", ".join(FLOWER_TABLE + name.replace("_", "-") for name in missing)
        raise ConfigError(f"strategy.ref names {strategy_class.__name__}, which has no default for {keys}: give it")
    ours = {name: value for name, value in _OURS.items() if name in takes}
    # The adapter class has the name of the strategy, because messages show it.
    return type(strategy_class.__name__, (FlowerStrategy,), {}), {
        "inner_class": strategy_class,
        "arguments": {**ours, **options},
    }


def _record(prompt: Tensor) -> ArrayRecord:
    return ArrayRecord({_ARRAY: Array(prompt.numpy())})


# --- memory of the strategy, as tensors -------------------------------------------------------------------------------


def _memory(inner: object, fresh: object) -> dict[str, Tensor]:
    """Return copies of the attributes that differ from a fresh instance, with keys ``attribute/kind/name``.

    Raises:
        ConfigError: If an attribute is neither a number nor an array nor a flat container of arrays, because a run with
            it could not be resumed.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in vars(inner).items():
        before = vars(fresh).get(name)
        if value is before or callable(value) or (isinstance(value, bool | int | float | str) and value == before):
            continue
        kind, parts = _parts(value)
        if kind is None:
            raise ConfigError(
                f"{type(inner).__name__} remembers {name}, a {type(value).__name__}, which a checkpoint cannot hold; "
                "a checkpoint can hold numbers, numpy arrays, lists and dicts of arrays, and ArrayRecords"
            )
        tensors |= {f"{name}/{kind}/{part}": torch.from_numpy(np.array(array)) for part, array in parts.items()}
    return tensors


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
    """Set the attributes of the strategy from the result of `_memory`."""
    attributes: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, tensor in sorted(state.items()):
        name, kind, part = key.split("/", 2)
        attributes.setdefault((name, kind), {})[part] = tensor.numpy().copy()
    for (name, kind), parts in attributes.items():
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
