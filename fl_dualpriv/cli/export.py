"""``fl-dualpriv export``: write a prompt of a finished run as a file that says how to use it and what it reveals.

It imports quickly, as `cli.main` does.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fl_dualpriv.cli.console import Output
from fl_dualpriv.errors import ConfigError, PrivacyError


class Level(StrEnum):
    """Level of a guarantee: it hides the presence of one record, or of one client."""

    RECORD = "record"
    CLIENT = "client"


def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or a node's state folder.")],
    client: Annotated[str, typer.Option(metavar="I|global", help="Owner of the prompt: a client's number, or global.")],
    out: Annotated[
        Path | None, typer.Option(help="File, .safetensors. Default: RUN-client-I.safetensors in this folder.")
    ] = None,
    level: Annotated[
        Level | None, typer.Option(help="State only this level's guarantee, if another level does not cover it.")
    ] = None,
    not_private: Annotated[
        bool, typer.Option("--not-private", help="Publish a prompt without differential privacy, and say so in it.")
    ] = False,
    allow_reproducible_noise: Annotated[
        bool, typer.Option("--allow-reproducible-noise", help="Publish although the noise comes from a seed.")
    ] = False,
    backbone: Annotated[
        str | None, typer.Option(help="The model, if it is stored elsewhere now; its weights must be the same.")
    ] = None,
    pretrained: Annotated[str, typer.Option(help="Weights of --backbone.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file and its card.")] = False,
) -> None:
    """Write a client's prompt, as the run scored it, or the global prompt, with its model card beside it.

    Exit status: 0, or 2 if the prompt is not published. Then no file is written.
    """
    errors = Output(stderr=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, as in a run
    from fl_dualpriv.publish import rules as publishing  # late: torch takes seconds
    from fl_dualpriv.publish.file import card_path, write_published

    try:
        who = _whose(client)
        target = out or Path(publishing.file_name(folder, who))
        used = [path for path in (target, card_path(target)) if path.exists()]
        if used and not overwrite:
            raise ConfigError(f"{used[0]} exists: give another --out, or --overwrite to replace it")
        if pretrained and backbone is None:
            raise ConfigError(f"--pretrained {pretrained}: name the model with --backbone too")
        published = publishing.publish(
            folder,
            who,
            level=None if level is None else level.value,
            not_private=not_private,
            allow_reproducible_noise=allow_reproducible_noise,
            backbone=None if backbone is None else (backbone, pretrained),
            device=device,
        )
        write_published(target, published)
    except (ConfigError, PrivacyError, OSError) as error:
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None
    console = Output()
    for line in (*published.facts.lines, *(f"note: {note}" for note in published.facts.notes)):
        console.print(escape(line), soft_wrap=True, highlight=False)
    console.print(escape(f"{target} and {card_path(target)}"), soft_wrap=True, highlight=False)


def _whose(client: str) -> int | None:
    if client == "global":
        return None
    if not (client.isascii() and client.isdecimal() and len(client) < 10):
        raise ConfigError(f"--client {client}: give a client's number, or global")
    return int(client)
