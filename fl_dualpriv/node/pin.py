"""The pin: a list of the app bundles that may run on a node. The SuperNode checks it before it imports code of an app.

Flower gives a node any app that its server names. A node that runs any code that it receives has no budget at all: that
code can read the data and send any answer. Flower's own ``--trusted-entities`` needs signatures of Flower's hub; a list
of digests needs no third party. A bundle reaches a SuperNode only in ``_pull_and_store_message``, which is not a public
name of Flower. Therefore `install` replaces this function only after the replacement has refused a bundle on trial, in
the installed Flower. Otherwise no node is started.
"""

import importlib
import logging
from collections.abc import Callable, Collection
from typing import Any

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.app_bundle import digest_of, read_bundle

_INVALID_FAB = 7  # Flower's ErrorCode.INVALID_FAB
_log = logging.getLogger("flwr")  # so that the SuperNode's own log has the refusals


class AppRefused(Exception):
    """The app of a message may not run here. The text is for the server and the log."""


class PinUnavailable(RuntimeError):
    """The pin is not known to hold in the installed Flower. No node may be started."""


def check_app(allowed: Collection[str], run: Any, bundle: Any) -> None:
    """Refuse a run whose app the owner did not allow.

    Guarantee:
        After this check the bundle's bytes have one of the digests in ``allowed``, and the run gives the bundle's own
        name and version. A node looks for the unpacked app under a path made of name and version, so other names could
        lead it to other code on its disk.

    Args:
        allowed: SHA-256 digests, lower-case hex.
        run: Flower's ``Run``, as the server describes it.
        bundle: Flower's ``Fab``, as the server sent it. Its ``hash_str`` is only a claim of the server, not trusted.

    Raises:
        AppRefused: If the bundle is not allowed, is not the bundle of an app, or is not the one that the run names.
    """
    digest = digest_of(bundle.content)
    if digest not in allowed:
        raise AppRefused(
            f"this node runs only apps that its owner allowed, and the bundle with SHA-256 {digest} "
            f"({len(bundle.content)} bytes) is not one of them"
        )
    try:
        app = read_bundle(bundle.content)
    except ConfigError as error:
        raise AppRefused(str(error)) from error
    claimed = (run.fab_id, run.fab_version, run.fab_hash, bundle.hash_str or digest)
    if claimed != (app.app_id, app.version, digest, digest):
        raise AppRefused(
            f"the run names its app {run.fab_id!r:.80} {run.fab_version!r:.40} {run.fab_hash!r:.80}, but the bundle is "
            f"{app.app_id!r} {app.version!r} {digest}"
        )


def pinned(
    pull: Callable[..., int | None], insert: Callable[..., None], allowed: Collection[str]
) -> Callable[..., int | None]:
    """Return Flower's ``_pull_and_store_message`` with a refusal of messages of apps that are not allowed.

    Guarantee:
        A bundle reaches the node's state, from which the processes of apps take their code, only through `check_app`.
        The answer to a refused message is an error that says why. No part of its run is kept, so each message of the
        run is checked again. The parameters have Flower's names. If a later Flower calls the function in another way,
        that is an error, and no message is accepted.

    Args:
        pull: Flower's function.
        insert: Flower's ``_insert_message``, which queues a reply.
        allowed: SHA-256 digests, lower-case hex.
    """
    from flwr.app import Error, Message

    def pull_and_store(
        *,
        state: Any,
        object_store: Any,
        node_config: Any,
        receive: Callable[[], Any],
        get_run: Callable[[int], Any],
        get_fab: Callable[[str, int], Any],
        pull_object: Callable[[int, str], bytes],
        confirm_message_received: Callable[[int, str], None],
        trusted_entities: dict[str, str] | None,
    ) -> int | None:
        received: list[Any] = []
        runs: dict[int, Any] = {}

        def receive_and_note() -> Any:
            delivery = receive()
            if delivery is not None:
                received.append(delivery[0])
            return delivery

        def get_run_and_note(run_id: int) -> Any:
            runs[run_id] = get_run(run_id)
            return runs[run_id]

        def get_checked(fab_hash: str, run_id: int) -> Any:
            bundle = get_fab(fab_hash, run_id)
            check_app(allowed, runs[run_id], bundle)
            return bundle

        try:
            return pull(
                state=state,
                object_store=object_store,
                node_config=node_config,
                receive=receive_and_note,
                get_run=get_run_and_note,
                get_fab=get_checked,
                pull_object=pull_object,
                confirm_message_received=confirm_message_received,
                trusted_entities=trusted_entities,
            )
        except AppRefused as refusal:
            (message,) = received
            _log.error("[RUN %s] app refused: %s", message.metadata.run_id, refusal)
            insert(Message(Error(_INVALID_FAB, f"AppRefused: {refusal}"), reply_to=message), state, object_store)
            return message.metadata.run_id

    return pull_and_store


