"""The ledger is appended, readable, and knows its run."""

import json
from pathlib import Path

from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent


def event(run: str, step: int) -> LedgerEvent:
    return LedgerEvent(run=run, unit="record", server_round=1, step=step, sampling_rate=0.1, noise_multiplier=1.5)


def test_events_are_appended_and_read_back_by_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.events("a") == []
    for step in range(3):
        ledger.record(event("a", step))
    ledger.record(event("b", 0))
    assert [e.step for e in Ledger(ledger.path).events("a")] == [0, 1, 2]
    assert Ledger(ledger.path).events("b") == [event("b", 0)]


def test_each_line_is_json_a_person_can_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event("a", 7))
    (line,) = ledger.path.read_text().splitlines()
    assert json.loads(line) == {
        "run": "a",
        "unit": "record",
        "server_round": 1,
        "step": 7,
        "sampling_rate": 0.1,
        "noise_multiplier": 1.5,
    }
