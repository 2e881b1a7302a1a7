"""A message lives as long as its reply is waited for, and a little longer."""

from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fl_dualpriv.flower.expiring_grid import SLACK, ExpiringGrid
from fl_dualpriv.flower.local import LocalGrid


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of the messages that reach the grid below."""
    found: list[float] = []
    push = LocalGrid._push

    def noting(self: LocalGrid, message: Message) -> Any:
        found.append(message.metadata.ttl)
        return push(self, message)

    monkeypatch.setattr(LocalGrid, "_push", noting)
    return found


def test_messages_end_with_the_waiting(lives: list[float]):
    app = ClientApp()

    @app.query()
    def answer(message: Message, _context: Any) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = ExpiringGrid(LocalGrid(app, 2, {}))
    asked = [Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()]
    unlimited = asked[0].metadata.ttl
    replies = list(grid.send_and_receive(iter(asked), timeout=40.0))
    assert len(replies) == 2
    assert all(reply.metadata.ttl <= 40.0 + SLACK for reply in replies)
    (again,) = grid.send_and_receive([Message(RecordDict(), 1, MessageType.QUERY)])
    assert not again.has_error()
    assert lives == [40.0 + SLACK, 40.0 + SLACK, unlimited]
    (short,) = grid.send_and_receive([Message(RecordDict(), 1, MessageType.QUERY, ttl=5.0)], timeout=40.0)
    assert not short.has_error()
    assert lives[-1] == 5.0
