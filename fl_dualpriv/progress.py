"""Shows a run while it goes on, by following its ``rounds.jsonl``: a bar on a terminal, plain lines elsewhere."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fl_dualpriv.tables import epsilon_text, percent

_EVERY_SECONDS = 0.3


class Follower:
    """Reads the whole lines that were added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """The new lines, parsed. A line that is still being written waits for the next look."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines() if line.strip()]


def round_text(entry: dict[str, Any]) -> str:
    """Accuracy, ε spent so far and failures of one line of ``rounds.jsonl``."""
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
    if entry["failures"]:
        parts.append(f"[red]{entry['failures']} failed[/red]")
    return " · ".join(parts)


@contextlib.contextmanager
def shown(console: Console, rounds_file: Path, rounds: int) -> Iterator[None]:
    """Show the rounds that are appended to ``rounds_file`` while the body runs, and the last ones after it.

    Args:
        console: Where to; a bar if it is a terminal, else one line a round.
        rounds_file: JSON lines; may not exist yet.
        rounds: Number of rounds of the whole run.
    """
    follower = Follower(rounds_file)
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
        for entry in follower.new():
            text = round_text(entry)
            bar.update(task, completed=entry["round"], description=text)
            if not console.is_terminal:
                # soft_wrap: a pipe has no width to fold lines at
                console.print(f"round {entry['round']}/{rounds} · {entry['seconds']:.1f} s · {text}", soft_wrap=True)

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
