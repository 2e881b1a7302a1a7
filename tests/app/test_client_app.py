"""The ClientApp's handlers as a server sees them, also a server that asks for too much."""

import fcntl
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from flwr.app import Message, MessageType, RecordDict

import fl_dualpriv.client.node
import fl_dualpriv.client.round
from fl_dualpriv import messages
from fl_dualpriv.files import read_tensors, write_tensors
from fl_dualpriv.learners.row_check import RowPath
from fl_dualpriv.privacy import ledger as ledger_module
from fl_dualpriv.privacy.ledger import Ledger
from fl_dualpriv.privacy.plan import RoundTerms
from tests.app.client_node import (
    KINDS,
    NO_PRIVACY,
    OFFERED,
    PROMPT,
    Nodes,
    ask,
    evaluate,
    ledger_lines,
    tiny_nodes,
    train,
    uploads,
)


@pytest.fixture
def nodes(tiny_clip_dir: Path, tmp_path: Path) -> Nodes:
    return tiny_nodes(tiny_clip_dir, tmp_path)


def test_a_query_says_who_and_how_many(nodes: Nodes):
    reply = ask(nodes(), RecordDict(), MessageType.QUERY)
    # 8 images a class, less max(1, round(0.1 * 8)) = 1 for val and round(0.2 * 8) = 2 for test; one class a client
    (card,) = messages.read_cards(reply)
    assert (card.partition, card.num_examples) == (0, 5)
    assert card.rows in get_args(RowPath)  # which one is a matter of the machine


def test_an_upload_leaves_and_the_personal_prompt_stays(nodes: Nodes, tmp_path: Path):
    reply = train(nodes())
    assert list(reply.content) == ["arrays", "clients"]
    assert dict(reply.content["clients"]) == {"partitions": [0], "failed": [], "reasons": []}
    (upload,) = uploads(reply).values
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
        "node-run.json",
        "prompt.safetensors",
        "sent.safetensors",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_multiplier": 1.0}, "noise multiplier 1, here at least 1.5"),
        ({"noise_multiplier": 0.0}, "noise multiplier 0"),
        ({"noise_multiplier": float("nan")}, "noise multiplier nan"),
        ({"clip_norm": 1.5}, "clip norm 1.5, here at most 1"),
        ({"clip_norm": float("nan")}, "clip norm nan"),
        ({"sampling_rate": 0.2}, "sampling rate 0.2, here at most 0.15"),
        ({"releases": 2}, "2 local steps, here at most 1"),
        ({"mechanism": "none"}, "mechanism 'none', here 'gaussian'"),
        ({"trusts_server": True}, "an upload without noise"),
        ({"arithmetic": "integer"}, "arithmetic 'integer', here 'float'"),
    ],
)
def test_a_server_that_asks_for_more_gets_nothing(nodes: Nodes, tmp_path: Path, changes: dict[str, Any], words: str):
    found = uploads(train(nodes(), terms=replace(OFFERED, **changes)))
    assert found.partitions == ()
    assert words in found.failed[0]
    assert ledger_lines(tmp_path) == 0
    assert not list(tmp_path.glob("out/**/prompt.safetensors"))
    (line,) = (tmp_path / "out" / "clients" / "client-000" / "refusals.jsonl").read_text().splitlines()
    assert words in json.loads(line)["reason"]
    assert json.loads(line)["asked"] == "train, round 1"


def test_a_server_that_asks_for_floats_gets_nothing_from_an_integer_run(nodes: Nodes, tmp_path: Path):
    """Low-order bits of float noise tell of the data: whose plan is integers never sends others."""
    grid = nodes({"privacy.arithmetic": "integer"})
    found = uploads(train(grid))
    assert found.partitions == ()
    assert "arithmetic 'float', here 'integer'" in found.failed[0]
    assert ledger_lines(tmp_path) == 0
    assert uploads(train(grid, terms=replace(OFFERED, arithmetic="integer"))).partitions == (0,)


def test_a_server_that_asks_for_less_is_served_on_our_terms(nodes: Nodes):
    cautious = replace(OFFERED, noise_multiplier=9.0, clip_norm=0.1, sampling_rate=0.01)
    assert uploads(train(nodes(), terms=cautious)).partitions == (0,)


def test_a_prompt_of_another_shape_is_refused(nodes: Nodes, tmp_path: Path):
    """(1, 32) would broadcast to every place of the client's own prompt."""
    found = uploads(train(nodes(), prompt=torch.zeros(1, 32)))
    assert "of shape (1, 32); this run's is (4, 32)" in found.failed[0]
    assert ledger_lines(tmp_path) == 0


