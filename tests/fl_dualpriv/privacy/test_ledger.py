"""The ledger is appended, readable, and knows its run."""

import json
import os
from pathlib import Path

import pytest

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


def test_the_events_of_a_round_are_one_synced_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or sync(file))
    one, all_at_once = Ledger(tmp_path / "one.jsonl"), Ledger(tmp_path / "all.jsonl")
    for step in range(3):
        one.record(event("a", step))
    synced.clear()
    all_at_once.record_all([event("a", step) for step in range(3)])
    assert all_at_once.path.read_bytes() == one.path.read_bytes()
    assert synced == [all_at_once.path.stat().st_size]  # everything was in the file when it was synced
    assert all_at_once.count() == 3


def test_a_torn_line_stays_and_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event("a", 0))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:20])
    ledger.record_all([event("a", 1), event("a", 2)])
    assert ledger.count() == 4  # its release may have been made
    assert [e.step for e in ledger.events("a")] == [0, 1, 2]
