"""A hostile server writes the run's configuration: an owner's node answers alike whatever single records are like."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType, RecordDict
from PIL import Image

from fl_dualpriv import messages
from fl_dualpriv.flower.local import LocalGrid
from fl_dualpriv.models.open_clip import OpenClipBackbone
from fl_dualpriv.tasks.images import ImageTask
from tests.app.client_node import OFFERED, PROMPT, Nodes, ask, evaluate, tiny_nodes, train

BUDGET = """
[budget]
epsilon = 1000
delta = 1e-5
max-sampling-rate = 1.0
min-noise-multiplier = 0.1
max-clip-norm = 1.0
scores = true
seeded-noise = false
"""
Start = Callable[..., LocalGrid]


@pytest.fixture
def nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    return tiny_nodes(tiny_clip_dir, tmp_path)


@pytest.fixture
def owned(nodes: Nodes, tmp_path: Path) -> Start:
    """Nodes whose owner holds a budget over the tiny images."""

    def start(changes: dict[str, Any] | None = None, limits: str = BUDGET) -> LocalGrid:
        grid = nodes(changes)
        file = tmp_path / "node.toml"
        file.write_text(f'state-dir = "{tmp_path / "mine"}"\ndata-path = "{tmp_path / "images"}"\n{limits}')
        grid.contexts[1].node_config["node-file"] = str(file)
        return grid

    return start


def refusals(tmp_path: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (tmp_path / "mine" / "refusals.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_a_run_without_privacy_reads_no_image_and_quotes_none(owned: Start, tmp_path: Path, kind: str) -> None:
    (tmp_path / "images" / "cat" / "a_persons_name.png").write_bytes(b"no image")
    grid = owned({"privacy.record.mechanism": "none"})
    reply = {
        "query": lambda: ask(grid, RecordDict(), MessageType.QUERY),
        "train": lambda: train(grid),
        "evaluate": lambda: evaluate(grid),
    }[kind]()
    assert reply.has_error()
    assert "without record-level differential privacy" in reply.error.reason
    assert "a_persons_name" not in reply.error.reason
    assert len(refusals(tmp_path)) == 1
    assert not (tmp_path / "mine" / "ledger.jsonl").exists()


@pytest.mark.parametrize("kind", ["query", "train", "evaluate"])
def test_an_owner_who_demands_integers_answers_no_run_in_floats(owned: Start, tmp_path: Path, kind: str) -> None:
    limits = BUDGET + "integer-arithmetic = true\n"
    asked = {
        "query": lambda grid, terms: ask(grid, RecordDict(), MessageType.QUERY),
        "train": lambda grid, terms: train(grid, terms=terms),
        "evaluate": lambda grid, terms: evaluate(grid),
    }[kind]
    # A submitter chooses the run's arithmetic; its server then asks for that, or for the one that would pass.
    for offered in (OFFERED, replace(OFFERED, arithmetic="integer")):
        reply = asked(owned(limits=limits), offered)
        assert reply.has_error()
        assert 'privacy.arithmetic = "float", only "integer"' in reply.error.reason
    assert len(refusals(tmp_path)) == 2
    assert not (tmp_path / "mine" / "ledger.jsonl").exists()


def test_an_owner_who_demands_integers_gets_them(owned: Start, tmp_path: Path) -> None:
    """A sum for a trusted server is whole numbers of units, and a server that asks for floats gets nothing."""
    limits = BUDGET + "integer-arithmetic = true\ntrusts-server = true\n"
    grid = owned({"privacy.arithmetic": "integer", "privacy.record.trusts-server": True}, limits)
    floats = replace(OFFERED, trusts_server=True)
    refused = messages.read_uploads(train(grid, terms=floats), (4, 32))
    assert "arithmetic 'float', here 'integer'" in refused.failed[0]
    assert not (tmp_path / "mine" / "ledger.jsonl").exists()
    for server_round in (1, 2):  # a batch may be empty: q n = 1.5
        found = messages.read_uploads(train(grid, server_round, replace(floats, arithmetic="integer")), (4, 32))
        assert found.partitions == (0,)
        assert bool((found.values == found.values.trunc()).all())
        assert float(found.values.abs().max()) <= 10 * 2**20  # ten images


def test_the_owner_says_which_images_a_run_is_for(owned: Start, tmp_path: Path) -> None:
    """A server that names another folder gets the owner's; without that, its listing would come back as an error."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "secret").mkdir(parents=True)
    grid = owned({"data.path": str(elsewhere)})
    reply = ask(grid, RecordDict(), MessageType.QUERY)
    assert messages.read_cards(reply)[0].num_examples == 10  # all of the tiny images


