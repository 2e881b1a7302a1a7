"""The pin, on the installed Flower's own node state: what was not allowed leaves nothing behind but an error."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supernode.nodestate import NodeStateFactory

from fl_dualpriv.flower.app_bundle import build_bundle, digest_of
from fl_dualpriv.node import pin as node_pin
from fl_dualpriv.node.pin import PinUnavailable, install, pinned

LOOP = importlib.import_module("flwr.supernode.start_client_internal")
PROGRAM = importlib.import_module("flwr.supernode.cli.flower_supernode")
PULL, INSERT = LOOP._pull_and_store_message, LOOP._insert_message

PYPROJECT = """
[project]
name = "some-app"
version = "1.2.0"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "some:app"
clientapp = "some:app"
"""


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    app = tmp_path_factory.mktemp("some-app")
    (app / "pyproject.toml").write_text(PYPROJECT)
    (app / "some.py").write_text("app = 1\n")
    return build_bundle(app)


class Node:
    """A node's state, and a server that sends it a message of a run, with a bundle."""

    def __init__(self) -> None:
        stores = ObjectStoreFactory()
        self.state = NodeStateFactory(objectstore_factory=stores).state()
        self.store = stores.store()
        self.state.set_node_id(7)
        self.fetched = 0

    def ask(
        self,
        pull: Callable[..., int | None],
        content: bytes,
        *,
        hash_str: str | None = None,
        trusted: dict[str, str] | None = None,
        **run: str,
    ) -> int | None:
        """Let ``pull`` take a message of a run that the server describes with ``run``."""
        digest = digest_of(content)
        described = Run.create_empty(run_id=5)
        described.fab_id, described.fab_version, described.fab_hash = "someone/some-app", "1.2.0", digest
        for name, value in run.items():
            setattr(described, name, value)
        metadata = Metadata(
            run_id=5,
            message_id="",
            src_node_id=0,
            dst_node_id=7,
            reply_to_message_id="",
            group_id="",
            created_at=float(self.fetched),
            ttl=1e12,
            message_type="train",
        )
        message = make_message(metadata=metadata, content=RecordDict())
        tree, objects = get_object_tree(message), get_all_nested_objects(message)
        message.metadata.__dict__["_message_id"] = message.object_id

        def get_fab(_hash: str, _run_id: int) -> Fab:
            self.fetched += 1
            return Fab(digest if hash_str is None else hash_str, content, {})

        return pull(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, tree),
            get_run=lambda _run_id: described,
            get_fab=get_fab,
            pull_object=lambda _run_id, object_id: objects[object_id].deflate(),
            confirm_message_received=lambda _run_id, _message_id: None,
            trusted_entities=trusted,
        )

    def refusals(self) -> list[str]:
        """Reasons of all replies, which must be errors; nothing else may be there."""
        assert self.state.get_run(5) is None
        assert not self.state.get_tasks()
        assert not self.state.get_messages_legacy(is_reply=False)
        replies: list[Message] = list(self.state.get_messages_legacy(is_reply=True))
        assert all(reply.error.code == 7 for reply in replies)  # INVALID_FAB
        return [reply.error.reason or "" for reply in replies]


def test_an_allowed_app_gets_in(content: bytes):
    node = Node()
    assert node.ask(pinned(PULL, INSERT, [digest_of(content)]), content) == 5
    fab = node.state.get_fab(digest_of(content))
    assert fab is not None
    assert fab.content == content
    assert len(node.state.get_tasks()) == 1
    assert node.ask(pinned(PULL, INSERT, [digest_of(content)]), content) == 5
    assert node.fetched == 1  # the run is known: its bundle is in the state


@pytest.mark.parametrize("lie", [None, "", "that of an allowed app"])
def test_an_app_that_is_not_allowed_leaves_nothing_but_an_error(content: bytes, lie: str | None):
    node, allowed = Node(), [digest_of(content)]
    changed = content.replace(b"app = 1", b"app = 2")
    hash_str = allowed[0] if lie else lie  # the server's word for the digest
    pull = pinned(PULL, INSERT, allowed)
    assert node.ask(pull, changed, hash_str=hash_str) == 5
    assert node.state.get_fab(digest_of(changed)) is None
    assert node.state.get_fab(allowed[0]) is None
    (reason,) = node.refusals()
    assert digest_of(changed) in reason
    node.ask(pull, changed, hash_str=hash_str)
    assert len(node.refusals()) == 1
    assert node.fetched == 2  # looked at anew
    assert node.ask(pull, content) == 5  # the node goes on
    assert node.state.get_run(5) is not None


