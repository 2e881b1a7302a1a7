"""Show the progress of a run to its operator: a bar on a terminal, plain lines elsewhere.

The module follows two files: ``rounds.jsonl``, a result, and ``operator/progress.jsonl`` with times and failures.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fl_dualpriv.run.file_kinds import PROGRESS, ROUNDS
from fl_dualpriv.run.tables import epsilon_text, percent

_EVERY_SECONDS = 0.3


class Follower:
    """Reader of the complete lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Return the new lines, parsed. A line that is still being written waits for the next look."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines() if line.strip()]


def round_text(entry: dict[str, Any], failures: int = 0) -> str:
    """Return a text with accuracy and spent ε from one line of ``rounds.jsonl``, and with the failed client calls."""
    parts = []
    if entry["accuracy"] is not None:
        parts.append(
            f"local {percent(entry['accuracy']['local'])}, neighbour {percent(entry['accuracy']['neighbour'])}"
        )
    spent = [
        f"{epsilon_text(entry['epsilon'][key])} ({unit})"
        for key, unit in (("record_level", "record"), ("client_level", "client"))
        if entry["epsilon"][key] is not None
    ]
    if spent:
        parts.append("ε " + ", ".join(spent))
    if failures:
        parts.append(f"[red]{failures} failed[/red]")
    return " · ".join(parts)


@contextlib.contextmanager
def shown(console: Console, folder: Path, rounds: int) -> Iterator[None]:
    """Show the rounds that a run reports in its folder while the body runs, and the last ones after it.

    Args:
        console: Output for the progress: a bar if it is a terminal, else one line per round.
        folder: Folder of the run. Its files may not exist yet.
        rounds: Number of rounds of the whole run.
    """
    results, operators = Follower(folder / ROUNDS), Follower(folder / PROGRESS)
    told: dict[int, dict[str, Any]] = {}
    bar = Progress(
        TextColumn("round {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=rounds)

    def look() -> None:
        entries = results.new()
        told.update({line["round"]: line for line in operators.new()})  # read last, because results are written later
        for entry in entries:
            progress_line = told.get(entry["round"], {})
            text = round_text(entry, progress_line.get("failures", 0))
            bar.update(task, completed=entry["round"], description=text)
            if not console.is_terminal:
                seconds = f" · {progress_line['seconds']:.1f} s" if progress_line else ""
                # soft_wrap, because a pipe has no width at which to break lines
                console.print(f"round {entry['round']}/{rounds}{seconds} · {text}", soft_wrap=True)

    done = threading.Event()

    def follow() -> None:
        while not done.wait(_EVERY_SECONDS):
            look()

    thread = threading.Thread(target=follow, daemon=True, name="progress")
    with bar:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            look()
