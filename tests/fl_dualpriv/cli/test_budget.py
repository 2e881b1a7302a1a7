"""`fl-dualpriv budget DIR` prints what the ledgers say, of a run's folder and of a node's."""

import json
import math
import statistics
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fl_dualpriv.cli import main as cli
from fl_dualpriv.node.file import read_node_file
from fl_dualpriv.privacy.accounting import COARSE_GRID, epsilon
from fl_dualpriv.privacy.filters.choose import filter_of, spend_budget
from fl_dualpriv.privacy.ledger import Ledger, LedgerEvent, ReservedPlan


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["budget", *arguments], env={"COLUMNS": "200"})


def write(path: Path, releases: int, unit: str = "record", run: str = "a") -> None:
    Ledger(path).record(
        LedgerEvent(run=run, unit=unit, server_round=1, releases=releases, sampling_rate=0.1, noise_multiplier=1.5)
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Three clients that took part in 1, 2 and 5 rounds, and a server of 5."""
    write(tmp_path / "ledger.jsonl", 5, "client")
    for number, releases in enumerate((1, 2, 5)):
        write(tmp_path / "clients" / f"client-{number:03d}" / "ledger.jsonl", releases)
    rows = [{"unit": "record", "delta": 1e-4}, {"unit": "client", "delta": 1e-3}]
    (tmp_path / "summary.json").write_text(json.dumps({"privacy": rows}))
    return tmp_path


def test_max_median_and_all_of_them(run_folder: Path) -> None:
    found = json.loads(call(str(run_folder), "--json").stdout)
    expected = [epsilon(0.1, 1.5, n, 1e-4) for n in (1, 2, 5)]  # δ of the run's own table
    assert [c["epsilon"] for c in found["clients"]] == expected
    assert (found["epsilon-max"], found["epsilon-median"]) == (max(expected), statistics.median(expected))
    assert found["server"][0]["epsilon"] == epsilon(0.1, 1.5, 5, 1e-3)
    shown = call(str(run_folder)).stdout
    assert f"ε of 3 clients: max {max(expected):.4g}, median {expected[1]:.4g}" in shown
    assert all(f"client-{number:03d}" in shown for number in range(3))


def test_another_delta(run_folder: Path) -> None:
    found = json.loads(call(str(run_folder), "--delta", "1e-6", "--json").stdout)
    assert found["clients"][2]["epsilon"] == epsilon(0.1, 1.5, 5, 1e-6)
    refused = call(str(run_folder), "--delta", "2")
    assert refused.exit_code == 2


def test_a_nodes_own_folder_is_one_client_with_its_refusals(tmp_path: Path) -> None:
    write(tmp_path / "ledger.jsonl", 2)
    write(tmp_path / "ledger.jsonl", 2, run="b")
    (tmp_path / "refusals.jsonl").write_text("{}\n{}\n")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"run": "torn')
    (client,) = json.loads(call(str(tmp_path), "--json").stdout)["clients"]
    assert (client["releases"], client["runs"], client["damaged"], client["refused"]) == (6, 2, 1, 2)
    assert client["epsilon"] == epsilon(0.1, 1.5, 6, 1e-5)


def test_damage_alone_is_infinite(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text("junk\n")
    assert json.loads(call(str(tmp_path), "--json").stdout)["clients"][0]["epsilon"] is None
    assert "inf" in call(str(tmp_path)).stdout
    assert math.isinf(Ledger(tmp_path / "ledger.jsonl").read().epsilon(1e-5))


def test_a_folder_without_ledgers_is_an_error(tmp_path: Path) -> None:
    result = call(str(tmp_path))
    assert result.exit_code == 2
    assert "holds no ledger.jsonl" in result.stderr


NODE = """
state-dir = "{state}"
data-path = "{state}"
[budget]
epsilon = 8.0
delta = 1e-5
max-sampling-rate = 0.2
min-noise-multiplier = 0.8
max-clip-norm = 1.0
filter = "{filter}"
"""


@pytest.mark.parametrize("name", ["reserve", "renyi", "worst-terms"])
def test_an_owners_file_says_what_is_left_and_what_each_filter_would_admit(tmp_path: Path, name: str) -> None:
    node = tmp_path / "node.toml"
    node.write_text(NODE.format(state=tmp_path, filter=name))
    own = read_node_file(node).budget
    assert own is not None
    plan = ReservedPlan(run="a", releases=4, sampling_rate=0.1, noise_multiplier=1.5)
    event = LedgerEvent(run="a", unit="record", server_round=1, releases=2, sampling_rate=0.1, noise_multiplier=1.5)
    spend_budget(Ledger(tmp_path / "ledger.jsonl"), own, plan, event)
    found = json.loads(call(str(node), "--json").stdout)
    assert found["epsilon-of-fixed-terms"] == epsilon(0.1, 1.5, 2, 1e-5)
    content, chosen = Ledger(tmp_path / "ledger.jsonl").read(), filter_of(own)
    assert found["rest-buys"] == chosen.affordable(content, 0.1, 1.5)
    assert found["last-run"]["releases"] == (4 if name == "reserve" else 2)
    by_hand = found["last-run"]["releases"]
    admitted = found["admitted"]
    assert admitted["reserve"] == min(10, int(8 // epsilon(0.1, 1.5, by_hand, 1e-6, COARSE_GRID)))
    assert admitted["worst-terms"] == 11 // by_hand  # eleven releases at q = 0.2 and z = 0.8 are ε = 8
    assert admitted["path"] > admitted["renyi"] > admitted["worst-terms"]
    shown = call(str(node)).stdout
    assert chosen.claim() in shown
    assert chosen.balance(content) in shown
    assert "no filter" in shown


def test_a_ledgers_filter_is_shown_with_its_folder(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").begin({"filter": "reserve", "epsilon": 8.0})
    write(tmp_path / "ledger.jsonl", 2)
    shown = call(str(tmp_path)).stdout
    assert "filter = reserve, epsilon = 8.0" in shown
    assert "terms fixed beforehand" in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "needs a [budget]"), ("[budget]\nepsilon = -1\n", "budget.epsilon = -1"), ("[", "not valid TOML")],
)
def test_an_owners_file_that_cannot_be_used_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    node = tmp_path / "node.toml"
    node.write_text(text)
    result = call(str(node))
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_an_owners_file_of_another_filter_than_the_ledgers_is_an_error(tmp_path: Path) -> None:
    node = tmp_path / "node.toml"
    node.write_text(NODE.format(state=tmp_path, filter="renyi"))
    Ledger(tmp_path / "ledger.jsonl").begin({"filter": "reserve", "epsilon": 8.0, "delta": 1e-5})
    result = call(str(node))
    assert result.exit_code == 2
    assert "filter was 'reserve' and is now 'renyi'" in result.stderr
