"""A hostile server and an owner's questions: what it may name, what it can tell apart, and what never leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType, RecordDict
from PIL import Image

from clients.app import app
from fl_dualpriv import messages
from fl_dualpriv.config.schema import app_defaults
from fl_dualpriv.data import hub
from fl_dualpriv.data.load import load_questions
from fl_dualpriv.flower.local import LocalGrid
from tests.app.client_node import OFFERED, ask, evaluate, train
from tests.app.test_hostile_config import BUDGET
from tests.tiny_llava import ANSWERS, QUESTIONS

DEFAULTS = app_defaults(Path(__file__).parents[2])
Start = Callable[..., LocalGrid]
IMAGES = 8
PUBLIC = {"prompt.n-ctx": 4, "prompt.words": "look at this red"}


def lines(images: int) -> list[str]:
    rows = [
        {"image": f"{i}.png", "question": QUESTIONS[kind], "answer": ANSWERS[kind], "type": f"type {kind}"}
        for i in range(images)
        for kind in range(2)
    ]
    return [json.dumps(row) for row in rows]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """The owner's folder: questions to train on alone."""
    folder = tmp_path / "questions"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "train.jsonl").write_text("\n".join(lines(IMAGES)))
    load_questions.cache_clear()
    return folder


@pytest.fixture
def owned(mine: Path, llava_dir: Path, tmp_path: Path) -> Start:
    """Nodes whose owner holds a budget over these questions; the server writes the rest."""

    def start(changes: dict[str, Any] | None = None) -> LocalGrid:
        base: dict[str, Any] = {
            "population": 2,
            "supernodes": 0,
            "rounds": 2,
            "train.local-steps": 1,
            "privacy.record.calibrate-to": "noise-multiplier",
            "privacy.record.noise-multiplier": 1.5,
            "privacy.record.delta": 1e-3,
            "evaluation.held-out-data": "public",
            "data.ref": "questions",
            "data.path": "/elsewhere",
            "data.max-tokens": 24,
            "backbone.name": f"hf:{llava_dir}",
            "resources.device": "cpu",
            "resources.feature-cache": "off",
            "output.dir": str(tmp_path / "out"),
        }
        grid = LocalGrid(app, 2, DEFAULTS | base | PUBLIC | (changes or {}))
        file = tmp_path / "node.toml"
        file.write_text(f'state-dir = "{tmp_path / "mine"}"\ndata-path = "{mine}"\n{BUDGET}')
        grid.contexts[1].node_config["node-file"] = str(file)
        return grid

    return start


def replies(grid: LocalGrid, tmp_path: Path) -> list[tuple[bool, Any]]:
    """What a server can tell apart: errors with their words, counts, and the names and sizes of what came."""
    for name in ("ledger.jsonl", "prompt.safetensors"):
        (tmp_path / "mine" / name).unlink(missing_ok=True)
    load_questions.cache_clear()
    told: list[tuple[bool, Any]] = []
    for reply in (ask(grid, RecordDict(), MessageType.QUERY), train(grid), evaluate(grid)):
        told.append((True, reply.error.reason) if reply.has_error() else (False, shape_of(reply.content)))
    return told


def reason_of(reply: Message) -> str:
    assert reply.has_error()
    return str(reply.error.reason)


def shape_of(content: RecordDict) -> dict[str, Any]:
    found = {
        name: {key: array.shape for key, array in record.items()} for name, record in content.array_records.items()
    }
    found |= {name: dict(record) for name, record in content.config_records.items()}
    return found | {name: dict(record) for name, record in content.metric_records.items()}


