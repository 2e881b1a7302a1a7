"""Start Flower's SuperNode for the owner of some data: their node file, and no app but those that it allows.

The SuperNode runs in this process, since the pin (`node.pin`) must stand where apps arrive. Flower unpacks an app into
its home and later loads it from there by name, without a second look; so a node gets a home of its own, empty at the
start and closed to other users: only bundles that passed the pin are ever unpacked in it.
"""

import logging
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.flower import programs
from fl_dualpriv.flower.engine import to_toml
from fl_dualpriv.node import health as node_health
from fl_dualpriv.node import pin as node_pin
from fl_dualpriv.node.data import before_joining
from fl_dualpriv.node.device import probe
from fl_dualpriv.node.file import ENVIRONMENT, NodeFile, missing_folders, read_node_file
from fl_dualpriv.node.tables import NodeServer, split_address
from fl_dualpriv.run.user_folders import home as home_of_user

ANY_APP = (
    "--any-app: this node runs whatever code its server sends, and against a hostile server it then has no budget at "
    "all: such code can read the data and send it away"
)


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What an owner says at the start; the rest stands in the node file, and None is what stands there too.

    Attributes:
        node_file: The owner's file.
        superlink: ``HOST:PORT`` of the server.
        insecure: Without TLS; for a SuperLink on this machine.
        root_certificates: PEM file that the server's certificate is checked with; None: the system's.
        auth_private_key: SSH key (NIST curve) by which the server knows this node; None: anonymous.
        trusted_entities: Flower's YAML file of publishers; a bundle must then also be signed by one of them.
        partition_id: Which client of the run this node is, from 0.
        host: Address of the port below; other machines have no business there.
        port: TCP port between this node and the processes of its apps; each node of a machine needs its own.
        max_retries: Attempts to reach the server again; None: for ever.
        any_app: Start without a pin.
        health_seconds: Between two looks at the node's health.
    """

    node_file: Path
    superlink: str | None
    insecure: bool
    root_certificates: Path | None
    auth_private_key: Path | None
    trusted_entities: Path | None
    partition_id: int | None
    host: str
    port: int | None
    max_retries: int | None
    any_app: bool
    health_seconds: float = 60.0


def check_options(options: NodeOptions) -> NodeFile:
    """Read the owner's file and refuse what would start a node without the protection that its owner expects.

    Raises:
        ConfigError: If the file cannot be used, or options and file do not fit.
    """
    file = options.node_file
    node = read_node_file(file)
    if node.apps and options.any_app:
        raise ConfigError(f"{file} allows {len(node.apps)} app(s), and --any-app allows all: choose one")
    if not node.apps and not options.any_app:
        raise ConfigError(
            f'{file} allows no app: put `allowed = ["DIGEST"]` under [app], with what `fl-dualpriv node hash APP` '
            "prints, or give --any-app to run whatever the server sends, without any budget against it"
        )
    if missing := missing_folders(node):
        raise ConfigError(f"{file} has {missing}")
    if options.insecure and options.root_certificates is not None:
        raise ConfigError("--insecure is without TLS and --root-certificates is for TLS: choose one")
    if options.superlink is None and node.server is None:
        raise ConfigError(
            f"nothing says where the server is: give --superlink HOST:PORT, or [server] with an address in {file}"
        )
    try:
        split_address(options.superlink or "host:1")
    except ValueError as error:
        raise ConfigError(f"--superlink {error}") from error
    return node


def server_of(options: NodeOptions, node: NodeFile) -> NodeServer:
    """How the node reaches its server: the options, and what they leave open as the file says it.

    Raises:
        ConfigError: If nothing says where the server is.
    """
    said = node.server or NodeServer(address=options.superlink or "")
    if options.insecure:  # then nothing of the file's TLS
        said = replace(said, insecure=True, root_certificates=None, private_key=None)
    given = {
        "address": options.superlink,
        "root_certificates": options.root_certificates,
        "private_key": options.auth_private_key,
        "partition_id": options.partition_id,
        "port": options.port,
    }
    return replace(said, **{name: value for name, value in given.items() if value is not None})


def command_line(options: NodeOptions, server: NodeServer, node_config: Path) -> list[str]:
    """The words with which Flower's SuperNode is started."""
    words = ["flower-supernode", "--superlink", server.address, "--node-config", str(node_config)]
    words += ["--host", options.host, "--port", str(server.port)]
    if server.insecure:
        words.append("--insecure")
    for name, value in (
        ("--root-certificates", server.root_certificates),
        ("--auth-supernode-private-key", server.private_key),
        ("--trusted-entities", options.trusted_entities),
        ("--max-retries", options.max_retries),
    ):
        if value is not None:
            words += [name, str(value)]
    return words


