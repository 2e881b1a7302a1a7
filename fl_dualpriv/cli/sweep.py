"""``fl-dualpriv sweep`` and ``fl-dualpriv table``: the runs of a sweep file, and the table of their results."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fl_dualpriv.cli.console import Output
from fl_dualpriv.cli.job import fail
from fl_dualpriv.errors import ConfigError, PrivacyError
from fl_dualpriv.run.cpus import usable_cpus

SweepFile = Annotated[Path, typer.Argument(metavar="FILE", help="Sweep file, TOML.")]
Runs = Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/NAME-OF-THE-FILE.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of every cell; may be repeated.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds, from the first. Default: all.")]
App = Annotated[Path | None, typer.Option("--app", help="Folder of the Flower app. Default: the one around FILE.")]


class Format(StrEnum):
    """Form of a table."""

    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"


def sweep(
    file: SweepFile,
    assignments: Sets = None,
    runs: Runs = None,
    app_dir: App = None,
    seeds: Seeds = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cells at once. Default: the usable cores.")] = None,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of one cell; a fraction shares a GPU.")] = 0.0,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Existing Ray cluster; auto takes RAY_ADDRESS.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print all cells, their cost and what is missing; run nothing.")
    ] = False,
) -> None:
    """Run all cells of a sweep file that are not finished, in parallel, and print the table.

    All cells are checked before the first one starts. A sweep that was cut off goes on when it is started again.
    """
    from fl_dualpriv.cli.sweeping import open_sweep, run_sweep  # late: it loads the accountants

    console, errors = Output(), Output(stderr=True)
    try:
        opened = open_sweep(file, runs, app_dir, assignments or (), seeds)
        at_once = workers or usable_cpus()
        failed = run_sweep(opened, console, workers=at_once, gpus=gpus, ray_address=ray_address, dry_run=dry_run)
    except KeyboardInterrupt:
        fail(errors, "stopped; the finished cells stay: start the same command again to go on", 130)
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    if failed:
        listed = "\n  ".join(f"{label}: {reason}" for label, reason in failed)
        fail(errors, f"{len(failed)} cells failed:\n  {listed}", 1)


def table(
    file: SweepFile,
    assignments: Sets = None,
    runs: Runs = None,
    app_dir: App = None,
    seeds: Seeds = None,
    form: Annotated[Format, typer.Option("--format", help="Form of the table.")] = Format.MARKDOWN,
    out: Annotated[Path | None, typer.Option(help="File for the table; Markdown files get a heading.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all numbers, with command, commit and seeds.")
    ] = None,
) -> None:
    """Print the table of the finished cells of a sweep; nothing is run."""
    from fl_dualpriv.cli.sweeping import open_sweep, print_table  # late: it loads the accountants

    console, errors = Output(), Output(stderr=True)
    try:
        opened = open_sweep(file, runs, app_dir, assignments or (), seeds)
        options = "".join(f" --set {shlex.quote(word)}" for word in assignments or ())
        options += "" if seeds is None else f" --seeds {seeds}"
        print_table(console, opened, form.value, out, json_file, options)
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
