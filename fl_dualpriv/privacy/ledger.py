"""An append-only, human-readable record of releases: written and synced *before* each release is made."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


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
        """Append the event and sync it to disk, before the release: a crash may over-count, never under-count."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self, run: str) -> list[LedgerEvent]:
        """All events of one run, in the order written."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [event for line in lines if (event := LedgerEvent(**json.loads(line))).run == run]
