"""Start Flower's SuperNode for the owner of some data, with the owner's node file and only the apps that it allows.

The SuperNode runs in this process, because the pin (`node.pin`) must check apps where they arrive. Flower unpacks an
app into its home and later loads it from there by name, without a second check. Each node therefore gets its own home,
empty at the start and closed to other users: only bundles that passed the pin are ever unpacked in it.
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
    "--any-app: this node runs any code that its server sends, and against a hostile server it then has no budget at "
    "all: such code can read the data and send it away"
)


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """Options that an owner gives at the start. The node file gives the rest, and the value of an option that is None.

    Attributes:
        node_file: The owner's file.
        superlink: ``HOST:PORT`` of the server.
        insecure: True to connect without TLS, for a SuperLink on this machine.
        root_certificates: PEM file that verifies the server's certificate. None means the system's certificates.
        auth_private_key: SSH key (NIST curve) by which the server knows this node. None means anonymous.
        trusted_entities: Flower's YAML file of publishers. A bundle must then also be signed by one of them.
        partition_id: Number of this node's client in the run, from 0.
        host: Address of the port below. No other machine needs access to it.
        port: TCP port between this node and the processes of its apps. Each node of a machine needs its own.
        max_retries: Attempts to reach the server again. None means no limit.
        any_app: True to start without a pin.
        health_seconds: Seconds between two checks of the node's health.
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
    """Read the owner's file, and refuse options that would start a node without the protection that its owner expects.

    Raises:
        ConfigError: If the file cannot be used, or options and file contradict each other.
    """
    file = options.node_file
    node = read_node_file(file)
    if node.apps and options.any_app:
        raise ConfigError(f"{file} allows {len(node.apps)} app(s), and --any-app allows all: choose one")
    if not node.apps and not options.any_app:
        raise ConfigError(
            f'{file} allows no app: put `allowed = ["DIGEST"]` under [app], with the digest that `fl-dualpriv node '
            "hash APP` prints, or give --any-app to run any app that the server sends, without any budget against it"
        )
    if missing := missing_folders(node):
        raise ConfigError(f"{file} has {missing}")
    if options.insecure and options.root_certificates is not None:
        raise ConfigError("--insecure disables TLS and --root-certificates is for TLS: choose one")
    if options.superlink is None and node.server is None:
        raise ConfigError(
            f"the address of the server is missing: give --superlink HOST:PORT, or [server] with an address in {file}"
        )
    try:
        split_address(options.superlink or "host:1")
    except ValueError as error:
        raise ConfigError(f"--superlink {error}") from error
    return node


def server_of(options: NodeOptions, node: NodeFile) -> NodeServer:
    """Return the connection to the node's server, from the options first and then from the file.

    Raises:
        ConfigError: If neither gives the address of the server.
    """
    server = node.server or NodeServer(address=options.superlink or "")
    if options.insecure:  # then the file's TLS values do not apply
        server = replace(server, insecure=True, root_certificates=None, private_key=None)
    given = {
        "address": options.superlink,
        "root_certificates": options.root_certificates,
        "private_key": options.auth_private_key,
        "partition_id": options.partition_id,
        "port": options.port,
    }
    return replace(server, **{name: value for name, value in given.items() if value is not None})


def command_line(options: NodeOptions, server: NodeServer, node_config: Path) -> list[str]:
    """Return the command line that starts Flower's SuperNode."""
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
    """Return the node configuration for apps as TOML: number of the client, owner's file, and usable device."""
    # The configuration goes into a file, because the words of --node-config accept no path with quotes.
    chosen = {"device": device} if device else {}
    return to_toml({"partition-id": server.partition_id, "node-file": str(options.node_file), **chosen})


def start(options: NodeOptions, node: NodeFile) -> None:
    """Run the SuperNode in this process until it ends.

    Guarantee:
        Unless ``any_app`` is set, an app whose bundle is not in the owner's list is refused before any of its code is
        imported (`node.pin.install`). Flower loads code from a folder into which only this node has unpacked bundles,
        and only bundles in that list. Two risks remain. Other programs of this user and the administrator can still
        write into that folder. Other users of this machine can reach ``port``. Because Flower does not authenticate
        them, they can take a message meant for the app and answer it in its place, but they see neither data nor
        ledger.

    Args:
        options: Options that the owner gives at the start.
        node: Owner's file as `check_options` read it.

    Raises:
        ConfigError: If no record of the owner's data can be used.
        PinUnavailable: If the pin does not hold in the installed Flower.
        SystemExit: At the end, with Flower's own status.
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
            f"{folder} cannot be made ({error.strerror or error}), but a node keeps Flower's files in it: set HOME to "
            "a folder of this user"
        ) from error
    # Not in /tmp, because systems delete old files there. No other user can read the folder (mkdtemp).
    with tempfile.TemporaryDirectory(prefix="node-", dir=folder, ignore_cleanup_errors=True) as home:
        os.environ |= environment(Path(home))
        os.environ.pop(ENVIRONMENT, None)  # the node's configuration names its file
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
    """Return the owner's device, or the CPU after one warning that says why; empty if the owner chose none."""
    device, note = probe(node.device) if node.device else ("", "")
    if note:
        logging.getLogger("flwr").warning("%s", note)
    return device


def environment(home: Path) -> dict[str, str]:
    """Return the variables for the SuperNode and for the processes of its apps, which inherit them."""
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Flower starts its programs by bare name. They must be those of this environment.
        "PATH": programs.search_path(),
    }


def settle_proxies(server: NodeServer) -> None:
    """Let the node and its apps, which talk to each other on this machine, do so without the user's proxies.

    The connection to a server on another machine still uses the user's proxies.

    Raises:
        ConfigError: If Flower's client cannot use a proxy of that connection. Without the proxy the node would take
            another path than its owner has configured.
    """
    unusable = [name for name, value in flower_hook.proxy_changes(os.environ).items() if value is None]
    if unusable and not server.is_here:
        raise ConfigError(
            f"{unusable[0]} = {os.environ[unusable[0]]}: Flower's client cannot use a proxy of this kind; install "
            "socksio for socks5://, give an http:// proxy, or unset it"
        )
    flower_hook.reach_loopback_directly(os.environ)
