"""The work of ``fl-dualpriv sweep`` and ``table``.

It loads the accountants, so the commands import it when they are called.
"""

import functools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.markup import escape

from fl_dualpriv.cli.console import Output
from fl_dualpriv.cli.job import find_app, settled
from fl_dualpriv.config.ranges import ConfigValue
from fl_dualpriv.config.schema import app_defaults, merge, parse_assignment
from fl_dualpriv.errors import ConfigError
from fl_dualpriv.files import write_bytes, write_json
from fl_dualpriv.run.cluster import cluster_address, counted
from fl_dualpriv.sweep import table as tables
from fl_dualpriv.sweep.cells import Cell, Settle, cells_of
from fl_dualpriv.sweep.document import Document, describe, read_sweep
from fl_dualpriv.sweep.missing import Missing, missing_things, uses_made_data
from fl_dualpriv.sweep.tuning import Choice, Choices, Entry, choose, entries_of, finals_of

Form = Literal["markdown", "latex", "csv"]
"""Form of a table."""


@dataclass(frozen=True, kw_only=True)
class OpenSweep:
    """A sweep whose file was read, with its app and the folder of its runs."""

    document: Document
    app_dir: Path
    runs: Path
    settle: Settle

    @functools.cached_property
    def entries(self) -> list[Entry]:
        """Trials of all rows that are tuned."""
        return entries_of(self.document, self.settle)


def open_sweep(
    file: Path,
    runs: Path | None = None,
    app_dir: Path | None = None,
    assignments: Sequence[str] = (),
    seeds: int | None = None,
) -> OpenSweep:
    """Read a sweep file.

    Args:
        file: The file.
        runs: Folder of the runs; None takes one with the name of the file in the working directory.
        app_dir: Folder of the app; None takes the one around the file.
        assignments: ``KEY=VALUE`` for every cell.
        seeds: Number of seeds, from the first; None takes all.

    Raises:
        ConfigError: If the file or an assignment has problems, or there is no app around the file.
    """
    document = read_sweep(file).cut(dict(map(parse_assignment, assignments)), seeds)
    app = find_app(file) if app_dir is None else app_dir.resolve()
    defaults = app_defaults(app)

    def settle(base: Path, keys: Mapping[str, ConfigValue]) -> dict[str, ConfigValue]:
        return settled(merge(defaults, keys), defaults, app, base)[0]

    return OpenSweep(document=document, app_dir=app, runs=(runs or Path("runs") / file.stem).absolute(), settle=settle)


