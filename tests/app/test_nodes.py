"""Many clients on few nodes: the same prompts, personal prompts, scores and ledgers as with a node for each client."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import fl_dualpriv.client.node
import fl_dualpriv.client.round
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import read_tensors
from fl_dualpriv.flower.local import LocalGrid, run_local
from fl_dualpriv.learners import row_check
from fl_dualpriv.learners.row_check import RowPath
from fl_dualpriv.run.file_kinds import read_totals

APP_DIR = Path(__file__).parents[2]
DEFAULTS = app_defaults(APP_DIR)
POPULATION = 6
CLIENT_LEVEL: dict[str, Any] = {
    "privacy.record.mechanism": "none",
    "privacy.client.mechanism": "gaussian",
    "privacy.client.calibrate-to": "noise-multiplier",
    "privacy.client.expected-cohort": 3.0,
}
LEVELS: dict[str, dict[str, Any]] = {
    "record": {},
    "client": CLIENT_LEVEL,
    "both": CLIENT_LEVEL | {"privacy.record.mechanism": "gaussian"},
    "trusts-server": {"privacy.record.trusts-server": True, "train.local-steps": 1},
    "none": {"privacy.record.mechanism": "none"},
    "published": {"method": "dpfpl-paper"},
    "published code": {"method": "dpfpl-paper", "dpfpl-paper.published": "code", "train.local-steps": 1},
    "top-m": {"train.top-m": 2},
    "feature": {"privacy.record.noise-space": "feature"},
    "promptfl": {"method": "promptfl", "privacy.record.mechanism": "none"},
    "collective": {"prompt.personalisation": "collective", "privacy.record.noise-multiplier": 0.3},
}
PRIVATE = {"record", "both", "trusts-server", "top-m", "feature", "collective"}
"""Levels at which every client's steps are noised."""

Run = Callable[..., Path]


@pytest.fixture
def run(images: Path, tiny_clip_dir: Path, tmp_path: Path) -> Run:
    def start(nodes: int, changes: dict[str, Any] | None = None) -> Path:
        out = tmp_path / f"nodes-{nodes}"
        base: dict[str, Any] = {
            "rounds": 2,
            "population": POPULATION,
            "supernodes": nodes,
            "join-timeout": 1.0,
            "train.local-steps": 2,
            "train.sampling-rate": 0.3,
            "privacy.randomness": "seeded",
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.delta": 1e-3,
            "evaluation.held-out-data": "public",
            "data.ref": "folder",
            "data.path": str(images),
            "data.partition": "dirichlet",  # clients of unequal sizes
            "data.dirichlet-alpha": 1.0,
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
            "output.dir": str(out),
        }
        run_local(APP_DIR, DEFAULTS | base | (changes or {}))
        return out

    return start


def prompts(out: Path) -> dict[str, Tensor]:
    files = [out / "prompts" / "global.safetensors", *sorted(out.glob("clients/*/prompt.safetensors"))]
    return {f"{f.parent.name} {name}": tensor for f in files for name, tensor in read_tensors(f)[0].items()}


def ledgers(out: Path) -> dict[str, list[dict[str, Any]]]:
    """All events but for the token of the run, by file."""
    found = {}
    for path in sorted(out.rglob("ledger.jsonl")):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(out))] = [
            {k: v for k, v in event.items() if k not in ("run", "time")} for event in events
        ]
    return found


def scores(out: Path) -> list[Any]:
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return [*lines, read_totals(out)["failures"]]


@pytest.mark.parametrize("level", LEVELS)
def test_few_nodes_give_the_numbers_of_many(run: Run, level: str):
    many = run(0, LEVELS[level])
    expected = prompts(many)
    assert bool(expected["prompts global"].any())
    for nodes in (1, 2) if level in ("record", "client", "collective") else (2,):
        few = run(nodes, LEVELS[level])
        found = prompts(few)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name  # bit by bit, see `prompt_products` and `row_check`
        assert ledgers(few) == ledgers(many)
        assert scores(few) == scores(many)
    clients_with_a_ledger = sum(name.startswith("clients/") for name in ledgers(many))
    assert clients_with_a_ledger == POPULATION if level in PRIVATE - {"both"} else clients_with_a_ledger <= POPULATION


def test_a_round_takes_one_message_per_node(run: Run, asked: Counter[str]):
    run(2)
    # two rounds; the un-tuned model, two scored rounds, the shared prompt and the free rival
    assert asked == {"query": 2, "train": 4, "evaluate": 10}


def test_a_failing_client_among_many_is_one_counted_zero(run: Run, tmp_path: Path):
    state = tmp_path / "nodes-2" / "clients" / "client-003"
    state.parent.mkdir(parents=True)
    state.write_text("in the way")
    out = run(2)
    assert read_totals(out)["failures"] == 2  # its ledger cannot be written in any round
    assert [path.parent.name for path in sorted(out.glob("clients/*/prompt.safetensors"))] == [
        f"client-{p:03d}" for p in range(POPULATION) if p != 3
    ]


@pytest.mark.parametrize("apart", [False, True])
def test_clients_step_together_unless_their_numbers_would_mix(run: Run, monkeypatch: pytest.MonkeyPatch, apart: bool):
    monkeypatch.setattr(fl_dualpriv.client.node.RunContext, "clients_apart", apart)
    update, sizes = fl_dualpriv.client.round.cohort_update, []

    def counting(**arguments: Any) -> Any:
        sizes.append([participant.partition for participant in arguments["participants"]])
        return update(**arguments)

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", counting)
    run(2)
    assert sizes == ([[0], [2], [4], [1], [3], [5]] if apart else [[0, 2, 4], [1, 3, 5]]) * 2


def test_a_summary_says_how_rows_were_computed(run: Run):
    found = json.loads((run(2) / "summary.json").read_text())["rows"]
    assert set(found) <= set(get_args(RowPath))
    assert sum(found.values()) == POPULATION


def test_on_a_machine_whose_rows_do_not_hold_a_run_ends_before_its_first_release(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_check, "_rows_do_not_mix", lambda *_: False)
    with pytest.raises(ConfigError, match="the sensitivity of a step cannot be stated, and nothing is released"):
        run(2)
    assert not list(tmp_path.rglob("ledger.jsonl"))
    assert run(2, {"method": "promptfl", "privacy.record.mechanism": "none", "output.dir": str(tmp_path / "open")})


def test_the_wrong_number_of_nodes_is_an_error_that_quotes_the_flag(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LocalGrid, "get_node_ids", lambda self: [1, 2, 3])
    with pytest.raises(ConfigError, match=r"supernodes = 2, but 3 nodes joined .*num-supernodes=2.* supernodes = 3"):
        run(2, {"join-timeout": 0.3})
