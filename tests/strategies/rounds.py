"""Rounds of a strategy over hand-made uploads, one client a node; no noise, and all join at rates above a half."""

from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from fl_dualpriv import messages
from fl_dualpriv.server.strategy import RoundStrategy, ServerPrivacy
from tests.made_strategy import made_strategy, quiet, training_messages


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
    return made_strategy(cls, privacy, quiet, sizes=sizes, nodes=[100 - i for i in range(len(sizes))], **options)


def play(strategy: RoundStrategy, uploads: Sequence[Tensor | None], server_round: int, start: Tensor) -> Tensor:
    """One round; a client whose upload is None does not answer."""
    replies = []
    for message in training_messages(strategy, server_round, start):
        (partition,) = messages.read_train(message).partitions
        if (upload := uploads[partition]) is not None:
            content = messages.uploads_content(messages.Uploads(partitions=(partition,), values=upload[None]))
            replies.append(Message(content, reply_to=message))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    assert arrays is not None
    return messages.from_arrays(arrays).to(torch.float64)