def run_sweep(
    opened: OpenSweep, console: Output, *, workers: int, gpus: float, ray_address: str | None, dry_run: bool
) -> list[tuple[str, str]]:
    """Check all cells, then run the unfinished ones and print the table, or print the plan.

    Args:
        opened: The sweep.
        console: Output for progress and table.
        workers: Cells at once on this machine.
        gpus: GPUs of one cell.
        ray_address: Address of a Ray cluster; None takes the one of the configuration.
        dry_run: True to print the plan only.

    Returns:
        The cells that failed, with their reasons.

    Raises:
        ConfigError: If cells are not valid, or something is missing.
    """
    # A cell that is valid with the first trial as its choice is valid with any other trial.
    entries = opened.entries
    first = {entry.key: entry.trials[0].tuned for entry in entries}
    cells = cells_of(opened.document, opened.settle, first)
    trials = [cell for entry in entries for cell in entry.trials]
    lacking = missing_things([*trials, *cells])
    if dry_run:
        _show_plan(console, opened, entries, cells, lacking, workers)
        return []
    if fatal := [thing.text for thing in lacking if not thing.is_downloaded]:
        raise ConfigError("\n  ".join(["no cell was started, because something is missing:", *fatal]))
    addresses = {str(cell.settings["resources.ray-address"]) for cell in [*trials, *cells]}
    if ray_address is None and len(addresses) > 1:
        raise ConfigError(
            f"resources.ray-address differs between cells: {', '.join(sorted(addresses))}; a sweep has one cluster, "
            "give it with --ray-address"
        )
    address = cluster_address(ray_address if ray_address is not None else addresses.pop())
    signal.signal(signal.SIGTERM, _terminated)
    failed = _run_all(console, opened, entries, workers, gpus, address)
    print_table(console, opened)
    return failed


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _run_all(
    console: Output, opened: OpenSweep, entries: Sequence[Entry], workers: int, gpus: float, address: str
) -> list[tuple[str, str]]:
    """Run the trials, the finalists and the cells of the table, and return the cells that failed with their reasons."""
    from fl_dualpriv.sweep.schedule import Ended, Resources, run_cells  # late: Ray takes seconds to load

    resources = Resources(workers=workers, gpus=gpus, address=address)
    all_ended: list[Ended] = []

    def stage(what: str, cells: Sequence[Cell], *, are_trials: bool) -> None:
        unique = {cell.folder: cell for cell in cells}
        there = sum(cell.is_done(opened.runs) for cell in unique.values())
        console.print(f"{what}: {len(unique)} runs, {there} finished before", highlight=False)
        total = len(unique)

        def report(ended: Ended, left: int, seconds: float | None) -> None:
            result = f"failed: {ended.error}" if ended.error else _result(ended.cell, opened.runs)
            time_left = f"; about {_duration(seconds)} left" if left and seconds else ""
            console.print(
                escape(f"[{total - left}/{total}] {ended.cell.label}: {result} ({ended.seconds:.0f} s){time_left}"),
                soft_wrap=True,
                highlight=False,
            )

        all_ended.extend(run_cells(cells, opened.runs, opened.app_dir, resources, report, are_trials=are_trials))

    if entries:
        stage("trials", [cell for entry in entries for cell in entry.trials], are_trials=True)
        finals = [cell for entry in entries for cell in finals_of(opened.document, opened.settle, entry, opened.runs)]
        if finals:
            stage("finalists", finals, are_trials=True)
        for (name, point), choice in _choices(opened, entries).items():
            console.print(escape(f"  {name}{describe(point)}: {choice.sentence()}"), soft_wrap=True, highlight=False)
    stage("table", cells_to_run(opened, entries), are_trials=False)
    if all_ended:
        used = counted(ended.machine for ended in all_ended)
        console.print(f"runs by machine: {used}", highlight=False, soft_wrap=True)
    return [
        (ended.cell.label, ended.error) for ended in all_ended if ended.error and not ended.cell.has_failed(opened.runs)
    ]


def _choices(opened: OpenSweep, entries: Sequence[Entry]) -> dict[tuple[str, tuple], Choice]:
    """Return the choices of the entries whose trials have all ended."""
    choices = {}
    for entry in entries:
        if all(cell.is_done(opened.runs) for cell in entry.trials):
            finals = finals_of(opened.document, opened.settle, entry, opened.runs)
            if all(cell.is_done(opened.runs) for cell in finals):
                choices[entry.key] = choose(entry, finals, opened.runs)
    return choices


def _known_finals(opened: OpenSweep, entries: Sequence[Entry]) -> list[Cell]:
    """Return the runs of finalists of the entries whose trials have all ended."""
    return [
        cell
        for entry in entries
        if all(trial.is_done(opened.runs) for trial in entry.trials)
        for cell in finals_of(opened.document, opened.settle, entry, opened.runs)
    ]


def cells_to_run(opened: OpenSweep, entries: Sequence[Entry]) -> list[Cell]:
    """Return the cells of the table with the chosen values; a row that is not chosen yet has none."""
    choices = _choices(opened, entries)
    cells = cells_of(opened.document, opened.settle, {key: choice.tuned for key, choice in choices.items()})
    waiting = {entry.key for entry in entries} - set(choices)
    return [cell for cell in cells if (cell.row.name, cell.point) not in waiting]


