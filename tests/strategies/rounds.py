"""Rounds of a strategy over hand-made uploads, one client a node; no noise, and all join at rates above a half."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fl_dualpriv import wire
from fl_dualpriv.privacy.noise import RandomSource, StreamKey
from fl_dualpriv.privacy.plan import round_terms
from fl_dualpriv.server import RoundStrategy, ServerPrivacy


class Zeros:
    """A source whose noise is exactly zero: the quantile of one half."""

    reproducible = True

    def words(self, count: int) -> np.ndarray:
        raise NotImplementedError

    def uniforms(self, count: int) -> np.ndarray:
        return np.full(count, 0.5)


def quiet(key: StreamKey) -> RandomSource:
    return Zeros()


def client_level(rate: float = 0.75, bound: float = 1.0) -> ServerPrivacy:
    return ServerPrivacy(
        unit="client", bound=bound, noise_multiplier=1.0, sampling_rate=rate, ledger_multiplier=1.0, ledger=None
    )


def record_level() -> ServerPrivacy:
    return ServerPrivacy(
        unit="record", bound=1.0, noise_multiplier=1.0, sampling_rate=0.1, ledger_multiplier=1.0, ledger=None
    )


def make(
    cls: type[RoundStrategy],
    privacy: ServerPrivacy | None = None,
    *,
    sizes: Sequence[int] = (1, 1, 1, 1),
    **options: Any,
) -> Any:
    # Messages cannot be made outside a Flower task.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 0
    return cls(
        cards={i: wire.ClientCard(partition=i, num_examples=n) for i, n in enumerate(sizes)},
        hosts={i: 100 - i for i in range(len(sizes))},
        masses=dict.fromkeys(range(len(sizes)), 1.0),
        num_rounds=3,
        evaluate_every=0,
        prompt_kind="global",
        run_token="token",
        terms=round_terms(None, 0.1, 1),
        tolerates_failures=True,
        privacy=privacy,
        sources=quiet,
        seed=0,
        report=lambda report: None,
        **options,
    )


def play(strategy: RoundStrategy, uploads: Sequence[Tensor | None], server_round: int, start: Tensor) -> Tensor:
    """One round; a client whose upload is None does not answer."""
    replies = []
    for message in strategy.configure_train(server_round, wire.to_arrays(start), ConfigRecord(), None):  # type: ignore[arg-type]
        (partition,) = wire.read_train(message).partitions
        if (upload := uploads[partition]) is not None:
            content = wire.uploads_content(wire.Uploads(partitions=(partition,), values=upload[None]))
            replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return wire.from_arrays(arrays).to(torch.float64)
