"""Health line of a running node: joined or not, messages since the start, answered rounds, and the rest of the budget.

A thread of the SuperNode's process checks once a minute. It writes a line into the node's log when something changed,
and once an hour in any case. A separate process (``python -m fl_dualpriv.node.health NODE.toml``) computes the ε of the
ledger, because an accountant takes more memory than a SuperNode.
"""

import importlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_dualpriv.flower.env import TEXT
from fl_dualpriv.node.file import NodeFile, read_node_file

_log = logging.getLogger("flwr")  # the SuperNode's own log
_SILENT_SECONDS = 90.0  # an idle node asks its server every three seconds; on a busy one an answer may take long
_HOUR = 3600.0
_APART = "not joined yet"
_COUNT_SECONDS = 120.0


@dataclass(kw_only=True)
class Pulse:
    """Observed state of the SuperNode's loop.

    Attributes:
        node_id: Number by which the server knows this node; 0 before the node joined.
        heard: Time of the server's last answer, by ``clock``.
        messages: Number of messages received from the server since the start.
        clock: Function that returns the time in seconds.
    """

    node_id: int = 0
    heard: float = 0.0
    messages: int = 0
    clock: Callable[[], float] = field(default=time.monotonic)

    def watch(self, pull: Callable[..., int | None]) -> Callable[..., int | None]:
        """Wrap Flower's ``_pull_and_store_message`` and note its calls; a joined node calls it every few seconds."""

        def pull_and_note(**arguments: Any) -> int | None:
            self.node_id, self.heard = arguments["state"].get_node_id(), self.clock()
            run_id = pull(**arguments)
            self.heard = self.clock()
            self.messages += run_id is not None
            return run_id

        return pull_and_note

    def state(self) -> str:
        """Return the state in words."""
        if not self.node_id:
            return _APART
        silent = self.clock() - self.heard
        if silent > _SILENT_SECONDS:
            return f"joined, but nothing from the server for {silent:.0f} s"
        return f"joined as node {self.node_id}"


def count(node: NodeFile) -> str:
    """Return the ledger in words: rounds, and the rest of the budget. This loads the accountant."""
    if node.state_dir is None:
        return "no state-dir, so no separate ledger"
    from fl_dualpriv.privacy.filters.choose import filter_of
    from fl_dualpriv.privacy.ledger import Ledger

    content = Ledger(node.state_dir / "ledger.jsonl").read()
    message = f"{len(content.events)} rounds answered" + (
        f", {content.damaged} damaged lines" if content.damaged else ""
    )
    if node.budget is None:
        return f"{message}, no budget set"
    return f"{message}; {filter_of(node.budget).balance(content)}"


class HealthLine:
    """Writer of the health line.

    Args:
        node_file: The owner's file.
        pulse: State of the SuperNode's loop.
        seconds: Seconds between two checks.
        write: Function that receives a line.
    """

    def __init__(
        self, node_file: Path, pulse: Pulse, seconds: float, write: Callable[[str], None] = lambda line: _log.info(line)
    ) -> None:
        self._file, self._pulse, self._seconds, self._write = node_file, pulse, seconds, write
        self._node = read_node_file(node_file)
        self._last: tuple[object, ...] | None = None
        self._written = -math.inf
        self._counted: tuple[object, str] = (None, "")

    def start(self) -> None:
        """Check from now on, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="health", daemon=True).start()

    def look(self) -> None:
        """Write a line if something changed, or if the last one is an hour old."""
        joined, now = self._pulse.state(), self._pulse.clock()
        seen = (joined.partition(" for ")[0], self._pulse.messages, self._ledger_stamp())
        if seen != self._last or now - self._written >= _HOUR:
            self._write(f"health: {joined}; {self._pulse.messages} messages since the start; {self._ledger()}")
            self._last, self._written = seen, now

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:  # such as a full disk: the node and the checks go on
                _log.warning("health: %s: %s", type(error).__name__, error)
            time.sleep(self._seconds if self._last is not None and self._last[0] != _APART else 1.0)

    def _ledger_stamp(self) -> tuple[int, int] | None:
        try:
            assert self._node.state_dir is not None
            status = (self._node.state_dir / "ledger.jsonl").stat()
        except (AssertionError, OSError):
            return None
        return status.st_size, status.st_mtime_ns

    def _ledger(self) -> str:
        stamp = self._ledger_stamp()
        if self._counted[1] == "" or self._counted[0] != stamp:
            done = subprocess.run(  # -P: no module of the working folder is imported
                [sys.executable, "-P", "-m", "fl_dualpriv.node.health", str(self._file)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                env=os.environ | TEXT,
                check=False,
                timeout=_COUNT_SECONDS,
            )
            last = (done.stdout if done.returncode == 0 else done.stderr).strip().rpartition("\n")[2]
            self._counted = stamp, last if done.returncode == 0 else f"the ledger cannot be counted ({last})"
        return self._counted[1]


def install(node_file: Path, seconds: float) -> None:
    """Watch the SuperNode that this process will start. Call it after the pin, whose refusals count as messages.

    Health does not protect. On a Flower with another loop, the line says that the node has not joined.
    """
    loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
    pulse = Pulse()
    if pull := getattr(loop, "_pull_and_store_message", None):
        loop._pull_and_store_message = pulse.watch(pull)
    HealthLine(node_file, pulse, seconds).start()


if __name__ == "__main__":
    os.nice(10)  # the accountant takes seconds to load, and a round may be running
    sys.stdout.write(count(read_node_file(Path(sys.argv[1]))) + "\n")
