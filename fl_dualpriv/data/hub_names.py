"""The meaning of ``datasets:NAME``, before the library of that name is loaded. Standard library only."""

from pathlib import Path

HUB = "datasets:"
PARQUET = ".parquet"
_SAVED = ("dataset_dict.json", "state.json")
"""Marks of ``DatasetDict.save_to_disk`` and of ``Dataset.save_to_disk``."""


def source_and_configuration(name: str) -> tuple[str, str]:
    """``NAME#CONFIGURATION`` in two; a path that exists is a name as a whole."""
    if Path(name).expanduser().exists():
        return name, ""
    source, _, configuration = name.partition("#")
    return source, configuration


def absolute_name(name: str, base: Path) -> str:
    """Make a path from ``base`` absolute; any other name does not change, because the hub knows it.

    Args:
        name: Without ``datasets:``.
        base: Folder in which the user typed it.
    """
    path = base / Path(name).expanduser()
    if path.exists():
        return str(path)
    source, mark, configuration = name.partition("#")
    path = base / Path(source).expanduser()
    return f"{path}{mark}{configuration}" if path.exists() else name


def is_saved(folder: Path) -> bool:
    """True if the library of data sets saved this folder."""
    return any((folder / mark).is_file() for mark in _SAVED)


def hub_name(path: str) -> str | None:
    """The name that the library is asked for; None if ``data.path`` names files of questions.

    A folder that the library saved and a parquet file need no ``datasets:`` in front.
    """
    if path.startswith(HUB):
        return path.removeprefix(HUB)
    place = Path(path).expanduser()
    return path if is_saved(place) or (place.suffix.lower() == PARQUET and place.is_file()) else None
