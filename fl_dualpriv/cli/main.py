"""The program ``fl-dualpriv`` and its commands. It imports quickly: only the engine loads Flower, Ray and torch."""

import os
import sys
from typing import Any

import typer
from rich.markup import escape

from fl_dualpriv.cli import data as data_command
from fl_dualpriv.cli import node as node_command
from fl_dualpriv.cli.audit import audit
from fl_dualpriv.cli.budget import budget
from fl_dualpriv.cli.console import Output, spell_out_what_cannot_be_shown
from fl_dualpriv.cli.export import export
from fl_dualpriv.cli.job import fail
from fl_dualpriv.cli.new_class import new_learner, new_method, new_strategy
from fl_dualpriv.cli.predict import predict
from fl_dualpriv.cli.report import compare, ls, report
from fl_dualpriv.cli.run import run
from fl_dualpriv.cli.sweep import sweep, table
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.flower import env as flower_env
from fl_dualpriv.flower import hook as flower_hook
from fl_dualpriv.run.user_folders import home, settle_home


class _Front(typer.Typer):
    """Commands for an output of any encoding. Typer prints help before it calls any function of this module."""

    def __call__(self, *words: Any, **named: Any) -> Any:
        spell_out_what_cannot_be_shown()
        return super().__call__(*words, **named)


app = _Front(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(node_command.app, name="node")
app.add_typer(data_command.app, name="data")
app.command()(run)
app.command()(budget)
app.command()(audit)
app.command()(new_strategy)
app.command()(new_method)
app.command()(new_learner)
app.command()(export)
app.command()(predict)
app.command()(report)
app.command()(ls)
app.command()(compare)
app.command()(sweep)
app.command()(table)


@app.callback()
def _root() -> None:
    """Federated prompt learning with differential privacy."""
    errors = Output(stderr=True)
    try:
        note = settle_home()
    except ConfigError as error:
        fail(errors, str(error), 2)
    if note:
        errors.print(f"note: {escape(note)}", soft_wrap=True, highlight=False)


@app.command()
def env() -> None:
    """Print `export` lines for Flower's own commands, for an environment without the hook of `make setup`.

    Then call `flwr run` from an empty folder, because the simulation looks for modules in the working directory first.
    """
    try:
        variables = flower_env.installed()
    except FileNotFoundError:
        folder = home() / ".fl-dualpriv" / "flower"
        try:
            variables = flower_env.for_user(folder)
        except OSError as error:
            fail(
                Output(stderr=True),
                f"{folder} cannot be used: {error.strerror or error}; set HOME to another folder",
                2,
            )
    sys.stdout.write(flower_env.exports(variables | flower_hook.proxy_changes(os.environ)) + "\n")


if __name__ == "__main__":
    app()
