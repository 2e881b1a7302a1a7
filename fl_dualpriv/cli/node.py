"""``fl-dualpriv node``: check and start a node for the owner of some data; print the digest of an app it may run.

The module imports quickly: only a node loads Flower and torch.
"""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

from fl_dualpriv.cli.console import Output
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower.app_bundle import load_bundle, read_bundle
from fl_dualpriv.node.pin import PinUnavailable

_PIPE_WIDTH = 160  # a log has no width
app = typer.Typer(no_args_is_help=True, help="Run a node for the owner of some data, with the owner's limits.")


@app.command()
def start(
    node_file: Annotated[Path, typer.Argument(metavar="NODE.toml", help="The owner's file: folder, budget, apps.")],
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The server. Default: [server] of NODE.toml.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS, for a server on this machine.")] = False,
    root_certificates: Annotated[
        Path | None, typer.Option(help="PEM file that verifies the server's certificate. Default: the system's.")
    ] = None,
    auth_private_key: Annotated[
        Path | None,
        typer.Option("--auth-supernode-private-key", help="SSH key by which the server knows this node."),
    ] = None,
    trusted_entities: Annotated[
        Path | None, typer.Option(help="Flower's YAML file of publishers; one of them must also have signed the app.")
    ] = None,
    partition_id: Annotated[
        int | None, typer.Option(min=0, help="Number of this node's client in the run. Default: NODE.toml's, or 0.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address of --port.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="TCP port for this node's apps. Default: NODE.toml's, or 9094."),
    ] = None,
    max_retries: Annotated[
        int | None, typer.Option(min=0, help="Attempts to reach the server again. Default: no limit.")
    ] = None,
    any_app: Annotated[
        bool, typer.Option("--any-app", help="Run any code that the server sends: then no budget holds against it.")
    ] = False,
    health_seconds: Annotated[
        float, typer.Option(min=1.0, help="Seconds between two checks of the node's health; changes are logged.")
    ] = 60.0,
) -> None:
    """Start Flower's SuperNode with the owner's limits. It refuses an app that NODE.toml does not allow before it runs.

    Exit status: 2 if the node was not started, else Flower's.
    """
    from fl_dualpriv.node import start as node_start

    options = node_start.NodeOptions(
        node_file=node_file.absolute(),
        superlink=superlink,
        insecure=insecure,
        root_certificates=root_certificates,
        auth_private_key=auth_private_key,
        trusted_entities=trusted_entities,
        partition_id=partition_id,
        host=host,
        port=port,
        max_retries=max_retries,
        any_app=any_app,
        health_seconds=health_seconds,
    )
    console = Output(stderr=True)
    try:
        node = node_start.check_options(options)
        if any_app:
            console.print(f"[bold yellow]warning:[/bold yellow] {node_start.ANY_APP}", soft_wrap=True, highlight=False)
        if node.budget is None:
            console.print(
                f"[bold yellow]warning:[/bold yellow] {escape(str(node_file))} has no \\[budget]: only the "
                "configuration of each run limits what leaves",
                soft_wrap=True,
                highlight=False,
            )
        node_start.start(options, node)
    except (ConfigError, PinUnavailable) as error:
        _exit(console, str(error))


@app.command()
def check(
    node_file: Annotated[Path, typer.Argument(metavar="NODE.toml", help="The owner's file, with a [server].")],
    offline: Annotated[bool, typer.Option("--offline", help="Do not try to reach the server.")] = False,
) -> None:
    """Check data, model, budget, certificate, clock and port before joining. Nothing is sent and nothing joined.

    Exit status: 0 if the node can start, else 1.
    """
    from fl_dualpriv.node import check as node_check
    from fl_dualpriv.node.file import read_node_file

    errors, console = Output(stderr=True), Output(pipe_width=_PIPE_WIDTH)
    try:
        node = read_node_file(node_file.absolute())
    except ConfigError as error:
        _exit(errors, str(error), 1)
    table = Table(show_header=False)
    colours, bad = {"good": "green", "note": "yellow", "bad": "bold red"}, 0
    for finding in node_check.check(node, node.server, offline=offline):
        colour = colours[finding.verdict]
        table.add_row(finding.what, f"[{colour}]{finding.verdict}[/{colour}]", escape(finding.says))
        bad += finding.verdict == "bad"
    console.print(table, highlight=False)
    if bad:
        _exit(errors, f"{bad} of the above must be put right before this node can join", 1)


@app.command("hash")
def hash_app(
    source: Annotated[Path, typer.Argument(metavar="APP_DIR_OR_FAB", help="An app's folder, or a .fab file.")],
) -> None:
    """Print the digest to put into NODE.toml: SHA-256 of the app's bundle, built here if a folder is given.

    The digest is Flower's fab-hash of the run. Read the app before you allow it: the digest identifies the app, but
    does not show that it is harmless.
    """
    notes = Output(stderr=True)
    try:
        content = load_bundle(source)
        bundle = read_bundle(content)
    except ConfigError as error:
        _exit(notes, str(error))
    sys.stdout.write(bundle.digest + "\n")
    sys.stdout.flush()
    notes.print(
        f"{bundle.app_id} {bundle.version}: {len(bundle.files)} files, {len(content)} bytes. The digest is SHA-256 of "
        "the bundle, the same as Flower's fab-hash, whose first eight digits are in the names of files and folders. In "
        "NODE.toml:",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    notes.print(f'[app]\nallowed = ["{bundle.digest}"]', markup=False, highlight=False, soft_wrap=True)


def _exit(console: Output, message: str, status: int = 2) -> NoReturn:
    console.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(status)
