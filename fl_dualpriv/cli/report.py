"""``fl-dualpriv report``, ``ls`` and ``compare``: look at finished runs. They load no torch."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from fl_dualpriv.cli.console import Output
from fl_dualpriv.cli.job import fail
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes
from fl_dualpriv.report.figures import write_figures
from fl_dualpriv.report.page import page
from fl_dualpriv.report.runs import Run, differences, find_runs, grouped, read_run
from fl_dualpriv.run.file_kinds import REPORT, path_of
from fl_dualpriv.run.tables import KINDS, epsilon_text, percent, points


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file. Default: report.html in the folder of one run, or here.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for PDF and SVG figures as well.")] = None,
    governance: Annotated[
        bool, typer.Option("--governance", help="Add a section for people who decide about the data.")
    ] = False,
) -> None:
    """Write one HTML file about one run or several: results against free rivals, clients, ε in words, cost."""
    console, errors = Output(), Output(stderr=True)
    try:
        runs = [read_run(folder) for folder in folders]
        target = out or (path_of(folders[0], REPORT, "result") if len(folders) == 1 else Path(REPORT))
        try:
            write_bytes(target, page(runs, governance=governance).encode())
            written = [] if figures is None else write_figures(figures, grouped(runs))
        except OSError as error:
            where = error.filename or target
            raise ConfigError(
                f"{where} cannot be written: {error.strerror or error}; give --out or --figures"
            ) from error
        console.print(f"report: {escape(str(target))}", soft_wrap=True, highlight=False)
        if figures is not None:
            names = ", ".join(file.name for file in written)
            console.print(f"figures: {escape(str(figures))}: {names}", soft_wrap=True, highlight=False)
    except ConfigError as error:
        fail(errors, str(error), 2)


def ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"),
) -> None:
    """List the runs of a folder: method, ε, seed, local accuracy, gain over the free rival."""
    console, errors = Output(), Output(stderr=True)
    paths = list(find_runs(folder))
    if not paths:
        fail(errors, f"{folder} holds no run; give the folder above the folders of runs", 2)
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("run", "method", "ε", "seed", "local", "gain over the free rival"):
        table.add_column(head, overflow="fold", justify="right" if head in ("ε", "seed", "local") else "left")
    for path in paths:
        try:
            run = read_run(path)
        except ConfigError as error:
            table.add_row(escape(path.name), escape(str(error).removeprefix(f"{path}: ")), "", "", "", "")
            continue
        method, seed, local = escape(run.summary["method"]), str(run.summary["seed"]), run.score("final", "local")
        gain = f"{run.gain()} points"
        table.add_row(escape(path.name), method, epsilon_text(run.epsilon), seed, percent(local), gain)
    console.print(table)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a finished run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another one.")],
) -> None:
    """Print the differences of two runs: their configurations and their results."""
    console, errors = Output(), Output(stderr=True)
    try:
        runs = [read_run(folder) for folder in (first, second)]
    except ConfigError as error:
        fail(errors, str(error), 2)
    _print_differences(console, runs)
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("accuracy", "A", "B", "B - A, points"):
        table.add_column(head, justify="left" if head == "accuracy" else "right")
    for kind in KINDS:
        a, b = (run.score("final", kind) for run in runs)
        table.add_row(kind.replace("_", " "), percent(a), percent(b), points(a, b))
    table.add_row("gain over the free rival", *(run.gain() for run in runs), "")
    table.add_row("ε", *(epsilon_text(run.epsilon) for run in runs), "")
    console.print(table)


def _print_differences(console: Output, runs: list[Run]) -> None:
    console.print("A: " + escape(str(runs[0].folder)) + "\nB: " + escape(str(runs[1].folder)), soft_wrap=True)
    changed = differences(runs)
    if not changed:
        console.print("the configurations are the same, apart from seed and folder")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("key", "A", "B"):
        table.add_column(head, overflow="fold")
    for key, (a, b) in changed.items():
        table.add_row(escape(key), escape(str(a)), escape(str(b)))
    console.print(table)