def install(allowed: Collection[str]) -> None:
    """Pin the SuperNode of this process to some apps, for good.

    Guarantee:
        When this returns, the SuperNode that this process may start accepts bundles only through `pinned`. This is
        tested on the installed Flower, not assumed. The SuperNode's loop looks the function up under the replaced name,
        and the replacement has refused a bundle on trial. The trial left no run, no code and no task behind, and one
        error as a reply.

    Raises:
        PinUnavailable: If any of this does not hold. Then start no node.
    """
    try:
        loop: Any = importlib.import_module("flwr.supernode.start_client_internal")
        # Import by name, because the package also has a function with the module's name.
        program = importlib.import_module("flwr.supernode.cli.flower_supernode")
        pull, insert = loop._pull_and_store_message, loop._insert_message
        if program.start_client_internal is not loop.start_client_internal:
            raise PinUnavailable("flower-supernode runs another loop")
        if "_pull_and_store_message" not in loop.start_client_internal.__code__.co_names:
            raise PinUnavailable("its loop does not call _pull_and_store_message")
        _try_out(pinned(pull, insert, frozenset()))
        loop._pull_and_store_message = pinned(pull, insert, frozenset(allowed))
    except Exception as error:  # any error means that this Flower has another form
        import flwr

        raise PinUnavailable(
            f"Flower {flwr.__version__} does not receive apps in the way that this pin knows ({type(error).__name__}: "
            f"{error}); the node is not started. Install a version of Flower that pyproject.toml names"
        ) from error


def _try_out(pull: Callable[..., int | None]) -> None:
    """Give ``pull``, which allows no app, a message with a bundle, in a separate node state.

    Raises:
        PinUnavailable: If any part of the bundle got into the node, or the reply is not one error.
    """
    from flwr.app import Metadata, RecordDict
    from flwr.app.message import make_message
    from flwr.supercore.fab import Fab
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supercore.run import Run
    from flwr.supernode.nodestate import NodeStateFactory

    # A node state in memory, a run and a message, as a server would make them.
    stores = ObjectStoreFactory()
    state, content = NodeStateFactory(objectstore_factory=stores).state(), b"the bundle of no app"
    state.set_node_id(1)
    run = Run.create_empty(run_id=1)
    run.fab_hash = digest_of(content)
    asked = make_message(
        metadata=Metadata(
            run_id=1,
            message_id="trial",
            src_node_id=0,
            dst_node_id=1,
            reply_to_message_id="",
            group_id="",
            created_at=0.0,
            ttl=1e12,
            message_type="query",
        ),
        content=RecordDict(),
    )
    # The function under trial gets the bundle through the same parameters as in a real node.
    was_disabled, _log.disabled = _log.disabled, True  # an owner need not read about this refusal
    try:
        answered = pull(
            state=state,
            object_store=stores.store(),
            node_config={},
            receive=lambda: (asked, None),
            get_run=lambda _run_id: run,
            get_fab=lambda _hash, _run_id: Fab(run.fab_hash, content, {}),
            pull_object=lambda _run_id, _object_id: b"",
            confirm_message_received=lambda _run_id, _message_id: None,
            trusted_entities=None,
        )
    finally:
        _log.disabled = was_disabled
    # Nothing of the bundle may have arrived, and the one answer must be Flower's error for a bad bundle.
    if state.get_run(1) is not None or state.get_fab(run.fab_hash) is not None or state.get_tasks():
        raise PinUnavailable("a bundle that is not allowed got into the node on trial")
    replies = state.get_messages_legacy(is_reply=True)
    if answered != 1 or [reply.has_error() and reply.error.code for reply in replies] != [_INVALID_FAB]:
        raise PinUnavailable("a bundle that is not allowed was not answered with an error on trial")