def test_a_round_that_a_crash_cut_off_after_its_event_is_not_repeated(nodes: Nodes, tmp_path: Path):
    grid = nodes()
    train(grid)
    (tmp_path / "out" / "clients" / "client-000" / "prompt.safetensors").unlink()  # the state was not kept
    assert "round 1 was done" in uploads(train(grid)).failed[0]
    assert ledger_lines(tmp_path) == 1


@pytest.mark.parametrize("randomness", ["os", "seeded"])
def test_a_repeated_question_gets_the_same_upload_and_costs_nothing(nodes: Nodes, tmp_path: Path, randomness: str):
    """As from a server that was cut off: for the last two rounds, bit by bit, without a release."""
    grid = nodes({"privacy.randomness": randomness, "rounds": 4})
    first = [uploads(train(grid, r)).values for r in (1, 2, 3)]
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "clients" / "client-000").iterdir()}
    for server_round in (2, 3, 2):
        assert torch.equal(uploads(train(grid, server_round)).values, first[server_round - 1])
    for refused in (uploads(train(grid, 1)), uploads(train(grid, 3, prompt=PROMPT + 1))):
        assert "was done (last: 3); a repetition is refused" in refused.failed[0]
    after = {p.name: p.read_bytes() for p in (tmp_path / "out" / "clients" / "client-000").iterdir()}
    assert {name: after[name] for name in before} == before
    assert not torch.equal(uploads(train(grid, 4)).values, first[2])


@pytest.mark.parametrize(
    ("before", "asked"),
    [
        ({"privacy.record.trusts-server": True}, replace(OFFERED, trusts_server=True)),
        ({"privacy.record.mechanism": "none"}, NO_PRIVACY),
    ],
)
def test_what_one_server_was_trusted_with_is_not_sent_to_another(
    nodes: Nodes, tmp_path: Path, before: dict[str, Any], asked: RoundTerms
):
    """A token and a global prompt are public after a run: neither they nor its state open its clean uploads."""
    clean = uploads(train(nodes(before), terms=asked)).values
    assert len(clean) == 1
    assert (tmp_path / "out" / "clients" / "client-000" / "sent.safetensors").stat().st_mode & 0o077 == 0
    lines, other = ledger_lines(tmp_path), nodes()
    for server_round in (1, 2):  # the kept sum itself, and a personal prompt that was moved without noise
        found = uploads(train(other, server_round))
        assert found.partitions == ()
        assert "the run of this token was on other terms" in found.failed[0]
    assert ledger_lines(tmp_path) == lines
    scores = messages.read_scores(evaluate(other))
    assert scores.partitions == ()


