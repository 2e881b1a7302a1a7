"""Messages that nobody waits for any more are not delivered: a node that was away must not spend its budget on them.

Flower's time limit ends the server's waiting alone; a message itself lives for hours. A node that was off, or slow,
would take the rounds that it missed one by one, spend ε on each for replies that nobody reads, and so be late again.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

SLACK = 30.0
"""Seconds that a message lives longer than its reply is waited for: clocks differ, and its reply inherits its life."""


class ExpiringGrid(Grid):
    """Flower's grid of a deployment, with a life for each message.

    Guarantee:
        A message that is sent and waited for with a time limit is handed to no node later than `SLACK` seconds after
        that limit, by the clock of the server.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """See `Grid`."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """See `Grid`."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`; messages live as long as their replies are waited for."""
        sent = list(messages)
        if timeout is not None:
            for message in sent:
                message.metadata.ttl = min(message.metadata.ttl, timeout + SLACK)
        return self._grid.send_and_receive(sent, timeout=timeout)
