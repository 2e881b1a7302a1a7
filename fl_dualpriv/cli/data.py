"""``fl-dualpriv data``: standard data sets, and a check of one's own data before a run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fl_dualpriv.cli.console import Output
from fl_dualpriv.cli.job import described, fail
from fl_dualpriv.data.standard import STANDARD
from fl_dualpriv.errors import ConfigError, PrivacyError

app = typer.Typer(no_args_is_help=True, help="Standard data sets, and a check of your own data before a run.")


@app.command("list")
def list_data() -> None:
    """List the standard data sets and the scripts that make their folders from what their owners distribute."""
    table = Table(box=None, pad_edge=False)
    for column in ("data set", "classes", "domains", "owners' page", "script (in the repository)"):
        table.add_column(column, overflow="fold")
    for data in STANDARD:
        command = f"python -m tools.data.{data.module}"
        table.add_row(data.name, str(data.classes), str(data.domains or "-"), escape(data.page), escape(command))
    Output(pipe_width=180).print(table)


@app.command("check")
def check(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, as for `fl-dualpriv run`.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated.")
    ] = None,
    app_dir: Annotated[
        Path | None, typer.Option("--app", help="Folder of the Flower app. Default: the one around CONFIG.")
    ] = None,
) -> None:
    """Describe the data of a run as it would read them: counts, clients, files that it skips or cannot use.

    Nothing is started or written. The exit status is 2 if the run would be refused.
    """
    console, errors = Output(pipe_width=180), Output(stderr=True)
    try:
        job = described(config, assignments or [], None, app_dir)
    except (ConfigError, PrivacyError) as error:
        fail(errors, str(error), 2)
    for line in job.data:
        console.print(escape(line), soft_wrap=True, highlight=False)
