"""The health line says what the node's loop did and what its ledger holds, when something changed and once an hour."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.node.health import HealthLine, Pulse, count
from fl_dualpriv.privacy.accounting import COARSE_GRID, epsilon
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent

EVENT = LedgerEvent(run="r", unit="record", server_round=1, releases=2, sampling_rate=0.2, noise_multiplier=1.0)
BUDGET = """
[budget]
epsilon = 8.0
delta = 1e-4
max-sampling-rate = 0.2
min-noise-multiplier = 1.0
max-clip-norm = 1.0
"""


@dataclass
class State:
    """Of a SuperNode that has joined."""

    node_id: int

    def get_node_id(self) -> int:
        return self.node_id


@pytest.fixture
def node_file(tmp_path: Path) -> Path:
    file = tmp_path / "node.toml"
    file.write_text(f'state-dir = "{tmp_path / "state"}"\ndata-path = "{tmp_path}"\n{BUDGET}')
    return file


def test_what_the_ledger_says_in_words(node_file: Path, tmp_path: Path):
    nothing = "ε = 0 is reserved for 0 of 10 runs, ε = 8 and 10 runs are left"
    assert count(read_node_file(node_file)) == f"0 rounds answered; {nothing}"
    ledger = Ledger(tmp_path / "state" / "ledger.jsonl")
    ledger.record(EVENT)
    cost = epsilon(0.2, 1.0, 2, 1e-5, COARSE_GRID)  # at a tenth of δ
    said = f"ε = {cost:.4g} is reserved for 1 of 10 runs, ε = {8 - cost:.4g} and 9 runs are left"
    assert count(read_node_file(node_file)) == f"1 rounds answered; {said}"
    ledger.path.write_text("torn\n")  # nothing bounds a ledger of damaged lines alone
    assert count(read_node_file(node_file)) == "0 rounds answered, 1 damaged lines; " + (
        "1 plans of at most 10 are charged and nothing is left: the ledger is closed"
    )


def test_a_line_when_something_changed_and_once_an_hour(
    node_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now, lines = [0.0], list[str]()
    pulse = Pulse(clock=lambda: now[0])
    health = HealthLine(node_file, pulse, 60.0, lines.append)
    counted: list[list[str]] = []

    def words(command: list[str], **_: Any) -> Any:
        """In place of a process: what the same module says in this one."""
        counted.append(command[1:])
        return type("Done", (), {"returncode": 0, "stdout": count(read_node_file(Path(command[-1]))) + "\n"})

    monkeypatch.setattr("fl_dualpriv.node.health.subprocess.run", words)
    answers = iter([None, 5, None])
    pull = pulse.watch(lambda **_: next(answers))
    health.look()
    assert lines == [
        "health: not joined yet; 0 messages since the start; 0 rounds answered; "
        "ε = 0 is reserved for 0 of 10 runs, ε = 8 and 10 runs are left"
    ]
    assert pull(state=State(node_id=7)) is None
    health.look()
    health.look()
    assert len(lines) == 2  # nothing new
    assert lines[1].startswith("health: joined as node 7; 0 messages")
    assert pull(state=State(node_id=7)) == 5
    Ledger(tmp_path / "state" / "ledger.jsonl").record(EVENT)
    health.look()
    assert lines[2].startswith("health: joined as node 7; 1 messages since the start; 1 rounds answered; ε = ")
    assert counted == [["-P", "-m", "fl_dualpriv.node.health", str(node_file)]] * 2  # the ledger changed once
    now[0] = 200.0
    health.look()
    assert "nothing from the server for 200 s; 1 messages" in lines[3]
    now[0] = 210.0
    health.look()
    assert len(lines) == 4
    now[0] = 200.0 + 3600.0
    health.look()
    assert len(lines) == 5


@pytest.mark.slow  # a process that imports the accountant
def test_the_ledger_is_counted_in_a_process_of_its_own(node_file: Path):
    lines = list[str]()
    HealthLine(node_file, Pulse(), 60.0, lines.append).look()
    assert lines == [
        "health: not joined yet; 0 messages since the start; 0 rounds answered; "
        "ε = 0 is reserved for 0 of 10 runs, ε = 8 and 10 runs are left"
    ]