def test_the_owner_says_which_shares_of_classes_a_run_may_read(owned: Start, tmp_path: Path) -> None:
    """A server that names a file gets the owner's, or an error whose words stay here; other runs ignore the shares."""
    secret, own = tmp_path / "secret.toml", tmp_path / "own.toml"
    secret.write_text('password = "x"', encoding="utf-8")
    own.write_text("[client-0]\ncat = 0.3\ndog = 0.7\n", encoding="utf-8")
    declared = {"train.class-prior": "declared", "data.class-shares": str(secret)}
    reply = ask(owned(declared), RecordDict(), MessageType.QUERY)
    assert "its message is in the log of the node" in reply.error.reason
    limits = f'class-shares = "{own}"\n{BUDGET}'
    for changes in (declared, {"train.class-prior": "list"}, {}):
        grid = owned(changes, limits)
        reply = ask(grid, RecordDict(), MessageType.QUERY)
        assert not reply.has_error(), reply.error.reason
        assert messages.read_uploads(train(grid, token=str(changes)), (4, 32)).partitions == (0,)


def test_the_words_of_an_error_stay_on_the_node(owned: Start, tmp_path: Path) -> None:
    notes = tmp_path / "patients.json"
    notes.write_text(json.dumps({"A. Person": 1}))
    reply = ask(owned(limits=f'classes = "{notes}"\n{BUDGET}'), RecordDict(), MessageType.QUERY)
    assert reply.has_error()
    assert "its message is in the log of the node" in reply.error.reason
    assert "Person" not in reply.error.reason


@pytest.mark.parametrize("held_out", ["auto", "public"])
def test_scores_never_leave_of_images_cut_out_of_training_folders(owned: Start, tmp_path: Path, held_out: str) -> None:
    """``scores = true`` is for test/ and val/ of the owner's folder; these images have neither."""
    reply = evaluate(owned({"evaluation.held-out-data": held_out}))
    assert reply.has_error()
    assert "score" in reply.error.reason


def odd(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "cat" / name)


def replies(grid: LocalGrid) -> list[tuple[bool, int]]:
    """What a server can tell apart: errors, and how many numbers came."""
    found: list[Message] = [ask(grid, RecordDict(), MessageType.QUERY), train(grid)]
    return [
        (reply.has_error(), 0 if reply.has_error() else sum(len(r) for r in reply.content.values())) for reply in found
    ]


def test_a_record_of_another_shape_changes_no_reply(
    owned: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preparation that keeps some sizes: what does not fit into the batch is a zero, not an error."""
    prepare = OpenClipBackbone.preprocess

    def sizes_differ(self: Any, image: Image.Image) -> Any:
        tensor = prepare(self, image)
        return tensor[:, :-8] if image.size == (2, 2) else tensor

    monkeypatch.setattr(OpenClipBackbone, "preprocess", sizes_differ)
    before = replies(owned())
    (tmp_path / "mine" / "ledger.jsonl").unlink()
    (tmp_path / "mine" / "prompt.safetensors").unlink()
    for number in range(8):
        odd(tmp_path, f"odd-{number}.png")
    assert replies(owned()) == before
    assert not before[1][0]


@pytest.mark.parametrize("why", ["replay", "over the plan", "over the budget", "other terms"])
def test_no_image_is_read_for_a_refused_round(owned: Start, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    grid = owned(limits=BUDGET.replace("1000", "0.001") if why == "over the budget" else BUDGET)
    if why in ("replay", "over the plan"):
        for server_round in range(1, 2 if why == "replay" else 3):
            assert messages.read_uploads(train(grid, server_round), (4, 32)).partitions == (0,)

    def never(*arguments: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(ImageTask, "client_data", never)
    terms = replace(OFFERED, clip_norm=2.0) if why == "other terms" else OFFERED
    # The same round with the same prompt would be what was sent, once more: docs/resume.md.
    prompt = PROMPT + 1 if why == "replay" else PROMPT
    reply = train(grid, 3 if why == "over the plan" else 1, terms=terms, prompt=prompt)
    (reason,) = messages.read_uploads(reply, (4, 32)).failed.values()
    assert reason.startswith("PrivacyError")