def _result(cell: Cell, runs: Path) -> str:
    summary = cell.summary(runs)
    return "no summary" if summary is None else f"local {100 * summary['accuracy']['final']['local']:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_plan(
    console: Output,
    opened: OpenSweep,
    entries: Sequence[Entry],
    cells: Sequence[Cell],
    lacking: Sequence[Missing],
    workers: int,
) -> None:
    """Print the cells, their cost and what is missing."""
    document = opened.document
    for cell in {(cell.row.name, cell.point): cell for cell in cells}.values():
        tuned = f"; tunes {', '.join(key for key, _ in cell.tuned)}" if cell.tuned else ""
        console.print(
            escape(f"  {cell.row.name}{describe(cell.point)}: seeds {', '.join(map(str, document.seeds))}{tuned}"),
            soft_wrap=True,
            highlight=False,
        )
    tune = document.tune
    trials = [cell for entry in entries for cell in entry.trials]
    finals = len(entries) * tune.finalists * (len(tune.seeds) - 1) if tune and entries else 0
    # What is known of finalists and choices already; the others are counted as runs that are left.
    known = [*trials, *_known_finals(opened, entries), *cells_to_run(opened, entries)]
    ended = {cell.folder: cell for cell in known if cell.is_done(opened.runs)}.values()
    runs = len(cells) + len(trials) + finals
    summaries = [cell.summary(opened.runs) for cell in ended if not cell.has_failed(opened.runs)]
    times = [float(summary["seconds"]) for summary in summaries if summary is not None]
    console.print(f"{len(cells)} cells, {len(trials)} trials, {finals} runs of finalists; {len(ended)} finished")
    if times:
        left = (runs - len(ended)) * sum(times) / len(times) / workers
        console.print(f"cost: about {_duration(left)} with {workers} at once, as the finished runs took")
    else:
        console.print(f"cost: no run has finished, so the time is not known; {runs} runs, {workers} at once")
    console.print("missing here: " + ("nothing" if not lacking else ""), highlight=False)
    for thing in lacking:
        console.print(escape(f"  {thing.text}"), soft_wrap=True, highlight=False)


def print_table(
    console: Output,
    opened: OpenSweep,
    form: Form = "markdown",
    out: Path | None = None,
    json_file: Path | None = None,
    options: str = "",
) -> None:
    """Print the table of the finished cells, and write the files that are asked for.

    Args:
        console: Output.
        opened: The sweep.
        form: Form of the table.
        out: File for the table.
        json_file: File for all numbers.
        options: Options of the commands that made the table, with a space in front, for the files.

    Raises:
        ConfigError: If no cell has finished, the form does not exist for this table, or a file cannot be written.
    """
    entries = opened.entries
    choices: Choices = _choices(opened, entries)
    cells = cells_to_run(opened, entries)
    document = opened.document
    if uses_made_data(cells):
        document = replace(document, made_data=True)
    done = tables.finished(cells, opened.runs)
    if not done:
        raise ConfigError(f"no cell of {document.file} has finished in {opened.runs}; run `fl-dualpriv sweep` first")
    lines = tables.lines_of(document, done)
    wanted = len(document.points) * len(document.rows) * len(document.seeds)
    missing = wanted - sum(len(summaries) for summaries in done.values())
    make = {"markdown": tables.markdown, "latex": tables.latex, "csv": tables.comma_separated}[form]
    text = make(document, lines)
    words = f"{os.path.relpath(document.file, opened.app_dir)}{options}"
    command = f"fl-dualpriv sweep {words} && fl-dualpriv table {words}"
    try:
        if out is not None:
            whole = tables.page(document, lines, missing, command) if form == "markdown" else text + "\n"
            write_bytes(out, whole.encode())
        if json_file is not None:
            content = tables.content_of(document, lines, choices, missing)
            whole_command = f"{command} --json {os.path.relpath(json_file, opened.app_dir)}"
            write_json(json_file, {"command": whole_command, "commit": _commit(opened)} | content)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out or json_file} cannot be written: {error.strerror or error}; give another file"
        ) from error
    if document.made_data:
        console.print("made data, not comparable", highlight=False)
    console.print(escape(text), soft_wrap=True, highlight=False)
    if missing:
        console.print(f"not finished: {missing} runs are missing", highlight=False)


def _commit(opened: OpenSweep) -> str:
    """Return the commit of the app's checkout; empty if it is none."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=opened.app_dir, capture_output=True, text=True, check=False)
    return done.stdout.strip()
