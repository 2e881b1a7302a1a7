"""Opacus' PRV accountant as a second witness of ε: on a grid, and by ``fl-dualpriv budget --check``."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.privacy.accounting import SampledGaussians, composed_epsilon
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent
from fl_dualpriv.privacy.selection import choice
from fl_dualpriv.run.witness import prv_epsilon


@pytest.mark.parametrize(
    ("noise", "rate", "releases", "delta"),
    [
        (1.0, 0.1, 100, 1e-5),
        (2.0, 0.3, 18, 1e-4),
        (0.8, 0.02, 300, 1e-5),
        (5.0, 1.0, 10, 1e-5),
        (0.7, 0.5, 3, 1e-5),
        (3.0, 0.05, 500, 1e-6),
    ],
)
def test_both_accountants_agree_within_one_percent(noise: float, rate: float, releases: int, delta: float) -> None:
    ours = composed_epsilon((SampledGaussians(rate, noise, releases),), delta)
    assert prv_epsilon([(noise, rate, releases)], delta) == pytest.approx(ours, rel=0.01)


def event(**changes: object) -> LedgerEvent:
    fields = {"run": "a", "unit": "record", "server_round": 1, "releases": 18, "sampling_rate": 0.3}
    return LedgerEvent(**(fields | {"noise_multiplier": 2.0} | changes))  # type: ignore[arg-type]


def test_budget_prints_both(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.record(event())
    assert ledger.read().opacus_history() == [(2.0, 0.3, 18)]
    done = CliRunner().invoke(cli.app, ["budget", str(tmp_path), "--check", "--delta", "1e-4"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "ε (PLD)" in done.output
    assert "ε (PRV)" in done.output
    assert done.output.count("2.69") >= 3  # both columns, and the statistics


def test_a_choice_has_no_witness(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").record(choice(0.5).event("a"))
    done = CliRunner().invoke(cli.app, ["budget", str(tmp_path), "--check"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
