"""The ledger is appended, readable, knows its run, and its ε is dp-accounting's."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld

from fl_dualpriv.privacy import ledger as ledger_module
from fl_dualpriv.privacy.accounting import epsilon
from fl_dualpriv.privacy.ledger import Ledger, LedgerContent, LedgerEvent


def event(run: str, server_round: int, releases: int = 1) -> LedgerEvent:
    return LedgerEvent(
        run=run, unit="record", server_round=server_round, releases=releases, sampling_rate=0.1, noise_multiplier=1.5
    )


def test_events_are_appended_and_read_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.read() == LedgerContent(events=(), damaged=0)
    written = (event("a", 1), event("a", 2, 3), event("b", 1))
    for one in written:
        ledger.record(one)
    found = Ledger(ledger.path).read()
    assert found == LedgerContent(events=written, damaged=0)
    assert (found.releases("a"), found.releases("b"), found.releases()) == (4, 1, 5)
    assert (found.last_round("a"), found.last_round("b"), found.last_round("c")) == (2, 1, 0)


def test_each_line_is_json_a_person_can_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event("a", 7, 5))
    (line,) = map(json.loads, ledger.path.read_text().splitlines())
    assert len(line.pop("time")) == len("2026-11-25T17:00:00Z")
    assert line == {
        "run": "a",
        "unit": "record",
        "server_round": 7,
        "releases": 5,
        "sampling_rate": 0.1,
        "noise_multiplier": 1.5,
    }


def test_the_line_is_synced_whole_and_so_is_the_name_of_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def noting(handle: int) -> None:
        descriptors = Path("/proc/self/fd")
        synced.append(str((descriptors / str(handle)).readlink()) if descriptors.exists() else "")
        sizes.append(os.fstat(handle).st_size)
        sync(handle)

    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", noting)
    ledger = Ledger(tmp_path / "new" / "deep" / "ledger.jsonl")
    ledger.record(event("a", 1))
    assert sizes[-1] == ledger.path.stat().st_size  # everything was in the file when it was synced
    before = len(synced)
    ledger.record(event("a", 2))
    assert len(synced) == before + 1
    if synced[0]:
        # Its name and those of all folders that may be new, before there is a line in it.
        folders = [tmp_path / "new" / "deep", tmp_path / "new", tmp_path, tmp_path.parent]
        assert synced[:4] == [str(folder) for folder in folders]
        assert synced[before - 1 :] == [str(ledger.path)] * 2


def test_a_file_that_a_crash_left_empty_has_its_name_synced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.touch()
    seen = []
    monkeypatch.setattr(ledger_module, "_sync_names", lambda folder: seen.append((folder, ledger.path.stat().st_size)))
    ledger.record(event("a", 1))
    ledger.record(event("a", 2))
    assert seen == [(tmp_path.resolve(), 0)]


def test_a_torn_line_stays_and_is_charged_as_the_largest_round(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event("a", 1))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole + whole[:20])
    ledger.record(event("a", 2, 4))
    found = ledger.read()
    assert (len(found.events), found.damaged) == (2, 1)
    assert found.releases() == 1 + 4 + 4
    assert found.epsilon(1e-5) == epsilon(0.1, 1.5, 9, 1e-5)


def test_a_damaged_line_is_charged_on_the_worst_terms_in_sight() -> None:
    cheap = replace(event("a", 1), sampling_rate=0.01, noise_multiplier=4.0)
    dear = replace(event("b", 1, 6), sampling_rate=0.2, noise_multiplier=3.0)
    further = replace(event("c", 1), noise_multiplier=1.1)
    found = LedgerContent(events=(cheap, dear), damaged=1)
    worst = replace(dear, sampling_rate=0.2, noise_multiplier=1.1)
    expected = LedgerContent(events=(cheap, dear, further, worst), damaged=0)
    assert found.epsilon(1e-5, [further]) == expected.epsilon(1e-5)


def test_damage_alone_has_no_bound() -> None:
    assert LedgerContent(events=(), damaged=1).epsilon(1e-5) == math.inf
    assert LedgerContent(events=(), damaged=0).epsilon(1e-5) == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"releases": -3},
        {"releases": 0},
        {"releases": 1.5},
        {"releases": True},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": "1.5"},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"unit": "epoch"},
        {"server_round": 0},
    ],
)
def test_an_event_that_nobody_can_charge_is_not_written_and_not_believed(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event("a", 1))
    bad = replace(event("a", 2), **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accounted"):
        ledger.record(bad)
    forged = json.dumps({**vars(event("a", 2)), **changes})
    with ledger.path.open("a") as file:
        file.write(forged + "\n")
    assert ledger.read() == LedgerContent(events=(event("a", 1),), damaged=1)


def test_lines_of_the_first_version_still_count(tmp_path: Path) -> None:
    old = {"run": "a", "unit": "record", "server_round": 1, "step": 0, "sampling_rate": 0.1, "noise_multiplier": 1.5}
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(old | {"step": step}) + "\n" for step in range(3)))
    assert Ledger(path).read() == LedgerContent(events=(event("a", 1),) * 3, damaged=0)


def test_epsilon_is_that_of_dp_accounting_on_the_same_events(tmp_path: Path) -> None:
    """Three kinds of release in one ledger, composed in the order written; equal to 1e-6."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for q, z, n in ((0.1, 1.5, 5), (1.0, 6.0, 1), (0.02, 0.9, 40), (0.1, 1.5, 5)):
        ledger.record(replace(event("a", 1, n), sampling_rate=q, noise_multiplier=z))
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for one in ledger.read().events:
        gaussian = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(one.sampling_rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, one.releases))
    assert ledger.read().epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-6)
