"""The ClientApp's handlers as a server sees them, also a server that asks for too much."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, RecordDict
from PIL import Image

from clients.app import app
from fl_dualpriv import wire
from fl_dualpriv.config import app_defaults
from fl_dualpriv.files import read_tensors
from fl_dualpriv.local_engine import LocalGrid

DEFAULTS = app_defaults(Path(__file__).parents[2])
PROMPT = torch.zeros(4, 32)

Nodes = Callable[..., LocalGrid]


@pytest.fixture
def nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")

    def start(changes: dict[str, Any] | None = None) -> LocalGrid:
        base: dict[str, Any] = {
            "population": 2,
            "rounds": 2,
            "train.local-steps": 1,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.noise-multiplier": 1.5,
            "privacy.record.delta": 1e-3,
            "evaluation.held-out-data": "public",
            "data.ref": "folder",
            "data.path": str(tmp_path / "images"),
            "backbone.name": f"local-dir:{tiny_clip_dir}",
            "resources.device": "cpu",
            "output.dir": str(tmp_path / "out"),
        }
        return LocalGrid(app, 2, DEFAULTS | base | (changes or {}))

    return start


def ask(grid: LocalGrid, content: RecordDict, kind: str) -> Message:
    (reply,) = grid.send_and_receive([Message(content, 1, kind)])
    return reply


def train(grid: LocalGrid, server_round: int = 1, noise: float = 1.5, token: str = "t") -> Message:
    task = wire.TrainTask(global_prompt=PROMPT, server_round=server_round, run_token=token, noise_multiplier=noise)
    return ask(grid, wire.train_content(task), MessageType.TRAIN)


def evaluate(grid: LocalGrid, prompt: wire.PromptKind = "personal") -> Message:
    task = wire.EvaluateTask(global_prompt=PROMPT, server_round=1, run_token="t", prompt=prompt)
    return ask(grid, wire.evaluate_content(task), MessageType.EVALUATE)


def ledger_lines(tmp_path: Path) -> int:
    path = tmp_path / "out" / "clients" / "client-000" / "ledger.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_query_says_who_and_how_many(nodes: Nodes):
    reply = ask(nodes(), RecordDict(), MessageType.QUERY)
    # 8 images a class, less max(1, round(0.1 * 8)) = 1 for val and round(0.2 * 8) = 2 for test; one class a client
    assert wire.read_card(reply) == wire.ClientCard(partition=0, num_examples=5)


def test_an_upload_leaves_and_the_personal_prompt_stays(nodes: Nodes, tmp_path: Path):
    reply = train(nodes())
    assert list(reply.content) == ["arrays"]
    upload = wire.read_upload(reply, (4, 32))
    stored, _ = read_tensors(tmp_path / "out" / "clients" / "client-000" / "prompt.safetensors")
    assert bool(stored["personal"].any())
    assert not torch.allclose(upload, stored["personal"].double())
    assert ledger_lines(tmp_path) == 1


def test_a_node_chooses_its_own_state_folder(nodes: Nodes, tmp_path: Path):
    grid = nodes()
    grid.contexts[1].node_config["state-dir"] = str(tmp_path / "mine")
    train(grid)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "ledger.jsonl",
        "ledger.lock",
        "prompt.safetensors",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("noise", [0.0, 1.0, float("nan")])
def test_a_server_that_asks_for_less_noise_gets_nothing(nodes: Nodes, tmp_path: Path, noise: float):
    reply = train(nodes(), noise=noise)
    assert reply.has_error()
    assert "the step is refused" in reply.error.reason
    assert ledger_lines(tmp_path) == 0
    assert not list(tmp_path.glob("out/**/prompt.safetensors"))


def test_a_server_that_sends_nan_gets_noise_alone(nodes: Nodes):
    grid = nodes()
    bad = wire.TrainTask(
        global_prompt=torch.full((4, 32), torch.nan), server_round=1, run_token="t", noise_multiplier=1.5
    )
    reply = ask(grid, wire.train_content(bad), MessageType.TRAIN)
    # every gradient is NaN, so every clipped row is zero; local minus global is NaN: the server counts a failure
    assert not torch.isfinite(wire.read_upload(reply, (4, 32))).any()


@pytest.mark.parametrize(
    "requests",
    [[(1, "t"), (2, "t"), (3, "t")], [(1, "t"), (1, "t"), (1, "t")], [(1, "t"), (1, "u"), (1, "v")]],
    ids=["later round", "same round again", "new run tokens"],
)
def test_no_more_releases_than_the_plan_accounts_for(nodes: Nodes, tmp_path: Path, requests: list[tuple[int, str]]):
    grid = nodes()  # two rounds of one step: ε is of two releases
    replies = [train(grid, server_round, token=token) for server_round, token in requests]
    assert replies[-1].has_error()
    assert ledger_lines(tmp_path) <= 2  # a repetition is refused before its release


def test_private_held_out_data_are_not_scored_for_any_server(nodes: Nodes):
    assert evaluate(nodes({"evaluation.held-out-data": "private"})).has_error()


def test_personal_and_global_scores_count_the_same_images(nodes: Nodes):
    grid = nodes()
    train(grid)
    scores = [wire.read_score(evaluate(grid, kind)) for kind in ("zero-shot", "global", "personal")]
    assert {(s.local_total, s.neighbour_total) for s in scores} == {(2, 2)}  # one class of two is the client's