@pytest.mark.parametrize(
    "run",
    [
        {"fab_id": "evil/some-app"},
        {"fab_version": "1.2.0.0/../../evil"},
        {"fab_hash": "0" * 64},
        {"hash_str": "0" * 64},
    ],
    ids=str,
)
def test_a_run_that_would_find_other_code_on_the_disk_is_refused(content: bytes, run: dict[str, str]):
    """Flower loads what lies under apps/PUBLISHER.NAME.VERSION.HASH, in the words of the run."""
    node = Node()
    node.ask(pinned(PULL, INSERT, [digest_of(content)]), content, **run)
    assert node.state.get_fab(digest_of(content)) is None
    (reason,) = node.refusals()
    assert "but the bundle is 'someone/some-app' '1.2.0'" in reason


def test_flowers_own_check_of_publishers_still_runs(content: bytes):
    node = Node()
    node.ask(pinned(PULL, INSERT, [digest_of(content)]), content, trusted={"key": "ssh-ed25519 ..."})
    assert node.refusals() == ["The FAB could not be verified."]


def test_no_message_and_a_run_that_ended_are_no_refusals(content: bytes):
    pull = pinned(PULL, INSERT, [])

    def ended() -> None:
        raise RunNotRunningException

    node, nothing = Node(), lambda *_: pytest.fail("nothing was received")
    for receive in (lambda: None, ended):
        given = dict.fromkeys(("get_run", "get_fab", "pull_object", "confirm_message_received"), nothing)
        rest = {"state": node.state, "object_store": node.store, "node_config": {}, "trusted_entities": None}
        assert pull(receive=receive, **given, **rest) is None
    assert node.refusals() == []


def test_install_pins_the_loop_of_the_installed_flower(content: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LOOP, "_pull_and_store_message", PULL)  # put back at the end
    install(["0" * 64])
    node = Node()
    node.ask(LOOP._pull_and_store_message, content)
    assert len(node.refusals()) == 1


def lets_all_in(**given: Any) -> int | None:
    """A Flower that stores a bundle by another way than the one that it is handed."""
    message, _ = given["receive"]()
    run = given["get_run"](message.metadata.run_id)
    given["state"].store_run(run)
    return given["get_fab"](run.fab_hash, run.run_id) and 1


def swallows(**given: Any) -> int | None:
    """A Flower that catches what comes out of a callback."""
    try:
        return PULL(**given)
    except Exception:
        return None


def renamed(*, node_state: Any) -> int | None:
    """A Flower that calls its parameters otherwise."""
    return node_state


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [
        (LOOP, "_pull_and_store_message", lets_all_in),
        (LOOP, "_pull_and_store_message", swallows),
        (LOOP, "_pull_and_store_message", renamed),
        (LOOP, "_insert_message", lambda *_: None),
        (LOOP, "_insert_message", None),
        (PROGRAM, "start_client_internal", lambda **_: None),
    ],
    ids=["lets all in", "swallows", "renamed", "sends no reply", "gone", "another loop"],
)
def test_another_flower_is_not_started(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, other: Any):
    if other is None:
        monkeypatch.delattr(module, name)
    else:
        monkeypatch.setattr(module, name, other)
    before = LOOP._pull_and_store_message
    with pytest.raises(PinUnavailable, match="the node is not started"):
        install(["0" * 64])
    assert LOOP._pull_and_store_message is before


def test_a_loop_that_takes_messages_otherwise_is_not_started(monkeypatch: pytest.MonkeyPatch):
    def loop(**given: Any) -> None:
        PULL(**given)

    for module in (LOOP, PROGRAM):
        monkeypatch.setattr(module, "start_client_internal", loop)
    with pytest.raises(PinUnavailable, match="does not call _pull_and_store_message"):
        install(["0" * 64])
    assert node_pin._log.disabled is False