@pytest.mark.parametrize(
    "changes", [{"data.path": "datasets:somebody/patients"}, {"data.path": "/etc"}, {"data.path": "datasets:/etc"}]
)
def test_a_run_reads_the_owners_questions_whatever_it_names(
    owned: Start, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    def fetched(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(hub, "load_tables", fetched)
    reply = ask(owned(changes), RecordDict(), MessageType.QUERY)
    # 8 images: 1 for val, 2 for test; two questions about each of 5, all of them this node's client's.
    assert messages.read_cards(reply)[0].num_examples == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"data.ref": "demo-vqa"},
        {"data.ref": "folder", "backbone.name": "demo"},
        {"data.ref": "auto"},
        {"prompt.words": "zebra"},
        {"data.max-tokens": 10**9},
        {"pruning.visual-keep-ratio": 0.5, "pruning.visual-layer": 99},
    ],
)
def test_what_a_node_cannot_do_is_told_by_its_kind_alone(owned: Start, mine: Path, changes: dict[str, Any]) -> None:
    reply = ask(owned(changes), RecordDict(), MessageType.QUERY)
    reason = reason_of(reply)
    assert "ConfigError" in reason
    assert "its message is in the log of the node" in reason
    assert str(mine) not in reason


@pytest.mark.parametrize("held_out", ["auto", "public"])
@pytest.mark.parametrize("split", ["test", "val"])
def test_scores_never_leave_of_questions_cut_out_of_training(
    owned: Start, mine: Path, held_out: str, split: str
) -> None:
    """``scores = true`` is for files of their own: here val has one, and test is a cut."""
    (mine / "val.jsonl").write_text("\n".join(lines(2)))
    reply = evaluate(owned({"evaluation.held-out-data": held_out, "evaluation.split": split}))
    assert reply.has_error() is (split == "test")
    if split == "test":
        assert "score" in reason_of(reply)


SPOILED: dict[str, dict[str, Any]] = {
    "unknown words": {"question": "is Alice a zebra ?"},
    "half a surrogate": {"question": "is \ud800 there ?"},
    "the image token": {"question": "what is this <image> ?"},
    "the end token": {"answer": "</s>"},
    "no words": {"question": " ", "answer": ""},
    "a number": {"answer": 3},
    "endless": {"question": "what is this ? " * 20_000},
    "no image": {"image": "none.png"},
    "a folder": {"image": "."},
    "a file that is none": {"image": "train.jsonl"},
    "a name that cannot be": {"image": "\0" + "a" * 5000},
}


@pytest.mark.parametrize("name", list(SPOILED))
def test_a_spoiled_record_changes_no_reply(owned: Start, mine: Path, tmp_path: Path, name: str) -> None:
    """Nor do all of a client's. Counts and types are public and stay; an image that is named no more is one of them."""
    (mine / "val.jsonl").write_text("\n".join(lines(2)))
    (mine / "test.jsonl").write_text("\n".join(lines(2)))
    before = replies(owned(), tmp_path)
    assert [error for error, _ in before] == [False, False, False]
    rows = [json.loads(line) for line in lines(IMAGES)]
    for spoiled in (rows[:1], rows):
        for row in spoiled:
            row |= SPOILED[name]
        (mine / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert replies(owned(), tmp_path) == before


def test_a_client_without_a_usable_record_releases_noise(owned: Start, mine: Path) -> None:
    (mine / "train.jsonl").write_text("\n".join(lines(IMAGES)).replace("?", "zebra"))
    (upload,) = messages.read_uploads(train(owned()), (4, 32)).values
    assert bool(torch.isfinite(upload).all())
    assert bool(upload.any())


def test_only_the_upload_leaves_whatever_is_remembered(owned: Start) -> None:
    changes = {
        "pruning.update-keep-ratio": 0.5,
        "pruning.update-rule": "past",
        "pruning.update-warm-up": 1,
        "train.optimizer": "adam-corrected",
        "pruning.visual-keep-ratio": 0.5,
    }
    reply = train(owned(changes), terms=OFFERED)
    assert shape_of(reply.content) == {
        "arrays": {"upload": (1, 4, 32)},
        "clients": {"partitions": [0], "failed": [], "reasons": []},
    }