def node_config_text(options: NodeOptions, server: NodeServer, device: str = "") -> str:
    """The node configuration that apps get, as TOML: which client this is, its owner's file, and the usable device."""
    # A file, because the words of --node-config take no path with quotes.
    chosen = {"device": device} if device else {}
    return to_toml({"partition-id": server.partition_id, "node-file": str(options.node_file), **chosen})


def start(options: NodeOptions, node: NodeFile) -> None:
    """Run the SuperNode in this process until it ends.

    Guarantee:
        Unless ``any_app`` is set, an app whose bundle is not in the owner's list is refused before any of its code is
        imported (`node.pin.install`), and what Flower loads lies in a folder into which this node alone has unpacked,
        and only such bundles. What remains: whoever may write there all the same, that is other programs of this user
        and the administrator; and other users of this machine, who can reach ``port`` and, since Flower asks them for
        nothing, take a message meant for the app and answer it in its place, but see neither data nor ledger.

    Args:
        options: What the owner says at the start.
        node: What `check_options` read.

    Raises:
        ConfigError: If no record of the owner's data can be used.
        PinUnavailable: If the installed Flower is not one in which the pin holds.
        SystemExit: With Flower's own status, at the end.
    """
    for line in before_joining(node):
        sys.stderr.write(f"{line}\n")
    server = server_of(options, node)
    settle_proxies(server)
    folder = home_of_user() / ".fl-dualpriv" / "nodes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror or error}), and a node keeps Flower's files in it: set HOME to "
            "a folder of this user"
        ) from error
    # Not in /tmp, which systems clean by age. Readable by nobody else (mkdtemp).
    with tempfile.TemporaryDirectory(prefix="node-", dir=folder, ignore_cleanup_errors=True) as home:
        os.environ |= environment(Path(home))
        os.environ.pop(ENVIRONMENT, None)  # the file of this node is named in its configuration
        if not options.any_app:
            node_pin.install(node.apps)
        node_health.install(options.node_file, options.health_seconds)
        device = chosen_device(node)
        config = Path(home) / "node-config.toml"
        config.write_text(node_config_text(options, server, device), encoding="utf-8")

        from flwr.supernode.cli.flower_supernode import flower_supernode

        sys.argv = command_line(options, server, config)
        flower_supernode()


def chosen_device(node: NodeFile) -> str:
    """The owner's device, or the CPU after one line that says why; empty where the owner chose none."""
    device, note = probe(node.device) if node.device else ("", "")
    if note:
        logging.getLogger("flwr").warning("%s", note)
    return device


def environment(home: Path) -> dict[str, str]:
    """Variables for the SuperNode and the processes of its apps, which inherit them."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower starts its own programs by bare name: those of this environment, whatever else is on the path.
        "PATH": programs.search_path(),
    }


def settle_proxies(server: NodeServer) -> None:
    """Let the node and its apps, which talk to each other on this machine, do so without the user's proxies.

    The way to a server elsewhere stays as the user's proxies say.

    Raises:
        ConfigError: If a proxy stands on that way that Flower's client cannot use. Without it the node would go another
            way than its owner has said.
    """
    unusable = [name for name, value in flower_hook.proxy_changes(os.environ).items() if value is None]
    if unusable and not server.is_here:
        raise ConfigError(
            f"{unusable[0]} = {os.environ[unusable[0]]}: Flower's client cannot use a proxy of this kind; install "
            "socksio for socks5://, give an http:// proxy, or unset it"
        )
    flower_hook.reach_loopback_directly(os.environ)
