"""Linux control groups: the groups of this process, and the numbers in their files. Standard library only."""

from pathlib import Path


def group_names(file: Path) -> dict[str, str]:
    """Read ``/proc/self/cgroup``.

    Args:
        file: Path of that file; tests give another one.

    Returns:
        The group of this process by controller. The group of version 2 has the empty name as its key. The result is
        empty without the file.
    """
    try:
        lines = [line.split(":", 2) for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {name: parts[2] for parts in lines if len(parts) == 3 for name in parts[1].split(",")}


def and_above(group: str | None) -> list[str]:
    """Return the path of a group and those above it, relative to the root; inside a container only '' exists."""
    if group is None:
        return []
    parts = [part for part in group.split("/") if part]
    return ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def numbers(file: Path, start: str = "") -> list[int]:
    """Return the whole number after ``start`` on each line that begins so; empty if the file cannot be read."""
    words = [line[len(start) :].split() for line in _lines(file) if line.startswith(start)]
    return [int(line_words[0]) for line_words in words if line_words and line_words[0].isdigit()]


def words(file: Path) -> list[str]:
    """Return the words of a file's first line; empty if the file cannot be read."""
    return (_lines(file) or [""])[0].split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
