"""Let a message expire when the server no longer waits for its reply, so that no node spends its budget on it.

Flower's time limit ends only the server's wait. The message itself lives for hours. A node that was off or slow would
process the rounds that it missed one by one, spend ε on each for replies that no server reads, and so be late again.
"""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

SLACK = 30.0
"""Seconds by which a message outlives the wait for its reply: clocks differ, and the reply inherits the lifetime."""


class ExpiringGrid(Grid):
    """Flower's grid of a deployment, with a lifetime for each message.

    Guarantee:
        If a message is sent and its reply is awaited with a time limit, no node receives the message later than `SLACK`
        seconds after that limit, by the clock of the server.

    Args:
        grid: Flower's grid, which carries the messages.
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
        """See `Grid`. With a time limit, a message lives until `SLACK` seconds after it at most."""
        sent = list(messages)
        if timeout is not None:
            for message in sent:
                message.metadata.ttl = min(message.metadata.ttl, timeout + SLACK)
        return self._grid.send_and_receive(sent, timeout=timeout)
