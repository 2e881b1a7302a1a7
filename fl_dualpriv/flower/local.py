"""Engine ``local``: run the same ServerApp, ClientApp and Strategy objects as under Ray, in one process.

It is for tests, debugging and small machines. It gives real exit codes, starts at once, and computes bitwise the same
prompts as the Ray engine.
"""

import itertools
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fl_dualpriv.flower.app_modules import import_from, put_first

Config = Mapping[str, bool | int | float | str]

_CLIENT_APP_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class LocalGrid(Grid):
    """Flower Grid whose nodes are contexts of this process. One call of the ClientApp answers a message.

    Args:
        client_app: ClientApp that answers every message.
        num_supernodes: Number of nodes; each hosts one client or more.
        run_config: Flat run configuration, as Flower passes it to apps.
    """

    def __init__(self, client_app: ClientApp, num_supernodes: int, run_config: Config) -> None:
        self._app = client_app
        self.run_id = secrets.randbits(62)
        self._message_ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self.contexts = {
            index + 1: Context(
                run_id=self.run_id,
                node_id=index + 1,
                node_config={"partition-id": index, "num-partitions": num_supernodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index in range(num_supernodes)
        }
        # Flower makes messages only inside a task. This process is the task of node 0, the server.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, self.run_id, 0

    def set_run(self, run: Any) -> None:
        """Do nothing, because the grid is made for one run."""

    @property
    def run(self) -> Any:
        """Unavailable: this grid has no Flower ``Run``."""
        raise NotImplementedError("the local engine has no Run record; use LocalGrid.run_id")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message from the server."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes. They exist from the start."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message at once. An exception of the client becomes an error reply, as under Ray."""
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str:
        name = f"local-{next(self._message_ids)}"
        message.metadata.__dict__["_message_id"] = name
        try:
            reply = self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # any error that a client raises is its own failure, not the server's
            reply = Message(Error(_CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        self._replies[name] = reply
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies in the requested order. Each reply is returned once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull. ``timeout`` has no effect, because no reply can be late."""
        return self.pull_messages(self.push_messages(messages))


def load_apps(app_dir: Path) -> tuple[ServerApp, ClientApp]:
    """Import the ServerApp and ClientApp that the app's pyproject.toml names."""
    project = tomllib.loads((app_dir / "pyproject.toml").read_text(encoding="utf-8"))
    components = project["tool"]["flwr"]["app"]["components"]
    put_first(app_dir)
    server, client = (_load(components[name], app_dir) for name in ("serverapp", "clientapp"))
    return server, client


def _load(reference: str, app_dir: Path) -> Any:
    module_name, name = reference.split(":")
    return getattr(import_from(app_dir, module_name), name)


def run_local(app_dir: Path, run_config: Config) -> None:
    """Run the whole federation in this process, and return when it has succeeded.

    Args:
        app_dir: Folder with the app's pyproject.toml.
        run_config: Flat run configuration. The number of nodes is ``supernodes``, or ``population`` if that is 0.

    Raises:
        Exception: Any error of the server app, unchanged.
    """
    server_app, client_app = load_apps(app_dir)
    grid = LocalGrid(client_app, int(run_config["supernodes"] or run_config["population"]), run_config)
    context = Context(run_id=grid.run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(run_config))
    server_app(grid, context)


def engine_name(grid: Grid) -> str:
    """Return ``local``, ``ray`` (Flower's simulation runtime) or ``deployment``."""
    if isinstance(grid, LocalGrid):
        return "local"
    return "ray" if type(grid).__name__ == "InMemoryGrid" else "deployment"
