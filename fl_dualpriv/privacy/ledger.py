"""An append-only, human-readable record of releases: written and synced *before* each release is made."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_LOCK_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class LedgerEvent:
    """One Gaussian release on a Poisson sample.

    Attributes:
        run: Token of the run the release belongs to.
        unit: ``record`` or ``client``.
        server_round: Round, from 1.
        step: Local step within the round, from 0.
        sampling_rate: q.
        noise_multiplier: Effective multiplier of everything released in this event.
    """

    run: str
    unit: str
    server_round: int
    step: int
    sampling_rate: float
    noise_multiplier: float


class Ledger:
    """A JSON-lines file of `LedgerEvent`s."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def record(self, event: LedgerEvent) -> None:
        """Append one event; see `record_all`."""
        self.record_all([event])

    def record_all(self, events: Sequence[LedgerEvent]) -> None:
        """Append events and sync them to disk, before their releases: a crash may over-count, never under-count."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A crash can leave half a line; it stays, as a line of its own that still counts.
            torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            lines = "".join(json.dumps(asdict(event)) + "\n" for event in events)
            file.write((b"\n" if torn else b"") + lines.encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold this ledger alone, across processes: between looking at its count and adding to it nobody else may.

        Raises:
            TimeoutError: If another process holds it for seconds; the clients beside this one must not wait for it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            deadline = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released with the file, also by a crash
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{self.path.name} is held by another process") from None
                    time.sleep(0.05)
            yield

    def count(self) -> int:
        """Number of events of all runs; a half-written line counts: its release may have been made."""
        return len(self._lines())

    def events(self, run: str) -> list[LedgerEvent]:
        """All whole events of one run, in the order written."""
        found = []
        for line in self._lines():
            try:
                found.append(LedgerEvent(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return [event for event in found if event.run == run]

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