def test_with_a_seed_a_round_that_was_cut_off_is_made_as_it_would_have_been(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed between its event and its state: the same upload and no second event; and not if the state was lost."""
    grid, folder = nodes({"privacy.randomness": "seeded", "rounds": 4}), tmp_path / "out" / "clients" / "client-000"
    train(grid, 1)
    kept = {p: p.read_bytes() for p in folder.glob("*.safetensors")}
    expected = uploads(train(grid, 2)).values
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "round 2 was done" in uploads(train(grid, 2)).failed[0]  # from no state at all it would be another release
    for path, content in kept.items():
        path.write_bytes(content)
    assert torch.equal(uploads(train(grid, 2)).values, expected)
    assert ledger_lines(tmp_path) == 2


def test_a_server_that_sends_nan_gets_noise_alone(nodes: Nodes):
    reply = train(nodes(), prompt=torch.full((4, 32), torch.nan))
    # every gradient is NaN, so every clipped row is zero; local minus global is NaN: the server makes it zero
    assert not torch.isfinite(uploads(reply).values).any()


@pytest.mark.parametrize(
    "requests",
    [[(1, "t"), (2, "t"), (3, "t")], [(1, "t"), (1, "u"), (1, "v")]],
    ids=["later round", "new run tokens"],
)
def test_no_more_releases_than_the_plan_accounts_for(nodes: Nodes, tmp_path: Path, requests: list[tuple[int, str]]):
    grid = nodes()  # two rounds of one step: ε is of two releases
    replies = [train(grid, server_round, token=token) for server_round, token in requests]
    assert list(uploads(replies[-1]).failed) == [0]
    assert ledger_lines(tmp_path) <= 2  # a repetition is refused before its release


@pytest.mark.parametrize("kind", KINDS)
def test_private_held_out_data_are_not_scored_for_any_server(nodes: Nodes, kind: messages.PromptKind):
    assert evaluate(nodes({"evaluation.held-out-data": "private"}), kind).has_error()


def test_personal_and_global_scores_count_the_same_images(nodes: Nodes):
    grid = nodes()
    train(grid)
    tables = [messages.read_scores(evaluate(grid, kind)).values for kind in KINDS]
    assert [len(table) for table in tables] == [1] * len(KINDS)
    assert all(table.total.tolist() == [2, 2] for table in tables)
    assert {tuple(table.held[0].tolist()) for table in tables} == {(True, False)}  # one class of two is the client's


# --- a node that hosts several clients --------------------------------------------------------------------------------


def test_a_node_hosts_every_kth_client(nodes: Nodes):
    cards = messages.read_cards(ask(nodes({"population": 5}), RecordDict(), MessageType.QUERY))
    assert [card.partition for card in cards] == [0, 2, 4]
    assert all(card.num_examples > 0 for card in cards)


def test_a_node_that_the_run_has_no_place_for_is_refused(nodes: Nodes):
    grid = nodes()
    grid.contexts[1].node_config["partition-id"] = 2
    reply = ask(grid, RecordDict(), MessageType.QUERY)
    assert "but the run has 2 nodes" in reply.error.reason


@pytest.mark.parametrize("partitions", [(0, 1), (0, 0), (0, -2), (7,)], ids=str)
@pytest.mark.parametrize("what", [train, evaluate])
def test_a_message_about_clients_that_are_not_here_is_refused_whole(
    nodes: Nodes, tmp_path: Path, what: Callable[..., Message], partitions: tuple[int, ...]
):
    reply = what(nodes({"population": 4}), partitions=partitions)
    assert "this node does not host" in reply.error.reason
    assert not (tmp_path / "out").exists()


def test_clients_of_a_node_keep_their_states_and_ledgers_apart(nodes: Nodes, tmp_path: Path):
    grid = nodes({"population": 4}, num_supernodes=1)
    found = uploads(train(grid, partitions=(3, 0, 2)))
    assert (found.partitions, found.failed) == ((0, 2, 3), {})
    assert [ledger_lines(tmp_path, p) for p in range(4)] == [1, 0, 1, 1]
    folders = sorted(p.parent.name for p in tmp_path.glob("out/clients/*/prompt.safetensors"))
    assert folders == ["client-000", "client-002", "client-003"]
    assert uploads(train(grid, partitions=(1,))).partitions == (1,)
    # A round that was done for another prompt is refused, by those who did it.
    again = uploads(train(grid, server_round=2, partitions=(1,)))
    assert again.partitions == (1,)
    mixed = uploads(train(grid, server_round=2, partitions=(0, 1), prompt=PROMPT + 1))
    assert (mixed.partitions, list(mixed.failed)) == ((0,), [1])
    assert "a repetition is refused" in mixed.failed[1]


def test_an_owners_folder_is_for_one_client(nodes: Nodes, tmp_path: Path):
    """Another layout of clients would start new ledgers for records whose budget is spent."""
    grid = nodes({"population": 4})
    grid.contexts[1].node_config["state-dir"] = str(tmp_path / "mine")
    reply = train(grid, partitions=(0, 2))
    assert "state-dir" in reply.error.reason
    assert not (tmp_path / "mine").exists()


def test_a_client_whose_folder_is_in_the_way_takes_nobody_down(nodes: Nodes, tmp_path: Path):
    blocked = tmp_path / "out" / "clients" / "client-002"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    grid = nodes({"population": 4}, num_supernodes=1)
    found = uploads(train(grid, partitions=(0, 1, 2, 3)))
    assert (found.partitions, list(found.failed)) == ((0, 1, 3), [2])


def test_a_client_whose_prompt_is_damaged_takes_nobody_down(nodes: Nodes, tmp_path: Path):
    grid = nodes({"population": 4}, num_supernodes=1)
    train(grid, partitions=(0, 1, 2, 3))
    (tmp_path / "out" / "clients" / "client-002" / "prompt.safetensors").write_bytes(b"junk")
    scores = messages.read_scores(evaluate(grid, partitions=(0, 1, 2, 3)))
    assert (scores.partitions, list(scores.failed)) == ((0, 1, 3), [2])
    again = uploads(train(grid, server_round=2, partitions=(0, 1, 2, 3)))
    assert (again.partitions, list(again.failed)) == ((0, 1, 3), [2])
    assert ledger_lines(tmp_path, 2) == 1  # it failed before its release


@pytest.mark.parametrize("damage", ["rank", "width", "dtype", "missing"])
def test_a_client_whose_state_has_another_form_takes_nobody_down(nodes: Nodes, tmp_path: Path, damage: str):
    grid = nodes({"population": 4}, num_supernodes=1)
    train(grid, partitions=(0, 1, 2, 3))
    file = tmp_path / "out" / "clients" / "client-002" / "prompt.safetensors"
    tensors, metadata = read_tensors(file)
    match damage:
        case "rank":
            tensors["carrier"] = tensors["carrier"][:1]
        case "width":
            tensors["personal"] = tensors["personal"][:, :5]
        case "dtype":
            tensors["personal"] = tensors["personal"].double()
        case "missing":
            del tensors["carrier"]
    write_tensors(file, tensors, metadata)
    scores = messages.read_scores(evaluate(grid, partitions=(0, 1, 2, 3)))
    assert (scores.partitions, list(scores.failed)) == ((0, 1, 3), [2])
    again = uploads(train(grid, server_round=2, partitions=(0, 1, 2, 3)))
    assert (again.partitions, list(again.failed)) == ((0, 1, 3), [2])
    assert [ledger_lines(tmp_path, p) for p in range(4)] == [2, 2, 1, 2]  # it failed before its release


def test_a_client_whose_ledger_is_held_elsewhere_takes_nobody_down(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ledger_module, "_LOCK_SECONDS", 0.1)
    held = Ledger(tmp_path / "out" / "clients" / "client-002" / "ledger.jsonl")
    grid = nodes({"population": 4}, num_supernodes=1)
    with held.exclusive():
        found = uploads(train(grid, partitions=(0, 1, 2, 3)))
    assert (found.partitions, list(found.failed)) == ((0, 1, 3), [2])
    assert "TimeoutError" in found.failed[2]
    assert ledger_lines(tmp_path, 2) == 0


def test_a_common_step_that_fails_is_tried_client_by_client(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update = fl_dualpriv.client.round.cohort_update

    def too_large(**arguments: Any) -> Any:
        if len(arguments["participants"]) > 1 or arguments["participants"][0].partition == 3:
            raise MemoryError
        return update(**arguments)

    everyone = (0, 1, 2, 3)
    seeded = {"population": 4, "privacy.randomness": "seeded"}
    expected = uploads(
        train(nodes(seeded | {"output.dir": str(tmp_path / "together")}, num_supernodes=1), partitions=everyone)
    )
    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", too_large)
    found = uploads(train(nodes(seeded, num_supernodes=1), partitions=everyone))
    assert (found.partitions, list(found.failed)) == ((0, 1, 2), [3])
    assert torch.equal(found.values, expected.values[:3])
    assert [ledger_lines(tmp_path, p) for p in everyone] == [1, 1, 1, 1]  # one round each, however it was computed


def test_an_error_of_every_step_fails_everybody_and_the_events_stay(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def boom(**arguments: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", boom)
    found = uploads(train(nodes({"population": 4}), partitions=(0, 2)))
    assert found.partitions == ()
    assert found.failed == dict.fromkeys((0, 2), "RuntimeError; its message is in the log of the node")  # not "boom"
    assert found.values.shape == (0, 4, 32)
    assert [ledger_lines(tmp_path, p) for p in (0, 2)] == [1, 1]


def test_ledgers_are_held_until_the_states_are_kept(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    update, seen = fl_dualpriv.client.round.cohort_update, []

    def looking(**arguments: Any) -> Any:
        for p in (0, 2):
            lock = tmp_path / "out" / "clients" / f"client-{p:03d}" / "ledger.lock"
            with lock.open("w") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            seen.append(ledger_lines(tmp_path, p))
        return update(**arguments)

    monkeypatch.setattr(fl_dualpriv.client.round, "cohort_update", looking)
    assert uploads(train(nodes({"population": 4}), partitions=(0, 2))).partitions == (0, 2)
    assert seen == [1, 1]  # written before anything is drawn


@pytest.mark.parametrize("method", ["promptfl", "dpfpl"])
def test_without_anything_to_keep_no_file_is_written(nodes: Nodes, tmp_path: Path, method: str):
    grid = nodes({"population": 4, "method": method, "privacy.record.mechanism": "none"})
    assert uploads(train(grid, terms=NO_PRIVACY, partitions=(0, 2))).partitions == (0, 2)
    assert (tmp_path / "out" / "clients").exists() is (method == "dpfpl")
    train(grid, terms=NO_PRIVACY, partitions=(0, 2))  # without DP a repetition costs nothing
